"""A traceable model to a program of `torch.export`, by the exporter of transformers."""

from __future__ import annotations

from transformers.exporters import DynamoConfig, DynamoExporter

from mlserver_hftasks.export.job import Export

FILE = "model.pt2"


def write(job: Export) -> str:
    """Write the program and its weights; the name of its file."""
    config = DynamoConfig(dynamic=True, dynamic_shapes=job.sizes)
    program, _ = DynamoExporter().export_program(job.model, job.inputs, config)
    DynamoExporter.save_program(program, job.folder / FILE)
    return FILE
