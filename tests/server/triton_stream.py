"""A stream with the messages of tritonclient, in a process of its own: see `triton_over_grpc`.

MLServer streams `ModelInferResponse`s where Triton wraps each into a `ModelStreamInferResponse`, so that
tritonclient's own `async_stream_infer` does not understand them; a stub of two lines does. Arguments: the
server's address, a model that generates, a prompt. Prints what came back as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2 as pb

METHOD = "/inference.GRPCInferenceService/ModelStreamInfer"


def streamed(channel: grpc.Channel, model: str, prompt: str, **parameters: int) -> Iterator[Any]:
    stub = channel.stream_stream(
        METHOD, pb.ModelInferRequest.SerializeToString, pb.ModelInferResponse.FromString
    )
    tensor = triton.InferInput("text_inputs", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([prompt.encode()], dtype=np.object_))
    message = pb.ModelInferRequest(
        model_name=model,
        inputs=[tensor._get_tensor()],
        raw_input_contents=[tensor._get_content()],
        parameters={name: pb.InferParameter(int64_param=value) for name, value in parameters.items()},
    )
    return map(triton.InferResult, stub(iter([message]), timeout=60))


def main(address: str, model: str, prompt: str) -> dict[str, Any]:
    with grpc.insecure_channel(address) as channel:
        got = list(streamed(channel, model, prompt, max_new_tokens=12))
        try:
            error = str(list(streamed(channel, model, prompt, max_new_tokens=0)))
        except grpc.RpcError as refused:
            error = refused.details()
    return {
        "pieces": [json.loads(each.as_numpy("output").ravel()[0])["generated_text"] for each in got],
        "finish_reason": got[-1].get_response().parameters["finish_reason"].string_param,
        "error": error,
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:4])))
