"""An explainer that is imported, and torch with it, when the first explanation is asked for.

A program of ONNX Runtime or OpenVINO is ready, and predicts, without torch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from mlserver_hftasks.explain.methods import masking
from mlserver_hftasks.explain.options import ExplainOptions
from mlserver_hftasks.explain.result import Explanation
from mlserver_hftasks.explain.targets import TARGETS
from mlserver_hftasks.runtime.explaining import Explains


class LateExplainer:
    """Explains without gradients; `make`, called on the event loop, makes the explainer behind it."""

    def __init__(self, task_name: str, make: Callable[[], Explains]) -> None:
        self._explains = task_name in TARGETS
        self._make = make
        self._explainer: Explains | None = None

    @property
    def methods(self) -> tuple[str, ...]:
        """Those of `masking`; () for a task whose answer is no score."""
        return ("auto", *masking.METHODS) if self._explains else ()

    async def explain(
        self, inputs: Mapping[str, Sequence[Any]], parameters: Any, options: ExplainOptions
    ) -> list[Explanation]:
        """See `Explainer.explain`. The first call takes as long as importing torch."""
        if self._explainer is None:
            await asyncio.to_thread(import_module, "mlserver_hftasks.explain.explainer")
        if self._explainer is None:  # another request may have been first
            self._explainer = self._make()
        return await self._explainer.explain(inputs, parameters, options)

    async def close(self) -> None:
        """Fail what still waits."""
        if self._explainer is not None:
            await self._explainer.close()
