"""Explainers of models that were loaded here.

What needs torch is imported when the first explanation asks for it, unless the model runs on torch anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING

from mlserver_hftasks.backends.base import Backend
from mlserver_hftasks.backends.program import ProgramBackend
from mlserver_hftasks.engine.batcher import Batcher
from mlserver_hftasks.engine.generator import Generator
from mlserver_hftasks.explain.methods import masking, path
from mlserver_hftasks.explain.targets import TARGETS
from mlserver_hftasks.generation.whole import NoWholeAnswers
from mlserver_hftasks.loading import Served
from mlserver_hftasks.runtime.explaining import Explains
from mlserver_hftasks.runtime.late import LateExplainer
from mlserver_hftasks.settings import Settings

if TYPE_CHECKING:
    from mlserver_hftasks.explain.engines import Engines

METHODS = {
    True: ("auto", *path.METHODS, *masking.METHODS),
    False: ("auto", *masking.METHODS),
}
"""By which a model can be explained, with gradients and without."""

PROGRAMS = (ProgramBackend, NoWholeAnswers)
"""Backends without gradients, which run without torch."""


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


@dataclass(frozen=True, slots=True)
class ExplainerParts:
    """What an explainer is made of."""

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
