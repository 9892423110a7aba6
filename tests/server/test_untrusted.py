"""Clients and models that are not to be trusted: keywords, paths, URLs and pickles."""

from __future__ import annotations

import http.server
import json
import os
import pickle
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from safetensors.torch import load_file

from tests.server.grpc_client import GrpcClient, request
from tests.server.process import Model, Server
from tests.server.v2 import assert_same, infer_path, tensor, texts

TEXT = "I loved this film, every single minute of it was a joy."
MASKED = "I [MASK] this film."
# -- what a client may not choose -------------------------------------------------------------------

EVERY_MODEL: dict[str, list[dict[str, Any]]] = {
    "sentiment": texts(TEXT),
    "zero-shot": [*texts(TEXT), tensor("candidate_labels", ["good", "bad"])],
    "mask": texts(MASKED),
    "tokens": texts(TEXT),
    "answers": [tensor("question", ["who?"]), tensor("context", [TEXT])],
    "features": texts(TEXT),
    "embeddings": texts(TEXT),
    "ranking": [tensor("query", ["who?"]), tensor("texts", [TEXT, "a"])],
}
FORBIDDEN: dict[str, Any] = {
    "custom_generate": "someone/code",
    "trust_remote_code": True,
    "batch_size": 64,
    "num_workers": 4,
    "model": "someone/model",
    "tokenizer": "someone/tokenizer",
    "device": "cuda:0",
    "model_kwargs": '{"trust_remote_code": true}',
    "generate_kwargs": '{"custom_generate": "someone/code"}',
    "self": "a",
    "__class__": "a",
}


@pytest.mark.parametrize("model", EVERY_MODEL)
def test_a_client_cannot_pass_other_keywords(server: Server, grpc_client: GrpcClient, model: str) -> None:
    for name, value in FORBIDDEN.items():
        datatype = {bool: "BOOL", int: "INT64"}.get(type(value), "BYTES")
        raw = tensor(name, [value], datatype, "raw")
        for response in (
            server.infer(model, [*EVERY_MODEL[model], raw]),
            server.client.post(
                infer_path(model), json={"inputs": EVERY_MODEL[model], "parameters": {name: value}}
            ),
        ):
            assert response.status_code == 400, name
            assert f"unknown input or parameter '{name}'" in response.json()["error"]
        error = grpc_client.error_of(request(model, [*EVERY_MODEL[model], raw]))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(("model", "name"), [("mask", "tokenizer_kwargs"), ("features", "tokenize_kwargs")])
def test_keywords_of_the_tokenizer_are_a_list_of_their_own(server: Server, model: str, name: str) -> None:
    def status_and_text(keywords: dict[str, Any]) -> tuple[int, str]:
        body = {"inputs": EVERY_MODEL[model], "parameters": {name: keywords}}
        response = server.client.post(infer_path(model), json=body)
        return response.status_code, response.text

    assert status_and_text({"truncation": True})[0] == 200
    for smuggled in ({"trust_remote_code": True}, {"return_tensors": "np"}, {"x": 1, "truncation": True}):
        status, text = status_and_text(smuggled)
        assert (status, name in text) == (400, True), (smuggled, text)


@pytest.fixture
def listener() -> Iterator[tuple[str, list[str]]]:
    """The URL of a web server on this machine, and the paths that were asked of it."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:
            """Keep quiet."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{web.server_address[1]}", asked
        web.shutdown()
        thread.join()


def with_texts(inputs: Sequence[Mapping[str, Any]], text: str) -> list[dict[str, Any]]:
    """The request with every one of its texts replaced."""
    masked = {tensor["name"]: [MASKED in element for element in tensor["data"]] for tensor in inputs}
    return [
        {
            **tensor,
            "data": [f"{text} [MASK]" if mask else text for mask in masked[tensor["name"]]],
        }
        for tensor in inputs
    ]


def test_urls_and_paths_are_texts(
    server: Server, tmp_path: Path, listener: tuple[str, list[str]], sentiment_folder: Path
) -> None:
    url, asked = listener
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # a server that opens it for reading hangs
    suspicious = [
        f"{url}/image.png",
        f"file://{pipe}",
        str(pipe),
        str(sentiment_folder),
        "//127.0.0.1/share",
        "~",
        ".",
    ]
    for text in suspicious:
        for model, inputs in EVERY_MODEL.items():
            assert server.infer(model, with_texts(inputs, text)).status_code == 200, (model, text)
        (result,) = server.results("zero-shot", with_texts(EVERY_MODEL["zero-shot"], text))
        assert result["sequence"] == text
    assert asked == []
    with pytest.raises(OSError, match="No such device or address"):
        os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)  # nobody reads


def test_images_are_not_fetched(server: Server, listener: tuple[str, list[str]]) -> None:
    url, asked = listener
    for value in (f"data:image/png;base64,{url}", f"data:image/png;base64,{url}/a.png"):
        response = server.infer(
            "sentiment", [tensor("inputs", [json.dumps({"text": value})], content_type="hg_json")]
        )
        assert response.status_code == 400
    assert (
        server.infer("sentiment", [tensor("inputs", [url], content_type="pillow_image")]).status_code == 400
    )
    assert asked == []


# -- pickled weights --------------------------------------------------------------------------------


class Malice:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self._path,)


@pytest.fixture
def pickled_folder(tmp_path: Path, sentiment_folder: Path) -> tuple[Path, Path]:
    """A model whose weights are a pickle, and the file that its unpickling makes."""
    folder, trace = tmp_path / "pickled", tmp_path / "trace"
    shutil.copytree(sentiment_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Malice(trace)}))
    return folder, trace


@pytest.mark.parametrize(
    "model_kwargs", [{}, {"use_safetensors": False}], ids=["by default", "when asked for"]
)
def test_a_pickle_is_not_run(
    server: Server, pickled_folder: tuple[Path, Path], model_kwargs: dict[str, Any]
) -> None:
    folder, trace = pickled_folder
    model = Model(folder, {"task": "text-classification", "model_kwargs": model_kwargs})
    with server.having("pickled", model) as response:
        assert server.infer("pickled", texts("a")).status_code == 404
    assert 400 <= response.status_code < 500, response.text
    assert " @ " in response.json()["error"]
    if not model_kwargs:
        assert '"use_safetensors": false' in response.json()["error"]
    assert not trace.exists()


def test_pickled_weights_load_when_asked_for(server: Server, tmp_path: Path, sentiment_folder: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(sentiment_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(sentiment_folder / "model.safetensors"), folder / "pytorch_model.bin")
    extra = {"task": "text-classification", "model_kwargs": {"use_safetensors": False}}
    with server.having("pickled", Model(folder, extra)) as response:
        assert response.status_code == 200
        assert_same(server.results("pickled", texts(TEXT)), server.results("sentiment", texts(TEXT)))
