"""Models on several devices: what is handed to transformers, and what is refused. One CPU is all there is."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from mlserver_hftasks.errors import InvalidSettings
from mlserver_hftasks.loading import load, placement
from mlserver_hftasks.settings import read_settings
from tests import tiny
from tests.harness import results, serve

TEXTS = {"inputs": ["the river was high", "a museum"]}


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto", '{"": "cpu"}'])
def test_a_map_gives_the_same_answers(device_map: Any) -> None:
    folder = tiny.folder("bert", "sequence")
    extra = {"device_map": device_map, "task": "text-classification", "pretrained_model": str(folder)}
    settings = read_settings(extra, {})
    placed = load(settings)
    plain = serve(folder, "text-classification")
    assert placed.backend.description == plain.backend.description
    got, wanted = results(placed, TEXTS), results(plain, TEXTS)
    np.testing.assert_allclose([each["score"] for each in got], [each["score"] for each in wanted], atol=1e-6)
    placed.close()


def test_memory_is_handed_on_with_numbers_as_keys() -> None:
    extra = {"device_map": "auto", "max_memory": json.dumps({"cpu": "1GiB"})}
    options = placement.placement_options(read_settings(extra, {}))
    assert options == {"device_map": "auto", "max_memory": {"cpu": "1GiB"}}
    assert placement._number("0") == 0


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"device_map": "everywhere"}, "@ parameters.extra.device_map"),
        ({"device_map": "auto", "device": 0}, "got device_map and the device 0, expected one of them"),
        ({"device_map": "auto", "tp_plan": "auto"}, "got device_map and the tp_plan 'auto'"),
        ({"device_map": "auto", "quantization": "int8"}, "the quantization 'int8', expected one of them"),
        ({"tp_plan": "auto", "backend": "onnx"}, "got tp_plan and the backend 'onnx'"),
        ({"max_memory": {"cpu": "1GiB"}}, "got max_memory without device_map"),
        ({"device_map": {"": "cuda:99"}}, "got the device 'cuda:99', but torch sees"),
        ({"device_map": "auto", "max_memory": {"99": "1GiB"}}, "got the device 99, but torch sees"),
        (
            {"tp_plan": "auto"},
            "not one of several (RANK, LOCAL_RANK, WORLD_SIZE are not set)",
        ),
    ],
)
def test_what_cannot_be_placed_says_so(
    extra: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in placement.TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InvalidSettings) as caught:
        placement.placement_options(read_settings(extra, {}))
    assert message in str(caught.value)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "find_spec", lambda name: None)
    with pytest.raises(InvalidSettings, match=r"pip install 'mlserver-hftasks\[parallel\]'"):
        placement.placement_options(read_settings({"device_map": "auto"}, {}))


def test_models_that_generate_stay_where_the_map_has_put_them() -> None:
    stepped = read_settings({"task": "text-generation", "device_map": {"": "cpu"}}, {})
    folder = str(tiny.folder("gpt2", "causal"))
    assert load(stepped.model_copy(update={"pretrained_model": folder})).decoder is not None
    extra = {"task": "text2text-generation", "pretrained_model": str(tiny.folder("bart", "seq2seq"))}
    placed, plain = (load(read_settings({**extra, **more}, {})) for more in ({"device_map": "auto"}, {}))
    asked = {"inputs": ["the river was"]}
    assert results(placed, asked, max_new_tokens=4) == results(plain, asked, max_new_tokens=4)
