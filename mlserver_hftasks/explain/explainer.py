"""From a request to its explanations.

The request's items are answered, unless they are already. Then each is explained by itself: a method asks for
evaluations, and those of all items and all requests run together in batches, in `engines` that make way for
predictions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from mlserver_hftasks.backends.base import Backend
from mlserver_hftasks.backends.gradients import Differentiable, PathBackend
from mlserver_hftasks.engine.rows import FloatArray
from mlserver_hftasks.engine.together import together
from mlserver_hftasks.errors import Overloaded, RequestTooLarge
from mlserver_hftasks.explain import absence
from mlserver_hftasks.explain.cases import Case
from mlserver_hftasks.explain.engines import Engines
from mlserver_hftasks.explain.evaluation import Clock, attribute
from mlserver_hftasks.explain.methods import masking, path
from mlserver_hftasks.explain.methods.base import Estimate, too_late
from mlserver_hftasks.explain.options import ExplainOptions, cannot_explain
from mlserver_hftasks.explain.result import BoolArray, Explanation
from mlserver_hftasks.explain.targets import targets_of
from mlserver_hftasks.explain.tokens import tokens_of
from mlserver_hftasks.tasks.base import Answered, Example, Task
from mlserver_hftasks.tasks.signature import Parameters

AUTO = {True: "integrated-gradients", False: "permutation-shap"}
"""The method where there are gradients, and where there are none."""


@dataclass(frozen=True, slots=True)
class ExplainLimits:
    """Bounds of one explainer."""

    max_explanations: int = 256
    """Most texts that are being explained or wait for it; beyond: `Overloaded`."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request's items, and what is run for them: either `examples` or `answered` has them."""

    references: Sequence[Example]
    examples: Sequence[Example]
    answered: Sequence[Answered]


def gradients_of(task: Task[Any], backend: Backend) -> PathBackend | None:
    """What gives gradients of a task's scores; None where there are none, or nothing to explain.

    The first call takes a while: make it where nobody waits, and before rows run.
    """
    if targets_of(task) is None or not isinstance(backend, Differentiable):
        return None
    return backend.gradients()


class Explainer:
    """Explains what one task says over one model. Made on the event loop that will await `explain`."""

    def __init__(
        self,
        task: Task[Any],
        engines: Engines,
        *,
        limits: ExplainLimits | None = None,
    ) -> None:
        self._task = task
        self._tokenizer = task.model.encoder.tokenizer
        self._targets = targets_of(task)
        self._engines = engines
        self._paths = engines.paths
        self._limits = limits or ExplainLimits()
        self._waiting = 0

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that this model can be explained by, `auto` first; () if by none."""
        if self._targets is None:
            return ()
        return ("auto", *(path.METHODS if self._paths else ()), *masking.METHODS)

    async def explain(
        self,
        inputs: Mapping[str, Sequence[Any]],
        parameters: Parameters,
        options: ExplainOptions,
        answered: Sequence[Answered] | None = None,
    ) -> list[Explanation]:
        """One explanation per item; `inputs` and `parameters` as `Task.examples` takes them.

        `answered`: the model's answers, where they are known; else the items are answered first.

        Raises `InvalidRequest` for an option that this model or item cannot have, `Overloaded` at once when
        too many texts wait, `DeadlineExceeded` when the deadline passed before there was any estimate.
        """
        clock, method = Clock(options.deadline_ms), self._method(options)
        self._check_room(1)
        asked = await asyncio.to_thread(self._asked, inputs, parameters, options, answered)
        with self._counted(len(asked.examples or asked.answered)):
            found = await self._predicted([*asked.references, *asked.examples], clock)
            references, items = found[: len(asked.references)], found[len(asked.references) :]
            cases = await asyncio.to_thread(
                self._cases, [*asked.answered, *items], references, parameters, options, method, clock
            )
            return await together(self._explained(case) for case in cases)

    async def close(self) -> None:
        """Fail what still waits, and end the thread."""
        await self._engines.close()

    # -- before: what is asked, and of what ------------------------------------------------------

    def _method(self, options: ExplainOptions) -> str:
        """The method by its own name. Raises `InvalidRequest` for one that cannot be had here."""
        if options.method == "auto" and self.methods:
            return AUTO[self._paths is not None]
        if options.method not in self.methods:
            raise cannot_explain(options.method, self.methods, self._task.name)
        return options.method

    def _asked(
        self,
        inputs: Mapping[str, Sequence[Any]],
        parameters: Parameters,
        options: ExplainOptions,
        answered: Sequence[Answered] | None,
    ) -> _Asked:
        """What is known of the items, and what must be run first."""
        targets = self._targets
        assert targets is not None
        references = targets.references(options.target, parameters)
        if answered is not None:
            examples = [item.example for item in answered]
        else:
            examples = self._task.examples(inputs, targets.answering(parameters))
        self._check_room(len(examples))
        known = targets.given(examples, options.target) or answered
        return _Asked(references, examples, []) if known is None else _Asked(references, [], list(known))

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
        try:
            async with asyncio.timeout(clock.left_s):
                return await self._engines.answered(examples, clock.began) if examples else []
        except TimeoutError:
            raise too_late() from None

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
        subject = self._targets.subject_per_token if options.per_token else self._targets.subject
        subjects = [subject(item, options.target, parameters, references) for item in answered]
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
            known = await case.clock.run(self._engines.run, rows)
            return [
                None if outputs is None else self._engines.score_of(row, outputs)
                for row, outputs in zip(rows, known, strict=True)
            ]

        method = masking.METHODS[case.method](len(tokens.groups), case.effort)
        # A permutation of n features is n coalitions of n.
        estimate = await attribute(method, evaluate, numbers=len(tokens.groups) ** 2)
        return replace(estimate, attributions=tokens.scattered(estimate.attributions)), name
