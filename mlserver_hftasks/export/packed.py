"""Weights of products in 8 or 4 bits, unpacked while they are multiplied with: ONNX Runtime's `MatMulNBits`.

A weight matrix is cut into blocks along its inputs, each with a scale of its own, symmetric. A step of few
tokens takes as long as reading the weights, so a quarter or an eighth of them is what makes it faster.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mlserver_hftasks.export.graph import CONTRIB, Editor

BLOCK = 32
"""Inputs that share a scale."""
INT8_INPUTS = 4
"""The operator's `accuracy_level`: what flows in has 8 bits too, with a scale per token and block."""
KINDS = frozenset({"MatMul", "Gemm", "FusedMatMul"})


def pack_weights(model: ir.Model, nodes: Iterable[ir.Node], bits: int) -> int:
    """Let these products have weights of so many bits; how many are such products."""
    edit, made = Editor(model), 0
    for node in list(nodes):
        weight = weight_of(node)
        if weight is None:
            continue
        packed, scales = packed_blocks(weight, bits)
        name = f"{node.inputs[1].name}_int{bits}"
        product = edit.add(
            node,
            "MatMulNBits",
            node.inputs[0],
            edit.constant(name, packed),
            edit.constant(f"{name}_scales", scales),
            domain=CONTRIB,
            K=weight.shape[0],
            N=weight.shape[1],
            bits=bits,
            block_size=BLOCK,
            accuracy_level=INT8_INPUTS,
        )
        if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
            product = edit.add(node, "Add", product, node.inputs[2])
        edit.replace(node, product)
        made += 1
    RemoveUnusedNodesPass()(model)
    return made


def weight_of(node: ir.Node) -> npt.NDArray[np.float32] | None:
    """The weight [in, out] of a product with one, None for another node."""
    if node.op_type not in KINDS or node.inputs[1] is None or node.inputs[1].const_value is None:
        return None
    constant = node.inputs[1].const_value
    plain = all(node.attributes.get_float(name, 1.0) == 1.0 for name in ("alpha", "beta"))
    others = ("transA", "transBatchA", "transBatchB")
    if constant.dtype != ir.DataType.FLOAT or len(constant.shape) != 2 or not plain:
        return None
    if any(node.attributes.get_int(name, 0) for name in others):
        return None
    array: npt.NDArray[np.float32] = constant.numpy()
    return array.T if node.attributes.get_int("transB", 0) else array


def packed_blocks(
    weight: npt.NDArray[np.float32], bits: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """The weight [in, out] as the operator takes it: [out, blocks, bytes], and scales [out, blocks].

    A value is kept as its multiple of the scale above the middle of the range, two to a byte of 4 bits each.
    """
    middle = 1 << (bits - 1)
    inputs, outputs = weight.shape
    blocks = -(-inputs // BLOCK)
    padded = np.zeros((outputs, blocks * BLOCK), np.float32)
    padded[:, :inputs] = weight.T
    cut = padded.reshape(outputs, blocks, BLOCK)
    scales = np.maximum(np.abs(cut).max(-1), 1e-30) / (middle - 1)
    whole = (np.rint(cut / scales[:, :, None]) + middle).astype(np.uint8)
    if bits == 4:
        whole = whole[:, :, ::2] | (whole[:, :, 1::2] << 4)
    return whole, scales.astype(np.float32)
