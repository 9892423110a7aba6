"""tritonclient over HTTP and gRPC."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton

from mlserver_hftasks.client import read
from tests.server.process import Server
from tests.server.v2 import infer_path, texts

LOVED, TERRIBLE = "I loved this film", "This is terrible!"


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
        typed = client.infer(
            "three", [triton_input(LOVED, TERRIBLE)], outputs=requested, parameters={"top_k": 2}
        )
        sequence = client.infer(
            "sentiment", [triton_input(LOVED)], sequence_id=1, sequence_start=True, priority=1
        )
    expected = server.results("sentiment", texts(LOVED))
    assert [json.loads(element) for element in default.as_numpy("output").ravel()] == expected
    assert default.get_response()["id"] == "seven"
    assert [json.loads(element) for element in sequence.as_numpy("output").ravel()] == expected
    assert typed.as_numpy("label").shape == (2, 2)
    assert typed.as_numpy("probabilities").dtype == np.float32
    assert typed.as_numpy("probabilities").sum(axis=1) == pytest.approx([1, 1], abs=1e-5)


def test_explanations_over_http(server: Server) -> None:
    with triton.InferenceServerClient(f"127.0.0.1:{server.http_port}") as client:
        beside = client.infer("sentiment", [triton_input(LOVED)], parameters={"explain": "occlusion"})
    (reading,) = read(beside)
    assert [word.text for word in reading.words()] == LOVED.split()
    assert beside.as_numpy("attributions").shape == (1, 1, len(reading.tokens))
    assert beside.as_numpy("converged").dtype == np.bool_


def test_tritonclient_with_binary_data_is_told_what_to_do(server: Server) -> None:
    made = triton.InferInput("inputs", [1], "BYTES")
    made.set_data_from_numpy(np.array([LOVED], dtype=np.object_), binary_data=True)
    body, header_length = triton.InferenceServerClient.generate_request_body([made])
    headers = {
        "Content-Type": "application/octet-stream",
        "Inference-Header-Content-Length": str(header_length),
    }
    response = server.client.post(infer_path("sentiment"), content=bytes(body), headers=headers)
    assert response.status_code == 400
    assert "expected application/json" in response.json()["error"]


def test_tritonclient_over_grpc(server: Server) -> None:
    script = Path(__file__).with_name("triton_over_grpc.py")
    run = subprocess.run(
        [sys.executable, str(script), server.grpc_url, "sentiment"],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    got = json.loads(run.stdout)
    expected = server.results("sentiment", texts(LOVED, TERRIBLE))
    assert got["ready"] == [True, True, True]
    assert [json.loads(element) for element in got["default"]] == expected
    assert [json.loads(element) for element in got["top_k"]] == server.results(
        "sentiment", texts(LOVED, TERRIBLE), top_k=2
    )
    assert got["names"] == ["score", "label", "probabilities"]
    assert got["labels"] == [result["label"] for result in expected]
    assert np.ravel(got["scores"]) == pytest.approx([result["score"] for result in expected], abs=1e-6)
    assert got["probabilities"] == [[2, 2], "float32"]
    assert got["explained"] == got["labels"]
    assert got["converged"] == [[2, 1], "bool"]
    assert got["id"] == "seven"
    assert got["wrong"][0] == "StatusCode.INVALID_ARGUMENT"
    assert got["wrong"][1].endswith("@ top_k")
    assert got["fraction"][0] == "StatusCode.INVALID_ARGUMENT", "MLServer would drop it in silence"
    assert got["protocol"][0] == "OK"
    metadata = server.client.get("/v2/models/sentiment").json()
    assert got["inputs"] == [entry["name"] for entry in metadata["inputs"]]
    assert got["outputs"] == [entry["name"] for entry in metadata["outputs"]]
