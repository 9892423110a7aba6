"""Which rows may share a call of `generate()`; apart from it, since tasks name the key without torch."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class GenerateKey:
    """Rows with equal keys may share one call of `generate()`; their seeds and limits are in `decoding`."""

    arguments: tuple[tuple[str, Hashable], ...] = ()
    """Of `GenerationConfig`, sorted by name; lists are tuples."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer; it holds the one that did."""
    logprobs: bool = False
    company: Hashable = None
    """Keeps apart what would hold one another up, such as rows of very different limits."""

    @classmethod
    def of(cls, arguments: Mapping[str, Any], **others: Any) -> GenerateKey:
        """The key of a call with those arguments."""
        return cls(tuple((name, _frozen(arguments[name])) for name in sorted(arguments)), **others)


def _frozen(value: Any) -> Hashable:
    frozen: Hashable = tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value
    return frozen
