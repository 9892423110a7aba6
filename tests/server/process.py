"""A real `mlserver start` in a process of its own, on free ports of the loopback."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.server.v2 import Metrics, infer_path, results_of

START_SECONDS = 120.0
"""A generous bound on a start: imports of torch and transformers, several processes, two shared cores."""
CLIENT_SECONDS = 60.0
"""A generous bound on any answer, so that a test that hangs ends."""
FORGOTTEN = ("MLSERVER_", "PREDICTIVE_UNIT_", "PROMETHEUS_", "HF_", "TRANSFORMERS_")
"""Variables of the caller's environment that a server of a test must not see."""


@dataclass(frozen=True)
class Model:
    """One `model-settings.json`."""

    folder: Path | None
    """What `pretrained_model` names; None leaves it out."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    version: str | None = None
    name: str | None = None
    """The model's name; else that of its folder in the repository."""
    implementation: str = "mlserver_hftasks.HFTasksRuntime"
    top: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of the file, beside `parameters`."""

    def settings(self, name: str) -> dict[str, Any]:
        extra = dict(self.extra)
        if self.folder is not None:
            extra.setdefault("pretrained_model", str(self.folder))
        parameters: dict[str, Any] = {"extra": extra}
        if self.version is not None:
            parameters["version"] = self.version
        made = {"name": self.name or name, "implementation": self.implementation, "parameters": parameters}
        return {**made, **self.top}


class Server:
    """`mlserver start` on a model repository in `root`. A context manager: ready inside, ended after."""

    def __init__(
        self,
        root: Path,
        models: Mapping[str, Model],
        *,
        parallel_workers: int = 0,
        environment: Mapping[str, str] | None = None,
        python: Path | None = None,
    ) -> None:
        self.root = root
        self._python = python or Path(sys.executable)
        self.repository = root / "repository"
        self.http_port, self.grpc_port, self.metrics_port = _free_ports(3)
        self.url = f"http://127.0.0.1:{self.http_port}"
        self.grpc_url = f"127.0.0.1:{self.grpc_port}"
        self._log_path = root / "server.log"
        self._environment = dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None
        self.repository.mkdir(parents=True)
        settings = {
            "debug": False,
            "host": "127.0.0.1",
            "http_port": self.http_port,
            "grpc_port": self.grpc_port,
            "metrics_port": self.metrics_port,
            "metrics_dir": str(root / "metrics"),
            "environments_dir": str(root / "environments"),
            "parallel_workers": parallel_workers,
        }
        (self.repository / "settings.json").write_text(json.dumps(settings))
        for name, model in models.items():
            self.write(name, model)
        self.client = httpx.Client(base_url=self.url, timeout=CLIENT_SECONDS, trust_env=False)

    # -- life ------------------------------------------------------------------------------------

    def __enter__(self) -> Server:
        self.start()
        try:
            self.wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def start(self) -> None:
        command = [str(self._python.with_name("mlserver")), "start", str(self.repository)]
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=self.root, env=self._variables(), stdout=log, stderr=subprocess.STDOUT
            )

    def wait_until_ready(self) -> None:
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}\n{self.log[-4000:]}")
            with suppress(httpx.TransportError):
                # Before its models are registered a server counts as ready: ask for them by name.
                if all(self._is_ready(path) for path in self._model_paths()):
                    return
            time.sleep(0.1)
        raise TimeoutError(f"the server is not ready after {START_SECONDS} s\n{self.log[-4000:]}")

    def wait_until_ended(self) -> int:
        """The exit status of a server that ends by itself."""
        return self.process.wait(START_SECONDS)

    def stop(self) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                for pid in [*self.pids()[1:], self.process.pid]:
                    with suppress(ProcessLookupError):
                        os.kill(pid, 9)
                self.process.wait()

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "the server was not started"
        return self._process

    # -- what it says ----------------------------------------------------------------------------

    @property
    def log(self) -> str:
        return self._log_path.read_text(errors="replace")

    def log_since(self, position: int) -> str:
        """The log from a position that `log_position` gave."""
        with self._log_path.open("rb") as log:
            log.seek(position)
            return log.read().decode(errors="replace")

    def log_position(self) -> int:
        return self._log_path.stat().st_size

    def metrics(self) -> Metrics:
        text = self.client.get(f"http://127.0.0.1:{self.metrics_port}/metrics").text
        return Metrics(text)

    def pids(self) -> list[int]:
        """The main process, then its descendants."""
        found = [self.process.pid]
        for pid in found:
            with suppress(OSError):
                children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
                found.extend(int(child) for child in children.split())
        return found

    def rss_bytes(self) -> int:
        """Resident memory of all its processes."""
        return sum(_status_kib(pid, "VmRSS") for pid in self.pids()) * 1024

    def peak_rss_bytes(self) -> int:
        """The most resident memory the main process had since the start, or since `reset_peak_rss`."""
        return _status_kib(self.process.pid, "VmHWM") * 1024

    def reset_peak_rss(self) -> None:
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    # -- requests --------------------------------------------------------------------------------

    def infer(
        self,
        model: str,
        inputs: Sequence[Mapping[str, Any]],
        *,
        outputs: Sequence[str] = (),
        version: str | None = None,
        **parameters: Any,
    ) -> httpx.Response:
        """POST a V2 request; `parameters` are those of the request."""
        body: dict[str, Any] = {"inputs": list(inputs)}
        if outputs:
            body["outputs"] = [{"name": name} for name in outputs]
        if parameters:
            body["parameters"] = parameters
        return self.client.post(infer_path(model, version), json=body)

    def results(self, model: str, inputs: Sequence[Mapping[str, Any]], **options: Any) -> list[Any]:
        """The parsed elements of the default output of a request that must succeed."""
        return results_of(self.infer(model, inputs, **options))

    def repository_call(self, name: str, action: str) -> httpx.Response:
        """`load` or `unload` by the repository API."""
        return self.client.post(f"/v2/repository/models/{name}/{action}", json={})

    @contextmanager
    def having(self, name: str, model: Model) -> Iterator[httpx.Response]:
        """A further model for a while; gives the answer to the call that loads it."""
        self.write(name, model)
        try:
            yield self.repository_call(name, "load")
        finally:
            self.repository_call(name, "unload")
            shutil.rmtree(self.repository / name)

    def write(self, name: str, model: Model) -> None:
        """Write the settings of a model into the repository; what is served does not change by itself."""
        folder = self.repository / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model-settings.json").write_text(json.dumps(model.settings(name)))

    def _is_ready(self, path: str) -> bool:
        return self.client.get(f"/v2/models/{path}/ready").status_code == 200

    def _model_paths(self) -> list[str]:
        paths = []
        for file in self.repository.glob("**/model-settings.json"):
            settings = json.loads(file.read_text())
            version = settings["parameters"].get("version")
            paths.append(settings["name"] + (f"/versions/{version}" if version else ""))
        return paths

    def _variables(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(FORGOTTEN)}
        return {
            **inherited,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(self.root / "hub"),
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
            **self._environment,
        }


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _status_kib(pid: int, key: str) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1])
    return 0
