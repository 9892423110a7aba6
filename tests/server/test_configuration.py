"""Settings, the environment, and what a model's own files say."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from mlserver.grpc import dataplane_pb2 as pb

from tests.server.conftest import LONG
from tests.server.grpc_client import GrpcClient
from tests.server.process import Model, Server
from tests.server.v2 import texts

TEXTS = ["I loved this film", "This is terrible!", "Two ferries left for Morrow at 6:45."]
TASK = {"task": "text-classification"}

BAD_SETTINGS: list[tuple[str, dict[str, Any], str]] = [
    ("unknown", {"tsk": "a"}, "unknown setting 'tsk', did you mean 'task'? @ parameters.extra"),
    ("unknown and far", {"zzzz": 1}, "unknown setting 'zzzz', expected one of"),
    ("task", {"task": "text-clasification"}, "did you mean 'text-classification'? @ task"),
    ("number", {"batch_size": 0}, "@ parameters.extra.batch_size"),
    ("text for a number", {"max_items": "many"}, "got 'many', expected"),
    ("choice", {"dtype": "int4"}, "@ parameters.extra.dtype"),
    ("truncation", {"truncation": "sometimes"}, "@ parameters.extra.truncation"),
    ("framework", {"framework": "tf"}, "@ parameters.extra.framework"),
    ("optimum", {"optimum_model": True, "backend": "openvino"}, "@ parameters.extra"),
    ("device", {"device": "tpu:9:9"}, "@ parameters.extra.device"),
    ("absent device", {"device": "mps"}, "@ parameters.extra.device"),
    ("length", {"max_length": 100_000}, "expected 5..128"),
    ("labels", {"labels": ["a", "b", "c"]}, "@ parameters.extra.labels"),
    ("suffix", {"task_suffix": "_en_to_fr"}, "task_suffix"),
    ("model", {"pretrained_model": "/nowhere/at/all"}, "@ parameters.extra.pretrained_model"),
    ("tokenizer", {"pretrained_tokenizer": "/nowhere/at/all"}, "@ parameters.extra.pretrained_tokenizer"),
]


@pytest.mark.parametrize(
    ("extra", "says"), [case[1:] for case in BAD_SETTINGS], ids=[case[0] for case in BAD_SETTINGS]
)
def test_bad_settings_refuse_to_load(
    server: Server, sentiment_folder: Path, extra: dict[str, Any], says: str
) -> None:
    position = server.log_position()
    with server.having("wrong", Model(sentiment_folder, {**TASK, **extra})) as response:
        assert response.status_code == 422, response.text
        assert says in response.json()["error"]
        assert " @ " in response.json()["error"]
        assert server.infer("wrong", texts("a")).status_code == 404
        client = GrpcClient(server.grpc_url)
        with pytest.raises(grpc.RpcError) as raised:
            client.stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="wrong"), timeout=60)
        client.close()
        assert raised.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert says in raised.value.details()
    assert "Traceback" not in server.log_since(position)


def test_bad_settings_keep_the_model_that_serves(some_server: Server, sentiment_folder: Path) -> None:
    good = Model(sentiment_folder, TASK)
    with some_server.having("kept", good):
        before = some_server.results("kept", texts(*TEXTS))
        for extra in ({"dtype": "int4"}, {"pretrained_model": "/nowhere/at/all"}):
            some_server.write("kept", Model(sentiment_folder, {**TASK, **extra}))
            response = some_server.repository_call("kept", "load")
            assert response.status_code == 422
            assert re.fullmatch(r"(?!mlserver).+ @ parameters\.extra\.\w+", response.json()["error"])
            assert some_server.results("kept", texts(*TEXTS)) == before
        some_server.write("kept", good)
        assert some_server.repository_call("kept", "load").status_code == 200


def test_bad_settings_end_a_server_that_starts(tmp_path: Path, sentiment_folder: Path) -> None:
    server = Server(tmp_path, {"wrong": Model(sentiment_folder, {**TASK, "bach_size": 3})})
    server.start()
    try:
        server.wait_until_ended()
        assert "unknown setting 'bach_size', did you mean 'batch_size'? @ parameters.extra" in server.log
    finally:
        server.stop()


def renamed_labels(server: Server) -> list[str]:
    """What a model with the labels bad and good answers."""
    names = {"NEGATIVE": "bad", "POSITIVE": "good"}
    return [names[result["label"]] for result in server.results("sentiment", texts(*TEXTS))]


def test_texts_as_settings(server: Server, sentiment_folder: Path) -> None:
    """Seldon Core 2 hands all parameters over as texts."""
    extra = {
        "task": "sentiment-analysis",
        "framework": "pt",
        "optimum_model": "false",
        "device": "-1",
        "batch_size": "8",
        "max_batch_tokens": "512",
        "truncation": "true",
        "warmup": "false",
        "model_kwargs": '{"attn_implementation": "sdpa"}',
        "labels": '["bad", "good"]',
        "timeout_ms": "null",
    }
    with server.having("texts", Model(sentiment_folder, extra)) as response:
        assert response.status_code == 200, response.text
        assert [result["label"] for result in server.results("texts", texts(*TEXTS))] == renamed_labels(
            server
        )
        assert len(server.results("texts", texts(LONG * 3))) == 1, "truncated by setting"


@pytest.mark.parametrize(
    "content",
    [{"0": "bad", "1": "good"}, {"label_list": ["bad", "good"]}, {"label_list": "['bad', 'good']"}],
    ids=["index to name", "label list", "label list as text"],
)
def test_index_to_name(
    server: Server, tmp_path: Path, sentiment_folder: Path, content: dict[str, Any]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sentiment_folder, folder)
    (folder / "index_to_name.json").write_text(json.dumps(content))
    with server.having("named", Model(folder, TASK)) as response:
        assert response.status_code == 200, response.text
        assert [result["label"] for result in server.results("named", texts(*TEXTS))] == renamed_labels(
            server
        )
        (typed,) = server.infer("named", texts(*TEXTS), outputs=["label"]).json()["outputs"]
        assert typed["data"] == renamed_labels(server)


def test_a_broken_index_to_name_refuses_to_load(
    server: Server, tmp_path: Path, sentiment_folder: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sentiment_folder, folder)
    (folder / "index_to_name.json").write_text('{"0": "bad"}')
    with server.having("named", Model(folder, TASK)) as response:
        assert response.status_code == 422
        assert response.json()["error"].endswith("@ index_to_name.json")


@pytest.fixture(scope="module")
def configured(tmp_path_factory: pytest.TempPathFactory, sentiment_folder: Path) -> Iterator[Server]:
    """A server with one worker whose environment says what its files do not."""
    environment = {
        "PREDICTIVE_UNIT_PARAMETERS": json.dumps(
            [
                {"name": "max_items", "value": "2", "type": "INT"},
                {"name": "do_lower_case", "value": "true", "type": "BOOL"},
            ]
        ),
        "MLSERVER_MODEL_HUGGINGFACE_TASK": "text-classification",
        "MLSERVER_MODEL_HUGGINGFACE_MAX_TEXT_CHARS": "50",
        "MLSERVER_MODEL_HUGGINGFACE_LABELS": '["bad", "good"]',
        "MLSERVER_MODEL_HUGGINGFACE_MAX_ITEMS": "9",
    }
    name = "mlserver_hftasks.HuggingFaceRuntime"
    models = {
        "plain": Model(sentiment_folder, implementation=name),
        "own": Model(sentiment_folder, {"max_items": 7, "max_text_chars": 60}, implementation=name),
        "folder": Model(None, implementation=name),
        "uri": Model(None, implementation=name),
    }
    root = tmp_path_factory.mktemp("configured")
    server = Server(root, models, parallel_workers=1, environment=environment)
    shutil.copytree(sentiment_folder, server.repository / "folder", dirs_exist_ok=True)
    for name, uri in (("uri", sentiment_folder), ("relative", "../folder")):
        path = server.repository / name / "model-settings.json"
        path.parent.mkdir(exist_ok=True)
        settings = {
            "name": name,
            "implementation": "mlserver_hftasks.HuggingFaceRuntime",
            "parameters": {"uri": str(uri)},
        }
        path.write_text(json.dumps(settings))
    with server:
        yield server


def test_environment_reaches_the_model(configured: Server) -> None:
    assert configured.results("plain", texts(TEXTS[0]))[0]["label"] in {"bad", "good"}
    assert "expected at most 50" in configured.infer("plain", texts("a" * 51)).json()["error"]
    response = configured.infer("plain", texts("a", "b", "c"))
    assert (response.status_code, "expected at most 2" in response.text) == (413, True)


def test_environment_in_its_order(configured: Server) -> None:
    """PREDICTIVE_UNIT_PARAMETERS before parameters.extra before MLSERVER_MODEL_HUGGINGFACE_*."""
    assert "expected at most 60" in configured.infer("own", texts("a" * 61)).json()["error"]
    assert "expected at most 2" in configured.infer("own", texts("a", "b", "c")).json()["error"]


@pytest.mark.parametrize("model", ["folder", "uri", "relative"])
def test_a_model_by_its_uri(configured: Server, model: str) -> None:
    """`parameters.uri`, which is the folder of the settings where they do not say."""
    assert configured.results(model, texts(TEXTS[0])) == configured.results("plain", texts(TEXTS[0]))


def test_the_name_of_the_old_runtime_survives_a_reload(configured: Server) -> None:
    before = configured.results("plain", texts(TEXTS[0]))
    assert configured.repository_call("plain", "load").status_code == 200
    assert configured.results("plain", texts(TEXTS[0])) == before
