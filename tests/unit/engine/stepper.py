"""A model that really keeps a cache: the next token is a hash of all that lies in a sequence's part of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np

from mlserver_hftasks.engine.sequences import Choice, Chunk, Prompt

VOCABULARY = 97
POISON = 96
"""A token that the model cannot take."""
PATIENCE_S = 10.0
UNWRITTEN = -1000


def prompt(*tokens: int, new: int = 5, **others: object) -> Prompt:
    return Prompt(np.array(tokens, dtype=np.int64), new, **others)  # type: ignore[arg-type]


def hashed(tokens: Sequence[int]) -> int:
    """The token that follows, never `POISON`."""
    total = sum((index + 3) * (token + 7) for index, token in enumerate(tokens))
    return (total * 31 + len(tokens)) % (VOCABULARY - 1)


def continued(tokens: Sequence[int], count: int) -> list[int]:
    """What the model says to the tokens alone."""
    made = list(tokens)
    for _ in range(count):
        made.append(hashed(made))
    return made[len(tokens) :]


class HashStepper:
    """Its steps can be watched, held up and slowed down. Who reads another's cache goes astray."""

    def __init__(self, cache_tokens: int = 1000, seconds: float = 0.0) -> None:
        self.cache_tokens = cache_tokens
        self.seconds = seconds
        self.steps: list[list[tuple[int, int]]] = []
        """Per step and chunk: index of the prompt, number of tokens."""
        self.entered = threading.Event()
        self.gate = threading.Event()
        self.gate.set()
        self._cache = np.full(cache_tokens, UNWRITTEN, dtype=np.int64)

    def step(self, chunks: Sequence[Chunk]) -> Sequence[Choice | None]:
        self.steps.append([(chunk.sequence.index, chunk.count) for chunk in chunks])
        self.entered.set()
        assert self.gate.wait(PATIENCE_S)
        time.sleep(self.seconds)
        if any(POISON in chunk.tokens for chunk in chunks):
            raise ValueError("the token 96 is not in the vocabulary")
        return [self._feed(chunk) for chunk in chunks]

    def _feed(self, chunk: Chunk) -> Choice | None:
        first = chunk.extent + chunk.position
        assert len(chunk.tokens) == chunk.count
        self._cache[first : first + chunk.count] = chunk.tokens
        if not chunk.chooses:
            return None
        seen = self._cache[chunk.extent : first + chunk.count]
        assert UNWRITTEN not in seen
        token = hashed(seen.tolist())
        return Choice(token, -float(token) if chunk.sequence.prompt.logprobs else None)
