"""token-classification: entities in texts, or in texts that come split into words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator, Field

from mlserver_hftasks.backends.base import Head, Level
from mlserver_hftasks.engine.rows import IntArray
from mlserver_hftasks.errors import InvalidRequest, RequestTooLarge
from mlserver_hftasks.tasks.base import Answered, Example, ModelFacts, Task
from mlserver_hftasks.tasks.encoder import Encoding, Truncation
from mlserver_hftasks.tasks.entities import WORD_LEVEL, Aggregation, EntityFinder, Window, spans_of, without_overlaps
from mlserver_hftasks.tasks.signature import Datatype, InputSpec, OutputSpec, Signature, Tensor, padded_tensor
from mlserver_hftasks.tasks.text import OneOrMore, TextParameters, truncation_of

MAX_OVERLAP = 7 / 8
"""Largest share of a window that may be overlap: a text costs at most eight times its tokens."""

Offsets = Annotated[
    list[list[tuple[int, int]]],
    BeforeValidator(lambda value: [value] if _depth(value) == 2 else value),
]


def _depth(value: Any) -> int:
    """How deep lists are nested, seen along the first elements."""
    return 1 + _depth(value[0]) if isinstance(value, list | tuple) and value else 0


class TokenClassificationParameters(TextParameters):
    """Parameters of `transformers.TokenClassificationPipeline`, and those that only version 4 had."""

    aggregation_strategy: Annotated[
        Aggregation | None, BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value)
    ] = Field(None, description="how tokens become entities; none gives the tokens")
    ignore_labels: OneOrMore | None = Field(
        None, description='labels, or groups, to leave out; ["O"] if not given'
    )
    stride: int | None = Field(
        None,
        ge=0,
        description="read long texts in windows that overlap by this many tokens, instead of cutting them",
    )
    is_split_into_words: bool = Field(False, description="the items are lists of words")
    delimiter: str | None = Field(
        None, description="what joins the words, for start and end; a space if not given"
    )
    offset_mapping: Offsets | None = Field(
        None, description="first and one past last character of each token, in place of the tokenizer's"
    )
    grouped_entities: bool | None = Field(None, description="aggregation_strategy simple (deprecated)")
    ignore_subwords: bool | None = Field(None, description="with grouped_entities: first (deprecated)")

    @property
    def aggregation(self) -> Aggregation:
        """The strategy; as in transformers 4, the deprecated names win."""
        if self.grouped_entities is None and self.ignore_subwords is None:
            return self.aggregation_strategy or "none"
        if not self.grouped_entities:
            return "none"
        return "first" if self.ignore_subwords else "simple"


@dataclass(frozen=True, slots=True)
class Sentence:
    """A text, and its tokens row by row."""

    text: str
    windows: tuple[Window, ...]


class TokenClassification(Task[TokenClassificationParameters]):
    """Results equal those of `transformers.TokenClassificationPipeline`."""

    name = "token-classification"
    head = Head("AutoModelForTokenClassification", {"logits": Level.TOKEN})
    signature = Signature(
        inputs=(
            InputSpec(
                "inputs", ("args", "array_inputs", "sequences"), description="texts, or lists of words"
            ),
        ),
        parameters=TokenClassificationParameters,
        outputs=(
            OutputSpec("label", "BYTES", (-1, -1), "the entities' labels, or groups; '' fills up"),
            OutputSpec("word", "BYTES", (-1, -1), "their text as the tokenizer has it; '' fills up"),
            OutputSpec("score", "FP32", (-1, -1), "their scores; 0 fills up"),
            OutputSpec("start", "INT64", (-1, -1), "their first characters; -1 fills up"),
            OutputSpec("end", "INT64", (-1, -1), "one past their last characters; -1 fills up"),
            OutputSpec("num_entities", "INT64", (-1,), "how many there are"),
            OutputSpec(
                "logits",
                "FP32",
                (-1, -1, -1),
                "the model's outputs per token, window after window; 0 fills up",
            ),
            OutputSpec("num_tokens", "INT64", (-1,), "how many tokens there are, special ones included"),
        ),
    )

    def __init__(self, model: ModelFacts) -> None:
        super().__init__(model)
        self._finder = EntityFinder(model.labels, model.encoder.tokenizer)

    def examples(
        self, inputs: Mapping[str, Sequence[Any]], parameters: TokenClassificationParameters
    ) -> list[Example]:
        """One row per text, or with `stride` one per window of it."""
        self._check(parameters)
        values = inputs.get("inputs", ())
        split = parameters.is_split_into_words
        items = self._word_lists(values, parameters) if split else self.texts(values, "inputs")
        encodings = self.model.encoder.encode(items, self._truncation(parameters), words=split)
        offsets: Sequence[Any] = [None] * len(items)
        if parameters.offset_mapping is not None:
            offsets = _checked_offsets(parameters.offset_mapping, encodings)
        return [
            self._example(item, encoding, given, parameters, f"inputs[{index}]")
            for index, (item, encoding, given) in enumerate(zip(items, encodings, offsets, strict=True))
        ]

    def postprocess(self, answered: Answered, parameters: TokenClassificationParameters) -> Any:
        """A list of dicts, one per token without aggregation, else one per entity."""
        sentence: Sentence = answered.example.context
        ignore = {"O"} if parameters.ignore_labels is None else set(parameters.ignore_labels)
        entities = [
            entity
            for window, outputs in zip(sentence.windows, answered.outputs, strict=True)
            for entity in self._finder.find(
                sentence.text, window, outputs["logits"][window.positions], parameters.aggregation, ignore
            )
        ]
        return entities if len(sentence.windows) == 1 else without_overlaps(entities)

    def shaped(
        self, results: list[Any], parameters: TokenClassificationParameters, *, scalar: bool
    ) -> list[Any]:
        """As the pipeline: a list of words by itself gives a list of one result."""
        return super().shaped(results, parameters, scalar=scalar and not parameters.is_split_into_words)

    def tensors(
        self, names: Sequence[str], answered: Sequence[Answered], parameters: TokenClassificationParameters
    ) -> Mapping[str, Tensor]:
        """Entities [n, most entities]; `logits` [n, most tokens, labels]."""
        made: dict[str, Tensor] = {}
        if not set(names) <= {"logits", "num_tokens"}:
            made.update(_entity_tensors([self.postprocess(item, parameters) for item in answered]))
        if "logits" in names or "num_tokens" in names:
            made.update(_logit_tensors(answered, len(self.model.labels)))
        return {name: made[name] for name in names}

    # -- before the model ------------------------------------------------------------------------

    def _check(self, parameters: TokenClassificationParameters) -> None:
        """Refuse what a tokenizer without offsets cannot do, and what contradicts itself."""
        if not self.model.encoder.is_fast:
            refused = {
                "aggregation_strategy": parameters.aggregation in WORD_LEVEL,
                "stride": parameters.stride is not None,
                "is_split_into_words": parameters.is_split_into_words,
            }
            for name in (name for name, asked in refused.items() if asked):
                raise InvalidRequest(
                    f"this model's tokenizer is written in Python and knows no words or offsets, expected "
                    f"aggregation_strategy none or simple on whole texts, without stride @ {name}"
                )
        if parameters.stride is None:
            return
        if parameters.aggregation_strategy == "none" and parameters.aggregation == "none":
            raise InvalidRequest("got stride with aggregation_strategy none, expected another strategy @ stride")
        if parameters.offset_mapping is not None:
            raise InvalidRequest("got stride and offset_mapping, expected one of them @ offset_mapping")

    def _truncation(self, parameters: TokenClassificationParameters) -> Truncation | None:
        """As the pipeline: texts are cut to what the model takes, unless there are windows."""
        if parameters.stride is None:
            return truncation_of(self.model, parameters.truncation, parameters.max_length, default=True)
        window = truncation_of(self.model, True, parameters.max_length)
        assert window is not None
        length, special = window.max_length, self.model.encoder.special_tokens()
        if length <= special:
            raise InvalidRequest(f"got {length}, expected at least {special + 1} tokens in a window @ max_length")
        most = min(length - special - 1, int(length * MAX_OVERLAP))
        if parameters.stride > most:
            raise InvalidRequest(
                f"got {parameters.stride}, expected 0..{most} for windows of {length} tokens @ stride"
            )
        return Truncation("longest_first", length, parameters.stride)

    def _word_lists(
        self, values: Sequence[Any], parameters: TokenClassificationParameters
    ) -> list[list[str]]:
        """The items as lists of words; words by themselves are one item."""
        items = [values] if values and all(isinstance(value, str) for value in values) else values
        self.check_count(len(items), "inputs")
        return [self._words(item, parameters.delimiter, f"inputs[{i}]") for i, item in enumerate(items)]

    def _words(self, words: Any, delimiter: str | None, where: str) -> list[str]:
        if not isinstance(words, list | tuple) or not words:
            raise InvalidRequest(
                f"got {type(words).__name__} {words!r:.60}, expected a list of words as is_split_into_words "
                f"says @ {where}"
            )
        checked = [self.text(word, f"{where}[{index}]") for index, word in enumerate(words)]
        length = sum(map(len, checked)) + (len(checked) - 1) * len(" " if delimiter is None else delimiter)
        if length > self.model.limits.max_text_chars:
            limit = self.model.limits.max_text_chars
            raise RequestTooLarge(f"words of {length} characters together, expected at most {limit} @ {where}")
        return checked

    def _example(
        self,
        item: str | list[str],
        encoding: Encoding,
        offsets: Sequence[tuple[int, int]] | None,
        parameters: TokenClassificationParameters,
        where: str,
    ) -> Example:
        pieces = [encoding] if parameters.stride is None else [encoding, *encoding.overflowing]
        delimiter = " " if parameters.delimiter is None else parameters.delimiter
        text = item if isinstance(item, str) else delimiter.join(item)
        word_starts = None
        if not isinstance(item, str):
            word_starts = np.cumsum([0, *(len(word) + len(delimiter) for word in item[:-1])], dtype=np.int64)
        windows = tuple(self._window(piece, offsets, word_starts) for piece in pieces)
        if offsets is not None:
            _check_spans(windows[0], text, where)
        rows = tuple(self.model.encoder.row(piece) for piece in pieces)
        return Example(rows, Sentence(text, windows))

    def _window(
        self, piece: Encoding, offsets: Sequence[tuple[int, int]] | None, word_starts: IntArray | None
    ) -> Window:
        positions = np.flatnonzero(np.asarray(piece.special_tokens_mask) == 0)
        ids = np.asarray(piece.ids, dtype=np.int64)[positions]
        if offsets is None and not self.model.encoder.is_fast:
            return Window(ids, positions, None)
        offsets = piece.offsets if offsets is None else offsets
        if word_starts is None:
            spans = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
        else:
            spans = spans_of(offsets, piece.word_ids, word_starts)
        return Window(ids, positions, spans[positions])


def _checked_offsets(
    given: Sequence[Sequence[tuple[int, int]]], encodings: Sequence[Encoding]
) -> Sequence[Sequence[tuple[int, int]]]:
    if len(given) != len(encodings):
        raise InvalidRequest(f"got {len(given)} lists, expected {len(encodings)}, one per item @ offset_mapping")
    for index, (offsets, encoding) in enumerate(zip(given, encodings, strict=True)):
        if len(offsets) != len(encoding.ids):
            raise InvalidRequest(
                f"got {len(offsets)} pairs, expected {len(encoding.ids)}, one per token with the special ones "
                f"@ offset_mapping[{index}]"
            )
    return given


def _check_spans(window: Window, text: str, where: str) -> None:
    spans = window.spans
    if spans is None or not spans.size:
        return
    if spans.min() < 0 or spans.max() > len(text) or (spans[:, 0] > spans[:, 1]).any():
        raise InvalidRequest(f"got offsets outside of the text, expected 0..{len(text)} for {where} @ offset_mapping")


def _entity_tensors(results: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Tensor]:
    def column(name: str, datatype: Datatype, fill: Any) -> Tensor:
        rows = [[fill if entity[name] is None else entity[name] for entity in entities] for entities in results]
        return padded_tensor(datatype, rows, fill)

    grouped = any("entity_group" in entity for entities in results for entity in entities)
    return {
        "label": column("entity_group" if grouped else "entity", "BYTES", ""),
        "word": column("word", "BYTES", ""),
        "score": column("score", "FP32", 0),
        "start": column("start", "INT64", -1),
        "end": column("end", "INT64", -1),
        "num_entities": Tensor("INT64", np.array([len(entities) for entities in results], dtype=np.int64)),
    }


def _logit_tensors(answered: Sequence[Answered], labels: int) -> dict[str, Tensor]:
    logits = [np.concatenate([outputs["logits"] for outputs in item.outputs]) for item in answered]
    lengths = np.array([len(rows) for rows in logits], dtype=np.int64)
    filled = np.zeros((len(logits), lengths.max(), labels), dtype=np.float32)
    for index, rows in enumerate(logits):
        filled[index, : len(rows)] = rows
    return {"logits": Tensor("FP32", filled), "num_tokens": Tensor("INT64", lengths)}
