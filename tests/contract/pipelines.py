"""The reference of the contract tests: transformers' own pipelines, on the same model folders."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers

TEXTS = (
    "Angela Merkel met the mayor of Hamburg in the old town hall.",
    "  Two   ferries  left for Morrow ,  at 6:45!!  ",
    "Zürich → Genève 東京 привет 🎉👩‍👩‍👧 naïve",
    "Dr. O'Neill-Smith paid $3.50, per kilogram (for) the best coffee in Lima...",
    "a",
    "\tnew\nline\r\nx",
    "[SEP] <s> </s> hello [UNK] xyzzy",
    "x" * 120,
    "🎉 🎉 🎉",
    " ",
)
"""Unicode, emoji, punctuation, spaces, special tokens as text; each shorter than the tiny models take."""

LONG = "The harbour was quiet when Anna Keller opened the shutters of the river museum in Berlin. " * 12
"""More than the tiny models take."""


def reference(task: str, folder: Path | str) -> Callable[..., Any]:
    """The pipeline of transformers; its notices about what a test provokes on purpose are dropped."""
    pipeline = _pipeline(task, str(folder))

    def call(*args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Tokenizer does not support real words")
            return pipeline(*args, **kwargs)

    return call


@functools.cache
def _pipeline(task: str, folder: str) -> Any:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return transformers.pipeline(task, model=folder)


def assert_same(got: Any, want: Any, where: str = "result") -> None:
    """Equal in keys, their order, texts and integers, and within 1e-5 in numbers."""
    if isinstance(want, Mapping):
        assert list(got) == list(want), where
        for key in want:
            assert_same(got[key], want[key], f"{where}.{key}")
    elif isinstance(want, Sequence) and not isinstance(want, str):
        assert isinstance(got, list) and len(got) == len(want), where
        for index, (one, other) in enumerate(zip(got, want, strict=True)):
            assert_same(one, other, f"{where}[{index}]")
    elif isinstance(want, str | int) or want is None:
        assert got == want and isinstance(got, type(want)), where
    else:
        assert isinstance(got, float) and abs(got - float(want)) < 1e-5, f"{where}: {got} is not {want}"


def elements(result: Any) -> list[Any]:
    """What becomes of a pipeline's result on the wire: its top-level elements."""
    return result if isinstance(result, list) else [result]
