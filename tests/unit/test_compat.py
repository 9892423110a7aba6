"""The compatibility suite's own parts: the requests, the comparison, the page. No server runs here."""

import json
from dataclasses import replace
from typing import Any

import pytest

from tests.compat.compare import differences
from tests.compat.known import explained
from tests.compat.models import MODELS
from tests.compat.replay import REQUESTS, Answer, Case, Output, cases
from tests.compat.report import judge, stale

CASE = Case("x", "rest", "sentiment", None, {"inputs": []})


def answer(*elements: Any, name: str = "output", **fields: Any) -> Answer:
    data = [json.dumps(element) for element in elements]
    output = Output(name, "BYTES", [len(data), 1], {"content_type": "hg_jsonlist"}, data)
    return Answer("200", envelope={"model_name": "m"}, outputs=[replace(output, **fields)])


def test_the_requests_are_many_and_of_models_that_there_are() -> None:
    all_cases = cases()
    assert len({case.request_id for case in all_cases}) >= 80
    assert {case.protocol for case in all_cases} == {"rest", "grpc", "grpc-contents"}
    assert {model.name for model in MODELS} == {case.model for case in all_cases} - {"nobody"}


@pytest.mark.parametrize(
    "content_type",
    [
        "str",
        "raw",
        "hg_json",
        "hg_jsonlist",
        "hg_conversation",
        "pillow_image",
        "base64",
        "np",
        "nplist",
        "hf",
    ],
)
def test_every_content_type_is_sent(content_type: str) -> None:
    assert f'"content_type": "{content_type}"' in REQUESTS.read_text()


def test_the_page_explains_requests_that_there_are() -> None:
    names = {name for case in cases() for name in (case.name, case.request_id)}
    assert {request for request, _ in explained()} <= names


def test_a_row_of_the_page_may_name_several_requests_and_kinds() -> None:
    page = "| request | what | why |\n| --- | --- | --- |\n| `a`, `b@grpc` | shape, keys | so it is |\n"
    assert explained(page) == {
        (request, kind): "so it is" for request in ("a", "b@grpc") for kind in ("shape", "keys")
    }
    with pytest.raises(ValueError, match="'a' with 'shape' is there twice"):
        explained(page + "| `a` | shape | again |\n")


LABEL = {"label": "A", "score": 0.5}


@pytest.mark.parametrize(
    ("ours", "kinds"),
    [
        (answer(LABEL), []),
        (answer({"label": "A", "score": 0.50009}), []),
        (answer({"label": "A", "score": 0.5002}), ["numbers"]),
        (answer({"label": "A", "score": float("nan")}), ["numbers"]),
        (answer({"label": "A", "score": 1}), ["types"]),
        (answer({"label": "B", "score": 0.5}), ["values"]),
        (answer({"score": 0.5, "label": "A"}), ["keys"]),
        (answer({"label": "A"}), ["keys"]),
        (answer([LABEL]), ["types"]),
        (answer(LABEL, LABEL), ["shape", "lengths"]),
        (answer(LABEL, name="output-1"), ["output names"]),
        (answer(LABEL, datatype="FP32"), ["datatype"]),
        (answer(LABEL, parameters={"content_type": "str"}), ["parameters", "types"]),
        (replace(answer(LABEL), envelope={"model_name": "n"}), ["values"]),
        (replace(answer(LABEL), envelope={"model_name": "m", "id": "7"}), ["keys"]),
        (Answer("400", "no"), ["ours refuses"]),
    ],
)
def test_what_differs_is_found(ours: Answer, kinds: list[str]) -> None:
    assert sorted(each.kind for each in differences(answer(LABEL), ours)) == sorted(kinds)


def test_errors_differ_in_their_status_only() -> None:
    theirs, ours = Answer("500", "Internal Server Error"), Answer("400", '{"error": "no"}')
    assert [each.kind for each in differences(theirs, ours)] == ["status"]
    assert [each.kind for each in differences(theirs, answer())] == ["theirs fails"]
    assert differences(theirs, Answer("500", "another text")) == []


def test_only_what_the_page_explains_is_explained() -> None:
    found = differences(answer(LABEL), answer(LABEL, LABEL))
    reasons = {("x", "shape"): "why", ("x@rest", "lengths"): "why"}
    assert judge(CASE, [], reasons).verdict == "equal"
    assert judge(CASE, found, reasons).verdict == "explained"
    assert judge(CASE, found, {("x", "shape"): "why"}).verdict == "different"
    assert judge(CASE, found, {("x@grpc", "shape"): "why", **reasons}).verdict == "explained"


def test_an_explanation_must_hold_for_all_that_it_names() -> None:
    found = differences(answer(LABEL), Answer("400", "no"))
    rest, grpc = (judge(replace(CASE, protocol=protocol), found, {}) for protocol in ("rest", "grpc"))
    equal = judge(replace(CASE, protocol="grpc"), [], {})
    reason = {("x", "ours refuses"): "why"}
    assert stale([rest, grpc], reason) == []
    assert stale([rest, equal], reason) == [("x", "ours refuses")]
    assert stale([rest, equal], {("x@rest", "ours refuses"): "why"}) == []
    assert stale([rest, grpc], {("y", "status"): "why"}) == [("y", "status")]
