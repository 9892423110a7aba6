"""Explanations through every door of a real server, over REST and gRPC, with and without workers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from mlserver_hftasks.client import explain, read
from mlserver_hftasks.explain.tensors import OUTPUTS
from tests import tiny
from tests.server.grpc_client import GrpcClient, unpacked
from tests.server.process import Model, Server
from tests.server.v2 import assert_same, at_once, tensor, texts

TEXT = "The museum by the river was quiet, but the harbour was not."
OTHER = "I loved this film"
NAMES = [spec.name for spec in OUTPUTS]
DEFAULT_NAMES = [name for name in NAMES if name != "html"]
DTYPES = {"BYTES": np.object_, "FP32": np.float32, "INT64": np.int64, "BOOL": np.bool_}
CHEAP = {"method": "input-x-gradient"}


def explain_path(model: str, version: str | None = None) -> str:
    return f"/v2/models/{model}" + (f"/versions/{version}" if version else "") + "/explain"


def post(server: Server, path: str, inputs: Any, outputs: Any = (), **parameters: Any) -> httpx.Response:
    body: dict[str, Any] = {"inputs": inputs, "parameters": parameters}
    if outputs:
        body["outputs"] = [{"name": name} for name in outputs]
    return server.client.post(path, json=body)


def arrays_of(response: httpx.Response) -> dict[str, Any]:
    """The outputs as arrays; what JSON holds as parsed."""
    assert response.status_code == 200, f"{response.status_code}: {response.text[:500]}"
    return {
        output["name"]: np.array(output["data"], dtype=DTYPES[output["datatype"]]).reshape(output["shape"])
        for output in response.json()["outputs"]
    }


def records_of(response: httpx.Response) -> list[Any]:
    return [json.loads(record) for record in arrays_of(response)["explanation"].ravel()]


def assert_adds_up(arrays: dict[str, Any]) -> None:
    total = arrays["attributions"].sum(axis=2)
    explained = arrays["score"] - arrays["baseline_score"] + arrays["delta"]
    assert np.allclose(total, explained, atol=1e-4)
    for array in arrays.values():
        assert array.dtype != np.float32 or np.isfinite(array).all()


def error_of(response: httpx.Response, status: int = 400) -> str:
    assert response.status_code == status, response.text[:500]
    body = response.json()
    assert list(body) == ["error"]
    return str(body["error"])


@pytest.fixture
def some_grpc(some_server: Server) -> Iterator[GrpcClient]:
    client = GrpcClient(some_server.grpc_url)
    yield client
    client.close()


@pytest.fixture(scope="module")
def explainer(server: Server, sentiment_folder: Path) -> Iterator[Server]:
    """The server, with a model whose setting is to explain."""
    extra = {"task": "text-classification", "mode": "explain", "explain": {"method": "occlusion"}}
    with server.having("explainer", Model(sentiment_folder, extra)) as loaded:
        assert loaded.status_code == 200, loaded.text
        yield server


# -- the doors --------------------------------------------------------------------------------------


def test_the_explain_route(some_server: Server) -> None:
    response = post(some_server, explain_path("sentiment"), texts(TEXT, OTHER))
    arrays = arrays_of(response)
    assert list(arrays) == DEFAULT_NAMES
    assert arrays["num_tokens"].tolist() == [len(record["words"]) for record in records_of(response)]
    assert_adds_up(arrays)
    answered = some_server.results("sentiment", texts(TEXT, OTHER))
    assert arrays["target_label"][:, 0].tolist() == [result["label"] for result in answered]
    words = {word.text for word in read(response.json())[0].words()}
    assert {"museum", "river", "harbour"} <= words


def test_every_door_says_the_same(some_server: Server, explainer: Server) -> None:
    asked = {"method": "occlusion", "target": 0}
    (by_route,) = records_of(post(some_server, explain_path("sentiment"), texts(TEXT), **asked))
    (beside,) = records_of(
        some_server.infer("sentiment", texts(TEXT), outputs=["explanation"], explain=asked)
    )
    (by_mode,) = records_of(some_server.infer("sentiment", texts(TEXT), mode="explain", **asked))
    (by_setting,) = records_of(explainer.infer("explainer", texts(TEXT), target=0))
    body = {"instances": [{"text": TEXT, **asked}]}
    (by_v1,) = some_server.client.post("/v1/models/sentiment:explain", json=body).json()["explanations"]
    for record in (beside, by_mode, by_setting, by_v1):
        assert_same(record, by_route)
    assert by_route["method"] == "occlusion"


def test_beside_a_prediction(some_server: Server) -> None:
    arrays = arrays_of(some_server.infer("sentiment", texts(TEXT), explain=True))
    assert list(arrays) == ["output", *DEFAULT_NAMES]
    assert json.loads(arrays["output"][0, 0]) == some_server.results("sentiment", texts(TEXT))[0]
    assert_adds_up(arrays)
    asked = some_server.infer("sentiment", texts(TEXT), explain="occlusion", outputs=["logits", "delta"])
    assert list(arrays_of(asked)) == ["logits", "delta"]


def test_over_grpc(some_server: Server, some_grpc: GrpcClient) -> None:
    """As a method's name, as JSON in a parameter, and as a tensor; the prediction comes too."""
    (expected,) = records_of(
        post(some_server, explain_path("sentiment"), texts(TEXT), method="occlusion", target=1)
    )
    options = json.dumps({"method": "occlusion", "target": 1})
    as_tensor = [*texts(TEXT), tensor("explain", [options])]
    for answer in (
        some_grpc.infer("sentiment", texts(TEXT), explain=options),
        some_grpc.infer("sentiment", as_tensor),
    ):
        outputs = {output.name: output for output in answer.outputs}
        assert list(outputs) == ["output", *DEFAULT_NAMES]
        (record,) = outputs["explanation"].contents.bytes_contents
        assert_same(json.loads(record), expected)
        shape = list(outputs["attributions"].shape)
        assert len(outputs["attributions"].contents.fp32_contents) == np.prod(shape)
    alone = some_grpc.infer("sentiment", texts(TEXT), mode="explain", method="occlusion", raw=True)
    assert [output.name for output in alone.outputs] == DEFAULT_NAMES
    raw = dict(zip([output.name for output in alone.outputs], alone.raw_output_contents, strict=True))
    assert len(unpacked("BYTES", raw["tokens"])) == len(unpacked("INT64", raw["word_ids"]))


