"""Real servers on one model thread: whole answers and streams, beside mlserver-huggingface."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx

from benchmarks.generation.work import CLIENTS, SHAPES, Ask, asks, folder_of, total
from benchmarks.report import Figure, Findings, number
from benchmarks.rounds import Spread, ratios, take_turns
from benchmarks.server import Model, Server, running
from benchmarks.session import Session
from benchmarks.shapes import Shape
from benchmarks.versus.fleet import as_shared
from benchmarks.versus.systems import FP32, PLAIN, System

AGAINST_INCUMBENT, FIRST_TOKEN, STREAMING = 4.0, 0.25, 0.9
OURS, INCUMBENT = 48, 16
"""Requests of each system per round."""
LIMIT_S = 300.0


@dataclass(slots=True)
class Run:
    """What the clients of a run saw."""

    tokens_per_s: float = 0.0
    first_s: list[float] = field(default_factory=list)
    """From sending to the first text."""
    whole_s: list[float] = field(default_factory=list)
    """From sending to the end."""


def measure(session: Session) -> Findings:
    """Tokens per second and time to the first token, for each shape."""
    findings = Findings()
    for shape in SHAPES:
        findings.add(_measure(session, shape))
    return findings


def _measure(session: Session, shape: Shape) -> Findings:
    folder = as_shared(folder_of(session, shape))

    def server(system: System) -> Any:
        model: Model = system.model(shape.name, folder, "text-generation")
        return running(model, **system.server_options())

    with server(FP32) as ours, server(PLAIN) as incumbent:
        systems = {
            "ours": partial(_run, ours, shape, asks(OURS), stream=False),
            "ours, streaming": partial(_run, ours, shape, asks(OURS), stream=True),
            "incumbent": partial(_run, incumbent, shape, asks(INCUMBENT), stream=False),
        }
        for each in (ours, incumbent):
            _run(each, shape, asks(2), stream=False)
        runs = take_turns(session.plan.few_rounds, systems, session.tell)
    for name, each in runs.items():
        for index, run in enumerate(each):
            session.journal.record(
                "generation-served",
                name,
                shape=shape.described,
                clients=CLIENTS,
                round=index,
                tokens_per_s=run.tokens_per_s,
                first_token_s=statistics.median(run.first_s),
                whole_s=statistics.median(run.whole_s),
            )
    rates = {name: [run.tokens_per_s for run in each] for name, each in runs.items()}
    first = [statistics.median(run.first_s) for run in runs["ours, streaming"]]
    whole = [statistics.median(run.whole_s) for run in runs["incumbent"]]
    shown = {name: number(Spread.of(each).median) for name, each in rates.items()}
    return Findings(
        [
            Figure(
                f"{CLIENTS} clients against mlserver-huggingface, tokens/s ({shape.name})",
                Spread.of(ratios(rates["ours"], rates["incumbent"])),
                at_least=AGAINST_INCUMBENT,
                detail=f"{shown['ours']} against {shown['incumbent']} tokens/s",
            ),
            Figure(
                f"time to first token against its answers' latency ({shape.name})",
                Spread.of(ratios(first, whole)),
                at_most=FIRST_TOKEN,
                detail=f"{1e3 * Spread.of(first).median:.0f} against {1e3 * Spread.of(whole).median:.0f} ms",
            ),
            Figure(
                f"streams against whole answers, tokens/s ({shape.name})",
                Spread.of(ratios(rates["ours, streaming"], rates["ours"])),
                at_least=STREAMING,
                detail=f"{shown['ours, streaming']} tokens/s, a piece per token",
            ),
        ]
    )


def _run(server: Server, shape: Shape, work: Sequence[Ask], *, stream: bool) -> Run:
    return asyncio.run(_closed_loop(server, shape, work, stream=stream))


async def _closed_loop(server: Server, shape: Shape, work: Sequence[Ask], *, stream: bool) -> Run:
    """Clients that send their next request when they have their answer."""
    run, pending = Run(), iter(work)
    route = "infer_stream" if stream else "infer"
    base = f"http://{server.host}:{server.port}/v2/models/{shape.name}/{route}"
    async with httpx.AsyncClient(timeout=LIMIT_S, limits=httpx.Limits(max_connections=CLIENTS)) as client:

        async def one() -> None:
            for ask in pending:
                sent = time.perf_counter()
                times = [time.perf_counter() - sent async for _ in _pieces(client, base, ask)]
                run.first_s.append(times[0])
                run.whole_s.append(times[-1])

        began = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(CLIENTS)))
        run.tokens_per_s = total(list(work)) / (time.perf_counter() - began)
    return run


async def _pieces(client: httpx.AsyncClient, url: str, ask: Ask) -> AsyncIterator[str]:
    """The lines of the answer as they come."""
    parameters = {"max_new_tokens": ask.new_tokens, "do_sample": False}
    inputs = [_tensor("args", ask.text, "str")]
    inputs += [_tensor(name, json.dumps(value), "hg_json") for name, value in parameters.items()]
    async with client.stream("POST", url, json={"inputs": inputs}) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {(await response.aread()).decode():.500}")
        async for line in response.aiter_lines():
            if line:
                yield line


def _tensor(name: str, element: str, content_type: str) -> dict[str, Any]:
    return {
        "name": name,
        "shape": [1],
        "datatype": "BYTES",
        "data": [element],
        "parameters": {"content_type": content_type},
    }
