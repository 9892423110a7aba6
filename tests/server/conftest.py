"""Servers that many tests share, each started when a test first asks for it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests import tiny
from tests.server.grpc_client import GrpcClient
from tests.server.process import Model, Server
from tests.server.v2 import eventually, results_of, texts

LABELS_OF_VERSION = {"1": ("red", "green", "blue"), "2": ("cat", "dog")}
LIMITS = {"max_items": 4, "max_text_chars": 300, "max_body_bytes": 20_000}
SLOW: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
}
"""A model whose rows take a hundred times as long as a tiny model's."""
SLOW_TALKER: dict[str, Any] = {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "intermediate_size": 2048,
}
"""A model that takes some ten milliseconds per step."""
SLOW_TALKER_SETTINGS: dict[str, Any] = {
    "task": "text-generation",
    "batch_size": 2,
    "max_queue_rows": 2,
    "max_new_tokens": 120,
    "kv_cache_tokens": 200,
}
MEDIUM: dict[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 256,
}
"""A model that takes milliseconds: of many clients at once, some must share a batch."""
CROWDED_ROWS = 100
"""`max_queue_rows` of the model `crowded`."""
LONG = "the river museum was quiet when the harbour opened " * 5
"""A text of about a hundred tokens."""


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def sentiment_folder() -> Path:
    return tiny.folder("bert", "sequence")


@pytest.fixture(scope="session")
def slow_folder() -> Path:
    return tiny.folder("bert", "sequence", **SLOW)


@pytest.fixture(scope="session")
def servers(
    tmp_path_factory: pytest.TempPathFactory, sentiment_folder: Path, slow_folder: Path
) -> Iterator[Callable[[int], Server]]:
    """The shared server with so many parallel workers."""
    with ExitStack() as stack:

        @functools.cache
        def with_workers(count: int) -> Server:
            root = tmp_path_factory.mktemp(f"server-{count}")
            models = (
                all_models(sentiment_folder, slow_folder)
                if count == 0
                else few_models(sentiment_folder, slow_folder)
            )
            return stack.enter_context(Server(root, models, parallel_workers=count))

        yield with_workers


@pytest.fixture(scope="session")
def server(servers: Callable[[int], Server]) -> Server:
    """The shared server without parallel workers; it has every model."""
    return servers(0)


@pytest.fixture(params=[0, 2], ids=["no workers", "2 workers"])
def some_server(request: pytest.FixtureRequest, servers: Callable[[int], Server]) -> Server:
    """The shared servers, by turns."""
    return servers(request.param)


@pytest.fixture(scope="session")
def grpc_client(server: Server) -> Iterator[GrpcClient]:
    client = GrpcClient(server.grpc_url)
    yield client
    client.close()


@pytest.fixture
def fill_queue(server: Server) -> Iterator[Callable[[str], threading.Thread]]:
    """Sends a model a request of a hundred long texts and comes back when most of them wait.

    The thread ends when the request is answered; at the end all must be answered.
    """
    threads: list[threading.Thread] = []
    answers: list[httpx.Response] = []

    def fill(model: str) -> threading.Thread:
        inputs = texts(*[LONG] * CROWDED_ROWS)
        threads.append(threading.Thread(target=lambda: answers.append(server.infer(model, inputs))))
        threads[-1].start()
        assert eventually(lambda: server.metrics().value("hftasks_queue_rows", model) > CROWDED_ROWS / 2)
        return threads[-1]

    yield fill
    for thread in threads:
        thread.join()
    assert [len(results_of(response)) for response in answers] == [CROWDED_ROWS] * len(threads)


def few_models(sentiment: Path, slow: Path) -> dict[str, Model]:
    task = {"task": "text-classification"}
    return {
        "sentiment": Model(sentiment, task),
        "limited": Model(sentiment, {**task, **LIMITS}),
        "crowded": Model(slow, {**task, "batch_size": 16, "max_queue_rows": CROWDED_ROWS}),
        "narrow": Model(sentiment, {**task, "max_queue_rows": 3}),
        "talker": Model(tiny.folder("gpt2", "causal"), {"task": "text-generation"}),
        "windowed": Model(sentiment, task, top={"max_batch_size": 32, "max_batch_time": 1.0}),
        "versioned-1": Model(
            tiny.folder("bert", "sequence", LABELS_OF_VERSION["1"]), task, version="1", name="versioned"
        ),
        "versioned-2": Model(
            tiny.folder("bert", "sequence", LABELS_OF_VERSION["2"]), task, version="2", name="versioned"
        ),
    }


def all_models(sentiment: Path, slow: Path) -> dict[str, Model]:
    task = {"task": "text-classification"}
    return {
        **few_models(sentiment, slow),
        "three": Model(tiny.folder("bert", "sequence", ("one", "two", "three"), **MEDIUM), task),
        "padded": Model(sentiment, {**task, "packing": "off"}),
        "slow": Model(slow, {**task, "batch_size": 16}),
        "bulk": Model(slow, {**task, "warmup": False}),
        "hurried": Model(slow, {**task, "timeout_ms": 100, "warmup": False}),
        "zero-shot": Model(
            tiny.folder("bert", "sequence", ("contradiction", "neutral", "entailment"), **MEDIUM),
            {"task": "zero-shot-classification"},
        ),
        "mask": Model(tiny.folder("bert", "mask", **MEDIUM), {"task": "fill-mask"}),
        "tokens": Model(tiny.folder("bert", "token", **MEDIUM), {"task": "token-classification"}),
        "answers": Model(tiny.folder("bert", "qa", **MEDIUM), {"task": "question-answering"}),
        "features": Model(tiny.folder("bert", "base"), {"task": "feature-extraction"}),
        "embeddings": Model(tiny.folder("bert", "base"), {"task": "sentence-embedding"}),
        "chatter": Model(
            tiny.folder("llama", "causal"),
            {"task": "text-generation", "pretrained_tokenizer": str(tiny.chat_tokenizer("llama"))},
        ),
        "quantized-talker": Model(
            tiny.folder("llama", "causal"), {"task": "text-generation", "quantization": "int8-weight-only"}
        ),
        "slow-talker": Model(tiny.folder("llama", "causal", **SLOW_TALKER), SLOW_TALKER_SETTINGS),
        "ranking": Model(tiny.folder("bert", "sequence", ("relevance",)), {"task": "text-ranking"}),
    }
