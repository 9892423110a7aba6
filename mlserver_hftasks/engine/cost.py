"""What a batch costs in seconds, learned from the batches that ran."""

from __future__ import annotations

import math
from typing import NamedTuple

KNEE_EFFICIENCY = 0.95
"""A larger batch is not worth its latency once throughput reaches this share of its limit."""

USUAL_DEVIATION = 0.1
"""Of predictions from what batches take, until it is known."""
MOST_DEVIATION = 2.0
"""One batch that was held up for long says no more than this."""


class _Sums(NamedTuple):
    """Sums over batches: of their weights, and with these of cost, seconds, cost^2 and cost x seconds."""

    weight: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def plus(self, other: _Sums, factor: float = 1.0) -> _Sums:
        """The sums over both, the others' times a factor."""
        return _Sums(*(mine + factor * theirs for mine, theirs in zip(self, other, strict=True)))


class CostModel:
    """`seconds = overhead + per_token * cost`, by least squares that forget.

    Throughput of batches of cost c is `c / (overhead + per_token * c)`; it reaches the share e of its
    limit `1 / per_token` at `c = e / (1 - e) * overhead / per_token`, which is `knee_tokens`.
    """

    def __init__(self, memory: float = 0.98) -> None:
        self._memory = memory
        self._lasting = self._recent = _Sums()
        self._variance = USUAL_DEVIATION**2
        self.overhead_s = 0.0
        self.per_token_s = 0.0

    def observe(self, cost: int, seconds: float, *, lasting: bool = False) -> None:
        """Learn from one batch; a `lasting` one (of the warm-up, of all sizes) is never forgotten.

        Without those, batches that all have the size of the budget could not tell overhead from slope.
        The squares are weighted by 1/cost, since noise grows with the batch.
        """
        sums = _Sums(1.0 / cost, 1.0, seconds / cost, float(cost), seconds)
        if lasting:
            self._lasting = self._lasting.plus(sums)
        else:
            self._learn_deviation(cost, seconds)
            self._recent = sums.plus(self._recent, self._memory)
        self._solve()

    def _learn_deviation(self, cost: int, seconds: float) -> None:
        if self.knows:
            missed = min(seconds / max(self.seconds(cost), 1e-9) - 1, MOST_DEVIATION)
            self._variance = self._memory * self._variance + (1 - self._memory) * missed**2

    def _solve(self) -> None:
        weight, x, y, xx, xy = self._lasting.plus(self._recent)
        spread = weight * xx - x * x
        self.overhead_s, self.per_token_s = 0.0, y / x
        if spread > 1e-9 * weight * xx:
            slope = max((weight * xy - x * y) / spread, 0.0)
            overhead = (y - slope * x) / weight
            if overhead > 0:
                self.overhead_s, self.per_token_s = overhead, slope

    @property
    def deviation(self) -> float:
        """Root mean square of how far predictions were off, as a share of what was predicted."""
        return math.sqrt(self._variance)

    @property
    def knows(self) -> bool:
        """Whether any batch was seen."""
        return self._lasting.weight + self._recent.weight > 0

    def seconds(self, cost: float) -> float:
        """Predicted seconds of one batch of that cost."""
        return self.overhead_s + self.per_token_s * cost

    @property
    def knee_tokens(self) -> float:
        """The cost beyond which a larger batch no longer raises throughput; infinite if unknown."""
        if self.per_token_s <= 0:
            return float("inf")
        return KNEE_EFFICIENCY / (1 - KNEE_EFFICIENCY) * self.overhead_s / self.per_token_s
