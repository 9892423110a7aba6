"""Whether a model that steps through many sequences says of each what it says of that sequence alone.

As in `probe`, two questions: are the logits those of a plain pass over the whole sequence, however its
prompt was cut and whoever ran beside it? And does nothing move when only the neighbours' tokens change?
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from mlserver_hftasks.backends.probe import MAX_WINDOW_TOKENS, window_of
from mlserver_hftasks.backends.torch import TOLERANCE, TOLERANCES
from mlserver_hftasks.engine.rows import IntArray
from mlserver_hftasks.engine.sequences import Chunk, GeneratedSequence, GenerationJob, Prompt
from mlserver_hftasks.generation.decoder import TorchDecoder

PROMPTS = (9, 37, 16)
NEW_TOKENS = 3
ROOM = {**TOLERANCES, "int8-weight-only": TOLERANCES["int8"], "int4-weight-only": TOLERANCES["bfloat16"]}
"""What it may differ by, relative to the largest logit. Int4 products take inputs in bfloat16."""
PIECE = 16
"""Prompts are fed in pieces of so many tokens."""


def objection(decoder: TorchDecoder, plain: PreTrainedModel) -> str | None:
    """Why the model cannot run in steps, or None if it can. `plain` is the same model with its own attention.

    Raises whatever the model raises.
    """
    precisions = decoder.description.dtype, str(plain.dtype).removeprefix("torch.")
    tolerance = max(ROOM.get(precision, TOLERANCE) for precision in precisions)
    texts = _texts(decoder, plain)
    stepped = _stepped(decoder, texts)
    for text, got in zip(texts, stepped, strict=True):
        worst = _difference(got, _alone(plain, text))
        if not worst <= tolerance:  # NaN is an objection too
            return f"logits differ by {worst:.1e} of the largest"
    others = [text if index % 2 == 0 else text[::-1].copy() for index, text in enumerate(texts)]
    for before, after in list(zip(stepped, _stepped(decoder, others), strict=True))[::2]:
        moved = _difference(after, before)
        if not moved <= tolerance / 10:
            return f"with other neighbours logits differ by {moved:.1e} of the largest"
    return None


def _texts(decoder: TorchDecoder, plain: PreTrainedModel) -> list[IntArray]:
    """Random tokens of the probe's sequences, new ones included."""
    vocabulary = plain.get_input_embeddings().num_embeddings
    window = window_of(plain.config.get_text_config())
    longest = PROMPTS[1] if window is None else min(window + 9, MAX_WINDOW_TOKENS)
    room = decoder.cache_tokens // len(PROMPTS) - NEW_TOKENS
    lengths = [min(length, room) for length in (PROMPTS[0], max(longest, PROMPTS[1]), PROMPTS[2])]
    generator = np.random.default_rng(0)
    return [generator.integers(0, vocabulary, max(length, 1) + NEW_TOKENS) for length in lengths]


def _stepped(decoder: TorchDecoder, texts: Sequence[IntArray]) -> list[torch.Tensor]:
    """Logits before each new token, [NEW_TOKENS, vocabulary] per text; each begins a step after the last."""
    job = GenerationJob(0.0, 0.0, None, False)
    sequences, extent = [], 0
    for index, text in enumerate(texts):
        prompt = Prompt(text[:-NEW_TOKENS], NEW_TOKENS)
        sequences.append(GeneratedSequence(job, prompt, index, random.Random(), extent))
        extent += prompt.reserved
    found: list[list[torch.Tensor]] = [[] for _ in texts]
    step = 0
    while any(len(logits) < NEW_TOKENS for logits in found):
        step += 1
        chunks = [
            Chunk(each, 1 if each.decodes else min(PIECE, len(each.prompt.tokens) - each.cached))
            for each in sequences[:step]
            if len(found[each.index]) < NEW_TOKENS
        ]
        choosing = [chunk.sequence for chunk in chunks if chunk.chooses]
        rows = iter(decoder.logits(chunks).cpu())
        for chunk in chunks:
            chunk.sequence.cached += chunk.count
        for sequence in choosing:
            logits = found[sequence.index]
            logits.append(next(rows))
            sequence.tokens.append(int(texts[sequence.index][len(sequence.prompt.tokens) + len(logits) - 1]))
    return [torch.stack(logits) for logits in found]


def _alone(plain: PreTrainedModel, text: IntArray) -> torch.Tensor:
    with torch.inference_mode():
        ids = torch.from_numpy(text[:-1]).to(plain.device)[None]
        logits: torch.Tensor = plain(input_ids=ids, use_cache=False).logits
    return logits[0, -NEW_TOKENS:].float().cpu()


def _difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative to the largest value."""
    return float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6))
