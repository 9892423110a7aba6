"""From settings and a program's file to what runs it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from mlserver_hftasks.backends.base import Description, Head
from mlserver_hftasks.backends.program import Layout, Runner
from mlserver_hftasks.errors import InvalidSettings
from mlserver_hftasks.loading.manifest import Manifest, Program
from mlserver_hftasks.settings import Settings


def open_runner(settings: Settings, program: Program, layout: Layout) -> tuple[Runner, Description]:
    """The program, loaded, and how it runs. Raises `InvalidSettings` for what does not go together."""
    if program.backend != "onnx" and (settings.provider or settings.provider_options):
        raise InvalidSettings(
            f'got a provider with the backend "{program.backend}", expected one with "onnx" only '
            "@ parameters.extra.provider"
        )
    opened: tuple[Runner, Description] = _OPEN[program.backend](settings, program, layout)
    return opened


def check_head(head: Head, backend: str) -> None:
    """Raises `InvalidSettings` for a task that no program of that backend serves."""
    if head.generates and (backend != "onnx" or head.auto_class != DECODERS):
        raise InvalidSettings(
            f'got "{backend}" for a model of the kind {head.auto_class.removeprefix("AutoModelFor")}, which '
            'generates, expected "torch", or "onnx" for one that continues texts @ parameters.extra.backend'
        )


def check_stepping(settings: Settings, program: Program) -> str:
    """The precision of a decoder's program. Raises `InvalidSettings` for what does not go with one."""
    if _accelerator(settings.device) is not None or settings.provider not in (None, "CPUExecutionProvider"):
        raise InvalidSettings(
            f'got {settings.provider or settings.device!r} for a decoder with the backend "onnx", expected '
            'the CPU (device -1), or the backend "torch" @ parameters.extra.device'
        )
    _only_float(settings, '"onnx"')
    return _precision(settings, program)


def _open_onnx(settings: Settings, program: Program, layout: Layout) -> tuple[Runner, Description]:
    from mlserver_hftasks.backends import onnx

    provider, options = _provider(settings)
    onnx.check_options(provider, options)
    if provider != onnx.CPU and _quantization(settings, program) != "none":
        raise InvalidSettings(
            f"got a quantized program on {provider}, expected the CPU (device -1) or a program in float "
            "@ parameters.extra.device"
        )
    _only_float(settings, '"onnx"')
    runner = onnx.OnnxRunner(
        program.path, threads=settings.intra_op_threads, provider=provider, provider_options=options
    )
    device = "cpu" if provider == onnx.CPU else f"cuda:{options.get('device_id', 0)}"
    return runner, Description("onnx", device, _precision(settings, program), layout.value)


def _provider(settings: Settings) -> tuple[str, Mapping[str, str | int | bool]]:
    from mlserver_hftasks.backends import onnx

    index = _accelerator(settings.device)
    provider = settings.provider or (onnx.CPU if index is None else onnx.CUDA)
    if provider != onnx.CPU and index is not None:
        return provider, {"device_id": index, **settings.provider_options}
    return provider, settings.provider_options


def _accelerator(device: int | str | None) -> int | None:
    """The number of the CUDA device that the setting names, None for the CPU."""
    if device in (None, -1, "cpu"):
        return None
    found = re.fullmatch(r"(?:cuda:?)?(\d*)", str(device))
    if found is None:
        raise InvalidSettings(
            f'got {device!r}, expected -1, 0, "cpu" or "cuda:1" with this backend @ parameters.extra.device'
        )
    return int(found[1] or 0)


