"""The cost model finds overhead and slope, forgets what is old, and survives anything."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlserver_hftasks.engine.cost import KNEE_EFFICIENCY, USUAL_DEVIATION, CostModel

OVERHEAD_S, PER_TOKEN_S = 4e-3, 2e-4


def taught(*observations: tuple[int, float], lasting: bool = False) -> CostModel:
    model = CostModel()
    for cost, seconds in observations:
        model.observe(cost, seconds, lasting=lasting)
    return model


def line(cost: int, overhead: float = OVERHEAD_S, per_token: float = PER_TOKEN_S) -> tuple[int, float]:
    return cost, overhead + per_token * cost


def test_knows_nothing_at_first() -> None:
    model = CostModel()
    assert not model.knows
    assert model.seconds(1000) == 0
    assert model.knee_tokens == math.inf


def test_two_batches_give_the_line_exactly() -> None:
    model = taught(line(10), line(500))
    assert model.knows
    assert model.overhead_s == pytest.approx(OVERHEAD_S)
    assert model.per_token_s == pytest.approx(PER_TOKEN_S)
    assert model.seconds(250) == pytest.approx(line(250)[1])


@pytest.mark.parametrize("lasting", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_recovers_the_line_from_noise(seed: int, lasting: bool) -> None:
    generator = np.random.default_rng(seed)
    costs = generator.integers(5, 2000, 400)
    noise = generator.lognormal(0, 0.1, 400)
    model = taught(*((int(c), line(int(c))[1] * float(n)) for c, n in zip(costs, noise, strict=True)))
    assert model.per_token_s == pytest.approx(PER_TOKEN_S, rel=0.1)
    assert model.overhead_s == pytest.approx(OVERHEAD_S, rel=0.5)


def test_batches_of_one_size_do_not_wash_the_warm_up_out() -> None:
    model = taught(line(8), line(64), line(512), lasting=True)
    for _ in range(5000):
        model.observe(*line(1024))
    assert model.overhead_s == pytest.approx(OVERHEAD_S, rel=1e-6)
    assert model.per_token_s == pytest.approx(PER_TOKEN_S, rel=1e-6)


def test_follows_a_device_that_became_slower() -> None:
    model = taught(*(line(cost) for cost in range(10, 1000, 10)))
    for cost in list(range(10, 1000, 10)) * 4:
        model.observe(*line(cost, 3 * OVERHEAD_S, 3 * PER_TOKEN_S))
    assert model.seconds(500) == pytest.approx(3 * line(500)[1], rel=0.01)


def test_at_the_knee_throughput_is_the_stated_share_of_its_limit() -> None:
    model = taught(line(10), line(1000))
    knee = model.knee_tokens
    assert knee == pytest.approx(19 * OVERHEAD_S / PER_TOKEN_S)
    assert knee / model.seconds(knee) == pytest.approx(KNEE_EFFICIENCY / PER_TOKEN_S)


@pytest.mark.parametrize(
    ("observations", "overhead", "per_token"),
    [
        ([(100, 0.5)], 0.0, 0.005),  # one batch: all of it is slope
        ([(100, 0.5)] * 50, 0.0, 0.005),  # nothing to tell overhead from slope by
        ([(100, 0.1), (200, 0.4)], 0.0, 0.5 / 2 / 125),  # a negative overhead: a line through the origin
        ([(100, 0.0)], 0.0, 0.0),
    ],
)
def test_degenerate(observations: list[tuple[int, float]], overhead: float, per_token: float) -> None:
    model = taught(*observations)
    assert model.overhead_s == overhead
    if len(set(observations)) == 1:
        assert model.per_token_s == pytest.approx(per_token)
    assert model.per_token_s >= 0


def test_larger_batches_that_were_faster_leave_no_slope() -> None:
    model = taught((100, 0.4), (200, 0.2))
    assert model.per_token_s == 0
    assert 0.2 < model.overhead_s < 0.4
    assert model.knee_tokens == math.inf


@given(
    st.lists(
        st.tuples(st.integers(1, 100_000), st.floats(0, 1e3), st.booleans()),
        min_size=1,
        max_size=60,
    )
)
def test_never_negative_never_nan(observations: list[tuple[int, float, bool]]) -> None:
    model = CostModel()
    for cost, seconds, lasting in observations:
        model.observe(cost, seconds, lasting=lasting)
        assert model.knows
        assert 0 <= model.overhead_s < math.inf
        assert 0 <= model.per_token_s < math.inf
        assert model.knee_tokens >= 0
        assert model.seconds(1) <= model.seconds(1000)


def test_the_deviation_is_that_of_the_predictions() -> None:
    generator = np.random.default_rng(0)
    model = CostModel()
    for cost in (10, 100, 1000):
        model.observe(cost, 0.004 + 1e-4 * cost, lasting=True)
    assert model.deviation == USUAL_DEVIATION
    for share in (0.3, 0.02):
        for cost in generator.integers(10, 1000, 400).tolist():
            model.observe(cost, (0.004 + 1e-4 * cost) * (1 + share * generator.standard_normal()))
        assert model.deviation == pytest.approx(share, rel=0.4)
    model.observe(100, 1000.0)
    assert model.deviation < 0.5, "one batch that was held up is not all there is"
