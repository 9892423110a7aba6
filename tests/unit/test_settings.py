"""parameters.extra: where values come from, how strings become values, what is refused and how."""

import json
from typing import Any

import pytest

from mlserver_hftasks.errors import InvalidSettings
from mlserver_hftasks.settings import Settings, read_settings


def unit(**values: tuple[str, Any]) -> dict[str, str]:
    parameters = [{"name": name, "type": kind, "value": value} for name, (kind, value) in values.items()]
    return {"PREDICTIVE_UNIT_PARAMETERS": json.dumps(parameters)}


def test_infer_uri_means_the_mode() -> None:
    uri = "http://localhost:8080/v2/models/m/infer"
    assert read_settings({"infer_uri": uri}, {}).mode == "explain"
    assert read_settings({"infer_uri": "null"}, {}).mode == "infer"
    assert read_settings({"explain": '{"method": "occlusion"}'}, {}).explain == {"method": "occlusion"}
    with pytest.raises(InvalidSettings, match='expected "mode": "explain"'):
        read_settings({"infer_uri": uri, "mode": "infer"}, {})


def test_precedence() -> None:
    environment = {"MLSERVER_MODEL_HUGGINGFACE_TASK": "fill-mask", "mlserver_model_huggingface_device": "0"}
    defaults = {"pretrained_model": "from-uri", "device": -1}
    assert read_settings({}, environment, defaults).task == "fill-mask"
    assert read_settings({}, environment, defaults).device == 0
    assert read_settings({"task": "ner"}, environment).task == "ner"
    assert read_settings({"task": "ner"}, {**environment, **unit(task=("STRING", "x"))}).task == "x"
    assert read_settings({}, {}, defaults).pretrained_model == "from-uri"
    assert read_settings({"pretrained_model": "mine"}, {}, defaults).pretrained_model == "mine"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("device", "-1", -1),
        ("device", "0", 0),
        ("device", "cuda:1", "cuda:1"),
        ("device", "null", None),
        ("batch_size", "16", 16),
        ("batch_size", "", None),
        ("optimum_model", "false", False),
        ("trust_remote_code", "0", False),
        ("truncation", "true", True),
        ("truncation", "only_first", "only_first"),
        ("labels", '["a", "b"]', ["a", "b"]),
        ("labels", '{"0": "a", "1": "b"}', {0: "a", 1: "b"}),
        ("model_kwargs", '{"attn_implementation": "eager"}', {"attn_implementation": "eager"}),
        ("latency_target_ms", "40", 40.0),
    ],
)
def test_strings_are_coerced(key: str, value: str, expected: Any) -> None:
    assert getattr(read_settings({key: value}, {}), key) == expected


def test_every_type_of_seldon_core_v1() -> None:
    environment = unit(
        batch_size=("INT", "8"),
        latency_target_ms=("FLOAT", "12.5"),
        timeout_ms=("DOUBLE", "3"),
        task=("STRING", "ner"),
        warmup=("BOOL", "no"),
    )
    settings = read_settings({}, environment)
    assert (settings.batch_size, settings.latency_target_ms, settings.timeout_ms) == (8, 12.5, 3.0)
    assert (settings.task, settings.warmup) == ("ner", False)


@pytest.mark.parametrize(
    ("extra", "environment", "message"),
    [
        (
            {"pretrained_modle": "x"},
            {},
            "unknown setting 'pretrained_modle', did you mean 'pretrained_model'?",
        ),
        (
            {"framework": "tf"},
            {},
            '"pt": transformers 5 has PyTorch models only @ parameters.extra.framework',
        ),
        ({"dtype": "int4"}, {}, "@ parameters.extra.dtype"),
        ({"batch_size": 0}, {}, "got 0, expected: Input should be greater than or equal to 1"),
        ({"packing": "on"}, {}, "'auto' or 'off'"),
        ({"intra_op_threads": 10**8}, {}, "less than or equal to 1024"),
        ({"timeout_ms": "inf"}, {}, "finite"),
        ({"truncation": "left"}, {}, "longest_first"),
        ({"task": "ner", "task_suffix": "_en_to_fr"}, {}, "only `translation` takes one"),
        ({}, unit(batch_size=("INT", "x")), "got 'x', expected a value of type INT @ batch_size"),
        ({}, unit(warmup=("BOOL", "maybe")), "expected a value of type BOOL @ warmup"),
        (
            {},
            unit(task=("TEXT", "x")),
            "got the type 'TEXT', expected one of INT, FLOAT, DOUBLE, STRING, BOOL",
        ),
        ({}, {"PREDICTIVE_UNIT_PARAMETERS": "{"}, "invalid JSON"),
        ({}, {"PREDICTIVE_UNIT_PARAMETERS": '{"a": 1}'}, "expected a JSON list"),
        ({}, {"PREDICTIVE_UNIT_PARAMETERS": '["a"]'}, "expected name, value and type"),
    ],
)
def test_what_is_refused_names_the_key_and_the_remedy(extra: Any, environment: Any, message: str) -> None:
    with pytest.raises(InvalidSettings) as caught:
        read_settings(extra, environment)
    assert message in str(caught.value)


def test_the_settings_are_frozen_and_described() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().task = "x"  # type: ignore[misc]
    assert all(field.description for field in Settings.model_fields.values())
