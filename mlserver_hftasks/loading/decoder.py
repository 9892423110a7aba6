"""The generating engine's model: how large its cache is, and whether the model fits it at all."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from mlserver_hftasks.backends.placed import moved
from mlserver_hftasks.generation.decoder import TorchDecoder
from mlserver_hftasks.generation.probe import objection
from mlserver_hftasks.generation.twin import with_shared_weights

logger = logging.getLogger("mlserver.hftasks")

USUAL_SEQUENCES = 64
USUAL_TOKENS = 2048
"""Where memory allows, the cache has room for so many sequences of so many tokens, or as many as fit."""
SHARE_OF_MEMORY = {"cpu": 0.25}
"""Of what is free, for the cache; 0.8 on other devices, whose memory nothing else needs."""
USUAL_MEMORY = 4 * 2**30
"""Where nobody says how much is free."""


def cache_tokens_of(
    setting: int | None, config: PretrainedConfig, dtype: torch.dtype, device: torch.device, max_tokens: int
) -> int:
    """Tokens of the cache: the setting, else from the model and the free memory."""
    if setting is not None:
        return setting
    memory = free_memory(device) * SHARE_OF_MEMORY.get(device.type, 0.8)
    affordable = int(memory / bytes_per_token(config, dtype))
    return max(min(affordable, USUAL_SEQUENCES * min(max_tokens, USUAL_TOKENS)), 1)


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
        reason = objection(decoder, model)
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


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device; of a container no more than its limit leaves."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = [size for size in (_available(), _left_in_container()) if size is not None]
    return min(found, default=USUAL_MEMORY)


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None


def _left_in_container() -> int | None:
    try:
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # no cgroups, or no limit
        return None
    return max(limit - used, 0)
