"""`export.json`: what lies in a folder of ours with a program, and finding programs in folders.

The file is that of `transformers.exporters.ExportedModel`, with a key of ours beside theirs: what else there
is to know to serve the program without its model, and without torch and transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter

from mlserver_hftasks.backends.program import Layout, Plan, Reads
from mlserver_hftasks.errors import InvalidSettings
from mlserver_hftasks.settings import Settings

FILE = "export.json"
KEY = "hftasks"
SCHEMA = 1
FORMATS = {"onnx": "onnx", "openvino": "openvino", "dynamo": "export"}
"""Backends by the names that transformers gives their formats."""
NAMES: dict[str, tuple[str, ...]] = {
    "onnx": (
        "model.onnx",
        "onnx/model.onnx",
        "decoder_model_merged.onnx",
        "onnx/decoder_model_merged.onnx",
    ),
    "openvino": ("openvino_model.xml", "openvino/openvino_model.xml"),
    "torchscript": ("model.pt", "traced_model.pt"),
}
"""Where other tools, Optimum above all, put a program."""
QUANTIZED = (
    "model_quantized.onnx",
    "onnx/model_quantized.onnx",
    "model_int8.onnx",
    "onnx/model_int8.onnx",
    "decoder_model_merged_quantized.onnx",
    "onnx/decoder_model_merged_quantized.onnx",
)
PACKAGES = ("mlserver-hftasks", "transformers", "torch", "onnx", "onnxscript", "onnxruntime", "openvino")
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True, slots=True)
class Manifest:
    """What is written of a program of ours."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    backend: Literal["onnx", "openvino", "export"]
    """One that `hftasks prepare` writes: an old TorchScript file is opened for a setting only."""
    file: str
    task: str
    plan: Plan
    max_tokens: int
    dtype: str = "float32"
    quantization: str = "none"
    tokenizer: Mapping[str, Any] | None = None
    """What `light.LightTokenizer` needs; None if only transformers can tokenize for this model."""
    compiled_for: Sequence[str] | None = None
    """Features of the CPU that it is machine code for; None if it is not compiled."""
    made_with: Mapping[str, str] = field(default_factory=dict)
    """Versions of packages."""

    def write(self, folder: Path) -> None:
        """Write the file."""
        own = asdict(self)
        own["plan"] |= {"layout": self.plan.layout.value, "reads": self.plan.reads.value}
        names = {backend: name for name, backend in FORMATS.items()}
        content = {
            "schema_version": SCHEMA,
            "export_format": names[self.backend],
            "components": {"model": {"file": self.file, "metadata": {}}},
            KEY: own,
        }
        (folder / FILE).write_text(json.dumps(content, indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """The manifest of a folder; None if another tool wrote it. Raises `InvalidSettings`."""
        try:
            own = json.loads((folder / FILE).read_text()).get(KEY)
            if own is None:
                return None
            plan = own.pop("plan")
            made = Plan(**{**plan, "layout": Layout(plan["layout"]), "reads": Reads(plan["reads"])})
            return TypeAdapter(cls).validate_python({**own, "plan": made})
        except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
            raise InvalidSettings(
                f"'{folder / FILE}' cannot be read ({' '.join(repr(error).split()):.120}), expected what "
                "`hftasks prepare` writes @ parameters.extra.pretrained_model"
            ) from None


@dataclass(frozen=True, slots=True)
class Program:
    """A program in a folder, beside its model's config and tokenizer."""

    backend: str
    folder: Path
    path: Path
    manifest: Manifest | None = None
    """None for a program of another tool."""


def find_program(folder: Path, settings: Settings) -> Program | None:
    """The program in a folder that the settings ask for, or allow; None if there is none.

    Raises `InvalidSettings` where there is one that contradicts them.
    """
    if not folder.is_dir():
        return None
    ours = _our_program(folder, settings)
    if ours is not None or settings.chosen_backend in (None, "torch"):
        return ours
    return _other_program(folder, settings)


def candidates(settings: Settings) -> tuple[str, ...]:
    """Names of the file in the order in which it is looked for."""
    if settings.file_name is not None:
        return (settings.file_name,)
    backend = settings.chosen_backend or ""
    return QUANTIZED if backend == "onnx" and settings.quantization == "int8" else NAMES.get(backend, ())


def _our_program(folder: Path, settings: Settings) -> Program | None:
    if not (folder / FILE).is_file():
        return None
    manifest = Manifest.read(folder)
    if manifest is None:
        return None
    wanted = settings.chosen_backend
    if wanted not in (None, manifest.backend):
        if any(any(folder.glob(pattern)) for pattern in WEIGHTS):
            return None  # the model itself is there too
        raise InvalidSettings(
            f'got "{wanted}", but the folder holds a program, expected "{manifest.backend}" or no backend '
            "@ parameters.extra.backend"
        )
    if settings.quantization not in (None, manifest.quantization):
        raise InvalidSettings(
            f'got "{settings.quantization}", expected "{manifest.quantization}", which the program in the '
            "folder is, or no value @ parameters.extra.quantization"
        )
    path = inside(folder, manifest.file)
    if not path.is_file():
        raise InvalidSettings(f"'{manifest.file}' is not there, but {FILE} names it @ {folder}")
    return Program(manifest.backend, folder, path, manifest)


def _other_program(folder: Path, settings: Settings) -> Program | None:
    backend = settings.chosen_backend or ""
    for name in candidates(settings):
        path = inside(folder, name)
        if path.is_file():
            return Program(backend, folder, path)
    if settings.file_name is not None or backend == "torchscript":
        raise InvalidSettings(
            f"'{settings.file_name or NAMES[backend][0]}' is not there, expected a program in {folder} "
            "@ parameters.extra.file_name"
        )
    return None


def inside(folder: Path, name: str) -> Path:
    """The path of a file in a folder. Raises `InvalidSettings` for one that is elsewhere."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise InvalidSettings(
            f"got '{name}', expected a file in the model's folder @ parameters.extra.file_name"
        )
    return folder / name


def versions() -> dict[str, str]:
    """Of the packages that have a part in a program, those that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
