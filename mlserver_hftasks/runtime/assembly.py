"""Puts together what answers the requests of one model."""

from __future__ import annotations

from collections.abc import Callable

from mlserver_hftasks.engine.batcher import Batcher
from mlserver_hftasks.explain.black_box import SIGNATURE, BlackBoxExplainer
from mlserver_hftasks.explain.explainer import Explainer, ExplainLimits
from mlserver_hftasks.explain.remote import RemoteModel
from mlserver_hftasks.loading import Served
from mlserver_hftasks.metrics import ModelMetrics
from mlserver_hftasks.runtime.explaining import AnsweringService, Explaining, Explains
from mlserver_hftasks.runtime.service import Service
from mlserver_hftasks.settings import Settings
from mlserver_hftasks.tasks.base import ItemLimits
from mlserver_hftasks.tasks.signature import Signature


def answering(
    name: str,
    settings: Settings,
    served: Served,
    batcher: Batcher,
    metrics: ModelMetrics,
    on_thread_start: Callable[[], None],
) -> AnsweringService:
    """Predictions of a model that was loaded here, and their explanations."""
    explainer = Explainer(
        served.task,
        served.backend,
        batcher,
        limits=ExplainLimits(settings.max_queue_explanations),
        on_thread_start=on_thread_start,
        name=f"{name}-explain",
    )
    explaining = _explaining(explainer, served.task.signature, settings, metrics)
    predictions = Service(served.task, batcher, settings.timeout_ms)
    return AnsweringService(predictions, explaining, mode=settings.mode)


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
