"""A server that answers every POST alike, and every GET, and keeps what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Answering:
    def __init__(
        self, respond: Callable[[Any], tuple[int, Any]], metadata: tuple[int, Any] | None = None
    ) -> None:
        self.requests: list[tuple[str, Any]] = []
        self.gets: list[str] = []
        self.metadata = metadata or (404, {})
        asked, gets, server = self.requests, self.gets, self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                asked.append((self.path, body))
                self._answer(*respond(body))

            def do_GET(self) -> None:
                gets.append(self.path)
                self._answer(*server.metadata)

            def _answer(self, status: int, answer: Any) -> None:
                data = json.dumps(answer).encode()
                self.send_response(status)
                if status == 307:
                    self.send_header("Location", "http://127.0.0.1:1/elsewhere")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that went away
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@contextmanager
def answering(
    status: int = 200,
    answer: Any = None,
    respond: Callable[[Any], tuple[int, Any]] | None = None,
    metadata: tuple[int, Any] | None = None,
) -> Iterator[Answering]:
    made = Answering(respond or (lambda body: (status, answer)), metadata)
    thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield made
    finally:
        made.server.shutdown()
        thread.join()
        made.server.server_close()
