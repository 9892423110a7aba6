"""Models that continue prompts: ONNX Runtime against torch, in process, by CPU time of one thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from benchmarks.generation.engine import _engine
from benchmarks.generation.work import SHAPES, Ask, asks, folder_of, total
from benchmarks.report import Figure, Findings, Table, number, spread
from benchmarks.rounds import Spread, ratios, take_turns
from benchmarks.session import Session
from benchmarks.shapes import Shape
from mlserver_hftasks.loading import Served, load, memory
from mlserver_hftasks.settings import Settings

TORCH, ONNX, INT8 = "torch float32", "onnx float32", "onnx int8"
EXTRA: Mapping[str, dict[str, Any]] = {
    TORCH: {},
    ONNX: {"backend": "onnx"},
    INT8: {"backend": "onnx", "quantization": "int8"},
}
AGAINST = {ONNX: 1.0, INT8: 1.5}
"""Times torch in float32, at least."""
TOGETHER = 2.0
"""Clients together against one, at least."""
WORK = {1: 4, 8: 16}
"""Requests by number of clients."""
CACHE_TOKENS = 8192

Run = tuple[float, list[list[int]]]
"""New tokens per second of CPU time, and the answers."""


def measure(session: Session) -> Findings:
    """Tokens per second of each system at one client and at eight, for each shape."""
    torch.set_num_threads(1)
    memory.manage()
    findings = Findings()
    for shape in SHAPES:
        findings.add(_measure(session, shape))
    return findings


def _measure(session: Session, shape: Shape) -> Findings:
    served = {name: _loaded(session, shape, name) for name in EXTRA}
    turns: dict[str, Callable[[], Run]] = {
        _named(name, clients): partial(_run, each, asks(count), clients)
        for clients, count in WORK.items()
        for name, each in served.items()
    }
    for each in served.values():
        _run(each, asks(3), 2)  # allocators settle
    runs = take_turns(session.plan.few_rounds, turns, session.tell)
    rates = {name: [rate for rate, _ in each] for name, each in runs.items()}
    for name, some in rates.items():
        for index, rate in enumerate(some):
            session.journal.record("decoder", name, shape=shape.described, round=index, tokens_per_s=rate)
    for each in served.values():
        each.close()
    return Findings(_figures(shape, rates, runs), [_table(shape, rates)])


def _loaded(session: Session, shape: Shape, name: str) -> Served:
    session.tell(f"loading {name}")
    return load(
        Settings(
            task="text-generation",
            pretrained_model=str(folder_of(session, shape)),
            program_cache=str(session.models / "programs"),
            kv_cache_tokens=CACHE_TOKENS,
            intra_op_threads=1,
            **EXTRA[name],
        )
    )


def _run(served: Served, work: list[Ask], clients: int) -> Run:
    assert served.decoder is not None, "the model does not step"
    began = time.process_time()
    _, answers = _engine(served.decoder, work, clients)
    return total(work) / (time.process_time() - began), answers


def _named(name: str, clients: int) -> str:
    return f"{name}, {'one client' if clients == 1 else f'{clients} clients'}"


def _figures(shape: Shape, rates: dict[str, list[float]], runs: dict[str, list[Run]]) -> list[Figure]:
    made = []
    for name, target in AGAINST.items():
        for clients in WORK:
            mine, base = rates[_named(name, clients)], rates[_named(TORCH, clients)]
            made.append(
                Figure(
                    f"{_named(name, clients)}, against {TORCH}, tokens/s ({shape.name})",
                    Spread.of(ratios(mine, base)),
                    at_least=target,
                    detail=f"{number(Spread.of(mine).median)} against {number(Spread.of(base).median)}",
                )
            )
    many = max(WORK)
    gain = ratios(rates[_named(ONNX, many)], rates[_named(ONNX, 1)])
    made.append(
        Figure(f"{ONNX}, {many} clients against one ({shape.name})", Spread.of(gain), at_least=TOGETHER)
    )
    pairs = zip(runs[_named(ONNX, many)][0][1], runs[_named(TORCH, many)][0][1], strict=True)
    equal = [one == other for one, other in pairs]
    made.append(
        Figure(
            f"share of answers of {ONNX} equal to torch's, token for token ({shape.name})",
            Spread.of([sum(equal) / len(equal)]),
            at_least=1.0,
        )
    )
    return made


def _table(shape: Shape, rates: dict[str, list[float]]) -> Table:
    rows = []
    for name in EXTRA:
        cells = []
        for clients in WORK:
            mine, base = rates[_named(name, clients)], rates[_named(TORCH, clients)]
            cells += [number(Spread.of(mine).median), spread(Spread.of(ratios(mine, base)))]
        rows.append((name, *cells))
    columns = ["", *(cell for clients in WORK for cell in (_named("tokens/s", clients), "times torch"))]
    return Table(f"Decoders by CPU time ({shape.described})", columns, rows)
