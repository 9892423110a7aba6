"""The batcher with a backend that really computes something: sums of token ids."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from mlserver_hftasks.engine.batcher import Batcher, BatchReport
from mlserver_hftasks.engine.cost import CostModel
from mlserver_hftasks.engine.rows import Decoding, Outputs, Row
from mlserver_hftasks.engine.scheduler import Limits, Scheduler
from mlserver_hftasks.errors import ForwardFailed, InvalidRequest, Overloaded, Unavailable

POISON = 666
"""A token id that the model cannot take."""
PATIENCE_S = 10.0
"""No test waits longer for anything."""


class SumBackend:
    """The sum and the number of the ids of each row; its batches can be watched, held up and slowed down."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.batches: list[list[int]] = []
        self.entered = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    def forward(self, rows: Sequence[Row]) -> Sequence[Outputs]:
        ids = [row.arrays["input_ids"] for row in rows]
        self.batches.append([int(values[0]) for values in ids])
        self.entered.set()
        assert self.gate.wait(PATIENCE_S)
        time.sleep(self.seconds)
        if any(POISON in values for values in ids):
            raise ValueError("the id 666 is not in the vocabulary")
        return [{"sum": np.float32(v.sum())[None], "tokens": np.float32(len(v))[None]} for v in ids]


def row(*ids: int, key: Any = None) -> Row:
    return Row({"input_ids": np.array(ids, dtype=np.int64)}, key)


def sums(outputs: Sequence[Outputs]) -> list[int]:
    return [int(output["sum"][0]) for output in outputs]


@asynccontextmanager
async def serving(
    backend: Any,
    *,
    limits: Limits | None = None,
    cost: CostModel | None = None,
    padded: bool = False,
    **options: Any,
) -> AsyncIterator[Batcher]:
    scheduler = Scheduler(limits or Limits(), cost or CostModel(), padded=padded)
    batcher = Batcher(backend, scheduler, **options)
    try:
        yield batcher
    finally:
        if isinstance(backend, SumBackend):
            backend.gate.set()
        await batcher.close()
        assert not batcher._thread.is_alive()
        assert not batcher._waiters
        assert batcher.queued_rows == 0


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.001)


async def hold(backend: SumBackend, batcher: Batcher) -> asyncio.Task[list[Outputs]]:
    """Occupy the device with a row until `backend.gate` is set."""
    backend.gate.clear()
    backend.entered.clear()
    held = asyncio.create_task(batcher.run([row(1)]))
    await until(backend.entered.is_set)
    return held


# -- answers -------------------------------------------------------------------------------------


async def test_outputs_come_in_the_order_of_the_rows() -> None:
    async with serving(SumBackend(), limits=Limits(max_batch_rows=3)) as batcher:
        outputs = await batcher.run([row(i, 1) for i in range(20)])
        assert sums(outputs) == [i + 1 for i in range(20)]
        assert await batcher.run([]) == []


@pytest.mark.parametrize("padded", [False, True])
async def test_many_clients_each_get_their_own(padded: bool) -> None:
    backend = SumBackend()
    generator = np.random.default_rng(0)
    limits = Limits(max_batch_rows=16, max_batch_tokens=200)

    async def client(number: int) -> None:
        for _ in range(10):
            wanted = [
                generator.integers(0, 500, generator.integers(1, 40)) for _ in range(generator.integers(1, 9))
            ]
            outputs = await batcher.run([row(*ids.tolist(), key=number % 3) for ids in wanted])
            assert sums(outputs) == [int(ids.sum()) for ids in wanted]
            assert [int(output["tokens"][0]) for output in outputs] == [len(ids) for ids in wanted]
            await asyncio.sleep(0)

    async with serving(backend, limits=limits, padded=padded) as batcher, asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*(client(number) for number in range(40)))
    assert max(len(batch) for batch in backend.batches) > 1  # clients shared batches


async def test_keys_do_not_mix() -> None:
    backend = SumBackend()
    async with serving(backend) as batcher:
        held = await hold(backend, batcher)
        waiting = [asyncio.create_task(batcher.run([row(10 + i, key=i % 2)])) for i in range(6)]
        await until(lambda: batcher.queued_rows == 6)
        backend.gate.set()
        await asyncio.gather(held, *waiting)
    assert sorted(map(sorted, backend.batches)) == [[1], [10, 12, 14], [11, 13, 15]]


