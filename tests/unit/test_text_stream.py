"""Text as tokens come: the pieces are the whole, no piece is half of anything, stop texts never leak."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mlserver_hftasks.tasks.text_stream import REPLACEMENT, TextStream
from tests import tiny

ARCHITECTURES = ("gpt2", "llama", "xlm-roberta", "bert")
WHOLE = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30)


def decoder(architecture: str):  # type: ignore[no-untyped-def]
    tokenizer = tiny.tokenizer_of(architecture)
    return lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True)


def pieces(stream: TextStream, tokens: list[int]) -> list[str]:
    return [*map(stream.push, tokens), stream.finish()]


def bytes_decoder(tokens):  # type: ignore[no-untyped-def]
    """Tokens that are bytes."""
    return bytes(tokens).decode("utf-8", errors="replace")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_pieces_are_the_whole(architecture: str, data: st.DataObject) -> None:
    tokenizer, decode = tiny.tokenizer_of(architecture), decoder(architecture)
    random_tokens = st.lists(st.integers(0, len(tokenizer) - 1), max_size=40)
    tokens = data.draw(random_tokens | WHOLE.map(lambda text: tokenizer(text)["input_ids"]))
    assert "".join(pieces(TextStream(decode), tokens)) == decode(tokens)


@given(st.lists(st.integers(0, 255), max_size=40))
def test_bytes_that_are_no_text_come_through_too(tokens: list[int]) -> None:
    assert "".join(pieces(TextStream(bytes_decoder), tokens)) == bytes_decoder(tokens)


@given(WHOLE)
def test_no_piece_is_half_a_character(text: str) -> None:
    assume(REPLACEMENT not in text)
    for piece in pieces(TextStream(bytes_decoder), list(text.encode())):
        assert REPLACEMENT not in piece


def test_a_character_comes_with_its_last_byte() -> None:
    assert pieces(TextStream(bytes_decoder), list("a🙂b".encode())) == ["a", "", "", "", "🙂", "b", ""]


@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3),
    st.booleans(),
)
def test_stop_texts(text: str, stops: list[str], keep: bool) -> None:
    stream = TextStream(bytes_decoder, stops, keep_stop=keep)
    given_out = ""
    for position, token in enumerate(text.encode()):
        given_out += stream.push(token)
        so_far = text[: position + 1]
        found = [so_far.find(stop) for stop in stops if stop in so_far]
        assert stream.stopped == bool(found)
        if found:
            assert given_out == (so_far if keep else so_far[: min(found)])
            assert stream.finish() == stream.push(97) == ""
            return
        held = so_far[len(given_out) :]
        assert so_far.startswith(given_out)
        assert not held or any(stop.startswith(held) for stop in stops), "held back without need"
    assert given_out + stream.finish() == text


def test_the_first_of_several_stop_texts_in_one_token_ends_it() -> None:
    stream = TextStream("".join, ["dog", "the"])
    assert stream.push("see the dog run") == "see "  # type: ignore[arg-type]
    assert stream.stopped


def test_the_space_before_the_first_word_stays() -> None:
    tokenizer, decode = tiny.tokenizer_of("xlm-roberta"), decoder("xlm-roberta")
    before = tokenizer("The river", add_special_tokens=False)["input_ids"]
    after = tokenizer("museum was quiet", add_special_tokens=False)["input_ids"]
    assert "".join(pieces(TextStream(decode, context=before), after)) == " museum was quiet"
    assert "".join(pieces(TextStream(decode), after)) == "museum was quiet"
