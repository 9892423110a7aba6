"""What `generate()` makes of a row does not depend on who shares the call, and is what it makes alone."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from mlserver_hftasks.engine.rows import Decoding, Outputs, Row
from mlserver_hftasks.engine.sequences import FINISH_REASONS, FinishReason
from mlserver_hftasks.generation.generate import GenerateBackend
from mlserver_hftasks.generation.keys import GenerateKey
from mlserver_hftasks.generation.twin import with_shared_weights
from mlserver_hftasks.loading import generating
from tests import harness, tiny

CPU = torch.device("cpu")
DECODERS = ("gpt2", "llama")
ARCHITECTURES = (*tiny.SEQ2SEQ, *DECODERS)
LIKE_BART = ("mbart", "m2m_100", "marian")
LENGTHS = (5, 31, 1, 17, 60)
NEW_TOKENS = 12
PARAMETERS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several beams": {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 2.0},
    "beams until enough": {"num_beams": 3, "early_stopping": True, "length_penalty": 0.5},
    "beams to the last": {"num_beams": 2, "early_stopping": "never"},
    "penalties": {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
    "no token twice": {"no_repeat_ngram_size": 1},
    "beams with penalties": {"num_beams": 3, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "forbidden": {"bad_words_ids": [[9], [30, 31]], "suppress_tokens": [40, 41]},
    "forced": {"forced_bos_token_id": 21, "forced_eos_token_id": 22},
}
DRAWN: dict[str, dict[str, Any]] = {
    "all": {"do_sample": True, "top_k": 0},
    "usual": {"do_sample": True},
    "narrow": {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "typical_p": 0.95},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"do_sample": True, "num_beams": 3, "num_return_sequences": 2},
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def load(architecture: str) -> Any:
    head = "seq2seq" if architecture in tiny.SEQ2SEQ else "causal"
    folder = tiny.folder(architecture, head)  # type: ignore[arg-type]
    return getattr(transformers, tiny.AUTO_CLASSES[head]).from_pretrained(folder).eval()


@functools.cache
def reference(architecture: str) -> Any:
    """The model as transformers runs it."""
    return load(architecture)


@functools.cache
def backend(architecture: str) -> GenerateBackend:
    tokenizer = tiny.tokenizer_of(architecture)
    return GenerateBackend(
        load(architecture), device=CPU, pad_token_id=tokenizer.pad_token_id, decode=tokenizer.decode
    )


def prompts(architecture: str, lengths: Sequence[int] = LENGTHS) -> list[Any]:
    generator = np.random.default_rng(1)
    end = tiny.tokenizer_of(architecture).eos_token_id
    made = [generator.integers(50, 690, length) for length in lengths]
    return [np.append(ids, end) for ids in made] if architecture in tiny.SEQ2SEQ else made


def row(ids: Any, key: GenerateKey, **decoding: Any) -> Row:
    return Row({"input_ids": ids}, key, decoding=Decoding(**{"max_new_tokens": NEW_TOKENS, **decoding}))


def answers(outputs: Outputs) -> list[list[int]]:
    return [
        tokens[:length].tolist()
        for tokens, length in zip(outputs["sequences"], outputs["lengths"], strict=True)
    ]


def reasons(outputs: Outputs) -> list[FinishReason]:
    return [FINISH_REASONS[index] for index in outputs["finish"]]


def generated(architecture: str, ids: Any, **arguments: Any) -> list[list[int]]:
    """What transformers makes of one prompt, without the prompt and the padding behind an end."""
    model = reference(architecture)
    made = model.generate(
        torch.from_numpy(ids)[None], attention_mask=torch.ones(1, len(ids), dtype=torch.int64), **arguments
    )
    start = 1 if architecture in tiny.SEQ2SEQ else len(ids)
    end = arguments.get("eos_token_id", tiny.tokenizer_of(architecture).eos_token_id)
    new = [sequence[start:].tolist() for sequence in made]
    return [tokens[: tokens.index(end) + 1] if end in tokens else tokens for tokens in new]


# -- equality ------------------------------------------------------------------------------------


CASES = [
    (architecture, name)
    for architecture in ARCHITECTURES
    for name in PARAMETERS
    if architecture not in LIKE_BART or name in ("greedy", "beams", "beams with penalties")
]


@pytest.mark.parametrize(("architecture", "name"), CASES)
def test_a_batch_gives_what_transformers_gives_each_row(architecture: str, name: str) -> None:
    parameters = PARAMETERS[name]
    if architecture in DECODERS:  # where the first token is the prompt's
        parameters = {name: value for name, value in parameters.items() if name != "forced_bos_token_id"}
    texts, key = prompts(architecture), GenerateKey.of(parameters)
    together = backend(architecture).forward([row(ids, key) for ids in texts])
    for ids, outputs in zip(texts, together, strict=True):
        assert answers(outputs) == generated(
            architecture, ids, max_new_tokens=NEW_TOKENS, pad_token_id=0, **parameters
        )


def test_the_answers_are_worth_comparing() -> None:
    made = [
        answers(outputs)[0]
        for name in ARCHITECTURES
        for outputs in backend(name).forward([row(ids, GenerateKey()) for ids in prompts(name)])
    ]
    assert len({len(tokens) for tokens in made}) > 3
    assert sum(len(set(tokens)) > 4 for tokens in made) > len(made) / 2


@pytest.mark.parametrize("parameters", DRAWN.values(), ids=DRAWN.keys())
@pytest.mark.parametrize("architecture", ["bart", "t5", "llama"])
def test_a_draw_hangs_on_its_seed_alone(architecture: str, parameters: dict[str, Any]) -> None:
    texts, key = prompts(architecture, (5, 5, 31, 12)), GenerateKey.of(parameters)
    texts[1] = texts[0]
    seeds = (7, 8, 7, 9)
    rows = [row(ids, key, seed=seed) for ids, seed in zip(texts, seeds, strict=True)]
    together = [answers(outputs) for outputs in backend(architecture).forward(rows)]
    backwards = [answers(outputs) for outputs in backend(architecture).forward(rows[::-1])][::-1]
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    alone = [answers(backend(architecture).forward([each])[0]) for each in rows]
    assert together == alone == backwards
    assert together[0] != together[1]
    assert all(len(each) == parameters.get("num_return_sequences", 1) for each in together)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_draws_without_a_seed_differ() -> None:
    texts = prompts("llama", (20,)) * 4
    made = backend("llama").forward([row(ids, GenerateKey.of(DRAWN["all"])) for ids in texts])
    assert len({str(answers(outputs)) for outputs in made}) == 4


def test_draws_follow_the_model() -> None:
    """Frequencies of 4000 first tokens against the probabilities that transformers draws from."""
    ids = prompts("gpt2", (6,))[0]
    parameters = {"do_sample": True, "top_k": 5, "temperature": 2.0}
    logits = reference("gpt2")(torch.from_numpy(ids)[None]).logits[0, -1] / 2.0
    best = logits.topk(5)
    wanted = best.values.softmax(-1).detach().numpy()
    key = GenerateKey.of({**parameters, "num_return_sequences": 50})
    rows = [row(ids, key, seed=seed, max_new_tokens=1) for seed in range(80)]
    drawn = np.concatenate([outputs["sequences"][:, 0] for outputs in backend("gpt2").forward(rows)])
    shares = np.array([(drawn == token).mean() for token in best.indices.tolist()])
    assert shares.sum() == 1
    assert np.abs(shares - wanted).max() < 4 * np.sqrt(0.25 / len(drawn))


# -- ends ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameters", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_row_keeps_its_own_limits(architecture: str, parameters: dict[str, Any]) -> None:
    texts, key = prompts(architecture), GenerateKey.of(parameters)
    limits = [(3, 0), (12, 0), (7, 5), (12, 5), (1, 0)]
    rows = [
        row(ids, key, max_new_tokens=most, min_new_tokens=least)
        for ids, (most, least) in zip(texts, limits, strict=True)
    ]
    for outputs, ids, (most, least) in zip(backend(architecture).forward(rows), texts, limits, strict=True):
        options = {"min_new_tokens": least} if least else {}
        wanted = generated(architecture, ids, max_new_tokens=most, pad_token_id=0, **options, **parameters)
        assert answers(outputs) == wanted
        end = tiny.tokenizer_of(architecture).eos_token_id
        expected = FinishReason.EOS if wanted[0][-1] == end else FinishReason.LENGTH
        assert reasons(outputs) == [expected]


@pytest.mark.parametrize("architecture", ["bart", "gpt2"])
def test_a_stop_text_ends_its_own_row_only(architecture: str) -> None:
    texts, endless = prompts(architecture, (9, 31)), {"eos_token_id": 3, "no_repeat_ngram_size": 1}
    tokenizer = tiny.tokenizer_of(architecture)
    plain = [
        generated(architecture, ids, max_new_tokens=NEW_TOKENS, pad_token_id=0, **endless)[0] for ids in texts
    ]
    written = [tokenizer.decode(tokens) for tokens in plain]
    pieces = [written[1][start : start + 3] for start in range(8, len(written[1]) - 3)]
    stop = next(piece for piece in pieces if piece.isascii() and piece not in written[0])
    made = backend(architecture).forward(
        [row(ids, GenerateKey.of(endless, stop=(stop, "xyzzy"))) for ids in texts]
    )
    ended = answers(made[1])[0]
    assert ended == plain[1][: len(ended)]
    assert stop in tokenizer.decode(ended)
    assert stop not in tokenizer.decode(ended[:-1])
    assert reasons(made[1]) == [FinishReason.STOP]
    assert answers(made[0])[0] == plain[0]


def test_stop_texts_end_beams() -> None:
    key = GenerateKey.of({"num_beams": 3}, stop=("e", "a", "t"))
    made = backend("bart").forward([row(ids, key) for ids in prompts("bart")])
    written = [tiny.tokenizer_of("bart").decode(answers(outputs)[0][:-1]) for outputs in made]
    assert not any(set(text) & {"e", "a", "t"} for text in written)
    assert FinishReason.STOP in [reasons(outputs)[0] for outputs in made]


@pytest.mark.parametrize(
    "parameters", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"]
)
@pytest.mark.parametrize("architecture", ["t5", "llama"])
def test_a_row_past_its_deadline_gives_what_there_is(architecture: str, parameters: dict[str, Any]) -> None:
    texts, key = prompts(architecture, (5, 20, 9)), GenerateKey.of({**parameters, "eos_token_id": 3})
    rows = [row(ids, key) for ids in texts]
    rows[1] = row(texts[1], key, until=time.monotonic() - 1)
    made = backend(architecture).forward(rows)
    assert reasons(made[1]) == [FinishReason.TIMEOUT] * len(answers(made[1]))
    assert made[1]["lengths"].tolist() == [1] * len(answers(made[1]))
    plain = backend(architecture).forward([row(texts[0], key)])[0]
    assert answers(made[0]) == answers(plain)


def test_a_batch_that_nobody_waits_for_ends_at_once() -> None:
    key = GenerateKey.of({"eos_token_id": 3})
    rows = [row(ids, key, max_new_tokens=100) for ids in prompts("bart")]
    for each in rows:
        each.abandon()
    assert {outputs["lengths"].tolist()[0] for outputs in backend("bart").forward(rows)} == {1}


# -- what else there is --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parameters", [{}, {"num_beams": 3, "num_return_sequences": 3}], ids=["greedy", "beams"]
)
@pytest.mark.parametrize("architecture", ["bart", "t5", "gpt2", "llama"])
def test_log_probabilities(architecture: str, parameters: dict[str, Any]) -> None:
    texts = prompts(architecture, (5, 31))
    rows = [row(ids, GenerateKey.of(parameters, logprobs=True)) for ids in texts]
    for ids, outputs in zip(texts, backend(architecture).forward(rows), strict=True):
        assert outputs["logprobs"].dtype == np.float32
        assert outputs["logprobs"].shape == outputs["sequences"].shape
        for tokens, found in zip(answers(outputs), outputs["logprobs"], strict=True):
            wanted = step_by_step(architecture, ids, tokens)
            assert found[: len(tokens)] == pytest.approx(wanted, abs=1e-4)


@torch.no_grad()
def step_by_step(architecture: str, ids: Any, tokens: list[int]) -> list[float]:
    model, found = reference(architecture), []
    start = [model.generation_config.decoder_start_token_id]
    for index, token in enumerate(tokens):
        if architecture in tiny.SEQ2SEQ:
            fed = torch.tensor([start + tokens[:index]])
            logits = model(torch.from_numpy(ids)[None], decoder_input_ids=fed).logits
        else:
            logits = model(torch.tensor([ids.tolist() + tokens[:index]])).logits
        found.append(float(logits[0, -1].log_softmax(-1)[token]))
    return found


def test_rows_that_say_nothing_are_continued_a_little() -> None:
    made = backend("t5").forward([Row({"input_ids": ids}) for ids in prompts("t5")])
    assert all(1 <= outputs["lengths"][0] <= 8 for outputs in made)
    assert made[0]["sequences"].dtype == made[0]["lengths"].dtype == made[0]["finish"].dtype == np.int64


def test_all_of_a_model_that_cannot_be_stepped_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generating, "decoder_of", lambda *arguments: None)
    served = harness.serve(tiny.folder("gpt2", "causal"), "text-generation")
    assert served.decoder is None
    texts = ["This is", "Two ferries left for Morrow at"]
    made = harness.results(served, {"text_inputs": texts}, max_length=20, return_full_text=False)
    for text, (answer,) in zip(texts, made, strict=True):
        ids = tiny.tokenizer_of("gpt2")(text, return_tensors="np")["input_ids"][0]
        (wanted,) = generated("gpt2", ids, max_length=20, pad_token_id=0)
        wanted = tiny.tokenizer_of("gpt2").decode(wanted, skip_special_tokens=True)
        assert answer["generated_text"] == wanted


def test_a_twin_shares_weights_and_nothing_else() -> None:
    model = load("llama")
    twin = with_shared_weights(model)
    assert [a.data_ptr() for a in twin.parameters()] == [b.data_ptr() for b in model.parameters()]
    twin.generation_config.num_beams = 5
    twin.config._attn_implementation = "eager"
    assert model.generation_config.num_beams != 5
    assert {
        module.config._attn_implementation for module in model.modules() if hasattr(module, "config")
    } == {"sdpa"}
    assert twin.model.layers[0].self_attn.config is twin.config
