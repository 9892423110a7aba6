"""The generating engine's model: how large its cache is, and whether the model fits it at all."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from mlserver_hftasks.backends.placed import moved
from mlserver_hftasks.backends.torch import TOLERANCE, TOLERANCES
from mlserver_hftasks.generation import probe
from mlserver_hftasks.generation.decoder import TorchDecoder
from mlserver_hftasks.generation.plain import new_token_logits, probe_texts
from mlserver_hftasks.generation.twin import with_shared_weights
from mlserver_hftasks.loading import cache_room
from mlserver_hftasks.loading.cache_room import free_ram

logger = logging.getLogger("mlserver.hftasks")

ROOM = {**TOLERANCES, "int8-weight-only": 1e-3, "int4-weight-only": TOLERANCES["bfloat16"]}
"""What it may differ by, relative to the largest logit. Inputs of weights have 16 bits in the one, and are
bfloat16 in the other."""


def cache_tokens_of(
    setting: int | None, config: PretrainedConfig, dtype: torch.dtype, device: torch.device, max_tokens: int
) -> int:
    """Tokens of the cache: the setting, else from the model and the free memory."""
    share = cache_room.SHARE_OF_MEMORY if device.type == "cpu" else cache_room.SHARE_OF_DEVICE
    memory = free_memory(device) * share
    return setting or cache_room.usual_tokens(memory, bytes_per_token(config, dtype), max_tokens)


def bytes_per_token(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Keys and values of one token in all layers."""
    text: Any = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * head_dim * dtype.itemsize)


def decoder_of(
    model: PreTrainedModel, device: torch.device, cache_tokens: int, precision: str | None = None
) -> TorchDecoder | None:
    """The model behind the generating engine; None if it does not fit, which the log says.

    `precision` is what the model computes in, where that is not its dtype.
    """
    moved(model.eval().requires_grad_(False), device)
    try:
        decoder = TorchDecoder(
            with_shared_weights(model), device=device, cache_tokens=cache_tokens, precision=precision
        )
        reason = _objection(decoder, model)
    except Exception as error:  # whatever an architecture makes of attention that it was not made for
        reason = repr(error)
    if reason is None:
        return decoder
    logger.info(
        "%s is not batched continuously (%.200s): generate() runs it, and it does not stream",
        type(model).__name__,
        reason,
    )
    return None


def _objection(decoder: TorchDecoder, plain: PreTrainedModel) -> str | None:
    """Why the model cannot run in steps, or None. `plain` is the same model with its own attention."""
    precisions = decoder.description.dtype, str(plain.dtype).removeprefix("torch.")
    tolerance = max(ROOM.get(precision, TOLERANCE) for precision in precisions)
    texts = probe_texts(plain, decoder.cache_tokens)
    alone = [new_token_logits(plain, text) for text in texts]
    return probe.objection(lambda chunks: decoder.logits(chunks).cpu().numpy(), texts, alone, tolerance)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device; of a container no more than its limit leaves."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_ram()
