"""Attention within sequences that lie end to end, behind `transformers.AttentionInterface`."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

ATTENTION_NAME = "hftasks_varlen"


@dataclass(frozen=True, slots=True)
class Sequences:
    """Boundaries of the sequences that lie end to end in a packed batch of T tokens."""

    lengths: tuple[int, ...]
    cumulative: torch.Tensor
    """[n + 1], int32, on the device of the batch; the first is 0, the last is T."""
    reads: Reads | None = None
    """What is read of the last layer, where that is less than all; see `early`."""

    @classmethod
    def equal(cls, count: int, length: int, *, device: torch.device) -> Sequences:
        """So many sequences of one length."""
        bounds = torch.arange(0, (count + 1) * length, length, dtype=torch.int32, device=device)
        return cls((length,) * count, bounds)


@dataclass(frozen=True, slots=True)
class Reads:
    """Tokens of a packed batch, equally many of each sequence."""

    tokens: torch.Tensor
    """[n * m], their places among the T."""
    sequences: Sequences
    """Their boundaries, n times m."""


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    sequences: Sequences,
    queries: Sequences | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Attention within each of the sequences: query [1, heads, T, d] -> [1, T, heads, d].

    `queries` are the boundaries of the queries, where each sequence has other than its keys.

    `sequences` has no default: a backbone that does not hand it on fails loudly instead of letting one
    client's tokens attend to another's. `sliding_window` counts as FlashAttention does: a token sees
    `sliding_window - 1` tokens to each side. Raises TypeError for what it does not compute.
    """
    if attention_mask is not None or kwargs.get("position_bias") is not None or kwargs.get("softcap"):
        raise TypeError("varlen attention takes no mask, position bias or softcap")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if queries is not None and (causal or sliding_window is not None):
        raise TypeError("where queries are not the tokens themselves nobody knows what lies before them")
    attend = _attend_fused if fused_kernel_takes(query) else _attend_each
    window = None if sliding_window is None else sliding_window - 1
    bounds = (queries or sequences, sequences)
    return attend(query, key, value, bounds, scaling, causal, window), None


AttentionInterface.register(ATTENTION_NAME, varlen_attention)

Bounds = tuple[Sequences, Sequences]
"""Of the queries, and of keys and values."""
Attend = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, Bounds, float | None, bool, int | None], torch.Tensor
]


def fused_kernel_takes(query: torch.Tensor) -> bool:
    """Whether FlashAttention runs on such a query [..., d]."""
    return query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] <= 256


def _attend_fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: Bounds,
    scaling: float | None,
    causal: bool,
    window: int | None,
) -> torch.Tensor:
    """One FlashAttention kernel over all sequences."""
    from torch.nn.attention.varlen import varlen_attn

    before = -1 if window is None else window
    after = 0 if causal else before
    of_queries, of_keys = bounds
    q, k, v = (states[0].transpose(0, 1).contiguous() for states in (query, key, value))
    output = varlen_attn(
        q,
        k,
        v,
        cu_seq_q=of_queries.cumulative,
        cu_seq_k=of_keys.cumulative,
        max_q=max(of_queries.lengths),
        max_k=max(of_keys.lengths),
        scale=scaling,
        window_size=(before, after),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, torch.Tensor)
    return output[None]


def _attend_each(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: Bounds,
    scaling: float | None,
    causal: bool,
    window: int | None,
) -> torch.Tensor:
    """Scaled dot product attention per sequence: on a CPU the launch costs less than the padding.

    Neighbours of one length share a launch.
    """
    grouped = query.shape[1] != key.shape[1]
    lengths = zip(bounds[0].lengths, bounds[1].lengths, strict=True)
    runs = [(each, len(list(run))) for each, run in itertools.groupby(lengths)]
    asked, known = ([length[side] * count for length, count in runs] for side in (0, 1))
    # Not `narrow`, whose gradient would fill a tensor of the whole batch for every piece.
    pieces = zip(
        *(
            torch.split(states[0], sizes, dim=1)
            for states, sizes in ((query, asked), (key, known), (value, known))
        ),
        strict=True,
    )
    attended = []
    for ((_, length), count), of_run in zip(runs, pieces, strict=True):
        q, k, v = (_stacked(states, count) for states in of_run)
        mask = None if window is None or length <= window else _window_mask(length, window, causal, query)
        outputs = scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=causal and mask is None,
            scale=scaling,
            enable_gqa=grouped,
        )
        attended.append(outputs.transpose(1, 2).flatten(0, 1))
    return torch.cat(attended)[None]


def _stacked(states: torch.Tensor, count: int) -> torch.Tensor:
    """Sequences of one length as a batch: [heads, count * length, d] -> [count, heads, length, d]."""
    return states.reshape(len(states), count, -1, states.shape[-1]).transpose(0, 1)


def _window_mask(length: int, window: int, causal: bool, like: torch.Tensor) -> torch.Tensor:
    position = torch.arange(length, device=like.device)
    distance = position[:, None] - position[None, :]
    return (distance <= window) & (distance >= 0) if causal else distance.abs() <= window
