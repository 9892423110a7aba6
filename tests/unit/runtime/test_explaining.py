"""Which of a request's words are options, which parameters, and what is answered."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlserver.types import InferenceRequest, Parameters, RequestInput, RequestOutput, ResponseOutput
from pydantic import Field

from mlserver_hftasks.errors import DeadlineExceeded, InvalidRequest, RequestTooLarge
from mlserver_hftasks.explain.options import ExplainOptions
from mlserver_hftasks.explain.result import Explanation
from mlserver_hftasks.runtime import service as service_module
from mlserver_hftasks.runtime.explaining import AnsweringService, Explaining
from mlserver_hftasks.runtime.service import Reply
from mlserver_hftasks.tasks.signature import InputSpec, OutputSpec, Signature
from mlserver_hftasks.tasks.signature import Parameters as TaskParameters
from tests.explanations import explanation
from tests.unit.codecs.test_content import JSON


class SomeParameters(TaskParameters):
    top_k: int | None = Field(1, ge=1)
    truncation: bool | None = None


SIGNATURE = Signature(
    inputs=(InputSpec("inputs", ("args",)),),
    parameters=SomeParameters,
    outputs=(OutputSpec("score", "FP32", (-1,)), OutputSpec("label", "BYTES", (-1,))),
)


class FakeExplainer:
    """Explains each text, and keeps what it was asked."""

    methods = ("auto", "occlusion")

    def __init__(self) -> None:
        self.asked: list[tuple[Any, Any, ExplainOptions]] = []
        self.delay_s = 0.0
        self.closed = False

    async def explain(
        self,
        inputs: Mapping[str, Sequence[Any]],
        parameters: Any,
        options: ExplainOptions,
        answered: Any = None,
    ) -> list[Explanation]:
        self.asked.append((dict(inputs), parameters, options))
        self.answered = answered
        await asyncio.sleep(self.delay_s)
        return [explanation((text,)) for text in inputs["inputs"]]

    async def close(self) -> None:
        self.closed = True


class FakePredictions:
    """Answers with the names it was asked for."""

    def __init__(self) -> None:
        self.asked: list[InferenceRequest] = []

    def has_output(self, name: str) -> bool:
        return name in {"output", "score", "label"}

    async def answer(self, payload: InferenceRequest) -> Reply:
        return (await self.answer_with(payload))[0]

    async def answer_with(self, payload: InferenceRequest) -> tuple[Reply, list[str]]:
        self.asked.append(payload)
        names = [output.name for output in payload.outputs or ()] or ["output"]
        outputs = [
            ResponseOutput(name=name, shape=[1], datatype="BYTES", data=["predicted"]) for name in names
        ]
        return Reply(outputs, {"said": "so"}), ["what it says"]

    async def stream(self, payload: InferenceRequest) -> AsyncIterator[Reply]:
        for _ in range(3):
            yield await self.answer(payload)


def nested(levels: int) -> Any:
    made: Any = 1
    for _ in range(levels):
        made = [made]
    return made


def request_of(
    outputs: Sequence[str] = (), inputs: Sequence[Any] = (), parameters: Mapping[str, Any] | None = None
) -> InferenceRequest:
    return InferenceRequest(
        inputs=[RequestInput(name="inputs", shape=[2], datatype="BYTES", data=["one", "two"]), *inputs],
        outputs=[RequestOutput(name=name) for name in outputs] or None,
        parameters=Parameters(**(parameters or {})),
    )


class Desk:
    def __init__(self, mode: str = "infer", predicts: bool = True, **settings: Any) -> None:
        self.explainer, self.predictions = FakeExplainer(), FakePredictions()
        explaining = Explaining(self.explainer, SIGNATURE, **settings)
        predictions: Any = self.predictions if predicts else None
        self.service = AnsweringService(predictions, explaining, mode=mode)

    async def ask(self, outputs: Sequence[str] = (), inputs: Sequence[Any] = (), **parameters: Any) -> Any:
        reply = await self.service.answer(request_of(outputs, inputs, parameters))
        return {output.name: output for output in reply.outputs}

    @property
    def options(self) -> ExplainOptions:
        return self.explainer.asked[-1][2]

    @property
    def parameters(self) -> Any:
        return self.explainer.asked[-1][1]


def said(options: ExplainOptions) -> dict[str, Any]:
    return options.model_dump(exclude_unset=True)


async def test_without_a_word_of_explanations_there_is_none() -> None:
    desk = Desk()
    assert list(await desk.ask(top_k=2)) == ["output"]
    assert list(await desk.ask(explain=False)) == ["output"]
    assert not desk.explainer.asked


@pytest.mark.parametrize(
    ("asked", "options"),
    [
        (True, {}),
        ("true", {}),
        ("occlusion", {"method": "occlusion"}),
        ({"target": 1, "html": True}, {"target": 1, "html": True}),
        ('{"method": "input_x_gradient", "top_k": 3}', {"method": "input-x-gradient", "top_k": 3}),
    ],
)
async def test_explain_beside_a_prediction(asked: Any, options: dict[str, Any]) -> None:
    desk = Desk()
    made = await desk.ask(explain=asked, top_k=2)
    assert next(iter(made)) == "output"
    assert {"tokens", "attributions", "score", "explanation"} <= set(made)
    assert ("html" in made) == bool(options.get("html"))
    assert said(desk.options) == options
    assert desk.parameters.top_k == 2  # the task's, since options come under their own name here
    (predicted,) = desk.predictions.asked
    assert predicted.parameters is not None
    assert predicted.parameters.model_extra == {"top_k": 2}
    assert desk.explainer.answered == ["what it says"]  # not asked again


async def test_without_a_prediction_nothing_is_known_of_it() -> None:
    desk = Desk()
    await desk.ask(mode="explain")
    assert desk.explainer.answered is None
    await desk.ask(explain=True, outputs=["attributions"])
    assert desk.explainer.answered is None
    assert not desk.predictions.asked


async def test_explain_as_a_tensor() -> None:
    desk = Desk()
    tensor = RequestInput(name="explain", shape=[1], datatype="BYTES", data=['{"method": "occlusion"}'])
    await desk.ask(inputs=[tensor])
    assert said(desk.options) == {"method": "occlusion"}
    tensor = RequestInput(name="explain", shape=[1], datatype="BOOL", data=[True])
    await desk.ask(inputs=[tensor])
    assert said(desk.options) == {}
    with pytest.raises(InvalidRequest, match="2 values"):
        await desk.ask(inputs=[RequestInput(name="explain", shape=[2], datatype="BYTES", data=["a", "b"])])


@pytest.mark.parametrize("desk", [Desk(mode="explain"), Desk()], ids=["setting", "request"])
async def test_the_mode_gives_explanations_only(desk: Desk) -> None:
    request = {} if desk.service.mode == "explain" else {"mode": "explain"}
    made = await desk.ask(method="occlusion", top_k=4, truncation=True, **request)
    assert "output" not in made
    assert not desk.predictions.asked
    assert said(desk.options) == {"method": "occlusion", "top_k": 4}
    assert desk.parameters.model_dump(exclude_unset=True) == {"truncation": True}


async def test_a_stream_of_predictions_stays_one() -> None:
    desk = Desk()
    assert len([reply async for reply in desk.service.stream(request_of())]) == 3
    (reply,) = [reply async for reply in desk.service.stream(request_of(parameters={"explain": True}))]
    assert [output.name for output in reply.outputs][:2] == ["output", "tokens"]
    assert reply.parameters == {"said": "so"}


async def test_the_mode_of_a_request_wins() -> None:
    desk = Desk(mode="explain")
    assert list(await desk.ask(mode="infer")) == ["output"]
    with pytest.raises(InvalidRequest, match="expected infer or explain @ mode"):
        await desk.ask(mode="dream")
    with pytest.raises(InvalidRequest, match="@ mode"):
        await desk.ask(mode=["explain"])


async def test_the_nearest_word_counts() -> None:
    desk = Desk(mode="explain", defaults={"method": "occlusion", "tolerance": 0.5, "level": "word"})
    await desk.ask(tolerance=0.25, explain={"level": "token"})
    assert said(desk.options) == {"method": "occlusion", "tolerance": 0.25, "level": "token"}


async def test_options_do_not_cross_requests() -> None:
    desk = Desk(mode="explain")
    await asyncio.gather(*(desk.ask(target=f"label {n}") for n in range(8)), desk.ask())
    targets = {options.target for _, _, options in desk.explainer.asked}
    assert targets == {None, *(f"label {n}" for n in range(8))}


async def test_outputs_select_and_do_nothing_else() -> None:
    desk = Desk(mode="explain")
    assert list(await desk.ask(["delta", "tokens"])) == ["delta", "tokens"]
    assert list(await desk.ask(["html"])) == ["html"]
    assert said(desk.options) == {}
    with pytest.raises(InvalidRequest, match="unknown output 'token', did you mean 'tokens'"):
        await desk.ask(["token"])


async def test_outputs_of_both_in_the_order_asked() -> None:
    desk = Desk()
    made = await desk.ask(["attributions", "label", "tokens", "score"], explain=True)
    assert list(made) == ["attributions", "label", "tokens", "score"]
    # Both have a score: it is the prediction's, as metadata says.
    assert made["score"].datatype == "BYTES"
    assert [output.name for output in desk.predictions.asked[0].outputs or ()] == ["label", "score"]


async def test_answers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(mode="explain")
    made = await desk.ask(["attributions"])
    monkeypatch.setattr(service_module, "MAX_NUMBERS", len(made["attributions"].data))
    assert await desk.ask(["attributions"])
    with pytest.raises(RequestTooLarge, match="send fewer items @ outputs"):
        await desk.ask(["attributions", "delta"])
    with pytest.raises(RequestTooLarge, match="send fewer items @ outputs"):
        await desk.ask()


async def test_what_is_not_asked_for_is_not_done() -> None:
    desk = Desk()
    assert list(await desk.ask(["attributions"], explain=True)) == ["attributions"]
    assert not desk.predictions.asked
    assert list(await desk.ask(["label"], explain=True)) == ["label"]
    assert len(desk.explainer.asked) == 1


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"explain": {"methode": "occlusion"}}, "unknown option 'methode', did you mean 'method'? @ explain"),
        ({"explain": "occlusio"}, "@ explain.method"),
        ({"explain": {"tolerance": -1}}, "@ explain.tolerance"),
        ({"explain": {"tolerance": 1e-300}}, "@ explain.tolerance"),
        ({"explain": [1]}, "@ explain"),
        ({"explain": "{"}, "invalid JSON"),
        ({"explain": 7}, "@ explain"),
        ({"explain": nested(1000)}, "nested too deeply"),
        ({"mode": nested(1000)}, "nested too deeply"),
        ({"mode": "explain", "explain": False}, "@ explain"),
        ({"mode": "explain", "methode": "occlusion"}, "did you mean 'method'?"),
        ({"mode": "explain", "tolerance": True}, "no boolean"),
        ({"explain": True, "method": "occlusion"}, "unknown input or parameter 'method'"),
    ],
)
async def test_what_is_wrong_is_told(parameters: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        await Desk().ask(**parameters)
    assert reason in str(error.value)


OPTIONS = st.dictionaries(st.sampled_from([*ExplainOptions.model_fields, "other"]), JSON, max_size=4)


@given(JSON | OPTIONS | OPTIONS.map(json.dumps) | st.text(max_size=9), st.sampled_from(["infer", "explain"]))
def test_any_wish_is_granted_or_refused(wish: Any, mode: str) -> None:
    async def ask() -> None:
        assert await Desk(mode=mode).ask(explain=wish)

    with contextlib.suppress(InvalidRequest):
        asyncio.run(ask())


async def test_a_model_that_only_explains() -> None:
    desk = Desk(mode="explain", predicts=False)
    assert "attributions" in await desk.ask()
    with pytest.raises(InvalidRequest, match="only explains"):
        await desk.ask(mode="infer")
    await desk.service.close()
    assert desk.explainer.closed


async def test_the_timeout_is_kept() -> None:
    desk = Desk(mode="explain", timeout_ms=60_000.0)
    desk.explainer.delay_s = 30
    with pytest.raises(DeadlineExceeded):
        await desk.ask(timeout_ms=20)
