"""Loading, reloading, unloading, parallel workers, settings, health and the log."""

from __future__ import annotations

import json
import re
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from mlserver.grpc import dataplane_pb2 as pb

from tests import tiny
from tests.server.conftest import CROWDED_ROWS, LABELS_OF_VERSION, LONG
from tests.server.grpc_client import GrpcClient
from tests.server.process import Model, Server
from tests.server.v2 import at_once, eventually, infer_path, tensor, texts

TEXTS = ["I loved this film", "This is terrible!", "Two ferries left for Morrow at 6:45."]
TASK = {"task": "text-classification"}
BIG: dict[str, Any] = {
    "hidden_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
}
"""About 16 million parameters: 60 MB."""


@pytest.fixture(params=[0, 1, 2], ids=["no workers", "1 worker", "2 workers"])
def any_server(request: pytest.FixtureRequest, servers: Callable[[int], Server]) -> Server:
    return servers(request.param)


@pytest.fixture
def any_grpc(any_server: Server) -> Iterator[GrpcClient]:
    client = GrpcClient(any_server.grpc_url)
    yield client
    client.close()


def loaded_lines(server: Server, position: int) -> list[str]:
    return [line for line in server.log_since(position).splitlines() if "loaded model=" in line]


# -- with and without workers -------------------------------------------------------------------------


def test_answers(server: Server, any_server: Server, any_grpc: GrpcClient) -> None:
    expected = server.results("sentiment", texts(*TEXTS), top_k=2)
    for answer in at_once([lambda: any_server.results("sentiment", texts(*TEXTS), top_k=2)] * 12):
        for got, want in zip(answer, expected, strict=True):
            assert [entry["label"] for entry in got] == [entry["label"] for entry in want]
            assert [entry["score"] for entry in got] == pytest.approx(
                [entry["score"] for entry in want], abs=1e-5
            )
    typed = any_server.infer("sentiment", texts(*TEXTS), outputs=["logits"]).json()["outputs"][0]
    assert (typed["name"], typed["datatype"], typed["shape"]) == ("logits", "FP32", [3, 2])
    raw = any_grpc.infer("sentiment", texts(*TEXTS), outputs=["label"], raw=True)
    assert raw.outputs[0].name == "label"
    for version, labels in LABELS_OF_VERSION.items():
        assert any_server.results("versioned", texts(TEXTS[0]), version=version)[0]["label"] in labels


def test_metadata(server: Server, any_server: Server) -> None:
    assert (
        any_server.client.get("/v2/models/sentiment").json()
        == server.client.get("/v2/models/sentiment").json()
    )
    assert (
        any_server.client.get("/v2/models/versioned/versions/1").json()["parameters"]["task"] == TASK["task"]
    )


ERRORS: list[tuple[str, dict[str, Any], int, grpc.StatusCode]] = [
    ("sentiment", {"inputs": texts("a"), "top_k": 0}, 400, grpc.StatusCode.INVALID_ARGUMENT),
    ("sentiment", {"inputs": []}, 400, grpc.StatusCode.INVALID_ARGUMENT),
    ("sentiment", {"inputs": texts("a"), "outputs": ["labels"]}, 400, grpc.StatusCode.INVALID_ARGUMENT),
    ("limited", {"inputs": texts(*"abcde")}, 413, grpc.StatusCode.INVALID_ARGUMENT),
    ("narrow", {"inputs": texts(*"abcd")}, 413, grpc.StatusCode.INVALID_ARGUMENT),
    ("sentiment", {"inputs": texts(*[LONG] * 500), "timeout_ms": 1}, 504, grpc.StatusCode.DEADLINE_EXCEEDED),
]


def test_errors(server: Server, any_server: Server, any_grpc: GrpcClient) -> None:
    position = any_server.log_position()
    for model, options, status, code in ERRORS:
        response = any_server.infer(model, **options)
        assert response.status_code == status, response.text
        message = response.json()["error"]
        assert re.fullmatch(r"(?!mlserver).+ @ [^@]+", message)
        assert message == server.infer(model, **options).json()["error"], "workers change nothing of it"
        error = any_grpc.error(model, **options)
        assert (error.code(), error.details()) == (code, message)
    body = json.dumps({"inputs": texts("a" * 20_000)})
    assert any_server.client.post(infer_path("limited"), content=body).status_code == 413
    assert any_server.client.post(infer_path("limited"), content=b"{").status_code == 400
    assert any_server.infer("nobody", texts("a")).status_code == 404
    assert any_server.log_since(position) == ""


