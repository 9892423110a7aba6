"""From settings to something that serves, by torch or by a program.

What a program needs is imported only for programs, and torch and transformers only where they are used: a
folder with a program is ready before torch is imported.
"""

from __future__ import annotations

from pathlib import Path

from mlserver_hftasks.errors import InvalidSettings
from mlserver_hftasks.loading.manifest import find_program
from mlserver_hftasks.loading.served import Served
from mlserver_hftasks.settings import Settings


def load(settings: Settings) -> Served:
    """Load what the settings describe. Raises `InvalidSettings` with what is wrong and what to do."""
    if not settings.pretrained_model:
        raise InvalidSettings("no model, expected a hub id or a folder @ parameters.extra.pretrained_model")
    program = find_program(Path(settings.pretrained_model), settings)
    if program is None and settings.chosen_backend in (None, "torch"):
        from mlserver_hftasks.loading.eager import load_eager

        return load_eager(settings)
    from mlserver_hftasks.loading.programs import load_program, provide_program

    return load_program(settings, program or provide_program(settings))
