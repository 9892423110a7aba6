"""The command `hftasks`: a command per file, put together here."""

from __future__ import annotations

import typer

from mlserver_hftasks.cli import check, prepare
from mlserver_hftasks.cli.explain import explain

app = typer.Typer(
    name="hftasks",
    help="Prepare, check and explain models for MLServer's Hugging Face runtime.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)
app.command("check", help=check.HELP)(check.command)
app.command("prepare", help=prepare.HELP)(prepare.command)
app.command("explain")(explain)

if __name__ == "__main__":
    app()