async def test_an_idle_device_does_not_wait_for_company() -> None:
    backend = SumBackend()
    async with serving(backend) as batcher:
        for i in range(5):
            await batcher.run([row(i)])
    assert backend.batches == [[i] for i in range(5)]


# -- failures ------------------------------------------------------------------------------------


async def test_a_failing_row_fails_its_own_request_only() -> None:
    backend = SumBackend()
    reports: list[BatchReport] = []
    async with serving(backend, observe=reports.append) as batcher:
        held = await hold(backend, batcher)
        good = [asyncio.create_task(batcher.run([row(10 + i), row(20 + i)])) for i in range(8)]
        bad = asyncio.create_task(batcher.run([row(5), row(POISON), row(7)]))
        also_bad = asyncio.create_task(batcher.run([row(POISON), row(POISON)]))
        await until(lambda: batcher.queued_rows == 21)
        backend.gate.set()
        assert sums(await held) == [1]
        assert [sums(await task) for task in good] == [[10 + i, 20 + i] for i in range(8)]
        for task in (bad, also_bad):
            with pytest.raises(ForwardFailed, match="ValueError: the id 666 is not in the vocabulary"):
                await task
        assert sums(await batcher.run([row(3)])) == [3]
    together = next(report for report in reports if report.rows == 21)
    assert together.failed_rows == 3
    assert len(backend.batches[1]) == 21


async def test_errors_of_ours_keep_their_status() -> None:
    class Refusing:
        def forward(self, rows: Sequence[Row]) -> Sequence[Outputs]:
            raise InvalidRequest("not so @ inputs")

    async with serving(Refusing()) as batcher:
        with pytest.raises(InvalidRequest, match="not so"):
            await batcher.run([row(1)])


async def test_a_backend_that_loses_rows_is_noticed() -> None:
    class Losing:
        def forward(self, rows: Sequence[Row]) -> Sequence[Outputs]:
            return [{"sum": np.zeros(1, np.float32)}] * (len(rows) - 1)

    async with serving(Losing()) as batcher, asyncio.timeout(PATIENCE_S):
        with pytest.raises(ForwardFailed, match="0 outputs for 1 rows"):
            await batcher.run([row(1), row(2)])


@pytest.mark.parametrize("error", [RuntimeError("no such core"), SystemExit(1)])
async def test_a_device_thread_that_dies_tells_everybody(error: BaseException) -> None:
    def fail() -> None:
        assert started.wait(PATIENCE_S)
        raise error

    started = threading.Event()
    async with serving(SumBackend(), on_thread_start=fail) as batcher, asyncio.timeout(PATIENCE_S):
        waiting = [asyncio.create_task(batcher.run([row(i), row(i)])) for i in range(5)]
        await until(lambda: len(batcher._waiters) == 5)
        started.set()
        for task in waiting:
            with pytest.raises(ForwardFailed, match="the device thread failed"):
                await task
        with pytest.raises(Unavailable):
            await batcher.run([row(1)])


async def test_a_scheduler_that_fails_tells_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(SumBackend()) as batcher, asyncio.timeout(PATIENCE_S):
        monkeypatch.setattr(batcher._scheduler, "finished", lambda *_: 1 / 0)
        with pytest.raises(ForwardFailed, match="ZeroDivisionError"):
            await batcher.run([row(1)])


# -- clients that leave, and the end -------------------------------------------------------------


async def test_cancelling_takes_waiting_rows_back_and_disturbs_nobody() -> None:
    backend = SumBackend()
    async with serving(backend) as batcher:
        held = await hold(backend, batcher)
        leaving = asyncio.create_task(batcher.run([row(100), row(101)]))
        staying = asyncio.create_task(batcher.run([row(200), row(201)]))
        await until(lambda: batcher.queued_rows == 4)
        leaving.cancel()
        await asyncio.wait([leaving])
        assert leaving.cancelled()
        assert batcher.queued_rows == 2
        assert batcher._scheduler.queued_tokens == 2
        held.cancel()  # too late to be taken back, and its answer is dropped
        backend.gate.set()
        assert sums(await staying) == [200, 201]
        assert sums(await batcher.run([row(3)])) == [3]
    assert backend.batches == [[1], [200, 201], [3]]


