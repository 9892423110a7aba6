"""Explanations of generated text: whose log-probability, of which tokens, and at whose expense."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch
import transformers
from captum.attr import LayerIntegratedGradients, LLMGradientAttribution, TextTokenInput

from mlserver_hftasks.backends.gradients import PathBackend, PathRow, ScoredRow
from mlserver_hftasks.engine.sequences import Prompt
from mlserver_hftasks.errors import DeadlineExceeded, InvalidRequest, RequestTooLarge
from mlserver_hftasks.explain import engines as engines_module
from mlserver_hftasks.explain.evaluation import Clock
from mlserver_hftasks.explain.explainer import ExplainLimits
from mlserver_hftasks.explain.options import ExplainOptions
from mlserver_hftasks.explain.reading import Reading
from mlserver_hftasks.explain.record import json_of
from mlserver_hftasks.explain.result import Explanation
from mlserver_hftasks.explain.targets.answers import MOST_SCORES, MOST_TOKENS
from mlserver_hftasks.explain.targets.text_generation import USUAL_TOKENS, TextGenerationTargets
from mlserver_hftasks.generation import scoring as scoring_module
from mlserver_hftasks.generation.decoder import TorchDecoder
from mlserver_hftasks.generation.stepped_scoring import SteppedScoring
from mlserver_hftasks.loading import Served
from mlserver_hftasks.loading.served import Scoring
from tests import tiny
from tests.explaining import explaining
from tests.harness import serve

ARCHITECTURES = ("gpt2", "llama")
PROMPTS = ("The river museum was quiet", "Anna", "When the harbour opened, two ferries left for Morrow")
FEW = {"max_new_tokens": 6, "min_new_tokens": 6}
TOLERANCE = 0.05
PATIENCE_S = 20.0


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def served(architecture: str, **config: Any) -> Served:
    return serve(tiny.folder(architecture, "causal", **config), "text-generation")


@functools.cache
def plain(architecture: str) -> Any:
    folder = tiny.folder(architecture, "causal")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def ids_of(architecture: str, explanation: Explanation) -> list[int]:
    ids: list[int] = tiny.tokenizer_of(architecture).convert_tokens_to_ids(list(explanation.tokens))
    return ids


def logprobs(architecture: str, ids: Sequence[int], prompt_tokens: int) -> Any:
    """Of each token behind the prompt, by the model itself in one plain pass."""
    with torch.inference_mode():
        logits = plain(architecture)(torch.tensor([ids])).logits[0, prompt_tokens - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[prompt_tokens:])[:, None])[:, 0].numpy()


def assert_sound(explanation: Explanation) -> None:
    assert explanation.prompt_tokens is not None
    answer = slice(explanation.prompt_tokens, None)
    assert not explanation.attributions[:, answer].any()
    assert not explanation.attributions[:, explanation.sequence_ids < 0].any()
    assert (explanation.sequence_ids[answer] == 1).all()
    assert np.isfinite(explanation.attributions).all()
    right = explanation.score - explanation.baseline_score + explanation.delta
    np.testing.assert_allclose(explanation.attributions.sum(axis=1), right, atol=1e-3)
    for (start, end), text in zip(
        explanation.offsets.tolist(), explanation.sequence_ids.tolist(), strict=True
    ):
        assert (start < 0) == (end < 0)
        piece = explanation.texts[text][start:end] if start >= 0 else ""
        assert piece == piece.strip() or piece.isspace()


# -- what is explained ---------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
async def test_the_greedy_answer_as_a_whole(architecture: str) -> None:
    async with explaining(served(architecture)) as explain:
        assert explain.explainer.methods[1] == "integrated-gradients"
        for prompt, explanation in zip(PROMPTS, await explain({"text_inputs": PROMPTS}, FEW), strict=True):
            assert_sound(explanation)
            assert explanation.method == "integrated-gradients"
            assert explanation.baseline == "mean"
            assert explanation.converged.all()
            assert abs(explanation.delta[0]) <= TOLERANCE * np.abs(explanation.attributions).sum()
            assert explanation.target_label == ("answer",)
            assert explanation.target.tolist() == [[-1, -1]]
            assert explanation.texts[0] == prompt
            ids, first = ids_of(architecture, explanation), explanation.prompt_tokens
            assert first is not None
            greedy = plain(architecture).generate(torch.tensor([ids[:first]]), do_sample=False, **FEW)
            assert ids == greedy[0].tolist()
            expected = logprobs(architecture, ids, first).sum()
            np.testing.assert_allclose(explanation.score, expected, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
async def test_token_by_token_adds_up_to_the_whole(architecture: str) -> None:
    async with explaining(served(architecture)) as explain:
        options = {"method": "integrated-gradients-fixed", "max_evals": 12}
        for prompt in PROMPTS:
            (whole,) = await explain({"text_inputs": [prompt]}, FEW, **options)
            (each,) = await explain({"text_inputs": [prompt]}, FEW, per_token=True, **options)
            assert_sound(each)
            first = each.prompt_tokens or 0
            ids = ids_of(architecture, each)
            assert each.target.tolist() == [[first + n, token] for n, token in enumerate(ids[first:])]
            assert len(each.target_label) == FEW["max_new_tokens"]
            np.testing.assert_allclose(each.score, logprobs(architecture, ids, first), atol=1e-4)
            np.testing.assert_allclose(
                each.attributions.sum(axis=0), whole.attributions[0], atol=1e-4, rtol=1e-3
            )


@pytest.mark.parametrize("method", ["integrated-gradients", "permutation-shap", "occlusion"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
async def test_batch_equals_single_in_any_order(architecture: str, method: str) -> None:
    async with explaining(served(architecture)) as explain:
        for options in (
            {"method": method, "max_evals": 30},
            {"method": method, "max_evals": 9, "per_token": 1},
        ):
            alone = [(await explain({"text_inputs": [each]}, FEW, **options))[0] for each in PROMPTS]
            for order in ((0, 1, 2), (2, 0, 1)):
                inputs = {"text_inputs": [PROMPTS[index] for index in order]}
                for index, got in zip(order, await explain(inputs, FEW, **options), strict=True):
                    assert got.tokens == alone[index].tokens
                    assert got.evaluations == alone[index].evaluations
                    scale = max(1.0, float(np.abs(alone[index].attributions).max()))
                    np.testing.assert_allclose(
                        got.attributions, alone[index].attributions, atol=1e-5 * scale, rtol=1e-4
                    )


async def test_equals_captum() -> None:
    """LLMGradientAttribution over the embedding layer, which takes a pass forward and back for each token."""
    tokenizer = tiny.tokenizer_of("gpt2")
    method = LLMGradientAttribution(
        LayerIntegratedGradients(plain("gpt2"), plain("gpt2").get_input_embeddings()), tokenizer
    )
    prompt, target = PROMPTS[0], " when the harbour"
    count = len(tokenizer(prompt)["input_ids"])
    theirs = method.attribute(
        TextTokenInput(prompt, tokenizer),
        target=target,
        n_steps=10,
        baselines=torch.full((1, count), tokenizer.pad_token_id),
    )
    options = {"method": "integrated-gradients-fixed", "max_evals": 12, "baseline": "pad", "target": target}
    async with explaining(served("gpt2")) as explain:
        (whole,) = await explain({"text_inputs": [prompt]}, **options)
        (each,) = await explain({"text_inputs": [prompt]}, per_token=True, **options)
    np.testing.assert_allclose(whole.attributions[0, :count], theirs.seq_attr.numpy(), atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(each.attributions[:, :count], theirs.token_attr.numpy(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("target", [" when the harbour opened", "!?", " 🙂ü"])
async def test_the_text_of_the_client(architecture: str, target: str) -> None:
    """Its tokens are those that it has behind the prompt."""
    async with explaining(served(architecture)) as explain:
        (explanation,) = await explain({"text_inputs": PROMPTS[:1]}, target=target, per_token=True)
        (before, behind) = explanation.texts
        assert (before, behind) == (PROMPTS[0], target)
        assert_sound(explanation)
        together = tiny.tokenizer_of(architecture)(before + behind)["input_ids"]
        assert ids_of(architecture, explanation) == together
        first = explanation.prompt_tokens or 0
        np.testing.assert_allclose(explanation.score, logprobs(architecture, together, first), atol=1e-4)
        (other,) = await explain({"text_inputs": PROMPTS[:1]}, target="seum", method="occlusion")
        assert other.texts[1] == "seum"
        assert other.target_label == ("answer",)


async def test_the_text_of_the_client_behind_a_prompt_that_was_cut() -> None:
    """What was cut off is no part of the answer, on whichever side."""
    async with explaining(served("gpt2")) as explain:
        (one,) = await explain(
            {"text_inputs": [PROMPTS[0] * 20]},
            {"truncation": True, "max_new_tokens": 100},
            target=" Anna",
            max_evals=2,
        )
    assert one.texts[1] == " Anna"
    assert ids_of("gpt2", one)[one.prompt_tokens :] == tiny.tokenizer_of("gpt2")(" Anna")["input_ids"]


async def test_rows_that_run_together_score_about_as_many_tokens() -> None:
    """Their logits are filled up to those of the longest."""
    async with explaining(served("gpt2")) as explain:
        explainer, parameters = explain.explainer, explain.served.task.signature.parse({})

        def keys_of(target: str) -> set[Any]:
            options = ExplainOptions(target=target)
            asked = explainer._asked({"text_inputs": PROMPTS}, parameters, options, None)
            cases = explainer._cases(asked.answered, [], parameters, options, "", Clock(None))
            rows = [
                row
                for case in cases
                for row in (
                    case.point_row(0.5, 0),
                    case.masked_row(np.ones(len(case.tokens.groups), dtype=np.bool_), 0),
                )
            ]
            return {row.key for row in rows}

        assert len(keys_of(" was")) == 1
        assert not keys_of(" was") & keys_of(" when the harbour opened, two ferries left for Morrow")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
async def test_what_a_template_adds_is_never_absent(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = served(architecture)
    tokenizer = model.task.model.encoder.tokenizer
    monkeypatch.setattr(tokenizer, "chat_template", tiny.CHAT_TEMPLATE)
    chat = [{"role": "system", "content": "user"}, {"role": "user", "content": "who opened the museum?"}]
    async with explaining(model) as explain:
        (one,) = await explain({"messages": [chat]}, FEW, max_evals=20)
    assert_sound(one)
    assert one.texts[0] == "system: user\nuser: who opened the museum?\nassistant:"
    spans = [(8, 12), (19, 41)]
    assert [one.texts[0][start:end] for start, end in spans] == [each["content"] for each in chat]
    own = one.offsets[one.sequence_ids == 0].tolist()
    assert own
    assert all(any(a <= start and end <= b for a, b in spans) for start, end in own)
    assert {letter for start, end in own for letter in range(start, end)} >= {8, 9, 10, 11, 40}
    assert one.attributions[0][one.sequence_ids == 0].any()


async def test_a_role_that_looks_like_a_place_for_contents(monkeypatch: pytest.MonkeyPatch) -> None:
    model = served("gpt2")
    template = "{% for each in messages %}{{ each.role }}: {{ each.content }}\n{% endfor %}"
    monkeypatch.setattr(model.task.model.encoder.tokenizer, "chat_template", template)
    chat = [{"role": "user\ue0007\ue001", "content": "who opened the museum?"}]
    async with explaining(model) as explain:
        (one,) = await explain({"messages": [chat]}, FEW, max_evals=4)
    assert_sound(one)
    assert (one.sequence_ids[: one.prompt_tokens] == 0).all()  # nobody knows what the template adds


async def test_tokens_that_the_tokenizer_does_not_know() -> None:
    """Models may have more of them, to fill their matrices up."""
    model = served("gpt2", vocab_size=1000)
    unknown = len(tiny.tokenizer_of("gpt2")) + 5
    some = {"max_new_tokens": 3, "forced_eos_token_id": unknown}
    async with explaining(model) as explain:
        (one,) = await explain({"text_inputs": PROMPTS[:1]}, some, per_token=True, max_evals=4, html=True)
    assert one.tokens[-1] == one.target_label[-1] == f"[{unknown}]"
    assert f"[{unknown}]" in json_of(one, None)


async def test_an_answer_that_generate_makes() -> None:
    async with explaining(served("gpt2")) as explain:
        (one,) = await explain({"text_inputs": PROMPTS[:1]}, {**FEW, "num_beams": 2}, max_evals=20)
        ids, first = ids_of("gpt2", one), one.prompt_tokens or 0
        beams = plain("gpt2").generate(torch.tensor([ids[:first]]), num_beams=2, do_sample=False, **FEW)
        assert ids == beams[0].tolist()


async def test_an_answer_that_nobody_bounds_is_short_and_always_the_same() -> None:
    async with explaining(served("llama")) as explain:
        first, second = [
            (await explain({"text_inputs": PROMPTS[:1]}, {"min_new_tokens": 99}, max_evals=4))[0]
            for _ in range(2)
        ]
        assert len(first.tokens) - (first.prompt_tokens or 0) == USUAL_TOKENS
        assert first.tokens == second.tokens


async def test_words_of_the_prompt() -> None:
    async with explaining(served("gpt2")) as explain:
        (tokens,) = await explain({"text_inputs": PROMPTS[:1]}, FEW, per_token=True, max_evals=9)
        (words,) = await explain({"text_inputs": PROMPTS[:1]}, FEW, per_token=True, max_evals=9, level="word")
    assert words.tokens[: words.prompt_tokens] == tuple(PROMPTS[0].split())
    assert words.target_label == tokens.target_label
    for place, token in zip(words.target[:, 0].tolist(), tokens.target[:, 0].tolist(), strict=True):
        assert words.tokens[place] == tokens.texts[1][slice(*tokens.offsets[token])]
    np.testing.assert_allclose(
        words.attributions.sum(axis=1), tokens.attributions.sum(axis=1), atol=1e-4, rtol=1e-4
    )


async def test_a_heat_map_per_token() -> None:
    async with explaining(served("gpt2")) as explain:
        (one,) = await explain(
            {"text_inputs": PROMPTS[:1]}, target=" <b>was quiet", per_token=True, max_evals=4, top_k=3
        )
    record = orjson.loads(json_of(one, 3))
    reading = Reading.of(record)
    assert [word.text for word in reading.words()] == PROMPTS[0].split()
    assert all(len(target["top"]) == 3 for target in record["targets"])
    for index, target in enumerate(reading.targets):
        before, answer = reading.passages(index)
        assert "".join(piece.text for piece in before) == PROMPTS[0]
        assert "".join(piece.text for piece in answer) == " <b>was quiet"
        (explained,) = (piece.text for piece in answer if piece.explained)
        assert explained == target.label or (explained == " " and target.label == "Ġ")
        assert reading.place(index) == f"token {index + 1}"
    html = reading._repr_html_()
    assert html.count("<section") == len(reading.targets) > 3
    assert "<b>was" not in html
    assert '<b class="answer"' in html


# -- where a decoder follows an encoder ------------------------------------------------------------

SEQ2SEQ = {
    "bart": ("summarization", {}),
    "t5": ("text2text-generation", {"prefix": "say again: "}),
    "marian": ("translation", {}),
    "mbart": ("translation", {"src_lang": "en_XX", "tgt_lang": "fr_XX"}),
}
WRITTEN_IN_PYTHON = Path(__file__).parents[1] / "golden/s2s_m2m"


@pytest.mark.parametrize("architecture", SEQ2SEQ)
async def test_an_answer_to_what_an_encoder_read(architecture: str) -> None:
    task, parameters = SEQ2SEQ[architecture]
    folder = tiny.folder(architecture, "seq2seq")  # type: ignore[arg-type]
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    some = {**parameters, "max_new_tokens": 6, "num_beams": 1}
    prefix = parameters.get("prefix", "")
    async with explaining(serve(folder, task)) as explain:
        assert explain.explainer.methods == ("auto", "occlusion", "permutation-shap")
        together = await explain(PROMPTS, some, max_evals=60)
        for prompt, got in zip(PROMPTS, together, strict=True):
            assert_sound(got)
            assert (got.method, got.target_label) == ("permutation-shap", ("answer",))
            assert got.texts[0] == prefix + prompt
            own = got.offsets[got.sequence_ids == 0]
            assert own[:, 0].min() >= len(prefix)
            assert own[:, 1].max() == len(prefix + prompt)
            first, tokenizer = got.prompt_tokens, explain.served.task.model.encoder.tokenizer
            ids = tokenizer.convert_tokens_to_ids(list(got.tokens))
            read, said = torch.tensor([ids[:first]]), torch.tensor(ids[first:])
            fed = torch.cat([torch.tensor([explain.served.task.start]), said[:-1]])  # type: ignore[attr-defined]
            with torch.inference_mode():
                logits = model(input_ids=read, decoder_input_ids=fed[None]).logits[0]
            expected = logits.log_softmax(-1).gather(1, said[:, None])[:, 0]
            np.testing.assert_allclose(got.score, expected.sum(), rtol=1e-4)
            (alone,) = await explain([prompt], some, max_evals=60)
            np.testing.assert_allclose(got.attributions, alone.attributions, atol=1e-5, rtol=1e-4)
            (whole,) = await explain([prompt], some, method="occlusion")
            (each,) = await explain([prompt], some, method="occlusion", per_token=True)
            np.testing.assert_allclose(each.score, expected, atol=1e-4)
            np.testing.assert_allclose(each.attributions.sum(axis=0), whole.attributions[0], atol=1e-4)
            assert each.target[:, 0].tolist() == list(range(first or 0, len(ids)))
        (words,) = await explain(PROMPTS[:1], some, max_evals=60, level="word", method="occlusion")
        assert_sound(words)
        with pytest.raises(InvalidRequest, match=r"model's own answer is explained @ explain.target"):
            await explain(PROMPTS[:1], some, target="another")
        with pytest.raises(InvalidRequest, match="cannot be explained by"):
            await explain(PROMPTS[:1], some, method="input-x-gradient")


async def test_decoders_take_few_tokens_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits over a vocabulary for all of them would take much memory; the encoder's tokens are others."""
    most, shapes = 40, []
    async with explaining(serve(tiny.folder("t5", "seq2seq"), "summarization")) as explain:
        some = {"max_new_tokens": 12, "min_new_tokens": 12}
        expected = await explain(PROMPTS, some, max_evals=40)
        scoring = explain.explainer._engines._scoring  # type: ignore[attr-defined]
        monkeypatch.setattr(scoring_module, "MOST_FED_TOKENS", most)
        scoring._model.register_forward_hook(
            lambda module, args, kwargs, out: shapes.append(tuple(out.logits.shape[:2])), with_kwargs=True
        )
        for got, wanted in zip(await explain(PROMPTS, some, max_evals=40), expected, strict=True):
            np.testing.assert_allclose(got.attributions, wanted.attributions, atol=1e-5, rtol=1e-4)
    assert max(rows * fed for rows, fed in shapes) <= most
    assert max(rows for rows, _ in shapes) > 1


