"""Requests to a model that generates: whole answers, and streams of them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from typing import Any

from mlserver.types import InferenceRequest

from mlserver_hftasks.codecs.request import STREAMED
from mlserver_hftasks.codecs.response import RESULT_NAME, encode_results, encode_tensor
from mlserver_hftasks.engine.batcher import Batcher
from mlserver_hftasks.engine.generator import Generator, NewToken
from mlserver_hftasks.engine.sequences import FinishReason
from mlserver_hftasks.errors import InvalidRequest
from mlserver_hftasks.runtime.offload import Deadline
from mlserver_hftasks.runtime.service import Asked, Reply, Service, run_rows
from mlserver_hftasks.tasks.base import Answered, Example
from mlserver_hftasks.tasks.decoding import Answer, prompts_of, regrouped
from mlserver_hftasks.tasks.text_generation import TextGeneration, TextGenerationParameters


class GenerationService(Service):
    """Runs prompts in the steps of a generating engine, and what that does not take in batches of its own."""

    task: TextGeneration

    def __init__(
        self,
        task: TextGeneration,
        timeout_ms: float | None,
        generator: Generator,
        batcher: Batcher,
        *,
        stream_interval: int = 1,
    ) -> None:
        super().__init__(task, timeout_ms)
        self._generator = generator
        self._batcher = batcher
        self._stream_interval = stream_interval

    def check_admission(self) -> None:
        """See `Service`."""
        self._generator.check_admission()

    async def answer_with(self, payload: InferenceRequest) -> tuple[Reply, list[Answered]]:
        """See `Service`. Raises `InvalidRequest` for a stream that came through a worker as one request."""
        extra = (payload.parameters.model_extra if payload.parameters else None) or {}
        if extra.get(STREAMED):
            raise InvalidRequest(
                "streams do not get through parallel workers, expected parallel_workers 0 in the server's "
                "settings, or a request to /infer @ infer_stream"
            )
        return await super().answer_with(payload)

    async def run(self, asked: Asked, deadline: Deadline) -> list[Answered]:
        """See `Service`."""
        prompts = prompts_of(asked.examples)
        if prompts is None:
            return await run_rows(self._batcher, asked.examples, deadline)
        deadline.leave_to_engine()
        return regrouped(asked.examples, await self._generator.run(prompts, deadline=deadline.until))

    async def stream(self, payload: InferenceRequest) -> AsyncGenerator[Reply, None]:
        """The answers piece by piece: text that is certain, the last piece with finish reason and counts."""
        self.check_admission()
        async with Deadline(self._timeout_ms) as deadline:
            asked = await self.read(payload, deadline)
            until = deadline.until
        prompts = prompts_of(asked.examples)
        if prompts is None:
            raise InvalidRequest(
                "what is asked for is only computed as a whole (see docs/generation.md), expected no beams, "
                "n-grams, typical, epsilon or eta sampling and no forbidden words in a stream @ infer_stream"
            )
        pieces = _Pieces(self.task, asked, self._stream_interval)
        async with aclosing(self._generator.stream(prompts, deadline=until)) as news:
            async for tokens in news:
                for reply in pieces.after(tokens):
                    yield reply

    async def close(self) -> None:
        """See `Service`."""
        await self._generator.close()
        await self._batcher.close()


class _Pieces:
    """New tokens of a request's answers, as the replies of a stream."""

    def __init__(self, task: TextGeneration, asked: Asked, interval: int) -> None:
        parameters = asked.parameters
        assert isinstance(parameters, TextGenerationParameters)
        self._task = task
        self._parameters = parameters
        self._names = asked.call.outputs or (RESULT_NAME,)
        self._interval = parameters.stream_interval or interval
        self._answers = [
            _Growing(task, example, parameters) for example in asked.examples for _ in example.context.prompts
        ]

    def after(self, news: Sequence[NewToken]) -> Iterator[Reply]:
        """Replies that the tokens make due."""
        for each in news:
            answer = self._answers[each.index]
            answer.take(each)
            if each.finish is not None or answer.is_due(self._interval):
                yield self._reply(each.index, answer, each.finish)

    def _reply(self, index: int, growing: _Growing, finish: FinishReason | None) -> Reply:
        piece = growing.piece(finish)
        said: dict[str, Any] = {} if finish is None else growing.summary(finish)
        if len(self._answers) > 1:
            said["index"] = index
        typed = self._task.piece_tensors(piece) if self._names != (RESULT_NAME,) else {}
        outputs = [
            encode_results([self._task.piece(piece, self._parameters)])
            if name == RESULT_NAME
            else encode_tensor(name, typed[name].datatype, typed[name].values)
            for name in self._names
        ]
        return Reply(outputs, said)


class _Growing:
    """One answer while it grows, and what of it was not sent yet."""

    def __init__(self, task: TextGeneration, example: Example, parameters: TextGenerationParameters) -> None:
        self._writer = task.writer(example, parameters)
        self._prompt_tokens = len(example.context.tokens)
        self._text = ""
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._count = 0
        self._sent = False

    def take(self, news: NewToken) -> None:
        """Take in a token, or an end."""
        if news.token is not None:
            self._tokens.append(news.token)
            self._text += self._writer.push(news.token)
            self._count += 1
        if news.logprob is not None:
            self._logprobs.append(news.logprob)
        if news.finish is not None:
            self._text += self._writer.finish()

    def is_due(self, interval: int) -> bool:
        """Whether there is enough to send; the first text goes at once."""
        return bool(self._text) and (len(self._tokens) >= interval or not self._sent)

    def piece(self, finish: FinishReason | None) -> Answer:
        """What was not sent yet."""
        made = Answer(self._tokens, finish, self._logprobs, self._text)
        self._tokens, self._logprobs, self._text, self._sent = [], [], "", True
        return made

    def summary(self, finish: FinishReason) -> dict[str, Any]:
        """What the last piece says of the whole answer."""
        return {
            "finish_reason": finish.value,
            "prompt_tokens": self._prompt_tokens,
            "generated_tokens": self._count,
        }
