"""What a prepared model costs and gains: `report.json`, and the same as a table."""

from __future__ import annotations

import datetime
import json
import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.table import Table

from mlserver_hftasks.backends.base import Description
from mlserver_hftasks.cli.trial import Difference, Speed

FILE = "report.json"
PACKAGES = ("mlserver-hftasks", "mlserver", "torch", "transformers", "onnxruntime", "openvino")


@dataclass(frozen=True, slots=True)
class Side:
    """The model before or after."""

    how: Description
    load_s: float
    weights_bytes: int
    """Of the float32 weights before, of the whole folder after."""
    speed: Speed


@dataclass(frozen=True, slots=True)
class Report:
    """All that `prepare` found out."""

    task: str
    source: str
    quantization: str
    rows: int
    """How many were compared."""
    unit: str
    """What throughput counts: rows, or new tokens."""
    before: Side
    after: Side
    difference: Difference
    threads: int

    def write(self, folder: Path) -> None:
        """As JSON."""
        (folder / FILE).write_text(json.dumps({**asdict(self), **machine(self.threads)}, indent=2) + "\n")

    def table(self) -> Table:
        """For the terminal."""
        made = Table("", "float32 on torch", "prepared", "ratio", title=f"{self.task}: {self.source}")
        before, after = self.before, self.after
        made.add_row(
            "backend, dtype", *(f"{side.how.backend}, {side.how.dtype}" for side in (before, after)), ""
        )
        made.add_row("batches", before.how.packing, after.how.packing, "")
        for name, one, other, digits in (
            ("size, MiB", before.weights_bytes / 2**20, after.weights_bytes / 2**20, 1),
            ("latency of one, ms", before.speed.latency_ms, after.speed.latency_ms, 2),
            (f"throughput, {self.unit}/s", before.speed.per_s, after.speed.per_s, 0),
        ):
            made.add_row(name, f"{one:.{digits}f}", f"{other:.{digits}f}", f"{other / one:.2f}")
        made.add_row("largest output difference", "", f"{self.difference.largest:.2g}", "")
        made.add_row("  deviation of the outputs", f"{self.difference.deviation:.2g}", "", "")
        if self.difference.agreement is not None:
            same = "same label" if self.difference.equal_answers is None else "same next token"
            made.add_row(same, "", f"{100 * self.difference.agreement:.2f} %", "")
        if self.difference.equal_answers is not None:
            made.add_row("same answer", "", f"{100 * self.difference.equal_answers:.2f} %", "")
        if self.difference.least_cosine is not None:
            made.add_row("least cosine", "", f"{self.difference.least_cosine:.5f}", "")
        made.caption = f"{self.rows} rows compared; {_cpu()}, {self.threads} threads"
        return made


def machine(threads: int) -> dict[str, Any]:
    """Where and when it was measured."""
    return {
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "threads": threads},
        "versions": {"python": platform.python_version(), **_versions()},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())
