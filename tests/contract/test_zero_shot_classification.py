"""zero-shot-classification against transformers' own pipeline."""

from __future__ import annotations

import logging
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

TASK = "zero-shot-classification"
NLI = ("contradiction", "neutral", "entailment")
TOPICS = ["travel", "music", "sports & politics", "Zürich 🎉", "food, drink"]


@pytest.fixture(scope="module", params=["bert", "roberta", "distilbert"])
def folder(request: pytest.FixtureRequest) -> Path:
    return tiny.folder(request.param, "sequence", labels=NLI)


@pytest.fixture(scope="module")
def served(folder: Path) -> Served:
    return serve(folder, TASK)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Callable[..., Any]:
    return reference(TASK, folder)


@pytest.fixture(scope="module")
def bert() -> Served:
    return serve(tiny.folder("bert", "sequence", labels=NLI), TASK)


@pytest.mark.parametrize("multi_label", [None, False, True])
@pytest.mark.parametrize(
    "labels",
    [TOPICS, ["travel"], "travel", "travel, music,,  sports ,", ["music", "travel", "music"]],
    ids=["list", "list of one", "one", "commas", "twice"],
)
def test_results_equal_the_pipeline(
    served: Served, pipeline: Callable[..., Any], labels: str | list[str], multi_label: bool | None
) -> None:
    texts = [*TEXTS, LONG]
    parameters: dict[str, Any] = {"candidate_labels": labels}
    if multi_label is not None:
        parameters["multi_label"] = multi_label
    want = pipeline(texts, **parameters)
    assert_same(results(served, {"inputs": texts}, **parameters), want)


@pytest.mark.parametrize(
    "template",
    [
        "{}",
        "Es geht um {}.",
        "{} {{or}} not",
        "{0}",
        "{0} is {0}",
        "This text: {:} }}",
        "{{{}}}",
        "\u200b{} 🎉",
    ],
)
def test_templates(served: Served, pipeline: Callable[..., Any], template: str) -> None:
    parameters = {"candidate_labels": TOPICS, "hypothesis_template": template}
    want = pipeline(list(TEXTS), **parameters)
    assert_same(results(served, {"inputs": TEXTS}, **parameters), want)


@pytest.mark.parametrize(
    "classes",
    [
        ("entailment", "neutral", "contradiction"),
        ("not_entailment", "Entailment"),
        ("ENTAILED", "not"),
        ("a", "b", "c"),
    ],
)
@pytest.mark.parametrize("multi_label", [False, True])
def test_which_class_entails(classes: tuple[str, ...], multi_label: bool) -> None:
    folder = tiny.folder("bert", "sequence", labels=classes)
    parameters = {"candidate_labels": TOPICS, "multi_label": multi_label}
    want = reference(TASK, folder)(list(TEXTS), **parameters)
    assert_same(results(serve(folder, TASK), {"inputs": TEXTS}, **parameters), want)


def test_an_encoder_with_decoder() -> None:
    folder = tiny.folder("bart", "sequence", labels=NLI)
    texts = [
        text for text in (*TEXTS, LONG) if "</s>" not in text
    ]  # BART wants as many in every row of a batch
    want = reference(TASK, folder)(texts, candidate_labels=TOPICS)
    assert_same(results(serve(folder, TASK), {"inputs": texts}, candidate_labels=TOPICS), want)


def test_a_model_without_entailment_is_named_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="mlserver_hftasks"):
        serve(tiny.folder("bert", "sequence", labels=("a", "b", "c")), TASK)
    assert "none of the labels ('a', 'b', 'c') begins with 'entail'" in caplog.text


def test_the_labels_of_the_settings_name_the_class_that_entails() -> None:
    plain = tiny.folder("bert", "sequence", labels=("LABEL_0", "LABEL_1", "LABEL_2"))
    told = serve(plain, TASK, labels=["entailment", "neutral", "contradiction"])
    named = serve(tiny.folder("bert", "sequence", labels=("entailment", "neutral", "contradiction")), TASK)
    request = {"inputs": TEXTS}
    assert_same(
        results(told, request, candidate_labels=TOPICS), results(named, request, candidate_labels=TOPICS)
    )


