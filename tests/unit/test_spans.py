"""Spans of tokens, against the definitions written out in full."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlserver_hftasks.engine.rows import Row
from mlserver_hftasks.tasks.spans import best_spans, cut, masked_softmax, windows, word_bounds

probabilities = st.lists(st.floats(0, 1, width=32, allow_subnormal=False), min_size=1, max_size=12)


@given(probabilities, st.data(), st.integers(1, 15), st.integers(1, 200))
def test_best_spans_are_those_of_the_whole_table(
    start_values: list[float], data: st.DataObject, longest: int, k: int
) -> None:
    size = len(start_values)
    end_values = data.draw(
        st.lists(st.floats(0, 1, width=32, allow_subnormal=False), min_size=size, max_size=size)
    )
    start, end = np.array(start_values, dtype=np.float32), np.array(end_values, dtype=np.float32)
    table = [
        (-float(start[first] * end[last]), first, last)
        for first in range(size)
        for last in range(first, min(first + longest, size))
        if start[first] * end[last] > 0
    ]
    first, last, scores = best_spans(start, end, longest, k)
    assert scores.tolist() == [-score for score, _, _ in sorted(table)][:k]
    assert set(zip((-scores).tolist(), first.tolist(), last.tolist(), strict=True)) <= set(table)
    assert len(set(zip(first.tolist(), last.tolist(), strict=True))) == len(scores)


def test_equal_scores_are_ordered_by_place() -> None:
    ones = np.ones(4, dtype=np.float32)
    first, last, _ = best_spans(ones, ones, 2, 100)
    assert list(zip(first.tolist(), last.tolist(), strict=True)) == [
        (0, 0), (0, 1), (1, 1), (1, 2), (2, 2), (2, 3), (3, 3)
    ]  # fmt: skip


def test_no_tokens_have_no_spans() -> None:
    nothing = np.zeros(0, dtype=np.float32)
    assert [len(array) for array in best_spans(nothing, nothing, 15, 3)] == [0, 0, 0]


@given(st.integers(0, 300), st.integers(1, 40), st.data())
def test_windows_cover_the_text_and_overlap_as_asked(tokens: int, room: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, room - 1))
    found = windows(tokens, room, overlap)
    assert found[0][0] == 0
    assert found[-1][1] == tokens
    assert all(end - start <= room for start, end in found)
    for (_, end), (start, next_end) in pairwise(found):
        assert end - start == overlap
        assert next_end > end


def test_word_bounds() -> None:
    first, last = word_bounds([0, 0, 1, None, None, 2, 2, 2])
    assert first.tolist() == [0, 0, 2, 3, 4, 5, 5, 5]
    assert last.tolist() == [1, 1, 2, 3, 4, 7, 7, 7]
    assert [array.tolist() for array in word_bounds([])] == [[], []]


def test_masked_softmax() -> None:
    logits = np.array([1.0, 1000.0, 2.0, -5.0], dtype=np.float32)
    got = masked_softmax(logits, np.array([True, False, True, True]))
    expected = np.exp(logits[[0, 2, 3]]) / np.exp(logits[[0, 2, 3]]).sum()
    assert got[1] == 0
    assert got[[0, 2, 3]] == pytest.approx(expected)
    assert got.dtype == np.float32
    assert masked_softmax(logits, np.zeros(4, dtype=bool)).tolist() == [0, 0, 0, 0]


def test_cut_keeps_all_that_is_not_context() -> None:
    row = Row({"input_ids": np.arange(10), "token_type_ids": np.arange(10) + 100}, key="k")
    shorter = cut(row, 3, 9, 2, 4)
    assert shorter.arrays["input_ids"].tolist() == [0, 1, 2, 5, 6, 9]
    assert shorter.arrays["token_type_ids"].tolist() == [100, 101, 102, 105, 106, 109]
    assert shorter.key == "k"
