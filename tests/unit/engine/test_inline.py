"""Short batches run on the event loop, all others on the device thread, and never two at once."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlserver_hftasks.engine.batcher import Batcher
from mlserver_hftasks.engine.cost import CostModel
from mlserver_hftasks.engine.rows import Outputs, Row
from mlserver_hftasks.engine.scheduler import Limits, Scheduler
from mlserver_hftasks.errors import ForwardFailed, Overloaded, RequestTooLarge, Unavailable
from tests.unit.engine.test_batcher import PATIENCE_S, POISON, SumBackend, row, serving, sums

PER_TOKEN_S = 1e-3
SHORT_S = 5.5e-3
"""Rows of up to five tokens run on the event loop."""


class Fixed(CostModel):
    """A millisecond per token, whatever was seen."""

    def observe(self, cost: int, seconds: float, *, lasting: bool = False) -> None:
        self.per_token_s = PER_TOKEN_S

    @property
    def knows(self) -> bool:
        return True

    @property
    def knee_tokens(self) -> float:
        return 1e9


class Watched(SumBackend):
    """Says on which thread each batch ran, and whether two ever ran at once."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__(seconds)
        self.threads: list[int] = []
        self.overlaps = 0
        self._alone = threading.Lock()

    def forward(self, rows: Sequence[Row]) -> Sequence[Outputs]:
        if not self._alone.acquire(blocking=False):
            self.overlaps += 1
            raise RuntimeError("two batches at once")
        try:
            self.threads.append(threading.get_ident())
            return super().forward(rows)
        finally:
            self._alone.release()


def fixed() -> CostModel:
    model = Fixed()
    model.observe(1, 0.0)
    return model


def inline(backend: Any, **options: Any) -> Any:
    return serving(backend, cost=fixed(), inline_s=SHORT_S, **options)


async def test_a_short_batch_runs_on_the_event_loop_and_a_long_one_does_not() -> None:
    backend, here = Watched(), threading.get_ident()
    async with inline(backend) as batcher, asyncio.timeout(PATIENCE_S):
        assert sums(await batcher.run([row(1, 2, 3)])) == [6]
        assert sums(await batcher.run([row(*range(9))])) == [36]
        assert sums(await batcher.run([row(4)])) == [4]
    assert [thread == here for thread in backend.threads] == [True, False, True]


@pytest.mark.parametrize("options", [{"cost": CostModel()}, {"cost": fixed(), "inline_s": 0.0}])
async def test_what_is_not_known_to_be_short_leaves_the_event_loop_alone(options: dict[str, Any]) -> None:
    backend = Watched()
    async with serving(backend, **{"inline_s": 1.0, **options}) as batcher, asyncio.timeout(PATIENCE_S):
        assert sums(await batcher.run([row(1)])) == [1]
    assert threading.get_ident() not in backend.threads


async def test_an_engine_that_has_run_nothing_is_idle() -> None:
    async with inline(Watched()) as batcher:
        assert batcher.wait_until_idle(0)


async def test_requests_of_one_pass_of_the_loop_share_a_batch() -> None:
    backend = Watched()
    async with inline(backend) as batcher, asyncio.timeout(PATIENCE_S):
        for _ in range(3):
            got = await asyncio.gather(*(batcher.run([row(number)]) for number in range(4)))
            assert [sums(outputs) for outputs in got] == [[0], [1], [2], [3]]
    assert backend.batches == [[0, 1, 2, 3]] * 3


async def test_the_loop_does_other_things_between_short_batches() -> None:
    backend = Watched(seconds=0.002)
    limits = Limits(max_batch_rows=1)
    async with inline(backend, limits=limits) as batcher, asyncio.timeout(PATIENCE_S):
        work = asyncio.create_task(batcher.run([row(number) for number in range(20)]))
        passes = 0
        while not work.done():
            await asyncio.sleep(0)
            passes += 1
        assert sums(await work) == list(range(20))
    assert passes >= 20
    assert batcher.wait_until_idle(0)


async def test_a_row_that_fails_on_the_event_loop_fails_its_own_request_only() -> None:
    async with inline(Watched()) as batcher, asyncio.timeout(PATIENCE_S):
        good, bad = (
            asyncio.create_task(batcher.run([row(1)])),
            asyncio.create_task(batcher.run([row(POISON)])),
        )
        assert sums(await good) == [1]
        with pytest.raises(ForwardFailed, match="666"):
            await bad
        assert sums(await batcher.run([row(2)])) == [2]


