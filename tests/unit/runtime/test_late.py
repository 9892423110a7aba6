"""An explainer that is made when it is asked for."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from mlserver_hftasks.errors import DeadlineExceeded, InvalidRequest
from mlserver_hftasks.explain.options import ExplainOptions
from mlserver_hftasks.runtime.late import LateExplainer
from tests.explanations import explanation

PATIENCE_S = 20.0


class Ready:
    methods = ("auto", "occlusion")

    def __init__(self, prepared: str) -> None:
        assert prepared == "prepared"
        self.asked: list[ExplainOptions] = []
        self.closed = False

    async def explain(
        self, inputs: Any, parameters: Any, options: ExplainOptions, answered: Any = None
    ) -> Any:
        self.asked.append(options)
        return [explanation((text,)) for text in inputs["inputs"]]

    async def close(self) -> None:
        self.closed = True


class Making:
    """Prepares when it is let go, and counts."""

    def __init__(self, *failures: Exception) -> None:
        self.gate, self.entered = threading.Event(), threading.Event()
        self.failures = list(failures)
        self.prepared = 0
        self.made: list[Ready] = []
        self.late = LateExplainer("some-task", ("auto", "magic"), self.prepare, self.make)

    def prepare(self) -> str:
        self.entered.set()
        assert self.gate.wait(PATIENCE_S)
        if self.failures:
            raise self.failures.pop()
        self.prepared += 1
        return "prepared"

    def make(self, prepared: str) -> Ready:
        self.made.append(Ready(prepared))
        return self.made[-1]

    async def explain(self, **options: Any) -> Any:
        return await self.late.explain({"inputs": ["a text"]}, None, ExplainOptions.read(options))


async def test_it_is_made_once_for_all_who_ask() -> None:
    making = Making()
    assert making.late.methods == ("auto", "magic")
    asked = [asyncio.create_task(making.explain()) for _ in range(3)]
    assert await asyncio.to_thread(making.entered.wait, PATIENCE_S)
    asked[0].cancel()  # who goes away takes nothing from the others
    making.gate.set()
    assert [len(each) for each in await asyncio.gather(*asked[1:])] == [1, 1]
    assert (making.prepared, len(making.made)) == (1, 1)
    assert making.late.methods == ("auto", "occlusion")
    await making.late.close()
    assert making.made[0].closed


async def test_a_deadline_counts_from_the_beginning() -> None:
    making = Making()
    with pytest.raises(DeadlineExceeded, match="before the first estimate"):
        await making.explain(deadline_ms=50)
    making.gate.set()
    await making.explain(deadline_ms=20_000)
    (options,) = making.made[0].asked
    assert options.deadline_ms is not None
    assert options.deadline_ms <= 20_000
    await making.late.close()


async def test_what_fails_is_tried_again() -> None:
    making = Making(ValueError("no"))
    making.gate.set()
    with pytest.raises(ValueError, match="no"):
        await making.explain()
    assert len(await making.explain()) == 1
    await making.late.close()


async def test_nothing_is_made_where_there_is_nothing_to_explain() -> None:
    making = Making()
    late = LateExplainer("some-task", (), making.prepare, making.make)
    with pytest.raises(InvalidRequest, match="of some-task there is nothing to explain"):
        await late.explain({"inputs": ["a text"]}, None, ExplainOptions.read({}))
    await late.close()
    assert not making.entered.is_set()


async def test_it_may_be_closed_while_it_is_made() -> None:
    making = Making()
    asked = asyncio.create_task(making.explain())
    assert await asyncio.to_thread(making.entered.wait, PATIENCE_S)
    closing = asyncio.create_task(making.late.close())
    await asyncio.sleep(0)
    making.gate.set()
    await asyncio.gather(closing, asked)
    assert making.made[0].closed