def test_name_of_version_4(bert: Served) -> None:
    old = results(bert, {"inputs": TEXTS}, candidate_labels=TOPICS, multi_class=True)
    assert old == results(bert, {"inputs": TEXTS}, candidate_labels=TOPICS, multi_label=True)
    assert old != results(bert, {"inputs": TEXTS}, candidate_labels=TOPICS)
    wins = results(bert, {"inputs": TEXTS}, candidate_labels=TOPICS, multi_class=False, multi_label=True)
    assert wins == results(bert, {"inputs": TEXTS}, candidate_labels=TOPICS)


def test_of_equal_scores_the_later_label_comes_first(bert: Served) -> None:
    parameters = bert.task.signature.parse({"candidate_labels": ["a", "b", "c"]})
    outputs = [{"logits": np.array([0, 0, high], dtype=np.float32)} for high in (1, 2, 1)]
    (example,) = bert.task.examples({"inputs": ["text"]}, parameters)
    result = bert.task.postprocess(Answered(example, outputs), parameters)
    assert result["labels"] == ["b", "c", "a"]


def test_shapes(served: Served, pipeline: Callable[..., Any]) -> None:
    text = TEXTS[0]
    assert_same(
        results(served, {"inputs": [text]}, scalar=True, candidate_labels=TOPICS),
        elements(pipeline(text, candidate_labels=TOPICS)),
    )
    for texts in ([text], [text, "b"]):
        assert_same(
            results(served, {"inputs": texts}, candidate_labels=TOPICS),
            elements(pipeline(texts, candidate_labels=TOPICS)),
        )


def test_only_the_text_is_cut(bert: Served) -> None:
    parsed = bert.task.signature.parse({"candidate_labels": ["travel"], "max_length": 20})
    for settings in ({}, {"truncation": True}):
        served = serve(tiny.folder("bert", "sequence", labels=NLI), TASK, **settings)
        (example,) = served.task.examples({"inputs": [LONG]}, parsed)
        ids = example.rows[0].arrays["input_ids"]
        tail = bert.task.model.encoder.encode(["This example is travel."])[0].ids[1:]
        assert len(ids) == 20
        assert ids[-len(tail) :].tolist() == tail
    with pytest.raises(
        InvalidRequest, match=r"expected at most 128.* @ inputs\[0\] with candidate_labels\[0\]"
    ):
        results(bert, {"inputs": [LONG]}, candidate_labels=["travel"], truncation=False)


def test_a_batch_equals_single_items(served: Served) -> None:
    texts = [*TEXTS, LONG]
    batch = results(served, {"inputs": texts}, candidate_labels=TOPICS)
    assert_same(batch, results(served, {"inputs": texts}, candidate_labels=TOPICS, together=False))
    single = [results(served, {"inputs": [text]}, candidate_labels=TOPICS)[0] for text in texts]
    assert_same(batch, single)


def test_parameters_of_clients_in_one_batch_do_not_mix(served: Served) -> None:
    requests: list[dict[str, Any]] = [
        {"candidate_labels": TOPICS},
        {"candidate_labels": ["music", "travel"], "multi_label": True},
        {"candidate_labels": "food", "hypothesis_template": "{}!"},
    ]
    parsed = [served.task.signature.parse(parameters) for parameters in requests]
    examples = [served.task.examples({"inputs": TEXTS}, each) for each in parsed]
    outputs = iter(served.backend.forward([r for each in examples for example in each for r in example.rows]))
    for parameters, given, each in zip(requests, parsed, examples, strict=True):
        answered = [Answered(example, [next(outputs) for _ in example.rows]) for example in each]
        got = [served.task.postprocess(item, given) for item in answered]
        assert_same(got, results(served, {"inputs": TEXTS}, **parameters))


