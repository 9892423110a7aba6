"""Decoder-only models of transformers, one step for many sequences: no padding, no copies of the cache.

The tokens that a step feeds lie end to end, `[1, T]`, whatever sequence they are of. The model's attention
calls `cached_attention` below (through `transformers.AttentionInterface`), which puts their keys and values
into a cache that was allocated once, and attends from each token to its own sequence's part of it.

A sequence's part is contiguous (see `engine.extents`), so nothing is gathered: on a CPU each sequence's
attention reads a view; on CUDA one FlashAttention kernel takes all of them, with the starts of the parts
as boundaries and how much of each is in use.

The idea of mixing prompts and single tokens in a step is that of Orca
(https://www.usenix.org/conference/osdi22/presentation/yu), of prompts in pieces that of Sarathi
(https://arxiv.org/abs/2308.16369).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from mlserver_hftasks.backends.base import Description
from mlserver_hftasks.backends.placed import moved
from mlserver_hftasks.backends.varlen import fused_kernel_takes
from mlserver_hftasks.engine.sequences import Choice, Chunk
from mlserver_hftasks.generation.sampling import choose

ATTENTION_NAME = "hftasks_cached"


@dataclass(frozen=True, slots=True)
class Span:
    """The part of a step that is one sequence's, and the part of the cache that it sees."""

    first: int
    """Where its tokens begin in the step."""
    count: int
    extent: int
    length: int
    """Tokens in the cache after the step: those before, and its own."""


