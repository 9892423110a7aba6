"""The nouns of the engine: rows, the jobs they wait in, the batches they leave in."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
Outputs = Mapping[str, npt.NDArray[Any]]
"""What the model says of one row: output name -> array without a batch dimension; float32, or int64 where
they are ids or counts."""


@dataclass(eq=False, slots=True)
class Decoding:
    """What a row brings that a model continues step by step. `until` and `abandoned` may change meanwhile."""

    max_new_tokens: int
    min_new_tokens: int = 0
    width: int = 1
    """Sequences that run side by side: beams, or answers."""
    seed: int | None = None
    """Of what is drawn; None draws differently each time."""
    first_token: int | None = None
    """The first new token, if it is given."""
    until: float = math.inf
    """When to return what there is, in seconds of `time.monotonic`."""
    abandoned: bool = False
    """Nobody waits any more."""

    @property
    def cost(self) -> int:
        """Tokens that it takes at most."""
        return self.width * self.max_new_tokens


@dataclass(frozen=True, slots=True)
class Row:
    """One unbatched model input.

    `arrays` map the model's input names to arrays of shape [tokens]. `key` says who may share a batch:
    rows run together exactly when their keys are equal. `select`, where given, names the positions
    whose outputs are wanted, so that a head over a large vocabulary need not compute the others.
    `decoding` is there where the model continues the row. `source` is what the row was made from; the
    engine only carries it.
    """

    arrays: Mapping[str, IntArray]
    key: Hashable = None
    select: IntArray | None = None
    decoding: Decoding | None = None
    source: Any = None

    def __post_init__(self) -> None:
        if self.cost < 1:
            raise ValueError("a row has at least one token")

    @property
    def cost(self) -> int:
        """Number of tokens, those that may come included."""
        return len(self.arrays["input_ids"]) + (0 if self.decoding is None else self.decoding.cost)

    def abandon(self) -> None:
        """Say that nobody waits for it any more, for a model that is at it."""
        if self.decoding is not None:
            self.decoding.abandoned = True


@dataclass(eq=False, slots=True)
class Job:
    """The rows of one request, as the scheduler sees them. `eq=False`: a job is itself only."""

    rows: tuple[Row, ...]
    enqueued_at: float
    pending: list[int] = field(default_factory=list)
    """Indices of the rows that have not left in a batch, the next one last."""
    remaining_tokens: int = 0
    """Sum of the costs of the pending rows."""
    cancelled: bool = False

    @property
    def key(self) -> Hashable:
        """The key that all rows of a job share."""
        return self.rows[0].key


@dataclass(frozen=True, slots=True)
class Ticket:
    """One row of a job on its way through a batch."""

    job: Job
    index: int

    @property
    def row(self) -> Row:
        """The row itself."""
        return self.job.rows[self.index]


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows that run together; `cost` as the backend pays it, padding included."""

    tickets: tuple[Ticket, ...]
    cost: int

    def __post_init__(self) -> None:
        if not self.tickets:
            raise ValueError("a batch has at least one row")

    @property
    def tokens(self) -> int:
        """Number of real tokens, padding not included."""
        return sum(ticket.row.cost for ticket in self.tickets)
