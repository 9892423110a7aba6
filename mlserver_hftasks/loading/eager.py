"""A model of transformers, run by torch as the settings say: where, in which precision, quantized or not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from mlserver_hftasks.backends import int8
from mlserver_hftasks.backends.base import Head
from mlserver_hftasks.backends.torch import TorchBackend
from mlserver_hftasks.engine.rows import Row
from mlserver_hftasks.errors import InvalidSettings
from mlserver_hftasks.loading.facts import max_tokens_of, pad_token_id_of
from mlserver_hftasks.loading.generating import generating
from mlserver_hftasks.loading.placement import is_placed
from mlserver_hftasks.loading.served import Served, model_facts, probe_rows, task_of
from mlserver_hftasks.loading.source import Source
from mlserver_hftasks.loading.threads import set_torch_threads
from mlserver_hftasks.settings import Settings
from mlserver_hftasks.tasks.encoder import Encoder


def load_eager(settings: Settings) -> Served:
    """Load what the settings describe. Raises `InvalidSettings`."""
    set_torch_threads(settings)
    device = device_of(settings.device)
    check_quantization(settings, device)
    source = Source(settings)
    config = source.config()
    kind = task_of(settings, config, source.folder)
    tokenizer = source.tokenizer()
    model = source.model(kind.head, config, device)
    if is_placed(settings):
        device = model.device
    encoder = Encoder(tokenizer, max_tokens_of(settings.max_length, tokenizer, model))
    pad_token_id = pad_token_id_of(tokenizer, model)
    if kind.head.generates:
        _check_generating(settings)
        return generating(settings, source, kind, config, model, encoder, device, pad_token_id)
    task = kind(model_facts(settings, config, encoder, source.folder))
    backend = torch_backend(
        settings, model, kind.head, device=device, pad_token_id=pad_token_id, probe=probe_rows(encoder)
    )
    return Served(task, backend)


def check_quantization(settings: Settings, device: torch.device) -> None:
    """Before anything is read. Raises `InvalidSettings` for what torch cannot quantize."""
    if settings.quantization in (None, "none"):
        return
    where = "@ parameters.extra.quantization"
    if settings.quantization != "int8":
        raise InvalidSettings(
            f'got "{settings.quantization}", expected "int8" or "none" with the backend "torch" {where}'
        )
    if device.type != "cpu":
        raise InvalidSettings(f'got "int8" on {device}, expected the CPU (device -1), or "none" {where}')
    if settings.dtype not in {"auto", "float32"}:
        raise InvalidSettings(
            f'got "int8" with the dtype {settings.dtype}, expected float32 or auto: in that is what is not '
            f"int8 {where}"
        )


def _check_generating(settings: Settings) -> None:
    asked = {"quantization": settings.quantization not in (None, "none")}
    asked["compile"] = settings.compile is not None and settings.compile.enable
    for name, wanted in asked.items():
        if wanted:
            raise InvalidSettings(
                f"got {name}, but models that generate run as they are, expected another task, or no such "
                f"key @ parameters.extra.{name}"
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
    quantized = settings.quantization == "int8"
    if quantized:
        int8.quantize(model, lambda: _run(model, probe[0]))
    backend = TorchBackend(
        model,
        head,
        device=device,
        pad_token_id=pad_token_id,
        probe=probe,
        packing=settings.packing == "auto",
        precision="int8" if quantized else None,
    )
    if settings.compile is not None and settings.compile.enable:
        backend.compile(settings.compile.backend, settings.compile.mode, probe)
    return backend


def _run(model: PreTrainedModel, row: Row) -> None:
    with torch.inference_mode():
        model.eval()(**{name: torch.from_numpy(values)[None] for name, values in row.arrays.items()})


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
