"""What stands for an absent token."""

from __future__ import annotations

from typing import Any

from mlserver_hftasks.backends.gradients import Absent
from mlserver_hftasks.errors import InvalidRequest
from mlserver_hftasks.explain.options import Baseline

NEUTRAL = "..."
"""What stands for an absent text where a model knows no mask token, as in shap's `maskers.Text`."""


def on_path(baseline: Baseline, tokenizer: Any) -> tuple[Absent, str]:
    """For gradients, and its name.

    The mask token; where there is none, in decoders, the mean embedding: under their normalisation nothing
    at all has no direction. Raises `InvalidRequest` for a token that the tokenizer does not have.
    """
    if baseline == "auto":
        baseline = "mean" if tokenizer.mask_token_id is None else "mask"
    if baseline in ("mean", "zero"):
        return baseline, baseline
    found = tokenizer.mask_token_id if baseline == "mask" else tokenizer.pad_token_id
    if found is None:
        raise InvalidRequest(
            f"got {baseline}, but the tokenizer has no such token, expected mean or zero @ explain.baseline"
        )
    return int(found), baseline


def in_text(baseline: Baseline, tokenizer: Any) -> tuple[int, str]:
    """For methods without gradients, which can only write another token, and its name.

    Never the padding token: models count positions, or look for the last token, by it. Raises
    `InvalidRequest` for what is no token.
    """
    if baseline not in ("auto", "mask"):
        raise InvalidRequest(
            f"got {baseline}, expected mask: a method without gradients writes a token @ explain.baseline"
        )
    if tokenizer.mask_token_id is not None:
        return int(tokenizer.mask_token_id), "mask"
    unknown = tokenizer.unk_token_id
    taken = (None, tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)
    if unknown not in taken:
        return int(unknown), str(tokenizer.unk_token)
    neutral = tokenizer.encode(NEUTRAL, add_special_tokens=False)
    return int(neutral[0]), NEUTRAL
