"""What is compared: the same model on each backend, exported once per run of the benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.session import Session
from benchmarks.shapes import Shape
from mlserver_hftasks.loading.cache import new_folder
from mlserver_hftasks.loading.programs import export_program
from mlserver_hftasks.settings import Settings

THREADS = 1


@dataclass(frozen=True, slots=True)
class System:
    """A backend with its settings; `backend` "torch" runs the model itself."""

    name: str
    backend: str
    quantization: str = "none"
    dtype: str = "auto"
    compiled: bool = False
    speed: tuple[float, float] | None = None
    """Times torch's float32 that it shall reach, on the MiniLM and the DistilBERT shape."""

    def folder(self, session: Session, shape: Shape) -> Path:
        """The folder of a shape's model, or one with its program."""
        return self.program(session, session.model(shape), shape.name)

    def program(self, session: Session, model: Path, name: str, calibration: Sequence[str] = ()) -> Path:
        """The model's folder, or one with its program, which is exported at first use."""
        if self.backend == "torch":
            return model
        made = f"{self.backend}-{self.quantization}" + ("-compiled" if self.compiled else "")
        out = session.models / f"{name}-{made}"
        if not out.is_dir():
            session.tell(f"exporting {name} for {self.name}")
            settings = Settings.model_validate(
                {
                    "task": "text-classification",
                    "pretrained_model": str(model),
                    "backend": self.backend,
                    "quantization": self.quantization,
                    "compile": {"enable": self.compiled},
                }
            )
            with new_folder(out) as unfinished:
                export_program(settings, unfinished, calibration=calibration, tell=session.tell)
        return out

    @property
    def precision(self) -> str:
        """Of the products with weights."""
        return "int8" if self.quantization != "none" else self.dtype.replace("auto", "float32")

    @property
    def extra(self) -> dict[str, Any]:
        """Settings beside the folder."""
        own: dict[str, Any] = {"dtype": self.dtype, "intra_op_threads": THREADS}
        if self.backend == "torch":
            own["quantization"] = self.quantization
        if self.backend == "export":  # what runs code when it is loaded must be asked for
            own |= {"backend": self.backend, "compile": self.compiled}
        return own


TORCH = System("torch float32", "torch", dtype="float32")
BFLOAT16 = System("torch bfloat16", "torch", dtype="bfloat16")
TORCH_INT8 = System("torch int8", "torch", "int8", dtype="float32")
ONNX = System("ONNX Runtime float32", "onnx", speed=(1.0, 1.0))
ONNX_INT8 = System("ONNX Runtime int8", "onnx", "int8")
ONNX_STATIC = System("ONNX Runtime int8-static", "onnx", "int8-static")
OPENVINO = System("OpenVINO float32", "openvino", speed=(1.0, 1.0))
OPENVINO_BFLOAT16 = System("OpenVINO bfloat16", "openvino", dtype="bfloat16", speed=(1.6, 1.6))
OPENVINO_INT8 = System("OpenVINO int8", "openvino", "int8")
EXPORT = System("torch.export", "export")
COMPILED = System("AOTInductor", "export", compiled=True)
SYSTEMS = (TORCH, BFLOAT16, TORCH_INT8, ONNX, ONNX_INT8, OPENVINO, OPENVINO_BFLOAT16, OPENVINO_INT8)
ON_TORCH = (EXPORT, COMPILED)
"""Further ones on one shape only: compiling takes a minute."""
AGREEING = (BFLOAT16, TORCH_INT8, ONNX_INT8, ONNX_STATIC, OPENVINO_BFLOAT16, OPENVINO_INT8)
"""What shall say what float32 says."""
INT8_SPEED = (2.6, 3.2)
"""Times torch's float32 that the fastest in int8 shall reach, on the MiniLM and the DistilBERT shape."""
FEW = (TORCH, ONNX, ONNX_INT8, OPENVINO, OPENVINO_BFLOAT16)
"""Those of a quick run."""


def systems_of(session: Session) -> tuple[System, ...]:
    """All, or those of a quick run."""
    return FEW if session.plan.name == "quick" else SYSTEMS