async def test_a_tokenizer_that_does_not_know_where_its_tokens_are() -> None:
    async with explaining(serve(WRITTEN_IN_PYTHON, "translation_en_to_fr")) as explain:
        (one,) = await explain(PROMPTS[:1], {"max_new_tokens": 6, "num_beams": 1}, max_evals=20)
    first = one.prompt_tokens or 0
    assert (one.offsets[:first] == -1).all()
    assert one.attributions[0, :first].any()
    assert not one.attributions[0, [0, first - 1]].any()  # the language, and the end
    assert one.texts[0] == PROMPTS[0]


# -- what cannot be ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "options", "message"),
    [
        ({}, {"target": 3}, r"got 3, expected a text that continues the prompt @ explain.target"),
        ({}, {"target": ""}, r"got '', expected a text .* @ explain.target"),
        ({}, {"target": "quiet " * 50}, r"expected at most 128 together @ explain.target"),
        (
            {"num_return_sequences": 2, "do_sample": True, **FEW},
            {},
            r"2 answers, expected one to explain @ num_return_sequences",
        ),
        (
            {"max_new_tokens": MOST_SCORES + 1, "min_new_tokens": MOST_SCORES + 1},
            {"per_token": True},
            rf"{MOST_SCORES + 1} tokens, expected at most {MOST_SCORES} .* token by token.* @ max_new_tokens",
        ),
        ({"max_new_tokens": 5000}, {}, r"@ max_new_tokens"),
        ({}, {"baseline": "mask"}, r"no such token, expected mean or zero @ explain.baseline"),
    ],
)
async def test_refused(parameters: dict[str, Any], options: dict[str, Any], message: str) -> None:
    async with explaining(served("gpt2")) as explain:
        with pytest.raises(InvalidRequest, match=message):
            await explain({"text_inputs": PROMPTS[:1]}, parameters, **options)


