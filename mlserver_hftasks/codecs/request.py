"""A V2 request as a call: items by input name, parameters by name, the outputs wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson
from mlserver.types import Datatype, InferenceRequest, RequestInput

from mlserver_hftasks.codecs.content import Decoded, decode_tensor, is_content_type
from mlserver_hftasks.errors import InvalidRequest, did_you_mean

SCALAR_NAME = "args"
"""The input whose one element is an item by itself, as an argument of the pipeline would be."""

PROTOCOL_PARAMETERS = frozenset(
    {
        "content_type",
        "headers",
        "sequence_id",
        "sequence_start",
        "sequence_end",
        "priority",
        "timeout",
        "binary_data_output",
    }
)
"""Request parameters that belong to the protocol and its clients, not to a task."""


_JSON_NAMES: dict[type, str] = {str: "a text", dict: "an object", list: "a list"}

DATATYPES = frozenset(member.value for member in Datatype)


@dataclass(frozen=True, slots=True)
class Names:
    """What names mean to a task: input names and aliases to the input's own name, and parameters."""

    inputs: dict[str, str]
    parameters: frozenset[str]
    lists: frozenset[str]
    """The parameters that may be lists; of the others a tensor of one element is the element."""


@dataclass(frozen=True, slots=True)
class Call:
    """What a client asks for, decoded but not checked against the task."""

    inputs: dict[str, list[Any]]
    parameters: dict[str, Any]
    scalar: bool
    """Whether the one item came by itself, not as a list of one."""
    outputs: tuple[str, ...]
    """Names of the outputs wanted; none: the task's result as JSON."""


def check_envelope(content: Any) -> None:
    """Raise `InvalidRequest` unless the JSON has the form of a V2 inference request."""
    if not isinstance(content, dict) or not isinstance(content.get("inputs"), list):
        raise InvalidRequest("no list of inputs, expected a V2 inference request @ inputs")
    _check_type(content.get("id"), str, "id")
    _check_parameters(content.get("parameters"), "parameters")
    _check_type(content.get("outputs"), list, "outputs")
    for index, output in enumerate(content.get("outputs") or ()):
        if not isinstance(output, dict) or not isinstance(output.get("name"), str):
            raise InvalidRequest(f"got {output!r:.60}, expected an output with a name @ outputs[{index}]")
        _check_parameters(output.get("parameters"), f"outputs[{index}].parameters")
    for index, tensor in enumerate(content["inputs"]):
        _check_tensor(tensor, f"inputs[{index}]")


def _check_type(value: Any, kind: type, where: str) -> None:
    if value is not None and not isinstance(value, kind):
        raise InvalidRequest(
            f"got {type(value).__name__} {value!r:.60}, expected {_JSON_NAMES[kind]} @ {where}"
        )


def _check_tensor(tensor: Any, where: str) -> None:
    if not isinstance(tensor, dict) or not isinstance(tensor.get("name"), str):
        raise InvalidRequest(f"a tensor without a name, expected name, shape, datatype and data @ {where}")
    _check_layout(tensor.get("shape"), tensor.get("datatype"), where)
    if tensor.get("data") is None:
        raise InvalidRequest(f"a tensor without data, expected a list of elements @ {where}.data")
    _check_parameters(tensor.get("parameters"), f"{where}.parameters")


def _check_layout(shape: Any, datatype: Any, where: str) -> None:
    if not isinstance(shape, list) or not all(type(size) is int and size >= -1 for size in shape):
        raise InvalidRequest(f"got the shape {shape!r:.60}, expected a list of sizes @ {where}.shape")
    got = str(getattr(datatype, "value", datatype))
    if got not in DATATYPES:
        raise InvalidRequest(
            f"got the datatype {got!r:.40}, {did_you_mean(got, DATATYPES)} @ {where}.datatype"
        )


def _check_parameters(parameters: Any, where: str) -> None:
    _check_type(parameters, dict, where)
    _check_type((parameters or {}).get("content_type"), str, f"{where}.content_type")
    _check_type((parameters or {}).get("headers"), dict, f"{where}.headers")


def decode_request(request: InferenceRequest, names: Names) -> Call:
    """Decode every tensor and parameter of the request. Raises `InvalidRequest`."""
    default = request.parameters.content_type if request.parameters else None
    default = default if is_content_type(default) else None
    inputs: dict[str, list[Any]] = {}
    parameters = _request_parameters(request, names)
    scalar = False
    for tensor in {tensor.name: tensor for tensor in request.inputs}.values():
        own_name = names.inputs.get(tensor.name) or _known(tensor.name, names)
        _check_layout(tensor.shape, tensor.datatype, tensor.name)  # gRPC messages come unchecked
        decoded = decode_tensor(tensor, default)
        if tensor.name not in names.inputs:
            parameters[own_name] = _parameter(tensor, decoded, names)
            continue
        if own_name in inputs:
            raise InvalidRequest(f"the input '{own_name}' came twice, expected it once @ {tensor.name}")
        inputs[own_name], by_itself = _items(decoded)
        scalar = scalar or by_itself or tensor.name == SCALAR_NAME
    if not inputs:
        expected = " or ".join(sorted(set(names.inputs)))
        raise InvalidRequest(f"no input, expected {expected} @ inputs")
    scalar = scalar and all(len(items) == 1 for items in inputs.values())
    outputs = tuple(output.name for output in request.outputs or ())
    return Call(inputs, parameters, scalar, outputs)


def _items(decoded: Decoded) -> tuple[list[Any], bool]:
    """The items of an input, and whether it is one by itself; a JSON list is a list of items."""
    if isinstance(decoded.value, list):
        return decoded.value, False
    return [decoded.value], True


def size_of(request: InferenceRequest) -> int:
    """About how many characters the request brings: what decoding it will cost."""
    return sum(
        sum(len(element) if isinstance(element, str | bytes) else 8 for element in tensor.data)
        if isinstance(tensor.data.root, list)
        else len(str(tensor.data.root))
        for tensor in request.inputs
    )


def _request_parameters(request: InferenceRequest, names: Names) -> dict[str, Any]:
    extra = (request.parameters.model_extra if request.parameters else None) or {}
    return {
        _known(name, names): _from_json(value) if name in names.lists else value
        for name, value in extra.items()
        if name not in PROTOCOL_PARAMETERS
    }


def _known(name: str, names: Names) -> str:
    if name not in names.parameters:
        known = [*names.inputs, *names.parameters]
        raise InvalidRequest(f"unknown input or parameter '{name}', {did_you_mean(name, known)} @ {name}")
    return name


def _parameter(tensor: RequestInput, decoded: Decoded, names: Names) -> Any:
    if tensor.name in names.lists:
        return decoded.value
    if len(decoded.items) != 1:
        raise InvalidRequest(f"{len(decoded.items)} values, expected one @ {tensor.name}")
    return decoded.items[0]


def _from_json(value: Any) -> Any:
    """A list or an object that had to travel as a string, since gRPC has no list parameters."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            return orjson.loads(value)
        except orjson.JSONDecodeError:
            return value
    return value
