"""What a precision costs: labels of the demo's classifier on the texts that it was not trained on."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from benchmarks.backends.systems import AGREEING, TORCH, System
from benchmarks.inprocess import InProcess
from benchmarks.report import Figure, Findings, Table, number
from benchmarks.rounds import Spread
from benchmarks.session import Session

AGREEMENT = 0.99
ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "models" / "sentiment"
TEXTS = ROOT / "examples" / "data" / "sentiment.tsv"
CALIBRATION = 512


def measure(session: Session) -> Findings:
    """Each system against torch in float32; nothing where the demo's models are not built."""
    if not DEMO.is_dir():
        return Findings()
    texts, calibration = _texts("test"), _texts("train")[:CALIBRATION]
    wanted = _logits(session, TORCH, texts, calibration)
    figures, rows = [], []
    for system in AGREEING:
        got = _logits(session, system, texts, calibration)
        share = float((got.argmax(1) == wanted.argmax(1)).mean())
        apart = np.abs(got - wanted)
        session.journal.record("agreement", system.name, shape="demo sentiment", agreement=share)
        name = f"labels of {system.name} equal to {TORCH.name}'s, {len(texts)} held-out texts of the demo"
        figures.append(Figure(name, Spread.of([share]), at_least=AGREEMENT))
        rms = float(np.sqrt(np.square(apart).mean()))
        rows.append((system.name, f"{share:.4f}", number(rms), number(float(apart.max()))))
    title = f"Logits of the demo's classifier, of deviation {number(float(wanted.std()))}"
    return Findings(figures, [Table(title, ("", "labels equal", "apart, rms", "at most"), rows)])


def _texts(split: str) -> list[str]:
    with TEXTS.open(encoding="utf-8", newline="") as file:
        table = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [row["text"] for row in table if row["split"] == split]


def _logits(session: Session, system: System, texts: list[str], calibration: list[str]) -> np.ndarray:
    model = InProcess(system.program(session, DEMO, "demo", calibration), **system.extra)
    _, outputs = model.forward([[row] for row in model.rows(texts)])
    return np.stack([output["logits"] for output in outputs])
