"""The gate answers 429 without the application, and hands on all that it cannot judge."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from mlserver.errors import MLServerError, ModelNotFound
from starlette.responses import Response

from mlserver_hftasks.runtime.gate import Gate

PLAIN = b'{"inputs":[{"name":"args","shape":[1],"datatype":"BYTES","data":["a"]}]}'


class Model:
    """Refuses with that status, or not at all."""

    def __init__(self, status: int | None) -> None:
        self.ready = True
        self.counted = 0
        self._status = status

    def is_full(self) -> bool:
        return self._status is not None

    def check_admission(self) -> None:
        self.counted += 1
        if self._status is not None:
            raise MLServerError("full; retry after 3 s", self._status)


class Registry:
    def __init__(self) -> None:
        self.models: dict[tuple[str, str | None], Any] = {}

    async def get_model(self, name: str, version: str | None) -> Any:
        if (name, version) not in self.models:
            raise ModelNotFound(name, version)
        return self.models[name, version]


def made() -> tuple[Gate, Registry, list[bytes]]:
    """A gate, the models behind it, and the bodies that its application got."""
    registry, seen = Registry(), []

    async def application(scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        body = b""
        if scope["type"] == "http":
            while (message := await receive())["type"] == "http.request":
                body += message["body"]
                if not message.get("more_body"):
                    break
        seen.append(body)

    def answer(error: MLServerError) -> Response:
        return Response(orjson.dumps({"error": str(error)}), error.status_code)

    plane: Any = SimpleNamespace(_model_registry=registry)
    return Gate(application, plane, answer), registry, seen


async def ask(
    gate: Gate,
    path: str = "/v2/models/m/infer",
    body: Sequence[bytes] = (PLAIN,),
    headers: Sequence[tuple[bytes, bytes]] = (),
    kind: str = "http",
    **scope: Any,
) -> list[Any]:
    """What the gate itself sends."""
    sent: list[Any] = []
    pieces = [
        {"type": "http.request", "body": piece, "more_body": index < len(body) - 1}
        for index, piece in enumerate(body)
    ]

    async def receive() -> Any:
        return pieces.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    plain = {"type": kind, "path": path, "headers": list(headers), "method": "POST"}
    await gate({**plain, **scope}, receive, send)
    return sent


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("/v2/models/m/infer", ("m", None)),
        ("/v2/models/m/generate", ("m", None)),
        ("/v2/models/m/versions/v2/infer", ("m", "v2")),
    ],
)
async def test_a_model_that_is_full_refuses_before_the_application(
    path: str, key: tuple[str, str | None]
) -> None:
    gate, registry, seen = made()
    registry.models[key] = Model(429)
    start, content = await ask(gate, path)
    assert start["status"] == 429
    assert orjson.loads(content["body"]) == {"error": "full; retry after 3 s"}
    assert seen == []


@pytest.mark.parametrize("status", [None, 503])
async def test_whoever_is_not_refused_gets_in(status: int | None) -> None:
    gate, registry, seen = made()
    registry.models["m", None] = Model(status)
    assert await ask(gate) == []
    assert seen == [PLAIN]


@pytest.mark.parametrize(
    "request_",
    [
        {"body": [PLAIN[:9], PLAIN[9:]]},
        {"body": [PLAIN.replace(b"]}]", b']}],"parameters":{"mode":"explain"}')]},
        {"body": [PLAIN.replace(b"args", b"explain")]},
        {"headers": [(b"content-encoding", b"gzip")]},
        {"headers": [(b"origin", b"https://a.example")]},
        {"method": "OPTIONS"},
        {"method": "GET"},
        {"path": "/v2/models/m/infer_stream"},
        {"path": "/v2/models/m/explain"},
        {"path": "/v2/models/m/ready"},
        {"path": "/v2/models/other/infer"},
    ],
)
async def test_what_cannot_be_judged_gets_in_unharmed(request_: dict[str, Any]) -> None:
    gate, registry, seen = made()
    registry.models["m", None] = Model(429)
    assert await ask(gate, **request_) == []
    assert seen == [b"".join(request_.get("body", [PLAIN]))]
    assert registry.models["m", None].counted == 0


async def test_a_server_under_a_path_of_its_own_has_its_gate() -> None:
    gate, registry, seen = made()
    registry.models["m", None] = Model(429)
    start, _ = await ask(gate, "/models/v2/models/m/infer", root_path="/models")
    assert start["status"] == 429
    assert seen == []


async def test_a_queue_that_has_room_when_the_body_has_come_takes_the_request() -> None:
    gate, registry, seen = made()
    model = registry.models["m", None] = Model(None)
    model.is_full = lambda: True  # type: ignore[method-assign]
    assert await ask(gate) == []
    assert seen == [PLAIN]


async def test_models_that_are_not_ready_or_not_ours_get_their_requests() -> None:
    gate, registry, seen = made()
    registry.models["m", None] = Model(429)
    registry.models["m", None].ready = False
    registry.models["other", None] = SimpleNamespace(ready=True)
    assert await ask(gate) == []
    assert await ask(gate, "/v2/models/other/infer") == []
    assert seen == [PLAIN, PLAIN]


async def test_other_than_http_gets_in() -> None:
    gate, _, seen = made()
    assert await ask(gate, kind="lifespan") == []
    assert seen == [b""]


async def test_a_client_that_is_gone_is_left_to_the_application() -> None:
    gate, registry, _ = made()
    registry.models["m", None] = Model(429)
    sent: list[Any] = []
    got: list[Any] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        got.append(await receive())

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    gate._inner = application
    scope = {"type": "http", "method": "POST", "path": "/v2/models/m/infer", "headers": []}
    await gate(scope, receive, send)
    assert got == [{"type": "http.disconnect"}]
    assert sent == []
