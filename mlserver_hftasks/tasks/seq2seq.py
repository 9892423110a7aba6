"""What summarization, translation and text2text-generation share: an encoder reads, a decoder writes.

transformers 5 has no such pipelines; results equal those of version 4.41.2, the newest that
`mlserver_huggingface` runs on. As there, a model's `task_specific_params` hold for the task they name: how to
generate, and the words that T5 wants before a text. Differences: a stop text of several tokens counts as a
whole, and does not keep the model from ending an answer itself; texts longer than the model reads are
refused; and a beam search that finds its last answer in the very step of `max_length` may choose another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
from pydantic import Field
from transformers import GenerationConfig, PretrainedConfig

from mlserver_hftasks.backends.base import Head
from mlserver_hftasks.engine.rows import Decoding, Row
from mlserver_hftasks.engine.sequences import FinishReason
from mlserver_hftasks.errors import InvalidRequest
from mlserver_hftasks.generation.keys import GenerateKey
from mlserver_hftasks.tasks.base import Answered, Example, ModelFacts, Task
from mlserver_hftasks.tasks.decoding import Answer, Choices, answer_tensors, answers_of, summary_of
from mlserver_hftasks.tasks.encoder import Encoding, source_of
from mlserver_hftasks.tasks.generation import GenerationParameters
from mlserver_hftasks.tasks.signature import InputSpec, OutputSpec, Signature, Tensor
from mlserver_hftasks.tasks.text import TEXTS, TruncationChoice, truncation_of

START_TOKENS = 1
"""A decoder that follows an encoder begins with one token, which `max_length` and `min_length` count."""
USUAL_LENGTH = 20
"""`max_length` where neither request nor model says how long; transformers 4 had the same."""
TEXT = "generated_text"
"""The name of the text among `answer_tensors`."""


class Seq2SeqParameters(GenerationParameters):
    """Parameters of transformers 4's `Text2TextGenerationPipeline`; `max_length` is that of the answer."""

    max_length: int | None = Field(
        None, ge=1, description="most tokens of an answer, the one that it begins with included"
    )
    min_length: int | None = Field(None, ge=0, description="no end before so many tokens, see max_length")
    truncation: TruncationChoice | None = Field(
        None, description="cut texts that are too long: true, or a strategy of transformers"
    )
    prefix: str | None = Field(None, description="comes before every text; the model's own if not set")
    return_tensors: bool | None = Field(None, description="token ids in place of texts")
    return_text: bool | None = Field(None, description="accepted, no effect: texts are the default")
    logprobs: bool | None = Field(
        None, description="with the log-probability of each token under the model's own distribution"
    )
    clean_up_tokenization_spaces: bool | None = Field(
        None, description="no spaces before punctuation; not so if not set"
    )

    not_for_generate: ClassVar[frozenset[str]] = GenerationParameters.not_for_generate | {
        "truncation",
        "prefix",
        "return_tensors",
        "return_text",
        "logprobs",
    }


Q = TypeVar("Q", bound=Seq2SeqParameters)


def signature_of(
    result: str, parameters: type[Seq2SeqParameters], inputs: Sequence[InputSpec] = (TEXTS,)
) -> Signature:
    """The signature of a task whose texts are called `result`_text."""
    return Signature(
        inputs=tuple(inputs),
        parameters=parameters,
        outputs=(
            OutputSpec(f"{result}_text", "BYTES", (-1, -1), "the text of each answer"),
            OutputSpec("token_ids", "INT64", (-1, -1, -1), "its tokens, filled up with -1"),
            OutputSpec("logprobs", "FP32", (-1, -1, -1), "of its tokens, filled up with 0"),
            OutputSpec("generated_tokens", "INT64", (-1, -1), "number of its tokens"),
            OutputSpec("finish_reason", "BYTES", (-1, -1), "eos, stop, length or timeout"),
        ),
    )


