"""Weights in 8 or 4 bits: the operator computes what the packed weights say, token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from mlserver_hftasks.export.packed import BLOCK, pack_weights, packed_blocks, weight_of

INPUTS, INNER, OUTPUTS = 80, 64, 40
DRAW = np.random.default_rng(3)
UP, DOWN, HEAD = (
    DRAW.normal(size=shape).astype(np.float32) for shape in ((INPUTS, INNER), (INNER, OUTPUTS), (96, OUTPUTS))
)
BIAS = DRAW.normal(size=OUTPUTS).astype(np.float32)
STATES = DRAW.normal(size=(5, INPUTS)).astype(np.float32)
KINDS = ["MatMul", "Gemm", "FusedMatMul"]


def model() -> ir.Model:
    """A product of each kind: plain, with a bias, and with a weight that lies as the embeddings do."""
    nodes = [
        helper.make_node("MatMul", ["states", "up"], ["a"]),
        helper.make_node("Gemm", ["a", "down", "bias"], ["b"]),
        helper.make_node("FusedMatMul", ["b", "head"], ["out"], domain="com.microsoft", transB=1),
    ]
    constants = {"up": UP, "down": DOWN, "bias": BIAS, "head": HEAD}
    made = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("states", TensorProto.FLOAT, ["T", INPUTS])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["T", len(HEAD)])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return ir.from_proto(helper.make_model(made, opset_imports=opsets, ir_version=9))


def run(program: ir.Model, states: Any = STATES) -> Any:
    session = onnxruntime.InferenceSession(
        ir.to_proto(program).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(["out"], {"states": states})[0]


def unpacked(weight: np.ndarray, bits: int) -> np.ndarray:
    """The weight [in, out] that the packed one stands for."""
    packed, scales = packed_blocks(weight, bits)
    whole = packed.astype(np.int64)
    if bits == 4:
        whole = np.stack((whole & 15, whole >> 4), -1).reshape(*whole.shape[:2], BLOCK)
    values = (whole - (1 << bits - 1)) * scales[:, :, None]
    return values.reshape(len(values), -1)[:, : len(weight)].T


@pytest.mark.parametrize(("bits", "most"), [(8, 0.02), (4, 0.25)])
def test_every_kind_of_product_is_packed_and_near(bits: int, most: float) -> None:
    program = model()
    assert [node.op_type for node in program.graph if weight_of(node) is not None] == KINDS
    assert pack_weights(program, list(program.graph), bits) == len(KINDS)
    assert [node.op_type for node in program.graph] == ["MatMulNBits", "MatMulNBits", "Add", "MatMulNBits"]
    exact = (STATES @ UP @ DOWN + BIAS) @ HEAD.T
    assert np.abs(run(program) - exact).max() < most * np.abs(exact).max()
    stood_for = ((STATES @ unpacked(UP, bits)) @ unpacked(DOWN, bits) + BIAS) @ unpacked(HEAD.T, bits)
    assert np.abs(run(program) - stood_for).max() < 0.03 * np.abs(exact).max()


@pytest.mark.parametrize("bits", [8, 4])
def test_a_token_does_not_hang_on_its_neighbours(bits: int) -> None:
    program = model()
    pack_weights(program, list(program.graph), bits)
    together, other = run(program), STATES.copy()
    other[1:] = 100 * DRAW.normal(size=other[1:].shape)
    np.testing.assert_allclose(run(program, other)[0], together[0], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(run(program, STATES[2:3])[0], together[2], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
def test_no_weight_is_further_away_than_half_a_step(bits: int) -> None:
    _, scales = packed_blocks(UP, bits)
    away = np.abs(unpacked(UP, bits) - UP)
    steps = np.repeat(scales, BLOCK, axis=1)[:, :INPUTS].T
    assert (away <= steps / 2 + 1e-6).all()
    assert packed_blocks(np.zeros((7, 3), np.float32), bits)[1].min() > 0, "zeros are not divided by zero"
