"""The experiments behind the figures of the foundation, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from benchmarks.foundation import bulk, equality, online, overload, packing, parts
from benchmarks.report import Findings
from benchmarks.session import Session

TITLE = "Benchmark of the foundation"
EXPERIMENTS: Mapping[str, Callable[[Session], Findings]] = {
    "packing": packing.measure,
    "online": online.measure,
    "bulk": bulk.measure,
    "overload": overload.measure,
    "equality": equality.measure,
    "parts": parts.measure,
}
