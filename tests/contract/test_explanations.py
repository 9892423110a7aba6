"""Explanations of every task, on every architecture that the study names, hold what they promise."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from captum.attr import FeatureAblation, LayerIntegratedGradients

from mlserver_hftasks.errors import InvalidRequest
from mlserver_hftasks.explain.result import Explanation
from mlserver_hftasks.loading import Served
from tests import tiny
from tests.explaining import explaining
from tests.harness import answer, serve

ARCHITECTURES = (
    "bert",
    "distilbert",
    "roberta",
    "electra",
    "albert",
    "modernbert",
    "deberta-v2",
    "gpt2",
    "llama",
)
TEXTS = ("a ship", "the river museum was quiet when the harbour opened", "Who opened the old museum?", "the")
TOLERANCE = 0.05


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def served(architecture: str, task: str, head: str, *, packing: str = "auto") -> Served:
    labels = ("contradiction", "neutral", "entailment") if task == "zero-shot-classification" else None
    return serve(tiny.folder(architecture, head, labels), task, packing=packing)  # type: ignore[arg-type]


def classifier(architecture: str, **settings: Any) -> Served:
    return served(architecture, "text-classification", "sequence", **settings)


def assert_sound(explanation: Explanation) -> None:
    """What holds of every explanation, converged or not."""
    k, tokens = explanation.attributions.shape
    assert len(explanation.tokens) == len(explanation.word_ids) == len(explanation.sequence_ids) == tokens
    assert explanation.offsets.shape == (tokens, 2)
    assert explanation.target.shape == (k, 2)
    numbers = (explanation.score, explanation.baseline_score, explanation.delta)
    assert all(len(each) == k and np.isfinite(each).all() for each in numbers)
    assert len(explanation.target_label) == len(explanation.converged) == k
    assert np.isfinite(explanation.attributions).all()
    assert not explanation.attributions[:, explanation.sequence_ids < 0].any()
    right = explanation.score - explanation.baseline_score + explanation.delta
    np.testing.assert_allclose(explanation.attributions.sum(axis=1), right, atol=1e-4)


def assert_offsets(explanation: Explanation) -> None:
    for (start, end), text, special in zip(
        explanation.offsets.tolist(),
        explanation.sequence_ids.tolist(),
        explanation.sequence_ids < 0,
        strict=True,
    ):
        assert special == (start < 0)
        if not special:
            piece = explanation.texts[text][start:end]
            assert piece == piece.strip() or piece.isspace()


# -- completeness, batches -----------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
async def test_complete_within_the_tolerance(architecture: str) -> None:
    async with explaining(classifier(architecture)) as explain:
        for explanation in await explain(TEXTS, max_evals=2000):
            assert_sound(explanation)
            assert_offsets(explanation)
            assert explanation.method == "integrated-gradients"
            assert explanation.baseline == ("mean" if architecture in ("gpt2", "llama") else "mask")
            assert explanation.converged.all()
            assert abs(explanation.delta[0]) <= TOLERANCE * np.abs(explanation.attributions).sum()
            predicted = answer(explain.served, {"inputs": explanation.texts})[0].outputs[0]["logits"]
            assert explanation.target.tolist() == [[-1, int(predicted.argmax())]]
            np.testing.assert_allclose(explanation.score, predicted.max(), atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", ["integrated-gradients", "permutation-shap"])
async def test_batch_equals_single_in_any_order(architecture: str, method: str) -> None:
    async with explaining(classifier(architecture)) as explain:
        options = {"method": method, "max_evals": 40}
        alone = [(await explain([text], **options))[0] for text in TEXTS]
        for order in ((0, 1, 2, 3), (2, 0, 3, 1)):
            together = await explain([TEXTS[index] for index in order], **options)
            for index, got in zip(order, together, strict=True):
                assert got.evaluations == alone[index].evaluations
                scale = max(1.0, float(np.abs(alone[index].attributions).max()))
                np.testing.assert_allclose(
                    got.attributions, alone[index].attributions, atol=1e-5 * scale, rtol=1e-4
                )


@pytest.mark.parametrize("architecture", ["bert", "roberta", "modernbert", "llama"])
async def test_packed_equals_padded(architecture: str) -> None:
    results = []
    for packing in ("auto", "off"):
        async with explaining(classifier(architecture, packing=packing)) as explain:
            results.append(await explain(TEXTS, max_evals=20))
    for packed, padded in zip(*results, strict=True):
        np.testing.assert_allclose(packed.attributions, padded.attributions, atol=1e-4, rtol=1e-3)


# -- against captum ------------------------------------------------------------------------------


def captum_attributions(architecture: str, texts: Sequence[str], steps: int) -> list[Any]:
    """By captum's hook on the embedding layer, one text at a time, from the mask token."""
    folder = tiny.folder(architecture, "sequence")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = tiny.tokenizer_of(architecture)
    layer = model.get_input_embeddings()
    method = LayerIntegratedGradients(lambda ids, **more: model(ids, **more).logits, layer)
    results = []
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt", return_special_tokens_mask=True)
        special = inputs.pop("special_tokens_mask").bool()
        ids = inputs.pop("input_ids")
        attributions = method.attribute(
            ids,
            baselines=torch.where(special, ids, tokenizer.mask_token_id),
            target=int(model(ids, **inputs).logits.argmax()),
            n_steps=steps,
            additional_forward_args=None,
        )
        results.append(attributions.sum(-1)[0].detach().numpy())
    return results


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "electra"])
async def test_equals_captum(architecture: str) -> None:
    async with explaining(classifier(architecture)) as explain:
        ours = await explain(TEXTS, method="integrated-gradients-fixed", max_evals=22)
    for explanation, theirs in zip(ours, captum_attributions(architecture, TEXTS, 20), strict=True):
        scale = max(1.0, float(np.abs(theirs).max()))
        np.testing.assert_allclose(explanation.attributions[0], theirs, atol=1e-5 * scale)


