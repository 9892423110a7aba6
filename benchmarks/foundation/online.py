"""The server under closed-loop clients of one text each, beside the same model in process."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks import load, v2
from benchmarks.inprocess import InProcess
from benchmarks.report import Figure, Findings, Table, number
from benchmarks.rounds import Spread, ratios, take_turns
from benchmarks.server import Server, classifier, running
from benchmarks.session import Session
from benchmarks.shapes import MINILM, Shape

CLIENTS = (1, 8, 32, 128)
THROUGHPUT_SHARE, LATENCY_RATIO, TOLERANCE = 0.85, 1.35, 1e-5
LIMIT_S = 60.0
MODEL = "model"


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one system, in the terms of all of them."""

    texts_per_s: float
    p50_ms: float
    p95_ms: float
    padding_share: float = 0.0
    batch_rows: float = 1.0
    loop_us: float = math.nan
    """CPU time of the server's event loop per request."""
    model_us: float = math.nan
    """CPU time of the device thread per text."""
    client_us: float = math.nan
    faults: int = 0
    score_difference: float = 0.0
    """From the in-process answers; infinite if a label differs."""


def measure(session: Session) -> Findings:
    """Throughput at 32 clients and latency at one, against the model in process."""
    findings = Findings()
    for shape in session.plan.shapes:
        clients = CLIENTS if shape is MINILM else (1, 32)
        with running(classifier(MODEL, session.model(shape))) as server:
            findings.add(_measure(session, shape, server, clients))
    return findings


def _measure(session: Session, shape: Shape, server: Server, clients: Sequence[int]) -> Findings:
    texts = session.texts_for(shape)
    alone = InProcess(session.model(shape))
    batches = alone.engine_batches(alone.rows(texts))
    by_row = {id(row): index for index, row in enumerate(row for batch in batches for row in batch)}
    assert len(by_row) == len(texts)
    expected = alone.answers(texts, alone.forward(_singly(alone, texts))[1])
    singles = min(session.plan.single_texts, len(texts) - 1)
    systems: dict[str, Callable[[], Run]] = {
        "in process, packed": partial(_packed, alone, batches),
        "in process, one by one": partial(_direct, alone, texts[1 : singles + 1]),
    }
    for count in clients:
        counted = singles if count == 1 else len(texts)
        systems[_name(count)] = partial(_serve, server, texts, expected, count, counted)
    load.run(load.closed_loop(v2.Texts(server.host, server.port, MODEL, texts), 8, 64, limit_s=LIMIT_S))
    runs = take_turns(session.rounds(shape), systems, session.tell)
    _record(session, shape, alone.dtype, runs)
    return Findings(_figures(shape, runs), [_table(shape, runs)])


def _singly(alone: InProcess, texts: Sequence[str]) -> list[list[Any]]:
    return [[row] for row in alone.rows(texts)]


def _name(clients: int) -> str:
    return f"server, {clients} client" + ("s" if clients > 1 else "")


# -- systems -------------------------------------------------------------------------------------


def _packed(alone: InProcess, batches: Sequence[Sequence[Any]]) -> Run:
    rows = sum(map(len, batches))
    cpu = time.process_time()
    seconds, _ = alone.forward(batches)
    cpu = time.process_time() - cpu
    return Run(rows / seconds, math.nan, math.nan, batch_rows=rows / len(batches), model_us=1e6 * cpu / rows)


def _direct(alone: InProcess, texts: Sequence[str]) -> Run:
    cpu, clock = time.process_time(), [time.perf_counter()]
    for text in texts:
        alone.answer(text)
        clock.append(time.perf_counter())
    took = [1e3 * (after - before) for before, after in itertools.pairwise(clock)]
    cpu_us = 1e6 * (time.process_time() - cpu) / len(took)
    return Run(
        1e3 * len(took) / sum(took), load.percentile(took, 50), load.percentile(took, 95), model_us=cpu_us
    )


