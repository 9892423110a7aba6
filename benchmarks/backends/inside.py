"""In process: texts/s in the engine's own batches and one by one, and how near the answers are to float32."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np

from benchmarks.backends.systems import INT8_SPEED, ON_TORCH, TORCH, System, systems_of
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
        _figures(shape, list(models), runs),
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


def _figures(shape: Shape, systems: list[System], runs: dict[str, list[Run]]) -> list[Figure]:
    """Of each system with a target, and of the fastest in int8."""
    place = 0 if shape is MINILM else 1
    figures = [_figure(shape, system, runs, system.speed[place]) for system in systems if system.speed]
    int8 = [system for system in systems if system.precision == "int8"]
    if int8:
        best = max(int8, key=lambda system: Spread.of([run.batched for run in runs[system.name]]).median)
        figures.append(_figure(shape, best, runs, INT8_SPEED[place], "the fastest in int8, "))
    return figures


def _figure(
    shape: Shape, system: System, runs: dict[str, list[Run]], target: float, what: str = ""
) -> Figure:
    mine, base = ([run.batched for run in runs[name]] for name in (system.name, TORCH.name))
    return Figure(
        f"{what}{system.name}, against {TORCH.name}, texts/s ({shape.name})",
        Spread.of(ratios(mine, base)),
        at_least=target,
        detail=f"{number(Spread.of(mine).median)} against {number(Spread.of(base).median)}",
    )


def _table(shape: Shape, rows: list[Row], systems: list[System], runs: dict[str, list[Run]]) -> Table:
    tokens = sum(row.cost for row in rows) / len(rows)
    wanted = runs[TORCH.name][0].logits
    limits = {each: gemm_tokens_per_s(shape, each) for each in {system.precision for system in systems}}
    lines = []
    for system in systems:
        mine, base = runs[system.name], runs[TORCH.name]
        rate = Spread.of([run.batched for run in mine]).median
        share = rate * tokens / limits[system.precision]
        lines.append(
            (
                system.name,
                number(rate),
                spread(Spread.of(ratios([run.batched for run in mine], [run.batched for run in base]))),
                f"{share:.2f} of {system.precision}",
                number(1e3 / Spread.of([run.singly for run in mine]).median),
                spread(Spread.of(ratios([run.singly for run in mine], [run.singly for run in base]))),
                f"{(mine[0].logits.argmax(1) == wanted.argmax(1)).mean():.3f}",
                number(float(np.abs(mine[0].logits - wanted).max())),
            )
        )
    return Table(f"In process, by CPU time ({shape.name}); logits have deviation 1", COLUMNS, lines)
