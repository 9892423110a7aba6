"""What sentence-transformers saved beside a model: how token states become one embedding.

modules.json                       the modules in order: Transformer, Pooling, Dense ..., Normalize
1_Pooling/config.json              the pooling mode
2_Dense/config.json, model.safetensors
sentence_bert_config.json          max_seq_length, do_lower_case
config_sentence_transformers.json  prompts, default_prompt_name
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mlserver_hftasks.engine.rows import FloatArray
from mlserver_hftasks.errors import InvalidSettings

PoolingMode = Literal["mean", "cls", "max", "last"]

_MODES: dict[str, PoolingMode] = {"mean": "mean", "cls": "cls", "max": "max", "lasttoken": "last"}
_FLAGS: dict[str, str] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""How versions before 6 of sentence-transformers wrote the mode down."""
_ACTIVATIONS: dict[str, Callable[[FloatArray], FloatArray]] = {
    "Identity": lambda values: values,
    "Tanh": np.tanh,
    "ReLU": lambda values: np.maximum(values, 0),
}


@dataclass(frozen=True, slots=True)
class Dense:
    """A linear layer after pooling."""

    weight: FloatArray
    """[out, in]"""
    bias: FloatArray | None
    activation: str
    """A name in `_ACTIVATIONS`."""

    def __call__(self, embedding: FloatArray) -> FloatArray:
        """[in] -> [out]."""
        values = self.weight @ embedding
        return _ACTIVATIONS[self.activation](values if self.bias is None else values + self.bias)


@dataclass(frozen=True, slots=True)
class SentenceConfig:
    """The defaults are those of a model without sentence-transformers' files."""

    pooling: PoolingMode = "mean"
    normalize: bool = False
    dense: tuple[Dense, ...] = ()
    max_tokens: int | None = None
    lower_case: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    """Text that goes before a text, by name."""
    default_prompt_name: str | None = None


def read_sentence_config(folder: str | None) -> SentenceConfig:
    """What the folder says. Raises `InvalidSettings` for what is not served here."""
    if folder is None or not (Path(folder) / "modules.json").is_file():
        return SentenceConfig()
    root = Path(folder)
    modules = [(_kind(module), root / module.get("path", "")) for module in _read(root / "modules.json")]
    kinds = [kind for kind, _ in modules]
    _check_order(kinds)
    transformer = _first(modules[0][1].glob("sentence_*_config.json"))
    saved = read_saved_settings(folder)
    return SentenceConfig(
        pooling=_pooling(modules[1][1] / "config.json"),
        normalize=kinds[-1] == "Normalize",
        dense=tuple(_dense(path) for kind, path in modules if kind == "Dense"),
        max_tokens=transformer.get("max_seq_length"),
        lower_case=bool(transformer.get("do_lower_case")),
        prompts={name: text or "" for name, text in (saved.get("prompts") or {}).items()},
        default_prompt_name=saved.get("default_prompt_name"),
    )


def read_saved_settings(folder: str | None) -> Mapping[str, Any]:
    """`config_sentence_transformers.json`: the prompts, and the activation of a cross-encoder."""
    path = Path(folder or "") / "config_sentence_transformers.json"
    settings: Mapping[str, Any] = _read(path) if folder is not None and path.is_file() else {}
    return settings


def _kind(module: Mapping[str, str]) -> str:
    """`sentence_transformers.models.Pooling` is a Pooling, wherever later versions have moved it."""
    return module.get("type", "").rpartition(".")[2]


def _check_order(kinds: Sequence[str]) -> None:
    middle = kinds[2:-1] if kinds[-1:] == ["Normalize"] else kinds[2:]
    if list(kinds[:2]) != ["Transformer", "Pooling"] or set(middle) - {"Dense"}:
        raise InvalidSettings(
            f"got the modules {', '.join(kinds)}, expected Transformer, Pooling, any number of Dense, and "
            "perhaps Normalize @ modules.json"
        )


def _pooling(path: Path) -> PoolingMode:
    config = _read(path)
    chosen = (
        config.get("pooling_mode") or [mode for flag, mode in _FLAGS.items() if config.get(flag)] or "mean"
    )
    modes = [chosen] if isinstance(chosen, str) else list(chosen)
    if len(modes) != 1 or modes[0] not in _MODES:
        raise InvalidSettings(
            f"got the pooling {modes}, expected one of {', '.join(_MODES)} @ {_place(path)}"
        )
    if config.get("include_prompt") is False:
        raise InvalidSettings(
            f"got false, expected true: prompts are pooled here @ {_place(path)}: include_prompt"
        )
    return _MODES[modes[0]]


def _dense(folder: Path) -> Dense:
    config = _read(folder / "config.json")
    name = str(config.get("activation_function", "Tanh")).rpartition(".")[2]
    plain = (
        not config.get("use_residual")
        and config.get("module_input_name", "sentence_embedding") == "sentence_embedding"
    )
    if name not in _ACTIVATIONS or not plain:
        raise InvalidSettings(
            f"got a Dense module with {config}, expected one over the embedding, without residual, with an "
            f"activation of {', '.join(_ACTIVATIONS)} @ {_place(folder / 'config.json')}"
        )
    path = folder / "model.safetensors"
    if not path.is_file():
        raise InvalidSettings(f"no safetensors, expected the weights of the Dense module @ {_place(path)}")
    weights = _load_float32(path)
    return Dense(weights["linear.weight"], weights.get("linear.bias"), name)


def _load_float32(path: Path) -> dict[str, FloatArray]:
    # Through torch, since numpy has no bfloat16.
    from safetensors.torch import load_file

    return {name: tensor.float().numpy() for name, tensor in load_file(path).items()}


def _first(paths: Any) -> Any:
    path = next(iter(sorted(paths)), None)
    return {} if path is None else _read(path)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror
        raise InvalidSettings(f"cannot be read ({reason}), expected a file @ {_place(path)}") from None
    except ValueError as error:
        raise InvalidSettings(f"cannot be read ({error}), expected JSON @ {_place(path)}") from None


def _place(path: Path) -> str:
    """The file and its folder, without where on this machine they are."""
    return "/".join(path.parts[-2:])
