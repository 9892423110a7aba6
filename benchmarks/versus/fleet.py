"""The servers of all systems, running side by side; one is busy at a time."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

from benchmarks import load, v2
from benchmarks.server import Server, ServerError
from benchmarks.session import Session
from benchmarks.shapes import MINILM, Shape
from benchmarks.versus.systems import System, chosen
from mlserver_hftasks.errors import HFTasksError

WARM_TEXTS, LIMIT_S = 48, 120.0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a system listens."""

    system: System
    host: str
    port: int
    only_model: str | None = None
    """Of a server that was given by its URL: it has the one model."""

    def texts(self, shape: Shape, texts: Sequence[str], model: str | None = None) -> v2.Texts:
        """One text per request."""
        name = self.only_model or model or shape.name
        return v2.Texts(self.host, self.port, name, texts, self.system.input_name)

    def bulk(self, shape: Shape, texts: Sequence[str]) -> v2.Bulk:
        """All texts in one request."""
        name = "inputs" if self.system.input_name == "args" else self.system.input_name
        return v2.Bulk(self.host, self.port, self.only_model or shape.name, texts, name)


@dataclass(slots=True)
class Fleet:
    """One server per system, each with a model of every shape; started at the first need."""

    session: Session
    others: Mapping[str, str] = field(default_factory=dict)
    """Further servers: their names, and the URLs of their V2 text-classification models."""
    _stack: ExitStack = field(default_factory=ExitStack)
    _servers: list[Server] = field(default_factory=list)
    _endpoints: list[Endpoint] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """Systems that did not start, and why."""

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack, ThreadPoolExecutor() as pool:  # each takes seconds to end
            list(pool.map(Server.stop, self._servers))

    def endpoints(self, shape: Shape = MINILM) -> list[Endpoint]:
        """All systems that serve the shape, warm."""
        if not self._endpoints:
            self._endpoints = self._start() + self._given()
            for endpoint in self._endpoints:
                for each in self._shapes(endpoint):
                    warm(endpoint.texts(each, self.session.texts(WARM_TEXTS)))
        return [endpoint for endpoint in self._endpoints if shape in self._shapes(endpoint)]

    def _shapes(self, endpoint: Endpoint) -> Sequence[Shape]:
        return (MINILM,) if endpoint.only_model else self.session.plan.shapes

    def _start(self) -> list[Endpoint]:
        self.session.tell("starting the servers")
        folders = {shape.name: shared(self.session, shape) for shape in self.session.plan.shapes}
        servers = {}
        for system in chosen(quick=self.session.plan.name == "quick"):
            with self._noticed(system):
                home = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="hftasks-bench-")))
                models = [system.model(name, folder) for name, folder in folders.items()]
                servers[system.name] = system, Server(models, home, **system.server_options())
                self._servers.append(servers[system.name][1])
        for system, server in servers.values():
            with self._noticed(system):
                server.wait_until_ready()
        return [
            Endpoint(system, server.host, server.port)
            for system, server in servers.values()
            if system.name not in self.failed
        ]

    @contextmanager
    def _noticed(self, system: System) -> Iterator[None]:
        """What is wrong with one system shall not keep the others from being measured."""
        try:
            yield
        except (ServerError, HFTasksError, OSError, ImportError) as error:
            self.failed[system.name] = f"{type(error).__name__}: {error}"[-300:]

    def _given(self) -> list[Endpoint]:
        endpoints = []
        for name, url in self.others.items():
            parts = urlsplit(url)
            model = parts.path.removesuffix("/infer").rpartition("/")[2]
            system = System(name, "other", "unknown")
            endpoints.append(Endpoint(system, parts.hostname or "", parts.port or 80, model))
        return endpoints


def warm(target: v2.Texts) -> None:
    """Enough for caches, allocators and cost models to settle."""
    load.run(load.closed_loop(target, 8, WARM_TEXTS, limit_s=LIMIT_S))


def shared(session: Session, shape: Shape) -> Path:
    """The folder of that shape's model, in a form that transformers 4 loads too."""
    return as_shared(session.model(shape))


def as_shared(made: Path) -> Path:
    """A model's folder in that form, beside its own."""
    folder = made.with_name(f"{made.name}-shared")
    if not folder.is_dir():
        shutil.copytree(made, folder, copy_function=os.link)
        file = folder / "tokenizer_config.json"
        settings = json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        settings.pop("backend", None)
        file.unlink()  # it is a link to the file of the other folder
        file.write_text(json.dumps(settings))
    return folder
