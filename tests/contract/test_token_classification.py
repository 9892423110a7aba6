"""token-classification against transformers' own pipeline."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import ByT5Tokenizer

from mlserver_hftasks.errors import InvalidRequest, RequestTooLarge
from mlserver_hftasks.loading import Served
from mlserver_hftasks.tasks.base import Answered
from tests import tiny
from tests.contract.pipelines import LONG, TEXTS, assert_same, elements, reference
from tests.harness import results, serve, tensors

TASK = "token-classification"
LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "MISC", "X-Y")
STRATEGIES = ("none", "simple", "first", "average", "max")
WORDS = (["Angela", "Merkel", "met", "O'Neill-Smith", "in", "Zürich", "🎉", ".", ""], ["a"], TEXTS[3].split())


@pytest.fixture(scope="module", params=["bert", "roberta", "distilbert", "xlm-roberta"])
def folder(request: pytest.FixtureRequest) -> Path:
    return tiny.folder(request.param, "token", labels=LABELS)


@pytest.fixture(scope="module")
def served(folder: Path) -> Served:
    return serve(folder, TASK)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Callable[..., Any]:
    return reference(TASK, folder)


@pytest.fixture(scope="module")
def bert() -> Served:
    return serve(tiny.folder("bert", "token", labels=LABELS), TASK)


@pytest.fixture(scope="module")
def slow_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer that is written in Python."""
    copy = tmp_path_factory.mktemp("slow") / "model"
    shutil.copytree(tiny.folder("distilbert", "token", labels=LABELS), copy)
    (copy / "tokenizer.json").unlink()
    ByT5Tokenizer(model_max_length=tiny.MAX_TOKENS).save_pretrained(copy)
    return copy


@pytest.mark.parametrize("strategy", [None, *STRATEGIES, "SIMPLE", "Max"])
def test_results_equal_the_pipeline(
    served: Served, pipeline: Callable[..., Any], strategy: str | None
) -> None:
    texts = [*TEXTS, "", LONG]
    parameters = {} if strategy is None else {"aggregation_strategy": strategy}
    want = pipeline(texts, **parameters)
    assert sum(map(len, want)) >= 20
    assert_same(results(served, {"inputs": texts}, **parameters), want)


@pytest.mark.parametrize("strategy", ["none", "simple", "max"])
@pytest.mark.parametrize("ignore", [[], ["O", "PER", "B-LOC"], ["Y", "MISC"], list(LABELS)])
def test_ignored_labels(
    served: Served, pipeline: Callable[..., Any], strategy: str, ignore: list[str]
) -> None:
    parameters = {"aggregation_strategy": strategy, "ignore_labels": ignore}
    want = pipeline(list(TEXTS), **parameters)
    assert_same(results(served, {"inputs": TEXTS}, **parameters), want)


def test_one_ignored_label_by_itself(bert: Served) -> None:
    alone = results(bert, {"inputs": TEXTS}, ignore_labels="MISC")
    assert alone == results(bert, {"inputs": TEXTS}, ignore_labels=["MISC"])
    assert alone != results(bert, {"inputs": TEXTS})


@pytest.mark.parametrize("strategy", [None, "simple", "first", "average", "max"])
@pytest.mark.parametrize("stride", [0, 7, 60])
def test_long_texts_in_windows(
    served: Served, pipeline: Callable[..., Any], strategy: str | None, stride: int
) -> None:
    texts = [LONG, TEXTS[0], LONG[7:], "🎉  Zürich " * 40, ""]
    parameters = {"stride": stride} | ({} if strategy is None else {"aggregation_strategy": strategy})
    want = pipeline(texts, **parameters)
    assert max(entity["end"] for entity in want[0]) > len(LONG) - 20  # nothing was cut away
    assert_same(results(served, {"inputs": texts}, **parameters), want)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("delimiter", [None, "", " ", "--"])
def test_words(served: Served, pipeline: Callable[..., Any], strategy: str, delimiter: str | None) -> None:
    parameters: dict[str, Any] = {"is_split_into_words": True, "aggregation_strategy": strategy}
    if delimiter is not None:
        parameters["delimiter"] = delimiter
    want = pipeline(list(WORDS), **parameters)
    assert_same(results(served, {"inputs": WORDS}, **parameters), want)


