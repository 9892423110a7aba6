"""Against the algorithm of TorchServe's Hugging Face handler: one text after another, padded, 50 steps.

Its handler pads each text to `max_length` (150 in its examples), takes the padding token as baseline, and
runs captum's LayerIntegratedGradients with 50 steps. Here that algorithm runs in process, without a server.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from benchmarks.explanations.subjects import errors, ours, reference, sentiment
from benchmarks.report import Figure, Findings, number
from benchmarks.rounds import Spread, ratios, take_turns
from benchmarks.session import Session

SPEEDUP = 10.0
MAX_LENGTH = 150
TEXTS, EXACT = 4, 2
TOLERANCES = (0.02, 0.01, 0.007, 0.005, 0.0035, 0.0025, 0.0015, 0.001)


def measure(session: Session) -> Findings:
    """Speed-up at the same error and from the same baseline, on the demo's model."""
    subject = sentiment(TEXTS, EXACT)
    few = subject.texts[:: TEXTS // EXACT]
    handler = partial(subject.captum.explain, pad_to=MAX_LENGTH, baseline="pad")
    session.tell("the reference")
    exact = reference(subject, few, baseline="pad")
    allowed = float(np.mean(errors(handler(few).attributions, exact)))
    tolerance, reached = TOLERANCES[0], np.inf
    for tolerance in TOLERANCES:
        run = ours(subject, few, baseline="pad", tolerance=tolerance)
        reached = float(np.mean(errors(run.attributions, exact)))
        if reached <= allowed:
            break
    runs = take_turns(
        1 if session.plan.rounds == 1 else 2,
        {
            "handler": partial(handler, subject.texts),
            "ours": partial(ours, subject, subject.texts, baseline="pad", tolerance=tolerance),
        },
        session.tell,
    )
    seconds = {system: [run.seconds for run in of_system] for system, of_system in runs.items()}
    per_text = {system: number(Spread.of(took).median / TEXTS) for system, took in seconds.items()}
    return Findings(
        [
            Figure(
                "explanations/s against the algorithm of TorchServe's handler (demo sentiment model)",
                Spread.of(ratios(seconds["handler"], seconds["ours"])),
                at_least=SPEEDUP,
                detail=f"{per_text['ours']} s against {per_text['handler']} s a text; "
                f"error {number(reached)} against {number(allowed)}",
            )
        ]
    )
