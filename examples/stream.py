"""Prints an answer while a model writes it: `python examples/stream.py MODEL "The harbour was"`.

`--chat` sends the text as a message through the model's chat template, `--grpc` streams over gRPC. Needs
httpx (`pip install httpx`) for REST, mlserver for gRPC; the server needs `"parallel_workers": 0`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

import httpx

Chunk = dict[str, Any]
"""A piece: its text, and what the response's parameters say; the last one has `finish_reason`."""


def request(options: argparse.Namespace) -> dict[str, Any]:
    """The V2 request as JSON."""
    name, element, content_type = "text_inputs", options.text, "str"
    if options.chat:
        messages = [{"role": "user", "content": options.text}]
        name, element, content_type = "messages", json.dumps(messages), "hg_json"
    tensor = {
        "name": name,
        "shape": [1],
        "datatype": "BYTES",
        "data": [element],
        "parameters": {"content_type": content_type},
    }
    return {"inputs": [tensor], "parameters": {"max_new_tokens": options.max_new_tokens}}


def over_rest(options: argparse.Namespace) -> Iterator[Chunk]:
    """Server-sent events: each line `data: {...}` is a V2 response."""
    url = f"http://{options.host}:{options.http_port}/v2/models/{options.model}/infer_stream"
    with httpx.stream("POST", url, json=request(options), timeout=None) as response:
        if response.status_code != 200:
            raise SystemExit(f"{response.status_code}: {response.read().decode()}")
        for line in response.iter_lines():
            if line.startswith("data: "):
                yield piece_of(json.loads(line.removeprefix("data: ")))


def over_grpc(options: argparse.Namespace) -> Iterator[Chunk]:
    """The method `ModelStreamInfer`, with one request."""
    import grpc
    from mlserver.grpc.converters import ModelInferRequestConverter, ModelInferResponseConverter
    from mlserver.grpc.dataplane_pb2_grpc import GRPCInferenceServiceStub
    from mlserver.types import InferenceRequest

    content = request(options)
    tensor = content["inputs"][0]
    tensor["data"] = [element.encode() for element in tensor["data"]]
    message = ModelInferRequestConverter.from_types(
        InferenceRequest.model_validate(content), model_name=options.model
    )
    with grpc.insecure_channel(f"{options.host}:{options.grpc_port}") as channel:
        for response in GRPCInferenceServiceStub(channel).ModelStreamInfer(iter([message])):
            yield piece_of(ModelInferResponseConverter.to_types(response).model_dump())


def piece_of(response: dict[str, Any]) -> Chunk:
    """The piece in a V2 response. An error after the first piece is a piece without outputs."""
    said = response.get("parameters") or {}
    if not response["outputs"]:
        return {"text": "", **said}
    (element,) = response["outputs"][0]["data"]
    return {"text": json.loads(element)["generated_text"], **said}


def main() -> None:
    """Print the pieces as they come, then why the answer ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--grpc", action="store_true")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--http-port", type=int, default=8080)
    parser.add_argument("--grpc-port", type=int, default=8081)
    options = parser.parse_args()
    last: Chunk = {}
    for last in (over_grpc if options.grpc else over_rest)(options):
        print(last["text"], end="", flush=True)
    print(f"\n[{last.get('error') or last.get('finish_reason')}, {last.get('generated_tokens')} tokens]")


if __name__ == "__main__":
    main()
