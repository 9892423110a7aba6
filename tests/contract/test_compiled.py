"""Compiled programs: the model's answers, no compiler where they are served, and no other CPU."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mlserver_hftasks.backends.compiled import cpu_features
from mlserver_hftasks.errors import InvalidSettings
from mlserver_hftasks.export import dynamo
from mlserver_hftasks.loading.cache import new_folder
from mlserver_hftasks.loading.programs import ProgramReport, export_program
from mlserver_hftasks.settings import Compile, Settings, read_settings
from tests import tiny
from tests.contract.pipelines import TEXTS
from tests.contract.test_exported import TOLERANCE, differences
from tests.harness import answer, serve

TASK = "text-classification"
COMPILE = Compile()
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


def settings(**extra: Any) -> Settings:
    model = {"task": TASK, "pretrained_model": str(tiny.folder("bert", "sequence")), "backend": "export"}
    return read_settings({**model, "compile": True, **extra}, {})


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ProgramReport]:
    out = tmp_path_factory.mktemp("compiled") / "model"
    with new_folder(out) as unfinished:
        return out, export_program(settings(), unfinished)


@pytest.fixture
def other(compiled: tuple[Path, ProgramReport], tmp_path: Path) -> Any:
    """Makes the folder anew, its manifest changed."""

    def changed(**changes: Any) -> Path:
        folder = Path(shutil.copytree(compiled[0], tmp_path / "model"))
        content = json.loads((folder / "export.json").read_text())
        content["hftasks"].update(changes)
        (folder / "export.json").write_text(json.dumps(content))
        return folder

    return changed


@needs_compiler
def test_a_compiled_program_gives_what_the_model_gives(compiled: tuple[Path, ProgramReport]) -> None:
    folder, report = compiled
    assert report.largest_difference < TOLERANCE
    served = serve(folder, TASK, compile=COMPILE)
    assert (served.description.backend, served.description.packing) == ("aotinductor", "lanes")
    model = serve(tiny.folder("bert", "sequence"), TASK, packing="off")
    inputs = {"inputs": list(TEXTS)}
    want = answer(model, inputs, together=False)
    for together in (False, True):
        assert max(differences(answer(served, inputs, together=together), want)) < TOLERANCE
    many = {"inputs": list(TEXTS) * 3}  # any number of texts and tokens
    assert max(differences(answer(served, many), want * 3)) < TOLERANCE
    served.close()


SERVED = """
import sys
from tests.harness import results, serve
served = serve(sys.argv[1], "text-classification", compile={"enable": True})
print(results(served, {"inputs": ["the river was quiet"]}))
"""


@needs_compiler
def test_it_is_served_without_a_compiler(compiled: tuple[Path, ProgramReport], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SERVED, str(compiled[0])],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": str(tmp_path), "CXX": "/nowhere", "PYTHONPATH": str(Path.cwd()), "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert "score" in done.stdout


@needs_compiler
def test_one_of_another_cpu_is_refused(other: Any) -> None:
    folder = other(compiled_for=[*cpu_features(), "avx4096", "tachyons"])
    with pytest.raises(InvalidSettings, match="for a CPU with avx4096, tachyons, which this one lacks"):
        serve(folder, TASK, compile=COMPILE)


@needs_compiler
@pytest.mark.parametrize("version", ["2.1.0", "unknown"])
def test_one_of_another_torch_is_refused(other: Any, version: str) -> None:
    with pytest.raises(InvalidSettings, match=f"compiled with torch {version}, but this is torch 2"):
        serve(other(made_with={"torch": version}), TASK, compile=COMPILE)


@needs_compiler
def test_a_corrupt_package_is_one_line(other: Any) -> None:
    folder = other()
    (folder / "model.pt2").write_bytes((folder / "model.pt2").read_bytes()[:5000])
    with pytest.raises(
        InvalidSettings, match=r"'model.pt2' cannot be loaded by torch: .*, expected a package"
    ):
        serve(folder, TASK, compile=COMPILE)


def test_what_is_not_compiled_does_not_pass_for_it(tmp_path: Path) -> None:
    from tests import exported

    folder = exported.folder("distilbert", "qa", "export")
    with pytest.raises(InvalidSettings, match='a program of "export" that is not compiled'):
        serve(folder, "question-answering", compile=COMPILE)


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/nowhere/c++",))
    monkeypatch.setattr(dynamo, "DynamoExporter", None)  # the compiler is asked for first
    with pytest.raises(InvalidSettings, match="there is no C\\+\\+ compiler"):
        export_program(settings(), tmp_path)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"backend": "onnx"}, 'got compile and the backend "onnx", expected "torch" or "export"'),
        ({"compile": {"mode": "max-autotune"}}, 'with the backend "export", expected neither'),
        ({"quantization": "int8"}, 'got compile and the quantization "int8"'),
    ],
)
def test_what_does_not_go_together(extra: Any, message: str) -> None:
    with pytest.raises(InvalidSettings, match=message):
        settings(**extra)
