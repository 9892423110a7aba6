"""token-classification: the entities that the model finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlserver_hftasks.engine.rows import IntArray
from mlserver_hftasks.explain.targets.base import (
    MOST_SCORES,
    Choice,
    Entry,
    Subject,
    Sums,
    Targets,
    index_of,
    predicted,
    target_array,
)
from mlserver_hftasks.tasks.base import Answered
from mlserver_hftasks.tasks.entities import Tags, Vocabulary
from mlserver_hftasks.tasks.scores import softmax
from mlserver_hftasks.tasks.token_classification import TokenClassification, TokenClassificationParameters
from mlserver_hftasks.tasks.windows import Sentence, Window


@dataclass(frozen=True, slots=True)
class _Entity:
    """The words of an entity, by the first token of each: places in the row, and labels."""

    positions: IntArray
    labels: IntArray
    score: float


class TokenClassificationTargets(Targets[TokenClassification, TokenClassificationParameters]):
    """Each entity that is predicted, up to `MOST_SCORES`: the sum of the logits at its words' first tokens.

    The client may ask for those of one label only. Of a text in windows, that with the surest entity.
    """

    def __init__(self, task: TokenClassification) -> None:
        super().__init__(task)
        self._tags = Tags(task.model.labels)
        self._vocabulary = Vocabulary(task.model.encoder.tokenizer)
        self._outside = np.array([group == "O" for group in self._tags.groups], dtype=np.bool_)

    def subject(
        self,
        answered: Answered,
        choice: Choice,
        parameters: TokenClassificationParameters,
        references: Sequence[Answered],
    ) -> Subject:
        """As many scores as there are entities, none if there are none."""
        sentence: Sentence = answered.example.context
        wanted = self._wanted(choice)
        found = [
            self._entities(sentence.text, window, outputs["logits"][window.positions], wanted)
            for window, outputs in zip(sentence.windows, answered.outputs, strict=True)
        ]
        best = max(range(len(found)), key=lambda index: max((e.score for e in found[index]), default=0.0))
        surest = sorted(found[best], key=lambda entity: -entity.score)[:MOST_SCORES]
        entities = sorted(surest, key=lambda entity: int(entity.positions[0]))
        row, window = answered.example.rows[best], sentence.windows[best]
        return Subject(
            row,
            Sums(tuple(_entries(entity) for entity in entities)),
            target_array([(int(e.positions[0]), int(e.labels[0])) for e in entities]),
            tuple(self._tags.groups[entity.labels[0]] for entity in entities),
            text=sentence.text,
            offsets=_offsets(window, row.cost),
        )

    def _wanted(self, choice: Choice) -> str | None:
        """The name of the entities to explain."""
        groups = list(self._tags.groups)
        if choice is None or predicted(choice, groups):
            return None
        labels = self.task.model.labels
        return groups[index_of(choice, labels if choice in labels or isinstance(choice, int) else groups)]

    def _entities(self, text: str, window: Window, logits: object, wanted: str | None) -> list[_Entity]:
        scores = np.asarray(logits)
        if not len(window.ids):
            return []
        firsts = np.arange(len(scores))
        if window.spans is not None:
            firsts = self._vocabulary.word_starts(window, text)
        labels = scores[firsts].argmax(axis=1)
        sure = softmax(scores[firsts]).max(axis=1)
        starts = self._tags.starts(labels)
        entities = [
            _Entity(window.positions[firsts[group]], labels[group], float(sure[group].mean()))
            for group in np.split(np.arange(len(labels)), starts[1:])
            if not self._outside[labels[group[0]]]
        ]
        return [e for e in entities if wanted in (None, self._tags.groups[e.labels[0]])]


def _entries(entity: _Entity) -> tuple[Entry, ...]:
    places = zip(entity.positions.tolist(), entity.labels.tolist(), strict=True)
    return tuple(Entry("logits", place) for place in places)


def _offsets(window: Window, tokens: int) -> IntArray:
    offsets = np.full((tokens, 2), -1, dtype=np.int64)
    if window.spans is not None:
        offsets[window.positions] = window.spans
    return offsets
