"""Rows to the arrays of a batch, and its outputs back to rows; what all backends share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mlserver_hftasks.backends.base import Head, Level
from mlserver_hftasks.engine.rows import FloatArray, IntArray, Outputs, Row


def padded(rows: Sequence[Row], pad_token_id: int) -> dict[str, IntArray]:
    """Input arrays [n, longest] with their attention mask."""
    shape = (len(rows), max(row.cost for row in rows))
    arrays: dict[str, IntArray] = {name: np.zeros(shape, dtype=np.int64) for name in rows[0].arrays}
    arrays["input_ids"].fill(pad_token_id)
    arrays["attention_mask"] = np.zeros(shape, dtype=np.int64)
    for index, row in enumerate(rows):
        arrays["attention_mask"][index, : row.cost] = 1
        for name, values in row.arrays.items():
            arrays[name][index, : row.cost] = values
    return arrays


def selection(rows: Sequence[Row]) -> IntArray | None:
    """The positions that the rows select, [n, most of them], filled up with 0; None if they select none."""
    selections = [row.select for row in rows if row.select is not None]
    if not selections:
        return None
    if len(selections) < len(rows):
        raise ValueError("rows of one batch select positions all or none; their keys must differ")
    index = np.zeros((len(rows), max(map(len, selections))), dtype=np.int64)
    for i, selected in enumerate(selections):
        index[i, : len(selected)] = selected
    return index


def marker_of(config: Any, head: Head) -> int | None:
    """The token that a head looks for in a text, None if it looks for none.

    Classifiers over an encoder with a decoder (BART's) read the state of the last end-of-text token, and take
    all such tokens of a batch to be spread evenly over its rows. A client may write that token.
    """
    if not config.is_encoder_decoder or head.auto_class != "AutoModelForSequenceClassification":
        return None
    marker: int | None = config.eos_token_id
    return marker


def alike(rows: Sequence[Row], marker: int | None) -> list[list[int]]:
    """Indices of the rows that hold the marker equally often, in groups; all in one if there is none."""
    groups: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        count = 0 if marker is None else int(np.count_nonzero(row.arrays["input_ids"] == marker))
        groups.setdefault(count, []).append(index)
    return list(groups.values())


def gathered(
    rows: Sequence[Row],
    groups: Iterable[Sequence[int]],
    forward: Callable[[Sequence[Row]], Sequence[Outputs]],
) -> list[Outputs]:
    """The outputs of all rows in order, where each group of them runs by itself."""
    made: list[Outputs] = [{}] * len(rows)
    for indices in groups:
        outputs = forward([rows[index] for index in indices])
        for index, output in zip(indices, outputs, strict=True):
            made[index] = output
    return made


def split(arrays: Mapping[str, FloatArray], rows: Sequence[Row], head: Head) -> list[Outputs]:
    """The outputs of each row, without padding. An array per token has [n, longest or selected, ...]."""
    return [
        {
            name: array[index]
            if head.outputs[name] is Level.SEQUENCE
            else array[index, : row.cost if row.select is None else len(row.select)]
            for name, array in arrays.items()
        }
        for index, row in enumerate(rows)
    ]
