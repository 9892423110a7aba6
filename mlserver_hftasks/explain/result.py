"""What an explanation is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlserver_hftasks.engine.rows import FloatArray, IntArray

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Explanation:
    """How much each of T tokens (words, if asked for) of one item adds to each of K scores.

    For each score `attributions.sum() == score - baseline_score + delta`; all numbers are finite.
    """

    tokens: tuple[str, ...]
    """As the tokenizer writes them; of words their text."""
    offsets: IntArray
    """[T, 2], the first character in the token's text and the one after the last, in code points; -1 for
    special tokens, and where the tokenizer does not know."""
    word_ids: IntArray
    """[T], -1 for special tokens; counted in each text of a pair from 0."""
    sequence_ids: IntArray
    """[T], which text of a pair the token is from, -1 for special tokens."""
    attributions: FloatArray
    """[K, T], in the unit of the score: a logit. 0 for special tokens."""
    target: IntArray
    """[K, 2], position of the token and index of the label that the score belongs to; -1 where none."""
    target_label: tuple[str, ...]
    score: FloatArray
    """[K], of the item itself."""
    baseline_score: FloatArray
    """[K], with all tokens absent but the special ones."""
    delta: FloatArray
    """[K], by how much the attributions miss completeness."""
    converged: BoolArray
    """[K], whether the error is within the tolerance that was asked for."""
    method: str
    baseline: str
    evaluations: int
    """How many times the model was evaluated."""
    texts: tuple[str, ...] = ()
    """The text, or the two of a pair, that the offsets count in, for drawing; () if there is none."""
    prompt_tokens: int | None = None
    """Of a prompt and its answer how many tokens are the prompt's: the others, of the second text, are never
    absent and get 0. None where a text or a pair is explained."""
