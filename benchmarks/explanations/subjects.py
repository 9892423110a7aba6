"""The models that are explained, ours and captum's way to explain them, and how far off both are."""

from __future__ import annotations

import asyncio
import csv
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from captum.attr import LayerIntegratedGradients

from examples.build_models import SENTENCES, build
from mlserver_hftasks.explain.result import Explanation
from mlserver_hftasks.loading import Served, load
from mlserver_hftasks.settings import Settings
from tests import toy
from tests.explaining import explaining

MODELS = Path(__file__).parents[2] / "models"
FEWEST_TOKENS, MOST_TOKENS = 5, 60
REFERENCE_STEPS = 512
CAPTUM_STEPS = 50

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Subject:
    """A model with texts of 5 to 60 tokens."""

    name: str
    folder: Path
    texts: tuple[str, ...]
    exact: int
    """How many of the texts are compared with the reference, which takes ten times as long as an answer."""

    @cached_property
    def served(self) -> Served:
        """Loaded as the runtime does."""
        task = "text-classification"
        return load(Settings(task=task, pretrained_model=str(self.folder), intra_op_threads=1))

    @cached_property
    def captum(self) -> Captum:
        """The same model for captum."""
        return Captum(self.folder)


def sentiment(count: int, exact: int) -> Subject:
    """The demo's model, built if it is not there, on sentences like those that it learned from."""
    build(MODELS)
    with SENTENCES.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        sentences = [row["text"] for row in rows if row["split"] == "test"]
    draw = np.random.default_rng(0)
    texts = []
    for words in np.linspace(FEWEST_TOKENS - 2, 46, count).astype(int):
        joined = " ".join(str(sentence) for sentence in draw.choice(sentences, 6)).split()
        texts.append(" ".join(joined[: int(words)]))
    return Subject("demo sentiment model", MODELS / "sentiment", tuple(texts), exact)


def trained_toy(count: int, exact: int) -> Subject:
    """Two layers, trained on the spot: little more than what each call costs by itself."""
    texts, _ = toy.texts(count, seed=5, least=8, most=MOST_TOKENS - 2)
    return Subject("two layers of 48", toy.folder(), tuple(texts), exact)


def ours(subject: Subject, texts: Sequence[str], *, one_by_one: bool = False, **options: Any) -> Run:
    """All texts in one request, or one request after another."""

    async def run() -> tuple[list[Explanation], float]:
        async with explaining(subject.served) as explain:
            await explain(texts[:2], max_evals=4)
            began = time.process_time()
            if one_by_one:
                found = [(await explain([text], **options))[0] for text in texts]
            else:
                found = await explain(texts, **options)
            return found, time.process_time() - began

    explanations, seconds = asyncio.run(run())
    return Run(
        seconds,
        [explanation.attributions[0] for explanation in explanations],
        float(np.mean([explanation.evaluations for explanation in explanations])),
    )


@dataclass(frozen=True, slots=True)
class Run:
    """What a system took and said."""

    seconds: float
    """Of CPU time, which other processes do not touch; both run on one thread at a time."""
    attributions: Sequence[Array]
    evaluations: float
    """Per text."""


class Captum:
    """captum's LayerIntegratedGradients on the word embeddings, one text at a time."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self._model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
        self._method = LayerIntegratedGradients(self._logits, self._model.get_input_embeddings())

    def explain(
        self, texts: Sequence[str], *, steps: int = CAPTUM_STEPS, pad_to: int | None = None, baseline: str
    ) -> Run:
        """`baseline` is `mask` or `pad`; with `pad_to` texts are padded to so many tokens."""
        began = time.process_time()
        found = [self._explain(text, steps, pad_to, baseline) for text in texts]
        return Run(time.process_time() - began, found, steps)

    def attribute(
        self, ids: torch.Tensor, mask: torch.Tensor, absents: torch.Tensor, target: int, steps: int
    ) -> torch.Tensor:
        """captum's own call: [1, tokens] -> [1, tokens, hidden]."""
        attributions: torch.Tensor = self._method.attribute(
            ids, baselines=absents, target=target, additional_forward_args=(mask,), n_steps=steps
        )
        return attributions

    def _logits(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._model(input_ids=ids, attention_mask=mask).logits
        return logits

    def _explain(self, text: str, steps: int, pad_to: int | None, baseline: str) -> Array:
        padding = {"padding": "max_length", "max_length": pad_to, "truncation": True} if pad_to else {}
        inputs = self._tokenizer(text, return_tensors="pt", return_special_tokens_mask=True, **padding)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        absent = getattr(self._tokenizer, f"{baseline}_token_id")
        with torch.no_grad():
            target = int(self._logits(ids, mask).argmax())
        absents = torch.where(inputs["special_tokens_mask"].bool(), ids, absent)
        attributions = self.attribute(ids, mask, absents, target, steps)
        found: Array = attributions.sum(-1)[0].detach().numpy()
        return found[: int(mask.sum())]


def reference(subject: Subject, texts: Sequence[str], **options: Any) -> list[Array]:
    """Integrated gradients by 512 steps, in our batches; the tests compare them with captum's."""
    steps = REFERENCE_STEPS + 2
    run = ours(subject, texts, method="integrated-gradients-fixed", max_evals=steps, **options)
    return list(run.attributions)


def errors(attributions: Sequence[Array], exact: Sequence[Array]) -> list[float]:
    """Of each text, how far the worst token is off, as a share of the largest attribution."""
    return [
        float(np.abs(found - right).max() / np.abs(right).max())
        for found, right in zip(attributions, exact, strict=False)
    ]