async def test_a_client_that_leaves_with_half_its_rows_running() -> None:
    backend = SumBackend()
    async with serving(backend, limits=Limits(max_batch_rows=2)) as batcher:
        backend.gate.clear()
        task = asyncio.create_task(batcher.run([row(i) for i in range(5)]))
        await until(backend.entered.is_set)
        assert batcher.queued_rows == 3
        task.cancel()
        await asyncio.wait([task])
        assert batcher.queued_rows == 0
        backend.gate.set()
        assert sums(await batcher.run([row(9)])) == [9]
    assert backend.batches == [[0, 1], [9]]


async def test_timeout_frees_the_queue() -> None:
    backend = SumBackend()
    async with serving(backend) as batcher:
        held = await hold(backend, batcher)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await batcher.run([row(5)])
        assert batcher.queued_rows == 0
        backend.gate.set()
        assert sums(await held) == [1]


async def test_close_lets_the_running_batch_end_and_fails_what_waits() -> None:
    backend = SumBackend()
    async with serving(backend) as batcher, asyncio.timeout(PATIENCE_S):
        held = await hold(backend, batcher)
        waiting = [asyncio.create_task(batcher.run([row(i)])) for i in range(3)]
        await until(lambda: batcher.queued_rows == 3)
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0.02)
        assert not closing.done()
        with pytest.raises(Unavailable, match="unloaded"):
            await batcher.run([row(1)])
        backend.gate.set()
        await closing
        assert sums(await held) == [1]
        for task in waiting:
            with pytest.raises(Unavailable):
                await task
    assert backend.batches == [[1]]


async def test_close_twice_and_when_idle() -> None:
    async with serving(SumBackend()) as batcher:
        await batcher.close()
        with pytest.raises(Unavailable):
            await batcher.run([row(1)])


# -- admission, reports, the event loop ----------------------------------------------------------


async def test_a_full_queue_refuses_at_once() -> None:
    backend = SumBackend()
    async with serving(backend, limits=Limits(max_queue_rows=3)) as batcher:
        held = await hold(backend, batcher)
        waiting = asyncio.create_task(batcher.run([row(i) for i in range(3)]))
        await until(lambda: batcher.queued_rows == 3)
        with pytest.raises(Overloaded):
            await batcher.run([row(9)])
        with pytest.raises(Overloaded):
            batcher.check_admission()
        backend.gate.set()
        assert sums(await waiting) == [0, 1, 2]
        await held
        batcher.check_admission()


@pytest.mark.parametrize("padded", [False, True])
async def test_reports(padded: bool) -> None:
    reports: list[BatchReport] = []
    backend = SumBackend(seconds=0.03)
    cost = CostModel()
    for tokens in (1, 100):  # all overhead: rows of any length are worth a batch together
        cost.observe(tokens, 0.03, lasting=True)
    async with serving(backend, cost=cost, padded=padded, observe=reports.append) as batcher:
        held = await hold(backend, batcher)
        pair = asyncio.create_task(batcher.run([row(1, 2, 3), row(4)]))
        await until(lambda: batcher.queued_rows == 2)
        await asyncio.sleep(0.05)
        backend.gate.set()
        await asyncio.gather(held, pair)
    first, second = reports
    assert (first.rows, first.tokens, first.cost) == (1, 1, 1)
    assert (second.rows, second.tokens, second.cost) == (2, 4, 6 if padded else 4)
    assert len(second.queue_wait_s) == 2
    assert min(second.queue_wait_s) >= 0.05
    assert all(report.forward_s >= 0.03 for report in reports)
    assert all(report.failed_rows == 0 for report in reports)


async def test_the_depth_of_the_queue_is_told_as_it_changes() -> None:
    depths: list[int] = []
    backend = SumBackend()
    async with serving(backend, observe_queue=depths.append) as batcher:
        held = await hold(backend, batcher)
        depths.clear()
        waiting = [asyncio.create_task(batcher.run([row(1), row(2)])) for _ in range(2)]
        await until(lambda: len(depths) == 2)
        assert depths == [2, 4]
        waiting[0].cancel()
        await until(lambda: len(depths) == 3)
        assert depths[-1] == 2
        backend.gate.set()
        await asyncio.gather(held, waiting[1])
        await until(lambda: depths[-1] == 0)


async def test_the_cost_model_learns_from_batches_that_succeed() -> None:
    backend = SumBackend(seconds=0.01)
    cost = CostModel()
    batcher = Batcher(backend, Scheduler(Limits(), cost, padded=False))
    with pytest.raises(ForwardFailed):
        await batcher.run([row(POISON)])
    assert not cost.knows
    await batcher.run([row(1)])
    assert cost.seconds(1) >= 0.01
    await batcher.close()


