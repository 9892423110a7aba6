"""Generation over real servers: whole answers, streams over REST and gRPC, and what ends them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from tests.server.grpc_client import GrpcClient, request
from tests.server.process import CLIENT_SECONDS, Server
from tests.server.v2 import at_once, eventually, results_of, tensor, texts

PROMPT = "The river museum was quiet"
LONG = {"min_new_tokens": 120, "max_new_tokens": 120}
ROUTES = ("infer_stream", "generate_stream")


def body(*prompts: str, outputs: tuple[str, ...] = (), **parameters: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"inputs": texts(*prompts, name="text_inputs"), "parameters": parameters}
    return {**made, "outputs": [{"name": name} for name in outputs]} if outputs else made


def chunks(
    server: Server, model: str, content: dict[str, Any], route: str = "infer_stream"
) -> Iterator[dict[str, Any]]:
    """The parsed server-sent events, as they come."""
    with server.client.stream("POST", f"/v2/models/{model}/{route}", json=content) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line:
                assert line.startswith("data: ")
                yield json.loads(line.removeprefix("data: "))


def text_of(chunk: dict[str, Any]) -> str:
    (output,) = chunk["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("output", "BYTES", [1, 1])
    return str(json.loads(output["data"][0])["generated_text"])


def whole(server: Server, model: str, prompt: str, **parameters: Any) -> str:
    ((entry,),) = server.results(
        model, texts(prompt, name="text_inputs"), return_full_text=False, **parameters
    )
    return str(entry["generated_text"])


def running(server: Server, model: str) -> float:
    return server.metrics().value("hftasks_running_sequences", model)


def cache_share(server: Server, model: str) -> float:
    return server.metrics().value("hftasks_kv_cache_share", model)


def idle(server: Server, model: str) -> bool:
    return eventually(lambda: running(server, model) == 0 and cache_share(server, model) == 0)


def test_an_answer_says_why_it_ended_and_how_long_it_is(some_server: Server) -> None:
    response = some_server.infer("talker", texts(PROMPT, name="text_inputs"), max_new_tokens=5)
    ((entry,),) = results_of(response)
    assert entry["generated_text"].startswith(PROMPT)
    said = response.json()["parameters"]
    assert said["finish_reason"] in {"length", "eos"}
    assert said["generated_tokens"] == 5 or said["finish_reason"] == "eos"
    assert said["prompt_tokens"] > 3


@pytest.mark.parametrize("route", ROUTES)
def test_a_stream_is_the_answer_in_pieces(server: Server, route: str) -> None:
    for model in ("talker", "chatter"):
        got = list(chunks(server, model, body(PROMPT, max_new_tokens=20), route))
        assert "".join(map(text_of, got)) == whole(server, model, PROMPT, max_new_tokens=20)
        assert len(got) > 5
        assert all(chunk["model_name"] == model for chunk in got)
        assert all("finish_reason" not in (chunk["parameters"] or {}) for chunk in got[:-1])
        last = got[-1]["parameters"]
        assert last["finish_reason"] in {"length", "eos"}
        assert last["generated_tokens"] <= 20
        assert last["prompt_tokens"] > 3


def test_a_quantized_model_streams_too(server: Server) -> None:
    metadata = server.client.get("/v2/models/quantized-talker").json()["parameters"]
    assert (metadata["dtype"], metadata["packing"]) == ("int8-weight-only", "continuous")
    wanted = [whole(server, "quantized-talker", prompt, max_new_tokens=20) for prompt in (PROMPT, "Anna")]
    asked = [
        lambda prompt=prompt: list(chunks(server, "quantized-talker", body(prompt, max_new_tokens=20)))
        for prompt in (PROMPT, "Anna")
    ]
    streams = at_once(asked)
    assert ["".join(map(text_of, stream)) for stream in streams] == wanted
    assert all(len(stream) > 5 for stream in streams)


def test_pieces_come_while_the_model_runs(server: Server) -> None:
    began = time.monotonic()
    came = [time.monotonic() - began for _ in chunks(server, "slow-talker", body(PROMPT, **LONG))]
    assert len(came) > 20
    assert came[0] < came[-1] / 4, "the first piece waited for the others"


def test_stream_interval(server: Server) -> None:
    content = body(PROMPT, max_new_tokens=24, min_new_tokens=24, stream_interval=8)
    got = list(chunks(server, "talker", content))
    assert len(got) <= 5
    assert "".join(map(text_of, got)) == whole(server, "talker", PROMPT, max_new_tokens=24, min_new_tokens=24)


def test_several_prompts_share_a_stream(server: Server) -> None:
    prompts = (PROMPT, "Anna", "a b c")
    answers = ["", "", ""]
    reasons: dict[int, str] = {}
    for chunk in chunks(server, "talker", body(*prompts, max_new_tokens=12)):
        said = chunk["parameters"]
        assert said["index"] not in reasons, "a piece came after the last"
        answers[said["index"]] += text_of(chunk)
        if "finish_reason" in said:
            reasons[said["index"]] = said["finish_reason"]
    assert answers == [whole(server, "talker", prompt, max_new_tokens=12) for prompt in prompts]
    assert sorted(reasons) == [0, 1, 2]


def test_typed_outputs_of_a_stream(server: Server) -> None:
    names = ("generated_text", "token_ids", "logprobs")
    got = list(chunks(server, "talker", body(PROMPT, outputs=names, max_new_tokens=9, logprobs=True)))
    assert [output["name"] for output in got[0]["outputs"]] == list(names)
    ids = [each for chunk in got for each in chunk["outputs"][1]["data"]]
    logprobs = [each for chunk in got for each in chunk["outputs"][2]["data"]]
    response = server.infer(
        "talker",
        texts(PROMPT, name="text_inputs"),
        outputs=["token_ids", "logprobs"],
        max_new_tokens=9,
        logprobs=True,
    ).json()
    assert ids == response["outputs"][0]["data"]
    assert logprobs == pytest.approx(response["outputs"][1]["data"], abs=1e-4)


def test_a_stop_text_never_shows(server: Server) -> None:
    answer = whole(server, "talker", PROMPT, max_new_tokens=24)
    stop = answer[6:10]
    got = list(chunks(server, "talker", body(PROMPT, max_new_tokens=24, stop=stop)))
    assert "".join(map(text_of, got)) == answer[: answer.index(stop)]
    assert got[-1]["parameters"]["finish_reason"] == "stop"


def test_a_chat_streams(server: Server) -> None:
    chat = [{"role": "user", "content": "Who paid?"}]
    inputs = [tensor("messages", [json.dumps(chat)], content_type="hg_json")]
    ((entry,),) = server.results("chatter", inputs, max_new_tokens=8)
    *asked, told = entry["generated_text"]
    assert asked == chat
    got = list(chunks(server, "chatter", {"inputs": inputs, "parameters": {"max_new_tokens": 8}}))
    assert "".join(map(text_of, got)) == told["content"]
    old = {"uuid": "x", "past_user_inputs": [], "generated_responses": [], "new_user_input": "Who paid?"}
    inputs = [tensor("conversations", [json.dumps(old)], content_type="hg_conversation")]
    (entries,) = server.results("chatter", inputs, max_new_tokens=8)
    assert entries[0]["generated_text"] == [*chat, told]


def test_a_client_that_goes_away_ends_its_generation(server: Server) -> None:
    before = server.metrics().value("hftasks_generated_tokens_total", "slow-talker")
    stream = chunks(server, "slow-talker", body(PROMPT, **LONG))
    next(stream)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert idle(server, "slow-talker")
    made = server.metrics().value("hftasks_generated_tokens_total", "slow-talker") - before
    assert made < 60, "it ran on without anybody"


def test_a_grpc_stream_and_its_end(server: Server, grpc_client: GrpcClient) -> None:
    message = request("talker", texts(PROMPT, name="text_inputs"), max_new_tokens=12)
    got = list(grpc_client.stub.ModelStreamInfer(iter([message]), timeout=CLIENT_SECONDS))
    pieces = [json.loads(each.outputs[0].contents.bytes_contents[0])["generated_text"] for each in got]
    assert "".join(pieces) == whole(server, "talker", PROMPT, max_new_tokens=12)
    assert got[-1].parameters["finish_reason"].string_param in {"length", "eos"}
    assert 1 <= got[-1].parameters["generated_tokens"].int64_param <= 12
    message = request("slow-talker", texts(PROMPT, name="text_inputs"), **LONG)
    call = grpc_client.stub.ModelStreamInfer(iter([message]), timeout=CLIENT_SECONDS)
    next(call)
    call.cancel()
    assert idle(server, "slow-talker")


def test_messages_of_tritonclient_stream(server: Server) -> None:
    script = Path(__file__).with_name("triton_stream.py")
    run = subprocess.run(
        [sys.executable, str(script), server.grpc_url, "talker", PROMPT],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    got = json.loads(run.stdout)
    assert "".join(got["pieces"]) == whole(server, "talker", PROMPT, max_new_tokens=12)
    assert got["finish_reason"] in {"length", "eos"}
    assert "max_new_tokens" in got["error"]


@pytest.mark.parametrize("options", [[], ["--grpc"], ["--chat"], ["--chat", "--grpc"]], ids=" ".join)
def test_the_example_prints_a_stream(server: Server, options: list[str]) -> None:
    script = Path(__file__).parents[2] / "examples" / "stream.py"
    address = ["--http-port", str(server.http_port), "--grpc-port", server.grpc_url.rpartition(":")[2]]
    run = subprocess.run(
        [sys.executable, str(script), "chatter", PROMPT, "--max-new-tokens", "8", *address, *options],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    if "--chat" not in options:
        assert run.stdout.startswith(whole(server, "chatter", PROMPT, max_new_tokens=8))
    assert re.search(r"\n\[(length|eos), [1-8] tokens\]\n$", run.stdout)


def test_parameters_do_not_leak_between_clients(server: Server) -> None:
    asked: list[dict[str, Any]] = [
        {"max_new_tokens": 4 + number, "do_sample": number % 2 == 1, "seed": number, "top_k": 1 + number}
        for number in range(8)
    ]
    asked += [{"max_new_tokens": 6, "num_beams": 2}, {"max_new_tokens": 9, "repetition_penalty": 3}]
    alone = [whole(server, "talker", PROMPT, **each) for each in asked]

    def call(parameters: dict[str, Any]) -> str:
        return whole(server, "talker", PROMPT, **parameters)

    for _ in range(3):
        assert at_once([lambda each=each: call(each) for each in asked]) == alone  # type: ignore[misc]


def test_a_late_answer_is_what_there_is(server: Server) -> None:
    response = server.infer("slow-talker", texts(PROMPT, name="text_inputs"), timeout_ms=400, **LONG)
    said = response.json()["parameters"]
    assert said["finish_reason"] == "timeout"
    assert 1 <= said["generated_tokens"] < 120
    *_, last = chunks(server, "slow-talker", body(PROMPT, timeout_ms=400, **LONG))
    assert last["parameters"]["finish_reason"] == "timeout"
    beams = server.infer(
        "slow-talker", texts(PROMPT, name="text_inputs"), timeout_ms=500, num_beams=2, **LONG
    )
    assert beams.json()["parameters"]["finish_reason"] == "timeout"


def test_overload_is_a_429_and_those_inside_get_their_answers(server: Server) -> None:
    """`slow-talker` runs two and lets two wait, and its cache holds one long answer."""
    done: list[httpx.Response] = []
    content = body(PROMPT, **LONG)
    path = "/v2/models/slow-talker/infer"
    threads = [
        threading.Thread(target=lambda: done.append(server.client.post(path, json=content))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    assert eventually(lambda: server.metrics().value("hftasks_waiting_sequences", "slow-talker") == 2)
    refused = server.client.post(path, json=content)
    streamed = server.client.post("/v2/models/slow-talker/infer_stream", json=content)
    for response in (refused, streamed):
        assert response.status_code == 429
        assert int(response.headers["Retry-After"]) >= 1
    for thread in threads:
        thread.join()
    assert {len(results_of(response)) for response in done} == {1}
    assert idle(server, "slow-talker")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 5000}, "expected 1..1024 @ max_new_tokens"),
        ({"custom_generate": "x/y"}, "unknown input or parameter 'custom_generate'"),
        ({"num_beams": 2}, "only computed as a whole"),
    ],
)
def test_bad_input_before_the_first_piece_has_its_status(
    server: Server, parameters: dict[str, Any], message: str
) -> None:
    for route in ROUTES:
        response = server.client.post(f"/v2/models/talker/{route}", json=body(PROMPT, **parameters))
        assert response.status_code == 400
        assert message in response.json()["error"]


def test_an_error_after_the_first_piece_is_a_piece(server: Server) -> None:
    got: list[dict[str, Any]] = []
    stream = chunks(server, "slow-talker", body(PROMPT, **LONG))
    got.append(next(stream))
    unloading = threading.Thread(target=lambda: server.repository_call("slow-talker", "unload"))
    unloading.start()
    got += stream
    unloading.join()
    assert server.repository_call("slow-talker", "load").status_code == 200
    said = got[-1]["parameters"]
    assert said["finish_reason"] == "length", "an unload waits for what runs"


def test_streams_and_workers(servers: Any) -> None:
    with_workers = servers(2)
    for route in ROUTES:
        response = with_workers.client.post(f"/v2/models/talker/{route}", json=body(PROMPT))
        assert response.status_code == 400
        assert "parallel_workers 0" in response.json()["error"]
    (chunk,) = chunks(with_workers, "sentiment", {"inputs": texts("I loved this film")})
    assert chunk["outputs"][0]["name"] == "output", "what has no pieces comes in one"


def test_metrics(server: Server) -> None:
    def values() -> list[float]:
        metrics = server.metrics()
        names = ("time_to_first_token_seconds_count", "token_gap_seconds_count", "generated_tokens_total")
        return [metrics.value(f"hftasks_{name}", "talker") for name in (*names, "prompt_tokens_total")]

    before = values()
    response = server.infer(
        "talker", texts(PROMPT, "Anna", name="text_inputs"), max_new_tokens=6, min_new_tokens=6
    )
    said = response.json()["parameters"]
    first, gaps, new, prompt = (after - was for after, was in zip(values(), before, strict=True))
    assert (first, gaps, new) == (2, 10, 12)
    assert prompt == said["prompt_tokens"]


def test_a_thousand_short_generations_leave_nothing(server: Server) -> None:
    def some() -> None:
        prompts = [f"{PROMPT} {number}" for number in range(25)]
        assert len(server.results("talker", texts(*prompts, name="text_inputs"), max_new_tokens=4)) == 25

    at_once([some] * 8)
    before = server.rss_bytes()
    for _ in range(4):
        at_once([some] * 8)
    assert idle(server, "talker")
    assert server.rss_bytes() < before + 30e6


def test_grpc_errors_of_a_stream(server: Server, grpc_client: GrpcClient) -> None:
    message = request("talker", texts(PROMPT, name="text_inputs"), max_new_tokens=0)
    with pytest.raises(grpc.RpcError) as failed:
        next(grpc_client.stub.ModelStreamInfer(iter([message]), timeout=CLIENT_SECONDS))
    assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