async def test_occlusion_equals_captum() -> None:
    """captum's FeatureAblation of token ids, by the mask token."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        tiny.folder("bert", "sequence")
    ).eval()
    tokenizer = tiny.tokenizer_of("bert")
    ablation = FeatureAblation(lambda ids: model(ids).logits)
    async with explaining(classifier("bert")) as explain:
        for explanation in await explain(TEXTS, method="occlusion"):
            ids = torch.tensor([tokenizer(explanation.texts[0])["input_ids"]])
            special = torch.tensor(explanation.sequence_ids < 0)[None]
            theirs = ablation.attribute(
                ids,
                baselines=torch.where(special, ids, tokenizer.mask_token_id),
                target=int(explanation.target[0, 1]),
            )
            np.testing.assert_allclose(explanation.attributions[0], theirs[0].numpy(), atol=1e-5)


# -- however attention is computed, and padding ---------------------------------------------------


@pytest.mark.parametrize("architecture", ["bert", "roberta", "modernbert", "llama"])
async def test_eager_attention_equals_sdpa(architecture: str) -> None:
    results = []
    for attention in ("sdpa", "eager"):
        kwargs = {"model_kwargs": {"attn_implementation": attention}, "packing": "off"}
        model = serve(tiny.folder(architecture, "sequence"), "text-classification", **kwargs)
        async with explaining(model) as explain:
            results.append(await explain(TEXTS, max_evals=20))
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one.attributions, other.attributions, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
async def test_a_tokenizer_that_pads_on_the_left_changes_nothing(architecture: str) -> None:
    results = []
    for side in ("right", "left"):
        model = serve(tiny.folder(architecture, "sequence"), "text-classification", packing="off")
        model.task.model.encoder.tokenizer.padding_side = side
        async with explaining(model) as explain:
            results.append(await explain(TEXTS, max_evals=20))
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one.attributions, other.attributions, atol=1e-5, rtol=1e-4)


# -- the traps -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "baseline"), [("roberta", "pad"), ("gpt2", "pad")])
async def test_a_padding_baseline_moves_neither_positions_nor_the_pooled_token(
    architecture: str, baseline: str
) -> None:
    """With the padding token's *id* RoBERTa would count other positions and GPT-2 pool another token."""
    async with explaining(classifier(architecture)) as explain:
        (explanation,) = await explain(TEXTS[1:2], baseline=baseline, max_evals=2000)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        tiny.folder(architecture, "sequence")
    ).eval()
    tokenizer = tiny.tokenizer_of(architecture)
    inputs = tokenizer(TEXTS[1], return_tensors="pt", return_special_tokens_mask=True)
    special = inputs.pop("special_tokens_mask").bool()
    embeddings = model.get_input_embeddings()
    padding = embeddings.weight[tokenizer.pad_token_id]
    hook = embeddings.register_forward_hook(
        lambda layer, args, output: torch.where(special[..., None], output, padding)
    )
    expected = model(**inputs).logits[0, explanation.target[0, 1]].item()
    hook.remove()
    assert explanation.baseline_score[0] == pytest.approx(expected, abs=1e-4)
    assert explanation.converged.all()
    with pytest.raises(InvalidRequest, match=r"expected mask: .* @ explain.baseline"):
        async with explaining(classifier(architecture)) as explain:
            await explain(TEXTS[:1], baseline=baseline, method="occlusion")


