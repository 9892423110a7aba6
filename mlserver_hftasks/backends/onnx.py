"""ONNX Runtime: programs in `.onnx` files, ours or Optimum's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlserver_hftasks.backends.program import Feed
from mlserver_hftasks.engine.rows import FloatArray
from mlserver_hftasks.errors import InvalidSettings

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
OPTIONS: dict[str, frozenset[str]] = {
    CPU: frozenset({"use_arena"}),
    CUDA: frozenset(
        {
            "device_id",
            "gpu_mem_limit",
            "arena_extend_strategy",
            "do_copy_in_default_stream",
            "use_tf32",
            "prefer_nhwc",
            "enable_skip_layer_norm_strict_mode",
        }
    ),
    TENSORRT: frozenset(
        {
            "device_id",
            "trt_max_workspace_size",
            "trt_fp16_enable",
            "trt_bf16_enable",
            "trt_int8_enable",
            "trt_engine_cache_enable",
            "trt_engine_cache_path",
            "trt_timing_cache_enable",
            "trt_timing_cache_path",
            "trt_builder_optimization_level",
        }
    ),
}
"""What `provider_options` may hold; all of it is about speed and memory."""
SILENT = 4
"""Severity of the runtime's own log: what fails is an exception anyway."""
SLOW_FUSIONS = ["SkipLayerNormFusion"]
"""ONNX Runtime would undo `export.graph.split_skip_norms` when it opens the program."""


def check_options(provider: str | None, options: Mapping[str, object]) -> None:
    """Raises `InvalidSettings` for an option that the provider has not, or that is not in the list."""
    known = OPTIONS[provider or CPU]
    if unknown := sorted(set(options) - known):
        raise InvalidSettings(
            f"got {unknown[0]!r}, expected {', '.join(sorted(known))} for {provider or CPU} "
            "@ parameters.extra.provider_options"
        )


def open_session(
    path: Path,
    threads: int | None = None,
    provider: str = CPU,
    provider_options: Mapping[str, Any] | None = None,
) -> Any:
    """An `onnxruntime.InferenceSession`; `threads` of one operator, all cores if None.

    Raises `InvalidSettings` for what cannot be opened.
    """
    runtime = _onnxruntime()
    if provider not in runtime.get_available_providers():
        raise InvalidSettings(
            f"got {provider}, but this onnxruntime has {', '.join(runtime.get_available_providers())}; "
            "expected one of them; pip install 'mlserver-hftasks[onnx-gpu]' @ parameters.extra.provider"
        )
    options = runtime.SessionOptions()
    options.log_severity_level = SILENT
    options.intra_op_num_threads = threads or default_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    chosen = [(provider, {name: str(value) for name, value in (provider_options or {}).items()})]
    try:
        return runtime.InferenceSession(
            str(path),
            options,
            providers=chosen if provider == CPU else [*chosen, (CPU, {})],
            disabled_optimizers=SLOW_FUSIONS if provider == CPU else None,
        )
    except Exception as error:  # the runtime's own exceptions share no class of their own
        raise InvalidSettings(
            f"'{path.name}' cannot be opened by ONNX Runtime: {' '.join(str(error).split()):.300}, "
            "expected a program that it can run @ parameters.extra.file_name"
        ) from None


class OnnxRunner:
    """An ONNX program; see `program.Runner`.

    `threads` of one operator, all cores if None. Raises `InvalidSettings` for what cannot be opened.
    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None = None,
        provider: str = CPU,
        provider_options: Mapping[str, Any] | None = None,
    ) -> None:
        self._session = open_session(path, threads, provider, provider_options)
        self.inputs = frozenset(each.name for each in self._session.get_inputs())
        self._types = {each.name: _DTYPES.get(each.type, np.int64) for each in self._session.get_inputs()}
        self._names = [each.name for each in self._session.get_outputs()]
        self.outputs = frozenset(self._names)

    def run(self, feed: Feed) -> Mapping[str, FloatArray]:
        """See `program.Runner`."""
        arrays = {name: np.asarray(array, self._types[name]) for name, array in feed.items()}
        outputs = self._session.run(self._names, arrays)
        return {name: np.asarray(array, np.float32) for name, array in zip(self._names, outputs, strict=True)}

    def close(self) -> None:
        """See `program.Runner`."""
        del self._session


_DTYPES: dict[str, npt.DTypeLike] = {
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}


def default_threads() -> int:
    """As torch counts: OMP_NUM_THREADS, else the cores that this process may use."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdecimal() and int(given) > 0:
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise InvalidSettings(
            "got 'onnx', but onnxruntime is not installed, expected it: "
            "pip install 'mlserver-hftasks[onnx]' @ parameters.extra.backend"
        ) from None
    return onnxruntime
