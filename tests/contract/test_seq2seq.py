"""summarization, translation and text2text-generation give what transformers 4.41.2 gave (`golden/`)."""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from mlserver_hftasks.errors import InvalidRequest, InvalidSettings, RequestTooLarge
from mlserver_hftasks.loading import Served
from mlserver_hftasks.loading.serve import load
from mlserver_hftasks.settings import Settings
from mlserver_hftasks.tasks.languages import Languages
from mlserver_hftasks.tasks.registry import canonical_name
from tests import harness, tiny

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "seq2seq.json").read_text(encoding="utf-8"))
RESULT = {"summarization": "summary", "translation": "translation", "text2text-generation": "generated"}
ENDED_AT_THE_LAST_STEP: tuple[tuple[str, dict[str, Any]], ...] = (
    ("summarization", {"min_length": 12, "max_length": 20}),
    ("summarization", {"num_beams": 2, "no_repeat_ngram_size": 1}),
    ("translation_en_to_fr", {"num_beams": 2, "no_repeat_ngram_size": 1}),
)
"""T5's beams that find their last answer in the very step of `max_length`: transformers 4 stopped there, 5
looks at the answers that were cut too, and may find a better one."""
TEXTS = (
    "The harbour was quiet.",
    "Anna Keller opened the shutters of the river museum in Berlin, and two ferries left for Morrow.",
    "a",
    "Zürich → Genève 東京 привет 🎉 naïve",
)


@functools.cache
def serve(model: str, task: str, **settings: Any) -> Served:
    return harness.serve(GOLDEN / model, task, **settings)


def bart(**settings: Any) -> Served:
    return serve("s2s_bart", "summarization", **settings)


# -- what transformers 4 gave --------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", CASES, ids=[f"{i}-{case['model']}-{case['task']}" for i, case in enumerate(CASES)]
)
def test_golden(case: dict[str, Any]) -> None:
    scalar = isinstance(case["inputs"], str)
    inputs = {"inputs": [case["inputs"]] if scalar else case["inputs"]}
    got = harness.results(serve(case["model"], case["task"]), inputs, scalar=scalar, **case["parameters"])
    if got != case["expected"]:
        assert case["model"] == "s2s_t5" and (case["task"], case["parameters"]) in ENDED_AT_THE_LAST_STEP


def test_the_golden_cases_are_worth_it() -> None:
    assert len(CASES) > 300
    assert {(case["model"], case["task"]) for case in CASES} >= {
        ("s2s_bart", "summarization"),
        ("s2s_t5", "translation"),
        ("s2s_mbart", "translation"),
        ("s2s_m2m", "translation_en_to_fr"),
        ("s2s_t5", "text2text-generation"),
    }
    assert len({json.dumps(case["expected"]) for case in CASES}) > 180


# -- batches, draws, typed outputs ---------------------------------------------------------------


@pytest.mark.parametrize("parameters", [{}, {"num_beams": 3}, {"do_sample": True, "seed": 5}])
@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("bart", "summarization"),
        ("t5", "summarization"),
        ("mbart", "translation"),
        ("m2m_100", "translation"),
        ("marian", "translation"),
        ("t5", "text2text-generation"),
    ],
)
def test_a_batch_equals_items_alone(architecture: str, task: str, parameters: dict[str, Any]) -> None:
    served = harness.serve(tiny.folder(architecture, "seq2seq"), task, warmup=False)
    languages = {"src_lang": "en_XX", "tgt_lang": "fr_XX"} if task == "translation" else {}
    parameters = {"max_new_tokens": 8, **parameters, **languages}
    together = harness.results(served, {"inputs": TEXTS}, **parameters)
    alone = [harness.results(served, {"inputs": [text]}, **parameters)[0] for text in TEXTS]
    assert together == alone
    assert [list(each) for each in together] == [[f"{RESULT[task]}_text"]] * len(TEXTS)