def test_words_in_windows(served: Served, pipeline: Callable[..., Any]) -> None:
    parameters = {"is_split_into_words": True, "aggregation_strategy": "first", "stride": 5}
    words = [LONG.split(), ["a"]]
    assert_same(results(served, {"inputs": words}, **parameters), pipeline(words, **parameters))


def test_words_by_themselves_are_one_item(served: Served, pipeline: Callable[..., Any]) -> None:
    parameters = {"is_split_into_words": True, "ignore_labels": []}
    want = pipeline(WORDS[0], **parameters)
    assert len(want) == 1
    assert_same(results(served, {"inputs": WORDS[0]}, **parameters), want)
    assert_same(results(served, {"inputs": [WORDS[0]]}, scalar=True, **parameters), want)


@pytest.mark.parametrize("strategy", ["none", "simple", "average"])
def test_offset_mapping(served: Served, pipeline: Callable[..., Any], strategy: str) -> None:
    text = "Anna Keller lives in Berlin"
    count = len(served.task.model.encoder.encode([text])[0].ids)
    offsets = [(min(index, len(text)), min(index + 2, len(text))) for index in range(count)]
    parameters = {"aggregation_strategy": strategy, "offset_mapping": offsets, "ignore_labels": []}
    want = pipeline(text, **parameters)
    assert_same(results(served, {"inputs": [text]}, scalar=True, **parameters), want)


def test_offset_mapping_per_item(bert: Served) -> None:
    texts = ["Anna lives", "Berlin is old"]
    offsets = [list(piece.offsets) for piece in bert.task.model.encoder.encode(texts)]
    assert results(bert, {"inputs": texts}, offset_mapping=offsets) == results(bert, {"inputs": texts})


def test_shapes(served: Served, pipeline: Callable[..., Any]) -> None:
    text = TEXTS[0]
    assert_same(results(served, {"inputs": [text]}, scalar=True), elements(pipeline(text)))
    assert_same(results(served, {"inputs": [text]}), elements(pipeline([text])))
    assert_same(results(served, {"inputs": [text, "b c"]}), elements(pipeline([text, "b c"])))
    assert results(served, {"inputs": [""]}, scalar=True) == elements(pipeline("")) == []
    assert results(served, {"inputs": [""]}) == elements(pipeline([""])) == [[]]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"grouped_entities": True}, "simple"),
        ({"grouped_entities": True, "ignore_subwords": False}, "simple"),
        ({"grouped_entities": True, "ignore_subwords": True}, "first"),
        ({"ignore_subwords": True}, "none"),
        ({"grouped_entities": False, "aggregation_strategy": "max"}, "none"),
        ({"grouped_entities": True, "aggregation_strategy": "max"}, "simple"),
    ],
)
def test_names_of_version_4(bert: Served, old: dict[str, Any], new: str) -> None:
    got = results(bert, {"inputs": TEXTS}, **old)
    assert got == results(bert, {"inputs": TEXTS}, aggregation_strategy=new)


def test_texts_are_cut_as_the_client_says(bert: Served) -> None:
    cut = results(bert, {"inputs": [LONG]}, scalar=True, ignore_labels=[], max_length=20)
    assert [token["index"] for token in cut] == list(range(1, 19))
    with pytest.raises(InvalidRequest, match=r"expected at most 128: shorten it.* @ inputs\[0\]"):
        results(bert, {"inputs": [LONG]}, truncation=False)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_batch_equals_single_items(served: Served, strategy: str) -> None:
    texts = [*TEXTS, LONG]
    batch = results(served, {"inputs": texts}, aggregation_strategy=strategy)
    alone = results(served, {"inputs": texts}, aggregation_strategy=strategy, together=False)
    assert_same(batch, alone)
    single = [results(served, {"inputs": [text]}, aggregation_strategy=strategy)[0] for text in texts]
    assert_same(batch, single)


