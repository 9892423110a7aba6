"""text-ranking: cross-encoder scores of pairs, and the order of a query's texts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from mlserver_hftasks.errors import InvalidRequest, InvalidSettings
from mlserver_hftasks.loading import Served
from mlserver_hftasks.tasks.text_ranking import TextRanking
from tests import harness, tiny

QUERY = "Where is the old bridge?"
TEXTS = [
    "The old bridge is over the river.",
    "Bread and milk.",
    "A woman reads a long book in the garden behind the house every evening.",
    "It rains.",
]
LONG = "the old town by the river " * 40


def folder(architecture: str = "bert", labels: tuple[str, ...] = ("score",), **config: Any) -> Path:
    return tiny.folder(architecture, "sequence", labels, **config)


@pytest.fixture(scope="module", params=["bert", "roberta"])
def architecture(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def served(architecture: str) -> Served:
    return harness.serve(folder(architecture), "text-ranking")


@pytest.fixture(scope="module")
def bert() -> Served:
    return harness.serve(folder(), "text-ranking")


def logits(path: Path, pairs: list[tuple[str, str]], **tokenizer_options: Any) -> np.ndarray[Any, Any]:
    """What the model says of each pair by itself, [n, labels]."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
    rows = []
    for pair in pairs:
        with torch.inference_mode():
            rows.append(model(**tokenizer(*pair, return_tensors="pt", **tokenizer_options)).logits[0].numpy())
    return np.stack(rows)


def sigmoid(values: Any) -> Any:
    return 1 / (1 + np.exp(-np.asarray(values, dtype=np.float64)))


def test_scores_are_sigmoids_of_the_models_logits(served: Served, architecture: str) -> None:
    raw = logits(folder(architecture), [(QUERY, text) for text in TEXTS])[:, 0]
    got = harness.results(served, {"query": [QUERY], "texts": TEXTS})
    assert [entry["index"] for entry in got] == np.argsort(-raw).tolist()
    np.testing.assert_allclose([e["score"] for e in got], np.sort(sigmoid(raw))[::-1], atol=1e-5)
    assert all(set(entry) == {"index", "score"} for entry in got)
    assert np.ptp(raw) > 1e-2


def test_raw_scores_are_the_logits(bert: Served) -> None:
    raw = logits(folder(), [(QUERY, text) for text in TEXTS])[:, 0]
    got = harness.results(bert, {"query": [QUERY], "texts": TEXTS}, raw_scores=True)
    np.testing.assert_allclose([e["score"] for e in got], np.sort(raw)[::-1], atol=1e-4)


def test_top_k_and_texts(bert: Served) -> None:
    everything = harness.results(bert, {"query": [QUERY], "texts": TEXTS})
    for name in ("return_text", "return_documents"):
        best = harness.results(bert, {"query": [QUERY], "texts": TEXTS}, top_k=2, **{name: True})
        assert [entry["index"] for entry in best] == [entry["index"] for entry in everything[:2]]
        assert [entry["text"] for entry in best] == [TEXTS[entry["index"]] for entry in best]
    assert harness.results(bert, {"query": [QUERY], "texts": TEXTS}, top_k=99) == everything


@pytest.mark.parametrize(
    "pairs",
    [
        [{"query": QUERY, "text": text} for text in TEXTS],
        [{"text": QUERY, "text_pair": text} for text in TEXTS],
        [[QUERY, text] for text in TEXTS],
    ],
)
def test_pairs_keep_their_order(bert: Served, pairs: list[Any]) -> None:
    ranked = harness.results(bert, {"query": [QUERY], "texts": TEXTS})
    by_index = {entry["index"]: entry["score"] for entry in ranked}
    got = harness.results(bert, {"inputs": pairs})
    assert all(set(entry) == {"score"} for entry in got)
    np.testing.assert_allclose([e["score"] for e in got], [by_index[i] for i in range(4)], atol=1e-6)


def test_a_scalar_pair_is_one_element(bert: Served) -> None:
    got = harness.results(bert, {"inputs": [{"query": QUERY, "text": TEXTS[0]}]}, scalar=True)
    assert len(got) == 1
    assert set(got[0]) == {"score"}


