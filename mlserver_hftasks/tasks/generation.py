"""Parameters of text generation: the ones of `transformers.GenerationConfig` that a client may set.

What a client sends reaches a model through these fields only: no `custom_generate`, no assistant model, no
keyword, file or address. A field that is not set leaves the choice to the model's own `generation_config`.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from mlserver_hftasks.tasks.signature import Parameters

MIN_TEMPERATURE = 1e-6
"""Logits that are divided by it stay finite in float32."""
MAX_SEQUENCES = 64
"""Most beams, and most answers to one prompt."""
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_WORDS = 256
"""Most words, or token ids, that a request may forbid."""

TokenId = Annotated[int, Field(ge=0)]
_Text = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str | int) and not isinstance(value, bool) else value


Texts = Annotated[list[_Text], BeforeValidator(_listed)]
"""A list of texts that are not empty; a text by itself is a list of one."""
TokenIds = Annotated[list[TokenId], BeforeValidator(_listed)]
"""A list of token ids; an id by itself is a list of one."""


class GenerationParameters(Parameters):
    """What all generating tasks take. Names and meanings are those of `transformers.GenerationConfig`."""

    max_new_tokens: int | None = Field(None, ge=1, description="most tokens to generate")
    max_length: int | None = Field(
        None, ge=1, description="most tokens, those of the prompt included where the model continues it"
    )
    min_new_tokens: int | None = Field(None, ge=0, description="no end before so many new tokens")
    min_length: int | None = Field(None, ge=0, description="no end before so many tokens, see max_length")
    do_sample: bool | None = Field(None, description="draw tokens at random; else take the most likely")
    temperature: float | None = Field(
        None, ge=MIN_TEMPERATURE, le=100, description="divides the logits before drawing"
    )
    top_k: int | None = Field(None, ge=0, description="draw among so many most likely tokens; 0 is all")
    top_p: float | None = Field(
        None, gt=0, le=1, description="draw among the most likely tokens of this total probability"
    )
    min_p: float | None = Field(
        None, ge=0, le=1, description="draw among tokens of at least this share of the highest probability"
    )
    typical_p: float | None = Field(None, gt=0, le=1, description="locally typical sampling, of this total")
    epsilon_cutoff: float | None = Field(None, ge=0, lt=1, description="epsilon sampling: least probability")
    eta_cutoff: float | None = Field(None, ge=0, lt=1, description="eta sampling: least probability")
    seed: int | None = Field(
        None, ge=0, lt=2**63, description="makes a drawn answer repeatable, whoever else is served"
    )
    num_beams: int | None = Field(None, ge=1, le=MAX_SEQUENCES, description="beam search with so many beams")
    num_return_sequences: int | None = Field(
        None, ge=1, le=MAX_SEQUENCES, description="answers per item; several need do_sample or beams"
    )
    early_stopping: bool | Literal["never"] | None = Field(None, description="when a beam search may end")
    length_penalty: float | None = Field(
        None, ge=-100, le=100, description="beam search: over 0 prefers longer answers, under 0 shorter ones"
    )
    repetition_penalty: float | None = Field(
        None, gt=0, le=100, description="over 1 makes tokens less likely that came before"
    )
    no_repeat_ngram_size: int | None = Field(
        None, ge=0, description="no sequence of so many tokens comes twice; 0 allows all"
    )
    bad_words: Annotated[Texts, Field(max_length=MAX_WORDS)] | None = Field(
        None, description="texts that must not be generated"
    )
    bad_words_ids: Annotated[list[TokenIds], Field(max_length=MAX_WORDS)] | None = Field(
        None, description="the same as token ids"
    )
    suppress_tokens: Annotated[TokenIds, Field(max_length=MAX_WORDS)] | None = Field(
        None, description="token ids that must not be generated"
    )
    forced_bos_token_id: TokenId | None = Field(None, description="the first token that is generated")
    forced_eos_token_id: TokenId | None = Field(None, description="the last token, where max_length cuts")
    eos_token_id: Annotated[TokenIds, Field(min_length=1, max_length=MAX_STOPS)] | None = Field(
        None, description="ends an answer; an id or a list of them"
    )
    pad_token_id: TokenId | None = Field(None, description="accepted, no effect: answers are not padded")
    renormalize_logits: bool | None = Field(None, description="normalise again after the filters")
    remove_invalid_values: bool | None = Field(None, description="accepted, no effect on finite logits")
    use_cache: bool | None = Field(None, description="accepted, no effect: there is always a cache")
    stop: Annotated[Texts, Field(max_length=MAX_STOPS)] | None = Field(
        None, description="an answer ends before the first of these texts"
    )
    stop_sequence: Annotated[Texts, Field(max_length=MAX_STOPS)] | None = Field(
        None, description="the same, but the answer keeps the text that ended it, as in the pipeline"
    )
    clean_up_tokenization_spaces: bool | None = Field(
        None, description="no spaces before punctuation; the tokenizer's own choice if not set"
    )

    not_for_generate: ClassVar[frozenset[str]] = frozenset(
        {
            "timeout_ms",
            "seed",
            "bad_words",
            "stop",
            "stop_sequence",
            "clean_up_tokenization_spaces",
            "pad_token_id",
            "remove_invalid_values",
            "use_cache",
        }
    )
    """Fields that are no argument of `generate()`. Subclasses add those of their own fields."""

    @model_validator(mode="after")
    def _several_answers_differ(self) -> Self:
        count, beams = self.num_return_sequences or 1, self.num_beams or 1
        if beams > 1 and count > beams:
            raise ValueError(f"num_return_sequences of at most num_beams, which is {beams}")
        return self

    def generate_arguments(self) -> dict[str, Any]:
        """The arguments of `generate()` that the client set, by name.

        Not among them are `seed`, `stop`, `stop_sequence` and `bad_words`, which need a generator or a
        tokenizer: they are the caller's to see to.
        """
        values = self.model_dump(exclude=set(self.not_for_generate), exclude_none=True)
        return {name: value for name, value in values.items() if name in self.model_fields_set}

    def generate_key(self) -> Hashable:
        """Equal for requests that may share one call of `generate()`.

        Drawn answers with a seed share with nobody, since one generator draws for a whole batch.
        """
        arguments = self.generate_arguments()
        words = (self.bad_words, self.stop, self.stop_sequence)
        return tuple((name, repr(arguments[name])) for name in sorted(arguments)), repr(words), self.seed
