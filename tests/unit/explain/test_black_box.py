"""Explaining a model on another server, which here counts words."""

from __future__ import annotations

import asyncio
import re
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import orjson
import pytest

from mlserver_hftasks.errors import (
    DeadlineExceeded,
    ForwardFailed,
    HFTasksError,
    InvalidRequest,
    InvalidSettings,
    Overloaded,
    RequestTooLarge,
    Unavailable,
)
from mlserver_hftasks.explain.allowed import check_uri, metadata_uri
from mlserver_hftasks.explain.black_box import BlackBoxExplainer
from mlserver_hftasks.explain.options import ExplainOptions
from mlserver_hftasks.explain.remote import BATCH_TEXTS, RemoteModel
from mlserver_hftasks.explain.result import Explanation
from mlserver_hftasks.explain.words import MAX_WORDS, Item
from mlserver_hftasks.tasks.base import ItemLimits
from mlserver_hftasks.tasks.signature import Parameters
from tests.answering import Answering, answering

TEXT = "The soup was great, but the waiter was rude!"
WEIGHTS = {"soup": 0.25, "great": 2.0, "rude": -3.0}
BIAS = 0.5


def score(text: str) -> float:
    return BIAS + sum(WEIGHTS.get(word, 0.0) for word in re.findall(r"\w+", text))


def texts_of(body: Any) -> list[str]:
    (tensor,) = (each for each in body["inputs"] if each["name"] == "array_inputs")
    return list(tensor["data"])


def by_label(body: Any) -> tuple[int, Any]:
    results = [
        [{"label": "GOOD", "score": score(text)}, {"label": "BAD", "score": -score(text)}]
        for text in texts_of(body)
    ]
    data = [orjson.dumps(result).decode() for result in results]
    return 200, {"outputs": [{"name": "output", "shape": [len(data), 1], "datatype": "BYTES", "data": data}]}


