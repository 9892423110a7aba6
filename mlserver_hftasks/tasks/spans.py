"""Arithmetic of answer spans: windows over a long text, words, probabilities, the best spans."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from mlserver_hftasks.engine.rows import FloatArray, IntArray


def windows(tokens: int, room: int, overlap: int) -> list[tuple[int, int]]:
    """Pieces (start, end) of at most `room` tokens that cover a text; neighbours share `overlap` tokens.

    The last ends with the text and may be shorter. Needs 0 <= overlap < room. An empty text is one piece.
    """
    step = room - overlap
    last = max(0, -(-(tokens - room) // step))
    return [(index * step, min(index * step + room, tokens)) for index in range(last + 1)]


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


def best_spans(start: FloatArray, end: FloatArray, longest: int, k: int) -> tuple[IntArray, IntArray, FloatArray]:
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
