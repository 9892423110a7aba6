"""Padding removal: the sequences of a batch laid end to end through a backbone that knows nothing of it.

A transformers model with a head calls its backbone (`model.base_model`). `Backbone` stands in that place:
it takes the padded batch, drops the padding, runs the backbone once over all tokens `[1, T]`, and puts
the hidden states back where the head expects them, `[n, longest, hidden]`. Heads stay untouched.

What keeps the sequences apart is the layout:

- `varlen`: the backbone's attention calls `varlen_attention` below (through
  `transformers.AttentionInterface`), which attends within each sequence. Costs no more than the tokens.
- `block`: a block-diagonal additive mask, for attention that is not behind that interface but only
  depends on relative positions (MPNet). Attention then costs T squared.
- `padded`: no packing.
- `single`: each row by itself, for what cannot even be padded (FNet mixes tokens and padding).

The idea of packing around the attention is that of Effective FasterTransformer and ByteTransformer
(https://arxiv.org/abs/2210.03052).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

ATTENTION_NAME = "hftasks_varlen"


class Layout(Enum):
    """How the rows of a batch lie in memory."""

    VARLEN = "varlen"
    BLOCK = "block"
    PADDED = "padded"
    SINGLE = "single"


@dataclass(frozen=True, slots=True)
class Sequences:
    """Boundaries of the sequences that lie end to end in a packed batch of T tokens."""

    lengths: tuple[int, ...]
    cumulative: torch.Tensor
    """[n + 1], int32, on the device of the batch; the first is 0, the last is T."""


class Backbone:
    """Stands in for `forward` of a model's backbone; see the module docstring.

    `select`, [n, m] or None, names the positions of each row whose hidden states the head shall get.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._module = model.base_model
        self._attention = model.config._attn_implementation
        self._own_forward = vars(self._module).get("forward")
        self._forward = self._module.forward
        self.layout = Layout.PADDED
        self.select: torch.Tensor | None = None
        self._module.forward = self

    def use(self, layout: Layout) -> None:
        """Change the layout of what follows. Raises TypeError if the model knows no such layout."""
        if layout is Layout.VARLEN and not self._module._supports_attention_backend:
            raise TypeError("its attention is not behind AttentionInterface")
        implementation = ATTENTION_NAME if layout is Layout.VARLEN else self._attention
        if implementation != self._module.config._attn_implementation:
            self._module.set_attn_implementation(implementation)
        self.layout = layout

    def replace(self, make: Callable[[Callable[..., Any]], Callable[..., Any]], attention: str) -> None:
        """Run what `make` makes of the backbone's `forward` from now on, with that attention if packed."""
        if self.layout is Layout.VARLEN:
            self._module.set_attn_implementation(attention)
        self._forward = make(self._forward)

    def release(self) -> None:
        """Give the backbone its own `forward` back, which ends the cycle that keeps its memory."""
        del self._module.forward
        if self._own_forward is not None:  # accelerate's, which moves the inputs between devices
            self._module.forward = self._own_forward

    def __call__(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        """The backbone's outputs for a padded batch [n, longest] with its `attention_mask`."""
        if self.layout in (Layout.PADDED, Layout.SINGLE):
            return self._selected(self._forward(input_ids, **kwargs))
        if len(input_ids) == 1:
            return self._selected(self._forward(input_ids, **{**kwargs, **self._alone(input_ids)}))
        mask = kwargs.pop("attention_mask").bool()
        packed = {
            name: value[mask][None] if isinstance(value, torch.Tensor) else value
            for name, value in kwargs.items()
        }
        packed["position_ids"] = self._positions(input_ids, mask)[mask][None]
        packed.update(self._boundaries(mask))
        outputs = self._forward(input_ids[mask][None], **packed)
        hidden = outputs.last_hidden_state[0]
        unpacked = hidden.new_zeros(*mask.shape, hidden.shape[-1])
        unpacked[mask] = hidden
        outputs.last_hidden_state = unpacked
        pool_again(self._module, outputs)
        return self._selected(outputs)

    def _selected(self, outputs: Any) -> Any:
        if self.select is not None:
            hidden = outputs.last_hidden_state
            index = self.select[:, :, None].expand(-1, -1, hidden.shape[-1])
            outputs.last_hidden_state = hidden.gather(1, index)
        return outputs

    def _positions(self, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        first = first_position(self._module)
        if first is None:
            return mask.cumsum(1) - 1
        # RoBERTa and its kin count from padding_idx + 1 and skip that token wherever it stands.
        counted = input_ids != first
        positions: torch.Tensor = counted.cumsum(1) * counted + first
        return positions

    def _alone(self, input_ids: torch.Tensor) -> dict[str, Any]:
        """What tells the backbone that the batch is one row, which nothing pads."""
        if self.layout is Layout.BLOCK:
            return {"attention_mask": None}
        length = input_ids.shape[1]
        cumulative = torch.tensor([0, length], dtype=torch.int32, device=input_ids.device)
        return {"attention_mask": None, "sequences": Sequences((length,), cumulative)}

    def _boundaries(self, mask: torch.Tensor) -> dict[str, Any]:
        if self.layout is Layout.BLOCK:
            owner = torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)[mask]
            dtype = self._module.dtype
            apart = (owner[:, None] != owner[None, :]).to(dtype) * torch.finfo(dtype).min
            return {"attention_mask": apart[None, None]}
        lengths = mask.sum(1)
        cumulative = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        return {"attention_mask": None, "sequences": Sequences(tuple(lengths.tolist()), cumulative)}


def pool_again(module: torch.nn.Module, outputs: Any) -> None:
    """Pool the hidden states `[n, longest, hidden]` where the backbone itself pooled packed ones."""
    pooler: Any = getattr(module, "pooler", None)
    if pooler is None or outputs.get("pooler_output") is None:
        return
    hidden = outputs.last_hidden_state
    if isinstance(pooler, torch.nn.Linear):  # ALBERT's is no module of its own
        outputs.pooler_output = module.pooler_activation(pooler(hidden[:, 0]))  # type: ignore[operator]
    else:
        outputs.pooler_output = pooler(hidden)


def first_position(module: torch.nn.Module) -> int | None:
    """The padding_idx from which a backbone such as RoBERTa's counts positions, None if it counts from 0."""
    embeddings: Any = getattr(module, "embeddings", None)
    first: int | None = getattr(getattr(embeddings, "position_embeddings", None), "padding_idx", None)
    return first


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    sequences: Sequences,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Attention within each of the sequences: query [1, heads, T, d] -> [1, T, heads, d].

    `sequences` has no default: a backbone that does not hand it on fails loudly instead of letting one
    client's tokens attend to another's. `sliding_window` counts as FlashAttention does: a token sees
    `sliding_window - 1` tokens to each side. Raises TypeError for what it does not compute.
    """
    if attention_mask is not None or kwargs.get("position_bias") is not None or kwargs.get("softcap"):
        raise TypeError("varlen attention takes no mask, position bias or softcap")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    attend = _attend_fused if _fused_kernel_takes(query) else _attend_each
    window = None if sliding_window is None else sliding_window - 1
    return attend(query, key, value, sequences, scaling, causal, window), None


AttentionInterface.register(ATTENTION_NAME, varlen_attention)

Attend = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, Sequences, float | None, bool, int | None], torch.Tensor
]


def _fused_kernel_takes(query: torch.Tensor) -> bool:
    return query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] <= 256


def _attend_fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sequences: Sequences,
    scaling: float | None,
    causal: bool,
    window: int | None,
) -> torch.Tensor:
    """One FlashAttention kernel over all sequences."""
    from torch.nn.attention.varlen import varlen_attn

    before = -1 if window is None else window
    after = 0 if causal else before
    longest = max(sequences.lengths)
    q, k, v = (states[0].transpose(0, 1).contiguous() for states in (query, key, value))
    output = varlen_attn(
        q,
        k,
        v,
        cu_seq_q=sequences.cumulative,
        cu_seq_k=sequences.cumulative,
        max_q=longest,
        max_k=longest,
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
    sequences: Sequences,
    scaling: float | None,
    causal: bool,
    window: int | None,
) -> torch.Tensor:
    """Scaled dot product attention per sequence: on a CPU the launch costs less than the padding.

    Neighbours of one length share a launch.
    """
    grouped = query.shape[1] != key.shape[1]
    runs = [(length, len(list(run))) for length, run in itertools.groupby(sequences.lengths)]
    sizes = [length * count for length, count in runs]
    # Not `narrow`, whose gradient would fill a tensor of the whole batch for every piece.
    pieces = zip(*(torch.split(states[0], sizes, dim=1) for states in (query, key, value)), strict=True)
    attended = []
    for (length, count), of_run in zip(runs, pieces, strict=True):
        q, k, v = (_stacked(states, count, length) for states in of_run)
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


def _stacked(states: torch.Tensor, count: int, length: int) -> torch.Tensor:
    """Sequences of one length as a batch: [heads, count * length, d] -> [count, heads, length, d]."""
    return states.reshape(len(states), count, length, -1).transpose(0, 1)


def _window_mask(length: int, window: int, causal: bool, like: torch.Tensor) -> torch.Tensor:
    position = torch.arange(length, device=like.device)
    distance = position[:, None] - position[None, :]
    return (distance <= window) & (distance >= 0) if causal else distance.abs() <= window
