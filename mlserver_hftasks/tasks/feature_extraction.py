"""feature-extraction: the last hidden state of every token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from mlserver_hftasks.backends.base import Head, Level
from mlserver_hftasks.engine.rows import FloatArray
from mlserver_hftasks.errors import InvalidRequest
from mlserver_hftasks.tasks.base import Answered, Example, Task
from mlserver_hftasks.tasks.encoder import Truncation
from mlserver_hftasks.tasks.signature import OutputSpec, Signature, Tensor
from mlserver_hftasks.tasks.text import TEXTS, TextParameters, TruncationChoice, truncation_of


class TokenizeOptions(BaseModel):
    """What `tokenize_kwargs` may hold."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    truncation: TruncationChoice | None = None
    max_length: int | None = Field(None, ge=1)
    padding: bool | Literal["longest", "do_not_pad"] | None = None


class FeatureExtractionParameters(TextParameters):
    """Parameters of `transformers.FeatureExtractionPipeline`."""

    tokenize_kwargs: TokenizeOptions = Field(
        TokenizeOptions(), description="a dict of truncation and max_length; padding has no effect"
    )
    return_tensors: bool | str | None = Field(None, description="accepted, no effect")

    @field_validator("tokenize_kwargs", mode="before")
    @classmethod
    def _known_options(cls, value: Any) -> Any:
        known = set(TokenizeOptions.model_fields)
        if value is None:
            return TokenizeOptions()
        if isinstance(value, dict) and not set(value) <= known:
            raise ValueError(f"no keys but {', '.join(sorted(known))}")
        return value


class FeatureExtraction(Task[FeatureExtractionParameters]):
    """Results equal those of `transformers.FeatureExtractionPipeline`, as arrays instead of lists."""

    name = "feature-extraction"
    head = Head("AutoModel", {"last_hidden_state": Level.TOKEN})
    signature = Signature(
        inputs=(TEXTS,),
        parameters=FeatureExtractionParameters,
        outputs=(
            OutputSpec("last_hidden_state", "FP32", (-1, -1, -1), "[n, longest, hidden], filled up with 0"),
            OutputSpec("num_tokens", "INT64", (-1,), "tokens of each text, special ones included"),
        ),
    )

    def examples(
        self, inputs: Mapping[str, Sequence[Any]], parameters: FeatureExtractionParameters
    ) -> list[Example]:
        """One row per text."""
        texts = self.texts(inputs.get("inputs", ()), "inputs")
        encodings = self.model.encoder.encode(texts, self._truncation(parameters))
        return [Example((self.model.encoder.row(encoding),)) for encoding in encodings]

    def postprocess(self, answered: Answered, parameters: FeatureExtractionParameters) -> FloatArray:
        """[1, tokens, hidden]: the pipeline runs each text as a batch of its own."""
        return answered.outputs[0]["last_hidden_state"][None]

    def shaped(
        self, results: list[Any], parameters: FeatureExtractionParameters, *, scalar: bool
    ) -> list[Any]:
        """One element per text: [1, tokens, hidden], or [tokens, hidden] for a text sent by itself."""
        return list(results[0]) if scalar else results

    def tensors(
        self, names: Sequence[str], answered: Sequence[Answered], parameters: FeatureExtractionParameters
    ) -> Mapping[str, Tensor]:
        """`last_hidden_state` [n, longest, hidden], `num_tokens` [n]."""
        states = [item.outputs[0]["last_hidden_state"] for item in answered]
        counts = np.array([len(state) for state in states], dtype=np.int64)
        made = {"num_tokens": Tensor("INT64", counts)}
        if "last_hidden_state" in names:
            padded = np.zeros((len(states), int(counts.max()), states[0].shape[-1]), dtype=np.float32)
            for index, state in enumerate(states):
                padded[index, : len(state)] = state
            made["last_hidden_state"] = Tensor("FP32", padded)
        return {name: made[name] for name in names}

    def _truncation(self, parameters: FeatureExtractionParameters) -> Truncation | None:
        options = parameters.tokenize_kwargs
        chosen: dict[str, Any] = {}
        for name in ("truncation", "max_length"):
            given = [
                value for value in (getattr(parameters, name), getattr(options, name)) if value is not None
            ]
            if len(given) > 1:
                raise InvalidRequest(f"got {name} twice, expected it once @ tokenize_kwargs.{name}")
            chosen[name] = given[0] if given else None
        return truncation_of(self.model, chosen["truncation"], chosen["max_length"])
