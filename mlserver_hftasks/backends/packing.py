"""Padding removal: the sequences of a batch laid end to end through a backbone that knows nothing of it.

A transformers model with a head calls its backbone (`model.base_model`). `Backbone` stands in that place:
it takes the padded batch, drops the padding, runs the backbone once over all tokens `[1, T]`, and puts
the hidden states back where the head expects them, `[n, longest, hidden]`. Heads stay untouched.

What keeps the sequences apart is the layout:

- `varlen`: the backbone's attention calls `varlen.varlen_attention` (through
  `transformers.AttentionInterface`), which attends within each sequence. Costs no more than the tokens.
- `block`: a block-diagonal additive mask, for attention that is not behind that interface but only
  depends on relative positions (MPNet). Attention then costs T squared.
- `padded`: no packing.
- `single`: each row by itself, for what cannot even be padded (FNet mixes tokens and padding).

The idea of packing around the attention is that of Effective FasterTransformer and ByteTransformer
(https://arxiv.org/abs/2210.03052).
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from transformers import PreTrainedModel

from mlserver_hftasks.backends.early import EarlyLayer
from mlserver_hftasks.backends.varlen import ATTENTION_NAME, Reads, Sequences

Replacing = Callable[[Callable[..., Any]], Callable[..., Any]]
"""From a function to one with the same arguments and results."""


class Layout(Enum):
    """How the rows of a batch lie in memory."""

    VARLEN = "varlen"
    BLOCK = "block"
    PADDED = "padded"
    SINGLE = "single"


class Backbone:
    """Stands in for `forward` of a model's backbone; see the module docstring.

    `select`, [n, m] or None, names the positions of each row whose hidden states the head shall get. If
    `reads_first`, it gets the first ones where nothing is selected.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._module = model.base_model
        self._attention = model.config._attn_implementation
        self._own_forward = vars(self._module).get("forward")
        self._forward = self._module.forward
        self.layout = Layout.PADDED
        self.select: torch.Tensor | None = None
        self.reads_first = False
        self._early: EarlyLayer | None = None
        self._module.forward = self

    def use(self, layout: Layout) -> None:
        """Change the layout of what follows. Raises TypeError if the model knows no such layout."""
        self.read_all()
        if layout is Layout.VARLEN and not self._module._supports_attention_backend:
            raise TypeError("its attention is not behind AttentionInterface")
        implementation = ATTENTION_NAME if layout is Layout.VARLEN else self._attention
        if implementation != self._module.config._attn_implementation:
            self._module.set_attn_implementation(implementation)
        self.layout = layout

    def read_early(self, *, first: bool) -> bool:
        """Compute no more of the last layer than is read, from now on; whether that can be done.

        With `first`, that is the first token of each row, unless rows select others.
        """
        self.read_all()
        if self.layout is Layout.VARLEN:
            self._early = EarlyLayer.of(self._module)
            self.reads_first = first and self._early is not None
        return self._early is not None

    def read_all(self) -> None:
        """Compute all of the last layer, from now on."""
        if self._early is not None:
            self._early.release()
        self._early, self.reads_first = None, False

    def replace(self, make: Replacing, attention: str, outside: Replacing) -> None:
        """Run what `make` makes of the backbone's `forward` from now on, with that attention if packed.

        What is computed of few tokens is `outside` of it.
        """
        if self.layout is Layout.VARLEN:
            self._module.set_attn_implementation(attention)
        if self._early is not None:
            self._early.replace(outside)
        self._forward = make(self._forward)

    def release(self) -> None:
        """Give the backbone its own `forward` back, which ends the cycle that keeps its memory."""
        self.read_all()
        del self._module.forward
        if self._own_forward is not None:  # accelerate's, which moves the inputs between devices
            self._module.forward = self._own_forward

    def __call__(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        """The backbone's outputs for a padded batch [n, longest] with its `attention_mask`."""
        if self.layout in (Layout.PADDED, Layout.SINGLE):
            return self._selected(self._forward(input_ids, **kwargs))
        reads = self._reads(input_ids)
        if len(input_ids) == 1:
            outputs = self._forward(input_ids, **{**kwargs, **self._alone(input_ids, reads)})
            return outputs if reads is not None else self._selected(outputs)
        mask = kwargs.pop("attention_mask").bool()
        packed = {
            name: value[mask][None] if isinstance(value, torch.Tensor) else value
            for name, value in kwargs.items()
        }
        packed["position_ids"] = self._positions(input_ids, mask)[mask][None]
        packed.update(self._boundaries(mask, reads))
        outputs = self._forward(input_ids[mask][None], **packed)
        hidden = outputs.last_hidden_state[0]
        if reads is not None:
            outputs.last_hidden_state = hidden.view(*reads.shape, -1)
            pool_again(self._module, outputs)
            return outputs
        unpacked = hidden.new_zeros(*mask.shape, hidden.shape[-1])
        unpacked[mask] = hidden
        outputs.last_hidden_state = unpacked
        pool_again(self._module, outputs)
        return self._selected(outputs)

    def _reads(self, input_ids: torch.Tensor) -> torch.Tensor | None:
        """The positions that the last layer computes, [n, m]; None if all."""
        if self._early is None or self.select is not None:
            return None if self._early is None else self.select
        return input_ids.new_zeros(len(input_ids), 1) if self.reads_first else None

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

    def _alone(self, input_ids: torch.Tensor, reads: torch.Tensor | None) -> dict[str, Any]:
        """What tells the backbone that the batch is one row, which nothing pads."""
        if self.layout is Layout.BLOCK:
            return {"attention_mask": None}
        length = input_ids.shape[1]
        cumulative = torch.tensor([0, length], dtype=torch.int32, device=input_ids.device)
        return {"attention_mask": None, "sequences": _sequences((length,), cumulative, reads)}

    def _boundaries(self, mask: torch.Tensor, reads: torch.Tensor | None) -> dict[str, Any]:
        if self.layout is Layout.BLOCK:
            owner = torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)[mask]
            dtype = self._module.dtype
            apart = (owner[:, None] != owner[None, :]).to(dtype) * torch.finfo(dtype).min
            return {"attention_mask": apart[None, None]}
        lengths = mask.sum(1)
        cumulative = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        return {"attention_mask": None, "sequences": _sequences(tuple(lengths.tolist()), cumulative, reads)}


def _sequences(lengths: tuple[int, ...], cumulative: torch.Tensor, reads: torch.Tensor | None) -> Sequences:
    """`reads`, [n, m], are positions within each sequence."""
    if reads is None:
        return Sequences(lengths, cumulative)
    tokens = (cumulative[:-1, None] + reads).flatten()
    return Sequences(lengths, cumulative, Reads(tokens, Sequences.equal(*reads.shape, device=reads.device)))


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
