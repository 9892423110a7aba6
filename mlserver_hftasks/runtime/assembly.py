"""Puts together what answers the requests of one model.

What only torch runs is imported only for it: a folder with a program is ready before torch is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

from mlserver_hftasks.backends.program import ProgramBackend
from mlserver_hftasks.codecs.request import EXPLAIN
from mlserver_hftasks.engine.batcher import INLINE_S, Batcher
from mlserver_hftasks.engine.cost import CostModel
from mlserver_hftasks.engine.generator import Generator
from mlserver_hftasks.engine.scheduler import Scheduler
from mlserver_hftasks.engine.steps import StepScheduler
from mlserver_hftasks.errors import InvalidSettings
from mlserver_hftasks.explain.black_box import SIGNATURE, BlackBoxExplainer
from mlserver_hftasks.explain.remote import RemoteModel
from mlserver_hftasks.explain.targets import TARGETS
from mlserver_hftasks.loading import Served
from mlserver_hftasks.metrics import ModelMetrics
from mlserver_hftasks.runtime.configuration import limits_of, step_limits_of
from mlserver_hftasks.runtime.explaining import AnsweringService, Explaining, Explains
from mlserver_hftasks.runtime.late import LateExplainer
from mlserver_hftasks.runtime.service import RowService, Service
from mlserver_hftasks.settings import Settings
from mlserver_hftasks.tasks.base import ItemLimits
from mlserver_hftasks.tasks.signature import Signature


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
    if settings.mode == EXPLAIN and served.task.name not in TARGETS:
        raise InvalidSettings(
            f"got {EXPLAIN}, but of {served.task.name} there is nothing to explain, expected another task "
            "@ parameters.extra.mode"
        )
    batcher = Batcher(
        served.backend,
        Scheduler(limits_of(settings), cost, padded=served.backend.padded),
        on_thread_start=on_thread_start,
        inline_s=_inline_s(served),
        observe=metrics.batch_ran,
        observe_queue=metrics.queued,
        name=name,
    )
    make = partial(_explainer, name, settings, served, batcher, on_thread_start)
    late = isinstance(served.backend, ProgramBackend)
    explainer = LateExplainer(served.task.name, make) if late else make()
    explaining = _explaining(explainer, served.task.signature, settings, metrics)
    predictions = _predictions(name, settings, served, batcher, metrics, on_thread_start)
    return AnsweringService(predictions, explaining, mode=settings.mode)


def prepare_explaining(served: Served) -> None:
    """Make gradients ready, where there are some: it takes a while, and must not come while rows run."""
    if isinstance(served.backend, ProgramBackend):
        return
    from mlserver_hftasks.explain.explainer import gradients_of

    gradients_of(served.task, served.backend)


def explaining_another(settings: Settings, infer_uri: str, metrics: ModelMetrics) -> AnsweringService:
    """Explanations of a model on another server, and nothing else. Made on the event loop that will await."""
    model = RemoteModel(infer_uri, input_name=settings.infer_input, output_name=settings.infer_output)
    limits = ItemLimits(settings.max_items, settings.max_text_chars)
    explainer = BlackBoxExplainer(
        model,
        replacement=settings.infer_mask,
        limits=limits,
        max_waiting=settings.max_queue_explanations,
    )
    return AnsweringService(None, _explaining(explainer, SIGNATURE, settings, metrics), mode=settings.mode)


def _inline_s(served: Served) -> float:
    """Nothing where a prediction of seconds says little: for a device that others use too, and for a model
    that goes on until it has said all."""
    predictable = served.description.device == "cpu" and not served.task.head.generates
    return INLINE_S if predictable else 0.0


def _explainer(
    name: str, settings: Settings, served: Served, batcher: Batcher, on_thread_start: Callable[[], None]
) -> Explains:
    from mlserver_hftasks.explain.explainer import Explainer, ExplainLimits

    return Explainer(
        served.task,
        served.backend,
        batcher,
        limits=ExplainLimits(settings.max_queue_explanations),
        on_thread_start=on_thread_start,
        name=f"{name}-explain",
    )


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


def _predictions(
    name: str,
    settings: Settings,
    served: Served,
    batcher: Batcher,
    metrics: ModelMetrics,
    on_thread_start: Callable[[], None],
) -> Service:
    if served.decoder is None:
        return RowService(served.task, settings.timeout_ms, batcher)
    from mlserver_hftasks.runtime.generation import GenerationService
    from mlserver_hftasks.tasks.text_generation import TextGeneration

    limits = step_limits_of(settings, served.decoder.description.device)
    generator = Generator(
        served.decoder,
        StepScheduler(limits, served.decoder.cache_tokens),
        on_thread_start=on_thread_start,
        observe=metrics.step_ran,
        observe_occupancy=metrics.occupied,
        name=f"{name}-steps",
    )
    return GenerationService(
        cast(TextGeneration, served.task),  # no other task has a decoder
        settings.timeout_ms,
        generator,
        batcher,
        stream_interval=settings.stream_interval,
    )
