"""What a model says of itself: how long a text may be, what fills up a batch, what its labels are called."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import TYPE_CHECKING

from mlserver_hftasks.errors import InvalidSettings

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

UNLIMITED_TOKENS = 1 << 20
"""What tokenizers say when nobody said how long a text may be is far above this."""


def max_tokens_of(setting: int | None, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> int:
    """Most tokens of a text: what tokenizer, position embeddings and setting all allow."""
    limits = [limit for limit in (tokenizer.model_max_length, _positions(model)) if limit]
    return limited(setting, tokenizer, int(min([*limits, UNLIMITED_TOKENS])))


def limited(setting: int | None, tokenizer: PreTrainedTokenizerBase, most: int) -> int:
    """The setting `max_length` where it is less than what the model takes. Raises `InvalidSettings`."""
    if setting is None:
        return most
    least = int(tokenizer.num_special_tokens_to_add(pair=True)) + 2
    if not least <= setting <= most:
        raise InvalidSettings(
            f"got {setting}, expected {least}..{most}: a text must fit beside special tokens, and the model "
            "takes no more @ parameters.extra.max_length"
        )
    return setting


def _positions(model: PreTrainedModel) -> int | None:
    embeddings = getattr(model.base_model, "embeddings", None)
    table = getattr(embeddings, "position_embeddings", None)
    rows: int | None = getattr(table, "num_embeddings", None)
    if rows is not None:
        # RoBERTa and its kin count positions from padding_idx + 1.
        padding_idx: int | None = getattr(table, "padding_idx", None)
        return rows - (0 if padding_idx is None else padding_idx + 1)
    positions: int | None = getattr(model.config, "max_position_embeddings", None)
    return positions if positions and positions > 0 else None


def pad_token_id_of(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> int:
    """The id that fills up rows; the model must agree, since some heads look for it."""
    for candidate in (tokenizer.pad_token_id, model.config.pad_token_id, tokenizer.eos_token_id, 0):
        if candidate is not None:
            break
    if model.config.pad_token_id is None:
        model.config.pad_token_id = candidate
    return int(candidate)


def labels_of(
    setting: list[str] | dict[int, str] | None, config: PretrainedConfig, folder: Path
) -> tuple[str, ...]:
    """Names by index: the setting, else `index_to_name.json`, else the model's config."""
    own = config.id2label or {}
    names = tuple(str(own[index]) for index in sorted(own))
    given, where = setting, "parameters.extra.labels"
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
            listed = ast.literal_eval(listed)
        return [str(name) for name in listed]
    except (ValueError, TypeError, SyntaxError, AttributeError) as error:
        raise InvalidSettings(
            f'cannot be read ({error}), expected {{"0": "name"}} or {{"label_list": ["name"]}} '
            "@ index_to_name.json"
        ) from None
