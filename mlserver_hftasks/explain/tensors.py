"""Explanations as tensors: batch first, filled up to the longest, never NaN."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from mlserver_hftasks.explain.html import page
from mlserver_hftasks.explain.options import ExplainOptions
from mlserver_hftasks.explain.reading import Reading
from mlserver_hftasks.explain.record import json_of
from mlserver_hftasks.explain.result import Explanation
from mlserver_hftasks.tasks.signature import OutputSpec, Tensor

RECORD_NAME = "explanation"
"""The output with everything of an explanation as JSON."""
HTML_NAME = "html"
"""The output that is there on request only."""

OUTPUTS = (
    OutputSpec("tokens", "BYTES", (-1, -1), "tokens as the tokenizer writes them; '' fills up"),
    OutputSpec("offsets", "INT64", (-1, -1, 2), "first and one past last character in the text; -1 fills up"),
    OutputSpec("word_ids", "INT64", (-1, -1), "the word of each token; -1 for special tokens, and fills up"),
    OutputSpec("num_tokens", "INT64", (-1,), "how many tokens there are; the rest is filled up"),
    OutputSpec("attributions", "FP32", (-1, -1, -1), "[n, targets, tokens], what each adds to the score"),
    OutputSpec("target", "INT64", (-1, -1, 2), "position and label of each score; -1 where none"),
    OutputSpec("target_label", "BYTES", (-1, -1), "the label's name; '' fills up"),
    OutputSpec("score", "FP32", (-1, -1), "what is explained: a logit, a cosine or a log-probability"),
    OutputSpec("baseline_score", "FP32", (-1, -1), "the same with all tokens absent"),
    OutputSpec("delta", "FP32", (-1, -1), "sum of attributions - (score - baseline_score)"),
    OutputSpec("converged", "BOOL", (-1, -1), "whether the error is within the tolerance"),
    OutputSpec(RECORD_NAME, "BYTES", (-1, 1), "all of it as JSON, with TorchServe's keys"),
    OutputSpec(HTML_NAME, "BYTES", (-1, 1), "a heat map, a page by itself; with the option `html`"),
)


def default_names(options: ExplainOptions) -> tuple[str, ...]:
    """The outputs of a request that names none."""
    return tuple(spec.name for spec in OUTPUTS if spec.name != HTML_NAME or options.html)


def tensors_of(
    names: Sequence[str], explanations: Sequence[Explanation], options: ExplainOptions
) -> Mapping[str, Tensor]:
    """The outputs of those names; each is one of `OUTPUTS`."""
    specs = {spec.name: spec for spec in OUTPUTS}
    records = (
        [json_of(explanation, options.top_k) for explanation in explanations]
        if {RECORD_NAME, HTML_NAME} & set(names)
        else []
    )
    texts = {RECORD_NAME: records}
    if HTML_NAME in names:
        texts[HTML_NAME] = [page([Reading.of(orjson.loads(record))]) for record in records]
    return {
        name: Tensor(
            specs[name].datatype,
            _object_array(texts[name]).reshape(-1, 1)
            if name in texts
            else _padded(_COLUMNS[name], explanations),
        )
        for name in names
    }


def count_numbers(names: Sequence[str], explanations: Sequence[Explanation]) -> int:
    """How many numbers, or texts, the outputs of those names will hold, what fills them up included."""
    written = sum(explanation.attributions.size for explanation in explanations)
    return sum(
        written
        if name in (RECORD_NAME, HTML_NAME)
        else math.prod(_shape([_COLUMNS[name][0](explanation) for explanation in explanations]))
        for name in names
    )


def _object_array(values: Sequence[str]) -> npt.NDArray[Any]:
    return np.array(values, dtype=np.object_)


Column = tuple[Callable[[Explanation], npt.NDArray[Any]], Any]
"""The array of one explanation, and what fills it up."""

_COLUMNS: dict[str, Column] = {
    "tokens": (lambda one: _object_array(one.tokens), ""),
    "offsets": (lambda one: one.offsets, -1),
    "word_ids": (lambda one: one.word_ids, -1),
    "num_tokens": (lambda one: np.array(len(one.tokens), dtype=np.int64), 0),
    "attributions": (lambda one: one.attributions, 0),
    "target": (lambda one: one.target, -1),
    "target_label": (lambda one: _object_array(one.target_label), ""),
    "score": (lambda one: one.score, 0),
    "baseline_score": (lambda one: one.baseline_score, 0),
    "delta": (lambda one: one.delta, 0),
    "converged": (lambda one: one.converged, True),
}


def _shape(arrays: Sequence[npt.NDArray[Any]]) -> tuple[int, ...]:
    """Of all of them, each filled up to the largest size along each of its axes."""
    largest = np.max([array.shape for array in arrays], axis=0) if arrays[0].ndim else ()
    return (len(arrays), *map(int, largest))


def _padded(column: Column, explanations: Sequence[Explanation]) -> npt.NDArray[Any]:
    """The arrays one above the other, each filled up to the largest size along each of its axes."""
    read, fill = column
    arrays = [read(explanation) for explanation in explanations]
    made: npt.NDArray[Any] = np.full(_shape(arrays), fill, dtype=arrays[0].dtype)
    for index, array in enumerate(arrays):
        place: tuple[int | slice, ...] = (index, *(slice(size) for size in array.shape))
        made[place] = array
    return made
