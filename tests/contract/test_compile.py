"""Compiled backbones: equal to the others, and nothing left to compile once they are loaded.

Dynamo traces here as it does with inductor; its graphs are then run as they are, since C++ takes a minute.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mlserver_hftasks.backends import compiling
from mlserver_hftasks.errors import InvalidSettings
from mlserver_hftasks.settings import read_settings
from tests import tiny
from tests.contract.test_packing import assert_close, rows_of
from tests.harness import serve

COMPILE = {"enable": True, "backend": "eager"}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def served(architecture: str, **settings: Any) -> Any:
    return serve(tiny.folder(architecture, "sequence"), "text-classification", **settings).backend


@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_the_same_answers_and_no_program_after_load(architecture: str) -> None:
    compile_settings = read_settings({"compile": COMPILE}, {}).compile
    backend, plain = served(architecture, compile=compile_settings), served(architecture)
    assert backend.description.packing == "varlen"
    assert backend._backbone._module.config._attn_implementation == compiling.ATTENTION_NAME
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert compiled > 0
    rows = rows_of(architecture)
    for batch in (rows, rows[:1], rows[2:4], rows[::-1], rows * 3):
        assert_close(backend.forward(batch), plain.forward(batch))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled
    backend.close()


@pytest.mark.parametrize(
    ("architecture", "settings", "message"),
    [
        ("bert", {"backend": "indutcor"}, "expected one of .*inductor.* @ parameters.extra.compile.backend"),
        ("bert", {**COMPILE, "mode": "max-autotune"}, 'expected no mode, or the backend "inductor"'),
        ("mpnet", COMPILE, "the model's rows run block"),
    ],
)
def test_what_cannot_be_compiled_says_so(architecture: str, settings: Any, message: str) -> None:
    with pytest.raises(InvalidSettings, match=message):
        served(architecture, compile=read_settings({"compile": settings}, {}).compile)


def test_a_compiler_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("no C++\ncompiler")

    monkeypatch.setattr(compiling, "compiled", lambda forward, backend, mode: failing)
    with pytest.raises(InvalidSettings, match=r"torch cannot compile the model: no C\+\+ compiler, expected"):
        served("bert", compile=read_settings({"compile": True}, {}).compile)


@pytest.mark.parametrize(
    ("value", "enabled"),
    [
        (True, True),
        ("true", True),
        ('{"enable": false}', False),
        ({"mode": "reduce-overhead"}, True),
        (None, None),
    ],
)
def test_ways_to_say_it(value: Any, enabled: bool | None) -> None:
    read = read_settings({"compile": value}, {}).compile
    assert (read.enable if read else None) == enabled


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"compile": {"enabled": True}}, "parameters.extra.compile"),
        ({"compile": {"dynamic": False}}, "parameters.extra.compile"),
        ({"compile": True, "backend": "onnx"}, 'got compile and the backend "onnx"'),
        ({"compile": True, "quantization": "int8"}, 'got compile and the quantization "int8"'),
    ],
)
def test_what_is_refused(extra: Any, message: str) -> None:
    with pytest.raises(InvalidSettings, match=message):
        read_settings(extra, {})
