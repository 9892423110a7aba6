"""Extents: none overlap, none are lost, and gaps that touch are one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlserver_hftasks.engine.extents import Extents

SIZE = 64


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=60))
def test_nothing_overlaps_and_nothing_is_lost(steps: list[tuple[bool, int]]) -> None:
    extents, held = Extents(SIZE), list[tuple[int, int]]()
    for take, number in steps:
        if take:
            start = extents.take(number)
            gaps = gaps_between(held)
            assert (start is None) == (max((length for _, length in gaps), default=0) < number)
            if start is not None:
                assert start == min(gap for gap, length in gaps if length >= number), (
                    "not the first that fits"
                )
                held.append((start, number))
        elif held:
            extents.give_back(*held.pop(number % len(held)))
        assert extents.used == sum(length for _, length in held)
    for each in held:
        extents.give_back(*each)
    assert extents.take(SIZE) == 0


def gaps_between(held: list[tuple[int, int]]) -> list[tuple[int, int]]:
    gaps, end = [], 0
    for start, length in [*sorted(held), (SIZE, 0)]:
        if start > end:
            gaps.append((end, start - end))
        end = start + length
    return gaps


def test_no_extent_is_empty() -> None:
    with pytest.raises(ValueError, match="0 tokens"):
        Extents(SIZE).take(0)
