"""Requests as calls: names, parameters in each form they may travel, scalars and lists."""

from typing import Any

import pytest
from mlserver.types import InferenceRequest, Parameters, RequestInput, RequestOutput

from mlserver_hftasks.codecs.envelope import check_envelope
from mlserver_hftasks.codecs.request import Call, Names, count_characters, decode_request, size_of
from mlserver_hftasks.errors import InvalidRequest

NAMES = Names(
    inputs={"inputs": "inputs", "args": "inputs", "array_inputs": "inputs", "question": "question"},
    parameters=frozenset({"top_k", "labels", "flag"}),
    lists=frozenset({"labels"}),
)


def tensor(name: str, *data: Any, content_type: str | None = None, datatype: str = "BYTES") -> RequestInput:
    parameters = Parameters(content_type=content_type) if content_type else None
    return RequestInput(
        name=name, shape=[len(data)], datatype=datatype, data=list(data), parameters=parameters
    )


def decode(*tensors: RequestInput, outputs: list[str] | None = None, **parameters: Any) -> Call:
    return decode_request(
        InferenceRequest(
            inputs=list(tensors),
            parameters=Parameters(**parameters) if parameters else None,
            outputs=None if outputs is None else [RequestOutput(name=name) for name in outputs],
        ),
        NAMES,
    )


def test_one_element_of_args_is_an_item_by_itself() -> None:
    assert decode(tensor("args", "a")) == Call({"inputs": ["a"]}, {}, True, ())
    assert decode(tensor("args", "a", "b")).scalar is False
    assert decode(tensor("array_inputs", "a")).scalar is False
    assert decode(tensor("inputs", "a", content_type="raw")) == Call({"inputs": ["a"]}, {}, True, ())


def test_a_json_list_is_a_list_of_items() -> None:
    assert decode(tensor("inputs", '["a", "b"]', content_type="hg_json")) == Call(
        {"inputs": ["a", "b"]}, {}, False, ()
    )
    assert decode(tensor("inputs", '["a"]', content_type="hg_json")).scalar is False
    assert decode(tensor("args", '["a"]', content_type="hg_json")).scalar is True
    assert decode(tensor("inputs", '["a", "b"]', content_type="hg_jsonlist")).inputs == {
        "inputs": [["a", "b"]]
    }


def test_several_items_are_no_scalar_whatever_stands_beside_them() -> None:
    two = tensor("inputs", "a", "b")
    assert decode(two, tensor("question", "c", content_type="raw")).scalar is False


@pytest.mark.parametrize(
    "top_k",
    [
        tensor("top_k", 3, datatype="INT64"),
        tensor("top_k", 3, content_type="raw"),
        tensor("top_k", "3", content_type="hg_json"),
    ],
)
def test_a_parameter_may_be_a_tensor(top_k: RequestInput) -> None:
    assert decode(tensor("args", "a"), top_k).parameters == {"top_k": 3}


def test_a_parameter_may_be_a_request_parameter() -> None:
    call = decode(tensor("args", "a"), top_k=3, headers={"x": "y"}, sequence_id=7, binary_data_output=True)
    assert call.parameters == {"top_k": 3}


def test_a_tensor_of_texts_stays_a_list_where_the_parameter_may_be_one() -> None:
    assert decode(tensor("args", "a"), tensor("labels", "x")).parameters == {"labels": ["x"]}
    assert decode(tensor("args", "a"), labels='["x", "y"]').parameters == {"labels": ["x", "y"]}
    assert decode(tensor("args", "a"), labels="x, y").parameters == {"labels": "x, y"}


def test_the_last_of_two_tensors_of_one_name_counts() -> None:
    assert decode(tensor("args", "a"), tensor("args", "b")).inputs == {"inputs": ["b"]}


def test_columns_and_outputs() -> None:
    call = decode(tensor("inputs", "a"), tensor("question", "b"), outputs=["label", "score"])
    assert call.inputs == {"inputs": ["a"], "question": ["b"]}
    assert call.outputs == ("label", "score")


def test_the_content_type_of_the_request_is_the_default_if_it_is_one_of_tensors() -> None:
    assert decode(tensor("args", '{"a": 1}'), content_type="hg_jsonlist").inputs == {"inputs": [{"a": 1}]}
    assert decode(tensor("args", "a"), content_type="hf").inputs == {"inputs": ["a"]}


