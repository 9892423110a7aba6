"""From settings to something that serves: a task over a model, and the backend that runs it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from mlserver_hftasks.backends.base import Backend
from mlserver_hftasks.engine.rows import Row
from mlserver_hftasks.errors import InvalidSettings
from mlserver_hftasks.loading.eager import check_quantization, torch_backend
from mlserver_hftasks.loading.facts import labels_of, max_tokens_of, pad_token_id_of
from mlserver_hftasks.loading.source import Source
from mlserver_hftasks.settings import Settings
from mlserver_hftasks.tasks.base import ItemLimits, ModelFacts, Task
from mlserver_hftasks.tasks.encoder import Encoder
from mlserver_hftasks.tasks.registry import canonical_name, task_class

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
    device = _device(settings.device)
    check_quantization(settings, device)
    source = Source(settings)
    config = source.config()
    kind = task_class(canonical_name(settings.task or _infer_task(config, source.folder)))
    tokenizer = source.tokenizer()
    model = source.model(kind.head, config, device)
    encoder = Encoder(tokenizer, max_tokens_of(settings.max_length, tokenizer, model))
    facts = ModelFacts(
        config=config,
        encoder=encoder,
        labels=labels_of(settings.labels, config, source.folder),
        truncation=settings.truncation,
        limits=ItemLimits(settings.max_items, settings.max_text_chars),
        folder=str(source.folder),
    )
    task = kind(facts)
    backend = torch_backend(
        settings,
        model,
        kind.head,
        device=device,
        pad_token_id=pad_token_id_of(tokenizer, model),
        probe=probe_rows(encoder),
    )
    return Served(task, backend)


def probe_rows(encoder: Encoder, words: tuple[int, ...] = (1, 40, 12, 90)) -> list[Row]:
    """Rows of real tokens, about as many as `words` says, for probing and warming up."""
    sentence = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]
    texts = [" ".join((sentence * (count // len(sentence) + 1))[:count]) for count in words]
    arrays = [encoder.row(encoding).arrays for encoding in encoder.encode_as_fits(texts)]
    return [Row(row) for row in arrays]


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
