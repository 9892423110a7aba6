"""Quantized weights for models that generate: products of a few tokens, bound by reading the weights.

A step of a decoder multiplies one token of each sequence with all weights, so that its time is that of
reading them. Integer products of FBGEMM read twice as many bytes a second then as those of oneDNN, which
`int8` uses for whole texts; where torch is built without FBGEMM, oneDNN takes over.

`Int8` quantizes inputs to 8 bits, one scale per token. `Int8WeightOnly` cuts each input into two such
pieces, of 127 and 127 * 254 levels, and multiplies both in one pass over the weights:

    x[t, k] = s[t] * (h[t, k] + l[t, k] / 254),    s[t] = max |x[t]| / 127,    h, l integers in -127..127

which leaves an error of 2^-16 of a token's largest input, less than bfloat16 leaves, at the price of twice
the sums: nothing where reading is what takes the time, and up to twice the time of `Int8` for long prompts.
`Int4WeightOnly` is torch's own kernel, with a scale and a zero for each group of 32 inputs.

All of them keep a token's numbers apart from those of the tokens beside it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mlserver_hftasks.backends import int8
from mlserver_hftasks.backends.linears import Layer, Product, Shared, replace, replace_head
from mlserver_hftasks.errors import InvalidSettings, first_line

TOP = 127.0
FINER = 254.0
"""Half a level of the upper piece is the largest that is left to the lower one."""
GROUP = 32
"""Inputs of an int4 weight that share a scale and a zero."""
OUTPUTS = 16
"""The int4 kernel's outputs come in so many."""
Levels = Callable[[Tensor], Tensor]
"""Inputs in levels, [n, in] floats in -127..127, rounded there -> float32 [n, out]."""


def quantize(model: PreTrainedModel, run: Callable[[], object], quantization: str) -> None:
    """Quantize a model that generates in place; `run` runs it once, on anything.

    The output layer, which decides between tokens, keeps its inputs' precision in every mode, and has 8
    bits. Embeddings stay as they are, also where they are the output layer's weights. Raises
    `InvalidSettings` if this CPU or build of torch lacks the products.
    """
    multiplied = _levels_product()
    make = _MAKERS[quantization]
    # The head first: of T5 it is a part of the backbone.
    replace_head(model, lambda layer: Int8WeightOnly(layer, multiplied))
    replace(model, run, lambda layer: make(layer, multiplied))


class Int8(Shared):
    """Weights and inputs in int8: [..., in] -> [..., out]."""

    def __init__(self, layer: Layer, multiplied: Callable[[Tensor], Levels]) -> None:
        self._product = multiplied(layer.weight.float())
        self._bias = _bias_of(layer)

    def __call__(self, tensor: Tensor) -> Tensor:
        """See the module docstring."""
        inputs, largest = _with_largest(tensor)
        product = self._product(inputs * (TOP / largest))
        return _finished(product, largest, self._bias, tensor)


class Int8WeightOnly(Shared):
    """Weights in int8, inputs in 16 bits: [..., in] -> [..., out]."""

    def __init__(self, layer: Layer, multiplied: Callable[[Tensor], Levels]) -> None:
        self._product = multiplied(layer.weight.float())
        self._bias = _bias_of(layer)

    def __call__(self, tensor: Tensor) -> Tensor:
        """See the module docstring."""
        inputs, largest = _with_largest(tensor)
        levels = inputs * (TOP / largest)
        upper = levels.round()
        lower = levels.sub_(upper).mul_(FINER)
        both = self._product(torch.cat([upper, lower]))
        product = torch.add(both[: len(inputs)], both[len(inputs) :], alpha=1 / FINER)
        return _finished(product, largest, self._bias, tensor)


class Int4WeightOnly(Shared):
    """Weights in int4, inputs in bfloat16: [..., in] -> [..., out]. `in` is a multiple of `GROUP`."""

    def __init__(self, layer: Layer) -> None:
        weight = layer.weight.float()
        self._outputs, inputs = weight.shape
        weight = nn.functional.pad(weight, (0, 0, 0, -self._outputs % OUTPUTS))
        groups = weight.view(len(weight), inputs // GROUP, GROUP)
        least, most = groups.amin(-1), groups.amax(-1)
        scales = ((most - least) / 15).clamp_min_(int8.SMALLEST)
        middle = least + 8 * scales
        # As the kernel will have them: the weights are rounded to what the stored scales make of them.
        self._scales = torch.stack([scales, middle], -1).transpose(0, 1).contiguous().bfloat16()
        stored = self._scales.float().transpose(0, 1)
        levels = (groups - stored[..., 1:]).div_(stored[..., :1].clamp_min(int8.SMALLEST)).round_().add_(8)
        quantized = levels.clamp_(0, 15).to(torch.int32).view(weight.shape)
        self._weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(quantized, 1)
        self._bias = _bias_of(layer)

    def __call__(self, tensor: Tensor) -> Tensor:
        """See the module docstring."""
        inputs = tensor.reshape(-1, tensor.shape[-1]).bfloat16()
        product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            inputs, self._weight, GROUP, self._scales
        )[:, : self._outputs]
        if self._bias is not None:
            product = product + self._bias
        return product.to(tensor.dtype).reshape(*tensor.shape[:-1], self._outputs)


