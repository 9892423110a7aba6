"""What a request costs beside the model: MLServer's own, and each part of ours."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from mlserver.codecs.json import encode_to_json_bytes
from mlserver.types import InferenceRequest, InferenceResponse

from benchmarks import load, v2
from benchmarks.report import Figure, Findings, Table, number
from benchmarks.rounds import Spread, ratios, take_turns
from benchmarks.server import Model, Server, classifier, running
from benchmarks.session import Session
from benchmarks.shapes import ONE_LAYER
from mlserver_hftasks.codecs.envelope import check_envelope
from mlserver_hftasks.codecs.response import encode_results
from mlserver_hftasks.engine.batcher import Batcher
from mlserver_hftasks.engine.cost import CostModel
from mlserver_hftasks.engine.rows import Outputs, Row
from mlserver_hftasks.engine.scheduler import Limits, Scheduler
from mlserver_hftasks.loading import load as load_model
from mlserver_hftasks.runtime.service import RowService
from mlserver_hftasks.settings import Settings
from mlserver_hftasks.tasks.base import Answered

ECHO, OURS = "echo", "one-layer"
LIMIT_S = 30.0
REPEATS = 300


@dataclass(frozen=True, slots=True)
class Run:
    """A closed loop on one of the models."""

    p50_ms: float
    per_s: float
    loop_us: float
    """CPU time of the event loop per request."""
    others_us: float


def measure(session: Session) -> Findings:
    """A one-layer model's request against an echo's, and where the difference goes."""
    echo = Model(ECHO, implementation="benchmarks.echo.EchoRuntime")
    ours = classifier(OURS, session.model(ONE_LAYER))
    root = str(Path(__file__).resolve().parents[2])
    with running(echo, ours, environment={"PYTHONPATH": root}) as server:
        systems = {
            f"{name}, {clients}": partial(_serve, session, server, name, clients)
            for name in (ECHO, OURS)
            for clients in (1, 8)
        }
        for warm in systems.values():
            warm()
        runs = take_turns(session.plan.few_rounds, systems, session.tell)
    for system, each in runs.items():
        for index, run in enumerate(each):
            values = {name: getattr(run, name) for name in Run.__slots__}
            session.journal.record("parts", system, shape=ONE_LAYER.described, round=index, **values)
    parts = asyncio.run(_parts(session))
    session.journal.record("parts", "in process", shape=ONE_LAYER.described, us=dict(parts))
    rows = [[name, number(value)] for name, value in parts]
    return Findings(_figures(runs), [Table("Parts of a request in process", ("part", "us, median"), rows)])


def _serve(session: Session, server: Server, model: str, clients: int) -> Run:
    target = v2.Texts(server.host, server.port, model, session.texts())
    before = server.cpu()
    seen = load.run(load.closed_loop(target, clients, 4 * session.plan.single_texts, limit_s=LIMIT_S))
    cpu = server.cpu().since(before)
    return Run(
        load.percentile(seen.latencies_ms(), 50),
        seen.per_second,
        1e6 * cpu.loop_s / seen.sent,
        1e6 * cpu.others_s / seen.sent,
    )


def _figures(runs: dict[str, list[Run]]) -> list[Figure]:
    def of(system: str, name: str) -> list[float]:
        return [getattr(run, name) for run in runs[system]]

    return [
        Figure(
            f"request to a one-layer model against an echo, {clients} client(s), {what}",
            Spread.of(ratios(of(f"{OURS}, {clients}", name), of(f"{ECHO}, {clients}", name))),
            detail=f"{number(Spread.of(of(f'{OURS}, {clients}', name)).median)} against "
            f"{number(Spread.of(of(f'{ECHO}, {clients}', name)).median)} {unit}",
        )
        for clients, name, what, unit in (
            (1, "p50_ms", "median latency", "ms"),
            (1, "loop_us", "CPU of the event loop", "us"),
            (8, "loop_us", "CPU of the event loop", "us"),
        )
    ]


# -- the parts, in process -----------------------------------------------------------------------


class _Instant:
    """A backend that answers at once."""

    def forward(self, rows: Sequence[Row]) -> list[Outputs]:
        """The same logits for every row."""
        return [{"logits": np.zeros(2, dtype=np.float32)} for _ in rows]


async def _parts(session: Session) -> list[tuple[str, float]]:
    folder = str(session.model(ONE_LAYER))
    served = load_model(Settings(task="text-classification", pretrained_model=folder, device="cpu"))
    task = served.task
    batcher = Batcher(_Instant(), Scheduler(Limits(), CostModel(), padded=False))
    service = RowService(task, None, batcher)
    body = v2.Texts("", 0, OURS, session.texts(64)).request(0).partition(b"\r\n\r\n")[2]
    payload = InferenceRequest.model_validate(orjson.loads(body))
    call, parameters = service._decode(payload)
    (example,) = task.examples(call.inputs, parameters)
    answered = Answered(example, served.backend.forward(example.rows))
    result = [task.postprocess(answered, parameters)]
    response = InferenceResponse(model_name=OURS, outputs=(await service.answer(payload)).outputs)
    parts = [
        ("JSON, check the envelope", _time(lambda: check_envelope(orjson.loads(body)))),
        (
            "V2 types from JSON (MLServer's)",
            _time(lambda: InferenceRequest.model_validate(orjson.loads(body))),
        ),
        ("decode the request, check the parameters", _time(lambda: service._decode(payload))),
        ("tokenize", _time(lambda: task.examples(call.inputs, parameters))),
        ("schedule, to the device thread and back", await _time_async(lambda: batcher.run(example.rows))),
        ("postprocess", _time(lambda: task.postprocess(answered, parameters))),
        ("encode the result", _time(lambda: encode_results(result))),
        ("JSON from V2 types (MLServer's)", _time(lambda: encode_to_json_bytes(response.model_dump()))),
        ("all of ours, the model instant", await _time_async(lambda: service.answer(payload))),
        ("forward, one layer", _time(lambda: served.backend.forward(example.rows))),
        ("full garbage collection of this process", _time(gc.collect, 3)),
    ]
    await batcher.close()
    served.backend.close()
    return parts


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
