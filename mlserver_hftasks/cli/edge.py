"""Where the commands end: errors in one line, and what the terminal shows."""

from __future__ import annotations

import errno
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape

from mlserver_hftasks.errors import HFTasksError

console = Console()
errors = Console(stderr=True, soft_wrap=True)

STACK = "HFTASKS_STACK"
"""Environment variable: if set, an error that nobody foresaw shows its stack."""


@contextmanager
def one_line() -> Iterator[None]:
    """End the command with status 1 and one line on stderr for whatever goes wrong inside."""
    try:
        yield
    except HFTasksError as error:
        raise _ended(str(error)) from None
    except OSError as error:
        raise _ended(_of_the_system(error)) from None
    except (KeyboardInterrupt, typer.Abort):
        raise _ended("interrupted") from None
    except Exception as error:
        if os.environ.get(STACK):
            raise
        reason = " ".join(str(error).split()) or "no further reason"
        if "No space left" in reason:  # safetensors has errors of its own
            reason = "no space left on the disk"
        raise _ended(f"{reason:.400} ({type(error).__name__}; {STACK}=1 shows where)") from None


def _of_the_system(error: OSError) -> str:
    where = f" @ {error.filename}" if error.filename else ""
    if error.errno == errno.ENOSPC:
        return f"no space left on the disk, nothing was written{where}"
    return f"{error.strerror or error}{where}"


def _ended(message: str) -> typer.Exit:
    errors.print(f"[bold red]error:[/] {escape(message)}", highlight=False)
    return typer.Exit(1)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and log lines of the libraries, which would tear a progress bar apart."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
