"""Programs that were exported before: what is common to all runtimes that execute one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import numpy as np

from mlserver_hftasks.backends import feeds, lanes
from mlserver_hftasks.backends.base import Description, Head
from mlserver_hftasks.engine.rows import FloatArray, IntArray, Outputs, Row

Feed = Mapping[str, IntArray]


class Layout(Enum):
    """What a program takes."""

    LANES = "lanes"
    """Tokens without padding; see `lanes`."""
    PADDED = "padded"
    """`input_ids` and `attention_mask` [n, longest], as transformers' models do."""
    SINGLE = "single"
    """The same, one row at a time: what cannot be padded."""
    STEPS = "steps"
    """Prompts and their answers, token by token; see `generation.ports`."""


class Reads(Enum):
    """Which hidden states the head of a program in lanes gets."""

    ALL = "all"
    FIRST = "first"
    """The first token's: BERT's classifier looks at nothing else."""
    SELECTED = "selected"
    """Those that the rows select."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How rows become the inputs of a program."""

    layout: Layout
    pad_token_id: int
    reads: Reads = Reads.ALL
    padding_idx: int | None = None
    """For models that count positions from there; see `lanes.positions`."""
    marker: int | None = None
    """Of rows that are padded, those with equally many of that token run together; see `feeds.marker_of`."""


class Runner(Protocol):
    """A program, loaded. Called from one thread at a time."""

    inputs: frozenset[str]
    outputs: frozenset[str]

    def run(self, feed: Feed) -> Mapping[str, FloatArray]:
        """The program's outputs by name, float32, for exactly its inputs."""

    def close(self) -> None:
        """Give the memory back."""


class ProgramBackend:
    """Runs rows through a program; see `base.Backend`. With `alone` each row runs by itself in any layout."""

    def __init__(
        self, runner: Runner, head: Head, plan: Plan, description: Description, *, alone: bool = False
    ) -> None:
        self._runner = runner
        self._head = head
        self._plan = plan
        self._alone = alone or plan.layout is Layout.SINGLE
        self.padded = plan.layout is Layout.PADDED and not alone
        self.description = description

    def forward(self, rows: Sequence[Row]) -> Sequence[Outputs]:
        """See `base.Backend`."""
        return feeds.gathered(rows, self._passes(rows), self._forward)

    def close(self) -> None:
        """See `base.Backend`."""
        self._runner.close()
        del self._runner

    def _passes(self, rows: Sequence[Row]) -> Iterator[Sequence[int]]:
        return ([index] for index in range(len(rows))) if self._alone else self.passes_of(self._plan, rows)

    def _forward(self, rows: Sequence[Row]) -> list[Outputs]:
        feed = self.feed_of(self._plan, rows)
        arrays = self._runner.run({name: feed[name] for name in self._runner.inputs})
        wanted = {name: arrays[name] for name in self._head.outputs}
        selection = feeds.selection(rows)
        if selection is not None and self._plan.reads is not Reads.SELECTED:
            index = selection[:, :, None]
            wanted = {name: np.take_along_axis(array, index, 1) for name, array in wanted.items()}
        return feeds.split(wanted, rows, self._head)

    @staticmethod
    def passes_of(plan: Plan, rows: Sequence[Row]) -> Iterator[Sequence[int]]:
        """Indices of the rows that go through a program of that plan together."""
        if plan.layout is Layout.SINGLE:
            return ([index] for index in range(len(rows)))
        if plan.layout is Layout.PADDED:
            return iter(feeds.alike(rows, plan.marker))
        return lanes.passes([row.cost for row in rows])

    @staticmethod
    def feed_of(plan: Plan, rows: Sequence[Row]) -> dict[str, IntArray]:
        """All inputs that a program of that plan may have, for one pass over the rows."""
        selection = feeds.selection(rows) if plan.reads is Reads.SELECTED else None
        if plan.layout is Layout.LANES:
            first = np.zeros((len(rows), 1), np.int64)
            reads = {Reads.ALL: None, Reads.FIRST: first, Reads.SELECTED: selection}[plan.reads]
            return lanes.feed(rows, reads, plan.pad_token_id, plan.padding_idx)
        made = feeds.padded(rows, plan.pad_token_id)
        if selection is not None:
            made["reads"] = selection
        shape = made["input_ids"].shape
        made.setdefault("token_type_ids", np.zeros(shape, np.int64))
        made["position_ids"] = np.broadcast_to(np.arange(shape[1]), shape)
        return made