def test_as_many_queries_as_texts_are_pairs(bert: Served) -> None:
    queries = [QUERY, "Who?", "What is there?", "When?"]
    got = harness.results(bert, {"query": queries, "texts": TEXTS}, raw_scores=True, return_text=True)
    expected = logits(folder(), list(zip(queries, TEXTS, strict=True)))[:, 0]
    np.testing.assert_allclose([e["score"] for e in got], expected, atol=1e-4)
    assert [entry["text"] for entry in got] == TEXTS
    assert "index" not in got[0]


def test_one_text_is_still_ranked(bert: Served) -> None:
    (entry,) = harness.results(bert, {"query": [QUERY], "texts": TEXTS[:1]}, scalar=True)
    assert entry["index"] == 0


def test_a_batch_equals_pairs_alone(served: Served) -> None:
    together = harness.results(served, {"query": [QUERY], "texts": TEXTS}, raw_scores=True)
    alone = harness.results(served, {"query": [QUERY], "texts": TEXTS}, raw_scores=True, together=False)
    assert [entry["index"] for entry in together] == [entry["index"] for entry in alone]
    np.testing.assert_allclose([e["score"] for e in together], [e["score"] for e in alone], atol=1e-5)


def test_long_texts_are_cut_unless_told_not_to(bert: Served) -> None:
    expected = logits(folder(), [(QUERY, LONG)], truncation="longest_first", max_length=128)
    (entry,) = harness.results(bert, {"query": [QUERY], "texts": [LONG]}, raw_scores=True)
    assert entry["score"] == pytest.approx(expected[0, 0], abs=1e-4)
    shorter = logits(folder(), [(QUERY, LONG)], truncation="only_second", max_length=30)
    (entry,) = harness.results(
        bert, {"query": [QUERY], "texts": [LONG]}, raw_scores=True, truncation="only_second", max_length=30
    )
    assert entry["score"] == pytest.approx(shorter[0, 0], abs=1e-4)
    with pytest.raises(InvalidRequest, match=r"expected at most 128.*@ texts\[0\]"):
        harness.results(bert, {"query": [QUERY], "texts": [LONG]}, truncation=False)


def test_typed_outputs(bert: Served) -> None:
    raw = logits(folder(), [(QUERY, text) for text in TEXTS])
    got = harness.tensors(bert, ["score", "index", "logits"], {"query": [QUERY], "texts": TEXTS})
    np.testing.assert_allclose(got["score"].values, sigmoid(raw[:, 0]), atol=1e-5)
    assert got["index"].values.tolist() == np.argsort(-raw[:, 0]).tolist()
    np.testing.assert_allclose(got["logits"].values, raw, atol=1e-4)
    assert [got[name].datatype for name in got] == ["FP32", "INT64", "FP32"]
    assert [got[name].values.dtype for name in got] == [np.float32, np.int64, np.float32]
    best = harness.tensors(bert, ["index"], {"query": [QUERY], "texts": TEXTS}, top_k=2)
    assert best["index"].values.tolist() == np.argsort(-raw[:, 0])[:2].tolist()


def test_two_labels_give_the_probability_of_the_second() -> None:
    path = folder(labels=("irrelevant", "relevant"))
    both = logits(path, [(QUERY, text) for text in TEXTS])
    expected = torch.softmax(torch.from_numpy(both), dim=-1)[:, 1].numpy()
    inputs = {"inputs": [[QUERY, text] for text in TEXTS]}
    served = harness.serve(path, "text-ranking")
    got = harness.results(served, inputs)
    np.testing.assert_allclose([e["score"] for e in got], expected, atol=1e-5)
    got = harness.results(served, inputs, raw_scores=True)
    np.testing.assert_allclose([e["score"] for e in got], both[:, 1] - both[:, 0], atol=1e-4)


def test_three_labels_are_refused_at_load() -> None:
    with pytest.raises(InvalidSettings, match=r"3 labels, expected 1 .* or 2"):
        harness.serve(folder(labels=("a", "b", "c")), "text-ranking")


IDENTITY = "torch.nn.modules.linear.Identity"
SIGMOID = "torch.nn.modules.activation.Sigmoid"


