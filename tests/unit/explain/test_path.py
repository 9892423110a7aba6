"""Integrated gradients of functions whose integrals are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlserver_hftasks.errors import DeadlineExceeded
from mlserver_hftasks.explain.methods import path
from mlserver_hftasks.explain.methods.base import Effort, Estimate
from mlserver_hftasks.explain.methods.path import Point


class Steps:
    """K = 2 scores of F features, each a step of its own width at its own place: the sum of what they add.

    The contribution of a feature is the slope of its step; integrated from 0 to 1, the step itself.
    """

    def __init__(self, heights: Sequence[Sequence[float]], places: Sequence[float], widths: Sequence[float]):
        self.heights, self.places, self.widths = map(np.array, (heights, places, widths))
        self.asked: list[float] = []

    def __call__(self, alpha: float) -> Point:
        assert alpha not in self.asked, "each point is asked for once"
        assert 0 <= alpha <= 1
        self.asked.append(alpha)
        slope = 1 / np.cosh((alpha - self.places) / self.widths) ** 2 / self.widths
        score = self.heights @ np.tanh((alpha - self.places) / self.widths)
        return Point(score.astype(np.float32), (self.heights * slope).astype(np.float32))

    @property
    def integral(self) -> Any:
        ends = np.tanh((1 - self.places) / self.widths) - np.tanh(-self.places / self.widths)
        return self.heights * ends


def run(method: Any, model: Callable[[float], Point], *, answers: int = 10**9) -> Estimate:
    """Drive a method; after so many answers there is no more time."""
    wanted = next(method)
    given_so_far = 0
    while True:
        points: list[Point | None] = []
        for alpha in wanted:
            points.append(model(alpha) if given_so_far < answers else None)
            given_so_far += 1
        try:
            wanted = method.send(points)
        except StopIteration as end:
            estimate: Estimate = end.value
            return estimate


def error(estimate: Estimate, model: Steps) -> Any:
    """The true one, in the measure of the tolerance: [K]."""
    missed = np.abs(estimate.attributions - model.integral).sum(axis=1)
    return missed / np.abs(model.integral).sum(axis=1)


def assert_adds_up(estimate: Estimate) -> None:
    left = estimate.attributions.sum(axis=1)
    right = estimate.score - estimate.baseline_score + estimate.delta
    np.testing.assert_allclose(left, right, atol=1e-5)


SMOOTH = Steps([[1.0, 2.0, -0.5], [0.3, 0.1, 3.0]], [0.3, 0.6, 0.1], [0.5, 0.7, 0.9])
SHARP = Steps([[1.0, 2.0, -0.5], [0.3, 0.1, 3.0]], [0.31, 0.62, 0.07], [0.03, 0.1, 0.02])
CANCELLING = Steps([[1.0, -1.0], [2.0, -1.9]], [0.21, 0.23], [0.03, 0.03])
"""The sum hardly moves, while what it is the sum of does."""


def fresh(model: Steps) -> Steps:
    return Steps(model.heights, model.places, model.widths)


@pytest.mark.parametrize("template", [SMOOTH, SHARP, CANCELLING], ids=["smooth", "sharp", "cancelling"])
@pytest.mark.parametrize("tolerance", [0.05, 0.02, 0.01, 0.001])
def test_adaptive_keeps_its_tolerance_token_by_token(template: Steps, tolerance: float) -> None:
    model = fresh(template)
    estimate = run(path.adaptive(Effort(tolerance, 1000)), model)
    assert estimate.converged.all()
    assert (error(estimate, model) <= tolerance).all()
    assert estimate.evaluations == len(model.asked)
    assert_adds_up(estimate)


def test_adaptive_asks_where_the_path_bends() -> None:
    assert run(path.adaptive(Effort(0.02)), fresh(SMOOTH)).evaluations <= 9
    sudden = Steps([[1.0, 0.5]], [0.2, 0.21], [0.006, 0.006])
    estimate = run(path.adaptive(Effort(0.02)), sudden)
    assert estimate.evaluations < 45
    by_rule = run(path.fixed(Effort(0.02, estimate.evaluations)), fresh(sudden))
    assert error(estimate, sudden) <= 0.02 < 0.3 < error(by_rule, sudden)
    assert sum(alpha > 0.5 for alpha in sudden.asked) <= 5  # nothing happens there


@pytest.mark.parametrize("most", [2, 3, 5, 7, 8, 12, 20])
def test_the_cap_is_kept_and_the_rest_is_honest(most: int) -> None:
    model = fresh(SHARP)
    estimate = run(path.adaptive(Effort(0.001, most)), model)
    assert len(model.asked) == estimate.evaluations <= most
    assert not estimate.converged.any()
    assert_adds_up(estimate)


@settings(deadline=None)
@given(
    places=st.lists(st.floats(0.02, 0.98), min_size=3, max_size=3),
    widths=st.lists(st.floats(0.02, 2.0), min_size=3, max_size=3),
    answers=st.integers(0, 40),
)
def test_adaptive_ends_well_whenever_time_is_up(
    places: list[float], widths: list[float], answers: int
) -> None:
    model = Steps([[1.0, -2.0, 0.5], [0.1, 0.2, 0.3]], places, widths)
    method = path.adaptive(Effort(0.01, 200))
    if answers < 2:
        with pytest.raises(DeadlineExceeded, match="@ deadline_ms"):
            run(method, model, answers=answers)
        return
    estimate = run(method, model, answers=answers)
    assert estimate.evaluations <= min(answers, 200)
    assert np.isfinite(estimate.attributions).all()
    assert_adds_up(estimate)
    if estimate.converged.all():
        assert error(estimate, model).max() <= 0.03


def test_doubts_shrink_as_points_come() -> None:
    errors = [
        run(path.adaptive(Effort(1e-9, most)), fresh(SHARP)).error.max() for most in (7, 14, 28, 56, 112)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 1000


def test_fixed_is_the_gauss_legendre_rule() -> None:
    model = fresh(SMOOTH)
    estimate = run(path.fixed(Effort(0.01)), model)
    assert estimate.evaluations == len(model.asked) == 52
    np.testing.assert_allclose(estimate.attributions, model.integral, atol=1e-6)
    assert run(path.fixed(Effort(0.01, 12)), fresh(SMOOTH)).evaluations == 12
    for answers in (2, 3, 5, 17, 40):
        cut_short = run(path.fixed(Effort(0.01)), fresh(SMOOTH), answers=answers)
        assert_adds_up(cut_short)
        assert error(cut_short, SMOOTH).max() < 2 / answers


def test_input_x_gradient_is_the_slope_at_the_end() -> None:
    model = fresh(SMOOTH)
    estimate = run(path.input_x_gradient(Effort(0.05)), model)
    np.testing.assert_array_equal(estimate.attributions, fresh(SMOOTH)(1.0).contribution)
    assert not estimate.converged.any()
    assert_adds_up(estimate)
    with pytest.raises(DeadlineExceeded):
        run(path.input_x_gradient(Effort(0.05)), fresh(SMOOTH), answers=1)


def test_a_path_that_goes_nowhere() -> None:
    estimate = run(path.adaptive(Effort(0.05)), Steps([[0.0], [0.0]], [0.5], [0.1]))
    assert estimate.converged.all()
    assert not estimate.attributions.any()
    assert estimate.evaluations == len(path.START)


@pytest.mark.parametrize("most", [2, 3, 5, 9, 33])
def test_adaptive_adds_up_to_the_scores(most: int) -> None:
    """What an interval misses goes to features that are in doubt; those that do nothing get nothing."""
    model = Steps([[1.0, 0.0, 2.0], [0.3, 0.0, 3.0]], [0.31, 0.5, 0.07], [0.03, 0.1, 0.02])
    estimate = run(path.adaptive(Effort(1e-4, most)), model)
    np.testing.assert_allclose(estimate.delta, 0, atol=1e-5)
    assert not estimate.converged.any()
    assert not estimate.attributions[:, 1].any()


def test_what_is_missing_goes_where_the_doubts_are() -> None:
    """The second feature is flat, so that any points give its integral; the first alone was missed."""
    model = Steps([[1.0, 0.5]], [0.4, -300.0], [0.05, 1000.0])
    estimate = run(path.adaptive(Effort(0.001, 9)), model)
    assert error(estimate, model) < 1e-3 < abs(estimate.error)
    np.testing.assert_allclose(estimate.attributions, model.integral, atol=1e-3)


def test_what_is_missing_where_nothing_is_in_doubt() -> None:
    """All have a part in it, as they contribute; where gradients vanish nobody has, and `delta` tells."""

    def flat(alpha: float) -> Point:
        return Point(np.array([4 * alpha], dtype=np.float32), np.array([[1.0, 2.0, 0.0]], dtype=np.float32))

    estimate = run(path.adaptive(Effort(0.05)), flat)
    np.testing.assert_allclose(estimate.attributions, [[4 / 3, 8 / 3, 0.0]], rtol=1e-5)
    np.testing.assert_allclose(estimate.delta, 0, atol=1e-5)
    assert not estimate.converged.any()

    def vanishing(alpha: float) -> Point:
        return Point(np.array([float(alpha > 0.4)], dtype=np.float32), np.zeros((1, 3), dtype=np.float32))

    estimate = run(path.adaptive(Effort(0.05)), vanishing)
    assert not estimate.attributions.any()
    assert estimate.delta.tolist() == [-1.0]
    assert not estimate.converged.any()


def test_rounding_does_not_choose_the_points() -> None:
    """Mirrored intervals are in the same doubt, but for rounding."""
    for noise in (1e-6, -1e-6):
        doubts = np.array([1.0, 3.0, 3.0 * (1 + noise), 2.0, 0.0], dtype=np.float32)
        assert path._order(doubts).tolist() == [4, 0, 3, 2, 1]


@pytest.mark.parametrize("points", [2, 3, 5, 9])
def test_weights_integrate_polynomials(points: int) -> None:
    alphas = np.sort(np.r_[0, np.random.default_rng(points).uniform(0, 1, points - 2), 1])
    rule = path._Rule.through(alphas, min(points, 6))
    for power in range(min(points, 6)):
        wanted = np.diff(alphas ** (power + 1)) / (power + 1)
        got = rule((alphas**power)[:, None, None])
        assert got.shape == (points - 1, 1, 1)
        np.testing.assert_allclose(got.ravel(), wanted, atol=1e-5)
