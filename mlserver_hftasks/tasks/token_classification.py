"""token-classification: entities in texts, or in texts that come split into words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator, Field

from mlserver_hftasks.backends.base import Head, Level
from mlserver_hftasks.engine.rows import FloatArray, IntArray
from mlserver_hftasks.errors import InvalidRequest, RequestTooLarge
from mlserver_hftasks.tasks.base import Answered, Example, ModelFacts, Task
from mlserver_hftasks.tasks.encoder import Encoding, Truncation
from mlserver_hftasks.tasks.entities import (
    WORD_LEVEL,
    Aggregation,
    Tags,
    Vocabulary,
    Window,
    group_means,
    spans_of,
    without_overlaps,
    word_scores,
)
from mlserver_hftasks.tasks.scores import softmax
from mlserver_hftasks.tasks.signature import InputSpec, OutputSpec, Signature, Tensor, padded_tensor
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
    ignore_labels: OneOrMore | None = Field(None, description='labels, or groups, to leave out; ["O"] if not given')
    stride: int | None = Field(
        None, ge=0, description="read long texts in windows that overlap by this many tokens, instead of cutting them"
    )
    is_split_into_words: bool = Field(False, description="the items are lists of words")
    delimiter: str | None = Field(None, description="what joins the words, for start and end; a space if not given")
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
                "logits", "FP32", (-1, -1, -1), "the model's outputs per token, window after window; 0 fills up"
            ),
            OutputSpec("num_tokens", "INT64", (-1,), "how many tokens there are, special ones included"),
        ),
    )

    def __init__(self, model: ModelFacts) -> None:
        super().__init__(model)
        self._tags = Tags(model.labels)
        self._vocabulary = Vocabulary(model.encoder.tokenizer)
