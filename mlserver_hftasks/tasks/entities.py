"""From scores of tokens to entities: which tokens are one word, and which words one entity.

The aggregation strategies are those of `transformers.TokenClassificationPipeline`, computed on arrays.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from mlserver_hftasks.engine.rows import FloatArray, IntArray
from mlserver_hftasks.tasks.scores import softmax
from mlserver_hftasks.tasks.windows import Window

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BoolArray = npt.NDArray[np.bool_]
Aggregation = Literal["none", "simple", "first", "average", "max"]
WORD_LEVEL = frozenset({"first", "average", "max"})
"""The strategies that never give the tokens of one word different labels."""

SPACE = ord(" ")


class Tags:
    """What the names of the labels say: B- begins an entity, I- and names without prefix continue it."""

    def __init__(self, labels: Sequence[str]) -> None:
        tags = [label[2:] if label.startswith(("B-", "I-")) else label for label in labels]
        numbers = {tag: number for number, tag in enumerate(dict.fromkeys(tags))}
        self._tags = np.array([numbers[tag] for tag in tags], dtype=np.int64)
        self._begins = np.array([label.startswith("B-") for label in labels], dtype=np.bool_)
        self.groups = tuple(label.split("-", 1)[-1] for label in labels)
        """Name of the entity that a label begins."""

    def starts(self, labels: IntArray) -> IntArray:
        """Where entities start in a sequence of labels that is not empty; `O` is an entity here."""
        tags = self._tags[labels]
        new = np.ones(len(labels), dtype=np.bool_)
        new[1:] = (tags[1:] != tags[:-1]) | self._begins[labels[1:]]
        return np.flatnonzero(new)


class Vocabulary:
    """The tokens of a vocabulary as texts, and which of them continue a word."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._unknown = -1 if tokenizer.unk_token_id is None else tokenizer.unk_token_id
        self._lengths = _token_lengths(tokenizer)

    def tokens(self, window: Window, text: str) -> list[str]:
        """The tokens of a window; an unknown one is what the text has in its place."""
        tokens: list[str] = self._tokenizer.convert_ids_to_tokens(window.ids.tolist())
        if window.spans is not None:
            for index in np.flatnonzero(window.ids == self._unknown).tolist():
                start, end = window.spans[index].tolist()
                tokens[index] = text[start:end]
        return tokens

    def joined(self, tokens: list[str]) -> str:
        """The tokens as readable text."""
        readable: str = self._tokenizer.convert_tokens_to_string(tokens)
        return readable

    def word_starts(self, window: Window, text: str) -> IntArray:
        """Where words start in a window with spans that is not empty.

        WordPiece marks the tokens that continue a word, which makes them longer than their text. Other
        vocabularies leave only a guess: a token continues a word unless there is a space beside its start.
        """
        assert window.spans is not None
        starts, ends = window.spans.T
        if self._lengths is not None:
            inside = self._lengths[window.ids] != ends - starts
        else:
            spaces = np.frombuffer(f"{text} ".encode("utf-32-le"), dtype=np.uint32) == SPACE
            spaces[-1] = False
            inside = (starts > 0) & ~spaces[starts - 1] & ~spaces[starts]
        inside &= window.ids != self._unknown
        inside[0] = False
        return np.flatnonzero(~inside)


