"""What a client may ask of an explanation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import orjson
from pydantic import BeforeValidator, Field

from mlserver_hftasks.errors import InvalidRequest
from mlserver_hftasks.tasks.signature import CheckedModel, validated

Method = Literal[
    "auto",
    "integrated-gradients",
    "integrated-gradients-fixed",
    "input-x-gradient",
    "occlusion",
    "permutation-shap",
]
Baseline = Literal["auto", "mask", "mean", "pad", "zero"]

MOST_EVALUATIONS = 10_000
"""Most evaluations of the model that one text may ask for."""


def _as_name(value: Any) -> Any:
    """A name in any case, with hyphens or underscores."""
    return value.lower().replace("_", "-") if isinstance(value, str) else value


def cannot_explain(method: str, methods: Sequence[str], task_name: str) -> InvalidRequest:
    """The error of a method that is none of those that a model can be explained by."""
    expected = f"expected one of {', '.join(methods)}"
    if not methods:
        expected = f"of {task_name} there is nothing to explain"
    return InvalidRequest(
        f"got {method}, which this model cannot be explained by, {expected} @ explain.method"
    )


class ExplainOptions(CheckedModel):
    """The options of one request, the same for all its items. Frozen, unknown names refused."""

    method: Annotated[Method, BeforeValidator(_as_name)] = Field(
        "auto", description="how to attribute; auto: integrated-gradients, permutation-shap without gradients"
    )
    target: str | int | None = Field(
        None,
        description="what to explain: a label or its id; null or `predicted`: what the model answers. Of "
        "fill-mask a token, of token-classification a label of entities, of sentence-embedding the text to "
        "be similar to, of text-generation the continuation",
    )
    per_token: bool = Field(
        False, description="of tasks that answer with text each token of the answer, in place of the whole"
    )
    baseline: Annotated[Baseline, BeforeValidator(_as_name)] = Field(
        "auto",
        description="what stands for an absent token; auto: the mask token, or the mean embedding where "
        "there is none. Special tokens are never absent",
    )
    tolerance: float = Field(
        0.05, ge=1e-6, le=1, description="converged when the error is below this share of the attributions"
    )
    max_evals: int | None = Field(
        None,
        ge=2,
        le=MOST_EVALUATIONS,
        description="most evaluations of the model for one text; of integrated gradients never more than 512",
    )
    deadline_ms: float | None = Field(
        None, gt=0, description="answer with what there is after this many milliseconds"
    )
    level: Literal["token", "word"] = Field("token", description="attribute to tokens or to whole words")
    top_k: int | None = Field(
        None, ge=1, description="also list so many of the weightiest tokens in the JSON"
    )
    html: bool = Field(False, description="also draw a heat map")

    @classmethod
    def read(cls, value: Any, where: str = "explain") -> ExplainOptions:
        """From what clients send: true, a method's name, an object, or an object as JSON text.

        Raises `InvalidRequest` naming the first option that is wrong.
        """
        if isinstance(value, str) and value.lstrip().startswith("{"):
            try:
                value = orjson.loads(value)
            except orjson.JSONDecodeError as error:
                raise InvalidRequest(
                    f"got invalid JSON ({error}), expected an object of options @ {where}"
                ) from None
        elif isinstance(value, str) and value.lower() != "true":
            value = {"method": value}
        elif value is None or value is True or isinstance(value, str):
            value = {}
        if not isinstance(value, Mapping):
            raise InvalidRequest(
                f"got {value!r:.60}, expected true, the name of a method, or an object of options @ {where}"
            )
        return validated(cls, dict(value), list(cls.model_fields), what="option", where=where)
