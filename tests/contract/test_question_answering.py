"""question-answering gives what transformers 4.41.2 gave (`golden/`), and refuses what crashed it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from mlserver_hftasks.errors import InvalidRequest, InvalidSettings, RequestTooLarge
from mlserver_hftasks.loading import Served
from mlserver_hftasks.tasks.base import ModelFacts
from mlserver_hftasks.tasks.question_answering import QuestionAnswering
from tests import harness, tiny

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "question_answering.json").read_text(encoding="utf-8"))

QUESTION = "Who built the lighthouse?"
CONTEXT = "The lighthouse at Cape Morrow was built in 1871 by Edwin Hale. It is 43 metres tall."
LONG = CASES[2]["context"]
QUESTIONS = [QUESTION, "Where is it?", "How tall is the lighthouse?"]
CONTEXTS = [CONTEXT, "Anna Keller lives in Bern and works for the river museum.", LONG]


@pytest.fixture(scope="module")
def models() -> dict[str, Served]:
    return {name: harness.serve(GOLDEN / name, "question-answering") for name in ("qa_bert", "qa_roberta")}


@pytest.fixture(scope="module")
def bert(models: dict[str, Served]) -> Served:
    return models["qa_bert"]


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def assert_same(got: Any, expected: Any) -> None:
    if isinstance(expected, list):
        assert isinstance(got, list)
        assert len(got) == len(expected)
        for mine, theirs in zip(got, expected, strict=True):
            assert_same(mine, theirs)
        return
    assert {**got, "score": None} == {**expected, "score": None}
    assert got["score"] == pytest.approx(expected["score"], rel=1e-4, abs=1e-6)


# -- what transformers 4 gave --------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=[f"{i}-{case['model']}" for i, case in enumerate(CASES)])
def test_golden(models: dict[str, Served], case: dict[str, Any]) -> None:
    inputs = {name: listed(case[name]) for name in ("question", "context")}
    got = harness.results(models[case["model"]], inputs, **case["parameters"])
    assert_same(got, listed(case["expected"]))


def test_the_golden_cases_are_worth_it() -> None:
    assert len(CASES) > 100
    assert {case["model"] for case in CASES} == {"qa_bert", "qa_roberta"}
    answers = {json.dumps(case["expected"]) for case in CASES}
    assert len(answers) > 80


# -- requests and the shapes of results ----------------------------------------------------------


def test_inputs_in_every_form_give_the_same(bert: Served) -> None:
    expected = harness.results(bert, {"question": QUESTIONS, "context": CONTEXTS})
    items = [{"question": q, "context": c} for q, c in zip(QUESTIONS, CONTEXTS, strict=True)]
    assert harness.results(bert, {"inputs": items}) == expected
    for index, item in enumerate(items):
        for scalar in (True, False):
            (single,) = harness.results(bert, {"inputs": [item]}, scalar=scalar)
            assert_same(single, expected[index])
    (two_texts,) = harness.results(bert, {"inputs": [QUESTION, CONTEXT]})
    assert_same(two_texts, expected[0])


def test_one_context_serves_many_questions(bert: Served) -> None:
    got = harness.results(bert, {"question": QUESTIONS, "context": [CONTEXT]})
    assert got == harness.results(bert, {"question": QUESTIONS, "context": [CONTEXT] * 3})
    assert len(got) == 3


def test_inputs_have_aliases() -> None:
    for alias in ("args", "array_inputs", "data", "X"):
        spec = QuestionAnswering.signature.input_named(alias)
        assert spec is not None
        assert spec.name == "inputs"


def test_shapes_with_top_k(bert: Served) -> None:
    one = harness.results(bert, {"question": [QUESTION], "context": [CONTEXT]}, top_k=3)
    assert [set(answer) for answer in one] == [{"score", "start", "end", "answer"}] * 3
    two = harness.results(bert, {"question": QUESTIONS[:2], "context": [CONTEXT]}, top_k=3)
    assert_same(two[0], one)
    assert all(isinstance(answers, list) for answers in two)
    scores = [answer["score"] for answer in one]
    assert scores == sorted(scores, reverse=True)
    assert all(answer["answer"] == CONTEXT[answer["start"] : answer["end"]] for answer in one)


def test_topk_is_top_k_and_null_is_the_default(bert: Served) -> None:
    inputs = {"question": [QUESTION], "context": [CONTEXT]}
    assert harness.results(bert, inputs, topk=2) == harness.results(bert, inputs, top_k=2)
    nothing = dict.fromkeys(("top_k", "doc_stride", "max_answer_len", "max_seq_len", "align_to_words"))
    assert harness.results(bert, inputs, **nothing) == harness.results(bert, inputs)


def test_parameters_without_effect(bert: Served) -> None:
    inputs = {"question": [QUESTION], "context": [LONG]}
    got = harness.results(bert, inputs, max_question_len=1, padding="max_length", top_k=3)
    assert got == harness.results(bert, inputs, top_k=3)


def test_as_many_answers_as_there_are_spans(bert: Served) -> None:
    """Here version 4 died where top_k was the number of cells of its table, and gave empty spans else."""
    inputs = {"question": ["?"], "context": ["bern"]}
    for top_k in range(1, 120):
        answers = listed(harness.results(bert, inputs, top_k=top_k))
        assert 1 <= len(answers) <= top_k
        assert all(answer["answer"] and answer["score"] > 0 for answer in answers)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "xlm-roberta", "modernbert", "albert"])
def test_a_batch_equals_items_alone(architecture: str) -> None:
    served = harness.serve(tiny.folder(architecture, "qa"), "question-answering")
    inputs = {"question": QUESTIONS, "context": CONTEXTS}
    parameters = {"top_k": 3, "handle_impossible_answer": True, "max_seq_len": 60, "doc_stride": 8}
    together = harness.results(served, inputs, **parameters)
    alone = harness.results(served, inputs, together=False, **parameters)
    for index, (mine, single) in enumerate(zip(together, alone, strict=True)):
        by_itself = harness.results(
            served, {"question": [QUESTIONS[index]], "context": [CONTEXTS[index]]}, **parameters
        )
        assert_same(mine, single)
        assert_same(mine, by_itself)


def test_windows_are_rows_of_one_example(bert: Served) -> None:
    parameters = bert.task.signature.parse({"max_seq_len": 32, "doc_stride": 8})
    short, long = bert.task.examples({"question": [QUESTION], "context": [CONTEXT[:20]]}, parameters) + (
        bert.task.examples({"question": [QUESTION], "context": [LONG]}, parameters)
    )
    assert len(short.rows) == 1
    assert len(long.rows) > 10
    assert {row.cost for row in long.rows[:-1]} == {32}
    assert long.rows[-1].cost <= 32
    starts = {tuple(row.arrays["input_ids"][:5]) for row in long.rows}
    assert len(starts) == 1  # each window begins with the question


def test_typed_outputs(bert: Served) -> None:
    inputs = {"question": QUESTIONS, "context": CONTEXTS}
    got = harness.tensors(bert, ["answer", "score", "start", "end"], inputs, top_k=2)
    expected = harness.results(bert, inputs, top_k=2)
    assert {name: tensor.datatype for name, tensor in got.items()} == {
        "answer": "BYTES", "score": "FP32", "start": "INT64", "end": "INT64"
    }  # fmt: skip
    assert [tensor.values.dtype for tensor in got.values()] == [np.object_, np.float32, np.int64, np.int64]
    for name, tensor in got.items():
        assert tensor.values.tolist() == [[answer[name] for answer in answers] for answers in expected]


def test_typed_outputs_are_filled_up(bert: Served) -> None:
    got = harness.tensors(
        bert, ["answer", "score", "start", "end"], {"question": ["?"], "context": [" "]}, top_k=3
    )
    assert got["answer"].values.tolist() == [["", "", ""]]
    assert got["score"].values.tolist() == [[0, 0, 0]]
    assert got["start"].values.tolist() == [[0, -1, -1]]
    assert got["end"].values.tolist() == [[0, -1, -1]]


# -- where version 4 crashed ---------------------------------------------------------------------


def test_a_question_that_leaves_less_room_than_the_default_stride(bert: Served) -> None:
    question = "where is the river and the bridge and the old mayor of the town ?"
    (got,) = harness.results(bert, {"question": [question], "context": [LONG]})
    assert got["answer"] == LONG[got["start"] : got["end"]]


def test_left_padding_tokenizers_answer_from_the_context() -> None:
    """XLNet's way: the context comes first, and CLS last."""
    served = harness.serve(GOLDEN / "qa_bert", "question-answering")
    tokenizer = served.task.model.encoder.tokenizer
    tokenizer.padding_side = "left"
    task = QuestionAnswering(served.task.model)
    parameters = task.signature.parse({"top_k": 20, "align_to_words": False, "max_seq_len": 40})
    (short,) = task.examples({"question": [QUESTION], "context": [CONTEXT[:40]]}, parameters)
    ids = tokenizer(CONTEXT[:40], QUESTION)["input_ids"]
    assert short.rows[0].arrays["input_ids"].tolist() == ids
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(GOLDEN / "qa_bert").eval()
    with torch.inference_mode():
        logits = model(**tokenizer(CONTEXT[:40], QUESTION, return_tensors="pt"))
    outputs = {name: logits[name][0].numpy() for name in ("start_logits", "end_logits")}
    answers = task.postprocess(harness.Answered(short, [outputs]), parameters)
    assert len(answers) == 20
    assert all(answer["answer"] == CONTEXT[answer["start"] : answer["end"]] != "" for answer in answers)
    start, end = (logits[name][0].softmax(-1) for name in ("start_logits", "end_logits"))
    context = slice(1, tokenizer(CONTEXT[:40], QUESTION).sequence_ids().count(0) + 1)
    table = torch.outer(start[context], end[context]).triu().tril(14)
    assert answers[0]["score"] == pytest.approx(table.max().item(), rel=1e-5)


