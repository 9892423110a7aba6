"""Text to token ids: a tokenizer of transformers, made safe and fast for many threads.

`PreTrainedTokenizerFast.__call__` keeps the truncation of the last call in the Rust tokenizer, so two
threads that truncate differently disturb one another. Here the Rust tokenizer never truncates: texts
are encoded as they are, without a lock, and only those that turn out too long are encoded again by a
second copy under a lock.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import numpy as np

from mlserver_hftasks.engine.rows import IntArray, Row
from mlserver_hftasks.errors import InvalidRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Text = str | Sequence[str]
"""A text, or its words."""
TextOrPair = Text | tuple[Text, Text]
SHORT_CHARS = 4_000
"""Of a text that is tokenized by itself rather than as a batch of one."""
Strategy = Literal["longest_first", "only_first", "only_second"]


@dataclass(frozen=True, slots=True)
class Truncation:
    """Cut to `max_length` tokens, special ones included; `stride` tokens overlap between the pieces."""

    strategy: Strategy
    max_length: int
    stride: int = 0


class Encoding(Protocol):
    """What is read of `tokenizers.Encoding`; all lists have one entry per token.

    `sequence_ids` say which text of a pair (None for special tokens); `overflowing` are the further
    pieces of a text that was cut.
    """

    ids: list[int]
    type_ids: list[int]
    special_tokens_mask: list[int]
    offsets: list[tuple[int, int]]
    word_ids: list[int | None]
    sequence_ids: list[int | None]
    overflowing: list[Any]


@dataclass(frozen=True, slots=True)
class _SlowEncoding:
    """The encoding of a tokenizer that is written in Python: it has no offsets and no words."""

    ids: list[int]
    type_ids: list[int]
    special_tokens_mask: list[int]
    overflowing: tuple[()] = ()


@dataclass(frozen=True, slots=True)
class Source:
    """What a row was made from, for those who must say of what text its tokens are."""

    encoding: Any
    """An `Encoding`, or one of a tokenizer in Python."""
    text: TextOrPair
    positions: IntArray | None = None
    """Which tokens of the encoding the row has; None: all."""


@dataclass(frozen=True, slots=True)
class _Marked:
    """An encoding between special tokens that are not the tokenizer's to add."""

    ids: list[int]
    special_tokens_mask: list[int]
    offsets: list[tuple[int, int]]
    word_ids: list[int | None]
    sequence_ids: list[int | None]
    overflowing: tuple[()] = ()


class _Traced:
    """An encoding that knows its text."""

    __slots__ = ("encoding", "text")

    def __init__(self, encoding: Any, text: TextOrPair) -> None:
        self.encoding = encoding
        self.text = text

    def __getattr__(self, name: str) -> Any:
        return getattr(self.encoding, name)

    @property
    def overflowing(self) -> list[Any]:
        return [_Traced(piece, self.text) for piece in self.encoding.overflowing]


def _traced(encoding: Any, text: TextOrPair) -> Encoding:
    """It has what the encoding has, by `__getattr__`, which types cannot tell."""
    return cast(Encoding, _Traced(encoding, text))


def source_of(encoding: Encoding) -> Source | None:
    """Where an encoding is from, if it was made by `Encoder.encode`."""
    return Source(encoding.encoding, encoding.text) if isinstance(encoding, _Traced) else None


def marked(encoding: Encoding, before: Sequence[int], after: Sequence[int]) -> Encoding:
    """The encoding with special tokens before and after it."""
    assert isinstance(encoding, _Traced)
    first, last = len(before), len(after)
    ids = [*before, *encoding.ids, *after]
    special = [*[1] * first, *encoding.special_tokens_mask, *[1] * last]
    if not hasattr(encoding, "offsets"):
        slow = _SlowEncoding(ids, [0] * len(ids), special)
        return _traced(slow, encoding.text)
    around = _Marked(
        ids,
        special,
        [*[(0, 0)] * first, *encoding.offsets, *[(0, 0)] * last],
        [*[None] * first, *encoding.word_ids, *[None] * last],
        [*[None] * first, *[0] * len(encoding.ids), *[None] * last],
    )
    return _traced(around, encoding.text)


