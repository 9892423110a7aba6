"""What is explained of a task's answer; one file a task.

Adding one is adding its file and a line in `TARGETS`; files are imported when asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mlserver_hftasks.tasks.base import Task

if TYPE_CHECKING:
    from mlserver_hftasks.explain.targets.base import Targets

TARGETS: dict[str, str] = {
    "fill-mask": "fill_mask.FillMaskTargets",
    "question-answering": "question_answering.QuestionAnsweringTargets",
    "summarization": "seq2seq.Seq2SeqTargets",
    "sentence-embedding": "sentence_embedding.SentenceEmbeddingTargets",
    "text2text-generation": "seq2seq.Seq2SeqTargets",
    "text-generation": "text_generation.TextGenerationTargets",
    "text-classification": "text_classification.TextClassificationTargets",
    "text-ranking": "text_ranking.TextRankingTargets",
    "token-classification": "token_classification.TokenClassificationTargets",
    "translation": "seq2seq.Seq2SeqTargets",
    "zero-shot-classification": "zero_shot_classification.ZeroShotTargets",
}


def targets_of(task: Task[Any]) -> Targets[Any, Any] | None:
    """The targets of a task; None for one whose answer is no score."""
    if task.name not in TARGETS:
        return None
    module, _, attribute = TARGETS[task.name].partition(".")
    kind = getattr(import_module(f"mlserver_hftasks.explain.targets.{module}"), attribute)
    made: Targets[Any, Any] = kind(task)
    return made
