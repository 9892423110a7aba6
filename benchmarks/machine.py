"""Where and when a result was measured, and whether the machine was left alone meanwhile."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("mlserver-hftasks", "mlserver", "torch", "transformers", "tokenizers", "numpy", "uvloop")


def describe() -> dict[str, Any]:
    """Date, versions, CPU and threads: what each result carries."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    return (
        f"{named.get('model name', 'unknown')} "
        f"(family {named.get('cpu family', '?')}, model {named.get('model', '?')})"
    )


def _clocks() -> tuple[float, float, float]:
    """Seconds: of all cores when busy, of this process and its ended children, of the wall."""
    try:
        fields = [int(text) for text in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        busy = (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")
    except OSError:
        busy = float("nan")
    times = os.times()
    ours = times.user + times.system + times.children_user + times.children_system
    return busy, ours, time.monotonic()


@dataclass(slots=True)
class Others:
    """CPU time taken by processes that are not this one's, since it was made (Linux).

    Processes of ours count from the moment they have ended.
    """

    _begin: tuple[float, float, float] = field(default_factory=_clocks)

    def cores(self) -> float:
        """How many cores they used on average; NaN where it cannot be known."""
        busy, ours, wall = (now - then for now, then in zip(_clocks(), self._begin, strict=True))
        return max(busy - ours, 0.0) / wall if wall > 0 else float("nan")
