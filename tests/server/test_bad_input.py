"""What a client does wrong: an exact status, a message that helps, no traceback, and nobody else suffers."""

from __future__ import annotations

import gzip
import json
import re
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx
import pytest
from mlserver.grpc import dataplane_pb2 as pb

from tests.server.conftest import CROWDED_ROWS, LIMITS, LONG
from tests.server.grpc_client import GrpcClient, request
from tests.server.process import Server, at_once, eventually, infer_path, results_of, tensor, texts

LOVED = "I loved this film"
GOOD = texts(LOVED)
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


@dataclass(frozen=True)
class Case:
    name: str
    inputs: Sequence[Mapping[str, Any]]
    says: str
    status: int = 400
    model: str = "sentiment"
    outputs: Sequence[str] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)


def labels_for_zero_shot(*labels: str) -> list[dict[str, Any]]:
    return [*GOOD, tensor("candidate_labels", list(labels))]


CASES = [
    Case("input name", [tensor("inputz", ["a"])], "unknown input or parameter 'inputz', did you mean 'inputs'? @ inputz"),
    Case("no inputs", [], "no input, expected"),
    Case("only a parameter", [tensor("top_k", [2], "INT64")], "no input, expected"),
    Case("input twice", [*GOOD, *texts("b", name="args")], "came twice"),
    Case("two kinds of input", [*GOOD, tensor("text", ["a"])], "both inputs and text"),
    Case("empty batch", [tensor("inputs", [])], "an empty batch, expected 1..1024 items @ inputs"),
    Case("empty raw tensor", [tensor("inputs", [], content_type="raw")], "an empty tensor"),
    Case("shape too large", [tensor("inputs", ["a"], shape=[2])], "1 elements, expected 2"),
    Case("shape too small", [tensor("inputs", ["a", "b"], shape=[1])], "2 elements, expected 1"),
    Case("shape of too many sizes", [tensor("inputs", ["a", "b"], shape=[2, 2])], "2 elements, expected 4"),
    Case("shape below zero", [tensor("inputs", ["a"], shape=[-1])], "got the shape [-1], expected a list of sizes"),
    Case("shape beyond memory", [tensor("inputs", ["a"], shape=[2**60])], "1 elements, expected"),
    Case("numbers as texts", [tensor("inputs", [1, 2], "INT64")], "got int 1, expected a text @ inputs[0]"),
    Case("floats as texts", [tensor("inputs", [1.5], "FP32")], "expected a text @ inputs[0]"),
    Case("arrays as texts", [tensor("inputs", [1.5], "FP32", "np")], "expected a text @ inputs[0]"),
    Case("texts as an array", [tensor("inputs", ["a"], content_type="np")], "got the datatype BYTES"),
    Case("bytes as texts", [tensor("inputs", ["aGk="], content_type="base64")], "got bytes b'hi', expected a text"),
    Case("content type", [tensor("inputs", ["a"], content_type="strr")], "unknown content type 'strr', did you mean 'str'?"),
    Case("base64", [tensor("inputs", ["&&"], content_type="base64")], "invalid base64"),
    Case("no image", [tensor("inputs", ["aGk="], content_type="pillow_image")], "an image that cannot be read"),
    Case("image among texts", [tensor("inputs", ['{"text": "data:image/png;base64,aGk="}'], content_type="hg_json")], "an image"),
    Case("JSON", [tensor("inputs", ['{"a":'], content_type="hg_json")], "invalid JSON"),
    Case("JSON list", [tensor("inputs", ['"a"', "b"], content_type="hg_jsonlist")], "invalid JSON"),
    Case("JSON too deep", [tensor("inputs", ["[" * 100_000], content_type="hg_json")], "invalid JSON"),
    Case("JSON number", [tensor("inputs", ["1"], content_type="hg_json")], "got int 1, expected a text @ inputs[0]"),
    Case("JSON keys", [tensor("inputs", ['{"txt": "a"}'], content_type="hg_json")], "got the keys ['txt']"),
    Case("pairs of unequal number", [tensor("text", ["a"]), tensor("text_pair", ["b", "c"])], "got 2 second texts, expected 1"),
    Case("output name", GOOD, "unknown output 'labels', did you mean 'label'? @ outputs", outputs=["label", "labels"]),
    Case("parameter name", GOOD, "unknown input or parameter 'topk', did you mean 'top_k'? @ topk", parameters={"topk": 2}),
    Case("parameter tensor name", [*GOOD, tensor("topk", [2], "INT64")], "did you mean 'top_k'?"),
    Case("parameter value", GOOD, "got 0, expected: input should be greater than or equal to 1 @ top_k", parameters={"top_k": 0}),
    Case("parameter type", GOOD, "got 'two', expected", parameters={"top_k": "two"}),
    Case("parameter choice", GOOD, "got 'relu', expected", parameters={"function_to_apply": "relu"}),
    Case("parameter of two values", [*GOOD, tensor("top_k", [2, 3], "INT64")], "2 values, expected one @ top_k"),
    Case("parameter of no value", [*GOOD, tensor("top_k", [], "INT64")], "0 values, expected one @ top_k"),
    Case("parameter with a fraction", [*GOOD, tensor("top_k", [2.5], "FP32")], "got 2.5, expected"),
    Case("parameter tensor in JSON", [*GOOD, tensor("top_k", ['{"a": 2}'], content_type="hg_json")], "@ top_k"),
    Case("parameter beyond a limit", GOOD, "got 129, expected 1..128 @ max_length", parameters={"max_length": 129}),
    Case("timeout of the past", GOOD, "expected: input should be greater than 0 @ timeout_ms", parameters={"timeout_ms": -1}),
    Case("remote code", GOOD, "unknown input or parameter 'trust_remote_code'", parameters={"trust_remote_code": True}),
    Case("too many tokens", texts(LONG * 10), "expected at most 128: shorten it, or send the parameter truncation=true"),
    Case("too many items", texts(*"abcde"), "5 items, expected at most 4 @ inputs", 413, "limited"),
    Case("too many characters", texts("a", "b" * 301), "a text of 301 characters, expected at most 300 @ inputs[1]", 413, "limited"),
    Case("no mask", texts("no mask here"), "expected '[MASK]' @ inputs[0]", model="mask"),
    Case("target", texts("I [MASK] it"), "@ targets", model="mask", parameters={"targets": '[1]'}),
    Case("no labels", GOOD, "candidate_labels", model="zero-shot"),
    Case("empty labels", labels_for_zero_shot(), "candidate_labels", model="zero-shot"),
    Case("template", labels_for_zero_shot("a"), "@ hypothesis_template", model="zero-shot", parameters={"hypothesis_template": "no place"}),
    Case("no context", [tensor("question", ["who?"])], "context", model="answers"),
    Case("empty context", [tensor("question", ["who?"]), tensor("context", [""])], "context", model="answers"),
    Case("strategy", GOOD, "got 'best', expected", model="tokens", parameters={"aggregation_strategy": "best"}),
    Case("no query", [tensor("texts", ["a"])], "query", model="ranking"),
    Case("pooling", GOOD, "got 'median', expected", model="embeddings", parameters={"pooling": "median"}),
]


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

