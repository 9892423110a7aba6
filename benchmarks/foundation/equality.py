"""A batch of n gives what n batches of one give, for every task, on tiny models."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.report import Figure, Findings, Table, number
from benchmarks.rounds import Spread
from benchmarks.session import Session
from mlserver_hftasks.tasks.base import Answered, Task

TOLERANCE = 1e-5
MASK = "[MASK]"
FAMILIES = ("bert", "mpnet", "deberta-v2")
"""One for each layout: sequences end to end, a block mask, padding."""

_TEXTS = (
    "The river was high.",
    "A small boat waited for the old man, who came late and carried a heavy bag of apples from the market.",
    "She laughed",
    "Nobody in the village knew why the bridge was closed on Monday, or who had closed it.",
)
_CONTEXT = "The old man carried a bag of apples. He lived in the village near the bridge with his daughter."

INPUTS: Mapping[str, tuple[str, Mapping[str, Sequence[Any]], Mapping[str, Any]]] = {
    "feature-extraction": ("base", {"inputs": _TEXTS}, {}),
    "fill-mask": ("mask", {"inputs": [f"{text} {MASK}" for text in _TEXTS]}, {}),
    "question-answering": (
        "qa",
        {
            "question": ["Who lived there?", "What did the old man carry to the village?"],
            "context": [_CONTEXT, _CONTEXT * 4],
        },
        {},
    ),
    "sentence-embedding": ("base", {"inputs": _TEXTS}, {}),
    "text-classification": ("sequence", {"inputs": _TEXTS}, {"top_k": 2}),
    "text-ranking": ("sequence", {"query": ["Where is the boat?"], "texts": _TEXTS}, {}),
    "token-classification": ("token", {"inputs": _TEXTS}, {}),
    "zero-shot-classification": ("sequence", {"inputs": _TEXTS}, {"candidate_labels": ["boats", "people"]}),
}
"""Head, inputs and parameters by task."""
LABELS = {"zero-shot-classification": ("contradiction", "entailment"), "text-ranking": ("relevance",)}


def measure(session: Session) -> Findings:
    """The largest difference over all tasks and layouts; a task that fails is an infinite one."""
    rows, worst = [], 0.0
    for task in INPUTS:
        session.tell(f"batch against singles: {task}")
        differences = [_difference(task, family) for family in FAMILIES]
        rows.append([task, *map(number, differences)])
        worst = max(worst, *differences)
        for family, value in zip(FAMILIES, differences, strict=True):
            session.journal.record(
                "equality", task, shape=f"tiny {family}", dtype="float32", difference=value
            )
    figure = Figure(
        "a batch of n against n batches of one, every task that does not generate, largest difference",
        Spread.of([worst]),
        at_most=TOLERANCE,
        detail=f"{len(INPUTS)} tasks on {', '.join(FAMILIES)}; results, typed and raw outputs",
    )
    return Findings([figure], [Table("Largest difference by task", ["task", *FAMILIES], rows)])


def _difference(task: str, family: str) -> float:
    """Largest difference of results, typed and raw outputs; infinite if anything else differs."""
    tiny, harness = (importlib.import_module(f"tests.{name}") for name in ("tiny", "harness"))
    head, inputs, parameters = INPUTS[task]
    served = harness.serve(tiny.folder(family, head, LABELS.get(task)), task)
    mask = served.task.model.encoder.tokenizer.mask_token
    inputs = {name: [value.replace(MASK, mask) for value in values] for name, values in inputs.items()}
    together, singly = (
        _everything(served.task, harness.answer(served, inputs, together=together, **parameters), parameters)
        for together in (True, False)
    )
    return difference(together, singly)


def _everything(task: Task[Any], answered: Sequence[Answered], parameters: Mapping[str, Any]) -> list[Any]:
    parsed = task.signature.parse(dict(parameters))
    names = [spec.name for spec in task.signature.outputs]
    tensors = task.tensors(names, answered, parsed)
    return [
        [task.postprocess(item, parsed) for item in answered],
        {name: tensors[name].values.tolist() for name in names},
        [[dict(outputs) for outputs in item.outputs] for item in answered],
    ]


def difference(some: Any, other: Any) -> float:
    """Largest difference of the numbers in two structures; infinite if anything else differs."""
    if isinstance(some, np.ndarray | np.generic):
        some = some.tolist()
    if isinstance(other, np.ndarray | np.generic):
        other = other.tolist()
    if isinstance(some, dict) and isinstance(other, dict) and list(some) == list(other):
        return difference(list(some.values()), list(other.values()))
    if isinstance(some, list | tuple) and isinstance(other, list | tuple) and len(some) == len(other):
        return max((difference(a, b) for a, b in zip(some, other, strict=True)), default=0.0)
    if isinstance(some, float) and isinstance(other, float):
        return 0.0 if some == other else abs(some - other)
    return 0.0 if some == other else math.inf
