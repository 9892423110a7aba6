"""A row's answer does not depend on padding, packing or neighbours, whatever the architecture."""

from __future__ import annotations

import functools
import gc
import logging
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AttentionInterface, AutoConfig, AutoModel, BertModel

from mlserver_hftasks.backends import probe
from mlserver_hftasks.backends import torch as torch_backend
from mlserver_hftasks.backends.base import Head, Level
from mlserver_hftasks.backends.packing import Backbone
from mlserver_hftasks.backends.torch import TorchBackend
from mlserver_hftasks.backends.varlen import ATTENTION_NAME, varlen_attention
from mlserver_hftasks.engine.rows import Outputs, Row
from tests import tiny

CPU = torch.device("cpu")
LENGTHS = (1, 60, 2, 33, 7, 126, 19, 1, 5)
LAYOUTS = {"mpnet": "block", "deberta-v2": "padded", "bart": "padded"}
"""All others run as `varlen`."""
CASES = [(architecture, head) for architecture, family in tiny.FAMILIES.items() for head in family.heads]
BASES = [(architecture, "base") for architecture, family in tiny.FAMILIES.items() if "base" in family.heads]
HEADS = {
    "sequence": Head(tiny.AUTO_CLASSES["sequence"], {"logits": Level.SEQUENCE}),
    "token": Head(tiny.AUTO_CLASSES["token"], {"logits": Level.TOKEN}),
    "mask": Head(tiny.AUTO_CLASSES["mask"], {"logits": Level.TOKEN}),
    "qa": Head(tiny.AUTO_CLASSES["qa"], {"start_logits": Level.TOKEN, "end_logits": Level.TOKEN}),
    "base": Head(tiny.AUTO_CLASSES["base"], {"last_hidden_state": Level.TOKEN}),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def load(architecture: str, head: str, **config: Any) -> Any:
    folder = tiny.folder(architecture, head, **config)  # type: ignore[arg-type]
    return getattr(transformers, tiny.AUTO_CLASSES[head]).from_pretrained(folder)


def serve(
    architecture: str, head: str, *, packing: bool, model: Any = None, device: torch.device = CPU
) -> Any:
    return TorchBackend(
        load(architecture, head) if model is None else model,
        HEADS[head],
        device=device,
        pad_token_id=tiny.tokenizer_of(architecture).pad_token_id,
        packing=packing,
        probe=rows_of(architecture, (1, 40, 12, 90), seed=1, padding_inside=False),
    )


@functools.cache
def backend(architecture: str, head: str, *, packing: bool = True) -> TorchBackend:
    made: TorchBackend = serve(architecture, head, packing=packing)
    return made


def rows_of(
    architecture: str, lengths: Sequence[int] = LENGTHS, seed: int = 0, *, padding_inside: bool = True
) -> list[Row]:
    """Rows of random tokens with the padding token inside, which ends at the end-of-text token for BART."""
    tokenizer = tiny.tokenizer_of(architecture)
    generator = np.random.default_rng(seed)
    rows = []
    for length in lengths:
        ids = generator.integers(len(tokenizer.all_special_ids), len(tokenizer), length)
        if length >= 5 and padding_inside:
            ids[length // 2] = tokenizer.pad_token_id
        if architecture == "bart":
            ids[-1] = tokenizer.eos_token_id
        arrays = {"input_ids": ids}
        if tiny.FAMILIES[architecture].token_types:
            arrays["token_type_ids"] = (np.arange(length) > length // 3).astype(np.int64)
        rows.append(Row(arrays))
    return rows


def assert_close(got: Sequence[Outputs], wanted: Sequence[Outputs], tolerance: float = 1e-5) -> None:
    for of_got, of_wanted in zip(got, wanted, strict=True):
        assert of_got.keys() == of_wanted.keys()
        for name, array in of_wanted.items():
            assert of_got[name].shape == array.shape
            assert of_got[name].dtype == np.float32
            scale = max(1.0, float(np.abs(array).max()))
            np.testing.assert_allclose(of_got[name], array, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("architecture", ["bart"])
def test_a_classifier_that_reads_at_a_token_may_meet_it_anywhere(architecture: str) -> None:
    """BART's head reads at the end-of-text token, and takes a batch to have as many of it in each row.

    A client who writes the token must neither fail a neighbour nor get a neighbour's answer.
    """
    rows = rows_of(architecture, (9, 12, 15, 10, 14), padding_inside=False)
    for row, places in zip(rows, ((), (3,), (2, 5), (4,), (1,)), strict=True):
        row.arrays["input_ids"][list(places)] = tiny.tokenizer_of(architecture).eos_token_id
    served = backend(architecture, "sequence")
    assert_close(served.forward(rows), [served.forward([row])[0] for row in rows])


# -- every architecture with every head ----------------------------------------------------------


@pytest.mark.parametrize(("architecture", "head"), CASES)
def test_layout(architecture: str, head: str) -> None:
    packed = backend(architecture, head)
    assert packed.description.packing == LAYOUTS.get(architecture, "varlen")
    assert packed.padded == (packed.description.packing == "padded")
    assert backend(architecture, head, packing=False).description.packing == "padded"


@pytest.mark.parametrize(("architecture", "head"), CASES)
def test_packed_equals_padded(architecture: str, head: str) -> None:
    rows = rows_of(architecture)
    wanted = backend(architecture, head, packing=False).forward(rows)
    assert_close(backend(architecture, head).forward(rows), wanted)
    flat = np.concatenate([next(iter(outputs.values())).ravel()[:2] for outputs in wanted])
    assert len(np.unique(flat.round(3))) > len(rows)  # or else this test would prove nothing


@pytest.mark.parametrize(("architecture", "head"), CASES)
def test_batch_equals_singles_in_any_order(architecture: str, head: str) -> None:
    rows = rows_of(architecture, seed=2)
    served = backend(architecture, head)
    alone = [served.forward([row])[0] for row in rows]
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(rows))
        assert_close(served.forward([rows[i] for i in order]), [alone[i] for i in order])
    assert_close(served.forward(rows[:4]), alone[:4])


@pytest.mark.parametrize(("architecture", "head"), CASES)
def test_neighbours_do_not_matter(architecture: str, head: str) -> None:
    rows = rows_of(architecture)
    others = rows_of(architecture, seed=5)
    mixed = [row if index % 2 else others[index] for index, row in enumerate(rows)]
    served = backend(architecture, head)
    assert_close(served.forward(mixed)[1::2], served.forward(rows)[1::2], 1e-6)


@pytest.mark.parametrize(("architecture", "head"), [case for case in CASES if case[1] != "sequence"])
def test_select_gives_what_all_positions_give(architecture: str, head: str) -> None:
    rows = rows_of(architecture)
    generator = np.random.default_rng(3)
    chosen = [generator.integers(0, row.cost, 1 + index % 4) for index, row in enumerate(rows)]
    selected = [replace(row, select=select) for row, select in zip(rows, chosen, strict=True)]
    for packing in (True, False):
        served = backend(architecture, head, packing=packing)
        wanted = [
            {name: array[select] for name, array in outputs.items()}
            for outputs, select in zip(served.forward(rows), chosen, strict=True)
        ]
        assert_close(served.forward(selected), wanted)
        assert_close(served.forward(rows), backend(architecture, head, packing=packing).forward(rows))


def test_select_is_all_or_none() -> None:
    first, second = rows_of("bert", (3, 4))
    with pytest.raises(ValueError, match="select"):
        backend("bert", "mask").forward([first, replace(second, select=np.array([1]))])


@pytest.mark.parametrize(("architecture", "head"), BASES)
def test_bfloat16(architecture: str, head: str) -> None:
    rows = rows_of(architecture)
    packed = serve(architecture, head, packing=True, model=load(architecture, head).bfloat16())
    padded = serve(architecture, head, packing=False, model=load(architecture, head).bfloat16())
    assert packed.description.dtype == "bfloat16"
    assert packed.description.packing == LAYOUTS.get(architecture, "varlen")
    alone = [padded.forward([row])[0] for row in rows]
    for outputs, wanted in zip(packed.forward(rows), alone, strict=True):
        array = wanted["last_hidden_state"]
        assert np.abs(outputs["last_hidden_state"] - array).max() <= 6e-2 * np.abs(array).max()


# -- heads and configs with ways of their own ----------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("modernbert", {"classifier_pooling": "mean"}),
        ("modernbert", {"classifier_pooling": "cls"}),
        ("eurobert", {"classifier_pooling": "mean"}),
        ("eurobert", {"classifier_pooling": "bos"}),
        ("llama", {"num_key_value_heads": 2}),
        ("bert", {"num_attention_heads": 4}),
        ("xlm-roberta", {"type_vocab_size": 2}),
    ],
)
def test_pooling_and_shapes(architecture: str, config: dict[str, Any]) -> None:
    packed, padded = (
        serve(architecture, "sequence", packing=packing, model=load(architecture, "sequence", **config))
        for packing in (True, False)
    )
    rows = rows_of(architecture)
    assert packed.description.packing == "varlen"
    assert_close(packed.forward(rows), padded.forward(rows))


_COMMON = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 160,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 1, "head_dim": 16}
FURTHER: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("varlen", {**_GROUPED, "sliding_window": 16}),
    "qwen2": (
        "varlen",
        {**_GROUPED, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "qwen3": ("varlen", _GROUPED),
    "gemma3_text": ("varlen", {**_GROUPED, "sliding_window": 16, "use_bidirectional_attention": True}),
    "esm": (
        "varlen",
        {**_COMMON, "pad_token_id": 1, "mask_token_id": 5, "position_embedding_type": "rotary"},
    ),
    "data2vec-text": ("varlen", {**_COMMON, "pad_token_id": 1}),
    "megatron-bert": ("block", _COMMON),
    "gemma2": ("padded", {**_GROUPED, "sliding_window": 16}),  # soft caps on its attention
    "roformer": ("padded", _COMMON),
    "fnet": ("single", {key: _COMMON[key] for key in _COMMON if key != "num_attention_heads"}),
    "convbert": ("single", _COMMON),  # its convolutions see the padding
}


@pytest.mark.parametrize("architecture", FURTHER)
def test_further_architectures(architecture: str) -> None:
    layout, config = FURTHER[architecture]
    model = AutoModel.from_config(AutoConfig.for_model(architecture, **config))
    tiny.fill_weights(model, seed=1)
    served = TorchBackend(model, HEADS["base"], device=CPU, pad_token_id=config["pad_token_id"])
    assert served.description.packing == layout
    generator = np.random.default_rng(4)
    rows = [Row({"input_ids": generator.integers(6, 300, length)}) for length in (1, 60, 2, 33, 150, 7)]
    assert_close(served.forward(rows), [served.forward([row])[0] for row in rows])


def test_block_layout_bounds_the_square(monkeypatch: pytest.MonkeyPatch) -> None:
    served = backend("mpnet", "token")
    rows = rows_of("mpnet")
    wanted = served.forward(rows)
    calls: list[int] = []
    forward = served._forward
    monkeypatch.setattr(served, "_forward", lambda part: calls.append(len(part)) or forward(part))
    monkeypatch.setitem(torch_backend.BLOCK_TOKENS, "cpu", 64)
    assert_close(served.forward(rows), wanted)
    assert calls == [3, 2, 1, 3]


# -- what must not be packed ---------------------------------------------------------------------


class _Swallowing(BertModel):
    """Hands neither the boundaries nor a block-diagonal mask on to its layers, and raises nothing."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        kwargs.pop("sequences", None)
        if attention_mask is not None and attention_mask.ndim > 2:
            attention_mask = None
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


class _Blind(BertModel):
    """Ignores every mask."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        kwargs.pop("sequences", None)
        return super().forward(input_ids=input_ids, **kwargs)


def _full_attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    """Takes `sequences` and forgets about it."""
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=kwargs.get("scaling"))
    return output.transpose(1, 2), None


