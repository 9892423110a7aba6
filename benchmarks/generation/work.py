"""What is generated: decoders with random weights, prompts of 5 to 60 tokens, answers of 16 to 64."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import texts
from benchmarks.session import Session
from benchmarks.shapes import MAX_TOKENS, Shape, tokenizer_of

LLAMA = Shape(
    "llama",
    "llama",
    {
        "hidden_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "intermediate_size": 1376,
        "num_key_value_heads": 8,
    },
    token_types=False,
)
GPT2 = Shape("gpt2", "gpt2", {"n_embd": 512, "n_layer": 6, "n_head": 8}, token_types=False)
SHAPES = (LLAMA, GPT2)
CLIENTS = 16
PROMPT_TOKENS, NEW_TOKENS = (5, 60), (16, 64)
SEED = 7


@dataclass(frozen=True, slots=True)
class Ask:
    """One request."""

    text: str
    tokens: tuple[int, ...]
    """Of the text."""
    new_tokens: int


def folder_of(session: Session, shape: Shape, deviation: float = 0.05) -> Path:
    """The folder of that shape's model, made at first use. No token ends an answer, so lengths are known.

    `deviation` is that of the weights.
    """
    folder = session.models / f"generation-{shape.name}"
    if folder.is_dir():
        return folder
    tokenizer = tokenizer_of(shape)
    config = AutoConfig.for_model(
        shape.model_type,
        **shape.sizes,
        vocab_size=len(tokenizer),
        max_position_embeddings=MAX_TOKENS,
        initializer_range=deviation,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.convert_tokens_to_ids("[CLS]"),
        eos_token_id=None,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def asks(count: int, seed: int = SEED) -> list[Ask]:
    """Requests; a longer list begins with the shorter one."""
    tokenizer: Any = tokenizer_of(LLAMA)
    draw = np.random.default_rng(seed)
    words = texts.words()
    made = []
    for _ in range(count):
        wanted = int(draw.integers(PROMPT_TOKENS[0], PROMPT_TOKENS[1] + 1))
        chosen = [words[index] for index in draw.integers(0, len(words), wanted)]
        while len(ids := tokenizer(" ".join(chosen))["input_ids"]) > wanted and len(chosen) > 1:
            chosen.pop()
        new = int(draw.integers(NEW_TOKENS[0], NEW_TOKENS[1] + 1))
        made.append(Ask(" ".join(chosen), tuple(ids), new))
    return made


def total(some: list[Ask]) -> int:
    """New tokens of the requests together."""
    return sum(ask.new_tokens for ask in some)
