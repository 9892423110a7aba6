"""A traceable model to a program of `torch.export`, by the exporter of transformers."""

from __future__ import annotations

from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from transformers.exporters import DynamoConfig, DynamoExporter

from mlserver_hftasks.export.job import Export

FILE = "model.pt2"


def write(job: Export) -> str:
    """Write the program and its weights; the name of its file. Raises `ValueError` if it would not open."""
    config = DynamoConfig(dynamic=True, dynamic_shapes=job.sizes)
    program, _ = DynamoExporter().export_program(job.model, job.inputs, config)
    if any(free_unbacked_symbols(node.meta.get("val")) for node in program.graph.nodes):
        # It would be written, and could not be read.
        raise ValueError("the size of a tensor inside depends on the values of others")
    DynamoExporter.save_program(program, job.folder / FILE)
    return FILE
