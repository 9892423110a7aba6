"""V2 requests over gRPC, written as the JSON of the REST protocol is.

The messages are MLServer's own: those of tritonclient cannot live in one process with them.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import grpc
from mlserver.grpc import dataplane_pb2 as pb
from mlserver.grpc.dataplane_pb2_grpc import GRPCInferenceServiceStub

CLIENT_SECONDS = 60.0
_FIELDS = {
    "BYTES": "bytes_contents",
    "BOOL": "bool_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}
_FORMATS = {"BOOL": "?", "INT32": "i", "INT64": "q", "UINT8": "B", "FP32": "f", "FP64": "d"}


class GrpcClient:
    """One channel to a server."""

    def __init__(self, url: str) -> None:
        self._channel = grpc.insecure_channel(url)
        self.stub = GRPCInferenceServiceStub(self._channel)

    def close(self) -> None:
        self._channel.close()

    def infer(self, model: str, inputs: Sequence[Mapping[str, Any]], **options: Any) -> Any:
        """The answer; raises `grpc.RpcError`. Options are those of `request`."""
        return self.stub.ModelInfer(request(model, inputs, **options), timeout=CLIENT_SECONDS)

    def results(self, model: str, inputs: Sequence[Mapping[str, Any]], **options: Any) -> list[Any]:
        """The parsed elements of the default output."""
        (output,) = self.infer(model, inputs, **options).outputs
        assert output.name == "output"
        return [json.loads(element) for element in output.contents.bytes_contents]

    def error(self, model: str, inputs: Sequence[Mapping[str, Any]], **options: Any) -> grpc.RpcError:
        """The error of a request that must fail."""
        return self.error_of(request(model, inputs, **options))

    def error_of(self, message: Any) -> grpc.RpcError:
        """The error of a message that must fail."""
        try:
            answer = self.stub.ModelInfer(message, timeout=CLIENT_SECONDS)
        except grpc.RpcError as error:
            return error
        raise AssertionError(f"no error, but {answer}")


def request(
    model: str,
    inputs: Sequence[Mapping[str, Any]],
    *,
    outputs: Sequence[str] = (),
    version: str | None = None,
    request_id: str = "",
    raw: bool = False,
    **parameters: Any,
) -> Any:
    """A request; `raw` sends the data as `raw_input_contents`."""
    message = pb.ModelInferRequest(
        model_name=model,
        model_version=version or "",
        id=request_id,
        parameters=_parameters(parameters),
        inputs=[_tensor(tensor, with_data=not raw) for tensor in inputs],
        outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in outputs],
    )
    if raw:
        message.raw_input_contents.extend(
            _raw(tensor["datatype"], _flat(tensor["data"])) for tensor in inputs
        )
    return message


def unpacked(datatype: str, raw: bytes) -> list[Any]:
    """The elements of one entry of `raw_output_contents`."""
    if datatype != "BYTES":
        size = struct.calcsize(_FORMATS[datatype])
        return list(struct.unpack(f"<{len(raw) // size}{_FORMATS[datatype]}", raw))
    elements = []
    while raw:
        (length,) = struct.unpack_from("<I", raw)
        elements.append(raw[4 : 4 + length])
        raw = raw[4 + length :]
    return elements


def _tensor(tensor: Mapping[str, Any], *, with_data: bool) -> Any:
    made = pb.ModelInferRequest.InferInputTensor(
        name=tensor["name"],
        datatype=tensor["datatype"],
        shape=tensor["shape"],
        parameters=_parameters(tensor.get("parameters", {})),
    )
    if with_data:
        elements = [_as_sent(element) for element in _flat(tensor["data"])]
        getattr(made.contents, _FIELDS[tensor["datatype"]]).extend(elements)
    return made


def _parameters(values: Mapping[str, Any]) -> dict[str, Any]:
    kinds = {bool: "bool_param", int: "int64_param", str: "string_param"}
    return {name: pb.InferParameter(**{kinds[type(value)]: value}) for name, value in values.items()}


def _raw(datatype: str, elements: Sequence[Any]) -> bytes:
    if datatype != "BYTES":
        return struct.pack(f"<{len(elements)}{_FORMATS[datatype]}", *elements)
    sent = [_as_sent(element) for element in elements]
    return b"".join(struct.pack("<I", len(element)) + element for element in sent)


def _as_sent(element: Any) -> Any:
    return element.encode() if isinstance(element, str) else element


def _flat(data: Any) -> list[Any]:
    if not isinstance(data, list):
        return [data]
    return [leaf for element in data for leaf in _flat(element)]
