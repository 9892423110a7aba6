"""What differs between two answers to one request."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tests.compat.replay import Answer, Output

TOLERANCE = 1e-4
"""Between numbers."""
SAID_OF_GENERATION = frozenset({"finish_reason", "prompt_tokens", "generated_tokens"})
"""Parameters of a response that only ours has, which takes nothing away."""


@dataclass(frozen=True, slots=True)
class Difference:
    """`kind` is the name that `docs/compatibility.md` knows it by."""

    kind: str
    theirs: str
    ours: str
    where: str = ""


def differences(theirs: Answer, ours: Answer) -> list[Difference]:
    """All that differs, but at most one of each kind."""
    found = list(_of_status(theirs, ours))
    if not found and theirs.error is None:
        found = [
            *_of_values(dict(theirs.envelope), _comparable(ours), "response"),
            *_of_outputs(theirs, ours),
        ]
    return list({difference.kind: difference for difference in reversed(found)}.values())


def _comparable(ours: Answer) -> dict[str, Any]:
    said = ours.envelope.get("parameters", {})
    kept = {name: value for name, value in said.items() if name not in SAID_OF_GENERATION}
    return {**ours.envelope, "parameters": kept} if "parameters" in ours.envelope else dict(ours.envelope)


def _of_status(theirs: Answer, ours: Answer) -> Iterator[Difference]:
    """Errors: who refuses, and with which status. Messages are not compared."""
    kinds = {(False, True): "ours refuses", (True, False): "theirs fails", (True, True): "status"}
    if theirs.status != ours.status:
        kind = kinds[theirs.error is not None, ours.error is not None]
        yield Difference(kind, *(f"{each.status} {each.error or ''}".strip() for each in (theirs, ours)))


def _of_outputs(theirs: Answer, ours: Answer) -> Iterator[Difference]:
    names = [[output.name for output in answer.outputs] for answer in (theirs, ours)]
    if names[0] != names[1]:
        yield Difference("output names", *map(str, names))
        return
    for one, other in zip(theirs.outputs, ours.outputs, strict=True):
        yield from _of_output(one, other)


def _of_output(theirs: Output, ours: Output) -> Iterator[Difference]:
    for kind in ("datatype", "shape", "parameters"):
        one, other = getattr(theirs, kind), getattr(ours, kind)
        if one != other:
            yield Difference(kind, str(one), str(other), theirs.name)
    yield from _of_values(_parsed(theirs), _parsed(ours), theirs.name)


def _parsed(output: Output) -> Sequence[Any]:
    """The values that the JSON texts stand for: spaces and escapes in the texts do not count."""
    is_json = output.parameters.get("content_type") == "hg_jsonlist"
    return [json.loads(element) for element in output.data] if is_json else list(output.data)


def _of_values(theirs: Any, ours: Any, where: str) -> Iterator[Difference]:
    if type(theirs) is not type(ours):
        yield Difference("types", _shown(theirs), _shown(ours), where)
    elif isinstance(theirs, dict):
        yield from _of_dicts(theirs, ours, where)
    elif isinstance(theirs, list):
        yield from _of_lists(theirs, ours, where)
    elif isinstance(theirs, float):
        if not abs(theirs - ours) <= TOLERANCE:
            yield Difference("numbers", str(theirs), str(ours), where)
    elif theirs != ours:
        yield Difference("values", _shown(theirs), _shown(ours), where)


def _of_dicts(theirs: dict[str, Any], ours: dict[str, Any], where: str) -> Iterator[Difference]:
    if list(theirs) != list(ours):
        yield Difference("keys", str(list(theirs)), str(list(ours)), where)
    for key in theirs.keys() & ours.keys():
        yield from _of_values(theirs[key], ours[key], f"{where}.{key}")


def _of_lists(theirs: list[Any], ours: list[Any], where: str) -> Iterator[Difference]:
    if len(theirs) != len(ours):
        yield Difference("lengths", f"{len(theirs)}: {_shown(theirs)}", f"{len(ours)}: {_shown(ours)}", where)
        return
    for index, (one, other) in enumerate(zip(theirs, ours, strict=True)):
        yield from _of_values(one, other, f"{where}[{index}]")


def _shown(value: Any) -> str:
    return repr(value)[:200]
