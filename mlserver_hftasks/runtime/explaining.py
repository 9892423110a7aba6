"""A request's way to its explanations, and to a prediction beside them.

All doors end here. A request asks for explanations by its `mode` (so do the routes of `routes`, and the
setting of that name), or by its parameter `explain` and then gets the prediction too.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from mlserver.types import InferenceRequest, ResponseOutput

from mlserver_hftasks.codecs.request import (
    EXPLAIN,
    Call,
    Names,
    Wish,
    decode_request,
    size_of,
    split_request,
)
from mlserver_hftasks.codecs.response import encode_tensor
from mlserver_hftasks.errors import InvalidRequest, did_you_mean
from mlserver_hftasks.explain.options import ExplainOptions
from mlserver_hftasks.explain.result import Explanation
from mlserver_hftasks.explain.tensors import HTML_NAME, OUTPUTS, count_numbers, default_names, tensors_of
from mlserver_hftasks.metrics import ExplainReport
from mlserver_hftasks.runtime.offload import BULK_CHARS, Deadline, run_for
from mlserver_hftasks.runtime.service import NestingChecked, Reply, Service, check_numbers, names_of
from mlserver_hftasks.tasks.base import Answered
from mlserver_hftasks.tasks.signature import Parameters, Signature

CHARS_PER_TOKEN, CHARS_PER_DRAWN_TOKEN = 4, 80
"""Encoding, or drawing, a token of an explanation costs about as much as tokenizing so many characters."""
OPTION_NAMES = frozenset(ExplainOptions.model_fields)
OUTPUT_NAMES = tuple(spec.name for spec in OUTPUTS)


class Explains(Protocol):
    """What is needed of an explainer."""

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods that it can do."""

    async def explain(
        self,
        inputs: Mapping[str, Sequence[Any]],
        parameters: Any,
        options: ExplainOptions,
        answered: Sequence[Answered] | None = None,
    ) -> list[Explanation]:
        """One explanation per item; `answered` is what the model says of each, if that is known.

        Raises `HFTasksError`.
        """

    async def close(self) -> None:
        """Fail what still waits."""