class StepCache:
    """Keys and values of `tokens` tokens, and how the running step lies in them.

    Layers get their memory when they first write, [tokens, kv_heads, head_dim] each for keys and values.
    """

    def __init__(self, tokens: int, device: torch.device) -> None:
        self.tokens = tokens
        self._device = device
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._masks: dict[tuple[int, int, int | None], torch.Tensor] = {}
        self.spans: tuple[Span, ...] = ()
        self.slots = torch.empty(0, dtype=torch.int64)

    def begin(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Lay out a step; returns the positions of its tokens, [T]."""
        spans, positions, slots, first = [], [], [], 0
        for chunk in chunks:
            position = np.arange(chunk.position, chunk.position + chunk.count)
            positions.append(position)
            slots.append(position + chunk.extent)
            spans.append(Span(first, chunk.count, chunk.extent, chunk.position + chunk.count))
            first += chunk.count
        self.spans = tuple(spans)
        self.slots = torch.from_numpy(np.concatenate(slots)).to(self._device)
        self._masks.clear()
        self.__dict__.pop("boundaries", None)
        return torch.from_numpy(np.concatenate(positions)).to(self._device)

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put the step's keys and values, [T, kv_heads, d] each, into the layer's cache and return that."""
        held = self._layers.get(layer)
        if held is None:
            held = (self._memory(key), self._memory(value))
            self._layers[layer] = held
        held[0].index_copy_(0, self.slots, key)
        held[1].index_copy_(0, self.slots, value)
        return held

    def release(self) -> None:
        """Give the memory back."""
        self._layers.clear()

    def mask(self, count: int, length: int, window: int | None) -> torch.Tensor:
        """[count, length], true where one of the last `count` tokens of `length` sees another."""
        found = self._masks.get((count, length, window))
        if found is None:
            own = torch.arange(length - count, length, device=self._device)[:, None]
            distance = own - torch.arange(length, device=self._device)[None, :]
            found = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            self._masks[count, length, window] = found
        return found

    @cached_property
    def boundaries(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int]:
        """For the fused kernel: cumulative queries, starts of the parts of the cache and what is used of
        each, longest query, longest part. All int32; the spans are in the order of their extents."""
        queries = np.cumsum([0, *(span.count for span in self.spans)])
        starts = [*(span.extent for span in self.spans), self.tokens]
        used = [span.length for span in self.spans]
        tensors = (torch.tensor(list(map(int, each)), dtype=torch.int32) for each in (queries, starts, used))
        cumulative, starts_, used_ = (tensor.to(self._device) for tensor in tensors)
        return cumulative, starts_, used_, max(span.count for span in self.spans), max(used)

    def _memory(self, like: torch.Tensor) -> torch.Tensor:
        # On a CPU memory that was never written takes no room, and what was not written is never read.
        make = like.new_empty if like.device.type == "cpu" else like.new_zeros
        return make(self.tokens, *like.shape[1:])


def cached_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    step_cache: StepCache,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Attention of a step's tokens, query [1, heads, T, d], to their sequences so far -> [1, T, heads, d].

    `step_cache` has no default: a model that does not hand it on fails loudly. Raises TypeError for what
    it does not compute.
    """
    if attention_mask is not None or kwargs.get("position_bias") is not None or kwargs.get("softcap"):
        raise TypeError("cached attention takes no mask, position bias or softcap")
    if kwargs.get("s_aux") is not None or getattr(module, "is_cross_attention", False):
        raise TypeError("cached attention takes no sinks and attends to no other text")
    keys, values = step_cache.write(module.layer_idx, key[0].transpose(0, 1), value[0].transpose(0, 1))
    attend = _attend_fused if fused_kernel_takes(query) else _attend_each
    return attend(query, keys, values, step_cache, scaling, sliding_window), None


AttentionInterface.register(ATTENTION_NAME, cached_attention)


def _attend_fused(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    cache: StepCache,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """One FlashAttention kernel over all sequences."""
    from torch.nn.attention.varlen import varlen_attn

    cumulative, starts, used, longest_query, longest = cache.boundaries
    output = varlen_attn(
        query[0].transpose(0, 1).contiguous(),
        keys,
        values,
        cu_seq_q=cumulative,
        cu_seq_k=starts,
        max_q=longest_query,
        max_k=longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != keys.shape[1],
        seqused_k=used,
    )
    assert isinstance(output, torch.Tensor)
    return output[None]


def _attend_each(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    cache: StepCache,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Scaled dot product attention per sequence, over views of the cache."""
    grouped = query.shape[1] != keys.shape[1]
    pieces = []
    for span in cache.spans:
        seen = slice(span.extent, span.extent + span.length)
        whole = span.count == span.length and (window is None or span.length <= window)
        alone = span.count == 1 and (window is None or span.length <= window)
        pieces.append(
            scaled_dot_product_attention(
                query.narrow(2, span.first, span.count),
                keys[seen].transpose(0, 1)[None],
                values[seen].transpose(0, 1)[None],
                attn_mask=None if whole or alone else cache.mask(span.count, span.length, window),
                is_causal=whole and not alone,
                scale=scaling,
                enable_gqa=grouped,
            )
        )
    return torch.cat(pieces, dim=2).transpose(1, 2)


def _turn_head(model: PreTrainedModel) -> None:
    """Let the weight of the output layer lie in memory as [hidden, vocabulary], its shape unchanged.

    In float32 on a CPU its products take 15 to 40 % less time so, most with few tokens (512 x 32,000 and
    2,048 x 32,000 measured); in bfloat16 they take longer. Tied embeddings stay tied.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        return
    if head.weight.device.type == "cpu" and head.weight.dtype is torch.float32:
        head.weight.data = head.weight.data.t().contiguous().t()


class TorchDecoder:
    """Steps through a decoder-only model of transformers; see `engine.sequences.Stepper`.

    `model` is this class's own: its attention changes. `precision` is what it computes in, where that is
    not the dtype of its weights. Raises TypeError if that is not behind
    `AttentionInterface`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        device: torch.device,
        cache_tokens: int,
        precision: str | None = None,
    ) -> None:
        if not model._supports_attention_backend:
            raise TypeError("its attention is not behind AttentionInterface")
        model.set_attn_implementation(ATTENTION_NAME)
        self._model = moved(model.eval().requires_grad_(False), device)
        self.cache_tokens = cache_tokens
        self._device = device
        self._cache = StepCache(cache_tokens, device)
        _turn_head(self._model)
        dtype = precision or str(model.dtype).removeprefix("torch.")
        self.description = Description("torch", str(device), dtype, "continuous")

    def step(self, chunks: Sequence[Chunk]) -> Sequence[Choice | None]:
        """See `engine.sequences.Stepper`."""
        order = sorted(range(len(chunks)), key=lambda index: chunks[index].extent)
        ordered = [chunks[index] for index in order]
        choosing = [chunk.sequence for chunk in ordered if chunk.chooses]
        with torch.inference_mode():
            logits = self.logits(ordered)
            chosen = iter(choose(logits, choosing)) if choosing else iter(())
        results: list[Choice | None] = [None] * len(chunks)
        for index, chunk in zip(order, ordered, strict=True):
            if chunk.chooses:
                results[index] = next(chosen)
        return results

    def close(self) -> None:
        """Give the memory back; `step` must not be called again."""
        self._cache.release()
        del self._model
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def logits(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Logits after each of the chunks that choose, [n, vocabulary], as float32.

        The chunks must be in the order of their extents.
        """
        tokens = np.concatenate([chunk.tokens for chunk in chunks])
        ends = np.cumsum([chunk.count for chunk in chunks]) - 1
        wanted = [int(end) for end, chunk in zip(ends, chunks, strict=True) if chunk.chooses] or [0]
        positions = self._cache.begin(chunks)
        with torch.inference_mode():
            output = self._model(
                input_ids=torch.from_numpy(tokens).to(self._device)[None],
                position_ids=positions[None],
                attention_mask=None,
                use_cache=False,
                logits_to_keep=torch.tensor(wanted, device=self._device),
                step_cache=self._cache,
            )
        logits: torch.Tensor = output.logits[0]
        return logits.float()
