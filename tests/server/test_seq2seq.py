"""Encoders with a decoder behind a real server: many clients, their own parameters, deadlines."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests import tiny
from tests.server.grpc_client import GrpcClient
from tests.server.process import Model, Server
from tests.server.v2 import at_once, tensor, texts

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "seq2seq.json").read_text(encoding="utf-8"))
MODELS = {
    "summaries": Model(GOLDEN / "s2s_bart", {"task": "summarization", "max_new_tokens": 400}),
    "translations": Model(GOLDEN / "s2s_t5", {"task": "translation", "task_suffix": "_en_to_fr"}),
    "languages": Model(GOLDEN / "s2s_mbart", {"task": "translation"}),
}
LARGE = {"d_model": 256, "decoder_layers": 6, "decoder_ffn_dim": 1024, "max_position_embeddings": 2048}
"""A decoder that takes some milliseconds per step, and never ends before the limit in these tests."""
SERVED = {
    ("s2s_bart", "summarization"): "summaries",
    ("s2s_t5", "translation_en_to_fr"): "translations",
    ("s2s_mbart", "translation"): "languages",
}
SIMPLE = {"num_beams", "max_length", "min_length", "max_new_tokens", "src_lang", "tgt_lang", "return_tensors"}


@pytest.fixture(scope="module")
def seq2seq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    slow = Model(
        tiny.folder("bart", "seq2seq", **LARGE), {"task": "text2text-generation", "max_new_tokens": 2000}
    )
    with Server(tmp_path_factory.mktemp("seq2seq"), {**MODELS, "slow": slow}) as server:
        yield server


@pytest.fixture(scope="module")
def over_grpc(seq2seq: Server) -> Iterator[GrpcClient]:
    client = GrpcClient(seq2seq.grpc_url)
    yield client
    client.close()


def chosen() -> list[tuple[str, dict[str, Any]]]:
    """Golden cases with parameters that differ, by the model that serves them."""
    found = [
        (SERVED[case["model"], case["task"]], case)
        for case in CASES
        if (case["model"], case["task"]) in SERVED and set(case["parameters"]) <= SIMPLE
    ]
    return found[::2]


def request_of(case: dict[str, Any]) -> list[dict[str, Any]]:
    inputs = case["inputs"]
    return [tensor("args", [inputs])] if isinstance(inputs, str) else texts(*inputs)


def test_clients_at_once_get_what_each_would_get_alone(seq2seq: Server, over_grpc: GrpcClient) -> None:
    """Equal parameters share a batch, others do not; nobody's answer hangs on it, by either protocol."""
    cases = chosen()
    assert len(cases) > 20

    def ask(client: Any, model: str, case: dict[str, Any]) -> Any:
        return client.results(model, request_of(case), **case["parameters"])

    clients = itertools.cycle([seq2seq, over_grpc])
    calls = [partial(ask, client, *case) for client, case in zip(clients, cases * 2, strict=False)]
    expected = [case["expected"] for _, case in cases * 2]
    assert at_once(calls) == expected
    metrics = seq2seq.metrics()
    rows = sum(metrics.value("hftasks_batch_rows_sum", model) for model in MODELS)
    batches = sum(metrics.value("hftasks_batch_rows_count", model) for model in MODELS)
    assert rows > 1.2 * batches, "no two clients shared a batch"


def test_what_the_response_says_of_its_answer(seq2seq: Server, over_grpc: GrpcClient) -> None:
    body = seq2seq.infer("summaries", texts("The harbour was quiet."), max_length=12).json()
    assert body["parameters"] == {"finish_reason": "eos", "prompt_tokens": 12, "generated_tokens": 11}
    answer = over_grpc.infer("summaries", texts("The harbour was quiet."), max_length=12)
    assert answer.parameters["finish_reason"].string_param == "eos"
    assert answer.parameters["generated_tokens"].int64_param == 11


def test_typed_outputs(seq2seq: Server) -> None:
    names = ["translation_text", "token_ids", "generated_tokens", "finish_reason", "logprobs"]
    body = seq2seq.infer(
        "translations", texts("a", "The harbour was quiet."), outputs=names, logprobs=True, max_length=6
    ).json()
    found = {output["name"]: output for output in body["outputs"]}
    assert list(found) == names
    assert found["translation_text"]["shape"] == [2, 1]
    assert found["finish_reason"]["data"] == ["length", "length"]
    assert found["generated_tokens"]["data"] == [5, 5]
    assert found["token_ids"]["shape"] == found["logprobs"]["shape"] == [2, 1, 5]
    assert all(value < 0 for value in found["logprobs"]["data"])


@pytest.mark.parametrize(
    ("model", "parameters", "message"),
    [
        ("languages", {"src_lang": "en_XX", "tgt_lang": "klingon"}, "unknown language 'klingon'"),
        ("languages", {}, "no language, expected a code such as"),
        ("translations", {"max_new_tokens": 100_000}, "expected 1..1024 @ max_new_tokens"),
        ("translations", {"custom_generate": "someone/else"}, "unknown input or parameter"),
        ("summaries", {"num_return_sequences": 9}, "@ num_return_sequences"),
    ],
)
def test_bad_requests(
    seq2seq: Server, over_grpc: GrpcClient, model: str, parameters: dict[str, Any], message: str
) -> None:
    response = seq2seq.infer(model, texts("hello"), **parameters)
    assert response.status_code == 400
    assert message in response.json()["error"]
    error = over_grpc.error(model, texts("hello"), **parameters)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert message in error.details()


def test_a_generation_past_its_deadline_returns_what_it_has(seq2seq: Server) -> None:
    response = seq2seq.infer(
        "slow", texts("The harbour was quiet."), timeout_ms=1000, max_new_tokens=2000, min_new_tokens=2000
    )
    assert response.status_code == 200, response.text
    said = response.json()["parameters"]
    assert said["finish_reason"] == "timeout"
    assert 1 <= said["generated_tokens"] < 2000
