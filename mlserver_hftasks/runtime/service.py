"""A request's way, from its tensors to those of the answer.

The numbers are the steps of `docs/structure.md`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from mlserver.types import InferenceRequest, ResponseOutput

from mlserver_hftasks.codecs.request import Call, Names, count_characters, decode_request, size_of
from mlserver_hftasks.codecs.response import RESULT_NAME, encode_results, encode_tensor
from mlserver_hftasks.engine.batcher import Batcher
from mlserver_hftasks.engine.rows import Outputs
from mlserver_hftasks.errors import InvalidRequest, RequestTooLarge
from mlserver_hftasks.runtime.offload import BULK_CHARS, Deadline, run_for
from mlserver_hftasks.tasks.base import Answered, Example, Task
from mlserver_hftasks.tasks.signature import Parameters, Signature

CHARS_PER_NUMBER = 0.2
"""Post-processing a number costs about as much as tokenizing so many characters."""
MAX_NUMBERS = 16_000_000
"""Most numbers in an answer; beyond: 413. As JSON they are some 200 MB."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a response holds: its outputs, and what its parameters say."""

    outputs: list[ResponseOutput]
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, decoded and checked."""

    call: Call
    parameters: Parameters
    examples: list[Example]


class Service(ABC):
    """Answers requests for one task, over an engine that a subclass knows."""

    def __init__(self, task: Task[Any], timeout_ms: float | None) -> None:
        self.task = task
        self._timeout_ms = timeout_ms
        self._names = names_of(task.signature)

    async def answer(self, payload: InferenceRequest) -> Reply:
        """The answer to a request. Raises `HFTasksError`."""
        return (await self.answer_with(payload))[0]

    async def answer_with(self, payload: InferenceRequest) -> tuple[Reply, list[Answered]]:
        """The same, and what of the model's outputs it was made from, per item."""
        self.check_admission()  # 1
        async with Deadline(self._timeout_ms) as deadline:
            asked = await self.read(payload, deadline)  # 2 and 3
            answered = await self.run(asked, deadline)  # 4 to 7
            numbers = sum(array.size for item in answered for row in item.outputs for array in row.values())
            reply = await run_for(int(CHARS_PER_NUMBER * numbers), self._reply, asked, answered)  # 8
        return reply, answered

    async def stream(self, payload: InferenceRequest) -> AsyncGenerator[Reply, None]:
        """The answer in pieces; of a task that has none, in one. Raises `HFTasksError`."""
        yield await self.answer(payload)

    @abstractmethod
    def check_admission(self) -> None:
        """Raise `Overloaded` if even the smallest request would be refused now."""

    @abstractmethod
    async def run(self, asked: Asked, deadline: Deadline) -> list[Answered]:
        """What the engine makes of a request, per item."""

    @abstractmethod
    async def close(self) -> None:
        """End the engine's thread; what still waits fails."""

    async def read(self, payload: InferenceRequest, deadline: Deadline) -> Asked:
        """Decode and check the request, make its examples, take its timeout if it is shorter."""
        call, parameters = await run_for(size_of(payload, BULK_CHARS), self._decode, payload)
        deadline.tighten(parameters.timeout_ms)
        examples = await run_for(_work_of(call), self._examples, call, parameters)
        return Asked(call, parameters, examples)

    def _reply(self, asked: Asked, answered: list[Answered]) -> Reply:
        outputs = _encode(self.task, asked.call, asked.parameters, answered)
        return Reply(outputs, self.task.summary(answered, asked.parameters))

    def has_output(self, name: str) -> bool:
        """Whether a request may name that output."""
        return name == RESULT_NAME or any(spec.name == name for spec in self.task.signature.outputs)

    def _decode(self, payload: InferenceRequest) -> tuple[Call, Parameters]:
        with NestingChecked():
            call = decode_request(payload, self._names)
            for name in call.outputs:
                if name != RESULT_NAME:
                    self.task.signature.output_named(name)
            return call, self.task.signature.parse(call.parameters)

    def _examples(self, call: Call, parameters: Parameters) -> list[Example]:
        with NestingChecked():
            return self.task.examples(call.inputs, parameters)


