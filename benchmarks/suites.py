"""The suites: which experiments belong together on one page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from benchmarks import backends, explanations, foundation, generation, versus
from benchmarks.report import Findings
from benchmarks.session import FULL, QUICK, VERSUS, VERSUS_QUICK, Plan, Session

Experiments = Mapping[str, Callable[[Session], Findings]]


@dataclass(frozen=True, slots=True)
class Suite:
    """Experiments by name, in the order in which they run."""

    title: str
    names: tuple[str, ...]
    quick: tuple[str, ...]
    """Those of a quick run."""
    opened: Callable[[Session, Mapping[str, str]], AbstractContextManager[Experiments]]
    """The experiments, with what they share; further servers by URL come second."""
    full_plan: Plan = FULL
    quick_plan: Plan = QUICK
    needs_incumbent: bool = False


def _alone(title: str, experiments: Experiments, quick: tuple[str, ...] = ()) -> Suite:
    """A suite whose experiments share nothing."""

    @contextmanager
    def opened(session: Session, others: Mapping[str, str]) -> Iterator[Experiments]:
        yield experiments

    return Suite(title, tuple(experiments), quick or tuple(experiments), opened)


SUITES: Mapping[str, Suite] = {
    "foundation": _alone(foundation.TITLE, foundation.EXPERIMENTS),
    "generation": _alone(generation.TITLE, generation.EXPERIMENTS, generation.QUICK),
    "backends": _alone(backends.TITLE, backends.EXPERIMENTS, backends.QUICK),
    "explanations": _alone(explanations.TITLE, explanations.EXPERIMENTS, explanations.QUICK),
    "versus": Suite(
        versus.TITLE,
        tuple(versus.EXPERIMENTS),
        versus.QUICK,
        versus.experiments,
        VERSUS,
        VERSUS_QUICK,
        needs_incumbent=True,
    ),
}