@pytest.mark.parametrize("multi_label", [False, True])
def test_typed_outputs(served: Served, multi_label: bool) -> None:
    parameters = {"candidate_labels": TOPICS, "multi_label": multi_label}
    found = results(served, {"inputs": TEXTS}, **parameters)
    made = tensors(served, ["scores", "labels", "logits"], {"inputs": TEXTS}, **parameters)
    assert [made[name].datatype for name in made] == ["FP32", "BYTES", "FP32"]
    assert made["labels"].values.tolist() == [result["labels"] for result in found]
    np.testing.assert_allclose(made["scores"].values, [result["scores"] for result in found], atol=1e-6)
    logits = made["logits"].values
    assert logits.shape == (len(TEXTS), len(TOPICS), len(NLI)) and logits.dtype == np.float32
    best = logits[:, :, 2] - logits[:, :, 0] if multi_label else logits[:, :, 2]
    assert [TOPICS[index] for index in best.argmax(1)] == made["labels"].values[:, 0].tolist()
    assert list(tensors(served, ["labels"], {"inputs": TEXTS}, **parameters)) == ["labels"]


# -- bad input -----------------------------------------------------------------------------------

ONE = {"candidate_labels": ["a"]}


@pytest.mark.parametrize(
    ("inputs", "parameters", "message"),
    [
        (["a"], {}, "^no candidate_labels, but it is required @ candidate_labels$"),
        (["a"], {"candidate_labels": []}, r"got \[\], expected: 1\.\.256 labels @ candidate_labels$"),
        (["a"], {"candidate_labels": " , "}, r"expected: 1\.\.256 labels @ candidate_labels$"),
        (["a"], {"candidate_labels": ["b", " "]}, "expected: labels that are not empty @ candidate_labels$"),
        (["a"], {"candidate_labels": ["b"] * 257}, r"expected: 1\.\.256 labels @ candidate_labels$"),
        (["a"], {"candidate_labels": 3}, "got 3, expected: .*valid list @ candidate_labels$"),
        (["a"], {"candidate_labels": ["b", 3]}, r"got 3, expected: .*valid string @ candidate_labels\.1$"),
        ([], ONE, "an empty batch"),
        (["b", ""], ONE, r"an empty text, expected one to classify @ inputs\[1\]$"),
        ([{"text": "a"}], ONE, r"expected a text @ inputs\[0\]$"),
        (["a"], ONE | {"hypothesis_template": 5}, "valid string @ hypothesis_template$"),
        (["a"], ONE | {"multi_label": "perhaps"}, "valid boolean.* @ multi_label$"),
        (["a"], ONE | {"truncation": "sideways"}, "@ truncation"),
        (["a"], {"candidate_label": ["b"]}, "did you mean 'candidate_labels'"),
        (
            ["a"],
            {"candidate_labels": ["b", "long " * 200]},
            r"cannot be cut to 128 tokens: .*too short.* @ inputs\[0\] with candidate_labels\[1\]$",
        ),
    ],
)
def test_bad_input(bert: Served, inputs: list[Any], parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        results(bert, {"inputs": inputs}, **parameters)


@pytest.mark.parametrize(
    "template",
    [
        "no place",
        "",
        "{{}}",
        "{} {}",
        "{} {0}",
        "{1}",
        "{label}",
        "{0.__class__}",
        "{.__class__.__mro__}",
        "{0[0]}",
        "{!r}",
        "{:>1000000000}",
        "{:{}}",
        "{",
        "}",
        "{0",
    ],
)
def test_templates_that_are_refused(bert: Served, template: str) -> None:
    with pytest.raises(
        InvalidRequest, match=r"expected: a sentence with \{\} in place .* @ hypothesis_template$"
    ):
        results(bert, {"inputs": ["a"]}, candidate_labels=["b"], hypothesis_template=template)


def test_limits() -> None:
    small = serve(tiny.folder("bert", "sequence", labels=NLI), TASK, max_items=2, max_text_chars=50)
    with pytest.raises(RequestTooLarge, match="34 texts x labels, expected at most 32 @ candidate_labels"):
        results(small, {"inputs": ["a", "b"]}, candidate_labels=["c"] * 17)
    with pytest.raises(
        RequestTooLarge, match="sentences of 60 characters, expected at most 50 @ hypothesis_template"
    ):
        results(small, {"inputs": ["a"]}, candidate_labels=["c", "d" * 20], hypothesis_template="{0}{0}{0}")
