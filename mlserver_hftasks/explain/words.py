"""What an explainer of another server's model takes: texts, pairs and questions, and the words in them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mlserver_hftasks.errors import InvalidRequest, RequestTooLarge
from mlserver_hftasks.explain.result import BoolArray
from mlserver_hftasks.tasks.base import ItemLimits
from mlserver_hftasks.tasks.signature import InputSpec, Parameters, Signature
from mlserver_hftasks.tasks.text import TEXTS

WORD = re.compile(r"\w+(?:['\u2019]\w+)*|[^\w\s]")
MAX_WORDS = 512
"""Of one item."""
NOTHING = "..."
"""A text of a pair that has lost all its words: models refuse empty ones."""

TEXT, PAIR, QUESTION = ("inputs",), ("text", "text_pair"), ("question", "context")
"""The fields of items."""

SIGNATURE = Signature(
    inputs=(
        TEXTS,
        InputSpec("text", required=False, description="first texts of pairs, in place of `inputs`"),
        InputSpec("text_pair", required=False, description="second texts of pairs"),
        InputSpec("question", required=False, description="questions, in place of `inputs`"),
        InputSpec("context", required=False, description="one context per question, or one for all"),
    ),
    parameters=Parameters,
    outputs=(),
)
"""What an explainer of another model takes."""


@dataclass(frozen=True, slots=True)
class Item:
    """What a model is asked of at once: texts by field."""

    fields: tuple[str, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Words:
    """An item, and where its words are."""

    item: Item

    @cached_property
    def spans(self) -> list[tuple[int, int, int]]:
        """Per word which text it is in, and its first character there and the one after its last."""
        return [
            (number, *match.span())
            for number, text in enumerate(self.item.texts)
            for match in WORD.finditer(text)
        ]

    def without(self, present: BoolArray, replacement: str) -> Item:
        """The item with those words only; as it is if all are present."""
        if present.all():
            return self.item
        pieces: list[list[str]] = [[] for _ in self.item.texts]
        positions = [0] * len(pieces)
        for (number, start, end), is_present in zip(self.spans, present.tolist(), strict=True):
            text = self.item.texts[number]
            word = text[start:end] if is_present else replacement
            pieces[number] += [text[positions[number] : start], word]
            positions[number] = end
        left = (
            " ".join("".join([*of_text, text[position:]]).split())
            for of_text, text, position in zip(pieces, self.item.texts, positions, strict=True)
        )
        return Item(self.item.fields, tuple(text or self._nothing for text in left))

    @property
    def _nothing(self) -> str:
        return "" if self.item.fields == TEXT else NOTHING


def words_of(inputs: Mapping[str, Sequence[Any]], limits: ItemLimits) -> list[Words]:
    """The items of a request. Raises `InvalidRequest`, `RequestTooLarge`."""
    items = _items(inputs)
    if not 1 <= len(items) <= limits.max_items:
        raise InvalidRequest(f"{len(items)} texts, expected 1..{limits.max_items} @ inputs")
    return [_words(item, where, limits) for item, where in items]


def _items(inputs: Mapping[str, Sequence[Any]]) -> list[tuple[Item, str]]:
    """The items, and where each came."""
    given = [fields for fields in (TEXT, PAIR, QUESTION) if set(fields) & set(inputs)]
    if len(given) != 1:
        raise InvalidRequest(
            f"got {', '.join(inputs) or 'nothing'}, expected inputs, or text and text_pair, or question and "
            "context @ inputs"
        )
    if given[0] == TEXT:
        return [_item(value, f"inputs[{index}]") for index, value in enumerate(inputs["inputs"])]
    return _paired(given[0], inputs)


def _item(value: Any, where: str) -> tuple[Item, str]:
    if not isinstance(value, Mapping):
        return Item(TEXT, (value,)), where
    for fields in (PAIR, QUESTION):
        if set(value) == set(fields):
            return Item(fields, tuple(value[field] for field in fields)), where
    raise InvalidRequest(
        f"got the keys {sorted(map(str, value))!s:.100}, expected a text, text and text_pair, or question "
        f"and context @ {where}"
    )


def _paired(fields: tuple[str, ...], inputs: Mapping[str, Sequence[Any]]) -> list[tuple[Item, str]]:
    first, second = fields
    if fields == PAIR and second not in inputs:
        return [(Item(TEXT, (value,)), f"text[{index}]") for index, value in enumerate(inputs["text"])]
    columns = [list(inputs.get(field, ())) for field in fields]
    if fields == QUESTION and len(columns[1]) == 1:
        columns[1] *= len(columns[0])
    if len(columns[0]) != len(columns[1]):
        raise InvalidRequest(f"got {len(columns[1])}, expected {len(columns[0])} as in {first} @ {second}")
    return [
        (Item(fields, pair), f"{first}[{index}]") for index, pair in enumerate(zip(*columns, strict=True))
    ]


def _words(item: Item, where: str, limits: ItemLimits) -> Words:
    for text in item.texts:
        if not isinstance(text, str):
            raise InvalidRequest(f"got {type(text).__name__} {text!r:.60}, expected a text @ {where}")
        if len(text) > limits.max_text_chars:
            raise RequestTooLarge(
                f"a text of {len(text)} characters, expected at most {limits.max_text_chars} @ {where}"
            )
    words = Words(item)
    if not 1 <= len(words.spans) <= MAX_WORDS:
        raise InvalidRequest(f"a text of {len(words.spans)} words, expected 1..{MAX_WORDS} @ {where}")
    return words
