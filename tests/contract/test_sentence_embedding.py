"""sentence-embedding: pooling of what transformers gives, and the files of sentence-transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from mlserver_hftasks.errors import InvalidRequest, InvalidSettings, RequestTooLarge
from mlserver_hftasks.loading import Served
from tests import harness, tiny

TEXTS = ["The river is wide.", "A man walked to the old town and bought bread; it was raining all day.", "hi"]
LONG = "the old town by the river " * 40

Array = np.ndarray[Any, Any]
POOLINGS: dict[str, Callable[[Array], Array]] = {
    "mean": lambda states: states.mean(axis=0),
    "cls": lambda states: states[0],
    "max": lambda states: states.max(axis=0),
    "last": lambda states: states[-1],
}


@pytest.fixture(scope="module", params=["bert", "roberta", "mpnet", "gpt2"])
def architecture(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def served(architecture: str) -> Served:
    return harness.serve(tiny.folder(architecture, "base"), "sentence-embedding")


@pytest.fixture(scope="module")
def bert() -> Served:
    return harness.serve(tiny.folder("bert", "base"), "sentence-embedding")


def states(texts: list[str], architecture: str = "bert", **tokenizer_options: Any) -> list[Array]:
    """The last hidden states of each text by itself, [tokens, hidden]."""
    path = tiny.folder(architecture, "base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModel.from_pretrained(path).eval()
    with torch.inference_mode():
        return [
            model(**tokenizer(text, return_tensors="pt", **tokenizer_options)).last_hidden_state[0].numpy()
            for text in texts
        ]


def unit(vector: Array) -> Array:
    result: Array = vector / np.linalg.norm(vector)
    return result


# -- without sentence-transformers' files --------------------------------------------------------


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling(served: Served, architecture: str, pooling: str) -> None:
    expected = [POOLINGS[pooling](array) for array in states(TEXTS, architecture)]
    got = harness.results(served, {"inputs": TEXTS}, pooling=pooling)
    alone = harness.results(served, {"inputs": TEXTS}, pooling=pooling, together=False)
    assert len(got) == 3
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_allclose(got, alone, atol=1e-5)
    assert np.abs(got[0] - got[2]).max() > 1e-2


def test_plain_folders_give_the_mean_without_normalisation(bert: Served) -> None:
    got = harness.results(bert, {"inputs": TEXTS})
    np.testing.assert_allclose(got, [array.mean(axis=0) for array in states(TEXTS)], atol=1e-5)


def test_rows_that_select_positions_do_not_share_batches_with_others(bert: Served) -> None:
    def keys(pooling: str) -> set[Any]:
        parameters = bert.task.signature.parse({"pooling": pooling})
        examples = bert.task.examples({"inputs": TEXTS}, parameters)
        return {(row.key, row.select is None) for example in examples for row in example.rows}

    assert keys("mean") == keys("max") == {(None, True)}
    assert keys("cls") == keys("last") == {(("select", 1), False)}


def test_normalize_and_truncate_dim(bert: Served) -> None:
    means = [array.mean(axis=0) for array in states(TEXTS)]
    got = harness.results(bert, {"inputs": TEXTS}, normalize=True)
    np.testing.assert_allclose(got, [unit(mean) for mean in means], atol=1e-5)
    got = harness.results(bert, {"inputs": TEXTS}, truncate_dim=8)
    np.testing.assert_allclose(got, [mean[:8] for mean in means], atol=1e-5)
    got = harness.results(bert, {"inputs": TEXTS}, truncate_dim=8, normalize=True)
    np.testing.assert_allclose(got, [unit(mean[:8]) for mean in means], atol=1e-5)


def test_a_scalar_and_a_list_of_one_are_one_vector(bert: Served) -> None:
    for scalar in (True, False):
        (vector,) = harness.results(bert, {"inputs": TEXTS[:1]}, scalar=scalar)
        assert vector.shape == (32,)
        assert vector.dtype == np.float32


def test_typed_output(bert: Served) -> None:
    tensor = harness.tensors(bert, ["embedding"], {"inputs": TEXTS})["embedding"]
    assert (tensor.datatype, tensor.values.dtype, tensor.values.shape) == ("FP32", np.float32, (3, 32))
    np.testing.assert_array_equal(tensor.values, harness.results(bert, {"inputs": TEXTS}))


def test_long_texts_are_cut_unless_told_not_to(bert: Served) -> None:
    (expected,) = states([LONG], truncation=True, max_length=128)
    (got,) = harness.results(bert, {"inputs": [LONG]})
    np.testing.assert_allclose(got, expected.mean(axis=0), atol=1e-5)
    (expected,) = states([LONG], truncation=True, max_length=20)
    (got,) = harness.results(bert, {"inputs": [LONG]}, max_length=20)
    np.testing.assert_allclose(got, expected.mean(axis=0), atol=1e-5)
    with pytest.raises(InvalidRequest, match="expected at most 128"):
        harness.results(bert, {"inputs": [LONG]}, truncation=False)


def test_a_prompt_goes_before_each_text(bert: Served) -> None:
    got = harness.results(bert, {"inputs": TEXTS}, prompt="query: ")
    plain = harness.results(bert, {"inputs": ["query: " + text for text in TEXTS]})
    np.testing.assert_array_equal(got, plain)
    for name in ("query", "document"):
        empty = harness.results(bert, {"inputs": TEXTS}, prompt_name=name)
        np.testing.assert_array_equal(empty, harness.results(bert, {"inputs": TEXTS}))


# -- with them -----------------------------------------------------------------------------------

FLAGS = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": False}


def saved(folder: Path, pooling: dict[str, Any], *modules: str, **files: Any) -> Path:
    """The tiny model as sentence-transformers saves it; `modules` follow the pooling."""
    path = folder / "model"
    shutil.copytree(tiny.folder("bert", "base"), path)
    kinds = ["Transformer", "Pooling", *modules]
    places = ["", *(f"{index}_{kind}" for index, kind in enumerate(kinds) if index)]
    entries = [
        {"idx": index, "name": str(index), "path": place, "type": f"sentence_transformers.models.{kind}"}
        for index, (kind, place) in enumerate(zip(kinds, places, strict=True))
    ]
    files = {"modules": entries, "1_Pooling/config": pooling, **files}
    for name, content in files.items():
        (path / f"{name}.json").parent.mkdir(exist_ok=True)
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({**FLAGS, "pooling_mode_mean_tokens": True}, "mean"),
        ({**FLAGS, "pooling_mode_cls_token": True}, "cls"),
        ({**FLAGS, "pooling_mode_max_tokens": True}, "max"),
        ({**FLAGS, "pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "cls", "embedding_dimension": 32}, "cls"),
        ({"pooling_mode": ["lasttoken"]}, "last"),
        ({}, "mean"),
    ],
)
def test_the_files_say_how_to_pool(tmp_path: Path, config: dict[str, Any], pooling: str) -> None:
    served = harness.serve(saved(tmp_path, config), "sentence-embedding")
    expected = [POOLINGS[pooling](array) for array in states(TEXTS)]
    np.testing.assert_allclose(harness.results(served, {"inputs": TEXTS}), expected, atol=1e-5)


def test_the_files_say_whether_to_normalise_and_the_request_may_differ(tmp_path: Path) -> None:
    served = harness.serve(saved(tmp_path, {"pooling_mode": "cls"}, "Normalize"), "sentence-embedding")
    first = [array[0] for array in states(TEXTS)]
    got = harness.results(served, {"inputs": TEXTS})
    np.testing.assert_allclose(got, [unit(vector) for vector in first], atol=1e-5)
    got = harness.results(served, {"inputs": TEXTS}, normalize=False)
    np.testing.assert_allclose(got, first, atol=1e-5)
    got = harness.results(served, {"inputs": TEXTS}, pooling="mean")
    np.testing.assert_allclose(got, [unit(array.mean(axis=0)) for array in states(TEXTS)], atol=1e-5)


def test_the_files_say_how_long_texts_are_and_their_case(tmp_path: Path) -> None:
    options = {"max_seq_length": 10, "do_lower_case": True}
    served = harness.serve(saved(tmp_path, {}, sentence_bert_config=options), "sentence-embedding")
    (expected,) = states([LONG], truncation=True, max_length=10)
    (got,) = harness.results(served, {"inputs": [LONG]})
    np.testing.assert_allclose(got, expected.mean(axis=0), atol=1e-5)
    (expected,) = states([LONG], truncation=True, max_length=40)
    (got,) = harness.results(served, {"inputs": [LONG]}, max_length=40)
    np.testing.assert_allclose(got, expected.mean(axis=0), atol=1e-5)
    parameters = served.task.signature.parse({})
    upper, lower = served.task.examples({"inputs": ["[CLS] HI", "[cls] hi"]}, parameters)
    assert upper.rows[0].arrays["input_ids"].tolist() == lower.rows[0].arrays["input_ids"].tolist()


def test_prompts_of_the_files(tmp_path: Path) -> None:
    prompts = {"prompts": {"query": "search: ", "passage": "text: "}, "default_prompt_name": "passage"}
    served = harness.serve(saved(tmp_path, {}, config_sentence_transformers=prompts), "sentence-embedding")

    def embed(prefix: str) -> list[Array]:
        return [array.mean(axis=0) for array in states([prefix + text for text in TEXTS])]

    np.testing.assert_allclose(harness.results(served, {"inputs": TEXTS}), embed("text: "), atol=1e-5)
    got = harness.results(served, {"inputs": TEXTS}, prompt_name="query")
    np.testing.assert_allclose(got, embed("search: "), atol=1e-5)
    got = harness.results(served, {"inputs": TEXTS}, prompt="")
    np.testing.assert_allclose(got, embed(""), atol=1e-5)
    with pytest.raises(
        InvalidRequest, match=r"unknown prompt 'pasage', did you mean 'passage'\? @ prompt_name"
    ):
        harness.results(served, {"inputs": TEXTS}, prompt_name="pasage")


def test_dense_modules(tmp_path: Path) -> None:
    weight, bias = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)), torch.arange(5.0)
    config = {"in_features": 32, "out_features": 5, "activation_function": "torch.nn.modules.activation.Tanh"}
    path = saved(tmp_path, {}, "Dense", "Normalize", **{"2_Dense/config": config})
    save_file({"linear.weight": weight.bfloat16(), "linear.bias": bias}, path / "2_Dense/model.safetensors")
    served = harness.serve(path, "sentence-embedding")
    means = [array.mean(axis=0) for array in states(TEXTS)]
    matrix = weight.bfloat16().float().numpy()
    expected = [unit(np.tanh(matrix @ mean + bias.numpy())) for mean in means]
    np.testing.assert_allclose(harness.results(served, {"inputs": TEXTS}), expected, atol=1e-5)
    with pytest.raises(InvalidRequest, match=r"got 6, expected 1\.\.5 @ truncate_dim"):
        harness.results(served, {"inputs": TEXTS}, truncate_dim=6)


DENSE = {"in_features": 32, "out_features": 5, "activation_function": "torch.nn.modules.activation.Tanh"}


@pytest.mark.parametrize(
    ("pooling", "modules", "files", "message"),
    [
        (
            {**FLAGS, "pooling_mode_weightedmean_tokens": True},
            (),
            {},
            "got the pooling ['weightedmean'], expected one of mean",
        ),
        ({"pooling_mode": ["cls", "mean"]}, (), {}, "got the pooling ['cls', 'mean'], expected one of mean"),
        ({"include_prompt": False}, (), {}, "@ 1_Pooling/config.json: include_prompt"),
        ({}, ("LSTM",), {}, "got the modules Transformer, Pooling, LSTM, expected"),
        ({}, ("Normalize", "Dense"), {}, "got the modules Transformer, Pooling, Normalize, Dense, expected"),
        ({}, ("Dense",), {"2_Dense/config": {**DENSE, "use_residual": True}}, "without residual"),
        (
            {},
            ("Dense",),
            {"2_Dense/config": {"activation_function": "torch.nn.GELU"}},
            "an activation of Identity",
        ),
        (
            {},
            ("Dense",),
            {"2_Dense/config": DENSE},
            "no safetensors, expected the weights of the Dense module",
        ),
        ({}, ("Dense",), {}, "@ 2_Dense/config.json"),
    ],
)
def test_what_is_not_served_is_refused_at_load(
    tmp_path: Path, pooling: dict[str, Any], modules: tuple[str, ...], files: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidSettings) as refusal:
        harness.serve(saved(tmp_path, pooling, *modules, **files), "sentence-embedding")
    assert message in str(refusal.value)
    assert str(tmp_path) not in str(refusal.value)


# -- bad requests --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "parameters", "message"),
    [
        ({}, {}, "an empty batch, expected 1..1024 items @ inputs"),
        ({"inputs": ["fine", {"text": "no"}]}, {}, "expected a text @ inputs[1]"),
        (
            {"inputs": TEXTS},
            {"pooling": "average"},
            "expected: input should be 'mean', 'cls', 'max' or 'last' @ pooling",
        ),
        ({"inputs": TEXTS}, {"truncate_dim": 33}, "got 33, expected 1..32 @ truncate_dim"),
        ({"inputs": TEXTS}, {"truncate_dim": 0}, "@ truncate_dim"),
        ({"inputs": TEXTS}, {"prompt": "a", "prompt_name": "query"}, "expected one of them @ prompt_name"),
        ({"inputs": TEXTS}, {"prompt_name": "qurey"}, "did you mean 'query'? @ prompt_name"),
        ({"inputs": TEXTS}, {"max_length": 129}, "expected 1..128 @ max_length"),
        ({"inputs": TEXTS}, {"normalise": True}, "did you mean 'normalize'?"),
    ],
)
def test_bad_requests_are_refused(
    bert: Served, inputs: dict[str, Any], parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        harness.results(bert, inputs, **parameters)
    assert message in str(refusal.value)


def test_a_prompt_over_the_limit_is_refused() -> None:
    served = harness.serve(tiny.folder("bert", "base"), "sentence-embedding", max_text_chars=50)
    with pytest.raises(RequestTooLarge, match="a text of 51 characters, expected at most 50 @ prompt"):
        harness.results(served, {"inputs": ["hi"]}, prompt="x" * 51)
