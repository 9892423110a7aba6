"""What a model is tried on: the lines of a file, or a few texts of ours."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlserver_hftasks.engine.rows import Row
from mlserver_hftasks.errors import HFTasksError, InvalidSettings
from mlserver_hftasks.tasks.base import Example, Task

MOST_ITEMS = 2000
"""Of a file; the others are left out."""
MASK = "[MASK]"
"""Stands for the tokenizer's own mask in texts of ours."""

Item = str | Mapping[str, Any]
"""A text, or inputs and parameters by name."""

_SENTENCES = (
    "This is terrible!",
    "The parcel came two days late, but everything inside was intact and well packed.",
    "Angela Merkel met Emmanuel Macron in Paris on Tuesday to talk about the budget of the European Union.",
    "ok",
    "I have used this phone for about a year now. The battery still lasts from morning to evening, the "
    "camera is better than that of many newer ones, and only the speaker has become a little quiet. For its "
    "price I would buy it again without a second thought, and I have told all my friends so.",
    "How do I get my money back?",
    "The committee postponed its decision until the figures for the third quarter are known.",
    "Heavy rain flooded the cellars along the river, and the fire brigade pumped through the night while "
    "volunteers filled bags with sand.",
)
_CONTEXT = " ".join(_SENTENCES[index] for index in (1, 2, 4, 6))
OWN: Mapping[str, Sequence[Item]] = {
    "fill-mask": [f"{text} It was {MASK}." for text in _SENTENCES],
    "question-answering": [
        {"question": question, "context": _CONTEXT}
        for question in ("Who met Emmanuel Macron?", "How long does the battery last?", "What came late?")
    ],
    "text-ranking": [{"query": "How are refunds paid?", "texts": list(_SENTENCES)}],
    "zero-shot-classification": [
        {"inputs": text, "candidate_labels": ["shopping", "politics", "weather"]} for text in _SENTENCES
    ],
}
"""By task; the sentences for the others."""
REPEATS = 4
"""How often texts of ours are run: enough for batches."""


def own_items(task: str) -> list[Item]:
    """Texts for a task, where no file is given."""
    return list(OWN.get(task, _SENTENCES)) * REPEATS


def read_items(path: Path) -> list[Item]:
    """The items of a file: a text per line; of `.jsonl` a text or an object per line; of `.tsv` and `.csv`
    the column `text`. Raises `InvalidSettings`."""
    try:
        read = _READERS.get(path.suffix.lower(), _read_lines)
        items = read(path.read_text(encoding="utf-8"), path)
    except (UnicodeDecodeError, ValueError, csv.Error) as error:
        raise InvalidSettings(f"cannot be read ({error}), expected texts in UTF-8 @ {path}") from None
    if not items:
        raise InvalidSettings(f"no texts, expected one per line @ {path}")
    return items[:MOST_ITEMS]


def _read_lines(content: str, path: Path) -> list[Item]:
    return [line.strip() for line in content.splitlines() if line.strip()]


def _read_json_lines(content: str, path: Path) -> list[Item]:
    items = [json.loads(line) for line in content.splitlines() if line.strip()]
    for number, item in enumerate(items, start=1):
        if not isinstance(item, str | dict):
            raise InvalidSettings(f"got {item!r:.40}, expected a text or an object @ {path}, line {number}")
    return items


def _read_table(content: str, path: Path) -> list[Item]:
    if path.suffix.lower() == ".tsv":
        table = csv.DictReader(content.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        table = csv.DictReader(content.splitlines())
    if "text" not in (table.fieldnames or ()):
        raise InvalidSettings(f"got the columns {table.fieldnames}, expected one named text @ {path}")
    return [row["text"] for row in table if row["text"]]


_READERS = {".jsonl": _read_json_lines, ".tsv": _read_table, ".csv": _read_table}


def rows_of(task: Task[Any], items: Sequence[Item]) -> list[Row]:
    """The rows of all items, each item a request by itself. Raises `InvalidSettings` naming the item."""
    return [row for example in examples_of(task, items) for row in example.rows]


def examples_of(task: Task[Any], items: Sequence[Item]) -> list[Example]:
    """The examples of all items, each item a request by itself. Raises `InvalidSettings` naming the item."""
    examples: list[Example] = []
    for number, item in enumerate(items, start=1):
        try:
            examples += _examples_of(task, item)
        except HFTasksError as error:
            raise InvalidSettings(f"text {number} does not fit {task.name}: {error}") from None
    return examples


def _examples_of(task: Task[Any], item: Item) -> list[Example]:
    values = {"inputs": item} if isinstance(item, str) else dict(item)
    mask = getattr(task.model.encoder.tokenizer, "mask_token", None)
    known = {name: spec.name for spec in task.signature.inputs for name in (spec.name, *spec.aliases)}
    inputs = {known[name]: _listed(value, mask) for name, value in values.items() if name in known}
    given = {name: value for name, value in values.items() if name not in known}
    if "truncation" in task.signature.parameters.model_fields:
        given.setdefault("truncation", True)
    return task.examples(inputs, task.signature.parse(given))


def _listed(value: Any, mask: str | None) -> list[Any]:
    texts = value if isinstance(value, list) else [value]
    return [text.replace(MASK, mask) if mask and isinstance(text, str) else text for text in texts]


def texts_of(items: Sequence[Item]) -> list[str]:
    """All texts in the items, for calibration."""
    found: list[str] = []
    for item in items:
        values = [item] if isinstance(item, str) else item.values()
        for value in values:
            listed = value if isinstance(value, list) else [value]
            found += [text for text in listed if isinstance(text, str)]
    return found
