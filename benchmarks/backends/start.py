"""From the start of the process to ready, and its memory: a folder with a program against the model."""

from __future__ import annotations

from functools import partial

from benchmarks.backends.systems import ONNX_INT8, OPENVINO_INT8, TORCH, System
from benchmarks.report import Figure, Findings, Table, number, spread
from benchmarks.rounds import Spread, ratios, take_turns
from benchmarks.server import classifier, running
from benchmarks.session import Session
from benchmarks.shapes import MINILM

SYSTEMS = (TORCH, ONNX_INT8, OPENVINO_INT8)
SHARE = 0.5
COLUMNS = ("", "ready s", "RSS MiB")


def measure(session: Session) -> Findings:
    """Each system's life, by turns."""
    for system in SYSTEMS:
        system.folder(session, MINILM)
    turns = {system.name: partial(_live, session, system) for system in SYSTEMS}
    runs = take_turns(session.plan.few_rounds, turns, session.tell)
    rows = []
    for name, lives in runs.items():
        ready, memory = ([life[index] for life in lives] for index in (0, 1))
        session.journal.record("start", name, shape=MINILM.described, ready_s=ready, rss_mib=memory)
        rows.append((name, spread(Spread.of(ready)), spread(Spread.of(memory))))
    mine, base = ([life[0] for life in runs[system.name]] for system in (ONNX_INT8, TORCH))
    figure = Figure(
        f"start to ready: {ONNX_INT8.name} against {TORCH.name} ({MINILM.name})",
        Spread.of(ratios(mine, base)),
        at_most=SHARE,
        detail=f"{number(Spread.of(mine).median)} against {number(Spread.of(base).median)} s",
    )
    return Findings([figure], [Table(f"Start ({MINILM.name})", COLUMNS, rows)])


def _live(session: Session, system: System) -> tuple[float, float]:
    with running(classifier("model", system.folder(session, MINILM), **system.extra)) as server:
        return server.ready_s, server.rss_mib()
