"""`hftasks explain` against a server, and its heat maps."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from mlserver_hftasks.cli.heat_map import heat_maps
from mlserver_hftasks.cli.main import app
from mlserver_hftasks.explain.reading import Reading
from mlserver_hftasks.explain.record import json_of
from tests import tiny
from tests.answering import answering
from tests.explanations import SENTENCE, explanation


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["explain", *arguments])


def answer(**fields: Any) -> dict[str, Any]:
    return {"outputs": [{"name": "explanation", "data": [json_of(explanation(**fields))]}]}


def test_a_server_is_asked_and_its_answer_drawn(tmp_path: Path) -> None:
    page = tmp_path / "why.html"
    with answering(200, answer(labels=("POSITIVE", "[/red]NEGATIVE"))) as server:
        done = run(
            SENTENCE, "--url", f"{server.url}/v2/models/m", "--method", "occlusion", "--target", "1",
            "-o", "level=word", "-o", "tolerance=0.5", "--html", str(page),
        )  # fmt: skip
    assert done.exit_code == 0, done.output
    (_, body) = server.requests[0]
    assert body["parameters"] == {"method": "occlusion", "target": "1", "level": "word", "tolerance": 0.5}
    assert "Why POSITIVE?" in done.output
    assert "Why [/red]NEGATIVE?" in done.output
    assert page.read_text().startswith("<!doctype html>")


def test_an_item_of_several_texts() -> None:
    with answering(200, answer()) as server:
        done = run('{"question": "who?", "context": "she"}', "--url", f"{server.url}/v2/models/m")
    assert done.exit_code == 0
    ((_, body),) = server.requests
    assert json.loads(body["inputs"][0]["data"][0]) == {"question": "who?", "context": "she"}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "expected one of them"),
        (["--url", "http://x", "--model", "y"], "expected one of them"),
        (["--url", "http://127.0.0.1:1/v2/models/m"], "expected a V2 server"),
        (["--url", "http://127.0.0.1:1/", "-o", "level"], "expected NAME=VALUE"),
        (["--model", "/nowhere/at/all"], "pretrained_model"),
    ],
)
def test_what_is_wrong_is_told(arguments: list[str], reason: str) -> None:
    done = run("a text", *arguments)
    assert done.exit_code == 1
    assert reason in " ".join(done.stderr.split())
    assert "Traceback" not in done.output


def test_what_the_server_says_against_it() -> None:
    with answering(400, {"error": "unknown option @ methode"}) as server:
        done = run("a text", "--url", f"{server.url}/v2/models/m")
    assert done.exit_code == 1
    assert "400: unknown option @ methode" in done.stderr


def test_a_model_is_loaded_here() -> None:
    folder = str(tiny.folder("bert", "sequence"))
    done = run(
        "the river museum", '{"text": "the river", "text_pair": "was quiet"}', "--model", folder,
        "--method", "occlusion", "--target", "NEGATIVE", "-o", "truncation=true",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert done.output.count("Why NEGATIVE?") == 2
    assert done.output.count("occlusion, baseline mask") == 2
    assert "the river museum" in done.output
    wrong = run("the river museum", "--model", folder, "--target", "SIDEWAYS")
    assert wrong.exit_code == 1
    assert "SIDEWAYS" in wrong.stderr


def test_an_answer_is_explained_here() -> None:
    options = ["--target", " was quiet", "-o", "per_token=true", "--method", "input-x-gradient"]
    done = run("the river museum", "--model", str(tiny.folder("gpt2", "causal")), *options)
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert "Why was at token 1?" in said
    assert done.output.count("input-x-gradient, baseline mean") == done.output.count("Why ") > 1
    chat = '{"messages": [{"role": "user", "content": "hi"}]}'
    refused = run(chat, "--model", str(tiny.folder("gpt2", "causal")))
    assert refused.exit_code == 1
    assert "no chat template" in " ".join(refused.stderr.split())


# -- heat maps ------------------------------------------------------------------------------------


def drawn(colour: bool = False, **fields: Any) -> str:
    system: Any = "truecolor" if colour else None
    console = Console(file=io.StringIO(), width=100, force_terminal=colour, color_system=system)
    for heat_map in heat_maps(Reading.of(json.loads(json_of(explanation(**fields))))):
        console.print(heat_map)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_the_text_and_the_numbers_are_there_without_colours() -> None:
    made = drawn()
    assert SENTENCE in made
    assert "\x1b" not in made
    assert "delicious" in made.split(SENTENCE)[1]
    assert "Not converged" not in made


def test_colours_tell_the_sign_and_so_do_underlines() -> None:
    attributions = np.zeros_like(explanation().attributions)
    attributions[0, 1], attributions[0, 2] = 2.0, -1.0  # "The", "soup"
    made = drawn(colour=True, attributions=attributions)
    assert "\x1b[30;48;2;236;136;64mThe\x1b[0m" in made
    assert "\x1b[4;30;48;2;169;201;248msoup\x1b[0m" in made


def test_not_converged_is_told() -> None:
    assert "Not converged" in drawn(converged=np.array([False]))


def test_nothing_to_explain_and_nothing_known() -> None:
    assert SENTENCE in drawn(labels=())
    nowhere = np.full_like(explanation().offsets, -1)
    assert "the soup was delicious" in drawn(offsets=nowhere)
