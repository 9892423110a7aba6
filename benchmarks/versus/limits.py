"""What the core itself can do: the matrix products of a model's layers, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.shapes import Shape

TOKENS = 512
"""Rows of the left matrices: a batch of about 20 texts."""
SECONDS = 0.4


def gemm_tokens_per_s(shape: Shape, dtype: str) -> float:
    """Tokens per second if a model were but the products with its layers' weights."""
    hidden, layers, _, inner = shape.sizes.values()
    # query, key and value in one, the attention's output, the two of the feed-forward network
    sizes = ((hidden, 3 * hidden), (hidden, hidden), (hidden, inner), (inner, hidden))
    products = [_int8(*size) if dtype == "int8" else _float(*size, dtype) for size in sizes]
    _once(products)
    begin, repeats = time.thread_time(), 0
    while time.thread_time() - begin < SECONDS:
        for _ in range(layers):
            _once(products)
        repeats += 1
    return TOKENS * repeats / (time.thread_time() - begin)


def _float(rows: int, columns: int, dtype: str) -> Callable[[], object]:
    kind: torch.dtype = getattr(torch, dtype)
    left, right = torch.randn(TOKENS, rows).to(kind), (torch.randn(columns, rows) / rows).to(kind).t()
    return partial(torch.mm, left, right)


def _int8(rows: int, columns: int) -> Callable[[], object]:
    """oneDNN's product of uint8 and int8, with sums in int32 that come out in float32."""
    left = torch.randint(0, 255, (TOKENS, rows), dtype=torch.uint8)
    right = torch.ops.onednn.qlinear_prepack(torch.randint(-127, 127, (columns, rows)).to(torch.int8), None)
    scales, zeros = torch.ones(columns), torch.zeros(columns, dtype=torch.int64)
    rest: tuple[Any, ...] = (None, 1.0, 0, torch.float32, "none", [], "none")
    return partial(torch.ops.onednn.qlinear_pointwise, left, 1.0, 128, right, scales, zeros, *rest)


def _once(products: list[Callable[[], object]]) -> None:
    with torch.inference_mode():
        for product in products:
            product()
