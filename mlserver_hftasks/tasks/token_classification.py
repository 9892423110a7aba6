"""token-classification: entities in texts, or in texts that come split into words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator, Field

from mlserver_hftasks.backends.base import Head, Level
from mlserver_hftasks.errors import InvalidRequest, RequestTooLarge
from mlserver_hftasks.tasks.base import Answered, Example, ModelFacts, Task
from mlserver_hftasks.tasks.encoder import Encoding, Text, Truncation
from mlserver_hftasks.tasks.entities import (
    WORD_LEVEL,
    Aggregation,
    EntityFinder,
    without_overlaps,
)
from mlserver_hftasks.tasks.signature import Datatype, InputSpec, OutputSpec, Signature, Tensor, padded_tensor
from mlserver_hftasks.tasks.text import LowerCase, OneOrMore, TextParameters, truncation_of
from mlserver_hftasks.tasks.windows import Offsets, Sentence, check_spans, checked_offsets, joined, window_of

MAX_OVERLAP = 7 / 8
"""Largest share of a window that may be overlap: a text costs at most eight times its tokens."""


def _per_item(offsets: Any) -> Any:
    """The offsets of one item as those of a batch of one."""
    try:
        return [offsets] if isinstance(offsets[0][0], int) else offsets
    except (TypeError, IndexError, KeyError):
        return offsets


Position = Annotated[int, Field(ge=0, lt=2**31)]
OffsetsPerItem = Annotated[list[list[tuple[Position, Position]]], BeforeValidator(_per_item)]


class TokenClassificationParameters(TextParameters):
    """Parameters of `transformers.TokenClassificationPipeline`, and those that only version 4 had."""

    aggregation_strategy: Annotated[Aggregation | None, LowerCase] = Field(
        None, description="how tokens become entities; none gives the tokens"
    )
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
    offset_mapping: OffsetsPerItem | None = Field(
        None, description="first and one past last character of each token, in place of the tokenizer's"
    )
    grouped_entities: bool | None = Field(None, description="aggregation_strategy simple (deprecated)")
    ignore_subwords: bool | None = Field(None, description="with grouped_entities: first (deprecated)")

    @property
    def joiner(self) -> str:
        """The delimiter, or its default."""
        return " " if self.delimiter is None else self.delimiter

    @property
    def says_none(self) -> bool:
        """Whether the client asks for no aggregation in so many words."""
        asked = (self.aggregation_strategy, self.grouped_entities, self.ignore_subwords)
        return self.aggregation == "none" and any(value is not None for value in asked)

    @property
    def aggregation(self) -> Aggregation:
        """The strategy; as in transformers 4, the deprecated names win."""
        if self.grouped_entities is None and self.ignore_subwords is None:
            return self.aggregation_strategy or "none"
        if not self.grouped_entities:
            return "none"
        return "first" if self.ignore_subwords else "simple"


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
        items: Sequence[Text] = (
            self._word_lists(values, parameters) if split else self.texts(values, "inputs")
        )
        encodings = self.model.encoder.encode(items, self._truncation(parameters), words=split)
        offsets: Sequence[Any] = [None] * len(items)
        if parameters.offset_mapping is not None:
            offsets = checked_offsets(parameters.offset_mapping, encodings)
        return [
            self._example(item, encoding, given, parameters)
            for item, encoding, given in zip(items, encodings, offsets, strict=True)
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

    def _check(self, parameters: TokenClassificationParameters) -> None:
        """Refuse what a tokenizer without offsets cannot do, and what contradicts itself."""
        needs_offsets = {
            "aggregation_strategy": parameters.aggregation in WORD_LEVEL,
            "stride": parameters.stride is not None,
            "is_split_into_words": parameters.is_split_into_words,
        }
        for name, needed in needs_offsets.items():
            if needed and not self.model.encoder.is_fast:
                raise InvalidRequest(
                    "this model's tokenizer is written in Python and knows no words, expected texts, without "
                    f"stride, and aggregation_strategy none or simple @ {name}"
                )
        if parameters.stride is None:
            return
        if parameters.says_none:
            raise InvalidRequest(
                "got stride with aggregation_strategy none, expected another strategy @ stride"
            )
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
            raise InvalidRequest(
                f"got {length}, expected at least {special + 1} tokens in a window @ max_length"
            )
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
        return [self._words(item, parameters.joiner, f"inputs[{i}]") for i, item in enumerate(items)]

    def _words(self, words: Any, delimiter: str, where: str) -> list[str]:
        if not isinstance(words, list | tuple) or not words:
            raise InvalidRequest(
                f"got {type(words).__name__} {words!r:.60}, expected a list of words as is_split_into_words "
                f"says @ {where}"
            )
        checked = [self.text(word, f"{where}[{index}]") for index, word in enumerate(words)]
        length = sum(map(len, checked)) + (len(checked) - 1) * len(delimiter)
        limit = self.model.limits.max_text_chars
        if length > limit:
            raise RequestTooLarge(
                f"words of {length} characters together, expected at most {limit} @ {where}"
            )
        return checked

    def _example(
        self,
        item: Text,
        encoding: Encoding,
        offsets: Offsets | None,
        parameters: TokenClassificationParameters,
    ) -> Example:
        pieces = [encoding] if parameters.stride is None else [encoding, *encoding.overflowing]
        text, word_starts = (item, None) if isinstance(item, str) else joined(item, parameters.joiner)
        known = self.model.encoder.is_fast
        windows = [
            window_of(piece, offsets or (piece.offsets if known else None), word_starts) for piece in pieces
        ]
        if offsets is not None:
            check_spans(windows[0], text)
        rows = tuple(self.model.encoder.row(piece) for piece in pieces)
        return Example(rows, Sentence(text, tuple(windows)))


def _entity_tensors(results: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Tensor]:
    def column(name: str, datatype: Datatype, fill: Any) -> Tensor:
        rows = [
            [fill if entity[name] is None else entity[name] for entity in entities] for entities in results
        ]
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
