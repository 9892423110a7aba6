"""text-classification against transformers' own pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlserver_hftasks.errors import InvalidRequest, RequestTooLarge
from mlserver_hftasks.loading import Served
from mlserver_hftasks.tasks.base import Answered
from tests import tiny
from tests.contract.pipelines import LONG, TEXTS, assert_same, elements, reference
from tests.harness import results, serve, tensors

TASK = "text-classification"
LABELS = ("bad", "fair", "good", "excellent")
PAIRS = [{"text": text[:50], "text_pair": TEXTS[-index][:50]} for index, text in enumerate(TEXTS)]


@pytest.fixture(scope="module", params=["bert", "roberta", "distilbert"])
def folder(request: pytest.FixtureRequest) -> Path:
    return tiny.folder(request.param, "sequence", labels=LABELS)


@pytest.fixture(scope="module")
def served(folder: Path) -> Served:
    return serve(folder, TASK)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Callable[..., Any]:
    return reference(TASK, folder)


@pytest.fixture(scope="module")
def bert() -> Served:
    return serve(tiny.folder("bert", "sequence", labels=LABELS), TASK)


@pytest.mark.parametrize("function", [None, "softmax", "sigmoid", "none", "SOFTMAX"])
@pytest.mark.parametrize("top_k", ["", None, 1, 2, 10])
def test_results_equal_the_pipeline(
    served: Served, pipeline: Callable[..., Any], top_k: int | str | None, function: str | None
) -> None:
    parameters: dict[str, Any] = {} if top_k == "" else {"top_k": top_k}
    if function is not None:
        parameters["function_to_apply"] = function
    want = pipeline([*TEXTS, ""], **parameters)
    assert_same(results(served, {"inputs": [*TEXTS, ""]}, **parameters), want)


@pytest.mark.parametrize("top_k", ["", None])
@pytest.mark.parametrize("labels", [("one",), ("two", "three"), ("four", "five", "six")])
@pytest.mark.parametrize("problem", ["regression", "multi_label_classification", None])
def test_the_function_follows_the_problem(
    problem: str | None, labels: tuple[str, ...], top_k: str | None
) -> None:
    folder = tiny.folder("distilbert", "sequence", labels=labels, problem_type=problem)
    parameters = {} if top_k == "" else {"top_k": top_k}
    want = reference(TASK, folder)(list(TEXTS), **parameters)
    assert_same(results(serve(folder, TASK), {"inputs": TEXTS}, **parameters), want)


def test_pairs(served: Served, pipeline: Callable[..., Any]) -> None:
    want = pipeline(PAIRS, top_k=None)
    assert_same(results(served, {"inputs": PAIRS}, top_k=None), want)
    first, second = ([pair[name] for pair in PAIRS] for name in ("text", "text_pair"))
    assert_same(results(served, {"text": first, "text_pair": second}, top_k=None), want)
    lists = [[[pair["text"], pair["text_pair"]]] for pair in PAIRS]
    assert_same(results(served, {"inputs": lists}, top_k=None), want)
    swapped = results(served, {"text": second, "text_pair": first}, top_k=None)
    assert swapped != results(served, {"text": first, "text_pair": second}, top_k=None)


def test_text_alone_is_inputs(served: Served) -> None:
    assert results(served, {"text": TEXTS}) == results(served, {"inputs": TEXTS})
    assert results(served, {"inputs": [{"text": text} for text in TEXTS]}) == results(
        served, {"inputs": TEXTS}
    )


@pytest.mark.parametrize(
    "options",
    [
        {"truncation": True},
        {"truncation": True, "max_length": 9},
        {"truncation": "longest_first", "max_length": 3},
    ],
)
def test_truncation(served: Served, pipeline: Callable[..., Any], options: dict[str, Any]) -> None:
    want = pipeline([LONG, "a"], **options)
    assert_same(results(served, {"inputs": [LONG, "a"]}, **options), want)


@pytest.mark.parametrize(
    ("strategy", "first", "second"),
    [("only_first", LONG, TEXTS[0]), ("only_second", TEXTS[0], LONG), ("longest_first", LONG, LONG[5:])],
)
def test_truncation_of_pairs(
    served: Served, pipeline: Callable[..., Any], strategy: str, first: str, second: str
) -> None:
    pairs = [{"text": first, "text_pair": second}, {"text": "a", "text_pair": "b"}]
    options = {"truncation": strategy, "max_length": 60, "top_k": None}
    want = pipeline(pairs, **options)
    assert_same(results(served, {"inputs": pairs}, **options), want)


@pytest.mark.parametrize("padding", [True, "max_length", "longest", False])
def test_padding_changes_nothing(bert: Served, padding: bool | str) -> None:
    options = {"truncation": True, "max_length": 40}
    assert results(bert, {"inputs": [*TEXTS, LONG]}, padding=padding, **options) == results(
        bert, {"inputs": [*TEXTS, LONG]}, **options
    )


def test_max_length_alone_cuts(bert: Served) -> None:
    assert results(bert, {"inputs": [LONG]}, max_length=9) == results(
        bert, {"inputs": [LONG]}, max_length=9, truncation=True
    )


def test_the_setting_cuts_unless_the_client_says_otherwise() -> None:
    folder = tiny.folder("bert", "sequence", labels=LABELS)
    cutting = serve(folder, TASK, truncation=True)
    assert results(cutting, {"inputs": [LONG]}) == results(
        serve(folder, TASK), {"inputs": [LONG]}, truncation=True
    )
    with pytest.raises(InvalidRequest, match="expected at most 128"):
        results(cutting, {"inputs": [LONG]}, truncation=False)


@pytest.mark.parametrize("parameters", [{}, {"top_k": 1}, {"top_k": 2}, {"top_k": None}])
def test_shapes(served: Served, pipeline: Callable[..., Any], parameters: dict[str, Any]) -> None:
    text = TEXTS[0]
    got = results(served, {"inputs": [text]}, scalar=True, **parameters)
    assert_same(got, elements(pipeline(text, **parameters)))
    got = results(served, {"inputs": [PAIRS[0]]}, scalar=True, **parameters)
    assert_same(got, elements(pipeline(PAIRS[0], **parameters)))
    for texts in ([text], [text, "b"]):
        assert_same(results(served, {"inputs": texts}, **parameters), elements(pipeline(texts, **parameters)))


def test_return_all_scores_of_version_4(bert: Served) -> None:
    """All labels in the model's order, a list per text, even for one text; an explicit top_k wins."""
    for scalar in (True, False):
        (scores,) = results(bert, {"inputs": [TEXTS[0]]}, scalar=scalar, return_all_scores=True)
        assert [entry["label"] for entry in scores] == list(LABELS)
        assert sum(entry["score"] for entry in scores) == pytest.approx(1)
    request = {"inputs": TEXTS}
    assert results(bert, request, return_all_scores=False) == results(bert, request)
    assert results(bert, request, return_all_scores=True, top_k=2) == results(bert, request, top_k=2)


