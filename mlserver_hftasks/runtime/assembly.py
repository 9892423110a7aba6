"""Puts together what answers the requests of one model.

What only torch runs, or only explainers of other servers need, is imported only for it: a folder with a
program is ready before torch is imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from mlserver_hftasks.codecs.request import EXPLAIN
from mlserver_hftasks.engine.batcher import INLINE_S, Batcher
from mlserver_hftasks.engine.cost import CostModel
from mlserver_hftasks.engine.generator import Generator
from mlserver_hftasks.engine.scheduler import Scheduler
from mlserver_hftasks.engine.steps import StepScheduler
from mlserver_hftasks.errors import InvalidSettings
from mlserver_hftasks.explain.allowed import metadata_uri
from mlserver_hftasks.loading import Served
from mlserver_hftasks.metrics import ModelMetrics
from mlserver_hftasks.runtime.configuration import limits_of, step_limits_of
from mlserver_hftasks.runtime.explainers import ExplainerParts, explains
from mlserver_hftasks.runtime.explaining import AnsweringService, Explaining, Explains
from mlserver_hftasks.runtime.service import RowService, Service
from mlserver_hftasks.settings import Settings
from mlserver_hftasks.tasks.base import ItemLimits
from mlserver_hftasks.tasks.signature import Signature

if TYPE_CHECKING:
    pass


def answering(
    name: str,
    settings: Settings,
    served: Served,
    cost: CostModel,
    metrics: ModelMetrics,
    on_thread_start: Callable[[], None],
) -> AnsweringService:
    """Predictions of a model that was loaded here, and their explanations.

    Made on the event loop that will await the answers. Raises `InvalidSettings`.
    """
    if settings.mode == EXPLAIN and not explains(served):
        raise InvalidSettings(
            f"got {EXPLAIN}, but of {served.task.name} there is nothing to explain, expected another task "
            "@ parameters.extra.mode"
        )
    batcher = Batcher(
        served.backend,
        Scheduler(limits_of(settings), cost, padded=served.backend.padded),
        on_thread_start=on_thread_start,
        inline_s=_inline_s(settings, served),
        observe=metrics.batch_ran,
        observe_queue=metrics.queued,
        name=name,
    )
    generator = _generator(name, settings, served, metrics, on_thread_start)
    made = ExplainerParts(f"{name}-explain", settings, served, batcher, generator, on_thread_start)
    explaining = _explaining(made.explainer(), served.task.signature, settings, metrics)
    predictions = _predictions(settings, served, batcher, generator)
    return AnsweringService(predictions, explaining, mode=settings.mode)


def explaining_another(settings: Settings, infer_uri: str, metrics: ModelMetrics) -> AnsweringService:
    """Explanations of a model on another server, and nothing else. Made on the event loop that will await."""
    from mlserver_hftasks.explain.black_box import BlackBoxExplainer
    from mlserver_hftasks.explain.remote import RemoteModel
    from mlserver_hftasks.explain.words import SIGNATURE

    model = RemoteModel(
        infer_uri,
        input_name=settings.infer_input,
        output_name=settings.infer_output,
        metadata_uri=metadata_uri(infer_uri, os.environ),
    )
    limits = ItemLimits(settings.max_items, settings.max_text_chars)
    explainer = BlackBoxExplainer(
        model,
        replacement=settings.infer_mask,
        limits=limits,
        max_waiting=settings.max_queue_explanations,
    )
    return AnsweringService(None, _explaining(explainer, SIGNATURE, settings, metrics), mode=settings.mode)


def _inline_s(settings: Settings, served: Served) -> float:
    """Nothing where a prediction of seconds says little: for a device that others use too, for a model that
    goes on until it has said all, and where no warm-up has shown what large batches take."""
    usual = served.description.device == "cpu" and not served.task.head.generates
    predictable = usual and settings.warmup
    return INLINE_S if predictable else 0.0


def _explaining(
    explainer: Explains, signature: Signature, settings: Settings, metrics: ModelMetrics
) -> Explaining:
    return Explaining(
        explainer,
        signature,
        defaults=settings.explain,
        timeout_ms=settings.timeout_ms,
        observe=metrics.explained,
    )


def _generator(
    name: str,
    settings: Settings,
    served: Served,
    metrics: ModelMetrics,
    on_thread_start: Callable[[], None],
) -> Generator | None:
    if served.decoder is None:
        return None
    limits = step_limits_of(settings, served.decoder.description.device)
    return Generator(
        served.decoder,
        StepScheduler(limits, served.decoder.cache_tokens),
        on_thread_start=on_thread_start,
        observe=metrics.step_ran,
        observe_occupancy=metrics.occupied,
        name=f"{name}-steps",
    )


def _predictions(
    settings: Settings, served: Served, batcher: Batcher, generator: Generator | None
) -> Service:
    if generator is None:
        return RowService(served.task, settings.timeout_ms, batcher)
    from mlserver_hftasks.runtime.generation import GenerationService
    from mlserver_hftasks.tasks.text_generation import TextGeneration

    return GenerationService(
        cast(TextGeneration, served.task),  # no other task has a decoder
        settings.timeout_ms,
        generator,
        batcher,
        stream_interval=settings.stream_interval,
    )
