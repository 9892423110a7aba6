"""zero-shot-classification: the entailment of a label's sentence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlserver_hftasks.explain.targets.base import (
    Choice,
    Entry,
    Subject,
    Sums,
    Targets,
    index_of,
    predicted,
    target_array,
)
from mlserver_hftasks.tasks.base import Answered
from mlserver_hftasks.tasks.zero_shot_classification import (
    ZeroShotClassification,
    ZeroShotClassificationParameters,
)


class ZeroShotTargets(Targets[ZeroShotClassification, ZeroShotClassificationParameters]):
    """The entailment logit of the pair of the text and the best label's sentence, or the named label's."""

    def subject(
        self,
        answered: Answered,
        choice: Choice,
        parameters: ZeroShotClassificationParameters,
        references: Sequence[Answered],
    ) -> Subject:
        """One score."""
        labels = parameters.candidate_labels
        if choice is None or predicted(choice, labels):
            label = int(np.argmax(self.task.label_scores(answered, parameters)))
        else:
            label = index_of(choice, labels)
        return Subject(
            answered.example.rows[label],
            Sums(((Entry("logits", (self.task.entailment,)),),)),
            target_array([(-1, label)]),
            (labels[label],),
        )