class Explaining:
    """Answers requests for explanations of one model."""

    def __init__(
        self,
        explainer: Explains,
        signature: Signature,
        *,
        defaults: Mapping[str, Any] | None = None,
        timeout_ms: float | None = None,
        observe: Callable[[ExplainReport], None] = lambda report: None,
    ) -> None:
        self.signature = signature
        self._observe = observe
        self._explainer = explainer
        self._defaults = dict(defaults or {})
        self._timeout_ms = timeout_ms
        beside = names_of(signature)
        self._names = {
            False: beside,
            True: Names(beside.inputs, beside.parameters | OPTION_NAMES, beside.lists - OPTION_NAMES),
        }

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods that this model can be explained by."""
        return self._explainer.methods

    async def answer(
        self,
        request: InferenceRequest,
        options: Any,
        *,
        alone: bool,
        answered: Sequence[Answered] | None = None,
    ) -> list[ResponseOutput]:
        """The explanations that a request asks for. Raises `HFTasksError`.

        `options` as the client wrote them under the name `explain`; `alone`, without a prediction: options
        may also come as parameters of the request, and then win over the task's of the same name. `answered`
        is what the prediction was made from.
        """
        began = time.monotonic()
        async with Deadline(self._timeout_ms) as deadline:
            work = size_of(request, BULK_CHARS)
            call, parameters, asked = await run_for(work, self._decode, request, options, alone)
            deadline.tighten(parameters.timeout_ms)
            explanations = await self._explainer.explain(call.inputs, parameters, asked, answered)
            names = call.outputs or default_names(asked)
            per_token = CHARS_PER_DRAWN_TOKEN if HTML_NAME in names else CHARS_PER_TOKEN
            work = per_token * sum(explanation.attributions.size for explanation in explanations)
            outputs = await run_for(work, _encode, names, explanations, asked)
        self._observe(_report(explanations, time.monotonic() - began))
        return outputs

    async def close(self) -> None:
        """Fail what still waits."""
        await self._explainer.close()

    def _decode(
        self, request: InferenceRequest, options: Any, alone: bool
    ) -> tuple[Call, Parameters, ExplainOptions]:
        with NestingChecked():
            call = decode_request(request, self._names[alone])
            for name in call.outputs:
                if name not in OUTPUT_NAMES:
                    raise InvalidRequest(
                        f"unknown output '{name}', {did_you_mean(name, OUTPUT_NAMES)} @ outputs"
                    )
            own = {name: value for name, value in call.parameters.items() if alone and name in OPTION_NAMES}
            rest = {name: value for name, value in call.parameters.items() if name not in own}
            written = ExplainOptions.read(options)
            merged = {**self._defaults, **own, **written.model_dump(exclude_unset=True)}
            return call, self.signature.parse(rest), ExplainOptions.read(merged)


class AnsweringService:
    """Predictions, explanations, or both, as each request asks and the setting says.

    `predictions` is None for a model that only explains another.
    """

    def __init__(self, predictions: Service | None, explaining: Explaining, *, mode: str) -> None:
        self.mode = mode
        self._predictions = predictions
        self._explaining = explaining

    @property
    def signature(self) -> Signature:
        """Of the task."""
        return self._explaining.signature

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods that this model can be explained by."""
        return self._explaining.methods

    def check_admission(self) -> None:
        """Raise `Overloaded` if even the smallest request for a prediction would be refused now."""
        if self._predictions is not None and self.mode != EXPLAIN:
            self._predictions.check_admission()

    async def answer(self, payload: InferenceRequest) -> Reply:
        """The answer to a request. Raises `HFTasksError`."""
        request, wish = self._split(payload)
        if self._predictions is None or wish.mode == EXPLAIN:
            return Reply(await self._explaining.answer(request, wish.options, alone=True))
        if wish.options is None:
            return await self._predictions.answer(request)
        return await self._both(self._predictions, request, wish)

    async def stream(self, payload: InferenceRequest) -> AsyncGenerator[Reply, None]:
        """The answer in pieces; with an explanation in one. Raises `HFTasksError`."""
        request, wish = self._split(payload)
        if self._predictions is None or wish.mode == EXPLAIN or wish.options is not None:
            yield await self.answer(payload)
            return
        async with aclosing(self._predictions.stream(request)) as pieces:
            async for piece in pieces:
                yield piece

    async def close(self) -> None:
        """Fail what still waits."""
        await self._explaining.close()
        if self._predictions is not None:
            await self._predictions.close()

    def _split(self, payload: InferenceRequest) -> tuple[InferenceRequest, Wish]:
        """The request, and its wish with the mode that counts."""
        with NestingChecked():
            request, wish = split_request(payload)
        mode = wish.mode or self.mode
        if self._predictions is None and mode != EXPLAIN:
            raise InvalidRequest("this model only explains, expected the mode explain @ mode")
        options = None if wish.options is False and mode != EXPLAIN else wish.options
        return request, Wish(mode, options)

    async def _both(self, predictions: Service, request: InferenceRequest, wish: Wish) -> Reply:
        """The prediction, then the explanation of that very answer; of an output that both have, its own."""
        outputs = request.outputs or []
        predicted = [output for output in outputs if predictions.has_output(output.name)]
        explained = [output for output in outputs if output not in predicted]
        reply, answered = Reply([]), None
        if predicted or not outputs:
            wanted = request.model_copy(update={"outputs": predicted})
            reply, answered = await predictions.answer_with(wanted)
        made = list(reply.outputs)
        if explained or not outputs:
            wanted = request.model_copy(update={"outputs": explained})
            made += await self._explaining.answer(wanted, wish.options, alone=False, answered=answered)
        places = {output.name: place for place, output in enumerate(outputs)}
        return Reply(sorted(made, key=lambda output: places.get(output.name, 0)), reply.parameters)


def _report(explanations: Sequence[Explanation], seconds: float) -> ExplainReport:
    return ExplainReport(
        seconds=seconds,
        evaluations=[explanation.evaluations for explanation in explanations],
        unconverged=sum(not explanation.converged.all() for explanation in explanations),
    )


def _encode(
    names: Sequence[str], explanations: Sequence[Explanation], options: ExplainOptions
) -> list[ResponseOutput]:
    check_numbers(count_numbers(names, explanations))
    tensors = tensors_of(names, explanations, options)
    return [encode_tensor(name, tensors[name].datatype, tensors[name].values) for name in names]
