"""Each case with its differences, and the tables that show them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.machine import describe
from tests.compat.compare import Difference
from tests.compat.models import MODELS
from tests.compat.peer import PINS
from tests.compat.replay import Case

Reasons = Mapping[tuple[str, str], str]

COLUMNS = ("calls", "equal", "explained", "different")
TASKS = tuple(dict.fromkeys(model.task for model in MODELS))


@dataclass(frozen=True, slots=True)
class Finding:
    """One case; `reasons` has one entry per difference, None where nobody explains it."""

    case: Case
    differences: Sequence[Difference]
    reasons: Sequence[str | None]

    @property
    def verdict(self) -> str:
        """`equal`, `explained` or `different`."""
        if not self.differences:
            return "equal"
        return "different" if None in self.reasons else "explained"


def judge(case: Case, differences: Sequence[Difference], reasons: Reasons) -> Finding:
    """The differences with their reasons."""
    keys = [[(name, each.kind) for name in (case.name, case.request_id)] for each in differences]
    return Finding(case, differences, [next(filter(None, map(reasons.get, pair)), None) for pair in keys])


def stale(findings: Sequence[Finding], reasons: Reasons) -> list[tuple[str, str]]:
    """Explained differences that there are no more: by none of its protocols, or not by all of them."""
    seen = {(each.case.name, difference.kind) for each in findings for difference in each.differences}
    names: dict[str, list[str]] = {}
    for each in findings:
        names.setdefault(each.case.name, []).append(each.case.name)
        names.setdefault(each.case.request_id, []).append(each.case.name)
    return [
        (name, kind)
        for name, kind in reasons
        if not all((case, kind) in seen for case in names.get(name, [name]))
    ]


def show(console: Console, findings: Sequence[Finding], *, every: bool = False) -> None:
    """The tables: all findings or those that nobody explains, then how many of each task."""
    shown = [each for each in findings if every or each.verdict == "different"]
    if shown:
        console.print(_differences(shown))
    console.print(_summary(findings))


def _differences(findings: Sequence[Finding]) -> Table:
    table = Table(
        "request", "difference", "mlserver-huggingface", "mlserver_hftasks", "why", title="Differences"
    )
    for each in findings:
        for difference, reason in zip(each.differences, each.reasons, strict=True):
            what = f"{difference.kind} {difference.where}".strip()
            cells = (each.case.name, what, difference.theirs[:300], difference.ours[:300], reason or "?")
            table.add_row(*map(Text, cells))
        if not each.differences:
            table.add_row(Text(each.case.name), "equal")
    return table


def _summary(findings: Sequence[Finding]) -> Table:
    table = Table("task", *COLUMNS, title="Requests, once per protocol")
    for row in _rows(findings):
        table.add_row(*row, end_section=row[0] == TASKS[-1])
    return table


def last_run(findings: Sequence[Finding], seconds: float) -> str:
    """When, where and with what result, as Markdown."""
    about, count = describe(), len({each.case.request_id for each in findings})
    versions = about["versions"]
    lines = [
        f"{about['date']}, commit {about['commit']}, {about['cpu']}, {about['cores']} cores; "
        f"{', '.join(PINS[:3])} against mlserver-hftasks {versions['mlserver-hftasks']} on transformers "
        f"{versions['transformers']}, both on torch {versions['torch']}: {count} requests over "
        f"{len(findings)} calls in {seconds:.0f} s, both servers' starts included.",
        "",
        f"| task | {' | '.join(COLUMNS)} |",
        "| --- | --- | --- | --- | --- |",
        *(f"| {' | '.join(row)} |" for row in _rows(findings)),
    ]
    return "\n".join(lines)


def _rows(findings: Sequence[Finding]) -> Iterator[tuple[str, ...]]:
    """Per task, and of all: how many, and how many of each verdict."""
    task_of = {model.name: model.task for model in MODELS}
    for name in (*TASKS, "all"):
        verdicts = [each.verdict for each in findings if name in (task_of.get(each.case.model), "all")]
        yield name, str(len(verdicts)), *(str(verdicts.count(verdict)) for verdict in COLUMNS[1:])
