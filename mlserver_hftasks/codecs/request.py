"""A V2 request as a call: items by input name, parameters by name, the outputs wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson
from mlserver.types import InferenceRequest, Parameters, RequestInput

from mlserver_hftasks.codecs.content import Decoded, decode_tensor, is_content_type
from mlserver_hftasks.codecs.envelope import check_counts, check_layout, check_names
from mlserver_hftasks.errors import InvalidRequest, did_you_mean

SCALAR_NAME = "args"
"""The input whose one element is an item by itself, as an argument of the pipeline would be."""

STREAMED = "hftasks_streamed"
"""The request parameter that marks what was sent to stream and goes to a worker, which cannot."""

PROTOCOL_PARAMETERS = frozenset(
    {
        STREAMED,
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

EXPLAIN = "explain"
"""The parameter, or input, that asks for explanations beside the answer; also the mode of them alone."""
INFER = "infer"
MODE = "mode"
"""The request parameter that says which of the two a request is for, whatever the setting says."""


@dataclass(frozen=True, slots=True)
class Names:
    """What names mean to a task: input names and aliases to the input's own name, and parameters."""

    inputs: dict[str, str]
    parameters: frozenset[str]
    lists: frozenset[str]
    """The parameters that may be lists; of the others a tensor of one element is the element."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What a request says of explanations; None where it says nothing."""

    mode: str | None
    options: Any
    """As the client wrote them, see `ExplainOptions.read`."""


@dataclass(frozen=True, slots=True)
class Call:
    """What a client asks for, decoded but not checked against the task."""

    inputs: dict[str, list[Any]]
    parameters: dict[str, Any]
    scalar: bool
    """Whether the one item came by itself, not as a list of one."""
    outputs: tuple[str, ...]
    """Names of the outputs wanted; none: the task's result as JSON."""


def decode_request(request: InferenceRequest, names: Names) -> Call:
    """Decode every tensor and parameter of the request. Raises `InvalidRequest`."""
    check_counts(len(request.inputs), len(request.outputs or ()))  # gRPC messages come unchecked
    check_names(tensor.name for tensor in [*request.inputs, *(request.outputs or ())])
    default = request.parameters.content_type if request.parameters else None
    default = default if is_content_type(default) else None
    inputs: dict[str, list[Any]] = {}
    parameters = _request_parameters(request, names)
    scalar = False
    for tensor in {tensor.name: tensor for tensor in request.inputs}.values():
        own_name = names.inputs.get(tensor.name) or _known(tensor.name, names)
        check_layout(tensor.shape, tensor.datatype, tensor.name)
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
    outputs = tuple(dict.fromkeys(output.name for output in request.outputs or ()))
    return Call(inputs, parameters, scalar, outputs)


def split_request(request: InferenceRequest) -> tuple[InferenceRequest, Wish]:
    """The request without what it says of explanations, and that. Raises `InvalidRequest`."""
    extra = dict((request.parameters.model_extra if request.parameters else None) or {})
    tensors = [tensor for tensor in request.inputs if tensor.name == EXPLAIN]
    if not tensors and not {MODE, EXPLAIN} & set(extra):
        return request, Wish(None, None)
    mode, options = extra.pop(MODE, None), extra.pop(EXPLAIN, None)
    if mode not in (None, INFER, EXPLAIN):
        raise InvalidRequest(f"got {mode!r:.40}, expected {INFER} or {EXPLAIN} @ {MODE}")
    for tensor in tensors:
        options = _one_value(tensor)
    rest = request.model_copy(
        update={
            "parameters": request.parameters and Parameters(**_protocol_fields(request.parameters), **extra),
            "inputs": [tensor for tensor in request.inputs if tensor.name != EXPLAIN],
        }
    )
    return rest, Wish(mode, options)


def _protocol_fields(parameters: Parameters) -> dict[str, Any]:
    return {name: getattr(parameters, name) for name in Parameters.model_fields}


def _one_value(tensor: RequestInput) -> Any:
    check_layout(tensor.shape, tensor.datatype, tensor.name)
    return _only_item(tensor, decode_tensor(tensor))


def _items(decoded: Decoded) -> tuple[list[Any], bool]:
    """The items of an input, and whether it is one by itself; a JSON list is a list of items."""
    if isinstance(decoded.value, list):
        return decoded.value, False
    return [decoded.value], True


def size_of(request: InferenceRequest, most: int) -> int:
    """About how many characters the request brings, which is what decoding costs; `most` as below."""
    extra = (request.parameters.model_extra if request.parameters else None) or {}
    return count_characters(
        [extra, [getattr(tensor.data, "root", tensor.data) for tensor in request.inputs]], most
    )


def count_characters(value: Any, most: int) -> int:
    """About how many characters are in a value, however nested; stops to count beyond `most`."""
    count, pending = 0, [value]
    while pending and count <= most:
        value = pending.pop()
        count += len(value) + 1 if isinstance(value, str | bytes) else 8
        if isinstance(value, dict):
            pending.extend(value.values())
        elif isinstance(value, list | tuple):
            if len(value) > most:
                return len(value)
            pending.extend(value)
    return count


def _request_parameters(request: InferenceRequest, names: Names) -> dict[str, Any]:
    extra = (request.parameters.model_extra if request.parameters else None) or {}
    check_names(extra)
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
    return _only_item(tensor, decoded)


def _only_item(tensor: RequestInput, decoded: Decoded) -> Any:
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
