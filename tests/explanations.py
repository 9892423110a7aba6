"""Explanations made up for tests: consistent, but of no model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from mlserver_hftasks.explain.result import Explanation

SENTENCE = "The soup was delicious, but the waiter was rude."


def explanation(
    texts: Sequence[str] = (SENTENCE,),
    labels: Sequence[str] = ("POSITIVE",),
    *,
    seed: int = 0,
    pieces: int = 4,
    **fields: Any,
) -> Explanation:
    """Of texts that are cut into words, and those into pieces of so many characters."""
    tokens, offsets, words, sequences = ["[CLS]"], [(-1, -1)], [-1], [-1]
    for sequence, text in enumerate(texts):
        for word, match in enumerate(re.finditer(r"\w+|[^\w\s]", text)):
            for start in range(match.start(), match.end(), pieces):
                end = min(start + pieces, match.end())
                tokens.append(("##" if start > match.start() else "") + text[start:end].lower())
                offsets.append((start, end))
                words.append(word)
                sequences.append(sequence)
        tokens, offsets, words, sequences = (
            [*tokens, "[SEP]"],
            [*offsets, (-1, -1)],
            [*words, -1],
            [*sequences, -1],
        )
    attributions = np.random.default_rng(seed).normal(size=(len(labels), len(tokens))).astype(np.float32)
    attributions[:, np.array(sequences) < 0] = 0
    baseline = np.arange(len(labels), dtype=np.float32)
    delta = np.full(len(labels), 0.125, dtype=np.float32)
    made: dict[str, Any] = {
        "tokens": tuple(tokens),
        "offsets": np.array(offsets, dtype=np.int64),
        "word_ids": np.array(words, dtype=np.int64),
        "sequence_ids": np.array(sequences, dtype=np.int64),
        "attributions": attributions,
        "target": np.array([(-1, index) for index in range(len(labels))], dtype=np.int64).reshape(-1, 2),
        "target_label": tuple(labels),
        "score": (attributions.sum(axis=1) + baseline - delta).astype(np.float32),
        "baseline_score": baseline,
        "delta": delta,
        "converged": np.ones(len(labels), dtype=np.bool_),
        "method": "integrated-gradients",
        "baseline": "mask",
        "evaluations": 19,
        "texts": tuple(texts),
    }
    return Explanation(**{**made, **fields})
