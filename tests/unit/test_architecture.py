"""Imports go down only, so that each room can be understood without those above it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mlserver_hftasks

PACKAGE = Path(mlserver_hftasks.__file__).parent
STOREYS = (
    {"errors"},
    {"settings"},
    {"engine"},
    {"backends"},
    {"generation"},
    {"tasks", "export"},
    {"metrics", "loading", "codecs", "explain"},
    {"runtime", "client"},
    {"__init__"},
    {"cli"},
)
"""From the ground up; a room imports from its own storey's room and from those below."""
STOREY = {room: level for level, rooms in enumerate(STOREYS) for room in rooms}
FILES = sorted(path for path in PACKAGE.rglob("*.py"))
HOST = {"mlserver", "starlette", "fastapi"}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path) -> None:
    here = room_of(path)
    for name in imported(path):
        if name.startswith("mlserver_hftasks."):
            there = name.split(".")[1]
            assert there == here or STOREY[there] < STOREY[here], f"{here} imports {there}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_door_and_the_codecs_know_mlserver(path: Path) -> None:
    if room_of(path) not in {"runtime", "codecs"}:
        assert not HOST & {name.split(".")[0] for name in imported(path)}


def test_the_scheduler_is_pure_policy() -> None:
    names = {
        name.split(".")[0]
        for file in ("scheduler", "cost", "rows", "room", "steps", "extents", "sequences")
        for name in imported(PACKAGE / f"engine/{file}.py")
    }
    assert not names & {"torch", "asyncio", "threading", "time", "transformers"}


def test_a_program_is_served_without_torch_and_transformers() -> None:
    """They take seconds to import: `loading` asks for them only where a model of theirs is to run."""
    script = (
        "import sys, mlserver_hftasks.loading.programs, mlserver_hftasks.backends.onnx\n"
        "import mlserver_hftasks.runtime.model\n"
        "from mlserver_hftasks.tasks.registry import TASKS, task_class\n"
        "[task_class(name) for name in sys.argv[1:]]\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "text-classification", "sentence-embedding", "fill-mask"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_exported_names() -> None:
    assert mlserver_hftasks.__all__ == ["HFTasksRuntime", "HuggingFaceRuntime"]
    assert mlserver_hftasks.HuggingFaceRuntime is mlserver_hftasks.HFTasksRuntime


def test_a_reload_of_the_package_keeps_the_class() -> None:
    import importlib

    before = mlserver_hftasks.HFTasksRuntime
    assert importlib.reload(mlserver_hftasks).HFTasksRuntime is before
