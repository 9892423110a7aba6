"""Runs a model on texts: what it says, how long it takes, and how far two of them are apart."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from mlserver_hftasks.cli.generating import ANSWER, GenerationTrial
from mlserver_hftasks.cli.texts import Item, rows_of
from mlserver_hftasks.engine.cost import CostModel
from mlserver_hftasks.engine.offline import batches_of
from mlserver_hftasks.engine.rows import FloatArray, Outputs, Row
from mlserver_hftasks.engine.warmup import warm_up
from mlserver_hftasks.errors import InvalidSettings
from mlserver_hftasks.loading import Served, probe_rows

ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Speed:
    """Medians of the rounds."""

    latency_ms: float
    """Of one row by itself, the median row."""
    per_s: float
    """Rows, or new tokens of models that generate: of all rows, in the batches that the engine makes."""


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
    equal_answers: float | None = None
    """Share of answers with the same tokens, of models that generate."""


class Tried(Protocol):
    """One loaded model, warm."""

    served: Served
    cost: CostModel
    timed: int
    """Most rows of one timed run."""
    singles: int
    """Rows that are timed one by one."""
    unit: str
    """What `amount` counts."""

    def rows(self, items: Sequence[Item]) -> list[Any]:
        """What the model runs of these items. Raises `InvalidSettings` naming one that does not fit."""

    def outputs(self, rows: Sequence[Any]) -> list[Outputs]:
        """Of each row, in order. Raises `InvalidSettings` if they are not all finite numbers."""

    def time_batches(self, rows: Sequence[Any]) -> float:
        """Seconds for all rows."""

    def time_singles(self, rows: Sequence[Any]) -> float:
        """Seconds of a row by itself."""

    def amount(self, rows: Sequence[Any]) -> int:
        """What there is of `unit` in the rows."""

    def speed(self) -> Mapping[str, str]:
        """For people."""


def tried(served: Served) -> Tried:
    """The model, ready to be run and timed."""
    return Trial(served) if served.decoder is None else GenerationTrial(served)


class Trial:
    """A model that runs rows in batches; see `Tried`."""

    timed, singles = 64, 12
    unit = "rows"

    def __init__(self, served: Served) -> None:
        self.served = served
        self.cost = CostModel()
        backend, encoder = served.backend, served.task.model.encoder
        warm_up(backend, backend.padded, self.cost, partial(probe_rows, encoder))

    def rows(self, items: Sequence[Item]) -> list[Row]:
        """See `Tried`."""
        return rows_of(self.served.task, items)

    def outputs(self, rows: Sequence[Row]) -> list[Outputs]:
        """See `Tried`."""
        found: dict[int, Outputs] = {}
        for batch in self._batches(rows):
            found.update(zip(map(id, batch), self.served.backend.forward(batch), strict=True))
        outputs = [found[id(row)] for row in rows]
        if not all(np.isfinite(array).all() for output in outputs for array in output.values()):
            raise InvalidSettings("the model's outputs are not finite numbers, expected others @ its weights")
        return outputs

    def time_batches(self, rows: Sequence[Row]) -> float:
        """See `Tried`."""
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

    def amount(self, rows: Sequence[Row]) -> int:
        """See `Tried`."""
        return len(rows)

    def speed(self) -> Mapping[str, str]:
        """See `Tried`."""
        cost = self.cost
        return {
            "a text of 32 tokens": f"{1e3 * cost.seconds(32):.1f} ms",
            "tokens per second": f"{1 / cost.per_token_s:.0f}" if cost.per_token_s else "unknown",
        }

    def _batches(self, rows: Sequence[Row]) -> list[list[Row]]:
        return batches_of(rows, self.cost, padded=self.served.backend.padded)


def speeds(
    trials: Mapping[str, Tried], rows: Sequence[Any], advance: Callable[[], None] = lambda: None
) -> dict[str, Speed]:
    """Of all models by name; they take turns, so that what else the machine does hits all alike."""
    like = next(iter(trials.values()))
    some, singles = rows[: like.timed], rows[: like.singles]
    batched: dict[str, list[float]] = {name: [] for name in trials}
    alone: dict[str, list[float]] = {name: [] for name in trials}
    for _ in range(ROUNDS):
        for name, trial in trials.items():
            batched[name].append(trial.time_batches(some))
            alone[name].append(trial.time_singles(singles))
            advance()
    return {
        name: Speed(
            1e3 * statistics.median(alone[name]), like.amount(some) / statistics.median(batched[name])
        )
        for name in trials
    }


def difference(got: Sequence[Outputs], wanted: Sequence[Outputs], *, headless: bool) -> Difference:
    """Of raw outputs, row by row; `headless`: they are hidden states, not logits."""
    largest, equal, cosines, values = 0.0, [], [], []
    answers = [
        np.array_equal(one[ANSWER], other[ANSWER])
        for one, other in zip(got, wanted, strict=True)
        if ANSWER in other
    ]
    for of_got, of_wanted in zip(got, wanted, strict=True):
        for name, array in of_wanted.items():
            if name == ANSWER:
                continue
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
        float(np.mean(answers)) if answers else None,
    )


def _cosine(one: FloatArray, other: FloatArray) -> float:
    norms = float(np.linalg.norm(one)) * float(np.linalg.norm(other))
    return float(np.vdot(one, other)) / max(norms, 1e-30)
