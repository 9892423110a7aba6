"""A traceable model to an ONNX file, by the exporter of transformers and the steps of `graph`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.exporters import OnnxConfig, OnnxExporter

from mlserver_hftasks.backends.program import Feed
from mlserver_hftasks.export import graph

FILE = "model.onnx"


def export(model: PreTrainedModel, sample: Mapping[str, torch.Tensor], provider: str) -> Any:
    """The model as an `onnx_ir.Model` for the provider "cpu" or "cuda"; all sizes in `sample` may vary."""
    varies = {
        name: dict.fromkeys(range(tensor.dim()), torch.export.Dim.AUTO) for name, tensor in sample.items()
    }
    config = OnnxConfig(dynamic=True, dynamic_shapes=varies, ort_fusions=provider)
    program, _ = OnnxExporter().export_program(model, dict(sample), config)
    if provider == "cpu":
        graph.split_skip_norms(program)
    return program


def save(program: Any, folder: Path) -> str:
    """Write the program and its weights; the name of its file."""
    OnnxExporter.save_program(program, folder / FILE)
    return FILE


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
