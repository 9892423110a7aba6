"""What is measured, under which names, on MLServer's `/metrics`.

| name | kind | what |
| --- | --- | --- |
| `hftasks_queue_rows` | gauge | rows that wait for the device |
| `hftasks_queue_wait_seconds` | histogram | from arrival in the queue to leaving in a batch, per row |
| `hftasks_batch_rows` | histogram | rows per batch |
| `hftasks_batch_tokens` | histogram | real tokens per batch |
| `hftasks_padding_share` | histogram | share of a batch's computed tokens that are padding |
| `hftasks_forward_seconds` | histogram | the model's time per batch |
| `hftasks_time_to_first_token_seconds` | histogram | from arrival to the first token, per sequence |
| `hftasks_token_gap_seconds` | histogram | from one token of a sequence to its next |
| `hftasks_step_seconds` | histogram | the model's time per step of generation |
| `hftasks_prompt_tokens_total` | counter | tokens of prompts that were fed to the model |
| `hftasks_generated_tokens_total` | counter | tokens that were generated |
| `hftasks_running_sequences` | gauge | sequences that are being generated |
| `hftasks_waiting_sequences` | gauge | sequences that wait to begin |
| `hftasks_kv_cache_share` | gauge | share of the cache of keys and values that is taken |
| `hftasks_explain_seconds` | histogram | time of a request for explanations, without its prediction |
| `hftasks_explain_evaluations` | histogram | evaluations of the model per explained text |
| `hftasks_explain_unconverged_total` | counter | explained texts of which some target has not converged |
| `hftasks_refused_total` | counter | requests refused with 429 |
| `hftasks_errors_total` | counter | requests that failed, by `kind`: the class of the error |

All carry `model_name` and `model_version`. With parallel workers gauges are sums over live workers, that of
the cache is the largest.
Collectors are made at first use, after MLServer has set up its multiprocess files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

from mlserver_hftasks.engine.batcher import BatchReport
from mlserver_hftasks.engine.generator import Occupancy, StepReport
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
        "first_token": histogram("time_to_first_token_seconds", "from arrival to first token", _SECONDS),
        "token_gap": histogram("token_gap_seconds", "from a token of a sequence to its next", _SECONDS),
        "step": histogram("step_seconds", "time of the model per step of generation", _SECONDS),
        "prompt_tokens": Counter("hftasks_prompt_tokens_total", "tokens of prompts fed", _LABELS),
        "generated": Counter("hftasks_generated_tokens_total", "tokens generated", _LABELS),
        "running": Gauge(
            "hftasks_running_sequences", "sequences in generation", _LABELS, multiprocess_mode="livesum"
        ),
        "waiting": Gauge(
            "hftasks_waiting_sequences", "sequences that wait to begin", _LABELS, multiprocess_mode="livesum"
        ),
        "cache": Gauge(
            "hftasks_kv_cache_share", "share of the cache that is taken", _LABELS, multiprocess_mode="livemax"
        ),
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

    def step_ran(self, report: StepReport) -> None:
        """Record one step of generation."""
        self._of["step"].observe(report.seconds)
        self._of["prompt_tokens"].inc(report.prompt_tokens)
        self._of["generated"].inc(report.new_tokens)
        for seconds in report.first_token_s:
            self._of["first_token"].observe(seconds)
        for seconds in report.token_gap_s:
            self._of["token_gap"].observe(seconds)

    def explained(self, report: ExplainReport) -> None:
        """Record one request for explanations."""
        self._of["explain"].observe(report.seconds)
        for evaluations in report.evaluations:
            self._of["evaluations"].observe(evaluations)
        self._of["unconverged"].inc(report.unconverged)

    def occupied(self, occupancy: Occupancy) -> None:
        """Record how full a generating engine is."""
        self._of["running"].set(occupancy.running)
        self._of["waiting"].set(occupancy.waiting)
        self._of["cache"].set(occupancy.cache_share)

    def queued(self, rows: int) -> None:
        """Record the depth of the queue."""
        self._of["queue_rows"].set(rows)

    def failed(self, error: HFTasksError) -> None:
        """Record a request that failed."""
        if isinstance(error, Overloaded):
            self._of["refused"].inc()
        self._errors.labels(*self._labels, type(error).__name__).inc()
