"""Exported programs behind a real server: the same answers, and one line for what cannot be served."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests import exported, tiny
from tests.server.process import Model, Server
from tests.server.v2 import texts

TEXTS = ("the river museum was quiet", "a harbour opened", "x", "Anna Keller met the mayor of Hamburg")


@pytest.fixture(scope="module")
def folder() -> Path:
    return exported.folder("bert", "sequence", "onnx")


def test_a_program_answers_as_the_model_does(server: Server, folder: Path) -> None:
    with server.having("program", Model(folder)) as response:
        assert response.status_code == 200, response.text
        got, want = (server.results(name, texts(*TEXTS), top_k=2) for name in ("program", "sentiment"))
        metadata = server.client.get("/v2/models/program").json()["parameters"]
    assert [metadata[name] for name in ("backend", "dtype", "packing", "task")] == [
        "onnx",
        "float32",
        "lanes",
        "text-classification",
    ]
    for one, other in zip(got, want, strict=True):
        assert [each["label"] for each in one] == [each["label"] for each in other]
        assert [each["score"] for each in one] == pytest.approx([each["score"] for each in other], abs=1e-4)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.onnx", b"no program", "'model.onnx' cannot be opened by ONNX Runtime"),
        ("model.onnx", None, "'model.onnx' is not there, but export.json names it"),
        ("export.json", b"{", "export.json' cannot be read"),
        ("tokenizer.json", b"{}", "'tokenizer.json' cannot be read"),
    ],
)
def test_a_broken_folder_is_one_line(
    server: Server, folder: Path, tmp_path: Path, file: str, content: bytes | None, message: str
) -> None:
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    (broken / file).unlink() if content is None else (broken / file).write_bytes(content)
    with server.having("broken", Model(broken)) as response:
        assert response.status_code >= 400
        assert message in response.json()["error"]
        assert "\n" not in response.json()["error"] and "Traceback" not in response.text


def test_a_backend_that_generates_is_refused(server: Server) -> None:
    model = Model(tiny.folder("gpt2", "base"), {"task": "text-generation", "backend": "openvino"})
    with server.having("generating", model) as response:
        assert response.status_code >= 400
        assert 'expected "torch", or "onnx" for one that continues texts' in response.json()["error"]
