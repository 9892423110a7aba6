"""What went wrong in mlserver_huggingface when clients met in a batch, or were not to be trusted."""

from __future__ import annotations

import itertools
import json
import random
import socket
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import grpc
import pytest

from tests.server.conftest import CROWDED_ROWS, LONG
from tests.server.grpc_client import GrpcClient, request
from tests.server.process import Server
from tests.server.v2 import assert_same, at_once, eventually, infer_path, tensor, texts

Request = tuple[list[dict[str, Any]], dict[str, Any]]
"""Inputs and request parameters."""

SENTENCES = [
    "I loved this film, every single minute of it was a joy.",
    "This is terrible!",
    "Two ferries left for Morrow at 6:45.",
    "Anna Keller opened the shutters of the river museum.",
    "My name is Clara, and I live in Berlin.",
    "The screen broke after two days and nobody answered my letter.",
]
MASKED = [
    "I [MASK] this film.",
    "This is [MASK]!",
    "The screen broke after [MASK] days and nobody answered my letter.",
]


def zero_shot_requests() -> list[Request]:
    labels = [
        ["good", "bad"],
        ["ship", "museum", "letter"],
        ["name", "film", "city", "screen", "river"],
        ["joy"],
    ]
    chosen = zip(SENTENCES, itertools.cycle(labels), strict=False)
    alone: list[Request] = [([*texts(text), tensor("candidate_labels", names)], {}) for text, names in chosen]
    return [
        *alone,
        ([*texts(*SENTENCES[:2]), tensor("candidate_labels", labels[1])], {"multi_label": True}),
        ([*texts(SENTENCES[0]), tensor("candidate_labels", labels[0])], {"hypothesis_template": "It is {}."}),
    ]


def text_requests(inputs: Sequence[str], **choices: Sequence[Any]) -> list[Request]:
    """A request for each text, the choices of the parameters by turns."""
    turns = {name: itertools.cycle(values) for name, values in choices.items()}
    return [(texts(text), {name: next(values) for name, values in turns.items()}) for text in inputs]


def question_requests() -> list[Request]:
    asked = [
        (f"what is {thing}?", text)
        for thing, text in zip(("it", "there", "my name"), SENTENCES, strict=False)
    ]
    return [
        ([tensor("question", [question]), tensor("context", [context])], parameters)
        for question, context in asked
        for parameters in ({}, {"top_k": 3}, {"max_answer_len": 2, "top_k": 2})
    ]


MIXTURES: dict[str, list[Request]] = {
    "three": text_requests(
        SENTENCES * 2, top_k=[1, 2, 3, None, 2], function_to_apply=["softmax", "sigmoid", "none", "softmax"]
    ),
    "zero-shot": zero_shot_requests(),
    "mask": [
        *text_requests(MASKED * 3, top_k=[1, 7, 5, 2]),
        ([*texts(MASKED[0]), tensor("targets", ["i", "the"])], {}),
    ],
    "tokens": text_requests(
        SENTENCES * 2, aggregation_strategy=["none", "simple", "first", "max", "average"]
    ),
    "answers": question_requests(),
}
"""For each model the requests of clients who want different things of it at once."""


@pytest.mark.parametrize("model", MIXTURES)
def test_clients_at_once_get_each_his_own(server: Server, grpc_client: GrpcClient, model: str) -> None:
    requests = MIXTURES[model]
    expected = [server.results(model, inputs, **parameters) for inputs, parameters in requests]
    assert len({json.dumps(results) for results in expected}) > len(requests) / 2, (
        "answers that tell clients apart"
    )
    order = [*range(len(requests))] * 4
    random.Random(0).shuffle(order)
    before = server.metrics()

    def ask(position: int) -> list[Any]:
        inputs, parameters = requests[order[position]]
        client = grpc_client if position % 2 and None not in parameters.values() else server
        return client.results(model, inputs, **parameters)

    answers = at_once([partial(ask, position) for position in range(len(order))], threads=24)
    for answer, number in zip(answers, order, strict=True):
        assert_same(answer, expected[number])
    after = server.metrics()
    batches, rows = (
        after.value(name, model) - before.value(name, model)
        for name in ("hftasks_batch_rows_count", "hftasks_batch_rows_sum")
    )
    assert batches < rows, "clients shared batches, or the test shows nothing"


def test_zero_shot_texts_and_labels_stay_with_their_client(server: Server) -> None:
    def ask(number: int) -> None:
        labels = [f"label {number} {index}" for index in range(2 + number % 3)]
        text = f"{SENTENCES[number % 6]} number {number}"
        (result,) = server.results("zero-shot", [*texts(text), tensor("candidate_labels", labels)])
        assert result["sequence"] == text
        assert sorted(result["labels"]) == labels
        assert sum(result["scores"]) == pytest.approx(1, abs=1e-4)

    at_once([partial(ask, number) for number in range(24)])


def test_scalars_of_two_clients(server: Server) -> None:
    expected = [server.results("three", texts(text, name="args")) for text in SENTENCES]
    answers = at_once([partial(server.results, "three", texts(text, name="args")) for text in SENTENCES * 4])
    for answer, want in zip(answers, expected * 4, strict=True):
        assert_same(answer, want)


