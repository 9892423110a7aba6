"""OpenVINO: programs in `.xml` and `.bin` files, on a CPU or an Intel GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlserver_hftasks.backends.onnx import default_threads
from mlserver_hftasks.backends.program import Feed
from mlserver_hftasks.engine.rows import FloatArray
from mlserver_hftasks.errors import InvalidSettings

PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
GROUP = 128
"""Columns of an activation that share a scale, where the weights are int8."""


class OpenVINORunner:
    """An OpenVINO program, or an ONNX one run by OpenVINO; see `program.Runner`.

    `dtype` is what it computes in, "float32" or "bfloat16". Raises `InvalidSettings` for what cannot be
    opened.
    """

    def __init__(
        self, path: Path, *, threads: int | None = None, dtype: str = "float32", device: str = "CPU"
    ) -> None:
        openvino = _openvino()
        properties: dict[str, object] = {
            "INFERENCE_PRECISION_HINT": PRECISIONS[dtype],
            "PERFORMANCE_HINT": "LATENCY",
        }
        if device == "CPU":
            properties["INFERENCE_NUM_THREADS"] = threads or default_threads()
            properties["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = GROUP
        try:
            self._program = openvino.Core().compile_model(str(path), device, properties)
        except Exception as error:  # OpenVINO raises RuntimeError and worse
            raise InvalidSettings(
                f"'{path.name}' cannot be opened by OpenVINO: {' '.join(str(error).split())[-300:]}, "
                "expected a program that it can run @ parameters.extra.file_name"
            ) from None
        self._request = self._program.create_infer_request()
        self.inputs = frozenset(port.get_any_name() for port in self._program.inputs)
        self._names = [port.get_any_name() for port in self._program.outputs]
        self.outputs = frozenset(self._names)

    def run(self, feed: Feed) -> Mapping[str, FloatArray]:
        """See `program.Runner`."""
        self._request.infer(feed, share_inputs=True)
        return {
            name: np.array(self._request.get_output_tensor(index).data, np.float32)
            for index, name in enumerate(self._names)
        }

    def close(self) -> None:
        """See `program.Runner`."""
        del self._request, self._program


def computes_bfloat16() -> bool:
    """Whether the CPU has instructions for it."""
    return "BF16" in _openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _openvino() -> Any:
    try:
        import openvino
    except ImportError:
        raise InvalidSettings(
            "got 'openvino', but it is not installed, expected it: "
            "pip install 'mlserver-hftasks[openvino]' @ parameters.extra.backend"
        ) from None
    return openvino
