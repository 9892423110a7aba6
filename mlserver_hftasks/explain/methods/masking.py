"""Methods that only ask what the model says when some features are absent: they need no gradients."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from mlserver_hftasks.engine.rows import FloatArray, IntArray
from mlserver_hftasks.explain.methods.base import Effort, Estimate, size, too_late
from mlserver_hftasks.explain.result import BoolArray

MaskMethod = Generator[Sequence[BoolArray], Sequence[FloatArray | None], Estimate]
"""Asks for the scores [K] of coalitions [features]: True where a feature is present."""

USUAL_PAIRS = 8
"""Pairs of permutations, where the client does not say how many evaluations there may be."""
FEWEST_PAIRS = 3
"""The error of a mean over fewer says little."""
MAX_PAIRS = 100
MAX_EVALS = 10_000
EXACT_FEATURES = 2
"""Of so few features one pair of permutations is all there are."""
SEED = 0
"""The same text gets the same answer."""


@dataclass(frozen=True, slots=True, eq=False)
class Coalitions:
    """The scores that are known, each asked for once; they count only those that were."""

    features: int
    scores: dict[bytes, FloatArray] = field(default_factory=dict)

    def learn(
        self, masks: Sequence[BoolArray]
    ) -> Generator[Sequence[BoolArray], Sequence[FloatArray | None], bool]:
        """Ask for what is not known of the masks, and whether all came."""
        wanted = list({mask.tobytes(): mask for mask in masks if mask.tobytes() not in self.scores}.values())
        if not wanted:
            return True
        answers = yield wanted
        self.scores.update(
            (mask.tobytes(), score) for mask, score in zip(wanted, answers, strict=True) if score is not None
        )
        return all(score is not None for score in answers)

    def score(self, mask: BoolArray) -> FloatArray:
        """Of a mask that is known."""
        return self.scores[mask.tobytes()]

    def known(self, masks: Sequence[BoolArray]) -> list[BoolArray]:
        """Those of the masks that are known."""
        return [mask for mask in masks if mask.tobytes() in self.scores]

    def missing(self, masks: Sequence[BoolArray]) -> int:
        """How many evaluations the masks would take."""
        return len({mask.tobytes() for mask in masks} - self.scores.keys())

    @property
    def full(self) -> BoolArray:
        """All are present."""
        return np.ones(self.features, dtype=np.bool_)

    @property
    def empty(self) -> BoolArray:
        """None is present."""
        return np.zeros(self.features, dtype=np.bool_)

    def estimate(self, attributions: FloatArray, error: FloatArray, effort: Effort) -> Estimate:
        """With both ends' scores."""
        ends = self.score(self.full), self.score(self.empty)
        return Estimate(attributions.astype(np.float32), *ends, error, effort, len(self.scores))

    def check_ends(self) -> None:
        """Raise `DeadlineExceeded` unless both ends are known."""
        if len(self.known([self.full, self.empty])) < min(2, self.features + 1):
            raise too_late()


def occlusion(features: int, effort: Effort) -> MaskMethod:
    """What the score loses without each feature. Does not add up where features stand for one another."""
    asked = Coalitions(features)
    singles = list(~np.eye(features, dtype=np.bool_))
    room = features if effort.max_evals is None else max(effort.max_evals - 2, 0)
    yield from asked.learn([asked.full, asked.empty, *singles[:room]])
    asked.check_ends()
    whole = asked.score(asked.full)
    lost = [whole - asked.score(mask) if asked.known([mask]) else np.zeros_like(whole) for mask in singles]
    attributions = np.stack(lost, axis=1) if lost else np.zeros((len(whole), 0), dtype=np.float32)
    complete = len(asked.known(singles)) == features
    missed = np.abs(attributions.sum(axis=1) - (whole - asked.score(asked.empty)))
    return asked.estimate(attributions, missed if complete else np.full_like(missed, np.inf), effort)


def permutation_shap(features: int, effort: Effort) -> MaskMethod:
    """Shapley values from permutations and their reverses: what each feature adds where it joins.

    Always complete; exact where features act by themselves or in pairs, which cancel between a permutation
    and its reverse (https://jmlr.org/papers/v23/21-0439.html). The error is that of the mean over the pairs.
    """
    asked, draw = Coalitions(features), np.random.default_rng(SEED)
    pairs: list[FloatArray] = []
    most_evals, most_pairs = effort.max_evals or MAX_EVALS, MAX_PAIRS if effort.max_evals else USUAL_PAIRS
    yield from asked.learn([asked.full, asked.empty])
    asked.check_ends()
    while len(pairs) < most_pairs and not _converged(pairs, effort):
        chains = _chains(draw.permutation(features))
        masks = [mask for chain in chains for mask in chain]
        room = most_evals - len(asked.scores)
        fits = asked.missing(masks) <= room
        complete = fits and (yield from asked.learn(masks))
        if not complete and not pairs:  # the first one may have gaps, there is no other
            yield from asked.learn([] if fits else _thinned(masks, room))
        if complete or not pairs:
            pairs.append(np.mean([_joining(asked, chain) for chain in chains], axis=0))
        if not complete:
            break
    return asked.estimate(*_mean(pairs), effort)


def _chains(order: IntArray) -> tuple[list[BoolArray], list[BoolArray]]:
    """The coalitions that grow by one feature after another in that order, and in the reverse order."""
    joins_at = np.argsort(order)
    sizes = np.arange(len(order) + 1)[:, None]
    return list(joins_at < sizes), list(len(order) - 1 - joins_at < sizes)


def _thinned(masks: Sequence[BoolArray], count: int) -> list[BoolArray]:
    """So many of the masks, evenly."""
    chosen = np.linspace(0, len(masks) - 1, max(count, 0) + 2)[1:-1].astype(int)
    return [masks[index] for index in chosen]


def _joining(asked: Coalitions, chain: Sequence[BoolArray]) -> FloatArray:
    """What each feature adds along a chain, [K, features]; those that join over a gap share alike."""
    known = asked.known(chain)
    added = np.zeros((len(asked.score(chain[0])), asked.features), dtype=np.float32)
    for before, after in pairwise(known):
        joining = after & ~before
        added[:, joining] = ((asked.score(after) - asked.score(before)) / joining.sum())[:, None]
    return added


def _mean(pairs: Sequence[FloatArray]) -> tuple[FloatArray, FloatArray]:
    """The mean, [K, features], and the sum of its standard errors, [K]; a single pair knows no error."""
    mean: FloatArray = np.mean(pairs, axis=0)
    if len(pairs) == 1:
        return mean, np.full(len(mean), 0 if mean.shape[1] <= EXACT_FEATURES else np.inf)
    deviation = np.std(pairs, axis=0, ddof=1) / np.sqrt(len(pairs))
    return mean, deviation.sum(axis=1)


def _converged(pairs: Sequence[FloatArray], effort: Effort) -> bool:
    if not pairs or (len(pairs) < FEWEST_PAIRS and pairs[0].shape[1] > EXACT_FEATURES):
        return False
    mean, error = _mean(pairs)
    return bool((error <= effort.tolerance * size(mean)).all())


METHODS: Mapping[str, Callable[[int, Effort], MaskMethod]] = {
    "occlusion": occlusion,
    "permutation-shap": permutation_shap,
}