def by_number(body: Any) -> tuple[int, Any]:
    data = [value for text in texts_of(body) for value in (score(text), -score(text))]
    name = body.get("outputs", [{"name": "logits"}])[0]["name"]
    return 200, {"outputs": [{"name": name, "shape": [len(data) // 2, 2], "datatype": "FP32", "data": data}]}


@asynccontextmanager
async def explainer_of(
    respond: Callable[[Any], tuple[int, Any]] = by_label,
    *,
    mask: str = "",
    timeout_s: float = 30.0,
    **fields: Any,
) -> AsyncIterator[tuple[BlackBoxExplainer, Answering]]:
    with answering(respond=respond) as server:
        model = RemoteModel(f"{server.url}/v2/models/m/infer", timeout_s=timeout_s, **fields)
        explainer = BlackBoxExplainer(model, replacement=mask, limits=ItemLimits(8, 5000), max_waiting=16)
        try:
            yield explainer, server
        finally:
            await explainer.close()


async def explain(explainer: BlackBoxExplainer, *texts: Any, **options: Any) -> list[Explanation]:
    return await explainer.explain(
        {"inputs": texts}, Parameters(timeout_ms=None), ExplainOptions.read(options)
    )


def by_word(one: Explanation) -> dict[str, float]:
    return dict(zip(one.tokens, one.attributions[0].tolist(), strict=True))


@pytest.mark.parametrize("method", ["auto", "permutation-shap", "occlusion"])
@pytest.mark.parametrize("mask", ["", "[MASK]"])
async def test_words_get_what_they_weigh(method: str, mask: str) -> None:
    async with explainer_of(mask=mask) as (explainer, server):
        (one,) = await explain(explainer, TEXT, method=method, target="GOOD")
        (again,) = await explain(explainer, TEXT, method=method, target="GOOD")
    assert list(one.tokens) == re.findall(r"\w+|[^\w\s]", TEXT)
    assert by_word(one) == pytest.approx({word: WEIGHTS.get(word, 0.0) for word in one.tokens}, abs=1e-5)
    assert one.texts[0][slice(*one.offsets[3])] == "great"
    assert (one.target_label, one.target.tolist()) == (("GOOD",), [[-1, -1]])
    assert np.allclose(one.attributions.sum(axis=1), one.score - one.baseline_score + one.delta, atol=1e-5)
    assert (one.attributions == again.attributions).all()
    assert bool(one.converged[0])
    sent = [text for _, body in server.requests for text in texts_of(body)]
    assert len(sent) == 2 * len(set(sent))  # each text once per explanation
    assert any(mask in text for text in sent)


async def test_requests_are_batched() -> None:
    async with explainer_of() as (explainer, server):
        await explain(explainer, " ".join(f"word{n}" for n in range(100)), method="occlusion")
    sizes = [len(texts_of(body)) for _, body in server.requests]
    assert max(sizes) == BATCH_TEXTS
    assert sum(sizes) == 102
    assert len(sizes) == 5


async def test_numbers_in_place_of_labels() -> None:
    async with explainer_of(by_number) as (explainer, _):
        (one,) = await explain(explainer, TEXT)
    assert (one.target_label, one.target.tolist()) == (("1",), [[-1, 1]])
    async with explainer_of(by_number, output_name="odds") as (explainer, server):
        (one,) = await explain(explainer, TEXT, target=0)
        assert server.requests[0][1]["outputs"] == [{"name": "odds"}]
        assert len(server.requests[0][1]["inputs"]) == 1
    assert by_word(one)["great"] == pytest.approx(2.0, abs=1e-5)


@pytest.mark.parametrize(("label", "number"), [("7", 7), ("1" * 25, -1), ("²", -1), ("٣", -1)])
async def test_labels_that_are_numbers(label: str, number: int) -> None:
    def respond(body: Any) -> tuple[int, Any]:
        data = [orjson.dumps([{"label": label, "score": score(text)}]).decode() for text in texts_of(body)]
        return 200, {"outputs": [{"name": "output", "data": data}]}

    async with explainer_of(respond) as (explainer, _):
        (one,) = await explain(explainer, TEXT, method="occlusion")
    assert (one.target_label, one.target.tolist()) == ((label,), [[-1, number]])


async def test_texts_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    draw, model = np.random.default_rng(0), RemoteModel("http://127.0.0.1:1/v2/models/m/infer")

    async def scores(items: Sequence[Item], until: float | None = None) -> list[dict[str, float]]:
        return [{"GOOD": float(draw.random())} for _ in items]

    monkeypatch.setattr(model, "scores", scores)
    text = " ".join(f"{n:01000}" for n in range(60))
    tracemalloc.start()
    (one,) = await explain(BlackBoxExplainer(model), text)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    await model.close()
    assert one.evaluations * len(text) / 2 > 25e6 > 2 * peak


async def test_a_target_by_name() -> None:
    async with explainer_of() as (explainer, _):
        (one,) = await explain(explainer, TEXT)
        assert one.target_label == ("BAD",)  # what the model says
        (one,) = await explain(explainer, TEXT, target="GOOD")
        assert by_word(one)["rude"] == pytest.approx(-3.0, abs=1e-5)
        with pytest.raises(InvalidRequest, match="expected one of BAD, GOOD @ target"):
            await explain(explainer, TEXT, target="UGLY")


@pytest.mark.parametrize(
    ("text", "options", "reason"),
    [
        (TEXT, {"method": "integrated-gradients"}, "no gradients, expected one of auto, permutation-shap"),
        (TEXT, {"baseline": "mask"}, "infer_mask @ baseline"),
        (TEXT, {"per_token": True}, "expected false @ per_token"),
        ("  ", {}, f"0 words, expected 1..{MAX_WORDS} @ inputs[0]"),
        ("a " * (MAX_WORDS + 1), {}, f"{MAX_WORDS + 1} words"),
        (7, {}, "expected a text @ inputs[0]"),
        ("a" * 5001, {}, "5001 characters"),
    ],
)
async def test_what_is_wrong_is_told(text: Any, options: dict[str, Any], reason: str) -> None:
    async with explainer_of() as (explainer, server):
        with pytest.raises(InvalidRequest) as error:
            await explain(explainer, text, **options)
        assert not server.requests
    assert reason in str(error.value)
    assert isinstance(error.value, RequestTooLarge) == (text == "a" * 5001)


async def test_counts_are_bounded() -> None:
    async with explainer_of() as (explainer, _):
        with pytest.raises(InvalidRequest, match=r"9 texts, expected 1\.\.8"):
            await explain(explainer, *[TEXT] * 9)
        many = [asyncio.create_task(explain(explainer, *[TEXT] * 8)) for _ in range(3)]
        done = await asyncio.gather(*many, return_exceptions=True)
        assert [type(one) for one in done].count(Overloaded) == 1
        assert await explain(explainer, TEXT)  # the places are free again


async def test_a_deadline_gives_the_best_so_far() -> None:
    def slow(body: Any) -> tuple[int, Any]:
        time.sleep(0.1)
        return by_label(body)

    async with explainer_of(slow) as (explainer, _):
        started = time.monotonic()
        text = " ".join(f"word{n}" for n in range(200))
        (one,) = await explain(explainer, text, deadline_ms=450)
        assert time.monotonic() - started < 1.0
        assert not one.converged[0]
        assert np.isfinite(one.attributions).all()
        with pytest.raises(DeadlineExceeded):
            await explain(explainer, text, deadline_ms=20)


async def test_max_evals_is_kept() -> None:
    async with explainer_of() as (explainer, server):
        (one,) = await explain(explainer, TEXT, max_evals=8)
        assert sum(len(texts_of(body)) for _, body in server.requests) <= 8
    assert one.evaluations <= 8


@pytest.mark.parametrize(
    ("status", "answer", "kind"),
    [
        (400, {"error": "a text of 600 tokens"}, InvalidRequest),
        (413, {"error": "too large"}, InvalidRequest),
        (404, {"error": "no such model"}, Unavailable),
        (429, {"error": "full"}, Overloaded),
        (503, "down", Unavailable),
        (504, {}, DeadlineExceeded),
        (500, {"error": "broken"}, ForwardFailed),
        (307, {}, ForwardFailed),
        (200, {}, ForwardFailed),
        (200, [], ForwardFailed),
        (200, {"outputs": [{"name": "output", "data": ["{"]}]}, ForwardFailed),
        (200, {"outputs": [{"name": "output", "data": ['{"label": "A"}']}]}, ForwardFailed),
        (200, {"outputs": [{"name": "output", "data": []}]}, ForwardFailed),
        (200, {"outputs": [{"name": "output", "data": ["[]"]}]}, ForwardFailed),
        (200, {"outputs": [{"name": "logits", "shape": [1, 2], "data": [1.0]}]}, ForwardFailed),
        (200, {"outputs": [{"name": "logits", "shape": [1], "data": [1.0]}]}, ForwardFailed),
        (200, {"outputs": [{"name": "tokens", "shape": [1, 1], "data": [1.0]}]}, ForwardFailed),
    ],
)
async def test_what_the_other_server_answers_wrong(
    status: int, answer: Any, kind: type[HFTasksError]
) -> None:
    async with explainer_of(lambda body: (status, answer)) as (explainer, server):
        with pytest.raises(HFTasksError, match="@ infer_uri") as error:
            await explain(explainer, TEXT)
        assert type(error.value) is kind
        assert len(server.requests) == 1


async def test_a_label_that_comes_and_goes() -> None:
    def only_the_best(body: Any) -> tuple[int, Any]:
        data = [
            f'{{"label": "{"GOOD" if score(text) > 0 else "BAD"}", "score": 1}}' for text in texts_of(body)
        ]
        return 200, {"outputs": [{"name": "output", "data": data}]}

    async with explainer_of(only_the_best) as (explainer, _):
        with pytest.raises(ForwardFailed, match="no score of 'BAD' for a part of the text"):
            await explain(explainer, TEXT)


async def test_a_server_that_does_not_answer() -> None:
    def asleep(body: Any) -> tuple[int, Any]:
        time.sleep(0.5)
        return by_label(body)

    async with explainer_of(asleep, timeout_s=0.1) as (explainer, _):
        with pytest.raises(DeadlineExceeded, match=r"no answer within 0\.1 s"):
            await explain(explainer, TEXT)
    gone = BlackBoxExplainer(RemoteModel("http://127.0.0.1:1/v2/models/m/infer"))
    with pytest.raises(Unavailable, match="does not answer"):
        await explain(gone, TEXT)
    await gone.close()


# -- pairs and questions ---------------------------------------------------------------------------

PAIR = {"text": ["The soup was great"], "text_pair": ["the waiter was rude"]}
QUESTION = {"question": ["Who was rude today?"], "context": ["The waiter was rude, the soup was great."]}


def columns_of(body: Any, *names: str) -> list[tuple[str, ...]]:
    """The fields of the items, as tensors by their names or as objects."""
    tensors = {each["name"]: each for each in body["inputs"]}
    if set(names) <= tensors.keys():
        return list(zip(*(tensors[name]["data"] for name in names), strict=True))
    assert tensors["array_inputs"]["parameters"] == {"content_type": "hg_jsonlist"}
    items = [orjson.loads(each) for each in tensors["array_inputs"]["data"]]
    return [tuple(item[name] for name in names) for item in items]


def of_pairs(body: Any) -> tuple[int, Any]:
    """What the first text says counts, what the second does half."""
    pairs = columns_of(body, "text", "text_pair")
    assert all(text for pair in pairs for text in pair), "empty texts are refused"
    data = [
        orjson.dumps([{"label": "GOOD", "score": score(first) + score(second) / 2}]).decode()
        for first, second in pairs
    ]
    return 200, {"outputs": [{"name": "output", "data": data}]}


def of_questions(body: Any) -> tuple[int, Any]:
    """The waiter is the answer where the context has one, surer if it is asked for who was rude."""
    (top_k,) = (each["data"] for each in body["inputs"] if each["name"] == "top_k")
    assert top_k == ["20"]
    results = []
    for question, context in columns_of(body, "question", "context"):
        sure = 0.5 + 0.25 * ("Who" in question) + 0.125 * ("rude" in context)
        answers = [{"answer": "soup", "score": 0.01}]
        if "waiter" in context:
            answers += [{"answer": "waiter", "score": sure / 2}, {"answer": "waiter", "score": sure / 2}]
        results.append(answers)
    single = results[0] if len(results) == 1 else results
    data = [orjson.dumps(each).decode() for each in single]
    return 200, {"outputs": [{"name": "output", "data": data}]}


def metadata_of(*names: str) -> tuple[int, Any]:
    return 200, {"name": "m", "inputs": [{"name": name} for name in names]}


async def explained(
    respond: Callable[[Any], tuple[int, Any]],
    inputs: Any,
    metadata: tuple[int, Any] | None,
    **options: Any,
) -> tuple[Explanation, Answering]:
    with answering(respond=respond, metadata=metadata) as server:
        uri = f"{server.url}/v2/models/m"
        model = RemoteModel(f"{uri}/infer", metadata_uri=None if metadata is None else uri)
        explainer = BlackBoxExplainer(model)
        try:
            for _ in range(2):  # the metadata are asked for once, if there are any
                (one,) = await explainer.explain(
                    inputs, Parameters(timeout_ms=None), ExplainOptions.read(options)
                )
        finally:
            await explainer.close()
        assert set(server.gets) == (set() if metadata is None else {"/v2/models/m"})
        assert len(server.gets) <= 1 or metadata == (404, {})
        return one, server


@pytest.mark.parametrize(
    "metadata", [None, metadata_of("text", "text_pair"), metadata_of("args"), (404, {}), (200, []), (200, {})]
)
@pytest.mark.parametrize("inputs", [PAIR, {"inputs": [{name: texts[0] for name, texts in PAIR.items()}]}])
async def test_words_of_both_texts(metadata: Any, inputs: Any) -> None:
    one, server = await explained(of_pairs, inputs, metadata)
    assert one.texts == ("The soup was great", "the waiter was rude")
    assert one.sequence_ids.tolist() == [0] * 4 + [1] * 4
    assert one.word_ids.tolist() == [0, 1, 2, 3] * 2
    assert all(
        one.texts[text][start:end] == token
        for text, (start, end), token in zip(one.sequence_ids, one.offsets, one.tokens, strict=True)
    )
    expected = [0, 0.25, 0, 2.0, 0, 0, 0, -1.5]
    np.testing.assert_allclose(one.attributions[0], expected, atol=1e-5)
    names = {each["name"] for each in server.requests[0][1]["inputs"]}
    assert names == ({"array_inputs", "top_k"} if metadata == metadata_of("args") else {*PAIR, "top_k"})


async def test_words_of_a_question_and_its_context() -> None:
    for inputs in (QUESTION, {"inputs": [{name: texts[0] for name, texts in QUESTION.items()}]}):
        one, _ = await explained(of_questions, inputs, metadata_of("question", "context"), method="occlusion")
        assert (one.target_label, one.target.tolist()) == (("waiter",), [[-1, -1]])
        found = {
            (text, token): value
            for text, token, value in zip(
                one.sequence_ids.tolist(), one.tokens, one.attributions[0].tolist(), strict=True
            )
            if value
        }
        assert found == pytest.approx({(0, "Who"): 0.25, (1, "waiter"): 0.875, (1, "rude"): 0.125}, abs=1e-6)
        assert one.baseline_score[0] == 0
    other, _ = await explained(of_questions, QUESTION, None, target="soup", max_evals=20)
    assert other.score[0] == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ({}, "got nothing, expected inputs, or text and text_pair, or question and context @ inputs"),
        ({**PAIR, **QUESTION}, "expected inputs, or text and text_pair"),
        ({"inputs": [{"text": "a", "context": "b"}]}, "expected a text, text and text_pair, or question"),
        ({"text": ["a", "b"], "text_pair": ["c"]}, "got 1, expected 2 as in text @ text_pair"),
        ({"question": ["a"]}, "got 0, expected 1 as in question @ context"),
        ({"question": ["a"], "context": [7]}, "got int 7, expected a text @ question[0]"),
        ({"question": ["?"] * 9, "context": ["a"]}, "9 texts, expected 1..8"),
    ],
)
async def test_pairs_that_are_none(inputs: Any, reason: str) -> None:
    async with explainer_of() as (explainer, server):
        with pytest.raises(InvalidRequest) as error:
            await explainer.explain(inputs, Parameters(timeout_ms=None), ExplainOptions.read({}))
        assert not server.requests
    assert reason in str(error.value)


async def test_an_answer_that_is_a_year_is_no_label() -> None:
    def respond(body: Any) -> tuple[int, Any]:
        found = [
            {"answer": "1912", "score": 0.5 * ("1912" in context)}
            for _, context in columns_of(body, "question", "context")
        ]
        return 200, {"outputs": [{"name": "output", "data": [orjson.dumps(each).decode() for each in found]}]}

    asked = {"question": ["When did it open?"], "context": ["In 1912 it did."]}
    one, _ = await explained(respond, asked, None, method="occlusion")
    assert (one.target_label, one.target.tolist()) == (("1912",), [[-1, -1]])


async def test_metadata_are_asked_for_again_after_a_failure() -> None:
    metadata = [(503, {}), (429, {}), metadata_of("args")]
    with answering(respond=of_pairs, metadata=metadata[0]) as server:
        uri = f"{server.url}/v2/models/m"
        model = RemoteModel(f"{uri}/infer", metadata_uri=uri)
        for server.metadata in [*metadata, (500, {})]:
            await model.scores([Item(("text", "text_pair"), ("a", "b"))])
        await model.close()
    assert len(server.gets) == len(metadata)
    names = [{each["name"] for each in body["inputs"]} - {"top_k"} for _, body in server.requests]
    assert names == [set(PAIR), set(PAIR), {"array_inputs"}, {"array_inputs"}]


async def test_one_context_for_all_questions() -> None:
    async with explainer_of(of_questions) as (explainer, _):
        asked = {"question": ["Who was rude?", "What was great?"], "context": QUESTION["context"]}
        both = await explainer.explain(
            asked, Parameters(timeout_ms=None), ExplainOptions.read({"max_evals": 9})
        )
    assert [one.texts[1] for one in both] == QUESTION["context"] * 2


# -- which servers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "allowed"),
    [
        ("http://127.0.0.1:8080/v2/models/m/infer", ""),
        ("http://localhost/v2/models/m/infer", ""),
        ("http://[::1]:8080/v2/models/m/infer", ""),
        ("https://models.example/v2/models/m/infer", "https://models.example"),
        ("https://models.example/v2/models/m/infer", "http://other, https://models.example:443/v2/"),
    ],
)
def test_what_is_allowed(uri: str, allowed: str) -> None:
    assert check_uri(uri, {"HFTASKS_INFER_URIS": allowed}) == uri


@pytest.mark.parametrize(
    ("uri", "allowed"),
    [
        ("http://models.example/v2/models/m/infer", ""),
        ("http://169.254.169.254/latest", ""),
        ("http://127.0.0.1.example/v2", ""),
        ("http://127.0.0.1:8080/v2", "http://models.example"),
        ("http://models.example/v2", "https://models.example"),
        ("http://models.example:81/v2", "http://models.example"),
        ("http://models.example.org/v2", "http://models.example"),
        ("http://models.example/v2x/infer", "http://models.example/v2"),
        ("http://models.example/v2/../admin", "http://models.example/v2"),
        ("http://user@localhost/v2", ""),
        ("http://localhost/v2?x=1", ""),
        ("file:///etc/passwd", ""),
        ("ftp://localhost/v2", ""),
        ("http://localhost:99999/v2", ""),
        ("http://[::1/v2", ""),
        ("localhost/v2", ""),
        ("", ""),
    ],
)
def test_what_is_not_allowed(uri: str, allowed: str) -> None:
    with pytest.raises(InvalidSettings, match=r"@ parameters\.extra\.infer_uri"):
        check_uri(uri, {"HFTASKS_INFER_URIS": allowed})


def test_metadata_are_asked_for_where_that_is_allowed_too() -> None:
    uri = "http://models.example/v2/models/m/infer"
    assert metadata_uri(uri, {"HFTASKS_INFER_URIS": "http://models.example"}) == uri.removesuffix("/infer")
    assert metadata_uri(uri, {"HFTASKS_INFER_URIS": uri}) is None
    assert metadata_uri("http://localhost/predict", {}) is None