class RowService(Service):
    """Runs rows in the batches of one engine."""

    def __init__(self, task: Task[Any], timeout_ms: float | None, batcher: Batcher) -> None:
        super().__init__(task, timeout_ms)
        self._batcher = batcher

    def check_admission(self) -> None:
        """See `Service`."""
        self._batcher.check_admission()

    async def run(self, asked: Asked, deadline: Deadline) -> list[Answered]:
        """See `Service`."""
        return await run_rows(self._batcher, asked.examples, deadline)

    async def close(self) -> None:
        """See `Service`."""
        await self._batcher.close()


async def run_rows(batcher: Batcher, examples: list[Example], deadline: Deadline) -> list[Answered]:
    """Outputs of the examples' rows. Those that a model continues return by the deadline what they have."""
    rows = [row for example in examples for row in example.rows]
    decodings = [row.decoding for row in rows if row.decoding is not None]
    if decodings and deadline.until is not None:
        for decoding in decodings:
            decoding.until = deadline.until
        deadline.leave_to_engine()
    return _regroup(examples, await batcher.run(rows))


class NestingChecked:
    """Recursion that went too deep is the fault of who nested so deeply."""

    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is RecursionError:
            raise InvalidRequest("a value nested too deeply, expected a few levels @ inputs") from None


def _work_of(call: Call) -> int:
    """About how many characters will be tokenized, or more.

    What comes once, a query, a context, a prompt or labels, may be tokenized with every item.
    """
    items = max(map(len, call.inputs.values()))
    sizes = {name: count_characters(values, BULK_CHARS) for name, values in call.inputs.items()}
    shared = sum(size for name, size in sizes.items() if len(call.inputs[name]) < items)
    shared += count_characters(call.parameters, BULK_CHARS)
    widest = max((len(value) for value in call.parameters.values() if isinstance(value, list)), default=1)
    return (sum(sizes.values()) + items * shared) * max(widest, 1)


def check_numbers(numbers: int) -> None:
    """Raise `RequestTooLarge` for an answer of more than `MAX_NUMBERS`."""
    if numbers > MAX_NUMBERS:
        raise RequestTooLarge(
            f"an answer of {numbers} numbers, expected at most {MAX_NUMBERS}: send fewer items @ outputs"
        )


def _encode(
    task: Task[Any], call: Call, parameters: Parameters, answered: list[Answered]
) -> list[ResponseOutput]:
    """The outputs that the call names, in its order; without names the result as JSON."""
    typed = [name for name in call.outputs if name != RESULT_NAME]
    tensors = task.tensors(typed, answered, parameters) if typed else {}
    check_numbers(sum(tensor.values.size for tensor in tensors.values()))
    made: list[ResponseOutput] = []
    for name in call.outputs or (RESULT_NAME,):
        if name == RESULT_NAME:
            results = [task.postprocess(item, parameters) for item in answered]
            check_numbers(sum(result.size for result in results if isinstance(result, np.ndarray)))
            made.append(encode_results(task.shaped(results, parameters, scalar=call.scalar)))
        else:
            made.append(encode_tensor(name, tensors[name].datatype, tensors[name].values))
    return made


def _regroup(examples: list[Example], outputs: list[Outputs]) -> list[Answered]:
    remaining = iter(outputs)
    return [Answered(example, [next(remaining) for _ in example.rows]) for example in examples]


def names_of(signature: Signature) -> Names:
    """What the names in a request mean to a task."""
    inputs = {name: spec.name for spec in signature.inputs for name in (spec.name, *spec.aliases)}
    fields = signature.parameters.model_fields
    lists = {name for name, field in fields.items() if _may_be_list(field.annotation)}
    return Names(inputs, frozenset(fields), frozenset(lists))


def _may_be_list(annotation: Any) -> bool:
    origin = getattr(annotation, "__origin__", annotation)
    return origin in (list, tuple, dict) or any(map(_may_be_list, getattr(annotation, "__args__", ())))
