"""A model of transformers into a folder that torch serves as it is, in the dtype that the settings name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mlserver_hftasks.loading.eager import device_of
from mlserver_hftasks.loading.making import copy_small_files
from mlserver_hftasks.loading.quantizing import check_quantization
from mlserver_hftasks.loading.served import task_of
from mlserver_hftasks.loading.source import Source
from mlserver_hftasks.settings import Settings


def save_model(settings: Settings, out: Path, *, tell: Callable[[str], None]) -> None:
    """Write weights, config, tokenizer and what tasks read into the folder `out`, which is there and empty.

    With "int8" the weights stay in float32: they are quantized while they are loaded, within a second for
    a hundred million of them. Raises `InvalidSettings`.
    """
    device = device_of(settings.device)
    source = Source(settings)
    config = source.config()
    kind = task_of(settings, config, source.folder)
    check_quantization(settings, device, kind.head)
    tell("loading the weights")
    model = source.model(kind.head, config, device)
    tell("writing the weights")
    model.save_pretrained(out)
    source.tokenizer().save_pretrained(out)
    copy_small_files(source.folder, out)
