"""Runs a model on texts: what it says, how long it takes, and how far two of them are apart."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from mlserver_hftasks.engine.cost import CostModel
from mlserver_hftasks.engine.offline import batches_of
from mlserver_hftasks.engine.rows import FloatArray, Outputs, Row
from mlserver_hftasks.engine.warmup import warm_up
from mlserver_hftasks.errors import InvalidSettings
from mlserver_hftasks.loading import Served, probe_rows

ROUNDS = 3
TIMED_ROWS = 64
"""Most rows of one timed run."""
SINGLES = 12
"""Rows that are timed one by one."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Medians of the rounds."""

    latency_ms: float
    """Of one row by itself, the median row."""
    rows_per_s: float
    """Of all rows, in the batches that the engine makes."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How far outputs are from those of a reference."""

    largest: float
    deviation: float
    """Standard deviation of the reference's outputs: what `largest` is to be held against."""
    agreement: float | None
    """Share of equal labels, each the largest of several logits; None where there are no labels."""
    least_cosine: float | None
    """Of the states of a text, for models without a head."""


class Trial:
    """One loaded model, warm."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.cost = CostModel()
        backend, encoder = served.backend, served.task.model.encoder
        warm_up(backend, backend.padded, self.cost, partial(probe_rows, encoder))

    def outputs(self, rows: Sequence[Row]) -> list[Outputs]:
        """Of each row, in order. Raises `InvalidSettings` if they are not all finite numbers."""
        found: dict[int, Outputs] = {}
        for batch in self._batches(rows):
            found.update(zip(map(id, batch), self.served.backend.forward(batch), strict=True))
        outputs = [found[id(row)] for row in rows]
        if not all(np.isfinite(array).all() for output in outputs for array in output.values()):
            raise InvalidSettings("the model's outputs are not finite numbers, expected others @ its weights")
        return outputs

    def time_batches(self, rows: Sequence[Row]) -> float:
        """Seconds for all rows."""
        began = time.perf_counter()
        for batch in self._batches(rows):
            self.served.backend.forward(batch)
        return time.perf_counter() - began

    def time_singles(self, rows: Sequence[Row]) -> float:
        """Seconds of the median row by itself."""
        took = []
        for row in rows:
            began = time.perf_counter()
            self.served.backend.forward([row])
            took.append(time.perf_counter() - began)
        return statistics.median(took)

    def _batches(self, rows: Sequence[Row]) -> list[list[Row]]:
        return batches_of(rows, self.cost, padded=self.served.backend.padded)


def speeds(
    trials: Mapping[str, Trial], rows: Sequence[Row], advance: Callable[[], None] = lambda: None
) -> dict[str, Speed]:
    """Of all models by name; they take turns, so that what else the machine does hits all alike."""
    some, singles = rows[:TIMED_ROWS], rows[:SINGLES]
    batched: dict[str, list[float]] = {name: [] for name in trials}
    alone: dict[str, list[float]] = {name: [] for name in trials}
    for _ in range(ROUNDS):
        for name, trial in trials.items():
            batched[name].append(trial.time_batches(some))
            alone[name].append(trial.time_singles(singles))
            advance()
    return {
        name: Speed(1e3 * statistics.median(alone[name]), len(some) / statistics.median(batched[name]))
        for name in trials
    }


def difference(got: Sequence[Outputs], wanted: Sequence[Outputs], *, headless: bool) -> Difference:
    """Of raw outputs, row by row; `headless`: they are hidden states, not logits."""
    largest, equal, cosines, values = 0.0, [], [], []
    for of_got, of_wanted in zip(got, wanted, strict=True):
        for name, array in of_wanted.items():
            largest = max(largest, float(np.abs(of_got[name] - array).max()))
            values.append(array.ravel())
            if headless:
                cosines.append(_cosine(of_got[name], array))
            elif array.shape[-1] > 1:
                equal.append(np.mean(of_got[name].argmax(-1) == array.argmax(-1)))
    return Difference(
        largest,
        float(np.concatenate(values).std()),
        float(np.mean(equal)) if equal else None,
        min(cosines) if cosines else None,
    )


def _cosine(one: FloatArray, other: FloatArray) -> float:
    norms = float(np.linalg.norm(one)) * float(np.linalg.norm(other))
    return float(np.vdot(one, other)) / max(norms, 1e-30)