def test_labels_of_the_settings() -> None:
    names = ["a", "b", "c", "d"]
    folder = tiny.folder("bert", "sequence", labels=LABELS)
    renamed = results(serve(folder, TASK, labels=names), {"inputs": TEXTS})
    plain = results(serve(folder, TASK), {"inputs": TEXTS})
    assert [entry["label"] for entry in renamed] == [names[LABELS.index(entry["label"])] for entry in plain]


def test_a_batch_equals_single_items(served: Served) -> None:
    batch = results(served, {"inputs": TEXTS}, top_k=None)
    assert_same(batch, results(served, {"inputs": TEXTS}, top_k=None, together=False))
    assert_same(batch, [results(served, {"inputs": [text]}, scalar=True, top_k=None) for text in TEXTS])


def test_parameters_of_clients_in_one_batch_do_not_mix(served: Served) -> None:
    requests: list[dict[str, Any]] = [{"top_k": 2}, {}, {"function_to_apply": "sigmoid", "top_k": None}]
    parsed = [served.task.signature.parse(parameters) for parameters in requests]
    examples = [served.task.examples({"inputs": TEXTS}, each) for each in parsed]
    outputs = iter(served.backend.forward([r for each in examples for example in each for r in example.rows]))
    for parameters, given, each in zip(requests, parsed, examples, strict=True):
        got = [served.task.postprocess(Answered(example, [next(outputs)]), given) for example in each]
        assert_same(got, results(served, {"inputs": TEXTS}, **parameters))


