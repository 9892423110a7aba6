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

Run = Callable[[Sequence[Row], float], Awaitable[list[Outputs]]]
"""An engine: rows, and when the explanation that they belong to began."""


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
        tasks = [asyncio.ensure_future(run([row], self.began)) for row in rows]
        try:
            done, _ = await asyncio.wait(tasks, timeout=left)
            return [task.result()[0] if task in done else None for task in tasks]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def attribute(
    method: Generator[Sequence[Wanted], Sequence[Known | None], Estimate],
    evaluate: Callable[[Sequence[Wanted]], Awaitable[Sequence[Known | None]]],
) -> Estimate:
    """The estimate of a method; `evaluate` gives None for what it has no time for."""
    try:
        wanted = next(method)
        while True:
            wanted = method.send(await evaluate(wanted))
    except StopIteration as end:
        estimate: Estimate = end.value
        return estimate
