"""What is measured, under which names, on MLServer's `/metrics`.

| name | kind | what |
| --- | --- | --- |
| `hftasks_queue_rows` | gauge | rows that wait for the device |
| `hftasks_queue_wait_seconds` | histogram | from arrival in the queue to leaving in a batch, per row |
| `hftasks_batch_rows` | histogram | rows per batch |
| `hftasks_batch_tokens` | histogram | real tokens per batch |
| `hftasks_padding_share` | histogram | share of a batch's computed tokens that are padding |
| `hftasks_forward_seconds` | histogram | the model's time per batch |
| `hftasks_explain_seconds` | histogram | time of a request for explanations, without its prediction |
| `hftasks_explain_evaluations` | histogram | evaluations of the model per explained text |
| `hftasks_explain_unconverged_total` | counter | explained texts of which some target has not converged |
| `hftasks_refused_total` | counter | requests refused with 429 |
| `hftasks_errors_total` | counter | requests that failed, by `kind`: the class of the error |

All carry `model_name` and `model_version`. With parallel workers the gauge is the sum over live workers.
Collectors are made at first use, after MLServer has set up its multiprocess files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

from mlserver_hftasks.engine.batcher import BatchReport
from mlserver_hftasks.errors import HFTasksError, Overloaded


@dataclass(frozen=True, slots=True)
class ExplainReport:
    """What there is to measure about one request for explanations."""

    seconds: float
    evaluations: Sequence[int]
    """Per text."""
    unconverged: int
    """Texts of which some target has not converged."""


_LABELS = ("model_name", "model_version")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_EVALUATIONS = (2, 5, 10, 15, 20, 30, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
_SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@cache
def _collectors() -> dict[str, Any]:
    def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"hftasks_{name}", text, _LABELS, buckets=buckets)

    return {
        "queue_rows": Gauge(
            "hftasks_queue_rows", "rows that wait for the device", _LABELS, multiprocess_mode="livesum"
        ),
        "queue_wait": histogram("queue_wait_seconds", "wait in the queue per row", _SECONDS),
        "rows": histogram("batch_rows", "rows per batch", _ROWS),
        "tokens": histogram("batch_tokens", "real tokens per batch", _TOKENS),
        "padding": histogram("padding_share", "share of computed tokens that are padding", _SHARES),
        "forward": histogram("forward_seconds", "time of the model per batch", _SECONDS),
        "explain": histogram("explain_seconds", "time of a request for explanations", _SECONDS),
        "evaluations": histogram("explain_evaluations", "evaluations per explained text", _EVALUATIONS),
        "unconverged": Counter(
            "hftasks_explain_unconverged_total", "explained texts that have not converged", _LABELS
        ),
        "refused": Counter("hftasks_refused_total", "requests refused with 429", _LABELS),
        "errors": Counter("hftasks_errors_total", "requests that failed", (*_LABELS, "kind")),
    }


class ModelMetrics:
    """The metrics of one model; made once per load, cheap per batch."""

    def __init__(self, model_name: str, model_version: str | None) -> None:
        self._labels = (model_name, model_version or "")
        self._errors = _collectors()["errors"]
        self._of = {
            name: collector.labels(*self._labels)
            for name, collector in _collectors().items()
            if collector is not self._errors
        }

    def batch_ran(self, report: BatchReport) -> None:
        """Record one batch."""
        self._of["rows"].observe(report.rows)
        self._of["tokens"].observe(report.tokens)
        self._of["padding"].observe(1 - report.tokens / report.cost)
        self._of["forward"].observe(report.forward_s)
        for wait in report.queue_wait_s:
            self._of["queue_wait"].observe(wait)

    def explained(self, report: ExplainReport) -> None:
        """Record one request for explanations."""
        self._of["explain"].observe(report.seconds)
        for evaluations in report.evaluations:
            self._of["evaluations"].observe(evaluations)
        self._of["unconverged"].inc(report.unconverged)

    def queued(self, rows: int) -> None:
        """Record the depth of the queue."""
        self._of["queue_rows"].set(rows)

    def failed(self, error: HFTasksError) -> None:
        """Record a request that failed."""
        if isinstance(error, Overloaded):
            self._of["refused"].inc()
        self._errors.labels(*self._labels, type(error).__name__).inc()
