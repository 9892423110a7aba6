"""The incumbent for real beside ours: `python -m benchmarks versus`.

systems             what is compared, a row each
fleet               their servers, side by side; a model that both transformers versions load
start               start and memory; `cost` is the foundation's `parts`
online, limits      one text per request, beside what the core could do
padding             the same with lengths that differ more and more
bulk                a request of 512 texts, alone and beside single ones
overload            more than a system can carry
embeddings          vectors over gRPC and REST
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from benchmarks.foundation import parts
from benchmarks.report import Findings, Table
from benchmarks.session import Session
from benchmarks.versus import bulk, embeddings, online, overload, padding, start
from benchmarks.versus.fleet import Fleet

EXPERIMENTS: Mapping[str, Callable[[Fleet], Findings]] = {
    # before the fleet is there
    "start": start.measure,
    "cost": lambda fleet: parts.measure(fleet.session),
    "embeddings": embeddings.measure,
    "online": online.measure,
    "padding": padding.measure,
    "bulk": bulk.measure_alone,
    "mixed": bulk.measure_mixed,
    "overload": overload.measure,
}
QUICK = ("start", "online", "overload")
TITLE = "Benchmark against mlserver-huggingface"
OPEN_FILES = 8192
"""An overloaded server that refuses nothing holds a connection for every request that waits."""


@contextmanager
def experiments(
    session: Session, others: Mapping[str, str]
) -> Iterator[Mapping[str, Callable[[Session], Findings]]]:
    """The experiments by name, with the servers that they share; `others` are further ones by URL."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < OPEN_FILES:
        resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES if hard < 0 else min(OPEN_FILES, hard), hard))
    with Fleet(session, others) as fleet:
        yield {name: partial(_with, fleet, measure) for name, measure in EXPERIMENTS.items()}


def _with(fleet: Fleet, measure: Callable[[Fleet], Findings], session: Session) -> Findings:
    known = set(fleet.failed)
    findings = measure(fleet)
    rows = [[name, why] for name, why in fleet.failed.items() if name not in known]
    if rows:
        findings.tables.append(Table("Systems that did not start, and are not measured", ("", "why"), rows))
    return findings
