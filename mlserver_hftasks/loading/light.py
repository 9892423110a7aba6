"""A config and a tokenizer without transformers, which takes seconds to import.

Both stand in for those of transformers as far as tasks and the runtime go; what else is asked of the
tokenizer goes to transformers' own, loaded then.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokenizers import Tokenizer

from mlserver_hftasks.errors import InvalidSettings

FACTS = (
    "pad_token_id",
    "cls_token_id",
    "sep_token_id",
    "mask_token",
    "mask_token_id",
    "unk_token_id",
    "eos_token_id",
    "bos_token_id",
    "model_input_names",
    "padding_side",
    "truncation_side",
)
"""Attributes of a tokenizer that are written down."""
CLEANS_UP_BPE = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
"""Without it transformers cleans no spaces up where a tokenizer is of that kind, whatever is asked for."""
SAMPLES: tuple[str, ...] = ("Hello, world!", "  two   spaces\nÉtienne 東京 🎉", "", "a [SEP] b </s> <mask>")


def read_config(folder: Path) -> Any:
    """`config.json`, its keys as attributes; a key that is not there is None, as most are by default."""
    content = _read(folder, "config.json")
    content["id2label"] = {int(index): name for index, name in (content.get("id2label") or {}).items()}
    return _Config(**content)


def read_generation_config(folder: Path) -> Any:
    """`generation_config.json` in the same way; empty where there is none."""
    there = (folder / "generation_config.json").is_file()
    return _Config(**(_read(folder, "generation_config.json") if there else {}))


def _read(folder: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((folder / name).read_text())
    except (OSError, ValueError) as error:
        raise InvalidSettings(f"'{name}' cannot be read: {error}, expected one @ {folder}") from None
    if not isinstance(content, dict):
        raise InvalidSettings(f"'{name}' is no JSON object, expected one @ {folder}")
    return content


class _Config(SimpleNamespace):
    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def get_text_config(self) -> Any:
        """Of a model that knows nothing but text, its own."""
        return self


def facts_of(tokenizer: Any, folder: Path) -> dict[str, Any] | None:
    """What `LightTokenizer` must know of a tokenizer that was saved in the folder.

    None if it is not the same without transformers.
    """
    if not (tokenizer.is_fast and (folder / "tokenizer.json").is_file()):
        return None
    facts = {name: getattr(tokenizer, name, None) for name in FACTS}
    facts["special_tokens"] = [tokenizer.num_special_tokens_to_add(pair=pair) for pair in (False, True)]
    light, own = LightTokenizer(folder, facts), tokenizer.backend_tokenizer
    facts["cleans_up"] = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
    facts["may_clean_up"] = type(own.model).__name__ != "BPE" or bool(
        getattr(tokenizer, CLEANS_UP_BPE, False)
    )
    pairs: list[Any] = [*SAMPLES, (SAMPLES[0], SAMPLES[1])]
    same = [encoding.ids for encoding in light.backend_tokenizer.encode_batch(pairs)] == [
        encoding.ids for encoding in own.encode_batch(pairs)
    ]
    return facts if same else None


class LightTokenizer:
    """A fast tokenizer from `tokenizer.json` and the facts that were written down."""

    is_fast = True

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        self._folder, self._facts = folder, facts
        try:
            self.backend_tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises nothing more special
            raise InvalidSettings(
                f"'tokenizer.json' cannot be read: {error}, expected one @ {folder}"
            ) from None
        self.backend_tokenizer.no_truncation()
        self.backend_tokenizer.no_padding()

    def __getattr__(self, name: str) -> Any:
        if name in self._facts:
            return self._facts[name]
        return getattr(self._whole, name)

    @cached_property
    def _whole(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._folder)

    def __len__(self) -> int:
        return int(self.backend_tokenizer.get_vocab_size(with_added_tokens=True))

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """How many special tokens a text or a pair gets."""
        return int(self._facts["special_tokens"][pair])

    def get_vocab(self) -> dict[str, int]:
        """Ids by token, added ones included."""
        vocabulary: dict[str, int] = self.backend_tokenizer.get_vocab(with_added_tokens=True)
        return vocabulary

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str | None]:
        """Tokens by id."""
        return [self.backend_tokenizer.id_to_token(int(each)) for each in ids]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The tokens as a text."""
        decoder = self.backend_tokenizer.decoder
        return " ".join(tokens) if decoder is None else str(decoder.decode(tokens))

    def encode(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> list[int]:
        """Ids of a text."""
        ids: list[int] = self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(
        self,
        ids: Sequence[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> str:
        """The text of some tokens."""
        asked = clean_up_tokenization_spaces
        if (self._facts["cleans_up"] if asked is None else asked) and self._facts.get("may_clean_up", True):
            return str(
                self._whole.decode(
                    ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=True
                )
            )
        return str(self.backend_tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))
