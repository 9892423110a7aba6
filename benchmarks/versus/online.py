"""One text per request, 1 to 128 clients in a closed loop; every system in every round."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks import load, v2
from benchmarks.inprocess import InProcess
from benchmarks.report import Figure, Findings, Line, Plot, Table, number, spread
from benchmarks.rounds import Spread, ratios, take_turns
from benchmarks.session import Session
from benchmarks.shapes import MINILM, Shape
from benchmarks.versus import limits
from benchmarks.versus.fleet import LIMIT_S, Endpoint, Fleet, shared
from benchmarks.versus.systems import BATCHING, FP32, INCUMBENTS, OURS_FP32, PLAIN, System

CLIENTS: Mapping[str, Sequence[int]] = {"minilm": (1, 8, 32, 128), "distilbert": (1, 8, 32)}
MOST_QUICK_CLIENTS = 32
TARGETS = {"float32": 2.1, "bfloat16": 3.0, "int8": 5.0}
"""Throughput against the incumbent's best configuration, by dtype."""
TARGET_CLIENTS = (8, 32)
PLAIN_LATENCY, BATCHING_LATENCY = 0.9, 0.5
TOLERANCE = 1e-4
NOT_THERE = Spread.of([])


@dataclass(frozen=True, slots=True)
class Run:
    """One closed loop, or one run of a limit in process."""

    texts_per_s: float
    p50_ms: float = math.nan
    p95_ms: float = math.nan
    p99_ms: float = math.nan
    client_us: float = math.nan
    faults: int = 0
    score_difference: float = math.nan
    """From the incumbent's scores; infinite if a label differs."""


Runs = Mapping[tuple[str, int], Sequence[Run]]
"""By system and number of clients; limits in process have 0 clients."""


def measure(fleet: Fleet) -> Findings:
    """Throughput and latency of all systems, for each shape."""
    findings = Findings()
    for shape in fleet.session.plan.shapes:
        findings.add(_measure(fleet, shape))
    return findings


def _measure(fleet: Fleet, shape: Shape) -> Findings:
    session = fleet.session
    texts, endpoints = session.texts_for(shape), fleet.endpoints(shape)
    expected = reference(endpoints, shape, texts)
    keys: dict[tuple[str, int], Any] = {
        (endpoint.system.name, clients): partial(serve, endpoint, shape, texts, expected, clients, counted)
        for clients, counted in _loops(session, shape, len(texts))
        for endpoint in endpoints
    }
    keys |= {(name, 0): measured for name, measured in _limits(session, shape, texts).items()}
    names = {f"{name}, {clients} clients": (name, clients) for name, clients in keys}
    turns = take_turns(session.rounds(shape), {name: keys[key] for name, key in names.items()}, session.tell)
    runs: Runs = {key: turns[name] for name, key in names.items()}
    systems = {endpoint.system.name: endpoint.system for endpoint in endpoints}
    _record(session, shape, systems, runs)
    return Findings(
        [*_throughput(shape, systems, runs), *_latency(shape, runs), _equality(shape, systems, runs)],
        [_table(shape, runs)],
        [_plot(shape, systems, runs)],
    )


def _loops(session: Session, shape: Shape, texts: int) -> list[tuple[int, int]]:
    most = MOST_QUICK_CLIENTS if session.plan.name == "quick" else math.inf
    singles = min(session.plan.single_texts, texts)
    return [(count, singles if count == 1 else texts) for count in CLIENTS[shape.name] if count <= most]


# -- systems -------------------------------------------------------------------------------------


def reference(endpoints: Sequence[Endpoint], shape: Shape, texts: Sequence[str]) -> list[Any]:
    """The plain incumbent's answer to each text; none if it does not run."""
    plain = next((endpoint for endpoint in endpoints if endpoint.system is PLAIN), None)
    if plain is None:
        return []
    seen = load.run(load.closed_loop(plain.texts(shape, texts), 8, len(texts), limit_s=LIMIT_S))
    found = {answer.index: v2.results(answer.body)[0] for answer in seen.answers if answer.status == 200}
    return [found[index] for index in range(len(texts))]