def _open_openvino(settings: Settings, program: Program, layout: Layout) -> tuple[Runner, Description]:
    from mlserver_hftasks.backends import openvino

    if settings.device not in (None, -1, "cpu"):
        raise InvalidSettings(
            f'got {settings.device!r}, expected -1 or "cpu" with "openvino" @ parameters.extra.device'
        )
    quantized = _quantization(settings, program) != "none"
    if settings.dtype != "auto":
        dtype = settings.dtype
    else:
        # Where the rest is bfloat16, int8 products are exact to the row, and faster.
        dtype = "bfloat16" if quantized and openvino.computes_bfloat16() else "float32"
    runner = openvino.OpenVINORunner(program.path, threads=settings.intra_op_threads, dtype=dtype)
    precision = _precision(settings, program) if quantized else dtype
    return runner, Description("openvino", "cpu", precision, layout.value)


def _open_exported(settings: Settings, program: Program, layout: Layout) -> tuple[Runner, Description]:
    from mlserver_hftasks.backends.exported import ExportedRunner

    compiled = program.manifest is not None and program.manifest.compiled_for is not None
    _check_trusted(settings, compiled=compiled)
    _only_float(settings, '"export"')
    device = _torch_device(settings)
    if program.manifest is not None and program.manifest.compiled_for is not None:
        return _open_compiled(program, program.manifest, device, layout)
    return ExportedRunner(program.path, device), Description("export", device, "float32", layout.value)


def _check_trusted(settings: Settings, *, compiled: bool) -> None:
    """Raises `InvalidSettings` for a file that a folder holds and no setting names: reading it runs code."""
    if settings.trust_remote_code:
        return
    if compiled and (settings.compile is None or not settings.compile.enable):
        raise InvalidSettings(
            "the folder holds machine code, which runs when it is loaded, expected compile=true or "
            "trust_remote_code=true for a folder that you trust @ parameters.extra.compile"
        )
    if not compiled and settings.chosen_backend != "export":
        raise InvalidSettings(
            "the folder holds a program of torch.export, which may run code when it is loaded, expected "
            'backend="export" or trust_remote_code=true for a folder that you trust '
            "@ parameters.extra.backend"
        )


def _open_compiled(
    program: Program, manifest: Manifest, device: str, layout: Layout
) -> tuple[Runner, Description]:
    from mlserver_hftasks.backends.compiled import CompiledRunner, check_made_for

    if device != "cpu":
        raise InvalidSettings(
            f"got a program that is compiled for a CPU on {device}, expected device -1 "
            "@ parameters.extra.device"
        )
    check_made_for(manifest.compiled_for or (), manifest.made_with.get("torch", "unknown"))
    return CompiledRunner(program.path), Description("aotinductor", device, "float32", layout.value)


def _open_torchscript(settings: Settings, program: Program, layout: Layout) -> tuple[Runner, Description]:
    from mlserver_hftasks.backends.torchscript import TorchScriptRunner

    device = _torch_device(settings)
    return TorchScriptRunner(program.path, device), Description(
        "torchscript", device, "float32", layout.value
    )


def _torch_device(settings: Settings) -> str:
    from mlserver_hftasks.loading.eager import device_of
    from mlserver_hftasks.loading.threads import set_torch_threads

    set_torch_threads(settings)
    return str(device_of(settings.device))


def _only_float(settings: Settings, backend: str) -> None:
    if settings.dtype not in ("auto", "float32"):
        raise InvalidSettings(
            f'got "{settings.dtype}" with the backend {backend}, expected "auto" or "float32", or the '
            'backend "openvino" or "torch" @ parameters.extra.dtype'
        )


def _quantization(settings: Settings, program: Program) -> str:
    return (settings.quantization or "none") if program.manifest is None else program.manifest.quantization


def _precision(settings: Settings, program: Program) -> str:
    quantization = _quantization(settings, program)
    if quantization != "none":
        return quantization
    return "float32" if program.manifest is None else program.manifest.dtype


DECODERS = "AutoModelForCausalLM"
"""Models that continue a text, and have no encoder."""
_OPEN: dict[str, Callable[[Settings, Program, Layout], tuple[Runner, Description]]] = {
    "onnx": _open_onnx,
    "openvino": _open_openvino,
    "export": _open_exported,
    "torchscript": _open_torchscript,
}
