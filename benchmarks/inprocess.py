"""The model without a server, on the calling thread: what a server can reach at best."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from mlserver_hftasks.engine.cost import CostModel
from mlserver_hftasks.engine.offline import batches_of
from mlserver_hftasks.engine.rows import Outputs, Row
from mlserver_hftasks.engine.warmup import warm_up
from mlserver_hftasks.loading import load, memory, probe_rows
from mlserver_hftasks.settings import Settings
from mlserver_hftasks.tasks.base import Answered, Example


class InProcess:
    """A text-classification model of ours."""

    def __init__(self, folder: Path, packing: Literal["auto", "off"] = "auto", **extra: Any) -> None:
        settings = Settings(
            task="text-classification", pretrained_model=str(folder), device="cpu", packing=packing, **extra
        )
        memory.manage()  # as the runtime does
        served = load(settings)
        self._task, self._backend = served.task, served.backend
        self._parameters = self._task.signature.parse({})
        self.dtype = served.backend.description.dtype
        self.cost = CostModel()
        warm_up(self._backend, self._backend.padded, self.cost, partial(probe_rows, self._task.model.encoder))

    def read_all(self) -> None:
        """Compute all of the last layer from now on, as if nobody knew what the head reads."""
        backbone: Any = self._backend._backbone  # type: ignore[attr-defined]
        backbone.read_all()

    def rows(self, texts: Sequence[str]) -> list[Row]:
        """The texts, tokenized."""
        return [example.rows[0] for example in self._examples(texts)]

    def answer(self, text: str) -> Any:
        """The direct call: tokenize, forward, postprocess."""
        (example,) = self._examples([text])
        return self._result(example, self._backend.forward(example.rows)[0])

    def answers(self, texts: Sequence[str], outputs: Sequence[Outputs]) -> list[Any]:
        """The results for outputs that were computed before."""
        return [
            self._result(example, output)
            for example, output in zip(self._examples(texts), outputs, strict=True)
        ]

    def forward(self, batches: Sequence[Sequence[Row]]) -> tuple[float, list[Outputs]]:
        """Seconds and outputs of the batches, one after another."""
        outputs: list[Outputs] = []
        begin = time.perf_counter()
        for batch in batches:
            outputs += self._backend.forward(batch)
        return time.perf_counter() - begin, outputs

    def engine_batches(self, rows: Sequence[Row]) -> list[list[Row]]:
        """The batches that the engine forms when all rows wait, in order of arrival."""
        return batches_of(rows, self.cost, padded=self._backend.padded)

    def _examples(self, texts: Sequence[str]) -> list[Example]:
        return self._task.examples({"inputs": texts}, self._parameters)

    def _result(self, example: Example, output: Outputs) -> Any:
        return self._task.postprocess(Answered(example, [output]), self._parameters)


def in_arrival_order(rows: Sequence[Row], size: int) -> list[Sequence[Row]]:
    """Batches of that many rows."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]
