"""The metrics that `mlserver_hftasks.metrics` documents: all there, all moving as they should."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from mlserver_hftasks import metrics as documented
from tests.server.conftest import CROWDED_ROWS, LONG
from tests.server.grpc_client import GrpcClient
from tests.server.process import Server
from tests.server.v2 import Metrics, at_once, eventually, tensor, texts

TABLE = re.findall(r"^\| `(\w+)` \| (\w+) \|", documented.__doc__ or "", re.MULTILINE)
"""Names and kinds as the module's docstring lists them."""
HISTOGRAMS = [name for name, kind in TABLE if kind == "histogram"]
OF_GENERATION = {f"hftasks_{name}_seconds" for name in ("time_to_first_token", "token_gap", "step")}
"""A model that classifies does not move them."""


def difference(after: Metrics, before: Metrics, model: str) -> Callable[..., float]:
    return lambda name, **labels: after.value(name, model, **labels) - before.value(name, model, **labels)


def test_the_table_is_read() -> None:
    assert len(TABLE) >= 8
    assert {kind for _, kind in TABLE} == {"gauge", "histogram", "counter"}


def test_all_documented_metrics_are_served(some_server: Server) -> None:
    some_server.results("sentiment", texts("a"))
    some_server.infer("sentiment", texts("a"), top_k=0)
    some_server.infer("sentiment", texts("a"), explain=True)
    families = some_server.metrics().kinds
    for name, kind in TABLE:
        assert families.get(name.removesuffix("_total")) == kind, name
    ours = {name for name in families if name.startswith("hftasks_") and not name.endswith("_created")}
    assert ours == {name.removesuffix("_total") for name, _ in TABLE}, (
        "nothing is served that is not documented"
    )


def test_batches_are_measured(some_server: Server) -> None:
    inputs = texts("I loved this film", "This is terrible!", "Two ferries left for Morrow at 6:45.")
    before = some_server.metrics()
    for _ in range(4):
        some_server.results("sentiment", inputs)
    assert eventually(
        lambda: difference(some_server.metrics(), before, "sentiment")("hftasks_batch_rows_sum") == 12
    )
    moved = difference(some_server.metrics(), before, "sentiment")
    batches = moved("hftasks_batch_rows_count")
    assert 4 <= batches < 12, "the texts of a request run together, though BERT's pad token is 0"
    for name in ("batch_tokens", "padding_share", "forward_seconds"):
        assert moved(f"hftasks_{name}_count") == batches, name
    assert moved("hftasks_queue_wait_seconds_count") == 12
    assert moved("hftasks_batch_tokens_sum") > 12 * 3
    assert moved("hftasks_padding_share_sum") == 0, "this model is packed"
    assert moved("hftasks_forward_seconds_sum") > 0
    assert moved("hftasks_queue_wait_seconds_sum") >= 0
    assert some_server.metrics().value("hftasks_queue_rows", "sentiment") == 0


def test_explanations_are_measured(some_server: Server) -> None:
    before = some_server.metrics()
    some_server.infer(
        "sentiment", texts("I loved this film", "a"), explain={"tolerance": 1e-6, "max_evals": 4}
    )
    moved = difference(some_server.metrics(), before, "sentiment")
    assert moved("hftasks_explain_seconds_count") == 1
    assert moved("hftasks_explain_seconds_sum") > 0
    assert moved("hftasks_explain_evaluations_count") == 2
    assert 0 < moved("hftasks_explain_evaluations_sum") <= 8
    assert moved("hftasks_explain_unconverged_total") >= 1


def test_histograms_are_cumulative(some_server: Server) -> None:
    some_server.infer("sentiment", texts("a"), explain=True)
    scraped = some_server.metrics()
    for name in HISTOGRAMS:
        count = scraped.value(f"{name}_count", "sentiment")
        assert (count > 0) is (name not in OF_GENERATION)
        assert scraped.value(f"{name}_bucket", "sentiment", le="+Inf") == count


def test_errors_count_by_kind(some_server: Server) -> None:
    before = some_server.metrics()
    for _ in range(3):
        assert some_server.infer("limited", texts("a"), top_k=0).status_code == 400
    assert some_server.infer("limited", texts("a" * 301)).status_code == 413
    assert some_server.infer("limited", texts("a"), timeout_ms=1e-6).status_code == 504
    moved = difference(some_server.metrics(), before, "limited")
    assert moved("hftasks_errors_total", kind="InvalidRequest") == 3
    assert moved("hftasks_errors_total", kind="RequestTooLarge") == 1
    assert moved("hftasks_errors_total", kind="DeadlineExceeded") == 1
    assert moved("hftasks_errors_total") == 5
    assert moved("hftasks_refused_total") == 0


def test_models_and_versions_are_told_apart(some_server: Server) -> None:
    before = some_server.metrics()
    some_server.results("versioned", texts("a"), version="1")
    some_server.results("versioned", texts("a", "b"), version="2")
    moved = difference(some_server.metrics(), before, "versioned")
    assert moved("hftasks_batch_rows_sum", model_version="1") == 1
    assert moved("hftasks_batch_rows_sum", model_version="2") == 2
    assert difference(some_server.metrics(), before, "sentiment")("hftasks_batch_rows_sum") == 0


def test_padding_is_measured_where_there_is_some(server: Server) -> None:
    before = server.metrics()
    server.results("padded", texts("a", LONG))
    moved = difference(server.metrics(), before, "padded")
    together = moved("hftasks_padding_share_count") == 1  # the two texts may as well have run apart
    share = moved("hftasks_padding_share_sum")
    assert 0.3 < share < 0.5 if together else share == 0


def test_queue_depth_and_refusals(
    server: Server, grpc_client: GrpcClient, fill_queue: Callable[[str], Any]
) -> None:
    before = server.metrics()
    filled = fill_queue("crowded")  # comes back when the gauge shows the rows that wait
    inputs = texts(*["a"] * CROWDED_ROWS)
    statuses = at_once([lambda: server.infer("crowded", inputs).status_code] * 4)
    with pytest.raises(grpc.RpcError):
        grpc_client.infer("crowded", inputs)
    assert filled.is_alive()
    assert statuses == [429] * 4
    filled.join()
    moved = difference(server.metrics(), before, "crowded")
    assert moved("hftasks_refused_total") == 5
    assert moved("hftasks_errors_total", kind="Overloaded") == 5
    assert moved("hftasks_batch_rows_sum") == CROWDED_ROWS, "refused rows never run"
    assert eventually(lambda: server.metrics().value("hftasks_queue_rows", "crowded") == 0)
    assert moved("hftasks_queue_wait_seconds_sum") > moved("hftasks_forward_seconds_sum"), (
        "rows waited for others"
    )


def test_forward_time_is_that_of_the_model(server: Server) -> None:
    before = server.metrics()
    server.results("slow", [tensor("inputs", [LONG] * 30)])
    server.results("sentiment", [tensor("inputs", [LONG] * 30)])
    after = server.metrics()
    slow, quick = (
        difference(after, before, model)("hftasks_forward_seconds_sum") for model in ("slow", "sentiment")
    )
    assert slow > 3 * quick
