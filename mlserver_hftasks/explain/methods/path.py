"""Methods that add up gradients on the straight path from a baseline (alpha 0) to the text (alpha 1).

Integrated gradients (https://arxiv.org/abs/1703.01365), by a fixed rule or by one that looks where the
path bends, and the gradient at its end alone.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mlserver_hftasks.engine.rows import FloatArray
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

_INNER = float(np.sqrt(3 / 7))
NODES = (-1.0, -_INNER, 0.0, _INNER, 1.0)
WEIGHTS = (1 / 10, 49 / 90, 32 / 45, 49 / 90, 1 / 10)
"""The Gauss-Lobatto rule of five points on [-1, 1], exact for polynomials of degree 7."""
FIRST_PANELS = ((0.0, 0.5), (0.5, 1.0))
MAX_EVALS = 129
"""Most evaluations of the adaptive rule, where the client does not say."""
COST_OF_SPLIT = 6
"""Two halves have nine points, of which three are known."""
MIN_WIDTH = 2.0**-20
"""No panel is narrower: points closer than that are the same in float32."""
FIXED_STEPS = 50


@dataclass(frozen=True, slots=True, eq=False)
class Panel:
    """A piece of the path, with the integral over it."""

    start: float
    end: float
    integral: FloatArray
    """[K, features]"""
    error: FloatArray
    """[K], by how much the integral misses the difference of the scores at both ends."""

    @classmethod
    def over(cls, start: float, end: float, known: Known) -> Panel:
        """Needs to know the points of `nodes`."""
        points = [known[alpha] for alpha in nodes(start, end)]
        half = (end - start) / 2
        integral = half * _total(w * point.contribution for w, point in zip(WEIGHTS, points, strict=True))
        rise = points[-1].score - points[0].score
        return cls(start, end, integral, np.abs(integral.sum(axis=1) - rise))

    def halves(self) -> tuple[tuple[float, float], ...]:
        """Both halves, as starts and ends."""
        middle = (self.start + self.end) / 2
        return (self.start, middle), (middle, self.end)


def nodes(start: float, end: float) -> list[float]:
    """The five alphas of a panel; neighbours share theirs exactly."""
    middle, half = (start + end) / 2, (end - start) / 2
    return [start, middle + half * NODES[1], middle, middle + half * NODES[3], end]


def adaptive(effort: Effort) -> PathMethod:
    """Integrated gradients, with points where they are needed.

    The sum of what a panel attributes must be the difference of the scores at its ends; a panel that misses
    it is split in halves, which keeps its ends and its middle. Panels that fit are left alone.
    """
    most = effort.max_evals or MAX_EVALS
    known: Known = {}
    first = _unique(alpha for panel in FIRST_PANELS for alpha in nodes(*panel))
    complete = yield from _learn(known, first[:most])
    if not complete or len(first) > most:
        return _by_trapezoids(known, effort)
    panels = [Panel.over(*bounds, known) for bounds in FIRST_PANELS]
    while worst := _worst(panels, effort.tolerance)[: (most - len(known)) // COST_OF_SPLIT]:
        wanted = _unique(alpha for panel in worst for half in panel.halves() for alpha in nodes(*half))
        complete = yield from _learn(known, [alpha for alpha in wanted if alpha not in known])
        panels = [piece for panel in panels for piece in _refined(panel, known)]
        if not complete:
            break
    return _estimate(
        _total(panel.integral for panel in panels), _total(panel.error for panel in panels), known, effort
    )


def fixed(effort: Effort) -> PathMethod:
    """Integrated gradients by the Gauss-Legendre rule, as captum computes them."""
    steps = FIXED_STEPS if effort.max_evals is None else max(effort.max_evals - 2, 1)
    roots, weights = np.polynomial.legendre.leggauss(steps)
    alphas = [float(alpha) for alpha in (roots + 1) / 2]
    known: Known = {}
    complete = yield from _learn(known, [1.0, 0.0, *alphas])
    if not complete:
        return _by_trapezoids(known, effort)
    weighted = zip(weights / 2, alphas, strict=True)
    return _complete_estimate(_total(w * known[alpha].contribution for w, alpha in weighted), known, effort)


def input_x_gradient(effort: Effort) -> PathMethod:
    """The gradient at the text itself, times the way from the baseline. Two evaluations, low fidelity."""
    known: Known = {}
    yield from _learn(known, [1.0, 0.0])
    if len(known) < 2:
        raise too_late()
    return _complete_estimate(known[1.0].contribution, known, effort)


def _learn(known: Known, alphas: Sequence[float]) -> Generator[Sequence[float], Sequence[Point | None], bool]:
    """Ask for the points, and whether all came."""
    points = yield alphas
    known.update((alpha, point) for alpha, point in zip(alphas, points, strict=True) if point is not None)
    return all(point is not None for point in points)


def _unique(alphas: Iterable[float]) -> list[float]:
    """Both ends first: without them there is no estimate at all."""
    return list(dict.fromkeys([1.0, 0.0, *alphas]))


def _by_trapezoids(known: Known, effort: Effort) -> Estimate:
    """What can be said from whatever points there are."""
    if not {0.0, 1.0} <= known.keys():
        raise too_late()
    alphas = sorted(known)
    integral = _total(
        (end - start) / 2 * (known[start].contribution + known[end].contribution)
        for start, end in pairwise(alphas)
    )
    return _complete_estimate(integral, known, effort)


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


def _worst(panels: Sequence[Panel], tolerance: float) -> list[Panel]:
    """The panels to split, worst first; the others together are within half the tolerance."""
    allowed = tolerance * size(_total(panel.integral for panel in panels))
    errors = np.stack([panel.error / allowed for panel in panels])
    if (errors.sum(axis=0) <= 1).all():
        return []
    order = np.argsort(errors.max(axis=1))
    fitting = int((np.cumsum(errors[order], axis=0) <= 1 / 2).all(axis=1).sum())
    bad = [panels[index] for index in reversed(order[fitting:])]
    return [panel for panel in bad if panel.end - panel.start > MIN_WIDTH]


def _total(arrays: Iterable[FloatArray]) -> FloatArray:
    total: FloatArray = np.sum(list(arrays), axis=0)
    return total


def _refined(panel: Panel, known: Known) -> list[Panel]:
    """Its halves, if all their points are known."""
    if all(alpha in known for half in panel.halves() for alpha in nodes(*half)):
        return [Panel.over(*half, known) for half in panel.halves()]
    return [panel]


METHODS: Mapping[str, Callable[[Effort], PathMethod]] = {
    "integrated-gradients": adaptive,
    "integrated-gradients-fixed": fixed,
    "input-x-gradient": input_x_gradient,
}
