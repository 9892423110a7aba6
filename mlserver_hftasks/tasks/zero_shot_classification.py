"""zero-shot-classification: labels that the client names, scored by a model of natural language inference."""

from __future__ import annotations

import logging
import string
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, BeforeValidator, Field

from mlserver_hftasks.backends.base import Head, Level
from mlserver_hftasks.engine.rows import FloatArray, IntArray
from mlserver_hftasks.errors import InvalidRequest, RequestTooLarge
from mlserver_hftasks.tasks.base import Answered, Example, ModelFacts, Task
from mlserver_hftasks.tasks.encoder import Truncation
from mlserver_hftasks.tasks.scores import softmax
from mlserver_hftasks.tasks.signature import InputSpec, OutputSpec, Signature, Tensor
from mlserver_hftasks.tasks.text import TextParameters, truncation_of

logger = logging.getLogger(__name__)

MAX_LABELS = 256
"""Most candidate labels of one request."""
ROWS_PER_ITEM = 16
"""Texts x labels may be this many times `max_items`: each pair is a row of the model."""


def _split_labels(value: Any) -> Any:
    """A text with commas between labels as a list of them; anything else as it is."""
    return [label.strip() for label in value.split(",") if label.strip()] if isinstance(value, str) else value


def _check_labels(labels: list[str]) -> list[str]:
    if not 1 <= len(labels) <= MAX_LABELS:
        raise ValueError(f"1..{MAX_LABELS} labels")
    if not all(label.strip() for label in labels):
        raise ValueError("labels that are not empty")
    return labels


def _check_template(template: str) -> str:
    _parts(template)
    return template


def _parts(template: str) -> list[str]:
    """The texts before, between and after the places of the label.

    They mean what `str.format` with one argument makes of `{}` or `{0}`, but `str.format` itself must not see
    a client's template: it reads attributes and fills memory to a width. Raises ValueError for all else.
    """
    try:
        fields = list(string.Formatter().parse(template))
    except ValueError:
        fields = []
    parts, names = [""], []
    for text, name, spec, conversion in fields:
        parts[-1] += text
        if name is not None:
            parts.append("")
            names.append(f"{name}{spec}{conversion or ''}")
    if names != [""] and set(names) != {"0"}:
        raise ValueError("a sentence with {} in place of the label, {{ and }} for braces, and no other field")
    return parts


class ZeroShotClassificationParameters(TextParameters):
    """Parameters of `transformers.ZeroShotClassificationPipeline`, and `multi_class` of version 4."""

    candidate_labels: Annotated[list[str], BeforeValidator(_split_labels), AfterValidator(_check_labels)] = (
        Field(description=f"the labels, at most {MAX_LABELS}: a list, or one text with commas between")
    )
    hypothesis_template: Annotated[str, AfterValidator(_check_template)] = Field(
        "This example is {}.", description="the sentence that a label makes, with {} in place of the label"
    )
    multi_label: bool = Field(False, description="several labels may hold: score each by itself")
    multi_class: bool | None = Field(None, description="multi_label (deprecated)")

    @property
    def independent(self) -> bool:
        """Whether each label is scored by itself; as in transformers 4, the deprecated name wins."""
        chosen = self.multi_label if self.multi_class is None else self.multi_class
        return chosen or len(self.candidate_labels) == 1


