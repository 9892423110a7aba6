"""The V1 protocol in TorchServe's form: instances in, `{"explanations": [...]}` out.

An instance is a text by itself, `{"text": ..., "target": ...}` or `{"question": ..., "context": ...}`. What
else it holds are parameters, as in a V2 request; instances that agree in them become one V2 request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from mlserver.types import InferenceRequest, InferenceResponse, Parameters, RequestInput, RequestOutput

from mlserver_hftasks.codecs.envelope import check_type
from mlserver_hftasks.codecs.request import PROTOCOL_PARAMETERS
from mlserver_hftasks.errors import InvalidRequest, did_you_mean

INPUTS = {
    "text": "args",
    "data": "args",
    "text_pair": "text_pair",
    "question": "question",
    "context": "context",
    "messages": "messages",
}
"""Keys of an instance that are inputs, and the names of those in a V2 request."""
PAIRED = {**INPUTS, "text": "text"}
"""The same where the instance has a second text."""
BODY_KEYS = ("instances", "parameters")
MAX_INSTANCES = 1024
MAX_REQUESTS = 64
"""Most V2 requests that the instances of one body may become."""


@dataclass(frozen=True, slots=True)
class Group:
    """One V2 request, and which instances it answers."""

    request: InferenceRequest
    indices: tuple[int, ...]


def requests_of(body: bytes, output: str) -> list[Group]:
    """The V2 requests for a body; each asks for that output. Raises `InvalidRequest`."""
    content = _body(body)
    check_type(content.get("parameters"), dict, "parameters")
    try:
        return _groups(content["instances"], content.get("parameters") or {}, output)
    except (orjson.JSONEncodeError, RecursionError):  # orjson reads more levels than it writes
        raise InvalidRequest("a value nested too deeply, expected a few levels @ instances") from None


def encode_explanations(groups: Sequence[Group], answers: Sequence[InferenceResponse]) -> bytes:
    """The body of the answer: the JSON texts of each answer's one output, in the order of the instances."""
    ordered: dict[int, orjson.Fragment] = {}
    for group, answer in zip(groups, answers, strict=True):
        data = answer.outputs[0].data
        elements = getattr(data, "root", data)
        ordered.update(
            (index, orjson.Fragment(element)) for index, element in zip(group.indices, elements, strict=True)
        )
    return orjson.dumps({"explanations": [ordered[index] for index in sorted(ordered)]})


def _body(body: bytes) -> dict[str, Any]:
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"invalid JSON ({error}), expected a V1 request @ body") from None
    if not isinstance(content, dict) or not isinstance(content.get("instances"), list):
        raise InvalidRequest("no list of instances, expected a V1 request @ instances")
    for name in content:
        if name not in BODY_KEYS:
            raise InvalidRequest(f"unknown key '{name:.40}', {did_you_mean(name, BODY_KEYS)} @ body")
    if not 1 <= len(content["instances"]) <= MAX_INSTANCES:
        raise InvalidRequest(
            f"{len(content['instances'])} instances, expected 1..{MAX_INSTANCES} @ instances"
        )
    return content


def _groups(instances: Sequence[Any], common: Mapping[str, Any], output: str) -> list[Group]:
    grouped: dict[bytes, tuple[dict[str, list[Any]], dict[str, Any], list[int]]] = {}
    for index, instance in enumerate(instances):
        inputs, parameters = _split(instance, f"instances[{index}]")
        key = orjson.dumps([sorted(inputs), parameters], option=orjson.OPT_SORT_KEYS)
        columns, _, indices = grouped.setdefault(key, ({name: [] for name in inputs}, parameters, []))
        for name, value in inputs.items():
            columns[name].append(value)
        indices.append(index)
    if len(grouped) > MAX_REQUESTS:
        raise InvalidRequest(
            f"instances that differ in {len(grouped)} ways, expected at most {MAX_REQUESTS}: send several "
            "requests @ instances"
        )
    return [
        Group(_request(columns, {**common, **parameters}, output), tuple(indices))
        for columns, parameters, indices in grouped.values()
    ]


def _split(instance: Any, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The inputs of an instance, by their V2 names, and its parameters."""
    if isinstance(instance, str):
        instance = {"text": instance}
    if not isinstance(instance, dict):
        raise InvalidRequest(f"got {instance!r:.60}, expected a text or an object @ {where}")
    names = PAIRED if "text_pair" in instance else INPUTS
    inputs = {names[key]: value for key, value in instance.items() if key in names}
    if not inputs:
        raise InvalidRequest(f"no text and no question, expected one of {', '.join(INPUTS)} @ {where}")
    if len(inputs) < sum(key in names for key in instance):
        raise InvalidRequest(f"got both text and data, expected one of them @ {where}")
    return inputs, {key: value for key, value in instance.items() if key not in names}


def _request(
    columns: Mapping[str, list[Any]], parameters: Mapping[str, Any], output: str
) -> InferenceRequest:
    for name in parameters:
        if name in PROTOCOL_PARAMETERS:
            raise InvalidRequest(f"unknown key '{name}', expected inputs and parameters @ instances")
    return InferenceRequest(
        inputs=[
            RequestInput(
                name=name,
                shape=[len(values)],
                datatype="BYTES",
                data=[orjson.dumps(value) for value in values],
                parameters=Parameters(content_type="hg_jsonlist"),
            )
            for name, values in columns.items()
        ],
        parameters=Parameters(**parameters),
        outputs=[RequestOutput(name=output)],
    )
