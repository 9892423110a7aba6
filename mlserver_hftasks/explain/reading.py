"""An explanation as a person reads it: words with numbers, whoever made them.

Read from the JSON of the output `explanation`, on the server to draw it and at a client. Needs neither torch
nor numpy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from mlserver_hftasks.explain.html import fragment
from mlserver_hftasks.explain.scale import Scale

CONTINUATIONS = ("##", "\u0120", "\u2581", "\u010a")
"""What tokenizers put before a token: an inside of a word, a space (twice), a line's end."""
SUMMARY_WORDS = 4


@dataclass(frozen=True, slots=True)
class Word:
    """A word of the text, and how much it adds to a score."""

    text: str
    start: int
    """In code points, in its own text of a pair; -1 where the tokenizer does not know."""
    end: int
    sequence: int
    """0, or 1 in the second text of a pair."""
    attribution: float


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a text: a word, or what is between words."""

    text: str
    word: Word | None = None
    explained: bool = False
    """Whether it is the answer, or the token of it, that the score is of."""


@dataclass(frozen=True, slots=True)
class Target:
    """One score that is explained. `sum(attributions) == score - baseline_score + delta`."""

    label: str
    id: int
    """Index of the label; -1 where there is none."""
    position: int
    """Of the token that the score is of; -1 where it is of the whole text."""
    score: float
    baseline_score: float
    delta: float
    converged: bool
    attributions: tuple[float, ...]
    """One per token, special ones included."""


@dataclass(frozen=True, slots=True, repr=False)
class Reading:
    """One explanation. In a notebook it shows as a heat map."""

    tokens: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]
    word_ids: tuple[int, ...]
    sequence_ids: tuple[int, ...]
    texts: tuple[str, ...]
    targets: tuple[Target, ...]
    method: str
    baseline: str
    evaluations: int
    prompt_tokens: int | None = None
    """How many tokens come before an answer that is explained; None where no text is answered."""

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Reading:
        """From the JSON object of one explanation. Raises `KeyError` for one that is none."""
        return cls(
            tokens=tuple(record["words"]),
            spans=tuple((start, end) for start, end in record["spans"]),
            word_ids=tuple(record["word_ids"]),
            sequence_ids=tuple(record["sequence_ids"]),
            texts=tuple(record["texts"]),
            targets=tuple(_target(target) for target in record["targets"]),
            method=record["method"],
            baseline=record["baseline"],
            evaluations=record["evaluations"],
            prompt_tokens=record.get("prompt_tokens"),
        )

    def words(self, target: int = 0) -> list[Word]:
        """The words of the text in order, tokens of a word added up; special tokens and answers left out."""
        attributions = self.targets[target].attributions
        return [
            self._word(indices, sum(attributions[index] for index in indices)) for indices in self._groups()
        ]

    def passages(self, target: int = 0) -> list[list[Piece]]:
        """The texts in pieces: the words, and what is between them, or a space where nobody knows."""
        words = self.words(target)
        count = max([len(self.texts), *(word.sequence + 1 for word in words)])
        passages = [list(self._pieces(number, words)) for number in range(count)]
        if self.prompt_tokens is not None and len(self.texts) > 1:
            passages[-1] = self._answer(self.targets[target].position)
        return passages

    def place(self, target: int = 0) -> str:
        """The word that the score is of; "" where it is of the whole text."""
        position = self.targets[target].position
        if not 0 <= position < len(self.tokens):
            return ""
        if self.prompt_tokens is not None and position >= self.prompt_tokens:
            return f"token {position - self.prompt_tokens + 1}"
        within = next((indices for indices in self._groups() if position in indices), None)
        return self.tokens[position] if within is None else self._word(within, 0.0).text.strip()

    def to_frame(self) -> Any:
        """A `pandas.DataFrame`, one line per target and word. Raises `ImportError` without pandas."""
        import pandas

        rows = [
            {
                "target": target.label,
                "word": word.text,
                "start": word.start,
                "end": word.end,
                "sequence": word.sequence,
                "attribution": word.attribution,
            }
            for index, target in enumerate(self.targets)
            for word in self.words(index)
        ]
        return pandas.DataFrame(rows)

    def __repr__(self) -> str:
        """The targets with their weightiest words."""
        return f"Reading({'; '.join(self._summary(index) for index in range(len(self.targets)))})"

    def _repr_html_(self) -> str:
        return fragment(self)

    def _summary(self, target: int) -> str:
        words = sorted(self.words(target), key=lambda word: -abs(word.attribution))[:SUMMARY_WORDS]
        scale = Scale(word.attribution for word in words)
        said = ", ".join(f"{word.text} {scale.number(word.attribution)}" for word in words)
        return f"{self.targets[target].label}: {said}"

    def _groups(self) -> Iterator[list[int]]:
        """The tokens of each word; a token of which nobody knows the word is one by itself."""
        sequences = self.sequence_ids[: self.prompt_tokens]
        own = [index for index, sequence in enumerate(sequences) if sequence >= 0]

        def word_of(index: int) -> tuple[int, int, int]:
            word = self.word_ids[index]
            return self.sequence_ids[index], word, index if word < 0 else -1

        return (list(indices) for _, indices in groupby(own, key=word_of))

    def _pieces(self, sequence: int, words: Sequence[Word]) -> Iterator[Piece]:
        text = self.texts[sequence] if sequence < len(self.texts) else ""
        position = 0
        for number, word in enumerate(word for word in words if word.sequence == sequence):
            if word.start < 0:
                yield from ([Piece(" ")] if number else [])
                yield Piece(word.text, word)
                position = len(text)
                continue
            if position < word.start:
                yield Piece(text[position : word.start])
            yield Piece(text[max(position, word.start) : word.end], word)
            position = max(position, word.end)
        if position < len(text):
            yield Piece(text[position:])

    def _answer(self, position: int) -> list[Piece]:
        """The answer in pieces: its token at that position and the rest, or all of it where that is none."""
        text = self.texts[-1]
        start, end = (0, len(text)) if position < 0 else self.spans[position]
        if start < 0:
            return [Piece(text)]
        pieces = [Piece(text[:start]), Piece(text[start:end], explained=True), Piece(text[end:])]
        return [piece for piece in pieces if piece.text]

    def _word(self, indices: list[int], attribution: float) -> Word:
        sequence = self.sequence_ids[indices[0]]
        spans = [self.spans[index] for index in indices]
        start, end = min(start for start, _ in spans), max(end for _, end in spans)
        if start < 0 or sequence >= len(self.texts):
            return Word("".join(map(self._surface, indices)), -1, -1, sequence, attribution)
        return Word(self.texts[sequence][start:end], start, end, sequence, attribution)

    def _surface(self, index: int) -> str:
        token = self.tokens[index]
        mark = next((mark for mark in CONTINUATIONS if token.startswith(mark)), "")
        return token[len(mark) :] or token


def _target(record: Mapping[str, Any]) -> Target:
    fields = ("label", "id", "position", "score", "baseline_score", "delta", "converged")
    return Target(**{name: record[name] for name in fields}, attributions=tuple(record["attributions"]))
