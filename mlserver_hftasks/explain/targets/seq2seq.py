"""summarization, translation and text2text-generation: how likely the model finds its answer to a text.

The answer is the decoder's, so that attributions are those of the encoder's tokens. Words that the task puts
before a text are never absent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mlserver_hftasks.engine.rows import Row
from mlserver_hftasks.explain.result import BoolArray
from mlserver_hftasks.explain.targets.answers import (
    WHOLE,
    LogProbability,
    control_ids,
    names_of,
    spelled,
    tokens_of,
)
from mlserver_hftasks.explain.targets.base import Choice, Subject, Targets, no_choice, target_array
from mlserver_hftasks.tasks.base import Answered
from mlserver_hftasks.tasks.seq2seq import Seq2Seq, Seq2SeqParameters


class Seq2SeqTargets(Targets[Seq2Seq[Any], Seq2SeqParameters]):
    """The log-probability of the answer."""

    def answering(self, parameters: Seq2SeqParameters) -> Seq2SeqParameters:
        """Nothing is drawn, unless the request says so."""
        return parameters.model_copy(update={} if parameters.do_sample else {"do_sample": False})

    def subject(
        self,
        answered: Answered,
        choice: Choice,
        parameters: Seq2SeqParameters,
        references: Sequence[Answered],
    ) -> Subject:
        """One score, of all tokens together."""
        return self._subject(answered, choice, parameters, per_token=False)

    def subject_per_token(
        self,
        answered: Answered,
        choice: Choice,
        parameters: Seq2SeqParameters,
        references: Sequence[Answered],
    ) -> Subject:
        """As many scores as the answer has tokens."""
        return self._subject(answered, choice, parameters, per_token=True)

    def _subject(
        self, answered: Answered, choice: Choice, parameters: Seq2SeqParameters, *, per_token: bool
    ) -> Subject:
        no_choice(choice, "the model's own answer is explained")
        tokenizer, (read,) = self.task.model.encoder.tokenizer, answered.example.rows
        tokens = tokens_of(answered, "max_new_tokens", per_token=per_token)
        ids, fed = read.arrays["input_ids"], np.concatenate([[self.task.start], tokens[:-1]])
        answer = spelled(tokens, tokenizer)
        places = [(len(ids) + index, int(token)) for index, token in enumerate(tokens)]
        return Subject(
            Row({"input_ids": ids, "decoder_input_ids": fed}, source=read.source),
            LogProbability(torch.from_numpy(tokens), per_token),
            target_array(places if per_token else [(-1, -1)]),
            names_of(answer, tokenizer) if per_token else (WHOLE,),
            kept=self._kept(read, parameters),
            answer=answer,
        )

    def _kept(self, row: Row, parameters: Seq2SeqParameters) -> BoolArray:
        """Special tokens, and the words before the text."""
        kept: BoolArray = np.isin(row.arrays["input_ids"], control_ids(self.task.model.encoder.tokenizer))
        prefix, offsets = self.task.prefix(parameters), getattr(row.source.encoding, "offsets", None)
        if offsets is not None and prefix and str(row.source.text).startswith(prefix):
            kept |= np.asarray(offsets).reshape(-1, 2)[:, 1] <= len(prefix)
        return kept