def test_overload(any_server: Server, any_grpc: GrpcClient) -> None:
    """More requests than all queues hold, where one fills the queue of a process."""
    inputs = texts(*[LONG] * CROWDED_ROWS)
    before = any_server.metrics().value("hftasks_refused_total", "crowded")

    def ask(number: int) -> int:
        if number % 2:
            try:
                any_grpc.infer("crowded", inputs)
            except grpc.RpcError as error:
                assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert re.fullmatch(
                    r"the queue is full: .+ @ max_queue_rows; retry after \d+ s", error.details()
                )
                return 429
            return 200
        response = any_server.infer("crowded", inputs)
        assert ("Retry-After" in response.headers) == (response.status_code == 429)
        return response.status_code

    statuses = at_once([partial(ask, number) for number in range(8)])
    assert set(statuses) == {200, 429}
    refused = any_server.metrics().value("hftasks_refused_total", "crowded") - before
    assert refused == statuses.count(429)
    assert any_server.infer("crowded", texts("a")).status_code == 200


def test_requests_leave_no_trace_in_the_log(any_server: Server, any_grpc: GrpcClient) -> None:
    position = any_server.log_position()
    for _ in range(3):
        any_server.results("sentiment", texts(*TEXTS))
        any_grpc.results("sentiment", texts(*TEXTS))
        any_server.client.get("/v2/health/live")
        any_server.client.get("/v2/models/sentiment")
    assert any_server.log_since(position) == ""


# -- load, reload, unload -----------------------------------------------------------------------------


class Load:
    """Clients who ask without a pause, half of them over gRPC."""

    def __init__(self, server: Server, model: str, clients: int = 4) -> None:
        self._server, self._model = server, model
        self._over = threading.Event()
        self.outcomes: list[Any] = []
        """Labels of the answers, status codes of the refusals."""
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        assert eventually(lambda: len(self.outcomes) > 10)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        grpc_client = GrpcClient(self._server.grpc_url) if number % 2 else None
        while not self._over.is_set():
            self.outcomes.append(self._ask(grpc_client))
        if grpc_client:
            grpc_client.close()

    def _ask(self, grpc_client: GrpcClient | None) -> Any:
        if grpc_client is None:
            response = self._server.infer(self._model, texts(*TEXTS))
            return self._labels(response.json()) if response.status_code == 200 else response.status_code
        try:
            results = grpc_client.results(self._model, texts(*TEXTS))
        except grpc.RpcError as error:
            return error.code()
        return tuple(result["label"] for result in results)

    def _labels(self, answer: dict[str, Any]) -> tuple[str, ...]:
        return tuple(json.loads(element)["label"] for element in answer["outputs"][0]["data"])


def rest_call(server: Server, model: str, action: str) -> None:
    response = server.repository_call(model, action)
    assert response.status_code == 200, response.text


def grpc_call(server: Server, model: str, action: str) -> None:
    client = GrpcClient(server.grpc_url)
    if action == "load":
        client.stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name=model), timeout=60)
    else:
        client.stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name=model), timeout=60)
    client.close()


@pytest.mark.parametrize("call", [rest_call, grpc_call])
def test_reload_under_load_loses_nothing(
    some_server: Server, call: Callable[[Server, str, str], None], sentiment_folder: Path
) -> None:
    renamed = Model(sentiment_folder, {**TASK, "labels": ["down", "up"]})
    with some_server.having("changing", Model(sentiment_folder, TASK)):
        old = {result["label"] for result in some_server.results("changing", texts(*TEXTS))}
        with Load(some_server, "changing") as load:
            for _ in range(3):
                call(some_server, "changing", "load")
            some_server.write("changing", renamed)
            call(some_server, "changing", "load")
            done = len(load.outcomes)
            assert eventually(lambda: len(load.outcomes) > done + 10)
        new = {result["label"] for result in some_server.results("changing", texts(*TEXTS))}
    assert all(isinstance(outcome, tuple) for outcome in load.outcomes), set(load.outcomes)
    assert set(load.outcomes[0]) <= old <= {"NEGATIVE", "POSITIVE"}
    assert new <= {"down", "up"}, "the new settings are served"
    assert len(set(load.outcomes)) == 2, "the same answers before and after, other names for them"


@pytest.mark.parametrize("call", [rest_call, grpc_call])
def test_unload_under_load(
    some_server: Server, call: Callable[[Server, str, str], None], sentiment_folder: Path
) -> None:
    gone = {404, 503, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAVAILABLE}
    with some_server.having("going", Model(sentiment_folder, TASK)):
        answers = {tuple(result["label"] for result in some_server.results("going", texts(*TEXTS)))}
        with Load(some_server, "going") as load:
            call(some_server, "going", "unload")
            assert some_server.infer("going", texts("a")).status_code == 404
            assert eventually(lambda: load.outcomes[-1] in gone)
            call(some_server, "going", "load")
            assert eventually(lambda: load.outcomes[-1] not in gone)
    assert set(load.outcomes) <= answers | gone
    assert answers <= set(load.outcomes)


def test_unload_answers_what_is_in_flight(some_server: Server, slow_folder: Path) -> None:
    extra = {**TASK, "warmup": False, "batch_size": 4}
    with some_server.having("leaving", Model(slow_folder, extra)):
        answers: list[Any] = []
        inputs = texts(*[LONG] * 200)
        thread = threading.Thread(target=lambda: answers.append(some_server.results("leaving", inputs)))
        before = some_server.metrics()
        thread.start()
        rows = "hftasks_batch_rows_sum"
        assert eventually(
            lambda: some_server.metrics().value(rows, "leaving") > before.value(rows, "leaving")
        )
        assert thread.is_alive(), "its first rows have run, the others wait"
        rest_call(some_server, "leaving", "unload")
        thread.join()
        assert [len(answer) for answer in answers] == [200]


