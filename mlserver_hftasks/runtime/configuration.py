"""From MLServer's model settings, and the environment, to ours."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import mlserver

from mlserver_hftasks.engine.scheduler import Limits
from mlserver_hftasks.engine.steps import StepLimits
from mlserver_hftasks.errors import InvalidRequest, InvalidSettings
from mlserver_hftasks.explain.allowed import check_uri
from mlserver_hftasks.explain.options import ExplainOptions
from mlserver_hftasks.settings import Settings, read_settings

DEFAULT_BATCH_ROWS = 256
DEFAULT_SEQUENCES = 64
"""Sequences that are generated at once."""
PREFILL_TOKENS = {"cpu": 128}
"""Most tokens of prompts in a step: on a CPU about as much as a step of many sequences costs without."""


def settings_of(settings: mlserver.ModelSettings) -> Settings:
    """The model's settings. Raises `InvalidSettings`."""
    extra = dict((settings.parameters and settings.parameters.extra) or {})
    uri = settings.parameters.uri if settings.parameters else None
    defaults: dict[str, Any] = {"pretrained_model": uri} if uri else {}
    if settings.max_batch_size > 1:
        defaults["batch_size"] = settings.max_batch_size
    read = read_settings(extra, os.environ, defaults)
    options = dict(read.explain)
    if read.explainer_type is not None:
        options.setdefault("method", read.explainer_type)
    _check_options(options)
    if read.infer_uri is not None:
        check_uri(read.infer_uri, os.environ)
    changed = {
        "explain": options,
        "pretrained_model": _resolved(settings, read.pretrained_model or uri),
        "pretrained_tokenizer": _resolved(settings, read.pretrained_tokenizer),
    }
    return read.model_copy(update=changed)


def _check_options(options: dict[str, Any]) -> None:
    try:
        ExplainOptions.read(options, "parameters.extra.explain")
    except InvalidRequest as error:
        raise InvalidSettings(str(error)) from None


def take_over_batching(settings: mlserver.ModelSettings) -> None:
    """Keep MLServer's own batcher away: it waits on an idle server and mixes clients' parameters.

    The size moves to `extra`, since the changed settings are what parallel workers get.
    """
    if settings.max_batch_size > 1 and settings.parameters is not None:
        settings.parameters.extra = {
            "batch_size": settings.max_batch_size,
            **(settings.parameters.extra or {}),
        }
    settings.max_batch_size = 0
    settings.max_batch_time = 0.0


def limits_of(settings: Settings) -> Limits:
    """The bounds of the engine."""
    target = settings.latency_target_ms
    return Limits(
        max_batch_rows=settings.batch_size or DEFAULT_BATCH_ROWS,
        max_batch_tokens=settings.max_batch_tokens,
        max_queue_rows=settings.max_queue_rows,
        max_queue_tokens=settings.max_queue_tokens,
        latency_target_s=None if target is None else target / 1e3,
    )


def step_limits_of(settings: Settings, device: str) -> StepLimits:
    """The bounds of the generating engine; `device` as its backend describes it."""
    return StepLimits(
        max_sequences=settings.batch_size or DEFAULT_SEQUENCES,
        prefill_tokens=min(PREFILL_TOKENS.get(device, 2048), settings.max_batch_tokens),
        max_queue_rows=settings.max_queue_rows,
        max_queue_tokens=settings.max_queue_tokens,
    )


def _resolved(settings: mlserver.ModelSettings, name: str | None) -> str | None:
    """A folder as an absolute path, relative to the model's own folder first; a hub id as it is."""
    if not name:
        return None
    name = name.removeprefix("file://")
    here = Path(mlserver.utils.to_absolute_path(settings, name))
    return next((str(path.resolve()) for path in (here, Path(name)) if path.is_dir()), name)
