"""translation: from one language to another.

The languages come with the task's name (`translation_en_to_fr`, or `translation` with the setting
`task_suffix`) or with the request. What they mean hangs on the model: tokens of a multilingual tokenizer
(mBART, M2M100, NLLB), the words before a text (T5), a first token in the text (Marian's models of many
targets), or nothing where a model knows one pair only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field
from transformers import PretrainedConfig

from mlserver_hftasks.errors import InvalidRequest, did_you_mean
from mlserver_hftasks.tasks.base import ModelFacts
from mlserver_hftasks.tasks.encoder import Encoding, Truncation, marked
from mlserver_hftasks.tasks.languages import Language, Languages
from mlserver_hftasks.tasks.seq2seq import Seq2Seq, Seq2SeqParameters, signature_of
from mlserver_hftasks.tasks.text import truncation_of

PAIR = re.compile(r"translation_(?P<source>.+)_to_(?P<target>.+)")


class TranslationParameters(Seq2SeqParameters):
    """Parameters of transformers 4's `TranslationPipeline`."""

    src_lang: str | None = Field(
        None, max_length=40, description="language of the texts; no effect if the model knows one pair"
    )
    tgt_lang: str | None = Field(
        None, max_length=40, description="language to translate into; no effect if the model knows one pair"
    )

    not_for_generate: ClassVar[frozenset[str]] = Seq2SeqParameters.not_for_generate | {"src_lang", "tgt_lang"}


class Translation(Seq2Seq[TranslationParameters]):
    """Results equal those of transformers 4's `TranslationPipeline`."""

    name = "translation"
    result = "translation"
    signature = signature_of(result, TranslationParameters)

    def __init__(self, model: ModelFacts) -> None:
        super().__init__(model)
        named = PAIR.fullmatch(model.asked_as)
        self._named = (named["source"], named["target"]) if named else (None, None)
        self._languages = Languages.of(model.encoder.tokenizer)
        self._targets = frozenset(getattr(model.encoder.tokenizer, "supported_language_codes", None) or ())

    @classmethod
    def specific(cls, name: str, config: PretrainedConfig) -> Mapping[str, Any]:
        """Of the pair that is named; of the first there is where none is, as in version 4."""
        pairs = _pairs(config)
        return pairs.get(name) or (next(iter(pairs.values()), {}) if name == cls.name else {})

    def encoded(self, texts: Sequence[str], parameters: TranslationParameters) -> list[Encoding]:
        """See `Seq2Seq`. A multilingual model's texts are marked with their language."""
        if self._languages is None:
            return super().encoded(texts, parameters)
        source, encoder = self._language(parameters, 0), self.model.encoder
        marks = len(source.before) + len(source.after)
        truncation = truncation_of(self.model, parameters.truncation, None)
        if truncation is not None:
            truncation = Truncation(truncation.strategy, max(truncation.max_length - marks, 1))
        encodings = encoder.encode(texts, truncation, special=False, limited=False)
        for index, encoding in enumerate(encodings):
            encoder.check_length(len(encoding.ids) + marks, f"inputs[{index}]")
        return [marked(each, source.before, source.after) for each in encodings]

    def first_token(self, parameters: TranslationParameters) -> int | None:
        """See `Seq2Seq`: the token of the language, of a multilingual model."""
        return None if self._languages is None else self._language(parameters, 1).first

    def prefix(self, parameters: TranslationParameters) -> str:
        """See `Seq2Seq`: that of the request's pair, where the model has one for it."""
        source, target = parameters.src_lang, parameters.tgt_lang
        if parameters.prefix is None and target is not None:
            if self._targets:
                return self._marked(target)
            pairs = _pairs(self.model.config)
            if source is not None and any("prefix" in each for each in pairs.values()):
                return self._words(f"translation_{source}_to_{target}", pairs)
        return super().prefix(parameters)

    def _language(self, parameters: TranslationParameters, which: int) -> Language:
        """The source's (0) or the target's (1): the request's choice, else that of the task's name."""
        name = ("src_lang", "tgt_lang")[which]
        assert self._languages is not None
        return self._languages.get(getattr(parameters, name) or self._named[which], name)

    def _marked(self, target: str) -> str:
        mark = f">>{target}<<"
        if mark not in self._targets:
            known = [each.strip("<>") for each in self._targets]
            raise InvalidRequest(f"unknown language {target!r:.40}, {did_you_mean(target, known)} @ tgt_lang")
        return f"{mark} "

    def _words(self, name: str, pairs: Mapping[str, Mapping[str, Any]]) -> str:
        if name not in pairs:
            known = ", ".join(sorted(pairs))
            raise InvalidRequest(f"the model has no '{name}', expected one of {known} @ tgt_lang")
        return str(pairs[name].get("prefix") or "")


def _pairs(config: PretrainedConfig) -> dict[str, Mapping[str, Any]]:
    """What the config says of each pair of languages."""
    specific = getattr(config, "task_specific_params", None) or {}
    return {name: each for name, each in specific.items() if name.startswith("translation")}