async def test_an_answer_that_is_too_long_to_explain_is_refused() -> None:
    async with explaining(served("gpt2")) as explain:
        with pytest.raises(InvalidRequest, match=rf"at most {MOST_TOKENS} to explain @ explain.target"):
            await explain({"text_inputs": PROMPTS[:1]}, target="quiet " * MOST_TOKENS)


async def test_a_long_answer_is_not_written_behind_every_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    def written(*_: Any) -> Any:
        raise AssertionError("tokenized with a prompt")

    monkeypatch.setattr(TextGenerationTargets, "_continued", written)
    async with explaining(served("gpt2"), limits=ExplainLimits(max_explanations=2)) as explain:
        with pytest.raises(InvalidRequest, match=rf"at most {MOST_TOKENS} to explain @ explain.target"):
            await explain({"text_inputs": PROMPTS[:2]}, target=" quiet" * (2 * MOST_TOKENS + 1))
        with pytest.raises(RequestTooLarge, match="3 items to explain, expected at most 2"):
            await explain({"text_inputs": PROMPTS}, target=" quiet")


async def test_prompts_without_tokens_are_refused() -> None:
    async with explaining(served("llama")) as explain:
        for prompt in ("", "<|begin_of_text|>"):
            with pytest.raises(InvalidRequest, match="at least one to"):
                await explain({"text_inputs": [prompt]}, FEW)


