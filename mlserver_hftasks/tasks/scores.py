"""From logits to scores."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mlserver_hftasks.engine.rows import FloatArray


def softmax(logits: FloatArray) -> FloatArray:
    """Along the last axis."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    total: FloatArray = shifted / shifted.sum(axis=-1, keepdims=True)
    return total


def sigmoid(logits: FloatArray) -> FloatArray:
    """Elementwise."""
    # Not 1 / (1 + exp(-x)), which overflows below -88 in float32.
    return np.asarray(np.exp(-np.logaddexp(0.0, -logits)), dtype=np.float32)


FUNCTIONS: dict[str | None, Callable[[FloatArray], FloatArray]] = {
    "softmax": softmax,
    "sigmoid": sigmoid,
    "none": lambda logits: logits,
}
