"""What a client does wrong: an exact status, a message that helps, no traceback, and nobody else suffers."""

from __future__ import annotations

import gzip
import json
import re
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import grpc
import httpx
import pytest

from tests.server.bad_requests import BODIES, BYTES, CASES, GOOD, LOVED, MESSAGES, Case
from tests.server.conftest import CROWDED_ROWS, LIMITS, LONG
from tests.server.grpc_client import GrpcClient, request
from tests.server.process import Server
from tests.server.v2 import at_once, eventually, infer_path, results_of, texts

MESSAGE = re.compile(r".+, expected.+ @ .*|.+ @ \S.*", re.DOTALL)
CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


@pytest.fixture(scope="module", autouse=True)
def quiet_and_unharmed(server: Server) -> Iterator[None]:
    """After all that, the log has not grown by a word and the answers are the same."""
    before = {model: server.results(model, GOOD, top_k=2) for model in ("sentiment", "limited", "three")}
    position = server.log_position()
    yield
    assert server.log_since(position) == ""
    assert {model: server.results(model, GOOD, top_k=2) for model in before} == before


def check_rest(response: httpx.Response, status: int, says: str) -> None:
    assert response.status_code == status, response.text[:500]
    assert set(response.json()) == {"error"}
    message = response.json()["error"]
    assert says in message
    assert " @ " in message
    assert "Traceback" not in message
    assert ".py" not in message


def check_grpc(error: grpc.RpcError, status: int, says: str) -> None:
    assert error.code() is CODES[status], error.details()
    assert says in error.details()
    assert " @ " in error.details()
    assert "Traceback" not in error.details()


# -- what JSON and gRPC messages can both say -----------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rest(server: Server, case: Case) -> None:
    response = server.infer(case.model, case.inputs, outputs=case.outputs, **case.parameters)
    check_rest(response, case.status, case.says)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_grpc(grpc_client: GrpcClient, case: Case) -> None:
    error = grpc_client.error(case.model, case.inputs, outputs=case.outputs, **case.parameters)
    check_grpc(error, case.status, case.says)


@pytest.mark.parametrize("case", [case for case in CASES if case.inputs], ids=lambda case: case.name)
def test_grpc_with_raw_contents(grpc_client: GrpcClient, case: Case) -> None:
    message = request(case.model, case.inputs, outputs=case.outputs, raw=True, **case.parameters)
    error = grpc_client.error_of(message)
    assert error.code() is CODES[case.status], error.details()
    assert " @ " in error.details()


# -- REST bodies ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("body", "says"), [case[1:] for case in BODIES], ids=[case[0] for case in BODIES])
def test_body(server: Server, body: Any, says: str) -> None:
    check_rest(server.client.post(infer_path("sentiment"), json=body), 400, says)


@pytest.mark.parametrize("path", ["infer", "generate", "infer_stream"])
@pytest.mark.parametrize(
    ("content", "headers", "says"), [case[1:] for case in BYTES], ids=[case[0] for case in BYTES]
)
def test_bytes(server: Server, path: str, content: bytes, headers: dict[str, str], says: str) -> None:
    response = server.client.post(f"/v2/models/sentiment/{path}", content=content, headers=headers)
    check_rest(response, 400, says)


def test_stream_of_a_bad_request_has_its_status(server: Server) -> None:
    response = server.client.post("/v2/models/sentiment/infer_stream", json={"inputs": texts(LONG * 10)})
    check_rest(response, 400, "expected at most 128")


# -- gRPC messages ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"), [case[1:] for case in MESSAGES], ids=[case[0] for case in MESSAGES]
)
def test_message(grpc_client: GrpcClient, change: Callable[[Any], None], says: str) -> None:
    message = request("sentiment", GOOD)
    change(message)
    check_grpc(grpc_client.error_of(message), 400, says)


def test_message_of_a_stream(grpc_client: GrpcClient) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        list(grpc_client.stub.ModelStreamInfer(iter([request("sentiment", [])]), timeout=60))
    check_grpc(raised.value, 400, "no input, expected")


# -- size -------------------------------------------------------------------------------------------

TOO_LARGE = json.dumps({"inputs": texts("a" * LIMITS["max_body_bytes"])}).encode()


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
def test_body_over_the_limit(server: Server, encoding: str) -> None:
    content = gzip.compress(TOO_LARGE) if encoding == "gzip" else TOO_LARGE
    response = server.client.post(
        infer_path("limited"), content=content, headers={"Content-Encoding": encoding}
    )
    check_rest(response, 413, f"expected at most {LIMITS['max_body_bytes']} @ body")


def test_body_over_the_limit_that_does_not_say_its_length(server: Server) -> None:
    endless = (b" " * 10_000 for _ in range(1000))
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        response = client.post(infer_path("limited"), content=endless)
    check_rest(response, 413, "@ body")


