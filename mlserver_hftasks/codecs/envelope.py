"""The form of a V2 inference request, before anything in it is decoded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mlserver.types import Datatype

from mlserver_hftasks.errors import InvalidRequest, did_you_mean

DATATYPES = frozenset(member.value for member in Datatype)
MAX_TENSORS = 64
"""Most inputs of a request, and most outputs that it names."""
MAX_DIMENSIONS = 16
MAX_SIZE = 2**31
MAX_ID_CHARS = 256
MAX_NAME_CHARS = 128
_JSON_NAMES: dict[type, str] = {str: "a text", dict: "an object", list: "a list"}


def check_envelope(content: Any) -> None:
    """Raise `InvalidRequest` unless the JSON has the form of a V2 inference request."""
    if not isinstance(content, dict) or not isinstance(content.get("inputs"), list):
        raise InvalidRequest("no list of inputs, expected a V2 inference request @ inputs")
    check_type(content.get("outputs"), list, "outputs")
    outputs = content.get("outputs") or ()
    check_counts(len(content["inputs"]), len(outputs))
    check_id(content.get("id"))
    _check_parameters(content.get("parameters"), "parameters")
    for index, output in enumerate(outputs):
        if not isinstance(output, dict) or not isinstance(output.get("name"), str):
            raise InvalidRequest(f"got {output!r:.60}, expected an output with a name @ outputs[{index}]")
        _check_parameters(output.get("parameters"), f"outputs[{index}].parameters")
    for index, tensor in enumerate(content["inputs"]):
        _check_tensor(tensor, f"inputs[{index}]")


def check_counts(inputs: int, outputs: int) -> None:
    """Raise `InvalidRequest` for more tensors than any task takes or gives."""
    for name, count in (("inputs", inputs), ("outputs", outputs)):
        if count > MAX_TENSORS:
            raise InvalidRequest(f"{count} {name}, expected at most {MAX_TENSORS} @ {name}")


def check_names(names: Iterable[str]) -> None:
    """Raise `InvalidRequest` for a name that is longer than any that means something."""
    for name in names:
        if len(name) > MAX_NAME_CHARS:
            raise InvalidRequest(
                f"a name of {len(name)} characters, expected at most {MAX_NAME_CHARS} @ {name[:20]!r}"
            )


def check_id(request_id: Any) -> None:
    """Raise `InvalidRequest` unless the id can go into a header of the answer, where MLServer puts it."""
    check_type(request_id, str, "id")
    if request_id and (
        len(request_id) > MAX_ID_CHARS or not (request_id.isascii() and request_id.isprintable())
    ):
        raise InvalidRequest(
            f"got an id of {len(request_id)} characters, expected up to {MAX_ID_CHARS} printable ASCII ones "
            "@ id"
        )


def check_type(value: Any, kind: type, where: str) -> None:
    """Raise `InvalidRequest` unless the value is null or of that kind."""
    if value is not None and not isinstance(value, kind):
        raise InvalidRequest(
            f"got {type(value).__name__} {value!r:.60}, expected {_JSON_NAMES[kind]} @ {where}"
        )


def check_layout(shape: Any, datatype: Any, where: str) -> None:
    """Raise `InvalidRequest` unless the shape is a list of sizes and the datatype one of V2's."""
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_size, shape)):
        got = f"{len(shape)} dimensions" if isinstance(shape, list) and len(shape) > 4 else f"{shape!r:.60}"
        raise InvalidRequest(f"got the shape {got}, expected a list of sizes @ {where}.shape")
    got = str(getattr(datatype, "value", datatype))
    if got not in DATATYPES:
        raise InvalidRequest(
            f"got the datatype {got!r:.40}, {did_you_mean(got, DATATYPES)} @ {where}.datatype"
        )


def _is_size(size: Any) -> bool:
    return type(size) is int and -1 <= size < MAX_SIZE


def _check_tensor(tensor: Any, where: str) -> None:
    if not isinstance(tensor, dict) or not isinstance(tensor.get("name"), str):
        raise InvalidRequest(f"a tensor without a name, expected name, shape, datatype and data @ {where}")
    check_layout(tensor.get("shape"), tensor.get("datatype"), where)
    if tensor.get("data") is None:
        raise InvalidRequest(f"a tensor without data, expected a list of elements @ {where}.data")
    _check_parameters(tensor.get("parameters"), f"{where}.parameters")


def _check_parameters(parameters: Any, where: str) -> None:
    check_type(parameters, dict, where)
    check_type((parameters or {}).get("content_type"), str, f"{where}.content_type")
    check_type((parameters or {}).get("headers"), dict, f"{where}.headers")
