"""Attributions as people compare them: as shares of the largest, with as many digits as tell them apart."""

from __future__ import annotations

import math
from collections.abc import Iterable

FOR, AGAINST = (230, 97, 0), (26, 110, 235)
"""Orange and blue, as red, green and blue: told apart by people of any colour vision."""
DIGITS = (2, 8)
"""Least and most digits after the point."""


class Scale:
    """The scale of some numbers. They are finite."""

    def __init__(self, values: Iterable[float]) -> None:
        self.largest = max(map(abs, values), default=0.0)
        wanted = 1 - math.floor(math.log10(self.largest)) if self.largest else 0
        self._digits = min(max(wanted, DIGITS[0]), DIGITS[1])

    def share(self, value: float) -> float:
        """From -1 to 1 for the numbers of the scale; 0 where all are 0."""
        return value / self.largest if self.largest else 0.0

    def number(self, value: float) -> str:
        """With its sign, and digits as all numbers of the scale have."""
        rounded = round(value, self._digits)
        sign = "+" if rounded > 0 else "\u2212" if rounded < 0 else ""
        return f"{sign}{abs(rounded):.{self._digits}f}"
