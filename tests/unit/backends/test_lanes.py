"""Lanes: every token has one place, rows do not touch, and the rows' own order comes back."""

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlserver_hftasks.backends import feeds, lanes
from mlserver_hftasks.backends.base import Description, Head, Level
from mlserver_hftasks.backends.program import Layout, Plan, ProgramBackend, Reads
from mlserver_hftasks.engine.rows import Row

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)
PAD = 0
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""Machines of CI are slow at times."""


def rows_of(lengths: list[int], typed: bool = False) -> list[Row]:
    draw = np.random.default_rng(sum(lengths))
    made = []
    for length in lengths:
        arrays = {"input_ids": draw.integers(1, 50, length)}
        if typed:
            arrays["token_type_ids"] = draw.integers(0, 2, length)
        made.append(Row(arrays))
    return made


@unhurried
@given(LENGTHS)
def test_rows_lie_apart_and_within_their_lanes(lengths: list[int]) -> None:
    where, offsets, count = lanes.arrange(lengths)
    longest = max(lengths)
    taken = np.zeros((count, longest), int)
    for lane, offset, length in zip(where, offsets, lengths, strict=True):
        assert offset + length <= longest
        taken[lane, offset : offset + length] += 1
    assert taken.max() == 1 and (taken.sum(1) > 0).all()


@unhurried
@given(LENGTHS)
def test_lanes_are_at_most_half_empty_but_one(lengths: list[int]) -> None:
    """First fit leaves at most one lane of which less than half is taken, up to the alignment of a row."""
    where, offsets, count = lanes.arrange(lengths)
    used = np.zeros(count, int)
    for lane, offset, length in zip(where, offsets, lengths, strict=True):
        used[lane] = max(used[lane], offset + length)
    assert ((used + lanes.ALIGNMENT) * 2 <= max(lengths)).sum() <= 1


@unhurried
@given(st.lists(st.integers(1, 600), min_size=1, max_size=30))
def test_rows_begin_where_sums_over_a_lane_are_the_same_everywhere(lengths: list[int]) -> None:
    _, offsets, _ = lanes.arrange(lengths)
    for offset, length in zip(offsets, lengths, strict=True):
        assert offset % lanes.ALIGNMENT == 0
        crosses = offset // lanes.BLOCK != (offset + length - 1) // lanes.BLOCK
        assert not crosses or offset % lanes.BLOCK == 0


@unhurried
@given(LENGTHS, st.booleans())
def test_places_and_tokens_are_inverse(lengths: list[int], typed: bool) -> None:
    rows = rows_of(lengths, typed)
    feed = lanes.feed(rows, None, PAD, None)
    assert ("packed_types" in feed) == typed
    flat = feed["places"].reshape(-1)
    assert (flat[feed["tokens"]] == np.arange(sum(lengths))).all()
    owners = feed["owners"].reshape(-1)
    assert (owners[feed["tokens"]] == np.repeat(np.arange(len(rows)), lengths)).all()
    assert (owners == lanes.NOBODY).sum() == owners.size - sum(lengths)
    assert (feed["packed_ids"] == np.concatenate([row.arrays["input_ids"] for row in rows])).all()
    assert set(lanes.INPUTS) <= set(feed)


@unhurried
@given(LENGTHS)
def test_what_the_head_gets_is_the_padded_batch(lengths: list[int]) -> None:
    rows = rows_of(lengths)
    feed, padded = lanes.feed(rows, None, PAD, None), feeds.padded(rows, PAD)
    assert (feed["head_ids"] == padded["input_ids"]).all()
    assert (feed["head_mask"] == padded["attention_mask"]).all()
    got = feed["packed_ids"][feed["reads"]] * feed["head_mask"]
    assert (got == padded["input_ids"]).all()


def test_positions_as_roberta_counts_them() -> None:
    ids = np.array([5, 1, 7, 1, 9])
    assert lanes.positions(ids, 1).tolist() == [2, 1, 3, 1, 4]
    assert lanes.positions(ids, None).tolist() == [0, 1, 2, 3, 4]


@unhurried
@given(LENGTHS, st.integers(1, 2000))
def test_passes_hold_every_row_once_and_stay_within_the_area(lengths: list[int], most: int) -> None:
    found = list(lanes.passes(lengths, most))
    assert sorted(index for part in found for index in part) == list(range(len(lengths)))
    for part in found:
        area = sum(lengths[i] for i in part) * max(lengths[i] for i in part)
        assert len(part) == 1 or area <= most


class Summing:
    """A program in lanes: each token's output is the sum of its row's ids, seen through lanes and owners."""

    inputs = frozenset({"packed_ids", "places", "owners", "tokens", "reads"})
    outputs = frozenset({"logits"})

    def run(self, feed: Any) -> Any:
        spread = feed["packed_ids"][feed["places"]]
        same = feed["owners"][:, :, None] == feed["owners"][:, None, :]
        summed = (same * spread[:, None, :]).sum(2).reshape(-1)[feed["tokens"]].astype(np.float32)
        made = np.stack([summed, feed["packed_ids"]], -1).astype(np.float32)[feed["reads"]]
        return {"logits": made[:, 0] if feed["reads"].shape[1] == 1 else made}

    def close(self) -> None:
        pass


def backend_of(level: Level, reads: Reads) -> ProgramBackend:
    head = Head("AutoModel", {"logits": level}, selects=reads is Reads.SELECTED)
    return ProgramBackend(
        Summing(), head, Plan(Layout.LANES, PAD, reads), Description("fake", "cpu", "float32", "lanes")
    )


@unhurried
@given(LENGTHS)
def test_a_rows_outputs_are_its_own(lengths: list[int]) -> None:
    rows = rows_of([length + 1 for length in lengths])
    outputs = backend_of(Level.TOKEN, Reads.ALL).forward(rows)
    for row, output in zip(rows, outputs, strict=True):
        ids = row.arrays["input_ids"]
        assert output["logits"].shape == (len(ids), 2)
        assert (output["logits"][:, 0] == ids.sum()).all() and (output["logits"][:, 1] == ids).all()


def test_the_first_token_alone_is_read_where_that_is_all() -> None:
    rows = rows_of([3, 9, 1])
    outputs = backend_of(Level.SEQUENCE, Reads.FIRST).forward(rows)
    got = [output["logits"].tolist() for output in outputs]
    assert got == [[row.arrays["input_ids"].sum(), row.arrays["input_ids"][0]] for row in rows]


@pytest.mark.parametrize("layout", [Layout.LANES, Layout.PADDED])
def test_a_program_may_run_its_rows_one_by_one(layout: Layout) -> None:
    """In the layout that it was made for."""
    seen: list[frozenset[str]] = []

    class Noting(Summing):
        inputs = frozenset({"packed_ids", "head_mask"} if layout is Layout.LANES else {"attention_mask"})

        def run(self, feed: Any) -> Any:
            seen.append(frozenset(feed))
            return {"logits": np.zeros((1, 2), np.float32)}

    head, how = Head("AutoModel", {"logits": Level.SEQUENCE}), Description("fake", "cpu", "float32", "single")
    backend = ProgramBackend(Noting(), head, Plan(layout, PAD), how, alone=True)
    assert len(backend.forward(rows_of([3, 5, 2]))) == 3
    assert seen == [Noting.inputs] * 3 and not backend.padded


def test_selected_tokens_are_read() -> None:
    rows = [
        Row({"input_ids": np.array([4, 5, 6])}, select=np.array([2, 0])),
        Row({"input_ids": np.array([7, 8, 9, 10])}, select=np.array([1])),
    ]
    outputs = backend_of(Level.TOKEN, Reads.SELECTED).forward(rows)
    assert outputs[0]["logits"].tolist() == [[15, 6], [15, 4]]
    assert outputs[1]["logits"].tolist()[:1] == [[34, 8]] and len(outputs[1]["logits"]) == 1


def test_some_rows_that_select_and_some_that_do_not_are_a_mistake() -> None:
    rows = [Row({"input_ids": np.array([4])}, select=np.array([0])), Row({"input_ids": np.array([4])})]
    with pytest.raises(ValueError, match="their keys must differ"):
        backend_of(Level.TOKEN, Reads.SELECTED).forward(rows)
