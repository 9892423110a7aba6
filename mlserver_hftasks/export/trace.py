"""A model of transformers as the function that is exported; `backends.program` names its inputs and outputs.

In lanes (`backends.lanes`) the backbone runs over packed tokens `[1, T]`, its attention is `lane_attention`
below, and the head gets the hidden states of the tokens that it reads. Heads stay untouched, as in
`backends.packing`. All is made of gathers by index, so that no shape in the graph depends on data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from mlserver_hftasks.backends.base import Head
from mlserver_hftasks.backends.packing import pool_again
from mlserver_hftasks.backends.program import Feed, Layout
from mlserver_hftasks.engine.rows import FloatArray

ATTENTION_NAME = "hftasks_lanes"
APART = -1e9
"""Added to the score of a token of another row: softmax makes it 0, and it is finite in bfloat16."""


class Lanes:
    """Where tokens lie, for `lane_attention`; `fused` asks for one operator per attention."""

    def __init__(self, places: torch.Tensor, owners: torch.Tensor, tokens: torch.Tensor, fused: bool) -> None:
        self.places, self.tokens, self.fused = places, tokens, fused
        self._owners = owners
        self._masks: dict[tuple[bool, int | None, torch.dtype], torch.Tensor] = {}

    def mask(self, causal: bool, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """Additive, [lanes, 1, longest, longest]; made once for all layers alike."""
        key = (causal, window, dtype)
        if key not in self._masks:
            apart = self._owners[:, :, None] != self._owners[:, None, :]
            position = torch.arange(self._owners.shape[1], device=self._owners.device)
            distance = position[:, None] - position[None, :]
            if causal:
                apart = apart | (distance < 0)
            if window is not None:
                apart = apart | (distance.abs() > window)
            self._masks[key] = (apart.to(dtype) * APART)[:, None]
        return self._masks[key]


def lane_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    lanes: Lanes,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Attention within each row, as `packing.varlen_attention`: [1, heads, T, d] -> [1, T, heads, d]."""
    if attention_mask is not None or kwargs.get("position_bias") is not None or kwargs.get("softcap"):
        raise TypeError("attention in lanes takes no mask, position bias or softcap")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    window = None if sliding_window is None else sliding_window - 1
    heads, width = query.shape[1], query.shape[3]
    scale = width**-0.5 if scaling is None else scaling
    mask = lanes.mask(bool(causal), window, query.dtype)
    q, k, v = (_into_lanes(states, heads, lanes) for states in (query, key, value))
    if lanes.fused:
        seen = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    else:
        seen = torch.softmax((q * scale) @ k.transpose(-1, -2) + mask, -1) @ v
    out_of_lanes = seen.transpose(1, 2).reshape(-1, heads * width).index_select(0, lanes.tokens)
    return out_of_lanes.view(1, -1, heads, width), None


def _into_lanes(states: torch.Tensor, heads: int, lanes: Lanes) -> torch.Tensor:
    """[1, its heads, T, d] -> [lanes, heads, longest, d]; fewer heads of keys and values are repeated."""
    own, width = states.shape[1], states.shape[3]
    flat = states.transpose(1, 2).reshape(-1, own * width)
    spread = (
        flat.index_select(0, lanes.places.reshape(-1)).view(*lanes.places.shape, own, width).transpose(1, 2)
    )
    return spread if own == heads else spread.repeat_interleave(heads // own, dim=1)


AttentionInterface.register(ATTENTION_NAME, lane_attention)


@contextmanager
def traceable(
    model: PreTrainedModel, head: Head, layout: Layout, *, fused: bool
) -> Iterator[PreTrainedModel]:
    """The model, for a while with a `forward` from a program's inputs to the head's outputs."""
    backbone, attention = model.base_model, model.config._attn_implementation
    whole, body = model.forward, backbone.forward
    reads: list[torch.Tensor] = []
    packed: dict[str, Any] = {}

    def selected(outputs: Any, flat: bool) -> Any:
        if reads:
            hidden = outputs.last_hidden_state
            index = reads[0]
            if flat:
                hidden = hidden[0].index_select(0, index.reshape(-1)).view(*index.shape, -1)
            else:
                hidden = hidden.gather(1, index[:, :, None].expand(-1, -1, hidden.shape[-1]))
            outputs.last_hidden_state = hidden
            if flat:
                pool_again(backbone, outputs)
        return outputs

    def backbone_forward(input_ids: torch.Tensor, **kwargs: Any) -> Any:
        if layout is not Layout.LANES:
            return selected(body(input_ids, **kwargs), flat=False)
        return selected(body(**{**kwargs, **packed}), flat=True)

    if backbone is model:
        whole = backbone_forward

    def forward(**inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        reads[:] = [inputs.pop("reads")] if "reads" in inputs else []
        given = inputs if layout is not Layout.LANES else _unpack(inputs, packed, fused)
        outputs = whole(**given)
        return {name: outputs[name] for name in head.outputs}

    if layout is Layout.LANES:
        if not backbone._supports_attention_backend:
            raise TypeError("its attention is not behind AttentionInterface")
        backbone.set_attn_implementation(ATTENTION_NAME)
    try:
        backbone.forward, model.forward = backbone_forward, forward
        yield model
    finally:
        del backbone.forward
        if "forward" in vars(model):
            del model.forward
        backbone.set_attn_implementation(attention)


def _unpack(
    inputs: Mapping[str, torch.Tensor], packed: dict[str, Any], fused: bool
) -> dict[str, torch.Tensor]:
    """The backbone's inputs into `packed`; returns the head's."""
    packed.update(
        input_ids=inputs["packed_ids"][None],
        position_ids=inputs["packed_positions"][None],
        attention_mask=None,
        lanes=Lanes(inputs["places"], inputs["owners"], inputs["tokens"], fused),
    )
    if "packed_types" in inputs:
        packed["token_type_ids"] = inputs["packed_types"][None]
    return {"input_ids": inputs["head_ids"], "attention_mask": inputs["head_mask"]}


class EagerRunner:
    """The traceable model itself as a `program.Runner`: what its program is compared with."""

    def __init__(self, model: PreTrainedModel, head: Head, inputs: frozenset[str]) -> None:
        self._model = model
        self.inputs, self.outputs = inputs, frozenset(head.outputs)

    def run(self, feed: Feed) -> Mapping[str, FloatArray]:
        """See `program.Runner`."""
        with torch.inference_mode():
            outputs = self._model(**{name: torch.from_numpy(array) for name, array in feed.items()})
        return {name: tensor.float().numpy() for name, tensor in outputs.items()}

    def close(self) -> None:
        """See `program.Runner`."""
        del self._model
