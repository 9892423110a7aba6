"""Whether a way to lay out a batch gives each row the answer that it gets alone.

Two questions are asked of a layout, on a batch of rows that are hard on it:

- Does each row get what the model says of that row by itself, with no padding and no neighbours? Wrong
  positions, a wrong attention window, a lost mask or a head that pools over the wrong tokens show here.
- Does a row's answer stay the same when its neighbours' tokens change and nothing else? All shapes are
  equal then, so it must not move by more than noise, in any dtype. Leaks between rows show here, even
  those too small for the first question in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from mlserver_hftasks.engine.rows import IntArray, Outputs, Row

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LENGTHS = (1, 40, 12, 90, 7)
"""Tokens of the rows, where there are no real ones to be had."""
MAX_WINDOW_TOKENS = 1024
"""Longest row that is made to see beyond the window of local attention."""


def random_rows(vocabulary: int, config: PretrainedConfig) -> list[Row]:
    """Rows of random tokens."""
    generator = np.random.default_rng(0)
    return [
        Row({"input_ids": generator.integers(0, vocabulary, min(n, _most_tokens(config)))}) for n in LENGTHS
    ]


def hard_rows(rows: Sequence[Row], config: PretrainedConfig, pad_token_id: int) -> list[Row]:
    """The rows, made hard to batch.

    Each has the padding token inside (a client may write it), a second half of the second token type
    where the model knows one, and the longest reaches beyond the window of local attention.
    """
    window = window_of(config)
    longest = max(range(len(rows)), key=lambda index: rows[index].cost)
    made = list(rows)
    if window is not None and window + 9 <= min(_most_tokens(config), MAX_WINDOW_TOKENS):
        made[longest] = _stretched(rows[longest], window + 9)
    typed = (getattr(config, "type_vocab_size", None) or 0) >= 2
    return [_hardened(row, pad_token_id, typed) for row in made]


def with_other_neighbours(rows: Sequence[Row]) -> list[Row]:
    """Every second row as it is; the tokens of those between in reverse, the first and last kept."""
    return [row if index % 2 == 0 else _reversed(row) for index, row in enumerate(rows)]


def objection_to(
    forward: Callable[[Sequence[Row]], Sequence[Outputs]],
    rows: Sequence[Row],
    alone: Sequence[Outputs],
    tolerance: float,
    still: float | None = None,
) -> str | None:
    """Why a way to run `rows` as a batch cannot be used, or None if it can; `alone` is what each must get.

    `still` is the tolerance of the second question, a tenth of that of the first if None.
    """
    try:
        together = forward(rows)
        among_others = forward(with_other_neighbours(rows))
    except Exception as error:  # whatever an architecture makes of a layout that it was not made for
        return repr(error)
    wrong = objection(together, alone, tolerance)
    if wrong is not None:
        return wrong
    moved = objection(among_others[::2], together[::2], tolerance / 10 if still is None else still)
    return None if moved is None else f"with other neighbours {moved}"


def objection(got: Sequence[Outputs], wanted: Sequence[Outputs], tolerance: float) -> str | None:
    """What differs by more than `tolerance` of its largest value, or None if nothing does."""
    for name in wanted[0]:
        worst = largest_difference(
            [{name: outputs[name]} for outputs in got], [{name: outputs[name]} for outputs in wanted]
        )
        if not worst <= tolerance:  # NaN is an objection too
            return f"{name} differs by {worst:.1e} of its largest value"
    return None


def largest_difference(got: Sequence[Outputs], wanted: Sequence[Outputs]) -> float:
    """The largest difference of any row's output, relative to that row's largest value of it."""
    worst = [
        float(np.abs(of_got[name] - array).max()) / max(float(np.abs(array).max()), 1e-6)
        for of_got, of_wanted in zip(got, wanted, strict=True)
        for name, array in of_wanted.items()
    ]
    return max(worst) if not np.isnan(worst).any() else float("nan")


def overall_difference(got: Sequence[Outputs], wanted: Sequence[Outputs]) -> float:
    """The largest difference of any row's output, relative to the largest value of it in all rows."""
    worst = []
    for name in wanted[0]:
        scale = max(float(np.abs(outputs[name]).max()) for outputs in wanted)
        apart = [np.abs(one[name] - other[name]).max() for one, other in zip(got, wanted, strict=True)]
        worst.append(np.max(apart) / max(scale, 1e-6))
    return float(np.max(worst))


def selecting(row: Row) -> Row:
    """The row with all of its tokens selected, for a head that computes only what is."""
    return replace(row, select=np.arange(row.cost))


def selected(rows: Sequence[Row], alone: Sequence[Outputs]) -> tuple[list[Row], list[Outputs]]:
    """The rows with a few of their tokens selected, and what of `alone`, [tokens, ...], each must get."""
    chosen = [np.array([0, row.cost - 1, row.cost // 2][: 1 + index % 3]) for index, row in enumerate(rows)]
    return (
        [replace(row, select=select) for row, select in zip(rows, chosen, strict=True)],
        [
            {name: array[select] for name, array in outputs.items()}
            for outputs, select in zip(alone, chosen, strict=True)
        ],
    )


def _hardened(row: Row, pad_token_id: int, typed: bool) -> Row:
    arrays = {name: values.copy() for name, values in row.arrays.items()}
    middle = row.cost // 2
    if row.cost >= 5:
        arrays["input_ids"][middle] = pad_token_id
    if typed and "token_type_ids" in arrays:
        arrays["token_type_ids"][middle:] = 1
    return replace(row, arrays=arrays)


def _stretched(row: Row, tokens: int) -> Row:
    """The row with its inside repeated up to that many tokens."""
    if not 3 <= row.cost < tokens:
        return row
    return replace(row, arrays={name: _repeat_inside(ids, tokens) for name, ids in row.arrays.items()})


def _repeat_inside(ids: IntArray, tokens: int) -> IntArray:
    return np.concatenate((ids[:1], np.resize(ids[1:-1], tokens - 2), ids[-1:]))


def _reversed(row: Row) -> Row:
    ids = row.arrays["input_ids"].copy()
    ids[1:-1] = ids[1:-1][::-1]
    return replace(row, arrays={**row.arrays, "input_ids": ids})


def window_of(config: PretrainedConfig) -> int | None:
    """Tokens that local attention sees, or more; None without local attention."""
    sizes = [getattr(config, name, None) for name in ("sliding_window", "local_attention")]
    known = [size for size in sizes if isinstance(size, int) and size > 0]
    return max(known, default=None)


def _most_tokens(config: PretrainedConfig) -> int:
    positions = getattr(config, "max_position_embeddings", None)
    # Two less, since some count positions from padding_idx + 1.
    return positions - 2 if positions and positions > 2 else 512
