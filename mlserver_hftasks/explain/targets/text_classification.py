"""text-classification: the logit of a label."""

from __future__ import annotations

from collections.abc import Sequence

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
from mlserver_hftasks.tasks.text_classification import TextClassification, TextClassificationParameters


class TextClassificationTargets(Targets[TextClassification, TextClassificationParameters]):
    """Of the label with the largest logit, or of the one that the client names."""

    def subject(
        self,
        answered: Answered,
        choice: Choice,
        parameters: TextClassificationParameters,
        references: Sequence[Answered],
    ) -> Subject:
        """One score."""
        labels = self.task.model.labels
        if choice is None or predicted(choice, labels):
            label = int(answered.outputs[0]["logits"].argmax())
        else:
            label = index_of(choice, labels)
        return Subject(
            answered.example.rows[0],
            Sums(((Entry("logits", (label,)),),)),
            target_array([(-1, label)]),
            (labels[label],),
        )
