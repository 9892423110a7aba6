"""Single texts and health probes while one request of 512 texts is served."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from benchmarks import load, v2
from benchmarks.foundation.online import mean
from benchmarks.report import Figure, Findings, number
from benchmarks.rounds import Spread, take_turns
from benchmarks.server import Server, classifier, running
from benchmarks.session import Session
from benchmarks.shapes import MINILM

T = TypeVar("T")

BULK_TEXTS = 512
SINGLES_PER_S, PROBES_PER_S = 10, 20
LIVE_MS = 50.0
LIMIT_S = 90.0
MODEL = "model"


@dataclass(frozen=True, slots=True)
class Run:
    """Latencies of single texts and of probes, beside bulk requests or without."""

    p50_ms: float
    p95_ms: float
    live_max_ms: float
    singles: int
    batch_ms: float = 0.0
    """Mean batch of a bulk request that is alone."""
    bulk_s: float = 0.0
    faults: int = 0


def measure(session: Session) -> Findings:
    """p95 of single texts beside a bulk request, against two batches and the idle p95."""
    with running(classifier(MODEL, session.model(MINILM))) as server:
        load.run(
            load.closed_loop(
                v2.Texts(server.host, server.port, MODEL, session.texts()), 8, 64, limit_s=LIMIT_S
            )
        )
        systems = {
            "idle": partial(_idle, session, server),
            "bulk": partial(_beside_bulk, session, server),
        }
        runs = take_turns(session.plan.few_rounds, systems, session.tell)
    for system, each in runs.items():
        for index, run in enumerate(each):
            values = {name: getattr(run, name) for name in Run.__slots__}
            session.journal.record(
                "bulk", system, shape=MINILM.described, dtype="float32", round=index, **values
            )
    return Findings(_figures(runs["idle"], runs["bulk"]))


def _figures(idle: list[Run], bulk: list[Run]) -> list[Figure]:
    bounds = [2 * b.batch_ms + i.p95_ms for i, b in zip(idle, bulk, strict=True)]
    shares = [b.p95_ms / bound for b, bound in zip(bulk, bounds, strict=True)]
    batch, idle_p95, p95 = (
        Spread.of(values).median
        for values in ([b.batch_ms for b in bulk], [i.p95_ms for i in idle], [b.p95_ms for b in bulk])
    )
    faults = sum(run.faults for run in idle + bulk)
    return [
        Figure(
            f"p95 of single texts beside a request of {BULK_TEXTS}, against two batches and the idle p95",
            Spread.of(shares),
            at_most=1.0,
            detail=f"{number(p95)} ms against 2 x {number(batch)} + {number(idle_p95)} ms; bulk "
            f"{number(Spread.of([b.bulk_s for b in bulk]).median)} s; {faults} faults",
        ),
        Figure(
            "health probe while the device is busy, slowest, ms",
            Spread.of([b.live_max_ms for b in bulk]),
            at_most=LIVE_MS,
            detail=f"idle {number(max(i.live_max_ms for i in idle))} ms",
        ),
    ]


def _idle(session: Session, server: Server) -> Run:
    singles, probes, _ = load.run(_beside(session, server, asyncio.sleep(4.0 * session.plan.bulks)))
    return _run(singles, probes)


def _beside_bulk(session: Session, server: Server) -> Run:
    target = v2.Bulk(server.host, server.port, MODEL, session.texts(BULK_TEXTS))
    before = server.metrics(MODEL)
    load.run(load.closed_loop(target, 1, 0, limit_s=LIMIT_S))
    batch_s = mean(before, server.metrics(MODEL), "hftasks_forward_seconds")
    work = load.closed_loop(target, 1, session.plan.bulks - 1, limit_s=LIMIT_S)
    singles, probes, bulks = load.run(_beside(session, server, work))
    took = [answer.done_s - answer.sent_s for answer in bulks.answers]
    run = _run(singles, probes)
    return replace(
        run, batch_ms=1e3 * batch_s, bulk_s=Spread.of(took).median, faults=run.faults + _faults(bulks)
    )


async def _beside(
    session: Session, server: Server, work: Coroutine[Any, Any, T]
) -> tuple[load.Load, load.Load, T]:
    """Single texts and probes for as long as the work takes, and what came of it."""
    task = asyncio.create_task(work)
    singles, probes = (
        load.open_loop(target, load.poisson(rate, LIMIT_S, seed=rate, until=task.done), limit_s=LIMIT_S)
        for target, rate in (
            (v2.Texts(server.host, server.port, MODEL, session.texts()), SINGLES_PER_S),
            (v2.Probe(server.host, server.port), PROBES_PER_S),
        )
    )
    return await asyncio.gather(singles, probes, task)


def _run(singles: load.Load, probes: load.Load) -> Run:
    took = singles.latencies_ms()
    return Run(
        load.percentile(took, 50),
        load.percentile(took, 95),
        max(probes.latencies_ms(), default=float("nan")),
        len(took),
        faults=_faults(singles) + _faults(probes),
    )


def _faults(seen: load.Load) -> int:
    return seen.faults + sum(answer.status != 200 for answer in seen.answers)
