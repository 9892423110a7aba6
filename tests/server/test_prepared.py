"""What `hftasks prepare` writes is served as it is, with the outputs that its report speaks of."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from mlserver_hftasks.cli.main import app
from tests import tiny
from tests.harness import serve
from tests.server.process import Server
from tests.server.v2 import texts

SENTENCES = ("the river was high", "a museum", "the harbour opened late and the boat waited for the man")


@pytest.mark.parametrize("options", [("--quantize", "int8"), ("--dtype", "bfloat16")], ids=["int8", "bf16"])
def test_a_prepared_folder_is_served(tmp_path: Path, options: tuple[str, ...]) -> None:
    source, root = tiny.folder("bert", "sequence"), tmp_path / "server"
    server = Server(root, {})
    out = server.repository / "sentiment"
    given = ["prepare", str(source), str(out), "--task", "text-classification", *options]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.stderr
    report = json.loads((out / "report.json").read_text())
    with server:
        described = server.client.get("/v2/models/sentiment").json()["parameters"]
        assert described["dtype"] == report["after"]["how"]["dtype"] != "float32"
        asked = {"inputs": texts(*SENTENCES), "outputs": [{"name": "logits"}]}
        answer = server.client.post("/v2/models/sentiment/infer", json=asked).json()["outputs"][0]
    got = np.array(answer["data"]).reshape(answer["shape"])
    task, backend = (exact := serve(source, "text-classification")).task, exact.backend
    examples = task.examples({"inputs": SENTENCES}, task.signature.parse({}))
    wanted = np.array([backend.forward(each.rows)[0]["logits"] for each in examples])
    allowed = 5 * report["difference"]["largest"] + 1e-3
    assert 0 < np.abs(got - wanted).max() < allowed < 0.5 * np.abs(wanted).max()
