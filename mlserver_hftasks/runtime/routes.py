"""Doors of explanations on the REST server, beside MLServer's own routes.

    POST /v2/models/{model}[/versions/{version}]/explain    a V2 request, answered with explanations
    POST /v1/models/{model}:explain                         TorchServe's form, see `codecs.instances`

Both become requests to `predict` with the parameter `mode`, so that versions, readiness, metrics, parallel
workers and gRPC's `ModelInfer` know one way only. A route that a model adds itself would be bound to that
model, and to whichever of its versions came first; these are the server's, added with our first model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlserver.errors import MLServerError
from mlserver.handlers import DataPlane
from mlserver.model import MLModel
from mlserver.rest.endpoints import Endpoints
from mlserver.rest.server import RESTServer
from mlserver.types import InferenceRequest, InferenceResponse, Parameters
from starlette.requests import Request
from starlette.responses import Response

from mlserver_hftasks.codecs.instances import encode_explanations, requests_of
from mlserver_hftasks.codecs.request import EXPLAIN, MODE
from mlserver_hftasks.engine.together import together
from mlserver_hftasks.errors import HFTasksError
from mlserver_hftasks.explain.tensors import RECORD_NAME

V2_PATHS = ("/v2/models/{model_name}/explain", "/v2/models/{model_name}/versions/{model_version}/explain")
V1_PATH = "/v1/models/{model_name}:explain"


def add_routes_with_models(
    is_ours: Callable[[str], bool], as_error: Callable[[HFTasksError], Exception]
) -> None:
    """From now on a REST server gets the routes with its first model that `is_ours` says is ours."""
    add_handlers = RESTServer.add_custom_handlers

    async def add_custom_handlers(server: RESTServer, model: MLModel) -> MLModel:
        if is_ours(model.name) and not any(route.path == V1_PATH for route in server._app.routes):
            doors = Doors(server._data_plane, is_ours, as_error)
            for path in V2_PATHS:
                server._app.add_api_route(path, doors.v2, methods=["POST"])
            server._app.add_api_route(V1_PATH, doors.v1, methods=["POST"])
        return await add_handlers(server, model)

    RESTServer.add_custom_handlers = add_custom_handlers


class Doors:
    """The routes of one server."""

    def __init__(
        self,
        data_plane: DataPlane,
        is_ours: Callable[[str], bool],
        as_error: Callable[[HFTasksError], Exception],
    ) -> None:
        self._data_plane = data_plane
        self._endpoints = Endpoints(data_plane)
        self._is_ours = is_ours
        self._as_error = as_error

    # FastAPI reads these annotations when it adds the route: they must be names of this module.
    async def v2(
        self,
        raw_request: Request,
        raw_response: Response,
        payload: InferenceRequest,
        model_name: str,
        model_version: str | None = None,
    ) -> InferenceResponse:
        """Explain what a V2 request brings."""
        self._check(model_name)
        if payload.parameters is None:
            payload.parameters = Parameters()
        setattr(payload.parameters, MODE, EXPLAIN)
        return await self._endpoints.infer(raw_request, raw_response, payload, model_name, model_version)

    async def v1(self, raw_request: Request, model_name: str) -> Response:
        """Explain instances."""
        self._check(model_name)
        body = await raw_request.body()
        try:
            groups = requests_of(body, RECORD_NAME)
        except HFTasksError as error:
            raise self._as_error(error) from None
        answers = await together(self._ask(group.request, model_name) for group in groups)
        return Response(encode_explanations(groups, answers), media_type="application/json")

    async def _ask(self, request: InferenceRequest, model_name: str) -> Any:
        setattr(request.parameters, MODE, EXPLAIN)
        return await self._data_plane.infer(request, model_name)

    def _check(self, model_name: str) -> None:
        if not self._is_ours(model_name):
            raise MLServerError(
                f"no model '{model_name:.80}' that explains, expected one of this server", 404
            )
