"""Methods that add up gradients on the straight path from a baseline (alpha 0) to the text (alpha 1).

Integrated gradients (https://arxiv.org/abs/1703.01365), by a fixed rule or by one that looks where the
gradients change, and the gradient at the end alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mlserver_hftasks.engine.rows import FloatArray, IntArray
from mlserver_hftasks.explain.methods.base import Effort, Estimate, size, too_late


@dataclass(frozen=True, slots=True, eq=False)
class Point:
    """What the model says somewhere on the path."""

    score: FloatArray
    """[K]"""
    contribution: FloatArray
    """[K, features], the gradient times the whole way."""


PathMethod = Generator[Sequence[float], Sequence[Point | None], Estimate]
"""Asks for points by their alpha."""
Known = dict[float, Point]

STRETCH = 0.7
"""Most models make up their mind in the first half of the path, so it is walked slowly at first:
`alpha = STRETCH * tan(atan(1 / STRETCH) * t)`, for t from 0 to 1. So turns the direction of the sum of two
vectors one of which grows; and the direction is all that a normalisation lets through."""
START = (1.0, 0.0, 0.5, 0.25, 0.75)
"""The first points by their t, most important first."""
MAX_EVALS = 129
"""Most evaluations of the adaptive rule, where the client does not say."""
NARROWEST = 2.0**-16
"""No interval is halved below this: points closer than that are nearly the same in float32."""
SMALLEST = np.float32(1e-12)
"""Doubts below are none."""
TINIEST = np.float32(1e-30)
"""Nothing is divided by less."""
TRAPEZOIDS = 2
"""Through so many points even where they lie in no order: polynomials of higher degree would swing."""
FINE, COARSE = 6, 4
"""How many of the nearest points an interval is integrated by, and by how many to see how well."""
MOST_EVALS = 512
"""No client gets more: what a rule of so many points costs by itself would be felt."""
FIXED_STEPS = 50


def adaptive(effort: Effort) -> PathMethod:
    """Integrated gradients, with points where they are needed.

    Between two neighbouring points the gradients are integrated as the polynomial through the nearest
    `FINE` points. An interval is in doubt as far as that differs, token by token, from what fewer points
    say, or as its sum differs from that of the scores; those most in doubt are halved.
    """
    most = min(effort.max_evals or MAX_EVALS, MOST_EVALS)
    known: Known = {}
    complete = yield from _learn_at(known, START[:most])
    while complete:
        middles = _doubtful(known, effort.tolerance)[: most - len(known)]
        if not middles:
            break
        complete = yield from _learn_at(known, middles)
    return _interpolated(known, effort)


def _learn_at(
    known: Known, times: Sequence[float]
) -> Generator[Sequence[float], Sequence[Point | None], bool]:
    """As `_learn`, by t: with contributions to the integral over t."""
    turn = math.atan(1 / STRETCH)
    points = yield [min(STRETCH * math.tan(turn * t), 1.0) if t < 1 else 1.0 for t in times]
    for t, point in zip(times, points, strict=True):
        if point is not None:
            pace = np.float32(STRETCH * turn / math.cos(turn * t) ** 2)
            known[t] = replace(point, contribution=pace * point.contribution)
    return all(point is not None for point in points)


def _doubtful(known: Known, tolerance: float) -> list[float]:
    """The middles of the intervals to halve, worst first; the others together are within the tolerance."""
    times = np.array(sorted(known))
    integral, doubts = _integrate(known)
    doubts = doubts / (tolerance * size(integral))
    if (doubts.sum(axis=0) <= 1).all():
        return []
    order = _order(doubts.max(axis=1))
    fitting = int((np.cumsum(doubts[order], axis=0) <= 1 / 2).all(axis=1).sum())
    bad = order[fitting:][::-1]
    wide = bad[(times[bad + 1] - times[bad]) > NARROWEST]
    return [float(middle) for middle in (times[wide] + times[wide + 1]) / 2]


def _order(doubts: FloatArray) -> IntArray:
    """Rising. Of those that differ by rounding only, as mirrored intervals do, the later one comes first."""
    nearly = np.round(np.log2(np.maximum(doubts, SMALLEST)), 2)
    order: IntArray = np.lexsort((-np.arange(len(doubts)), nearly))
    return order


def _interpolated(known: Known, effort: Effort, rules: tuple[int, int] = (FINE, COARSE)) -> Estimate:
    """What can be said from whatever points there are, both ends among them."""
    if not {0.0, 1.0} <= known.keys():
        raise too_late()
    integral, doubts = _integrate(known, rules)
    return _estimate(integral, doubts.sum(axis=0), known, effort)


def _integrate(known: Known, rules: tuple[int, int] = (FINE, COARSE)) -> tuple[FloatArray, FloatArray]:
    """The integral over the path, [K, features], and the doubts about each interval, [intervals, K].

    What each interval must add up to is known, from the scores at its ends. What it misses goes to the
    features that are in doubt, in proportion; where none is, to all as they contribute. Nothing is made up
    where the gradients vanish.
    """
    places = tuple(sorted(known))
    contributions = np.stack([known[place].contribution for place in places])
    scores = np.stack([known[place].score for place in places])
    pieces, coarsely = (rule(contributions) for rule in _rules(places, rules))
    differences = np.abs(pieces - coarsely)
    missed = np.diff(scores, axis=0) - pieces.sum(axis=2)
    doubts = differences.sum(axis=2)
    sizes = np.where(doubts[:, :, None] > SMALLEST, differences, np.abs(pieces))
    shares = sizes / np.maximum(sizes.sum(axis=2, keepdims=True), TINIEST)
    pieces += shares * missed[:, :, None]
    return pieces.sum(axis=0), np.maximum(doubts, np.abs(missed))


@dataclass(frozen=True, slots=True, eq=False)
class _Rule:
    """How the values at some points make the integral over each interval between them."""

    points: IntArray
    """[intervals, count], the points of the polynomial."""
    weights: FloatArray
    """[intervals, count]"""

    @classmethod
    def through(cls, alphas: FloatArray, count: int) -> _Rule:
        """Integrates the polynomial through the nearest `count` points.

        The weights solve the moment equations on each interval, mapped to [-1, 1], all at once.
        """
        intervals = np.arange(len(alphas) - 1)
        first = np.clip(intervals - (count - 2) // 2, 0, len(alphas) - count)
        points = first[:, None] + np.arange(count)
        middle, half = (alphas[1:] + alphas[:-1]) / 2, np.diff(alphas) / 2
        local = (alphas[points] - middle[:, None]) / half[:, None]
        powers = np.arange(count)
        moments = np.where(powers % 2, 0.0, 2.0 / (powers + 1))[:, None]
        solved = np.linalg.solve(local[:, None, :] ** powers[:, None], np.tile(moments, (len(local), 1, 1)))
        return cls(points, (solved[..., 0] * half[:, None]).astype(np.float32))

    def __call__(self, values: FloatArray) -> FloatArray:
        """[points, K, features] -> [intervals, K, features]."""
        pieces = np.zeros((len(self.points), *values.shape[1:]), dtype=np.float32)
        for points, weights in zip(self.points.T, self.weights.T, strict=True):
            pieces += weights[:, None, None] * values[points]
        return pieces


@functools.lru_cache(maxsize=256)
def _rules(alphas: tuple[float, ...], counts: tuple[int, int]) -> tuple[_Rule, _Rule]:
    """A fine one, and one to see how well that does, by how many points they take."""
    fine = min(counts[0], len(alphas))
    coarse = max(min(counts[1], fine - 1), 1)
    return _Rule.through(np.array(alphas), fine), _Rule.through(np.array(alphas), coarse)


def fixed(effort: Effort) -> PathMethod:
    """Integrated gradients by the Gauss-Legendre rule, as captum computes them."""
    steps = FIXED_STEPS if effort.max_evals is None else min(max(effort.max_evals - 2, 1), MOST_EVALS)
    roots, weights = _gauss_legendre(steps)
    alphas = [float(alpha) for alpha in (roots + 1) / 2]
    known: Known = {}
    scattered = np.random.default_rng(0).permutation(alphas).tolist()
    complete = yield from _learn(known, [1.0, 0.0, *scattered])
    if not complete:
        return _interpolated(known, effort, rules=(TRAPEZOIDS, TRAPEZOIDS))
    weighted = zip(weights / 2, alphas, strict=True)
    return _complete_estimate(_total(w * known[alpha].contribution for w, alpha in weighted), known, effort)


def input_x_gradient(effort: Effort) -> PathMethod:
    """The gradient at the text itself, times the way from the baseline. Two evaluations, low fidelity."""
    known: Known = {}
    yield from _learn(known, [1.0, 0.0])
    if len(known) < 2:
        raise too_late()
    return _complete_estimate(known[1.0].contribution, known, effort)


@functools.lru_cache(maxsize=32)
def _gauss_legendre(steps: int) -> tuple[FloatArray, FloatArray]:
    """Roots and weights on [-1, 1]."""
    roots, weights = np.polynomial.legendre.leggauss(steps)
    return roots.astype(np.float32), weights.astype(np.float32)


def _learn(known: Known, alphas: Sequence[float]) -> Generator[Sequence[float], Sequence[Point | None], bool]:
    """Ask for the points, and whether all came."""
    points = yield alphas
    known.update((alpha, point) for alpha, point in zip(alphas, points, strict=True) if point is not None)
    return all(point is not None for point in points)


def _complete_estimate(attributions: FloatArray, known: Known, effort: Effort) -> Estimate:
    """With the error that completeness shows."""
    missed = attributions.sum(axis=1) - (known[1.0].score - known[0.0].score)
    return _estimate(attributions, np.abs(missed), known, effort)


def _estimate(attributions: FloatArray, error: FloatArray, known: Known, effort: Effort) -> Estimate:
    return Estimate(
        np.asarray(attributions, dtype=np.float32),
        known[1.0].score,
        known[0.0].score,
        error,
        effort,
        len(known),
    )


def _total(arrays: Iterable[FloatArray]) -> FloatArray:
    total: FloatArray = np.sum(list(arrays), axis=0)
    return total


METHODS: Mapping[str, Callable[[Effort], PathMethod]] = {
    "integrated-gradients": adaptive,
    "integrated-gradients-fixed": fixed,
    "input-x-gradient": input_x_gradient,
}
