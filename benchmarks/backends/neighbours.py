"""How far a text's answer moves with its company in a batch: what int8 scales per token are for."""

from __future__ import annotations

import numpy as np

from benchmarks.backends.systems import systems_of
from benchmarks.inprocess import InProcess, in_arrival_order
from benchmarks.report import Findings, Table, number
from benchmarks.session import Session
from benchmarks.shapes import MINILM
from mlserver_hftasks.engine.rows import Row

TEXTS = 64
SIZES = (4, 16, 64)
NOTICEABLE = 1e-3


def measure(session: Session) -> Findings:
    """Batches of several sizes against each text alone."""
    rows = None
    lines = []
    for system in systems_of(session):
        model = InProcess(system.folder(session, MINILM), **system.extra)
        rows = model.rows(session.texts(TEXTS)) if rows is None else rows
        alone = _logits(model, rows, 1)
        moved = [np.abs(_logits(model, rows, size) - alone).max(1) for size in SIZES]
        session.journal.record(
            "neighbours", system.name, shape=MINILM.described, moved=[float(m.max()) for m in moved]
        )
        cells = [f"{number(float(each.max()))}, {(each > NOTICEABLE).sum()} texts" for each in moved]
        lines.append((system.name, *cells))
    columns = ("", *(f"batches of {size}" for size in SIZES))
    title = f"Logits in a batch against alone: the most, and texts of {TEXTS} beyond {NOTICEABLE}"
    return Findings(tables=[Table(title, columns, lines)])


def _logits(model: InProcess, rows: list[Row], size: int) -> np.ndarray:
    _, outputs = model.forward(in_arrival_order(rows, size))
    return np.stack([output["logits"] for output in outputs])
