"""V1 instances to V2 requests, and the answers back in the order of the instances."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlserver.types import InferenceResponse, ResponseOutput

from mlserver_hftasks.codecs.instances import MAX_INSTANCES, MAX_REQUESTS, encode_explanations, requests_of
from mlserver_hftasks.errors import InvalidRequest
from tests.unit.codecs.test_content import JSON


def groups_of(*instances: Any, **rest: Any) -> Any:
    return requests_of(json.dumps({"instances": instances, **rest}).encode(), "explanation")


def inputs_of(request: Any) -> dict[str, list[Any]]:
    return {
        tensor.name: [json.loads(element) for element in tensor.data.root]
        for tensor in request.inputs
        if tensor.parameters.content_type == "hg_jsonlist"
    }


@pytest.mark.parametrize("instance", ["a text", {"text": "a text"}, {"data": "a text"}])
def test_forms_of_a_text(instance: Any) -> None:
    (group,) = groups_of(instance)
    assert inputs_of(group.request) == {"args": ["a text"]}
    assert [output.name for output in group.request.outputs] == ["explanation"]


def test_a_pair_and_a_question() -> None:
    (pair,) = groups_of({"text": "one", "text_pair": "two"})
    assert inputs_of(pair.request) == {"text": ["one"], "text_pair": ["two"]}
    (question,) = groups_of({"question": "who?", "context": "she", "target": 3})
    assert inputs_of(question.request) == {"question": ["who?"], "context": ["she"]}
    assert question.request.parameters.model_extra == {"target": 3}


def test_instances_that_agree_are_one_request() -> None:
    groups = groups_of(
        {"text": "a", "target": 1}, {"text": "b", "target": 0}, "c", {"target": 1, "text": "d"}, "e",
        parameters={"method": "occlusion"},
    )  # fmt: skip
    assert [(inputs_of(group.request)["args"], group.indices) for group in groups] == [
        (["a", "d"], (0, 3)),
        (["b"], (1,)),
        (["c", "e"], (2, 4)),
    ]
    assert [group.request.parameters.model_extra for group in groups] == [
        {"method": "occlusion", "target": 1},
        {"method": "occlusion", "target": 0},
        {"method": "occlusion"},
    ]


def test_one_and_true_are_not_the_same_target() -> None:
    assert len(groups_of({"text": "a", "target": 1}, {"text": "a", "target": True})) == 2


def test_answers_come_back_in_the_order_of_the_instances() -> None:
    groups = groups_of({"text": "a", "target": 1}, {"text": "b", "target": 0}, {"text": "c", "target": 1})
    answers = [
        InferenceResponse(
            model_name="m",
            outputs=[
                ResponseOutput(
                    name="explanation",
                    shape=[len(group.indices), 1],
                    datatype="BYTES",
                    data=[json.dumps({"of": index}).encode() for index in group.indices],
                )
            ],
        )
        for group in groups
    ]
    assert json.loads(encode_explanations(groups, answers)) == {"explanations": [{"of": n} for n in range(3)]}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"{", "invalid JSON"),
        (b"[]", "@ instances"),
        (b"{}", "@ instances"),
        (b'{"instances": "a"}', "@ instances"),
        (b'{"instances": []}', "expected 1..1024 @ instances"),
        (b'{"instances": [1]}', "@ instances[0]"),
        (b'{"instances": [' + b"[" * 1000 + b"]" * 1000 + b"]}", "nested too deeply"),
        (b'{"instances": [{"text": ' + b"[" * 400 + b"]" * 400 + b"}]}", "nested too deeply"),
        (b'{"instances": [{"text": "a", "target": ' + b"[" * 400 + b"]" * 400 + b"}]}", "nested too deeply"),
        (b'{"instances": ["a", {"target": 1}]}', "@ instances[1]"),
        (b'{"instances": [{"text": "a", "data": "b"}]}', "both text and data"),
        (b'{"instances": ["a"], "instance": []}', "did you mean 'instances'?"),
        (b'{"instances": ["a"], "parameters": []}', "@ parameters"),
        (b'{"instances": [{"text": "a", "headers": {}}]}', "headers"),
    ],
)
def test_what_is_wrong_is_told(body: bytes, reason: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        requests_of(body, "explanation")
    assert reason in str(error.value)


KEYS = st.sampled_from(
    ["instances", "parameters", "text", "data", "text_pair", "question", "target", "headers"]
)
BODIES = st.recursive(
    JSON, lambda inner: st.dictionaries(KEYS, inner | st.lists(inner, max_size=3), max_size=3)
)


@given(BODIES | st.lists(BODIES, min_size=1, max_size=3).map(lambda each: {"instances": each}))
def test_any_body_is_read_or_refused(body: Any) -> None:
    try:
        groups = requests_of(json.dumps(body).encode(), "explanation")
    except InvalidRequest as error:
        assert " @ " in str(error)
    else:
        indices = sorted(index for group in groups for index in group.indices)
        assert indices == list(range(len(body["instances"])))


def test_counts_are_bounded() -> None:
    with pytest.raises(InvalidRequest, match=f"1..{MAX_INSTANCES}"):
        groups_of(*["a"] * (MAX_INSTANCES + 1))
    with pytest.raises(InvalidRequest, match=f"at most {MAX_REQUESTS}"):
        groups_of(*[{"text": "a", "target": n} for n in range(MAX_REQUESTS + 1)])
