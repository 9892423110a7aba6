"""What a task takes and gives, as data: the same lists serve decoding, checking and metadata."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from mlserver_hftasks.errors import InvalidRequest, did_you_mean

Datatype = Literal["BYTES", "FP32", "INT64", "BOOL"]


@dataclass(frozen=True, slots=True)
class InputSpec:
    """A tensor of items. `aliases` are further names that clients may call it by."""

    name: str
    aliases: tuple[str, ...] = ()
    required: bool = True
    description: str = ""


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """A tensor that a client may ask for by name; -1 in `shape` is a size that varies."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...]
    description: str = ""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A typed output: numbers, or an array of str for BYTES."""

    datatype: Datatype
    values: npt.NDArray[Any]


class CheckedModel(BaseModel):
    """What a client sends by name, checked. Frozen, unknown names refused, no boolean counts as a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_is_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and not _takes(cls.model_fields[info.field_name or ""].annotation, bool):
            raise ValueError("no boolean")
        return value


class Parameters(CheckedModel):
    """Parameters that every task takes, each per request. Subclasses add their task's own.

    What a client sends reaches a task through such a model only.
    """

    timeout_ms: float | None = Field(None, gt=0, description="give up after this many milliseconds (504)")


M = TypeVar("M", bound=CheckedModel)


def _takes(annotation: Any, kind: type) -> bool:
    return annotation is kind or any(_takes(part, kind) for part in getattr(annotation, "__args__", ()))


@dataclass(frozen=True, slots=True)
class Signature:
    """Inputs, parameters and typed outputs of one task."""

    inputs: tuple[InputSpec, ...]
    parameters: type[Parameters]
    outputs: tuple[OutputSpec, ...]

    def input_named(self, name: str) -> InputSpec | None:
        """The input of that name or alias."""
        return next((spec for spec in self.inputs if name == spec.name or name in spec.aliases), None)

    def output_named(self, name: str) -> OutputSpec:
        """The typed output of that name. Raises `InvalidRequest` if there is none."""
        for spec in self.outputs:
            if spec.name == name:
                return spec
        known = [spec.name for spec in self.outputs]
        raise InvalidRequest(f"unknown output '{name}', {did_you_mean(name, [*known, 'output'])} @ outputs")

    def parse(self, values: dict[str, Any]) -> Parameters:
        """The checked parameters. Raises `InvalidRequest` naming the first that is wrong."""
        defaults: Parameters | None = None if values else _defaults(self.parameters)
        return defaults or validated(self.parameters, values, self.known_names())

    def known_names(self) -> list[str]:
        """Every name that an input tensor may have."""
        names = [name for spec in self.inputs for name in (spec.name, *spec.aliases)]
        return names + list(self.parameters.model_fields)


def validated(
    kind: type[M],
    values: dict[str, Any],
    known: Sequence[str],
    *,
    what: str = "input or parameter",
    where: str = "",
) -> M:
    """The checked model of the values, which came as `where`.

    Raises `InvalidRequest` naming the first that is wrong; `known` names help with one that is unknown.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        message, place = _explain(error, known, what)
        raise InvalidRequest(f"{message} @ {where}.{place}" if where else f"{message} @ {place}") from None


@cache
def _defaults(kind: type[M]) -> M | None:
    """What most requests ask for, frozen, so that they may share it; None if a value is required."""
    try:
        return kind()
    except ValidationError:
        return None


def _explain(error: ValidationError, known: Sequence[str], what: str) -> tuple[str, str]:
    """What is wrong and what was expected, and where."""
    errors = error.errors(include_url=False, include_context=False)
    first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
    name = str(first["loc"][0]) if first["loc"] else "parameters"
    where = ".".join(str(part) for part in first["loc"] if not _is_type_name(part)) or name
    if first["type"] == "extra_forbidden":
        return f"unknown {what} '{name}', {did_you_mean(name, known)}", where
    if first["type"] == "missing":
        return f"no {name}, but it is required", where
    message = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return f"got {_shown(first['input'])}, expected: {message[0].lower()}{message[1:]}", where


def _is_type_name(part: int | str) -> bool:
    """Whether pydantic put the name of a union's member into the location."""
    return isinstance(part, str) and (part in {"str", "int", "float", "bool"} or "[" in part)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def padded_tensor(
    datatype: Datatype, rows: Sequence[Sequence[Any]], fill: Any, width: int | None = None
) -> Tensor:
    """Ragged rows as one tensor [n, width], short rows filled up; `width` defaults to the longest."""
    width = max((len(row) for row in rows), default=0) if width is None else width
    dtype = {"BYTES": np.object_, "FP32": np.float32, "INT64": np.int64, "BOOL": np.bool_}[datatype]
    values: npt.NDArray[Any] = np.full((len(rows), width), fill, dtype=dtype)
    for index, row in enumerate(rows):
        values[index, : len(row)] = row
    return Tensor(datatype, values)
