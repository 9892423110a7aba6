"""Over HTTP: what of a backend's speed in process reaches the clients."""

from __future__ import annotations

from functools import partial

from benchmarks import load, v2
from benchmarks.backends.systems import ONNX_INT8, OPENVINO_BFLOAT16, TORCH, System
from benchmarks.inprocess import InProcess
from benchmarks.report import Figure, Findings, Table, number, spread
from benchmarks.rounds import Spread, ratios, take_turns
from benchmarks.server import Server, classifier, running
from benchmarks.session import Session
from benchmarks.shapes import MINILM

CLIENTS = (1, 8, 32)
SYSTEMS = (TORCH, ONNX_INT8, OPENVINO_BFLOAT16)
SHARE = 0.85
LIMIT_S = 60.0
MODEL = "model"


def measure(session: Session) -> Findings:
    """Texts/s of each system by clients; of int8 also its share of what it does in process."""
    rows, figures = [], []
    for system in SYSTEMS:
        folder = system.folder(session, MINILM)
        with running(classifier(MODEL, folder, **system.extra)) as server:
            measured = _measure(session, system, server)
        cells = [spread(Spread.of(measured[str(count)])) for count in CLIENTS]
        rows.append((system.name, *cells, number(Spread.of(measured["in process"]).median)))
        if system is ONNX_INT8:
            share = ratios(measured[str(CLIENTS[-1])], measured["in process"])
            name = f"{system.name}, {CLIENTS[-1]} clients against in process ({MINILM.name})"
            figures.append(Figure(name, Spread.of(share), at_least=SHARE))
    columns = ("texts/s", *(f"{count} clients" for count in CLIENTS), "in process")
    return Findings(figures, [Table(f"Served ({MINILM.name})", columns, rows)])


def _measure(session: Session, system: System, server: Server) -> dict[str, list[float]]:
    alone = InProcess(system.folder(session, MINILM), **system.extra)
    texts = session.texts_for(MINILM)
    target = v2.Texts(server.host, server.port, MODEL, texts)
    load.run(load.closed_loop(target, 8, min(64, len(texts)), limit_s=LIMIT_S))
    turns = {str(count): partial(_serve, target, count, len(texts)) for count in CLIENTS}
    turns["in process"] = partial(_in_process, alone, texts)
    results = take_turns(session.plan.few_rounds, turns, session.tell)
    for name, rates in results.items():
        session.journal.record("served", system.name, clients=name, texts_per_s=rates, shape=MINILM.described)
    return results


def _serve(target: v2.Texts, clients: int, texts: int) -> float:
    counted = min(texts, 64) if clients == 1 else texts
    return load.run(load.closed_loop(target, clients, counted, limit_s=LIMIT_S)).per_second


def _in_process(alone: InProcess, texts: list[str]) -> float:
    seconds, outputs = alone.forward(alone.engine_batches(alone.rows(texts)))
    return len(outputs) / seconds
