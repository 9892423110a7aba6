"""The commands of `hftasks`, each in a file of its own."""

from __future__ import annotations

import typer

from mlserver_hftasks.cli.explain import explain

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Serve Hugging Face models on MLServer.")
app.command(name="explain")(explain)


@app.callback()
def _several_commands() -> None:
    """Serve Hugging Face models on MLServer."""


if __name__ == "__main__":
    app()
