"""Content types: what each decodes to, and that bad data is refused instead of passed through."""

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlserver.codecs import NumpyCodec, StringCodec
from mlserver.types import Parameters, RequestInput
from PIL import Image

from mlserver_hftasks.codecs.content import Decoded, decode_tensor
from mlserver_hftasks.errors import InvalidRequest

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
).filter(lambda value: "data:image/" not in json.dumps(value))


def tensor(
    data: list[Any], content_type: str | None = None, datatype: str = "BYTES", shape: list[int] | None = None
) -> RequestInput:
    parameters = Parameters(content_type=content_type) if content_type else None
    return RequestInput(
        name="x",
        shape=[len(data)] if shape is None else shape,
        datatype=datatype,
        data=data,
        parameters=parameters,
    )


def png(colour: str = "red", size: tuple[int, int] = (3, 2)) -> bytes:
    buffer = io.BytesIO()
    Image.new("1" if max(size) > 999 else "RGB", size, 1 if max(size) > 999 else colour).save(buffer, "PNG")
    return buffer.getvalue()


@given(st.lists(st.text()))
def test_texts_come_back_as_they_were_sent(texts: list[str]) -> None:
    for data in (texts, [text.encode() for text in texts]):
        assert decode_tensor(tensor(data)) == Decoded(texts, True)
        assert decode_tensor(tensor(data, "str")) == Decoded(texts, True)


@given(st.lists(st.text(), min_size=1))
def test_what_the_codec_of_mlserver_encodes_is_decoded(texts: list[str]) -> None:
    assert decode_tensor(StringCodec.encode_input("x", texts)).value == texts


@given(JSON)
def test_json_comes_back_as_it_was_sent(value: Any) -> None:
    text = json.dumps(value)
    assert decode_tensor(tensor([text], "hg_json")) == Decoded(value, False)
    assert decode_tensor(tensor([text.encode(), text], "hg_jsonlist")) == Decoded([value, value], True)


@given(st.lists(st.binary(), min_size=1))
def test_base64_comes_back_as_it_was_sent(values: list[bytes]) -> None:
    assert decode_tensor(tensor([base64.b64encode(value) for value in values], "base64")).value == values


@pytest.mark.parametrize("value", ["text", 3, 0.5, True])
def test_raw_is_the_first_element(value: Any) -> None:
    assert decode_tensor(tensor([value, "dropped"], "raw")) == Decoded(value, False)


def test_raw_bytes_of_grpc_are_text() -> None:
    assert decode_tensor(tensor([b"caf\xc3\xa9"], "raw")) == Decoded("café", False)


def test_arrays() -> None:
    sent = np.arange(6, dtype=np.float32).reshape(2, 3)
    whole = decode_tensor(NumpyCodec.encode_input("x", sent))
    np.testing.assert_array_equal(whole.value, sent)
    rows = decode_tensor(tensor(sent.ravel().tolist(), "nplist", "FP32", [2, 3]))
    assert rows.is_list
    np.testing.assert_array_equal(np.stack(rows.value), sent)
    assert rows.value[0].dtype == np.float32


def test_nested_data_is_taken_row_by_row() -> None:
    assert decode_tensor(tensor([["a"], ["b"]], shape=[2, 1])).value == ["a", "b"]
    assert decode_tensor(tensor([[["a"]], [["b", "c"]]], shape=[3])).value == ["a", "b", "c"]


def test_data_nested_beyond_reason_are_refused() -> None:
    data: list[Any] = ["a"]
    for _ in range(600):
        data = [data]
    with pytest.raises(InvalidRequest, match="nested deeper"):
        decode_tensor(
            RequestInput.model_construct(name="x", shape=[1], datatype="BYTES", data=data, parameters=None)
        )


def test_texts_of_the_shape_one_may_be_many() -> None:
    assert decode_tensor(tensor(["a"] * 512, shape=[1])).value == ["a"] * 512


def test_a_size_of_minus_one_says_nothing() -> None:
    assert decode_tensor(tensor(["a", "b"], shape=[-1])).value == ["a", "b"]


def test_numbers_without_a_content_type() -> None:
    assert decode_tensor(tensor([1, 2], datatype="INT64")) == Decoded([1, 2], True)


def test_images() -> None:
    images = decode_tensor(tensor([base64.b64encode(png())], "pillow_image")).value
    assert images[0].size == (3, 2)
    inside = json.dumps({"image": "data:image/png;base64," + base64.b64encode(png()).decode(), "text": "x"})
    decoded = decode_tensor(tensor([inside], "hg_jsonlist")).value[0]
    assert decoded["image"].getpixel((0, 0)) == (255, 0, 0)
    assert decoded["text"] == "x"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (tensor([1], "str"), "got int 1, expected a text @ x"),
        (tensor([None]), "got NoneType None, expected a text @ x"),
        (tensor([b"\xff"]), "not UTF-8"),
        (tensor(["{"], "hg_json"), "invalid JSON"),
        (tensor(["{}", "nope"], "hg_jsonlist"), "expected a JSON value @ x[1]"),
        (tensor([], "raw"), "an empty tensor, expected one element @ x"),
        (tensor(["not base64!"], "base64"), "invalid base64"),
        (tensor(["aGVsbG8="], "pillow_image"), "an image that cannot be read"),
        (tensor(["data"], "hg_jason"), "did you mean 'hg_json'?"),
        (tensor(["a"], shape=[2]), "1 elements, expected 2 as the shape [2] says @ x"),
        (tensor(["a"], datatype="INT64"), "expected a value of the datatype INT64 @ x[0]"),
        (tensor(["a"], "np", "FP32"), "expected values of the datatype FP32 @ x"),
        (tensor(["a"], "np", "BYTES"), "expected a number type @ x"),
        (tensor([1.5], "nplist", "FP32", []), "a tensor without dimensions, expected at least one @ x"),
        (tensor(["%!PS-Adobe-3.0 EPSF-3.0"], "pillow_image"), "invalid base64"),
        (
            tensor([base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")], "pillow_image"),
            "of no known",
        ),
        (
            tensor([base64.b64encode(png(size=(9000, 9000)))], "pillow_image"),
            "9000 x 9000 pixels, expected at most",
        ),
        (tensor([300], "np", "UINT8"), "expected values of the datatype UINT8 @ x"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_data_is_refused_with_a_reason(bad: RequestInput, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode_tensor(bad)
    assert message in str(caught.value)
    assert " @ x" in str(caught.value)


def test_the_requests_content_type_is_the_default() -> None:
    assert decode_tensor(tensor(["1"]), "hg_json") == Decoded(1, False)
    assert decode_tensor(tensor(["1"], "str"), "hg_json") == Decoded(["1"], True)
