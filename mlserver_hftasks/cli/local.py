"""Explanations in this process: the pieces of a server, without the server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import orjson

from mlserver_hftasks.engine.batcher import Batcher
from mlserver_hftasks.engine.cost import CostModel
from mlserver_hftasks.engine.generator import Generator
from mlserver_hftasks.engine.scheduler import Limits, Scheduler
from mlserver_hftasks.engine.steps import StepLimits, StepScheduler
from mlserver_hftasks.explain.engines import Engines, GeneratingEngines, PredictingEngines, scoring_of
from mlserver_hftasks.explain.explainer import Explainer, gradients_of
from mlserver_hftasks.explain.options import ExplainOptions
from mlserver_hftasks.explain.reading import Reading
from mlserver_hftasks.explain.record import json_of
from mlserver_hftasks.loading import Served, load
from mlserver_hftasks.settings import Settings


async def explain_here(
    model: str, task: str | None, items: Sequence[Any], options: dict[str, Any]
) -> list[Reading]:
    """Load the model and explain what it says of the items. Raises `HFTasksError`.

    `options` may also hold parameters of the task.
    """
    served = load(Settings(pretrained_model=model, task=task, warmup=False))
    own = {name: value for name, value in options.items() if name in ExplainOptions.model_fields}
    parameters = {name: value for name, value in options.items() if name not in own}
    asked, parsed = ExplainOptions.read(own), served.task.signature.parse(parameters)
    async with _explainer(served) as explainer:
        explanations = await explainer.explain(_inputs(served, items), parsed, asked)
    return [Reading.of(orjson.loads(json_of(explanation))) for explanation in explanations]


@asynccontextmanager
async def _explainer(served: Served) -> AsyncIterator[Explainer]:
    scheduler = Scheduler(Limits(), CostModel(), padded=served.backend.padded)
    async with AsyncExitStack() as stack:
        batcher = Batcher(served.backend, scheduler)
        stack.push_async_callback(batcher.close)
        generator = None
        if served.decoder is not None:
            generator = Generator(served.decoder, StepScheduler(StepLimits(), served.decoder.cache_tokens))
            stack.push_async_callback(generator.close)
        explainer = Explainer(served.task, engines_of(served, batcher, generator))
        stack.push_async_callback(explainer.close)
        yield explainer


def engines_of(served: Served, batcher: Batcher, generator: Generator | None) -> Engines:
    """What an explainer of the model runs on, beside those engines of its predictions. Takes a while."""
    if served.scoring is None:
        return PredictingEngines(served.backend, batcher, gradients_of(served.task, served.backend))
    return GeneratingEngines(scoring_of(served.scoring.make, batcher, generator), batcher, generator)


def _inputs(served: Served, items: Sequence[Any]) -> dict[str, list[Any]]:
    spec = served.task.signature.input_named("array_inputs")
    return {spec.name if spec else "inputs": list(items)}
