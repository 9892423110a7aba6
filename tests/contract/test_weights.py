"""Quantized models that generate: the same model, in steps as before, each row as it is alone."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from mlserver_hftasks.backends.linears import _Alone, _Part
from mlserver_hftasks.errors import InvalidSettings
from mlserver_hftasks.loading import Served
from tests import harness, tiny
from tests.contract.test_packing import one_thread
from tests.contract.test_text_generation import PROMPTS, answered, together

__all__ = ["one_thread"]

DECODERS, FOLLOWERS = ("gpt2", "llama"), ("t5", "marian")
MOST = {"int8": 0.12, "int8-weight-only": 0.12, "int4-weight-only": 0.8}
"""Largest difference of the logits, as a share of their norm. A weight of a tiny model counts for much."""
NAMES = tuple(MOST)


@functools.cache
def decoder(architecture: str, quantization: str, dtype: str = "auto") -> Served:
    folder = tiny.folder(architecture, "causal")  # type: ignore[arg-type]
    return harness.serve(folder, "text-generation", quantization=quantization, dtype=dtype)


@functools.cache
def follower(architecture: str, quantization: str) -> Served:
    return harness.serve(tiny.folder(architecture, "seq2seq"), "summarization", quantization=quantization)


def logits(served: Served) -> torch.Tensor:
    model: Any = served.backend._model  # type: ignore[attr-defined]
    ids = torch.arange(50, 90)[None]
    more = {"decoder_input_ids": ids[:, 7:20]} if model.config.is_encoder_decoder else {}
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=ids, use_cache=False, **more).logits.float()
    return found


def layers(model: nn.Module, *kinds: type) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("architecture", [*DECODERS, *FOLLOWERS])
def test_all_layers_are_quantized_and_it_is_the_same_model(architecture: str, name: str) -> None:
    serve = decoder if architecture in DECODERS else follower
    quantized, exact = serve(architecture, name), serve(architecture, "none")
    model, plain = (each.backend._model for each in (quantized, exact))  # type: ignore[attr-defined]
    assert not layers(model, nn.Linear, Conv1D)
    assert layers(model, _Alone, _Part) == layers(plain, nn.Linear, Conv1D)  # the output layer among them
    assert quantized.backend.description.dtype == quantized.description.dtype == name
    got, wanted = logits(quantized), logits(exact)
    assert 1e-4 < (got - wanted).norm() / wanted.norm() < MOST[name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("architecture", DECODERS)
def test_a_decoder_still_steps_and_gives_each_what_it_gives_alone(architecture: str, name: str) -> None:
    served = decoder(architecture, name)
    assert served.decoder is not None
    asked: list[tuple[str, dict[str, Any]]] = [
        (text, {"max_new_tokens": 5 + 3 * index, **extra})
        for index, text in enumerate(PROMPTS[1:4])
        for extra in ({}, {"do_sample": True, "seed": 3}, {"num_beams": 2})
    ]
    alone = [together(served, [request])[0] for request in asked]
    assert together(served, asked) == alone
    assert together(served, asked, max_sequences=3, prefill_tokens=5) == alone
    assert len(set(alone)) > len(alone) / 2


@pytest.mark.parametrize("name", NAMES)
def test_steps_say_what_generate_says(name: str) -> None:
    """The two copies of a model share what is quantized."""
    served = decoder("llama", name)
    assert served.decoder is not None
    for text in PROMPTS[2:4]:
        inputs, parameters = {"text_inputs": [text]}, {"max_new_tokens": 8, "return_tensors": True}
        ((stepped,),) = answered(served, [(inputs, parameters)])
        ((whole,),) = answered(served, [(inputs, {**parameters, "no_repeat_ngram_size": 100})])
        assert stepped.outputs[0]["sequences"].tolist() == whole.outputs[0]["sequences"].tolist()
    products = {
        id(module._product) for module in served.backend._model.modules() if isinstance(module, _Alone)
    }  # type: ignore[attr-defined]
    twins = {id(module._product) for module in served.decoder._model.modules() if isinstance(module, _Alone)}
    assert products == twins


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("architecture", FOLLOWERS)
def test_what_follows_an_encoder_does_not_hang_on_its_neighbours(architecture: str, name: str) -> None:
    served = follower(architecture, name)
    inputs = {"inputs": list(PROMPTS)}
    for parameters in ({"max_new_tokens": 12}, {"max_new_tokens": 12, "num_beams": 3}):
        alone = harness.results(served, inputs, together=False, **parameters)
        assert harness.results(served, inputs, **parameters) == alone


@pytest.mark.parametrize("name", ["int8-weight-only", "int4-weight-only"])
def test_a_half_precision_checkpoint_keeps_its_precision_beside_the_weights(name: str, tmp_path: Any) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny.folder("llama", "causal"))
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    tiny.tokenizer_of("llama").save_pretrained(tmp_path)
    for dtype, expected in (("auto", torch.bfloat16), ("float32", torch.float32)):
        served = harness.serve(tmp_path, "text-generation", quantization=name, dtype=dtype)
        assert served.decoder is not None
        assert served.backend._model.dtype == expected  # type: ignore[attr-defined]
        assert len(together(served, [(PROMPTS[0], {"max_new_tokens": 9, "min_new_tokens": 9})])[0]) > 3


def test_the_probe_asks_of_a_quantized_model_what_its_precision_can_give(monkeypatch: Any) -> None:
    """A step whose tokens hang on one another is served by generate()."""
    from mlserver_hftasks.backends import weights

    def per_tensor(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = tensor.reshape(-1, tensor.shape[-1]).float()
        return inputs, inputs.abs().max().expand(len(inputs), 1).clone() * 40

    monkeypatch.setattr(weights, "_with_largest", per_tensor)
    served = harness.serve(tiny.folder("gpt2", "causal"), "text-generation", quantization="int8")
    assert served.decoder is None


@pytest.mark.parametrize(
    ("task", "head", "settings", "message"),
    [
        (
            "text-generation",
            "causal",
            {"quantization": "int8-static"},
            'that generates, expected "int8", "int8',
        ),
        (
            "text-generation",
            "causal",
            {"quantization": "int8", "dtype": "bfloat16"},
            "expected float32 or auto",
        ),
        (
            "text-classification",
            "sequence",
            {"quantization": "int8-weight-only"},
            'of one pass, expected "int8"',
        ),
        (
            "text-classification",
            "sequence",
            {"quantization": "int4-weight-only"},
            'of one pass, expected "int8"',
        ),
        (
            "text-classification",
            "sequence",
            {"quantization": "int4-weight-only", "backend": "openvino"},
            'got "int4-weight-only" with the backend "openvino", expected int8',
        ),
    ],
)
def test_what_cannot_be_quantized_says_so(task: str, head: Any, settings: Any, message: str) -> None:
    with pytest.raises(InvalidSettings, match=message):
        harness.serve(tiny.folder("gpt2", head), task, **settings)
