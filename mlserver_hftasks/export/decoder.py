"""A decoder-only model to an ONNX program that steps through many sequences; run by `generation.program`.

The program takes the newest token of each sequence that decodes, and a piece of one prompt, end to end, so
that all layers read their weights once for both. Attention is ONNX Runtime's `GroupQueryAttention`, one node
for the sequences that decode and one for the piece. It reads and extends a cache that the caller owns: with
`past` and `present` bound to the same memory it copies nothing, and each sequence costs what it is long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.exporters import OnnxConfig, OnnxExporter

from mlserver_hftasks.errors import InvalidSettings
from mlserver_hftasks.export import graph
from mlserver_hftasks.export.maker import quiet_exporters, reason_of
from mlserver_hftasks.export.onnx import FILE
from mlserver_hftasks.export.packed import pack_weights
from mlserver_hftasks.generation import ports
from mlserver_hftasks.generation.slabs import CacheShape

ATTENTION_NAME = "hftasks_program_cache"
OPERATOR = "com.microsoft::GroupQueryAttention"
SAMPLE = {"decoding": 3, "piece": 5, "reads": 2, "capacity": 16}
"""Sizes of the inputs that are traced; none is 1, which would be taken for a constant."""


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
        self.extended.update(
            {ports.extended(name): tensor for name, tensor in zip(names, extended, strict=True)}
        )
        return output


def program_attention(
    module: Any,
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
    states = [tensor[0].transpose(0, 1).flatten(1) for tensor in (query, key, value)]
    return step.attend(module.layer_idx, states, attributes).view(1, -1, heads, width), None


AttentionInterface.register(ATTENTION_NAME, program_attention)


def cache_shape(model: PreTrainedModel) -> CacheShape:
    """Of a model's cache, as the model itself makes one. Raises TypeError if its layers are not alike."""
    with torch.inference_mode():
        made = model(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=True).past_key_values
    tensors = [tensor for layer in made.layers for tensor in (layer.keys, layer.values)]
    shapes = {(tensor.shape[1], tensor.shape[3]) for tensor in tensors}
    if len(shapes) != 1:
        raise TypeError(f"its layers keep keys and values of the sizes {sorted(shapes)}, expected one size")
    return CacheShape(len(made.layers), *shapes.pop())


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
    backbone, attention = model.base_model, model.config._attn_implementation
    if not model._supports_attention_backend or backbone is model:
        raise TypeError("its attention is not behind AttentionInterface")
    whole, body = model.forward, backbone.forward
    reads: list[torch.Tensor] = []

    def read_only(*args: Any, **kwargs: Any) -> Any:
        outputs = body(*args, **kwargs)
        outputs.last_hidden_state = outputs.last_hidden_state.index_select(1, reads[0])
        return outputs

    def forward(**inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        reads[:] = [inputs[ports.READS]]
        step = Step(inputs)
        ids, positions = _laid_out(inputs)
        outputs = whole(
            input_ids=ids[None], position_ids=positions[None], attention_mask=None, use_cache=False, step=step
        )
        return {ports.LOGITS: outputs.logits[0], **step.extended}

    model.set_attn_implementation(ATTENTION_NAME)
    backbone.forward, model.forward = read_only, forward
    try:
        yield model
    finally:
        del backbone.forward, model.forward
        model.set_attn_implementation(attention)


def _laid_out(inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of a step and their positions, [T] each."""
    piece = inputs[ports.PIECE_IDS]
    before = inputs[ports.PIECE_LAST].long() + 1 - piece.shape[0]
    positions = (inputs[ports.DECODE_LAST].long(), torch.arange(piece.shape[0]) + before)
    return torch.cat((inputs[ports.DECODE_IDS], piece)), torch.cat(positions)


def write_decoder(
    model: PreTrainedModel, folder: Path, quantization: str, tell: Callable[[str], None]
) -> str:
    """Write the program and its weights; the name of its file.

    Raises `InvalidSettings`, with the reason, for a model that cannot be exported.
    """
    tell("exporting to onnx, in steps")
    try:
        shape = cache_shape(model.eval().requires_grad_(False))
        with stepping(model) as traced, quiet_exporters():
            program = _traced(traced, shape)
    except Exception as error:  # whatever an exporter makes of an architecture it does not know
        raise InvalidSettings(
            f"{type(model).__name__} cannot be exported to onnx ({reason_of(error)}), expected a decoder "
            'whose attention is plain, or the backend "torch" @ parameters.extra.backend'
        ) from None
    if quantization != "none":
        tell(f"quantizing to {quantization}")
        QUANTIZERS[quantization](program)
    OnnxExporter.save_program(program, folder / FILE)
    return FILE


def _traced(model: PreTrainedModel, shape: CacheShape) -> Any:
    inputs = sample(shape)
    sizes = {
        name: {axis: torch.export.Dim.AUTO for axis in (0, 2)[: tensor.dim()] if tensor.shape[axis] > 1}
        for name, tensor in inputs.items()
    }
    config = OnnxConfig(dynamic=True, dynamic_shapes=sizes, ort_fusions="cpu")
    program, _ = OnnxExporter().export_program(model, inputs, config)
    graph.split_skip_norms(program)
    return program


def _in_int8(program: Any) -> None:
    graph.quantize_rows(program)
    _pack_head(program)


def _weights_in(bits: int, program: Any) -> None:
    head = _head(program)
    pack_weights(program, [node for node in program.graph if node not in head], bits)
    _pack_head(program)


def _pack_head(program: Any) -> None:
    """The output layer in 8 bits: it is read in every step, and in four would change too many tokens."""
    pack_weights(program, _head(program), 8)


def _head(program: Any) -> set[Any]:
    return graph.depends_on(program, frozenset({ports.READS}))


QUANTIZERS: dict[str, Callable[[Any], None]] = {
    "int8": _in_int8,
    "int8-weight-only": partial(_weights_in, 8),
    "int4-weight-only": partial(_weights_in, 4),
}
"""By the name of the setting."""
