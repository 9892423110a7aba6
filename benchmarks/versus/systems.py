"""What is compared: a row per system, with its settings. A new backend of ours is a new row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.server import OURS, Model
from mlserver_hftasks.loading.cache import new_folder
from mlserver_hftasks.loading.programs import export_program
from mlserver_hftasks.settings import Settings
from tests.compat import peer

Role = Literal["ours", "incumbent", "ceiling", "other"]

ROOT = Path(__file__).resolve().parents[2]
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}


@dataclass(frozen=True, slots=True)
class System:
    """One way to serve a text-classification model, on one model thread."""

    name: str
    role: Role
    dtype: str = "float32"
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Of `parameters.extra`, beside the task and the threads."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of model-settings.json, beside `parameters`."""
    program: Mapping[str, Any] | None = None
    """Settings with which the model is exported first, to be served from the folder that comes of it."""
    input_name: str = "args"
    """Of single texts: requests with `args` cannot be merged by MLServer's adaptive batching."""
    quick: bool = True
    """Whether the quick run has it."""

    def model(self, name: str, folder: Path | None, task: str = "text-classification", **extra: Any) -> Model:
        """That model as this system serves it."""
        if self.role == "ceiling":
            return Model(name, implementation="benchmarks.echo.EchoRuntime")
        implementation = OURS if self.role == "ours" else "mlserver_huggingface.HuggingFaceRuntime"
        # the incumbent heeds its number of threads only where the framework is named
        threads = {"intra_op_threads": 1, "framework": "pt"}
        settings = {"task": task, **threads, **self.extra, **extra}
        return Model(name, self._exported(folder, task), settings, implementation, self.settings)

    def _exported(self, folder: Path | None, task: str) -> Path | None:
        """The folder that is served, made beside the model's at first need."""
        if folder is None or self.program is None:
            return folder
        out = folder.with_name("-".join([folder.name, task, *map(str, self.program.values())]))
        if not out.is_dir():
            with new_folder(out) as unfinished:
                source = {"task": task, "pretrained_model": str(folder), **self.program}
                export_program(Settings(**source), unfinished, tell=lambda what: None)
        return out

    def server_options(self) -> dict[str, Any]:
        """How `benchmarks.server` starts it."""
        if self.role == "incumbent":
            return {"mlserver": peer.python().with_name("mlserver"), "environment": QUIET}
        return {"environment": {"PYTHONPATH": str(ROOT)} if self.role == "ceiling" else {}}


FP32 = System("ours fp32", "ours")
FP32_PADDED = System("ours fp32, packing off", "ours", extra={"packing": "off"}, quick=False)
ONNX = System("ours fp32, ONNX Runtime", "ours", program={"backend": "onnx"})
BF16 = System("ours bf16", "ours", "bfloat16", extra={"dtype": "bfloat16"}, quick=False)
BF16_OPENVINO = System(
    "ours bf16, OpenVINO",
    "ours",
    "bfloat16",
    extra={"dtype": "bfloat16"},
    program={"backend": "openvino"},
    quick=False,
)
INT8 = System("ours int8", "ours", "int8", extra={"quantization": "int8"}, quick=False)
INT8_ONNX = System(
    "ours int8, ONNX Runtime", "ours", "int8", program={"backend": "onnx", "quantization": "int8"}
)
PLAIN = System("mlserver-huggingface", "incumbent")
BATCHING = System(
    "mlserver-huggingface, batching",
    "incumbent",
    settings={"max_batch_size": 16, "max_batch_time": 0.01},
    input_name="array_inputs",
)
ECHO = System("echo", "ceiling", quick=False)

SYSTEMS = (FP32, FP32_PADDED, ONNX, BF16, BF16_OPENVINO, INT8, INT8_ONNX, PLAIN, BATCHING, ECHO)
"""All that is started here; the figures take the best of ours of each dtype."""

OURS_FP32 = (FP32, ONNX)
INCUMBENTS = tuple(system for system in SYSTEMS if system.role == "incumbent")


def chosen(*, quick: bool) -> tuple[System, ...]:
    """The systems of a run."""
    return tuple(system for system in SYSTEMS if system.quick or not quick)
