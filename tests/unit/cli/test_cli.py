"""`hftasks`: folders that can be served, reports that are true, and one line for what goes wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from mlserver_hftasks.cli import edge, prepare, texts, trial
from mlserver_hftasks.cli.main import app
from mlserver_hftasks.errors import InvalidSettings
from mlserver_hftasks.runtime.folder import read_folder
from tests import tiny
from tests.harness import serve

Run = Callable[..., tuple[int, str, str]]
TASKS = {
    "text-classification": "sequence",
    "token-classification": "token",
    "fill-mask": "mask",
    "question-answering": "qa",
    "feature-extraction": "base",
    "sentence-embedding": "base",
    "text-ranking": "sequence",
    "zero-shot-classification": "sequence",
}
LABELS = {"zero-shot-classification": ("contradiction", "entailment"), "text-ranking": ("relevance",)}


@pytest.fixture(autouse=True)
def wide_and_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge.console, "_width", 200)
    monkeypatch.setattr(trial, "ROUNDS", 1)
    monkeypatch.setattr(trial.Trial, "timed", 4)
    monkeypatch.setattr(texts, "REPEATS", 1)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in this process: its status, its output, its errors."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def called(*arguments: object) -> tuple[int, str, str]:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        return result.exit_code, result.stdout, result.stderr

    return called


@pytest.fixture
def model() -> Path:
    return tiny.folder("bert", "sequence")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def extra_of(folder: Path) -> dict[str, Any]:
    extra: dict[str, Any] = json.loads((folder / "model-settings.json").read_text())["parameters"]["extra"]
    return extra


# -- prepare -------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_prepared_and_checked(task: str, run: Run, tmp_path: Path) -> None:
    source = tiny.folder("bert", TASKS[task], LABELS.get(task))  # type: ignore[arg-type]
    status, output, errors = run("prepare", source, tmp_path / "out", "--task", task, "--quantize", "int8")
    assert (status, errors) == (0, "")
    assert "torch, int8" in output
    assert f"mlserver start {tmp_path / 'out'}" in "".join(output.splitlines())
    status, output, errors = run("check", tmp_path / "out")
    assert (status, errors) == (0, "")
    assert "out can be served" in output
    for known in (task, "int8", "varlen", "BertFor" if TASKS[task] != "base" else "BertModel"):
        assert known in output


def test_the_folder_holds_all_that_is_served(run: Run, tmp_path: Path, model: Path) -> None:
    out = tmp_path / "deep" / "sentiment"
    given = ("--task", "sentiment-analysis", "--quantize", "int8", "--threads", 1)
    assert run("prepare", model, out, *given)[0] == 0
    name, settings = read_folder(out)
    assert name == "sentiment"
    assert settings.pretrained_model == str(out)
    assert extra_of(out) == {
        "task": "text-classification",
        "backend": "torch",
        "quantization": "int8",
        "intra_op_threads": 1,
    }
    assert {path.name for path in out.iterdir()} == {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("model-settings.json", "report.json"),
    }
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in out.iterdir())
    assert [path.name for path in out.parent.iterdir()] == ["sentiment"]


def test_the_report_is_true(run: Run, tmp_path: Path, model: Path) -> None:
    sentences = ["the river was high", "a museum", "the harbour opened late and the boat waited"]
    file = tmp_path / "check.txt"
    file.write_text("\n".join(sentences) + "\n\n")
    out = tmp_path / "out"
    given = ("--task", "text-classification", "--quantize", "int8", "--check", file)
    assert run("prepare", model, out, *given)[0] == 0
    report = json.loads((out / "report.json").read_text())
    logits = []
    for settings in ({}, {"quantization": "int8"}):
        served = serve(model, "text-classification", **settings)
        examples = served.task.examples({"inputs": sentences}, served.task.signature.parse({}))
        logits.append([served.backend.forward([each.rows[0]])[0]["logits"] for each in examples])
    before, after = np.array(logits)
    assert report["rows"] == 3
    assert report["difference"]["largest"] == pytest.approx(np.abs(after - before).max(), rel=0.1)
    assert report["difference"]["agreement"] == np.mean(before.argmax(1) == after.argmax(1))
    assert report["before"]["how"]["dtype"] == "float32"
    assert report["after"]["how"]["dtype"] == "int8"
    assert report["before"]["weights_bytes"] == (model / "model.safetensors").stat().st_size
    for side in ("before", "after"):
        assert report[side]["speed"]["per_s"] > 0
        assert 0 < report[side]["speed"]["latency_ms"] < 5000
    assert report["machine"]["threads"] == torch.get_num_threads()


def test_bfloat16_halves_the_weights(run: Run, tmp_path: Path, model: Path) -> None:
    given = ("--task", "text-classification", "--dtype", "bfloat16")
    assert run("prepare", model, tmp_path / "out", *given)[0] == 0
    before, after = ((folder / "model.safetensors").stat().st_size for folder in (model, tmp_path / "out"))
    assert after < 0.6 * before
    assert "dtype" in extra_of(tmp_path / "out")


REFUSED = {
    "unknown task": (["--task", "sentimnt-analysis"], "did you mean 'sentiment-analysis'?"),
    "wrong head": (
        ["--task", "question-answering", "--check", "texts.txt"],
        "does not fit question-answering",
    ),
    "dtype of int8": (["--task", "ner", "--quantize", "int8", "--dtype", "bfloat16"], "expected float32"),
    "static": (["--task", "ner", "--quantize", "int8-static"], 'expected "int8" or "none"'),
    "no file": (["--task", "ner", "--check", "nowhere.txt"], "No such file or directory @ nowhere.txt"),
    "empty file": (["--task", "ner", "--check", "empty.txt"], "no texts, expected one per line @ empty.txt"),
    "no column": (["--task", "ner", "--check", "wrong.tsv"], "expected one named text @ wrong.tsv"),
    "no JSON": (["--task", "ner", "--check", "wrong.jsonl"], "expected texts in UTF-8 @ wrong.jsonl"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_prepared_is_one_line_and_no_folder(
    case: str, run: Run, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("texts.txt").write_text("a text\n")
    Path("empty.txt").write_text("\n")
    Path("wrong.tsv").write_text("label\tsentence\nx\ty\n")
    Path("wrong.jsonl").write_text("{")
    before = names(tmp_path)
    options, message = REFUSED[case]
    status, _, errors = run("prepare", model, "out", *options)
    assert status == 1
    assert message in errors
    assert errors.startswith("error: ")
    assert len(errors.splitlines()) == 1
    assert names(tmp_path) == before


def test_what_generates_in_steps_is_prepared_by_tokens(run: Run, tmp_path: Path) -> None:
    out, model = tmp_path / "out", tiny.folder("gpt2", "causal")
    code, said, errors = run("prepare", model, out, "--task", "text-generation", "--quantize", "int8")
    assert (code, errors) == (0, "")
    assert "throughput, tokens/s" in said and "same answer" in said
    report = json.loads((out / "report.json").read_text())
    assert (report["unit"], report["after"]["how"]["dtype"]) == ("tokens", "int8")
    assert 0 < report["difference"]["largest"] < report["difference"]["deviation"]
    assert 0 <= report["difference"]["equal_answers"] <= 1


def test_a_folder_that_is_there_stays_as_it_is(run: Run, tmp_path: Path, model: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    status, _, errors = run("prepare", model, tmp_path, "--task", "text-classification")
    assert status == 1
    assert "it is there already" in errors
    assert names(tmp_path) == ["mine.txt"]


def test_a_missing_model_is_one_line(run: Run, tmp_path: Path) -> None:
    status, _, errors = run("prepare", tmp_path / "none", tmp_path / "out", "--task", "ner")
    assert status == 1
    assert "cannot be loaded" in errors
    assert len(errors.splitlines()) == 1
    assert not names(tmp_path)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (
            RuntimeError("I/O error: No space left on device (os error 28)"),
            "no space",
        ),
        (ValueError("odd\nthing"), "odd thing (ValueError; HFTASKS_STACK=1 shows where)"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_a_step_that_fails_leaves_nothing(
    error: BaseException, message: str, run: Run, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(prepare, "_write_settings", failing)
    status, _, errors = run("prepare", model, tmp_path / "out", "--task", "text-classification")
    assert status == 1
    assert message in errors
    assert len(errors.splitlines()) == 1
    assert not names(tmp_path)


def test_the_stack_is_shown_when_asked_for(
    run: Run, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(edge.STACK, "1")
    monkeypatch.setattr(prepare, "_write_settings", lambda *arguments: {}["key"])
    result = CliRunner().invoke(
        app, ["prepare", str(model), str(tmp_path / "o"), "--task", "text-classification"]
    )
    assert isinstance(result.exception, KeyError)


# -- check ---------------------------------------------------------------------------------------

SETTINGS = {"implementation": "mlserver_hftasks.HFTasksRuntime"}
BROKEN: dict[str, tuple[Any, str]] = {
    "none": (None, "no model-settings.json"),
    "no JSON": ("{", "expected JSON @ model-settings.json"),
    "a list": ([], "got a list, expected an object"),
    "another runtime": (
        {"implementation": "mlserver_sklearn.SKLearnModel"},
        'expected "mlserver_hftasks.HFTasksRuntime" @ model-settings.json: implementation',
    ),
    "of MLServer": ({**SETTINGS, "max_batch_size": "many"}, "model-settings.json: max_batch_size"),
    "of ours": (
        {**SETTINGS, "parameters": {"extra": {"tsak": "ner"}}},
        "unknown setting 'tsak', did you mean 'task'?",
    ),
    "no model": ({**SETTINGS, "parameters": {"extra": {"task": "ner"}}}, "cannot be loaded"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_folder_that_cannot_be_served_says_why(case: str, run: Run, tmp_path: Path) -> None:
    content, message = BROKEN[case]
    if content is not None:
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "model-settings.json").write_text(text)
    status, _, errors = run("check", tmp_path)
    assert status == 1
    assert message in errors
    assert len(errors.splitlines()) == 1


def test_outputs_that_are_no_numbers_are_noticed(run: Run, tmp_path: Path, model: Path) -> None:
    import transformers

    out = tmp_path / "out"
    assert run("prepare", model, out, "--task", "text-classification")[0] == 0
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(out)
    with torch.no_grad():
        loaded.classifier.weight.fill_(float("nan"))
    loaded.save_pretrained(out)
    status, _, errors = run("check", out)
    assert status == 1
    assert "not finite numbers" in errors


# -- texts and numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "items"),
    [
        ("a.txt", "one\n\n two \n", ["one", "two"]),
        ("a.tsv", 'label\ttext\nx\tsay "a\ny\tb\n', ['say "a', "b"]),
        ("a.csv", 'text,label\n"a, b",x\n', ["a, b"]),
        ("a.jsonl", '"one"\n{"question": "q", "context": "c"}\n', ["one", {"question": "q", "context": "c"}]),
    ],
)
def test_files_of_texts(name: str, content: str, items: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    assert texts.read_items(tmp_path / name) == items


def test_all_texts_calibrate() -> None:
    assert texts.texts_of(["a", {"question": "b", "texts": ["c", "d"], "top_k": 3}]) == ["a", "b", "c", "d"]


def test_an_item_that_does_not_fit_is_named() -> None:
    task = serve(tiny.folder("bert", "qa"), "question-answering").task
    with pytest.raises(InvalidSettings, match="text 2 does not fit question-answering: "):
        texts.rows_of(task, [{"question": "a b", "context": "c"}, {"question": "a"}])


def test_difference_of_logits_and_of_states() -> None:
    one = [
        {"logits": np.array([1.0, 2.0, 0.0], np.float32)},
        {"logits": np.array([0.0, 1.0, 5.0], np.float32)},
    ]
    other = [{"logits": one[0]["logits"]}, {"logits": np.array([6.0, 1.0, 5.0], np.float32)}]
    found = trial.difference(other, one, headless=False)
    assert (found.largest, found.agreement, found.least_cosine) == (6.0, 0.5, None)
    assert found.deviation == pytest.approx(np.std([1, 2, 0, 0, 1, 5]))
    states = trial.difference([{"h": -one[0]["logits"]}], [{"h": one[0]["logits"]}], headless=True)
    assert (states.agreement, states.least_cosine) == (None, pytest.approx(-1))
    regression = trial.difference([{"logits": np.ones(1)}], [{"logits": np.zeros(1)}], headless=False)
    assert (regression.largest, regression.agreement) == (1.0, None)
