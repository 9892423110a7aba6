"""The tokens of a row, as an explanation names them, and the features that stand or fall together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mlserver_hftasks.engine.rows import FloatArray, IntArray
from mlserver_hftasks.errors import InvalidRequest
from mlserver_hftasks.explain.result import BoolArray
from mlserver_hftasks.explain.targets.base import Subject, token_names
from mlserver_hftasks.tasks.encoder import Source

ANSWER = 1
"""The number of the text that is an answer, after that of the prompt."""


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """T tokens with their features; see `result.Explanation` for the fields that have the same names."""

    names: tuple[str, ...]
    offsets: IntArray
    word_ids: IntArray
    sequence_ids: IntArray
    texts: tuple[str, ...]
    kept: BoolArray
    """[T], the special tokens."""
    groups: tuple[IntArray, ...]
    """The positions of each feature, in the order of the text; special tokens are none."""
    prompt_tokens: int | None = None
    """How many tokens come before an answer that is part of the row; None if there is none."""

    def spread(self, present: BoolArray) -> BoolArray:
        """From features that are present, to tokens that are: [features] -> [T]."""
        tokens = self.kept.copy()
        for group, there in zip(self.groups, present, strict=True):
            tokens[group] = there
        return tokens

    def scattered(self, attributions: FloatArray) -> FloatArray:
        """From features to tokens, which share what theirs has alike: [K, features] -> [K, T]."""
        shared = np.zeros((len(attributions), len(self.kept)), dtype=np.float32)
        for index, group in enumerate(self.groups):
            shared[:, group] = attributions[:, index : index + 1] / len(group)
        return shared


def tokens_of(subject: Subject, tokenizer: Any, level: Literal["token", "word"]) -> Tokens:
    """The tokens of what is explained. Raises `InvalidRequest` if all are special."""
    row, source = subject.row, subject.row.source
    if not isinstance(source, Source):
        raise TypeError("a row that is explained knows what it was made from")
    encoding, positions = source.encoding, source.positions
    chosen = np.arange(len(encoding.ids)) if positions is None else positions
    kept = np.asarray(encoding.special_tokens_mask, dtype=np.bool_)[chosen]
    words = _numbers(getattr(encoding, "word_ids", None), chosen)
    sequences = _numbers(getattr(encoding, "sequence_ids", None), chosen)
    texts = _texts(source, subject)
    spans = subject.offsets
    if spans is None and hasattr(encoding, "offsets"):
        spans = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)[chosen]
    if subject.kept is not None:
        kept = kept | subject.kept
        words, sequences = (np.where(kept, -1, numbers) for numbers in (words, sequences))
    if kept.all():
        raise InvalidRequest("a text without tokens, expected at least one to explain @ inputs")
    if subject.answer is not None:
        spans = _followed(spans, subject.answer.spans, len(chosen))
        kept, words, sequences = (
            np.concatenate([numbers, np.full(len(subject.answer.spans), fill, numbers.dtype)])
            for numbers, fill in ((kept, True), (words, -1), (sequences, ANSWER))
        )
        texts = (*texts, subject.answer.text)
    ids = row.arrays["input_ids"][: len(chosen)].tolist()
    ids += [] if subject.answer is None else subject.answer.ids.tolist()
    return Tokens(
        names=token_names(tokenizer, ids),
        offsets=_offsets(spans, sequences, texts),
        word_ids=words,
        sequence_ids=sequences,
        texts=texts,
        kept=kept,
        groups=_groups(kept, words, sequences, level),
        prompt_tokens=None if subject.answer is None else len(chosen),
    )


def merged(tokens: Tokens) -> tuple[Tokens, list[IntArray]]:
    """Words in place of tokens, and the positions of each; special tokens stay by themselves."""
    alone = [np.array([position]) for position in np.flatnonzero(tokens.kept)]
    groups = sorted([*tokens.groups, *alone], key=lambda group: int(group[0]))
    firsts = np.array([group[0] for group in groups])
    lasts = np.array([group[-1] for group in groups])
    spans = np.stack([tokens.offsets[firsts, 0], tokens.offsets[lasts, 1]], axis=1)
    offsets = _offsets(spans, tokens.sequence_ids[firsts], tokens.texts)
    kept = tokens.kept[firsts]
    words = Tokens(
        names=tuple(_name(tokens, group, offsets[index]) for index, group in enumerate(groups)),
        offsets=offsets,
        word_ids=tokens.word_ids[firsts],
        sequence_ids=tokens.sequence_ids[firsts],
        texts=tokens.texts,
        kept=kept,
        groups=tuple(np.array([place]) for place in np.flatnonzero(~kept)),
        prompt_tokens=None if tokens.prompt_tokens is None else int((firsts < tokens.prompt_tokens).sum()),
    )
    return words, groups


def _name(tokens: Tokens, group: IntArray, offsets: IntArray) -> str:
    """What the text says; where nobody knows, the tokens."""
    start, end = offsets.tolist()
    text = max(int(tokens.sequence_ids[group[0]]), 0)
    if 0 <= start < end and text < len(tokens.texts):
        return tokens.texts[text][start:end]
    return "".join(tokens.names[position] for position in group)


def _numbers(values: Sequence[int | None] | None, chosen: IntArray) -> IntArray:
    """[T], -1 for None, and for all where the tokenizer does not know."""
    if values is None:
        return np.full(len(chosen), -1, dtype=np.int64)
    return np.array([-1 if value is None else value for value in values], dtype=np.int64)[chosen]


def _texts(source: Source, subject: Subject) -> tuple[str, ...]:
    """The text or the pair; () for words, unless the subject knows what they make together."""
    if subject.text is not None:
        return (subject.text,)
    if isinstance(source.text, str):
        return (source.text,)
    both = tuple(text for text in source.text if isinstance(text, str))
    return both if isinstance(source.text, tuple) else ()


def _followed(spans: IntArray | None, answer: IntArray, tokens: int) -> IntArray:
    """The spans of the tokens before an answer, and of its own."""
    before = np.full((tokens, 2), -1, dtype=np.int64) if spans is None else spans
    return np.concatenate([before, answer])


def _offsets(spans: IntArray | None, sequences: IntArray, texts: Sequence[str]) -> IntArray:
    """[T, 2], without the white space that some tokenizers count to a token; -1 where there is nothing."""
    offsets = np.full((len(sequences), 2), -1, dtype=np.int64)
    if spans is None:
        return offsets
    for index in np.flatnonzero(sequences >= 0).tolist():
        start, end = spans[index].tolist()
        if start < 0:
            continue
        piece = texts[sequences[index]][start:end] if sequences[index] < len(texts) else ""
        if piece.strip():
            start += len(piece) - len(piece.lstrip())
            end -= len(piece) - len(piece.rstrip())
        offsets[index] = start, end
    return offsets


def _groups(
    kept: BoolArray, words: IntArray, sequences: IntArray, level: Literal["token", "word"]
) -> tuple[IntArray, ...]:
    """Tokens, or neighbours of one word together."""
    places = np.flatnonzero(~kept)
    same = np.zeros(len(places), dtype=np.bool_)
    if level == "word":
        before, here = places[:-1], places[1:]
        same[1:] = (
            (here - before == 1)
            & (words[here] == words[before])
            & (words[here] >= 0)
            & (sequences[here] == sequences[before])
        )
    return tuple(np.split(places, np.flatnonzero(~same)[1:]))