TENSOR = {"name": "inputs", "shape": [1], "datatype": "BYTES", "data": ["a"]}


def with_tensor(**changes: Any) -> dict[str, Any]:
    """A body whose tensor has other values for some keys; `...` takes the key away."""
    changed = {key: value for key, value in {**TENSOR, **changes}.items() if value is not ...}
    return {"inputs": [changed]}


BODIES: list[tuple[str, Any, str]] = [
    ("list", [1], "no list of inputs"),
    ("no inputs key", {}, "no list of inputs"),
    ("inputs null", {"inputs": None}, "no list of inputs"),
    ("tensor null", {"inputs": [None]}, "a tensor without a name"),
    ("no name", with_tensor(name=...), "a tensor without a name"),
    ("name null", with_tensor(name=None), "a tensor without a name"),
    ("name a number", with_tensor(name=5), "a tensor without a name"),
    ("no shape", with_tensor(shape=...), "got the shape None"),
    ("shape a text", with_tensor(shape="1"), "got the shape '1'"),
    ("shape of floats", with_tensor(shape=[1.0]), "got the shape [1.0]"),
    ("shape of booleans", with_tensor(shape=[True]), "got the shape [True]"),
    ("shape astronomic", with_tensor(shape=[10**30]), "got the shape"),
    ("no datatype", with_tensor(datatype=...), "got the datatype 'None'"),
    ("datatype unknown", with_tensor(datatype="STRING"), "got the datatype 'STRING', expected one of BOOL, BYTES"),
    ("datatype near", with_tensor(datatype="INT46"), "did you mean 'INT64'?"),
    ("datatype a list", with_tensor(datatype=["BYTES"]), "got the datatype"),
    ("no data", with_tensor(data=...), "a tensor without data"),
    ("data an object", with_tensor(data={"a": 1}), "expected a text @ inputs[0]"),
    ("data a number", with_tensor(data=3), "got int 3, expected a text @ inputs[0]"),
    ("element null", with_tensor(data=[None]), "got NoneType None, expected a text @ inputs[0]"),
    ("element a number", with_tensor(data=[1]), "got int 1, expected a text @ inputs[0]"),
    ("element a boolean", with_tensor(data=[True]), "expected a text @ inputs[0]"),
    ("texts as numbers", with_tensor(datatype="INT64"), "got 'a', expected a value of the datatype INT64 @ inputs[0]"),
    ("number over its type", with_tensor(datatype="UINT8", data=[300], parameters={"content_type": "np"}), "uint8"),
    ("content type a number", with_tensor(parameters={"content_type": 5}), "@ inputs[0].parameters.content_type"),
    ("tensor parameters a list", with_tensor(parameters=[1]), "expected an object @ inputs[0].parameters"),
    ("id a number", {**with_tensor(), "id": 5}, "expected a text @ id"),
    ("parameters a list", {**with_tensor(), "parameters": [1]}, "expected an object @ parameters"),
    ("request content type a number", {**with_tensor(), "parameters": {"content_type": 5}}, "@ parameters.content_type"),
    ("headers a text", {**with_tensor(), "parameters": {"headers": "a"}}, "@ parameters.headers"),
    ("parameter a list", {**with_tensor(), "parameters": {"top_k": [2]}}, "got [2], expected"),
    ("parameter an object", {**with_tensor(), "parameters": {"top_k": {}}}, "@ top_k"),
    ("parameter beyond 64 bits", {**with_tensor(), "parameters": {"top_k": 10**40}}, "@ top_k"),
    ("outputs an object", {**with_tensor(), "outputs": {"name": "label"}}, "expected a list @ outputs"),
    ("outputs of texts", {**with_tensor(), "outputs": ["label"]}, "expected an output with a name @ outputs[0]"),
    ("output without a name", {**with_tensor(), "outputs": [{}]}, "expected an output with a name @ outputs[0]"),
    ("output parameters a list", {**with_tensor(), "outputs": [{"name": "label", "parameters": [1]}]}, "@ outputs[0].parameters"),
]


