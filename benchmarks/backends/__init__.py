"""The experiments behind `docs/backends.md`: every backend against our own torch in float32, packed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from benchmarks.backends import decoder_programs, inside, neighbours, served, start, torch_side
from benchmarks.report import Findings
from benchmarks.session import Session

TITLE = "Benchmark of the backends"
EXPERIMENTS: Mapping[str, Callable[[Session], Findings]] = {
    "inside": inside.measure,
    "neighbours": neighbours.measure,
    "served": served.measure,
    "start": start.measure,
    "torch": torch_side.measure,
    "compile": torch_side.compiled,
    "decoder": decoder_programs.measure,
}
QUICK = ("inside", "start")
