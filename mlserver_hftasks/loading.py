"""From settings to something that serves: config, task, tokenizer, labels, model, backend."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from mlserver_hftasks.backends.base import Backend, Head
from mlserver_hftasks.backends.torch import TorchBackend
from mlserver_hftasks.engine.rows import Row
from mlserver_hftasks.errors import InvalidSettings
from mlserver_hftasks.settings import Settings
from mlserver_hftasks.tasks.base import ItemLimits, ModelFacts, Task
from mlserver_hftasks.tasks.encoder import Encoder
from mlserver_hftasks.tasks.registry import canonical_name, task_class

logger = logging.getLogger("mlserver.hftasks")
transformers.utils.logging.disable_progress_bar()

UNLIMITED_TOKENS = 1 << 20
"""What tokenizers say when nobody said how long a text may be is far above this."""

TASK_OF_HEAD = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "Model": "feature-extraction",
}
"""The task of a model whose class name ends so, where the settings name none."""


@dataclass(frozen=True, slots=True)
class Served:
    """A task over a model, ready to run."""

    task: Task[Any]
    backend: Backend


def load(settings: Settings) -> Served:
    """Load what the settings describe. Raises `InvalidSettings` with what is wrong and what to do."""
    if settings.optimum_model:
        raise InvalidSettings(
            "got true, expected false: the ONNX Runtime backend is not there yet; remove the key to serve "
            "the model on torch @ parameters.extra.optimum_model"
        )
    if not settings.pretrained_model:
        raise InvalidSettings("no model, expected a hub id or a folder @ parameters.extra.pretrained_model")
    source = _Source(settings)
    config = source.config()
    kind = task_class(canonical_name(settings.task or _infer_task(config, source.folder)))
    tokenizer = source.tokenizer()
    model = source.model(kind.head, config)
    facts = ModelFacts(
        config=config,
        encoder=Encoder(tokenizer, _max_tokens(settings, tokenizer, model)),
        labels=_labels(settings, config, source.folder),
        truncation=settings.truncation,
        limits=ItemLimits(settings.max_items, settings.max_text_chars),
        folder=str(source.folder),
    )
    task = kind(facts)
    backend = TorchBackend(
        model,
        kind.head,
        device=_device(settings.device),
        pad_token_id=_pad_token_id(tokenizer, model),
        probe=probe_rows(facts.encoder),
        packing=settings.packing == "auto",
    )
    return Served(task, backend)


def probe_rows(encoder: Encoder, words: tuple[int, ...] = (1, 40, 12, 90)) -> list[Row]:
    """Rows of real tokens, about as many as `words` says, for probing and warming up."""
    sentence = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]
    texts = [" ".join((sentence * (count // len(sentence) + 1))[:count]) for count in words]
    arrays = [encoder.row(encoding).arrays for encoding in encoder.encode_as_fits(texts)]
    return [Row(row) for row in arrays]


class _Source:
    """A hub id or a folder, and how to read it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._name = settings.pretrained_model or ""
        self._common = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
        self.folder = Path(self._name) if Path(self._name).is_dir() else self._snapshot()

    def _snapshot(self) -> Path:
        """The small files of a model on the hub, sentence-transformers' among them."""
        patterns = ["*.json", "*_Dense/*"]
        path = self._read(
            snapshot_download,
            self._name,
            "pretrained_model",
            revision=self._settings.revision,
            allow_patterns=patterns,
        )
        return Path(path)

    def config(self) -> PretrainedConfig:
        return self._read(AutoConfig.from_pretrained, self._name, "pretrained_model", **self._common)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        name = self._settings.pretrained_tokenizer or self._name
        tokenizer = self._read(AutoTokenizer.from_pretrained, name, "pretrained_tokenizer", **self._common)
        if self._settings.do_lower_case:
            _lower_case(tokenizer)
        return tokenizer

    def model(self, head: Head, config: PretrainedConfig) -> PreTrainedModel:
        options: dict[str, Any] = {
            "dtype": _dtype(self._settings, config),
            "use_safetensors": True,
            **self._common,
            **self._settings.model_kwargs,
        }
        auto_class = getattr(transformers, head.auto_class)
        with _quiet_transformers():
            model, report = self._read(
                auto_class.from_pretrained,
                self._name,
                "pretrained_model",
                config=config,
                output_loading_info=True,
                **options,
            )
        if missing := sorted(report["missing_keys"]):
            logger.warning(
                "%s has no weights for %s: they are random, and so are its answers", self._name, missing[:4]
            )
        loaded: PreTrainedModel = model
        return loaded

    def _read(self, read: Callable[..., Any], name: str, key: str, **options: Any) -> Any:
        try:
            return read(name, **options)
        except Exception as error:  # what several libraries make of files that they did not expect
            reason = " ".join(str(error).split()) or type(error).__name__
            if "safetensors" in reason:
                reason += ' (pickled weights load only with "model_kwargs": {"use_safetensors": false})'
            raise InvalidSettings(
                f"'{name}' cannot be loaded: {reason}, expected a model of the hub or its folder "
                f"@ parameters.extra.{key}"
            ) from error


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without the tables that transformers prints while it loads; we log a line of our own."""
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(verbosity)


def _infer_task(config: PretrainedConfig, folder: Path) -> str:
    if (folder / "modules.json").is_file():
        return "sentence-embedding"
    for architecture in config.architectures or ():
        for ending, task in TASK_OF_HEAD.items():
            if architecture.endswith(ending):
                return task
    raise InvalidSettings(
        f"no task, and none can be inferred from the architectures {config.architectures}, expected the name "
        "of a task @ parameters.extra.task"
    )


def _device(setting: int | str | None) -> torch.device:
    if setting is None or setting == -1:
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    kind = "cuda" if accelerator is None else accelerator.type
    try:
        device = torch.device(setting) if isinstance(setting, str) else torch.device(kind, setting)
    except RuntimeError:
        raise InvalidSettings(
            f'got {setting!r}, expected -1, 0, "cpu", "cuda:1" or "mps" @ parameters.extra.device'
        ) from None
    if device.type != "cpu" and (accelerator is None or accelerator.type != device.type):
        raise InvalidSettings(
            f"got {setting!r}, but torch {torch.__version__} sees no {device.type} device here, expected -1 "
            "(CPU), or a machine and a torch build with that device @ parameters.extra.device"
        )
    return device


def _dtype(settings: Settings, config: PretrainedConfig) -> torch.dtype:
    if settings.dtype != "auto":
        dtype: torch.dtype = getattr(torch, settings.dtype)
        return dtype
    stored = getattr(config, "dtype", None) or torch.float32
    # float16 arithmetic on a CPU is emulated, and slower than float32.
    slow = stored is torch.float16 and _device(settings.device).type == "cpu"
    return torch.float32 if slow or not isinstance(stored, torch.dtype) else stored


def _max_tokens(settings: Settings, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> int:
    """Most tokens of a text: what tokenizer, position embeddings and setting all allow."""
    limits = [limit for limit in (tokenizer.model_max_length, _positions(model)) if limit]
    most = min([*limits, UNLIMITED_TOKENS])
    if settings.max_length is None:
        return int(most)
    if settings.max_length > most:
        raise InvalidSettings(
            f"got {settings.max_length}, expected 1..{most}: the model takes no more "
            "@ parameters.extra.max_length"
        )
    return settings.max_length


def _positions(model: PreTrainedModel) -> int | None:
    embeddings = getattr(model.base_model, "embeddings", None)
    table = getattr(embeddings, "position_embeddings", None)
    if isinstance(table, torch.nn.Embedding):
        # RoBERTa and its kin count positions from padding_idx + 1.
        offset = 0 if table.padding_idx is None else table.padding_idx + 1
        return table.num_embeddings - offset
    positions: int | None = getattr(model.config, "max_position_embeddings", None)
    return positions if positions and positions > 0 else None


def _pad_token_id(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> int:
    """The id that fills up rows; the model must agree, since some heads look for it."""
    for candidate in (tokenizer.pad_token_id, model.config.pad_token_id, tokenizer.eos_token_id, 0):
        if candidate is not None:
            break
    if model.config.pad_token_id is None:
        model.config.pad_token_id = candidate
    return int(candidate)


def _labels(settings: Settings, config: PretrainedConfig, folder: Path) -> tuple[str, ...]:
    """Names by index: the setting, else `index_to_name.json`, else the model's config."""
    own = config.id2label or {}
    names = tuple(str(own[index]) for index in sorted(own))
    given, where = settings.labels, "parameters.extra.labels"
    if given is None and (folder / "index_to_name.json").is_file():
        given, where = _read_index_to_name(folder / "index_to_name.json"), "index_to_name.json"
    if given is None:
        return names
    by_index = given if isinstance(given, dict) else dict(enumerate(given))
    if sorted(by_index) != list(range(len(names))):
        raise InvalidSettings(
            f"got names for {sorted(by_index)}, expected them for 0..{len(names) - 1} @ {where}"
        )
    return tuple(by_index[index] for index in range(len(names)))


def _read_index_to_name(path: Path) -> dict[int, str] | list[str]:
    """TorchServe's two shapes: `{"0": "name", ...}`, or `{"label_list": "['name', ...]"}`."""
    try:
        content = json.loads(path.read_text())
        if "label_list" not in content:
            return {int(index): str(name) for index, name in content.items()}
        listed = content["label_list"]
        if isinstance(listed, str):
            listed = json.loads(listed.replace("'", '"'))
        return [str(name) for name in listed]
    except (ValueError, TypeError, AttributeError) as error:
        raise InvalidSettings(
            f'cannot be read ({error}), expected {{"0": "name"}} or {{"label_list": ["name"]}} '
            "@ index_to_name.json"
        ) from None


def _lower_case(tokenizer: PreTrainedTokenizerBase) -> None:
    """Lower-case first, whatever the tokenizer's own normalisation is."""
    if not tokenizer.is_fast:
        raise InvalidSettings(
            "got true, but this tokenizer is written in Python @ parameters.extra.do_lower_case"
        )
    from tokenizers import normalizers

    backend = tokenizer.backend_tokenizer
    lower = normalizers.Lowercase()
    backend.normalizer = (
        lower if backend.normalizer is None else normalizers.Sequence([lower, backend.normalizer])
    )
