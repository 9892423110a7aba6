"""The nouns of generation: prompts, the sequences that continue them, the steps of a model over many."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import numpy as np

from mlserver_hftasks.engine.rows import IntArray


class FinishReason(Enum):
    """Why an answer ended."""

    EOS = "eos"
    """The model said so."""
    STOP = "stop"
    """A stop text came."""
    LENGTH = "length"
    """As many tokens as were asked for, or as fit."""
    TIMEOUT = "timeout"
    """The request's deadline passed; the answer is what there was by then."""


FINISH_REASONS = tuple(FinishReason)
"""Where a reason is a number, it is an index into this."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen; names and meanings as in `transformers.GenerationConfig`.

    `top_k` 0, `top_p` 1 and `min_p` 0 filter nothing. `repetition_penalty` also applies where the most
    likely token is taken (`draw` false).
    """

    draw: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    suppressed: tuple[int, ...] = ()
    """Token ids that are never chosen."""


GREEDY = Sampling()


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """Tokens to continue, and how."""

    tokens: IntArray
    max_new_tokens: int
    sampling: Sampling = GREEDY
    eos: frozenset[int] = frozenset()
    min_new_tokens: int = 0
    """No token of `eos` before so many others."""
    seed: int | None = None
    logprobs: bool = False
    """Whether the log-probabilities of the chosen tokens are wanted."""
    stopper: Callable[[], Callable[[int], bool]] | None = None
    """Makes, for each sequence, what is told each new token and says whether it ends the answer."""

    def __post_init__(self) -> None:
        if len(self.tokens) < 1 or self.max_new_tokens < 1:
            raise ValueError("a prompt has at least one token, and so has its answer")

    @property
    def reserved(self) -> int:
        """Most tokens that the cache will hold for it: the last one is never fed to the model."""
        return len(self.tokens) + self.max_new_tokens - 1


@dataclass(eq=False, slots=True)
class GenerationJob:
    """The sequences of one request."""

    enqueued_at: float
    due: float
    deadline: float | None
    streams: bool
    """Whether each token is wanted as it comes."""
    sequences: tuple[GeneratedSequence, ...] = ()
    waiting: list[GeneratedSequence] = field(default_factory=list)
    """Those that have not begun, the next one last."""
    running: int = 0
    held_tokens: int = 0
    """What its running sequences hold of the cache."""
    cancelled: bool = False


@dataclass(eq=False, slots=True)
class GeneratedSequence:
    """One prompt on its way. `eq=False`: a sequence is itself only."""

    job: GenerationJob
    prompt: Prompt
    index: int
    """Which of the request's prompts it is."""
    random: random.Random
    extent: int = -1
    """Where in the cache its tokens lie; -1 while it waits and when it is done."""
    cached: int = 0
    """How many of its tokens are in the cache."""
    tokens: list[int] = field(default_factory=list)
    """What was generated."""
    logprobs: list[float] = field(default_factory=list)
    finish: FinishReason | None = None
    error: Exception | None = None
    stops: Callable[[int], bool] | None = None
    told_at: float = 0.0
    """When its last token came; before the first one, when the request came."""
    gap_s: float = 0.0
    """Seconds that its last token took, since the one before or since the request came."""

    @property
    def length(self) -> int:
        """Tokens of the prompt and new ones."""
        return len(self.prompt.tokens) + len(self.tokens)

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self.finish is not None or self.error is not None

    @property
    def decodes(self) -> bool:
        """Whether its prompt is in the cache already, so that it takes one token per step."""
        return self.cached >= len(self.prompt.tokens)


@dataclass(frozen=True, slots=True)
class Chunk:
    """The tokens of one sequence that a step feeds to the model: a piece of its prompt, or its last token."""

    sequence: GeneratedSequence
    count: int
    extent: int = field(init=False)
    """Where in the cache the sequence begins. As it was when the step was made: whoever cancels it meanwhile
    takes that from the sequence, and the step would write elsewhere, where another's tokens are."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "extent", self.sequence.extent)

    @property
    def position(self) -> int:
        """Position of the first of them, which is how many are in the cache before."""
        return self.sequence.cached

    @property
    def tokens(self) -> IntArray:
        """Their ids, [count]."""
        if self.sequence.decodes:
            return np.array(self.sequence.tokens[-1:], dtype=np.int64)
        return self.sequence.prompt.tokens[self.position : self.position + self.count]

    @property
    def chooses(self) -> bool:
        """Whether the next token is chosen after it, since all tokens before are in the cache then."""
        return self.position + self.count == self.sequence.length


@dataclass(frozen=True, slots=True)
class Choice:
    """The next token of a sequence."""

    token: int
    logprob: float | None = None
    """Natural logarithm of its probability under the model's own distribution, where it is wanted."""


class Stepper(Protocol):
    """The part of a generating backend that the engine needs. Called from one thread at a time.

    It keeps a cache of keys and values of so many tokens. A sequence's tokens lie in it one after another
    from `extent` on; the engine says where, and no two sequences overlap.
    """

    cache_tokens: int

    def step(self, chunks: Sequence[Chunk]) -> Sequence[Choice | None]:
        """Feed the chunks, put their keys and values into the cache, and choose the next tokens.

        One result per chunk, in order: None for a chunk after which nothing is chosen. A step that raised
        may be run again, also in parts.
        """
