"""`python -m benchmarks [--versus]`: run the experiments, print one table of figures, keep the results.

Exits non-zero if an experiment failed; a figure that misses its target is only shown.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1")  # before torch is imported

import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from benchmarks import foundation, machine, plots, report, versus
from benchmarks.report import Findings, Journal
from benchmarks.session import FULL, QUICK, SMOKE, VERSUS, VERSUS_QUICK, Plan, Session
from tests.compat import peer

RESULTS = Path(__file__).parent / "results"
BUSY_CORES = 0.2
"""When others use more of the machine than this, the figures are marked."""


def main(arguments: list[str] | None = None) -> None:
    """Run what the command line says."""
    options = _options(arguments)
    plan = _plan(options)
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    console = Console(width=None if sys.stdout.isatty() else 140)
    described, others, began = machine.describe(), machine.Others(), time.monotonic()
    if options.versus:
        described["incumbent"] = list(peer.PINS)
        peer.python()  # built now, or the time would count
    journal = Journal(RESULTS / f"{described['date'].replace(':', '')}.jsonl", described)
    findings = Findings()
    failed = []
    with ExitStack() as stack, console.status("") as status:
        models = options.models or stack.enter_context(tempfile.TemporaryDirectory(prefix="hftasks-models-"))
        session = Session(plan, Path(models), journal, status.update)
        experiments: Mapping[str, Callable[[Session], Findings]] = foundation.EXPERIMENTS
        if options.versus:
            experiments = stack.enter_context(versus.experiments(session, dict(options.system)))
        for name in options.only:
            try:
                findings.add(experiments[name](session))
            except Exception:  # the others' results are worth having
                console.print_exception()
                failed.append(name)
            console.print(f"{name}: ended after {time.monotonic() - began:.0f} s")
    notes = _notes(others.cores(), time.monotonic() - began, plan)
    report.show(findings, console)
    for note in [*notes, f"results: {journal.path}"]:
        console.print(note)
    if options.write:
        _write(
            options.write, findings, described, notes, versus.TITLE if options.versus else foundation.TITLE
        )
    if failed:
        sys.exit(f"not measured: {', '.join(failed)}")


def _plan(options: argparse.Namespace) -> Plan:
    if options.smoke:
        return SMOKE
    if options.versus:
        return VERSUS_QUICK if options.quick else VERSUS
    return QUICK if options.quick else FULL


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
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a meaningful subset within three minutes")
    size.add_argument("--smoke", action="store_true", help="everything once and short: only that it runs")
    parser.add_argument("--versus", action="store_true", help="measure mlserver-huggingface beside ours")
    parser.add_argument("--only", action="append", metavar="EXPERIMENT", help="may be given repeatedly")
    parser.add_argument(
        "--system",
        action="append",
        default=[],
        type=_system,
        metavar="NAME=URL",
        help="with --versus: a further server, by the URL of its V2 text-classification model "
        "(http://HOST:PORT/v2/models/MODEL/infer); may be given repeatedly",
    )
    parser.add_argument(
        "--models", type=Path, metavar="FOLDER", help="keep the models here, for other servers"
    )
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="also write tables as Markdown, plots as PNG"
    )
    options = parser.parse_args(arguments)
    known = versus.EXPERIMENTS if options.versus else foundation.EXPERIMENTS
    options.only = options.only or list(versus.QUICK if options.versus and options.quick else known)
    if unknown := set(options.only) - set(known):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
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