def test_versions(some_server: Server) -> None:
    labels = {}
    for version in ("1", "2", None):
        response = post(some_server, explain_path("versioned", version), texts(TEXT), **CHEAP)
        labels[version] = arrays_of(response)["target_label"][0, 0]
        assert response.json()["model_version"] == (version or "2")
    assert labels["1"] in {"red", "green", "blue"}
    assert labels["2"] in {"cat", "dog"}
    assert labels[None] == labels["2"]


def test_v1_instances(some_server: Server) -> None:
    path = "/v1/models/sentiment:explain"
    instances = [{"text": TEXT, "target": 1}, OTHER, {"data": TEXT, "target": "NEGATIVE"}]
    body = {"instances": instances, "parameters": CHEAP}
    response = some_server.client.post(path, json=body)
    assert response.headers["content-type"] == "application/json"
    (first, second, third) = response.json()["explanations"]
    assert [one["targets"][0]["label"] for one in (first, third)] == ["POSITIVE", "NEGATIVE"]
    assert first["words"] == third["words"] != second["words"]
    for one in (first, second, third):
        assert {"words", "importances", "delta"} <= one.keys()
        assert len(one["words"]) == len(one["importances"])
        assert one["method"] == "input-x-gradient"


def test_v1_question_answering(server: Server) -> None:
    instance = {"question": "What was quiet?", "context": TEXT}
    body = {"instances": [instance], "parameters": CHEAP}
    (one,) = server.client.post("/v1/models/answers:explain", json=body).json()["explanations"]
    assert {"words", "importances_answer_start", "importances_answer_end", "delta_start", "delta_end"} <= set(
        one
    )
    assert one["texts"] == [instance["question"], TEXT]
    assert set(one["sequence_ids"]) == {-1, 0, 1}


