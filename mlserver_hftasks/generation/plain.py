"""What a model of transformers says of a sequence in one plain pass: what others are held against."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from mlserver_hftasks.backends.probe import window_of
from mlserver_hftasks.engine.rows import FloatArray, IntArray
from mlserver_hftasks.generation.probe import NEW_TOKENS, texts_for


def probe_texts(plain: PreTrainedModel, cache_tokens: int) -> list[IntArray]:
    """Sequences for `probe.objection`."""
    vocabulary = plain.get_input_embeddings().num_embeddings
    return texts_for(int(vocabulary), window_of(plain.config.get_text_config()), cache_tokens)


def new_token_logits(plain: PreTrainedModel, text: IntArray) -> FloatArray:
    """Logits before each of the last tokens of a text, [NEW_TOKENS, vocabulary]."""
    with torch.inference_mode():
        ids = torch.from_numpy(text[:-1]).to(plain.device)[None]
        logits: torch.Tensor = plain(input_ids=ids, use_cache=False).logits
    found: FloatArray = logits[0, -NEW_TOKENS:].float().cpu().numpy()
    return found
