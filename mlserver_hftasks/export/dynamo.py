"""A traceable model to a program of `torch.export`, by the exporter of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.exporters import DynamoConfig, DynamoExporter

FILE = "model.pt2"


def export(model: PreTrainedModel, sample: Mapping[str, torch.Tensor]) -> Any:
    """The model as an `ExportedProgram`; all dimensions of `sample` may vary."""
    varies = {
        name: dict.fromkeys(range(tensor.dim()), torch.export.Dim.AUTO) for name, tensor in sample.items()
    }
    program, _ = DynamoExporter().export_program(
        model, dict(sample), DynamoConfig(dynamic=True, dynamic_shapes=varies)
    )
    return program


def save(program: Any, folder: Path) -> str:
    """Write the program and its weights; the name of its file."""
    DynamoExporter.save_program(program, folder / FILE)
    return FILE
