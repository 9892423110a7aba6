"""int8 with scales that are found before, on texts: fewer passes over the activations while it is served.

One scale for a tensor is too coarse by itself: a few columns, and a few tokens, are ten and more times as
large as the rest. So each column is first divided by a factor that moves a part of its size into the
weights, `max |x|^a / max |w|^(1 - a)` (SmoothQuant, https://arxiv.org/abs/2211.10438), and the range of what
is left need not be symmetric: GELU has next to nothing below zero. The exponent is chosen for each product
by the error of its outputs, and what it is off by on average is added again. A product whose error stays
large gets a scale per token after all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mlserver_hftasks.engine.rows import FloatArray
from mlserver_hftasks.export import graph
from mlserver_hftasks.export.graph import STEPS, TINY, Editor

LEVELS = 255
EXPONENTS = (0.5, 0.7, 0.8, 0.9, 1.0)
WORSE = 4.0
"""How many times the error of scales per token a product's may be."""
SAMPLED = 8
"""Tokens that are kept of a batch, to find errors on."""


@dataclass(slots=True)
class Observed:
    """What was seen of the input of a product, [tokens, columns] at a time."""

    low: FloatArray
    """The least of each column, [columns]."""
    high: FloatArray
    samples: list[FloatArray] = field(default_factory=list)

    @classmethod
    def nothing(cls) -> Observed:
        """Before the first batch. Zero is always within the range: a code stands for it exactly."""
        return cls(np.zeros(1, np.float32), np.zeros(1, np.float32))

    def add(self, tokens: FloatArray) -> None:
        """Take a batch in."""
        self.low = np.minimum(self.low, tokens.min(0))
        self.high = np.maximum(self.high, tokens.max(0))
        chosen = np.linspace(0, len(tokens) - 1, min(SAMPLED, len(tokens))).astype(int)
        self.samples.append(tokens[chosen])

    @property
    def sample(self) -> FloatArray:
        """Some tokens of all batches."""
        return np.concatenate(self.samples)


@dataclass(frozen=True, slots=True)
class Scale:
    """`x` is stored as `round(x / factors / step) + zero`, in 0..255."""

    factors: FloatArray
    """[columns]"""
    step: float
    zero: int

    @classmethod
    def of(cls, seen: Observed, weight: FloatArray, exponent: float) -> Scale:
        """Of a product's input; `weight` is [columns, out]."""
        sizes = np.maximum(np.maximum(-seen.low, seen.high), 1e-5)
        weights = np.maximum(np.abs(weight).max(1), 1e-5)
        factors = (sizes**exponent / weights ** (1 - exponent)).astype(np.float32)
        low, high = float((seen.low / factors).min()), float((seen.high / factors).max())
        step = max(high - low, TINY) / LEVELS
        return cls(factors, step, round(-low / step))

    def product(self, tokens: FloatArray, weight: FloatArray) -> FloatArray:
        """In int8, as it will be computed."""
        whole = np.clip(np.rint(tokens / self.factors / self.step) + self.zero, 0, LEVELS) - self.zero
        made: FloatArray = (whole * self.step) @ _rounded(weight * self.factors[:, None])
        return made


def quantize(model: ir.Model, observed: Mapping[str, Observed]) -> int:
    """Products in int8; how many have calibrated scales. `observed` are their inputs by name."""
    edit, made = Editor(model), 0
    for nodes in _by_input(model):
        seen = observed[str(nodes[0].inputs[0].name)]
        weight = np.concatenate([graph.weight_of(node) for node in nodes], axis=1)
        scale, error = _best(seen, weight)
        if error <= WORSE * _error_of_rows(seen.sample, weight):
            _replace(edit, nodes, scale, seen.sample)
            made += len(nodes)
    RemoveUnusedNodesPass()(model)
    graph.quantize_rows(model)
    return made


def _best(seen: Observed, weight: FloatArray) -> tuple[Scale, float]:
    """The scale with the least error, and that."""
    sample = seen.sample
    scales = [Scale.of(seen, weight, exponent) for exponent in EXPONENTS]
    wanted = sample @ weight
    errors = [_apart(scale.product(sample, weight), wanted) for scale in scales]
    best = int(np.argmin(errors))
    return scales[best], errors[best]


def _by_input(model: ir.Model) -> Iterator[list[ir.Node]]:
    groups: dict[ir.Value, list[ir.Node]] = {}
    for node in graph.products(model):
        groups.setdefault(node.inputs[0], []).append(node)
    return iter(groups.values())


def _replace(edit: Editor, nodes: list[ir.Node], scale: Scale, sample: FloatArray) -> None:
    data = nodes[0].inputs[0]
    step = edit.constant(f"{data.name}_step", np.array(scale.step, np.float32))
    zero = edit.constant(f"hftasks_zero_{scale.zero}", np.array(scale.zero, np.uint8))
    inverse = edit.constant(f"{data.name}_factors", (1 / scale.factors).astype(np.float32))
    even = edit.add(nodes[0], "Mul", data, inverse)
    whole = edit.add(nodes[0], "QuantizeLinear", even, step, zero)
    for node in nodes:
        weight = graph.weight_of(node)
        correction = (sample @ weight - scale.product(sample, weight)).mean(0).astype(np.float32)
        even_weight = weight * scale.factors[:, None]
        product = graph.int8_product(edit, node, even_weight, whole, step, zero, correction)
        edit.replace(node, graph.with_bias(edit, node, product))


def _rounded(weight: FloatArray) -> FloatArray:
    """The weight as int8 holds it."""
    steps = np.maximum(np.abs(weight).max(0), TINY) / STEPS
    made: FloatArray = np.rint(weight / steps) * steps
    return made


def _error_of_rows(tokens: FloatArray, weight: FloatArray) -> float:
    """What a product with the scales of `graph.quantize_rows` is off by."""
    steps = np.maximum(np.abs(tokens).max(1, keepdims=True), TINY) / STEPS
    return _apart((np.rint(tokens / steps) * steps) @ _rounded(weight), tokens @ weight)


def _apart(got: FloatArray, wanted: FloatArray) -> float:
    """Squared error of a token's product, against its square; the mean over tokens, loud and quiet alike."""
    squares = np.square(wanted).mean(1)
    return float((np.square(got - wanted).mean(1) / np.maximum(squares, TINY)).mean())
