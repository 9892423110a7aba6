"""The MLServer runtime: one model, from its settings to its answers."""

from __future__ import annotations

import asyncio
import ctypes
import functools
import gc
import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import mlserver
import torch
from mlserver.types import InferenceRequest, InferenceResponse, MetadataModelResponse, ResponseOutput

from mlserver_hftasks.codecs.request import Call, Names, decode_request, size_of
from mlserver_hftasks.codecs.response import RESULT_NAME, encode_results, encode_tensor
from mlserver_hftasks.engine.batcher import Batcher
from mlserver_hftasks.engine.cost import CostModel
from mlserver_hftasks.engine.rows import Outputs
from mlserver_hftasks.engine.scheduler import Limits, Scheduler
from mlserver_hftasks.engine.warmup import warm_up
from mlserver_hftasks.errors import DeadlineExceeded, ForwardFailed, HFTasksError, Unavailable
from mlserver_hftasks.loading import Served, load, probe_rows
from mlserver_hftasks.metrics import ModelMetrics
from mlserver_hftasks.runtime.metadata import input_tensors, output_tensors
from mlserver_hftasks.runtime.server import as_mlserver_error, limit_body, prepare_server
from mlserver_hftasks.settings import Settings, read_settings
from mlserver_hftasks.tasks.base import Answered, Example, Task
from mlserver_hftasks.tasks.signature import Parameters

logger = logging.getLogger("mlserver.hftasks")

T = TypeVar("T")

DEFAULT_BATCH_ROWS = 256
INLINE_CHARS = 4_000
"""Requests up to this size are decoded and tokenized on the event loop: under a millisecond."""
INLINE_NUMBERS = 20_000
"""Outputs up to this many numbers are post-processed on the event loop."""
DRAIN_SECONDS = 30.0
"""How long an unload waits for the requests in flight."""

_loading = threading.Lock()
"""transformers keeps state of the process while it loads a model."""
_cpu = ThreadPoolExecutor(max_workers=2, thread_name_prefix="hftasks-cpu")
"""Tokenization and post-processing of requests that are too large for the event loop."""


