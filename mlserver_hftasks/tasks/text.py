"""What the tasks over one text, or a pair of texts, share: truncation as the client asks for it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from mlserver_hftasks.errors import InvalidRequest
from mlserver_hftasks.tasks.base import ModelFacts
from mlserver_hftasks.tasks.encoder import Strategy, Truncation
from mlserver_hftasks.tasks.signature import InputSpec, Parameters

TruncationChoice = bool | Literal["longest_first", "only_first", "only_second", "do_not_truncate"]

OneOrMore = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
"""A list of texts; a text by itself is a list of one."""

LowerCase = BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value)
"""A name in any case, as transformers takes names of enumerations."""

TEXTS = InputSpec("inputs", ("args", "array_inputs"), description="texts")


class TextParameters(Parameters):
    """Truncation, for tasks that leave it to the client."""

    truncation: TruncationChoice | None = Field(
        None, description="cut texts that are too long: true, or a strategy of transformers"
    )
    max_length: int | None = Field(None, ge=1, description="cut to this many tokens, special ones included")


def truncation_of(
    model: ModelFacts,
    choice: TruncationChoice | None,
    max_length: int | None,
    *,
    default: bool | Strategy = False,
) -> Truncation | None:
    """The truncation that a request asks for: its own choice, else the setting, else the task's default.

    As in transformers, `max_length` alone asks for `longest_first`. Raises `InvalidRequest` if it is over
    what the model takes.
    """
    limit = model.encoder.max_tokens
    if max_length is not None and max_length > limit:
        raise InvalidRequest(f"got {max_length}, expected 1..{limit} @ max_length")
    if choice is None and max_length is not None:
        choice = True
    if choice is None:
        choice = default if model.truncation is None else model.truncation  # type: ignore[assignment]
    if choice is False or choice == "do_not_truncate":
        return None
    strategy: Strategy = "longest_first" if choice is True else choice  # type: ignore[assignment]
    return Truncation(strategy, max_length or limit)
