"""Poisson arrivals at four times what the server can carry, with a latency target."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks import load, v2
from benchmarks.report import Figure, Findings, number
from benchmarks.rounds import Spread, ratios, take_turns
from benchmarks.server import Server, classifier, running
from benchmarks.session import Session
from benchmarks.shapes import MINILM

TARGET_MS = 200.0
TIMES_CAPACITY = 4.0
CLIENTS = 32
REFUSAL_MS = 10.0
FLAT = 1.05
"""Resident memory in the last third of the overload against the first."""
LIMIT_S = 60.0
RSS_INTERVAL_S = 0.1
PLAIN, BOUNDED = "plain", "bounded"


@dataclass(frozen=True, slots=True)
class Run:
    """Capacity, then overload."""

    capacity_per_s: float
    offered_per_s: float
    admitted: int
    refused: int
    p50_ms: float
    p95_ms: float
    refusal_p50_ms: float
    refusal_p95_ms: float
    goodput_per_s: float
    """Answered within the target."""
    goodput_token_share: float
    """Words of the texts answered within the target, against what capacity would carry."""
    rss_mib: tuple[float, ...]
    faults: int
    lag_p99_ms: float
    """Of the generator itself."""


def measure(session: Session) -> Findings:
    """Latency of what is admitted, time of a refusal, memory, goodput."""
    folder = session.model(MINILM)
    models = (classifier(PLAIN, folder), classifier(BOUNDED, folder, latency_target_ms=TARGET_MS))
    with running(*models) as server:
        for name in (PLAIN, BOUNDED):
            load.run(load.closed_loop(_target(session, server, name), 8, 64, limit_s=LIMIT_S))
        rounds = take_turns(
            session.plan.few_rounds, {BOUNDED: partial(_overload, session, server)}, session.tell
        )
    for index, run in enumerate(rounds[BOUNDED]):
        values = {name: getattr(run, name) for name in Run.__slots__}
        session.journal.record(
            "overload",
            "server",
            shape=MINILM.described,
            dtype="float32",
            round=index,
            target_ms=TARGET_MS,
            **values,
        )
    return Findings(_figures(rounds[BOUNDED]))


def _target(session: Session, server: Server, model: str) -> v2.Texts:
    return v2.Texts(server.host, server.port, model, session.texts())


def _overload(session: Session, server: Server) -> Run:
    plain, bounded = (_target(session, server, name) for name in (PLAIN, BOUNDED))
    capacity = load.run(load.closed_loop(plain, CLIENTS, len(plain.texts), limit_s=LIMIT_S)).per_second
    seconds = session.plan.overload_s
    arrivals = load.poisson(TIMES_CAPACITY * capacity, seconds, seed=7)
    seen, rss = load.run(_watched(server, load.open_loop(bounded, arrivals, limit_s=seconds + 20)))
    admitted, refused = seen.latencies_ms(200), seen.latencies_ms(429)
    kept = [answer for answer in seen.answers if answer.status == 200 and answer.latency_ms <= TARGET_MS]
    words = [len(text.split()) for text in bounded.texts]
    kept_words = sum(words[answer.index % len(words)] for answer in kept)
    return Run(
        capacity,
        seen.sent / seconds,
        len(admitted),
        len(refused),
        load.percentile(admitted, 50),
        load.percentile(admitted, 95),
        load.percentile(refused, 50),
        load.percentile(refused, 95),
        len(kept) / seconds,
        kept_words / seconds / (capacity * statistics.mean(words)),
        tuple(rss),
        seen.faults + sum(answer.status not in (200, 429) for answer in seen.answers),
        seen.lag_ms,
    )


async def _watched(server: Server, work: Coroutine[Any, Any, load.Load]) -> tuple[load.Load, list[float]]:
    """What the work gives, and the server's resident memory meanwhile."""
    task = asyncio.create_task(work)
    rss: list[float] = []
    while not task.done():
        rss.append(server.rss_mib())
        await asyncio.wait([task], timeout=RSS_INTERVAL_S)
    return await task, rss


def _figures(runs: list[Run]) -> list[Figure]:
    def of(name: str) -> list[float]:
        return [getattr(run, name) for run in runs]

    rss = [each for run in runs for each in run.rss_mib]
    third = max(len(rss) // 3, 1)
    grown = statistics.median(rss[-third:]) / statistics.median(rss[:third])
    admitted, refused = sum(run.admitted for run in runs), sum(run.refused for run in runs)
    at = f"at {TIMES_CAPACITY:.0f} times capacity"
    return [
        Figure(
            f"{at}: p95 of admitted requests against the target of {TARGET_MS:.0f} ms",
            Spread.of([value / TARGET_MS for value in of("p95_ms")]),
            at_most=1.0,
            detail=f"p95 {number(Spread.of(of('p95_ms')).median)} ms; {admitted} admitted, {refused} refused",
        ),
        Figure(
            f"{at}: median time of a refusal, ms",
            Spread.of(of("refusal_p50_ms")),
            at_most=REFUSAL_MS,
            detail=f"p95 {number(Spread.of(of('refusal_p95_ms')).median)} ms; "
            f"the generator itself was {number(max(of('lag_p99_ms')))} ms late (p99)",
        ),
        Figure(
            f"{at}: resident memory, last third against first",
            Spread.of([grown]),
            at_most=FLAT,
            detail=f"{number(min(rss))} to {number(max(rss))} MiB",
        ),
        Figure(
            f"{at}: requests lost, answered twice or with anything but 200 and 429",
            Spread.of([float(sum(run.faults for run in runs))]),
            at_most=0.0,
            detail=f"of {admitted + refused}",
        ),
        Figure(
            f"{at}: goodput within the target, share of capacity",
            Spread.of(ratios(of("goodput_per_s"), of("capacity_per_s"))),
            detail=f"{number(Spread.of(of('goodput_token_share')).median)} in words; capacity "
            f"{number(Spread.of(of('capacity_per_s')).median)} requests/s",
        ),
    ]