@pytest.mark.parametrize(
    ("tensors", "parameters", "message"),
    [
        (
            [tensor("array_input", "a", "b")],
            {},
            "unknown input or parameter 'array_input', did you mean 'array_inputs'?",
        ),
        ([tensor("args", "a"), tensor("inputs", "b")], {}, "the input 'inputs' came twice"),
        ([tensor("args", "a")], {"top_kk": 1}, "did you mean 'top_k'? @ top_kk"),
        (
            [tensor("args", "a"), tensor("top_k", 1, 2, datatype="INT64")],
            {},
            "2 values, expected one @ top_k",
        ),
        ([tensor("top_k", 1, datatype="INT64")], {}, "no input, expected args or array_inputs or inputs"),
        (
            [tensor("args", "a"), tensor("custom_generate", "x")],
            {},
            "unknown input or parameter 'custom_generate'",
        ),
    ],
)
def test_what_is_wrong_is_named(
    tensors: list[RequestInput], parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode(*tensors, **parameters)
    assert message in str(caught.value)


GOOD = {"name": "x", "shape": [1], "datatype": "BYTES", "data": ["a"]}


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ([], "@ inputs"),
        ({"inputs": "x"}, "@ inputs"),
        ({"inputs": [3]}, "@ inputs[0]"),
        ({"inputs": [GOOD, {**GOOD, "name": 3}]}, "@ inputs[1]"),
        ({"inputs": [{**GOOD, "shape": "1"}]}, "@ inputs[0].shape"),
        ({"inputs": [{**GOOD, "shape": [-2]}]}, "@ inputs[0].shape"),
        ({"inputs": [{**GOOD, "shape": [True]}]}, "@ inputs[0].shape"),
        ({"inputs": [{**GOOD, "datatype": "TEXT"}]}, "@ inputs[0].datatype"),
        ({"inputs": [{**GOOD, "datatype": ["BYTES"]}]}, "@ inputs[0].datatype"),
        ({"inputs": [{**GOOD, "data": None}]}, "@ inputs[0].data"),
        ({"inputs": [{**GOOD, "parameters": "x"}]}, "@ inputs[0].parameters"),
        ({"inputs": [{**GOOD, "parameters": {"content_type": 3}}]}, "@ inputs[0].parameters.content_type"),
        ({"inputs": [GOOD], "parameters": []}, "@ parameters"),
        ({"inputs": [GOOD], "id": 3}, "@ id"),
        ({"inputs": [GOOD], "id": "a\nb"}, "@ id"),
        ({"inputs": [GOOD], "id": "\N{GRINNING FACE}"}, "@ id"),
        ({"inputs": [GOOD], "id": "a" * 300}, "@ id"),
        ({"inputs": [GOOD] * 65}, "@ inputs"),
        ({"inputs": [GOOD], "outputs": [{"name": "label"}] * 65}, "@ outputs"),
        ({"inputs": [{**GOOD, "shape": [1] * 17}]}, "@ inputs[0].shape"),
        ({"inputs": [{**GOOD, "shape": [10**18]}]}, "@ inputs[0].shape"),
        ({"inputs": [GOOD], "outputs": "label"}, "@ outputs"),
        ({"inputs": [GOOD], "outputs": ["label"]}, "@ outputs[0]"),
    ],
)
def test_what_is_no_v2_request_is_refused(content: Any, where: str) -> None:
    check_envelope({"inputs": [GOOD]})
    with pytest.raises(InvalidRequest) as caught:
        check_envelope(content)
    assert str(caught.value).endswith(where)


def test_size_counts_characters_wherever_they_are() -> None:
    request = InferenceRequest(
        inputs=[
            tensor("args", "abc", "de"),
            RequestInput(name="x", shape=[1], datatype="BYTES", data=[["f" * 90]]),
        ],
        parameters=Parameters(labels="g" * 50),
    )
    assert 3 + 2 + 90 + 50 < size_of(request, 1000) < 3 + 2 + 90 + 50 + 100


@pytest.mark.parametrize("value", ["a" * 50, ["a" * 9] * 9, [[]] * 50, {"a": ["b" * 50]}, [[[["a" * 50]]]]])
def test_counting_stops_beyond_the_most_that_matters(value: Any) -> None:
    assert 10 < count_characters(value, 10) < 100


def test_an_output_named_twice_is_given_once() -> None:
    assert decode(tensor("args", "a"), outputs=["label", "score", "label"]).outputs == ("label", "score")