def test_a_seed_repeats_a_draw_and_another_gives_another() -> None:
    draws = [
        harness.results(bart(), {"inputs": TEXTS}, do_sample=True, num_beams=1, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_typed_outputs() -> None:
    names = ["summary_text", "token_ids", "logprobs", "generated_tokens", "finish_reason"]
    parameters = {"num_beams": 3, "num_return_sequences": 2, "logprobs": True, "max_length": 12}
    got = harness.tensors(bart(), names, {"inputs": TEXTS}, **parameters)
    results = harness.results(bart(), {"inputs": TEXTS}, **parameters)
    assert [tensor.datatype for tensor in got.values()] == ["BYTES", "INT64", "FP32", "INT64", "BYTES"]
    assert got["summary_text"].values.tolist() == [[each["summary_text"] for each in row] for row in results]
    counts = got["generated_tokens"].values
    assert counts.shape == got["finish_reason"].values.shape == (len(TEXTS), 2)
    assert got["token_ids"].values.shape == got["logprobs"].values.shape == (len(TEXTS), 2, counts.max())
    assert ((got["token_ids"].values >= 0).sum(axis=2) == counts).all()
    assert set(got["finish_reason"].values.ravel()) == {"eos"}  # this model's last token always is one
    assert results[0][1]["logprobs"] == pytest.approx(
        got["logprobs"].values[0, 1, : counts[0, 1]].tolist(), abs=1e-6
    )
    with pytest.raises(InvalidRequest, match="expected the parameter logprobs=true @ outputs"):
        harness.tensors(bart(), ["logprobs"], {"inputs": TEXTS})


def test_what_the_response_says_of_the_answers() -> None:
    answered = harness.answer(bart(), {"inputs": TEXTS[:1]}, max_length=8)
    said = bart().task.summary(answered, bart().task.signature.parse({}))
    tokens = len(bart().task.model.encoder.tokenizer(TEXTS[0])["input_ids"])
    assert said == {"finish_reason": "eos", "prompt_tokens": tokens, "generated_tokens": 7}
    answered = harness.answer(serve("s2s_t5", "text2text-generation"), {"inputs": TEXTS[:2]}, max_length=3)
    said = serve("s2s_t5", "text2text-generation").task.summary(answered, bart().task.signature.parse({}))
    assert said["finish_reason"] == '["length", "length"]'


# -- parameters ----------------------------------------------------------------------------------


def test_stop_ends_before_and_stop_sequence_behind_the_text() -> None:
    plain = harness.results(bart(), {"inputs": TEXTS[:1]}, num_beams=1)[0]["summary_text"]
    stop = plain[6:9]
    before = harness.results(bart(), {"inputs": TEXTS[:1]}, num_beams=1, stop=stop)[0]["summary_text"]
    behind = harness.results(bart(), {"inputs": TEXTS[:1]}, num_beams=1, stop_sequence=stop)[0][
        "summary_text"
    ]
    assert before == plain[: plain.index(stop)]
    assert plain.startswith(behind) and stop in behind and behind != plain


def test_a_prefix_of_the_request_replaces_the_models_own() -> None:
    served = serve("s2s_t5", "summarization")
    for prefix in ("", "translate English to French: "):
        examples = served.task.examples(
            {"inputs": TEXTS[:1]}, served.task.signature.parse({"prefix": prefix})
        )
        wanted = served.task.model.encoder.tokenizer(prefix + TEXTS[0])["input_ids"]
        assert examples[0].rows[0].arrays["input_ids"].tolist() == wanted


def test_clean_up_works_for_every_tokenizer() -> None:
    task, tokenizer = bart().task, bart().task.model.encoder.tokenizer
    (answered,) = harness.answer(bart(), {"inputs": TEXTS[:1]}, max_length=8)
    tokens = tokenizer("it was n't so .", add_special_tokens=False)["input_ids"]
    outputs = {"sequences": np.array([tokens]), "lengths": np.array([len(tokens)]), "finish": np.array([0])}
    made = harness.Answered(answered.example, [outputs])
    texts = [
        task.postprocess(made, task.signature.parse(each))[0]["summary_text"]
        for each in ({}, {"clean_up_tokenization_spaces": True})
    ]
    assert texts == ["it was n't so .", "it wasn't so."]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"max_new_tokens": 51}, "got 51, expected 1..50 @ max_new_tokens"),
        ({"max_length": 52}, "got 52, expected 2..51 @ max_length"),
        ({"max_length": 1}, "got 1, expected 2..51 @ max_length"),
        ({"num_return_sequences": 4}, "got 4, expected 1..3 as num_beams @ num_return_sequences"),
        ({"num_beams": 1, "num_return_sequences": 2}, "expected do_sample=true or num_beams"),
        ({"eos_token_id": 700}, "got the token id 700, expected 0..699 @ eos_token_id"),
        ({"forced_eos_token_id": 700}, "@ forced_eos_token_id"),
        ({"src_lang": "en"}, "unknown input or parameter 'src_lang'"),
        ({"custom_generate": "x"}, "unknown input or parameter 'custom_generate'"),
        ({"assistant_model": "x"}, "unknown input or parameter 'assistant_model'"),
        ({"truncation": "sometimes"}, "@ truncation"),
        ({"max_new_tokens": True}, "@ max_new_tokens"),
    ],
)
def test_bad_parameters_are_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        harness.results(bart(max_new_tokens=50), {"inputs": TEXTS}, **parameters)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "an empty batch, expected 1..1024 items @ inputs"),
        ([5], "got int 5, expected a text @ inputs[0]"),
        (
            ["a", TEXTS[1] * 10],
            "expected at most 128: shorten it, or send the parameter truncation=true @ inputs[1]",
        ),
    ],
)
def test_bad_texts_are_refused(inputs: list[Any], message: str) -> None:
    for served in (bart(), serve("s2s_m2m", "translation_en_to_fr")):
        with pytest.raises(InvalidRequest) as refusal:
            harness.results(served, {"inputs": inputs})
        assert message in str(refusal.value)