def serve(
    endpoint: Endpoint,
    shape: Shape,
    texts: Sequence[str],
    expected: Sequence[Any],
    clients: int,
    counted: int,
) -> Run:
    """A closed loop on that system."""
    target = endpoint.texts(shape, texts)
    seen = load.run(load.closed_loop(target, clients, counted, limit_s=LIMIT_S))
    took = seen.latencies_ms()
    judged = endpoint.system.role != "ceiling" and bool(expected)
    return Run(
        seen.per_second,
        load.percentile(took, 50),
        load.percentile(took, 95),
        load.percentile(took, 99),
        seen.client_us,
        seen.faults + sum(answer.status != 200 for answer in seen.answers),
        max((_difference(answer, expected) for answer in seen.answers), default=math.nan)
        if judged
        else math.nan,
    )


def _difference(answer: load.Answer, expected: Sequence[Any]) -> float:
    if answer.status != 200:
        return math.inf
    (got,), want = v2.results(answer.body), expected[answer.index % len(expected)]
    return abs(got["score"] - want["score"]) if got["label"] == want["label"] else math.inf


def _limits(session: Session, shape: Shape, texts: Sequence[str]) -> dict[str, Any]:
    """The packed forward in process, and the GEMMs of the layers alone."""
    measured: dict[str, Any] = {}
    for dtype, short in (("float32", "fp32"), ("bfloat16", "bf16")):
        alone = InProcess(shared(session, shape), dtype=dtype)
        rows = alone.rows(texts)
        tokens = sum(row.cost for row in rows) / len(rows)
        measured[f"limit: packed in process {short}"] = partial(_packed, alone, alone.engine_batches(rows))
        measured[f"limit: GEMM {short}"] = partial(_gemm, shape, dtype, tokens)
    return measured


def _packed(alone: InProcess, batches: Sequence[Sequence[Any]]) -> Run:
    seconds, outputs = alone.forward(batches)
    return Run(len(outputs) / seconds)


def _gemm(shape: Shape, dtype: str, tokens_per_text: float) -> Run:
    return Run(limits.gemm_tokens_per_s(shape, dtype) / tokens_per_text)


def _record(session: Session, shape: Shape, systems: Mapping[str, System], runs: Runs) -> None:
    for (name, clients), each in runs.items():
        dtype = systems[name].dtype if name in systems else "bfloat16" if "bf16" in name else "float32"
        for index, run in enumerate(each):
            values = {field: getattr(run, field) for field in Run.__slots__}
            session.journal.record(
                "online", name, shape=shape.described, dtype=dtype, clients=clients, round=index, **values
            )


# -- what it shows -------------------------------------------------------------------------------


def of(runs: Runs, key: tuple[str, int], name: str = "texts_per_s") -> list[float]:
    """One value of every round."""
    return [getattr(run, name) for run in runs[key]]


def _median(runs: Runs, key: tuple[str, int], name: str = "texts_per_s") -> float:
    return Spread.of(of(runs, key, name)).median


def _throughput(shape: Shape, systems: Mapping[str, System], runs: Runs) -> list[Figure]:
    figures = []
    for clients in TARGET_CLIENTS:
        theirs = [system.name for system in INCUMBENTS if system.name in systems]
        best = max(theirs, key=lambda name: _median(runs, (name, clients)), default=PLAIN.name)
        for dtype, target in TARGETS.items():
            ours = [each.name for each in systems.values() if (each.role, each.dtype) == ("ours", dtype)]
            what = f"{clients} clients: ours {dtype} against the incumbent's best, texts/s ({shape.name})"
            if not ours or best not in systems:
                figures.append(Figure(what, NOT_THERE, at_least=target, detail="not part of this run"))
                continue
            name = max(ours, key=lambda name: _median(runs, (name, clients)))
            figures.append(_ratio(what, runs, (name, clients), (best, clients), at_least=target))
        figures += [
            _ratio(
                f"{clients} clients: {FP32.name} against {each.name}, texts/s ({shape.name})",
                runs,
                (FP32.name, clients),
                (each.name, clients),
            )
            for each in systems.values()
            if each.role == "other" and FP32.name in systems
        ]
    return figures