class Seq2Seq(Task[Q]):
    """Texts in, texts out. Subclasses name the result."""

    head = Head("AutoModelForSeq2SeqLM", {}, generates=True)
    result: ClassVar[str]
    """What the pipeline's results are called: `result`_text and `result`_token_ids."""

    def __init__(self, model: ModelFacts) -> None:
        super().__init__(model)
        self._choices = Choices(model)
        self.start = model.generation_config.decoder_start_token_id or 0
        """What the decoder begins with, before the answer's first token."""
        self._pad = model.generation_config.pad_token_id or 0
        own = self.specific(model.asked_as, model.config).get("prefix", getattr(model.config, "prefix", None))
        self._prefix = own or ""

    @classmethod
    def specific(cls, name: str, config: PretrainedConfig) -> Mapping[str, Any]:
        """What the model's config says of the task of that name."""
        found: Mapping[str, Any] = (getattr(config, "task_specific_params", None) or {}).get(name, {})
        return found

    @classmethod
    def configure(cls, name: str, config: PretrainedConfig, generation: GenerationConfig) -> None:
        """See `Task`: what the config says of this task's generation holds."""
        for key, value in cls.specific(name, config).items():
            if hasattr(generation, key):
                setattr(generation, key, value)

    def examples(self, inputs: Mapping[str, Sequence[Any]], parameters: Q) -> list[Example]:
        """One row per text; the context is the number of its tokens."""
        self._choices.check(parameters)
        texts = self.texts(inputs.get("inputs", ()), "inputs")
        arguments = self._choices.generate_arguments(parameters)
        return [self._example(each, arguments, parameters) for each in self.encoded(texts, parameters)]

    def postprocess(self, answered: Answered, parameters: Q) -> Any:
        """One dict per answer."""
        answers = self._answers(answered, parameters)
        if not parameters.return_tensors:
            entries: list[dict[str, Any]] = [{f"{self.result}_text": answer.text} for answer in answers]
        else:
            longest = max(len(answer.tokens) for answer in answers)
            entries = [{f"{self.result}_token_ids": self._ids(answer, longest)} for answer in answers]
        if parameters.logprobs:
            for entry, answer in zip(entries, answers, strict=True):
                entry["logprobs"] = answer.logprobs
        return entries

    def shaped(self, results: list[Any], parameters: Q, *, scalar: bool) -> list[Any]:
        """As the pipeline: of a list of texts with one answer each, the answers."""
        if scalar:
            return list(results[0])
        return [entries[0] for entries in results] if all(len(each) == 1 for each in results) else results

    def tensors(
        self, names: Sequence[str], answered: Sequence[Answered], parameters: Q
    ) -> Mapping[str, Tensor]:
        """All [n, answers], those of tokens [n, answers, longest]."""
        if "logprobs" in names and not parameters.logprobs:
            raise InvalidRequest("no log-probabilities, expected the parameter logprobs=true @ outputs")
        made = answer_tensors([self._answers(item, parameters) for item in answered])
        made[f"{self.result}_text"] = made[TEXT]
        return {name: made[name] for name in names}

    def summary(self, answered: Sequence[Answered], parameters: Q) -> Mapping[str, Any]:
        """Finish reasons and token counts, for the response's parameters."""
        answers = [answer for item in answered for answer in answers_of(item)]
        return summary_of([answer.finish for answer in answers if answer.finish]) | {
            "prompt_tokens": sum(item.example.context for item in answered),
            "generated_tokens": sum(len(answer.tokens) for answer in answers),
        }

    # -- texts to rows ---------------------------------------------------------------------------

    def encoded(self, texts: Sequence[str], parameters: Q) -> list[Encoding]:
        """Each text with what belongs before and after it. Raises `InvalidRequest`."""
        prefix = self.prefix(parameters)
        truncation = truncation_of(self.model, parameters.truncation, None)
        return self.model.encoder.encode([prefix + text for text in texts], truncation)

    def prefix(self, parameters: Q) -> str:
        """What comes before every text. Raises `InvalidRequest`."""
        given = parameters.prefix
        return self._prefix if given is None else self.text(given, "prefix")

    def first_token(self, parameters: Q) -> int | None:
        """What an answer begins with, where it is no parameter of `generate()`. Raises `InvalidRequest`."""
        return None

    def _example(self, encoding: Encoding, arguments: Mapping[str, Any], parameters: Q) -> Example:
        ids = np.asarray(encoding.ids, dtype=np.int64)
        least, most = self._lengths(parameters)
        decoding = Decoding(
            most, least, self._choices.width(parameters), parameters.seed, self.first_token(parameters)
        )
        key = GenerateKey.of(
            arguments,
            stop=tuple(parameters.stop or parameters.stop_sequence or ()),
            logprobs=bool(parameters.logprobs),
            company=(least, most),
        )
        row = Row({"input_ids": ids}, key, decoding=decoding, source=source_of(encoding))
        return Example((row,), len(ids))

    def _lengths(self, parameters: Q) -> tuple[int, int]:
        """Least and most new tokens. Raises `InvalidRequest` for more than the model or the setting takes."""
        config, limit = self.model.generation_config, self._most_new_tokens()
        asked, name = parameters.max_new_tokens, "max_new_tokens"
        if asked is None and parameters.max_length is not None:
            asked, name = parameters.max_length - START_TOKENS, "max_length"
        if asked is not None and not 1 <= asked <= limit:
            extra = START_TOKENS if name == "max_length" else 0
            raise InvalidRequest(f"got {asked + extra}, expected {1 + extra}..{limit + extra} @ {name}")
        if asked is None:
            usual = config.max_new_tokens or (config.max_length or USUAL_LENGTH) - START_TOKENS
            asked = max(min(usual, limit), 1)
        least = self._least(parameters.min_new_tokens, parameters.min_length)
        if least is None:
            least = self._least(config.min_new_tokens, config.min_length) or 0
        return least, asked

    def _most_new_tokens(self) -> int:
        positions = getattr(self.model.config, "max_position_embeddings", None)
        return min(self.model.limits.max_new_tokens, positions or self.model.limits.max_new_tokens)

    def _least(self, new: int | None, length: int | None) -> int | None:
        if new is not None:
            return new
        return None if length is None else max(length - START_TOKENS, 0)

    # -- answers ---------------------------------------------------------------------------------

    def _answers(self, answered: Answered, parameters: Q) -> list[Answer]:
        return [answer.with_text(self._text(answer, parameters)) for answer in answers_of(answered)]

    def _text(self, answer: Answer, parameters: Q) -> str:
        tokenizer = self.model.encoder.tokenizer
        text: str = tokenizer.decode(
            answer.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        if parameters.clean_up_tokenization_spaces:
            text = tokenizer.clean_up_tokenization(text)  # decode() leaves BPE as it is
        if answer.finish is FinishReason.STOP and parameters.stop:
            places = [place for place in map(text.find, parameters.stop) if place >= 0]
            return text[: min(places, default=len(text))]
        return text

    def _ids(self, answer: Answer, longest: int) -> list[int]:
        """The answer's tokens as `generate()` returns them: after the first one, filled up."""
        return [self.start, *answer.tokens, *[self._pad] * (longest - len(answer.tokens))]
