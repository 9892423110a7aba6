"""What the targets of all tasks share that answer with text: how likely the model finds its answer.

The score is the natural logarithm of the probability of the answer's tokens given the prompt and those before
(as in https://arxiv.org/abs/2312.05491).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from mlserver_hftasks.engine.rows import IntArray
from mlserver_hftasks.errors import DeadlineExceeded, InvalidRequest
from mlserver_hftasks.explain.targets.base import AnswerText, token_names
from mlserver_hftasks.tasks.base import Answered
from mlserver_hftasks.tasks.text_stream import TextStream

MOST_TOKENS = 256
"""Of an answer that is explained as a whole."""
MOST_SCORES = 64
"""Of one that is explained token by token: each takes a backward pass of its own."""
WHOLE = "answer"
"""The label of the score of a whole answer."""


@dataclass(frozen=True, slots=True)
class LogProbability:
    """Of tokens, from the logits before each of them: their sum, or one by one."""

    tokens: Tensor
    per_token: bool

    def __call__(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """[1] or [tokens]"""
        logits = outputs["logits"].float()
        chosen = logits.gather(1, self.tokens.to(logits.device)[:, None])[:, 0] - logits.logsumexp(dim=1)
        return chosen if self.per_token else chosen.sum()[None]


def tokens_of(answered: Answered, where: str, *, per_token: bool) -> IntArray:
    """Of the one answer. Raises `InvalidRequest` for several, or for one that is too long."""
    (outputs,) = answered.outputs
    if len(outputs["lengths"]) > 1:
        raise InvalidRequest(
            f"{len(outputs['lengths'])} answers, expected one to explain @ num_return_sequences"
        )
    tokens: IntArray = outputs["sequences"][0, : outputs["lengths"][0]]
    most = MOST_SCORES if per_token else MOST_TOKENS
    if not len(tokens):
        raise DeadlineExceeded("no token within the time allowed, expected one by then @ timeout_ms")
    if len(tokens) > most:
        raise InvalidRequest(
            f"an answer of {len(tokens)} tokens, expected at most {most} to explain"
            f"{' token by token' if per_token else ''} @ {where}"
        )
    return tokens


def spelled(tokens: IntArray, tokenizer: Any, context: Sequence[int] = ()) -> AnswerText:
    """The text that the tokens come to behind some others, each with what it makes certain."""

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    stream = TextStream(decode, context=context)
    text, ends = "", [0]
    for token in tokens.tolist():
        text += stream.push(token)
        ends.append(len(text))
    text += stream.finish()
    ends[-1] = len(text)
    return AnswerText(tokens, text, or_nowhere(np.array([ends[:-1], ends[1:]], dtype=np.int64).T))


def names_of(answer: AnswerText, tokenizer: Any) -> tuple[str, ...]:
    """What each token writes; where it writes nothing, as the tokenizer calls it."""
    names = token_names(tokenizer, answer.ids.tolist())
    spans = answer.spans.tolist()
    written = [answer.text[start:end].strip() if start >= 0 else "" for start, end in spans]
    return tuple(text or name for text, name in zip(written, names, strict=True))


def control_ids(tokenizer: Any) -> list[int]:
    """Special tokens, which are never absent; a token for what is unknown is none of them."""
    unknown = {tokenizer.unk_token_id} - {tokenizer.bos_token_id, tokenizer.eos_token_id}
    return list(set(tokenizer.all_special_ids) - unknown)


def or_nowhere(spans: IntArray) -> IntArray:
    """Spans [n, 2]; those of nothing become -1."""
    spans[spans[:, 0] >= spans[:, 1]] = -1
    return spans