def test_parameters_of_clients_in_one_batch_do_not_mix(served: Served) -> None:
    requests: list[dict[str, Any]] = [
        {"aggregation_strategy": "simple", "stride": 5},
        {},
        {"aggregation_strategy": "max", "ignore_labels": []},
    ]
    parsed = [served.task.signature.parse(parameters) for parameters in requests]
    examples = [served.task.examples({"inputs": [LONG, TEXTS[0]]}, each) for each in parsed]
    outputs = iter(served.backend.forward([r for each in examples for example in each for r in example.rows]))
    for parameters, given, each in zip(requests, parsed, examples, strict=True):
        answered = [Answered(example, [next(outputs) for _ in example.rows]) for example in each]
        got = [served.task.postprocess(item, given) for item in answered]
        assert_same(got, results(served, {"inputs": [LONG, TEXTS[0]]}, **parameters))


# -- typed outputs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parameters", [{}, {"aggregation_strategy": "first"}, {"ignore_labels": list(LABELS)}]
)
def test_typed_entities(served: Served, parameters: dict[str, Any]) -> None:
    texts = ["", *TEXTS]
    names = ["label", "word", "score", "start", "end", "num_entities"]
    found = results(served, {"inputs": texts}, **parameters)
    made = tensors(served, names, {"inputs": texts}, **parameters)
    assert list(made) == names
    assert made["num_entities"].values.tolist() == [len(entities) for entities in found]
    kinds = {name: made[name].datatype for name in names}
    assert kinds == dict(zip(names, ["BYTES", "BYTES", "FP32", "INT64", "INT64", "INT64"], strict=True))
    width = max(len(entities) for entities in found)
    for name, fill in (("label", ""), ("word", ""), ("score", 0.0), ("start", -1), ("end", -1)):
        assert made[name].values.shape == (len(texts), width)
        for row, entities in zip(made[name].values.tolist(), found, strict=True):
            key = (
                name
                if name != "label"
                else "entity"
                if not parameters.get("aggregation_strategy")
                else "entity_group"
            )
            want = [entity[key] for entity in entities]
            assert row[: len(want)] == (pytest.approx(want) if name == "score" else want)
            assert row[len(want) :] == [fill] * (width - len(want))


def test_typed_logits(bert: Served) -> None:
    texts = ["a", TEXTS[0]]
    made = tensors(bert, ["logits", "num_tokens"], {"inputs": texts})
    lengths = [len(encoding.ids) for encoding in bert.task.model.encoder.encode(texts)]
    assert made["num_tokens"].values.tolist() == lengths
    logits = made["logits"].values
    assert logits.shape == (2, max(lengths), len(LABELS)) and logits.dtype == np.float32
    assert (logits[0, lengths[0] :] == 0).all() and (logits[0, : lengths[0]] != 0).all()
    best = [LABELS[index] for index in logits[1, 1 : lengths[1] - 1].argmax(-1)]
    tokens = results(bert, {"inputs": texts}, ignore_labels=[])[1]
    assert best == [token["entity"] for token in tokens]


def test_typed_logits_of_windows_follow_one_another(bert: Served) -> None:
    made = tensors(bert, ["num_tokens"], {"inputs": [LONG]}, stride=5, aggregation_strategy="simple")
    assert list(made) == ["num_tokens"]
    rows = bert.task.examples(
        {"inputs": [LONG]}, bert.task.signature.parse({"stride": 5, "aggregation_strategy": "simple"})
    )[0].rows
    assert len(rows) > 1
    assert made["num_tokens"].values.tolist() == [sum(row.cost for row in rows)]


