"""Exported programs give what the model gives on torch, alone and in a batch.

A few architectures here; `HFTASKS_WIDE=1` runs the whole matrix.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlserver_hftasks.backends.program import Layout
from mlserver_hftasks.errors import InvalidSettings
from mlserver_hftasks.loading import Served
from mlserver_hftasks.loading.manifest import Manifest
from tests import exported, tiny
from tests.contract.pipelines import TEXTS
from tests.exported import TASKS
from tests.harness import answer, results, serve

TOLERANCE = 1e-4
"""Of float32, relative to the largest value of an output."""
NARROW: list[tuple[str, tiny.HeadName, str]] = [
    ("bert", "sequence", "onnx"),
    ("roberta", "mask", "onnx"),
    ("deberta-v2", "token", "onnx"),
    ("bert", "base", "openvino"),
    ("distilbert", "qa", "export"),
    ("bart", "sequence", "export"),
]
BACKENDS = ("onnx", "openvino", "export")
WIDE: list[tuple[str, tiny.HeadName, str]] = [
    (architecture, head, backend)
    for backend in BACKENDS
    for architecture, family in tiny.FAMILIES.items()
    for head in family.heads
]
MATRIX = WIDE if os.environ.get("HFTASKS_WIDE") else NARROW
INPUTS: dict[str, Any] = {
    "text-classification": {"inputs": list(TEXTS)},
    "token-classification": {"inputs": list(TEXTS)},
    "feature-extraction": {"inputs": list(TEXTS)},
    "question-answering": {"question": ["who?"] * len(TEXTS[:6]), "context": list(TEXTS[:6])},
}


def inputs_of(served: Served) -> Any:
    if served.task.name == "fill-mask":
        mask = served.task.model.encoder.tokenizer.mask_token
        return {"inputs": [f"{mask} met the mayor", f"the {mask} of {mask}", f"a{mask}" * 9]}
    return INPUTS[served.task.name]


def differences(got: Any, want: Any) -> list[float]:
    return [
        float(np.abs(outputs[name] - array).max() / np.abs(array).max())
        for one, other in zip(got, want, strict=True)
        for outputs, wanted in zip(one.outputs, other.outputs, strict=True)
        for name, array in wanted.items()
    ]


REFUSED = {("bart", "sequence", "export"): "cannot be exported to export .*depends on the values of others"}


@pytest.mark.parametrize(("architecture", "head", "backend"), MATRIX)
def test_a_program_gives_what_the_model_gives(architecture: str, head: tiny.HeadName, backend: str) -> None:
    if reason := REFUSED.get((architecture, head, backend)):
        with pytest.raises(InvalidSettings, match=reason):
            exported.folder(architecture, head, backend)
        return
    torch = serve(tiny.folder(architecture, head), TASKS[head], packing="off")
    program = serve(exported.folder(architecture, head, backend), TASKS[head], backend=backend)
    assert program.backend.description.backend == backend
    inputs = inputs_of(torch)
    want = answer(torch, inputs, together=False)
    assert max(differences(answer(program, inputs, together=False), want)) < TOLERANCE
    assert max(differences(answer(program, inputs), want)) < TOLERANCE


def test_lanes_are_used_where_the_attention_allows() -> None:
    layouts = {
        architecture: serve(exported.folder(architecture, head, "onnx"), TASKS[head]).backend
        for architecture, head in (("bert", "sequence"), ("deberta-v2", "token"))
    }
    assert layouts["bert"].description.packing == "lanes" and not layouts["bert"].padded
    assert layouts["deberta-v2"].description.packing == "padded" and layouts["deberta-v2"].padded


@pytest.fixture(scope="module")
def sentiment() -> Path:
    return exported.folder("bert", "sequence", "onnx")


@pytest.mark.parametrize(
    ("head", "backend", "task", "inputs"),
    [
        (
            "sequence",
            "onnx",
            "zero-shot-classification",
            {"inputs": [TEXTS[0]], "candidate_labels": ["a", "b"]},
        ),
        ("sequence", "onnx", "text-classification", {"inputs": list(TEXTS)}),
        ("base", "openvino", "sentence-embedding", {"inputs": list(TEXTS)}),
        ("base", "openvino", "feature-extraction", {"inputs": list(TEXTS)}),
    ],
)
def test_tasks_of_one_head_share_a_program(head: tiny.HeadName, backend: str, task: str, inputs: Any) -> None:
    parameters = {"candidate_labels": ["river", "town"]} if task.startswith("zero") else {}
    got, want = (
        results(serve(folder, task), inputs, **parameters)
        for folder in (exported.folder("bert", head, backend), tiny.folder("bert", head))
    )
    assert_close(got, want)


def assert_close(got: Any, want: Any) -> None:
    """Results alike, numbers within a thousandth."""
    if isinstance(want, dict):
        assert list(got) == list(want)
        assert_close(list(got.values()), list(want.values()))
    elif isinstance(want, list):
        assert len(got) == len(want)
        for one, other in zip(got, want, strict=True):
            assert_close(one, other)
    elif isinstance(want, str):
        assert got == want
    else:
        np.testing.assert_allclose(got, want, atol=1e-3)


def test_another_head_is_refused(sentiment: Path) -> None:
    with pytest.raises(InvalidSettings, match="the program was exported for 'text-classification'"):
        serve(sentiment, "token-classification")


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_answers_in_lanes_do_not_hang_on_the_neighbours(quantization: str) -> None:
    """Scales per token, and rows that lie where sums are the same: equal to the last bit.

    A last digit would not do: where it tips one rounding to int8, the logits move by a hundredth and more.
    """
    served = serve(exported.folder("bert", "sequence", "onnx", quantization), TASKS["sequence"])
    assert served.backend.description.packing == "lanes"
    texts = [*TEXTS, *(text[:n] for n, text in enumerate(TEXTS * 2, start=9))]
    alone = answer(served, {"inputs": texts}, together=False)
    assert max(differences(answer(served, {"inputs": texts}), alone)) == 0
    loud = answer(served, {"inputs": [*texts, "x" * 120, "🎉 " * 40]})[: len(texts)]
    assert max(differences(loud, alone)) == 0


def test_int8_is_near_the_model() -> None:
    report = exported.report("bert", "sequence", "onnx", "int8")
    assert 1e-4 < report.largest_difference < 0.15
    manifest = Manifest.read(exported.folder("bert", "sequence", "onnx", "int8"))
    assert manifest is not None and manifest.quantization == "int8" and manifest.plan.layout is Layout.LANES


def test_an_onnx_file_of_another_tool(tmp_path: Path) -> None:
    """Optimum's layout: padded inputs, `onnx/model.onnx`, and no manifest."""
    folder = Path(shutil.copytree(exported.folder("deberta-v2", "token", "onnx"), tmp_path / "model"))
    (folder / "export.json").unlink()
    (folder / "onnx").mkdir()
    for path in folder.glob("model.onnx*"):
        path.rename(folder / "onnx" / path.name)
    served = serve(folder, TASKS["token"], optimum_model=True)
    want = answer(serve(tiny.folder("deberta-v2", "token"), TASKS["token"]), inputs_of(served))
    assert max(differences(answer(served, inputs_of(served)), want)) < 5 * TOLERANCE
    with pytest.raises(InvalidSettings, match=r"gives logits, expected last_hidden_state .*file_name"):
        serve(folder, "feature-extraction", optimum_model=True)


