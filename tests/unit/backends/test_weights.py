"""Products for models that generate: each token by itself, and no other error than that of the weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlserver_hftasks.backends import int8, weights
from mlserver_hftasks.backends.linears import Layer
from mlserver_hftasks.errors import InvalidSettings

NAMES = tuple(weights._MAKERS)
WIDE = (48, 96)
"""Outputs and inputs, in groups of 32."""


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def product(name: str, weight: Tensor, bias: Tensor | None = None) -> Any:
    return weights._MAKERS[name](Layer(weight, bias), weights._levels_product())


def rounded(weight: Tensor) -> Tensor:
    """A weight as int8 holds it."""
    scales = weight.abs().amax(1, keepdim=True) / int8._levels()
    return (weight / scales).round() * scales


@pytest.mark.parametrize("shape", [(1, 96), (1, 300, 96), (2, 3, 5, 96)])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("name", "least", "most"), [("int8", 1e-4, 2e-2), ("int4-weight-only", 1e-2, 0.1)])
def test_a_product_is_near_the_float_one(
    name: str, least: float, most: float, shape: tuple[int, ...], biased: bool
) -> None:
    weight, bias = noise(*WIDE, seed=1) * torch.logspace(-3, 3, 48)[:, None], noise(48, seed=2)
    inputs = noise(*shape) * torch.logspace(-4, 4, shape[-2] if len(shape) > 2 else 1)[:, None]
    got = product(name, weight, bias if biased else None)(inputs)
    wanted = nn.functional.linear(inputs, weight, bias if biased else None)
    assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
    scale = inputs.norm(dim=-1, keepdim=True) * weight.norm(dim=1)
    assert least < (((got - wanted) / scale) ** 2).mean() ** 0.5 * 96**0.5 < most


@pytest.mark.parametrize("biased", [True, False])
def test_weight_only_leaves_the_error_of_the_weights(biased: bool) -> None:
    weight, bias = noise(*WIDE, seed=1), noise(48, seed=2) if biased else None
    inputs = noise(7, 96) * torch.logspace(-4, 4, 7)[:, None]
    inputs[:, 5] *= 50  # one large input must not drown the others
    got = product("int8-weight-only", weight, bias)(inputs)
    exact = nn.functional.linear(inputs, rounded(weight), bias)
    scale = inputs.abs().amax(1, keepdim=True) * rounded(weight).norm(dim=1)
    assert ((got - exact).abs() / scale).max() < 2**-15 * 4
    beside = product("int8", weight, bias)(inputs)
    assert ((beside - exact).abs() / scale).max() > 2**-9


@pytest.mark.parametrize("name", NAMES)
def test_a_token_does_not_hang_on_its_neighbours(name: str) -> None:
    made = product(name, noise(*WIDE, seed=1))
    inputs = noise(9, 96, seed=3)
    loud = torch.cat([inputs, 1e4 * noise(5, 96, seed=4)])
    others = torch.cat([inputs, noise(5, 96, seed=5)])
    assert torch.equal(made(loud)[:9], made(others)[:9])
    alone = torch.cat([made(token[None]) for token in inputs])
    torch.testing.assert_close(made(inputs), alone, rtol=1e-2 if "int4" in name else 1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_stays(name: str, dtype: torch.dtype) -> None:
    weight, bias, inputs = noise(*WIDE).to(dtype), noise(48).to(dtype), noise(3, 96, seed=1).to(dtype)
    got = product(name, weight, bias)(inputs)
    assert got.dtype == dtype
    wanted = inputs.float() @ weight.float().t() + bias.float()
    assert (got.float() - wanted).norm() / wanted.norm() < 0.15


@pytest.mark.parametrize("name", NAMES)
def test_zeros_nothing_and_what_is_no_number(name: str) -> None:
    bias = noise(48)
    assert torch.equal(
        product(name, torch.zeros(WIDE), bias)(torch.zeros(3, 96)).round(decimals=5),
        bias.expand(3, 48).round(decimals=5),
    )
    assert product(name, noise(*WIDE))(torch.zeros(0, 96)).shape == (0, 48)
    inputs = noise(2, 96)
    inputs[1, 3] = torch.nan
    got = product(name, noise(*WIDE))(inputs)
    assert got[0].isfinite().all() and not got[1].isfinite().any()


@pytest.mark.parametrize("outputs", [1, 15, 16, 33])
def test_any_number_of_outputs_in_int4(outputs: int) -> None:
    weight, inputs = noise(outputs, 64), noise(4, 64, seed=1)
    got, wanted = product("int4-weight-only", weight)(inputs), inputs @ weight.t()
    assert got.shape == wanted.shape
    assert (got - wanted).norm() / wanted.norm() < 0.15


def test_inputs_that_make_no_groups_take_int8() -> None:
    assert isinstance(product("int4-weight-only", noise(16, 48)), weights.Int8WeightOnly)
    assert isinstance(product("int4-weight-only", noise(16, 64)), weights.Int4WeightOnly)


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_of_a_model_has_the_same_products(name: str) -> None:
    made = product(name, noise(*WIDE))
    assert copy.deepcopy(made) is made


@pytest.mark.parametrize("kind", [weights._Fbgemm, weights._OneDnn])
@pytest.mark.parametrize("most", int8.LEVELS)
def test_both_libraries_sum_exactly(kind: Any, most: int) -> None:
    if not weights._multiplies_right(kind, most):
        pytest.skip("not on this CPU")
    levels = torch.randint(-127, 128, (5, 256), generator=torch.Generator().manual_seed(0)).float()
    weight = torch.randint(-most, most + 1, (16, 256), generator=torch.Generator().manual_seed(1)).float()
    weight[:, 0] = most  # scales of one
    torch.testing.assert_close(kind(weight, most)(levels), levels @ weight.t(), rtol=1e-6, atol=0)


def test_where_one_library_is_missing_the_other_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(weight: Tensor, most: int) -> Any:
        raise RuntimeError("Didn't find engine for operation quantized::linear_prepack")

    usual = product("int8-weight-only", noise(*WIDE))
    monkeypatch.setattr(weights, "_Fbgemm", missing)
    other = product("int8-weight-only", noise(*WIDE))
    torch.testing.assert_close(other(noise(3, 96)), usual(noise(3, 96)), rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(weights, "_OneDnn", missing)
    with pytest.raises(InvalidSettings, match=r"cannot multiply int8 on this CPU .*Didn't find engine"):
        product("int8", noise(*WIDE))