async def test_the_caller_may_be_in_inference_mode() -> None:
    with torch.inference_mode():
        async with explaining(classifier("bert")) as explain:
            (explanation,) = await explain(TEXTS[1:2])
    assert explanation.attributions.any()


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
async def test_what_the_model_cannot_see_gets_nothing(architecture: str) -> None:
    """A token classifier that reads from left to right: an entity knows nothing of those after it."""
    async with explaining(served(architecture, "token-classification", "token")) as explain:
        (explanation,) = await explain(TEXTS[1:2], max_evals=30)
    positions = explanation.target[:, 0].tolist()
    assert len(positions) > 1
    for attributions, start, after in zip(
        explanation.attributions, positions[:-1], positions[1:], strict=False
    ):
        assert attributions[: start + 1].any()
        assert not attributions[after:].any()


# -- every task ----------------------------------------------------------------------------------

MASKED = "the {mask} museum was {mask}"
TASKS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "text-classification": ("sequence", {"text": ["the museum"], "text_pair": ["was quiet"]}, {}, {}),
    "token-classification": ("token", {"inputs": [TEXTS[1], TEXTS[0]]}, {}, {}),
    "question-answering": (
        "qa",
        {"question": ["where is the museum?"], "context": ["the river museum was quiet when it opened"]},
        {},
        {},
    ),
    "zero-shot-classification": (
        "sequence",
        {"inputs": [TEXTS[1]]},
        {"candidate_labels": ["ship", "art", "sport"]},
        {},
    ),
    "fill-mask": ("mask", {"inputs": [MASKED]}, {}, {}),
    "text-ranking": ("sequence", {"query": ["museum"], "texts": [TEXTS[1], TEXTS[0]]}, {}, {}),
    "sentence-embedding": ("base", {"inputs": [TEXTS[1]]}, {}, {"target": "a quiet harbour"}),
}
CASES = [
    (architecture, task)
    for architecture in ("bert", "roberta", "modernbert", "deberta-v2", "llama")
    for task, (head, *_) in TASKS.items()
    if head in tiny.FAMILIES[architecture].heads
]


@pytest.mark.parametrize(("architecture", "task"), CASES)
async def test_every_task(architecture: str, task: str) -> None:
    head, inputs, parameters, options = TASKS[task]
    mask = tiny.tokenizer_of(architecture).mask_token
    filled = {name: [text.replace("{mask}", mask or "") for text in texts] for name, texts in inputs.items()}
    async with explaining(served(architecture, task, head)) as explain:
        assert explain.explainer.methods[1] == "integrated-gradients"
        by_method = {}
        for method in explain.explainer.methods:
            explanations = await explain(filled, parameters, method=method, max_evals=60, **options)
            for explanation in explanations:
                assert_sound(explanation)
                assert_offsets(explanation)
                assert explanation.evaluations <= 60
            by_method[method] = explanations[0]
    first = by_method["integrated-gradients"]
    for explanation in by_method.values():
        assert explanation.target_label == first.target_label
        assert explanation.attributions.any()
        np.testing.assert_allclose(explanation.score, first.score, atol=1e-4)


async def test_question_answering_explains_the_answer_that_is_given() -> None:
    model = served("bert", "question-answering", "qa")
    question, context = "where is the museum?", "the river museum was quiet when it opened"
    long = " ".join([context] * 12)
    for text, parameters in ((context, {}), (long, {"max_seq_len": 48, "doc_stride": 8})):
        inputs = {"question": [question], "context": [text]}
        async with explaining(model) as explain:
            (explanation,) = await explain(inputs, {**parameters, "align_to_words": False})
        parsed = model.task.signature.parse({**parameters, "align_to_words": False})
        given = model.task.postprocess(answer(model, inputs, **dict(parsed))[0], parsed)
        first, last = explanation.target[:, 0]
        assert explanation.offsets[first, 0] == given["start"]
        assert explanation.offsets[last, 1] == given["end"]
        assert explanation.texts == (question, text)
        assert explanation.target_label == ("start", "end")
        assert len(explanation.tokens) <= 48


async def test_token_types_of_a_pair_are_kept() -> None:
    model = classifier("bert")
    async with explaining(model) as explain:
        (explanation,) = await explain({"text": ["the museum"], "text_pair": ["was quiet"]})
    logits = answer(model, {"text": ["the museum"], "text_pair": ["was quiet"]})[0].outputs[0]["logits"]
    np.testing.assert_allclose(explanation.score, logits.max(), atol=1e-5)
    assert explanation.texts == ("the museum", "was quiet")
    assert set(explanation.sequence_ids.tolist()) == {-1, 0, 1}


async def test_an_entity_is_at_its_word() -> None:
    async with explaining(served("bert", "token-classification", "token")) as explain:
        (tokens,) = await explain(TEXTS[1:2], max_evals=4)
        (words,) = await explain(TEXTS[1:2], max_evals=4, level="word")
    assert len(tokens.target) > 0
    assert len(words.tokens) < len(tokens.tokens)
    for token, word in zip(tokens.target[:, 0], words.target[:, 0], strict=True):
        assert words.word_ids[word] == tokens.word_ids[token] >= 0


