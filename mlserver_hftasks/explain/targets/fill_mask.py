"""fill-mask: the logits of the tokens that fill the masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlserver_hftasks.errors import InvalidRequest
from mlserver_hftasks.explain.targets.base import (
    MOST_SCORES,
    Choice,
    Entry,
    Subject,
    Sums,
    Targets,
    predicted,
    target_array,
    token_names,
)
from mlserver_hftasks.tasks.base import Answered
from mlserver_hftasks.tasks.fill_mask import Blanks, FillMask, FillMaskParameters


class FillMaskTargets(Targets[FillMask, FillMaskParameters]):
    """Of the likeliest token in the place of each of the first masks, or of the token that is named."""

    def subject(
        self,
        answered: Answered,
        choice: Choice,
        parameters: FillMaskParameters,
        references: Sequence[Answered],
    ) -> Subject:
        """One score per mask."""
        blanks: Blanks = answered.example.context
        logits = answered.outputs[0]["logits"][:MOST_SCORES]
        if choice is None or predicted(choice, ()):
            tokens = _likeliest(logits, blanks.targets)
        else:
            tokens = [self._token(choice, logits.shape[1])] * len(logits)
        return Subject(
            answered.example.rows[0],
            Sums(tuple((Entry("logits", (mask, token)),) for mask, token in enumerate(tokens))),
            target_array(list(zip(blanks.positions.tolist(), tokens, strict=False))),
            token_names(self.task.model.encoder.tokenizer, tokens),
        )

    def _token(self, choice: str | int, vocabulary: int) -> int:
        if isinstance(choice, str):
            return self.task.target_id(choice, "explain.target")
        if not 0 <= choice < vocabulary:
            raise InvalidRequest(f"unknown target {choice}, expected 0..{vocabulary - 1} @ explain.target")
        return choice


def _likeliest(logits: Any, targets: Any) -> list[int]:
    if targets is None:
        best: list[int] = logits.argmax(axis=1).tolist()
        return best
    chosen: list[int] = np.asarray(targets)[logits[:, targets].argmax(axis=1)].tolist()
    return chosen