def _int4(layer: Layer, multiplied: Callable[[Tensor], Levels]) -> Product:
    """In 8 bits where the inputs do not make whole groups."""
    return Int8WeightOnly(layer, multiplied) if layer.weight.shape[1] % GROUP else Int4WeightOnly(layer)


_MAKERS: dict[str, Callable[[Layer, Callable[[Tensor], Levels]], Product]] = {
    "int8": Int8,
    "int8-weight-only": Int8WeightOnly,
    "int4-weight-only": _int4,
}


def _with_largest(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens in float32 [n, in], and the largest magnitude of each, [n, 1], never zero."""
    inputs = tensor.reshape(-1, tensor.shape[-1]).float()
    largest = torch.linalg.vector_norm(inputs, float("inf"), dim=1, keepdim=True)
    return inputs, largest.clamp_min_(int8.SMALLEST)


def _finished(product: Tensor, largest: Tensor, bias: Tensor | None, like: Tensor) -> Tensor:
    scales = largest.div_(TOP)
    if bias is None:
        product.mul_(scales)
    else:
        torch.addcmul(bias, product, scales, out=product)
    return product.to(like.dtype).view(*like.shape[:-1], product.shape[1])


def _bias_of(layer: Layer) -> Tensor | None:
    return None if layer.bias is None else layer.bias.detach().float()


# -- products of integers --------------------------------------------------------------------------


class _Fbgemm:
    """Levels with int8 weights, by FBGEMM."""

    def __init__(self, weight: Tensor, most: int) -> None:
        scales = weight.abs().amax(1).clamp_min_(int8.SMALLEST).div_(most)
        zeros = torch.zeros(len(weight), dtype=torch.int64)
        levels = weight.div(scales[:, None]).round_().to(torch.int8)
        with warnings.catch_warnings():
            # Tensors of such dtypes are to go from torch one day. Nothing else makes what FBGEMM takes, and
            # without them oneDNN is found instead.
            warnings.filterwarnings("ignore", message=r"torch\.quantize_per_tensor", category=UserWarning)
            quantized = torch._make_per_channel_quantized_tensor(levels, scales.double(), zeros, 0)
        self._weight: Any = torch.ops.quantized.linear_prepack(quantized, None)

    def __call__(self, levels: Tensor) -> Tensor:
        product: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            levels, 1.0, int8.ZERO, self._weight
        )
        return product


class _OneDnn:
    """The same by oneDNN."""

    def __init__(self, weight: Tensor, most: int) -> None:
        self._product = int8.Int8Weight(weight, most)
        self._shift = torch.full((weight.shape[1],), int8.ROUNDING + int8.ZERO)

    def __call__(self, levels: Tensor) -> Tensor:
        return self._product(levels.add(self._shift).view(torch.int32).to(torch.uint8))


def _levels_product() -> Callable[[Tensor], Levels]:
    """What multiplies right with the most levels of a weight. Raises `InvalidSettings` if nothing does."""
    reason = "its sums overflow"
    for kind in (_Fbgemm, _OneDnn):
        for most in int8.LEVELS:
            try:
                if _multiplies_right(kind, most):
                    return partial(kind, most=most)
            except (RuntimeError, AttributeError, NotImplementedError) as error:
                reason = first_line(error)
    raise InvalidSettings(
        f"torch {torch.__version__} cannot multiply int8 on this CPU ({reason}), expected "
        '"none" or another backend @ parameters.extra.quantization'
    )


def _multiplies_right(kind: Callable[[Tensor, int], Levels], most: int) -> bool:
    """On the largest inputs and weights that there can be."""
    inputs, weight = torch.full((32, 64), TOP), torch.ones(32, 64)
    return bool(torch.allclose(kind(weight, most)(inputs), inputs @ weight.t(), rtol=1e-4))