async def test_only_answers_have_tokens() -> None:
    async with explaining(serve(tiny.folder("bert", "sequence"), "text-classification")) as explain:
        with pytest.raises(InvalidRequest, match=r"answers no text, .* @ explain.per_token"):
            await explain(["the museum"], per_token=True)


async def test_a_model_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PathBackend, "of", classmethod(lambda *_: None))
    async with explaining(serve(tiny.folder("gpt2", "causal"), "text-generation")) as explain:
        assert explain.explainer.methods == ("auto", "occlusion", "permutation-shap")
        (one,) = await explain({"text_inputs": PROMPTS[:1]}, FEW)
        assert (one.method, one.baseline) == ("permutation-shap", "...")
        assert abs(one.delta[0]) < 1e-3
        assert_sound(one)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
async def test_a_decoder_that_only_steps(architecture: str) -> None:
    """A program's: its prompts in one piece, answers token by token."""
    model = served(architecture)
    assert model.decoder is not None
    plain_model = transformers.AutoModelForCausalLM.from_pretrained(tiny.folder(architecture, "causal"))
    few = TorchDecoder(plain_model, device=torch.device("cpu"), cache_tokens=40)
    stepped = dataclasses.replace(
        model, scoring=Scoring(lambda pause: SteppedScoring(few, pause), gradients=False)
    )
    options = {"method": "permutation-shap", "max_evals": 40}
    async with explaining(model) as explain:
        whole = await explain({"text_inputs": PROMPTS}, FEW, **options)
        each = await explain({"text_inputs": PROMPTS}, FEW, per_token=True, **options)
    async with explaining(stepped) as explain:
        assert explain.explainer.methods == ("auto", "occlusion", "permutation-shap")
        for expected, got in zip(
            whole, await explain({"text_inputs": PROMPTS}, FEW, max_evals=40), strict=True
        ):
            assert (got.method, got.tokens) == ("permutation-shap", expected.tokens)
            np.testing.assert_allclose(got.attributions, expected.attributions, atol=1e-4, rtol=1e-3)
        again = await explain({"text_inputs": PROMPTS}, FEW, per_token=True, **options)
    for expected, got in zip(each, again, strict=True):
        np.testing.assert_allclose(got.attributions, expected.attributions, atol=1e-4, rtol=1e-3)


