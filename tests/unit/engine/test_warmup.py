"""The warm-up teaches the cost model, and a slow device does not pay for all of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from mlserver_hftasks.engine import warmup
from mlserver_hftasks.engine.cost import CostModel
from mlserver_hftasks.engine.rows import Outputs, Row


class Clock:
    """Time that passes only when a batch runs; a batch takes 4 ms and 0.1 ms per token."""

    def __init__(self, *, slower: float = 1.0, disturbed: bool = False) -> None:
        self.now = 0.0
        self.batches = 0
        self._slower = slower
        self._disturbed = disturbed

    def monotonic(self) -> float:
        return self.now

    def forward(self, rows: Sequence[Row]) -> Sequence[Outputs]:
        disturbance = 5.0 if self._disturbed and self.batches % warmup.RUNS != 1 else 1.0
        self.batches += 1
        self.now += self._slower * disturbance * (4e-3 + 1e-4 * sum(row.cost for row in rows))
        return [{} for _ in rows]


def rows_of(words: tuple[int, ...]) -> list[Row]:
    return [Row({"input_ids": np.ones(count, dtype=np.int64)}) for count in words]


@pytest.mark.parametrize("disturbed", [False, True])
def test_it_learns_from_the_fastest_runs(monkeypatch: pytest.MonkeyPatch, disturbed: bool) -> None:
    clock, cost = Clock(disturbed=disturbed), CostModel()
    monkeypatch.setattr(warmup, "time", clock)
    warmup.warm_up(clock, False, cost, rows_of)
    assert clock.batches == len(warmup.SHAPES) * warmup.RUNS
    assert cost.overhead_s == pytest.approx(4e-3, rel=1e-3)
    assert cost.per_token_s == pytest.approx(1e-4, rel=1e-3)


def test_it_ends_early_on_a_slow_device(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, cost = Clock(slower=1000.0), CostModel()
    monkeypatch.setattr(warmup, "time", clock)
    warmup.warm_up(clock, False, cost, rows_of)
    assert clock.batches == warmup.RUNS
    assert cost.knows
