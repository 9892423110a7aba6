"""What MLServer 1.7 lacks and a runtime can only add from outside.

`prepare_server` runs once per process, before the servers take requests for a model of ours:

- gRPC answers with the status codes of our errors (MLServer maps four HTTP codes only);
- a 429 carries Retry-After;
- a REST body over the model's limit is refused while it is read, before and after gunzip, and one that
  is no V2 request with a 400 in the protocol's form (FastAPI answers 422 in its own);
- a gRPC message that is no V2 request is an INVALID_ARGUMENT (MLServer says INTERNAL), and so is a
  parameter of a kind that MLServer drops in silence;
- a stream that fails before its first answer has the error's own status (MLServer says 500);
- a stream that goes to a worker says so, since a worker cannot stream;
- a request for a model that is still loading is a 503 (MLServer says 400);
- an error that crosses from a worker keeps its message (MLServer puts the class before it);
- what a client did wrong is not logged with a traceback;
- the REST server has the routes of explanations (`routes`), and before it a gate that refuses (`gate`);
- threads hand the interpreter over sooner.

The changes touch requests to models of this package only, save the first and the last.
"""

from __future__ import annotations

import logging
import math
import re
import struct
import sys
import zlib
from collections.abc import AsyncIterator, Mapping
from email.message import Message
from functools import cache
from typing import Any

import grpc
import mlserver.grpc.utils
import mlserver.handlers.dataplane
import mlserver.parallel.worker
import mlserver.rest.endpoints
import mlserver.rest.errors
import orjson
from mlserver.errors import MLServerError, ModelNotReady
from mlserver.grpc.servicers import InferenceServicer
from mlserver.parallel.errors import WorkerError
from mlserver.parallel.model import ParallelModel
from mlserver.rest.requests import Request
from mlserver.rest.responses import Response
from mlserver.types import InferenceRequest, InferenceResponse, Parameters
from starlette.exceptions import HTTPException
from starlette.responses import StreamingResponse

from mlserver_hftasks.codecs.envelope import check_envelope, check_id
from mlserver_hftasks.codecs.request import PROTOCOL_PARAMETERS, STREAMED
from mlserver_hftasks.errors import HFTasksError, InvalidSettings, Overloaded
from mlserver_hftasks.runtime.gate import open_gates
from mlserver_hftasks.runtime.routes import add_routes_with_models

