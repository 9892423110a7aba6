"""text-generation: how likely the model finds its answer, as a whole or token by token.

The answer is that of the request, or a text that
the client gives. It is part of the row and never absent, so that attributions are those of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mlserver_hftasks.engine.rows import IntArray, Row
from mlserver_hftasks.engine.sequences import FINISH_REASONS, FinishReason
from mlserver_hftasks.errors import InvalidRequest
from mlserver_hftasks.explain.result import BoolArray
from mlserver_hftasks.explain.targets.answers import (
    MOST_TOKENS,
    WHOLE,
    LogProbability,
    control_ids,
    names_of,
    or_nowhere,
    spelled,
    tokens_of,
)
from mlserver_hftasks.explain.targets.base import (
    AnswerText,
    Choice,
    Subject,
    Targets,
    predicted,
    target_array,
)
from mlserver_hftasks.tasks.base import Answered, Example
from mlserver_hftasks.tasks.chat import Chat, contents_in
from mlserver_hftasks.tasks.encoder import Encoding, Source
from mlserver_hftasks.tasks.text_generation import (
    CONTEXT_TOKENS,
    PromptContext,
    TextGeneration,
    TextGenerationParameters,
)

USUAL_TOKENS = 32
"""Most tokens of an answer that is made to be explained, where nobody says how many."""


class TextGenerationTargets(Targets[TextGeneration, TextGenerationParameters]):
    """The log-probability of the answer, or of the text that the client names."""

    def answering(self, parameters: TextGenerationParameters) -> TextGenerationParameters:
        """The most likely tokens, and not many, unless the request says otherwise."""
        usual: dict[str, Any] = {}
        if parameters.do_sample is None:
            usual["do_sample"] = False
        if parameters.max_new_tokens is None and parameters.max_length is None:
            usual["max_new_tokens"] = min(USUAL_TOKENS, self.task.model.limits.max_new_tokens)
        return parameters.model_copy(update=usual)

    def given(self, examples: Sequence[Example], choice: Choice) -> list[Answered] | None:
        """The client's text behind each prompt."""
        if choice is None or predicted(choice, ()):
            return None
        if not isinstance(choice, str) or not choice:
            raise InvalidRequest(
                f"got {choice!r:.60}, expected a text that continues the prompt @ explain.target"
            )
        text = self.task.text(choice, "explain.target")
        self._check_target(text)
        return [Answered(example, [_as_outputs(self._continued(example, text)[0])]) for example in examples]

    def subject(
        self,
        answered: Answered,
        choice: Choice,
        parameters: TextGenerationParameters,
        references: Sequence[Answered],
    ) -> Subject:
        """One score, of all tokens together."""
        return self._subject(answered, choice, per_token=False)

    def subject_per_token(
        self,
        answered: Answered,
        choice: Choice,
        parameters: TextGenerationParameters,
        references: Sequence[Answered],
    ) -> Subject:
        """As many scores as the answer has tokens."""
        return self._subject(answered, choice, per_token=True)

    def _subject(self, answered: Answered, choice: Choice, *, per_token: bool) -> Subject:
        context: PromptContext = answered.example.context
        if context.encoded is None:
            raise InvalidRequest("an empty prompt, expected at least one token to explain @ inputs")
        given = isinstance(choice, str) and not predicted(choice, ())
        where = "explain.target" if given else "max_new_tokens"
        tokens = tokens_of(answered, where, per_token=per_token)
        answer = self._answer(answered.example, tokens, choice)
        tokenizer, first = self.task.model.encoder.tokenizer, len(context.tokens)
        row = Row(
            {"input_ids": np.concatenate([context.tokens, tokens])},
            select=np.arange(first - 1, first - 1 + len(tokens)),
            source=context.encoded,
        )
        self._check_length(row.cost, first)
        places = [(first + index, int(token)) for index, token in enumerate(tokens)]
        return Subject(
            row,
            LogProbability(torch.from_numpy(tokens), per_token),
            target_array(places if per_token else [(-1, -1)]),
            names_of(answer, tokenizer) if per_token else (WHOLE,),
            kept=self._kept(context),
            answer=answer,
        )

    def _check_length(self, tokens: int, of_prompt: int) -> None:
        most = self.task.model.encoder.max_tokens
        if tokens > most:
            raise InvalidRequest(
                f"a prompt of {of_prompt} tokens and an answer of {tokens - of_prompt}, expected at most "
                f"{most} together @ explain.target"
            )

    def _check_target(self, text: str) -> None:
        """Before every prompt is written with it; behind a prompt it may have a few tokens less."""
        (alone,) = self._alone(text)
        if len(alone.ids) > 2 * MOST_TOKENS:
            raise InvalidRequest(
                f"an answer of {len(alone.ids)} tokens, expected at most {MOST_TOKENS} to explain "
                "@ explain.target"
            )

    # -- what is never absent --------------------------------------------------------------------

    def _kept(self, context: PromptContext) -> BoolArray:
        """Special tokens, also those that are written in the text, and what a chat's template adds."""
        tokenizer = self.task.model.encoder.tokenizer
        kept: BoolArray = np.isin(context.tokens, control_ids(tokenizer))
        offsets = getattr(context.encoded and context.encoded.encoding, "offsets", None)
        if isinstance(context.source, Chat) and offsets is not None:
            assert context.encoded is not None
            contents = contents_in(str(context.encoded.text), context.source, tokenizer)
            if contents is not None:
                kept |= ~_within(np.asarray(offsets).reshape(-1, 2), contents)
        return kept

    # -- the answer's text -----------------------------------------------------------------------

    def _answer(self, example: Example, tokens: IntArray, choice: Choice) -> AnswerText:
        if isinstance(choice, str) and not predicted(choice, ()):
            return AnswerText(tokens, choice, self._continued(example, choice)[1])
        context = example.context.tokens[-CONTEXT_TOKENS:].tolist()
        return spelled(tokens, self.task.model.encoder.tokenizer, context)

    def _continued(self, example: Example, text: str) -> tuple[IntArray, IntArray]:
        """The tokens of a text behind a prompt, and where in the text they are.

        As the tokenizer writes it behind the prompt's text, if that leaves the prompt's tokens as they are;
        else by itself. A prompt that was cut is no longer what its text comes to.
        """
        encoder, context = self.task.model.encoder, example.context
        before = str(context.encoded.text) if isinstance(context.encoded, Source) else ""
        own: list[int] = context.tokens.tolist()
        for special in (True, False) if before else ():
            prompt, both = encoder.encode([before, before + text], special=special, limited=False)
            if prompt.ids == own and len(both.ids) > len(own) and both.ids[: len(own)] == own:
                return _ids_and_spans(both, len(own), len(before))
        (alone,) = self._alone(text)
        return _ids_and_spans(alone, 0, 0)

    def _alone(self, text: str) -> list[Encoding]:
        return self.task.model.encoder.encode([text], special=False, limited=False, where="explain.target")


def _as_outputs(tokens: IntArray) -> dict[str, IntArray]:
    """In the form of `generation.generate`."""
    finish = np.array([FINISH_REASONS.index(FinishReason.LENGTH)], dtype=np.int64)
    return {"sequences": tokens[None], "lengths": np.array([len(tokens)], dtype=np.int64), "finish": finish}


def _ids_and_spans(encoding: Encoding, first: int, character: int) -> tuple[IntArray, IntArray]:
    """The tokens from `first` on, and where they are in the text that begins at that character."""
    ids = np.asarray(encoding.ids[first:], dtype=np.int64)
    if not hasattr(encoding, "offsets"):
        return ids, np.full((len(ids), 2), -1, dtype=np.int64)
    offsets = np.asarray(encoding.offsets[first:], dtype=np.int64).reshape(-1, 2) - character
    return ids, or_nowhere(np.maximum(offsets, 0))


def _within(offsets: IntArray, contents: Sequence[tuple[int, int]]) -> BoolArray:
    """[tokens], which reach into one of the contents."""
    inside = np.zeros(len(offsets), dtype=np.bool_)
    for start, end in contents:
        inside |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
    return inside
