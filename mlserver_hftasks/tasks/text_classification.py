"""text-classification: labels with scores for a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from mlserver_hftasks.backends.base import Head, Level
from mlserver_hftasks.engine.rows import FloatArray
from mlserver_hftasks.errors import InvalidRequest
from mlserver_hftasks.tasks.base import Answered, Example, ModelFacts, Task
from mlserver_hftasks.tasks.encoder import TextOrPair
from mlserver_hftasks.tasks.scores import FUNCTIONS, softmax
from mlserver_hftasks.tasks.signature import InputSpec, OutputSpec, Signature, Tensor
from mlserver_hftasks.tasks.text import TEXTS, LowerCase, TextParameters, truncation_of

FunctionName = Literal["sigmoid", "softmax", "none", "default"]


class TextClassificationParameters(TextParameters):
    """Parameters of `transformers.TextClassificationPipeline`, and `return_all_scores` of version 4."""

    top_k: int | None = Field(1, ge=1, description="how many labels; null gives all")
    function_to_apply: Annotated[FunctionName | None, LowerCase] = Field(
        None, description="from logits to scores"
    )
    return_all_scores: bool | None = Field(None, description="all labels in the model's order (deprecated)")
    padding: bool | Literal["longest", "max_length", "do_not_pad"] | None = Field(
        None, description="accepted, no effect: texts are not padded"
    )


class TextClassification(Task[TextClassificationParameters]):
    """Results equal those of `transformers.TextClassificationPipeline`."""

    name = "text-classification"
    head = Head("AutoModelForSequenceClassification", {"logits": Level.SEQUENCE})
    signature = Signature(
        inputs=(
            TEXTS,
            InputSpec("text", required=False, description="first texts of pairs, in place of `inputs`"),
            InputSpec("text_pair", required=False, description="second texts of pairs"),
        ),
        parameters=TextClassificationParameters,
        outputs=(
            OutputSpec("label", "BYTES", (-1, -1), "the top_k labels, best first"),
            OutputSpec("score", "FP32", (-1, -1), "their scores"),
            OutputSpec("probabilities", "FP32", (-1, -1), "scores of all labels in the model's order"),
            OutputSpec("logits", "FP32", (-1, -1), "the model's own outputs"),
        ),
    )

    def __init__(self, model: ModelFacts) -> None:
        super().__init__(model)
        self._default_function = default_function(model)

    def examples(
        self, inputs: Mapping[str, Sequence[Any]], parameters: TextClassificationParameters
    ) -> list[Example]:
        """One row per text or pair."""
        texts = self._texts_or_pairs(inputs)
        truncation = truncation_of(self.model, parameters.truncation, parameters.max_length)
        encodings = self.model.encoder.encode(texts, truncation)
        return [Example((self.model.encoder.row(encoding),)) for encoding in encodings]

    def postprocess(self, answered: Answered, parameters: TextClassificationParameters) -> Any:
        """One dict, or with an explicit `top_k` a list of dicts."""
        scores = self._scores(answered, parameters)
        if parameters.return_all_scores and "top_k" not in parameters.model_fields_set:
            return [self._entry(index, scores) for index in range(len(scores))]
        order = self._order(scores, parameters)
        entries = [self._entry(index, scores) for index in order]
        return entries if "top_k" in parameters.model_fields_set else entries[0]

    def shaped(
        self, results: list[Any], parameters: TextClassificationParameters, *, scalar: bool
    ) -> list[Any]:
        """As the pipeline: without `top_k` a single text still gives a list of one result."""
        legacy = "top_k" not in parameters.model_fields_set
        return results if legacy else super().shaped(results, parameters, scalar=scalar)

    def tensors(
        self, names: Sequence[str], answered: Sequence[Answered], parameters: TextClassificationParameters
    ) -> Mapping[str, Tensor]:
        """All [n, labels]; `label` and `score` [n, top_k]."""
        logits = np.stack([item.outputs[0]["logits"] for item in answered])
        scores = np.stack([self._scores(item, parameters) for item in answered])
        order = np.stack([self._order(row, parameters) for row in scores])
        made = {
            "label": Tensor("BYTES", np.array(self.model.labels, dtype=np.object_)[order]),
            "score": Tensor("FP32", np.take_along_axis(scores, order, axis=1)),
            "probabilities": Tensor("FP32", scores),
            "logits": Tensor("FP32", logits),
        }
        return {name: made[name] for name in names}

    def _texts_or_pairs(self, inputs: Mapping[str, Sequence[Any]]) -> list[TextOrPair]:
        if "text_pair" not in inputs and "text" not in inputs:
            return [
                self._text_or_pair(value, f"inputs[{i}]")
                for i, value in enumerate(self._counted(inputs.get("inputs", ())))
            ]
        if "inputs" in inputs:
            raise InvalidRequest("got both inputs and text, expected one of them @ text")
        if "text_pair" not in inputs:
            return list(self.texts(inputs["text"], "text"))
        first, second = (
            self.texts(inputs.get("text", ()), "text"),
            self.texts(inputs["text_pair"], "text_pair"),
        )
        if len(first) != len(second):
            raise InvalidRequest(
                f"got {len(second)} second texts, expected {len(first)} as in text @ text_pair"
            )
        return list(zip(first, second, strict=True))

    def _counted(self, values: Sequence[Any]) -> Sequence[Any]:
        self.check_count(len(values), "inputs")
        return values

    def _text_or_pair(self, value: Any, where: str) -> TextOrPair:
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list) and len(value[0]) == 2:
            value = dict(zip(("text", "text_pair"), value[0], strict=True))  # an old form of pairs
        if not isinstance(value, dict):
            return self.text(value, where)
        if not {"text"} <= set(value) <= {"text", "text_pair"}:
            raise InvalidRequest(f"got the keys {sorted(value)}, expected text and text_pair @ {where}")
        first = self.text(value["text"], f"{where}.text")
        return (first, self.text(value["text_pair"], f"{where}.text_pair")) if "text_pair" in value else first

    def _scores(self, answered: Answered, parameters: TextClassificationParameters) -> FloatArray:
        chosen = parameters.function_to_apply
        function = self._default_function if chosen in (None, "default") else FUNCTIONS[chosen]
        return function(answered.outputs[0]["logits"])

    def _order(self, scores: FloatArray, parameters: TextClassificationParameters) -> Any:
        order = np.argsort(-scores, kind="stable")
        return order[: parameters.top_k]

    def _entry(self, index: int, scores: FloatArray) -> dict[str, Any]:
        return {"label": self.model.labels[index], "score": float(scores[index])}


def default_function(model: ModelFacts) -> Any:
    """From logits to scores as the model's config says: its problem type, else its number of labels."""
    problem = getattr(model.config, "problem_type", None)
    if problem == "regression":
        return FUNCTIONS["none"]
    if problem == "multi_label_classification" or len(model.labels) == 1:
        return FUNCTIONS["sigmoid"]
    return softmax