# -- time, and those who generate ----------------------------------------------------------------

SLOW = {"n_embd": 128, "n_layer": 6, "n_inner": 512}


@pytest.mark.parametrize("method", ["integrated-gradients", "permutation-shap"])
async def test_a_deadline_ends_with_what_there_is(method: str) -> None:
    options = {"method": method, "tolerance": 1e-6, "max_evals": 500, "target": PROMPTS[2]}
    prompt = {"text_inputs": [" ".join([PROMPTS[2]] * 2)] * 2}
    async with explaining(served("gpt2", **SLOW)) as explain:
        await explain(prompt, **{**options, "max_evals": 4})  # warm
        began = time.monotonic()
        explanations = await explain(prompt, deadline_ms=2000, **options)
        assert time.monotonic() - began < 2.5
        for one in explanations:
            assert not one.converged.any()
            assert 2 <= one.evaluations < 500
            assert one.attributions.any()


async def test_no_time_for_the_answer() -> None:
    async with explaining(served("gpt2", **SLOW)) as explain:
        with pytest.raises(DeadlineExceeded, match="before the first estimate"):
            await explain(
                {"text_inputs": PROMPTS}, {"min_new_tokens": 90, "max_new_tokens": 90}, deadline_ms=20
            )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
async def test_who_generates_gets_the_same_meanwhile(architecture: str) -> None:
    model = served(architecture)
    tokens = [np.array(tiny.tokenizer_of(architecture)(text)["input_ids"]) for text in PROMPTS]
    prompts = [Prompt(each, 12, logprobs=True) for each in tokens]
    async with explaining(model) as explain:
        assert explain.generator is not None
        expected = await explain.generator.run(prompts)
        explained = [(await explain({"text_inputs": [each]}, FEW, max_evals=20))[0] for each in PROMPTS]
        busy = [asyncio.create_task(explain({"text_inputs": PROMPTS}, FEW, max_evals=20)) for _ in range(3)]
        count = 0
        while not all(task.done() for task in busy):
            for got, wanted in zip(await explain.generator.run(prompts), expected, strict=True):
                assert list(got.tokens) == list(wanted.tokens)
                np.testing.assert_allclose(got.logprobs, wanted.logprobs, atol=1e-5)
            count += 1
        assert count > 1
        for task in busy:
            for got, wanted in zip(await task, explained, strict=True):
                np.testing.assert_allclose(got.attributions, wanted.attributions, atol=1e-4, rtol=1e-3)


