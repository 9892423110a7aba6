"""text-ranking: how well a text answers a query."""

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
from mlserver_hftasks.tasks.text_ranking import TextRanking, TextRankingParameters


class TextRankingTargets(Targets[TextRanking, TextRankingParameters]):
    """The score before its sigmoid: the logit, or with two labels the difference of theirs."""

    def subject(
        self,
        answered: Answered,
        choice: Choice,
        parameters: TextRankingParameters,
        references: Sequence[Answered],
    ) -> Subject:
        """One score."""
        no_choice(choice, "a text is ranked by one score")
        labels = self.task.model.labels
        entries = [Entry("logits", (len(labels) - 1,))]
        if len(labels) == 2:
            entries.append(Entry("logits", (0,), -1.0))
        return Subject(
            answered.example.rows[0],
            Sums((tuple(entries),)),
            target_array([(-1, len(labels) - 1)]),
            (labels[-1],),
        )
