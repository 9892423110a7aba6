"""The last layer computes the tokens that the head reads: the same answers, and no others computed."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, BertForSequenceClassification

from mlserver_hftasks.backends import early
from mlserver_hftasks.backends.base import Head, Level
from mlserver_hftasks.backends.gradients import PathRow
from mlserver_hftasks.backends.torch import TorchBackend
from mlserver_hftasks.engine.rows import Row
from tests import harness, tiny
from tests.contract.test_packing import (
    CPU,
    FURTHER,
    HEADS,
    assert_close,
    load,
    one_thread,
    rows_of,
    serve,
)

__all__ = ["one_thread"]

KNOWN = ("bert", "distilbert", "roberta", "xlm-roberta", "camembert", "electra", "ernie")
UNKNOWN = ("mpnet", "albert", "modernbert", "deberta-v2", "gpt2", "llama")
FEED_FORWARD = {"distilbert": "ffn.lin1"}


@contextmanager
def all_tokens(served: Any) -> Iterator[None]:
    """With the full last layer."""
    first = served._backbone.reads_first
    served._backbone.read_all()
    yield
    assert served._backbone.read_early(first=first)


def tokens_computed(served: Any, architecture: str, rows: list[Row]) -> int:
    """Tokens that the last feed-forward network sees."""
    seen: list[int] = []
    (stack,) = (
        module for module in served._model.base_model.modules() if type(module).__name__ == "ModuleList"
    )
    layer = stack[-1].get_submodule(FEED_FORWARD.get(architecture, "intermediate.dense"))
    hook = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[:-1].numel()))
    served.forward(rows)
    hook.remove()
    (count,) = seen
    return count


def selecting(rows: list[Row], *, count: int = 2) -> list[Row]:
    generator = np.random.default_rng(3)
    return [replace(row, select=generator.integers(0, row.cost, 1 + i % count)) for i, row in enumerate(rows)]


@pytest.mark.parametrize("architecture", KNOWN)
@pytest.mark.parametrize("plain", [False, True], ids=["inputs", "keys"])
def test_a_classifier_computes_the_first_token_only(
    architecture: str, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    served, rows = serve(architecture, "sequence", packing=True), rows_of(architecture)
    if plain:
        monkeypatch.setattr(early, "_cheap", lambda *arguments: False)
    assert tokens_computed(served, architecture, rows) == len(rows)
    got, alone = served.forward(rows), [served.forward([row])[0] for row in rows]
    with all_tokens(served):
        wanted = served.forward(rows)
        assert tokens_computed(served, architecture, rows) == sum(row.cost for row in rows)
    assert_close(got, wanted)
    assert_close(alone, wanted)


@pytest.mark.parametrize("head", ["mask", "base"])
@pytest.mark.parametrize("architecture", ["bert", "distilbert", "roberta"])
def test_selected_tokens(architecture: str, head: str) -> None:
    served, rows = serve(architecture, head, packing=True), rows_of(architecture)
    for chosen in (selecting(rows), selecting(rows, count=1), selecting(rows[:1])):
        most = max(len(row.select) for row in chosen if row.select is not None)
        assert tokens_computed(served, architecture, chosen) == len(chosen) * most
        got = served.forward(chosen)
        with all_tokens(served):
            assert_close(got, served.forward(chosen))
    assert tokens_computed(served, architecture, rows) == sum(row.cost for row in rows)


@pytest.mark.parametrize("architecture", UNKNOWN)
def test_other_structures_keep_their_last_layer(architecture: str) -> None:
    assert serve(architecture, "sequence", packing=True)._backbone._early is None


class _Mean(BertForSequenceClassification):
    """Reads all tokens where others read the first."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        outputs = self.bert(input_ids, attention_mask=attention_mask, **kwargs)
        hidden, mask = outputs.last_hidden_state, attention_mask[:, :, None]
        outputs["logits"] = self.classifier((hidden * mask).sum(1) / mask.sum(1))
        return outputs


def test_a_head_that_reads_more_is_noticed() -> None:
    served = serve("bert", "sequence", packing=True, model=load_as(_Mean))
    assert served.description.packing == "varlen"
    assert served._backbone._early is None
    rows = rows_of("bert")
    assert_close(served.forward(rows), [served.forward([row])[0] for row in rows])


def load_as(kind: Any) -> Any:
    return kind.from_pretrained(tiny.folder("bert", "sequence"))


