"""The layout of exported programs: tokens without padding, and lanes in which attention sees them.

All that works token by token (projections, feed-forward, normalisation) runs on the tokens of a batch laid
end to end, [tokens, hidden]. Attention runs on *lanes*, [lanes, longest]: each holds several rows one after
another, as far as they fit (first-fit decreasing), and a mask keeps them apart. A batch of unequal rows
costs `tokens x longest` in attention instead of `rows x longest x longest`, and nothing in the rest, with no
loop in the program. (Packing several short sequences into one of the longest: https://arxiv.org/abs/2107.02027.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from mlserver_hftasks.engine.rows import IntArray, Row

MAX_AREA = 2**18
"""Most `tokens x longest` of one pass: the scores of attention stay within the caches, GEMMs are large."""
ALIGNMENT = 4
"""A row begins at a multiple of that many places, so that its numbers are the same wherever it lies, to the
last bit. The only sums over a lane are those of attention. Softmax adds every w-th term up, in w lanes of a
vector register, and then the register, by halves and at last in fours: at these offsets the same terms meet
in the same order, and the terms of other rows are zeros."""
BLOCK = 256
"""A row crosses no multiple of that many places but from one: matrix products sum in blocks of that many."""
NOBODY = -1
"""The owner of a place that holds no token."""

INPUTS = ("packed_ids", "packed_positions", "places", "owners", "tokens", "reads", "head_ids", "head_mask")
"""Inputs of a program; `packed_types` too where the model knows token types. See `feed`."""


def positions(ids: IntArray, padding_idx: int | None) -> IntArray:
    """Positions of one row's tokens: from 0, or as RoBERTa from padding_idx + 1, skipping that token."""
    if padding_idx is None:
        return np.arange(len(ids))
    counted = ids != padding_idx
    made: IntArray = np.cumsum(counted) * counted + padding_idx
    return made


def feed(
    rows: Sequence[Row], reads: IntArray | None, pad_token_id: int, padding_idx: int | None
) -> dict[str, IntArray]:
    """The inputs of a program for one pass.

    packed_ids, packed_types, packed_positions [tokens]: the rows end to end;
    places [lanes, longest]: which token lies where, 0 where none does;
    owners [lanes, longest]: the row that it belongs to, or `NOBODY`;
    tokens [tokens]: the place of each token in the flattened lanes;
    reads [n, m]: the tokens whose hidden states the head gets, from `reads`, positions within each row, or
    all of a row if None; head_ids, head_mask [n, m]: their ids, and which of them are no padding.
    """
    lengths = [row.cost for row in rows]
    starts = np.cumsum([0, *lengths[:-1]])
    lanes, offsets, count = arrange(lengths)
    longest, total = max(lengths), sum(lengths)
    places = np.zeros((count, longest), np.int64)
    owners = np.full((count, longest), NOBODY, np.int64)
    tokens = np.empty(total, np.int64)
    for row, (lane, offset, start, length) in enumerate(zip(lanes, offsets, starts, lengths, strict=True)):
        places[lane, offset : offset + length] = np.arange(start, start + length)
        owners[lane, offset : offset + length] = row
        tokens[start : start + length] = np.arange(length) + (lane * longest + offset)
    ids = [row.arrays["input_ids"] for row in rows]
    made = {
        "packed_ids": np.concatenate(ids),
        "packed_positions": np.concatenate([positions(each, padding_idx) for each in ids]),
        "places": places,
        "owners": owners,
        "tokens": tokens,
    }
    if "token_type_ids" in rows[0].arrays:
        made["packed_types"] = np.concatenate([row.arrays["token_type_ids"] for row in rows])
    return made | _head_feed(made["packed_ids"], np.asarray(lengths), starts, reads, pad_token_id)


def _head_feed(
    ids: IntArray, lengths: IntArray, starts: IntArray, reads: IntArray | None, pad_token_id: int
) -> dict[str, IntArray]:
    within = np.arange(lengths.max())[None, :] if reads is None else reads
    real = np.broadcast_to(within < lengths[:, None], (len(lengths), within.shape[1]))
    flat = np.where(real, starts[:, None] + within, 0)
    return {
        "reads": flat,
        "head_ids": np.where(real, ids[flat], pad_token_id),
        "head_mask": real.astype(np.int64),
    }


def arrange(lengths: Sequence[int]) -> tuple[list[int], list[int], int]:
    """Lane and offset of each row, and the number of lanes; a lane is as long as the longest row."""
    longest = max(lengths)
    lanes, offsets = [0] * len(lengths), [0] * len(lengths)
    filled: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        starts = (_start(used, length) for used in filled)
        fits = (lane for lane, start in enumerate(starts) if start + length <= longest)
        lane = next(fits, len(filled))
        if lane == len(filled):
            filled.append(0)
        lanes[index], offsets[index] = lane, _start(filled[lane], length)
        filled[lane] = offsets[index] + length
    return lanes, offsets, len(filled)


def _start(used: int, length: int) -> int:
    """Where a row may begin in a lane of which so much is used; see `ALIGNMENT` and `BLOCK`."""
    start = -(-used // ALIGNMENT) * ALIGNMENT
    if start % BLOCK + length > BLOCK:
        start = -(-start // BLOCK) * BLOCK
    return start


def passes(lengths: Sequence[int], most: int = MAX_AREA) -> Iterator[list[int]]:
    """Indices of the rows that run together, the longest first, so that each pass has like lengths."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    begin = tokens = 0
    for end, index in enumerate(order):
        if end > begin and (tokens + lengths[index]) * lengths[order[begin]] > most:
            yield order[begin:end]
            begin, tokens = end, 0
        tokens += lengths[index]
    yield order[begin:]
