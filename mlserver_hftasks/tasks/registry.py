"""Tasks by name. Adding a task is adding its file and one line here; files are imported when asked for."""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

from mlserver_hftasks.errors import InvalidSettings, did_you_mean
from mlserver_hftasks.tasks.base import Task

TASKS: dict[str, str] = {
    "feature-extraction": "feature_extraction.FeatureExtraction",
    "fill-mask": "fill_mask.FillMask",
    "question-answering": "question_answering.QuestionAnswering",
    "sentence-embedding": "sentence_embedding.SentenceEmbedding",
    "summarization": "summarization.Summarization",
    "text2text-generation": "text2text_generation.Text2TextGeneration",
    "text-classification": "text_classification.TextClassification",
    "text-generation": "text_generation.TextGeneration",
    "text-ranking": "text_ranking.TextRanking",
    "token-classification": "token_classification.TokenClassification",
    "translation": "translation.Translation",
    "zero-shot-classification": "zero_shot_classification.ZeroShotClassification",
}

ALIASES: dict[str, str] = {
    "sentiment-analysis": "text-classification",
    "ner": "token-classification",
    "conversational": "text-generation",
    "sentence-similarity": "sentence-embedding",
    "embedding": "sentence-embedding",
    "reranking": "text-ranking",
}
"""Other names of tasks, those of transformers first."""

TRANSLATION = re.compile("translation_.+_to_.+")
"""A translation's name may say from which language to which."""


def canonical_name(name: str) -> str:
    """The task's own name. Raises `InvalidSettings` naming the nearest task."""
    name = "translation" if TRANSLATION.fullmatch(name) else ALIASES.get(name, name)
    if name not in TASKS:
        raise InvalidSettings(f"unknown task '{name}', {did_you_mean(name, [*TASKS, *ALIASES])} @ task")
    return name


def task_class(name: str) -> type[Task[Any]]:
    """The class of a task by its own name."""
    module, _, attribute = TASKS[name].partition(".")
    found: type[Task[Any]] = getattr(import_module(f"mlserver_hftasks.tasks.{module}"), attribute)
    return found
