"""sentence-embedding: how similar a text is to another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlserver_hftasks.errors import InvalidRequest
from mlserver_hftasks.explain.targets.base import Choice, Subject, Targets, target_array
from mlserver_hftasks.tasks.base import Answered, Example
from mlserver_hftasks.tasks.sentence_config import Dense, PoolingMode
from mlserver_hftasks.tasks.sentence_embedding import (
    SMALLEST_NORM,
    SentenceEmbedding,
    SentenceEmbeddingParameters,
)

ACTIVATIONS = {"Identity": lambda values: values, "Tanh": torch.tanh, "ReLU": torch.relu}


@dataclass(frozen=True, slots=True)
class Similarity:
    """The cosine of a row's embedding with a vector of unit length; as `SentenceEmbedding.postprocess`."""

    pooling: PoolingMode
    dense: Sequence[Dense]
    dimension: int | None
    other: Tensor

    def __call__(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """[1]"""
        states = outputs["last_hidden_state"].float()
        if self.pooling == "mean":
            vector = states.mean(dim=0)
        elif self.pooling == "max":
            vector = states.amax(dim=0)
        else:
            vector = states[0]
        for layer in self.dense:
            weight = torch.from_numpy(layer.weight).to(vector)
            vector = weight @ vector
            if layer.bias is not None:
                vector = vector + torch.from_numpy(layer.bias).to(vector)
            vector = ACTIVATIONS[layer.activation](vector)
        vector = vector[: self.dimension]
        cosine: Tensor = (vector @ self.other.to(vector)) / vector.norm().clamp_min(SMALLEST_NORM)
        return cosine[None]


class SentenceEmbeddingTargets(Targets[SentenceEmbedding, SentenceEmbeddingParameters]):
    """The cosine similarity to the text that the client names."""

    def references(self, choice: Choice, parameters: SentenceEmbeddingParameters) -> list[Example]:
        """The other text. Raises `InvalidRequest` if there is none."""
        if not isinstance(choice, str) or not choice:
            raise InvalidRequest(
                f"got {choice!r}, expected a text: its similarity is what is explained @ explain.target"
            )
        return self.task.examples({"inputs": [choice]}, parameters)

    def subject(
        self,
        answered: Answered,
        choice: Choice,
        parameters: SentenceEmbeddingParameters,
        references: Sequence[Answered],
    ) -> Subject:
        """One score."""
        other = torch.from_numpy(self.task.postprocess(references[0], parameters)).float()
        other = other / other.norm().clamp_min(SMALLEST_NORM)
        score = Similarity(self.task.pooling(parameters), self.task.dense, parameters.truncate_dim, other)
        return Subject(answered.example.rows[0], score, target_array([(-1, -1)]), ("similarity",))