def test_body_up_to_the_limit(server: Server) -> None:
    body = json.dumps({"inputs": GOOD}).encode()
    padded = body + b" " * (LIMITS["max_body_bytes"] - len(body))
    headers = {"Content-Encoding": "gzip"}
    for content, extra in ((padded, {}), (gzip.compress(padded), headers)):
        assert results_of(server.client.post(infer_path("limited"), content=content, headers=extra))
    for content, extra in ((padded + b" ", {}), (gzip.compress(padded + b" "), headers)):
        assert server.client.post(infer_path("limited"), content=content, headers=extra).status_code == 413


def test_gzip_bomb_does_not_grow_memory(server: Server) -> None:
    size = 200_000_000
    compressor = zlib.compressobj(1, wbits=zlib.MAX_WBITS | 16)
    pieces = [compressor.compress(b" " * 1_000_000) for _ in range(size // 1_000_000)]
    bomb = b"".join(pieces) + compressor.flush()
    assert len(bomb) < size / 100
    server.reset_peak_rss()
    before = server.rss_bytes()
    for path in ("infer", "generate", "infer_stream"):
        url = f"/v2/models/limited/{path}"
        response = server.client.post(url, content=bomb, headers={"Content-Encoding": "gzip"})
        check_rest(response, 413, "@ body")
    assert server.peak_rss_bytes() - before < size / 4


# -- others do not suffer ---------------------------------------------------------------------------


def test_one_bad_request_among_good_ones_fails_alone(server: Server, grpc_client: GrpcClient) -> None:
    good = [f"{LOVED} {word}" for word in ("much", "little", "once", "twice", "today", "again")]
    expected = [server.results("three", texts(text), top_k=3) for text in good]
    bad = [case for case in CASES if case.model == "sentiment"][:12]

    def ask(number: int) -> Any:
        if number % 3 == 2:
            case = bad[number // 3 % len(bad)]
            return server.infer("three", case.inputs, outputs=case.outputs, **case.parameters).status_code
        client = grpc_client if number % 3 else server
        return client.results("three", texts(good[number % len(good)]), top_k=3)

    answers = at_once([partial(ask, number) for number in range(60)], threads=20)
    for number, answer in enumerate(answers):
        if number % 3 == 2:
            assert 400 <= answer < 500
        else:
            (got,), (want,) = answer, expected[number % len(good)]
            assert [entry["label"] for entry in got] == [entry["label"] for entry in want]
            assert [entry["score"] for entry in got] == pytest.approx(
                [entry["score"] for entry in want], abs=1e-5
            )


# -- overload and deadlines -------------------------------------------------------------------------


def test_overload_is_refused_at_once(
    server: Server, grpc_client: GrpcClient, fill_queue: Callable[[str], threading.Thread]
) -> None:
    refused_before = server.metrics().value("hftasks_refused_total", "crowded")
    filled = fill_queue("crowded")
    inputs = texts(*[LOVED] * CROWDED_ROWS)
    began = time.monotonic()
    response = server.infer("crowded", inputs)
    error = grpc_client.error("crowded", inputs)
    refused_after_s = time.monotonic() - began
    assert filled.is_alive(), "refused while the others still wait"
    check_rest(response, 429, "the queue is full")
    assert int(response.headers["Retry-After"]) >= 1
    check_grpc(error, 429, "the queue is full")
    filled.join()
    served_after_s = time.monotonic() - began
    assert refused_after_s < served_after_s / 2
    assert server.metrics().value("hftasks_refused_total", "crowded") == refused_before + 2
    assert server.infer("crowded", GOOD).status_code == 200


def test_a_request_that_times_out_leaves_the_queue(
    server: Server, grpc_client: GrpcClient, fill_queue: Callable[[str], threading.Thread]
) -> None:

    def rows_run() -> float:
        return server.metrics().value("hftasks_batch_rows_sum", "slow")

    before = rows_run()
    filled = fill_queue("slow")
    inputs = texts(*[LONG] * 20)
    response = server.infer("slow", inputs, timeout_ms=1)
    check_rest(response, 504, "no answer within 1 ms")
    check_grpc(grpc_client.error("slow", inputs, timeout_ms=1), 504, "no answer within 1 ms")
    assert filled.is_alive(), "answered while the others still wait"
    filled.join()
    assert eventually(lambda: server.metrics().value("hftasks_queue_rows", "slow") == 0)
    assert rows_run() - before < CROWDED_ROWS + 40, "what nobody waits for is not run"
    assert server.infer("slow", GOOD).status_code == 200


def test_timeout_by_setting(server: Server, grpc_client: GrpcClient) -> None:
    inputs = texts(*[LONG] * 80)
    check_rest(server.infer("hurried", inputs), 504, "no answer within 100 ms")
    check_rest(server.infer("hurried", inputs, timeout_ms=60_000), 504, "no answer within 100 ms")
    check_rest(server.infer("hurried", inputs, timeout_ms=50), 504, "no answer within 50 ms")
    check_grpc(grpc_client.error("hurried", inputs), 504, "no answer within 100 ms")
