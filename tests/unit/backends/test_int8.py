"""int8 products: near the float ones, each token by itself, and only on a CPU that can."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mlserver_hftasks.backends import int8
from mlserver_hftasks.backends.int8 import Int8Product
from mlserver_hftasks.backends.linears import Layer, replace
from mlserver_hftasks.errors import InvalidSettings


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantized_per_token(tensor: Tensor) -> tuple[Tensor, Tensor]:
    shift = torch.full((tensor.shape[-1],), int8.ROUNDING + int8.ZERO)
    return int8.quantized_per_token(tensor, shift)


# -- one product ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 2, 64), (1, 300, 64), (7, 64), (2, 3, 5, 64)])
@pytest.mark.parametrize("biased", [True, False])
def test_a_product_is_near_the_float_one(shape: tuple[int, ...], biased: bool) -> None:
    weight, bias = noise(48, 64, seed=1) * torch.logspace(-3, 3, 48)[:, None], noise(48, seed=2)
    inputs = noise(*shape) * torch.logspace(-4, 4, shape[-2])[:, None]
    got = Int8Product(Layer(weight, bias if biased else None))(inputs)
    wanted = nn.functional.linear(inputs, weight, bias if biased else None)
    assert got.shape == wanted.shape
    assert got.dtype == torch.float32
    # Scales per token and per output: each pair of them is near, large and small ones.
    scale = inputs.norm(dim=-1, keepdim=True) * weight.norm(dim=1)
    assert ((got - wanted).abs() / scale).max() < 2e-2


def test_zeros_and_a_bias() -> None:
    bias = noise(5)
    assert torch.equal(Int8Product(Layer(torch.zeros(5, 8), bias))(noise(3, 8)), bias.expand(3, 5))
    assert torch.equal(Int8Product(Layer(noise(5, 8), bias))(torch.zeros(3, 8)), bias.expand(3, 5))


@pytest.mark.parametrize("levels", int8.LEVELS)
def test_the_largest_numbers_do_not_overflow(levels: int) -> None:
    if levels < int8._levels():
        pytest.skip("this CPU takes more levels")
    inputs, weight = torch.ones(3, 4096), torch.ones(16, 4096)
    assert Int8Product(Layer(weight, None), levels)(inputs).numpy() == pytest.approx(4096, rel=1e-4)
    assert Int8Product(Layer(-weight, None), levels)(inputs).numpy() == pytest.approx(-4096, rel=1e-4)


def test_a_cpu_that_overflows_gets_fewer_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "_computes_right", lambda levels: levels == 63)
    assert int8._levels() == 63


@pytest.mark.parametrize("broken", [lambda levels: False, lambda levels: torch.ones(2) @ torch.ones(3)])
def test_a_cpu_that_cannot_says_so(monkeypatch: pytest.MonkeyPatch, broken: Any) -> None:
    monkeypatch.setattr(int8, "_computes_right", broken)
    with pytest.raises(InvalidSettings, match=r"cannot multiply int8 on this CPU .* @ parameters.extra.quan"):
        int8._levels()


# -- inputs --------------------------------------------------------------------------------------

FLOATS = st.floats(-1e6, 1e6, width=32)


@given(st.lists(st.lists(FLOATS, min_size=6, max_size=6), min_size=1, max_size=5))
def test_inputs_come_back_within_half_a_step(values: list[list[float]]) -> None:
    tensor = torch.tensor(values)
    quantized, scales = quantized_per_token(tensor)
    assert quantized.dtype == torch.uint8
    assert quantized.min() >= 1
    back = (quantized.float() - int8.ZERO) * scales
    assert ((back - tensor).abs() <= 0.501 * scales + 1e-12).all()
    assert torch.allclose(scales[:, 0] * 127, tensor.abs().amax(1), atol=2e-10)


@given(st.lists(FLOATS, min_size=6, max_size=6), st.lists(FLOATS, min_size=6, max_size=6))
def test_a_token_does_not_depend_on_its_neighbours(token: list[float], neighbour: list[float]) -> None:
    alone, scale = quantized_per_token(torch.tensor([token]))
    among, scales = quantized_per_token(torch.tensor([neighbour, token, neighbour]))
    assert torch.equal(among[1], alone[0])
    assert torch.equal(scales[1], scale[0])


# -- layers of a model ---------------------------------------------------------------------------


class Block(nn.Module):
    """Attention-like: three layers read one tensor, a fourth reads another of the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(8, 8), nn.Linear(8, 4, bias=False)
        self.conv, self.other = Conv1D(6, 8), nn.Linear(8, 3)
        self.unused = nn.Linear(8, 8)

    def forward(self, tensor: Tensor) -> Tensor:
        parts = self.query(tensor), self.value(tensor), self.conv(tensor), self.other(tensor + 1)
        return torch.cat(parts, dim=-1)


class Model(nn.Module):
    """A backbone that runs its block twice, with a pooler and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.base_model = nn.ModuleDict({"block": Block(), "pooler": nn.Linear(21, 4)})
        self.head = nn.Linear(4, 2)

    def forward(self, tensor: Tensor) -> Tensor:
        first = self.base_model["block"](tensor)
        second = self.base_model["block"](first[..., :8])
        return self.head(self.base_model["pooler"](second))


def replaced(model: Any) -> list[tuple[int, int]]:
    """Replace with exact products; the sizes of those that were made."""
    made: list[tuple[int, int]] = []

    def make(layer: Layer) -> Any:
        made.append(tuple(layer.weight.shape))  # type: ignore[arg-type]
        return lambda tensor: nn.functional.linear(tensor, layer.weight, layer.bias)

    assert replace(model, lambda: model(noise(3, 8)), make) == 4
    return made


def test_layers_that_read_one_tensor_are_joined_and_give_the_same() -> None:
    torch.manual_seed(0)
    model = Model().requires_grad_(False)
    inputs = noise(5, 8), noise(1, 8, seed=3)
    wanted = [model(tensor) for tensor in inputs]
    assert replaced(model) == [(18, 8), (3, 8)]
    for tensor, want in zip(inputs, wanted, strict=True):
        torch.testing.assert_close(model(tensor), want)
    assert isinstance(model.base_model["pooler"], nn.Linear)
    assert isinstance(model.base_model["block"].unused, nn.Linear)


def test_nothing_is_kept_after_a_pass() -> None:
    model = Model().requires_grad_(False)
    replaced(model)
    model(noise(3, 8))
    joined = model.base_model["block"].query._joined
    assert joined._input is None
    assert joined._parts == ()
