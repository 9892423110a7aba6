"""From the start of the process to the model's readiness, and resident memory before and after load."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from benchmarks import load
from benchmarks.report import Figure, Findings, Table, number, spread
from benchmarks.rounds import Spread, ratios, take_turns
from benchmarks.server import running
from benchmarks.session import Session
from benchmarks.shapes import MINILM
from benchmarks.versus.fleet import LIMIT_S, Endpoint, Fleet, shared
from benchmarks.versus.systems import BATCHING, BF16, FP32, INT8_ONNX, ONNX, OURS_FP32, PLAIN, System

CLIENTS = 32
READY_SHARE, RSS_SHARE = 0.5, 0.75
COLUMNS = {"ready_s": "ready s", "idle_mib": "RSS idle MiB", "loaded_mib": "RSS after load MiB"}


@dataclass(frozen=True, slots=True)
class Run:
    """One life of a server."""

    ready_s: float
    idle_mib: float
    loaded_mib: float


def measure(fleet: Fleet) -> Findings:
    """Ours against the incumbent's plain configuration; each server has one model."""
    session = fleet.session
    full = session.plan.name == "full"
    systems = (FP32, ONNX, BF16, INT8_ONNX, PLAIN, BATCHING) if full else (FP32, PLAIN)
    if full:
        _live(session, PLAIN)  # both have been read from the disk before
        _live(session, FP32)
    turns = {system.name: partial(_live, session, system) for system in systems}
    runs = take_turns(session.plan.few_rounds, turns, session.tell)
    rows = []
    for name, each in runs.items():
        for index, run in enumerate(each):
            values = {field: getattr(run, field) for field in Run.__slots__}
            session.journal.record("start", name, shape=MINILM.described, round=index, **values)
        rows.append([name, *(spread(Spread.of([getattr(run, field) for run in each])) for field in COLUMNS)])
    table = Table(f"Start and memory ({MINILM.name})", ("", *COLUMNS.values()), rows)
    return Findings(_figures(runs), [table])


def _live(session: Session, system: System) -> Run:
    with running(system.model(MINILM.name, shared(session, MINILM)), **system.server_options()) as server:
        idle = server.rss_mib()
        target = Endpoint(system, server.host, server.port).texts(MINILM, session.texts())
        load.run(load.closed_loop(target, CLIENTS, len(target.texts), limit_s=LIMIT_S))
        return Run(server.ready_s, idle, server.rss_mib())


def _figures(runs: dict[str, list[Run]]) -> list[Figure]:
    def of(system: System, field: str) -> list[float]:
        return [getattr(run, field) for run in runs[system.name]]

    figures = []
    for what, field, target in (
        ("start to ready", "ready_s", READY_SHARE),
        ("resident memory after load", "loaded_mib", RSS_SHARE),
    ):
        theirs = of(PLAIN, field)
        for system in (each for each in OURS_FP32 if each.name in runs):
            ours = of(system, field)
            medians = " against ".join(number(Spread.of(values).median) for values in (ours, theirs))
            figures.append(
                Figure(
                    f"{what}: {system.name} against {PLAIN.name}",
                    Spread.of(ratios(ours, theirs)),
                    at_most=target,
                    detail=f"{medians} {field.rpartition('_')[2].replace('mib', 'MiB')}",
                )
            )
    return figures
