"""What `sampling` does, in NumPy: for programs, which are served without torch.

The same filters in the same order and the same one number per drawn token, so that a seed chooses the same
tokens; there is the description.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mlserver_hftasks.engine.rows import FloatArray, IntArray
from mlserver_hftasks.engine.sequences import Choice, GeneratedSequence, Sampling

Doubles = npt.NDArray[np.float64]

FIRST_LOOK = 1024
"""top_p is looked for among so many of the most likely tokens first, before all are sorted."""


def choose(logits: FloatArray, sequences: Sequence[GeneratedSequence]) -> list[Choice]:
    """One token per row of logits, [n, vocabulary]."""
    return [_choice(row, sequence) for row, sequence in zip(logits, sequences, strict=True)]


def looked_at(sampling: Sampling, vocabulary: int) -> int:
    """How many of the most likely tokens are looked at; 0 for a draw among all, which needs no order."""
    if sampling.top_k:
        return min(sampling.top_k, vocabulary)
    filters = sampling.top_p < 1 or sampling.min_p > 0
    return min(FIRST_LOOK, vocabulary) if filters else 0


def forbidden(sequence: GeneratedSequence) -> list[int]:
    """Tokens that may not come next."""
    early = len(sequence.tokens) < sequence.prompt.min_new_tokens
    return [*sequence.prompt.sampling.suppressed, *(sequence.prompt.eos if early else ())]


def seen(sequence: GeneratedSequence) -> IntArray:
    """Tokens that came already, each once."""
    return np.unique(np.concatenate((sequence.prompt.tokens, np.array(sequence.tokens, dtype=np.int64))))


def _choice(logits: FloatArray, sequence: GeneratedSequence) -> Choice:
    changed = _penalised(logits, sequence)
    sampling = sequence.prompt.sampling
    token = _draw(changed, sampling, sequence.random.random()) if sampling.draw else int(changed.argmax())
    return Choice(token, _logprob(logits, token) if sequence.prompt.logprobs else None)


def _penalised(logits: FloatArray, sequence: GeneratedSequence) -> FloatArray:
    """Logits after what also applies without drawing; the same array if nothing does."""
    penalty, banned = sequence.prompt.sampling.repetition_penalty, forbidden(sequence)
    if penalty == 1.0 and not banned:
        return logits
    changed = logits.copy()
    if penalty != 1.0:
        index = seen(sequence)
        values = changed[index]
        changed[index] = np.where(values < 0, values * penalty, values / penalty)
    changed[banned] = -np.inf
    return changed


def _logprob(logits: FloatArray, token: int) -> float:
    return float(logits[token] - _logsumexp(logits.astype(np.float64)))


def _draw(logits: FloatArray, sampling: Sampling, uniform: float) -> int:
    scaled = logits / np.float32(sampling.temperature)
    count = looked_at(sampling, len(logits))
    if not count:
        doubles = scaled.astype(np.float64)
        return _pick(np.exp(doubles - doubles.max()), uniform)
    index = _best(scaled, count)
    # Without top_k the probabilities are those among all tokens, not among the ones looked at.
    total = scaled[index] if sampling.top_k else scaled
    normaliser = _logsumexp(total.astype(np.float64))
    kept, covered = _filtered(scaled[index], normaliser, sampling)
    if not sampling.top_k and not covered:
        index = np.argsort(-scaled, kind="stable")
        kept, _ = _filtered(scaled[index], normaliser, sampling)
    return int(index[_pick(kept, uniform)])


def _best(scaled: FloatArray, count: int) -> IntArray:
    """The most likely tokens, in falling order."""
    index = np.argpartition(scaled, len(scaled) - count)[len(scaled) - count :]
    return index[np.argsort(-scaled[index], kind="stable")]


def _filtered(scaled: FloatArray, normaliser: float, sampling: Sampling) -> tuple[Doubles, bool]:
    """What top_p and min_p leave of probabilities in falling order, and whether nothing beyond them would
    have been left."""
    probabilities: Doubles = np.exp(scaled.astype(np.float64) - normaliser)
    before = probabilities.cumsum() - probabilities
    keep = (before < sampling.top_p) & (probabilities >= sampling.min_p * probabilities[0])
    keep[0] = True
    return probabilities * keep, not keep[-1]


def _pick(weights: Doubles, uniform: float) -> int:
    """The index at which the cumulated weights exceed that share of their sum."""
    cumulated = weights.cumsum()
    # As in `sampling`, where the number is a float32 like the logits, and may be rounded up to 1: below the
    # sum, so that the token has a weight.
    target = min(np.float64(np.float32(uniform)) * cumulated[-1], np.nextafter(cumulated[-1], 0.0))
    return min(int(np.searchsorted(cumulated, target, side="right")), len(weights) - 1)


def _logsumexp(values: Doubles) -> float:
    largest = values.max()
    return float(largest + np.log(np.exp(values - largest).sum()))
