"""Results as JSON lines, as tables of the terminal and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.rounds import Spread


@dataclass(frozen=True, slots=True)
class Figure:
    """One number with the target it must reach; without a target it is only shown."""

    name: str
    measured: Spread
    at_least: float | None = None
    at_most: float | None = None
    detail: str = ""

    @property
    def target(self) -> str:
        """For the tables."""
        if self.at_least is not None:
            return f">= {number(self.at_least)}"
        return f"<= {number(self.at_most)}" if self.at_most is not None else "-"

    @property
    def met(self) -> bool | None:
        """None without a target; a figure that could not be measured is not met."""
        if self.at_least is not None:
            return self.measured.median >= self.at_least
        return self.measured.median <= self.at_most if self.at_most is not None else None

    def row(self) -> list[str]:
        """Name, target, measured, whether met, detail."""
        met = {True: "yes", False: "NO", None: "-"}[self.met]
        return [self.name, self.target, spread(self.measured), met, self.detail]


@dataclass(frozen=True, slots=True)
class Table:
    """Further numbers, as text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Line:
    """Points of a plot, each with the spread of its rounds."""

    name: str
    x: Sequence[float]
    y: Sequence[Spread]


@dataclass(frozen=True, slots=True)
class Plot:
    """`benchmarks.plots` draws it; `name` is the file's."""

    name: str
    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    log_x: bool = False
    log_y: bool = False


@dataclass(slots=True)
class Findings:
    """What an experiment has to say."""

    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)

    def add(self, other: Findings) -> None:
        """Append the findings of another experiment."""
        self.figures += other.figures
        self.tables += other.tables
        self.plots += other.plots

    def all_tables(self) -> list[Table]:
        """The table of figures and the further ones."""
        columns = ("figure", "target", "measured (least to most of the rounds)", "met", "")
        rows = [figure.row() for figure in self.figures]
        return [Table("Figures", columns, rows), *self.tables]


class Journal:
    """A file of results, one JSON object per line; each carries where it was measured."""

    def __init__(self, path: Path, machine: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._machine = machine

    def record(self, workload: str, system: str, **values: Any) -> None:
        """Append one result."""
        line = {"workload": workload, "system": system, **values, **self._machine}
        with self.path.open("a") as file:
            file.write(orjson.dumps(line).decode() + "\n")


def number(value: float | None) -> str:
    """Three digits that count."""
    if value is None or math.isnan(value):
        return "-"
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:.0f}" if abs(value) >= 100 or value == 0 else f"{value:.3g}"
    return f"{value:.1e}"


def spread(value: Spread) -> str:
    """`2.9 (2.7 to 3.1)`; one number if the rounds agree."""
    if math.isnan(value.median) or value.low == value.high:
        return number(value.median)
    return f"{number(value.median)} ({number(value.low)} to {number(value.high)})"


def show(findings: Findings, console: Console) -> None:
    """Print all tables."""
    for table in findings.all_tables():
        printed = RichTable(title=table.title, title_justify="left")
        for column in table.columns:
            printed.add_column(column, overflow="fold")
        for row in table.rows:
            printed.add_row(*row)
        console.print(printed)


def markdown(
    findings: Findings,
    machine: dict[str, Any],
    notes: Sequence[str],
    *,
    title: str,
    images: Sequence[tuple[str, str]] = (),
) -> str:
    """All tables with where they were measured, as one page; `images` are titles and files."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    parts = [
        f"# {title}",
        "Written by `make bench` (`python -m benchmarks SUITE --write FOLDER`); do not edit. Ratios are "
        "medians of ratios within one round, in brackets the least and the most of the rounds.",
        "\n".join(
            f"- {line}"
            for line in (
                f"date {machine['date']}, commit {machine['commit']}",
                f"CPU {machine['cpu']}, {machine['cores']} cores, model threads: {machine['threads']}",
                versions,
                *notes,
            )
        ),
    ]
    figures, *tables = findings.all_tables()
    parts += [f"## {figures.title}", _markdown_table(figures)]
    parts += [f"![{caption}]({file})" for caption, file in images]
    for table in tables:
        parts += [f"## {table.title}", _markdown_table(table)]
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
