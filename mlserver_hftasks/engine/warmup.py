"""The first batches, at load: no client pays for them, and the cost model learns from them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from mlserver_hftasks.engine.batcher import Forward
from mlserver_hftasks.engine.cost import CostModel
from mlserver_hftasks.engine.rows import Row

SHAPES = ((1, 8), (1, 64), (4, 32), (8, 64), (2, 16))
"""Rows and words per row of the warm-up batches. Small first, a large one before the last small one."""
RUNS = 3
MAX_SECONDS = 2.0
"""No further batch is begun after this; a large model on a slow device has learned enough by then."""


def warm_up(
    backend: Forward, padded: bool, cost: CostModel, rows_of: Callable[[tuple[int, ...]], Sequence[Row]]
) -> None:
    """Run each shape and learn from its fastest run; `rows_of` makes rows of so many words.

    The fastest, since whatever else goes on while a server starts makes a batch slower, never faster.
    """
    until = time.monotonic() + MAX_SECONDS
    for count, words in SHAPES:
        rows = rows_of((words,) * count)
        tokens = [row.cost for row in rows]
        spent = min(_seconds(backend, rows) for _ in range(RUNS))
        cost.observe(len(tokens) * max(tokens) if padded else sum(tokens), spent, lasting=True)
        if time.monotonic() > until:
            return


def _seconds(backend: Forward, rows: Sequence[Row]) -> float:
    began = time.monotonic()
    backend.forward(rows)
    return time.monotonic() - began
