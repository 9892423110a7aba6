"""Quantized models of every architecture: packed as before, each row as it is alone, near to float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mlserver_hftasks.errors import InvalidSettings
from mlserver_hftasks.settings import Compile
from tests import tiny
from tests.contract.test_packing import LAYOUTS, assert_close, one_thread, rows_of
from tests.harness import serve

__all__ = ["one_thread"]

TASKS = {"sequence": "text-classification", "base": "feature-extraction", "mask": "fill-mask"}
CASES = [
    (architecture, head)
    for architecture, family in tiny.FAMILIES.items()
    for head in ("sequence", "base", "mask")
    if head in family.heads and (head == "base" or architecture in {"bert", "bart", "distilbert"})
]


def served(architecture: str, head: Any, **settings: Any) -> Any:
    return serve(tiny.folder(architecture, head), TASKS[head], **settings).backend


@pytest.mark.parametrize(("architecture", "head"), CASES)
def test_int8(architecture: str, head: str) -> None:
    quantized, exact = served(architecture, head, quantization="int8"), served(architecture, head)
    assert quantized.description.dtype == "int8"
    assert quantized.description.packing == LAYOUTS.get(architecture, "varlen")
    rows = rows_of(architecture)
    got = quantized.forward(rows)
    assert_close(got, [quantized.forward([row])[0] for row in rows], 2e-2)
    wanted = exact.forward(rows)
    for name in wanted[0]:
        flat, want = (np.concatenate([o[name].ravel() for o in each]) for each in (got, wanted))
        difference = np.linalg.norm(flat - want) / np.linalg.norm(want)
        assert 1e-5 < difference < 0.12  # it is quantized, and it is the same model
    quantized.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantization": "int8", "dtype": "bfloat16"}, "expected float32 or auto"),
        ({"quantization": "int8-static", "backend": "torch"}, 'expected "int8" or "none"'),
    ],
)
def test_what_cannot_be_quantized_says_so(settings: Any, message: str) -> None:
    with pytest.raises(InvalidSettings, match=message):
        served("bert", "sequence", **settings)


def test_a_half_precision_checkpoint_is_quantized_from_float32(tmp_path: Any) -> None:
    import transformers

    model = transformers.AutoModel.from_pretrained(tiny.folder("bert", "base")).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    tiny.tokenizer_of("bert").save_pretrained(tmp_path)
    backend = serve(tmp_path, "feature-extraction", quantization="int8").backend
    assert backend._model.dtype == torch.float32


def test_models_that_generate_are_not_compiled() -> None:
    with pytest.raises(InvalidSettings, match="models that generate are not compiled"):
        serve(tiny.folder("gpt2", "causal"), "text-generation", compile=Compile())


def test_models_that_generate_step_in_half_precision() -> None:
    served = serve(tiny.folder("gpt2", "causal"), "text-generation", dtype="bfloat16")
    assert served.decoder is not None
    assert served.description.dtype == "bfloat16"
    served.close()
