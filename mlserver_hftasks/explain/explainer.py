"""From a request to its explanations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlserver_hftasks.backends.base import Backend
from mlserver_hftasks.engine.batcher import Batcher
from mlserver_hftasks.explain.options import ExplainOptions
from mlserver_hftasks.explain.result import Explanation
from mlserver_hftasks.tasks.base import Task
from mlserver_hftasks.tasks.signature import Parameters


@dataclass(frozen=True, slots=True)
class ExplainLimits:
    """Bounds of one explainer."""

    max_explanations: int = 256
    """Most texts that are being explained or wait for it; beyond: `Overloaded`."""


class Explainer:
    """Explains what one task says over one model. Made on the event loop that will await `explain`.

    `batcher` is the engine of the predictions, which explanations make way for.
    """

    def __init__(
        self,
        task: Task[Any],
        backend: Backend,
        batcher: Batcher,
        *,
        limits: ExplainLimits | None = None,
        on_thread_start: Callable[[], None] = lambda: None,
        name: str = "explain",
    ) -> None:
        self._task = task
        self._backend = backend
        self._batcher = batcher
        self._limits = limits or ExplainLimits()

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that this model can be explained by, `auto` first."""
        raise NotImplementedError

    async def explain(
        self, inputs: Mapping[str, Sequence[Any]], parameters: Parameters, options: ExplainOptions
    ) -> list[Explanation]:
        """One explanation per item; `inputs` and `parameters` as `Task.examples` takes them.

        Raises `InvalidRequest` for an option that this model or item cannot have, `Overloaded` at once when
        too many texts wait, `DeadlineExceeded` when the deadline passed before there was any estimate.
        """
        raise NotImplementedError

    async def close(self) -> None:
        """Fail what still waits, and end the thread."""
        raise NotImplementedError
