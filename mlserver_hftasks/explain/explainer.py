"""From a request to its explanations.

The request's rows are predicted. Then each item is explained by itself: a method asks for
evaluations, and those of all items and all requests run together in batches. Gradients have a thread of
their own, which stops in the midst of a batch while predictions wait; methods without gradients run in the
background of the predictions' own engine.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from mlserver_hftasks.backends.base import Backend
from mlserver_hftasks.backends.gradients import Differentiable, PathBackend
from mlserver_hftasks.engine.batcher import Batcher
from mlserver_hftasks.engine.cost import CostModel
from mlserver_hftasks.engine.rows import FloatArray
from mlserver_hftasks.engine.scheduler import Limits, Scheduler
from mlserver_hftasks.engine.together import together
from mlserver_hftasks.errors import InvalidRequest, Overloaded, RequestTooLarge
from mlserver_hftasks.explain import absence
from mlserver_hftasks.explain.cases import Case
from mlserver_hftasks.explain.evaluation import Clock, attribute
from mlserver_hftasks.explain.methods import masking, path
from mlserver_hftasks.explain.methods.base import Estimate, too_late
from mlserver_hftasks.explain.options import ExplainOptions
from mlserver_hftasks.explain.result import BoolArray, Explanation
from mlserver_hftasks.explain.targets import targets_of
from mlserver_hftasks.explain.tokens import tokens_of
from mlserver_hftasks.tasks.base import Answered, Example, Task
from mlserver_hftasks.tasks.signature import Parameters

MAX_BATCH_TOKENS = {"cpu": 384}
"""Tokens of a batch of gradients; 16384 on other devices."""
BACKGROUND_TOKENS = {"cpu": 64}
"""Tokens of a batch in the background, since a prediction that comes in waits for it to end; or 2048."""
UNBOUNDED = 1 << 40
"""Of rows that wait: texts are counted where they come in."""
MAX_PAUSE_S = 0.02
"""Explanations wait for predictions between two products of matrices, but never longer than this."""
AUTO = {True: "integrated-gradients", False: "permutation-shap"}
"""The method where there are gradients, and where there are none."""


@dataclass(frozen=True, slots=True)
class ExplainLimits:
    """Bounds of one explainer."""

    max_explanations: int = 256
    """Most texts that are being explained or wait for it; beyond: `Overloaded`."""


def gradients_of(task: Task[Any], backend: Backend) -> PathBackend | None:
    """What gives gradients of a task's scores; None where there are none, or nothing to explain.

    The first call takes a while: make it where nobody waits, and before rows run.
    """
    if targets_of(task) is None or not isinstance(backend, Differentiable):
        return None
    return backend.gradients()


class Explainer:
    """Explains what one task says over one model. Made on the event loop that will await `explain`.

    `batcher` is the engine of the predictions, which explanations make way for; `backend` runs nothing yet.
    """

    def __init__(
        self,
        task: Task[Any],
        backend: Backend,
        batcher: Batcher,
        *,
        limits: ExplainLimits | None = None,
        on_thread_start: Callable[[], None] = lambda: None,
        name: str = "explain",
    ) -> None:
        self._task = task
        self._tokenizer = task.model.encoder.tokenizer
        self._targets = targets_of(task)
        self._batcher = batcher
        self._limits = limits or ExplainLimits()
        self._waiting = 0
        tokens = BACKGROUND_TOKENS.get(backend.description.device.partition(":")[0], 2048)
        batcher.open_background(_scheduler(tokens, padded=backend.padded))
        self._gradients = gradients_of(task, backend)
        self._paths: Batcher | None = None
        if self._gradients is not None:
            tokens = MAX_BATCH_TOKENS.get(self._gradients.device.type, 16384)
            self._gradients.pause = functools.partial(batcher.wait_until_idle, MAX_PAUSE_S)
            self._paths = Batcher(
                self._gradients,
                _scheduler(tokens, padded=self._gradients.padded),
                on_thread_start=on_thread_start,
                name=name,
            )

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that this model can be explained by, `auto` first; () if by none."""
        if self._targets is None:
            return ()
        return ("auto", *(path.METHODS if self._paths else ()), *masking.METHODS)

    async def explain(
        self, inputs: Mapping[str, Sequence[Any]], parameters: Parameters, options: ExplainOptions
    ) -> list[Explanation]:
        """One explanation per item; `inputs` and `parameters` as `Task.examples` takes them.

        Raises `InvalidRequest` for an option that this model or item cannot have, `Overloaded` at once when
        too many texts wait, `DeadlineExceeded` when the deadline passed before there was any estimate.
        """
        clock, method = Clock(options.deadline_ms), self._method(options)
        self._check_room(1)
        examples, references = await asyncio.to_thread(self._examples, inputs, parameters, options)
        with self._counted(len(examples)):
            answered = await self._predicted([*references, *examples], clock)
            cases = await asyncio.to_thread(
                self._cases, answered[len(references) :], answered[: len(references)], parameters, options,
                method, clock,
            )  # fmt: skip
            return await together(self._explained(case) for case in cases)

    async def close(self) -> None:
        """Fail what still waits, and end the thread."""
        if self._paths is not None:
            await self._paths.close()

    # -- before: what is asked, and of what ------------------------------------------------------

    def _method(self, options: ExplainOptions) -> str:
        """The method by its own name. Raises `InvalidRequest` for one that cannot be had here."""
        if options.method == "auto" and self.methods:
            return AUTO[self._paths is not None]
        if options.method not in self.methods:
            expected = (
                f"expected one of {', '.join(self.methods)}"
                if self.methods
                else (f"of {self._task.name} there is nothing to explain")
            )
            raise InvalidRequest(
                f"got {options.method}, which this model cannot be explained by, {expected} @ explain.method"
            )
        return options.method

    def _examples(
        self, inputs: Mapping[str, Sequence[Any]], parameters: Parameters, options: ExplainOptions
    ) -> tuple[list[Example], list[Example]]:
        """The items, and what they are compared with."""
        assert self._targets is not None
        references = self._targets.references(options.target, parameters)
        return self._task.examples(inputs, parameters), references

    def _check_room(self, count: int) -> None:
        most = self._limits.max_explanations
        if count > most:
            raise RequestTooLarge(
                f"{count} items to explain, expected at most {most} @ max_queue_explanations"
            )
        if self._waiting + count > most:
            raise Overloaded(
                f"{self._waiting} texts wait for their explanations and the request brings {count}, expected "
                f"at most {most} together @ max_queue_explanations",
                retry_after_s=2.0,
            )

    @contextmanager
    def _counted(self, count: int) -> Iterator[None]:
        self._check_room(count)
        self._waiting += count
        try:
            yield
        finally:
            self._waiting -= count

    async def _predicted(self, examples: Sequence[Example], clock: Clock) -> list[Answered]:
        """The model's answers, which say what to explain."""
        rows = [row for example in examples for row in example.rows]
        try:
            async with asyncio.timeout(clock.left_s):
                outputs = iter(await self._batcher.run(rows, background=True, since=clock.began))
        except TimeoutError:
            raise too_late() from None
        return [Answered(example, [next(outputs) for _ in example.rows]) for example in examples]

    def _cases(
        self,
        answered: Sequence[Answered],
        references: Sequence[Answered],
        parameters: Parameters,
        options: ExplainOptions,
        method: str,
        clock: Clock,
    ) -> list[Case]:
        assert self._targets is not None
        subjects = [self._targets.subject(item, options.target, parameters, references) for item in answered]
        return [
            Case(subject, tokens_of(subject, self._tokenizer, options.level), method, options, clock)
            for subject in subjects
        ]

    # -- the explanation of one item -------------------------------------------------------------

    async def _explained(self, case: Case) -> Explanation:
        if not case.subject.labels:
            return case.explanation(case.nothing(), "")
        attribution = self._along_path if case.method in path.METHODS else self._by_masking
        return case.explanation(*await attribution(case))

    async def _along_path(self, case: Case) -> tuple[Estimate, str]:
        """By gradients: features are tokens, and words are summed up afterwards."""
        assert self._paths is not None
        paths = self._paths
        absent, name = absence.on_path(case.options.baseline, self._tokenizer)

        async def evaluate(alphas: Sequence[float]) -> list[path.Point | None]:
            known = await case.clock.run(
                lambda rows, began: paths.run(rows, since=began),
                [case.point_row(alpha, absent) for alpha in alphas],
            )
            return [None if out is None else path.Point(out["score"], out["contribution"]) for out in known]

        method = path.METHODS[case.method](case.effort)
        numbers = len(case.subject.labels) * len(case.tokens.kept)
        return await attribute(method, evaluate, numbers=numbers), name

    async def _by_masking(self, case: Case) -> tuple[Estimate, str]:
        """By leaving features out, in the background of the predictions."""
        tokens = case.tokens
        absent, name = absence.in_text(case.options.baseline, self._tokenizer)

        async def evaluate(masks: Sequence[BoolArray]) -> list[FloatArray | None]:
            rows = [case.masked_row(mask, absent) for mask in masks]
            known = await case.clock.run(
                lambda rows, began: self._batcher.run(rows, background=True, since=began), rows
            )
            return [None if outputs is None else case.scores(outputs) for outputs in known]

        method = masking.METHODS[case.method](len(tokens.groups), case.effort)
        # A permutation of n features is n coalitions of n.
        estimate = await attribute(method, evaluate, numbers=len(tokens.groups) ** 2)
        return replace(estimate, attributions=tokens.scattered(estimate.attributions)), name


def _scheduler(max_batch_tokens: int, *, padded: bool) -> Scheduler:
    limits = Limits(max_batch_tokens=max_batch_tokens, max_queue_rows=UNBOUNDED, max_queue_tokens=UNBOUNDED)
    return Scheduler(limits, CostModel(), padded=padded)
