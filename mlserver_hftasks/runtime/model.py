"""The MLServer runtime: the life of one model, and the edge where errors become MLServer's."""

from __future__ import annotations

import asyncio
import ctypes
import functools
import gc
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import mlserver
from mlserver.types import InferenceRequest, InferenceResponse, MetadataModelResponse, ResponseOutput

from mlserver_hftasks.engine.batcher import Batcher
from mlserver_hftasks.engine.cost import CostModel
from mlserver_hftasks.engine.scheduler import Scheduler
from mlserver_hftasks.engine.warmup import warm_up
from mlserver_hftasks.errors import ForwardFailed, HFTasksError, Unavailable
from mlserver_hftasks.loading import Served, load, probe_rows
from mlserver_hftasks.loading.threads import set_torch_threads
from mlserver_hftasks.metrics import ModelMetrics
from mlserver_hftasks.runtime.configuration import limits_of, settings_of, take_over_batching
from mlserver_hftasks.runtime.metadata import described
from mlserver_hftasks.runtime.server import as_mlserver_error, limit_body, prepare_server
from mlserver_hftasks.runtime.service import Service
from mlserver_hftasks.settings import Settings

logger = logging.getLogger("mlserver.hftasks")

DRAIN_SECONDS = 30.0
"""How long an unload waits for the requests in flight."""

_loading = threading.Lock()
"""transformers keeps state of the process while it loads a model."""


class HFTasksRuntime(mlserver.MLModel):
    """Serves one Hugging Face model for one task; `docs/settings.md` lists `parameters.extra`."""

    def __init__(self, settings: mlserver.ModelSettings) -> None:
        prepare_server()
        try:
            self._hf_settings = settings_of(settings)
        except HFTasksError as error:
            raise as_mlserver_error(error) from None
        take_over_batching(settings)
        limit_body(settings.name, self._hf_settings.max_body_bytes)
        super().__init__(settings)
        self._served: Served | None = None
        self._service: Service | None = None
        self._in_flight = 0
        self._drained = asyncio.Event()

    # -- life ------------------------------------------------------------------------------------

    async def load(self) -> bool:
        """Load the model off the event loop, warm it up, start its device thread."""
        settings, cost = self._hf_settings, CostModel()
        try:
            served = await asyncio.to_thread(_load, settings, cost)
        except HFTasksError as error:
            raise as_mlserver_error(error) from None
        self._metrics = ModelMetrics(self.name, self.version)
        batcher = Batcher(
            served.backend,
            Scheduler(limits_of(settings), cost, padded=served.backend.padded),
            on_thread_start=functools.partial(set_torch_threads, settings),
            observe=self._metrics.batch_ran,
            observe_queue=self._metrics.queued,
            name=self.name,
        )
        self._served, self._service = served, Service(served.task, batcher, settings.timeout_ms)
        self._log_loaded(served, cost)
        return True

    async def unload(self) -> bool:
        """Answer what is in flight, then give the memory back."""
        service, served = self._service, self._served
        self._service = self._served = None
        if service is None or served is None:
            return True
        if self._in_flight:
            self._drained.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._drained.wait(), DRAIN_SECONDS)
        await service.batcher.close()
        served.backend.close()
        del served, service
        await asyncio.to_thread(_give_memory_back)
        return True

    async def metadata(self) -> MetadataModelResponse:
        """Inputs, parameters and outputs of the task, and how the model is run."""
        response = await super().metadata()
        return response if self._served is None else described(response, self._served)

    # -- requests --------------------------------------------------------------------------------

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Answer one V2 request. Every error is an `MLServerError` with its status."""
        with self._counted(), self._errors_mapped():
            return InferenceResponse(
                model_name=self.name, model_version=self.version, outputs=await self._answer(payload)
            )

    async def _answer(self, payload: InferenceRequest) -> list[ResponseOutput]:
        if self._service is None:
            raise Unavailable(f"the model '{self.name}' is not loaded, expected a model that is ready")
        return await self._service.answer(payload)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._drained.set()

    @contextmanager
    def _errors_mapped(self) -> Iterator[None]:
        try:
            yield
        except HFTasksError as error:
            self._metrics.failed(error)
            raise as_mlserver_error(error) from None
        except Exception as error:
            logger.exception("model '%s': a request failed for a reason of our own", self.name)
            failure = ForwardFailed(f"internal error: {type(error).__name__}")
            self._metrics.failed(failure)
            raise as_mlserver_error(failure) from error

    def _log_loaded(self, served: Served, cost: CostModel) -> None:
        how = served.backend.description
        logger.info(
            "loaded model=%s version=%s task=%s backend=%s device=%s dtype=%s packing=%s max_tokens=%d "
            "overhead_ms=%.2f us_per_token=%.1f",
            self.name,
            self.version or "-",
            served.task.name,
            how.backend,
            how.device,
            how.dtype,
            how.packing,
            served.task.model.encoder.max_tokens,
            1e3 * cost.overhead_s,
            1e6 * cost.per_token_s,
        )


def _load(settings: Settings, cost: CostModel) -> Served:
    with _loading:
        served = load(settings)
        if settings.warmup:
            rows_of = functools.partial(probe_rows, served.task.model.encoder)
            warm_up(served.backend, served.backend.padded, cost, rows_of)
        # Looking through all objects of torch and transformers would stop the event loop for half a second.
        gc.collect()
        gc.freeze()
    return served


def _give_memory_back() -> None:
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    with suppress(OSError, AttributeError):  # only glibc keeps freed memory, and can be told not to
        ctypes.CDLL("libc.so.6").malloc_trim(0)
