"""A traceable model to an ONNX file, by the exporter of transformers and the steps of `graph`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from transformers.exporters import OnnxConfig, OnnxExporter

from mlserver_hftasks.backends.program import Feed, Layout, ProgramBackend, Reads
from mlserver_hftasks.export import graph
from mlserver_hftasks.export.early import read_early
from mlserver_hftasks.export.job import Export

FILE = "model.onnx"
BATCH = 16
"""Rows that are calibrated together."""


def write(job: Export) -> str:
    """Write the program and its weights; the name of its file."""
    program = _traced(job)
    if job.order.quantization != "none":
        job.tell(f"quantizing to {job.order.quantization}")
        _quantize(program, job)
    if job.plan.reads in (Reads.FIRST, Reads.SELECTED) and job.plan.layout is Layout.LANES:
        read_early(program)
    OnnxExporter.save_program(program, job.folder / FILE)
    return FILE


def _traced(job: Export) -> Any:
    """The model as an `onnx_ir.Model`."""
    config = OnnxConfig(dynamic=True, dynamic_shapes=job.sizes, ort_fusions=job.order.provider)
    program, _ = OnnxExporter().export_program(job.model, job.inputs, config)
    if job.order.provider == "cpu":
        graph.split_skip_norms(program)
    return program


def _quantize(program: Any, job: Export) -> None:
    if job.order.quantization == "int8":
        graph.quantize_rows(program)
        return
    rows = job.calibration
    batches = (rows[start : start + BATCH] for start in range(0, len(rows), BATCH))
    feeds = (ProgramBackend.feed_of(job.plan, batch) for batch in batches)
    graph.quantize_static(program, largest_inputs(program, feeds, job.folder))


def largest_inputs(program: Any, feeds: Iterable[Feed], folder: Path) -> dict[str, float]:
    """The largest magnitude, over the feeds, of the inputs of the products that `graph` quantizes."""
    import onnxruntime

    names = sorted({str(node.inputs[0].name) for node in graph.products(program)})
    values = {str(node.inputs[0].name): node.inputs[0] for node in graph.products(program)}
    count = len(program.graph.outputs)
    program.graph.outputs.extend(values[name] for name in names if not values[name].is_graph_output())
    try:
        OnnxExporter.save_program(program, folder / "calibration.onnx")
        session = onnxruntime.InferenceSession(
            folder / "calibration.onnx", providers=["CPUExecutionProvider"]
        )
        largest = dict.fromkeys(names, 0.0)
        for feed in feeds:
            inputs = {each.name: feed[each.name] for each in session.get_inputs()}
            for name, array in zip(names, session.run(names, inputs), strict=True):
                largest[name] = max(largest[name], float(np.abs(array).max()))
        return largest
    finally:
        del program.graph.outputs[count:]
        for path in folder.glob("calibration.onnx*"):
            path.unlink()