class ZeroShotClassification(Task[ZeroShotClassificationParameters]):
    """Results equal those of `transformers.ZeroShotClassificationPipeline`.

    A text and a label make one row, the text as premise and the label's sentence as hypothesis. The score is
    that of entailment: https://arxiv.org/abs/1909.00161.
    """

    name = "zero-shot-classification"
    head = Head("AutoModelForSequenceClassification", {"logits": Level.SEQUENCE})
    signature = Signature(
        inputs=(InputSpec("inputs", ("args", "array_inputs", "sequences"), description="texts"),),
        parameters=ZeroShotClassificationParameters,
        outputs=(
            OutputSpec("labels", "BYTES", (-1, -1), "the candidate labels, best first"),
            OutputSpec("scores", "FP32", (-1, -1), "their scores"),
            OutputSpec(
                "logits", "FP32", (-1, -1, -1), "the model's own outputs, labels in the client's order"
            ),
        ),
    )

    def __init__(self, model: ModelFacts) -> None:
        super().__init__(model)
        self.entailment = entailment_id(model)
        self._contradiction = -1 if self.entailment == 0 else 0

    def examples(
        self, inputs: Mapping[str, Sequence[Any]], parameters: ZeroShotClassificationParameters
    ) -> list[Example]:
        """One row per text and label, the labels of one text together."""
        texts = self.texts(inputs.get("inputs", ()), "inputs")
        limit = ROWS_PER_ITEM * self.model.limits.max_items
        count = len(texts) * len(parameters.candidate_labels)
        if count > limit:
            raise RequestTooLarge(f"{count} texts x labels, expected at most {limit} @ candidate_labels")
        hypotheses = self._hypotheses(parameters)
        truncation = self._truncation(parameters)
        return [
            self._example(text, hypotheses, truncation, f"inputs[{index}]")
            for index, text in enumerate(texts)
        ]

    def postprocess(self, answered: Answered, parameters: ZeroShotClassificationParameters) -> Any:
        """One dict, the labels best first."""
        scores = self.label_scores(answered, parameters)
        order = _best_first(scores)
        return {
            "sequence": answered.example.context,
            "labels": [parameters.candidate_labels[index] for index in order],
            "scores": scores[order].tolist(),
        }

    def tensors(
        self,
        names: Sequence[str],
        answered: Sequence[Answered],
        parameters: ZeroShotClassificationParameters,
    ) -> Mapping[str, Tensor]:
        """`labels` and `scores` [n, labels], `logits` [n, labels, classes]."""
        logits = np.stack([_logits(item) for item in answered])
        scores = self._scores(logits, parameters)
        order = np.stack([_best_first(of_text) for of_text in scores])
        made = {
            "labels": Tensor("BYTES", np.array(parameters.candidate_labels, dtype=np.object_)[order]),
            "scores": Tensor("FP32", np.take_along_axis(scores, order, axis=1)),
            "logits": Tensor("FP32", logits),
        }
        return {name: made[name] for name in names}

    def label_scores(self, answered: Answered, parameters: ZeroShotClassificationParameters) -> FloatArray:
        """The scores of an item's labels, in the client's order: [labels]."""
        return self._scores(_logits(answered), parameters)

    def _hypotheses(self, parameters: ZeroShotClassificationParameters) -> list[str]:
        """The sentence of each label."""
        parts = _parts(parameters.hypothesis_template)
        longest = sum(map(len, parts)) + (len(parts) - 1) * max(map(len, parameters.candidate_labels))
        limit = self.model.limits.max_text_chars
        if longest > limit:
            raise RequestTooLarge(
                f"sentences of {longest} characters, expected at most {limit} @ hypothesis_template"
            )
        return [label.join(parts) for label in parameters.candidate_labels]

    def _truncation(self, parameters: ZeroShotClassificationParameters) -> Truncation | None:
        """As the pipeline, only the text is cut, never a label's sentence."""
        choice = self.model.truncation if parameters.truncation is None else parameters.truncation
        if choice is None or choice is True:
            choice = "only_first"
        return truncation_of(self.model, choice, parameters.max_length)  # type: ignore[arg-type]

    def _example(
        self, text: str, hypotheses: Sequence[str], truncation: Truncation | None, where: str
    ) -> Example:
        if not text:
            raise InvalidRequest(f"an empty text, expected one to classify @ {where}")
        encoder = self.model.encoder
        pairs = [(text, hypothesis) for hypothesis in hypotheses]
        encodings = encoder.encode(pairs, truncation, where=f"{where} with candidate_labels")
        return Example(tuple(encoder.row(encoding) for encoding in encodings), text)

    def _scores(self, logits: FloatArray, parameters: ZeroShotClassificationParameters) -> FloatArray:
        """From logits [..., labels, classes] to scores [..., labels]."""
        if parameters.independent:
            scores: FloatArray = softmax(logits[..., [self._contradiction, self.entailment]])[..., 1]
            return scores
        return softmax(logits[..., self.entailment])


def entailment_id(model: ModelFacts) -> int:
    """The class named `entail...` in the config, else among our labels; -1, the last, if there is none."""
    named = [
        *(model.config.label2id or {}).items(),
        *zip(model.labels, range(len(model.labels)), strict=True),
    ]
    for name, index in named:
        if str(name).lower().startswith("entail"):
            return int(index)
    logger.warning(
        "none of the labels %s begins with 'entail': the last class is taken for it; set `labels`",
        model.labels,
    )
    return -1


def _logits(answered: Answered) -> FloatArray:
    """[labels, classes]"""
    return np.stack([outputs["logits"] for outputs in answered.outputs])


def _best_first(scores: FloatArray) -> IntArray:
    """Of equal scores the later label comes first, as in the pipeline."""
    order: IntArray = scores.argsort()[::-1]
    return order
