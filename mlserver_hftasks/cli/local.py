"""Explanations in this process: the pieces of a server, without the server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from mlserver_hftasks.engine.batcher import Batcher
from mlserver_hftasks.engine.cost import CostModel
from mlserver_hftasks.engine.scheduler import Limits, Scheduler
from mlserver_hftasks.explain.explainer import Explainer
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
    scheduler = Scheduler(Limits(), CostModel(), padded=served.backend.padded)
    batcher = Batcher(served.backend, scheduler)
    explainer = Explainer(served.task, served.backend, batcher)
    try:
        explanations = await explainer.explain(_inputs(served, items), parsed, asked)
    finally:
        await explainer.close()
        await batcher.close()
    return [Reading.of(orjson.loads(json_of(explanation))) for explanation in explanations]


def _inputs(served: Served, items: Sequence[Any]) -> dict[str, list[Any]]:
    spec = served.task.signature.input_named("array_inputs")
    return {spec.name if spec else "inputs": list(items)}