def test_memory_comes_back(some_server: Server) -> None:
    folder = tiny.folder("bert", "sequence", **BIG)
    size = (folder / "model.safetensors").stat().st_size * max(len(some_server.pids()) - 2, 1)
    assert size > 50e6
    some_server.write("big", Model(folder, {**TASK, "warmup": False}))
    rest_call(some_server, "big", "load")
    rest_call(some_server, "big", "unload")
    grown, left = [], []
    before = some_server.rss_bytes()
    for _ in range(3):
        rest_call(some_server, "big", "load")
        some_server.results("big", texts(*TEXTS))
        grown.append(some_server.rss_bytes() - before)
        rest_call(some_server, "big", "unload")
        left.append(some_server.rss_bytes() - before)
    shutil.rmtree(some_server.repository / "big")
    assert min(grown) > 0.8 * size
    assert all(leftover < growth - 0.6 * size for growth, leftover in zip(grown, left, strict=True))
    assert left[-1] - left[0] < 0.5 * size, "nothing gathers"


def test_reload_does_not_keep_the_old_model(server: Server) -> None:
    folder = tiny.folder("bert", "sequence", **BIG)
    size = (folder / "model.safetensors").stat().st_size
    with server.having("big", Model(folder, {**TASK, "warmup": False})):
        first = server.rss_bytes()
        for _ in range(3):
            rest_call(server, "big", "load")
        assert server.rss_bytes() - first < 1.5 * size


def test_batching_of_mlserver_stays_away_after_a_reload(some_server: Server) -> None:
    """`windowed` has max_batch_size 32 and max_batch_time 1.0."""

    def check() -> None:
        spent = []
        for _ in range(5):
            began = time.monotonic()
            some_server.results("windowed", texts(TEXTS[0]))
            spent.append(time.monotonic() - began)
        assert statistics.median(spent) < 0.5
        before = some_server.metrics()
        some_server.results("windowed", texts(*["a"] * 70))
        after = some_server.metrics()
        batches, up_to_32 = (
            after.value("hftasks_batch_rows_bucket", "windowed", le=le)
            - before.value("hftasks_batch_rows_bucket", "windowed", le=le)
            for le in ("+Inf", "32.0")
        )
        assert batches == up_to_32 >= 3, "max_batch_size is the most rows of a batch"

    check()
    rest_call(some_server, "windowed", "load")
    check()


def test_one_line_of_log_per_load(server: Server, sentiment_folder: Path) -> None:
    position = server.log_position()
    with server.having("logged", Model(sentiment_folder, TASK, version="7")):
        (line,) = loaded_lines(server, position)
        for field in ("model=logged", "version=7", "task=text-classification", "backend=torch", "device=cpu"):
            assert field in line
        rest_call(server, "logged", "load")
        assert len(loaded_lines(server, position)) == 2, "a reload loads once"


# -- health -------------------------------------------------------------------------------------------


def test_health_answers_while_the_device_is_busy(server: Server) -> None:
    """The first batch of a model that was not warmed up is as large as it may be: here over a second."""
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(server.results("bulk", texts(*[LONG] * 80))))
    thread.start()
    spent = []
    while thread.is_alive():
        began = time.monotonic()
        assert server.client.get("/v2/health/live").status_code == 200
        spent.append(time.monotonic() - began)
        time.sleep(0.01)
    assert [len(answer) for answer in answers] == [80]
    scraped = server.metrics()
    longest = scraped.value("hftasks_forward_seconds_sum", "bulk") / scraped.value(
        "hftasks_forward_seconds_count", "bulk"
    )
    assert len(spent) > 10
    assert statistics.quantiles(spent, n=20)[-1] < longest / 4


def test_a_model_of_another_runtime_is_left_alone(server: Server) -> None:
    """What the runtime changes of MLServer concerns models of its own."""
    code = "import mlserver\nclass Sum(mlserver.MLModel):\n    async def load(self): return True\n"
    folder = server.repository / "other"
    folder.mkdir()
    (folder / "other_runtime.py").write_text(code)
    settings = {"name": "other", "implementation": "other_runtime.Sum", "parameters": {}}
    (folder / "model-settings.json").write_text(json.dumps(settings))
    try:
        rest_call(server, "other", "load")
        response = server.client.post(infer_path("other"), json={"inputs": "none"})
        assert response.status_code == 422, "FastAPI's own answer"
        rest_call(server, "other", "unload")
    finally:
        shutil.rmtree(folder)


def test_inputs_of_any_name_are_json(server: Server) -> None:
    """The server after all that."""
    assert len(server.results("sentiment", [tensor("array_inputs", TEXTS)])) == len(TEXTS)
