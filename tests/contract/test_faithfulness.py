"""On a model whose relevant words are known, explanations find them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from mlserver_hftasks.explain.result import Explanation
from mlserver_hftasks.loading import Served
from tests import toy
from tests.explaining import explaining
from tests.harness import answer, serve

METHODS = ("integrated-gradients", "permutation-shap", "occlusion")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def served() -> Served:
    return serve(toy.folder(), "text-classification")


def log_odds(served: Served, texts: Sequence[str]) -> Any:
    """Of each text: the second logit less the first."""
    logits = np.stack([item.outputs[0]["logits"] for item in answer(served, {"inputs": texts})])
    return logits[:, 1] - logits[:, 0]


def test_the_model_has_learned_its_task(served: Served) -> None:
    texts, odds = toy.texts(200, seed=1)
    assert np.corrcoef(log_odds(served, texts), odds)[0, 1] > 0.95


@pytest.fixture(scope="module", params=METHODS)
def explanations(request: pytest.FixtureRequest, served: Served) -> list[Explanation]:
    async def explained() -> list[Explanation]:
        async with explaining(served) as explain:
            return await explain(toy.texts(40, seed=2)[0], method=request.param, target="POSITIVE")

    return asyncio.run(explained())


def relevant(explanation: Explanation) -> Any:
    return np.array([toy.is_telling(token) for token in explanation.tokens])


def test_precision_at_k(explanations: list[Explanation]) -> None:
    """Of the k tokens with the largest attributions, the share of the k that matter."""
    hits, chances = [], []
    for explanation in explanations:
        telling = relevant(explanation)
        if telling.any():
            largest = np.argsort(-np.abs(explanation.attributions[0]))[: telling.sum()]
            hits.append(telling[largest].mean())
            chances.append(telling.mean())
    assert np.mean(hits) >= 0.95
    assert np.mean(chances) < 0.4  # by chance


def test_signs(explanations: list[Explanation]) -> None:
    """Words of a sentiment speak for its label, and only for that."""
    right = [
        (attribution > 0) == (token in toy.TELLING[1])
        for explanation in explanations
        for token, attribution in zip(explanation.tokens, explanation.attributions[0], strict=True)
        if toy.is_telling(token)
    ]
    assert np.mean(right) >= 0.97


def without(explanation: Explanation, gone: Any) -> str:
    """The text with the tokens at these places masked."""
    words = list(explanation.tokens)
    for place in gone:
        words[place] = "[MASK]"
    return " ".join(words[1:-1])


def test_comprehensiveness_and_sufficiency(served: Served, explanations: list[Explanation]) -> None:
    """ERASER (https://arxiv.org/abs/1911.03429): the score falls without what matters, stays with it.

    Measured on the texts that the model finds positive, the top fifth of their words against as many others.
    """
    draw = np.random.default_rng(0)
    texts: dict[str, list[str]] = {name: [] for name in ("whole", "without", "only", "chance", "only chance")}
    for explanation in explanations:
        places = np.arange(1, len(explanation.tokens) - 1)
        if explanation.score[0] - explanation.baseline_score[0] < 0.3:
            continue
        count = max(1, len(places) // 5)
        top = places[np.argsort(-explanation.attributions[0, places])[:count]]
        random = draw.choice(places, count, replace=False)
        texts["whole"].append(without(explanation, []))
        for suffix, chosen in (("", top), ("chance", random)):
            texts[suffix or "without"].append(without(explanation, chosen))
            texts[f"only {suffix}".strip()].append(without(explanation, np.setdiff1d(places, chosen)))
    assert len(texts["whole"]) >= 8
    odds = {name: log_odds(served, of_name).mean() for name, of_name in texts.items()}
    comprehensiveness, by_chance = odds["whole"] - odds["without"], odds["whole"] - odds["chance"]
    assert comprehensiveness > 1.0
    assert comprehensiveness > 3 * abs(by_chance)
    sufficiency, sufficiency_by_chance = odds["whole"] - odds["only"], odds["whole"] - odds["only chance"]
    assert sufficiency < 0.3 * sufficiency_by_chance