@pytest.mark.parametrize("step", ["next_batch", "finished"])
async def test_a_scheduler_that_fails_on_the_event_loop_tells_everybody(
    monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    async with inline(Watched()) as batcher, asyncio.timeout(PATIENCE_S):
        monkeypatch.setattr(batcher._scheduler, step, lambda *_: 1 / 0)
        with pytest.raises(ForwardFailed, match="ZeroDivisionError"):
            await batcher.run([row(1)])
        with pytest.raises(Unavailable):
            await batcher.run([row(1)])


async def test_a_report_that_fails_does_not_end_the_engine() -> None:
    def observe(report: object) -> None:
        raise OSError("no space left for metrics")

    failures: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: failures.append(context))
    async with inline(Watched(), observe=observe) as batcher, asyncio.timeout(PATIENCE_S):
        assert [sums(await batcher.run([row(number)])) for number in (1, 2, 3)] == [[1], [2], [3]]
    assert [str(failure["exception"]) for failure in failures] == ["no space left for metrics"] * 3


async def test_rows_that_wait_are_seen_from_the_first_batch_on() -> None:
    seen: list[int] = []
    backend, limits = Watched(seconds=0.01), Limits(max_batch_rows=2)
    async with serving(backend, limits=limits, observe_queue=seen.append) as batcher:
        work = asyncio.create_task(batcher.run([row(1)] * 6))
        while not backend.batches:
            await asyncio.sleep(0)
        assert seen[:1] == [4]
        await work
    assert seen[-1] == 0


async def test_a_request_that_is_refused_leaves_an_idle_engine_idle() -> None:
    async with inline(Watched(), limits=Limits(max_queue_rows=2)) as batcher, asyncio.timeout(PATIENCE_S):
        with pytest.raises(RequestTooLarge):
            await batcher.run([row(1)] * 3)
        assert batcher.wait_until_idle(0)


async def test_threads_are_prepared_wherever_a_batch_runs() -> None:
    prepared: list[int] = []
    async with (
        inline(Watched(), on_thread_start=lambda: prepared.append(threading.get_ident())) as batcher,
        asyncio.timeout(PATIENCE_S),
    ):
        await batcher.run([row(1)])
        await batcher.run([row(*range(9))])
    assert set(prepared) == {threading.get_ident(), batcher._thread.ident}


async def test_the_background_never_runs_on_the_event_loop() -> None:
    backend = Watched()
    async with inline(backend) as batcher, asyncio.timeout(PATIENCE_S):
        batcher.open_background(Scheduler(Limits(), fixed(), padded=False))
        tasks = [asyncio.create_task(batcher.run([row(number)], background=True)) for number in (1, 2)]
        front = asyncio.create_task(batcher.run([row(3)]))
        assert [sums(await task) for task in tasks] == [[1], [2]]
        assert sums(await front) == [3]
    here = [thread == threading.get_ident() for thread in backend.threads]
    assert backend.batches == [[3], [1, 2]]
    assert here == [True, False]


CLIENT = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 2)), min_size=1, max_size=6)
"""What a client asks for, one after another: tokens of a row, and what it does before."""


@settings(max_examples=25, deadline=None)
@given(clients=st.lists(CLIENT, min_size=1, max_size=8), leaver=st.integers(0, 8))
def test_nothing_is_lost_or_mixed_whoever_runs_it(clients: list[list[tuple[int, int]]], leaver: int) -> None:
    """Short and long batches in any order; one client leaves in the midst of it."""
    backend = Watched(seconds=0.0005)

    async def client(batcher: Batcher, number: int, asks: Sequence[tuple[int, int]]) -> None:
        for tokens, pause in asks:
            await asyncio.sleep(0 if pause < 2 else 0.001)
            wanted = row(*[number + 1] * tokens, key=number % 2)
            with_company = [wanted, row(number)] if pause else [wanted]
            with_company = [Row(each.arrays, number % 2) for each in with_company]
            expected = [(number + 1) * tokens, number][: len(with_company)]
            assert sums(await batcher.run(with_company)) == expected

    async def main() -> None:
        async with inline(backend, limits=Limits(max_batch_rows=8)) as batcher, asyncio.timeout(PATIENCE_S):
            tasks = [asyncio.create_task(client(batcher, *each)) for each in enumerate(clients)]
            if leaver < len(tasks):
                await asyncio.sleep(0.001)
                tasks[leaver].cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                assert result is None or isinstance(result, asyncio.CancelledError)
            deadline = time.monotonic() + PATIENCE_S
            while not batcher.wait_until_idle(0) and time.monotonic() < deadline:
                await asyncio.sleep(0.001)
            assert batcher.wait_until_idle(0)

    asyncio.run(main())
    assert backend.overlaps == 0


async def test_a_full_queue_refuses_while_short_batches_run() -> None:
    async with inline(Watched(), limits=Limits(max_queue_rows=3)) as batcher, asyncio.timeout(PATIENCE_S):
        results = await asyncio.gather(*(batcher.run([row(1)]) for _ in range(5)), return_exceptions=True)
        assert [isinstance(result, Overloaded) for result in results] == [False] * 3 + [True] * 2
        assert all(np.isclose(sums(result), [1]) for result in results[:3] if isinstance(result, list))