@pytest.mark.parametrize(("body", "says"), [case[1:] for case in BODIES], ids=[case[0] for case in BODIES])
def test_body(server: Server, body: Any, says: str) -> None:
    check_rest(server.client.post(infer_path("sentiment"), json=body), 400, says)


VALID = json.dumps(with_tensor()).encode()
BYTES: list[tuple[str, bytes, dict[str, str], str]] = [
    ("empty", b"", {}, "an empty body"),
    ("null", b"null", {}, "no list of inputs"),
    ("cut off", VALID[:-3], {}, "invalid JSON"),
    ("not UTF-8", VALID.replace(b'"a"', b'"\xff"'), {}, "invalid JSON"),
    ("lone surrogate", VALID.replace(b'"a"', b'"\\ud800"'), {}, "invalid JSON"),
    ("NaN", VALID.replace(b'"a"', b"NaN"), {}, "invalid JSON"),
    ("infinity", VALID.replace(b'"a"', b"1e999"), {}, "invalid JSON"),
    ("deep", b"[" * 100_000, {}, "invalid JSON"),
    ("form", VALID, {"Content-Type": "application/x-www-form-urlencoded"}, "expected application/json @ body"),
    ("text", VALID, {"Content-Type": "text/plain"}, "expected application/json @ body"),
    ("nonsense type", VALID, {"Content-Type": ";;"}, "expected application/json @ body"),
    ("no gzip", VALID, {"Content-Encoding": "gzip"}, "a body that is not gzip"),
    ("gzip cut off", gzip.compress(VALID)[:-4], {"Content-Encoding": "gzip"}, "not one whole gzip stream"),
    ("empty gzip", gzip.compress(b""), {"Content-Encoding": "gzip"}, "an empty body"),
    ("deflate", zlib.compress(VALID), {"Content-Encoding": "deflate"}, "expected gzip or none @ body"),
]


@pytest.mark.parametrize("path", ["infer", "generate", "infer_stream"])
@pytest.mark.parametrize(("content", "headers", "says"), [case[1:] for case in BYTES], ids=[case[0] for case in BYTES])
def test_bytes(server: Server, path: str, content: bytes, headers: dict[str, str], says: str) -> None:
    response = server.client.post(f"/v2/models/sentiment/{path}", content=content, headers=headers)
    check_rest(response, 400, says)


def test_stream_of_a_bad_request_has_its_status(server: Server) -> None:
    response = server.client.post("/v2/models/sentiment/infer_stream", json={"inputs": texts(LONG * 10)})
    check_rest(response, 400, "expected at most 128")


