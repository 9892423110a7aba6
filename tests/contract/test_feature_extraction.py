"""feature-extraction equals transformers' own pipeline, in batches and alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import transformers

from mlserver_hftasks.errors import InvalidRequest, RequestTooLarge
from mlserver_hftasks.loading import Served
from tests import harness, tiny

TEXTS = ["The river is wide.", "A man walked to the old town and bought bread; it was raining all day.", "hi"]
LONG = "the old town by the river " * 40


@pytest.fixture(scope="module", params=["bert", "roberta", "modernbert", "gpt2"])
def architecture(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def served(architecture: str) -> Served:
    return harness.serve(tiny.folder(architecture, "base"), "feature-extraction")


@pytest.fixture(scope="module")
def bert() -> Served:
    return harness.serve(tiny.folder("bert", "base"), "feature-extraction")


def pipeline(architecture: str) -> Any:
    return transformers.pipeline(
        "feature-extraction", model=str(tiny.folder(architecture, "base")), device="cpu"
    )


def test_equals_the_pipeline_for_a_list(served: Served, architecture: str) -> None:
    expected = pipeline(architecture)(TEXTS)
    got = harness.results(served, {"inputs": TEXTS})
    assert [array.shape[0] for array in got] == [1, 1, 1]
    for mine, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
    assert np.abs(got[0][0, -1] - got[2][0, -1]).max() > 1e-2


def test_a_scalar_is_one_element_of_token_vectors(served: Served, architecture: str) -> None:
    expected = pipeline(architecture)(TEXTS[0])
    got = harness.results(served, {"inputs": TEXTS[:1]}, scalar=True)
    assert len(got) == len(expected) == 1
    np.testing.assert_allclose(got[0], expected[0], atol=1e-5)


def test_a_list_of_one_is_one_element_with_a_batch_dimension(bert: Served) -> None:
    (got,) = harness.results(bert, {"inputs": TEXTS[:1]})
    assert got.ndim == 3
    assert got.dtype == np.float32


def test_a_batch_equals_texts_alone(served: Served) -> None:
    together = harness.results(served, {"inputs": TEXTS})
    alone = harness.results(served, {"inputs": TEXTS}, together=False)
    for first, second in zip(together, alone, strict=True):
        np.testing.assert_allclose(first, second, atol=1e-5)


@pytest.mark.parametrize(
    "parameters",
    [
        {"truncation": True},
        {"tokenize_kwargs": {"truncation": True}},
        {"tokenize_kwargs": {"truncation": "longest_first", "max_length": 12}},
        {"tokenize_kwargs": {"truncation": True, "max_length": 7, "padding": True}, "return_tensors": True},
    ],
)
def test_truncation_equals_the_pipelines(bert: Served, parameters: dict[str, Any]) -> None:
    expected = pipeline("bert")([LONG, TEXTS[2]], **{**parameters, "return_tensors": False})
    got = harness.results(bert, {"inputs": [LONG, TEXTS[2]]}, **parameters)
    for mine, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_max_length_cuts(bert: Served) -> None:
    (got,) = harness.results(bert, {"inputs": [LONG]}, max_length=9)
    assert got.shape == (1, 9, 32)


def test_typed_outputs_are_padded_with_zeros(bert: Served) -> None:
    got = harness.tensors(bert, ["num_tokens", "last_hidden_state"], {"inputs": TEXTS})
    single = harness.results(bert, {"inputs": TEXTS})
    counts, states = got["num_tokens"], got["last_hidden_state"]
    assert (counts.datatype, counts.values.dtype) == ("INT64", np.int64)
    assert counts.values.tolist() == [array.shape[1] for array in single]
    assert states.values.shape == (3, counts.values.max(), 32)
    assert (states.datatype, states.values.dtype) == ("FP32", np.float32)
    for row, count, array in zip(states.values, counts.values, single, strict=True):
        np.testing.assert_array_equal(row[:count], array[0])
        assert not row[count:].any()


def test_only_the_named_outputs_come(bert: Served) -> None:
    assert list(harness.tensors(bert, ["num_tokens"], {"inputs": TEXTS})) == ["num_tokens"]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"tokenize_kwargs": {"return_tensors": "pt"}},
            "no keys but max_length, padding, truncation @ tokenize_kwargs",
        ),
        ({"tokenize_kwargs": {"max_length": 0}}, "@ tokenize_kwargs.max_length"),
        ({"tokenize_kwargs": {"padding": "max_length"}}, "@ tokenize_kwargs.padding"),
        ({"tokenize_kwargs": "truncation"}, "@ tokenize_kwargs"),
        ({"truncation": True, "tokenize_kwargs": {"truncation": True}}, "got truncation twice"),
        ({"max_length": 129}, "got 129, expected 1..128 @ max_length"),
        ({"tokenize_kwargs": {"truncation": True, "max_length": 999}}, "expected 1..128 @ max_length"),
        ({"batch_size": 4}, "unknown input or parameter 'batch_size'"),
    ],
)
def test_bad_parameters_are_refused(bert: Served, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        harness.results(bert, {"inputs": TEXTS}, **parameters)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("inputs", "kind", "message"),
    [
        ({}, InvalidRequest, "an empty batch"),
        ({"inputs": []}, InvalidRequest, "an empty batch, expected 1..1024 items @ inputs"),
        ({"inputs": ["fine", 5]}, InvalidRequest, "expected a text @ inputs[1]"),
        ({"inputs": [LONG]}, InvalidRequest, "expected at most 128"),
        ({"inputs": ["x"] * 1025}, RequestTooLarge, "expected at most 1024"),
    ],
)
def test_bad_inputs_are_refused(
    bert: Served, inputs: dict[str, Any], kind: type[InvalidRequest], message: str
) -> None:
    with pytest.raises(kind) as refusal:
        harness.results(bert, inputs)
    assert message in str(refusal.value)
