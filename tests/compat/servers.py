"""The two servers: the same models and settings, another implementation."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.compat.models import MODELS
from tests.server import process

THEIRS = "mlserver_huggingface.HuggingFaceRuntime"
OURS = "mlserver_hftasks.HuggingFaceRuntime"
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}


@contextmanager
def running(peer_python: Path) -> Iterator[tuple[process.Server, process.Server]]:
    """The incumbent's server and ours, both ready; ended with the block."""
    with tempfile.TemporaryDirectory(prefix="hftasks-compat-") as folder:
        theirs = _server(Path(folder, "theirs"), THEIRS, peer_python)
        ours = _server(Path(folder, "ours"), OURS)
        with theirs, ours:
            yield theirs, ours


def _server(root: Path, implementation: str, python: Path | None = None) -> process.Server:
    models = {
        model.name: process.Model(None, implementation=implementation, top={"parameters": model.parameters()})
        for model in MODELS
    }
    return process.Server(root, models, environment=QUIET, python=python)
