"""What is done to an exported ONNX graph before it is saved, each step for a reason that was measured.

- `split_skip_norms`: ONNX Runtime's CPU kernel of `SkipLayerNormalization` adds and normalises in scalars;
  an addition and `LayerNormalization` give the same five times as fast.
- `quantize_rows`: int8 products with one scale per token. A row's answer then does not depend on the other
  rows of its batch, as it does where one scale serves the whole tensor (ONNX Runtime's own dynamic
  quantization), and is nearer to that of float32.

`static` has int8 with scales that were calibrated before.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

CONTRIB = "com.microsoft"
STEPS = 127
"""Largest magnitude of an int8 weight or activation: symmetric, since VNNI multiplies u8 by s8."""
ZERO_POINT = 128
FEWEST_COLUMNS = 32
"""Products with fewer columns, a classifier's, stay in float."""
TINY = 1e-30
"""Least scale: a row of zeros is not divided by zero."""
HEAD_INPUTS = frozenset({"reads", "head_ids", "head_mask"})
"""What depends on these belongs to the head, which stays in float."""


class Editor:
    """Adds nodes and constants to a graph; equal constants once."""

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        model.opset_imports[CONTRIB] = 1
        self._constants: dict[str, ir.Value] = {}

    def constant(self, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
        """An initializer of that name."""
        if name not in self._constants:
            value = ir.Value(name=name, const_value=ir.tensor(array))
            value.dtype, value.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
            self.graph.register_initializer(value)
            self._constants[name] = value
        return self._constants[name]

    def add(
        self, before: ir.Node, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: object
    ) -> ir.Value:
        """The output of a new node."""
        node = ir.node(kind, list(inputs), attributes=attributes, domain=domain)
        self.graph.insert_before(before, node)
        return node.outputs[0]

    def replace(self, node: ir.Node, value: ir.Value) -> None:
        """Let everything that reads the node's first output read `value`, and remove the node."""
        old = node.outputs[0]
        value.shape, value.type = old.shape, old.type
        if old.is_graph_output():
            value.name, old.name = old.name, f"{old.name}_before"
        old.replace_all_uses_with(value, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)


def split_skip_norms(model: ir.Model) -> None:
    """`SkipLayerNormalization` as additions and a normalisation."""
    edit = Editor(model)
    for node in [node for node in model.graph if node.op_type in _NORMS]:
        kind, weights = _NORMS[node.op_type]
        data, skip = node.inputs[:2]
        bias = node.inputs[2 + weights] if len(node.inputs) > 2 + weights else None
        total = data if bias is None else edit.add(node, "Add", data, bias)
        total = edit.add(node, "Add", total, skip)
        epsilon = node.attributes["epsilon"].value
        normed = edit.add(node, kind, total, *node.inputs[2 : 2 + weights], epsilon=epsilon, axis=-1)
        if len(node.outputs) > 3:
            node.outputs[3].replace_all_uses_with(total, replace_graph_outputs=True)
        edit.replace(node, normed)


_NORMS = {
    "SkipLayerNormalization": ("LayerNormalization", 2),
    "SkipSimplifiedLayerNormalization": ("SimplifiedLayerNormalization", 1),
}
"""What remains of each without the addition, and its number of weights."""


def products(model: ir.Model) -> list[ir.Node]:
    """The products with weights that quantization is for: those of the backbone."""
    head = depends_on(model, HEAD_INPUTS)
    return [node for node in model.graph if node not in head and _weight(node) is not None]


def quantize_rows(model: ir.Model) -> int:
    """Products in int8 with a scale per token; how many."""
    edit, made = Editor(model), {}
    step = edit.constant("hftasks_step", np.array(1 / STEPS, np.float32))
    zero = edit.constant("hftasks_zero", np.array(ZERO_POINT, np.uint8))
    last = edit.constant("hftasks_last_axis", np.array([-1], np.int64))
    tiny = edit.constant("hftasks_tiny", np.array(TINY, np.float32))
    nodes = products(model)
    for node in nodes:
        data = node.inputs[0]
        if data not in made:
            largest = edit.add(node, "ReduceMax", edit.add(node, "Abs", data), last, keepdims=1)
            largest = edit.add(node, "Max", largest, tiny)
            within = edit.add(node, "QuantizeLinear", edit.add(node, "Div", data, largest), step, zero)
            made[data] = within, largest
        within, largest = made[data]
        product = int8_product(edit, node, weight_of(node), within, step, zero)
        product = edit.add(node, "Mul", product, largest)
        edit.replace(node, with_bias(edit, node, product))
    RemoveUnusedNodesPass()(model)
    return len(nodes)


def int8_product(
    edit: Editor,
    node: ir.Node,
    weight: npt.NDArray[np.float32],
    data: ir.Value,
    step: ir.Value,
    zero: ir.Value,
    correction: npt.NDArray[np.float32] | None = None,
) -> ir.Value:
    """`data` in uint8 times the weight, which is stored in int8 with a scale per column; without the bias.

    `correction`, [columns], is added.
    """
    steps = (np.maximum(np.abs(weight).max(0), TINY) / STEPS).astype(np.float32)
    whole = np.rint(weight / steps).astype(np.int8)
    name = node.inputs[1].name
    quantized = edit.constant(f"{name}_int8", whole), edit.constant(f"{name}_steps", steps)
    inputs: list[ir.Value | None] = [data, quantized[0], step, quantized[1], zero]
    if correction is not None:
        inputs += [None, edit.constant(f"{name}_correction", correction)]
    return edit.add(node, "MatMulIntegerToFloat", *inputs, domain=CONTRIB)


def with_bias(edit: Editor, node: ir.Node, product: ir.Value) -> ir.Value:
    """The product and the bias that a `Gemm` has."""
    if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
        return edit.add(node, "Add", product, node.inputs[2])
    return product


def weight_of(node: ir.Node) -> npt.NDArray[np.float32]:
    """The weight [in, out] of one of `products`."""
    weight = _weight(node)
    assert weight is not None
    return weight


def _weight(node: ir.Node) -> npt.NDArray[np.float32] | None:
    """The weight [in, out] of a product, None for other nodes and for what stays in float."""
    if node.op_type not in {"MatMul", "Gemm"} or node.inputs[1] is None:
        return None
    constant = node.inputs[1].const_value
    if constant is None or len(constant.shape) != 2 or constant.dtype != ir.DataType.FLOAT:
        return None
    turned = bool(node.attributes.get_int("transB", 0))
    if node.attributes.get_int("transA", 0) or {
        node.attributes.get_float(x, 1.0) for x in ("alpha", "beta")
    } != {1.0}:
        return None
    weight: npt.NDArray[np.float32] = constant.numpy().T if turned else constant.numpy()
    return weight if weight.shape[1] >= FEWEST_COLUMNS else None


def depends_on(model: ir.Model, names: frozenset[str]) -> set[ir.Node]:
    """The nodes that any of these inputs has a part in."""
    reached = [value for value in model.graph.inputs if value.name in names]
    nodes: set[ir.Node] = set()
    while reached:
        for node, _ in reached.pop().uses():
            if node not in nodes:
                nodes.add(node)
                reached += node.outputs
    return nodes
