"""Where the head reads few tokens, the last layer computes no others.

A classifier reads the first token of each row. The last layer needs all tokens as keys and values; its
queries, and all that follows its attention (output projection, feed-forward network, normalisations), work
token by token, so they run on the tokens that are read: with 25 tokens a row that saves most of one layer.

Keys and values need not be there either. With few queries it costs less to bring each of them to the inputs
of the layer, once for each head, than to bring all inputs to the keys:

    q_h (W_k,h x_t + b_k,h) = (W_k,h^T q_h) x_t + q_h b_k,h

where the last term is the same for all t, so that the softmax does not see it; and as the weights sum up to
one, sum_t a_t (W_v,h x_t + b_v,h) = W_v,h (sum_t a_t x_t) + b_v,h.

What a layer looks like is listed in `STRUCTURES`. Whoever uses this compares it with the full layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mlserver_hftasks.backends.varlen import Reads, Sequences


@dataclass(frozen=True, slots=True)
class Structure:
    """Where a layer has its projections, and what it makes of what was attended to."""

    attention: str
    """The module with the projections, by its path in the layer."""
    query: str
    key: str
    value: str
    finish: Callable[[Any, Tensor, Tensor], Tensor]
    """Layer, context [1, m, width], residual [1, m, hidden] -> [1, m, hidden]."""

    def fits(self, layer: nn.Module) -> bool:
        """Whether the layer has these projections."""
        names = dict(layer.named_modules())
        return all(
            f"{self.attention}.{projection}" in names for projection in (self.query, self.key, self.value)
        )


def _bert(layer: Any, context: Tensor, residual: Tensor) -> Tensor:
    finished: Tensor = layer.feed_forward_chunk(layer.attention.output(context, residual))
    return finished


def _distilbert(layer: Any, context: Tensor, residual: Tensor) -> Tensor:
    attended = layer.sa_layer_norm(layer.attention.out_lin(context) + residual)
    finished: Tensor = layer.output_layer_norm(layer.ffn(attended) + attended)
    return finished


STRUCTURES = (
    Structure("attention.self", "query", "key", "value", _bert),
    Structure("attention", "q_lin", "k_lin", "v_lin", _distilbert),
)
"""BERT and its many kin (RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA, ERNIE, Data2Vec), and DistilBERT."""


class EarlyLayer:
    """Stands in for `forward` of a backbone's last layer, and gives the tokens that are read."""

    def __init__(self, layer: nn.Module, structure: Structure) -> None:
        self._layer = layer
        self._structure = structure
        self._forward = layer.forward
        layer.forward = self

    @classmethod
    def of(cls, backbone: nn.Module) -> EarlyLayer | None:
        """In the last layer of a backbone, or None if it has a structure that is not known here.

        Nor is it touched where somebody else stands in for it already: accelerate, between devices.
        """
        stacks = [module for module in backbone.modules() if isinstance(module, nn.ModuleList)]
        for structure in STRUCTURES:
            for stack in stacks:
                if len(stack) and structure.fits(stack[-1]) and "forward" not in vars(stack[-1]):
                    return cls(stack[-1], structure)
        return None

    def replace(self, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Run what `make` makes of this in its place."""
        self._layer.forward = make(self.__call__)

    def release(self) -> None:
        """Give the layer its own `forward` back."""
        del self._layer.forward

    def __call__(self, hidden_states: Tensor, *args: Any, sequences: Sequences, **kwargs: Any) -> Tensor:
        """[1, T, hidden] -> [1, n * m, hidden], or all tokens where no others are to be read."""
        reads = sequences.reads
        if reads is None:
            full: Tensor = self._forward(hidden_states, *args, sequences=sequences, **kwargs)
            return full
        residual = hidden_states.index_select(1, reads.tokens)
        attention: Any = self._layer.get_submodule(self._structure.attention)
        query, key, value = (
            getattr(attention, name)
            for name in (self._structure.query, self._structure.key, self._structure.value)
        )
        asked = _by_head(query(residual), attention)
        attend = _attend_inputs if _cheap(key, value, reads) else _attend
        context = attend(attention, asked, key, value, hidden_states, sequences, reads)
        return self._structure.finish(self._layer, context, residual)


def _by_head(states: Tensor, attention: Any) -> Tensor:
    """[1, T, heads * d] -> [1, heads, T, d]"""
    return states.view(*states.shape[:2], -1, attention.attention_head_size).transpose(1, 2)


def _interface(attention: Any) -> Callable[..., Any]:
    found: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
    return found


def _attend(
    attention: Any,
    asked: Tensor,
    key: nn.Module,
    value: nn.Module,
    hidden: Tensor,
    sequences: Sequences,
    reads: Reads,
) -> Tensor:
    """As the layer does it, with fewer queries: asked [1, heads, n * m, d] -> [1, n * m, heads * d]."""
    keys, values = (_by_head(projection(hidden), attention) for projection in (key, value))
    context, _ = _interface(attention)(
        attention,
        asked,
        keys,
        values,
        None,
        scaling=attention.scaling,
        sequences=sequences,
        queries=reads.sequences,
    )
    joined: Tensor = context.flatten(2)
    return joined


def _cheap(key: nn.Module, value: nn.Module, reads: Reads) -> bool:
    """Whether the weights are at hand, queries few, and the attention one that takes wide heads."""
    plain = type(key) is nn.Linear and type(value) is nn.Linear
    return plain and reads.sequences.lengths[0] == 1 and not reads.tokens.is_cuda


def _attend_inputs(
    attention: Any,
    asked: Tensor,
    key: Any,
    value: Any,
    hidden: Tensor,
    sequences: Sequences,
    reads: Reads,
) -> Tensor:
    """The same without keys and values; see the module docstring. All heads of a read ask side by side."""
    _, heads, count, d = asked.shape
    wide = torch.bmm(asked[0], key.weight.view(heads, d, -1))  # [heads, n * m, inputs]
    mixed, _ = _interface(attention)(
        attention,
        wide.transpose(0, 1).flatten(0, 1)[None, None],
        hidden[:, None],
        hidden[:, None],
        None,
        scaling=attention.scaling,
        sequences=sequences,
        queries=Sequences.equal(len(sequences.lengths), heads, device=hidden.device),
    )
    by_head = mixed.view(count, heads, -1).transpose(0, 1)
    context = torch.bmm(by_head, value.weight.view(heads, d, -1).transpose(1, 2))
    joined = context.transpose(0, 1).reshape(1, count, -1)
    return joined if value.bias is None else joined + value.bias
