"""A decoder that `hftasks prepare` wrote for ONNX Runtime, behind a real server: what torch says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mlserver_hftasks.cli.main import app
from tests import tiny
from tests.contract.test_text_generation import PROMPTS, served, together
from tests.server.grpc_client import GrpcClient, request
from tests.server.process import CLIENT_SECONDS, Server
from tests.server.test_generation import LONG, ROUTES, body, chunks, idle, text_of, whole
from tests.server.v2 import at_once, texts

MODEL = "writer"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("decoders"), {})
    out = made.repository / MODEL
    source = str(tiny.folder("llama", "causal"))
    given = ["prepare", source, str(out), "--task", "text-generation", "--backend", "onnx"]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.stderr
    report = json.loads((out / "report.json").read_text())
    assert report["difference"]["equal_answers"] == 1.0
    assert report["difference"]["largest"] < 1e-4
    assert report["unit"] == "tokens"
    assert [report[side]["how"]["backend"] for side in ("before", "after")] == ["torch", "onnx"]
    checked = CliRunner().invoke(app, ["check", str(out)])
    assert checked.exit_code == 0, checked.stderr
    assert "tokens per second, 8 clients" in checked.stdout
    with made:
        yield made


def on_torch(text: str, **parameters: object) -> str:
    return together(served("llama"), [(text, parameters)])[0]


def test_answers_are_those_of_torch(server: Server) -> None:
    described = server.client.get(f"/v2/models/{MODEL}").json()["parameters"]
    assert (described["backend"], described["packing"]) == ("onnx", "continuous")
    draw = {"do_sample": True, "seed": 4, "max_new_tokens": 15}
    for parameters in ({"max_new_tokens": 20}, draw):  # type: dict[str, Any]
        got = at_once([partial(whole, server, MODEL, text, **parameters) for text in PROMPTS])
        assert got == [on_torch(text, **parameters) for text in PROMPTS]


@pytest.mark.parametrize("route", ROUTES)
def test_streams(server: Server, route: str) -> None:
    got = list(chunks(server, MODEL, body(PROMPTS[0], max_new_tokens=20), route))
    assert len(got) > 3
    assert "".join(map(text_of, got)) == on_torch(PROMPTS[0], max_new_tokens=20)
    assert got[-1]["parameters"]["finish_reason"] in {"length", "eos"}


def test_a_grpc_stream(server: Server) -> None:
    client = GrpcClient(server.grpc_url)
    message = request(MODEL, texts(PROMPTS[2], name="text_inputs"), max_new_tokens=12)
    got = list(client.stub.ModelStreamInfer(iter([message]), timeout=CLIENT_SECONDS))
    pieces = [json.loads(each.outputs[0].contents.bytes_contents[0])["generated_text"] for each in got]
    assert "".join(pieces) == on_torch(PROMPTS[2], max_new_tokens=12)
    client.close()


def test_a_client_that_goes_away_leaves_the_others_alone(server: Server) -> None:
    stream = chunks(server, MODEL, body(PROMPTS[1], **LONG))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert whole(server, MODEL, PROMPTS[0], max_new_tokens=20) == on_torch(PROMPTS[0], max_new_tokens=20)
    assert idle(server, MODEL)


def test_beams_are_a_bad_request(server: Server) -> None:
    response = server.infer(MODEL, texts("Anna", name="text_inputs"), num_beams=2)
    assert response.status_code == 400
    assert 'a model with the backend "torch"' in response.json()["error"]


def test_the_server_needs_no_torch(server: Server) -> None:
    """It takes seconds to import, and hundreds of MiB."""
    (pid, *_) = server.pids()
    maps = Path(f"/proc/{pid}/maps").read_text()
    assert "libonnxruntime" in maps or "onnxruntime_pybind11_state" in maps
    assert "libtorch_cpu" not in maps
