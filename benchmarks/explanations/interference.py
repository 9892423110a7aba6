"""What explanations cost the predictions of the same model, on a real server."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass

import orjson

from benchmarks import load, v2
from benchmarks.http import connect, post
from benchmarks.report import Figure, Findings, number
from benchmarks.rounds import Spread, take_turns
from benchmarks.server import Server, classifier, running
from benchmarks.session import Session
from benchmarks.shapes import MINILM

LATENCY_RATIO = 1.6
LOAD_SHARE = 0.4
"""Of what the server can do alone: predictions come at random, and find it idle more often than not."""
EXPLAINING_CLIENTS, TEXTS_PER_REQUEST = 8, 8
QUEUE = EXPLAINING_CLIENTS * TEXTS_PER_REQUEST
"""`max_queue_explanations`: full as long as all clients wait. More of them would only be refused."""
LIMIT_S = 120.0
RETRY_S = 0.5
WARM_S = 3.0
"""Explanations alone, until their queue is full and their batches have found their size."""
MODEL = "model"


@dataclass(frozen=True, slots=True)
class Run:
    """Latencies of predictions, and explanations per second beside them."""

    p50_ms: float
    p95_ms: float
    explanations_per_s: float
    faults: int


def measure(session: Session) -> Findings:
    """95th percentile of predictions, with explanations that saturate their queue and without."""
    with running(classifier(MODEL, session.model(MINILM), max_queue_explanations=QUEUE)) as server:
        target = v2.Texts(server.host, server.port, MODEL, session.texts(128))
        alone = load.run(load.closed_loop(target, 8, 256, limit_s=LIMIT_S))
        rate = LOAD_SHARE * alone.per_second
        seconds = session.plan.overload_s
        runs = take_turns(
            session.plan.few_rounds,
            {
                "without": lambda: load.run(_predictions(session, server, rate, seconds, explained=False)),
                "with": lambda: load.run(_predictions(session, server, rate, seconds, explained=True)),
            },
            session.tell,
        )
    ratios = [w.p95_ms / wo.p95_ms for w, wo in zip(runs["with"], runs["without"], strict=True)]
    with_them, without = runs["with"], runs["without"]
    done = Spread.of([run.explanations_per_s for run in with_them])
    return Findings(
        [
            Figure(
                "p95 of predictions while explanations saturate their queue, against without",
                Spread.of(ratios),
                at_most=LATENCY_RATIO,
                detail=f"{number(Spread.of([run.p95_ms for run in with_them]).median)} against "
                f"{number(Spread.of([run.p95_ms for run in without]).median)} ms at {number(rate)}/s "
                f"(p50 {number(Spread.of([run.p50_ms for run in with_them]).median)} against "
                f"{number(Spread.of([run.p50_ms for run in without]).median)}), "
                f"{number(done.median)} explanations/s beside them",
            ),
            Figure(
                "predictions lost or mixed up meanwhile",
                Spread.of([float(sum(run.faults for run in with_them + without))]),
                at_most=0,
            ),
        ]
    )


async def _predictions(
    session: Session, server: Server, rate: float, seconds: float, *, explained: bool
) -> Run:
    target = v2.Texts(server.host, server.port, MODEL, session.texts(128))
    over = asyncio.Event()
    requests = _requests(session.texts(64))
    clients = [
        asyncio.create_task(_explain(server, requests[number:] + requests[:number], over))
        for number in range(EXPLAINING_CLIENTS if explained else 0)
    ]
    await asyncio.sleep(WARM_S)
    predictions = await load.open_loop(target, load.poisson(rate, seconds, seed=7), limit_s=LIMIT_S)
    over.set()
    answered = sum(await asyncio.gather(*clients))
    latencies = predictions.latencies_ms()
    return Run(
        load.percentile(latencies, 50),
        load.percentile(latencies, 95),
        TEXTS_PER_REQUEST * answered / (seconds + WARM_S),
        predictions.faults,
    )


def _requests(texts: list[str]) -> list[bytes]:
    """Requests of several texts each to be explained."""
    made = []
    for start in range(0, len(texts), TEXTS_PER_REQUEST):
        chosen = texts[start : start + TEXTS_PER_REQUEST]
        tensor = {"name": "inputs", "shape": [len(chosen)], "datatype": "BYTES", "data": chosen}
        made.append(post(f"/v2/models/{MODEL}/explain", orjson.dumps({"inputs": [tensor]})))
    return made


async def _explain(server: Server, requests: list[bytes], over: asyncio.Event) -> int:
    """One client, who always waits for an explanation. How many requests were answered by the end."""
    connection = await connect(server.host, server.port)
    answered = 0
    for request in itertools.cycle(requests):
        response = await connection.exchange(request)
        if over.is_set():
            break
        answered += response.status == 200
        if response.status != 200:
            await asyncio.sleep(RETRY_S)
    connection.close()
    return answered
