"""What a request costs beside the model, with its target; measured as for the foundation."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.foundation import parts
from benchmarks.report import Findings
from benchmarks.versus.fleet import Fleet

TIMES_ECHO = 1.25


def measure(fleet: Fleet) -> Findings:
    """A one-layer model's request against an echo's, and the parts of ours."""
    found = parts.measure(fleet.session)
    return Findings([replace(figure, at_most=TIMES_ECHO) for figure in found.figures], found.tables)
