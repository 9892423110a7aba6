"""`hftasks explain`: why does the model say so?"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mlserver_hftasks.cli.heat_map import heat_maps
from mlserver_hftasks.client import AnsweredWithError, Reading, explain, page
from mlserver_hftasks.errors import HFTasksError, InvalidRequest

HELP = "Show how much each word adds to what the model says of a text."


def command(
    texts: Annotated[
        list[str], typer.Argument(help="Texts; or JSON objects, where the task takes more than a text.")
    ],
    url: Annotated[
        str | None, typer.Option(help="Ask a server: the model's URL, http://HOST:PORT/v2/models/NAME.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Load a model here: a hub id or a folder.")] = None,
    task: Annotated[
        str | None, typer.Option(help="With --model: the task, if its config does not say.")
    ] = None,
    method: Annotated[str, typer.Option(help="How to attribute.")] = "auto",
    target: Annotated[str | None, typer.Option(help="A label or its id, in place of the answer.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", help="NAME=VALUE: a further option, or a parameter of the task."),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Also write the heat maps as a page.")] = None,
) -> None:
    """See `HELP`."""
    console = Console(highlight=False)
    try:
        given = {"method": method, **({} if target is None else {"target": target}), **_options(option or [])}
        items = [_item(text) for text in texts]
        readings = _readings(items, url, model, task, given)
    except (HFTasksError, AnsweredWithError, OSError, ValueError) as error:
        Console(stderr=True, highlight=False).print(str(error), style="red", markup=False)
        raise typer.Exit(1) from None
    for reading in readings:
        for heat_map in heat_maps(reading):
            console.print(heat_map)
    if html is not None:
        html.write_text(page(readings), encoding="utf-8")
        console.print(f"Written: {html}", markup=False)


def _readings(
    items: list[Any], url: str | None, model: str | None, task: str | None, options: dict[str, Any]
) -> list[Reading]:
    if (url is None) == (model is None):
        raise InvalidRequest("neither or both of --url and --model, expected one of them @ command line")
    if url is not None:
        return _from_server(url, items, options)
    from mlserver_hftasks.cli.local import explain_here

    return asyncio.run(explain_here(str(model), task, items, options))


def _from_server(url: str, items: list[Any], options: dict[str, Any]) -> list[Reading]:
    import httpx

    try:
        return explain(url, items, **options)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise InvalidRequest(f"no answer ({error}), expected a V2 server @ {url}") from None


def _item(text: str) -> Any:
    return json.loads(text) if text.lstrip().startswith("{") else text


def _options(assignments: list[str]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise InvalidRequest(f"got {assignment!r}, expected NAME=VALUE @ --option")
        try:
            made[name] = json.loads(value)
        except json.JSONDecodeError:
            made[name] = value
    return made