def test_the_clone_shares_the_weights() -> None:
    model = served("gpt2")
    assert model.scoring is not None and model.decoder is not None
    scoring = model.scoring.make(lambda: None)
    own = dict(model.decoder._model.named_parameters())
    cloned = dict(scoring._backend._model.named_parameters())  # type: ignore[attr-defined]
    assert own.keys() == cloned.keys()
    assert all(own[name] is cloned[name] for name in own)
    assert scoring._backend._model is not model.decoder._model  # type: ignore[attr-defined]
    scoring.close()


async def test_everything_crawls_while_somebody_generates(monkeypatch: pytest.MonkeyPatch) -> None:
    pause_s, gate, entered = 0.05, threading.Event(), threading.Event()
    monkeypatch.setattr(engines_module, "MAX_PAUSE_S", pause_s)
    model = serve(tiny.folder("gpt2", "causal"), "text-generation")
    assert model.decoder is not None
    step = model.decoder.step

    def held(chunks: Any) -> Any:
        entered.set()
        assert gate.wait(PATIENCE_S)
        return step(chunks)

    async with explaining(model) as explain:
        scoring = explain.explainer._engines._scoring  # type: ignore[attr-defined]
        ids = {"input_ids": np.arange(5, 12)}
        scored = ScoredRow(ids, select=np.array([3]), score=lambda outputs: outputs["logits"][0, :1])
        way = PathRow(
            ids,
            select=np.array([3]),
            kept=np.zeros(7, dtype=np.bool_),
            score=lambda out: out["logits"][0, :1],
        )
        calls = (functools.partial(scoring.forward, [scored]), lambda: scoring.gradients().forward([way]))
        monkeypatch.setattr(model.decoder, "step", held)
        assert explain.generator is not None
        generating = asyncio.create_task(explain.generator.run([Prompt(np.arange(5, 9), 2)]))
        assert await asyncio.to_thread(entered.wait, PATIENCE_S)
        products = 2 * 4  # attention in and out, feed-forward in and out, in both layers
        for call in calls:
            began = time.monotonic()
            await asyncio.to_thread(call)
            assert time.monotonic() - began >= products * pause_s
        gate.set()
        await generating
        assert await asyncio.to_thread(explain.generator.wait_until_idle, PATIENCE_S)
        for call in calls:
            began = time.monotonic()
            await asyncio.to_thread(call)
            assert time.monotonic() - began < products * pause_s
