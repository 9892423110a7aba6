"""`python -m benchmarks`: run the experiments, print one table of figures, keep the results.

Exits non-zero if an experiment failed; a figure that misses its target is only shown.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1")  # before torch is imported

import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from benchmarks import machine, report
from benchmarks.foundation import EXPERIMENTS
from benchmarks.report import Findings, Journal
from benchmarks.session import FULL, QUICK, SMOKE, Plan, Session

RESULTS = Path(__file__).parent / "results"
BUSY_CORES = 0.2
"""When others use more of the machine than this, the figures are marked."""


def main(arguments: list[str] | None = None) -> None:
    """Run what the command line says."""
    options = _options(arguments)
    plan: Plan = SMOKE if options.smoke else QUICK if options.quick else FULL
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    console = Console(width=None if sys.stdout.isatty() else 140)
    described, others, began = machine.describe(), machine.Others(), time.monotonic()
    journal = Journal(RESULTS / f"{described['date'].replace(':', '')}.jsonl", described)
    findings = Findings()
    failed = []
    with tempfile.TemporaryDirectory(prefix="hftasks-models-") as models, console.status("") as status:
        session = Session(plan, Path(models), journal, status.update)
        for name in options.only or EXPERIMENTS:
            try:
                findings.add(EXPERIMENTS[name](session))
            except Exception:  # the others' results are worth having
                console.print_exception()
                failed.append(name)
            console.print(f"{name}: ended after {time.monotonic() - began:.0f} s")
    notes = _notes(others.cores(), time.monotonic() - began, plan)
    report.show(findings, console)
    for note in [*notes, f"results: {journal.path}"]:
        console.print(note)
    if options.write:
        options.write.parent.mkdir(parents=True, exist_ok=True)
        options.write.write_text(report.markdown(findings, described, notes))
    if failed:
        sys.exit(f"not measured: {', '.join(failed)}")


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
    parser.add_argument("--only", action="append", choices=list(EXPERIMENTS), help="may be given repeatedly")
    parser.add_argument("--write", type=Path, metavar="FILE", help="also write the tables as Markdown")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
