"""An explainer with its engine around a model, without a server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from mlserver_hftasks.engine.batcher import Batcher
from mlserver_hftasks.engine.cost import CostModel
from mlserver_hftasks.engine.scheduler import Limits, Scheduler
from mlserver_hftasks.explain.explainer import Explainer
from mlserver_hftasks.explain.options import ExplainOptions
from mlserver_hftasks.explain.result import Explanation
from mlserver_hftasks.loading import Served

Inputs = Mapping[str, Sequence[Any]]


class Explaining:
    """An explainer, asked as a client asks."""

    def __init__(self, served: Served, batcher: Batcher, explainer: Explainer) -> None:
        self.served = served
        self.batcher = batcher
        self.explainer = explainer

    async def __call__(
        self, inputs: Inputs | Sequence[str], parameters: Mapping[str, Any] | None = None, **options: Any
    ) -> list[Explanation]:
        """The explanations of a request; texts by themselves are the input `inputs`."""
        asked = inputs if isinstance(inputs, Mapping) else {"inputs": inputs}
        parsed = self.served.task.signature.parse(dict(parameters or {}))
        return await self.explainer.explain(asked, parsed, ExplainOptions.read(options))


@asynccontextmanager
async def explaining(served: Served, **options: Any) -> AsyncIterator[Explaining]:
    """`options` are those of `Explainer`."""
    scheduler = Scheduler(Limits(), CostModel(), padded=served.backend.padded)
    batcher = Batcher(served.backend, scheduler)
    explainer = Explainer(served.task, served.backend, batcher, **options)
    try:
        yield Explaining(served, batcher, explainer)
    finally:
        await explainer.close()
        await batcher.close()
