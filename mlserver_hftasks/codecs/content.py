"""Content types: what the elements of a V2 tensor mean.

The content types are those of mlserver_huggingface. Where that package passed bad data through (an
invalid base64 string, a number in a `str` tensor), this one raises `InvalidRequest`.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import orjson
from mlserver.types import RequestInput
from PIL import Image, UnidentifiedImageError

from mlserver_hftasks.codecs.envelope import MAX_DIMENSIONS
from mlserver_hftasks.errors import InvalidRequest, did_you_mean

IMAGE_PREFIX = "data:image/"
"""A JSON value that is a string with this prefix is an image in base64."""

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Of what Pillow can open: for some others it starts programs."""
MAX_PIXELS = 32_000_000

_DTYPES = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
}


@dataclass(frozen=True, slots=True)
class Decoded:
    """The value of a tensor: a list of items, or one item by itself."""

    value: Any
    is_list: bool

    @property
    def items(self) -> list[Any]:
        """The value as a list of items."""
        return self.value if self.is_list else [self.value]


def decode_tensor(tensor: RequestInput, default_content_type: str | None = None) -> Decoded:
    """Decode by the tensor's content type, else by the request's, else by its datatype.

    Without any content type BYTES are texts and numbers are numbers. Raises `InvalidRequest`.
    """
    elements = _elements(tensor)
    content_type = (tensor.parameters and tensor.parameters.content_type) or default_content_type
    if content_type is None:
        content_type = "str" if _datatype(tensor) == "BYTES" else "number"
    decode = _DECODERS.get(content_type)
    if decode is None:
        raise InvalidRequest(
            f"unknown content type '{content_type}', {did_you_mean(content_type, _DECODERS)} @ {tensor.name}"
        )
    return decode(tensor, elements)


def is_content_type(name: str | None) -> bool:
    """Whether tensors can be decoded by that content type."""
    return name in _DECODERS


def _datatype(tensor: RequestInput) -> str:
    return str(getattr(tensor.datatype, "value", tensor.datatype))


def _elements(tensor: RequestInput) -> list[Any]:
    """The tensor's data, flat. Raises `InvalidRequest` if it is not as many as the shape says.

    BYTES of the shape [1] may be more: so the documentation of mlserver_huggingface sends a batch. A size
    of -1, as metadata has it, says nothing.
    """
    elements = _flat(getattr(tensor.data, "root", tensor.data))
    expected = prod(tensor.shape)
    may_be_more = list(tensor.shape) == [1] and _datatype(tensor) == "BYTES"
    if len(elements) != expected and -1 not in tensor.shape and not (may_be_more and elements):
        raise InvalidRequest(
            f"{len(elements)} elements, expected {expected} as the shape {list(tensor.shape)} says "
            f"@ {tensor.name}"
        )
    return elements


def _flat(data: Any) -> list[Any]:
    flat = data if isinstance(data, list) else [data]
    for _ in range(MAX_DIMENSIONS):
        if not any(isinstance(element, list) for element in flat):
            return flat
        flat = [leaf for element in flat for leaf in (element if isinstance(element, list) else [element])]
    raise InvalidRequest(
        f"data nested deeper than {MAX_DIMENSIONS} levels, expected as many as dimensions @ data"
    )


def _text(element: Any, where: str) -> str:
    if isinstance(element, str):
        return element
    if isinstance(element, bytes):
        try:
            return element.decode()
        except UnicodeDecodeError as error:
            raise InvalidRequest(
                f"bytes that are not UTF-8 ({error.reason}), expected UTF-8 text @ {where}"
            ) from None
    raise InvalidRequest(f"got {type(element).__name__} {element!r:.60}, expected a text @ {where}")


def _first(tensor: RequestInput, elements: list[Any]) -> Any:
    if not elements:
        raise InvalidRequest(f"an empty tensor, expected one element @ {tensor.name}")
    return elements[0]


def _json(element: Any, where: str) -> Any:
    try:
        return _with_images(orjson.loads(_text(element, where)), where)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"invalid JSON ({error}), expected a JSON value @ {where}") from None


