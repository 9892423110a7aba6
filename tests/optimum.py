"""Decoders in Optimum's layout, as its exporter writes them: exported here, since it is not at hand."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from transformers import AutoModelForCausalLM, DynamicCache

from mlserver_hftasks.export.maker import quiet_exporters
from tests import tiny

LAYERS = 2


class WithPast(torch.nn.Module):
    """A model as a function of its cache."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, past: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        cache = DynamicCache()
        for layer in range(LAYERS):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        logits = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).logits
        return (logits, *(part for layer in cache.layers for part in (layer.keys, layer.values)))


def names(prefix: str) -> list[str]:
    return [f"{prefix}.{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value")]


@functools.cache
def folder(architecture: str) -> Path:
    """With `model.onnx`, in `onnx/`. It is shared: do not write to it."""
    source = tiny.folder(architecture, "causal")
    out = source.with_name(f"{source.name}-optimum")
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
    (out / "onnx").mkdir()
    model = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager").eval()
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = config.hidden_size // config.num_attention_heads
    past = [torch.randn(2, heads, 4, width) for _ in range(2 * LAYERS)]
    any_size = torch.export.Dim.AUTO
    two = {0: any_size, 1: any_size}
    with quiet_exporters():
        torch.onnx.export(
            WithPast(model),
            (torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 7, dtype=torch.int64),
             torch.arange(4, 7).expand(2, 3).clone(), past),
            out / "onnx" / "model.onnx",
            dynamo=True,
            external_data=False,
            input_names=["input_ids", "attention_mask", "position_ids", *names("past_key_values")],
            output_names=["logits", *names("present")],
            dynamic_shapes=(two, two, two, [{0: any_size, 2: any_size}] * len(past)),
        )  # fmt: skip
    return out


@functools.cache
def merged(architecture: str) -> Path:
    """With `decoder_model_merged.onnx`: one branch reads the cache, the other has none."""
    source = folder(architecture)
    out = source.with_name(f"{source.name}-merged")
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("onnx"))
    model = onnx.load(source / "onnx" / "model.onnx")
    graph, outer = model.graph, list(model.graph.input)
    branches = [_branch(graph, reads=True), _branch(graph, reads=False)]
    node = helper.make_node(
        "If", ["use_cache_branch"], [each.name for each in graph.output], then_branch=branches[0],
        else_branch=branches[1],
    )  # fmt: skip
    flag = helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1])
    weights = list(graph.initializer)
    whole = helper.make_graph([node], "merged", [*outer, flag], list(graph.output), weights)
    onnx.save(
        helper.make_model(whole, opset_imports=list(model.opset_import), ir_version=model.ir_version),
        out / "decoder_model_merged.onnx",
    )
    return out


def _branch(graph: onnx.GraphProto, *, reads: bool) -> onnx.GraphProto:
    """The graph without inputs: it sees those around it; where it does not read the cache, none of it."""
    ends = "past" if reads else "none"
    made: dict[str, str] = {}
    nodes = []
    if not reads:
        zero, axis = f"{ends}_zero", f"{ends}_axis"
        for name, value in ((zero, 0), (axis, 2)):
            constant = helper.make_tensor(name, TensorProto.INT64, [1], [value])
            nodes.append(helper.make_node("Constant", [], [name], value=constant))
        for name in names("past_key_values"):
            made[name] = f"{ends}_{name}"
            nodes.append(helper.make_node("Slice", [name, zero, zero, axis], [made[name]]))
    for node in graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.name = f"{ends}_{node.name}"
        copy.input[:] = [made.get(name, name) for name in node.input]
        made |= {name: f"{ends}_{name}" for name in node.output}
        copy.output[:] = [made[name] for name in node.output]
        nodes.append(copy)
    outputs = []
    for output in graph.output:
        value = onnx.ValueInfoProto()
        value.CopyFrom(output)
        value.name = made[output.name]
        outputs.append(value)
    return helper.make_graph(nodes, ends, [], outputs)
