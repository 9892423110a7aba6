"""sentence-embedding: one vector per text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import Field

from mlserver_hftasks.backends.base import Head, Level
from mlserver_hftasks.engine.rows import FloatArray, Row
from mlserver_hftasks.errors import InvalidRequest, did_you_mean
from mlserver_hftasks.tasks.base import Answered, Example, ModelFacts, Task
from mlserver_hftasks.tasks.encoder import Encoding, Truncation
from mlserver_hftasks.tasks.sentence_config import Dense, PoolingMode, read_sentence_config
from mlserver_hftasks.tasks.signature import OutputSpec, Signature, Tensor
from mlserver_hftasks.tasks.text import TEXTS, TextParameters, truncation_of

SMALLEST_NORM = 1e-12
"""A vector shorter than this is not made longer by normalisation."""


class SentenceEmbeddingParameters(TextParameters):
    """Parameters of sentence-transformers' `encode`; null leaves the choice to the model's files."""

    pooling: PoolingMode | None = Field(None, description="from token states to one vector")
    normalize: bool | None = Field(None, description="to unit length")
    truncate_dim: int | None = Field(
        None, ge=1, description="keep only the first so many numbers (Matryoshka)"
    )
    prompt: str | None = Field(None, description="goes before each text")
    prompt_name: str | None = Field(None, description="one of the prompts in the model's files")


class SentenceEmbedding(Task[SentenceEmbeddingParameters]):
    """Results equal those of sentence-transformers, whose files beside the model say how to pool.

    With `truncate_dim`, normalisation comes after the cut, so that unit length holds of what is sent.
    """

    name = "sentence-embedding"
    head = Head("AutoModel", {"last_hidden_state": Level.TOKEN})
    signature = Signature(
        inputs=(TEXTS,),
        parameters=SentenceEmbeddingParameters,
        outputs=(OutputSpec("embedding", "FP32", (-1, -1), "[n, hidden]"),),
    )

    def __init__(self, model: ModelFacts) -> None:
        super().__init__(model)
        self._config = read_sentence_config(model.folder)
        self._prompts = {"query": "", "document": "", **self._config.prompts}
        """sentence-transformers knows these two names with every model."""

    def examples(
        self, inputs: Mapping[str, Sequence[Any]], parameters: SentenceEmbeddingParameters
    ) -> list[Example]:
        """One row per text."""
        self._check_dimension(parameters.truncate_dim)
        prompt = self._prompt(parameters)
        texts = [prompt + text for text in self.texts(inputs.get("inputs", ()), "inputs")]
        if self._config.lower_case:
            texts = [text.lower() for text in texts]
        encodings = self.model.encoder.encode(texts, self._truncation(parameters))
        pooling = self.pooling(parameters)
        return [Example((self._row(encoding, pooling),)) for encoding in encodings]

    def postprocess(self, answered: Answered, parameters: SentenceEmbeddingParameters) -> FloatArray:
        """[hidden], or what `truncate_dim` leaves of it."""
        states = answered.outputs[0]["last_hidden_state"]
        vector: FloatArray
        pooling = self.pooling(parameters)
        if pooling == "mean":
            vector = states.mean(axis=0)
        elif pooling == "max":
            vector = states.max(axis=0)
        else:
            vector = states[0]  # the one position that the row selects
        for layer in self.dense:
            vector = layer(vector)
        vector = vector[: parameters.truncate_dim]
        if self._config.normalize if parameters.normalize is None else parameters.normalize:
            vector = vector / max(float(np.linalg.norm(vector)), SMALLEST_NORM)
        return vector

    def shaped(
        self, results: list[Any], parameters: SentenceEmbeddingParameters, *, scalar: bool
    ) -> list[Any]:
        """One element per text, each a vector."""
        return results

    def tensors(
        self, names: Sequence[str], answered: Sequence[Answered], parameters: SentenceEmbeddingParameters
    ) -> Mapping[str, Tensor]:
        """`embedding` [n, hidden]."""
        return {
            name: Tensor("FP32", np.stack([self.postprocess(item, parameters) for item in answered]))
            for name in names
        }

    @property
    def dense(self) -> tuple[Dense, ...]:
        """The layers after pooling."""
        return self._config.dense

    def pooling(self, parameters: SentenceEmbeddingParameters) -> PoolingMode:
        """How a request pools."""
        return parameters.pooling or self._config.pooling

    def _row(self, encoding: Encoding, pooling: PoolingMode) -> Row:
        """A row that has the model give only the states that the pooling reads."""
        if pooling in ("mean", "max"):
            return self.model.encoder.row(encoding)
        position = 0 if pooling == "cls" else len(encoding.ids) - 1
        return self.model.encoder.row(
            encoding, key=("select", 1), select=np.array([position], dtype=np.int64)
        )

    def _truncation(self, parameters: SentenceEmbeddingParameters) -> Truncation | None:
        """Texts are cut unless client or setting say otherwise, to the length in the model's files."""
        truncation = truncation_of(self.model, parameters.truncation, parameters.max_length, default=True)
        usual = self._config.max_tokens
        if truncation is None or parameters.max_length is not None or usual is None:
            return truncation
        return replace(truncation, max_length=min(truncation.max_length, usual))

    def _prompt(self, parameters: SentenceEmbeddingParameters) -> str:
        if parameters.prompt is not None and parameters.prompt_name is not None:
            raise InvalidRequest("got both prompt and prompt_name, expected one of them @ prompt_name")
        if parameters.prompt is not None:
            return self.text(parameters.prompt, "prompt")
        name = parameters.prompt_name
        if name is None:
            return self._prompts.get(self._config.default_prompt_name or "", "")
        if name not in self._prompts:
            raise InvalidRequest(
                f"unknown prompt '{name}', {did_you_mean(name, self._prompts)} @ prompt_name"
            )
        return self._prompts[name]

    def _check_dimension(self, wanted: int | None) -> None:
        dense = self._config.dense
        most = len(dense[-1].weight) if dense else getattr(self.model.config, "hidden_size", None)
        if wanted is not None and most is not None and wanted > most:
            raise InvalidRequest(f"got {wanted}, expected 1..{most} @ truncate_dim")
