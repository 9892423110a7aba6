"""The languages of a multilingual tokenizer, read off it once, since asking it changes its state."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from mlserver_hftasks.errors import InvalidRequest, did_you_mean

CODE = re.compile(r"[a-z]{2,3}_[A-Za-z]{2,4}")
"""What language codes look like where a tokenizer does not list them: `eng_Latn`."""


@dataclass(frozen=True, slots=True)
class Language:
    """What a language means to a model, as token ids."""

    before: tuple[int, ...]
    """Come before a text in this language."""
    after: tuple[int, ...]
    first: int
    """Begins a translation into it."""


class Languages:
    """Languages by their codes."""

    def __init__(self, known: Mapping[str, Language]) -> None:
        self._known = known

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Languages | None:
        """The tokenizer's languages; None if it knows nothing of languages. It is as before afterwards.

        Not safe while other threads use the tokenizer.
        """
        if not hasattr(tokenizer, "_build_translation_inputs"):
            return None
        ids = _ids_of(tokenizer)
        before = tokenizer.src_lang
        try:
            return cls({code: _language(tokenizer, code, first) for code, first in ids.items()})
        finally:
            tokenizer.src_lang = before

    def get(self, code: str | None, where: str) -> Language:
        """The language of that code. Raises `InvalidRequest` for none, or one that is not there."""
        if code is None:
            some = ", ".join(sorted(self._known)[:4])
            raise InvalidRequest(f"no language, expected a code such as {some} @ {where}")
        if code not in self._known:
            raise InvalidRequest(
                f"unknown language {code!r:.40}, {did_you_mean(code, self._known)} @ {where}"
            )
        return self._known[code]

    def codes(self) -> Sequence[str]:
        """All codes, in order."""
        return sorted(self._known)


def _ids_of(tokenizer: Any) -> dict[str, int]:
    """The token of each language, for those that have one."""
    listed = getattr(tokenizer, "lang_code_to_id", None)
    if listed is None:
        tokens = [token for token in tokenizer.all_special_tokens if CODE.fullmatch(token)]
        listed = {token: tokenizer.convert_tokens_to_ids(token) for token in tokens}
    return {code: index for code, index in listed.items() if index != tokenizer.unk_token_id}


def _language(tokenizer: Any, code: str, first: int) -> Language:
    tokenizer.src_lang = code
    return Language(tuple(tokenizer.prefix_tokens), tuple(tokenizer.suffix_tokens), first)
