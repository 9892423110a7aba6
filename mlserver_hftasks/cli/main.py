"""The command `hftasks`: a command per file, put together here."""

from __future__ import annotations

import typer

from mlserver_hftasks.cli import check, explain, prepare

app = typer.Typer(
    name="hftasks",
    help="Prepare, check and explain models of MLServer's Hugging Face runtime.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)
app.command("check", help=check.HELP)(check.command)
app.command("explain", help=explain.HELP)(explain.command)
app.command("prepare", help=prepare.HELP)(prepare.command)

if __name__ == "__main__":
    app()
