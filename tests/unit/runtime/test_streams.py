"""What `predict_stream` makes of pieces, and of an error before and after the first of them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import mlserver
import pytest
from mlserver.errors import MLServerError
from mlserver.types import InferenceRequest, InferenceResponse

from mlserver_hftasks import HFTasksRuntime
from mlserver_hftasks.codecs.response import encode_results
from mlserver_hftasks.errors import ForwardFailed, Overloaded
from mlserver_hftasks.metrics import ModelMetrics
from mlserver_hftasks.runtime.service import Reply


class Pieces:
    """A service whose stream is so many pieces, then an error."""

    def __init__(self, count: int, error: Exception | None) -> None:
        self._count, self._error = count, error
        self.closed = False

    async def stream(self, payload: InferenceRequest) -> AsyncGenerator[Reply, None]:
        try:
            for number in range(self._count):
                yield Reply([encode_results([{"generated_text": str(number)}])])
            if self._error is not None:
                raise self._error
        finally:
            self.closed = True


def runtime(service: Pieces) -> Any:
    settings = mlserver.ModelSettings(
        name="m",
        implementation=HFTasksRuntime,
        parameters=mlserver.settings.ModelParameters(extra={"pretrained_model": "x"}),
    )
    made: Any = HFTasksRuntime(settings)
    made._metrics = ModelMetrics("m", None)
    made._service = service
    return made


async def requests() -> AsyncIterator[InferenceRequest]:
    yield InferenceRequest(inputs=[])


async def collected(service: Pieces) -> list[InferenceResponse]:
    return [piece async for piece in runtime(service).predict_stream(requests())]


async def test_pieces_are_responses() -> None:
    got = await collected(Pieces(3, None))
    assert [piece.outputs[0].data.root for piece in got] == [
        [f'{{"generated_text":"{number}"}}'.encode()] for number in range(3)
    ]
    assert all(piece.model_name == "m" and piece.parameters is None for piece in got)


async def test_an_error_before_the_first_piece_is_an_error() -> None:
    with pytest.raises(MLServerError, match="full") as failed:
        await collected(Pieces(0, Overloaded("full")))
    assert failed.value.status_code == 429


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [(ForwardFailed("the model failed"), 500, "the model failed"), (ValueError("?"), 500, "internal error")],
)
async def test_an_error_after_it_is_a_last_piece(error: Exception, status: int, message: str) -> None:
    *pieces, last = await collected(Pieces(2, error))
    assert len(pieces) == 2
    assert last.outputs == []
    assert last.parameters is not None
    said = last.parameters.model_dump()
    assert said["status_code"] == status
    assert said["finish_reason"] == "error"
    assert message in said["error"]


async def test_closing_the_stream_closes_the_service_s() -> None:
    service = Pieces(5, None)
    made = runtime(service)
    stream = made.predict_stream(requests())
    await anext(stream)
    await stream.aclose()
    assert service.closed
    assert made._edge.in_flight == 0
