"""What a request costs beside the model: MLServer's own, and each part of ours."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import uvloop
from mlserver.codecs.json import encode_to_json_bytes
from mlserver.types import InferenceRequest, InferenceResponse

from benchmarks import load, v2
from benchmarks.instant import Instant
from benchmarks.report import Figure, Findings, Table, number
from benchmarks.rounds import Spread, ratios, take_turns
from benchmarks.server import Model, Server, classifier, running
from benchmarks.session import Session
from benchmarks.shapes import ONE_LAYER
from mlserver_hftasks.codecs.envelope import check_envelope
from mlserver_hftasks.codecs.response import encode_results
from mlserver_hftasks.engine.batcher import INLINE_S, Batcher
from mlserver_hftasks.engine.cost import CostModel
from mlserver_hftasks.engine.scheduler import Limits, Scheduler
from mlserver_hftasks.loading import load as load_model
from mlserver_hftasks.runtime.service import RowService
from mlserver_hftasks.settings import Settings
from mlserver_hftasks.tasks.base import Answered

ECHO, INSTANT, OURS = "echo", "ours, no model", "ours, one layer"
MODELS = {ECHO: "echo", INSTANT: "instant", OURS: "one-layer"}
CLIENTS = (1, 8, 32)
TIMES_ECHO = 1.25
LIMIT_S = 30.0
REPEATS = 300


@dataclass(frozen=True, slots=True)
class Run:
    """A closed loop on one of the models; CPU time of the server's process in microseconds per request."""

    p50_ms: float
    per_s: float
    cpu_us: float
    loop_us: float
    """Of the event loop."""
    forward_us: float
    """Seconds of the model, by the clock."""


def measure(session: Session) -> Findings:
    """A request of ours without a model against an echo's, and where the difference goes."""
    folder = session.model(ONE_LAYER)
    ours = classifier(MODELS[OURS], folder)
    instant = Model(MODELS[INSTANT], folder, ours.extra, "benchmarks.instant.InstantRuntime")
    echo = Model(MODELS[ECHO], implementation="benchmarks.echo.EchoRuntime")
    root = str(Path(__file__).resolve().parents[2])
    with running(echo, instant, ours, environment={"PYTHONPATH": root}) as server:
        systems = {
            f"{name}; {clients}": partial(_serve, session, server, MODELS[name], clients)
            for clients in CLIENTS
            for name in MODELS
        }
        for warm in systems.values():
            warm()
        runs = take_turns(session.plan.few_rounds, systems, session.tell)
    for system, each in runs.items():
        for index, run in enumerate(each):
            values = {name: getattr(run, name) for name in Run.__slots__}
            session.journal.record("parts", system, shape=ONE_LAYER.described, round=index, **values)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        parts = runner.run(_parts(session))
    session.journal.record("parts", "in process", shape=ONE_LAYER.described, us=dict(parts))
    return Findings(_figures(runs), [_served(runs), _in_process(parts)])


def _serve(session: Session, server: Server, model: str, clients: int) -> Run:
    target = v2.Texts(server.host, server.port, model, session.texts())
    before, cpu = server.metrics(model), server.cpu()
    seen = load.run(load.closed_loop(target, clients, 4 * session.plan.single_texts, limit_s=LIMIT_S))
    cpu, after = server.cpu().since(cpu), server.metrics(model)
    name = "hftasks_forward_seconds_sum"
    return Run(
        load.percentile(seen.latencies_ms(), 50),
        seen.per_second,
        1e6 * (cpu.loop_s + cpu.others_s) / seen.sent,
        1e6 * cpu.loop_s / seen.sent,
        1e6 * (after.get(name, 0.0) - before.get(name, 0.0)) / seen.sent,
    )


