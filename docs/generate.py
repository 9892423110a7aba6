"""Writes the reference pages from the code they describe: `make docs`. A test says when they are stale."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from mlserver_hftasks import metrics
from mlserver_hftasks.explain.options import ExplainOptions
from mlserver_hftasks.explain.tensors import OUTPUTS
from mlserver_hftasks.settings import Settings
from mlserver_hftasks.tasks.registry import ALIASES, TASKS, task_class
from mlserver_hftasks.tasks.signature import OutputSpec, Signature

FOLDER = Path(__file__).parent
NOTE = "<!-- made by `make docs` from the code; edit that -->\n\n"

SETTINGS_INTRODUCTION = """# Settings

Keys of `parameters.extra` in `model-settings.json`. Unknown keys are refused. Strings are coerced (`"0"`,
`"true"`, JSON), since Seldon Core v2 hands all values over as strings. `PREDICTIVE_UNIT_PARAMETERS` (Seldon
Core v1) wins over `extra`, which wins over the environment (`MLSERVER_MODEL_HUGGINGFACE_TASK` and so on).

MLServer's own `max_batch_size` is read as `batch_size` and then set to 0, so that its batcher stays away: it
waits on an idle server and gives one client's parameters to another. `max_batch_time` bounds a wait that does
not exist here.

"""
TASKS_INTRODUCTION = """# Tasks

Every tensor name below can be sent as an input of a V2 request; parameters also as V2 request `parameters`.
`args` with one element is one item by itself, as if the pipeline were called with it; all other names take
lists. Without `outputs` in the request the answer is one BYTES output, `output`, with one JSON text per
result; with `outputs` it is the tensors that the request names, and only those.

Of two tensors of one name the last counts; a parameter that comes as a tensor counts before one that comes as
a request parameter. Unknown names are refused.
"""
EXPLANATIONS_INTRODUCTION = """## Explanations

What any of these tasks says, save feature-extraction, is explained on request: see
[explanations.md](explanations.md). The options, and the outputs of `n` items:
"""


def settings_page() -> str:
    """`parameters.extra` as a table."""
    schema = Settings.model_json_schema()["properties"]
    rows = [
        (
            f"`{name}`",
            _kind(schema[name]),
            _default(field.get_default(call_default_factory=True)),
            field.description,
        )
        for name, field in Settings.model_fields.items()
    ]
    return NOTE + SETTINGS_INTRODUCTION + _table(("key", "type", "default", "what it does"), rows)


def tasks_page() -> str:
    """Inputs, parameters and outputs of each task."""
    parts = [TASKS_INTRODUCTION]
    for name in TASKS:
        kind = task_class(name)
        aliases = [alias for alias, task in ALIASES.items() if task == name]
        also = f" Also called {', '.join(f'`{alias}`' for alias in aliases)}." if aliases else ""
        first_line = (sys.modules[kind.__module__].__doc__ or "").strip().splitlines()[0]
        summary = first_line.partition(": ")[2]
        parts.append(f"## {name}\n\n{summary[:1].upper()}{summary[1:]}{also}\n\n{_signature(kind.signature)}")
    parts.append(f"{EXPLANATIONS_INTRODUCTION}\n{_parameters(ExplainOptions)}\n{_outputs(OUTPUTS)}")
    return NOTE + "\n".join(parts)


def metrics_page() -> str:
    """The docstring of `metrics`."""
    return NOTE + f"# Metrics\n\n{(metrics.__doc__ or '').strip()}\n"


def _signature(signature: Signature) -> str:
    inputs = [
        (f"`{spec.name}`", ", ".join(f"`{alias}`" for alias in spec.aliases), spec.description)
        for spec in signature.inputs
    ]
    return "\n".join(
        (
            _table(("input", "other names", "what"), inputs),
            _parameters(signature.parameters),
            _outputs(signature.outputs),
        )
    )


def _parameters(kind: type[BaseModel]) -> str:
    schema = kind.model_json_schema()["properties"]
    rows = [
        (f"`{name}`", _kind(schema[name]), _default(field.default), field.description)
        for name, field in kind.model_fields.items()
    ]
    return _table(("parameter", "type", "default", "what"), rows)


def _outputs(specs: Sequence[OutputSpec]) -> str:
    rows = [(f"`{spec.name}`", spec.datatype, f"`{list(spec.shape)}`", spec.description) for spec in specs]
    return _table(("output", "datatype", "shape", "what"), rows)


def _kind(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return " or ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "anyOf" in schema:
        members = [member for member in schema["anyOf"] if member.get("type") != "null"]
        return " or ".join(dict.fromkeys(map(_kind, members)))
    kind = schema.get("type", "any")
    return f"list of {_kind(schema['items'])}" if kind == "array" and schema.get("items") else str(kind)


def _default(value: object) -> str:
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_none=True)
    if value is None or value in ("", {}):
        return ""
    return "required" if value is PydanticUndefined else f"`{json.dumps(value)}`"


def _table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    cells = (" | ".join(str(cell or "").replace("|", "\\|") for cell in line) for line in lines)
    return "".join(f"| {line} |\n" for line in cells)


PAGES = {"settings.md": settings_page, "tasks.md": tasks_page, "metrics.md": metrics_page}


def main() -> None:
    """Write all pages."""
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page())


if __name__ == "__main__":
    main()