# -- gRPC messages ----------------------------------------------------------------------------------


def set_datatype(message: Any) -> None:
    message.inputs[0].datatype = "STRING"


def two_contents(message: Any) -> None:
    message.inputs[0].contents.ClearField("bytes_contents")
    message.inputs[0].contents.int64_contents.append(4)


def not_utf8(message: Any) -> None:
    message.inputs[0].contents.bytes_contents[0] = b"\xff\xfe"


def no_contents(message: Any) -> None:
    message.inputs[0].ClearField("contents")


def empty_parameter(message: Any) -> None:
    message.parameters["top_k"].CopyFrom(pb.InferParameter())


def content_type_a_number(message: Any) -> None:
    message.inputs[0].parameters["content_type"].int64_param = 5


def raw_of(contents: bytes, datatype: str = "BYTES", size: int = 1) -> Callable[[Any], None]:
    def change(message: Any) -> None:
        message.inputs[0].ClearField("contents")
        message.inputs[0].datatype = datatype
        message.inputs[0].shape[:] = [size]
        message.raw_input_contents.append(contents)

    return change


def raw_too_few(message: Any) -> None:
    raw_of(struct.pack("<I", 1) + b"a")(message)
    message.inputs.append(pb.ModelInferRequest.InferInputTensor(name="top_k", datatype="INT64", shape=[1]))


MESSAGES: list[tuple[str, Callable[[Any], None], str]] = [
    ("datatype", set_datatype, "got the datatype 'STRING'"),
    ("contents of another type", two_contents, "got int 4, expected a text @ inputs[0]"),
    ("not UTF-8", not_utf8, "bytes that are not UTF-8"),
    ("no contents", no_contents, "0 elements, expected 1"),
    ("parameter of no kind", empty_parameter, "@ top_k"),
    ("content type a number", content_type_a_number, "a message that cannot be read"),
    ("raw cut off", raw_of(b"\x05\x00"), "a message that cannot be read"),
    ("raw length beyond its end", raw_of(b"\xff\xff\xff\xff"), "a message that cannot be read"),
    ("raw of another size", raw_of(b"abc", "INT64"), "a message that cannot be read"),
    ("raw of a size below zero", raw_of(b"abcdefgh", "INT64", -1), "a message that cannot be read"),
    ("raw of a size beyond memory", raw_of(b"abcdefgh", "INT64", 2**61), "a message that cannot be read"),
    ("raw of an unknown datatype", raw_of(b"abc", "FOO"), "a message that cannot be read"),
    ("raw not UTF-8", raw_of(struct.pack("<I", 2) + b"\xff\xfe"), "bytes that are not UTF-8"),
    ("raw too few", raw_too_few, "a message that cannot be read"),
]


@pytest.mark.parametrize(("change", "says"), [case[1:] for case in MESSAGES], ids=[case[0] for case in MESSAGES])
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
    response = server.client.post(infer_path("limited"), content=content, headers={"Content-Encoding": encoding})
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

    answers = at_once([lambda number=number: ask(number) for number in range(60)], threads=20)
    for number, answer in enumerate(answers):
        if number % 3 == 2:
            assert 400 <= answer < 500
        else:
            (got,), (want,) = answer, expected[number % len(good)]
            assert [entry["label"] for entry in got] == [entry["label"] for entry in want]
            assert [entry["score"] for entry in got] == pytest.approx([entry["score"] for entry in want], abs=1e-5)


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
    filled = fill_queue("slow")
    inputs = texts(*[LONG] * 20)
    response = server.infer("slow", inputs, timeout_ms=1)
    check_rest(response, 504, "no answer within 1 ms")
    check_grpc(grpc_client.error("slow", inputs, timeout_ms=1), 504, "no answer within 1 ms")
    assert filled.is_alive(), "answered while the others still wait"
    filled.join()
    assert eventually(lambda: server.metrics().value("hftasks_queue_rows", "slow") == 0)
    assert server.infer("slow", GOOD).status_code == 200


def test_timeout_by_setting(server: Server, grpc_client: GrpcClient) -> None:
    inputs = texts(*[LONG] * 80)
    check_rest(server.infer("hurried", inputs), 504, "no answer within 100 ms")
    check_rest(server.infer("hurried", inputs, timeout_ms=60_000), 504, "no answer within 100 ms")
    check_rest(server.infer("hurried", inputs, timeout_ms=50), 504, "no answer within 50 ms")
    check_grpc(grpc_client.error("hurried", inputs), 504, "no answer within 100 ms")
