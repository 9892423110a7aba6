"""A model on the hub or in a folder: its config, its tokenizer, its weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mlserver_hftasks.backends.base import Head
from mlserver_hftasks.errors import InvalidSettings
from mlserver_hftasks.loading.placement import placement_options
from mlserver_hftasks.settings import Settings

logger = logging.getLogger("mlserver.hftasks")
SMALL_FILES = ("*.json", "*_Dense/*", "*.txt", "*.model")
"""Configs, tokenizers, and the layers of sentence-transformers."""
transformers.utils.logging.disable_progress_bar()


class Source:
    """A hub id or a folder, and how to read it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._name = settings.pretrained_model or ""
        self._common: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code}
        if settings.revision is not None:
            self._common["revision"] = settings.revision
        self.folder = Path(self._name) if Path(self._name).is_dir() else self._snapshot()

    @property
    def name(self) -> str:
        """The hub id or the folder."""
        return self._name

    def fetch(self, name: str) -> Path | None:
        """A folder with that file of the model on the hub, and what else begins so; None if there is none.

        None for a folder too: what it has is there.
        """
        if Path(self._name).is_dir():
            return None
        stem = name.removesuffix(".xml")
        folder = self._snapshot([f"{stem}*", *SMALL_FILES])
        return folder if (folder / name).is_file() else None

    def weights_folder(self) -> Path:
        """A folder that has the weights too, and the model's own code where that is run."""
        if Path(self._name).is_dir():
            return self.folder
        code = ["*.py"] if self._settings.trust_remote_code else []
        return self._snapshot(["*.safetensors", *SMALL_FILES, *code])

    def _snapshot(self, patterns: Sequence[str] = SMALL_FILES) -> Path:
        """The files of a model on the hub that match the patterns."""
        path = self._read(
            snapshot_download,
            self._name,
            "pretrained_model",
            revision=self._settings.revision,
            allow_patterns=list(patterns),
        )
        return Path(path)

    def config(self) -> PretrainedConfig:
        """The model's config. This and the rest raise `InvalidSettings` for what cannot be read."""
        return self._read(AutoConfig.from_pretrained, self._name, "pretrained_model", **self._common)

    def generation_config(self, config: PretrainedConfig) -> GenerationConfig:
        """Of the files, else what the config says of generating."""
        if (self.folder / "generation_config.json").is_file():
            return GenerationConfig.from_pretrained(self.folder)
        return GenerationConfig.from_model_config(config)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, or the one that the settings name."""
        name = self._settings.pretrained_tokenizer or self._name
        tokenizer = self._read(AutoTokenizer.from_pretrained, name, "pretrained_tokenizer", **self._common)
        if len(tokenizer) <= len(tokenizer.all_special_ids):
            # Without its files transformers makes one that knows no words, and says nothing.
            raise InvalidSettings(
                f"'{name}' has no tokenizer files, expected tokenizer.json or a vocabulary beside the model "
                "@ parameters.extra.pretrained_tokenizer"
            )
        if self._settings.do_lower_case:
            _lower_case(tokenizer)
        return tokenizer

    def model(self, head: Head, config: PretrainedConfig, device: torch.device) -> PreTrainedModel:
        """The model with that head, on the CPU; `device` is where it will run."""
        options: dict[str, Any] = {
            "dtype": dtype_of(self._settings, device, config),
            "use_safetensors": True,
            **placement_options(self._settings),
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


def dtype_of(settings: Settings, device: torch.device, config: PretrainedConfig) -> torch.dtype:
    """The dtype of the setting; `auto` is the checkpoint's, where the device computes in it."""
    if settings.dtype != "auto":
        dtype: torch.dtype = getattr(torch, settings.dtype)
        return dtype
    if settings.quantization in ("int8", "int8-static"):
        return torch.float32  # scales are found, and the rest is computed, in float32
    stored = getattr(config, "dtype", None) or torch.float32
    # float16 arithmetic on a CPU is emulated, and slower than float32.
    slow = stored is torch.float16 and device.type == "cpu"
    return torch.float32 if slow or not isinstance(stored, torch.dtype) else stored


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
