"""Reading explanations at a client, whatever got the answer."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from mlserver_hftasks.client import AnsweredWithError, explain, read
from mlserver_hftasks.explain.record import json_of
from tests.answering import answering
from tests.explanations import explanation

RECORDS = [json_of(explanation((text,))) for text in ("one soup", "two soups")]
V2 = {
    "model_name": "m",
    "outputs": [
        {"name": "tokens", "datatype": "BYTES", "shape": [1], "data": ["x"]},
        {"name": "explanation", "datatype": "BYTES", "shape": [2, 1], "data": RECORDS},
    ],
}


class TritonResult:
    """As `tritonclient`'s: texts are bytes, what was not asked for is None."""

    def as_numpy(self, name: str) -> Any:
        data = np.array([record.encode() for record in RECORDS], dtype=np.object_).reshape(-1, 1)
        return data if name == "explanation" else None


@pytest.mark.parametrize(
    "answer", [V2, {"explanations": [json.loads(record) for record in RECORDS]}, TritonResult()],
    ids=["V2", "V1", "tritonclient"],
)  # fmt: skip
def test_every_form_of_an_answer(answer: Any) -> None:
    readings = read(answer)
    assert [[word.text for word in reading.words()] for reading in readings] == [
        ["one", "soup"],
        ["two", "soups"],
    ]


def test_an_answer_without_explanations() -> None:
    with pytest.raises(ValueError, match="no output 'explanation'"):
        read({"outputs": [{"name": "output", "data": []}]})


def test_asking() -> None:
    with answering(200, V2) as server:
        readings = explain(f"{server.url}/v2/models/m/", ["one soup", {"text": "two"}], method="occlusion")
    assert len(readings) == 2
    (path, body) = server.requests[0]
    assert path == "/v2/models/m/explain"
    assert [json.loads(element) for element in body["inputs"][0]["data"]] == ["one soup", {"text": "two"}]
    assert body["parameters"] == {"method": "occlusion"}
    assert body["outputs"] == [{"name": "explanation"}]


def test_what_the_server_says_against_it() -> None:
    with (
        answering(400, {"error": "got 7, expected: a label @ target"}) as server,
        pytest.raises(AnsweredWithError, match="400: got 7, expected: a label @ target"),
    ):
        explain(f"{server.url}/v2/models/m", ["one"], target=7)


def test_a_client_needs_no_torch() -> None:
    heavy = ("torch", "transformers", "mlserver", "numpy", "pydantic")
    code = f"import sys, mlserver_hftasks.client as c; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
