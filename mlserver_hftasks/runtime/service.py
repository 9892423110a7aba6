"""A request's way, from its tensors to those of the answer.

The numbers are the steps of `docs/structure.md`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from mlserver.types import InferenceRequest, ResponseOutput

from mlserver_hftasks.codecs.request import Call, Names, decode_request, size_of
from mlserver_hftasks.codecs.response import RESULT_NAME, encode_results, encode_tensor
from mlserver_hftasks.engine.batcher import Batcher
from mlserver_hftasks.engine.rows import Outputs
from mlserver_hftasks.errors import DeadlineExceeded
from mlserver_hftasks.tasks.base import Answered, Example, Task
from mlserver_hftasks.tasks.signature import Parameters, Signature

T = TypeVar("T")

INLINE_CHARS = 4_000
"""Requests up to this size are decoded and tokenized on the event loop: under a millisecond."""
INLINE_NUMBERS = 20_000
"""Outputs up to this many numbers are post-processed on the event loop."""

_cpu = ThreadPoolExecutor(max_workers=2, thread_name_prefix="hftasks-cpu")
"""Decoding, tokenization and post-processing of what is too large for the event loop."""


class Service:
    """Answers requests for one task, over one engine."""

    def __init__(self, task: Task[Any], batcher: Batcher, timeout_ms: float | None) -> None:
        self.task = task
        self.batcher = batcher
        self._timeout_ms = timeout_ms
        self._names = _names_of(task.signature)

    async def answer(self, payload: InferenceRequest) -> list[ResponseOutput]:
        """The outputs for a request. Raises `HFTasksError`."""
        started = asyncio.get_running_loop().time()
        self.batcher.check_admission()  # 1
        task, size = self.task, size_of(payload)
        large = size > INLINE_CHARS
        call, parameters = await _off_loop(large, self._decode, payload)  # 2
        async with _Deadline(started, parameters.timeout_ms, self._timeout_ms):
            examples = await _off_loop(large, task.examples, call.inputs, parameters)  # 3
            outputs = await self.batcher.run([row for example in examples for row in example.rows])  # 4 to 7
        answered = _regroup(examples, outputs)
        numbers = sum(array.size for row in outputs for array in row.values())
        return await _off_loop(numbers > INLINE_NUMBERS, _encode, task, call, parameters, answered)  # 8

    def _decode(self, payload: InferenceRequest) -> tuple[Call, Parameters]:
        call = decode_request(payload, self._names)
        for name in call.outputs:
            if name != RESULT_NAME:
                self.task.signature.output_named(name)
        return call, self.task.signature.parse(call.parameters)


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


def _names_of(signature: Signature) -> Names:
    inputs = {name: spec.name for spec in signature.inputs for name in (spec.name, *spec.aliases)}
    fields = signature.parameters.model_fields
    lists = {name for name, field in fields.items() if _may_be_list(field.annotation)}
    return Names(inputs, frozenset(fields), frozenset(lists))


def _may_be_list(annotation: Any) -> bool:
    origin = getattr(annotation, "__origin__", annotation)
    return origin in (list, tuple, dict) or any(map(_may_be_list, getattr(annotation, "__args__", ())))


async def _off_loop(large: bool, function: Callable[..., T], *args: Any) -> T:
    if not large:
        return function(*args)
    return await asyncio.get_running_loop().run_in_executor(_cpu, function, *args)


class _Deadline:
    """Raises `DeadlineExceeded` when the shorter of the timeouts has passed since `started` (loop time)."""

    def __init__(self, started: float, *timeouts_ms: float | None) -> None:
        self._ms = min((ms for ms in timeouts_ms if ms is not None), default=None)
        self._timeout = asyncio.timeout_at(None if self._ms is None else started + self._ms / 1e3)

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(self, *exc_info: Any) -> None:
        try:
            await self._timeout.__aexit__(*exc_info)
        except TimeoutError:
            raise DeadlineExceeded(
                f"no answer within {self._ms:g} ms, expected one by then @ timeout_ms"
            ) from None
