"""A model of transformers, run by torch as the settings say: where, in which precision, quantized or not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from mlserver_hftasks.backends.base import Head
from mlserver_hftasks.backends.torch import TorchBackend
from mlserver_hftasks.engine.rows import Row
from mlserver_hftasks.errors import InvalidSettings
from mlserver_hftasks.loading.facts import max_tokens_of, pad_token_id_of
from mlserver_hftasks.loading.generating import generating
from mlserver_hftasks.loading.placement import is_placed
from mlserver_hftasks.loading.quantizing import check_quantization, quantized
from mlserver_hftasks.loading.served import Served, model_facts, probe_rows, task_of
from mlserver_hftasks.loading.source import Source
from mlserver_hftasks.loading.threads import set_torch_threads
from mlserver_hftasks.settings import Settings
from mlserver_hftasks.tasks.encoder import Encoder


def load_eager(settings: Settings) -> Served:
    """Load what the settings describe. Raises `InvalidSettings`."""
    set_torch_threads(settings)
    device = device_of(settings.device)
    source = Source(settings)
    config = source.config()
    kind = task_of(settings, config, source.folder)
    check_quantization(settings, device, kind.head)
    if kind.head.generates:
        _check_generating(settings)
    tokenizer = source.tokenizer()
    model = source.model(kind.head, config, device)
    if is_placed(settings):
        device = model.device
    encoder = Encoder(tokenizer, max_tokens_of(settings.max_length, tokenizer, model))
    pad_token_id = pad_token_id_of(tokenizer, model)
    if kind.head.generates:
        return generating(settings, source, kind, config, model, encoder, device, pad_token_id)
    task = kind(model_facts(settings, config, encoder, source.folder))
    backend = torch_backend(
        settings, model, kind.head, device=device, pad_token_id=pad_token_id, probe=probe_rows(encoder)
    )
    return Served(task, backend)


def _check_generating(settings: Settings) -> None:
    if settings.compile is not None and settings.compile.enable:
        raise InvalidSettings(
            "got compile, but models that generate are not compiled, expected another task, or no such key "
            "@ parameters.extra.compile"
        )


def torch_backend(
    settings: Settings,
    model: PreTrainedModel,
    head: Head,
    *,
    device: torch.device,
    pad_token_id: int,
    probe: Sequence[Row],
) -> TorchBackend:
    """The backend, after `check_quantization`. Changes the model. Raises `InvalidSettings`."""
    precision = quantized(settings, model, head, probe[0])
    backend = TorchBackend(
        model,
        head,
        device=device,
        pad_token_id=pad_token_id,
        probe=probe,
        packing=settings.packing == "auto",
        precision=precision,
    )
    if settings.compile is not None and settings.compile.enable:
        backend.compile(settings.compile.backend, settings.compile.mode, probe)
    return backend


def device_of(setting: int | str | None) -> torch.device:
    """The device of the setting. Raises `InvalidSettings` if there is none such here."""
    if setting is None or setting == -1:
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    kind = "cuda" if accelerator is None else accelerator.type
    try:
        device = torch.device(setting) if isinstance(setting, str) else torch.device(kind, setting)
    except RuntimeError:
        raise InvalidSettings(
            f'got {setting!r}, expected -1, 0, "cpu", "cuda:1" or "mps" @ parameters.extra.device'
        ) from None
    if device.type != "cpu" and (accelerator is None or accelerator.type != device.type):
        raise InvalidSettings(
            f"got {setting!r}, but torch {torch.__version__} sees no {device.type} device here, expected -1 "
            "(CPU), or a machine and a torch build with that device @ parameters.extra.device"
        )
    return device