async def test_the_event_loop_is_never_held_up() -> None:
    backend = SumBackend(seconds=0.3)
    async with serving(backend) as batcher:
        gaps = []
        for _ in range(3):  # on a busy machine anything may be late once
            task = asyncio.create_task(batcher.run([row(i) for i in range(50)]))
            worst, last = 0.0, time.monotonic()
            while not task.done():
                await asyncio.sleep(0.005)
                now = time.monotonic()
                worst, last = max(worst, now - last), now
            assert sums(await task) == list(range(50))
            gaps.append(worst)
            if worst < 0.05:
                return
    pytest.fail(f"the loop stood still for {gaps} s")


async def test_who_leaves_ends_the_rows_that_are_being_continued() -> None:
    backend = SumBackend()
    backend.gate.clear()
    async with serving(backend) as batcher:
        left, stayed = (
            Row({"input_ids": np.array([each])}, decoding=Decoding(max_new_tokens=9)) for each in (1, 2)
        )
        leaving = asyncio.create_task(batcher.run([left]))
        assert await asyncio.to_thread(backend.entered.wait, PATIENCE_S)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert left.decoding is not None and left.decoding.abandoned
        backend.gate.set()
        assert sums(await batcher.run([stayed])) == [2]
        assert stayed.decoding is not None and not stayed.decoding.abandoned
        assert stayed.cost == 1 + 9


# -- the background ------------------------------------------------------------------------------


async def test_the_background_runs_when_nothing_else_waits() -> None:
    backend = SumBackend()
    backend.gate.clear()
    async with serving(backend, limits=Limits(max_batch_rows=1)) as batcher, asyncio.timeout(PATIENCE_S):
        batcher.open_background(Scheduler(Limits(max_batch_rows=2), CostModel(), padded=False))
        tasks = [asyncio.create_task(batcher.run([row(1)]))]
        await until(backend.entered.is_set)
        tasks += [asyncio.create_task(batcher.run([row(number)], background=True)) for number in (7, 8, 9)]
        await asyncio.sleep(0)
        tasks += [asyncio.create_task(batcher.run([row(number)])) for number in (2, 3)]
        await asyncio.sleep(0)
        assert batcher.queued_rows == 2
        assert not batcher.wait_until_idle(0)
        backend.gate.set()
        assert [sums(await task) for task in tasks] == [[1], [7], [8], [9], [2], [3]]
        assert backend.batches == [[1], [2], [3], [7, 8], [9]]
        assert batcher.wait_until_idle(0)


async def test_the_background_does_not_starve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlserver_hftasks.engine.batcher.BACKGROUND_PATIENCE_S", 0.3)
    backend = SumBackend(seconds=0.01)
    async with serving(backend) as batcher, asyncio.timeout(PATIENCE_S):
        batcher.open_background(Scheduler(Limits(max_batch_rows=1), CostModel(), padded=False))
        patient = asyncio.create_task(batcher.run([row(7), row(8)], background=True))
        busy = [asyncio.create_task(_run_until(batcher, patient)) for _ in range(3)]
        assert sums(await patient) == [7, 8]
        await asyncio.gather(*busy)
    first, second = (backend.batches.index([number]) for number in (7, 8))
    assert second - first >= 2  # and takes no more than its turn


async def _run_until(batcher: Batcher, end: asyncio.Task[Any]) -> None:
    while not end.done():
        await batcher.run([row(1)])


async def test_the_background_ends_with_the_rest() -> None:
    backend = SumBackend()
    backend.gate.clear()
    async with serving(backend) as batcher, asyncio.timeout(PATIENCE_S):
        batcher.open_background(Scheduler(Limits(), CostModel(), padded=False))
        running = asyncio.create_task(batcher.run([row(1)]))
        await until(backend.entered.is_set)
        waiting = asyncio.create_task(batcher.run([row(2)], background=True))
        gone = asyncio.create_task(batcher.run([row(3)], background=True))
        await asyncio.sleep(0)
        gone.cancel()
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0)
        assert batcher.wait_until_idle(0)  # nobody is held up by an engine that ends
        backend.gate.set()
        await closing
        assert sums(await running) == [1]
        with pytest.raises(Unavailable):
            await waiting


async def test_no_background_unless_there_is_one() -> None:
    async with serving(SumBackend()) as batcher:
        with pytest.raises(ValueError, match="no background"):
            await batcher.run([row(1)], background=True)
