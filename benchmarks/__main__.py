"""`python -m benchmarks [SUITE ...]`: run the experiments, print tables of figures, keep the results.

Without a suite all of them run. Exits non-zero if an experiment failed; a figure that misses its target is
only shown.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1")  # before torch is imported

import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from benchmarks import machine, plots, report
from benchmarks.report import Findings, Journal
from benchmarks.session import SMOKE, Plan, Session
from benchmarks.suites import SUITES, Suite
from tests.compat import peer

RESULTS = Path(__file__).parent / "results"
BUSY_CORES = 0.2
"""When others use more of the machine than this, the figures are marked."""


def main(arguments: list[str] | None = None) -> None:
    """Run what the command line says."""
    options = _options(arguments)
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    console = Console(width=None if sys.stdout.isatty() else 140)
    failed = [each for name in options.suites for each in _run(name, options, console)]
    if failed:
        sys.exit(f"not measured: {', '.join(failed)}")


def _run(name: str, options: argparse.Namespace, console: Console) -> list[str]:
    """Run one suite, show and write what it found. Returns the experiments that failed."""
    suite = SUITES[name]
    described = machine.describe()
    if suite.needs_incumbent:
        described["incumbent"] = list(peer.PINS)
        peer.python()  # built now, or the time would count
    others, began = machine.Others(), time.monotonic()
    journal = Journal(RESULTS / f"{name}-{described['date'].replace(':', '')}.jsonl", described)
    plan = _plan(suite, options)
    findings = Findings()
    with _session(plan, journal, options, console) as session:
        failed = _measure(suite, session, options, findings, console)
    notes = _notes(others.cores(), time.monotonic() - began, plan)
    report.show(findings, console)
    for note in [*notes, f"results: {journal.path}"]:
        console.print(note)
    if options.write:
        _write(options.write / f"{name}.md", findings, described, notes, suite.title)
    return [f"{name} {experiment}" for experiment in failed]


def _measure(
    suite: Suite, session: Session, options: argparse.Namespace, findings: Findings, console: Console
) -> list[str]:
    """Run the experiments and add up what they find. Returns those that failed."""
    failed, began = [], time.monotonic()
    with suite.opened(session, dict(options.system)) as experiments:
        for name in options.only or (suite.quick if options.quick else suite.names):
            try:
                findings.add(experiments[name](session))
            except Exception:  # the others' results are worth having
                console.print_exception()
                failed.append(name)
            console.print(f"{name}: ended after {time.monotonic() - began:.0f} s")
    return failed


@contextmanager
def _session(
    plan: Plan, journal: Journal, options: argparse.Namespace, console: Console
) -> Iterator[Session]:
    with tempfile.TemporaryDirectory(prefix="hftasks-models-") as temporary, console.status("") as status:
        yield Session(plan, options.models or Path(temporary), journal, status.update)


def _plan(suite: Suite, options: argparse.Namespace) -> Plan:
    if options.smoke:
        return SMOKE
    return suite.quick_plan if options.quick else suite.full_plan


def _write(file: Path, findings: Findings, described: dict[str, Any], notes: list[str], title: str) -> None:
    """The page, and its plots beside it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    images = [(plot.title, plots.draw(plot, file.parent, file.stem).name) for plot in findings.plots]
    if "incumbent" in described:
        notes = [f"incumbent: {', '.join(described['incumbent'])}", *notes]
    file.write_text(report.markdown(findings, described, notes, title=title, images=images))


def _notes(others: float, seconds: float, plan: Plan) -> list[str]:
    warning = ": too many for figures to be trusted" if others > BUSY_CORES else ""
    return [
        f"{plan.name} run of {seconds:.0f} s, {plan.rounds} rounds of {plan.texts} texts",
        f"other processes used {others:.2f} cores meanwhile{warning}",
    ]


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a meaningful subset within a few minutes")
    size.add_argument("--smoke", action="store_true", help="everything once and short: only that it runs")
    parser.add_argument("--only", action="append", metavar="EXPERIMENT", help="may be given repeatedly")
    parser.add_argument(
        "--system",
        action="append",
        default=[],
        type=_system,
        metavar="NAME=URL",
        help="for versus: a further server, by the URL of its V2 text-classification model "
        "(http://HOST:PORT/v2/models/MODEL/infer); may be given repeatedly",
    )
    parser.add_argument(
        "--models", type=Path, metavar="FOLDER", help="keep the models here, for other servers"
    )
    parser.add_argument(
        "--write", type=Path, metavar="FOLDER", help="also write a page per suite, with its plots"
    )
    options = parser.parse_args(arguments)
    options.suites = options.suites or list(SUITES)
    if unknown := set(options.suites) - set(SUITES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(SUITES)}")
    known = [name for suite in options.suites for name in SUITES[suite].names]
    if unknown := set(options.only or ()) - set(known):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if options.only and len(options.suites) > 1:
        parser.error("--only goes with one suite")
    return options


def _system(text: str) -> tuple[str, str]:
    name, equals, url = text.partition("=")
    if not (name and equals and url.startswith("http://")):
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected NAME=http://HOST:PORT/v2/models/MODEL/infer"
        )
    return name, url


if __name__ == "__main__":
    main()
