"""The MLServer runtime: the life of one model, and the edge where errors become MLServer's."""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, suppress

import mlserver
from mlserver.errors import MLServerError
from mlserver.types import InferenceRequest, InferenceResponse, MetadataModelResponse, Parameters

from mlserver_hftasks.engine.cost import CostModel
from mlserver_hftasks.engine.warmup import warm_up
from mlserver_hftasks.errors import ForwardFailed, HFTasksError, Unavailable
from mlserver_hftasks.loading import Served, load, memory, probe_rows
from mlserver_hftasks.loading.threads import set_torch_threads
from mlserver_hftasks.metrics import ModelMetrics
from mlserver_hftasks.runtime.assembly import answering, explaining_another
from mlserver_hftasks.runtime.configuration import settings_of, take_over_batching
from mlserver_hftasks.runtime.explainers import prepare_explaining
from mlserver_hftasks.runtime.explaining import AnsweringService
from mlserver_hftasks.runtime.metadata import described
from mlserver_hftasks.runtime.server import as_mlserver_error, limit_body, prepare_server
from mlserver_hftasks.runtime.service import Reply
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
        self._service: AnsweringService | None = None
        self._edge = _Edge(self.name, self._failed)

    # -- life ------------------------------------------------------------------------------------

    async def load(self) -> bool:
        """Load the model off the event loop, warm it up, start its device thread."""
        settings, cost = self._hf_settings, CostModel()
        self._metrics = ModelMetrics(self.name, self.version)
        if settings.infer_uri is not None:
            self._service = explaining_another(settings, settings.infer_uri, self._metrics)
            logger.info(
                "loaded model=%s version=%s explains=%s", self.name, self.version or "-", settings.infer_uri
            )
            return True
        try:
            served = await asyncio.to_thread(_load, settings, cost)
            threads = functools.partial(set_torch_threads, settings)
            self._service = answering(self.name, settings, served, cost, self._metrics, threads)
        except HFTasksError as error:
            raise as_mlserver_error(error) from None
        self._served = served
        self._log_loaded(served, cost)
        return True

    async def unload(self) -> bool:
        """Answer what is in flight, then give the memory back."""
        service, served = self._service, self._served
        self._service = self._served = None
        if service is None:
            return True
        if self._edge.in_flight:
            self._edge.drained.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._edge.drained.wait(), DRAIN_SECONDS)
        await service.close()
        if served is not None:
            served.close()
        del served, service
        await asyncio.to_thread(memory.give_back)
        return True

    async def metadata(self) -> MetadataModelResponse:
        """Inputs, parameters and outputs of the task, and how the model is run."""
        response = await super().metadata()
        if self._service is None:
            return response
        return described(response, self._service, self._served)

    # -- requests --------------------------------------------------------------------------------

    def is_full(self) -> bool:
        """See `gate.Admits`."""
        try:
            if self._service is not None:
                self._service.check_admission()
        except HFTasksError:
            return True
        return False

    def check_admission(self) -> None:
        """See `gate.Admits`."""
        if self._service is not None:
            with self._edge:
                self._service.check_admission()

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Answer one V2 request. Every error is an `MLServerError` with its status."""
        with self._edge:
            return self._response(await self._ready_service().answer(payload))

    async def predict_stream(
        self, payloads: AsyncIterator[InferenceRequest]
    ) -> AsyncIterator[InferenceResponse]:
        """Answer one V2 request in pieces. An error after the first piece is a last piece that says so.

        Closing the iterator, as MLServer does when a client goes away, ends the generation.
        """
        begun = False
        try:
            with self._edge:
                payload = await anext(payloads)
                async with aclosing(self._ready_service().stream(payload)) as pieces:
                    async for piece in pieces:
                        yield self._response(piece)
                        begun = True
        except MLServerError as error:
            if not begun:
                raise
            said = {"error": str(error), "status_code": error.status_code, "finish_reason": "error"}
            yield self._response(Reply([], said))

    def _failed(self, error: HFTasksError) -> None:
        self._metrics.failed(error)

    def _ready_service(self) -> AnsweringService:
        if self._service is None:
            raise Unavailable(f"the model '{self.name}' is not loaded, expected a model that is ready")
        return self._service

    def _response(self, reply: Reply) -> InferenceResponse:
        return InferenceResponse(
            model_name=self.name,
            model_version=self.version,
            outputs=reply.outputs,
            parameters=Parameters(**reply.parameters) if reply.parameters else None,
        )

    def _log_loaded(self, served: Served, cost: CostModel) -> None:
        how = served.description
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


class _Edge:
    """Around each request: counts those in flight, and makes MLServer's errors of ours."""

    def __init__(self, name: str, failed: Callable[[HFTasksError], None]) -> None:
        self._name = name
        self._failed = failed
        self.in_flight = 0
        self.drained = asyncio.Event()

    def __enter__(self) -> None:
        self.in_flight += 1

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.in_flight -= 1
        if not self.in_flight:
            self.drained.set()
        if isinstance(error, HFTasksError):
            self._failed(error)
            raise as_mlserver_error(error) from None
        if isinstance(error, Exception):
            logger.error("model '%s': a request failed for a reason of our own", self._name, exc_info=error)
            failure = ForwardFailed(f"internal error: {type(error).__name__}")
            self._failed(failure)
            raise as_mlserver_error(failure) from error


def _load(settings: Settings, cost: CostModel) -> Served:
    with _loading, memory.without_collections():
        memory.manage()
        served = load(settings)
        if settings.warmup and served.decoder is None:  # a decoder's probe has warmed it up
            rows_of = functools.partial(probe_rows, served.task.model.encoder)
            if served.task.head.generates:  # what a row costs hangs on what a request asks for
                served.backend.forward(rows_of((4, 16)))
            else:
                warm_up(served.backend, served.backend.padded, cost, rows_of)
        prepare_explaining(served)
        memory.settle()
    return served