def test_typed_outputs(served: Served) -> None:
    parameters = {"top_k": 3, "function_to_apply": "sigmoid"}
    names = ["logits", "label", "score", "probabilities"]
    found = results(served, {"inputs": TEXTS}, **parameters)
    made = tensors(served, names, {"inputs": TEXTS}, **parameters)
    assert {name: made[name].datatype for name in made} == {
        "logits": "FP32",
        "label": "BYTES",
        "score": "FP32",
        "probabilities": "FP32",
    }
    assert made["label"].values.tolist() == [[entry["label"] for entry in entries] for entries in found]
    np.testing.assert_allclose(
        made["score"].values, [[entry["score"] for entry in entries] for entries in found], atol=1e-6
    )
    logits, probabilities = made["logits"].values, made["probabilities"].values
    assert logits.shape == probabilities.shape == (len(TEXTS), len(LABELS))
    assert logits.dtype == probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-logits)), atol=1e-6)
    assert list(tensors(served, ["score"], {"inputs": TEXTS})) == ["score"]


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "parameters", "message"),
    [
        ({}, {}, "an empty batch"),
        ({"inputs": []}, {}, r"an empty batch, expected 1\.\.1024 items @ inputs$"),
        ({"inputs": ["a", 7]}, {}, r"got int 7, expected a text @ inputs\[1\]$"),
        ({"inputs": [["a", "b"]]}, {}, r"expected a text @ inputs\[0\]$"),
        ({"inputs": [{"text_pair": "a"}]}, {}, r"expected text and text_pair @ inputs\[0\]$"),
        ({"inputs": [{"text": "a", "padding": True}]}, {}, r"expected text and text_pair @ inputs\[0\]$"),
        (
            {"inputs": [{"text": "a", "text_pair": 1}]},
            {},
            r"got int 1, expected a text @ inputs\[0\]\.text_pair$",
        ),
        ({"inputs": ["a"], "text": ["b"]}, {}, "expected one of them @ text$"),
        (
            {"text": ["a", "b"], "text_pair": ["c"]},
            {},
            "got 1 second texts, expected 2 as in text @ text_pair$",
        ),
        ({"inputs": [LONG]}, {}, r"expected at most 128: shorten it.*truncation=true @ inputs\[0\]$"),
        (
            {"inputs": [{"text": "a", "text_pair": LONG}]},
            {"truncation": "only_first"},
            r"cannot be cut to 128 tokens: .*too short.* @ inputs\[0\]$",
        ),
        ({"inputs": ["a"]}, {"top_k": 0}, "greater than or equal to 1 @ top_k$"),
        ({"inputs": ["a"]}, {"top_k": "many"}, "got 'many', expected: .*valid integer.* @ top_k$"),
        ({"inputs": ["a"]}, {"function_to_apply": "relu"}, "'sigmoid', 'softmax'.* @ function_to_apply$"),
        ({"inputs": ["a"]}, {"max_length": 129}, r"got 129, expected 1\.\.128 @ max_length$"),
        ({"inputs": ["a"]}, {"truncation": "sideways"}, "@ truncation"),
        ({"inputs": ["a"]}, {"timeout_ms": -1}, "greater than 0 @ timeout_ms$"),
        ({"inputs": ["a"]}, {"padding": "sideways"}, "@ padding"),
        ({"inputs": ["a"]}, {"add_special_tokens": True}, "unknown input or parameter 'add_special_tokens'"),
        ({"inputs": ["a"]}, {"topk": 2}, "unknown input or parameter 'topk', did you mean 'top_k'"),
    ],
)
def test_bad_input(bert: Served, inputs: dict[str, Any], parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        results(bert, inputs, **parameters)


def test_unknown_output(bert: Served) -> None:
    with pytest.raises(InvalidRequest, match="unknown output 'labels', did you mean 'label'"):
        bert.task.signature.output_named("labels")


def test_limits() -> None:
    small = serve(tiny.folder("bert", "sequence", labels=LABELS), TASK, max_items=2, max_text_chars=10)
    with pytest.raises(RequestTooLarge, match="3 items, expected at most 2 @ inputs"):
        results(small, {"inputs": ["a", "b", "c"]})
    with pytest.raises(RequestTooLarge, match=r"a text of 11 characters, expected at most 10 @ inputs\[0\]"):
        results(small, {"inputs": ["aaaaa bbbbb"]})
