"""`docs/compatibility.md`: the differences that it explains, and its last section."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
_ROW = re.compile(r"^\| (?P<requests>`[^|]+`) \| (?P<kinds>[^|]+) \| (?P<reason>[^|]+) \|$", re.MULTILINE)


def explained(page: str | None = None) -> dict[tuple[str, str], str]:
    """Reasons by request and kind of difference; a request is `id`, or `id@protocol` for that one only.

    Raises ValueError for a row that says what another said.
    """
    reasons: dict[tuple[str, str], str] = {}
    for key, reason in _rows(PAGE.read_text(encoding="utf-8") if page is None else page):
        if key in reasons:
            raise ValueError(f"{PAGE.name}: '{key[0]}' with '{key[1]}' is there twice")
        reasons[key] = reason
    return reasons


def _rows(page: str) -> Iterator[tuple[tuple[str, str], str]]:
    for row in _ROW.finditer(page):
        for request in re.findall(r"`([^`]+)`", row["requests"]):
            for kind in row["kinds"].split(","):
                yield (request, kind.strip()), row["reason"].strip()


def write_last_run(result: str) -> None:
    """Put the result under the page's last heading."""
    before, heading, _ = PAGE.read_text(encoding="utf-8").partition("## The last run\n")
    PAGE.write_text(f"{before}{heading}\n{result}\n", encoding="utf-8")
