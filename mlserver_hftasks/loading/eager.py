"""A model of transformers as the settings want it run by torch: in which precision, quantized or not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from mlserver_hftasks.backends import int8
from mlserver_hftasks.backends.base import Head
from mlserver_hftasks.backends.torch import TorchBackend
from mlserver_hftasks.engine.rows import Row
from mlserver_hftasks.errors import InvalidSettings
from mlserver_hftasks.loading.memory import keep_freed_memory
from mlserver_hftasks.settings import Settings


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
    keep_freed_memory()
    quantized = settings.quantization == "int8"
    if quantized:
        int8.quantize(model, lambda: _run(model, probe[0]))
    return TorchBackend(
        model,
        head,
        device=device,
        pad_token_id=pad_token_id,
        probe=probe,
        packing=settings.packing == "auto",
        precision="int8" if quantized else None,
    )


def _run(model: PreTrainedModel, row: Row) -> None:
    with torch.inference_mode():
        model.eval()(**{name: torch.from_numpy(values)[None] for name, values in row.arrays.items()})
