"""What a method of attribution is: a generator that asks for evaluations and ends with an estimate.

It yields what it wants to know, most important first, and is sent as many answers, None for those that
there was no time for; then it must end with what it has. It knows no model, no torch and no clock.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlserver_hftasks.engine.rows import FloatArray
from mlserver_hftasks.errors import DeadlineExceeded
from mlserver_hftasks.explain.result import BoolArray


@dataclass(frozen=True, slots=True)
class Effort:
    """How much a client asks of a method."""

    tolerance: float
    """Largest error, as a share of the absolute attributions together."""
    max_evals: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Estimate:
    """Attributions [K, features] of K scores, which are [K] each."""

    attributions: FloatArray
    score: FloatArray
    baseline_score: FloatArray
    error: FloatArray
    """An estimate of the error that the tolerance bounds; infinite where nobody knows."""
    effort: Effort
    evaluations: int

    @property
    def delta(self) -> FloatArray:
        """By how much the attributions exceed the difference of the scores."""
        total: FloatArray = self.attributions.sum(axis=1, dtype=np.float64).astype(np.float32)
        return total - (self.score - self.baseline_score)

    @property
    def converged(self) -> BoolArray:
        """Whether the error is within the tolerance."""
        converged: BoolArray = self.error <= self.effort.tolerance * size(self.attributions)
        return converged


def size(attributions: FloatArray) -> FloatArray:
    """What errors are measured by, [K, features] -> [K]: never 0, also where the attributions cancel out."""
    total: FloatArray = np.abs(attributions).sum(axis=1)
    return total + np.float32(1e-12)


def too_late() -> DeadlineExceeded:
    """The error of a method that has no estimate yet."""
    return DeadlineExceeded("the deadline passed before the first estimate, expected more time @ deadline_ms")
