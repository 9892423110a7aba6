"""Programs of tiny models, each exported at most once per process and removed at its end."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from mlserver_hftasks.loading.cache import new_folder
from mlserver_hftasks.loading.programs import ProgramReport, export_program
from mlserver_hftasks.settings import Settings
from tests import tiny

TASKS: dict[tiny.HeadName, str] = {
    "sequence": "text-classification",
    "token": "token-classification",
    "mask": "fill-mask",
    "qa": "question-answering",
    "base": "feature-extraction",
    "causal": "text-generation",
}
CALIBRATION = tuple(tiny.CORPUS.read_text(encoding="utf-8").splitlines()[:64])


def folder(architecture: str, head: tiny.HeadName, backend: str, quantization: str = "none") -> Path:
    """A folder that is served as it is. It is shared: do not write to it."""
    return _exported(architecture, head, backend, quantization)[0]


def report(architecture: str, head: tiny.HeadName, backend: str, quantization: str = "none") -> ProgramReport:
    """What its export said."""
    return _exported(architecture, head, backend, quantization)[1]


@functools.cache
def _exported(
    architecture: str, head: tiny.HeadName, backend: Any, quantization: Any
) -> tuple[Path, ProgramReport]:
    model = tiny.folder(architecture, head)
    out = model.with_name(f"{model.name}-{backend}-{quantization}")
    settings = Settings(
        task=TASKS[head], pretrained_model=str(model), backend=backend, quantization=quantization
    )
    with new_folder(out) as unfinished:
        made = export_program(settings, unfinished, calibration=CALIBRATION)
    return out, made
