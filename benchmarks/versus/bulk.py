"""One request of 512 texts: by itself, and beside clients of single texts."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks import load
from benchmarks.report import Figure, Findings, Table, number, spread
from benchmarks.rounds import Spread, ratios, take_turns
from benchmarks.session import Session
from benchmarks.shapes import MINILM
from benchmarks.versus.fleet import Endpoint, Fleet
from benchmarks.versus.systems import FP32, INCUMBENTS

TEXTS, SMOKE_TEXTS = 512, 32
SINGLES_PER_S = 10
LIMIT_S = 120.0


@dataclass(frozen=True, slots=True)
class Run:
    """A bulk request; with singles, also the latencies of the single texts that came meanwhile."""

    texts_per_s: float
    seconds: float
    p50_ms: float = math.nan
    p95_ms: float = math.nan
    max_ms: float = math.nan
    singles: int = 0
    lost: int = 0
    """Single texts without an answer, or with an error."""


Measured = dict[str, list[Run]]


def measure_alone(fleet: Fleet) -> Findings:
    """Texts per second of the bulk request."""
    runs = _turns(fleet, "bulk alone", lambda endpoint: _alone(fleet.session, endpoint))
    best = _best(runs)
    if best is None or FP32.name not in runs:
        return Findings(tables=[_alone_table(runs)])
    figure = Figure(
        f"a request of {TEXTS} texts: {FP32.name} against the incumbent's best, texts/s",
        Spread.of(ratios(_of(runs, FP32.name, "texts_per_s"), _of(runs, best, "texts_per_s"))),
        detail=f"the incumbent's best: {best}",
    )
    return Findings([figure], [_alone_table(runs)])


def _alone_table(runs: Measured) -> Table:
    rows = [
        [name, spread(Spread.of(_of(runs, name, "texts_per_s"))), number(_median(runs, name, "seconds"))]
        for name in runs
    ]
    return Table(f"One request of {TEXTS} texts", ("", "texts/s", "s"), rows)


def measure_mixed(fleet: Fleet) -> Findings:
    """Latency of single texts beside a bulk request."""
    runs = _turns(fleet, "bulk and singles", lambda endpoint: _mixed(fleet.session, endpoint))
    theirs = [system.name for system in INCUMBENTS if system.name in runs]
    best = min(theirs, key=lambda name: _median(runs, name, "p95_ms"), default=None)
    if best is None or FP32.name not in runs:
        return Findings(tables=[_mixed_table(runs)])
    figure = Figure(
        f"single texts beside a request of {TEXTS}: {FP32.name} against the incumbent's best, p95",
        Spread.of(ratios(_of(runs, FP32.name, "p95_ms"), _of(runs, best, "p95_ms"))),
        detail=f"{number(_median(runs, FP32.name, 'p95_ms'))} against "
        f"{number(_median(runs, best, 'p95_ms'))} ms ({best})",
    )
    return Findings([figure], [_mixed_table(runs)])


def _mixed_table(runs: Measured) -> Table:
    columns = {"p50_ms": "p50 ms", "p95_ms": "p95 ms", "max_ms": "slowest ms", "seconds": "bulk s"}
    rows = [
        [
            name,
            *(number(_median(runs, name, field)) for field in columns),
            f"{sum(run.lost for run in each)} of {sum(run.singles for run in each)}",
        ]
        for name, each in runs.items()
    ]
    title = f"{SINGLES_PER_S} single texts per second beside requests of {TEXTS}"
    return Table(title, ("", *columns.values(), "singles lost"), rows)


def _turns(fleet: Fleet, workload: str, run: Callable[[Endpoint], Run]) -> Measured:
    session = fleet.session
    systems = {
        endpoint.system.name: partial(run, endpoint)
        for endpoint in fleet.endpoints()
        if endpoint.system.role != "ceiling"
    }
    runs = take_turns(session.plan.few_rounds, systems, session.tell)
    for name, each in runs.items():
        for index, result in enumerate(each):
            values = {field: getattr(result, field) for field in Run.__slots__}
            session.journal.record(
                workload, name, shape=MINILM.described, texts=len(_texts(session)), round=index, **values
            )
    return runs


def _texts(session: Session) -> list[str]:
    return session.texts(SMOKE_TEXTS if session.plan.name == "smoke" else TEXTS)


def _alone(session: Session, endpoint: Endpoint) -> Run:
    target = endpoint.bulk(MINILM, _texts(session))
    return _bulk(load.run(load.closed_loop(target, 1, 0, limit_s=LIMIT_S)))


def _bulk(seen: load.Load) -> Run:
    if seen.faults or not seen.answers or seen.answers[0].status != 200:
        return Run(math.nan, math.nan)
    seconds = seen.answers[0].latency_ms / 1e3
    texts: Sequence[str] = getattr(seen.target, "texts", ())
    return Run(len(texts) / seconds, seconds)


def _mixed(session: Session, endpoint: Endpoint) -> Run:
    return load.run(_beside(session, endpoint))


async def _beside(session: Session, endpoint: Endpoint) -> Run:
    target = endpoint.bulk(MINILM, _texts(session))
    work = asyncio.create_task(load.closed_loop(target, 1, 0, limit_s=LIMIT_S))
    arrivals = load.poisson(SINGLES_PER_S, LIMIT_S, seed=SINGLES_PER_S, until=work.done)
    singles = await load.open_loop(endpoint.texts(MINILM, session.texts()), arrivals, limit_s=LIMIT_S)
    bulk, took = _bulk(await work), singles.latencies_ms()
    return Run(
        bulk.texts_per_s,
        bulk.seconds,
        load.percentile(took, 50),
        load.percentile(took, 95),
        max(took, default=math.nan),
        singles.sent,
        singles.sent - len(took),
    )


def _of(runs: Measured, name: str, field: str) -> list[float]:
    return [getattr(run, field) for run in runs[name]]


def _median(runs: Measured, name: str, field: str) -> float:
    return Spread.of(_of(runs, name, field)).median


def _best(runs: Measured) -> str | None:
    theirs = [system.name for system in INCUMBENTS if system.name in runs]
    return max(theirs, key=lambda name: _median(runs, name, "texts_per_s"), default=None)
