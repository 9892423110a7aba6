"""Dynamic int8 on a CPU: weights in int8, one scale per output; inputs in uint8, one scale per token.

A scale per token (not per batch) is what makes packing and sharing batches safe: a token's numbers do not
depend on its neighbours. oneDNN multiplies unsigned inputs with signed weights, so that inputs are moved
by 128; it sums in int32 and applies the weights' scales, and a last pass applies the tokens' scales and
the bias:

    y[t, n] = s[t] * (w[n] * sum_k (q[t, k] - 128) * Q[n, k]) + b[n]

with `s[t] = max |x[t]| / 127` and `w[n] = max |W[n]| / levels`. Embeddings, normalisations, attention and
heads stay in float32. Models that generate have few tokens at a time: see `weights`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mlserver_hftasks.backends.linears import Layer, Shared, replace
from mlserver_hftasks.errors import InvalidSettings, first_line

ZERO = 128
"""Of the inputs, which lie in 1..255."""
LEVELS = (127, 63)
"""Of the weights. CPUs without VNNI sum pairs of products in int16, which holds 255 * 63 twice but not
255 * 127; `_levels` finds out."""
ROUNDING = 2.0**23
"""Floats of this size have no digits after the point: adding it rounds, and leaves the integer in the
lowest byte. Twice as fast as rounding and converting."""
SMALLEST = 1e-12
"""Scales are at least that: a token or a weight row may be all zeros."""


def quantize(model: PreTrainedModel, run: Callable[[], object]) -> None:
    """Quantize the backbone's linear layers in place; `run` runs the model once, on anything.

    Raises `InvalidSettings` if this CPU or build of torch has no int8 products.
    """
    levels = _levels()
    replace(model, run, lambda layer: Int8Product(layer, levels))


class Int8Weight(Shared):
    """Inputs in uint8 [n, in] times a weight -> float32 [n, out], with the weight's scales."""

    def __init__(self, weight: Tensor, levels: int) -> None:
        weight = weight.contiguous()
        self._scales = weight.abs().amax(1).clamp_min_(SMALLEST).div_(levels)
        self._zeros = torch.zeros(len(weight), dtype=torch.int64)
        quantized = weight.div(self._scales[:, None]).round_().to(torch.int8)
        self._weight = torch.ops.onednn.qlinear_prepack(quantized, None)

    def __call__(self, inputs: Tensor) -> Tensor:
        """`ZERO` stands for zero."""
        product: Tensor = torch.ops.onednn.qlinear_pointwise(
            inputs,
            1.0,
            ZERO,
            self._weight,
            self._scales,
            self._zeros,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "none",
        )
        return product


class Int8Product(Shared):
    """[..., in] -> [..., out] in float32."""

    def __init__(self, layer: Layer, levels: int = LEVELS[0]) -> None:
        weight = layer.weight.float()
        self._weight = Int8Weight(weight, levels)
        self._shift = torch.full((weight.shape[1],), ROUNDING + ZERO)
        self._bias = weight.new_zeros(()) if layer.bias is None else layer.bias.detach().float()

    def __call__(self, tensor: Tensor) -> Tensor:
        """See the module docstring."""
        inputs, scales = quantized_per_token(tensor.reshape(-1, tensor.shape[-1]), self._shift)
        product = self._weight(inputs)
        torch.addcmul(self._bias, product, scales, out=product)
        return product.view(*tensor.shape[:-1], -1)


def quantized_per_token(tensor: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [n, k] as uint8 [n, k], and their scales [n, 1]; `shift`, [k], is `ROUNDING + ZERO`."""
    largest = torch.maximum(tensor.amax(1), tensor.amin(1).neg_())
    scales = largest.clamp_min_(SMALLEST).div_(127).unsqueeze_(1)
    # A vector, not a number, to add: torch has a fast path for the one and not for the other.
    rounded = torch.addcmul(shift, tensor, scales.reciprocal())
    return rounded.view(torch.int32).to(torch.uint8), scales


def _levels() -> int:
    """The most levels of a weight with which this CPU computes right."""
    reason = "its sums overflow"
    for levels in LEVELS:
        try:
            if _computes_right(levels):
                return levels
        except (RuntimeError, AttributeError, NotImplementedError) as error:
            reason = first_line(error)
    raise InvalidSettings(
        f"got int8, but torch {torch.__version__} cannot multiply int8 on this CPU ({reason}), expected "
        '"none" or another backend @ parameters.extra.quantization'
    )


def _computes_right(levels: int) -> bool:
    """On the largest inputs and weights that there can be."""
    inputs, weight = torch.ones(32, 64), torch.ones(32, 64)
    found = Int8Product(Layer(weight, None), levels)(inputs)
    return bool(torch.allclose(found, inputs @ weight.t(), rtol=1e-4))