def _latency(shape: Shape, runs: Runs) -> list[Figure]:
    ours = [system.name for system in OURS_FP32 if (system.name, 1) in runs]
    best = min(ours, key=lambda name: _median(runs, (name, 1), "p50_ms"), default=FP32.name)
    return [
        _ratio(
            f"1 client: ours fp32 against {system.name}, median latency ({shape.name})",
            runs,
            (best, 1),
            (system.name, 1),
            "p50_ms",
            at_most=target if shape is MINILM else None,
        )
        for system, target in ((PLAIN, PLAIN_LATENCY), (BATCHING, BATCHING_LATENCY))
        if ours and (system.name, 1) in runs
    ]


def _ratio(
    what: str,
    runs: Runs,
    above: tuple[str, int],
    below: tuple[str, int],
    name: str = "texts_per_s",
    *,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Figure:
    return Figure(
        what,
        Spread.of(ratios(of(runs, above, name), of(runs, below, name))),
        at_least=at_least,
        at_most=at_most,
        detail=f"{above[0]} {number(_median(runs, above, name))}, "
        f"{below[0]} {number(_median(runs, below, name))} {'ms' if name == 'p50_ms' else 'texts/s'}",
    )


def _equality(shape: Shape, systems: Mapping[str, System], runs: Runs) -> Figure:
    def worst(dtype: str) -> float:
        found = [
            max(of(runs, key, "score_difference"))
            for key in runs
            if key[0] in systems and (systems[key[0]].role, systems[key[0]].dtype) == ("ours", dtype)
        ]
        return max(found, default=math.nan)

    faults = sum(run.faults for each in runs.values() for run in each)
    return Figure(
        f"largest difference of ours fp32 from the incumbent's scores ({shape.name})",
        Spread.of([worst("float32")]),
        at_most=TOLERANCE,
        detail=f"bf16 {number(worst('bfloat16'))}, int8 {number(worst('int8'))} (inf: another label); "
        f"all systems: {faults} requests without their own answer",
    )


COLUMNS = {"texts_per_s": "texts/s", "p50_ms": "p50 ms", "p95_ms": "p95 ms", "p99_ms": "p99 ms"}


def _table(shape: Shape, runs: Runs) -> Table:
    rows = []
    for (name, clients), each in runs.items():
        shown = Spread.of([run.texts_per_s for run in each])
        rest = [
            number(Spread.of([getattr(run, field) for run in each]).median) for field in list(COLUMNS)[1:]
        ]
        faults = sum(run.faults for run in each)
        rows.append([name, str(clients or "-"), spread(shown), *rest, str(faults)])
    return Table(
        f"Online, one text per request ({shape.described}, {shape.name})",
        ("", "clients", *COLUMNS.values(), "without answer"),
        rows,
    )


def _plot(shape: Shape, systems: Mapping[str, System], runs: Runs) -> Plot:
    lines = []
    for name, system in systems.items():
        keys = [key for key in runs if key[0] == name]
        if system.role != "ceiling":
            lines.append(Line(name, [key[1] for key in keys], [Spread.of(of(runs, key)) for key in keys]))
    clients = lines[0].x
    lines += [Line(key[0], clients, [Spread.of(of(runs, key))] * len(clients)) for key in runs if key[1] == 0]
    title = f"Throughput against concurrency, one text per request ({shape.name})"
    return Plot(f"throughput-{shape.name}", title, "clients", "texts/s", lines, log_x=True)
