"""A model that generates: over `generate()`, and over the generating engine where it fits that."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from mlserver_hftasks.generation.generate import GenerateBackend
from mlserver_hftasks.loading.decoder import cache_tokens_of, decoder_of
from mlserver_hftasks.loading.quantizing import quantized
from mlserver_hftasks.loading.served import Served, asked_as, model_facts, probe_rows
from mlserver_hftasks.loading.source import Source
from mlserver_hftasks.settings import Settings
from mlserver_hftasks.tasks.base import Task
from mlserver_hftasks.tasks.encoder import Encoder


def generating(
    settings: Settings,
    source: Source,
    kind: type[Task[Any]],
    config: PretrainedConfig,
    model: PreTrainedModel,
    encoder: Encoder,
    device: torch.device,
    pad_token_id: int,
) -> Served:
    """The task over the model. Raises `InvalidSettings`."""
    precision = quantized(settings, model, kind.head, probe_rows(encoder, (1,))[0])
    generation_config = getattr(model, "generation_config", None) or GenerationConfig()
    kind.configure(asked_as(settings, config, source.folder), config, generation_config)
    decodes = not config.is_encoder_decoder
    more: dict[str, Any] = {}
    if decodes:
        more["cache_tokens"] = cache_tokens_of(
            settings.kv_cache_tokens, config, model.dtype, device, encoder.max_tokens
        )
    facts = model_facts(settings, config, encoder, source.folder, generation_config=generation_config, **more)
    decoder = decoder_of(model, device, facts.limits.cache_tokens, precision) if decodes else None
    decode = functools.partial(encoder.tokenizer.decode, skip_special_tokens=True)
    backend = GenerateBackend(
        model, device=device, pad_token_id=pad_token_id, decode=decode, precision=precision
    )
    return Served(kind(replace(facts, steps=decoder is not None)), backend, decoder)
