"""A lean HTTP/1.1 client: one keep-alive connection, one request at a time.

The generator shares the machine with the server it measures, so it must cost little: requests are bytes
made beforehand, answers are parsed no further than their length, and are judged after the run.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import cast

HEADERS_END = b"\r\n\r\n"


class AnswerError(Exception):
    """The server said something that is not one answer to one request, or hung up."""


@dataclass(frozen=True, slots=True)
class Response:
    """Status and body of an answer."""

    status: int
    body: bytes


class Connection(asyncio.Protocol):
    """One connection; use `connect` to open one."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._waiter: asyncio.Future[Response] | None = None
        self.surplus_bytes = 0
        """Bytes that came while no answer was due: an answer given twice."""

    async def exchange(self, request: bytes) -> Response:
        """Send a request and read its answer. Raises `AnswerError` if the connection breaks."""
        if self._transport is None or self.closed:
            raise AnswerError("the connection is closed")
        self._waiter = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._waiter

    @property
    def closed(self) -> bool:
        """Whether either side hung up."""
        return self._transport is None or self._transport.is_closing()

    def close(self) -> None:
        """Hang up."""
        if self._transport is not None:
            self._transport.close()

    # -- asyncio.Protocol ------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        waiter = self._waiter
        if waiter is None or waiter.done():
            self.surplus_bytes += len(data)
            return
        self._buffer += data
        try:
            response, rest = _parse(self._buffer)
        except AnswerError as error:
            waiter.set_exception(error)
            return
        if response is not None:
            self.surplus_bytes += rest
            self._buffer = b""
            waiter.set_result(response)

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(AnswerError(f"the server hung up: {exc}"))


async def connect(host: str, port: int) -> Connection:
    """An open connection. Raises OSError."""
    _, connection = await asyncio.get_running_loop().create_connection(Connection, host, port)
    return connection


def get(path: str) -> bytes:
    """A GET request."""
    return f"GET {path} HTTP/1.1\r\nHost: benchmark\r\n\r\n".encode()


def post(path: str, body: bytes, content_type: str = "application/json") -> bytes:
    """A POST request."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: benchmark\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _parse(data: bytes) -> tuple[Response | None, int]:
    """The answer, or None if more is to come, and how many bytes are left over."""
    head_end = data.find(HEADERS_END)
    if head_end < 0:
        return None, 0
    head = data[:head_end].lower()
    start = head.find(b"\r\ncontent-length:")
    if start < 0 or not head.startswith(b"http/1.1 "):
        raise AnswerError(f"no content-length in {head!r:.200}")
    length = int(head[start + 17 :].split(b"\r\n", 1)[0])
    end = head_end + len(HEADERS_END) + length
    if len(data) < end:
        return None, 0
    return Response(int(head[9:12]), data[end - length : end]), len(data) - end