@pytest.mark.parametrize(
    "model", ["three", "tokens", "features", "embeddings", "zero-shot", "mask", "answers"]
)
def test_batch_equals_single(server: Server, model: str) -> None:
    inputs = [*SENTENCES, LONG] if model != "mask" else MASKED
    if model == "answers":
        asked = [tensor("question", ["what is it?"] * len(inputs)), tensor("context", inputs)]
        single = [[tensor("question", ["what is it?"]), tensor("context", [text])] for text in inputs]
    else:
        more = [tensor("candidate_labels", ["good", "bad", "odd"])] if model == "zero-shot" else []
        asked, single = [*texts(*inputs), *more], [[*texts(text), *more] for text in inputs]
    together = server.results(model, asked)
    alone = [server.results(model, one) for one in single]
    assert len(together) == len(inputs)
    assert_same(together, alone if model == "mask" else [results[0] for results in alone])


def test_ranking_of_a_text_does_not_depend_on_the_others(server: Server) -> None:
    query = tensor("query", ["the museum"])
    together = server.results("ranking", [query, tensor("texts", SENTENCES)])
    by_index = {result["index"]: result["score"] for result in together}
    for index, text in enumerate(SENTENCES):
        (alone,) = server.results("ranking", [query, tensor("texts", [text])])
        assert alone["score"] == pytest.approx(by_index[index], abs=1e-5)


def test_a_bad_parameter_fails_its_client_only(server: Server) -> None:
    labels = tensor("candidate_labels", ["good", "bad"])
    expected = server.results("zero-shot", [*texts(SENTENCES[0]), labels])

    def ask(number: int) -> Any:
        if number % 4 == 1:
            bad: dict[str, Any] = {"hypothesis_template": "no place"}
            return server.infer("zero-shot", [*texts(SENTENCES[0]), labels], **bad).status_code
        return server.results("zero-shot", [*texts(SENTENCES[0]), labels])

    for number, answer in enumerate(at_once([partial(ask, number) for number in range(24)])):
        if number % 4 == 1:
            assert answer == 400
        else:
            assert_same(answer, expected)


# -- clients that leave -----------------------------------------------------------------------------

LEAVERS_ROWS = 300


def rows_run(server: Server) -> float:
    return server.metrics().value("hftasks_batch_rows_sum", "slow")


def cancels(grpc_client: GrpcClient, server: Server) -> None:
    call = grpc_client.stub.ModelInfer.future(request("slow", texts(*[LONG] * LEAVERS_ROWS)), timeout=60)
    time.sleep(0.2)
    assert call.cancel()


def runs_out_of_patience(grpc_client: GrpcClient, server: Server) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        grpc_client.stub.ModelInfer(request("slow", texts(*[LONG] * LEAVERS_ROWS)), timeout=0.2)
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def hangs_up(grpc_client: GrpcClient, server: Server) -> None:
    leaver = GrpcClient(server.grpc_url)
    call = leaver.stub.ModelInfer.future(request("slow", texts(*[LONG] * LEAVERS_ROWS)))
    time.sleep(0.2)
    leaver.close()
    with pytest.raises(grpc.RpcError):
        call.result()


@pytest.mark.parametrize("leave", [cancels, runs_out_of_patience, hangs_up])
def test_a_client_that_leaves_takes_its_rows_along(
    server: Server,
    grpc_client: GrpcClient,
    fill_queue: Callable[[str], threading.Thread],
    leave: Callable[[GrpcClient, Server], None],
) -> None:
    before = rows_run(server)
    filled = fill_queue("slow")
    mates = [threading.Thread(target=lambda: server.results("slow", texts(*SENTENCES))) for _ in range(3)]
    for mate in mates:
        mate.start()
    leave(grpc_client, server)
    for thread in (filled, *mates):
        thread.join(60)
        assert not thread.is_alive()
    assert eventually(lambda: server.metrics().value("hftasks_queue_rows", "slow") == 0)
    wanted = CROWDED_ROWS + len(mates) * len(SENTENCES)
    assert wanted <= rows_run(server) - before < wanted + LEAVERS_ROWS / 2


def test_a_rest_client_that_hangs_up_leaves_nothing_behind(server: Server) -> None:
    """MLServer does not see that it left; its request is served, and then forgotten."""
    body = json.dumps({"inputs": texts(*[LONG] * 40)}).encode()
    head = f"POST {infer_path('slow')} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    before = rows_run(server)
    with socket.create_connection(("127.0.0.1", server.http_port)) as connection:
        connection.sendall(head.encode() + body)
        assert eventually(lambda: rows_run(server) > before)
    assert len(server.results("slow", texts(*SENTENCES))) == len(SENTENCES)
    assert eventually(lambda: server.metrics().value("hftasks_queue_rows", "slow") == 0)


def test_a_body_that_never_ends_holds_up_nobody(server: Server) -> None:
    head = f"POST {infer_path('three')} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.http_port)) as connection:
        connection.sendall(head.encode() + b'{"inputs": [')
        assert server.results("three", texts(SENTENCES[0]))


# -- an idle server does not wait -------------------------------------------------------------------


def test_idle_server_does_not_wait_for_max_batch_time(server: Server) -> None:
    """`windowed` has max_batch_size 32 and max_batch_time 1.0: MLServer's batcher would wait a second."""

    def median_s(model: str) -> float:
        spent = []
        for _ in range(7):
            began = time.monotonic()
            server.results(model, texts(SENTENCES[0]))
            spent.append(time.monotonic() - began)
        return statistics.median(spent)

    without = median_s("sentiment")
    assert median_s("windowed") < max(10 * without, 0.5)
