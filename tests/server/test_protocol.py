"""What a correct client sends and gets: the V2 protocol over REST and gRPC, and the wire contract."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton

from tests.server.conftest import LABELS_OF_VERSION
from tests.server.grpc_client import GrpcClient, unpacked
from tests.server.process import Server, infer_path, results_of, tensor, texts

LOVED, TERRIBLE = "I loved this film", "This is terrible!"
ANNA = "Anna Keller opened the shutters of the river museum."
MASKED = "I [MASK] this film."
QUESTION, CONTEXT = "what is your name?", "Hello, I am Seldon, how is it going"
MODELS = {
    "sentiment": texts(LOVED, TERRIBLE),
    "tokens": texts(ANNA, LOVED),
    "mask": texts(MASKED, MASKED),
    "answers": [tensor("question", [QUESTION] * 2), tensor("context", [CONTEXT, ANNA])],
    "zero-shot": [*texts(LOVED, TERRIBLE), tensor("candidate_labels", ["good", "bad"])],
    "features": texts(LOVED, TERRIBLE),
    "embeddings": texts(LOVED, TERRIBLE),
    "ranking": [tensor("query", [LOVED]), tensor("texts", [TERRIBLE, ANNA])],
}
"""A good request for each model, of two items."""


# -- the result as JSON: the contract of mlserver_huggingface -------------------------------------


def test_default_output_is_json_texts(server: Server) -> None:
    response = server.infer("sentiment", texts(LOVED, TERRIBLE))
    answer = response.json()
    assert answer["model_name"] == "sentiment"
    (output,) = answer["outputs"]
    assert {key: output[key] for key in ("name", "datatype", "shape", "parameters")} == {
        "name": "output",
        "datatype": "BYTES",
        "shape": [2, 1],
        "parameters": {"content_type": "hg_jsonlist"},
    }
    for result in results_of(response):
        assert set(result) == {"label", "score"}
        assert result["label"] in {"NEGATIVE", "POSITIVE"}
        assert 0.5 <= result["score"] <= 1


def question(*values: str) -> list[dict[str, Any]]:
    return [tensor("question", list(values)), tensor("context", [CONTEXT] * len(values))]


def labelled(name: str, *values: str) -> list[dict[str, Any]]:
    return [tensor(name, list(values)), tensor("candidate_labels", ["good", "bad", "odd"])]


SHAPES: list[tuple[str, list[dict[str, Any]], dict[str, Any], list[type]]] = [
    ("sentiment", texts(LOVED, name="args"), {}, [dict]),
    ("sentiment", texts(LOVED, name="array_inputs"), {}, [dict]),
    ("sentiment", texts(LOVED, TERRIBLE, name="array_inputs"), {}, [dict, dict]),
    ("sentiment", texts(LOVED, TERRIBLE, name="args"), {}, [dict, dict]),
    ("sentiment", texts(LOVED, name="args"), {"top_k": 2}, [dict, dict]),
    ("sentiment", texts(LOVED, TERRIBLE), {"top_k": 2}, [list, list]),
    ("tokens", texts(ANNA), {}, [list]),
    ("mask", texts(MASKED, name="array_inputs"), {}, [dict] * 5),
    ("mask", texts(MASKED, MASKED, name="array_inputs"), {}, [list, list]),
    ("answers", question(QUESTION), {}, [dict]),
    ("answers", question(QUESTION, "who?"), {}, [dict, dict]),
    ("answers", question(QUESTION), {"top_k": 3}, [dict] * 3),
    ("answers", question(QUESTION, "who?"), {"top_k": 3}, [list, list]),
    ("zero-shot", labelled("args", LOVED), {}, [dict]),
    ("zero-shot", labelled("array_inputs", LOVED), {}, [dict]),
    ("zero-shot", labelled("array_inputs", LOVED, TERRIBLE), {}, [dict, dict]),
    ("features", texts(LOVED, name="args"), {}, [list]),
]


@pytest.mark.parametrize(
    ("model", "inputs", "parameters", "kinds"),
    SHAPES,
    ids=[f"{model}-{inputs[0]['name']}-{len(inputs[0]['data'])}-{parameters}" for model, inputs, parameters, _ in SHAPES],
)
def test_shape_of_result(
    server: Server, model: str, inputs: list[dict[str, Any]], parameters: dict[str, Any], kinds: list[type]
) -> None:
    assert [type(result) for result in server.results(model, inputs, **parameters)] == kinds


def test_scalar_token_classification_gives_one_element_per_entity(server: Server) -> None:
    (listed,) = server.results("tokens", texts(ANNA))
    assert listed, "the test's text must have entities"
    assert server.results("tokens", texts(ANNA, name="args")) == listed


def test_empty_result_keeps_name_and_content_type(server: Server) -> None:
    every_label = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    inputs = [tensor("args", [ANNA]), tensor("ignore_labels", every_label)]
    (output,) = server.infer("tokens", inputs).json()["outputs"]
    assert (output["name"], output["shape"], output["data"]) == ("output", [0, 1], [])
    assert output["parameters"] == {"content_type": "hg_jsonlist"}


@pytest.mark.parametrize("model", MODELS)
def test_grpc_answers_as_rest_does(server: Server, grpc_client: GrpcClient, model: str) -> None:
    assert grpc_client.results(model, MODELS[model]) == server.results(model, MODELS[model])


def test_grpc_takes_raw_contents_and_answers_in_kind(server: Server, grpc_client: GrpcClient) -> None:
    inputs = [*texts(LOVED, "höflich, naïve, 東京"), tensor("top_k", [2], "INT64")]
    answer = grpc_client.infer("sentiment", inputs, raw=True)
    assert not answer.outputs[0].contents.bytes_contents
    (raw,) = answer.raw_output_contents
    results = [json.loads(element) for element in unpacked("BYTES", raw)]
    assert results == server.results("sentiment", inputs)


# -- content types --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inputs",
    [
        [tensor("inputs", [LOVED, TERRIBLE], content_type="str")],
        [tensor("inputs", [json.dumps(LOVED), json.dumps(TERRIBLE)], content_type="hg_jsonlist")],
        [tensor("inputs", [[LOVED], [TERRIBLE]], shape=[2, 1])],
        [tensor("inputs", [LOVED, TERRIBLE], shape=[2, 1])],
    ],
    ids=["str", "hg_jsonlist", "nested", "two-dimensional"],
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
    assert server.results("sentiment", texts(LOVED), content_type="hg") == server.results("sentiment", texts(LOVED))


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
    elements = unpacked("BYTES", answer.raw_output_contents[0]) if raw else answer.outputs[0].contents.bytes_contents
    assert [json.loads(element) for element in elements] == server.results("three", texts(LOVED), top_k=2)


@pytest.mark.parametrize("value", [2, "2", 2.0])
def test_parameter_of_the_request(server: Server, value: Any) -> None:
    expected = server.results("three", [*texts(LOVED), tensor("top_k", [2], "INT64")])
    assert server.results("three", texts(LOVED), top_k=value) == expected


@pytest.mark.parametrize("value", [2, "2"])
def test_parameter_of_the_request_over_grpc(server: Server, grpc_client: GrpcClient, value: Any) -> None:
    assert grpc_client.results("three", texts(LOVED), top_k=value) == server.results("three", texts(LOVED), top_k=2)


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


# -- typed outputs ----------------------------------------------------------------------------------


def test_typed_outputs_are_those_asked_for_in_order(server: Server) -> None:
    names = ["probabilities", "label", "output", "score", "logits"]
    outputs = server.infer("sentiment", texts(LOVED, TERRIBLE), outputs=names).json()["outputs"]
    assert [output["name"] for output in outputs] == names
    by_name = {output["name"]: output for output in outputs}
    assert [by_name[name]["datatype"] for name in names] == ["FP32", "BYTES", "BYTES", "FP32", "FP32"]
    assert [by_name[name]["shape"] for name in names] == [[2, 2], [2, 1], [2, 1], [2, 1], [2, 2]]
    results = [json.loads(element) for element in by_name["output"]["data"]]
    assert by_name["label"]["data"] == [result["label"] for result in results]
    assert by_name["score"]["data"] == pytest.approx([result["score"] for result in results])
    logits = np.array(by_name["logits"]["data"]).reshape(2, 2)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert by_name["probabilities"]["data"] == pytest.approx(probabilities.ravel().tolist(), abs=1e-6)


def test_no_outputs_asked_for_is_the_default(server: Server) -> None:
    body = {"inputs": texts(LOVED), "outputs": []}
    (output,) = server.client.post(infer_path("sentiment"), json=body).json()["outputs"]
    assert output["name"] == "output"


def test_parameters_reach_typed_outputs(server: Server) -> None:
    (labels,) = server.infer("three", texts(LOVED, TERRIBLE), outputs=["label"], top_k=2).json()["outputs"]
    assert labels["shape"] == [2, 2]
    expected = server.results("three", texts(LOVED, TERRIBLE), top_k=2)
    assert labels["data"] == [entry["label"] for result in expected for entry in result]


def test_embeddings_are_floats(server: Server, grpc_client: GrpcClient) -> None:
    (output,) = server.infer("embeddings", texts(LOVED, TERRIBLE), outputs=["embedding"]).json()["outputs"]
    assert (output["datatype"], output["shape"]) == ("FP32", [2, 32])
    answer = grpc_client.infer("embeddings", texts(LOVED, TERRIBLE), outputs=["embedding"], raw=True)
    assert unpacked("FP32", answer.raw_output_contents[0]) == pytest.approx(output["data"], abs=1e-6)
    listed = np.array(server.results("embeddings", texts(LOVED, TERRIBLE)))
    assert np.array(output["data"]).reshape(2, 32) == pytest.approx(listed, abs=1e-6)


# -- metadata ---------------------------------------------------------------------------------------


def test_metadata_of_text_classification(server: Server) -> None:
    metadata = server.client.get("/v2/models/sentiment").json()
    inputs = {entry["name"]: entry for entry in metadata["inputs"]}
    roles = {name: entry["parameters"]["role"] for name, entry in inputs.items()}
    assert [name for name, role in roles.items() if role == "input"] == [
        "inputs",
        "args",
        "array_inputs",
        "text",
        "text_pair",
    ]
    assert {name for name, role in roles.items() if role == "parameter"} == {
        "timeout_ms",
        "truncation",
        "max_length",
        "top_k",
        "function_to_apply",
        "return_all_scores",
    }
    assert (inputs["top_k"]["datatype"], inputs["top_k"]["parameters"]["default"]) == ("INT64", 1)
    assert (inputs["return_all_scores"]["datatype"], inputs["timeout_ms"]["datatype"]) == ("BOOL", "FP32")
    assert [entry["name"] for entry in metadata["outputs"]] == ["output", "label", "score", "probabilities", "logits"]
    assert metadata["platform"] == "transformers"
    assert {"task": "text-classification", "backend": "torch", "device": "cpu", "max_length": 128}.items() <= metadata[
        "parameters"
    ].items()


@pytest.mark.parametrize("model", MODELS)
def test_metadata_lists_the_outputs_exactly(server: Server, model: str) -> None:
    listed = server.client.get(f"/v2/models/{model}").json()["outputs"]
    names = [entry["name"] for entry in listed]
    outputs = server.infer(model, MODELS[model], outputs=names).json()["outputs"]
    assert [output["name"] for output in outputs] == names
    for entry, output in zip(listed, outputs, strict=True):
        assert output["datatype"] == entry["datatype"], entry["name"]
        assert len(output["shape"]) == len(entry["shape"]), entry["name"]
        assert all(want in (-1, got) for want, got in zip(entry["shape"], output["shape"], strict=True))
        assert len(output["data"]) == np.prod(output["shape"]), entry["name"]


@pytest.mark.parametrize("model", MODELS)
def test_metadata_lists_the_inputs_exactly(server: Server, model: str) -> None:
    listed = [entry["name"] for entry in server.client.get(f"/v2/models/{model}").json()["inputs"]]
    assert len(set(listed)) == len(listed)
    for name in listed:
        inputs = [*(entry for entry in MODELS[model] if entry["name"] != name), tensor(name, ["[]"])]
        assert "unknown input or parameter" not in server.infer(model, inputs).text, name
    unlisted = server.infer(model, [*MODELS[model], tensor("num_workers", [2], "INT64")])
    assert unlisted.status_code == 400
    assert "unknown input or parameter 'num_workers'" in unlisted.json()["error"]


def test_metadata_over_grpc(server: Server, grpc_client: GrpcClient) -> None:
    from mlserver.grpc import dataplane_pb2 as pb

    answer = grpc_client.stub.ModelMetadata(pb.ModelMetadataRequest(name="three"), timeout=60)
    metadata = server.client.get("/v2/models/three").json()
    assert [entry.name for entry in answer.inputs] == [entry["name"] for entry in metadata["inputs"]]
    assert [list(entry.shape) for entry in answer.outputs] == [entry["shape"] for entry in metadata["outputs"]]
    assert answer.outputs[1].datatype == "BYTES"


# -- several models and versions --------------------------------------------------------------------


def test_versions_of_one_model(server: Server, grpc_client: GrpcClient) -> None:
    for version, labels in LABELS_OF_VERSION.items():
        response = server.infer("versioned", texts(LOVED), version=version)
        assert response.json()["model_version"] == version
        assert results_of(response)[0]["label"] in labels
        answer = grpc_client.infer("versioned", texts(LOVED), version=version)
        assert answer.model_version == version
        assert json.loads(answer.outputs[0].contents.bytes_contents[0])["label"] in labels
        metadata = server.client.get(f"/v2/models/versioned/versions/{version}")
        assert metadata.json()["name"] == "versioned"
    assert server.results("versioned", texts(LOVED))[0]["label"] in LABELS_OF_VERSION["2"], "newest by default"


def test_unknown_model_and_version(server: Server) -> None:
    assert server.infer("nobody", texts(LOVED)).status_code == 404
    assert server.infer("versioned", texts(LOVED), version="3").status_code == 404


def test_repository_index(server: Server) -> None:
    index = server.client.post("/v2/repository/index", json={}).json()
    states = {(entry["name"], entry.get("version")): entry["state"] for entry in index}
    assert states["sentiment", None] == states["versioned", "1"] == states["versioned", "2"] == "READY"


# -- the envelope -----------------------------------------------------------------------------------


def test_request_id_is_echoed(server: Server, grpc_client: GrpcClient) -> None:
    body = {"id": "seven", "inputs": texts(LOVED)}
    assert server.client.post(infer_path("sentiment"), json=body).json()["id"] == "seven"
    assert grpc_client.infer("sentiment", texts(LOVED), request_id="seven").id == "seven"
    made = {server.infer("sentiment", texts(LOVED)).json()["id"] for _ in range(3)}
    assert len(made) == 3, "an id is made up where none came"


@pytest.mark.parametrize("encoding", ["gzip", "GZIP"])
def test_compressed_request(server: Server, encoding: str) -> None:
    body = gzip.compress(json.dumps({"inputs": texts(LOVED)}).encode())
    headers = {"Content-Encoding": encoding, "Content-Type": "application/json"}
    response = server.client.post(infer_path("sentiment"), content=body, headers=headers)
    assert results_of(response) == server.results("sentiment", texts(LOVED))


def test_compressed_response(server: Server) -> None:
    response = server.infer("features", texts(LOVED))
    assert response.headers["content-encoding"] == "gzip"


@pytest.mark.parametrize("content_type", [None, "application/json; charset=utf-8", "application/ld+json"])
def test_content_types_of_the_body(server: Server, content_type: str | None) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    body = json.dumps({"inputs": texts(LOVED)}).encode()
    response = server.client.post(infer_path("sentiment"), content=body, headers=headers)
    assert results_of(response) == server.results("sentiment", texts(LOVED))


def test_chunked_body(server: Server) -> None:
    body = json.dumps({"inputs": texts(LOVED)}).encode()
    pieces = (body[start : start + 10] for start in range(0, len(body), 10))
    response = server.client.post(infer_path("sentiment"), content=pieces)
    assert results_of(response) == server.results("sentiment", texts(LOVED))


def test_stream_of_one_answer(server: Server) -> None:
    path = "/v2/models/sentiment/infer_stream"
    with server.client.stream("POST", path, json={"inputs": texts(LOVED)}) as response:
        assert response.status_code == 200
        (event,) = [line for line in response.iter_lines() if line]
    answer = json.loads(event.removeprefix("data: "))
    assert [json.loads(element) for element in answer["outputs"][0]["data"]] == server.results("sentiment", texts(LOVED))


# -- tritonclient -----------------------------------------------------------------------------------


def triton_input(*values: str) -> Any:
    made = triton.InferInput("inputs", [len(values)], "BYTES")
    made.set_data_from_numpy(np.array(values, dtype=np.object_), binary_data=False)
    return made


def test_tritonclient_over_http(server: Server) -> None:
    with triton.InferenceServerClient(f"127.0.0.1:{server.http_port}") as client:
        assert client.is_server_ready()
        assert client.is_model_ready("sentiment")
        # Without outputs it sends the request parameter binary_data_output: true.
        default = client.infer("sentiment", [triton_input(LOVED)], request_id="seven")
        names = ["label", "probabilities"]
        requested = [triton.InferRequestedOutput(name, binary_data=False) for name in names]
        typed = client.infer("three", [triton_input(LOVED, TERRIBLE)], outputs=requested, parameters={"top_k": 2})
        sequence = client.infer("sentiment", [triton_input(LOVED)], sequence_id=1, sequence_start=True, priority=1)
    expected = server.results("sentiment", texts(LOVED))
    assert [json.loads(element) for element in default.as_numpy("output").ravel()] == expected
    assert default.get_response()["id"] == "seven"
    assert [json.loads(element) for element in sequence.as_numpy("output").ravel()] == expected
    assert typed.as_numpy("label").shape == (2, 2)
    assert typed.as_numpy("probabilities").dtype == np.float32
    assert typed.as_numpy("probabilities").sum(axis=1) == pytest.approx([1, 1], abs=1e-5)


def test_tritonclient_with_binary_data_is_told_what_to_do(server: Server) -> None:
    made = triton.InferInput("inputs", [1], "BYTES")
    made.set_data_from_numpy(np.array([LOVED], dtype=np.object_), binary_data=True)
    body, header_length = triton.InferenceServerClient.generate_request_body([made])
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(header_length)}
    response = server.client.post(infer_path("sentiment"), content=bytes(body), headers=headers)
    assert response.status_code == 400
    assert "expected application/json" in response.json()["error"]


def test_tritonclient_over_grpc(server: Server) -> None:
    script = Path(__file__).with_name("triton_over_grpc.py")
    run = subprocess.run(
        [sys.executable, str(script), server.grpc_url, "sentiment"], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr[-2000:]
    got = json.loads(run.stdout)
    expected = server.results("sentiment", texts(LOVED, TERRIBLE))
    assert got["ready"] == [True, True, True]
    assert [json.loads(element) for element in got["default"]] == expected
    assert [json.loads(element) for element in got["top_k"]] == server.results("sentiment", texts(LOVED, TERRIBLE), top_k=2)
    assert got["names"] == ["score", "label", "probabilities"]
    assert got["labels"] == [result["label"] for result in expected]
    assert np.ravel(got["scores"]) == pytest.approx([result["score"] for result in expected], abs=1e-6)
    assert got["probabilities"] == [[2, 2], "float32"]
    assert got["id"] == "seven"
    assert got["wrong"][0] == "StatusCode.INVALID_ARGUMENT"
    assert got["wrong"][1].endswith("@ top_k")
    assert got["fraction"][0] == "StatusCode.INVALID_ARGUMENT", "MLServer would drop it in silence"
    assert got["protocol"][0] == "OK"
    metadata = server.client.get("/v2/models/sentiment").json()
    assert got["inputs"] == [entry["name"] for entry in metadata["inputs"]]
    assert got["outputs"] == [entry["name"] for entry in metadata["outputs"]]
