"""How likely a decoder that only steps finds answers that are there already, in place of `scoring`.

A program keeps keys and values, and gives logits after the last token of a piece. So a prompt is fed as one
piece, and the answer token by token, many rows side by side, as when they were generated.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from mlserver_hftasks.backends.base import Description
from mlserver_hftasks.backends.gradients import ScoredRow
from mlserver_hftasks.engine.rows import Outputs, Row
from mlserver_hftasks.engine.sequences import Chunk, GeneratedSequence, GenerationJob, Prompt


class Steps(Protocol):
    """What is needed of a decoder."""

    cache_tokens: int
    description: Description

    def logits(self, chunks: Sequence[Chunk]) -> Any:
        """After each chunk that chooses, [n, vocabulary]; the chunks are in the order of their extents."""

    def close(self) -> None:
        """Give the memory back."""


class SteppedScoring:
    """Runs `ScoredRow`s that select the tokens before those of an answer; see `base.Backend`.

    `decoder` is this class's own: nobody generates with it. `pause` is called after each step.
    """

    padded = False

    def __init__(self, decoder: Steps, pause: Callable[[], object] = lambda: None) -> None:
        self._decoder = decoder
        self._pause = pause
        self.description = decoder.description

    def forward(self, rows: Sequence[Row]) -> Sequence[Outputs]:
        """Per `ScoredRow` its `score` [K]."""
        scored = [row for row in rows if isinstance(row, ScoredRow)]
        return [outputs for part in self._parts(scored) for outputs in self._forward(part)]

    def close(self) -> None:
        """See `base.Backend`."""
        self._decoder.close()

    def _parts(self, rows: Sequence[ScoredRow]) -> Iterator[list[ScoredRow]]:
        """Rows that fit into the cache together."""
        part: list[ScoredRow] = []
        for row in rows:
            if part and sum(each.cost for each in part) + row.cost > self._decoder.cache_tokens:
                yield part
                part = []
            part.append(row)
        yield part

    def _forward(self, rows: Sequence[ScoredRow]) -> list[Outputs]:
        sequences = _sequences(rows)
        try:
            found = self._logits(rows, sequences)
        finally:
            for sequence in sequences:
                sequence.extent = -1  # of a step that failed as well
        with torch.inference_mode():
            return [
                {"score": row.score({"logits": torch.stack(logits)}).float().numpy()}
                for row, logits in zip(rows, found, strict=True)
            ]

    def _logits(
        self, rows: Sequence[ScoredRow], sequences: Sequence[GeneratedSequence]
    ) -> list[list[torch.Tensor]]:
        """Per row those before each token of its answer, [vocabulary] each."""
        found: list[list[torch.Tensor]] = [[] for _ in rows]
        while chunks := [
            _next(each) for each in sequences if len(found[each.index]) < each.prompt.max_new_tokens
        ]:
            logits = torch.as_tensor(self._decoder.logits(chunks)).cpu()
            for chunk, after in zip(chunks, logits.clone(), strict=True):
                sequence, ids = chunk.sequence, rows[chunk.sequence.index].arrays["input_ids"]
                sequence.cached += chunk.count
                sequence.tokens.append(int(ids[sequence.length]))
                found[sequence.index].append(after)
                if len(found[sequence.index]) == sequence.prompt.max_new_tokens:
                    sequence.extent = -1  # so that a decoder knows that its part of the cache is free
            self._pause()
        return found


def _sequences(rows: Sequence[ScoredRow]) -> list[GeneratedSequence]:
    """One for each row, beside one another in the cache."""
    job = GenerationJob(0.0, 0.0, None, False)
    made, extent = [], 0
    for index, row in enumerate(rows):
        if row.select is None:
            raise ValueError("a row that is scored says which of its tokens are")
        prompt = Prompt(row.arrays["input_ids"][: int(row.select[0]) + 1], len(row.select))
        made.append(GeneratedSequence(job, prompt, index, random.Random(), extent))
        extent += row.cost
    return made


def _next(sequence: GeneratedSequence) -> Chunk:
    return Chunk(sequence, 1 if sequence.decodes else len(sequence.prompt.tokens))