def _figures(runs: dict[str, list[Run]]) -> list[Figure]:
    def of(name: str, clients: int) -> list[float]:
        return [run.cpu_us for run in runs[f"{name}; {clients}"]]

    return [
        Figure(
            f"CPU of a request beside the model against an echo's, {clients} client" + "s" * (clients > 1),
            Spread.of(ratios(of(INSTANT, clients), of(ECHO, clients))),
            at_most=TIMES_ECHO,
            detail=f"{number(Spread.of(of(INSTANT, clients)).median)} against "
            f"{number(Spread.of(of(ECHO, clients)).median)} us; with one layer "
            f"{number(Spread.of(of(OURS, clients)).median)} us",
        )
        for clients in CLIENTS
    ]


COLUMNS = {
    "per_s": "requests/s",
    "p50_ms": "p50 ms",
    "cpu_us": "CPU us",
    "loop_us": "of these the event loop",
    "forward_us": "the model, us",
}


def _served(runs: dict[str, list[Run]]) -> Table:
    rows = []
    for system, each in runs.items():
        name, _, clients = system.partition("; ")
        shown = [number(Spread.of([getattr(run, column) for run in each]).median) for column in COLUMNS]
        rows.append([name, clients, *shown])
    return Table("A request in the server", ("", "clients", *COLUMNS.values()), rows)


def _in_process(parts: list[tuple[str, float]]) -> Table:
    whole = dict(parts)[WHOLE]
    rows = [[name, number(value), f"{100 * value / whole:.0f}"] for name, value in parts]
    return Table("Parts of a request in process", ("part", "us, median", "% of all of ours"), rows)


# -- the parts, in process -----------------------------------------------------------------------


WHOLE = "all of ours, the model instant"


async def _parts(session: Session) -> list[tuple[str, float]]:
    folder = str(session.model(ONE_LAYER))
    served = load_model(Settings(task="text-classification", pretrained_model=folder, device="cpu"))
    task = served.task
    here, there = _batcher(INLINE_S), _batcher(0.0)
    service = RowService(task, None, here)
    body = v2.Texts("", 0, OURS, session.texts(64)).request(0).partition(b"\r\n\r\n")[2]
    payload = InferenceRequest.model_validate(orjson.loads(body))
    call, parameters = service._decode(payload)
    (example,) = task.examples(call.inputs, parameters)
    answered = Answered(example, served.backend.forward(example.rows))
    result = [task.postprocess(answered, parameters)]
    response = InferenceResponse(model_name=OURS, outputs=(await service.answer(payload)).outputs)
    parts = [
        ("JSON, check the envelope", _time(lambda: check_envelope(orjson.loads(body)))),
        ("decode the request, check the parameters", _time(lambda: service._decode(payload))),
        ("tokenize", _time(lambda: task.examples(call.inputs, parameters))),
        ("schedule, run a batch on the event loop", await _time_async(lambda: here.run(example.rows))),
        ("postprocess", _time(lambda: task.postprocess(answered, parameters))),
        ("encode the result", _time(lambda: encode_results(result))),
        (WHOLE, await _time_async(lambda: service.answer(payload))),
        (
            "instead: schedule, to the device thread and back",
            await _time_async(lambda: there.run(example.rows)),
        ),
        (
            "MLServer: V2 types from JSON",
            _time(lambda: InferenceRequest.model_validate(orjson.loads(body))),
        ),
        (
            "MLServer: JSON from V2 types",
            _time(lambda: encode_to_json_bytes(response.model_dump())),
        ),
        ("forward, one layer", _time(lambda: served.backend.forward(example.rows))),
    ]
    await here.close()
    await there.close()
    served.backend.close()
    return parts


def _batcher(inline_s: float) -> Batcher:
    cost = CostModel()
    cost.observe(1, 1e-6, lasting=True)
    return Batcher(Instant(), Scheduler(Limits(), cost, padded=False), inline_s=inline_s)


def _time(call: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Microseconds, median."""
    took = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        took.append(time.perf_counter() - begin)
    return 1e6 * float(np.median(took))


async def _time_async(call: Callable[[], Coroutine[Any, Any, Any]]) -> float:
    took = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        await call()
        took.append(time.perf_counter() - begin)
    return 1e6 * float(np.median(took))
