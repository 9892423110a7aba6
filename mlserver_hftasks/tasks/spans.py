"""Spans of tokens in a context: windows, words, probabilities, the best spans, their text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from mlserver_hftasks.engine.rows import FloatArray, IntArray, Row
from mlserver_hftasks.tasks.encoder import Source


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens `start` to `end` of a context, which stand at `offset` and after in the window's row."""

    start: int
    end: int
    offset: int

    @property
    def in_row(self) -> slice:
        """Positions of the context in the row."""
        return slice(self.offset, self.offset + self.end - self.start)


@dataclass(frozen=True, slots=True)
class Passage:
    """A context: its text, its windows, and of each of its tokens the characters and the word."""

    text: str
    windows: tuple[Window, ...]
    characters: IntArray
    """[tokens, 2]: the first character, and the one after the last."""
    word_first: IntArray
    """[tokens]: the first token of the token's word."""
    word_last: IntArray

    def answers(
        self, window: Window, first: IntArray, last: IntArray, scores: FloatArray, *, align: bool
    ) -> Iterator[dict[str, Any]]:
        """Spans of a window's tokens as `score`, `start`, `end` and `answer`.

        `align` adds the rest of the words at both ends, as far as it is in the window.
        """
        first, last = first + window.start, last + window.start
        if align:
            first = np.maximum(self.word_first[first], window.start)
            last = np.minimum(self.word_last[last], window.end - 1)
        starts, ends = self.characters[first, 0].tolist(), self.characters[last, 1].tolist()
        for start, end, score in zip(starts, ends, scores.tolist(), strict=True):
            yield {"score": score, "start": start, "end": end, "answer": self.text[start:end]}


def windows(tokens: int, room: int, overlap: int) -> list[tuple[int, int]]:
    """Pieces (start, end) of at most `room` tokens that cover a text; neighbours share `overlap` tokens.

    The last ends with the text and may be shorter. Needs 0 <= overlap < room. An empty text is one piece.
    """
    step = room - overlap
    last = max(0, -(-(tokens - room) // step))
    return [(index * step, min(index * step + room, tokens)) for index in range(last + 1)]


def cut(row: Row, begin: int, end: int, start: int, stop: int) -> Row:
    """The row with only tokens `start` to `stop` of its context, which lies at `begin` to `end`."""
    arrays = {
        name: np.concatenate([values[:begin], values[begin + start : begin + stop], values[end:]])
        for name, values in row.arrays.items()
    }
    source = row.source
    if isinstance(source, Source):
        source = replace(source, positions=np.r_[:begin, begin + start : begin + stop, end : row.cost])
    return Row(arrays, row.key, source=source)


def word_bounds(word_ids: Sequence[int | None]) -> tuple[IntArray, IntArray]:
    """The first and the last token of the word that each token belongs to, each [tokens].

    A token outside any word (None) is its own.
    """
    words = np.array([-1 if word is None else word for word in word_ids], dtype=np.int64)
    count = len(words)
    begins = np.ones(count, dtype=np.bool_)
    begins[1:] = (words[1:] != words[:-1]) | (words[1:] < 0)
    starts = np.flatnonzero(begins)
    word_of_token = np.cumsum(begins) - 1
    ends = np.append(starts[1:], count) - 1
    return starts[word_of_token], ends[word_of_token]


def masked_softmax(logits: FloatArray, mask: npt.NDArray[np.bool_]) -> FloatArray:
    """Over the positions where `mask` holds, zero elsewhere; [tokens]. All zero where it holds nowhere."""
    result = np.zeros_like(logits)
    chosen = logits[mask]
    if chosen.size:
        shifted = np.exp(chosen - chosen.max())
        result[mask] = shifted / shifted.sum()
    return result


def best_spans(
    start: FloatArray, end: FloatArray, longest: int, k: int
) -> tuple[IntArray, IntArray, FloatArray]:
    """The k spans of 1 to `longest` tokens with the largest start[first] * end[last], best first.

    `start` and `end` are [tokens]. Gives first tokens, last tokens (inclusive) and scores; fewer than k
    where fewer have a score above zero. Equal scores are ordered by first token, then by length.
    """
    tokens = len(start)
    width = min(longest, tokens)
    if width == 0:
        nothing = np.zeros(0, dtype=np.int64)
        return nothing, nothing, np.zeros(0, dtype=np.float32)
    # Row i holds end[i : i + width], so that only spans that are short enough are ever multiplied.
    ends = sliding_window_view(np.append(end, np.zeros(width - 1, dtype=end.dtype)), width)
    scores = (start[:, None] * ends).ravel()
    best = _largest(scores, k)
    best = best[scores[best] > 0]
    first, length_less_one = np.divmod(best, width)
    return first, first + length_less_one, scores[best]


def _largest(values: FloatArray, k: int) -> IntArray:
    """Indices of the k largest, in descending order."""
    if k == 1:
        return np.array([values.argmax()])
    if k < len(values):
        candidates = np.argpartition(values, len(values) - k)[len(values) - k :]
    else:
        candidates = np.arange(len(values))
    order: IntArray = candidates[np.lexsort((candidates, -values[candidates]))]
    return order
