"""The notebooks run, and what they have stored is of a run that went well."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.server.process import FORGOTTEN, Model

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
SECONDS = 240


@pytest.fixture
def models(tmp_path: Path, sentiment_folder: Path) -> Path:
    """The models of the demo where they were built, else a tiny one that knows nothing."""
    built = ROOT / "models"
    if (built / "sentiment" / "model.safetensors").is_file():
        return built
    folder = tmp_path / "models" / "sentiment"
    folder.mkdir(parents=True)
    settings = Model(sentiment_folder, {"task": "text-classification"}).settings("sentiment")
    (folder / "model-settings.json").write_text(json.dumps(settings))
    (folder.parent / "settings.json").write_text(json.dumps({"debug": False, "parallel_workers": 0}))
    return folder.parent


def test_they_run(models: Path) -> None:
    pytest.importorskip("nbclient")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(FORGOTTEN)}
    done = subprocess.run(
        [sys.executable, ROOT / "notebooks" / "run.py", "--check"],
        env={**inherited, "HFTASKS_MODELS": str(models), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert done.stdout.count("as stored") == len(NOTEBOOKS) > 0


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_what_is_stored(path: Path) -> None:
    cells: list[Any] = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "execute_result", "display_data"}
    pages = [str(output["data"]["text/html"]) for output in outputs if "text/html" in output.get("data", {})]
    assert sum('class=\\"hft\\"' in page or 'class="hft"' in page for page in pages) >= 3
    assert not re.search(r"/(home|root|work|tmp|Users)/", path.read_text())
