"""Decoders that copy their cache: who shares a batch, how much is padded, and who is cancelled meanwhile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from onnxruntime import OrtValue

from mlserver_hftasks.backends.base import Description
from mlserver_hftasks.engine.sequences import GenerationJob
from mlserver_hftasks.engine.steps import StepLimits, StepScheduler
from mlserver_hftasks.generation.past import PastDecoder
from tests.unit.engine.stepper import VOCABULARY, continued, hashed, prompt


class HashProgram:
    """Its keys and values are the tokens; the next token is a hash of those that the mask lets through."""

    def __init__(self) -> None:
        self.areas: list[int] = []
        """Rows times tokens of the cache that went in, per run."""
        self._arrays: list[Any] = []
        """Memory behind the values, which do not own it."""

    def get_inputs(self) -> list[Any]:
        names = ("past_key_values.0.key", "past_key_values.0.value")
        cache = [
            SimpleNamespace(name=name, shape=["n", 1, "past", 1], type="tensor(float)") for name in names
        ]
        return [
            *(SimpleNamespace(name=name, shape=["n", "s"]) for name in ("input_ids", "attention_mask")),
            *cache,
        ]

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(name="logits")]

    def run_with_ort_values(self, names: Sequence[str], feed: Mapping[str, Any]) -> list[Any]:
        ids, mask = feed["input_ids"].numpy(), feed["attention_mask"].numpy().astype(bool)
        past = feed["past_key_values.0.key"].numpy()
        self.areas.append(past.shape[0] * past.shape[2])
        present = np.concatenate((past, ids[:, None, :, None].astype(np.float32)), axis=2)
        logits = np.zeros((*ids.shape, VOCABULARY), np.float32)
        for row, seen in enumerate(mask):
            logits[row, -1, hashed(present[row, 0, seen, 0].astype(int).tolist())] = 1
        self._arrays += (logits, present)
        return [OrtValue.ortvalue_from_numpy(array) for array in (logits, present, present)]


class Running:
    """An engine's steps, without threads."""

    def __init__(self, cache_tokens: int) -> None:
        self.program = HashProgram()
        how = Description("onnx", "cpu", "float32", "padded")
        self.decoder = PastDecoder(self.program, cache_tokens=cache_tokens, description=how)
        self.scheduler = StepScheduler(StepLimits(), cache_tokens)

    def submit(self, tokens: Sequence[int], new: int) -> GenerationJob:
        return self.scheduler.submit([prompt(*tokens, new=new)], 0.0)

    def step(self, cancelled: GenerationJob | None = None) -> bool:
        """Whether there was something to do. `cancelled` is when the step is made and has not run."""
        chunks = self.scheduler.next_step(0.0)
        if cancelled is not None:
            self.scheduler.cancel(cancelled)
        if chunks:
            self.scheduler.finished(chunks, self.decoder.step(chunks), 0.0, 0.01)
        return bool(chunks)

    def to_the_end(self) -> None:
        while self.step():
            pass


def test_a_long_sequence_does_not_pad_the_short_ones() -> None:
    running = Running(cache_tokens=200)
    prompts = [[*range(60)], *([7, index] for index in range(12))]
    jobs = [running.submit(tokens, new=9) for tokens in prompts]
    running.to_the_end()
    for tokens, job in zip(prompts, jobs, strict=True):
        assert job.sequences[0].tokens == continued(tokens, 9)
    assert max(running.program.areas) <= 200
    # As many runs as prompts, and after them two per step: the long sequence has company that fits.
    assert len(running.program.areas) <= len(prompts) + 2 * 9


def test_who_is_cancelled_before_the_step_runs_fails_nobody() -> None:
    running = Running(cache_tokens=200)
    stays = running.submit([1, 2, 3], new=6)
    running.step()
    leaves = running.submit([4, 5], new=6)
    running.step()
    running.step(cancelled=leaves)
    running.to_the_end()
    assert stays.sequences[0].tokens == continued([1, 2, 3], 6)
