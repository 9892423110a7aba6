"""Runs a model that continues prompts: which tokens it chooses, and how fast."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mlserver_hftasks.cli.texts import Item, examples_of
from mlserver_hftasks.engine.cost import CostModel
from mlserver_hftasks.engine.offline import answers_of
from mlserver_hftasks.engine.rows import FloatArray, Outputs
from mlserver_hftasks.engine.sequences import Chunk, GeneratedSequence, GenerationJob, Prompt
from mlserver_hftasks.errors import InvalidSettings
from mlserver_hftasks.loading import Served

ANSWER = "answer"
"""The output that is no number but tokens: equal or not."""
NEW_TOKENS = 16
"""Of every answer: no token ends one."""
CLIENTS = 8
"""Prompts that are continued side by side, where throughput is measured."""


class GenerationTrial:
    """As `trial.Trial`, of a model with a decoder; its rows are prompts, continued greedily."""

    timed, singles = 16, 3
    unit = "tokens"

    def __init__(self, served: Served) -> None:
        assert served.decoder is not None, "what generates as a whole has rows"
        self.served, self.cost = served, CostModel()
        self._decoder: Any = served.decoder
        self.time_singles([Prompt(np.zeros(4, np.int64), 4)])

    def rows(self, items: Sequence[Item]) -> list[Prompt]:
        """A prompt per item. Raises `InvalidSettings` naming the item."""
        examples = examples_of(self.served.task, items)
        room = self._decoder.cache_tokens - NEW_TOKENS
        found = []
        for number, example in enumerate(examples, start=1):
            prompts = example.context.prompts
            if not prompts or len(prompts[0].tokens) > room:
                raise InvalidSettings(
                    f"text {number} is too long, or asks for more than steps, expected a prompt"
                )
            found.append(Prompt(prompts[0].tokens, NEW_TOKENS))
        return found

    def outputs(self, rows: Sequence[Prompt]) -> list[Outputs]:
        """See `trial.Tried`: the logits after each prompt, and its answer."""
        answers = answers_of(self._decoder, rows, clients=CLIENTS)
        found: list[Outputs] = [
            {"logits": self._logits(row), ANSWER: np.array(answer)}
            for row, answer in zip(rows, answers, strict=True)
        ]
        if not all(np.isfinite(output["logits"]).all() for output in found):
            raise InvalidSettings("the model's outputs are not finite numbers, expected others @ its weights")
        return found

    def time_batches(self, rows: Sequence[Prompt]) -> float:
        """Seconds for all prompts, `CLIENTS` at a time."""
        return self._time(rows, CLIENTS)

    def time_singles(self, rows: Sequence[Prompt]) -> float:
        """Seconds of one answer by itself."""
        return self._time(rows, 1) / len(rows)

    def amount(self, rows: Sequence[Prompt]) -> int:
        """New tokens of the prompts."""
        return sum(row.max_new_tokens for row in rows)

    def speed(self) -> Mapping[str, str]:
        """For people: tokens per second."""
        rows = [Prompt(np.arange(2, 34) % 50, NEW_TOKENS) for _ in range(CLIENTS)]
        alone, together = self._time(rows[:2], 1), self._time(rows, CLIENTS)
        return {
            "tokens per second, one client": f"{self.amount(rows[:2]) / alone:.0f}",
            f"tokens per second, {CLIENTS} clients": f"{self.amount(rows) / together:.0f}",
        }

    def _time(self, rows: Sequence[Prompt], clients: int) -> float:
        began = time.perf_counter()
        answers_of(self._decoder, rows, clients=clients)
        return time.perf_counter() - began

    def _logits(self, prompt: Prompt) -> FloatArray:
        job = GenerationJob(0.0, 0.0, None, False)
        sequence = GeneratedSequence(job, replace(prompt, max_new_tokens=1), 0, random.Random(), extent=0)
        logits: FloatArray = np.array(self._decoder.logits([Chunk(sequence, len(prompt.tokens))])[0])
        sequence.extent = -1  # it has left
        return logits
