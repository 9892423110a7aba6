"""In process: batches without padding against padded ones, both in order of arrival."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from benchmarks.inprocess import InProcess, in_arrival_order
from benchmarks.report import Figure, Findings, Table, number
from benchmarks.rounds import Spread, ratios, take_turns
from benchmarks.session import Session
from benchmarks.shapes import MINILM, Shape
from mlserver_hftasks.engine.rows import Outputs, Row

BATCH = 16
SPEEDUP, TOLERANCE = 2.5, 1e-5
SIZES = (1, 4, 16, 64)


def measure(session: Session) -> Findings:
    """Speed-up and largest difference, for each shape; packed texts/s by batch size."""
    findings = Findings()
    for shape in session.plan.shapes:
        findings.add(_measure(session, shape))
    return findings


def _measure(session: Session, shape: Shape) -> Findings:
    folder = session.model(shape)
    packed, full, padded = InProcess(folder), InProcess(folder), InProcess(folder, packing="off")
    full.read_all()
    rows = packed.rows(session.texts_for(shape)[: min(128, session.plan.texts // 2)])
    batches = in_arrival_order(rows, BATCH)
    results = take_turns(
        session.rounds(shape),
        {
            "packed": partial(packed.forward, batches),
            "packed, full last layer": partial(full.forward, batches),
            "padded": partial(padded.forward, batches),
        },
        session.tell,
    )
    for system, runs in results.items():
        for index, (took, _) in enumerate(runs):
            session.journal.record(
                "packing",
                system,
                shape=shape.described,
                dtype=packed.dtype,
                batch=BATCH,
                round=index,
                texts_per_s=len(rows) / took,
                tokens_per_s=sum(row.cost for row in rows) / took,
            )
    required = shape is MINILM
    seconds = {system: [run[0] for run in runs] for system, runs in results.items()}
    speed = Figure(
        f"packed against padded, batch {BATCH}, texts/s ({shape.name})",
        Spread.of(ratios(seconds["padded"], seconds["packed"])),
        at_least=SPEEDUP if required else None,
        detail=f"{_rate(rows, seconds['packed'])} against {_rate(rows, seconds['padded'])} texts/s, "
        f"padding share {_padding(batches):.2f}",
    )
    early = Figure(
        f"packed, last layer of what is read, against all of it, texts/s ({shape.name})",
        Spread.of(ratios(seconds["packed, full last layer"], seconds["packed"])),
        detail="a classifier reads the first token of each text",
    )
    differences = [
        _difference(packed_run[1], other[1])
        for name in ("packed, full last layer", "padded")
        for packed_run, other in zip(results["packed"], results[name], strict=True)
    ]
    equal = Figure(
        f"largest difference of their outputs ({shape.name})",
        Spread.of([max(differences)]),
        at_most=TOLERANCE if required else None,
        detail="logits with deviation 1",
    )
    return Findings([speed, early, equal], [_by_size(session, packed, rows, shape)] if required else [])


def _by_size(session: Session, packed: InProcess, rows: list[Row], shape: Shape) -> Table:
    """Where throughput stops to rise, beside what the engine chooses."""
    some = rows[:64]
    batches = {str(size): in_arrival_order(some, size) for size in SIZES}
    chosen = packed.engine_batches(some)
    batches[f"engine: {len(some) / len(chosen):.0f}"] = list(chosen)
    runs = take_turns(
        session.plan.few_rounds,
        {name: partial(packed.forward, each) for name, each in batches.items()},
        session.tell,
    )
    cells = {name: _rate(some, [seconds for seconds, _ in each]) for name, each in runs.items()}
    return Table(
        f"Packed in process by rows per batch, texts/s ({shape.name})", list(cells), [list(cells.values())]
    )


def _rate(rows: list[Row], seconds: list[float]) -> str:
    return number(len(rows) / Spread.of(seconds).median)


def _padding(batches: Sequence[Sequence[Row]]) -> float:
    costs = [[row.cost for row in batch] for batch in batches]
    padded = sum(len(batch) * max(batch) for batch in costs)
    return 1 - sum(map(sum, costs)) / padded


def _difference(some: list[Outputs], others: list[Outputs]) -> float:
    return max(
        float(np.abs(one[name] - other[name]).max())
        for one, other in zip(some, others, strict=True)
        for name in one
    )
