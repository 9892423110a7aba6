"""`hftasks check`: whether a folder can be served, and how it will be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from mlserver_hftasks.cli.edge import console, one_line, quiet
from mlserver_hftasks.cli.texts import own_items
from mlserver_hftasks.cli.trial import Tried, tried
from mlserver_hftasks.loading import load, memory
from mlserver_hftasks.runtime.configuration import limits_of
from mlserver_hftasks.runtime.folder import read_folder
from mlserver_hftasks.runtime.metadata import input_tensors, output_tensors
from mlserver_hftasks.settings import Settings

HELP = """
Check a model's folder: read its settings, load it, run it, and print what will be served and how.

    hftasks check models/sst2

Exits with 1 and the reason in one line if the model could not be served.
"""
MOST_LABELS = 8


def command(
    folder: Annotated[Path, typer.Argument(help="Folder with a model-settings.json.", show_default=False)],
) -> None:
    """See `HELP`."""
    with one_line():
        with quiet(), console.status(f"loading {folder}"):
            memory.manage()
            name, settings = read_folder(folder)
            trial = tried(load(settings))
            trial.outputs(trial.rows(own_items(trial.served.task.name)))
        _show(name, settings, trial)
        trial.served.close()


def _show(name: str, settings: Settings, trial: Tried) -> None:
    for title, values in (
        ("model", _model(name, trial)),
        ("runs", _runs(trial)),
        ("limits", _limits(settings)),
    ):
        table = Table("", "", title=title, title_justify="left", show_header=False)
        for key, value in values.items():
            table.add_row(key, str(value))
        console.print(table)
    console.print(_tensors("inputs and parameters", input_tensors(trial.served.task.signature)))
    console.print(_tensors("outputs", output_tensors(trial.served.task.signature)))
    console.print(f"[green]{name} can be served[/]", highlight=False)


def _model(name: str, trial: Tried) -> Mapping[str, Any]:
    model = trial.served.task.model
    labels = model.labels[:MOST_LABELS]
    if len(model.labels) > MOST_LABELS:
        labels += (f"... {len(model.labels)} in all",)
    return {
        "name": name,
        "task": trial.served.task.name,
        "architecture": ", ".join(model.config.architectures or ("unknown",)),
        "labels": ", ".join(labels) or "none",
        "longest text, tokens": model.encoder.max_tokens,
    }


def _runs(trial: Tried) -> Mapping[str, Any]:
    how = trial.served.description
    return {
        "backend": how.backend,
        "device": how.device,
        "dtype": how.dtype,
        "batches": how.packing,
        "threads": torch.get_num_threads(),
        **trial.speed(),
    }


def _limits(settings: Settings) -> Mapping[str, Any]:
    limits = limits_of(settings)
    return {
        "rows of a batch": limits.max_batch_rows,
        "tokens of a batch": limits.max_batch_tokens,
        "rows that wait": limits.max_queue_rows,
        "tokens that wait": limits.max_queue_tokens,
        "latency target": _milliseconds(settings.latency_target_ms),
        "timeout": _milliseconds(settings.timeout_ms),
        "items of a request": settings.max_items,
        "characters of a text": settings.max_text_chars,
    }


def _milliseconds(value: float | None) -> str:
    return "none" if value is None else f"{value:g} ms"


def _tensors(title: str, tensors: list[Any]) -> Table:
    table = Table("name", "datatype", "shape", "what", title=title, title_justify="left")
    for tensor in tensors:
        datatype = getattr(tensor.datatype, "value", tensor.datatype)
        described = getattr(tensor.parameters, "description", None)
        table.add_row(tensor.name, str(datatype), str(tensor.shape), described or "")
    return table
