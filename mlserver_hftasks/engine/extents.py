"""Who holds which part of a cache: contiguous extents, first fit.

Contiguous, since attention then reads a sequence's keys and values where they lie, without gathering pages.
An extent holds all that its sequence may ever need, so nothing that runs is ever evicted.
"""

from __future__ import annotations

import bisect


class Extents:
    """Extents of a cache of `size` tokens."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.used = 0
        self._free: list[tuple[int, int]] = [(0, size)] if size > 0 else []
        """Start and length of the gaps, in order; neighbours are merged."""

    def take(self, length: int) -> int | None:
        """The start of a free extent of that length, now taken, or None if no gap is long enough."""
        if length < 1:
            raise ValueError(f"an extent of {length} tokens")
        for index, (start, gap) in enumerate(self._free):
            if gap >= length:
                self._free[index : index + 1] = [(start + length, gap - length)] if gap > length else []
                self.used += length
                return start
        return None

    def give_back(self, start: int, length: int) -> None:
        """Free an extent that was taken."""
        index = bisect.bisect_left(self._free, (start, 0))
        end = start + length
        first = last = index
        if index and sum(self._free[index - 1]) == start:
            first, start = index - 1, self._free[index - 1][0]
        if index < len(self._free) and self._free[index][0] == end:
            last, end = index + 1, sum(self._free[index])
        self._free[first:last] = [(start, end - start)]
        self.used -= length
