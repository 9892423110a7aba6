"""Calls of tritonclient.grpc, in a process of their own: its messages clash with MLServer's in one process.

Arguments: the server's address and a model that classifies texts. Prints what came back as JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import tritonclient.grpc as triton

from mlserver_hftasks.client import read

TEXTS = ["I loved this film", "This is terrible!"]


def inputs(texts: list[str]) -> list[Any]:
    tensor = triton.InferInput("inputs", [len(texts)], "BYTES")
    tensor.set_data_from_numpy(np.array([text.encode() for text in texts], dtype=np.object_))
    return [tensor]


def texts_of(result: Any, name: str) -> list[str]:
    return [element.decode() for element in result.as_numpy(name).ravel()]


def error_of(client: Any, model: str, **options: Any) -> list[str]:
    try:
        client.infer(model, inputs(TEXTS), **options)
    except triton.InferenceServerException as error:
        return [error.status(), error.message()]
    return ["OK", ""]


def calls(client: Any, model: str) -> dict[str, Any]:
    names = ["score", "label", "probabilities"]
    typed = client.infer(model, inputs(TEXTS), outputs=[triton.InferRequestedOutput(name) for name in names])
    with_parameter = client.infer(model, inputs(TEXTS), parameters={"top_k": 2})
    explained = client.infer(model, inputs(TEXTS), parameters={"explain": '{"method": "input-x-gradient"}'})
    metadata = client.get_model_metadata(model, as_json=True)
    return {
        "ready": [client.is_server_live(), client.is_server_ready(), client.is_model_ready(model)],
        "inputs": [tensor["name"] for tensor in metadata["inputs"]],
        "outputs": [tensor["name"] for tensor in metadata["outputs"]],
        "default": texts_of(client.infer(model, inputs(TEXTS)), "output"),
        "top_k": texts_of(with_parameter, "output"),
        "names": [output.name for output in typed.get_response().outputs],
        "labels": texts_of(typed, "label"),
        "scores": typed.as_numpy("score").tolist(),
        "probabilities": [list(typed.as_numpy("probabilities").shape), str(typed.as_numpy("score").dtype)],
        "explained": [target.label for one in read(explained) for target in one.targets],
        "converged": [
            list(explained.as_numpy("converged").shape),
            str(explained.as_numpy("converged").dtype),
        ],
        "id": client.infer(model, inputs(TEXTS), request_id="seven").get_response().id,
        "wrong": error_of(client, model, parameters={"top_k": 0}),
        "fraction": error_of(client, model, parameters={"top_k": 2.5}),
        "protocol": error_of(
            client, model, sequence_id=3, sequence_start=True, priority=1, timeout=9_000_000
        ),
    }


if __name__ == "__main__":
    print(json.dumps(calls(triton.InferenceServerClient(sys.argv[1]), sys.argv[2])))
