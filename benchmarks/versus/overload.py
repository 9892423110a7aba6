"""Poisson arrivals at 0.5 to 4 times what each system can carry: goodput within a latency target."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from benchmarks import load
from benchmarks.report import Figure, Findings, Line, Plot, Table, number
from benchmarks.rounds import Spread, ratios, take_turns
from benchmarks.server import running
from benchmarks.session import Session
from benchmarks.shapes import MINILM
from benchmarks.versus.fleet import LIMIT_S, Endpoint, Fleet, shared, warm
from benchmarks.versus.systems import BATCHING, FP32

TARGETS_MS = (40.0, 200.0)
TIMES = (0.5, 1.0, 2.0, 4.0)
CLIENTS = 32
"""That measure the capacity."""
GOODPUT_SHARE, FIGURE_MS = 0.9, 200.0
DRAIN_S = 60.0


@dataclass(frozen=True, slots=True)
class Run:
    """One system at one multiple of its capacity."""

    times: float
    capacity_per_s: float
    offered_per_s: float
    answered_per_s: float
    refused_per_s: float
    p50_ms: float
    """Of the requests that were answered with 200."""
    p95_ms: float
    within_40_per_s: float
    within_200_per_s: float
    lost: int
    """Requests without an answer, or with anything but 200 and 429."""
    lag_p99_ms: float
    """Of the generator itself."""


Measured = Mapping[str, list[list[Run]]]
"""By system, then by round, then by multiple of the capacity."""


def measure(fleet: Fleet) -> Findings:
    """Goodput and latency of all systems, ours with each target as its `latency_target_ms`."""
    session = fleet.session
    others = [each for each in fleet.endpoints() if each.system.role in {"incumbent", "other"}]
    if session.plan.name == "quick":
        others = [each for each in others if each.system is not BATCHING]
    folder = shared(session, MINILM)
    bounds = TARGETS_MS[1:] if session.plan.name == "quick" else TARGETS_MS
    models = [FP32.model(MINILM.name, folder)]
    models += [FP32.model(_bounded(target), folder, latency_target_ms=target) for target in bounds]
    with running(*models) as server:
        ours = Endpoint(FP32, server.host, server.port)
        systems: dict[str, Callable[[], list[Run]]] = {}
        for target in bounds:
            warm(ours.texts(MINILM, session.texts(), _bounded(target)))
            systems[name_of(target)] = partial(_sweep, session, ours, _bounded(target))
        warm(ours.texts(MINILM, session.texts()))
        systems |= {each.system.name: partial(_sweep, session, each, None) for each in others}
        runs = take_turns(session.plan.few_rounds, systems, session.tell)
    _record(session, runs)
    return Findings(_figures(runs), [_table(runs)], [_plot(runs)])


def _bounded(target_ms: float) -> str:
    return f"{MINILM.name}-{target_ms:.0f}"


def name_of(target_ms: float) -> str:
    """Ours with that latency target."""
    return f"{FP32.name}, target {target_ms:.0f} ms"


def _sweep(session: Session, endpoint: Endpoint, bounded: str | None) -> list[Run]:
    plain = endpoint.texts(MINILM, session.texts())
    capacity = load.run(load.closed_loop(plain, CLIENTS, len(plain.texts), limit_s=LIMIT_S)).per_second
    times = (TIMES[0], TIMES[-1]) if session.plan.name == "quick" else TIMES
    return [_overload(session, endpoint, bounded, capacity, each) for each in times]


def _overload(
    session: Session, endpoint: Endpoint, bounded: str | None, capacity: float, times: float
) -> Run:
    target, seconds = endpoint.texts(MINILM, session.texts(), bounded), session.plan.overload_s
    arrivals = load.poisson(times * capacity, seconds, seed=7)
    # a server that refuses nothing answers the last request only when all before it are
    limit_s = seconds * (times + 1) + DRAIN_S
    seen = load.run(load.open_loop(target, arrivals, limit_s=limit_s))
    load.run(load.closed_loop(target, 1, 0, limit_s=DRAIN_S))
    took = seen.latencies_ms(200)
    refused = sum(answer.status == 429 for answer in seen.answers)
    within_40, within_200 = (sum(took_ms <= bound for took_ms in took) / seconds for bound in TARGETS_MS)
    return Run(
        times,
        capacity,
        seen.sent / seconds,
        len(took) / seconds,
        refused / seconds,
        load.percentile(took, 50),
        load.percentile(took, 95),
        within_40,
        within_200,
        seen.sent - len(took) - refused,
        seen.lag_ms,
    )


def _record(session: Session, runs: Measured) -> None:
    for system, rounds in runs.items():
        for index, sweep in enumerate(rounds):
            for run in sweep:
                values = {name: getattr(run, name) for name in Run.__slots__}
                session.journal.record(
                    "overload", system, shape=MINILM.described, dtype="float32", round=index, **values
                )


# -- what it shows -------------------------------------------------------------------------------


def _at(runs: Measured, system: str, step: int, name: str) -> list[float]:
    return [getattr(sweep[step], name) for sweep in runs[system]]


def _figures(runs: Measured) -> list[Figure]:
    figures = []
    for system in runs:
        target = 40.0 if system == name_of(40.0) else FIGURE_MS
        goodput = _at(runs, system, -1, f"within_{target:.0f}_per_s")
        capacity = _at(runs, system, -1, "capacity_per_s")
        figures.append(
            Figure(
                f"{TIMES[-1]:.0f} times capacity: goodput within {target:.0f} ms, of capacity ({system})",
                Spread.of(ratios(goodput, capacity)),
                at_least=GOODPUT_SHARE if system == name_of(FIGURE_MS) else None,
                detail=f"{number(Spread.of(goodput).median)} of {number(Spread.of(capacity).median)} "
                f"requests/s; p95 {number(Spread.of(_at(runs, system, -1, 'p95_ms')).median)} ms",
            )
        )
    return figures


COLUMNS = {
    "capacity_per_s": "capacity/s",
    "offered_per_s": "offered/s",
    "answered_per_s": "answered/s",
    "refused_per_s": "refused/s",
    "within_40_per_s": "within 40 ms/s",
    "within_200_per_s": "within 200 ms/s",
    "p50_ms": "p50 ms",
    "p95_ms": "p95 ms",
    "lag_p99_ms": "generator's lag p99 ms",
}


def _table(runs: Measured) -> Table:
    rows = [
        [
            system,
            number(rounds[0][step].times),
            *(number(Spread.of(_at(runs, system, step, name)).median) for name in COLUMNS),
            number(sum(_at(runs, system, step, "lost"))),
        ]
        for system, rounds in runs.items()
        for step in range(len(rounds[0]))
    ]
    title = "Overload, multiples of each system's own capacity (answered: also after the arrivals' end)"
    return Table(title, ("", "times", *COLUMNS.values(), "lost"), rows)


def _plot(runs: Measured) -> Plot:
    lines = [
        Line(
            system,
            [Spread.of(_at(runs, system, step, "offered_per_s")).median for step in range(len(rounds[0]))],
            [Spread.of(_at(runs, system, step, "p95_ms")) for step in range(len(rounds[0]))],
        )
        for system, rounds in runs.items()
    ]
    lines = [line for line in lines if not all(math.isnan(value.median) for value in line.y)]
    title = "Latency against offered load (p95 of what is answered)"
    return Plot("latency", title, "requests/s offered", "p95 ms", lines, log_y=True)
