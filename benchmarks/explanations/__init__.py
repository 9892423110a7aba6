"""The experiments behind the figures of explanations, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from benchmarks.explanations import answers, bound, interference, speed, torchserve
from benchmarks.report import Findings
from benchmarks.session import Session

TITLE = "Benchmark of explanations"
EXPERIMENTS: Mapping[str, Callable[[Session], Findings]] = {
    "speed": speed.measure,
    "torchserve": torchserve.measure,
    "bound": bound.measure,
    "interference": interference.measure,
    "answers": answers.measure,
}
QUICK = ("speed", "interference")
