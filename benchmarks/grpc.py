"""A lean gRPC client for the load generator: bytes to `ModelInfer`, bytes back."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from mlserver.grpc import dataplane_pb2 as pb

from benchmarks.http import AnswerError, Response

METHOD = "/inference.GRPCInferenceService/ModelInfer"
OPTIONS = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1))
"""A connection of its own for every client."""


class Connection:
    """One channel, one request at a time; see `load.Connection`. Status 200 stands for OK."""

    def __init__(self, host: str, port: int) -> None:
        self.surplus_bytes = 0
        self.closed = False
        self._channel = grpc.aio.insecure_channel(f"{host}:{port}", options=OPTIONS)
        self._call = self._channel.unary_unary(METHOD)
        self._closing: asyncio.Task[None] | None = None

    async def exchange(self, request: bytes) -> Response:
        """Send a request and read its answer. Raises `AnswerError`."""
        try:
            return Response(200, await self._call(request))
        except grpc.RpcError as error:
            raise AnswerError(str(error)) from None

    def close(self) -> None:
        """Hang up."""
        self.closed = True
        self._closing = asyncio.get_running_loop().create_task(self._channel.close())


async def connect(host: str, port: int) -> Connection:
    """See `load.Connect`."""
    return Connection(host, port)


@dataclass(slots=True)
class Texts:
    """One text per request, in turn, as `v2.Texts`."""

    host: str
    port: int
    model: str
    texts: Sequence[str]
    name: str = "args"
    outputs: Sequence[str] = ()
    _messages: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        self._messages = [self._message(text) for text in self.texts]

    def request(self, index: int) -> bytes:
        """See `load.Target`."""
        message = self._messages[index % len(self._messages)]
        message.id = str(index)
        return bytes(message.SerializeToString())

    def is_answer(self, index: int, body: bytes) -> bool:
        """See `load.Target`."""
        return bool(pb.ModelInferResponse.FromString(body).id == str(index))

    def _message(self, text: str) -> Any:
        kind = {"content_type": pb.InferParameter(string_param="str")}
        tensor = pb.ModelInferRequest.InferInputTensor(
            name=self.name,
            datatype="BYTES",
            shape=[1],
            parameters=kind,
            contents=pb.InferTensorContents(bytes_contents=[text.encode()]),
        )
        asked = [pb.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in self.outputs]
        return pb.ModelInferRequest(model_name=self.model, inputs=[tensor], outputs=asked)