def test_a_layer_that_only_looks_alike_is_noticed() -> None:
    """It has the modules of BERT's under their names, and normalises before, not after."""
    config = AutoConfig.for_model("roberta-prelayernorm", **{**FURTHER["data2vec-text"][1]})
    model = AutoModel.from_config(config)
    tiny.fill_weights(model, seed=1)
    assert early.STRUCTURES[0].fits(model.encoder.layer[-1])
    served = TorchBackend(model, HEADS["base"], device=CPU, pad_token_id=1)
    assert served._backbone._early is None


def test_a_decoder_is_left_alone() -> None:
    """Where tokens see those before them only, queries by themselves do not say which those are."""
    config = AutoConfig.for_model("bert", is_decoder=True, **FURTHER["megatron-bert"][1])
    model = AutoModel.from_config(config)
    tiny.fill_weights(model, seed=1)
    served = TorchBackend(model, HEADS["base"], device=CPU, pad_token_id=0)
    assert served.description.packing == "varlen"
    assert served._backbone._early is None


@pytest.mark.parametrize("settings", [{"dtype": "bfloat16"}, {"quantization": "int8"}], ids=str)
@pytest.mark.parametrize("architecture", ["bert", "distilbert"])
def test_other_precisions(architecture: str, settings: Any) -> None:
    folder = tiny.folder(architecture, "sequence")  # type: ignore[arg-type]
    served: Any = harness.serve(folder, "text-classification", **settings).backend
    rows = rows_of(architecture)
    assert reads_first(served)
    got = served.forward(rows)
    with all_tokens(served):
        assert_close(got, served.forward(rows), 6e-2 if "dtype" in settings else 1e-4)


def reads_first(served: Any) -> bool:
    return served._backbone._early is not None and served._backbone.reads_first


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "roberta"])
def test_gradients_are_those_of_the_full_layer(architecture: str) -> None:
    served, rows = serve(architecture, "sequence", packing=True), rows_of(architecture)
    points = [
        PathRow(
            row.arrays,
            alpha=0.3,
            absent=5,
            kept=np.zeros(row.cost, dtype=np.bool_),
            score=lambda outputs: outputs["logits"],
        )
        for row in rows
    ]
    paths = served.gradients()
    assert paths._clone._backbone._early is not None
    assert paths._clone._backbone._early is not served._backbone._early
    got = paths.forward(points)
    with all_tokens(paths._clone):
        wanted = paths.forward(points)
    assert all(np.abs(outputs["contribution"]).max() > 1e-3 for outputs in wanted[1:])
    assert_close(got, wanted)


def test_a_layer_that_somebody_stands_in_for_is_left_alone() -> None:
    model = load("bert", "sequence")
    layer = model.bert.encoder.layer[-1]
    layer.forward = moved = functools.partial(type(layer).forward, layer)
    served = serve("bert", "sequence", packing=True, model=model)
    assert served._backbone._early is None
    served.close()
    assert layer.forward is moved


def test_a_layer_gets_its_own_forward_back() -> None:
    model = load("bert", "sequence")
    served = serve("bert", "sequence", packing=True, model=model)
    layer, weights = weakref.ref(model.bert.encoder.layer[-1]), weakref.ref(next(model.parameters()))
    assert "forward" in vars(layer())
    gc.disable()
    try:
        served.close()
        assert "forward" not in vars(layer())
        del model
        assert weights() is None
    finally:
        gc.enable()


def test_a_head_over_rows_and_tokens_reads_all() -> None:
    head = Head(
        tiny.AUTO_CLASSES["base"], {"last_hidden_state": Level.TOKEN, "pooler_output": Level.SEQUENCE}
    )
    served = TorchBackend(load("bert", "base"), head, device=CPU, pad_token_id=0)
    assert served._backbone._early is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["bert", "distilbert"])
def test_cuda(architecture: str, dtype: torch.dtype) -> None:
    model = load(architecture, "sequence").to(dtype)
    served = serve(architecture, "sequence", packing=True, model=model, device=torch.device("cuda"))
    rows = rows_of(architecture)
    assert tokens_computed(served, architecture, rows) == len(rows)
    got = served.forward(rows)
    with all_tokens(served):
        assert_close(got, served.forward(rows), 1e-3 if dtype is torch.float32 else 6e-2)
