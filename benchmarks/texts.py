"""The texts of every workload: made-up words, log-normal lengths, the same for every system."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np

FEWEST_WORDS, MOST_WORDS = 3, 120
MEDIAN_WORDS, SIGMA = 14.0, 0.85
"""Of the log-normal number of words: about 20 words and 25 tokens on average."""
VOCABULARY = 2000
SEED = 20

_CONSONANTS = (*"bdfgklmnprstvz", "ch", "sh", "st", "tr")
_VOWELS = (*"aeiou", "ai", "ea", "oo")


@cache
def words() -> tuple[str, ...]:
    """The vocabulary: words of two syllables, the most frequent first."""
    syllables = [consonant + vowel for consonant, vowel in itertools.product(_CONSONANTS, _VOWELS)]
    pairs = [first + second for first, second in itertools.product(syllables, syllables)]
    chosen = np.random.default_rng(SEED).choice(sorted(set(pairs)), VOCABULARY, replace=False)
    return tuple(str(word) for word in chosen)


@cache
def mixed(
    count: int, seed: int = SEED, *, median_words: float = MEDIAN_WORDS, sigma: float = SIGMA
) -> tuple[str, ...]:
    """Texts of 3 to 120 words; a longer list begins with the shorter one."""
    lengths = np.random.default_rng((seed, 0)).lognormal(np.log(median_words), sigma, count)
    lengths = np.clip(np.rint(lengths), FEWEST_WORDS, MOST_WORDS).astype(int)
    draw = np.random.default_rng((seed, 1))
    return tuple(_text(draw, int(length)) for length in lengths)


def _text(draw: np.random.Generator, length: int) -> str:
    ranks = np.minimum(draw.exponential(VOCABULARY / 5, length).astype(int), VOCABULARY - 1)
    return " ".join(words()[rank] for rank in ranks)
