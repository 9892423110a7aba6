"""What a request's parameters and the model's own `generation_config` come to, and answers as results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlserver_hftasks.engine.rows import IntArray
from mlserver_hftasks.engine.sequences import FINISH_REASONS, FinishReason, Prompt, Sampling
from mlserver_hftasks.errors import InvalidRequest
from mlserver_hftasks.tasks.base import Answered, Example, ModelFacts
from mlserver_hftasks.tasks.generation import MIN_TEMPERATURE, GenerationParameters
from mlserver_hftasks.tasks.signature import Tensor, padded_tensor

USUAL_NEW_TOKENS = 256
"""Where neither the request nor the model says how many; transformers' pipeline has the same."""
USUAL_TOP_K = 50
"""`generate()` draws among so many tokens where nobody says otherwise."""

NEEDS_GENERATE: dict[str, Any] = {
    "num_beams": 1,
    "no_repeat_ngram_size": 0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "bad_words_ids": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "top_h": None,
    "guidance_scale": 1.0,
    "sequence_bias": None,
    "exponential_decay_length_penalty": None,
    "begin_suppress_tokens": None,
    "watermarking_config": None,
    "encoder_repetition_penalty": 1.0,
}
"""What only `generate()` does, and the value of each without effect."""

TOKEN_IDS = (
    "suppress_tokens",
    "eos_token_id",
    "bad_words_ids",
    "forced_bos_token_id",
    "forced_eos_token_id",
)
"""Parameters that are token ids."""


