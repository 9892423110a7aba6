"""A traceable model to an ONNX file, by the exporter of transformers and the steps of `graph`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers.exporters import OnnxConfig, OnnxExporter

from mlserver_hftasks.backends.program import Feed, Layout, Plan, ProgramBackend, Reads
from mlserver_hftasks.engine.rows import Row
from mlserver_hftasks.export import graph, static
from mlserver_hftasks.export.early import read_early
from mlserver_hftasks.export.job import Export

FILE = "model.onnx"
BATCH = 16
"""Most rows that are calibrated together."""


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
    feeds = calibration_feeds(job.plan, job.calibration)
    static.quantize(program, observe(program, feeds, job.folder))


def calibration_feeds(plan: Plan, rows: Sequence[Row]) -> Iterator[Feed]:
    """The rows as a program of that plan takes them: together as when it is served, but a few at a time."""
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        for indices in ProgramBackend.passes_of(plan, batch):
            yield ProgramBackend.feed_of(plan, [batch[index] for index in indices])


def observe(program: Any, feeds: Iterable[Feed], folder: Path) -> dict[str, static.Observed]:
    """The inputs of the products that `graph` quantizes, by name, over the feeds."""
    import onnxruntime

    values = {str(node.inputs[0].name): node.inputs[0] for node in graph.products(program)}
    seen = {name: static.Observed.nothing() for name in values}
    count = len(program.graph.outputs)
    program.graph.outputs.extend(value for value in values.values() if not value.is_graph_output())
    try:
        OnnxExporter.save_program(program, folder / "calibration.onnx")
        session = onnxruntime.InferenceSession(
            folder / "calibration.onnx", providers=["CPUExecutionProvider"]
        )
        for feed in feeds:
            inputs = {each.name: feed[each.name] for each in session.get_inputs()}
            for name, array in zip(seen, session.run(list(seen), inputs), strict=True):
                seen[name].add(array.reshape(-1, array.shape[-1]))
        return seen
    finally:
        del program.graph.outputs[count:]
        for path in folder.glob("calibration.onnx*"):
            path.unlink()