def test_the_client(some_server: Server) -> None:
    (reading, _) = explain(f"{some_server.url}/v2/models/sentiment", [TEXT, OTHER], **CHEAP)
    assert "museum" in {word.text for word in reading.words()}
    assert sum(reading.targets[0].attributions) == pytest.approx(
        sum(word.attribution for word in reading.words()), abs=1e-4
    )


def test_html(server: Server) -> None:
    hostile = "<script>alert(1)</script> was quiet"
    arrays = arrays_of(post(server, explain_path("sentiment"), texts(hostile), html=True, **CHEAP))
    assert list(arrays) == NAMES
    (page,) = arrays["html"].ravel()
    assert page.startswith("<!doctype html>")
    assert "<script" not in page
    assert "&lt;" in page


@pytest.mark.parametrize(
    ("model", "inputs", "parameters"),
    [
        ("tokens", texts(TEXT), {}),
        ("answers", [*texts("What was quiet?", name="question"), *texts(TEXT, name="context")], {}),
        ("zero-shot", texts(TEXT), {"candidate_labels": ["art", "sport"]}),
        ("mask", texts("The [MASK] was quiet."), {}),
        ("ranking", [*texts("What was quiet?", name="query"), *texts(TEXT, OTHER, name="texts")], {}),
        ("embeddings", texts(TEXT), {"target": OTHER}),
        ("padded", texts(TEXT, OTHER), {}),
    ],
)
def test_every_task(server: Server, model: str, inputs: Any, parameters: dict[str, Any]) -> None:
    response = post(server, explain_path(model), inputs, **CHEAP, **parameters)
    arrays = arrays_of(response)
    assert list(arrays) == DEFAULT_NAMES
    assert_adds_up(arrays)
    assert read(response.json())[0].words


# -- text that was generated ----------------------------------------------------------------------------

PROMPT = "The river museum was quiet"
FEW = {"max_new_tokens": 4, "min_new_tokens": 4}


def test_answers_over_rest(some_server: Server) -> None:
    path, inputs = explain_path("talker"), texts(PROMPT, OTHER, name="text_inputs")
    arrays = arrays_of(post(some_server, path, inputs, **FEW, max_evals=20))
    assert list(arrays) == DEFAULT_NAMES
    assert_adds_up(arrays)
    assert arrays["target_label"].tolist() == [["answer"]] * 2
    response = post(some_server, path, inputs, **FEW, max_evals=9, per_token=True, html=True)
    arrays = arrays_of(response)
    assert_adds_up(arrays)
    assert arrays["attributions"].shape[:2] == (2, 4)
    for index, reading in enumerate(read(response.json())):
        assert reading.prompt_tokens == arrays["num_tokens"][index] - 4
        assert reading.texts[0] == (PROMPT, OTHER)[index]
        assert arrays["html"][index, 0].count("<section") == 4
        assert (arrays["target"][index, :, 0] == reading.prompt_tokens + np.arange(4)).all()


def test_the_answer_that_was_given_is_explained(some_server: Server) -> None:
    """Also where it was drawn, and nobody knows the seed."""
    drawn = {**FEW, "do_sample": True, "temperature": 3.0, "return_full_text": False}
    said = set()
    for _ in range(3):
        inputs = texts(PROMPT, name="text_inputs")
        arrays = arrays_of(some_server.infer("talker", inputs, explain="input-x-gradient", **drawn))
        ((entry,),) = [json.loads(each) for each in arrays["output"].ravel()]
        assert json.loads(arrays["explanation"][0, 0])["texts"] == [PROMPT, entry["generated_text"]]
        said.add(entry["generated_text"])
    assert len(said) > 1


