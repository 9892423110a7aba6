"""Results as a V2 response."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
from mlserver.types import Parameters, ResponseOutput, TensorData
from PIL import Image

RESULT_NAME = "output"
"""Name of the output that holds a task's result as JSON."""

_JSON_OPTIONS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS
_CONTENT_TYPES = {"BYTES": "str"}


def encode_results(results: Sequence[Any]) -> ResponseOutput:
    """One JSON text per top-level element of a pipeline's result: BYTES [n, 1], `hg_jsonlist`."""
    return ResponseOutput.model_construct(
        name=RESULT_NAME,
        datatype="BYTES",
        shape=[len(results), 1],
        data=_data([orjson.dumps(result, default=_plain, option=_JSON_OPTIONS) for result in results]),
        parameters=Parameters(content_type="hg_jsonlist"),
    )


def encode_tensor(name: str, datatype: str, values: npt.NDArray[Any]) -> ResponseOutput:
    """A typed output; texts are an object array of str."""
    elements = values.ravel().tolist()
    if datatype == "BYTES":
        elements = [element.encode() for element in elements]
    return ResponseOutput.model_construct(
        name=name,
        datatype=datatype,
        shape=list(values.shape),
        data=_data(elements),
        parameters=Parameters(content_type=_CONTENT_TYPES.get(datatype, "np")),
    )


def _data(elements: list[Any]) -> Any:
    return TensorData.model_construct(root=elements)


def _plain(value: Any) -> Any:
    """What orjson does not know: arrays that are not contiguous, and images."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Image.Image):
        buffer = io.BytesIO()
        kind = value.format or "PNG"
        value.save(buffer, format=kind)
        return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    raise TypeError(f"{type(value).__name__} has no JSON form")
