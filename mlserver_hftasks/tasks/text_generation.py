"""text-generation: prompts and chats, continued."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from mlserver_hftasks.backends.base import Head
from mlserver_hftasks.engine.rows import Decoding, IntArray, Row
from mlserver_hftasks.engine.sequences import FinishReason, Prompt
from mlserver_hftasks.errors import InvalidRequest
from mlserver_hftasks.generation.keys import GenerateKey
from mlserver_hftasks.tasks.base import Answered, Example, ModelFacts, Task
from mlserver_hftasks.tasks.chat import Chat, chats_of, is_chat, rendered
from mlserver_hftasks.tasks.decoding import Answer, Choices, answer_tensors, answers_of, summary_of
from mlserver_hftasks.tasks.encoder import Source, source_of
from mlserver_hftasks.tasks.generation import GenerationParameters
from mlserver_hftasks.tasks.signature import InputSpec, OutputSpec, Signature, Tensor
from mlserver_hftasks.tasks.text import TruncationChoice, truncation_of
from mlserver_hftasks.tasks.text_stream import TextStream

WHOLE_ONLY = (
    "got beams, n-grams, typical, epsilon or eta sampling or forbidden words, which a program does not "
    'compute, expected none of them, or a model with the backend "torch" @ parameters'
)
CONTEXT_TOKENS = 8
"""Tokens of the prompt beside which the first new ones are decoded."""


class TextGenerationParameters(GenerationParameters):
    """Parameters of `transformers.TextGenerationPipeline`, and what streams need."""

    return_full_text: bool | None = Field(
        None, description="the answer begins with the prompt; true if not set, not so in streams"
    )
    return_text: bool | None = Field(None, description="texts, which is what there is anyway")
    return_tensors: bool | None = Field(
        None, description="token ids of prompt and answer in place of the text"
    )
    logprobs: bool | None = Field(
        None, description="with the log-probability of each new token under the model's own distribution"
    )
    truncation: TruncationChoice | None = Field(
        None, description="cut prompts that are too long: true, or a strategy of transformers"
    )
    add_special_tokens: bool | None = Field(
        None, description="special tokens around a prompt that is a text; true if not set"
    )
    prefix: str | None = Field(None, max_length=10_000, description="comes before each prompt")
    stream_interval: int | None = Field(
        None, ge=1, description="tokens per piece of a stream; the setting if not set"
    )

    not_for_generate: ClassVar[frozenset[str]] = GenerationParameters.not_for_generate | {
        "return_full_text",
        "return_text",
        "return_tensors",
        "logprobs",
        "truncation",
        "add_special_tokens",
        "prefix",
        "stream_interval",
    }


@dataclass(frozen=True, slots=True)
class PromptContext:
    """One item: what came, its tokens, and its prompt for the engine if that can take it."""

    source: str | Chat
    tokens: IntArray
    prompts: tuple[Prompt, ...] | None
    encoded: Source | None = None
    """The prompt's text and its encoding; None for an empty one, which begins with a token of its own."""