class Encoder:
    """Encodes texts for a model that takes at most `max_tokens` tokens. Thread-safe."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.is_fast = bool(tokenizer.is_fast)
        self._takes_types = "token_type_ids" in tokenizer.model_input_names
        self._lock = threading.Lock()
        self._cutting: Any = None
        if self.is_fast:
            self._plain: Any = tokenizer.backend_tokenizer
            self._plain.no_truncation()
            self._plain.no_padding()

    def encode(
        self,
        texts: Sequence[TextOrPair],
        truncation: Truncation | None = None,
        *,
        words: bool = False,
        special: bool = True,
        limited: bool = True,
        where: str = "inputs",
    ) -> list[Encoding]:
        """One encoding per text. `words`: the texts are lists of words; `special`: with special tokens.

        Raises `InvalidRequest` for a text that is longer than the model takes and may not be cut; not so
        with `limited` false, for a task that cuts the encodings itself.
        """
        if not self.is_fast:
            encodings = [self._encode_slow(text, truncation, words, special) for text in texts]
        else:
            encodings = self._encode_plain(texts, words, special)
            if truncation is not None:
                for index, encoding in enumerate(encodings):
                    if len(encoding.ids) > truncation.max_length:
                        encodings[index] = self._encode_cut(
                            texts[index], truncation, words, special, f"{where}[{index}]"
                        )
        for index, encoding in enumerate(encodings):
            self.check_length(len(encoding.ids), f"{where}[{index}]", limited=limited)
        return [_traced(encoding, text) for encoding, text in zip(encodings, texts, strict=True)]

    def encode_as_fits(self, texts: Sequence[str]) -> list[Encoding]:
        """One encoding per text, cut to what the model takes."""
        return self.encode(texts, Truncation("longest_first", self.max_tokens))

    def row(self, encoding: Encoding, *, key: Any = None, select: IntArray | None = None) -> Row:
        """The encoding as a row of the model."""
        arrays = {"input_ids": np.asarray(encoding.ids, dtype=np.int64)}
        if self._takes_types:
            arrays["token_type_ids"] = np.asarray(encoding.type_ids, dtype=np.int64)
        return Row(arrays, key, select, source=source_of(encoding))

    def special_tokens(self, *, pair: bool = False) -> int:
        """How many special tokens a text or a pair gets."""
        return int(self.tokenizer.num_special_tokens_to_add(pair=pair))

    def check_length(self, length: int, where: str, *, limited: bool = True) -> None:
        """Raises `InvalidRequest` for a text without tokens, or with more than the model takes."""
        if length < 1:
            raise InvalidRequest(f"a text without tokens, expected at least one @ {where}")
        if limited and length > self.max_tokens:
            raise InvalidRequest(
                f"a text of {length} tokens, expected at most {self.max_tokens}: shorten it, or send the "
                f"parameter truncation=true @ {where}"
            )

    def _encode_plain(self, texts: Sequence[TextOrPair], words: bool, special: bool) -> list[Any]:
        options = {"is_pretokenized": words, "add_special_tokens": special}
        # A batch wakes the tokenizer's threads, which costs a short text a quarter of its time; but `encode`
        # keeps the interpreter to itself, and a long text would hold up everybody.
        if len(texts) == 1 and _characters(texts[0]) <= SHORT_CHARS:
            first, second = texts[0] if isinstance(texts[0], tuple) else (texts[0], None)
            return [self._plain.encode(first, second, **options)]
        encodings: list[Any] = self._plain.encode_batch(list(texts), **options)
        return encodings

    def _encode_cut(
        self, text: TextOrPair, truncation: Truncation, words: bool, special: bool, where: str
    ) -> Encoding:
        with self._lock:
            if self._cutting is None:
                self._cutting = copy.deepcopy(self._plain)
            try:
                self._cutting.enable_truncation(
                    max_length=truncation.max_length,
                    stride=truncation.stride,
                    strategy=truncation.strategy,
                    direction=self.tokenizer.truncation_side,
                )
                encoding: Encoding = self._cutting.encode_batch(
                    [text], is_pretokenized=words, add_special_tokens=special
                )[0]
            except BaseException as error:  # a panic of Rust is no Exception
                if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                    raise
                raise InvalidRequest(
                    f"the text cannot be cut to {truncation.max_length} tokens: {error} @ {where}"
                ) from None
        if len(encoding.ids) > truncation.max_length:
            raise InvalidRequest(
                f"got {truncation.max_length}, but the special tokens alone are more, expected up to "
                f"{self.max_tokens} @ max_length"
            )
        return encoding

    def _encode_slow(
        self, text: TextOrPair, truncation: Truncation | None, words: bool, special: bool
    ) -> Encoding:
        first, second = text if isinstance(text, tuple) else (text, None)
        options: dict[str, Any] = {"add_special_tokens": special}
        if truncation is not None:
            options |= {"truncation": truncation.strategy, "max_length": truncation.max_length}
        with self._lock:
            encoded = self.tokenizer(
                first, second, is_split_into_words=words, return_special_tokens_mask=True, **options
            )
        ids = encoded["input_ids"]
        types = encoded.get("token_type_ids", [0] * len(ids))
        # it lacks what its docstring says
        return cast(Encoding, _SlowEncoding(ids, types, encoded["special_tokens_mask"]))


def _characters(text: TextOrPair) -> int:
    return len(text) if isinstance(text, str) else sum(map(_characters, text))
