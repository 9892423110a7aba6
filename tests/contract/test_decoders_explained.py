"""Answers of exported decoders are explained as those of their models on torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests import exported, harness, optimum, tiny
from tests.contract.test_text_generation import PROMPTS
from tests.explaining import explaining


@pytest.mark.parametrize(("architecture", "layout"), [("llama", "ours"), ("gpt2", "optimum")])
async def test_answers_are_explained_as_on_torch(architecture: str, layout: str) -> None:
    """By leaving tokens of the prompt out: a program has no gradients."""
    few = {"max_new_tokens": 5, "min_new_tokens": 5}
    plain = harness.serve(tiny.folder(architecture, "causal"), "text-generation")  # type: ignore[arg-type]
    async with explaining(plain) as explain:
        options: dict[str, Any] = {"max_evals": 40, "per_token": True, "method": "permutation-shap"}
        expected = await explain({"text_inputs": PROMPTS[:3]}, few, **options)
    folder = (
        exported.folder(architecture, "causal", "onnx") if layout == "ours" else optimum.folder(architecture)
    )
    program = harness.serve(folder, "text-generation", backend="onnx")
    async with explaining(program) as explain:
        assert explain.explainer.methods == ("auto", "occlusion", "permutation-shap")
        got = await explain({"text_inputs": PROMPTS[:3]}, few, max_evals=40, per_token=True)
    for one, other in zip(got, expected, strict=True):
        assert (one.method, one.tokens, one.target_label) == (other.method, other.tokens, other.target_label)
        np.testing.assert_allclose(one.score, other.score, atol=1e-3)
        np.testing.assert_allclose(one.attributions, other.attributions, atol=2e-3)
