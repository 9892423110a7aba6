"""An explainer with its engine around a model, without a server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from mlserver_hftasks.cli.local import engines_of
from mlserver_hftasks.engine.batcher import Batcher
from mlserver_hftasks.engine.cost import CostModel
from mlserver_hftasks.engine.generator import Generator
from mlserver_hftasks.engine.scheduler import Limits, Scheduler
from mlserver_hftasks.engine.steps import StepLimits, StepScheduler
from mlserver_hftasks.explain.explainer import Explainer
from mlserver_hftasks.explain.options import ExplainOptions
from mlserver_hftasks.explain.result import Explanation
from mlserver_hftasks.loading import Served

Inputs = Mapping[str, Sequence[Any]]


class Explaining:
    """An explainer, asked as a client asks."""

    def __init__(
        self, served: Served, batcher: Batcher, explainer: Explainer, generator: Generator | None = None
    ) -> None:
        self.generator = generator
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
    generator = None
    if served.decoder is not None:
        generator = Generator(served.decoder, StepScheduler(StepLimits(), served.decoder.cache_tokens))
    explainer = Explainer(served.task, engines_of(served, batcher, generator), **options)
    try:
        yield Explaining(served, batcher, explainer, generator)
    finally:
        await explainer.close()
        await batcher.close()
        if generator is not None:
            await generator.close()
