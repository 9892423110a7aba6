"""What a correct client sends and gets: the V2 protocol over REST and gRPC, and the wire contract."""

from __future__ import annotations

import gzip
import json
from typing import Any

import numpy as np
import pytest

from mlserver_hftasks.tasks.registry import task_class
from tests.server.conftest import LABELS_OF_VERSION
from tests.server.grpc_client import GrpcClient, unpacked
from tests.server.process import Server
from tests.server.v2 import infer_path, results_of, tensor, texts

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
    ids=[
        f"{model}-{inputs[0]['name']}-{len(inputs[0]['data'])}-{parameters}"
        for model, inputs, parameters, _ in SHAPES
    ],
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
    assert (inputs["top_k"]["datatype"], inputs["top_k"]["parameters"]["default"]) == ("INT64", 1)
    assert (inputs["return_all_scores"]["datatype"], inputs["timeout_ms"]["datatype"]) == ("BOOL", "FP32")
    assert metadata["platform"] == "transformers"
    told = {"task": "text-classification", "backend": "torch", "device": "cpu", "max_length": 128}
    assert told.items() <= metadata["parameters"].items()


@pytest.mark.parametrize("model", MODELS)
def test_metadata_is_the_signature_of_the_task(server: Server, model: str) -> None:
    metadata = server.client.get(f"/v2/models/{model}").json()
    signature = task_class(metadata["parameters"]["task"]).signature
    names = [entry["name"] for entry in metadata["inputs"]]
    explains = ["explain"] if "explain_methods" in metadata["parameters"] else []
    assert names == [*signature.known_names(), *explains]
    outputs = [(entry["name"], entry["datatype"], tuple(entry["shape"])) for entry in metadata["outputs"]]
    typed = [(spec.name, spec.datatype, spec.shape) for spec in signature.outputs]
    assert outputs == [("output", "BYTES", (-1, 1)), *typed]


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
    assert [list(entry.shape) for entry in answer.outputs] == [
        entry["shape"] for entry in metadata["outputs"]
    ]
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
    assert server.results("versioned", texts(LOVED))[0]["label"] in LABELS_OF_VERSION["2"], (
        "newest by default"
    )


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
    assert [json.loads(element) for element in answer["outputs"][0]["data"]] == server.results(
        "sentiment", texts(LOVED)
    )
