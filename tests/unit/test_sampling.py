"""Choosing tokens: what each row asks for, whoever is beside it; equal to transformers' own filters."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as processing

from mlserver_hftasks.engine.sequences import GeneratedSequence, GenerationJob, Prompt, Sampling
from mlserver_hftasks.generation import host_sampling
from mlserver_hftasks.generation.sampling import choose

VOCABULARY = 40
PROMPT = (3, 5, 5, 7)


def sequence(seed: int = 0, tokens: tuple[int, ...] = (), **options: Any) -> GeneratedSequence:
    of_prompt = {name: options.pop(name) for name in ("eos", "min_new_tokens", "logprobs") if name in options}
    prompt = Prompt(np.array(PROMPT), 10, Sampling(**options), **of_prompt)
    made = GeneratedSequence(GenerationJob(0, 0, None, False), prompt, 0, random.Random(seed))
    made.tokens = list(tokens)
    return made


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def shares(options: dict[str, Any], row: torch.Tensor, draws: int = 4000) -> np.ndarray[Any, Any]:
    """How often each token is drawn from one row of logits."""
    generator = random.Random(1)
    made = []
    for _ in range(draws // 500):
        some = [sequence(generator.getrandbits(32), draw=True, **options) for _ in range(500)]
        made += [choice.token for choice in choose(row.expand(500, -1), some)]
    counted = Counter(made)
    return np.array([counted[token] / draws for token in range(VOCABULARY)])


FILTERS: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "all": ({}, []),
    "temperature": ({"temperature": 0.5}, [processing.TemperatureLogitsWarper(0.5)]),
    "top_k": ({"top_k": 3}, [processing.TopKLogitsWarper(3)]),
    "top_p": ({"top_p": 0.6}, [processing.TopPLogitsWarper(0.6)]),
    "min_p": ({"min_p": 0.2}, [processing.MinPLogitsWarper(0.2)]),
    "together": (
        {"temperature": 2.0, "top_k": 20, "top_p": 0.8, "min_p": 0.1},
        [
            processing.TemperatureLogitsWarper(2.0),
            processing.TopKLogitsWarper(20),
            processing.TopPLogitsWarper(0.8),
            processing.MinPLogitsWarper(0.1),
        ],
    ),
}


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("first_look", [1024, 2])
def test_draws_follow_the_filtered_distribution(
    name: str, first_look: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`first_look` 2: what is looked at first does not do, and all are sorted."""
    monkeypatch.setattr(host_sampling, "FIRST_LOOK", first_look)
    options, warpers = FILTERS[name]
    row = logits(1, seed=4)
    scores = row.clone()
    for warper in warpers:
        scores = warper(torch.tensor([PROMPT]), scores)
    wanted = scores.softmax(dim=-1)[0].numpy()
    got = shares(options, row)
    assert not got[wanted == 0].any(), "a token was drawn that the filters forbid"
    assert np.abs(got - wanted).max() < 0.035


def test_a_row_gets_the_same_in_any_company() -> None:
    rows = logits(6)
    asked: list[dict[str, Any]] = [
        {"draw": True, "top_k": 5, "temperature": 1.5},
        {"draw": True},
        {},
        {"draw": True, "top_p": 0.7},
        {"draw": True, "min_p": 0.05, "repetition_penalty": 2.0},
        {"repetition_penalty": 3.0, "suppressed": (1, 2)},
    ]
    alone = [
        choose(rows[index : index + 1], [sequence(index, **options)])[0].token
        for index, options in enumerate(asked)
    ]
    order = [4, 2, 0, 5, 1, 3]
    together = choose(rows[order], [sequence(index, **asked[index]) for index in order])
    assert [choice.token for choice in together] == [alone[index] for index in order]


def test_the_most_likely_token_needs_no_generator() -> None:
    rows = logits(3)
    before = rows.clone()
    some = [sequence(index) for index in range(3)]
    state = some[0].random.getstate()
    assert [choice.token for choice in choose(rows, some)] == rows.argmax(dim=-1).tolist()
    assert some[0].random.getstate() == state
    assert torch.equal(rows, before)


def test_repetition_penalty_is_that_of_transformers() -> None:
    rows = logits(8)
    rows[:4, 5], rows[4:, 11] = 12.0, 12.0
    ids = torch.tensor([[*PROMPT, 11, 12]]).expand(8, -1)
    wanted = processing.RepetitionPenaltyLogitsProcessor(5.0)(ids, rows.clone()).argmax(dim=-1).tolist()
    assert wanted != rows.argmax(dim=-1).tolist()
    got = choose(rows, [sequence(tokens=(11, 12), repetition_penalty=5.0) for _ in range(8)])
    assert [choice.token for choice in got] == wanted


def test_what_is_forbidden_is_not_chosen() -> None:
    row = logits(1)
    best = row[0].argsort(descending=True).tolist()
    eos = frozenset(best[:2])
    (early,) = choose(row, [sequence(eos=eos, min_new_tokens=2, tokens=(1,))])
    (late,) = choose(row, [sequence(eos=eos, min_new_tokens=2, tokens=(1, 1))])
    (suppressed,) = choose(row, [sequence(suppressed=tuple(best[:5]))])
    assert [early.token, late.token, suppressed.token] == [best[2], best[0], best[5]]


def test_log_probabilities_are_the_models_own() -> None:
    rows = logits(3)
    some = [sequence(logprobs=True, draw=True, temperature=9.0), sequence(), sequence(logprobs=True)]
    got = choose(rows, some)
    wanted = rows.log_softmax(dim=-1)
    assert got[1].logprob is None
    for index in (0, 2):
        assert got[index].logprob == pytest.approx(float(wanted[index, got[index].token]))
