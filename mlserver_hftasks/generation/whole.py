"""In place of `generate()`, where there is no model of transformers to call it on."""

from __future__ import annotations

from collections.abc import Sequence

from mlserver_hftasks.backends.base import Description
from mlserver_hftasks.engine.rows import Outputs, Row
from mlserver_hftasks.errors import InvalidRequest


class NoWholeAnswers:
    """The backend of rows beside a decoder that only steps; see `backends.base.Backend`."""

    padded = True

    def __init__(self, description: Description) -> None:
        self.description = description

    def forward(self, rows: Sequence[Row]) -> Sequence[Outputs]:
        """Raises `InvalidRequest`. Tasks do not come here: see `ModelFacts.whole`."""
        raise InvalidRequest("got rows for a program that only steps, expected prompts @ text_inputs")

    def close(self) -> None:
        """See `backends.base.Backend`."""
