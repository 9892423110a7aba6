"""The steps on exported graphs: they change how a graph computes, and not, or hardly, what."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from mlserver_hftasks.export import graph, static
from mlserver_hftasks.export.early import read_early

HIDDEN, INNER, LABELS = 16, 48, 3
DRAW = np.random.default_rng(7)
WEIGHTS = {
    "up": DRAW.normal(size=(HIDDEN, INNER)),
    "down": DRAW.normal(size=(INNER, HIDDEN * 2)),
    "narrow": DRAW.normal(size=(HIDDEN * 2, HIDDEN)),
    "head": DRAW.normal(size=(HIDDEN, LABELS)),
    "bias": DRAW.normal(size=INNER),
    "gamma": DRAW.normal(size=HIDDEN),
    "beta": DRAW.normal(size=HIDDEN),
}
STATES = DRAW.normal(size=(1, 7, HIDDEN)).astype(np.float32)
READS = np.array([[0], [4]])


def model() -> ir.Model:
    """The end of a model in lanes: a feed-forward network, its normalisation, what is read, a head."""
    nodes = [
        helper.make_node("MatMul", ["states", "up"], ["a"]),
        helper.make_node("Add", ["a", "bias"], ["b"]),
        helper.make_node("Tanh", ["b"], ["c"]),
        helper.make_node("MatMul", ["c", "down"], ["d"]),
        helper.make_node("MatMul", ["d", "narrow"], ["e"]),
        helper.make_node(
            "SkipLayerNormalization",
            ["e", "states", "gamma", "beta"],
            ["f"],
            domain="com.microsoft",
            epsilon=1e-5,
        ),
        helper.make_node("Gather", ["f", "zero"], ["g"], axis=0),
        helper.make_node("Reshape", ["reads", "all"], ["h"]),
        helper.make_node("Gather", ["g", "h"], ["i"], axis=0),
        helper.make_node("MatMul", ["i", "head"], ["logits"]),
    ]
    constants = {name: array.astype(np.float32) for name, array in WEIGHTS.items()}
    constants |= {"zero": np.array(0), "all": np.array([-1])}
    made = helper.make_graph(
        nodes,
        "tail",
        [
            helper.make_tensor_value_info("states", TensorProto.FLOAT, [1, "T", HIDDEN]),
            helper.make_tensor_value_info("reads", TensorProto.INT64, ["n", 1]),
        ],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", LABELS])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return ir.from_proto(helper.make_model(made, opset_imports=opsets, ir_version=9))


def run(program: ir.Model, states: Any = STATES, reads: Any = READS) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    serialized = ir.to_proto(program).SerializeToString()
    session = onnxruntime.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"states": states, "reads": reads})[0]


def kinds(program: ir.Model) -> list[str]:
    return [node.op_type for node in program.graph]


WANTED = run(model())


def test_an_addition_and_a_normalisation_are_the_same() -> None:
    program = model()
    graph.split_skip_norms(program)
    assert "SkipLayerNormalization" not in kinds(program) and "LayerNormalization" in kinds(program)
    np.testing.assert_allclose(run(program), WANTED, atol=1e-5)


def test_the_backbone_is_quantized_and_the_head_is_not() -> None:
    program = model()
    assert [node.inputs[1].name for node in graph.products(program)] == ["up", "down"], (
        "narrow has too few columns"
    )
    assert graph.quantize_rows(program) == 2
    assert kinds(program).count("MatMulIntegerToFloat") == 2 and kinds(program).count("MatMul") == 2
    assert not {"up", "down"} & set(program.graph.initializers), "the weights in float are gone"
    difference = np.abs(run(program) - WANTED).max()
    assert 0 < difference < 0.1 * np.abs(WANTED).max()


def test_a_loud_neighbour_changes_nothing() -> None:
    program = model()
    graph.quantize_rows(program)
    loud = np.concatenate([STATES, 1000 * STATES], axis=1)
    assert (run(program, loud) == run(program)).all()


def test_a_row_of_zeros_stays_finite() -> None:
    program = model()
    graph.quantize_rows(program)
    assert np.isfinite(run(program, np.zeros_like(STATES))).all()


def seen(name: str, states: Any) -> static.Observed:
    """What calibration on some states sees of the input of a product."""
    made = static.Observed.nothing()
    made.add(states[0] if name == "states" else np.tanh(states[0] @ WEIGHTS["up"] + WEIGHTS["bias"]))
    return made


def calibrated(states: Any) -> tuple[ir.Model, int]:
    program = model()
    return program, static.quantize(program, {name: seen(name, states) for name in ("states", "c")})


def test_calibrated_scales() -> None:
    program, count = calibrated(STATES)
    assert count == 2 and kinds(program).count("MatMulIntegerToFloat") == 2
    assert "ReduceMax" not in kinds(program)
    difference = np.abs(run(program) - WANTED).max()
    assert 0 < difference < 0.1 * np.abs(WANTED).max()


def test_a_loud_column_does_not_cost_the_others_their_digits() -> None:
    """One scale for all of it would leave three levels to the other columns."""
    loud = STATES.copy()
    loud[..., 3] *= 40
    program, count = calibrated(loud)
    wanted = run(model(), loud)
    assert count == 2
    assert np.abs(run(program, loud) - wanted).max() < 0.1 * np.abs(wanted).max()


def test_a_product_that_no_calibrated_scale_fits_gets_scales_per_token() -> None:
    """Tokens of very different size in all columns alike."""
    uneven = STATES * np.array([1, 1, 1, 300, 1, 1, 1], np.float32)[:, None]
    program, count = calibrated(uneven)
    assert count == 1 and kinds(program).count("ReduceMax") == 1
    assert kinds(program).count("MatMulIntegerToFloat") == 2


@pytest.mark.parametrize(("low", "high"), [(0.0, 3.0), (-2.0, 0.0), (-0.2, 9.0), (0.0, 0.0)])
def test_the_codes_of_a_range(low: float, high: float) -> None:
    """Both ends have codes, and zero one that stands for it exactly."""
    weight = np.ones((1, 1), np.float32)
    of_column = (np.array([each], np.float32) for each in (low, high))
    scale = static.Scale.of(static.Observed(*of_column), weight, 1.0)
    assert 0 <= scale.zero <= static.LEVELS
    for end in (low, high):
        code = round(end / float(scale.factors[0]) / scale.step) + scale.zero
        assert 0 <= code <= static.LEVELS
        assert (code - scale.zero) * scale.step * float(scale.factors[0]) == pytest.approx(
            end, abs=high / 250
        )


@pytest.mark.parametrize("quantized", [False, True])
def test_only_what_is_read_is_computed(quantized: bool) -> None:
    program = model()
    graph.split_skip_norms(program)
    if quantized:
        graph.quantize_rows(program)
    before = run(program)
    assert read_early(program) >= 6
    onnx.checker.check_model(ir.to_proto(program)) if not quantized else None
    first = next(node for node in program.graph if "states" in [value.name for value in node.inputs if value])
    assert first.op_type == "Gather", "before anything else"
    np.testing.assert_allclose(run(program), before, atol=1e-6)
    np.testing.assert_allclose(
        run(program, reads=np.array([[6]])), run(model(), reads=np.array([[6]])), atol=0.5
    )


def test_a_graph_that_ends_otherwise_is_left_alone() -> None:
    program = model()
    program.graph.inputs[1].name = "others"
    assert read_early(program) == 0