class HFTasksRuntime(mlserver.MLModel):
    """Serves one Hugging Face model for one task; `docs/settings.md` lists `parameters.extra`."""

    def __init__(self, settings: mlserver.ModelSettings) -> None:
        prepare_server()
        try:
            self._hf_settings = _settings_of(settings)
        except HFTasksError as error:
            raise as_mlserver_error(error) from None
        _take_over_batching(settings)
        limit_body(settings.name, self._hf_settings.max_body_bytes)
        super().__init__(settings)
        self._served: Served | None = None
        self._batcher: Batcher | None = None
        self._in_flight = 0
        self._drained = asyncio.Event()

    # -- life ------------------------------------------------------------------------------------

    async def load(self) -> bool:
        """Load the model off the event loop, warm it up, start its device thread."""
        settings, cost = self._hf_settings, CostModel()
        loop = asyncio.get_running_loop()
        try:
            self._served = await loop.run_in_executor(None, _load, settings, cost)
        except HFTasksError as error:
            raise as_mlserver_error(error) from None
        backend = self._served.backend
        self._names = _names_of(self._served.task)
        self._metrics = ModelMetrics(self.name, self.version)
        self._batcher = Batcher(
            backend,
            Scheduler(_limits_of(settings), cost, padded=backend.padded),
            on_thread_start=functools.partial(_set_threads, settings),
            observe=self._metrics.batch_ran,
            name=self.name,
        )
        self._log_loaded(cost)
        return True

    async def unload(self) -> bool:
        """Answer what is in flight, then give the memory back."""
        batcher, served = self._batcher, self._served
        self._batcher = None
        if batcher is None or served is None:
            return True
        if self._in_flight:
            self._drained.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._drained.wait(), DRAIN_SECONDS)
        await batcher.close()
        self._served = None
        served.backend.close()
        del served, batcher
        _give_memory_back()
        return True

    async def metadata(self) -> MetadataModelResponse:
        """Inputs, parameters and outputs of the task, and how the model is run."""
        response = await super().metadata()
        if self._served is None:
            return response
        signature, described = self._served.task.signature, self._served.backend.description
        response.platform = response.platform or "transformers"
        response.inputs = input_tensors(signature)
        response.outputs = output_tensors(signature)
        response.parameters = mlserver.types.Parameters(
            task=self._served.task.name,
            backend=described.backend,
            device=described.device,
            dtype=described.dtype,
            packing=described.packing,
            max_length=self._served.task.model.encoder.max_tokens,
        )
        return response

    # -- requests --------------------------------------------------------------------------------

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Answer one V2 request. Every error is an `MLServerError` with its status."""
        try:
            with self._counted():
                return await self._answer(payload)
        except HFTasksError as error:
            self._metrics.failed(error)
            raise as_mlserver_error(error) from None
        except Exception as error:
            logger.exception("model '%s': a request failed for a reason of our own", self.name)
            failure = ForwardFailed(f"internal error: {type(error).__name__}")
            self._metrics.failed(failure)
            raise as_mlserver_error(failure) from error

    async def _answer(self, payload: InferenceRequest) -> InferenceResponse:
        batcher, served = self._running()
        batcher.check_admission()
        task, size = served.task, size_of(payload)
        call, parameters = await _off_loop(size > INLINE_CHARS, self._decode, task, payload)
        async with _deadline(parameters.timeout_ms, self._hf_settings.timeout_ms):
            examples = await _off_loop(size > INLINE_CHARS, task.examples, call.inputs, parameters)
            outputs = await batcher.run([row for example in examples for row in example.rows])
        answered = _regroup(examples, outputs)
        numbers = sum(array.size for row in outputs for array in row.values())
        return InferenceResponse(
            model_name=self.name,
            model_version=self.version,
            outputs=await _off_loop(numbers > INLINE_NUMBERS, _encode, task, call, parameters, answered),
        )

    def _decode(self, task: Task[Any], payload: InferenceRequest) -> tuple[Call, Parameters]:
        call = decode_request(payload, self._names)
        for name in call.outputs:
            if name != RESULT_NAME:
                task.signature.output_named(name)
        return call, task.signature.parse(call.parameters)

    def _running(self) -> tuple[Batcher, Served]:
        if self._batcher is None or self._served is None:
            raise Unavailable(f"the model '{self.name}' is not loaded, expected a model that is ready")
        return self._batcher, self._served

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._drained.set()

    def _log_loaded(self, cost: CostModel) -> None:
        served = self._running()[1]
        described = served.backend.description
        logger.info(
            "loaded model=%s version=%s task=%s backend=%s device=%s dtype=%s packing=%s max_tokens=%d "
            "overhead_ms=%.2f us_per_token=%.1f",
            self.name,
            self.version or "-",
            served.task.name,
            described.backend,
            described.device,
            described.dtype,
            described.packing,
            served.task.model.encoder.max_tokens,
            1e3 * cost.overhead_s,
            1e6 * cost.per_token_s,
        )


def _load(settings: Settings, cost: CostModel) -> Served:
    with _loading:
        _set_threads(settings)
        served = load(settings)
        if settings.warmup:
            encoder = served.task.model.encoder
            warm_up(served.backend, served.backend.padded, cost, functools.partial(probe_rows, encoder))
    return served


def _encode(
    task: Task[Any], call: Call, parameters: Parameters, answered: list[Answered]
) -> list[ResponseOutput]:
    """The outputs that the call names, in its order; without names the result as JSON."""
    typed = [name for name in call.outputs if name != RESULT_NAME]
    tensors = task.tensors(typed, answered, parameters) if typed else {}
    made: list[ResponseOutput] = []
    for name in call.outputs or (RESULT_NAME,):
        if name == RESULT_NAME:
            results = [task.postprocess(item, parameters) for item in answered]
            made.append(encode_results(task.shaped(results, parameters, scalar=call.scalar)))
        else:
            made.append(encode_tensor(name, tensors[name].datatype, tensors[name].values))
    return made


def _regroup(examples: list[Example], outputs: list[Outputs]) -> list[Answered]:
    remaining = iter(outputs)
    return [Answered(example, [next(remaining) for _ in example.rows]) for example in examples]


async def _off_loop(large: bool, function: Callable[..., T], *args: Any) -> T:
    if not large:
        return function(*args)
    return await asyncio.get_running_loop().run_in_executor(_cpu, function, *args)


class _deadline:  # noqa: N801 - reads as a function, like asyncio.timeout
    """Raise `DeadlineExceeded` after the shorter of the timeouts, if there is one."""

    def __init__(self, *timeouts_ms: float | None) -> None:
        self._ms = min((ms for ms in timeouts_ms if ms is not None), default=None)
        self._timeout = asyncio.timeout(None if self._ms is None else self._ms / 1e3)

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(self, *exc_info: Any) -> None:
        try:
            await self._timeout.__aexit__(*exc_info)
        except TimeoutError:
            raise DeadlineExceeded(
                f"no answer within {self._ms:g} ms, expected one by then @ timeout_ms"
            ) from None


def _settings_of(settings: mlserver.ModelSettings) -> Settings:
    extra = dict((settings.parameters and settings.parameters.extra) or {})
    uri = settings.parameters.uri if settings.parameters else None
    defaults: dict[str, Any] = {"pretrained_model": uri} if uri else {}
    if settings.max_batch_size > 1:
        defaults["batch_size"] = settings.max_batch_size
    read = read_settings(extra, os.environ, defaults)
    return read.model_copy(update={"pretrained_model": _resolved(settings, read.pretrained_model or uri)})


def _resolved(settings: mlserver.ModelSettings, name: str | None) -> str | None:
    """A folder as an absolute path, relative to the model's own folder first; a hub id as it is."""
    if not name:
        return None
    name = name.removeprefix("file://")
    here = Path(mlserver.utils.to_absolute_path(settings, name))
    return next((str(path.resolve()) for path in (here, Path(name)) if path.is_dir()), name)


