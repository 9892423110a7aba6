"""Scoring by steps: what a failure leaves of its sequences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from mlserver_hftasks.backends.base import Description
from mlserver_hftasks.backends.gradients import ScoredRow
from mlserver_hftasks.engine.sequences import Chunk, GeneratedSequence
from mlserver_hftasks.generation.stepped_scoring import SteppedScoring


class Failing:
    """A decoder that fails at its second step."""

    cache_tokens = 100
    description = Description("onnx", "cpu", "float32", "continuous")

    def __init__(self) -> None:
        self.seen: list[GeneratedSequence] = []

    def logits(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        if self.seen:
            raise RuntimeError("out of memory")
        self.seen += [chunk.sequence for chunk in chunks]
        return torch.zeros(len(chunks), 7)

    def close(self) -> None: ...


def test_a_step_that_fails_frees_the_cache() -> None:
    decoder = Failing()
    row = ScoredRow({"input_ids": np.arange(5)}, select=np.array([2, 3]))
    with pytest.raises(RuntimeError, match="out of memory"):
        SteppedScoring(decoder).forward([row, row])
    assert [each.extent for each in decoder.seen] == [-1, -1]
