"""What the experiments share: how much to measure, the models, where results go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import shapes, texts
from benchmarks.report import Journal
from benchmarks.shapes import Shape


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    name: str
    rounds: int
    texts: int
    """Per run."""
    single_texts: int
    """Per run of one client."""
    few_rounds: int
    """Of what takes long, or has many samples in each round."""
    overload_s: float
    """Seconds of overload, per round."""
    bulks: int
    """Bulk requests, per round."""
    shapes: tuple[Shape, ...]


FULL = Plan("full", 3, 384, 128, 3, 8.0, 2, (shapes.MINILM, shapes.DISTILBERT))
QUICK = Plan("quick", 3, 192, 64, 2, 5.0, 1, (shapes.MINILM,))
VERSUS = Plan("full", 3, 192, 64, 2, 3.0, 1, (shapes.MINILM, shapes.DISTILBERT))
VERSUS_QUICK = Plan("quick", 1, 96, 40, 1, 2.0, 1, (shapes.MINILM,))
SMOKE = Plan("smoke", 1, 48, 16, 1, 1.5, 1, (shapes.MINILM, shapes.DISTILBERT))


@dataclass(frozen=True, slots=True)
class Session:
    """One run of the benchmark."""

    plan: Plan
    models: Path
    """Folder of the models."""
    journal: Journal
    tell: Callable[[str], None]
    """Shows what is going on."""

    def model(self, shape: Shape) -> Path:
        """The folder of that shape's model, made at first use."""
        return shapes.save(shape, self.models)

    def rounds(self, shape: Shape) -> int:
        """The main shape gets all of them."""
        return self.plan.rounds if shape is shapes.MINILM else self.plan.few_rounds

    def texts_for(self, shape: Shape) -> list[str]:
        """A large model gets fewer: each takes longer."""
        return self.texts(self.plan.texts if shape is shapes.MINILM else self.plan.texts // 3)

    def texts(self, count: int | None = None) -> list[str]:
        """The benchmark's texts."""
        return list(texts.mixed(self.plan.texts if count is None else count))
