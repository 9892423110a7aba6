"""What runs the rows of an explainer, and what they make way for.

Of a task that runs rows, explanations run beside the predictions: gradients on a thread of their own, the
rest in the background of the predictions' engine. Of a task that generates they run on threads of their own,
and stop while anything is generated.
"""

from __future__ import annotations

import asyncio
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

from mlserver_hftasks.backends.base import Backend
from mlserver_hftasks.backends.gradients import Differentiable, PathBackend, ScoredRow
from mlserver_hftasks.engine.batcher import Batcher
from mlserver_hftasks.engine.cost import CostModel
from mlserver_hftasks.engine.generator import Generator
from mlserver_hftasks.engine.rows import FloatArray, Outputs, Row
from mlserver_hftasks.engine.scheduler import Limits, Scheduler
from mlserver_hftasks.engine.together import together
from mlserver_hftasks.tasks.base import Answered, Example
from mlserver_hftasks.tasks.decoding import prompts_of, regrouped

MAX_BATCH_TOKENS = {"cpu": 384}
"""Tokens of a batch of gradients; 16384 on other devices."""
SCORED_TOKENS = {"cpu": 384}
"""The same where there are logits over a vocabulary for many of them; or 2048."""
BACKGROUND_TOKENS = {"cpu": 64}
"""Tokens of a batch in the background, since a prediction that comes in waits for it to end; or 2048."""
UNBOUNDED = 1 << 40
"""Of rows that wait: texts are counted where they come in."""
MAX_PAUSE_S = 0.02
"""Explanations wait for predictions between two products of matrices, but never longer than this."""
MAX_ANSWERS = 4
"""Answers that are generated at once to be explained: most places are those of other clients."""


class Foreground(Protocol):
    """What explanations make way for."""

    def wait_until_idle(self, seconds: float) -> bool:
        """Hold the calling thread until nothing runs, for so long at most."""


class Engines(ABC):
    """The engines of one explainer. Made on the event loop that will await them."""

    paths: Batcher | None = None
    """Runs `PathRow`s; None where there are no gradients."""

    @abstractmethod
    async def answered(self, examples: Sequence[Example], since: float) -> list[Answered]:
        """What the model answers to the items of an explanation that began then."""

    @abstractmethod
    async def run(self, rows: Sequence[Row], since: float) -> list[Outputs]:
        """The outputs of `ScoredRow`s, of which `score_of` is to be read."""

    @abstractmethod
    def score_of(self, row: ScoredRow, outputs: Outputs) -> FloatArray:
        """[K]"""

    async def close(self) -> None:
        """Fail what still waits, and end the threads."""
        if self.paths is not None:
            await self.paths.close()


class PredictingEngines(Engines):
    """Beside the engine of the predictions, which runs `backend`."""

    def __init__(
        self,
        backend: Backend,
        batcher: Batcher,
        gradients: PathBackend | None,
        *,
        on_thread_start: Callable[[], None] = lambda: None,
        name: str = "explain",
    ) -> None:
        self._batcher = batcher
        tokens = BACKGROUND_TOKENS.get(_kind(backend), 2048)
        batcher.open_background(_scheduler(tokens, padded=backend.padded))
        if gradients is not None:
            gradients.pause = functools.partial(batcher.wait_until_idle, MAX_PAUSE_S)
            tokens = MAX_BATCH_TOKENS.get(gradients.device.type, 16384)
            self.paths = _paths(gradients, tokens, on_thread_start, name)

    async def answered(self, examples: Sequence[Example], since: float) -> list[Answered]:
        """See `Engines`."""
        return await _answered(self._batcher, examples, since)

    async def run(self, rows: Sequence[Row], since: float) -> list[Outputs]:
        """See `Engines`."""
        return await self._batcher.run(rows, background=True, since=since)

    def score_of(self, row: ScoredRow, outputs: Outputs) -> FloatArray:
        """See `Engines`."""
        with torch.inference_mode():
            tensors = {name: torch.from_numpy(np.ascontiguousarray(each)) for name, each in outputs.items()}
            scores: FloatArray = row.score(tensors).float().numpy()
        return scores


