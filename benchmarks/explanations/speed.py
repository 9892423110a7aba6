"""Explanations per second, against captum one text at a time, at an error that is no worse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from benchmarks.explanations.subjects import (
    CAPTUM_STEPS,
    Array,
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
TEXTS, MOST_TEXTS = 64, 12
TOLERANCES = (0.05, 0.02, 0.01, 0.007, 0.005, 0.0035, 0.0025, 0.0015, 0.001, 0.0005, 0.0002)
"""Tried in turn, until the error is no worse than captum's."""
ONE_PERCENT = 0.01
FEWER_STEPS = (10, 20, 30, 40)
"""What captum's error would be with these: how much of the speed-up is the number of evaluations."""


def measure(session: Session) -> Findings:
    """Speed-up at the same error, for the demo's model and for a tiny one."""
    rounds = session.plan.few_rounds
    findings = Findings()
    # The demo's model takes half a minute a round for a dozen texts; the tiny one next to nothing.
    some = min(MOST_TEXTS, max(session.plan.texts // 16, 3))
    findings.add(_measure(session, sentiment(some, exact=min(6, some)), min(rounds, 2)))
    findings.add(_measure(session, trained_toy(TEXTS, exact=16), rounds))
    return findings


def _measure(session: Session, subject: Subject, rounds: int) -> Findings:
    texts, few = subject.texts, subject.texts[:: max(len(subject.texts) // subject.exact, 1)]
    session.tell(f"{subject.name}: the reference")
    exact = reference(subject, few)
    of_captum = {
        steps: errors(subject.captum.explain(few, steps=steps, baseline="mask").attributions, exact)
        for steps in (*FEWER_STEPS, CAPTUM_STEPS)
    }
    tried = _tried(subject, few, exact, until=float(np.mean(of_captum[CAPTUM_STEPS])))
    same = tried[-1].tolerance
    one_percent = next((each.tolerance for each in tried if np.mean(each.errors) <= ONE_PERCENT), same)
    explain = partial(ours, subject, texts)
    runs = take_turns(
        rounds,
        {
            "captum": partial(subject.captum.explain, texts, baseline="mask"),
            "ours": partial(explain, tolerance=same),
            "ours, one by one": partial(explain, tolerance=same, one_by_one=True),
            "ours, 1 %": partial(explain, tolerance=one_percent),
            "ours, default": explain,
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
    table = Table(
        f"Error of the worst token against 512 steps, {len(few)} texts ({subject.name})",
        ("system", "evaluations per text", "mean", "median", "worst text"),
        [
            *([f"captum, {steps} steps", str(steps), *_spread_of(each)] for steps, each in of_captum.items()),
            *([f"ours, tolerance {each.tolerance:g}", number(each.evaluations), *_spread_of(each.errors)]
              for each in tried),
        ],
    )  # fmt: skip
    return Findings(_figures(subject, runs, same, one_percent), [table])


@dataclass(frozen=True, slots=True)
class _Tried:
    tolerance: float
    evaluations: float
    errors: list[float]


def _tried(subject: Subject, few: Sequence[str], exact: Sequence[Array], *, until: float) -> list[_Tried]:
    """Ever smaller tolerances, the last of which has a mean error no larger than that."""
    tried = []
    for tolerance in TOLERANCES:
        run = ours(subject, few, tolerance=tolerance)
        tried.append(_Tried(tolerance, run.evaluations, errors(run.attributions, exact)))
        if np.mean(tried[-1].errors) <= until:
            break
    return tried


def _figures(
    subject: Subject, runs: Mapping[str, list[Run]], same: float, one_percent: float
) -> list[Figure]:
    seconds = {system: [run.seconds for run in of_system] for system, of_system in runs.items()}
    rates = {
        system: f"{number(len(subject.texts) / Spread.of(took).median)}/s with "
        f"{number(runs[system][0].evaluations)} evaluations"
        for system, took in seconds.items()
    }
    name = f"explanations/s against captum's {CAPTUM_STEPS} steps one by one"
    captum = rates["captum"]
    return [
        Figure(
            f"{name}, same error ({subject.name})",
            Spread.of(ratios(seconds["captum"], seconds["ours"])),
            at_least=SPEEDUP,
            detail=f"{rates['ours']}, tolerance {same:g}, against {captum}",
        ),
        Figure(
            f"{name}, 1 % error ({subject.name})",
            Spread.of(ratios(seconds["captum"], seconds["ours, 1 %"])),
            detail=f"{rates['ours, 1 %']}, tolerance {one_percent:g}, against {captum}",
        ),
        Figure(
            f"{name}, default tolerance ({subject.name})",
            Spread.of(ratios(seconds["captum"], seconds["ours, default"])),
            detail=f"{rates['ours, default']} against {captum}",
        ),
        Figure(
            f"all texts at once against one by one ({subject.name})",
            Spread.of(ratios(seconds["ours, one by one"], seconds["ours"])),
        ),
    ]


def _spread_of(found: list[float]) -> list[str]:
    return [number(float(value)) for value in (np.mean(found), np.median(found), max(found))]
