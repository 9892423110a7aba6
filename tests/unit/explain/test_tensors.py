"""Explanations as tensors: what the table of outputs promises, whatever the batch."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlserver_hftasks.explain.options import ExplainOptions
from mlserver_hftasks.explain.record import json_of
from mlserver_hftasks.explain.result import Explanation
from mlserver_hftasks.explain.tensors import OUTPUTS, count_numbers, default_names, tensors_of
from tests.explanations import explanation

NAMES = [spec.name for spec in OUTPUTS]
DTYPES = {"BYTES": np.object_, "FP32": np.float32, "INT64": np.int64, "BOOL": np.bool_}
explanations = st.builds(
    explanation,
    texts=st.lists(st.text(max_size=20), min_size=1, max_size=2).map(tuple),
    labels=st.lists(st.text(min_size=1, max_size=5), max_size=3).map(tuple),
    seed=st.integers(0, 99),
)


@given(st.lists(explanations, min_size=1, max_size=4))
def test_every_output_is_as_the_table_says(batch: list[Explanation]) -> None:
    made = tensors_of(NAMES, batch, ExplainOptions())
    assert list(made) == NAMES
    for spec in OUTPUTS:
        tensor = made[spec.name]
        assert tensor.datatype == spec.datatype
        assert tensor.values.dtype == DTYPES[spec.datatype]
        assert tensor.values.ndim == len(spec.shape)
        assert len(tensor.values) == len(batch)
        for size, said in zip(tensor.values.shape, spec.shape, strict=True):
            assert said in (-1, size)
        if spec.datatype == "FP32":
            assert np.isfinite(tensor.values).all()


@given(st.lists(explanations, min_size=1, max_size=4), st.sets(st.sampled_from(NAMES)))
def test_numbers_are_counted_before_they_are_made(batch: list[Explanation], names: set[str]) -> None:
    made = tensors_of(list(names - {"explanation", "html"}), batch, ExplainOptions())
    as_json = sum(one.attributions.size for one in batch) * len(names & {"explanation", "html"})
    assert count_numbers(list(names), batch) == sum(each.values.size for each in made.values()) + as_json


@given(st.lists(explanations, min_size=1, max_size=4))
def test_what_was_filled_up_is_told_by_the_counts(batch: list[Explanation]) -> None:
    made = {name: tensor.values for name, tensor in tensors_of(NAMES, batch, ExplainOptions()).items()}
    assert made["num_tokens"].tolist() == [len(one.tokens) for one in batch]
    for row, one in enumerate(batch):
        tokens, targets = len(one.tokens), len(one.target_label)
        assert made["tokens"][row].tolist() == [*one.tokens, *[""] * (made["tokens"].shape[1] - tokens)]
        assert (made["attributions"][row, :targets, :tokens] == one.attributions).all()
        assert not made["attributions"][row, targets:].any()
        assert not made["attributions"][row, :, tokens:].any()
        assert (made["offsets"][row, tokens:] == -1).all()
        assert (made["word_ids"][row, tokens:] == -1).all()
        assert (made["target"][row, targets:] == -1).all()
        assert made["target_label"][row].tolist()[:targets] == list(one.target_label)
        assert not any(made["target_label"][row, targets:])


def test_a_batch_still_adds_up() -> None:
    batch = [explanation(labels=labels, seed=len(labels)) for labels in ((), ("A",), ("A", "B", "C"))]
    made = {name: tensor.values for name, tensor in tensors_of(NAMES, batch, ExplainOptions()).items()}
    total = made["attributions"].sum(axis=2)
    assert np.allclose(total, made["score"] - made["baseline_score"] + made["delta"], atol=1e-5)


def test_html_only_on_request() -> None:
    assert "html" not in default_names(ExplainOptions())
    assert set(default_names(ExplainOptions(html=True))) == set(NAMES)


# -- JSON -----------------------------------------------------------------------------------------


def record(one: Explanation, top_k: int | None = None) -> Any:
    return json.loads(json_of(one, top_k))


def test_the_keys_of_torchserve() -> None:
    one = explanation(labels=("A", "B"))
    made = record(one)
    assert made["words"] == list(one.tokens)
    assert np.array(made["importances"], dtype=np.float32).tolist() == one.attributions[0].tolist()
    assert made["delta"] == pytest.approx(0.125)
    assert [target["label"] for target in made["targets"]] == ["A", "B"]


def test_the_keys_of_torchserve_for_question_answering() -> None:
    one = explanation(labels=("start", "end"))
    made = record(one)
    for index, end in enumerate(("start", "end")):
        got = np.array(made[f"importances_answer_{end}"], dtype=np.float32)
        assert got.tolist() == one.attributions[index].tolist()
        assert made[f"delta_{end}"] == pytest.approx(0.125)
    assert "importances" not in made


def test_without_a_target_nothing_is_important() -> None:
    one = explanation(labels=())
    made = record(one)
    assert made["importances"] == [0.0] * len(one.tokens)
    assert (made["delta"], made["targets"]) == (0.0, [])


def test_top_k_lists_the_weightiest_tokens_but_no_special_ones() -> None:
    one = explanation()
    (target,) = record(one, top_k=3)["targets"]
    order = np.argsort(-np.abs(one.attributions[0]))[:3]
    assert [entry["word"] for entry in target["top"]] == [one.tokens[index] for index in order]
    assert [entry["span"] for entry in target["top"]] == one.offsets[order].tolist()
    (everything,) = record(one, top_k=999)["targets"]
    assert len(everything["top"]) == len(one.tokens) - 2
    assert "top" not in record(one)["targets"][0]
