"""Our programs' decoder, whatever the program says: a step that fails leaves nothing behind."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from mlserver_hftasks.backends.base import Description
from mlserver_hftasks.engine.sequences import Chunk, GeneratedSequence, GenerationJob, Sampling
from mlserver_hftasks.generation import ports
from mlserver_hftasks.generation.program import ProgramDecoder
from tests.unit.engine.stepper import VOCABULARY, prompt


class Program:
    """Says nothing, and fails at some of its runs."""

    def __init__(self, *failing: int) -> None:
        self.failing, self.runs = failing, 0

    def get_inputs(self) -> list[Any]:
        caches = [*ports.cache_names(ports.DECODING, 0), *ports.cache_names(ports.PIECE, 0)]
        return [SimpleNamespace(name=name, shape=["n", 1, "t", 1]) for name in (*ports.TOKENS, *caches)]

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(name=ports.LOGITS, shape=["m", VOCABULARY])]

    def io_binding(self) -> Any:
        return SimpleNamespace(bind_input=lambda *how: None, bind_output=lambda *how: None)

    def run_with_iobinding(self, binding: Any) -> None:
        self.runs += 1
        if self.runs in self.failing:
            raise RuntimeError("out of memory")


def test_a_pass_that_fails_uses_no_seed_up() -> None:
    how = Description("onnx", "cpu", "float32", "continuous")
    decoder = ProgramDecoder(Program(2), cache_tokens=100, description=how)
    job = GenerationJob(0.0, 0.0, None, False)
    running = [
        GeneratedSequence(
            job, prompt(1, 2, 3, sampling=Sampling(draw=True)), 0, random.Random(seed), extent=0
        )
        for seed in (5, 6)
    ]
    chunks = [Chunk(each, 3) for each in running]  # a pass for each piece of a prompt
    with pytest.raises(RuntimeError, match="out of memory"):
        decoder.step(chunks)
    assert [each.random.random() for each in running] == [random.Random(seed).random() for seed in (5, 6)]
    assert all(choice is not None for choice in decoder.step(chunks))
