"""The explainer among predictions and other clients: bounds, deadlines, isolation, making way."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from mlserver_hftasks.backends.gradients import PathBackend, PathRow
from mlserver_hftasks.errors import (
    DeadlineExceeded,
    ForwardFailed,
    InvalidRequest,
    Overloaded,
    RequestTooLarge,
)
from mlserver_hftasks.explain import engines as engines_module
from mlserver_hftasks.explain.explainer import ExplainLimits
from mlserver_hftasks.loading import Served
from tests import tiny
from tests.explaining import explaining
from tests.harness import answer, serve

TEXT = "the river museum was quiet when the harbour opened"
MEDIUM = {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 512}
PATIENCE_S = 20.0


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def served() -> Served:
    """Not shared: some tests change what its gradients do."""
    return serve(tiny.folder("bert", "sequence"), "text-classification")


@pytest.fixture
def slow() -> Served:
    return serve(tiny.folder("bert", "sequence", **MEDIUM), "text-classification")


class HeldUp:
    """Holds the gradients of a model up between two layers until they are let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.gate = threading.Event(), threading.Event()
        forward = PathBackend.forward

        def held(backend: PathBackend, rows: Any) -> Any:
            self.entered.set()
            assert self.gate.wait(PATIENCE_S)
            return forward(backend, rows)

        monkeypatch.setattr(PathBackend, "forward", held)


# -- bounds --------------------------------------------------------------------------------------