def _with_images(value: Any, where: str) -> Any:
    if isinstance(value, list):
        return [_with_images(element, where) for element in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _image(element.partition(",")[2], f"{where}.{key}")
        if isinstance(element, str) and element.startswith(IMAGE_PREFIX)
        else _with_images(element, where)
        for key, element in value.items()
    }


def _base64(element: Any, where: str) -> bytes:
    raw = element if isinstance(element, bytes) else _text(element, where).encode()
    try:
        return base64.b64decode(raw, validate=True)
    except binascii.Error as error:
        raise InvalidRequest(f"invalid base64 ({error}), expected base64 of the bytes @ {where}") from None


def _image(element: Any, where: str) -> Image.Image:
    try:
        # Opening reads the header only; who needs the pixels loads them, once he knows how many there are.
        image = Image.open(io.BytesIO(_base64(element, where)), formats=IMAGE_FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise InvalidRequest(
                f"an image of {image.width} x {image.height} pixels, expected at most {MAX_PIXELS} @ {where}"
            )
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InvalidRequest(
            f"an image that cannot be read ({_reason(error)}), expected base64 of an image @ {where}"
        ) from None
    return image


def _reason(error: Exception) -> str:
    return "of no known format" if isinstance(error, UnidentifiedImageError) else str(error)


def _decode_str(tensor: RequestInput, elements: list[Any]) -> Decoded:
    name = tensor.name
    return Decoded([_text(element, f"{name}[{i}]") for i, element in enumerate(elements)], True)


def _decode_number(tensor: RequestInput, elements: list[Any]) -> Decoded:
    for index, element in enumerate(elements):
        if not isinstance(element, int | float):
            raise InvalidRequest(
                f"got {element!r:.60}, expected a value of the datatype {_datatype(tensor)} "
                f"@ {tensor.name}[{index}]"
            )
    return Decoded(elements, True)


def _decode_raw(tensor: RequestInput, elements: list[Any]) -> Decoded:
    first = _first(tensor, elements)
    return Decoded(_text(first, tensor.name) if isinstance(first, bytes) else first, False)


def _decode_json(tensor: RequestInput, elements: list[Any]) -> Decoded:
    return Decoded(_json(_first(tensor, elements), tensor.name), False)


def _decode_jsonlist(tensor: RequestInput, elements: list[Any]) -> Decoded:
    return Decoded([_json(element, f"{tensor.name}[{i}]") for i, element in enumerate(elements)], True)


def _decode_images(tensor: RequestInput, elements: list[Any]) -> Decoded:
    return Decoded([_image(element, f"{tensor.name}[{i}]") for i, element in enumerate(elements)], True)


def _decode_base64(tensor: RequestInput, elements: list[Any]) -> Decoded:
    return Decoded([_base64(element, f"{tensor.name}[{i}]") for i, element in enumerate(elements)], True)


def _decode_array(tensor: RequestInput, elements: list[Any]) -> Decoded:
    dtype = _DTYPES.get(_datatype(tensor))
    if dtype is None:
        raise InvalidRequest(f"got the datatype {_datatype(tensor)}, expected a number type @ {tensor.name}")
    try:
        return Decoded(np.array(elements, dtype=dtype).reshape(tensor.shape), False)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidRequest(
            f"{error}, expected values of the datatype {_datatype(tensor)} @ {tensor.name}"
        ) from None


def _decode_arrays(tensor: RequestInput, elements: list[Any]) -> Decoded:
    array = _decode_array(tensor, elements).value
    if not array.ndim:
        raise InvalidRequest(f"a tensor without dimensions, expected at least one @ {tensor.name}")
    return Decoded(list(array), True)


_DECODERS: dict[str, Callable[[RequestInput, list[Any]], Decoded]] = {
    "str": _decode_str,
    "raw": _decode_raw,
    "hg_json": _decode_json,
    "hg_jsonlist": _decode_jsonlist,
    "hg_conversation": _decode_jsonlist,
    "pillow_image": _decode_images,
    "base64": _decode_base64,
    "nplist": _decode_arrays,
    "np": _decode_array,
    "number": _decode_number,
}