class Choices:
    """A request's parameters, else the model's `generation_config`, else the usual."""

    def __init__(self, model: ModelFacts) -> None:
        self._config = model.generation_config
        self._model = model
        self._room = min(model.encoder.max_tokens, model.limits.cache_tokens)
        """Tokens of a prompt and its answer together."""
        self._vocabulary = len(model.encoder.tokenizer)

    def check(self, parameters: GenerationParameters) -> None:
        """Raise `InvalidRequest` for what the types of the parameters cannot say."""
        limit = self._model.limits.max_new_tokens
        if parameters.max_new_tokens is not None and parameters.max_new_tokens > limit:
            raise InvalidRequest(f"got {parameters.max_new_tokens}, expected 1..{limit} @ max_new_tokens")
        answers, beams = parameters.num_return_sequences or 1, self._value(parameters, "num_beams") or 1
        if 1 < beams < answers:
            raise InvalidRequest(f"got {answers}, expected 1..{beams} as num_beams @ num_return_sequences")
        if answers > 1 and beams == 1 and not self._value(parameters, "do_sample"):
            raise InvalidRequest(
                "several answers without do_sample would be equal, expected do_sample=true or num_beams "
                "@ num_return_sequences"
            )
        size = getattr(self._model.config.get_text_config(), "vocab_size", self._vocabulary)
        for name in TOKEN_IDS:
            worst = max(_flat(getattr(parameters, name)), default=0)
            if worst >= size:
                raise InvalidRequest(f"got the token id {worst}, expected 0..{size - 1} @ {name}")

    def needs_generate(self, parameters: GenerationParameters) -> bool:
        """Whether only `generate()` can do what is asked for."""
        asked = bool(parameters.bad_words)
        return asked or any(
            self._value(parameters, name) not in (None, neutral) for name, neutral in NEEDS_GENERATE.items()
        )

    def max_new_tokens(self, prompt_tokens: int, parameters: GenerationParameters, where: str) -> int:
        """Most new tokens: as asked, but no more than fit behind the prompt. Raises `InvalidRequest`."""
        most = self.max_prompt_tokens
        if prompt_tokens > most:
            raise InvalidRequest(
                f"a prompt of {prompt_tokens} tokens, expected at most {most}: shorten it, or send the "
                f"parameter truncation=true @ {where}"
            )
        asked = self._asked(prompt_tokens, parameters, where)
        return max(min(asked, self._room - prompt_tokens, self._model.limits.max_new_tokens), 1)

    def truncated_tokens(self, parameters: GenerationParameters) -> int:
        """What a prompt is cut to: it leaves room for as many new tokens as the request asks for."""
        return max(min(self.max_prompt_tokens, self._room - (parameters.max_new_tokens or 1)), 1)

    @property
    def max_prompt_tokens(self) -> int:
        """Most tokens of a prompt."""
        setting = self._model.limits.max_prompt_tokens
        return self._room - 1 if setting is None else min(setting, self._room - 1)

    def min_new_tokens(self, prompt_tokens: int, parameters: GenerationParameters) -> int:
        """No end before so many."""
        new = self._value(parameters, "min_new_tokens")
        total = self._value(parameters, "min_length")
        return max(int(new or 0), int(total or 0) - prompt_tokens, 0)

    def sampling(self, parameters: GenerationParameters) -> Sampling:
        """How tokens are chosen."""
        top_k = self._value(parameters, "top_k")
        return Sampling(
            draw=bool(self._value(parameters, "do_sample")),
            temperature=max(self._value(parameters, "temperature") or 1.0, MIN_TEMPERATURE),
            top_k=USUAL_TOP_K if top_k is None else top_k,
            top_p=self._value(parameters, "top_p") or 1.0,
            min_p=self._value(parameters, "min_p") or 0.0,
            repetition_penalty=self._value(parameters, "repetition_penalty") or 1.0,
            suppressed=tuple(self._value(parameters, "suppress_tokens") or ()),
        )

    def width(self, parameters: GenerationParameters) -> int:
        """Sequences that `generate()` runs side by side for one prompt."""
        beams, answers = (self._value(parameters, name) for name in ("num_beams", "num_return_sequences"))
        return max(beams or 1, answers or 1)

    def eos(self, parameters: GenerationParameters) -> frozenset[int]:
        """The tokens that end an answer."""
        return frozenset(_flat(self._value(parameters, "eos_token_id")))

    def generate_arguments(self, parameters: GenerationParameters) -> dict[str, Any]:
        """The arguments of `generate()`, save the lengths; `bad_words` as token ids."""
        arguments = parameters.generate_arguments()
        for name in ("max_length", "max_new_tokens", "min_length", "min_new_tokens"):
            arguments.pop(name, None)
        if parameters.bad_words:
            tokenizer = self._model.encoder.tokenizer
            spelled = [form for word in parameters.bad_words for form in (word, " " + word.lstrip())]
            ids = [tokenizer(form, add_special_tokens=False)["input_ids"] for form in spelled]
            arguments["bad_words_ids"] = [*arguments.get("bad_words_ids", []), *filter(None, ids)]
        return arguments

    def beginning(self, where: str) -> list[int]:
        """The tokens of an empty prompt. Raises `InvalidRequest` if the model has none."""
        start = self._model.encoder.tokenizer.bos_token_id
        if start is None:
            raise InvalidRequest(f"an empty prompt, expected a text with at least one token @ {where}")
        return [start]

    def _asked(self, prompt_tokens: int, parameters: GenerationParameters, where: str) -> int:
        if parameters.max_new_tokens is not None:
            return parameters.max_new_tokens
        if parameters.max_length is not None:
            if parameters.max_length <= prompt_tokens:
                raise InvalidRequest(
                    f"got {parameters.max_length}, expected more than the {prompt_tokens} tokens of {where} "
                    "@ max_length"
                )
            return parameters.max_length - prompt_tokens
        new, total = self._config.max_new_tokens, self._config.max_length
        if new is not None:
            return int(new)
        return USUAL_NEW_TOKENS if total is None else int(total) - prompt_tokens

    def _value(self, parameters: GenerationParameters, name: str) -> Any:
        value = getattr(parameters, name, None)
        return getattr(self._config, name, None) if value is None else value


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer to one item."""

    tokens: list[int]
    finish: FinishReason | None
    """None of a piece that is not the last."""
    logprobs: list[float]
    text: str = ""

    def with_text(self, text: str) -> Answer:
        """The same with its text."""
        return replace(self, text=text)


def answers_of(answered: Answered) -> list[Answer]:
    """The answers to one item, from the outputs that `generation.generate` describes."""
    (outputs,) = answered.outputs
    found = []
    for index, length in enumerate(outputs["lengths"].tolist()):
        logprobs = outputs["logprobs"][index, :length].tolist() if "logprobs" in outputs else []
        finish = FINISH_REASONS[outputs["finish"][index]]
        found.append(Answer(outputs["sequences"][index, :length].tolist(), finish, logprobs))
    return found


def summary_of(reasons: Sequence[FinishReason]) -> dict[str, Any]:
    """The finish reason of one answer; of several as JSON, since gRPC has no list parameters."""
    names = [reason.value for reason in reasons]
    shown = names[0] if len(names) == 1 else str(names).replace("'", '"')
    return {"finish_reason": shown}


def answer_tensors(answers: Sequence[Sequence[Answer]]) -> dict[str, Tensor]:
    """Typed outputs of all items, [n, answers], those of tokens [n, answers, longest]."""
    shape = (len(answers), len(answers[0]))
    flat = [answer for item in answers for answer in item]

    def table(datatype: Any, values: list[Any], dtype: Any) -> Tensor:
        return Tensor(datatype, np.array(values, dtype=dtype).reshape(shape))

    def ragged(datatype: Any, rows: list[Sequence[Any]], fill: float) -> Tensor:
        padded = padded_tensor(datatype, rows, fill)
        return Tensor(datatype, padded.values.reshape(*shape, -1))

    return {
        "generated_text": table("BYTES", [answer.text for answer in flat], np.object_),
        "finish_reason": table(
            "BYTES", [answer.finish.value if answer.finish else "" for answer in flat], np.object_
        ),
        "generated_tokens": table("INT64", [len(answer.tokens) for answer in flat], np.int64),
        "token_ids": ragged("INT64", [answer.tokens for answer in flat], -1),
        "logprobs": ragged("FP32", [answer.logprobs for answer in flat], 0.0),
    }


def outputs_of(results: Sequence[Any]) -> dict[str, IntArray | Any]:
    """What the generating engine answers to one item, in the form of `generation.generate`."""
    width = max((len(result.tokens) for result in results), default=0)
    made: dict[str, Any] = {
        "sequences": padded_tensor("INT64", [result.tokens for result in results], 0, width).values,
        "lengths": np.array([len(result.tokens) for result in results], dtype=np.int64),
        "finish": np.array([FINISH_REASONS.index(result.finish) for result in results], dtype=np.int64),
    }
    if any(result.logprobs for result in results):
        rows = [result.logprobs for result in results]
        made["logprobs"] = padded_tensor("FP32", rows, 0.0, width).values
    return made


def prompts_of(examples: Sequence[Example]) -> list[Prompt] | None:
    """The prompts of all examples, in order; None if the generating engine does not take them."""
    if any(example.context.prompts is None for example in examples):
        return None
    return [prompt for example in examples for prompt in example.context.prompts]


def regrouped(examples: Sequence[Example], results: Sequence[Any]) -> list[Answered]:
    """What the generating engine answers to `prompts_of` the examples, per example."""
    rest = iter(results)
    return [
        Answered(example, [outputs_of([next(rest) for _ in example.context.prompts])]) for example in examples
    ]


def _flat(value: Any) -> list[int]:
    if value is None:
        return []
    if isinstance(value, int):
        return [value]
    return [token for part in value for token in _flat(part)]