def _take_over_batching(settings: mlserver.ModelSettings) -> None:
    """Keep MLServer's own batcher away: it waits on an idle server and mixes clients' parameters.

    The size moves to `extra`, since the changed settings are what parallel workers get.
    """
    if settings.max_batch_size > 1 and settings.parameters is not None:
        settings.parameters.extra = {
            "batch_size": settings.max_batch_size,
            **(settings.parameters.extra or {}),
        }
    settings.max_batch_size = 0
    settings.max_batch_time = 0.0


def _limits_of(settings: Settings) -> Limits:
    target = settings.latency_target_ms
    return Limits(
        max_batch_rows=settings.batch_size or DEFAULT_BATCH_ROWS,
        max_batch_tokens=settings.max_batch_tokens,
        max_queue_rows=settings.max_queue_rows,
        max_queue_tokens=settings.max_queue_tokens,
        latency_target_s=None if target is None else target / 1e3,
    )


def _names_of(task: Task[Any]) -> Names:
    inputs = {name: spec.name for spec in task.signature.inputs for name in (spec.name, *spec.aliases)}
    fields = task.signature.parameters.model_fields
    lists = {name for name, field in fields.items() if _may_be_list(field.annotation)}
    return Names(inputs, frozenset(fields), frozenset(lists))


def _may_be_list(annotation: Any) -> bool:
    origin = getattr(annotation, "__origin__", annotation)
    return origin in (list, tuple, dict) or any(map(_may_be_list, getattr(annotation, "__args__", ())))


def _set_threads(settings: Settings) -> None:
    """Threads of torch's operators for the calling thread, and once per process between operators."""
    if settings.intra_op_threads is not None:
        torch.set_num_threads(settings.intra_op_threads)
    if settings.inter_op_threads is not None and torch.get_num_interop_threads() != settings.inter_op_threads:
        try:
            torch.set_num_interop_threads(settings.inter_op_threads)
        except RuntimeError:
            logger.warning(
                "inter_op_threads is set once per process; it stays %d", torch.get_num_interop_threads()
            )


def _give_memory_back() -> None:
    gc.collect()
    with suppress(OSError, AttributeError):  # only glibc keeps freed memory, and can be told not to
        ctypes.CDLL("libc.so.6").malloc_trim(0)
