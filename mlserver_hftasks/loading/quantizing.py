"""Quantization on torch: what goes together, and the model quantized while it loads."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from mlserver_hftasks.backends import int8, weights
from mlserver_hftasks.backends.base import Head
from mlserver_hftasks.engine.rows import Row
from mlserver_hftasks.errors import InvalidSettings
from mlserver_hftasks.settings import WEIGHT_ONLY, Settings

WHERE = "@ parameters.extra.quantization"


def check_quantization(settings: Settings, device: torch.device, head: Head) -> None:
    """Before weights are read. Raises `InvalidSettings` for what torch cannot quantize."""
    asked = settings.quantization
    if asked in (None, "none"):
        return
    known = ("int8", *WEIGHT_ONLY) if head.generates else ("int8",)
    if asked not in known:
        kind = "that generates" if head.generates else "of one pass"
        raise InvalidSettings(
            f'got "{asked}" with the backend "torch" for a task {kind}, expected '
            f'{", ".join(map(repr, known))} or "none" {WHERE}'.replace("'", '"')
        )
    if device.type != "cpu":
        raise InvalidSettings(f'got "{asked}" on {device}, expected the CPU (device -1), or "none" {WHERE}')
    if asked == "int8" and settings.dtype not in {"auto", "float32"}:
        raise InvalidSettings(
            f'got "int8" with the dtype {settings.dtype}, expected float32 or auto: in that is what is not '
            f"int8 {WHERE}"
        )


def quantized(settings: Settings, model: PreTrainedModel, head: Head, row: Row) -> str | None:
    """Quantize the model in place, after `check_quantization`; the name of its precision, None if not asked.

    `row` is run once. Raises `InvalidSettings` if this CPU cannot.
    """
    asked = settings.quantization
    if asked is None or asked == "none":
        return None

    def run() -> None:
        inputs = {name: torch.from_numpy(values)[None] for name, values in row.arrays.items()}
        if head.generates and model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = inputs["input_ids"][:, :1]
        with torch.inference_mode():
            model.eval()(**inputs)

    if head.generates:
        weights.quantize(model, run, asked)
    else:
        int8.quantize(model, run)
    _let_go_of_the_file(model)
    return asked


def _let_go_of_the_file(model: PreTrainedModel) -> None:
    """Copy what is left of the weights: they may be views of a file that is mapped whole."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