async def test_words_are_the_sums_of_their_tokens() -> None:
    async with explaining(classifier("bert")) as explain:
        for method in ("integrated-gradients", "permutation-shap", "occlusion"):
            (tokens,) = await explain(TEXTS[1:2], method=method)
            (words,) = await explain(TEXTS[1:2], method=method, level="word")
            assert words.tokens == ("[CLS]", *TEXTS[1].split(), "[SEP]")
            assert words.word_ids.tolist() == [-1, *range(9), -1]
            assert_sound(words)
            if method == "integrated-gradients":
                for word, attribution in zip(words.word_ids[1:-1], words.attributions[0, 1:-1], strict=True):
                    summed = tokens.attributions[0, tokens.word_ids == word].sum()
                    assert attribution == pytest.approx(summed, abs=1e-5)
            else:
                assert words.evaluations < tokens.evaluations  # words are absent as a whole


# Combining characters, emoji of several code points, other scripts, leading spaces.
SCRIPTS = (
    "  the harbour\tofi\u0302ce",
    "caf\u00e9 \U0001f469\u200d\U0001f680 museum",
    "\u4f60\u597d the <img onerror=x>",
)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "xlm-roberta", "modernbert", "gpt2", "llama"])
async def test_offsets_count_code_points(architecture: str) -> None:
    async with explaining(classifier(architecture)) as explain:
        for text, explanation in zip(SCRIPTS, await explain(SCRIPTS, max_evals=4), strict=True):
            assert explanation.texts == (text,)
            assert_offsets(explanation)
            covered = set()
            for start, end in explanation.offsets[explanation.sequence_ids >= 0].tolist():
                covered |= set(range(start, end))
            missed = {text[index] for index in set(range(len(text))) - covered}
            assert all(letter.isspace() or not letter.isalnum() for letter in missed)


# -- what cannot be ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "HAPPY"}, r"unknown target 'HAPPY', .* @ explain.target"),
        ({"target": 2}, r"unknown target 2, expected 0..1 @ explain.target"),
        ({"method": "occlusion", "baseline": "mean"}, r"got mean, expected mask: .* @ explain.baseline"),
    ],
)
async def test_refused(options: dict[str, Any], message: str) -> None:
    async with explaining(classifier("bert")) as explain:
        with pytest.raises(InvalidRequest, match=message):
            await explain(TEXTS[:1], **options)


async def test_a_target_may_be_named_by_label_or_id() -> None:
    async with explaining(classifier("bert")) as explain:
        for target in ("NEGATIVE", "negative", 0, "0"):
            (explanation,) = await explain(TEXTS[1:2], target=target, max_evals=4)
            assert explanation.target.tolist() == [[-1, 0]]
            assert explanation.target_label == ("NEGATIVE",)


async def test_a_text_of_special_tokens_only_is_refused() -> None:
    async with explaining(classifier("bert")) as explain:
        with pytest.raises(InvalidRequest, match="a text without tokens"):
            await explain([""])


async def test_similarity_needs_another_text() -> None:
    async with explaining(served("bert", "sentence-embedding", "base")) as explain:
        with pytest.raises(InvalidRequest, match=r"expected a text: .* @ explain.target"):
            await explain(TEXTS[:1])
        (same,) = await explain(TEXTS[1:2], target=TEXTS[1])
        assert same.score[0] == pytest.approx(1.0, abs=1e-5)


async def test_no_mask_token_no_mask() -> None:
    async with explaining(classifier("llama")) as explain:
        with pytest.raises(InvalidRequest, match=r"no such token, expected mean or zero @ explain.baseline"):
            await explain(TEXTS[:1], baseline="mask")


async def test_a_model_without_gradients_is_explained_without_them() -> None:
    """BART embeds a text twice, for its encoder and for its decoder."""
    async with explaining(classifier("bart")) as explain:
        assert explain.explainer.methods == ("auto", "occlusion", "permutation-shap")
        (explanation,) = await explain(TEXTS[1:2])
        assert explanation.method == "permutation-shap"
        assert_sound(explanation)
        with pytest.raises(
            InvalidRequest, match=r"cannot be explained by, expected one of .* @ explain.method"
        ):
            await explain(TEXTS[:1], method="integrated-gradients")


async def test_a_task_without_a_score_cannot_be_explained() -> None:
    async with explaining(served("bert", "feature-extraction", "base")) as explain:
        assert explain.explainer.methods == ()
        with pytest.raises(InvalidRequest, match="of feature-extraction there is nothing to explain"):
            await explain(TEXTS[:1])