GRPC_CODES = {
    413: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
MAX_MESSAGE_CHARS = 600
SWITCH_INTERVAL_S = 2e-4
"""How long a thread may keep the interpreter while another wants it. torch gives it back at every operator,
so with Python's own 5 ms a busy event loop can hold up the device that often. The gain measured is small:
under overload 0.87 against 0.84 of capacity, with spreads that overlap."""
_RETRY_AFTER = re.compile(r"; retry after (\d+) s$")

_body_limits: dict[str, int] = {}
"""Most bytes of a REST body, by model name."""


class BadBody(MLServerError, HTTPException):
    """A REST body that is not a V2 request.

    FastAPI lets only its own kind of exception out of reading a body, MLServer answers only its own in
    the protocol's form: this is both.
    """

    def __init__(self, message: str, status_code: int = 400) -> None:
        self.status_code = status_code
        self.detail = _printable(message)
        Exception.__init__(self, self.detail)
        self.headers = None

    def __str__(self) -> str:
        return self.detail


def _printable(message: str) -> str:
    """On one line, and short enough for the trailers of gRPC: clients choose some of the words.

    What is cut is the middle: the end says where.
    """
    cut = message
    if len(message) > MAX_MESSAGE_CHARS:
        cut = f"{message[: MAX_MESSAGE_CHARS - 150]} ... {message[-150:]}"
    return cut if cut.isprintable() else "".join(c if c.isprintable() else " " for c in cut)


def as_mlserver_error(error: HFTasksError) -> MLServerError:
    """The error as MLServer sends it. With workers only message and status get through."""
    message = _printable(str(error))
    if isinstance(error, Overloaded):
        # `_error_response` reads this again: between workers nothing else of an error gets through.
        message += f"; retry after {max(math.ceil(error.retry_after_s), 1)} s"
    return MLServerError(message, 422 if isinstance(error, InvalidSettings) else error.status_code)


def limit_body(model_name: str, max_bytes: int) -> None:
    """Refuse REST bodies for that model that are larger, compressed or not."""
    _body_limits[model_name] = max_bytes


@cache
def prepare_server() -> None:
    """Apply the changes that the module docstring lists."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    mlserver.grpc.utils.STATUS_CODE_MAPPING.update(GRPC_CODES)
    mlserver.rest.errors.Response = _error_response
    for name in ("mlserver.grpc", "mlserver.parallel"):
        logging.getLogger(name).addFilter(_is_not_the_clients_fault)
    any_body, any_json = Request.body, Request.json

    async def body(request: Request) -> bytes:
        limit = _body_limits.get(request.path_params.get("model_name", ""))
        if limit is None:
            unlimited: bytes = await any_body(request)
            return unlimited
        if not hasattr(request, "_body"):
            request._body = await _read_body(request, limit)
        read: bytes = request._body
        return read

    async def json(request: Request) -> Any:
        if request.path_params.get("model_name") not in _body_limits:
            return await any_json(request)
        try:
            content = orjson.loads(await body(request))
            check_envelope(content)
        except orjson.JSONDecodeError as error:
            raise BadBody(f"invalid JSON ({error}), expected a V2 inference request @ body") from None
        except HFTasksError as error:
            raise BadBody(str(error), error.status_code) from None
        except RecursionError:
            raise BadBody("a body nested too deeply, expected a V2 inference request @ body") from None
        return content

    Request.body, Request.json = body, json
    mlserver.rest.endpoints.StreamingResponse = _Stream
    mlserver.parallel.worker.WorkerError = _worker_error
    mlserver.handlers.dataplane.ModelNotReady = _not_ready
    _mark_streams_to_workers()
    _refuse_bad_messages()
    add_routes_with_models(_body_limits.__contains__, as_mlserver_error)
    open_gates(lambda error: _error_response(error.status_code, {"error": str(error)}))


def _mark_streams_to_workers() -> None:
    """MLServer sends them as requests for a whole answer; the task shall know, and refuse if it streams."""

    async def predict_stream(
        model: ParallelModel, payloads: AsyncIterator[InferenceRequest]
    ) -> AsyncIterator[InferenceResponse]:
        payload = await anext(payloads)
        if model.name in _body_limits:
            parameters = payload.parameters or Parameters()
            payload.parameters = parameters.model_copy(update={STREAMED: True})
        yield await model.predict(payload)

    ParallelModel.predict_stream = predict_stream


def _refuse_bad_messages() -> None:
    """gRPC: what MLServer cannot convert, or would drop, is the client's fault and told so."""
    convert = InferenceServicer._InsertHeaders

    def insert_headers(servicer: InferenceServicer, request: Any, context: Any) -> Any:
        if request.model_name in _body_limits:
            _check_kinds(request.parameters)
            _check_message_id(request.id)
        try:
            return convert(servicer, request, context)
        except (ValueError, IndexError, struct.error) as error:
            reason = " ".join(str(error).split())
            raise MLServerError(
                f"a message that cannot be read ({reason}), expected a V2 inference request @ inputs", 400
            ) from None

    InferenceServicer._InsertHeaders = insert_headers


def _check_kinds(parameters: Mapping[str, Any]) -> None:
    for name, parameter in parameters.items():
        if name not in PROTOCOL_PARAMETERS and not parameter.ListFields():
            raise MLServerError(
                "a parameter of a kind that MLServer does not take over gRPC, expected a boolean, an integer "
                f"or a text (or the value as a tensor of that name) @ {name}",
                400,
            )


def _check_message_id(request_id: str) -> None:
    try:
        check_id(request_id)
    except HFTasksError as error:
        raise as_mlserver_error(error) from None


class _Stream(StreamingResponse):
    """Has its first piece before it says 200: what fails until then is answered as any error."""

    # All in the task that streams: MLServer's generator holds context variables.
    async def stream_response(self, send: Any) -> None:
        pieces = aiter(self.body_iterator)
        first = await anext(pieces, b"")

        async def all_pieces() -> AsyncIterator[Any]:
            yield first
            async for piece in pieces:
                yield piece

        self.body_iterator = all_pieces()
        await super().stream_response(send)


async def _read_body(request: Request, limit: int) -> bytes:
    _check_content_type(request)
    gunzip = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16) if _is_compressed(request) else None
    chunks: list[bytes] = []
    size = 0
    async for sent in request.stream():
        try:
            chunk = gunzip.decompress(sent, limit + 1 - size) if gunzip else sent
        except zlib.error as error:
            raise BadBody(f"a body that is not gzip ({error}), expected gzip @ body") from None
        size += len(chunk)
        if size > limit:
            raise BadBody(f"a body of over {limit} bytes, expected at most {limit} @ body", 413)
        chunks.append(chunk)
    if gunzip is not None and (not gunzip.eof or gunzip.unused_data):
        raise BadBody("a body that is not one whole gzip stream, expected gzip @ body")
    if not size:
        raise BadBody("an empty body, expected a V2 inference request @ body")
    return b"".join(chunks)


def _check_content_type(request: Request) -> None:
    header = request.headers.get("Content-Type", "application/json")
    if header == "application/json":
        return
    message = Message()
    message["Content-Type"] = header
    content_type = message.get_content_type()
    if not re.fullmatch(r"application/(json|[^/]+\+json)", content_type):
        raise BadBody(f"got the content type {content_type!r:.80}, expected application/json @ body")


def _is_compressed(request: Request) -> bool:
    encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in {"identity", "gzip"}:
        raise BadBody(f"got the content encoding {encoding!r:.80}, expected gzip or none @ body")
    return bool(encoding == "gzip")


def _worker_error(error: BaseException) -> MLServerError:
    """What a worker sends of an error: ours as it is, it pickles."""
    return error if type(error) is MLServerError else WorkerError(error)


def _not_ready(name: str, version: str | None = None) -> MLServerError:
    error = ModelNotReady(name, version)
    if name in _body_limits:
        error.status_code = 503
    return error


def _error_response(status_code: int, content: dict[str, Any]) -> Response:
    waits = _RETRY_AFTER.search(str(content.get("error"))) if status_code == 429 else None
    headers = {"Retry-After": waits[1]} if waits else None
    return Response(status_code=status_code, content=content, headers=headers)


def _is_not_the_clients_fault(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return not (isinstance(error, MLServerError) and error.status_code != 500)
