"""Keeps the event loop free: work that takes long goes to threads, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from mlserver_hftasks.errors import DeadlineExceeded, Overloaded

T = TypeVar("T")

GRACE_S = 10.0
"""How long an engine may take to end a generation that is late: a step that runs is not interrupted."""

INLINE_CHARS = 4_000
"""Requests up to this size are decoded and tokenized on the event loop: under a millisecond."""
BULK_CHARS = 100_000
"""Requests beyond this size have a lane of their own, so that they do not hold up the others."""
MAX_WAITING = 64
"""Most requests that wait for a lane; beyond: 429."""


class Lane:
    """A few threads, and a bounded queue before them."""

    def __init__(self, name: str, threads: int) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=f"hftasks-{name}")
        self._waiting = 0

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """Call the function on a thread. Raises `Overloaded` if too many wait already."""
        if self._waiting >= MAX_WAITING:
            raise Overloaded(
                f"{self._waiting} requests wait to be tokenized or encoded, expected less than {MAX_WAITING} "
                "@ server"
            )
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)
        finally:
            self._waiting -= 1


_usual = Lane("cpu", 2)
_bulk = Lane("bulk", 1)


async def run_for(characters: int, function: Callable[..., T], *args: Any) -> T:
    """Call the function where work on so many characters belongs: here, or on a thread."""
    if characters <= INLINE_CHARS:
        return function(*args)
    return await (_usual if characters <= BULK_CHARS else _bulk).run(function, *args)


class Deadline:
    """Raises `DeadlineExceeded` once the timeout has passed since it was made."""

    def __init__(self, timeout_ms: float | None) -> None:
        self._started = asyncio.get_running_loop().time()
        self._ms = timeout_ms
        self._timeout = asyncio.timeout_at(self._when())

    def tighten(self, timeout_ms: float | None) -> None:
        """Take this timeout instead, if it is shorter."""
        if timeout_ms is not None and (self._ms is None or timeout_ms < self._ms):
            self._ms = timeout_ms
            self._timeout.reschedule(self._when())

    @property
    def until(self) -> float | None:
        """When the timeout passes, in seconds of `time.monotonic`; None for never."""
        when = self._when()
        return None if when is None else time.monotonic() + when - asyncio.get_running_loop().time()

    def leave_to_engine(self) -> None:
        """Raise no more by then: an engine that was told `until` returns what it has, within `GRACE_S`."""
        when = self._when()
        self._timeout.reschedule(None if when is None else when + GRACE_S)

    def _when(self) -> float | None:
        return None if self._ms is None else self._started + self._ms / 1e3

    async def __aenter__(self) -> Deadline:
        await self._timeout.__aenter__()
        return self

    async def __aexit__(self, *exc_info: Any) -> None:
        try:
            await self._timeout.__aexit__(*exc_info)
        except TimeoutError:
            raise DeadlineExceeded(
                f"no answer within {self._ms:g} ms, expected one by then @ timeout_ms"
            ) from None
