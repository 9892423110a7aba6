"""Puts other products in the place of a backbone's linear layers.

Layers that read the same tensor (query, key and value, say) become parts of one product: one larger
matrix is multiplied faster than three small ones, and the input is quantized once. Which do is seen by
running the model, not guessed from names. What runs once per text (pooler and head) stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

Product = Callable[[Tensor], Tensor]
"""[..., in] -> [..., out]"""
LEFT_ALONE = {"pooler"}
"""Modules whose layers run on one token per text."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear layer: `weight` is [out, in], as in `torch.nn.Linear`."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, module: nn.Module) -> Layer:
        """GPT-2's `Conv1D` keeps its weight transposed."""
        assert isinstance(module, nn.Linear | Conv1D)
        weight = module.weight.detach()
        return cls(weight if isinstance(module, nn.Linear) else weight.t(), module.bias)

    @classmethod
    def joined(cls, layers: Sequence[Layer]) -> Layer:
        """The layers as one, their outputs side by side."""
        if len(layers) == 1:
            return layers[0]
        zeros = [layer.weight.new_zeros(len(layer.weight)) for layer in layers]
        biases = [
            zero if layer.bias is None else layer.bias for layer, zero in zip(layers, zeros, strict=True)
        ]
        return cls(torch.cat([layer.weight for layer in layers]), torch.cat(biases).detach())


class Shared:
    """A product that never changes: a copy of the model it is part of has the same one."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


class _Joined:
    """One product for several layers; whoever is asked first computes it for all of them."""

    def __init__(self, product: Product, sizes: Sequence[int]) -> None:
        self._product = product
        self._sizes = list(sizes)
        self._input: Tensor | None = None
        self._parts: Sequence[Tensor] = ()

    def part(self, index: int, tensor: Tensor) -> Tensor:
        """The output of that layer. The parts are kept until the last of them is asked for."""
        if tensor is not self._input:
            self._input, self._parts = tensor, torch.split(self._product(tensor), self._sizes, dim=-1)
        part = self._parts[index]
        if index == len(self._sizes) - 1:
            self._input, self._parts = None, ()
        return part


class _StandIn(nn.Module):
    """In the place of a layer. Models ask a layer's weight for its dtype and device (T5's feed-forward)."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.weight = like.new_empty(0)


class _Part(_StandIn):
    """Stands in for one of the joined layers."""

    def __init__(self, like: Tensor, joined: _Joined, index: int) -> None:
        super().__init__(like)
        self._joined = joined
        self._index = index

    def forward(self, tensor: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        return self._joined.part(self._index, tensor)


class _Alone(_StandIn):
    """Stands in for a layer that no other shares its input with."""

    def __init__(self, like: Tensor, product: Product) -> None:
        super().__init__(like)
        self._product = product

    def forward(self, tensor: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        return self._product(tensor)


def replace(model: PreTrainedModel, run: Callable[[], object], make: Callable[[Layer], Product]) -> int:
    """Replace the backbone's linear layers in place; how many there were.

    `run` runs the model once, on anything. `make` may raise, which leaves the model half replaced.
    """
    groups = _groups(model.base_model, run)
    for names in groups:
        layers = [Layer.of(model.base_model.get_submodule(name)) for name in names]
        product = make(Layer.joined(layers))
        joined = _Joined(product, [len(layer.weight) for layer in layers])
        for index, name in enumerate(names):
            like = layers[index].weight
            stand_in = _Alone(like, product) if len(names) == 1 else _Part(like, joined, index)
            model.base_model.set_submodule(name, stand_in)
    return sum(map(len, groups))


def replace_head(model: PreTrainedModel, make: Callable[[Layer], Product]) -> None:
    """Replace the layer that gives a score to each token of the vocabulary, if it is a linear one.

    Embeddings that share its weight keep it.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear | Conv1D):
        return
    name = next(name for name, module in model.named_modules() if module is head)
    layer = Layer.of(head)
    model.set_submodule(name, _Alone(layer.weight, make(layer)))


def _groups(backbone: nn.Module, run: Callable[[], object]) -> list[list[str]]:
    """Names of the layers that ran, those that read the same tensor of the same module together."""
    groups: dict[tuple[str, int], list[str]] = {}
    kept: list[Tensor] = []  # so that no two tensors have the same id

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            kept.append(inputs[0])
            if not any(name in names for names in groups.values()):
                groups.setdefault((name.rpartition(".")[0], id(inputs[0])), []).append(name)

        return hook

    hooks = [
        module.register_forward_pre_hook(note(name))
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not LEFT_ALONE & set(name.split("."))
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return list(groups.values())
