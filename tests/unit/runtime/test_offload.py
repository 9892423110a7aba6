"""What keeps the event loop free, and who is refused or given up on meanwhile."""

from __future__ import annotations

import asyncio
import threading

import pytest

from mlserver_hftasks.codecs.request import Call
from mlserver_hftasks.errors import DeadlineExceeded, Overloaded
from mlserver_hftasks.runtime.offload import BULK_CHARS, INLINE_CHARS, MAX_WAITING, Deadline, Lane, run_for
from mlserver_hftasks.runtime.service import _work_of


async def test_small_work_stays_and_large_work_goes_to_a_thread() -> None:
    here = threading.current_thread().name
    assert await run_for(INLINE_CHARS, lambda: threading.current_thread().name) == here
    assert (await run_for(INLINE_CHARS + 1, lambda: threading.current_thread().name)).startswith(
        "hftasks-cpu"
    )
    assert (await run_for(BULK_CHARS + 1, lambda: threading.current_thread().name)).startswith("hftasks-bulk")


async def test_bulk_work_does_not_hold_up_the_rest() -> None:
    gate = threading.Event()
    bulk = [asyncio.create_task(run_for(BULK_CHARS + 1, gate.wait)) for _ in range(4)]
    async with asyncio.timeout(20):
        assert await run_for(INLINE_CHARS + 1, lambda: "done") == "done"
    gate.set()
    await asyncio.gather(*bulk)


async def test_a_full_lane_refuses_at_once() -> None:
    lane, gate = Lane("test", 1), threading.Event()
    waiting = [asyncio.create_task(lane.run(gate.wait)) for _ in range(MAX_WAITING)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match=f"{MAX_WAITING} requests wait"):
        await lane.run(lambda: None)
    gate.set()
    await asyncio.gather(*waiting)
    assert await lane.run(lambda: 1) == 1


async def test_the_deadline_counts_from_the_start() -> None:
    with pytest.raises(DeadlineExceeded, match="no answer within 20 ms"):
        async with Deadline(None) as deadline:
            await asyncio.sleep(0.05)
            deadline.tighten(20.0)
            deadline.tighten(1000.0)
            await asyncio.sleep(20)
    async with Deadline(None) as deadline:
        deadline.tighten(None)


@pytest.mark.parametrize(
    "call",
    [
        Call({"inputs": ["a"] * 100}, {"prompt": "b" * 1000}, False, ()),
        Call({"query": ["b" * 2000], "texts": ["a"] * 100}, {}, False, ()),
        Call({"inputs": ["a" * 1000]}, {"candidate_labels": ["b"] * 200}, False, ()),
        Call({"inputs": ["a" * 5000]}, {}, True, ()),
    ],
)
def test_work_counts_what_is_tokenized_with_every_item(call: Call) -> None:
    assert _work_of(call) > INLINE_CHARS


def test_a_usual_request_stays_on_the_loop() -> None:
    assert _work_of(Call({"inputs": ["a" * 120]}, {"top_k": 2}, True, ())) <= INLINE_CHARS
    assert (
        _work_of(Call({"inputs": ["a" * 120]}, {"candidate_labels": ["b" * 9] * 5}, True, ())) <= INLINE_CHARS
    )
