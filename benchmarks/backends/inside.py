"""In process: texts/s in the engine's own batches and one by one, and how near the answers are to float32."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np

from benchmarks.backends.systems import ON_TORCH, TORCH, System, systems_of
from benchmarks.inprocess import InProcess
from benchmarks.report import Figure, Findings, Table, number, spread
from benchmarks.rounds import Spread, ratios, take_turns
from benchmarks.session import Session
from benchmarks.shapes import MINILM, Shape
from benchmarks.versus.limits import gemm_tokens_per_s
from mlserver_hftasks.engine.rows import Row

TEXTS, SINGLES = 128, 32
COLUMNS = ("", "texts/s", "times torch", "of the GEMM rate", "one text, ms", "times torch", "agree", "differ")


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one system: rates per second of CPU time, which other processes do not touch."""

    batched: float
    singly: float
    logits: np.ndarray


def measure(session: Session) -> Findings:
    """Every system on every shape, by turns."""
    findings = Findings()
    for shape in session.plan.shapes:
        findings.add(_measure(session, shape))
    return findings


def _measure(session: Session, shape: Shape) -> Findings:
    systems = systems_of(session)
    if shape is MINILM and session.plan.name != "quick":
        systems += ON_TORCH
    models = {system: InProcess(system.folder(session, shape), **system.extra) for system in systems}
    count = TEXTS if shape is MINILM else TEXTS // 3
    rows = models[TORCH].rows(session.texts(count))
    turns = {system.name: partial(_run, model, rows) for system, model in models.items()}
    runs = take_turns(session.rounds(shape), turns, session.tell)
    for name, each in runs.items():
        for index, run in enumerate(each):
            values = {"texts_per_s": run.batched, "singles_per_s": run.singly}
            session.journal.record("inside", name, shape=shape.described, round=index, **values)
    return Findings(
        [figure for system in models for figure in _figures(shape, system, runs)],
        [_table(shape, rows, list(models), runs)],
    )


def _run(model: InProcess, rows: list[Row]) -> Run:
    batches = model.engine_batches(rows)
    began = time.process_time()
    _, outputs = model.forward(batches)
    batched = len(rows) / (time.process_time() - began)
    by_row = {id(row): output["logits"] for row, output in zip(chain(*batches), outputs, strict=True)}
    singles = rows[:SINGLES]
    began = time.process_time()
    model.forward([[row] for row in singles])
    singly = len(singles) / (time.process_time() - began)
    return Run(batched, singly, np.stack([by_row[id(row)] for row in rows]))


def _figures(shape: Shape, system: System, runs: dict[str, list[Run]]) -> list[Figure]:
    if system.speed is None:
        return []
    mine, base = ([run.batched for run in runs[name]] for name in (system.name, TORCH.name))
    return [
        Figure(
            f"{system.name} against {TORCH.name}, texts/s ({shape.name})",
            Spread.of(ratios(mine, base)),
            at_least=system.speed[0 if shape is MINILM else 1],
            detail=f"{number(Spread.of(mine).median)} against {number(Spread.of(base).median)}",
        )
    ]


def _table(shape: Shape, rows: list[Row], systems: list[System], runs: dict[str, list[Run]]) -> Table:
    tokens = sum(row.cost for row in rows) / len(rows)
    wanted = runs[TORCH.name][0].logits
    lines = []
    for system in systems:
        mine, base = runs[system.name], runs[TORCH.name]
        precision = "bfloat16" if system.dtype == "bfloat16" else "float32"
        rate = Spread.of([run.batched for run in mine]).median
        # int8 is compared with the float32 rate too: torch measures no int8 GEMM of the layers' shapes
        share = rate * tokens / gemm_tokens_per_s(shape, precision)
        lines.append(
            (
                system.name,
                number(rate),
                spread(Spread.of(ratios([run.batched for run in mine], [run.batched for run in base]))),
                f"{share:.2f} of {precision}",
                number(1e3 / Spread.of([run.singly for run in mine]).median),
                spread(Spread.of(ratios([run.singly for run in mine], [run.singly for run in base]))),
                f"{(mine[0].logits.argmax(1) == wanted.argmax(1)).mean():.3f}",
                number(float(np.abs(mine[0].logits - wanted).max())),
            )
        )
    return Table(f"In process, by CPU time ({shape.name}); logits have deviation 1", COLUMNS, lines)