def _leaking_attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    """A little of the neighbours, too little for bfloat16 to tell from noise."""
    apart, _ = varlen_attention(module, query, key, value, mask, **kwargs)
    mixed, _ = _full_attention(module, query, key, value, mask, **kwargs)
    return apart + 0.01 * (mixed - apart), None


def _short_sighted_attention(
    module: Any, *states: Any, sliding_window: int | None = None, **kwargs: Any
) -> Any:
    window = None if sliding_window is None else sliding_window - 1
    return varlen_attention(module, *states, sliding_window=window, **kwargs)


@pytest.fixture
def attention(request: pytest.FixtureRequest) -> Iterator[None]:
    AttentionInterface.register(ATTENTION_NAME, request.param)
    yield
    AttentionInterface.register(ATTENTION_NAME, varlen_attention)


@pytest.mark.parametrize(("broken", "layout"), [(_Swallowing, "padded"), (_Blind, "single")])
@pytest.mark.parametrize(
    "attention", [varlen_attention, _full_attention], indirect=True, ids=["ours", "full"]
)
def test_swallowed_boundaries_are_noticed(
    attention: None,
    broken: type[BertModel],
    layout: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = broken.from_pretrained(tiny.folder("bert", "base"))
    monkeypatch.setattr(torch_backend, "logger", logging.getLogger("packing"))
    with caplog.at_level(logging.INFO, logger="packing"):
        served = serve("bert", "base", packing=True, model=model)
    assert served.description.packing == layout
    assert f"cannot be packed; its rows run {layout}" in caplog.text
    rows = rows_of("bert")
    assert_close(served.forward(rows), [served.forward([row])[0] for row in rows])


@pytest.mark.parametrize("attention", [_full_attention, _leaking_attention], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["bert", "llama", "modernbert"])
def test_leaks_are_noticed_in_any_dtype(attention: None, dtype: torch.dtype, architecture: str) -> None:
    served = serve(architecture, "base", packing=True, model=load(architecture, "base").to(dtype))
    assert served.description.packing != "varlen"


@pytest.mark.parametrize("attention", [_short_sighted_attention], indirect=True)
def test_wrong_window_is_noticed_though_it_is_longer_than_the_probe(attention: None) -> None:
    model = load("modernbert", "base", local_attention=300, max_position_embeddings=512)
    assert serve("modernbert", "base", packing=True, model=model).description.packing != "varlen"


def test_positions_that_count_the_padding_token_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right for every text but one in which a client wrote the padding token."""
    monkeypatch.setattr(Backbone, "_positions", lambda self, input_ids, mask: mask.cumsum(1) + 1)
    assert serve("roberta", "base", packing=True).description.packing == "padded"


def test_hard_rows() -> None:
    config = AutoConfig.for_model("bert", sliding_window=100, max_position_embeddings=300)
    types = np.zeros(9, dtype=np.int64)
    plain = [Row({"input_ids": np.arange(1, n + 1), "token_type_ids": types[:n]}) for n in (1, 9, 3)]
    one, long, three = probe.hard_rows(plain, config, pad_token_id=0)
    assert one.arrays["input_ids"].tolist() == [1]
    assert three.arrays["input_ids"].tolist() == [1, 2, 3]
    assert long.cost == 109
    assert long.arrays["input_ids"][[0, -1]].tolist() == [1, 9]
    assert np.flatnonzero(long.arrays["input_ids"] == 0).tolist() == [54]
    assert long.arrays["token_type_ids"].sum() == 109 - 54
    assert plain[1].arrays["token_type_ids"].sum() == 0  # the rows given are left as they were
    untyped = AutoConfig.for_model("bert", type_vocab_size=1)
    assert probe.hard_rows(plain, untyped, 0)[1].arrays["token_type_ids"].sum() == 0


# -- memory, and other devices -------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "mpnet"])
def test_close_gives_the_memory_back_at_once(architecture: str) -> None:
    model = load(architecture, "sequence")
    served = serve(architecture, "sequence", packing=True, model=model)
    served.forward(rows_of(architecture))
    weights = weakref.ref(next(model.parameters()))
    gc.disable()
    try:
        del model
        served.close()
        assert weights() is None
    finally:
        gc.enable()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("architecture", "head"), BASES)
def test_cuda(architecture: str, head: str, dtype: torch.dtype) -> None:
    """Half precision runs the fused kernel, float32 one kernel per row; both against padded float32."""
    device = torch.device("cuda")
    packed = serve(architecture, head, packing=True, model=load(architecture, head).to(dtype), device=device)
    assert packed.description.packing == LAYOUTS.get(architecture, "varlen")
    rows = rows_of(architecture)
    tolerance = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    reference = [backend(architecture, head, packing=False).forward([row])[0] for row in rows]
    for outputs, wanted in zip(packed.forward(rows), reference, strict=True):
        array = wanted["last_hidden_state"]
        assert np.abs(outputs["last_hidden_state"] - array).max() <= tolerance * np.abs(array).max()
