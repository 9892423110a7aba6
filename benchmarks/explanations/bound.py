"""What one evaluation costs, forward and back, and what it would cost if it were but matrix products.

The products are those with the weights of the layers, as many back as forward. What ours saves is most of the
last layer; what is left to save is what stands between the two, and the number of evaluations (see `speed`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.explanations.subjects import CAPTUM_STEPS, Subject, sentiment
from benchmarks.report import Findings, Table, number, spread
from benchmarks.rounds import Spread, ratios, take_turns
from benchmarks.session import Session
from benchmarks.shapes import MINILM
from benchmarks.versus.limits import gemm_tokens_per_s
from mlserver_hftasks.backends.gradients import PathBackend, PathRow
from mlserver_hftasks.explain.explainer import gradients_of

TOKENS, POINTS, REPEATS = 32, 12, 3
"""Of a text, of a batch (384 tokens, as the explainer forms them), and batches per round."""
LABEL = 1


def measure(session: Session) -> Findings:
    """Microseconds of CPU time per token and evaluation, on the demo's model, which has MiniLM's shape."""
    torch.set_num_threads(1)
    subject = sentiment(2, 2)
    early, full = _paths(subject), _paths(subject)
    full._clone._backbone.read_all()
    captum, rows = subject.captum, _rows()
    ids = torch.from_numpy(rows[0].arrays["input_ids"])[None]
    runs = take_turns(
        session.plan.rounds,
        {
            "captum": partial(_us, partial(_captum, captum, ids), CAPTUM_STEPS * TOKENS),
            "ours, full last layer": partial(_us, partial(_repeated, full, rows), REPEATS * POINTS * TOKENS),
            "ours": partial(_us, partial(_repeated, early, rows), REPEATS * POINTS * TOKENS),
            "products of all layers, nothing else": partial(_products),
        },
        session.tell,
    )
    for system, each in runs.items():
        session.journal.record("evaluation", system, model=subject.name, us_per_token=each)
    lines = [
        [system, spread(Spread.of(each)), number(Spread.of(ratios(runs["captum"], each)).median)]
        for system, each in runs.items()
    ]
    columns = ("", "us per token and evaluation", "times captum's rate")
    return Findings(
        tables=[Table(f"One evaluation, forward and back, by CPU time ({subject.name})", columns, lines)]
    )


def _paths(subject: Subject) -> PathBackend:
    served = Subject(subject.name, subject.folder, subject.texts, subject.exact).served
    paths = gradients_of(served.task, served.backend)
    assert paths is not None
    return paths


def _rows() -> list[PathRow]:
    ids = np.random.default_rng(0).integers(1000, 20000, TOKENS)
    arrays = {"input_ids": ids, "token_type_ids": np.zeros(TOKENS, dtype=np.int64)}
    kept = np.zeros(TOKENS, dtype=np.bool_)
    return [
        PathRow(
            arrays, alpha=float(alpha), kept=kept, score=lambda outputs: outputs["logits"][LABEL : LABEL + 1]
        )
        for alpha in np.linspace(0, 1, POINTS)
    ]


def _repeated(paths: PathBackend, rows: list[PathRow]) -> None:
    for _ in range(REPEATS):
        paths.forward(rows)


def _captum(captum: Any, ids: torch.Tensor) -> None:
    captum.attribute(ids, torch.ones_like(ids), torch.zeros_like(ids), LABEL, CAPTUM_STEPS)


def _us(run: Callable[[], object], tokens: int) -> float:
    began = time.process_time()
    run()
    return 1e6 * (time.process_time() - began) / tokens


def _products() -> float:
    return 2e6 / gemm_tokens_per_s(MINILM, "float32")
