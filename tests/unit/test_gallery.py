"""Every ready-made settings file is one that the runtime takes."""

import json
from pathlib import Path

import pytest

from mlserver_hftasks.explain.options import ExplainOptions
from mlserver_hftasks.settings import read_settings
from mlserver_hftasks.tasks.registry import TASKS, canonical_name

GALLERY = Path(__file__).parents[2] / "model-settings"
FILES = sorted(GALLERY.glob("*/model-settings.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)
def test_the_settings_are_valid(path: Path) -> None:
    content = json.loads(path.read_text())
    assert content["name"] == path.parent.name
    assert content["implementation"] == "mlserver_hftasks.HFTasksRuntime"
    settings = read_settings(content["parameters"]["extra"], {})
    if settings.infer_uri is None:
        assert canonical_name(settings.task or "") in TASKS
        assert settings.pretrained_model
    ExplainOptions.read(settings.explain)


def test_every_task_has_one() -> None:
    assert {path.parent.name for path in FILES} >= set(TASKS)