def test_a_tokenizer_without_offsets_is_refused_at_load(bert: Served) -> None:
    class Slow:
        is_fast = False
        tokenizer = bert.task.model.encoder.tokenizer

    facts = bert.task.model
    slow = ModelFacts(facts.config, Slow(), facts.labels)  # type: ignore[arg-type]
    with pytest.raises(InvalidSettings, match=r"expected one with a tokenizer\.json"):
        QuestionAnswering(slow)


@pytest.mark.parametrize(
    ("inputs", "parameters", "message"),
    [
        ({}, {}, "no question, expected question and context, or inputs @ question"),
        ({"question": [QUESTION]}, {}, "no context, expected question and context, or inputs @ context"),
        ({"question": [], "context": [CONTEXT]}, {}, "an empty batch, expected 1..1024 items @ question"),
        ({"inputs": []}, {}, "an empty batch, expected 1..1024 items @ inputs"),
        (
            {"question": ["a", ""], "context": [CONTEXT]},
            {},
            "got an empty text, expected at least one character @ question[1]",
        ),
        (
            {"inputs": [{"question": "a", "context": ""}]},
            {},
            "got an empty text, expected at least one character @ inputs[0].context",
        ),
        ({"question": ["a"], "context": [5]}, {}, "got int 5, expected a text @ context[0]"),
        ({"question": QUESTIONS, "context": CONTEXTS[:2]}, {}, "got 2 contexts for 3 questions"),
        ({"question": QUESTIONS[:1], "context": CONTEXTS}, {}, "got 3 contexts for 1 questions"),
        ({"question": ["a"], "inputs": ["a", "b"]}, {}, "expected one of them @ inputs"),
        ({"inputs": ["a", "b", "c"]}, {}, "got 'a', expected a dict of question and context @ inputs[0]"),
        (
            {"inputs": [{"question": "a"}]},
            {},
            "got the keys ['question'], expected a dict of question and context",
        ),
        (
            {"inputs": [{"question": "a", "context": "b", "id": 1}]},
            {},
            "got the keys ['context', 'id', 'question']",
        ),
        (
            {"question": ["a"], "context": ["b"]},
            {"top_k": 0},
            "got 0, expected: input should be greater than or equal to 1 @ top_k",
        ),
        ({"question": ["a"], "context": ["b"]}, {"top_k": 1001}, "@ top_k"),
        ({"question": ["a"], "context": ["b"]}, {"max_answer_len": 0}, "@ max_answer_len"),
        ({"question": ["a"], "context": ["b"]}, {"max_seq_len": 65}, "got 65, expected 1..64 @ max_seq_len"),
        ({"question": ["a"], "context": ["b"]}, {"doc_stride": -1}, "@ doc_stride"),
        (
            {"question": ["a"], "context": ["b"]},
            {"doc_stride": 64},
            "got 64, expected less than max_seq_len, 64 @ doc_stride",
        ),
        (
            {"question": [QUESTION], "context": [LONG]},
            {"doc_stride": 60},
            "tokens that question[0] leaves for the context @ doc_stride",
        ),
        (
            {"inputs": [{"question": LONG, "context": "b"}]},
            {},
            "expected one that leaves room for the context, or a larger max_seq_len @ inputs[0]",
        ),
        (
            {"question": [QUESTION], "context": [LONG]},
            {"max_seq_len": 3},
            "of 3 tokens, expected one that leaves room",
        ),
        ({"question": ["a"], "context": ["b"]}, {"batch_size": 2}, "unknown input or parameter 'batch_size'"),
        ({"question": ["a"], "context": ["b"]}, {"padding": "yes please"}, "@ padding"),
    ],
)
def test_bad_requests_are_refused(
    bert: Served, inputs: dict[str, Any], parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        harness.results(bert, inputs, **parameters)
    assert message in str(refusal.value)


def test_a_stride_that_makes_countless_windows_is_refused() -> None:
    served = harness.serve(GOLDEN / "qa_bert", "question-answering", max_items=20)
    inputs = {"question": [QUESTION], "context": [LONG * 20]}
    with pytest.raises(RequestTooLarge, match="more than 20 windows over one context"):
        harness.results(served, inputs, max_seq_len=16, doc_stride=1)
