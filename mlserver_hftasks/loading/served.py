"""What loading gives, whatever runs the model, and the parts that all ways of loading share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mlserver_hftasks.backends.base import Backend, Description
from mlserver_hftasks.engine.rows import Row
from mlserver_hftasks.engine.sequences import Stepper
from mlserver_hftasks.errors import InvalidSettings
from mlserver_hftasks.loading.facts import labels_of
from mlserver_hftasks.settings import Settings
from mlserver_hftasks.tasks.base import ItemLimits, ModelFacts, Task
from mlserver_hftasks.tasks.encoder import Encoder
from mlserver_hftasks.tasks.registry import canonical_name, task_class

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig


@dataclass(frozen=True, slots=True)
class Scoring:
    """What says how likely a model that generates finds answers; see `generation.scoring`."""

    make: Callable[[Callable[[], object]], Backend]
    """Of its `pause`; takes a while."""
    gradients: bool
    """Whether it may have some."""


TASK_OF_HEAD = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForConditionalGeneration": "text2text-generation",
    "MTModel": "translation",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "Model": "feature-extraction",
}
"""The task of a model whose class name ends so, where the settings name none."""


class Decoder(Stepper, Protocol):
    """Steps through what is generated."""

    description: Description

    def close(self) -> None:
        """Give the memory back; `step` must not be called again."""


@dataclass(frozen=True, slots=True)
class Served:
    """A task over a model, ready to run."""

    task: Task[Any]
    backend: Backend
    decoder: Decoder | None = None
    """Steps through what is generated, where the model fits; `backend` runs the rest."""
    scoring: Scoring | None = None
    """Of a model that generates; None if there is nothing to explain its answers by."""

    @property
    def description(self) -> Description:
        """How most of what comes is run."""
        return (self.decoder or self.backend).description

    def close(self) -> None:
        """Give the memory back."""
        if self.decoder is not None:
            self.decoder.close()
        self.backend.close()


def asked_as(settings: Settings, config: PretrainedConfig, folder: Path) -> str:
    """The task that the settings name, with its suffix, or that the model's own files suggest."""
    return (settings.task or _infer_task(config.architectures, folder)) + settings.task_suffix


def task_of(settings: Settings, config: PretrainedConfig, folder: Path) -> type[Task[Any]]:
    """The class of that task."""
    return task_class(canonical_name(asked_as(settings, config, folder)))


def model_facts(
    settings: Settings,
    config: PretrainedConfig,
    encoder: Encoder,
    folder: Path,
    *,
    generation_config: GenerationConfig | None = None,
    cache_tokens: int = 1 << 20,
    whole: bool = True,
) -> ModelFacts:
    """What the task needs to know of the model; the last three where it generates."""
    return ModelFacts(
        config=config,
        encoder=encoder,
        labels=labels_of(settings.labels, config, folder),
        truncation=settings.truncation,
        limits=ItemLimits(
            settings.max_items,
            settings.max_text_chars,
            settings.max_new_tokens,
            settings.max_prompt_tokens,
            cache_tokens,
        ),
        generation_config=generation_config,
        whole=whole,
        folder=str(folder),
        asked_as=asked_as(settings, config, folder),
    )


def probe_rows(encoder: Encoder, words: tuple[int, ...] = (1, 40, 12, 90)) -> list[Row]:
    """Rows of real tokens, about as many as `words` says, for probing and warming up."""
    sentence = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]
    texts = [" ".join((sentence * (count // len(sentence) + 1))[:count]) for count in words]
    arrays = [encoder.row(encoding).arrays for encoding in encoder.encode_as_fits(texts)]
    return [Row(row) for row in arrays]


def _infer_task(architectures: Iterable[str] | None, folder: Path) -> str:
    if (folder / "modules.json").is_file():
        return "sentence-embedding"
    for architecture in architectures or ():
        for ending, task in TASK_OF_HEAD.items():
            if architecture.endswith(ending):
                return task
    raise InvalidSettings(
        f"no task, and none can be inferred from the architectures {architectures}, expected the name "
        "of a task @ parameters.extra.task"
    )
