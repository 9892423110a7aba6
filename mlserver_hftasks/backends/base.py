"""The contract of a backend, and what a task asks of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from mlserver_hftasks.engine.rows import Outputs, Row


class Level(Enum):
    """What one entry of an output describes."""

    SEQUENCE = "sequence"
    """The whole row: [labels]."""
    TOKEN = "token"
    """Each token of the row, or each selected one: [tokens, ...]."""


@dataclass(frozen=True, slots=True)
class Head:
    """Which model class a task needs, and which of its outputs the task reads."""

    auto_class: str
    """Name of a `transformers.AutoModel...` class."""
    outputs: Mapping[str, Level]
    selects: bool = False
    """Whether each row says which of its tokens the head shall run on; see `Row.select`."""
    generates: bool = False
    """Whether the model continues rows step by step, in place of one pass over them."""


@dataclass(frozen=True, slots=True)
class Description:
    """How rows are run, for the log line, the metadata and the metrics."""

    backend: str
    device: str
    dtype: str
    packing: str
    """`varlen`, `block`, `padded` or `single`, see `packing`; `lanes`, see `lanes`."""


class Backend(Protocol):
    """Runs batches of rows. Called from one thread at a time."""

    description: Description
    padded: bool
    """Whether a batch costs rows x longest; else it costs the sum of its tokens."""

    def forward(self, rows: Sequence[Row]) -> Sequence[Outputs]:
        """Outputs per row, in order, as float32 arrays: [...] per sequence, [tokens, ...] per token."""

    def close(self) -> None:
        """Give the memory back; `forward` must not be called again."""
