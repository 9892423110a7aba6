"""Whether a model that steps through many sequences says of each what it says of that sequence alone.

As in `backends.probe`, two questions: are the logits those of a plain pass over the whole sequence, however
its prompt was cut and whoever ran beside it? And does nothing move when only the neighbours' tokens change?
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np

from mlserver_hftasks.backends.probe import MAX_WINDOW_TOKENS
from mlserver_hftasks.engine.rows import FloatArray, IntArray
from mlserver_hftasks.engine.sequences import Chunk, GeneratedSequence, GenerationJob, Prompt

PROMPTS = (9, 37, 16)
NEW_TOKENS = 3
PIECE = 16
"""Prompts are fed in pieces of so many tokens."""

Logits = Callable[[Sequence[Chunk]], FloatArray]
"""Of the chunks that choose, [n, vocabulary]."""


def objection(
    logits: Logits, texts: Sequence[IntArray], alone: Sequence[FloatArray], tolerance: float
) -> str | None:
    """Why a model cannot run in steps, or None if it can.

    `alone` are the logits before each of the last `NEW_TOKENS` tokens of the texts, [NEW_TOKENS, vocabulary],
    from a plain pass. Raises whatever the model raises.
    """
    stepped = logits_in_steps(logits, texts)
    for got, wanted in zip(stepped, alone, strict=True):
        worst = difference(got, wanted)
        if not worst <= tolerance:  # NaN is an objection too
            return f"logits differ by {worst:.1e} of the largest"
    others = [text if index % 2 == 0 else text[::-1].copy() for index, text in enumerate(texts)]
    for before, after in list(zip(stepped, logits_in_steps(logits, others), strict=True))[::2]:
        moved = difference(after, before)
        if not moved <= tolerance / 10:
            return f"with other neighbours logits differ by {moved:.1e} of the largest"
    return None


def texts_for(vocabulary: int, window: int | None, cache_tokens: int) -> list[IntArray]:
    """Random tokens of the probe's sequences, new ones included; one reaches beyond a window of attention."""
    longest = PROMPTS[1] if window is None else min(window + 9, MAX_WINDOW_TOKENS)
    room = cache_tokens // len(PROMPTS) - NEW_TOKENS
    lengths = [min(length, room) for length in (PROMPTS[0], max(longest, PROMPTS[1]), PROMPTS[2])]
    generator = np.random.default_rng(0)
    return [generator.integers(0, vocabulary, max(length, 1) + NEW_TOKENS) for length in lengths]


def logits_in_steps(logits: Logits, texts: Sequence[IntArray], *, piece: int = PIECE) -> list[FloatArray]:
    """Logits before each new token, [NEW_TOKENS, vocabulary] per text; each begins a step after the last."""
    job = GenerationJob(0.0, 0.0, None, False)
    sequences, extent = [], 0
    for index, text in enumerate(texts):
        prompt = Prompt(text[:-NEW_TOKENS], NEW_TOKENS)
        sequences.append(GeneratedSequence(job, prompt, index, random.Random(), extent))
        extent += prompt.reserved
    found: list[list[FloatArray]] = [[] for _ in texts]
    step = 0
    while any(len(rows) < NEW_TOKENS for rows in found):
        step += 1
        chunks = [
            Chunk(each, 1 if each.decodes else min(piece, len(each.prompt.tokens) - each.cached))
            for each in sequences[:step]
            if len(found[each.index]) < NEW_TOKENS
        ]
        choosing = [chunk.sequence for chunk in chunks if chunk.chooses]
        rows = iter(logits(chunks))
        for chunk in chunks:
            chunk.sequence.cached += chunk.count
        for sequence in choosing:
            chosen = found[sequence.index]
            chosen.append(next(rows))
            sequence.tokens.append(int(texts[sequence.index][len(sequence.prompt.tokens) + len(chosen) - 1]))
    for sequence in sequences:
        sequence.extent = -1  # they have left
    return [np.stack(rows) for rows in found]


def difference(got: FloatArray, wanted: FloatArray) -> float:
    """Relative to the largest value."""
    return float(np.abs(got - wanted).max() / max(float(np.abs(wanted).max()), 1e-6))
