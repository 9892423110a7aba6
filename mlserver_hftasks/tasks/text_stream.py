"""Tokens to text, piece by piece: never half a character, never half a stop text that is not decided.

A token may be part of a character's bytes, and a tokenizer may decode it differently beside its neighbours
(the space that SentencePiece writes before a word). So tokens are decoded with some before them, and what
ends in a replacement character waits for what completes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MAX_BYTES = 4
"""Bytes of the longest character: a token so far back has no part in one that is still to come."""


class TextStream:
    """The text of one answer as its tokens come.

    `decode` turns tokens into text. The first of `stops` ends the answer: its text is what came before, or
    with `keep_stop` what came up to the end of that token. `context` are the tokens before the first, beside
    which it is decoded; they are no part of the text.
    """

    def __init__(
        self,
        decode: Decode,
        stops: Sequence[str] = (),
        *,
        keep_stop: bool = False,
        context: Sequence[int] = (),
    ) -> None:
        self._decode = decode
        self._stops = tuple(stops)
        self._keep_stop = keep_stop
        self._longest_stop = max(map(len, stops), default=0)
        self._window: list[int] = list(context)
        """The last tokens that were decoded, then those that wait for the rest of a character."""
        self._decoded = len(self._window)
        """How many of the window's tokens are decoded."""
        self._text = ""
        """Decoded text that is held back."""
        self.stopped = False

    def push(self, token: int) -> str:
        """Take the next token; returns the text that is certain now, which may be none."""
        if self.stopped:
            return ""
        self._window.append(token)
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT):
            end = len(self._window) - MAX_BYTES + 1
            if end <= self._decoded:
                return ""
            self._advance(self._decode(self._window[:end]), end)
        else:
            self._advance(text, len(self._window))
        return self._certain()

    def finish(self) -> str:
        """The rest: what waited for more, which does not come."""
        if self.stopped:
            return ""
        self._advance(self._decode(self._window), len(self._window))
        piece = self._certain()
        return piece if self.stopped else piece + self._give(len(self._text))

    def _advance(self, text: str, end: int) -> None:
        """The window's tokens up to `end` are `text`."""
        before = self._decode(self._window[: self._decoded]) if self._decoded else ""
        new = text[len(before) :]
        self._text += new
        if new:
            # The tokens of the last piece stay, so that the next are decoded beside them.
            self._window = self._window[self._decoded :]
            end -= self._decoded
        self._decoded = end

    def _certain(self) -> str:
        found = self._first_stop()
        if found is not None:
            self.stopped = True
            return self._give(len(self._text) if self._keep_stop else found)
        return self._give(len(self._text) - self._held_back())

    def _first_stop(self) -> int | None:
        places = [self._text.find(stop) for stop in self._stops]
        return min((place for place in places if place >= 0), default=None)

    def _held_back(self) -> int:
        """Length of the longest end of the text that may become a stop text."""
        for length in range(min(self._longest_stop - 1, len(self._text)), 0, -1):
            if any(stop.startswith(self._text[-length:]) for stop in self._stops if len(stop) > length):
                return length
        return 0

    def _give(self, end: int) -> str:
        piece, self._text = self._text[:end], self._text[end:]
        return piece
