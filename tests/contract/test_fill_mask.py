"""fill-mask against transformers' own pipeline."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import ByT5Tokenizer

from mlserver_hftasks.errors import InvalidRequest, InvalidSettings, RequestTooLarge
from mlserver_hftasks.loading import Served
from mlserver_hftasks.tasks import fill_mask
from mlserver_hftasks.tasks.base import Answered
from tests import tiny
from tests.contract.pipelines import TEXTS, assert_same, elements, reference
from tests.harness import results, serve, tensors

TASK = "fill-mask"
FAMILIES = ["bert", "roberta", "distilbert", "xlm-roberta"]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest) -> Path:
    return tiny.folder(request.param, "mask")


@pytest.fixture(scope="module")
def served(folder: Path) -> Served:
    return serve(folder, TASK)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Callable[..., Any]:
    return reference(TASK, folder)


@pytest.fixture(scope="module")
def bert() -> Served:
    return serve(tiny.folder("bert", "mask"), TASK)


def mask_of(served: Served) -> str:
    return str(served.task.model.encoder.tokenizer.mask_token)


def texts_for(served: Served) -> list[str]:
    """One mask in each, at the start, in the middle or at the end."""
    mask = mask_of(served)
    pad = served.task.model.encoder.tokenizer.pad_token
    return [
        f"{mask} is the capital of France.",
        *(f"{text} {mask}." for text in TEXTS),
        *(f"{text[:9]}{mask} {text[9:]}" for text in TEXTS[:4]),
        mask,
        f"  {mask}  ",
        f"{pad} the {mask} {pad} market",
    ]


@pytest.mark.parametrize("top_k", [None, 1, 3, 12])
def test_results_equal_the_pipeline(served: Served, pipeline: Callable[..., Any], top_k: int | None) -> None:
    texts = texts_for(served)
    parameters = {} if top_k is None else {"top_k": top_k}
    want = pipeline(texts, **parameters)
    assert {len(predictions) for predictions in want} == {top_k or 5}
    assert_same(results(served, {"inputs": texts}, **parameters), want)


def test_several_masks(served: Served, pipeline: Callable[..., Any]) -> None:
    mask, pad = mask_of(served), served.task.model.encoder.tokenizer.pad_token
    texts = [
        f"The {mask} of {mask} is old.",
        f"{mask}{mask} {mask}",
        f"{pad} {mask} {mask}",
        f"One {mask} only.",
    ]
    want = pipeline(texts, top_k=3)
    assert [len(predictions) for predictions in want[:2]] == [2, 3]
    assert_same(results(served, {"inputs": texts}, top_k=3), want)


@pytest.mark.parametrize("top_k", [None, 1, 3])
@pytest.mark.parametrize(
    "targets",
    [
        "the",
        ["the"],
        ["the", "harbour", "museum", "Berlin", " Berlin", "old"],
        ["the", "the", "a"],
        ["unheard-of", "Zürich", "🎉", "the", "two words"],
        ["", "the"],
        ["[MASK]", "<mask>", "▁the", "Ġthe", "##s"],
    ],
)
def test_targets(
    served: Served, pipeline: Callable[..., Any], targets: str | list[str], top_k: int | None
) -> None:
    texts = [*texts_for(served)[:3], f"The {mask_of(served)} of {mask_of(served)}."]
    parameters = {"targets": targets} | ({} if top_k is None else {"top_k": top_k})
    want = pipeline(texts, **parameters)
    assert_same(results(served, {"inputs": texts}, **parameters), want)


def test_truncation_through_tokenizer_kwargs(served: Served, pipeline: Callable[..., Any]) -> None:
    text = f"The {mask_of(served)} is old. " + "repeated text appended " * 100
    for options in (
        {"truncation": True},
        {"truncation": "longest_first", "max_length": 12},
        {"max_length": 9, "truncation": True},
    ):
        want = pipeline([text, f"A {mask_of(served)}."], tokenizer_kwargs=options)
        assert_same(
            results(served, {"inputs": [text, f"A {mask_of(served)}."]}, tokenizer_kwargs=options), want
        )
        assert_same(results(served, {"inputs": [text, f"A {mask_of(served)}."]}, **options), want)


def test_shapes(served: Served, pipeline: Callable[..., Any]) -> None:
    one, two = f"The {mask_of(served)} is old.", f"{mask_of(served)} and {mask_of(served)}"
    for text in (one, two):
        assert_same(results(served, {"inputs": [text]}, scalar=True), elements(pipeline(text)))
        assert_same(results(served, {"inputs": [text]}), elements(pipeline([text])))
    assert len(results(served, {"inputs": [one]})) == 5
    assert_same(results(served, {"inputs": [one, two]}), elements(pipeline([one, two])))


def test_more_than_the_vocabulary_gives_all_of_it(bert: Served) -> None:
    found = results(bert, {"inputs": ["The [MASK]."]}, top_k=40_000)
    assert sorted(entry["token"] for entry in found) == list(range(bert.task.model.config.vocab_size))
    assert sum(entry["score"] for entry in found) == pytest.approx(1, abs=1e-5)


def test_only_masks_go_through_the_head(bert: Served) -> None:
    parsed = bert.task.signature.parse({})
    texts = ["The [MASK] of [MASK] is old.", "[MASK]"]
    rows = [row for example in bert.task.examples({"inputs": texts}, parsed) for row in example.rows]
    outputs = bert.backend.forward(rows)
    size = bert.task.model.config.vocab_size
    assert [output["logits"].shape for output in outputs] == [(2, size), (1, size)]


def test_a_batch_equals_single_items(served: Served) -> None:
    texts = [*texts_for(served), f"{mask_of(served)} and {mask_of(served)}"]
    batch = results(served, {"inputs": texts})
    assert_same(batch, results(served, {"inputs": texts}, together=False))
    assert_same(batch, [results(served, {"inputs": [text]}, scalar=True) for text in texts])


def test_parameters_of_clients_in_one_batch_do_not_mix(served: Served) -> None:
    texts = texts_for(served)[:2]
    requests: list[dict[str, Any]] = [{"top_k": 2}, {"targets": ["the", "old", "a"]}, {}]
    parsed = [served.task.signature.parse(parameters) for parameters in requests]
    examples = [served.task.examples({"inputs": texts}, each) for each in parsed]
    outputs = iter(served.backend.forward([r for each in examples for example in each for r in example.rows]))
    for parameters, given, each in zip(requests, parsed, examples, strict=True):
        got = [served.task.postprocess(Answered(example, [next(outputs)]), given) for example in each]
        assert_same(got, results(served, {"inputs": texts}, **parameters))


@pytest.mark.parametrize("parameters", [{"top_k": 3}, {"targets": ["the", "old"]}])
def test_typed_outputs(served: Served, parameters: dict[str, Any]) -> None:
    mask = mask_of(served)
    texts = [f"The {mask} is old.", f"{mask} of {mask}", mask]
    found = results(served, {"inputs": texts}, **parameters)
    names = ["sequence", "score", "token", "token_str"]
    made = tensors(served, names, {"inputs": texts}, **parameters)
    assert {name: made[name].datatype for name in made} == {
        "sequence": "BYTES",
        "score": "FP32",
        "token": "INT64",
        "token_str": "BYTES",
    }
    for name, fill in (("sequence", ""), ("score", 0.0), ("token", -1), ("token_str", "")):
        values = made[name].values
        assert values.shape == (3, 2, parameters.get("top_k", 2))
        want = [
            [[e[name] for e in found[0]]],
            [[e[name] for e in of_mask] for of_mask in found[1]],
            [[e[name] for e in found[2]]],
        ]
        assert (
            values[0, :1].tolist() == want[0]
            and values[1].tolist() == want[1]
            and values[2, :1].tolist() == want[2]
        )
        assert (values[[0, 2], 1] == fill).all()


def test_only_the_typed_outputs_asked_for(bert: Served) -> None:
    made = tensors(bert, ["token"], {"inputs": ["The [MASK]."]})
    assert list(made) == ["token"] and made["token"].values.dtype == np.int64


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "parameters", "message"),
    [
        ([], {}, "an empty batch"),
        (
            ["The [MASK].", "none here"],
            {},
            r"no mask in a text of \d+ tokens, expected '\[MASK\]' @ inputs\[1\]$",
        ),
        (
            ["word " * 200 + "[MASK]"],
            {"truncation": True},
            r"no mask in a text of 128 tokens.* @ inputs\[0\]$",
        ),
        (["word " * 200 + "[MASK]"], {}, r"expected at most 128: shorten it.* @ inputs\[0\]$"),
        ([None], {}, r"got NoneType None, expected a text @ inputs\[0\]$"),
        (["[MASK]"], {"top_k": 0}, "greater than or equal to 1 @ top_k$"),
        (["[MASK]"], {"top_k": 1.5}, "@ top_k$"),
        (["[MASK]"], {"top_k": 60_000}, "60000 predictions for 1 masks, expected at most 50000 @ top_k$"),
        (["[MASK]"], {"targets": []}, "at least 1 item.* @ targets$"),
        (
            ["[MASK]"],
            {"targets": ["", ""]},
            r"no tokens in \['', ''\], expected at least one target .* @ targets$",
        ),
        (["[MASK]"], {"targets": ["a", 5]}, r"got 5, expected: .*valid string @ targets\.1$"),
        (["[MASK]"], {"targets": {"a": 1}}, "valid list @ targets$"),
        (
            ["[MASK]"],
            {"tokenizer_kwargs": {"padding": True}},
            "'truncation' or 'max_length' @ tokenizer_kwargs",
        ),
        (["[MASK]"], {"tokenizer_kwargs": {"max_length": 0}}, "greater than or equal to 1 @ max_length$"),
        (["[MASK]"], {"tokenizer_kwargs": {"max_length": 999}}, r"got 999, expected 1\.\.128 @ max_length$"),
        (["[MASK]"], {"tokenizer_kwargs": {"truncation": "sideways"}}, "@ truncation"),
        (["[MASK]"], {"tokenizer_kwargs": "x"}, "valid dictionary @ tokenizer_kwargs$"),
        (["[MASK]"], {"topk": 3}, "did you mean 'top_k'"),
    ],
)
def test_bad_input(bert: Served, inputs: list[Any], parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        results(bert, {"inputs": inputs}, **parameters)


def test_the_predictions_of_a_request_are_bounded(bert: Served) -> None:
    many = {"inputs": ["[MASK] " * 100] * 101}
    with pytest.raises(RequestTooLarge, match="50500 predictions for 10100 masks"):
        bert.task.examples(many, bert.task.signature.parse({}))
    assert len(bert.task.examples(many, bert.task.signature.parse({"targets": ["the", "a"]}))) == 101


def test_targets_are_bounded(bert: Served) -> None:
    with pytest.raises(InvalidRequest, match=r"at most 10000 items.* @ targets"):
        bert.task.signature.parse({"targets": ["a"] * (fill_mask.MAX_TARGETS + 1)})


def test_a_tokenizer_without_mask_is_refused_at_load(tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(tiny.folder("distilbert", "mask"), copy)
    (copy / "tokenizer.json").unlink()
    ByT5Tokenizer(model_max_length=tiny.MAX_TOKENS).save_pretrained(copy)
    with pytest.raises(InvalidSettings, match="the tokenizer has no mask token"):
        serve(copy, TASK)
