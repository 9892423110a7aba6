"""A traceable model to an OpenVINO file, by the exporter of transformers; int8 weights by this module."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers.exporters import OpenVINOConfig, OpenVINOExporter

from mlserver_hftasks.export.job import Export

FILE = "openvino_model.xml"
STEPS = 127
TINY = 1e-30
FEWEST_COLUMNS = 32
"""Products with fewer columns, a classifier's, stay in float."""


def write(job: Export) -> str:
    """Write the program and its weights; the name of its file."""
    config = OpenVINOConfig(dynamic=True, dynamic_shapes=job.sizes)
    program, _ = OpenVINOExporter().export_program(job.model, job.inputs, config)
    if job.order.quantization == "int8":
        job.tell("compressing the weights to int8")
        compress_weights(program)
    OpenVINOExporter.save_program(program, job.folder / FILE)
    return FILE


def compress_weights(program: Any) -> int:
    """Weights of products as int8 with a scale per column; how many.

    On a CPU OpenVINO then quantizes the activations too, while it runs, with scales per token and group of
    columns (its property DYNAMIC_QUANTIZATION_GROUP_SIZE).
    """
    from openvino import opset13

    count = 0
    for node in program.get_ordered_ops():
        weight = _weight(node)
        if weight is None:
            continue
        axis = 1 if node.get_attributes()["transpose_b"] else 0
        steps = np.maximum(np.abs(weight).max(axis=axis, keepdims=True), TINY).astype(np.float32) / STEPS
        whole = opset13.convert(opset13.constant(np.rint(weight / steps).astype(np.int8)), "f32")
        node.input(1).replace_source_output(opset13.multiply(whole, opset13.constant(steps)).output(0))
        count += 1
    return count


def _weight(node: Any) -> np.ndarray[Any, np.dtype[np.float32]] | None:
    if node.get_type_name() != "MatMul":
        return None
    source = node.input_value(1).get_node()
    if source.get_type_name() != "Constant" or len(source.shape) != 2 or min(source.shape) < FEWEST_COLUMNS:
        return None
    weight: np.ndarray[Any, np.dtype[np.float32]] = source.data
    return weight if weight.dtype == np.float32 else None
