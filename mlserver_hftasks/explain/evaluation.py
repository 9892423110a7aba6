"""Runs methods of attribution: their evaluations as rows of an engine, until they end or time is up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Generator, Sequence
from typing import TypeVar

from mlserver_hftasks.engine.rows import Outputs, Row
from mlserver_hftasks.explain.methods.base import Estimate

Wanted = TypeVar("Wanted")
Known = TypeVar("Known")

INLINE_NUMBERS = 512
"""Scores x features with which a step of a method takes less than a millisecond."""

Run = Callable[[Sequence[Row], float], Awaitable[list[Outputs]]]
"""An engine: rows, and when the explanation that they belong to began."""


SECONDS_PER_RANK = 1e-3
"""What is less important counts as having come so much later: so all items get their most important first."""
FIRST_ROWS, NEXT_ROWS = 2, 16
"""Rows that are ready together or not at all, where time may be short."""


class Clock:
    """When an explanation began, and when it must end: seconds of `time.monotonic`."""

    def __init__(self, deadline_ms: float | None) -> None:
        self.began = time.monotonic()
        self._until = None if deadline_ms is None else self.began + deadline_ms / 1e3

    @property
    def left_s(self) -> float | None:
        """Seconds, or None if there is no deadline."""
        return None if self._until is None else self._until - time.monotonic()

    async def run(self, run: Run, rows: Sequence[Row]) -> list[Outputs | None]:
        """The outputs of the rows, None for those that are not ready in time."""
        left = self.left_s
        if left is None:
            return list(await run(rows, self.began))
        if left <= 0:
            return [None] * len(rows)
        parts = _parts(len(rows))
        tasks = [
            asyncio.ensure_future(run(rows[start:end], self.began + start * SECONDS_PER_RANK))
            for start, end in parts
        ]
        try:
            done, _ = await asyncio.wait(tasks, timeout=left)
            return [
                output
                for task, (start, end) in zip(tasks, parts, strict=True)
                for output in (task.result() if task in done else [None] * (end - start))
            ]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _parts(count: int) -> list[tuple[int, int]]:
    """Starts and ends: the first rows, without which there is no estimate, then the others."""
    starts = [0, *range(FIRST_ROWS, count, NEXT_ROWS)]
    return list(zip(starts, [*starts[1:], count], strict=True))


async def attribute(
    method: Generator[Sequence[Wanted], Sequence[Known | None], Estimate],
    evaluate: Callable[[Sequence[Wanted]], Awaitable[Sequence[Known | None]]],
    *,
    numbers: int,
) -> Estimate:
    """The estimate of a method; `evaluate` gives None for what it has no time for.

    A method that thinks about many `numbers` at a time does so on a thread, not on the event loop.
    """
    answers: Sequence[Known | None] | None = None
    while True:
        if numbers > INLINE_NUMBERS:
            wanted = await asyncio.to_thread(_step, method, answers)
        else:
            wanted = _step(method, answers)
        if isinstance(wanted, Estimate):
            return wanted
        answers = await evaluate(wanted)


def _step(
    method: Generator[Sequence[Wanted], Sequence[Known | None], Estimate],
    answers: Sequence[Known | None] | None,
) -> Sequence[Wanted] | Estimate:
    """What the method wants next, or what it ends with."""
    try:
        return next(method) if answers is None else method.send(answers)
    except StopIteration as end:
        estimate: Estimate = end.value
        return estimate