def test_answers_over_grpc(some_server: Server, some_grpc: GrpcClient) -> None:
    options = {"target": " was", "method": "occlusion"}
    inputs = texts(PROMPT, name="text_inputs")
    (expected,) = records_of(post(some_server, explain_path("talker"), inputs, **options))
    answer = some_grpc.infer("talker", inputs, explain=json.dumps(options), max_new_tokens=2)
    outputs = {output.name: output for output in answer.outputs}
    assert list(outputs) == ["output", *DEFAULT_NAMES]
    (record,) = outputs["explanation"].contents.bytes_contents
    assert_same(json.loads(record), expected)
    assert expected["texts"] == [PROMPT, " was"]
    alone = some_grpc.infer("talker", inputs, mode="explain", **FEW, **CHEAP)
    assert [output.name for output in alone.outputs] == DEFAULT_NAMES


def test_answers_over_v1(server: Server) -> None:
    chat = [{"role": "user", "content": "who opened the museum?"}]
    instances = [{"text": PROMPT, "target": " was"}, {"text": PROMPT, **FEW}]
    body = {"instances": instances, "parameters": CHEAP}
    response = server.client.post("/v1/models/talker:explain", json=body)
    first, second = response.json()["explanations"]
    assert first["texts"] == [PROMPT, " was"]
    assert len(second["words"]) == second["prompt_tokens"] + 4
    body = {"instances": [{"messages": chat, **FEW}], "parameters": CHEAP}
    (one,) = server.client.post("/v1/models/chatter:explain", json=body).json()["explanations"]
    told = "".join(
        one["texts"][0][start:end] for start, end in one["spans"][: one["prompt_tokens"]] if start >= 0
    )
    assert told == chat[0]["content"].replace(" ", "")
    (reading, _) = explain(f"{server.url}/v2/models/talker", [PROMPT, OTHER], per_token=True, **FEW, **CHEAP)
    assert len(reading.targets) == 4


def test_a_model_that_only_explains_its_answers(server: Server) -> None:
    folder = tiny.folder("llama", "causal")
    extra = {"task": "text-generation", "mode": "explain", "explain": {"per_token": True, **CHEAP}}
    with server.having("why-talker", Model(folder, extra)) as loaded:
        assert loaded.status_code == 200, loaded.text
        arrays = arrays_of(server.infer("why-talker", texts(PROMPT, name="text_inputs"), **FEW))
        assert arrays["attributions"].shape[1] == 4
        metadata = server.client.get("/v2/models/why-talker").json()
        assert metadata["parameters"]["explain_methods"].startswith("auto, integrated-gradients")
        assert "per_token" in {each["name"] for each in metadata["inputs"]}


def test_answers_of_encoders_with_decoders(server: Server) -> None:
    folder = tiny.folder("t5", "seq2seq")
    with server.having("why-t5", Model(folder, {"task": "summarization"})) as loaded:
        assert loaded.status_code == 200, loaded.text
        arrays = arrays_of(server.infer("why-t5", texts(TEXT), explain="occlusion", max_length=6))
        assert_adds_up(arrays)
        record = json.loads(arrays["explanation"][0, 0])
        assert record["texts"] == [TEXT, json.loads(arrays["output"][0, 0])["summary_text"]]
        metadata = server.client.get("/v2/models/why-t5").json()
        assert metadata["parameters"]["explain_methods"] == "auto, occlusion, permutation-shap"


def test_bad_requests_for_answers(server: Server) -> None:
    path, inputs = explain_path("talker"), texts(PROMPT, name="text_inputs")
    assert "@ explain.target" in error_of(post(server, path, inputs, target=7))
    many = {"max_new_tokens": 80, "min_new_tokens": 80}
    assert "at most 64 to explain" in error_of(post(server, path, inputs, per_token=True, **many))
    assert "@ num_return_sequences" in error_of(
        post(server, path, inputs, num_return_sequences=2, do_sample=True, **FEW)
    )
    assert "@ explain.per_token" in error_of(
        post(server, explain_path("sentiment"), texts(TEXT), per_token=True)
    )


