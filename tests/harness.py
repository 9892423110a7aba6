"""Runs a task over a backend without server or engine: what a request goes through, in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlserver_hftasks.loading import Served, load
from mlserver_hftasks.settings import Settings
from mlserver_hftasks.tasks.base import Answered
from mlserver_hftasks.tasks.signature import Tensor


def serve(folder: Path | str, task: str, **settings: Any) -> Served:
    """Load a model folder for a task, as the runtime does."""
    return load(Settings(task=task, pretrained_model=str(folder), device="cpu", **settings))


def answer(
    served: Served, inputs: Mapping[str, Sequence[Any]], *, together: bool = True, **parameters: Any
) -> list[Answered]:
    """Examples and outputs of a request; `together`: all rows in one batch, else each alone."""
    parsed = served.task.signature.parse(parameters)
    examples = served.task.examples(inputs, parsed)
    rows = [row for example in examples for row in example.rows]
    outputs = (
        list(served.backend.forward(rows)) if together else [served.backend.forward([row])[0] for row in rows]
    )
    remaining = iter(outputs)
    return [Answered(example, [next(remaining) for _ in example.rows]) for example in examples]


def results(
    served: Served,
    inputs: Mapping[str, Sequence[Any]],
    *,
    scalar: bool = False,
    together: bool = True,
    **parameters: Any,
) -> list[Any]:
    """The elements of the response's `output`."""
    parsed = served.task.signature.parse(parameters)
    answered = answer(served, inputs, together=together, **parameters)
    return served.task.shaped([served.task.postprocess(a, parsed) for a in answered], parsed, scalar=scalar)


def tensors(
    served: Served, names: Sequence[str], inputs: Mapping[str, Sequence[Any]], **parameters: Any
) -> Mapping[str, Tensor]:
    """The typed outputs of a request."""
    parsed = served.task.signature.parse(parameters)
    return served.task.tensors(names, answer(served, inputs, **parameters), parsed)
