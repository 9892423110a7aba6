"""What the core itself can do: the matrix products of a model's layers, and nothing else."""

from __future__ import annotations

import time

import torch

from benchmarks.shapes import Shape

TOKENS = 512
"""Rows of the left matrices: a batch of about 20 texts."""
SECONDS = 0.4


def gemm_tokens_per_s(shape: Shape, dtype: str) -> float:
    """Tokens per second if a model were but the products with its layers' weights."""
    hidden, layers, _, inner = shape.sizes.values()
    kind: torch.dtype = getattr(torch, dtype)
    # query, key and value in one, the attention's output, the two of the feed-forward network
    sizes = ((hidden, 3 * hidden), (hidden, hidden), (hidden, inner), (inner, hidden))
    pairs = [
        (torch.randn(TOKENS, rows).to(kind), (torch.randn(columns, rows) / rows).to(kind).t())
        for rows, columns in sizes
    ]
    _once(pairs)
    begin, repeats = time.perf_counter(), 0
    while time.perf_counter() - begin < SECONDS:
        for _ in range(layers):
            _once(pairs)
        repeats += 1
    return TOKENS * repeats / (time.perf_counter() - begin)


def _once(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    with torch.inference_mode():
        for left, right in pairs:
            torch.mm(left, right)
