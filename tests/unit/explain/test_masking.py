"""Methods without gradients on games whose Shapley values are known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlserver_hftasks.errors import DeadlineExceeded
from mlserver_hftasks.explain.methods import masking
from mlserver_hftasks.explain.methods.base import Effort, Estimate

Game = Callable[[Any], Any]


class Recorded:
    """A game that may be asked for each coalition once."""

    def __init__(self, game: Game) -> None:
        self.game = game
        self.asked: set[bytes] = set()

    def __call__(self, mask: Any) -> Any:
        assert mask.tobytes() not in self.asked, "each coalition is asked for once"
        self.asked.add(mask.tobytes())
        return np.atleast_1d(self.game(mask)).astype(np.float32)


def run(method: Any, game: Game, *, answers: int = 10**9) -> Estimate:
    wanted = next(method)
    given_so_far = 0
    while True:
        scores = []
        for mask in wanted:
            scores.append(game(mask) if given_so_far < answers else None)
            given_so_far += 1
        try:
            wanted = method.send(scores)
        except StopIteration as end:
            estimate: Estimate = end.value
            return estimate


def table_game(features: int, seed: int = 0) -> Game:
    """A score of its own for every coalition."""
    values = np.random.default_rng(seed).normal(size=2**features)
    bits = 1 << np.arange(features)
    return lambda mask: values[int(mask @ bits)]


def pair_game(features: int) -> Game:
    """Features by themselves and in pairs."""
    draw = np.random.default_rng(1)
    alone, pairs = draw.normal(size=features), draw.normal(size=(features, features))
    return lambda mask: mask @ alone + mask @ pairs @ mask


def shapley(features: int, game: Game) -> Any:
    """By the definition, over all coalitions."""
    values = np.zeros(features)
    for feature in range(features):
        for others in itertools.product((False, True), repeat=features - 1):
            without = np.insert(np.array(others, dtype=np.bool_), feature, False)
            joined = without.copy()
            joined[feature] = True
            size = int(without.sum())
            weight = math.factorial(size) * math.factorial(features - size - 1) / math.factorial(features)
            values[feature] += weight * float(game(joined) - game(without))
    return values


def test_shap_is_exact_where_features_act_in_pairs() -> None:
    game = Recorded(pair_game(6))
    estimate = run(masking.permutation_shap(6, Effort(0.05)), game)
    np.testing.assert_allclose(estimate.attributions[0], shapley(6, pair_game(6)), atol=1e-5)
    assert estimate.converged.all()
    assert estimate.evaluations == len(game.asked) <= 2 + masking.FEWEST_PAIRS * 10


def test_shap_comes_near_the_definition_with_many_evaluations() -> None:
    exact = shapley(7, table_game(7))
    errors = [
        np.abs(run(masking.permutation_shap(7, Effort(1e-9, most)), table(7)).attributions[0] - exact).sum()
        for most in (30, 128)
    ]
    assert errors[1] < 0.3 * np.abs(exact).sum() < errors[0]


def table(features: int) -> Recorded:
    return Recorded(table_game(features))


@pytest.mark.parametrize(("features", "players"), [(1, "one"), (2, "two")])
def test_shap_of_few_features_is_exact_at_once(features: int, players: str) -> None:
    estimate = run(masking.permutation_shap(features, Effort(1e-6)), table(features))
    np.testing.assert_allclose(
        estimate.attributions[0], shapley(features, table_game(features)), atol=1e-6, err_msg=players
    )
    assert estimate.converged.all()
    assert estimate.evaluations == 2**features


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(2, 60) | st.none(), st.integers(0, 200))
def test_shap_always_adds_up_and_keeps_its_cap(features: int, most: int | None, answers: int) -> None:
    game = table(features)
    method = masking.permutation_shap(features, Effort(0.05, most))
    if answers < 2:
        with pytest.raises(DeadlineExceeded, match="@ deadline_ms"):
            run(method, game, answers=answers)
        return
    estimate = run(method, game, answers=answers)
    assert estimate.evaluations == len(game.asked) <= (most or 10_000)
    np.testing.assert_allclose(estimate.delta, 0, atol=1e-4)
    assert estimate.attributions.shape == (1, features)


def test_a_feature_that_does_nothing_gets_nothing() -> None:
    for method in masking.METHODS.values():
        estimate = run(
            method(5, Effort(0.05)), Recorded(lambda mask: 3.0 * mask[0] + 2.0 * mask[2] * mask[4])
        )
        assert estimate.attributions[0, 1] == estimate.attributions[0, 3] == 0


def test_occlusion_takes_away_one_by_one() -> None:
    game = Recorded(lambda mask: [mask @ [1.0, 2.0, 3.0], mask[0] or mask[1]])
    estimate = run(masking.occlusion(3, Effort(0.05)), game)
    np.testing.assert_array_equal(estimate.attributions, [[1, 2, 3], [0, 0, 0]])
    assert estimate.converged.tolist() == [True, False]  # the second score stands on either of two
    assert estimate.delta.tolist() == [0, -1]
    assert estimate.evaluations == 5


def test_occlusion_says_when_it_could_not_try_all() -> None:
    estimate = run(masking.occlusion(4, Effort(0.05, 4)), Recorded(lambda mask: mask.sum()))
    assert estimate.attributions.tolist() == [[1, 1, 0, 0]]
    assert not estimate.converged.any()
    late = run(masking.occlusion(4, Effort(0.05)), Recorded(lambda mask: mask.sum()), answers=3)
    assert late.attributions.tolist() == [[1, 0, 0, 0]]
    assert not late.converged.any()
