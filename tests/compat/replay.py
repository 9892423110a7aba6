"""The requests of `requests.jsonl`, sent over REST and gRPC."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from tests.server.grpc_client import GrpcClient, unpacked
from tests.server.process import Server
from tests.server.v2 import infer_path

REQUESTS = Path(__file__).with_name("requests.jsonl")
PROTOCOLS = ("rest", "grpc")
"""What a request without `over` is sent by. `grpc` sends data as `raw_input_contents`, as tritonclient
does; there is also `grpc-contents`, with data in the tensors."""


@dataclass(frozen=True, slots=True)
class Case:
    """One request by one protocol. `request` is the body of V2's REST protocol."""

    request_id: str
    protocol: str
    model: str
    version: str | None
    request: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Unique among all cases."""
        return f"{self.request_id}@{self.protocol}"


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor of an answer; BYTES as texts."""

    name: str
    datatype: str
    shape: Sequence[int]
    parameters: Mapping[str, Any]
    data: Sequence[Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back: outputs, or an error's message."""

    status: str
    """The HTTP status, or the name of the gRPC status."""
    error: str | None = None
    envelope: Mapping[str, Any] = field(default_factory=dict)
    """All but the outputs: model_name, model_version, id, parameters."""
    outputs: Sequence[Output] = ()


def cases(path: Path = REQUESTS) -> list[Case]:
    """Every request, once per protocol that it goes by."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    found = [
        Case(line["id"], protocol, line["model"], line.get("version"), line["request"])
        for line in lines
        for protocol in line.get("over", PROTOCOLS)
    ]
    if len({case.name for case in found}) != len(found):
        raise ValueError(f"{path.name}: an id occurs twice")
    return found


class Client:
    """Sends cases to one server."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._grpc = GrpcClient(server.grpc_url)

    def answers(self, all_cases: Sequence[Case]) -> Iterator[Answer]:
        """The answers, in order."""
        for case in all_cases:
            yield self._rest(case) if case.protocol == "rest" else self._over_grpc(case)

    def close(self) -> None:
        """Close the gRPC channel."""
        self._grpc.close()

    def _rest(self, case: Case) -> Answer:
        # a connection each: the incumbent blocks its event loop so long that it drops idle ones
        response = self._server.client.post(
            infer_path(case.model, case.version), json=case.request, headers={"Connection": "close"}
        )
        if response.status_code != 200:
            return Answer(str(response.status_code), response.text)
        body = response.json()
        outputs = [
            Output(each["name"], each["datatype"], each["shape"], each.get("parameters", {}), each["data"])
            for each in body.pop("outputs")
        ]
        return Answer("200", envelope=_envelope(case, body), outputs=outputs)

    def _over_grpc(self, case: Case) -> Answer:
        request = case.request
        try:
            response = self._grpc.infer(
                case.model,
                request["inputs"],
                outputs=[output["name"] for output in request.get("outputs", ())],
                version=case.version,
                request_id=request.get("id", ""),
                raw=case.protocol == "grpc",
                **request.get("parameters", {}),
            )
        except grpc.RpcError as error:
            return Answer(error.code().name, error.details())
        envelope = {name: getattr(response, name) for name in ("model_name", "model_version", "id")}
        envelope["parameters"] = _values(response.parameters)
        raw = response.raw_output_contents
        outputs = [
            Output(
                each.name,
                each.datatype,
                list(each.shape),
                _values(each.parameters),
                _texts(unpacked(each.datatype, raw[index]) if raw else each.contents.bytes_contents),
            )
            for index, each in enumerate(response.outputs)
        ]
        return Answer("OK", envelope=_envelope(case, envelope), outputs=outputs)


def _envelope(case: Case, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Without the id that the server made up for a request that has none."""
    return {name: value for name, value in fields.items() if name != "id" or "id" in case.request}


def _values(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {name: getattr(each, each.WhichOneof("parameter_choice")) for name, each in parameters.items()}


def _texts(elements: Sequence[Any]) -> list[Any]:
    return [element.decode() if isinstance(element, bytes) else element for element in elements]
