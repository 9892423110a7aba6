"""A tokenizer is called so that a long text does not hold up everybody."""

from __future__ import annotations

from typing import Any

import pytest

from mlserver_hftasks.tasks.encoder import SHORT_CHARS, Encoder, TextOrPair


class Plain:
    """Stands in for a tokenizer of `tokenizers`: `encode` keeps the interpreter, `encode_batch` does not."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def encode(self, text: Any, pair: Any, **options: Any) -> str:
        self.called.append("encode")
        return "encoding"

    def encode_batch(self, texts: list[Any], **options: Any) -> list[str]:
        self.called.append("encode_batch")
        return ["encoding"] * len(texts)


LONG = "a" * SHORT_CHARS


@pytest.mark.parametrize(
    ("text", "called"),
    [
        ("short", "encode"),
        (("short", "pair"), "encode"),
        (LONG, "encode"),
        (LONG + "a", "encode_batch"),
        (("a", LONG), "encode_batch"),
        ([LONG, "a"], "encode_batch"),
    ],
)
def test_a_long_text_is_a_batch(text: TextOrPair, called: str) -> None:
    encoder = Encoder.__new__(Encoder)
    encoder._plain = plain = Plain()
    assert encoder._encode_plain([text], words=False, special=True) == ["encoding"]
    assert plain.called == [called]
