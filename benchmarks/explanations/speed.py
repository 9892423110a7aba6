"""Explanations per second, against captum one text at a time, at an error that is no worse."""

from __future__ import annotations

from functools import partial

import numpy as np

from benchmarks.explanations.subjects import (
    CAPTUM_STEPS,
    Run,
    Subject,
    errors,
    ours,
    reference,
    sentiment,
    trained_toy,
)
from benchmarks.report import Figure, Findings, Table, number
from benchmarks.rounds import Spread, ratios, take_turns
from benchmarks.session import Session

SPEEDUP = 5.0
TEXTS = 64
TOLERANCES = (0.05, 0.03, 0.02, 0.015, 0.01, 0.005, 0.002)
"""Tried in turn, until the error is no worse than captum's."""


def measure(session: Session) -> Findings:
    """Speed-up at the same error, for the demo's model and for a tiny one."""
    rounds = session.plan.few_rounds
    findings = Findings()
    # The demo's model takes half a minute a round for so many texts; the tiny one next to nothing.
    some = min(TEXTS, max(session.plan.texts // 16, 3))
    findings.add(_measure(session, sentiment(some, exact=min(8, some)), min(rounds, 2)))
    findings.add(_measure(session, trained_toy(TEXTS, exact=16), rounds))
    return findings


def _measure(session: Session, subject: Subject, rounds: int) -> Findings:
    texts, few = subject.texts, subject.texts[:: max(len(subject.texts) // subject.exact, 1)]
    session.tell(f"{subject.name}: the reference")
    exact = reference(subject, few)
    of_captum = errors(subject.captum.explain(few, baseline="mask").attributions, exact)
    tried: list[list[str]] = []
    tolerance = TOLERANCES[0]
    for tolerance in TOLERANCES:
        run = ours(subject, few, tolerance=tolerance)
        found = errors(run.attributions, exact)
        tried.append(_row(f"ours, tolerance {tolerance:g}", run, found))
        if np.mean(found) <= np.mean(of_captum):
            break
    runs = take_turns(
        rounds,
        {
            "captum": partial(subject.captum.explain, texts, baseline="mask"),
            "ours": partial(ours, subject, texts, tolerance=tolerance),
            "ours, one by one": partial(ours, subject, texts, tolerance=tolerance, one_by_one=True),
            "ours, default": partial(ours, subject, texts),
        },
        session.tell,
    )
    for system, of_system in runs.items():
        for run in of_system:
            session.journal.record(
                "explanations",
                system,
                model=subject.name,
                texts_per_s=len(texts) / run.seconds,
                evaluations=run.evaluations,
            )
    seconds = {system: [run.seconds for run in of_system] for system, of_system in runs.items()}
    rates = {system: number(len(texts) / Spread.of(took).median) for system, took in seconds.items()}
    figure = Figure(
        f"explanations/s against captum's {CAPTUM_STEPS} steps one by one, same error ({subject.name})",
        Spread.of(ratios(seconds["captum"], seconds["ours"])),
        at_least=SPEEDUP,
        detail=f"{rates['ours']} against {rates['captum']}/s, {len(texts)} texts, tolerance {tolerance:g}",
    )
    usual = Figure(
        f"the same at the default tolerance ({subject.name})",
        Spread.of(ratios(seconds["captum"], seconds["ours, default"])),
        detail=f"{rates['ours, default']}/s",
    )
    together = Figure(
        f"all texts at once against one by one ({subject.name})",
        Spread.of(ratios(seconds["ours, one by one"], seconds["ours"])),
    )
    captum_row = [f"captum, {CAPTUM_STEPS} steps", str(CAPTUM_STEPS), *_spread_of(of_captum)]
    table = Table(
        f"Error of the worst token against 512 steps, {len(few)} texts ({subject.name})",
        ("system", "evaluations per text", "mean", "median", "worst text"),
        [captum_row, *tried],
    )
    return Findings([figure, usual, together], [table])


def _row(system: str, run: Run, found: list[float]) -> list[str]:
    return [system, number(run.evaluations), *_spread_of(found)]


def _spread_of(found: list[float]) -> list[str]:
    return [number(float(value)) for value in (np.mean(found), np.median(found), max(found))]
