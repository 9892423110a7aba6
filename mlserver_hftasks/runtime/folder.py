"""A model's folder as MLServer reads it, without a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlserver
from pydantic import ValidationError

from mlserver_hftasks.errors import InvalidSettings
from mlserver_hftasks.runtime.configuration import settings_of
from mlserver_hftasks.settings import Settings

FILE = "model-settings.json"
IMPLEMENTATIONS = ("mlserver_hftasks.HFTasksRuntime", "mlserver_hftasks.HuggingFaceRuntime")


def read_folder(folder: Path) -> tuple[str, Settings]:
    """The model's name and settings. Raises `InvalidSettings` for what would be refused."""
    path = folder / FILE
    if not path.is_file():
        raise InvalidSettings(f"no {FILE}, expected one @ {folder}")
    content = _content(path)
    if (named := content.get("implementation")) not in IMPLEMENTATIONS:
        raise InvalidSettings(f'got {named!r}, expected "{IMPLEMENTATIONS[0]}" @ {FILE}: implementation')
    try:
        read = mlserver.ModelSettings.parse_file(str(path))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise InvalidSettings(f"got {first['input']!r:.80}: {first['msg']} @ {FILE}: {where}") from None
    read.parameters = read.parameters or mlserver.settings.ModelParameters()
    read.parameters.uri = read.parameters.uri or str(folder)
    return read.name or folder.resolve().name, settings_of(read)


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InvalidSettings(f"cannot be read ({error}), expected JSON @ {FILE}") from None
    if not isinstance(content, dict):
        raise InvalidSettings(f"got a {type(content).__name__}, expected an object @ {FILE}")
    return content