class GeneratingEngines(Engines):
    """Beside the engines of a model that generates.

    `scoring` runs `ScoredRow`s, and has its gradients already if it has any. `generator` takes prompts,
    `batcher` what that does not take.
    """

    def __init__(
        self,
        scoring: Backend,
        batcher: Batcher,
        generator: Generator | None,
        *,
        on_thread_start: Callable[[], None] = lambda: None,
        name: str = "explain",
    ) -> None:
        self._batcher = batcher
        self._generator = generator
        self._scoring = scoring
        self._places = asyncio.Semaphore(MAX_ANSWERS)
        batcher.open_background(_scheduler(BACKGROUND_TOKENS["cpu"], padded=True))
        tokens = SCORED_TOKENS.get(_kind(scoring), 2048)
        self._scores = Batcher(
            scoring,
            _scheduler(tokens, padded=scoring.padded),
            on_thread_start=on_thread_start,
            name=f"{name}-scores",
        )
        gradients = scoring.gradients() if isinstance(scoring, Differentiable) else None
        if gradients is not None:
            gradients.pause = pause_for(batcher, generator)
            self.paths = _paths(gradients, tokens, on_thread_start, name)

    async def answered(self, examples: Sequence[Example], since: float) -> list[Answered]:
        """See `Engines`."""
        if self._generator is None or prompts_of(examples) is None:
            return await _answered(self._batcher, examples, since)
        parts = await together(self._generated(self._generator, example) for example in examples)
        return [answered for part in parts for answered in part]

    async def run(self, rows: Sequence[Row], since: float) -> list[Outputs]:
        """See `Engines`."""
        return await self._scores.run(rows, since=since)

    def score_of(self, row: ScoredRow, outputs: Outputs) -> FloatArray:
        """See `Engines`."""
        return outputs["score"]

    async def close(self) -> None:
        """See `Engines`."""
        await super().close()
        await self._scores.close()
        self._scoring.close()

    async def _generated(self, generator: Generator, example: Example) -> list[Answered]:
        prompts = prompts_of([example])
        assert prompts is not None
        async with self._places:
            return regrouped([example], await generator.run(prompts))


def scoring_of(make: Callable[[Callable[[], object]], Backend], *foreground: Foreground | None) -> Backend:
    """The scoring backend that `make` makes, with its gradients, which makes way from the beginning on."""
    scoring = make(pause_for(*foreground))
    if isinstance(scoring, Differentiable):
        scoring.gradients()
    return scoring


def pause_for(*foreground: Foreground | None) -> Callable[[], None]:
    """Holds the calling thread while anything runs there, but never for long."""
    engines = [each for each in foreground if each is not None]

    def pause() -> None:
        for each in engines:
            each.wait_until_idle(MAX_PAUSE_S)

    return pause


async def _answered(batcher: Batcher, examples: Sequence[Example], since: float) -> list[Answered]:
    rows = [row for example in examples for row in example.rows]
    outputs = iter(await batcher.run(rows, background=True, since=since))
    return [Answered(example, [next(outputs) for _ in example.rows]) for example in examples]


def _paths(
    gradients: PathBackend, max_batch_tokens: int, on_thread_start: Callable[[], None], name: str
) -> Batcher:
    scheduler = _scheduler(max_batch_tokens, padded=gradients.padded)
    return Batcher(gradients, scheduler, on_thread_start=on_thread_start, name=name)


def _kind(backend: Backend) -> str:
    """The device without its number."""
    return backend.description.device.partition(":")[0]


def _scheduler(max_batch_tokens: int, *, padded: bool) -> Scheduler:
    limits = Limits(max_batch_tokens=max_batch_tokens, max_queue_rows=UNBOUNDED, max_queue_tokens=UNBOUNDED)
    return Scheduler(limits, CostModel(), padded=padded)
