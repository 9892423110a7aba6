"""One item that is being explained: the rows that its methods ask for, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from mlserver_hftasks.backends.gradients import Absent, PathRow
from mlserver_hftasks.engine.rows import FloatArray, Outputs, Row
from mlserver_hftasks.explain.evaluation import Clock
from mlserver_hftasks.explain.methods.base import Effort, Estimate
from mlserver_hftasks.explain.options import ExplainOptions
from mlserver_hftasks.explain.result import BoolArray, Explanation
from mlserver_hftasks.explain.targets.base import Subject
from mlserver_hftasks.explain.tokens import Tokens, merged


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One item that is being explained."""

    subject: Subject
    tokens: Tokens
    method: str
    options: ExplainOptions
    clock: Clock

    @property
    def effort(self) -> Effort:
        """What the client asks of the method."""
        return Effort(self.options.tolerance, self.options.max_evals)

    def point_row(self, alpha: float, absent: Absent) -> PathRow:
        """The item's row at a point of its path."""
        row = self.subject.row
        key = (row.key, row.select is not None)
        return PathRow(
            row.arrays,
            key,
            row.select,
            alpha=alpha,
            absent=absent,
            kept=self.tokens.kept,
            score=self.subject.score,
        )

    def masked_row(self, features: BoolArray, absent: int) -> Row:
        """The item's row with some features only, and another token in the places of the others."""
        row, present = self.subject.row, self.tokens.spread(features)
        ids = np.where(present, row.arrays["input_ids"], absent)
        return replace(row, arrays={**row.arrays, "input_ids": ids}, source=None)

    def scores(self, outputs: Outputs) -> FloatArray:
        """[K], from what a backend says of such a row."""
        with torch.inference_mode():
            tensors = {name: torch.from_numpy(np.ascontiguousarray(each)) for name, each in outputs.items()}
            scores: FloatArray = self.subject.score(tensors).float().numpy()
        return scores

    def nothing(self) -> Estimate:
        """Of an item of which nothing is to be explained: a text without entities."""
        none = np.zeros(0, dtype=np.float32)
        attributions = np.zeros((0, len(self.tokens.kept)), dtype=np.float32)
        return Estimate(attributions, none, none, none, self.effort, 0)

    def explanation(self, estimate: Estimate, baseline: str) -> Explanation:
        """What the client gets; the estimate is of tokens."""
        tokens, attributions = self.tokens, estimate.attributions
        if self.options.level == "word":
            tokens, groups = merged(tokens)
            attributions = np.stack([attributions[:, group].sum(axis=1) for group in groups], axis=1)
        return Explanation(
            tokens=tokens.names,
            offsets=tokens.offsets,
            word_ids=tokens.word_ids,
            sequence_ids=tokens.sequence_ids,
            attributions=attributions,
            target=self.subject.target,
            target_label=self.subject.labels,
            score=estimate.score,
            baseline_score=estimate.baseline_score,
            delta=estimate.delta,
            converged=estimate.converged,
            method=self.method,
            baseline=baseline,
            evaluations=estimate.evaluations,
            texts=tokens.texts,
        )