SERVED = """
import asyncio, sys
from mlserver import ModelSettings
from mlserver.types import InferenceRequest, RequestInput
from mlserver_hftasks import HFTasksRuntime

async def main():
    parameters = {"uri": sys.argv[1], "extra": {"task": "text-classification"}}
    settings = ModelSettings(name="program", implementation=HFTasksRuntime, parameters=parameters)
    runtime = HFTasksRuntime(settings)
    await runtime.load()
    text = RequestInput(name="args", shape=[1], datatype="BYTES", data=["the river was quiet"])
    response = await runtime.predict(InferenceRequest(inputs=[text]))
    assert response.outputs[0].data
    await runtime.metadata()
    await runtime.unload()

asyncio.run(main())
print(sorted({"torch", "transformers", "httpx"} & set(sys.modules)))
"""


def test_a_program_is_loaded_and_predicts_without_torch_transformers_and_httpx() -> None:
    command = [sys.executable, "-c", SERVED, str(exported.folder("bert", "sequence", "onnx"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_model_is_exported_once_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlserver_hftasks.loading import programs

    calls: list[Path] = []
    ready = exported.folder("bert", "sequence", "onnx")

    def export(settings: Any, out: Path, **options: Any) -> None:
        calls.append(out)
        shutil.copytree(ready, out, dirs_exist_ok=True)

    monkeypatch.setattr(programs, "export_program", export)
    model, cache = tiny.folder("bert", "sequence"), str(tmp_path / "programs")
    for _ in range(2):
        served = serve(model, TASKS["sequence"], optimum_model=True, program_cache=cache)
        assert served.backend.description.backend == "onnx"
    assert len(calls) == 1, "the second time it was there"
    serve(tiny.folder("bert", "sequence", ("a", "b")), TASKS["sequence"], backend="onnx", program_cache=cache)
    assert len(calls) == 2, "another model is another program"


def test_a_model_that_cannot_be_exported_says_so(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match=r"cannot be exported|no calibration texts"):
        serve(
            tiny.folder("bert", "sequence"),
            TASKS["sequence"],
            backend="onnx",
            quantization="int8-static",
            program_cache=str(tmp_path),
        )
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"], "nothing half is left"


def test_torchscript(tmp_path: Path) -> None:
    """An old traced model, as TorchServe's handlers save it."""
    import warnings

    import torch
    import transformers

    folder = Path(shutil.copytree(tiny.folder("distilbert", "sequence"), tmp_path / "model"))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, attn_implementation="eager"
    ).eval()
    model.config.return_dict = False
    ids = torch.randint(5, 90, (2, 12))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(model, (ids, torch.ones_like(ids))).save(folder / "traced_model.pt")
    (folder / "model.safetensors").unlink()
    served = serve(folder, TASKS["sequence"], backend="torchscript")
    want = answer(
        serve(tiny.folder("distilbert", "sequence"), TASKS["sequence"]), INPUTS["text-classification"]
    )
    assert max(differences(answer(served, INPUTS["text-classification"]), want)) < 5 * TOLERANCE