# -- tokenizers written in Python --------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["none", "simple"])
def test_a_slow_tokenizer_gives_no_spans(slow_folder: Path, strategy: str) -> None:
    served = serve(slow_folder, TASK)
    assert not served.task.model.encoder.is_fast
    texts = list(TEXTS[:4])
    got = results(served, {"inputs": texts}, aggregation_strategy=strategy)
    assert got[0][0]["start"] is None and got[0][0]["end"] is None
    assert_same(got, reference(TASK, slow_folder)(texts, aggregation_strategy=strategy))
    made = tensors(served, ["start"], {"inputs": texts}, aggregation_strategy=strategy)
    assert (made["start"].values == -1).all()


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        ({"aggregation_strategy": "max"}, "aggregation_strategy"),
        ({"stride": 2, "aggregation_strategy": "simple"}, "stride"),
        ({"is_split_into_words": True}, "is_split_into_words"),
    ],
)
def test_what_a_slow_tokenizer_cannot_do(slow_folder: Path, parameters: dict[str, Any], name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"tokenizer is written in Python .* @ {name}$"):
        results(serve(slow_folder, TASK), {"inputs": ["a b"]}, **parameters)


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "parameters", "message"),
    [
        ([], {}, r"an empty batch, expected 1\.\.1024 items @ inputs$"),
        ([5], {}, r"got int 5, expected a text @ inputs\[0\]$"),
        (["a", ["b", "c"]], {}, r"got list \['b', 'c'\], expected a text @ inputs\[1\]$"),
        ([[]], {"is_split_into_words": True}, r"expected a list of words .* @ inputs\[0\]$"),
        (
            ["a", ["b"]],
            {"is_split_into_words": True},
            r"got str 'a', expected a list of words .* @ inputs\[0\]$",
        ),
        ([["a", 1]], {"is_split_into_words": True}, r"got int 1, expected a text @ inputs\[0\]\[1\]$"),
        ([], {"is_split_into_words": True}, "an empty batch"),
        (["a"], {"aggregation_strategy": "best"}, "'none', 'simple', 'first'.* @ aggregation_strategy$"),
        (["a"], {"aggregation_strategy": 3}, "@ aggregation_strategy$"),
        (["a"], {"ignore_labels": 3}, "valid list @ ignore_labels$"),
        (["a"], {"stride": -1}, "got -1, expected: .*greater than or equal to 0 @ stride$"),
        (["a"], {"stride": "x"}, "valid integer.* @ stride$"),
        (["a"], {"stride": 113}, r"got 113, expected 0\.\.112 for windows of 128 tokens @ stride$"),
        (
            ["a"],
            {"stride": 8, "max_length": 10},
            r"got 8, expected 0\.\.7 for windows of 10 tokens @ stride$",
        ),
        (
            ["a"],
            {"stride": 0, "max_length": 2},
            "got 2, expected at least 3 tokens in a window @ max_length$",
        ),
        (["a"], {"stride": 1, "aggregation_strategy": "none"}, "expected another strategy @ stride$"),
        (["a"], {"stride": 1, "grouped_entities": False}, "expected another strategy @ stride$"),
        (["a"], {"max_length": 129}, r"got 129, expected 1\.\.128 @ max_length$"),
        (["a"], {"offset_mapping": [[0, 1]]}, r"got 1 pairs, expected 3, .* @ offset_mapping\[0\]$"),
        (
            ["a", "b"],
            {"offset_mapping": [[0, 0]] * 3},
            "got 1 lists, expected 2, one per item @ offset_mapping$",
        ),
        (["a"], {"offset_mapping": [[0, 0], [0, 2], [0, 0]]}, r"expected 0\.\.1 @ offset_mapping$"),
        (["a"], {"offset_mapping": [[0, 0], [1, 0], [0, 0]]}, r"expected 0\.\.1 @ offset_mapping$"),
        (["a"], {"offset_mapping": [[0, 0]] * 3, "stride": 1}, "expected one of them @ offset_mapping$"),
        (["a"], {"offset_mapping": [[0, 10**30]]}, r"less than 2147483648 @ offset_mapping\.0\.0\.1$"),
        (["a"], {"offset_mapping": [[-1, 0]]}, r"greater than or equal to 0 @ offset_mapping"),
        (["a"], {"offset_mapping": 7}, "valid list @ offset_mapping$"),
        (["a"], {"aggregation": "max"}, "did you mean 'aggregation_strategy'"),
        (["a"], {"batch_size": 2}, "unknown input or parameter 'batch_size'"),
    ],
)
def test_bad_input(bert: Served, inputs: list[Any], parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        results(bert, {"inputs": inputs}, **parameters)


def test_limits() -> None:
    small = serve(tiny.folder("bert", "token", labels=LABELS), TASK, max_items=2, max_text_chars=10)
    with pytest.raises(RequestTooLarge, match="3 items, expected at most 2 @ inputs"):
        results(small, {"inputs": ["a", "b", "c"]})
    with pytest.raises(
        RequestTooLarge, match=r"words of 11 characters together, expected at most 10 @ inputs\[0\]"
    ):
        results(small, {"inputs": [["aaaaa", "bbbbb"]]}, is_split_into_words=True)
    with pytest.raises(RequestTooLarge, match="words of 21 characters"):
        results(small, {"inputs": [["a", "b", "c"]]}, is_split_into_words=True, delimiter="-" * 9)
