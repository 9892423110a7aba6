"""Systems take turns, so that what else the machine does hits all of them alike."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, smallest and largest of the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """NaN if there are none, or if one of them is NaN."""
        if not values or any(math.isnan(value) for value in values):
            return cls(math.nan, math.nan, math.nan)
        return cls(statistics.median(values), min(values), max(values))


def take_turns(
    rounds: int, systems: Mapping[str, Callable[[], T]], tell: Callable[[str], None] = lambda what: None
) -> dict[str, list[T]]:
    """Results by system, one per round. Each round begins with another system."""
    results: dict[str, list[T]] = {name: [] for name in systems}
    names = list(systems)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            tell(f"round {number + 1} of {rounds}: {name}")
            results[name].append(systems[name]())
    return results


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Round by round."""
    return [a / b if b else math.nan for a, b in zip(above, below, strict=True)]