def _token_lengths(tokenizer: PreTrainedTokenizerBase) -> IntArray | None:
    """Characters of each token by id, or None where nothing marks the tokens that continue a word."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not getattr(getattr(backend, "model", None), "continuing_subword_prefix", None):
        return None
    vocabulary = tokenizer.get_vocab()
    lengths = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    lengths[list(vocabulary.values())] = [len(token) for token in vocabulary]
    return lengths


class EntityFinder:
    """Finds the entities of a window, as the dicts of the pipeline's result."""

    def __init__(self, labels: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        self._labels = labels
        self._tags = Tags(labels)
        self._vocabulary = Vocabulary(tokenizer)

    def find(
        self, text: str, window: Window, logits: FloatArray, aggregation: Aggregation, ignore: Set[str]
    ) -> list[dict[str, Any]]:
        """The entities whose name is not in `ignore`; `logits` [tokens, labels] of the window's tokens."""
        if not len(window.ids):
            return []
        scores = softmax(logits)
        if aggregation == "none":
            return self._tokens(text, window, scores, ignore)
        if aggregation == "simple":
            return self._groups(text, window, scores, None, ignore)
        words = self._vocabulary.word_starts(window, text)
        return self._groups(text, window, word_scores(scores, words, aggregation), words, ignore)

    def _tokens(
        self, text: str, window: Window, scores: FloatArray, ignore: Set[str]
    ) -> list[dict[str, Any]]:
        """Each token by itself."""
        best = scores.argmax(axis=1)
        kept = np.flatnonzero(~_among(self._labels, ignore)[best]).tolist()
        tokens = self._vocabulary.tokens(window, text) if kept else []
        return [
            {
                "entity": self._labels[best[index]],
                "score": float(scores[index, best[index]]),
                "index": int(window.positions[index]),
                "word": tokens[index],
                **_span(window, index, index),
            }
            for index in kept
        ]

    def _groups(
        self, text: str, window: Window, scores: FloatArray, words: IntArray | None, ignore: Set[str]
    ) -> list[dict[str, Any]]:
        """Neighbouring words of one entity together, by where words start; with None, tokens."""
        best = scores.argmax(axis=1)
        firsts = self._tags.starts(best)
        lasts = np.append(firsts[1:], len(best))
        means = group_means(scores.max(axis=1), firsts)
        kept = np.flatnonzero(~_among(self._tags.groups, ignore)[best[firsts]]).tolist()
        tokens = self._vocabulary.tokens(window, text) if kept else []
        edges = np.append(np.arange(len(scores)) if words is None else words, len(window.ids))
        entities = []
        for group in kept:
            bounds = edges[firsts[group] : lasts[group] + 1].tolist()
            pieces = tokens[bounds[0] : bounds[-1]]
            if words is not None:
                pieces = [self._vocabulary.joined(tokens[start:end]) for start, end in pairwise(bounds)]
            entities.append(
                {
                    "entity_group": self._tags.groups[best[firsts[group]]],
                    "score": float(means[group]),
                    "word": self._vocabulary.joined(pieces),
                    **_span(window, bounds[0], bounds[-1] - 1),
                }
            )
        return entities


def _among(names: Sequence[str], some: Set[str]) -> BoolArray:
    return np.array([name in some for name in names], dtype=np.bool_)


def _span(window: Window, first: int, last: int) -> dict[str, int | None]:
    """From the first character of one token to the last of another."""
    if window.spans is None:
        return {"start": None, "end": None}
    return {"start": int(window.spans[first, 0]), "end": int(window.spans[last, 1])}


def word_scores(scores: FloatArray, starts: IntArray, aggregation: Aggregation) -> FloatArray:
    """One score per label for each word, [words, labels], from those of its tokens, [tokens, labels]."""
    if aggregation == "first":
        return scores[starts]
    if aggregation == "average":
        return group_means(scores, starts)
    sizes = np.diff(starts, append=len(scores))
    words = np.repeat(np.arange(len(starts)), sizes)
    surest_first = np.lexsort((-scores.max(axis=1), words))
    return scores[surest_first[starts]]


def group_means(values: FloatArray, starts: IntArray) -> FloatArray:
    """The mean of each group of values along the first axis, [groups, ...]."""
    sizes = np.diff(starts, append=len(values)).astype(np.float32)
    sums: FloatArray = np.add.reduceat(values, starts, axis=0)
    return (sums.T / sizes).T


def without_overlaps(entities: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of entities that overlap, because windows do, the longest, and of like length the surest.

    The first is also compared with itself, as in transformers: if it spans nothing it comes twice.
    """
    if not entities:
        return entities
    ordered = sorted(entities, key=lambda entity: entity["start"])
    kept = []
    best = ordered[0]
    for entity in ordered:
        if not best["start"] <= entity["start"] < best["end"]:
            kept.append(best)
            best = entity
        elif _rank(entity) > _rank(best):
            best = entity
    return [*kept, best]


def _rank(entity: dict[str, Any]) -> tuple[int, float]:
    return entity["end"] - entity["start"], entity["score"]
