"""A real `mlserver start` over a repository of its own, in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
OURS = "mlserver_hftasks.HFTasksRuntime"
START_SECONDS, STOP_SECONDS = 180.0, 20.0
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True, slots=True)
class Cpu:
    """CPU time in seconds: of the main thread, where the event loop runs, and of all others."""

    loop_s: float
    others_s: float

    def since(self, before: Cpu) -> Cpu:
        """What was used after `before`."""
        return Cpu(self.loop_s - before.loop_s, self.others_s - before.others_s)


@dataclass(frozen=True, slots=True)
class Model:
    """A model of the repository: `extra` goes to `parameters.extra`, `settings` beside it."""

    name: str
    folder: Path | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    implementation: str = OURS
    settings: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> str:
        """The text of `model-settings.json`."""
        extra = {"pretrained_model": str(self.folder), **self.extra} if self.folder else dict(self.extra)
        return json.dumps(
            {
                "name": self.name,
                "implementation": self.implementation,
                "parameters": {"extra": extra},
                **self.settings,
            }
        )


def classifier(name: str, folder: Path, **extra: Any) -> Model:
    """A text-classification model of ours on one thread."""
    return Model(name, folder, {"task": "text-classification", "intra_op_threads": 1, **extra})


class ServerError(Exception):
    """The server did not start, or died; the message ends with its log."""


class Server:
    """MLServer with these models, running. Use `running`."""

    def __init__(
        self,
        models: Sequence[Model],
        home: Path,
        *,
        mlserver: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.host = HOST
        self.port, self.grpc_port, self._metrics_port = free_ports(3)
        self._log_path = home / "server.log"
        self._write(models, home)
        command = [str(mlserver or Path(sys.executable).with_name("mlserver")), "start", str(home)]
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=home,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **ONE_THREAD, "HF_HUB_OFFLINE": "1", **(environment or {})},
            )
        self._names = [model.name for model in models]
        self.ready_s = 0.0
        """From start to the last model ready."""

    def _write(self, models: Sequence[Model], home: Path) -> None:
        settings = {
            "debug": False,
            "parallel_workers": 0,
            "host": HOST,
            "http_port": self.port,
            "grpc_port": self.grpc_port,
            "metrics_port": self._metrics_port,
            "metrics_dir": str(home),
        }
        (home / "settings.json").write_text(json.dumps(settings))
        for model in models:
            (home / model.name).mkdir()
            (home / model.name / "model-settings.json").write_text(model.as_json())

    def wait_until_ready(self) -> None:
        """Raises `ServerError` if it is not within `START_SECONDS`."""
        begin = time.monotonic()
        while not all(self._answers(f"/v2/models/{name}/ready") for name in self._names):
            if self._process.poll() is not None or time.monotonic() - begin > START_SECONDS:
                raise ServerError(f"MLServer is not ready:\n{self.log_tail()}")
            time.sleep(0.05)
        self.ready_s = time.monotonic() - begin

    def stop(self) -> None:
        """End the process, by force if need be."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    # -- what can be seen from outside -----------------------------------------------------------

    @property
    def pid(self) -> int:
        """Of the server's main process."""
        return self._process.pid

    def rss_mib(self) -> float:
        """Resident memory in MiB (Linux)."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        found = re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)
        return int(found[1]) / 1024 if found else float("nan")

    def cpu(self) -> Cpu:
        """CPU time that the server has used until now (Linux)."""
        spent = {
            int(path.parent.name): int(path.read_text().split()[0]) / 1e9
            for path in Path(f"/proc/{self.pid}/task").glob("*/schedstat")
        }
        loop = spent.get(self.pid, float("nan"))
        return Cpu(loop, sum(spent.values()) - loop)

    def metrics(self, model: str) -> dict[str, float]:
        """The sums and counts of one model's metrics by name: `hftasks_forward_seconds_sum`."""
        url = f"http://{HOST}:{self._metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=10) as response:
            lines = response.read().decode().splitlines()
        mark = f'model_name="{model}"'
        return {
            line.partition("{")[0]: float(line.rpartition(" ")[2])
            for line in lines
            if mark in line and not line.startswith("#") and "_bucket{" not in line
        }

    def log_tail(self, lines: int = 30) -> str:
        """The end of the server's log."""
        return "\n".join(self._log_path.read_text(errors="replace").splitlines()[-lines:])

    def _answers(self, path: str) -> bool:
        try:
            with urllib.request.urlopen(f"http://{HOST}:{self.port}{path}", timeout=5) as response:
                return bool(response.status == 200)
        except OSError:  # refused, or an HTTP error
            return False


@contextlib.contextmanager
def running(*models: Model, **options: Any) -> Iterator[Server]:
    """A server with these models, ready; stopped at the end. Raises `ServerError`."""
    with tempfile.TemporaryDirectory(prefix="hftasks-bench-") as home:
        server = Server(models, Path(home), **options)
        try:
            server.wait_until_ready()
            yield server
        finally:
            server.stop()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((HOST, 0))
        return [int(each.getsockname()[1]) for each in sockets]