# -- what comes of many ---------------------------------------------------------------------------------


def test_options_do_not_cross_clients(some_server: Server) -> None:
    def ask(number: int) -> Any:
        target, method = number % 2, ("occlusion", "input-x-gradient")[number // 2 % 2]
        response = post(
            some_server, explain_path("sentiment"), texts(TEXT, OTHER), target=target, method=method
        )
        return [(one["method"], one["targets"][0]["id"]) for one in records_of(response)]

    answers = at_once([lambda number=number: ask(number) for number in range(12)])  # type: ignore[misc]
    for number, answer in enumerate(answers):
        assert answer == [(("occlusion", "input-x-gradient")[number // 2 % 2], number % 2)] * 2


def test_predictions_are_the_same_while_explaining(server: Server) -> None:
    expected = server.results("sentiment", texts(TEXT, OTHER), top_k=2)
    with ThreadPoolExecutor(4) as pool:
        busy = [pool.submit(post, server, explain_path("sentiment"), texts(*[TEXT] * 4)) for _ in range(8)]
        for _ in range(20):
            # Within what other neighbours in a batch change, too.
            assert_same(server.results("sentiment", texts(TEXT, OTHER), top_k=2), expected)
        assert all(future.result().status_code == 200 for future in busy)


# -- what is wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"methode": "occlusion"}, "did you mean 'method'?"),
        ({"method": "magic"}, "@ explain.method"),
        ({"target": "SIDEWAYS"}, "target"),
        ({"target": 7}, "target"),
        ({"target": -1}, "target"),
        ({"tolerance": 0}, "tolerance"),
        ({"max_evals": 10**9}, "max_evals"),
        ({"level": "sentence"}, "level"),
        ({"explain": "{"}, "invalid JSON"),
        ({"explain": {"infer_uri": "http://127.0.0.1/"}}, "unknown option 'infer_uri'"),
        ({"mode": "magic"}, None),
    ],
)
def test_bad_options(some_server: Server, parameters: dict[str, Any], reason: str | None) -> None:
    response = post(some_server, explain_path("sentiment"), texts(TEXT), **parameters)
    if reason is None:  # the door says the mode
        assert response.status_code == 200
    else:
        assert reason in error_of(response)


def test_bad_texts(server: Server) -> None:
    path = explain_path("sentiment")
    assert "expected at most 128" in error_of(post(server, path, texts("museum " * 200)))
    assert "@ inputs" in error_of(post(server, path, [tensor("inputs", [], shape=[0])]))
    assert "expected at most 300" in error_of(post(server, explain_path("limited"), texts("a" * 301)), 413)
    assert "unknown output 'token'" in error_of(post(server, path, texts(TEXT), ["token"]))
    cut = arrays_of(post(server, path, texts("museum " * 200), truncation=True, **CHEAP))
    assert cut["num_tokens"].tolist() == [128]
    assert "without tokens" in error_of(post(server, path, texts(TEXT, "")))


def test_no_explanation_of_hidden_states(server: Server) -> None:
    assert "explain" in error_of(post(server, explain_path("features"), texts(TEXT)))
    metadata = server.client.get("/v2/models/features").json()
    assert "explain_methods" not in metadata["parameters"]
    assert "explain" not in {each["name"] for each in metadata["inputs"]}


def test_bad_bodies(some_server: Server) -> None:
    for path in (explain_path("sentiment"), "/v1/models/sentiment:explain"):
        for body in (b"", b"{", b"[]", b"{}", b'{"inputs": 1, "instances": 1}'):
            error_of(some_server.client.post(path, content=body))
    assert "expected at most" in error_of(
        some_server.client.post("/v1/models/limited:explain", content=b" " * 30_000), 413
    )
    wrong = some_server.client.post(
        "/v1/models/sentiment:explain", json={"instances": [OTHER, {"text": TEXT, "target": "SIDEWAYS"}]}
    )
    assert "target" in error_of(wrong)


def test_no_such_model(some_server: Server) -> None:
    error_of(post(some_server, explain_path("nobody"), texts(TEXT)), 404)
    error_of(post(some_server, explain_path("versioned", "9"), texts(TEXT)), 404)
    assert some_server.client.post("/v1/models/nobody:explain", json={"instances": [TEXT]}).status_code == 404
    assert some_server.client.get(explain_path("sentiment")).status_code == 405


# -- metadata -----------------------------------------------------------------------------------------


def test_metadata(explainer: Server) -> None:
    beside = explainer.client.get("/v2/models/sentiment").json()
    assert not {"attributions", "explanation"} & {output["name"] for output in beside["outputs"]}
    assert beside["parameters"]["explain_outputs"] == ", ".join(NAMES)
    assert "explain" in {each["name"] for each in beside["inputs"]}
    assert beside["parameters"]["explain_methods"].startswith("auto, ")

    alone = explainer.client.get("/v2/models/explainer").json()
    assert alone["parameters"]["mode"] == "explain"
    assert [output["name"] for output in alone["outputs"]] == NAMES
    assert {"method", "target", "max_evals"} <= {each["name"] for each in alone["inputs"]}
    arrays = arrays_of(explainer.infer("explainer", texts(TEXT, OTHER), html=True))
    for output in alone["outputs"]:
        array = arrays[output["name"]]
        assert array.ndim == len(output["shape"])
        assert DTYPES[output["datatype"]] == array.dtype


# -- another server's model -----------------------------------------------------------------------------


def black_box(server: Server, model: str, **extra: Any) -> Model:
    uri = f"{server.url}/v2/models/{model}/infer"
    return Model(None, {"infer_uri": uri, **extra})


def test_a_model_that_explains_another(some_server: Server, servers: Callable[[int], Server]) -> None:
    """The explainer lives on a server with or without workers, the model on one without."""
    model = black_box(servers(0), "sentiment", explain={"method": "occlusion"})
    with some_server.having("why-sentiment", model) as loaded:
        assert loaded.status_code == 200, loaded.text
        arrays = arrays_of(some_server.infer("why-sentiment", texts(TEXT)))
        (prediction,) = servers(0).results("sentiment", texts(TEXT))
        assert arrays["target_label"].tolist() == [[prediction["label"]]]
        assert arrays["score"][0, 0] == pytest.approx(prediction["score"], abs=1e-6)
        assert_adds_up(arrays)
        without = TEXT.replace("museum ", "")
        (scores,) = servers(0).results("sentiment", texts(without), top_k=2)[:1]
        left = next(entry["score"] for entry in scores if entry["label"] == prediction["label"])
        museum = arrays["tokens"][0].tolist().index("museum")  # tokens are words here
        assert arrays["attributions"][0, 0, museum] == pytest.approx(prediction["score"] - left, abs=1e-5)
        assert "only explains" in error_of(some_server.infer("why-sentiment", texts(TEXT), mode="infer"))
        assert "no gradients" in error_of(
            some_server.infer("why-sentiment", texts(TEXT), method="integrated-gradients")
        )
        (v1,) = some_server.client.post(
            "/v1/models/why-sentiment:explain", json={"instances": [{"text": TEXT}]}
        ).json()["explanations"]
        assert v1["targets"][0]["label"] == prediction["label"]
        metadata = some_server.client.get("/v2/models/why-sentiment").json()
        assert [output["name"] for output in metadata["outputs"]] == NAMES
        assert metadata["parameters"]["explain_methods"] == "auto, permutation-shap, occlusion"


def test_numbers_of_another_server(server: Server) -> None:
    options = {"infer_output": "logits", "infer_mask": "[MASK]", "explainer_type": "permutation_shap"}
    model = black_box(server, "sentiment", **options)
    with server.having("why-logits", model) as loaded:
        assert loaded.status_code == 200, loaded.text
        (record,) = records_of(server.infer("why-logits", texts(TEXT), max_evals=60))
        (logits,) = arrays_of(server.infer("sentiment", texts(TEXT), outputs=["logits"]))["logits"]
        assert record["targets"][0]["score"] == pytest.approx(max(logits), abs=1e-5)
        assert (record["baseline"], record["method"]) == ("[MASK]", "permutation-shap")
        assert record["evaluations"] <= 60


def test_pairs_and_questions_of_another_server(server: Server) -> None:
    pair = [*texts("the museum", name="text"), *texts("was quiet", name="text_pair")]
    with server.having("why-pairs", black_box(server, "sentiment")) as loaded:
        assert loaded.status_code == 200, loaded.text
        (record,) = records_of(server.infer("why-pairs", pair, method="occlusion"))
        (prediction,) = server.results("sentiment", pair)
        assert record["targets"][0]["label"] == prediction["label"]
        assert record["targets"][0]["score"] == pytest.approx(prediction["score"], abs=1e-6)
        assert record["texts"] == ["the museum", "was quiet"]
        assert record["sequence_ids"] == [0, 0, 1, 1]
        (without,) = server.results("sentiment", [*texts("the", name="text"), pair[1]], top_k=2)[:1]
        left = next(entry["score"] for entry in without if entry["label"] == prediction["label"])
        assert record["importances"][1] == pytest.approx(prediction["score"] - left, abs=1e-5)
    question = {"question": "What was quiet?", "context": TEXT}
    with server.having("why-answers", black_box(server, "answers")) as loaded:
        assert loaded.status_code == 200, loaded.text
        body = {"instances": [question], "parameters": {"method": "occlusion"}}
        (one,) = server.client.post("/v1/models/why-answers:explain", json=body).json()["explanations"]
        inputs = [*texts(question["question"], name="question"), *texts(TEXT, name="context")]
        answers = server.results("answers", inputs, top_k=20)
        best = max({answer["answer"] for answer in answers}, key=lambda text: _total(answers, text))
        assert one["targets"][0]["label"] == best
        assert one["targets"][0]["score"] == pytest.approx(_total(answers, best), abs=1e-6)
        assert one["texts"] == [question["question"], TEXT]
        assert any(one["importances"])


def _total(answers: Any, text: str) -> float:
    return sum(float(answer["score"]) for answer in answers if answer["answer"] == text)


def test_another_server_that_is_not_there(server: Server, sentiment_folder: Path) -> None:
    gone = Model(None, {"mode": "explain", "infer_uri": "http://127.0.0.1:1/v2/models/m/infer"})
    with server.having("why-nobody", gone):
        assert "does not answer" in error_of(server.infer("why-nobody", texts(TEXT)), 503)
    with server.having("why-refused", black_box(server, "limited")):
        long = "museum " * 100
        assert "413" in error_of(server.infer("why-refused", texts(long)))
    far = Model(None, {"mode": "explain", "infer_uri": "http://models.example/v2/models/m/infer"})
    with server.having("why-far", far) as loaded:
        assert "HFTASKS_INFER_URIS" in loaded.text
    extra = {"task": "text-classification", "infer_uri": "http://localhost/", "mode": "infer"}
    predicts = Model(sentiment_folder, extra)
    with server.having("why-both", predicts) as loaded:
        assert '"mode": "explain"' in json.loads(loaded.text)["error"]


def test_a_mode_that_there_is_not(server: Server) -> None:
    extra = {"task": "feature-extraction", "mode": "explain"}
    with server.having("why-features", Model(tiny.folder("bert", "base"), extra)) as loaded:
        assert loaded.status_code == 422
        assert "nothing to explain" in loaded.text


def test_options_in_the_settings_are_checked(server: Server, sentiment_folder: Path) -> None:
    extra = {"task": "text-classification", "explain": {"methode": "occlusion"}}
    with server.having("typo", Model(sentiment_folder, extra)) as loaded:
        assert loaded.status_code == 422
        assert "did you mean 'method'? @ parameters.extra.explain" in loaded.text
