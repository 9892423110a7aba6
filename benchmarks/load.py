"""The load generator: clients that wait for their answers (closed loop), arrivals that do not (open loop)."""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import uvloop

from benchmarks import http
from benchmarks.http import AnswerError, Response

T = TypeVar("T")

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 1024
"""An open loop opens no more; what arrives beyond waits, and its wait counts."""


class Target(Protocol):
    """Where requests go and what they are; `benchmarks.v2` has the usual one."""

    host: str
    port: int

    def request(self, index: int) -> bytes:
        """The HTTP request number `index`."""

    def is_answer(self, index: int, body: bytes) -> bool:
        """Whether the body of a 200 answers request number `index` and no other."""


class Connection(Protocol):
    """What a client talks through; `benchmarks.http` and `benchmarks.grpc` have one each."""

    surplus_bytes: int

    @property
    def closed(self) -> bool:
        """Whether it can be used no more."""

    async def exchange(self, request: bytes) -> Response:
        """Send a request and read its answer. Raises `AnswerError` if the connection breaks."""

    def close(self) -> None:
        """Hang up."""


Connect = Callable[[str, int], Awaitable[Connection]]


@dataclass(frozen=True, slots=True)
class Answer:
    """One request's life, in seconds of the monotonic clock."""

    index: int
    due_s: float
    """When it should have left: in an open loop the latency counts from here."""
    sent_s: float
    done_s: float
    status: int
    """0 if the connection broke."""
    body: bytes

    @property
    def latency_ms(self) -> float:
        """From due to done."""
        return 1e3 * (self.done_s - self.due_s)


@dataclass(slots=True)
class Load:
    """What a run of the generator saw."""

    target: Target
    answers: list[Answer] = field(default_factory=list)
    """In the order in which they came."""
    sent: int = 0
    surplus_bytes: int = 0
    client_cpu_s: float = 0.0
    """CPU time of the generator's process."""
    window: slice = field(default_factory=lambda: slice(None))
    """The answers that count: without the first of every client, and the last."""

    @property
    def counted(self) -> list[Answer]:
        """The answers in the window."""
        return self.answers[self.window]

    @property
    def per_second(self) -> float:
        """Answers with status 200 per second of the window."""
        counted = self.counted
        first = self.answers[self.window.start - 1].done_s if self.window.start else counted[0].sent_s
        return sum(answer.status == 200 for answer in counted) / (counted[-1].done_s - first)

    def latencies_ms(self, status: int = 200) -> list[float]:
        """Of the counted answers with that status."""
        return [answer.latency_ms for answer in self.counted if answer.status == status]

    @property
    def faults(self) -> int:
        """Requests without their own answer, and answers without a request. Broken connections too."""
        good = {200: self.target.is_answer}
        wrong = sum(
            answer.status == 0 or not good.get(answer.status, _any_body)(answer.index, answer.body)
            for answer in self.answers
        )
        seen_twice = len(self.answers) - len({answer.index for answer in self.answers})
        return wrong + seen_twice + (self.sent - len(self.answers)) + (self.surplus_bytes > 0)

    @property
    def lag_ms(self) -> float:
        """How late the generator itself was, 99th percentile."""
        return percentile([1e3 * (answer.sent_s - answer.due_s) for answer in self.answers], 99)

    @property
    def client_us(self) -> float:
        """CPU time of the generator per request, in microseconds."""
        return 1e6 * self.client_cpu_s / max(self.sent, 1)


def _any_body(index: int, body: bytes) -> bool:
    return True


def percentile(values: Sequence[float], percent: float) -> float:
    """That percentile; NaN of nothing."""
    return float(np.percentile(values, percent)) if len(values) else float("nan")


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine of this module on a loop of its own, without pauses for garbage collection."""
    gc.collect()
    gc.disable()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(main)
    finally:
        gc.enable()


async def closed_loop(
    target: Target, clients: int, counted: int, *, limit_s: float, connect: Connect = http.connect
) -> Load:
    """`clients` that send their next request when they have their answer, until `counted` came in the window.

    The window begins when each client has had one answer on average, and all of them are busy in it.
    It is a whole number of answers per client: a server may answer all clients at once, and a window
    that ends within such a burst has its time, but not all of its answers. Stops after `limit_s`
    whatever happened.
    """
    counted = -(-counted // clients) * clients
    load = Load(target, window=slice(clients, clients + counted))
    indices = itertools.count()
    connections: list[Connection] = [await connect(target.host, target.port) for _ in range(clients)]

    async def client(connection: Connection) -> None:
        while len(load.answers) < clients + counted:
            if not await _exchange(load, connection, next(indices), None):
                connections.append(connection := await connect(target.host, target.port))

    with _measured(load, connections):
        try:
            async with asyncio.timeout(limit_s):
                await asyncio.gather(*map(client, connections))
        except (TimeoutError, OSError) as error:
            logger.warning("the run was cut short: %r", error)
    return load


async def open_loop(
    target: Target, arrivals: Iterable[float], *, limit_s: float, open_first: int = 32
) -> Load:
    """Send at the given offsets (seconds from now), whether or not earlier requests are answered.

    `open_first` connections are opened before it begins, further ones as they are needed.
    """
    load = Load(target)
    connections = [await http.connect(target.host, target.port) for _ in range(open_first)]
    idle = list(connections)
    room = asyncio.Semaphore(MAX_CONNECTIONS)
    running: set[asyncio.Task[None]] = set()

    async def one(index: int, due: float) -> None:
        async with room:
            while idle and idle[-1].closed:  # a server may end a connection that was idle for long
                idle.pop()
            if idle:
                connection = idle.pop()
            else:
                connection = await http.connect(target.host, target.port)
                connections.append(connection)
            if await _exchange(load, connection, index, due):
                idle.append(connection)

    with _measured(load, connections):
        try:
            async with asyncio.timeout(limit_s):
                begin = time.monotonic()
                for index, offset in enumerate(arrivals):
                    due = begin + offset
                    if (delay := due - time.monotonic()) > 0:
                        await asyncio.sleep(delay)
                    task = asyncio.create_task(one(index, due))
                    running.add(task)
                    task.add_done_callback(running.discard)
                await asyncio.gather(*running)
        except (TimeoutError, OSError) as error:
            logger.warning("the run was cut short: %r", error)
            for task in running:
                task.cancel()
    return load


def poisson(
    rate: float, seconds: float, *, seed: int, until: Callable[[], bool] = lambda: False
) -> Iterator[float]:
    """Offsets of arrivals at `rate` per second, for so many seconds or until a condition holds."""
    draw = np.random.default_rng(seed)
    offset = float(draw.exponential(1 / rate))
    while offset < seconds and not until():
        yield offset
        offset += float(draw.exponential(1 / rate))


async def _exchange(load: Load, connection: Connection, index: int, due: float | None) -> bool:
    """One request and its answer; whether the connection can be used again."""
    request = load.target.request(index)
    sent = time.monotonic()
    load.sent += 1
    try:
        response = await connection.exchange(request)
        status, body = response.status, response.body
    except AnswerError as error:
        status, body = 0, str(error).encode()
        await asyncio.sleep(0.01)  # a server that is gone must not make the loop spin
    done = time.monotonic()
    load.answers.append(Answer(index, sent if due is None else due, sent, done, status, body))
    return status != 0


@contextmanager
def _measured(load: Load, connections: Sequence[Connection]) -> Iterator[None]:
    cpu = time.process_time()
    try:
        yield
    finally:
        load.client_cpu_s = time.process_time() - cpu
        for connection in connections:
            load.surplus_bytes += connection.surplus_bytes
            connection.close()