class TextGeneration(Task[TextGenerationParameters]):
    """Results equal those of `transformers.TextGenerationPipeline`.

    What the generating engine takes gets `Prompt`s in its context, what only `generate()` does gets rows.
    """

    name = "text-generation"
    head = Head("AutoModelForCausalLM", {}, generates=True)
    signature = Signature(
        inputs=(
            InputSpec("text_inputs", ("args", "array_inputs", "inputs"), description="prompts, or chats"),
            InputSpec("messages", ("conversations",), required=False, description="chats as JSON"),
        ),
        parameters=TextGenerationParameters,
        outputs=(
            OutputSpec("generated_text", "BYTES", (-1, -1), "the new text of each answer"),
            OutputSpec("token_ids", "INT64", (-1, -1, -1), "the new tokens, filled up with -1"),
            OutputSpec("logprobs", "FP32", (-1, -1, -1), "of the new tokens, filled up with 0"),
            OutputSpec("generated_tokens", "INT64", (-1, -1), "number of new tokens"),
            OutputSpec("finish_reason", "BYTES", (-1, -1), "eos, stop, length or timeout"),
        ),
    )

    def __init__(self, model: ModelFacts) -> None:
        super().__init__(model)
        self._choices = Choices(model)

    def examples(
        self, inputs: Mapping[str, Sequence[Any]], parameters: TextGenerationParameters
    ) -> list[Example]:
        """One example per prompt or chat."""
        self._check(parameters)
        sources = self._sources(inputs, parameters.num_return_sequences or 1)
        where = "messages" if "messages" in inputs else "text_inputs"
        tokens = self._tokens(sources, parameters, where)
        whole = self._choices.needs_generate(parameters) or not self.model.steps
        if whole and not self.model.whole:
            raise InvalidRequest(WHOLE_ONLY)
        choose = self._rows if whole else self._prompts
        return [
            choose(PromptContext(source, ids, None, encoded), parameters, f"{where}[{index}]")
            for index, (source, (ids, encoded)) in enumerate(zip(sources, tokens, strict=True))
        ]

    def postprocess(self, answered: Answered, parameters: TextGenerationParameters) -> Any:
        """A list with one dict per answer."""
        return [self._entry(answered, answer, parameters) for answer in self._answers(answered, parameters)]

    def tensors(
        self, names: Sequence[str], answered: Sequence[Answered], parameters: TextGenerationParameters
    ) -> Mapping[str, Tensor]:
        """All [n, answers], those of tokens [n, answers, longest]."""
        if "logprobs" in names and not parameters.logprobs:
            raise InvalidRequest("no log-probabilities, expected the parameter logprobs=true @ outputs")
        answers = [self._answers(item, parameters) for item in answered]
        made = answer_tensors(answers)
        return {name: made[name] for name in names}

    def summary(
        self, answered: Sequence[Answered], parameters: TextGenerationParameters
    ) -> Mapping[str, Any]:
        """Finish reasons and token counts, for the response's parameters."""
        answers = [answer for item in answered for answer in answers_of(item)]
        return summary_of([answer.finish for answer in answers if answer.finish]) | {
            "prompt_tokens": sum(len(item.example.context.tokens) for item in answered),
            "generated_tokens": sum(len(answer.tokens) for answer in answers),
        }

    def writer(self, example: Example, parameters: TextGenerationParameters) -> TextStream:
        """What turns the new tokens of one answer into text as they come."""
        return self._writer(example.context.tokens, parameters)

    def piece(self, piece: Answer, parameters: TextGenerationParameters) -> dict[str, Any]:
        """A piece of one answer as a result: its new text or tokens."""
        key, value = (
            ("generated_token_ids", piece.tokens)
            if parameters.return_tensors
            else ("generated_text", piece.text)
        )
        return {key: value} | ({"logprobs": piece.logprobs} if parameters.logprobs else {})

    def piece_tensors(self, piece: Answer) -> Mapping[str, Tensor]:
        """The typed outputs of a piece, of one item with one answer."""
        return answer_tensors([[piece]])

    # -- prompts ---------------------------------------------------------------------------------

    def _check(self, parameters: TextGenerationParameters) -> None:
        if parameters.return_full_text is not None and (
            parameters.return_text is not None or parameters.return_tensors is not None
        ):
            raise InvalidRequest(
                "got return_full_text together with return_text or return_tensors, expected one of them "
                "@ return_full_text"
            )
        self._choices.check(parameters)

    def _sources(self, inputs: Mapping[str, Sequence[Any]], answers: int) -> list[str | Chat]:
        if len(inputs) > 1:
            raise InvalidRequest("got both messages and text_inputs, expected one of them @ messages")
        ((name, values),) = inputs.items()
        chats = name == "messages" or any(map(is_chat, values)) or _is_one_chat(values)
        sources = chats_of(values, name) if chats else values
        self.check_count(len(sources) * answers, name)
        for index, source in enumerate(sources):
            where = f"{name}[{index}]"
            texts = [m["content"] for m in source.messages] if isinstance(source, Chat) else [source]
            for text in texts:
                self.text(text, where)
        return list(sources)

    def _tokens(
        self, sources: Sequence[str | Chat], parameters: TextGenerationParameters, where: str
    ) -> list[tuple[IntArray, Source | None]]:
        prefix = parameters.prefix or ""
        tokenizer = self.model.encoder.tokenizer
        special = parameters.add_special_tokens is not False and where != "messages"
        special = special and not any(isinstance(source, Chat) for source in sources)
        texts = [
            rendered(source, tokenizer, f"{where}[{index}]")
            if isinstance(source, Chat)
            else self.text(prefix + source, f"{where}[{index}]")
            for index, source in enumerate(sources)
        ]
        truncation = truncation_of(self.model, parameters.truncation, None)
        if truncation is not None:
            truncation = replace(truncation, max_length=self._choices.truncated_tokens(parameters))
        full = [index for index, text in enumerate(texts) if text]
        encodings = self.model.encoder.encode(
            [texts[index] for index in full], truncation, special=special, where=where
        )
        found = {
            index: (np.asarray(encoding.ids, dtype=np.int64), source_of(encoding))
            for index, encoding in zip(full, encodings, strict=True)
        }
        return [
            found.get(index) or (np.asarray(self._choices.beginning(f"{where}[{index}]"), np.int64), None)
            for index in range(len(texts))
        ]

    def _prompts(self, context: PromptContext, parameters: TextGenerationParameters, where: str) -> Example:
        tokens, count = context.tokens, parameters.num_return_sequences or 1
        stops = parameters.stop or parameters.stop_sequence
        prompts = tuple(
            Prompt(
                tokens,
                self._choices.max_new_tokens(len(tokens), parameters, where),
                self._choices.sampling(parameters),
                eos=self._choices.eos(parameters),
                min_new_tokens=self._choices.min_new_tokens(len(tokens), parameters),
                seed=None if parameters.seed is None else parameters.seed + number,
                logprobs=bool(parameters.logprobs),
                stopper=partial(self._stopper, tokens, parameters) if stops else None,
            )
            for number in range(count)
        )
        return Example((), replace(context, prompts=prompts))

    def _rows(self, context: PromptContext, parameters: TextGenerationParameters, where: str) -> Example:
        tokens = context.tokens
        arguments = self._choices.generate_arguments(parameters)
        decoding = Decoding(
            self._choices.max_new_tokens(len(tokens), parameters, where),
            self._choices.min_new_tokens(len(tokens), parameters),
            self._choices.width(parameters),
            parameters.seed,
        )
        key = GenerateKey.of(
            arguments,
            stop=tuple(parameters.stop or parameters.stop_sequence or ()),
            logprobs=bool(parameters.logprobs),
        )
        return Example((Row({"input_ids": tokens}, key, decoding=decoding),), context)

    # -- answers ---------------------------------------------------------------------------------

    def _writer(self, tokens: IntArray, parameters: TextGenerationParameters) -> TextStream:
        return TextStream(
            self._decoder(parameters),
            parameters.stop or parameters.stop_sequence or (),
            keep_stop=not parameters.stop,
            context=tokens[-CONTEXT_TOKENS:].tolist(),
        )

    def _stopper(self, tokens: IntArray, parameters: TextGenerationParameters) -> Callable[[int], bool]:
        writer = self._writer(tokens, parameters)

        def stops(token: int) -> bool:
            writer.push(token)
            return writer.stopped

        return stops

    def _decoder(self, parameters: TextGenerationParameters) -> Callable[[Sequence[int]], str]:
        clean_up = parameters.clean_up_tokenization_spaces
        options = {} if clean_up is None else {"clean_up_tokenization_spaces": clean_up}
        return partial(self.model.encoder.tokenizer.decode, skip_special_tokens=True, **options)

    def _answers(self, answered: Answered, parameters: TextGenerationParameters) -> list[Answer]:
        return [
            answer.with_text(self._text(answered.example.context.tokens, answer, parameters))
            for answer in answers_of(answered)
        ]

    def _text(self, prompt: IntArray, answer: Answer, parameters: TextGenerationParameters) -> str:
        if answer.finish is FinishReason.STOP and parameters.stop:
            writer = self._writer(prompt, parameters)
            return "".join(map(writer.push, answer.tokens)) + writer.finish()
        decode = self._decoder(parameters)
        context = prompt[-CONTEXT_TOKENS:].tolist()
        return decode([*context, *answer.tokens])[len(decode(context)) :]

    def _entry(
        self, answered: Answered, answer: Answer, parameters: TextGenerationParameters
    ) -> dict[str, Any]:
        context: PromptContext = answered.example.context
        if parameters.return_tensors:
            entry: dict[str, Any] = {"generated_token_ids": [*context.tokens.tolist(), *answer.tokens]}
        else:
            entry = {"generated_text": self._full(context.source, answer.text, parameters)}
        if parameters.logprobs:
            entry["logprobs"] = list(answer.logprobs)
        return entry

    def _full(self, source: str | Chat, text: str, parameters: TextGenerationParameters) -> Any:
        if parameters.return_full_text is False:
            return text
        return source.answered(text) if isinstance(source, Chat) else source + text


def _is_one_chat(values: Sequence[Any]) -> bool:
    return bool(values) and all(isinstance(value, Mapping) and "role" in value for value in values)