def test_the_limit_of_the_setting_holds_for_the_models_default_too() -> None:
    served = bart(max_new_tokens=5)
    (got,) = harness.answer(served, {"inputs": TEXTS[:1]})
    assert got.outputs[0]["lengths"].tolist() == [5]
    assert got.example.rows[0].cost == got.example.context + 3 * 5


def test_too_many_texts_are_too_large() -> None:
    with pytest.raises(RequestTooLarge):
        harness.results(bart(max_items=3), {"inputs": TEXTS})


# -- languages -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "task", "parameters", "message"),
    [
        ("s2s_mbart", "translation", {}, "no language, expected a code such as ar_AR, cs_CZ"),
        ("s2s_mbart", "translation", {"src_lang": "en_XX"}, "@ tgt_lang"),
        (
            "s2s_mbart",
            "translation",
            {"src_lang": "en_XX", "tgt_lang": "de_DX"},
            "unknown language 'de_DX', did you mean 'de_DE'? @ tgt_lang",
        ),
        ("s2s_mbart", "translation", {"src_lang": "<s>", "tgt_lang": "de_DE"}, "unknown language '<s>'"),
        ("s2s_m2m", "translation_en_to_xx", {}, "unknown language 'xx'"),
        (
            "s2s_t5",
            "translation",
            {"src_lang": "en", "tgt_lang": "ru"},
            "expected one of translation_en_to_de, translation_en_to_fr @ tgt_lang",
        ),
    ],
)
def test_bad_languages_are_refused(model: str, task: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        harness.results(serve(model, task), {"inputs": TEXTS}, **parameters)
    assert message in str(refusal.value)


def test_languages_of_a_request_go_before_those_of_the_name() -> None:
    named, plain = serve("s2s_m2m", "translation_en_to_fr"), serve("s2s_m2m", "translation")
    pair = {"src_lang": "de", "tgt_lang": "en"}
    assert harness.results(named, {"inputs": TEXTS}, **pair) == harness.results(
        plain, {"inputs": TEXTS}, **pair
    )
    half = harness.results(named, {"inputs": TEXTS}, tgt_lang="de")
    assert half == harness.results(plain, {"inputs": TEXTS}, src_lang="en", tgt_lang="de")


@pytest.mark.parametrize("model", ["s2s_mbart", "s2s_m2m"])
def test_clients_of_different_languages_share_a_batch(model: str) -> None:
    served = serve(model, "translation")
    languages = Languages.of(served.task.model.encoder.tokenizer)
    assert languages is not None
    codes = languages.codes()[::8]
    pairs = [{"src_lang": a, "tgt_lang": b} for a, b in itertools.pairwise(codes)]
    asked = [served.task.signature.parse({**pair, "num_beams": 2}) for pair in pairs]
    examples = [served.task.examples({"inputs": TEXTS[:1]}, parameters)[0] for parameters in asked]
    rows = [example.rows[0] for example in examples]
    assert len({row.key for row in rows}) == 1
    for outputs, example, parameters in zip(served.backend.forward(rows), examples, asked, strict=True):
        together = served.task.postprocess(harness.Answered(example, [outputs]), parameters)
        alone = harness.results(served, {"inputs": TEXTS[:1]}, **parameters.model_dump(exclude_unset=True))
        assert together == alone


def test_a_pair_of_a_request_chooses_the_words_that_t5_wants() -> None:
    served = serve("s2s_t5", "translation_en_to_de")
    parameters = served.task.signature.parse({"src_lang": "en", "tgt_lang": "fr"})
    (example,) = served.task.examples({"inputs": TEXTS[:1]}, parameters)
    wanted = served.task.model.encoder.tokenizer("translate English to French: " + TEXTS[0])["input_ids"]
    assert example.rows[0].arrays["input_ids"].tolist() == wanted


def test_a_model_of_one_pair_does_not_mind_languages() -> None:
    served = harness.serve(tiny.folder("marian", "seq2seq"), "translation_en_to_de")
    plain = harness.results(served, {"inputs": TEXTS})
    assert harness.results(served, {"inputs": TEXTS}, src_lang="en", tgt_lang="de") == plain


def test_marians_targets_are_marked_in_the_text() -> None:
    served = harness.serve(tiny.folder("marian", "seq2seq"), "translation")
    served.task.model.encoder.tokenizer.supported_language_codes = [">>fra<<", ">>spa<<"]
    task = type(served.task)(served.task.model)
    del served.task.model.encoder.tokenizer.supported_language_codes
    (example,) = task.examples({"inputs": TEXTS[:1]}, task.signature.parse({"tgt_lang": "fra"}))
    wanted = served.task.model.encoder.tokenizer(">>fra<< " + TEXTS[0])["input_ids"]
    assert example.rows[0].arrays["input_ids"].tolist() == wanted
    with pytest.raises(InvalidRequest, match="unknown language 'frx', did you mean 'fra'"):
        task.examples({"inputs": TEXTS[:1]}, task.signature.parse({"tgt_lang": "frx"}))


@pytest.mark.parametrize("model", ["s2s_mbart", "s2s_m2m"])
def test_languages_mark_texts_as_the_tokenizer_does(model: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(GOLDEN / model)
    before = tokenizer.src_lang
    languages = Languages.of(tokenizer)
    assert languages is not None
    assert tokenizer.src_lang == before
    assert len(languages.codes()) >= 25
    for code in languages.codes()[::9]:
        tokenizer.src_lang = code
        language = languages.get(code, "src_lang")
        bare = tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]
        assert tokenizer(TEXTS[0])["input_ids"] == [*language.before, *bare, *language.after]


def test_languages_of_nllb() -> None:
    tokenizer = transformers.NllbTokenizer()
    languages = Languages.of(tokenizer)
    assert languages is not None
    assert len(languages.codes()) > 190
    language = languages.get("fra_Latn", "tgt_lang")
    assert language.first == tokenizer.convert_tokens_to_ids("fra_Latn")
    assert language.before == (language.first,)
    assert language.after == (tokenizer.eos_token_id,)


def test_most_tokenizers_know_no_languages() -> None:
    assert Languages.of(tiny.tokenizer_of("t5")) is None


# -- settings ------------------------------------------------------------------------------------


def test_names_of_translation() -> None:
    assert canonical_name("translation_en_to_fr") == canonical_name("translation") == "translation"
    with pytest.raises(InvalidSettings):
        canonical_name("translation_en")
    suffixed = load(
        Settings(task="translation", task_suffix="_en_to_fr", pretrained_model=str(GOLDEN / "s2s_t5"))
    )
    named = serve("s2s_t5", "translation_en_to_fr")
    assert harness.results(suffixed, {"inputs": TEXTS}) == harness.results(named, {"inputs": TEXTS})


def test_the_task_is_inferred_from_the_model() -> None:
    for architecture, task in (("bart", "text2text-generation"), ("marian", "translation")):
        folder = tiny.folder(architecture, "seq2seq")  # type: ignore[arg-type]
        assert load(Settings(pretrained_model=str(folder))).task.name == task
