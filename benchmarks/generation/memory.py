"""Memory of a server over a thousand short answers, and its cache at the end."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import httpx

from benchmarks.generation.served import LIMIT_S, _pieces
from benchmarks.generation.work import CLIENTS, LLAMA, Ask, asks, folder_of
from benchmarks.report import Figure, Findings
from benchmarks.rounds import Spread
from benchmarks.server import Server, running
from benchmarks.session import Session
from benchmarks.versus.fleet import as_shared
from benchmarks.versus.systems import FP32

WARM, MORE, NEW_TOKENS = 200, 1000, 4
GROWTH_MIB = 20.0


def measure(session: Session) -> Findings:
    """Growth from the 200th answer to the 1,200th."""
    work = [replace(ask, new_tokens=NEW_TOKENS) for ask in asks(100)]
    model = FP32.model("llama", as_shared(folder_of(session, LLAMA)), "text-generation")
    with running(model, **FP32.server_options()) as server:
        asyncio.run(_ask(server, work, WARM))
        before = server.rss_mib()
        session.tell("a thousand short answers")
        asyncio.run(_ask(server, work, MORE))
        after, metrics = server.rss_mib(), server.metrics("llama")
    session.journal.record("generation-memory", "ours", before_mib=before, after_mib=after)
    held = metrics["hftasks_kv_cache_share"] + metrics["hftasks_running_sequences"]
    return Findings(
        [
            Figure(
                f"memory after {MORE} short answers, growth in MiB",
                Spread.of([after - before]),
                at_most=GROWTH_MIB,
                detail=f"{before:.0f} to {after:.0f} MiB",
            ),
            Figure("share of the cache that is taken at the end", Spread.of([held]), at_most=0.0),
        ]
    )


async def _ask(server: Server, work: Sequence[Ask], count: int) -> None:
    url = f"http://{server.host}:{server.port}/v2/models/llama/infer"
    pending = (work[index % len(work)] for index in range(count))
    async with httpx.AsyncClient(timeout=LIMIT_S, limits=httpx.Limits(max_connections=CLIENTS)) as client:

        async def one() -> None:
            for ask in pending:
                async for _ in _pieces(client, url, ask):
                    pass

        await asyncio.gather(*(one() for _ in range(CLIENTS)))
