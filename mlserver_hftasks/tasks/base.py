"""The contract of a task: the two ends of a Hugging Face pipeline, without its middle.

A request's items go through `examples` (the pipeline's `preprocess`), their rows run in an engine that
knows nothing of tasks, and each item's outputs go through `postprocess` with its own request's
parameters. `tensors` answers a request for typed outputs instead.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from mlserver_hftasks.backends.base import Head
from mlserver_hftasks.engine.rows import Outputs, Row
from mlserver_hftasks.errors import InvalidRequest, RequestTooLarge
from mlserver_hftasks.tasks.encoder import Encoder
from mlserver_hftasks.tasks.signature import Parameters, Signature, Tensor

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig

P = TypeVar("P", bound=Parameters)


@dataclass(frozen=True, slots=True)
class ItemLimits:
    """Bounds on what one request may bring; over them `RequestTooLarge`."""

    max_items: int = 1024
    max_text_chars: int = 100_000
    max_new_tokens: int = 1024
    """Of one answer."""
    max_prompt_tokens: int | None = None
    """None: what the model takes."""
    cache_tokens: int = 1 << 20
    """Of the generating engine: a prompt and its answer fit into it."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a task needs to know of the model it serves."""

    config: PretrainedConfig
    encoder: Encoder
    labels: tuple[str, ...]
    """Label names by index."""
    truncation: bool | str | None = None
    """The setting; None leaves it to the task."""
    limits: ItemLimits = ItemLimits()
    generation_config: Any = None
    """The model's `transformers.GenerationConfig`, for tasks that generate."""
    folder: str | None = None
    """Local folder of the model's files, where there is one."""
    steps: bool = True
    """Whether a generating engine can step through the model; else `generate()` runs all of it."""
    whole: bool = True
    """Whether there is `generate()`, for what an engine cannot step through."""
    asked_as: str = ""
    """The task as the settings name it, which may say more than its own name: `translation_en_to_fr`."""


@dataclass(frozen=True, slots=True)
class Example:
    """One item on its way: its rows, and what `postprocess` needs back."""

    rows: tuple[Row, ...]
    context: Any = None


@dataclass(frozen=True, slots=True)
class Answered:
    """One item with the model's outputs, one per row."""

    example: Example
    outputs: Sequence[Outputs]


class Task(ABC, Generic[P]):
    """One task over one model. Stateless between calls and safe to call from several threads."""

    name: ClassVar[str]
    head: ClassVar[Head]
    signature: ClassVar[Signature]
    unwraps_single: ClassVar[bool] = False
    """Whether the pipeline answers a list of one item like the item itself."""

    def __init__(self, model: ModelFacts) -> None:
        self.model = model

    @classmethod
    def configure(cls, name: str, config: PretrainedConfig, generation: GenerationConfig) -> None:
        """Change how the model generates to what its config says of the task, asked for by that name."""
        return

    @abstractmethod
    def examples(self, inputs: Mapping[str, Sequence[Any]], parameters: P) -> list[Example]:
        """One example per item. `inputs` maps the signature's input names to decoded values.

        Raises `InvalidRequest`, which fails this request only.
        """

    @abstractmethod
    def postprocess(self, answered: Answered, parameters: P) -> Any:
        """The pipeline's result for one item, as JSON can hold it (numpy allowed)."""

    @abstractmethod
    def tensors(
        self, names: Sequence[str], answered: Sequence[Answered], parameters: P
    ) -> Mapping[str, Tensor]:
        """The typed outputs of those names (each is in the signature) for all items of a request."""

    def shaped(self, results: list[Any], parameters: P, *, scalar: bool) -> list[Any]:
        """The top-level elements of the pipeline's result; each becomes one element of `output`.

        `scalar`: the client sent one item by itself, not a list of one.
        """
        unwrap = scalar or (self.unwraps_single and len(results) == 1)
        result = results[0] if unwrap else results
        return result if isinstance(result, list) else [result]

    def summary(self, answered: Sequence[Answered], parameters: P) -> Mapping[str, Any]:
        """What the parameters of the response say of the answer: texts and numbers by name."""
        return {}

    # -- helpers for subclasses ------------------------------------------------------------------

    def texts(self, values: Sequence[Any], where: str) -> list[str]:
        """The values as texts within the limits. Raises `InvalidRequest`, `RequestTooLarge`."""
        self.check_count(len(values), where)
        return [self.text(value, f"{where}[{index}]") for index, value in enumerate(values)]

    def text(self, value: Any, where: str) -> str:
        """The value as a text within the limit. Raises `InvalidRequest`, `RequestTooLarge`."""
        if not isinstance(value, str):
            raise InvalidRequest(f"got {type(value).__name__} {value!r:.60}, expected a text @ {where}")
        limit = self.model.limits.max_text_chars
        if len(value) > limit:
            raise RequestTooLarge(f"a text of {len(value)} characters, expected at most {limit} @ {where}")
        return value

    def check_count(self, count: int, where: str) -> None:
        """Raises `InvalidRequest` for an empty batch, `RequestTooLarge` for too many items."""
        limit = self.model.limits.max_items
        if count < 1:
            raise InvalidRequest(f"an empty batch, expected 1..{limit} items @ {where}")
        if count > limit:
            raise RequestTooLarge(f"{count} items, expected at most {limit} @ {where}")
