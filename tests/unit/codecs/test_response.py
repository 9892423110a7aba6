"""Results as V2 outputs, readable by MLServer's own codecs."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlserver.codecs import NumpyCodec, StringCodec
from PIL import Image

from mlserver_hftasks.codecs.content import decode_tensor
from mlserver_hftasks.codecs.response import encode_results, encode_tensor
from tests.unit.codecs.test_content import JSON, tensor


@given(st.lists(JSON, max_size=5))
def test_results_come_back_as_json_per_element(results: list[Any]) -> None:
    output = encode_results(results)
    assert output.shape == [len(results), 1]
    assert (output.name, output.datatype, output.parameters.content_type) == (
        "output",
        "BYTES",
        "hg_jsonlist",
    )
    assert [json.loads(element) for element in output.data.root] == results


def test_an_empty_result_keeps_its_name_and_content_type() -> None:
    output = encode_results([])
    assert (output.name, output.shape, output.parameters.content_type) == ("output", [0, 1], "hg_jsonlist")


def test_numpy_is_json_too() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    output = encode_results(
        [{"a": array, "t": array.T, "s": np.float32(0.1), "i": np.int64(3), "b": np.bool_(True)}]
    )
    decoded = json.loads(output.data.root[0])
    assert decoded["a"] == array.tolist()
    assert decoded["t"] == array.T.tolist()
    assert decoded["s"] == pytest.approx(0.1)
    assert (decoded["i"], decoded["b"]) == (3, True)


def test_an_image_goes_back_as_it_came() -> None:
    output = encode_results([{"image": Image.new("RGB", (2, 2), "blue")}])
    decoded = decode_tensor(tensor(list(output.data.root), "hg_jsonlist")).value[0]
    assert decoded["image"].getpixel((1, 1)) == (0, 0, 255)


def test_typed_outputs_are_read_by_mlservers_codecs() -> None:
    scores = np.array([[0.25, 0.75], [1.0, 0.0]], dtype=np.float32)
    output = encode_tensor("score", "FP32", scores)
    assert output.shape == [2, 2]
    np.testing.assert_array_equal(NumpyCodec.decode_output(output), scores)
    labels = encode_tensor("label", "BYTES", np.array([["é"], ["b"]], dtype=object))
    assert labels.shape == [2, 1]
    assert StringCodec.decode_output(labels) == ["é", "b"]
