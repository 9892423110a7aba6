"""One item that is being explained: the rows that its methods ask for, and what comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlserver_hftasks.backends.gradients import Absent, PathRow, ScoredRow
from mlserver_hftasks.engine.rows import IntArray
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
        return PathRow(
            row.arrays,
            self._key,
            row.select,
            alpha=alpha,
            absent=absent,
            kept=self.tokens.kept,
            score=self.subject.score,
        )

    def masked_row(self, features: BoolArray, absent: int) -> ScoredRow:
        """The item's row with some features only, and another token in the places of the others."""
        row, present = self.subject.row, self.tokens.spread(features)
        ids = row.arrays["input_ids"]
        ids = np.where(present[: len(ids)], ids, absent)
        return ScoredRow(
            {**row.arrays, "input_ids": ids},
            self._key,
            row.select,
            score=self.subject.score,
        )

    @property
    def _key(self) -> tuple[Any, int | None]:
        """Of rows that run together: what they select is filled up to the longest, so at most doubled."""
        row = self.subject.row
        return row.key, None if row.select is None else len(row.select).bit_length()

    def nothing(self) -> Estimate:
        """Of an item of which nothing is to be explained: a text without entities."""
        none = np.zeros(0, dtype=np.float32)
        attributions = np.zeros((0, len(self.tokens.kept)), dtype=np.float32)
        return Estimate(attributions, none, none, none, self.effort, 0)

    def explanation(self, estimate: Estimate, baseline: str) -> Explanation:
        """What the client gets; the estimate is of tokens."""
        tokens, attributions, target = self.tokens, estimate.attributions, self.subject.target
        if self.options.level == "word":
            tokens, groups = merged(tokens)
            attributions = np.stack([attributions[:, group].sum(axis=1) for group in groups], axis=1)
            target = _among(groups, target)
        return Explanation(
            tokens=tokens.names,
            offsets=tokens.offsets,
            word_ids=tokens.word_ids,
            sequence_ids=tokens.sequence_ids,
            attributions=attributions,
            target=target,
            target_label=self.subject.labels,
            score=estimate.score,
            baseline_score=estimate.baseline_score,
            delta=estimate.delta,
            converged=estimate.converged,
            method=self.method,
            baseline=baseline,
            evaluations=estimate.evaluations,
            texts=tokens.texts,
            prompt_tokens=tokens.prompt_tokens,
        )


def _among(groups: Sequence[IntArray], target: IntArray) -> IntArray:
    """Targets at positions of tokens, at those of the groups that the tokens are in."""
    moved = target.copy()
    for index, position in enumerate(target[:, 0].tolist()):
        moved[index, 0] = next((place for place, group in enumerate(groups) if position in group), -1)
    return moved
