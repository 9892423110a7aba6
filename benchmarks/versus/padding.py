"""Throughput by how much the lengths of texts differ, the average length the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from benchmarks import load, texts
from benchmarks.report import Findings, Line, Plot, Table, number
from benchmarks.rounds import Spread, take_turns
from benchmarks.shapes import MINILM
from benchmarks.versus.fleet import LIMIT_S, Endpoint, Fleet

SIGMAS = (0.0, 0.3, 0.6, 0.9, 1.2)
MEAN_WORDS = 20.0
CLIENTS, BATCH = 32, 16


def measure(fleet: Fleet) -> Findings:
    """Texts per second at 32 clients against the padding that batches in arrival order would have."""
    session = fleet.session
    endpoints = [each for each in fleet.endpoints() if each.system.role != "ceiling"]
    sets = {sigma: _texts(session.plan.texts // 2, sigma) for sigma in SIGMAS}
    shares = {sigma: padding_share(each) for sigma, each in sets.items()}
    systems: dict[str, Callable[[], float]] = {
        f"{endpoint.system.name}, sigma {sigma}": partial(_serve, endpoint, sets[sigma])
        for sigma in SIGMAS
        for endpoint in endpoints
    }
    runs = take_turns(session.plan.few_rounds, systems, session.tell)
    for endpoint in endpoints:
        for sigma in SIGMAS:
            for index, value in enumerate(runs[f"{endpoint.system.name}, sigma {sigma}"]):
                session.journal.record(
                    "padding",
                    endpoint.system.name,
                    shape=MINILM.described,
                    dtype=endpoint.system.dtype,
                    clients=CLIENTS,
                    sigma=sigma,
                    padding_share=shares[sigma],
                    round=index,
                    texts_per_s=value,
                )
    lines = [
        Line(
            endpoint.system.name,
            list(shares.values()),
            [Spread.of(runs[f"{endpoint.system.name}, sigma {sigma}"]) for sigma in SIGMAS],
        )
        for endpoint in endpoints
    ]
    columns = ("padding share", *(number(share) for share in shares.values()))
    rows = [[line.name, *(number(value.median) for value in line.y)] for line in lines]
    title = f"Throughput against padding share, {CLIENTS} clients, {MEAN_WORDS:.0f} words on average"
    axis = f"padding share of batches of {BATCH} in arrival order"
    return Findings(
        tables=[Table(f"{title} (texts/s)", columns, rows)],
        plots=[Plot("padding", title, axis, "texts/s", lines)],
    )


def padding_share(some: Sequence[str]) -> float:
    """Of the words that a server would compute in batches of 16 in arrival order, those that are padding."""
    lengths = [len(text.split()) for text in some]
    batches = [lengths[start : start + BATCH] for start in range(0, len(lengths), BATCH)]
    return 1 - sum(lengths) / sum(len(batch) * max(batch) for batch in batches)


def _texts(count: int, sigma: float) -> Sequence[str]:
    """A log-normal's mean is exp(sigma^2 / 2) times its median; the cut at 120 words lowers it a little."""
    return texts.mixed(count, median_words=MEAN_WORDS / math.exp(sigma**2 / 2), sigma=sigma)


def _serve(endpoint: Endpoint, some: Sequence[str]) -> float:
    target = endpoint.texts(MINILM, some)
    return load.run(load.closed_loop(target, CLIENTS, len(some), limit_s=LIMIT_S)).per_second
