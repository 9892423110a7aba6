"""Sampling in NumPy chooses what sampling on torch chooses, with the same seeds."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlserver_hftasks.engine.sequences import GeneratedSequence, GenerationJob, Prompt, Sampling
from mlserver_hftasks.generation import host_sampling, sampling

VOCABULARIES = (5, 300, 3000)
SAMPLINGS = st.builds(
    Sampling,
    draw=st.booleans(),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 4, 50, 1024]),
    top_p=st.sampled_from([1.0, 0.95, 0.4, 1e-6]),
    min_p=st.sampled_from([0.0, 0.05, 0.9]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    suppressed=st.sampled_from([(), (0,), (1, 3)]),
)


def sequence(chosen: Sampling, seed: int, **others: Any) -> GeneratedSequence:
    prompt = Prompt(np.array([0, 2, 2]), 9, chosen, eos=frozenset({4}), **others)
    made = GeneratedSequence(GenerationJob(0.0, 0.0, None, False), prompt, 0, random.Random(seed))
    made.tokens = [1, 2]
    return made


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(SAMPLINGS, st.integers(0, 9), st.booleans()), min_size=1, max_size=5),
    st.sampled_from(VOCABULARIES),
    st.sampled_from([0.1, 3.0]),
    st.integers(0, 1000),
)
def test_the_same_tokens_and_probabilities(
    asked: list[tuple[Sampling, int, bool]], vocabulary: int, spread: float, seed: int
) -> None:
    logits = (spread * np.random.default_rng(seed).standard_normal((len(asked), vocabulary))).astype(
        np.float32
    )
    kept = logits.copy()
    here, there = (
        [
            sequence(chosen, number, min_new_tokens=3 * wants, logprobs=wants)
            for chosen, number, wants in asked
        ]
        for _ in range(2)
    )
    got = host_sampling.choose(logits, here)
    want = sampling.choose(torch.from_numpy(logits), there)
    assert [each.token for each in got] == [each.token for each in want]
    for one, other in zip(got, want, strict=True):
        assert one.logprob == (None if other.logprob is None else pytest.approx(other.logprob, abs=1e-4))
    assert [each.random.random() for each in here] == [each.random.random() for each in there]
    assert np.array_equal(logits, kept)


class Highest(random.Random):
    """Its numbers are below 1, and 1 in float32."""

    def random(self) -> float:
        return math.nextafter(1.0, 0.0)


@pytest.mark.parametrize(
    ("chosen", "allowed"),
    [
        (Sampling(draw=True, suppressed=(4,)), {0, 1, 2, 3}),
        (Sampling(draw=True, top_k=5, suppressed=(4,)), {0, 1, 2, 3}),
        (Sampling(draw=True, top_k=5, top_p=0.1), {0}),
        (Sampling(draw=True, min_p=0.9), {0}),
    ],
)
def test_the_highest_number_draws_nothing_that_was_filtered(chosen: Sampling, allowed: set[int]) -> None:
    logits = np.array([[3.0, 2.0, 1.0, 0.5, 0.0]], dtype=np.float32)
    asked = sequence(chosen, 0)
    asked.random = Highest()
    assert host_sampling.choose(logits, [asked])[0].token in allowed
    assert sampling.choose(torch.from_numpy(logits), [asked])[0].token in allowed
