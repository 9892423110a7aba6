"""Puts together what answers the requests of one model.

What only torch runs, or only explainers of other servers need, is imported only for it: a folder with a
program is ready before torch is imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, cast

from mlserver_hftasks.backends.base import Backend
from mlserver_hftasks.backends.program import ProgramBackend
from mlserver_hftasks.codecs.request import EXPLAIN
from mlserver_hftasks.engine.batcher import INLINE_S, Batcher
from mlserver_hftasks.engine.cost import CostModel
from mlserver_hftasks.engine.generator import Generator
from mlserver_hftasks.engine.scheduler import Scheduler
from mlserver_hftasks.engine.steps import StepScheduler
from mlserver_hftasks.errors import InvalidSettings
from mlserver_hftasks.explain.allowed import metadata_uri
from mlserver_hftasks.explain.methods import masking, path
from mlserver_hftasks.explain.targets import TARGETS
from mlserver_hftasks.generation.whole import NoWholeAnswers
from mlserver_hftasks.loading import Served
from mlserver_hftasks.metrics import ModelMetrics
from mlserver_hftasks.runtime.configuration import limits_of, step_limits_of
from mlserver_hftasks.runtime.explaining import AnsweringService, Explaining, Explains
from mlserver_hftasks.runtime.late import LateExplainer
from mlserver_hftasks.runtime.service import RowService, Service
from mlserver_hftasks.settings import Settings
from mlserver_hftasks.tasks.base import ItemLimits
from mlserver_hftasks.tasks.signature import Signature

if TYPE_CHECKING:
    from mlserver_hftasks.explain.engines import Engines

METHODS = {
    True: ("auto", *path.METHODS, *masking.METHODS),
    False: ("auto", *masking.METHODS),
}
"""By which a model can be explained, with gradients and without."""

PROGRAMS = (ProgramBackend, NoWholeAnswers)
"""Backends without gradients, which run without torch."""


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
    made = _Parts(f"{name}-explain", settings, served, batcher, generator, on_thread_start)
    explaining = _explaining(made.explainer(), served.task.signature, settings, metrics)
    predictions = _predictions(settings, served, batcher, generator)
    return AnsweringService(predictions, explaining, mode=settings.mode)


def explains(served: Served) -> bool:
    """Whether there is something to explain of what the model answers."""
    return served.task.name in TARGETS and (served.scoring is not None or not served.task.head.generates)


def prepare_explaining(served: Served) -> None:
    """Make gradients ready, where there are some: it takes a while, and must not come while rows run.

    Those of a model that generates wait for the first explanation: they are another clone's.
    """
    if isinstance(served.backend, PROGRAMS) or served.task.head.generates:
        return
    from mlserver_hftasks.explain.explainer import gradients_of

    gradients_of(served.task, served.backend)


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


@dataclass(frozen=True, slots=True)
class _Parts:
    """What an explainer of a model that was loaded here is made of."""

    name: str
    settings: Settings
    served: Served
    batcher: Batcher
    generator: Generator | None
    on_thread_start: Callable[[], None]

    def explainer(self) -> Explains:
        """Ready, or to be made when it is first asked, where that takes long or needs torch."""
        if self.served.task.head.generates:
            scoring = self.served.scoring
            methods = METHODS[scoring.gradients] if scoring and explains(self.served) else ()
            return LateExplainer(self.served.task.name, methods, self._scoring, self._generating)
        if isinstance(self.served.backend, ProgramBackend):
            methods = METHODS[False] if explains(self.served) else ()
            late = partial(import_module, "mlserver_hftasks.explain.explainer")
            return LateExplainer(self.served.task.name, methods, late, lambda module: self._predicting())
        return self._predicting()

    def _predicting(self) -> Explains:
        from mlserver_hftasks.explain.engines import PredictingEngines
        from mlserver_hftasks.explain.explainer import gradients_of

        gradients = gradients_of(self.served.task, self.served.backend)
        return self._explainer(
            PredictingEngines(
                self.served.backend,
                self.batcher,
                gradients,
                on_thread_start=self.on_thread_start,
                name=self.name,
            )
        )

    def _scoring(self) -> Backend:
        """Made on a thread, while the model may generate."""
        from mlserver_hftasks.explain.engines import scoring_of

        assert self.served.scoring is not None
        self.on_thread_start()
        return scoring_of(self.served.scoring.make, self.batcher, self.generator)

    def _generating(self, scoring: Backend) -> Explains:
        from mlserver_hftasks.explain.engines import GeneratingEngines

        return self._explainer(
            GeneratingEngines(
                scoring,
                self.batcher,
                self.generator,
                on_thread_start=self.on_thread_start,
                name=self.name,
            )
        )

    def _explainer(self, engines: Engines) -> Explains:
        from mlserver_hftasks.explain.explainer import Explainer, ExplainLimits

        limits = ExplainLimits(self.settings.max_queue_explanations)
        return Explainer(self.served.task, engines, limits=limits)


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
