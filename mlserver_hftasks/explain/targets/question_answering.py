"""question-answering: where the answer starts and where it ends."""

from __future__ import annotations

from collections.abc import Sequence

from mlserver_hftasks.explain.targets.base import (
    Choice,
    Entry,
    Subject,
    Sums,
    Targets,
    no_choice,
    target_array,
)
from mlserver_hftasks.tasks.base import Answered
from mlserver_hftasks.tasks.question_answering import QuestionAnswering, QuestionAnsweringParameters


class QuestionAnsweringTargets(Targets[QuestionAnswering, QuestionAnsweringParameters]):
    """The start logit and the end logit of the best answer, in the window that has it."""

    def subject(
        self,
        answered: Answered,
        choice: Choice,
        parameters: QuestionAnsweringParameters,
        references: Sequence[Answered],
    ) -> Subject:
        """Two scores, of the question and its context as one row."""
        no_choice(choice, "the answer's start and end are explained")
        row, first, last = self.task.best_span(answered, parameters)
        return Subject(
            row,
            Sums(((Entry("start_logits", (first,)),), (Entry("end_logits", (last,)),))),
            target_array([(first, -1), (last, -1)]),
            ("start", "end"),
        )
