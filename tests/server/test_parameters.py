"""Texts in every content type, and parameters on every way that they may come."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.server.grpc_client import GrpcClient, unpacked
from tests.server.process import Server
from tests.server.v2 import tensor, texts

LOVED, TERRIBLE = "I loved this film", "This is terrible!"


def labelled(name: str, *values: str) -> list[dict[str, Any]]:
    return [tensor(name, list(values)), tensor("candidate_labels", ["good", "bad", "odd"])]


# -- content types --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inputs",
    [
        [tensor("inputs", [LOVED, TERRIBLE], content_type="str")],
        [tensor("inputs", [json.dumps(LOVED), json.dumps(TERRIBLE)], content_type="hg_jsonlist")],
        [tensor("inputs", [[LOVED], [TERRIBLE]], shape=[2, 1])],
        [tensor("inputs", [LOVED, TERRIBLE], shape=[2, 1])],
        [tensor("inputs", [LOVED, TERRIBLE], shape=[1])],
        [tensor("inputs", [json.dumps([LOVED, TERRIBLE])], content_type="hg_json")],
    ],
    ids=["str", "hg_jsonlist", "nested", "two-dimensional", "shape of one", "hg_json"],
)
def test_texts_in_every_content_type(server: Server, inputs: list[dict[str, Any]]) -> None:
    assert server.results("sentiment", inputs) == server.results("sentiment", texts(LOVED, TERRIBLE))


@pytest.mark.parametrize("content_type", ["raw", "hg_json"])
def test_one_text_by_itself_is_a_scalar(server: Server, content_type: str) -> None:
    text = json.dumps(LOVED) if content_type == "hg_json" else LOVED
    inputs = [tensor("inputs", [text], content_type=content_type)]
    expected = server.results("sentiment", texts(LOVED, name="args"), top_k=2)
    assert server.results("sentiment", inputs, top_k=2) == expected


def test_request_content_type_is_the_default_of_its_tensors(server: Server) -> None:
    inputs = [tensor("inputs", [json.dumps(LOVED)]), tensor("top_k", [2], "INT64", "raw")]
    assert server.results("sentiment", inputs, content_type="hg_jsonlist") == server.results(
        "sentiment", texts(LOVED), top_k=2
    )


def test_request_content_type_of_mlserver_huggingface_is_no_codec_of_tensors(server: Server) -> None:
    assert server.results("sentiment", texts(LOVED), content_type="hg") == server.results(
        "sentiment", texts(LOVED)
    )


def test_pairs(server: Server) -> None:
    pair = {"text": LOVED, "text_pair": TERRIBLE}
    (as_json,) = server.results("sentiment", [tensor("inputs", [json.dumps(pair)], content_type="hg_json")])
    (as_tensors,) = server.results("sentiment", [tensor("text", [LOVED]), tensor("text_pair", [TERRIBLE])])
    assert as_json == as_tensors
    assert as_json != server.results("sentiment", texts(LOVED))[0]


# -- parameters, on every way they may come ---------------------------------------------------------


@pytest.mark.parametrize(
    "parameter",
    [
        tensor("top_k", [2], "INT64"),
        tensor("top_k", [2], "INT32"),
        tensor("top_k", [2.0], "FP32"),
        tensor("top_k", ["2"]),
        tensor("top_k", ["2"], content_type="str"),
        tensor("top_k", [2], "INT64", "raw"),
        tensor("top_k", [2], "BYTES", "raw"),
        tensor("top_k", ["2"], content_type="hg_json"),
    ],
    ids=["int64", "int32", "fp32", "bytes", "str", "raw-int64", "raw-bytes", "hg_json"],
)
def test_parameter_as_tensor(server: Server, parameter: dict[str, Any]) -> None:
    expected = server.results("three", texts(LOVED), top_k=2)
    assert [len(result) for result in expected] == [2]
    assert server.results("three", [*texts(LOVED), parameter]) == expected


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize(
    "parameter",
    [
        tensor("top_k", [2], "INT64"),
        tensor("top_k", [2.0], "FP32"),
        tensor("top_k", ["2"]),
        tensor("top_k", ["2"], content_type="raw"),
        tensor("top_k", ["2"], content_type="hg_json"),
    ],
    ids=["int64", "fp32", "bytes", "raw", "hg_json"],
)
def test_parameter_as_tensor_over_grpc(
    server: Server, grpc_client: GrpcClient, parameter: dict[str, Any], raw: bool
) -> None:
    answer = grpc_client.infer("three", [*texts(LOVED), parameter], raw=raw)
    elements = (
        unpacked("BYTES", answer.raw_output_contents[0]) if raw else answer.outputs[0].contents.bytes_contents
    )
    assert [json.loads(element) for element in elements] == server.results("three", texts(LOVED), top_k=2)


@pytest.mark.parametrize("value", [2, "2", 2.0])
def test_parameter_of_the_request(server: Server, value: Any) -> None:
    expected = server.results("three", [*texts(LOVED), tensor("top_k", [2], "INT64")])
    assert server.results("three", texts(LOVED), top_k=value) == expected


@pytest.mark.parametrize("value", [2, "2"])
def test_parameter_of_the_request_over_grpc(server: Server, grpc_client: GrpcClient, value: Any) -> None:
    assert grpc_client.results("three", texts(LOVED), top_k=value) == server.results(
        "three", texts(LOVED), top_k=2
    )


def test_null_is_a_value(server: Server) -> None:
    (everything,) = server.results("three", texts(LOVED), top_k=None)
    assert len(everything) == 3


@pytest.mark.parametrize(
    "parameter",
    [
        tensor("multi_label", [True], "BOOL"),
        tensor("multi_label", [True], "BOOL", "raw"),
        tensor("multi_label", ["true"], content_type="hg_json"),
        tensor("multi_label", ["true"]),
    ],
    ids=["bool", "raw", "hg_json", "bytes"],
)
def test_boolean_parameter(server: Server, parameter: dict[str, Any]) -> None:
    inputs = labelled("inputs", LOVED)
    (alone,) = server.results("zero-shot", [*inputs, parameter])
    assert (alone,) == tuple(server.results("zero-shot", inputs, multi_label=True))
    (shared,) = server.results("zero-shot", inputs)
    assert sum(shared["scores"]) == pytest.approx(1, abs=1e-5)
    assert sum(alone["scores"]) != pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("value", [False, True])
def test_boolean_parameter_over_grpc(server: Server, grpc_client: GrpcClient, value: bool) -> None:
    inputs = labelled("inputs", LOVED)
    expected = server.results("zero-shot", inputs, multi_label=value)
    assert grpc_client.results("zero-shot", inputs, multi_label=value) == expected
    assert grpc_client.results("zero-shot", [*inputs, tensor("multi_label", [value], "BOOL")]) == expected


def test_list_parameter(server: Server, grpc_client: GrpcClient) -> None:
    labels = ["good", "bad", "odd"]
    expected = server.results("zero-shot", [*texts(LOVED), tensor("candidate_labels", labels)])
    assert set(expected[0]["labels"]) == set(labels)
    as_json = tensor("candidate_labels", [json.dumps(labels)], content_type="hg_json")
    assert server.results("zero-shot", [*texts(LOVED), as_json]) == expected
    assert server.results("zero-shot", texts(LOVED), candidate_labels=labels) == expected
    assert server.results("zero-shot", texts(LOVED), candidate_labels=json.dumps(labels)) == expected
    assert grpc_client.results("zero-shot", texts(LOVED), candidate_labels=json.dumps(labels)) == expected
