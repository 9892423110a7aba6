"""Exports a model into a folder that is served as it is: imported only where a program is made."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from mlserver_hftasks.backends import probe
from mlserver_hftasks.backends.base import Head
from mlserver_hftasks.backends.program import ProgramBackend
from mlserver_hftasks.engine.rows import Row
from mlserver_hftasks.errors import InvalidSettings
from mlserver_hftasks.export.job import Order
from mlserver_hftasks.export.maker import Made, Maker
from mlserver_hftasks.loading import light
from mlserver_hftasks.loading.facts import max_tokens_of, pad_token_id_of
from mlserver_hftasks.loading.manifest import Manifest, Program, versions
from mlserver_hftasks.loading.runners import check_head, open_runner
from mlserver_hftasks.loading.served import probe_rows, task_of
from mlserver_hftasks.loading.source import Source
from mlserver_hftasks.settings import WEIGHT_ONLY, Settings
from mlserver_hftasks.tasks.encoder import Encoder
from mlserver_hftasks.tasks.registry import canonical_name

logger = logging.getLogger("mlserver.hftasks")

NEEDED = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",), "export": ()}
"""Packages by backend; each is in the extra of that name."""
QUANTIZES = {"onnx": ("int8", "int8-static", *WEIGHT_ONLY), "openvino": ("int8",), "export": ()}
OF_DECODERS = ("int8", *WEIGHT_ONLY)
MOST = {"none": 1e-3, "int8": 0.5, "int8-static": 0.5}
"""Largest relative difference of a program from its model; of quantized ones the report says more."""
KEPT = ("modules.json", "*_Pooling", "*_Dense", "*_Normalize", "config_sentence_transformers.json")
KEPT_TOO = ("sentence_*_config.json", "index_to_name.json")
"""Files of a model that tasks read."""


def make_program(
    settings: Settings, out: Path, calibration: Sequence[str], tell: Callable[[str], None]
) -> tuple[Manifest, float]:
    """The manifest of the program, and its largest relative difference from the model."""
    order = _order(settings)
    tell("loading the model")
    source = Source(settings.model_copy(update={"dtype": "float32", "quantization": None}))
    config = source.config()
    kind = task_of(settings, config, source.folder)
    check_head(kind.head, order.format)
    _check_quantization(order, kind.head)
    tokenizer = source.tokenizer()
    model = source.model(kind.head, config, torch.device("cpu"))
    encoder = Encoder(tokenizer, max_tokens_of(None, tokenizer, model))
    if kind.head.generates:
        from mlserver_hftasks.loading.making_decoder import make_decoder

        return make_decoder(settings, order, out, source, kind, model, encoder, tell)
    maker = Maker(model, kind.head, probe_rows(encoder), pad_token_id_of(tokenizer, model), tell)
    made = maker.make(order, out, _calibration_rows(encoder, calibration, order))
    tokenizer.save_pretrained(out)
    config.save_pretrained(out)
    copy_small_files(source.folder, out)
    manifest = Manifest(
        backend=order.format,
        file=made.file,
        task=canonical_name(settings.task or kind.name),
        plan=made.plan,
        max_tokens=encoder.max_tokens,
        quantization=order.quantization,
        tokenizer=light.facts_of(tokenizer, out),
        made_with=versions(),
    )
    tell("comparing it with the model")
    difference = _difference(settings, manifest, made, out, kind.head)
    if not difference <= MOST[order.quantization]:  # NaN is too much as well
        raise InvalidSettings(
            f"the program's outputs differ from the model's by {difference:.1e} of the largest, expected at "
            f"most {MOST[order.quantization]:g}: choose another backend or quantization "
            "@ parameters.extra.backend"
        )
    manifest.write(out)
    return manifest, difference


def _order(settings: Settings) -> Order:
    backend: Any = settings.chosen_backend
    where = "@ parameters.extra.backend"
    if backend not in NEEDED:
        raise InvalidSettings(f"got {backend!r}, expected one of {', '.join(NEEDED)} to export to {where}")
    if missing := [name for name in NEEDED[backend] if find_spec(name) is None]:
        raise InvalidSettings(
            f"{missing[0]} is not installed, expected it to export a model: "
            f"pip install 'mlserver-hftasks[{backend}]' {where}"
        )
    quantization: Any = settings.quantization or "none"
    if quantization != "none" and quantization not in QUANTIZES[backend]:
        raise InvalidSettings(
            f'got "{quantization}" with the backend "{backend}", expected '
            f"{' or '.join(QUANTIZES[backend] or ('none',))} @ parameters.extra.quantization"
        )
    cuda = settings.device not in (None, -1, "cpu") and backend == "onnx"
    if cuda and quantization != "none":
        raise InvalidSettings(
            f'got "{quantization}" on {settings.device!r}, expected the CPU (device -1), or none '
            "@ parameters.extra.quantization"
        )
    return Order(backend, quantization, "cuda" if cuda else "cpu")


def _check_quantization(order: Order, head: Head) -> None:
    known = OF_DECODERS if head.generates else ("int8", "int8-static")
    if order.quantization not in ("none", *known):
        kind = "that generates" if head.generates else "of one pass"
        raise InvalidSettings(
            f'got "{order.quantization}" with the backend "{order.format}" for a task {kind}, expected '
            f"{', '.join(known)} @ parameters.extra.quantization"
        )


def _calibration_rows(encoder: Encoder, texts: Sequence[str], order: Order) -> list[Row]:
    if order.quantization != "int8-static":
        return []
    if not texts:
        raise InvalidSettings(
            "no calibration texts, expected some hundred of the kind that will be served: "
            'hftasks prepare --calibrate FILE, or the quantization "int8" @ parameters.extra.quantization'
        )
    return [Row(encoder.row(encoding).arrays) for encoding in encoder.encode_as_fits(list(texts))]


def _difference(settings: Settings, manifest: Manifest, made: Made, out: Path, head: Any) -> float:
    program = Program(manifest.backend, out, out / made.file, manifest)
    runner, description = open_runner(settings, program, made.plan.layout)
    backend = ProgramBackend(runner, head, made.plan, description)
    got = [backend.forward([row])[0] for row in made.rows]
    backend.close()
    return probe.overall_difference(got, made.expected)


def copy_small_files(source: Path, out: Path) -> None:
    """Copy the files that tasks read beside the weights from one folder to another."""
    for pattern in (*KEPT, *KEPT_TOO):
        for path in source.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, out / path.name)
            else:
                shutil.copy2(path, out / path.name)
