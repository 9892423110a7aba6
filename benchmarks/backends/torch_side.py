"""Precisions of torch itself: int8 and bfloat16 against float32, beside what the core could do at best."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from benchmarks.inprocess import InProcess
from benchmarks.report import Figure, Findings, Table, number, spread
from benchmarks.rounds import Spread, ratios, take_turns
from benchmarks.session import Session
from benchmarks.shapes import MINILM, Shape
from benchmarks.versus.limits import gemm_tokens_per_s
from mlserver_hftasks.engine.rows import Row
from mlserver_hftasks.settings import Compile

FP32, BF16, INT8 = "float32", "bfloat16", "int8"
EXTRA: dict[str, dict[str, Any]] = {
    FP32: {"dtype": "float32"},
    BF16: {"dtype": "bfloat16"},
    INT8: {"quantization": "int8"},
}
TARGETS = {INT8: (2.6, 3.2), BF16: (1.6, 1.6)}
"""Times float32 on the MiniLM and on the DistilBERT shape."""
TEXTS = 128


def measure(session: Session) -> Findings:
    """Texts/s of CPU time, and the share of the rate of the layers' products alone."""
    findings = Findings()
    for shape in session.plan.shapes:
        findings.add(_measure(session, shape))
    return findings


def compiled(session: Session) -> Findings:
    """What `compile` brings, and how long it takes."""
    folder = session.model(MINILM)
    models, loaded = {}, {}
    for name, compile_setting in (("eager", None), ("inductor", Compile())):
        for dtype in (FP32, BF16):
            began = time.monotonic()
            models[f"{dtype}, {name}"] = InProcess(folder, dtype=dtype, compile=compile_setting)
            loaded[f"{dtype}, {name}"] = time.monotonic() - began
    rows = models[f"{FP32}, eager"].rows(session.texts(TEXTS // 2))
    turns = {name: partial(_run, model, rows) for name, model in models.items()}
    runs = take_turns(session.plan.few_rounds, turns, session.tell)
    lines = []
    for name, each in runs.items():
        base = runs[f"{name.partition(',')[0]}, eager"]
        session.journal.record("compile", name, shape=MINILM.described, load_s=loaded[name], texts_per_s=each)
        rate, times = Spread.of(each), Spread.of(ratios(each, base))
        lines.append((name, number(loaded[name]), spread(rate), spread(times)))
    columns = ("", "load s", "texts/s", "times eager")
    return Findings(tables=[Table(f"torch.compile ({MINILM.name})", columns, lines)])


def _measure(session: Session, shape: Shape) -> Findings:
    folder = session.model(shape)
    models = {name: InProcess(folder, **extra) for name, extra in EXTRA.items()}
    rows = models[FP32].rows(session.texts(TEXTS if shape is MINILM else TEXTS // 3))
    tokens = sum(row.cost for row in rows) / len(rows)
    turns = {name: partial(_run, model, rows) for name, model in models.items()}
    turns |= {f"GEMM {name}": partial(_limit, shape, name, tokens) for name in EXTRA}
    runs = take_turns(session.rounds(shape), turns, session.tell)
    for name, each in runs.items():
        session.journal.record("torch", name, shape=shape.described, texts_per_s=each)
    return Findings(_figures(shape, runs), [_table(shape, runs)])


def _run(model: InProcess, rows: list[Row]) -> float:
    batches = model.engine_batches(rows)
    began = time.process_time()
    model.forward(batches)
    return len(rows) / (time.process_time() - began)


def _limit(shape: Shape, dtype: str, tokens_per_text: float) -> float:
    return gemm_tokens_per_s(shape, dtype) / tokens_per_text


def _figures(shape: Shape, runs: dict[str, list[float]]) -> list[Figure]:
    return [
        Figure(
            f"torch {name} against torch {FP32}, texts/s ({shape.name})",
            Spread.of(ratios(runs[name], runs[FP32])),
            at_least=targets[0 if shape is MINILM else 1],
            detail=f"{number(Spread.of(runs[name]).median)} against {number(Spread.of(runs[FP32]).median)}",
        )
        for name, targets in TARGETS.items()
    ]


def _table(shape: Shape, runs: dict[str, list[float]]) -> Table:
    lines = [
        (
            name,
            spread(Spread.of(runs[name])),
            spread(Spread.of(ratios(runs[name], runs[FP32]))),
            spread(Spread.of(runs[f"GEMM {name}"])),
            spread(Spread.of(ratios(runs[name], runs[f"GEMM {name}"]))),
        )
        for name in EXTRA
    ]
    columns = ("", "texts/s", f"times {FP32}", "the layers' GEMMs alone", "share")
    return Table(f"Torch by CPU time ({shape.name})", columns, lines)
