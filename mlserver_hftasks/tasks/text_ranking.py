"""text-ranking: how well texts answer a query, by a cross-encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field

from mlserver_hftasks.backends.base import Head, Level
from mlserver_hftasks.engine.rows import FloatArray
from mlserver_hftasks.errors import InvalidRequest, InvalidSettings
from mlserver_hftasks.tasks.base import Answered, Example, ModelFacts, Task
from mlserver_hftasks.tasks.scores import sigmoid
from mlserver_hftasks.tasks.sentence_config import read_saved_settings
from mlserver_hftasks.tasks.signature import InputSpec, OutputSpec, Signature, Tensor
from mlserver_hftasks.tasks.text import TextParameters, truncation_of

Pair = tuple[str, str]


class TextRankingParameters(TextParameters):
    """Parameters of sentence-transformers' `CrossEncoder.rank`."""

    raw_scores: bool = Field(False, description="scores as the model gives them, without the sigmoid")
    top_k: int | None = Field(None, ge=1, description="how many of the texts, best first; null gives all")
    return_text: bool = Field(False, description="the texts themselves in the answer")
    return_documents: bool = Field(False, description="other name of return_text")


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A text, and its place among those of its query; None in a pair that stands for itself."""

    text: str
    index: int | None


class TextRanking(Task[TextRankingParameters]):
    """Scores of (query, text) pairs.

    A model with one label gives the score itself. One with two (irrelevant, relevant) gives the log-odds
    of the second, whose sigmoid is its probability.
    """

    name = "text-ranking"
    head = Head("AutoModelForSequenceClassification", {"logits": Level.SEQUENCE})
    signature = Signature(
        inputs=(
            InputSpec("query", required=False, description="one query, or one for each of the texts"),
            InputSpec("texts", ("documents", "passages"), required=False, description="texts to rank"),
            InputSpec(
                "inputs",
                ("args", "array_inputs", "pairs"),
                required=False,
                description="pairs, in place of the others: lists of two, or dicts of query and text",
            ),
        ),
        parameters=TextRankingParameters,
        outputs=(
            OutputSpec("score", "FP32", (-1,), "of each text, in the order they came in"),
            OutputSpec("index", "INT64", (-1,), "of the top_k texts, best first"),
            OutputSpec("logits", "FP32", (-1, -1), "the model's own outputs"),
        ),
    )

    def __init__(self, model: ModelFacts) -> None:
        super().__init__(model)
        if len(model.labels) not in (1, 2):
            raise InvalidSettings(
                f"the model has {len(model.labels)} labels, expected 1 (a score) or 2 (irrelevant, relevant) "
                "@ parameters.extra.pretrained_model"
            )
        self._activated = _has_sigmoid(model)

    def examples(
        self, inputs: Mapping[str, Sequence[Any]], parameters: TextRankingParameters
    ) -> list[Example]:
        """One row per pair."""
        pairs, ranked = self._pairs(inputs)
        if parameters.top_k is not None and not ranked:
            raise InvalidRequest(
                f"got {parameters.top_k}, expected it only with one query and its texts @ top_k"
            )
        truncation = truncation_of(self.model, parameters.truncation, parameters.max_length, default=True)
        encodings = self.model.encoder.encode(
            pairs, truncation, where="texts" if "texts" in inputs else "inputs"
        )
        return [
            Example((self.model.encoder.row(encoding),), _Candidate(text, index if ranked else None))
            for index, (encoding, (_, text)) in enumerate(zip(encodings, pairs, strict=True))
        ]

    def postprocess(self, answered: Answered, parameters: TextRankingParameters) -> dict[str, Any]:
        """`score`, with the `index` of a ranked text, and the `text` if it was asked for."""
        candidate: _Candidate = answered.example.context
        result: dict[str, Any] = {} if candidate.index is None else {"index": candidate.index}
        result["score"] = float(self._score(answered.outputs[0]["logits"], parameters))
        if parameters.return_text or parameters.return_documents:
            result["text"] = candidate.text
        return result

    def shaped(self, results: list[Any], parameters: TextRankingParameters, *, scalar: bool) -> list[Any]:
        """One element per pair in order, or per text best first."""
        if "index" not in results[0]:
            return results
        return sorted(results, key=lambda result: -result["score"])[: parameters.top_k]

    def tensors(
        self, names: Sequence[str], answered: Sequence[Answered], parameters: TextRankingParameters
    ) -> Mapping[str, Tensor]:
        """`score` [n], `index` [top_k], `logits` [n, labels]."""
        logits = np.stack([item.outputs[0]["logits"] for item in answered])
        scores = self._score(logits, parameters)
        order = np.argsort(-scores, kind="stable")[: parameters.top_k]
        made = {
            "score": Tensor("FP32", scores),
            "index": Tensor("INT64", order.astype(np.int64)),
            "logits": Tensor("FP32", logits),
        }
        return {name: made[name] for name in names}

    def _score(self, logits: FloatArray, parameters: TextRankingParameters) -> FloatArray:
        """[..., labels] -> [...]."""
        raw: FloatArray = logits[..., 0] if logits.shape[-1] == 1 else logits[..., 1] - logits[..., 0]
        return sigmoid(raw) if self._activated and not parameters.raw_scores else raw

    # -- requests --------------------------------------------------------------------------------

    def _pairs(self, inputs: Mapping[str, Sequence[Any]]) -> tuple[list[Pair], bool]:
        """The pairs, and whether they are one query's."""
        if "inputs" in inputs:
            if "query" in inputs or "texts" in inputs:
                raise InvalidRequest("got both inputs and query or texts, expected one of them @ inputs")
            self.check_count(len(inputs["inputs"]), "inputs")
            return [self._pair(value, f"inputs[{i}]") for i, value in enumerate(inputs["inputs"])], False
        for name in ("query", "texts"):
            if name not in inputs:
                raise InvalidRequest(f"no {name}, expected query and texts, or inputs @ {name}")
        queries, texts = self.texts(inputs["query"], "query"), self.texts(inputs["texts"], "texts")
        if len(queries) == 1:
            return [(queries[0], text) for text in texts], True
        if len(queries) != len(texts):
            raise InvalidRequest(
                f"got {len(queries)} queries for {len(texts)} texts, expected 1 or as many @ query"
            )
        return list(zip(queries, texts, strict=True)), False

    def _pair(self, value: Any, where: str) -> Pair:
        if isinstance(value, dict):
            for first, second in (("query", "text"), ("text", "text_pair")):
                if set(value) == {first, second}:
                    return self.text(value[first], f"{where}.{first}"), self.text(
                        value[second], f"{where}.{second}"
                    )
            got = f"the keys {sorted(map(str, value))}"
        elif isinstance(value, (list, tuple)) and len(value) == 2:
            return self.text(value[0], f"{where}[0]"), self.text(value[1], f"{where}[1]")
        else:
            got = f"{type(value).__name__} {value!r:.60}"
        raise InvalidRequest(
            f"got {got}, expected a list of two texts, or a dict of query and text @ {where}"
        )


def _has_sigmoid(model: ModelFacts) -> bool:
    """Whether scores are sigmoids: as sentence-transformers wrote down, in one place or another, else yes.

    Raises `InvalidSettings` for another activation.
    """
    since_6 = read_saved_settings(model.folder).get("activation_fn")
    since_4 = (getattr(model.config, "sentence_transformers", None) or {}).get("activation_fn")
    before = getattr(model.config, "sbert_ce_default_activation_function", None)
    path = str(since_6 or since_4 or before or "Sigmoid")
    name = path.rpartition(".")[2]
    if name not in ("Sigmoid", "Identity"):
        raise InvalidSettings(f"got the activation {path}, expected Sigmoid or Identity @ activation_fn")
    return name == "Sigmoid"
