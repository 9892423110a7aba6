"""The contract of targets: from an answer to the scores that are explained of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from mlserver_hftasks.backends.gradients import Score
from mlserver_hftasks.engine.rows import IntArray, Row
from mlserver_hftasks.errors import InvalidRequest, did_you_mean
from mlserver_hftasks.explain.result import BoolArray
from mlserver_hftasks.tasks.base import Answered, Example, Task
from mlserver_hftasks.tasks.signature import Parameters

T = TypeVar("T", bound=Task[Any])
P = TypeVar("P", bound=Parameters)

MOST_SCORES = 8
"""Most scores that are explained of one item: each takes a backward pass of its own."""

Choice = str | int | None
"""What the client names as target; None: what the model answers."""


@dataclass(frozen=True, slots=True)
class AnswerText:
    """The tokens of an answer, at the end of the row or the decoder's own. They are never absent."""

    ids: IntArray
    text: str
    spans: IntArray
    """[tokens, 2], where in the text they are; -1 where nobody knows, or where they write nothing."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is explained of one item: K scores of one of its rows."""

    row: Row
    score: Score
    target: IntArray
    """[K, 2], position of the token and index of the label, -1 where there is none."""
    labels: tuple[str, ...]
    """[K]"""
    text: str | None = None
    """The text that `offsets` count in, where it is not what was tokenized."""
    offsets: IntArray | None = None
    """[tokens, 2], where they are not the tokenizer's."""
    kept: BoolArray | None = None
    """[tokens], which are never absent beside the special ones."""
    answer: AnswerText | None = None
    """What the row ends with, where its answer is part of it."""


class Targets(ABC, Generic[T, P]):
    """The targets of one task. Stateless between calls."""

    def __init__(self, task: T) -> None:
        self.task = task

    def references(self, choice: Choice, parameters: P) -> list[Example]:
        """Further examples that must be run before anything can be explained."""
        return []

    def answering(self, parameters: P) -> P:
        """What items are answered with that are answered only to be explained."""
        return parameters

    def given(self, examples: Sequence[Example], choice: Choice) -> list[Answered] | None:
        """The answers, where the client says them. Raises `InvalidRequest` for what is none."""
        return None

    @abstractmethod
    def subject(
        self, answered: Answered, choice: Choice, parameters: P, references: Sequence[Answered]
    ) -> Subject:
        """What to explain of an item. Raises `InvalidRequest` for a target that it cannot have."""

    def subject_per_token(
        self, answered: Answered, choice: Choice, parameters: P, references: Sequence[Answered]
    ) -> Subject:
        """The same with a score for each token of the answer. Raises `InvalidRequest` if it has none."""
        raise InvalidRequest(
            f"got true, but {self.task.name} answers no text, expected false, or a task that does "
            "@ explain.per_token"
        )


@dataclass(frozen=True, slots=True)
class Entry:
    """A number in the outputs of a row, with its weight."""

    output: str
    index: tuple[int, ...]
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Sums:
    """Scores that are sums of entries, one tuple for each."""

    entries: tuple[tuple[Entry, ...], ...]

    def __call__(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """[K]"""
        sums = [
            sum(entry.weight * outputs[entry.output][entry.index] for entry in entries)
            for entries in self.entries
        ]
        return torch.stack([torch.as_tensor(each) for each in sums]) if sums else torch.zeros(0)


def target_array(pairs: Sequence[tuple[int, int]]) -> IntArray:
    """[K, 2]"""
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def token_names(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """What the tokenizer calls them; ids of a model's vocabulary that it does not know are "[id]"."""
    names: list[str | None] = tokenizer.convert_ids_to_tokens(ids)
    return tuple(f"[{token}]" if name is None else name for token, name in zip(ids, names, strict=True))


def predicted(choice: Choice, labels: Sequence[str]) -> bool:
    """Whether the client wants what the model answers explained."""
    return choice is None or (choice == "predicted" and "predicted" not in labels)


def index_of(choice: str | int, labels: Sequence[str]) -> int:
    """The label of that name, in any case if that is clear, or of that id, also as text.

    Raises `InvalidRequest` if there is none.
    """
    if isinstance(choice, str):
        if choice in labels:
            return labels.index(choice)
        alike = [index for index, label in enumerate(labels) if label.lower() == choice.lower()]
        if len(alike) == 1:
            return alike[0]
    index = int(choice) if str(choice).isascii() and str(choice).isdecimal() else -1
    if not 0 <= index < len(labels):
        hint = (
            did_you_mean(str(choice), labels) if isinstance(choice, str) else f"expected 0..{len(labels) - 1}"
        )
        raise InvalidRequest(f"unknown target {choice!r}, {hint} @ explain.target")
    return index


def no_choice(choice: Choice, what: str) -> None:
    """Raise `InvalidRequest` if the client names a target where there is nothing to choose."""
    if not predicted(choice, ()):
        raise InvalidRequest(f"got {choice!r:.60}, expected no target: {what} @ explain.target")
