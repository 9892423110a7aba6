"""Refuses before anybody reads: a server with more requests than it can carry has no time for the surplus.

By MLServer's own way a refusal costs more than the answer of a model that does nothing. The gate stands
before its REST application, asks the model whether it would take even the smallest request, and answers 429
itself, without routing, parsing and MLServer's metrics (`hftasks_refused_total` counts). It lets pass what it
cannot judge by a glance: compressed bodies, those in several pieces, browsers' requests, and those that may
ask for an explanation, which has a queue of its own.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

from mlserver.errors import MLServerError
from mlserver.handlers import DataPlane
from mlserver.model import MLModel
from mlserver.rest.server import RESTServer
from starlette._utils import get_route_path
from starlette.responses import Response

from mlserver_hftasks.codecs.request import EXPLAIN, MODE

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

_PATH = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/(?:infer|generate)")
_OTHERS = (b"content-encoding", b"origin")
"""Headers of what the application itself refuses: compressed bodies, and browsers that want CORS headers."""
_UNSURE = tuple(f'"{name}"'.encode() for name in (EXPLAIN, MODE))


class Admits(Protocol):
    """What is asked of a model."""

    def is_full(self) -> bool:
        """Whether even the smallest request for a prediction would be refused now; nothing is counted."""

    def check_admission(self) -> None:
        """Raise `MLServerError` if even the smallest request for a prediction would be refused now."""


def open_gates(answer: Callable[[MLServerError], Response]) -> None:
    """From now on a REST server gets a gate with its first model that can be asked."""
    add_handlers = RESTServer.add_custom_handlers

    async def add_custom_handlers(server: RESTServer, model: MLModel) -> MLModel:
        app = server._app
        # a cache has answers that cost nothing
        if hasattr(model, Admits.is_full.__name__) and server._data_plane._response_cache is None:
            if app.middleware_stack is None:
                app.middleware_stack = app.build_middleware_stack()
            if not isinstance(app.middleware_stack, Gate):
                app.middleware_stack = Gate(app.middleware_stack, server._data_plane, answer)
        return await add_handlers(server, model)

    RESTServer.add_custom_handlers = add_custom_handlers


class Gate:
    """Stands before an ASGI application."""

    def __init__(
        self, inner: Application, data_plane: DataPlane, answer: Callable[[MLServerError], Response]
    ) -> None:
        self._inner = inner
        self._registry = data_plane._model_registry
        self._answer = answer

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        model = await self._full(scope)
        if model is None:
            await self._inner(scope, receive, send)
            return
        message = await receive()
        refusal = _refusal(model) if _is_clear(message) else None
        if refusal is not None:
            await self._answer(refusal)(scope, receive, send)
        else:
            await self._inner(scope, _replayed(message, receive), send)

    async def _full(self, scope: MutableMapping[str, Any]) -> Admits | None:
        """The model, if a request is for a prediction of one that would take none."""
        if scope["type"] != "http" or scope["method"] != "POST":
            return None
        found = _PATH.fullmatch(get_route_path(scope))
        if found is None or any(name in _OTHERS for name, _ in scope["headers"]):
            return None
        try:
            model = await self._registry.get_model(*found.groups())
        except MLServerError:
            return None
        is_full: Callable[[], bool] | None = getattr(model, Admits.is_full.__name__, None)
        return model if is_full is not None and model.ready and is_full() else None


def _refusal(model: Admits) -> MLServerError | None:
    """What the model says against a request now that all of it has come."""
    try:
        model.check_admission()
    except MLServerError as error:
        return error if error.status_code == 429 else None
    return None


def _is_clear(message: Message) -> bool:
    """Whether it is the whole body of a request for a prediction alone."""
    body = message.get("body", b"")
    return (
        message["type"] == "http.request"
        and not message.get("more_body", False)
        and not any(name in body for name in _UNSURE)
    )


def _replayed(message: Message, receive: Receive) -> Receive:
    """`receive` with a message before it that was taken already."""
    taken = [message]

    async def replay() -> Message:
        return taken.pop() if taken else await receive()

    return replay