async def test_a_full_queue_refuses_at_once(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    async with explaining(served, limits=ExplainLimits(4)) as explain:
        held = HeldUp(monkeypatch)
        waiting = asyncio.create_task(explain([TEXT] * 3))
        assert await asyncio.to_thread(held.entered.wait, PATIENCE_S)
        began = time.monotonic()
        with pytest.raises(Overloaded, match=r"3 texts wait .* brings 2, .* @ max_queue_explanations"):
            await explain([TEXT] * 2)
        assert time.monotonic() - began < 1
        with pytest.raises(RequestTooLarge, match="5 items to explain, expected at most 4"):
            await explain([TEXT] * 5)
        held.gate.set()
        assert len(await waiting) == 3
        assert len(await explain([TEXT] * 4)) == 4  # the room is given back


async def test_a_client_that_goes_away_gives_its_room_back(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with explaining(served, limits=ExplainLimits(2)) as explain:
        held = HeldUp(monkeypatch)
        gone = asyncio.create_task(explain([TEXT] * 2))
        assert await asyncio.to_thread(held.entered.wait, PATIENCE_S)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        held.gate.set()
        assert len(await explain([TEXT] * 2)) == 2


# -- time ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["integrated-gradients", "integrated-gradients-fixed", "permutation-shap"])
async def test_a_deadline_ends_with_what_there_is(slow: Served, method: str) -> None:
    texts, seconds = [" ".join([TEXT] * 3)] * 4, 1.0
    options = {"method": method, "tolerance": 1e-6, "max_evals": 500, "deadline_ms": 1000 * seconds}
    async with explaining(slow) as explain:
        await explain(texts[:1], max_evals=4)  # warm
        began = time.monotonic()
        explanations = await explain(texts, **options)
        assert time.monotonic() - began < seconds + 0.5
        for explanation in explanations:
            assert not explanation.converged.any()
            assert 2 <= explanation.evaluations < 500
            right = explanation.score - explanation.baseline_score + explanation.delta
            np.testing.assert_allclose(explanation.attributions.sum(axis=1), right, atol=1e-4)
            assert explanation.attributions.any()


async def test_a_deadline_before_any_estimate(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    async with explaining(served) as explain:
        held = HeldUp(monkeypatch)
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded, match="before the first estimate"):
            await explain([TEXT], deadline_ms=100)
        assert time.monotonic() - began < 5
        held.gate.set()
        assert (await explain([TEXT]))[0].converged.all()


# -- other clients -------------------------------------------------------------------------------


async def test_options_never_cross_clients(served: Served) -> None:
    asked: list[dict[str, Any]] = [
        {},
        {"target": "NEGATIVE"},
        {"target": "POSITIVE", "method": "integrated-gradients-fixed", "max_evals": 12},
        {"baseline": "zero", "max_evals": 9},
        {"method": "occlusion", "level": "word"},
        {"method": "permutation-shap", "max_evals": 30},
        {"tolerance": 0.001, "level": "word"},
    ]
    async with explaining(served) as explain:
        alone = [(await explain([TEXT], **options))[0] for options in asked]
        together = await asyncio.gather(*(explain([TEXT], **options) for options in asked * 3))
    for expected, (got,) in zip(alone * 3, together, strict=True):
        assert got.tokens == expected.tokens
        assert got.target_label == expected.target_label
        assert (got.method, got.baseline) == (expected.method, expected.baseline)
        assert got.evaluations == expected.evaluations
        np.testing.assert_allclose(got.attributions, expected.attributions, atol=1e-5)


async def test_one_item_that_fails_fails_its_request_only(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison = served.task.model.encoder.tokenizer("ship", add_special_tokens=False)["input_ids"][0]
    points = PathBackend._points

    def poisoned(backend: PathBackend, rows: Any) -> Any:
        if any(poison in row.arrays["input_ids"] for row in rows):
            raise ValueError("poison")
        return points(backend, rows)

    async with explaining(served) as explain:
        monkeypatch.setattr(PathBackend, "_points", poisoned)
        good, bad = await asyncio.gather(
            explain([TEXT] * 3), explain(["a ship", TEXT]), return_exceptions=True
        )
        assert isinstance(bad, ForwardFailed)
        assert isinstance(good, list)
        assert all(explanation.converged.all() for explanation in good)


# -- predictions ---------------------------------------------------------------------------------


def test_predictions_stay_the_same_bit_for_bit(served: Served) -> None:
    """captum's hooks on a model that serves made a third of concurrent predictions wrong."""
    paths = served.backend.gradients()  # type: ignore[attr-defined]
    rows = [item.example.rows[0] for item in answer(served, {"inputs": [TEXT, "a ship", "Who opened it?"]})]
    ways = [
        PathRow(
            row.arrays, alpha=0.4, kept=np.zeros(row.cost, dtype=np.bool_), score=lambda out: out["logits"]
        )
        for row in rows
    ]
    predicted, explained = served.backend.forward(rows), paths.forward(ways)
    wrong: list[int] = []

    def explain_on() -> None:
        while len(wrong) < 40:
            again = paths.forward(ways)
            same = [np.array_equal(a[n], b[n]) for a, b in zip(again, explained, strict=True) for n in a]
            wrong.append(len(same) - sum(same))

    thread = threading.Thread(target=explain_on)
    thread.start()
    count = 0
    while thread.is_alive():
        for got, expected in zip(served.backend.forward(rows), predicted, strict=True):
            assert np.array_equal(got["logits"], expected["logits"])
        count += 1
    assert count > 20
    assert not any(wrong)


async def test_predictions_among_explanations(served: Served) -> None:
    rows = [item.example.rows[0] for item in answer(served, {"inputs": [TEXT, "a ship", "Who opened it?"]})]
    async with explaining(served) as explain:
        expected = [(await explain.batcher.run([row]))[0]["logits"] for row in rows]
        explanations = [asyncio.create_task(explain([TEXT] * 4, tolerance=0.02)) for _ in range(3)]
        explanations += [asyncio.create_task(explain([TEXT], method="permutation-shap"))]
        while not all(task.done() for task in explanations):
            for row, logits in zip(rows, expected, strict=True):
                (got,) = await explain.batcher.run([row])
                np.testing.assert_allclose(got["logits"], logits, atol=1e-5)
        for task in explanations[:3]:
            assert all(explanation.converged.all() for explanation in await task)


def test_the_clone_shares_the_weights(served: Served) -> None:
    paths = served.backend.gradients()  # type: ignore[attr-defined]
    assert isinstance(paths, PathBackend)
    own = dict(served.backend._model.named_parameters())  # type: ignore[attr-defined]
    cloned = dict(paths._clone._model.named_parameters())
    assert own.keys() == cloned.keys()
    assert all(own[name] is cloned[name] for name in own)
    assert not any(weight.requires_grad for weight in own.values())
    assert served.backend.gradients() is paths  # type: ignore[attr-defined]


async def test_gradients_crawl_while_predictions_run(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    pause_s, gate, entered, forward = 0.05, threading.Event(), threading.Event(), served.backend.forward

    def held(rows: Any) -> Any:
        entered.set()
        assert gate.wait(PATIENCE_S)
        return forward(rows)

    monkeypatch.setattr(engines_module, "MAX_PAUSE_S", pause_s)
    row = answer(served, {"inputs": [TEXT]})[0].example.rows[0]
    way = PathRow(row.arrays, kept=np.zeros(row.cost, dtype=np.bool_), score=lambda out: out["logits"][:1])
    async with explaining(served) as explain:
        paths = served.backend.gradients()  # type: ignore[attr-defined]
        monkeypatch.setattr(served.backend, "forward", held)
        prediction = asyncio.create_task(explain.batcher.run([row]))
        assert await asyncio.to_thread(entered.wait, PATIENCE_S)
        began = time.monotonic()
        await asyncio.to_thread(paths.forward, [way])
        least = 4  # there are many more places to stop at
        assert time.monotonic() - began >= least * pause_s
        gate.set()
        await prediction
        assert await asyncio.to_thread(explain.batcher.wait_until_idle, PATIENCE_S)
        began = time.monotonic()
        for _ in range(5):
            await asyncio.to_thread(paths.forward, [way])
        assert time.monotonic() - began < 5 * least * pause_s


def test_the_pause_is_called_after_each_product(served: Served) -> None:
    paths = served.backend.gradients()  # type: ignore[attr-defined]
    assert paths is not None
    calls: list[int] = []
    paths.pause = lambda: calls.append(1)
    row = answer(served, {"inputs": [TEXT]})[0].example.rows[0]
    kept = np.zeros(row.cost, dtype=np.bool_)
    paths.forward([PathRow(row.arrays, kept=kept, score=lambda outputs: outputs["logits"])])
    # Per layer query, key, value, their output, and two of the feed-forward, but neither key nor value in the
    # last, of which the first token is read; at the end the pooler.
    products, passes_back = 2 * 6 - 2 + 1, 2
    assert len(calls) == products + products * passes_back


async def test_the_background_waits_for_predictions(served: Served) -> None:
    order: list[str] = []
    entered, gate, forward = threading.Event(), threading.Event(), served.backend.forward

    class Watched:
        description, padded = served.backend.description, served.backend.padded

        def forward(self, rows: Any) -> Any:
            order.append("first" if not order else "background" if rows[0].cost > 5 else "prediction")
            entered.set()
            assert gate.wait(PATIENCE_S)
            return forward(rows)

        def close(self) -> None:
            """Nothing to close."""

    long, short = (answer(served, {"inputs": [text]})[0].example.rows[0] for text in (TEXT, "the"))
    watched = Served(served.task, Watched())
    async with explaining(watched) as explain:
        tasks = [asyncio.create_task(explain.batcher.run([short]))]
        assert await asyncio.to_thread(entered.wait, PATIENCE_S)
        tasks += [asyncio.create_task(explain.batcher.run([long], background=True)) for _ in range(3)]
        await asyncio.sleep(0)
        tasks += [asyncio.create_task(explain.batcher.run([short])) for _ in range(3)]
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(*tasks)
    assert order[:2] == ["first", "prediction"]
    assert set(order[2:]) == {"background"}


async def test_a_model_that_only_forwards_is_explained_by_masking(served: Served) -> None:
    class NoGradients:
        description, padded = served.backend.description, served.backend.padded
        forward, close = served.backend.forward, served.backend.close

    async with explaining(Served(served.task, NoGradients())) as explain:  # type: ignore[arg-type]
        (explanation,) = await explain([TEXT])
        assert explanation.method == "permutation-shap"
        assert abs(explanation.delta[0]) < 1e-4
        with pytest.raises(InvalidRequest, match="cannot be explained by"):
            await explain([TEXT], method="input-x-gradient")


def test_embeddings_that_are_asked_for_twice_are_noticed(served: Served) -> None:
    embeddings = served.backend._model.bert.embeddings  # type: ignore[attr-defined]
    embeddings.register_forward_pre_hook(_embed_once_more)
    assert PathBackend.of(served.backend) is None  # type: ignore[arg-type]


def _embed_once_more(embeddings: Any, inputs: Any) -> None:
    embeddings.word_embeddings(torch.tensor([[1]]))
