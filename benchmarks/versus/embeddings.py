"""Embeddings: FP32 tensors over gRPC and numbers over REST.

The incumbent has no sentence embeddings; its nearest is feature-extraction, the vectors of all tokens as
JSON texts, which clients pool themselves. Ours is measured with that task too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Literal

from benchmarks import grpc, http, load, v2
from benchmarks.report import Findings, Table, number, spread
from benchmarks.rounds import Spread, take_turns
from benchmarks.server import Server, running
from benchmarks.session import Session
from benchmarks.shapes import MINILM
from benchmarks.versus.fleet import LIMIT_S, Fleet, shared
from benchmarks.versus.systems import FP32, PLAIN

CLIENTS = (8, 32)
FEATURES, VECTORS = "features", "vectors"
COLUMNS = {"per_s": "texts/s", "p50_ms": "p50 ms", "p95_ms": "p95 ms", "answer_bytes": "bytes per answer"}


@dataclass(frozen=True, slots=True)
class Run:
    """One closed loop."""

    per_s: float
    p50_ms: float
    p95_ms: float
    answer_bytes: float
    client_us: float
    faults: int


@dataclass(frozen=True, slots=True)
class Way:
    """A model, a protocol and what is asked for."""

    server: Server
    model: str
    protocol: Literal["REST", "gRPC"]
    outputs: Sequence[str] = ()

    def run(self, texts: Sequence[str], clients: int) -> Run:
        """A closed loop."""
        target: load.Target
        connect: load.Connect
        if self.protocol == "REST":
            target = v2.Texts(self.server.host, self.server.port, self.model, texts, outputs=self.outputs)
            connect = http.connect
        else:
            target = grpc.Texts(
                self.server.host, self.server.grpc_port, self.model, texts, "args", self.outputs
            )
            connect = grpc.connect
        seen = load.run(load.closed_loop(target, clients, len(texts), limit_s=LIMIT_S, connect=connect))
        took, sizes = seen.latencies_ms(), [len(answer.body) for answer in seen.counted]
        return Run(
            seen.per_second,
            load.percentile(took, 50),
            load.percentile(took, 95),
            sum(sizes) / max(len(sizes), 1),
            seen.client_us,
            seen.faults + sum(answer.status != 200 for answer in seen.answers),
        )


def measure(fleet: Fleet) -> Findings:
    """Throughput, latency and size of the answers."""
    session = fleet.session
    folder, texts = shared(session, MINILM), session.texts(max(session.plan.texts // 2, 16))
    with ExitStack() as stack:
        ours = stack.enter_context(
            running(
                FP32.model(VECTORS, folder, "sentence-embedding"),
                FP32.model(FEATURES, folder, "feature-extraction"),
            )
        )
        theirs = stack.enter_context(
            running(PLAIN.model(FEATURES, folder, "feature-extraction"), **PLAIN.server_options())
        )
        ways = {
            "ours, embedding FP32 over gRPC": Way(ours, VECTORS, "gRPC", ("embedding",)),
            "ours, embedding FP32 as JSON over REST": Way(ours, VECTORS, "REST", ("embedding",)),
            "ours, feature-extraction JSON over REST": Way(ours, FEATURES, "REST"),
            "mlserver-huggingface, feature-extraction JSON over REST": Way(theirs, FEATURES, "REST"),
            "mlserver-huggingface, feature-extraction JSON over gRPC": Way(theirs, FEATURES, "gRPC"),
        }
        for way in ways.values():
            way.run(texts[:16], 4)
        systems: dict[str, Callable[[], Run]] = {
            f"{name}; {clients}": partial(way.run, texts, clients)
            for clients in CLIENTS
            for name, way in ways.items()
        }
        runs = take_turns(session.plan.few_rounds, systems, session.tell)
    return _findings(session, runs)


def _findings(session: Session, runs: dict[str, list[Run]]) -> Findings:
    rows = []
    for key, each in runs.items():
        name, _, clients = key.rpartition("; ")
        for index, run in enumerate(each):
            values = {field: getattr(run, field) for field in Run.__slots__}
            session.journal.record(
                "embeddings", name, shape=MINILM.described, clients=int(clients), round=index, **values
            )
        shown = {field: Spread.of([getattr(run, field) for run in each]) for field in COLUMNS}
        rest = [number(shown[field].median) for field in list(COLUMNS)[1:]]
        rows.append([name, clients, spread(shown["per_s"]), *rest, str(sum(run.faults for run in each))])
    columns = ("", "clients", *COLUMNS.values(), "without answer")
    return Findings(tables=[Table("Embeddings, one text per request (minilm)", columns, rows)])