@pytest.mark.parametrize(
    ("file", "saved", "activated"),
    [
        ("config_sentence_transformers.json", {"activation_fn": IDENTITY}, False),
        ("config_sentence_transformers.json", {"activation_fn": SIGMOID}, True),
        ("config_sentence_transformers.json", {"prompts": {}}, True),
        ("config.json", {"sentence_transformers": {"activation_fn": IDENTITY}}, False),
        ("config.json", {"sentence_transformers": {"activation_fn": SIGMOID}}, True),
        ("config.json", {"sbert_ce_default_activation_function": IDENTITY}, False),
        ("config.json", {"sbert_ce_default_activation_function": None}, True),
    ],
)
def test_the_saved_activation_counts(
    tmp_path: Path, file: str, saved: dict[str, Any], activated: bool
) -> None:
    path = _with_saved(tmp_path, file, saved)
    raw = logits(folder(), [(QUERY, TEXTS[0])])[0, 0]
    (entry,) = harness.results(harness.serve(path, "text-ranking"), {"inputs": [[QUERY, TEXTS[0]]]})
    assert entry["score"] == pytest.approx(sigmoid(raw) if activated else raw, abs=1e-4)


def test_an_unknown_activation_is_refused_at_load(tmp_path: Path) -> None:
    path = _with_saved(tmp_path, "config.json", {"sentence_transformers": {"activation_fn": "torch.nn.Tanh"}})
    with pytest.raises(InvalidSettings, match=r"got the activation torch.nn.Tanh, expected Sigmoid or Ident"):
        harness.serve(path, "text-ranking")


def _with_saved(tmp_path: Path, file: str, saved: dict[str, Any]) -> Path:
    path = tmp_path / "model"
    shutil.copytree(folder(), path)
    before = json.loads((path / file).read_text()) if (path / file).exists() else {}
    (path / file).write_text(json.dumps({**before, **saved}))
    return path


@pytest.mark.parametrize(
    ("inputs", "parameters", "message"),
    [
        ({}, {}, "no query, expected query and texts, or inputs @ query"),
        ({"query": [QUERY]}, {}, "no texts, expected query and texts, or inputs @ texts"),
        ({"query": [QUERY], "texts": []}, {}, "an empty batch, expected 1..1024 items @ texts"),
        (
            {"query": [QUERY, QUERY], "texts": TEXTS},
            {},
            "got 2 queries for 4 texts, expected 1 or as many @ query",
        ),
        ({"query": [QUERY], "texts": ["a", None]}, {}, "expected a text @ texts[1]"),
        ({"query": [QUERY], "texts": TEXTS, "inputs": [["a", "b"]]}, {}, "expected one of them @ inputs"),
        (
            {"inputs": [[QUERY, "a"], QUERY]},
            {},
            "expected a list of two texts, or a dict of query and text @ inputs[1]",
        ),
        ({"inputs": [[QUERY, "a", "b"]]}, {}, "expected a list of two texts"),
        ({"inputs": [{"query": QUERY, "txt": "a"}]}, {}, "got the keys ['query', 'txt']"),
        ({"inputs": [{"query": QUERY, "text": 3}]}, {}, "expected a text @ inputs[0].text"),
        ({"inputs": [[QUERY, "a"]]}, {"top_k": 1}, "expected it only with one query and its texts @ top_k"),
        ({"query": [QUERY], "texts": TEXTS}, {"top_k": 0}, "@ top_k"),
        ({"query": [QUERY], "texts": TEXTS}, {"topk": 3}, "did you mean 'top_k'?"),
    ],
)
def test_bad_requests_are_refused(
    bert: Served, inputs: dict[str, Any], parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        harness.results(bert, inputs, **parameters)
    assert message in str(refusal.value)


def test_inputs_have_aliases() -> None:
    names = {
        "documents": "texts",
        "passages": "texts",
        "args": "inputs",
        "array_inputs": "inputs",
        "pairs": "inputs",
    }
    for alias, name in names.items():
        spec = TextRanking.signature.input_named(alias)
        assert spec is not None
        assert spec.name == name