def _serve(server: Server, texts: Sequence[str], expected: Sequence[Any], clients: int, counted: int) -> Run:
    target = v2.Texts(server.host, server.port, MODEL, texts)
    before, cpu = server.metrics(MODEL), server.cpu()
    seen = load.run(load.closed_loop(target, clients, counted, limit_s=LIMIT_S))
    cpu, after = server.cpu().since(cpu), server.metrics(MODEL)
    took = seen.latencies_ms()
    return Run(
        seen.per_second,
        load.percentile(took, 50),
        load.percentile(took, 95),
        mean(before, after, "hftasks_padding_share"),
        mean(before, after, "hftasks_batch_rows"),
        1e6 * cpu.loop_s / seen.sent,
        1e6 * cpu.others_s / seen.sent,
        seen.client_us,
        seen.faults + sum(answer.status != 200 for answer in seen.answers),
        max((_difference(answer, expected) for answer in seen.answers), default=float("nan")),
    )


def mean(before: dict[str, float], after: dict[str, float], name: str) -> float:
    """Of a histogram, over what came between two readings of the metrics."""
    count = after[f"{name}_count"] - before[f"{name}_count"]
    total = after[f"{name}_sum"] - before[f"{name}_sum"]
    return total / count if count else float("nan")


def _difference(answer: load.Answer, expected: Sequence[Any]) -> float:
    if answer.status != 200:
        return float("inf")
    (got,), want = v2.results(answer.body), expected[answer.index % len(expected)]
    return abs(got["score"] - want["score"]) if got["label"] == want["label"] else float("inf")


# -- what it shows -------------------------------------------------------------------------------


def _record(session: Session, shape: Shape, dtype: str, runs: dict[str, list[Run]]) -> None:
    for system, each in runs.items():
        for index, run in enumerate(each):
            values = {name: getattr(run, name) for name in Run.__slots__}
            session.journal.record(
                "online", system, shape=shape.described, dtype=dtype, round=index, **values
            )


def _figures(shape: Shape, runs: dict[str, list[Run]]) -> list[Figure]:
    def of(system: str, name: str) -> list[float]:
        return [getattr(run, name) for run in runs[system]]

    packed, direct = of("in process, packed", "texts_per_s"), of("in process, one by one", "p50_ms")
    many, one = of(_name(32), "texts_per_s"), of(_name(1), "p50_ms")
    served = [run for system, each in runs.items() if system.startswith("server") for run in each]
    required = shape is MINILM
    return [
        Figure(
            f"server at 32 clients against packed in process, texts/s ({shape.name})",
            Spread.of(ratios(many, packed)),
            at_least=THROUGHPUT_SHARE if required else None,
            detail=f"{number(Spread.of(many).median)} against {number(Spread.of(packed).median)} texts/s",
        ),
        Figure(
            f"server at 1 client against the direct call, median latency ({shape.name})",
            Spread.of(ratios(one, direct)),
            at_most=LATENCY_RATIO if required else None,
            detail=f"{number(Spread.of(one).median)} against {number(Spread.of(direct).median)} ms",
        ),
        Figure(
            f"largest difference of the server's scores from those in process ({shape.name})",
            Spread.of([max(run.score_difference for run in served)]),
            at_most=TOLERANCE if required else None,
            detail=f"{sum(run.faults for run in served)} requests without their own answer",
        ),
    ]


COLUMNS = {
    "texts_per_s": "texts/s",
    "p50_ms": "p50 ms",
    "p95_ms": "p95 ms",
    "batch_rows": "rows/batch",
    "padding_share": "padding",
    "model_us": "model CPU us",
    "loop_us": "loop CPU us",
    "client_us": "client CPU us",
}


def _table(shape: Shape, runs: dict[str, list[Run]]) -> Table:
    rows = [
        [system, *(number(Spread.of([getattr(run, name) for run in each]).median) for name in COLUMNS)]
        for system, each in runs.items()
    ]
    return Table(f"Online, one text per request ({shape.name})", ("", *COLUMNS.values()), rows)
