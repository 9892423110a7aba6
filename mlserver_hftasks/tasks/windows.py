"""The tokens of a text as the model reads it: in one row, or in windows that overlap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlserver_hftasks.engine.rows import IntArray
from mlserver_hftasks.errors import InvalidRequest
from mlserver_hftasks.tasks.encoder import Encoding

Offsets = Sequence[tuple[int, int]]
"""First and one past last character of each token."""


@dataclass(frozen=True, slots=True)
class Window:
    """The tokens of one row, without the special ones."""

    ids: IntArray
    """[tokens]"""
    positions: IntArray
    """[tokens], their places in the row."""
    spans: IntArray | None
    """[tokens, 2], first and one past the last character in the text; None where nobody knows."""


@dataclass(frozen=True, slots=True)
class Sentence:
    """A text, and its tokens row by row."""

    text: str
    windows: tuple[Window, ...]


def window_of(piece: Encoding, offsets: Offsets | None, word_starts: IntArray | None) -> Window:
    """The window of an encoding. `word_starts`: where the words start within which the offsets count."""
    positions = np.flatnonzero(np.asarray(piece.special_tokens_mask) == 0)
    ids = np.asarray(piece.ids, dtype=np.int64)[positions]
    if offsets is None:
        return Window(ids, positions, None)
    spans = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    if word_starts is not None:
        words = np.array([-1 if word is None else word for word in piece.word_ids], dtype=np.int64)
        inside = words >= 0
        spans[inside] += word_starts[words[inside], None]
    return Window(ids, positions, spans[positions])


def joined(words: Sequence[str], delimiter: str) -> tuple[str, IntArray]:
    """The words as one text, and where each starts in it."""
    lengths = [len(word) + len(delimiter) for word in words]
    return delimiter.join(words), np.cumsum([0, *lengths[:-1]], dtype=np.int64)


def checked_offsets(given: Sequence[Offsets], encodings: Sequence[Encoding]) -> Sequence[Offsets]:
    """The client's offsets, one list per item. Raises `InvalidRequest` if they are not one per token."""
    if len(given) != len(encodings):
        raise InvalidRequest(
            f"got {len(given)} lists, expected {len(encodings)}, one per item @ offset_mapping"
        )
    for index, (offsets, encoding) in enumerate(zip(given, encodings, strict=True)):
        if len(offsets) != len(encoding.ids):
            raise InvalidRequest(
                f"got {len(offsets)} pairs, expected {len(encoding.ids)}, one per token, special ones too "
                f"@ offset_mapping[{index}]"
            )
    return given


def check_spans(window: Window, text: str) -> None:
    """Raise `InvalidRequest` if the client's offsets are not within the text."""
    spans = window.spans
    assert spans is not None
    if ((spans < 0) | (spans > len(text))).any() or (spans[:, 0] > spans[:, 1]).any():
        raise InvalidRequest(f"got offsets outside of a text, expected 0..{len(text)} @ offset_mapping")
