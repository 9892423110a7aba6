"""A model that generates: over `generate()`, and over the generating engine where it fits that."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from mlserver_hftasks.backends.base import Backend
from mlserver_hftasks.generation.generate import GenerateBackend
from mlserver_hftasks.generation.scoring import EncodedScoring, ScoringBackend
from mlserver_hftasks.generation.twin import with_shared_weights
from mlserver_hftasks.loading.decoder import cache_tokens_of, decoder_of
from mlserver_hftasks.loading.quantizing import quantized
from mlserver_hftasks.loading.served import Scoring, Served, asked_as, model_facts, probe_rows
from mlserver_hftasks.loading.source import Source
from mlserver_hftasks.settings import Settings
from mlserver_hftasks.tasks.base import Task
from mlserver_hftasks.tasks.encoder import Encoder

logger = logging.getLogger("mlserver.hftasks")


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
    scoring = _scoring(model, encoder, device, pad_token_id, precision)
    return Served(kind(replace(facts, steps=decoder is not None)), backend, decoder, scoring)


def _scoring(
    model: PreTrainedModel,
    encoder: Encoder,
    device: torch.device,
    pad_token_id: int,
    precision: str | None,
) -> Scoring | None:
    """Only the clone is made now: most models are never asked for explanations."""
    try:
        twin = with_shared_weights(model)
    except Exception as error:  # whatever an architecture makes of being copied
        logger.info("%s cannot be explained: %r", type(model).__name__, error)
        return None

    def make(pause: Callable[[], object]) -> Backend:
        own, probe = with_shared_weights(twin), probe_rows(encoder)
        if own.config.is_encoder_decoder:
            return EncodedScoring(own, device=device, pad_token_id=pad_token_id, pause=pause)
        return ScoringBackend(
            own, device=device, pad_token_id=pad_token_id, probe=probe, precision=precision, pause=pause
        )

    return Scoring(make, gradients=not twin.config.is_encoder_decoder)
