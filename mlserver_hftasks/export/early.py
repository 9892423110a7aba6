"""Where the head reads few tokens, the last layer computes no others.

A classifier reads the first token of each row. All that follows the last attention (its output projection,
the feed-forward network, the normalisations) works token by token, so it can run on the tokens that are read
instead of all: with 25 tokens a row most of the last layer is saved, a tenth of a model of six.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mlserver_hftasks.export.graph import Editor, depends_on

TOKENWISE = frozenset(
    {
        *("Abs", "Add", "Cast", "Div", "Max", "Mul", "QuantizeLinear", "ReduceMax", "Sub"),
        *("BiasGelu", "Erf", "FastGelu", "Gelu", "QuickGelu", "Relu", "Sigmoid", "Tanh"),
        *("LayerNormalization", "SimplifiedLayerNormalization", "MatMul", "MatMulIntegerToFloat"),
    }
)
"""Operators that give each token of [1, T, ...] what it would get alone."""


def read_early(model: ir.Model) -> int:
    """Move the gather of what `reads` names up the graph; over how many nodes, 0 if it ends otherwise."""
    found = _last_gathers(model)
    if found is None:
        return 0
    squeeze, gather = found
    region = _region(model, squeeze)
    if not region:
        return 0
    edit = Editor(model)
    index = gather.inputs[1]
    moved: dict[ir.Value, ir.Value] = {}
    for node in [node for node in model.graph if node in region]:
        inputs = [_early(edit, value, index, moved, gather) for value in node.inputs]
        copy = ir.node(node.op_type, inputs, attributes=dict(node.attributes), domain=node.domain)
        model.graph.insert_before(gather, copy)
        moved[node.outputs[0]] = copy.outputs[0]
    read = edit.add(gather, "Gather", moved[squeeze.inputs[0]], squeeze.inputs[1], axis=0)
    edit.replace(gather, read)
    RemoveUnusedNodesPass()(model)
    return len(region)


def _last_gathers(model: ir.Model) -> tuple[ir.Node, ir.Node] | None:
    """`hidden[0]` and `[...][reads]`, by which a model in lanes ends."""
    on_reads = depends_on(model, frozenset({"reads"}))
    for node in model.graph:
        if node.op_type == "Gather" and node in on_reads and node.attributes.get_int("axis", 0) == 0:
            squeeze = node.inputs[0].producer()
            if (
                squeeze is not None
                and squeeze.op_type == "Gather"
                and squeeze.attributes.get_int("axis", 0) == 0
            ):
                once = len(squeeze.outputs[0].uses()) == 1
                return (squeeze, node) if once and squeeze not in on_reads else None
    return None


def _region(model: ir.Model, seed: ir.Node) -> set[ir.Node]:
    """The nodes between the last attention and `seed` whose results only `seed` needs."""
    region = {seed}
    for node in reversed(list(model.graph)):
        users = [user for output in node.outputs for user, _ in output.uses()]
        only_ours = bool(users) and all(user in region for user in users)
        if only_ours and node.op_type in TOKENWISE and len(node.outputs) == 1 and _by_token(node):
            region.add(node)
    return region - {seed} if seed.inputs[0].producer() in region else set()


def _by_token(node: ir.Node) -> bool:
    """Whether a product's right side is a weight; other operators of the list always work by token."""
    return not node.op_type.startswith("MatMul") or node.inputs[1].const_value is not None


def _early(
    edit: Editor,
    value: ir.Value | None,
    index: ir.Value,
    moved: dict[ir.Value, ir.Value],
    before: ir.Node,
) -> ir.Value | None:
    if value is None or value.const_value is not None or value in moved:
        return moved.get(value, value)
    moved[value] = edit.add(before, "Gather", value, index, axis=1)
    return moved[value]
