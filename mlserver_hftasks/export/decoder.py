"""A decoder-only model to an ONNX program that steps through many sequences; run by `generation.program`.

The program takes the newest token of each sequence that decodes, and a piece of one prompt, end to end, so
that all layers read their weights once for both. Attention is ONNX Runtime's `GroupQueryAttention`, one node
for the sequences that decode and one for the piece. It reads and extends a cache that the caller owns: with
`past` and `present` bound to the same memory it copies nothing, and each sequence costs what it is long.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel

from mlserver_hftasks.generation import ports

ATTENTION_NAME = "hftasks_program_cache"
OPERATOR = "com.microsoft::GroupQueryAttention"
SAMPLE = {"decoding": 3, "piece": 5, "reads": 2, "capacity": 16}
"""Sizes of the inputs that are traced; none is 1, which would be taken for a constant."""


@dataclass(frozen=True, slots=True)
class CacheShape:
    """Of the keys, and of the values, of one token."""

    layers: int
    heads: int
    width: int


class Step:
    """Where the tokens of a traced step are, for `program_attention`; collects the caches that it extends."""

    def __init__(self, inputs: Mapping[str, torch.Tensor]) -> None:
        self._inputs = inputs
        self.decoding = inputs[ports.DECODE_IDS].shape[0]
        self.extended: dict[str, torch.Tensor] = {}

    def attend(
        self, layer: int, states: Sequence[torch.Tensor], attributes: Mapping[str, int | float]
    ) -> torch.Tensor:
        """Query, key and value of a step, [T, its heads * d] each -> [T, heads * d]."""
        ones = [tensor[: self.decoding, None] for tensor in states]
        piece = [tensor[None, self.decoding :] for tensor in states]
        decoded = self._operator(layer, ones, ports.DECODE_LAST, ports.DECODING, attributes)
        read = self._operator(layer, piece, ports.PIECE_LAST, ports.PIECE, attributes)
        return torch.cat((decoded[:, 0], read[0]))

    def _operator(
        self,
        layer: int,
        states: Sequence[torch.Tensor],
        last: str,
        rows: str,
        attributes: Mapping[str, int | float],
    ) -> torch.Tensor:
        names = ports.cache_names(rows, layer)
        caches = [self._inputs[name] for name in names]
        lengths = self._inputs[last]
        output, *extended = torch.onnx.ops.symbolic_multi_out(
            OPERATOR,
            [*states, *caches, lengths, lengths.max() + 1],
            dict(attributes),
            dtypes=[states[0].dtype] * 3,
            shapes=[list(states[0].shape), *(list(cache.shape) for cache in caches)],
            version=1,
        )
        self.extended.update({ports.extended(name): tensor for name, tensor in zip(names, extended, strict=True)})
        return output


def program_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    step: Step,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Attention of a step's tokens, query [1, heads, T, d], to their sequences so far -> [1, T, heads, d].

    Raises TypeError for what the operator does not compute.
    """
    if attention_mask is not None or kwargs.get("position_bias") is not None:
        raise TypeError("attention over a program's cache takes no mask and no position bias")
    if kwargs.get("s_aux") is not None or getattr(module, "is_cross_attention", False):
        raise TypeError("attention over a program's cache takes no sinks and attends to no other text")
    heads, width = query.shape[1], query.shape[3]
    attributes: dict[str, int | float] = {
        "num_heads": heads,
        "kv_num_heads": key.shape[1],
        "scale": float(width**-0.5 if scaling is None else scaling),
    }
    if sliding_window is not None:
        attributes["local_window_size"] = sliding_window
    if softcap:
        attributes["softcap"] = float(softcap)
    layer: int = module.layer_idx  # type: ignore[assignment]
    states = [tensor[0].transpose(0, 1).flatten(1) for tensor in (query, key, value)]
    return step.attend(layer, states, attributes).view(1, -1, heads, width), None


AttentionInterface.register(ATTENTION_NAME, program_attention)


def cache_shape(model: PreTrainedModel) -> CacheShape:
    """Of a model's cache."""
    text: Any = model.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return CacheShape(int(text.num_hidden_layers), int(heads), int(width))


def sample(shape: CacheShape) -> dict[str, torch.Tensor]:
    """Inputs of a program with that cache."""
    decoding, piece, capacity = SAMPLE["decoding"], SAMPLE["piece"], SAMPLE["capacity"]
    made = {
        ports.DECODE_IDS: torch.arange(decoding),
        ports.DECODE_LAST: torch.arange(decoding, dtype=torch.int32),
        ports.PIECE_IDS: torch.arange(piece),
        ports.PIECE_LAST: torch.tensor([piece - 1], dtype=torch.int32),
        ports.READS: torch.arange(SAMPLE["reads"]),
    }
    for rows, count in ((ports.DECODING, decoding), (ports.PIECE, 1)):
        for layer in range(shape.layers):
            for name in ports.cache_names(rows, layer):
                made[name] = torch.zeros(count, shape.heads, capacity, shape.width)
    return made


@contextmanager
def stepping(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The model, for a while with a `forward` from a program's inputs to its outputs."""
    if not model._supports_attention_backend:
        raise TypeError("its attention is not behind AttentionInterface")
    whole, attention = model.forward, model.config._attn_implementation

    def forward(**inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        step = Step(inputs)
        piece, last = inputs[ports.PIECE_IDS], inputs[ports.PIECE_LAST].long()
        before = last + 1 - piece.shape[0]
        positions = (inputs[ports.DECODE_LAST].long(), torch.arange(piece.shape[0]) + before)
        outputs = whole(
            input_ids=torch.cat((inputs[ports.DECODE_IDS], piece))[None],
            position_ids=torch.cat(positions)[None],
            attention_mask=None,
            use_cache=False,
            logits_to_keep=inputs[ports.READS],
            step=step,
        )
        return {ports.LOGITS: outputs.logits[0], **step.extended}

    model.set_attn_implementation(ATTENTION_NAME)
    model.forward = forward  # type: ignore[method-assign]
    try:
        yield model
    finally:
        del model.forward
        model.set_attn_implementation(attention)
