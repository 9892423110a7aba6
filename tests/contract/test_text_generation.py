"""text-generation: the pipeline's answers, in steps shared with others, whatever they ask for."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers

from mlserver_hftasks.engine.generator import Generated, Generator
from mlserver_hftasks.engine.steps import StepLimits, StepScheduler
from mlserver_hftasks.errors import InvalidRequest, RequestTooLarge
from mlserver_hftasks.loading import Served
from mlserver_hftasks.tasks.base import Answered
from mlserver_hftasks.tasks.decoding import Choices, prompts_of, regrouped
from mlserver_hftasks.tasks.generation import MIN_TEMPERATURE
from mlserver_hftasks.tasks.text_stream import TextStream
from tests import harness, tiny

ARCHITECTURES = ("gpt2", "llama")
PROMPTS = (
    "The river museum was quiet",
    "Anna",
    "When the harbour opened, two ferries left for Morrow and nobody had paid for",
    "Grüße aus Köln 🙂",
    "a b c d e f g h",
)
TEMPLATE = tiny.CHAT_TEMPLATE


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@functools.cache
def served(architecture: str, **settings: Any) -> Served:
    return harness.serve(tiny.folder(architecture, "causal"), "text-generation", **settings)


@functools.cache
def pipeline(architecture: str) -> Any:
    return transformers.pipeline(
        "text-generation", model=str(tiny.folder(architecture, "causal")), device="cpu"
    )


def chatty(architecture: str, monkeypatch: pytest.MonkeyPatch) -> Served:
    """With a chat template, which belongs to the tokenizer."""
    model = served(architecture)
    monkeypatch.setattr(model.task.model.encoder.tokenizer, "chat_template", TEMPLATE)
    return model


async def _run(model: Served, requests: Sequence[Any], **limits: int) -> list[list[Generated]]:
    assert model.decoder is not None
    scheduler = StepScheduler(StepLimits(**limits), model.decoder.cache_tokens)
    generator = Generator(model.decoder, scheduler)
    try:
        return list(await asyncio.gather(*(generator.run(prompts) for prompts in requests)))
    finally:
        await generator.close()
        assert scheduler.cache.used == 0


def answered(
    model: Served, asked: Sequence[tuple[dict[str, Any], dict[str, Any]]], **limits: int
) -> list[Any]:
    """The answers to requests (inputs, parameters) that come at once: per request, per item."""
    parsed = [(inputs, model.task.signature.parse(parameters)) for inputs, parameters in asked]
    examples = [model.task.examples(inputs, parameters) for inputs, parameters in parsed]
    prompts = [prompts_of(each) for each in examples]
    stepping = [index for index, each in enumerate(prompts) if each is not None]
    made = asyncio.run(_run(model, [prompts[index] for index in stepping], **limits))
    results = dict(zip(stepping, made, strict=True))
    found = []
    for index, each in enumerate(examples):
        if index in results:
            found.append(regrouped(each, results[index]))
        else:
            outputs = model.backend.forward([row for example in each for row in example.rows])
            found.append([Answered(one, [out]) for one, out in zip(each, outputs, strict=True)])
    return found


def results(model: Served, inputs: dict[str, Any], *, scalar: bool = False, **parameters: Any) -> list[Any]:
    (items,) = answered(model, [(inputs, parameters)])
    parsed = model.task.signature.parse(parameters)
    made = [model.task.postprocess(item, parsed) for item in items]
    return model.task.shaped(made, parsed, scalar=scalar)


def together(model: Served, requests: Sequence[tuple[str, dict[str, Any]]], **limits: int) -> list[str]:
    asked = [({"text_inputs": [text]}, {"return_full_text": False, **p}) for text, p in requests]
    return [
        model.task.postprocess(items[0], model.task.signature.parse(parameters))[0]["generated_text"]
        for items, (_, parameters) in zip(answered(model, asked, **limits), asked, strict=True)
    ]


# -- the pipeline's answers ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "parameters",
    [
        {"max_new_tokens": 24},
        {"max_new_tokens": 24, "return_full_text": False},
        {"max_new_tokens": 12, "return_tensors": True},
        {"max_length": 40},
        {"max_new_tokens": 24, "min_new_tokens": 20},
        {"max_new_tokens": 40, "min_length": 30},
        {"max_new_tokens": 24, "repetition_penalty": 1.7},
        {"max_new_tokens": 24, "eos_token_id": [17, 90, 203]},
        {"max_new_tokens": 24, "suppress_tokens": [17, 90, 203]},
        {"max_new_tokens": 12, "num_beams": 3},
        {"max_new_tokens": 12, "num_beams": 4, "num_return_sequences": 2},
        {"max_new_tokens": 24, "no_repeat_ngram_size": 2},
    ],
    ids="-".join,
)
def test_equal_to_the_pipeline(architecture: str, parameters: dict[str, Any]) -> None:
    texts = list(PROMPTS)
    wanted = [pipeline(architecture)(text, do_sample=False, **parameters) for text in texts]
    got = results(served(architecture), {"text_inputs": texts}, **parameters)
    assert got == json.loads(json.dumps(wanted, default=list))


def test_shapes(architecture: str) -> None:
    model = served(architecture)
    (one,) = results(model, {"text_inputs": ["Anna"]}, scalar=True, max_new_tokens=3)
    (of_list,) = results(model, {"text_inputs": ["Anna"]}, max_new_tokens=3)
    assert of_list == [one]
    assert one["generated_text"].startswith("Anna")


def test_many_at_once_get_what_each_gets_alone(architecture: str) -> None:
    model = served(architecture)
    asked: list[tuple[str, dict[str, Any]]] = [
        (text, {"max_new_tokens": 5 + 3 * number, **extra})
        for number, (text, extra) in enumerate(
            (text, extra)
            for text in PROMPTS
            for extra in (
                {},
                {"do_sample": True, "seed": 5},
                {"do_sample": True, "seed": 5, "top_k": 3, "temperature": 2.0},
                {"do_sample": True, "seed": 6, "top_p": 0.5},
                {"repetition_penalty": 2.0},
                {"logprobs": True},
                {"num_beams": 2},
            )
        )
        if number % 2 == 0
    ]
    alone = [together(model, [request])[0] for request in asked]
    assert together(model, asked) == alone
    assert together(model, asked, max_sequences=3, prefill_tokens=5) == alone


def test_seeds(architecture: str) -> None:
    model = served(architecture)
    draw = {"do_sample": True, "max_new_tokens": 12, "min_new_tokens": 12}
    one, same, other, free, free_too = together(
        model,
        [("Anna", {**draw, "seed": 1})] * 2 + [("Anna", {**draw, "seed": 2})] + [("Anna", draw)] * 2,
    )
    assert one == same
    assert len({one, other, free, free_too}) == 4
    several = results(
        model,
        {"text_inputs": ["Anna"]},
        scalar=True,
        num_return_sequences=3,
        seed=1,
        return_full_text=False,
        **draw,
    )
    assert len({each["generated_text"] for each in several}) == 3
    assert several[0]["generated_text"] == one


def test_stop_texts(architecture: str) -> None:
    model = served(architecture)
    (whole,) = together(model, [(PROMPTS[0], {"max_new_tokens": 24})])
    stop = whole[8:11]
    at = whole.index(stop)
    cut, kept = together(
        model,
        [
            (PROMPTS[0], {"max_new_tokens": 24, "stop": stop}),
            (PROMPTS[0], {"max_new_tokens": 24, "stop_sequence": ["never", stop]}),
        ],
    )
    assert cut == whole[:at]
    assert whole.startswith(kept)
    assert stop in kept
    (item,) = answered(model, [({"text_inputs": [PROMPTS[0]]}, {"max_new_tokens": 24, "stop": stop})])[0]
    summary = model.task.summary([item], model.task.signature.parse({"stop": stop}))
    assert summary["finish_reason"] == "stop"
    assert summary["generated_tokens"] < 24


def test_log_probabilities_are_those_of_a_plain_pass(architecture: str) -> None:
    model = served(architecture)
    ids = model.task.model.encoder.tokenizer(PROMPTS[2])["input_ids"]
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny.folder(architecture, "causal"))
    for extra in ({}, {"no_repeat_ngram_size": 3}):
        (entries,) = results(
            model,
            {"text_inputs": [PROMPTS[2]]},
            logprobs=True,
            return_tensors=True,
            max_new_tokens=9,
            **extra,
        )
        (entry,) = entries
        new = entry["generated_token_ids"][len(ids) :]
        with torch.inference_mode():
            logits = plain(torch.tensor([entry["generated_token_ids"]])).logits[0, len(ids) - 1 : -1]
        wanted = logits.log_softmax(dim=-1).gather(1, torch.tensor(new)[:, None])[:, 0].tolist()
        assert entry["logprobs"] == pytest.approx(wanted, abs=1e-4)


def test_typed_outputs_and_the_summary(architecture: str) -> None:
    model = served(architecture)
    parameters = {"max_new_tokens": 15, "logprobs": True}
    parsed = model.task.signature.parse(parameters)
    (items,) = answered(model, [({"text_inputs": list(PROMPTS)}, parameters)])
    names = [spec.name for spec in model.task.signature.outputs]
    tensors = model.task.tensors(names, items, parsed)
    texts = results(model, {"text_inputs": list(PROMPTS)}, max_new_tokens=15, return_full_text=False)
    assert tensors["generated_text"].values[:, 0].tolist() == [each[0]["generated_text"] for each in texts]
    counts = tensors["generated_tokens"].values[:, 0].tolist()
    ids = tensors["token_ids"].values
    assert [(row[0] >= 0).sum() for row in ids] == counts
    assert tensors["logprobs"].values.shape == ids.shape
    assert set(tensors["finish_reason"].values[:, 0]) <= {"eos", "length"}
    summary = model.task.summary(items, parsed)
    assert summary["generated_tokens"] == sum(counts)
    assert json.loads(summary["finish_reason"]) == tensors["finish_reason"].values[:, 0].tolist()
    with pytest.raises(InvalidRequest, match="logprobs=true"):
        model.task.tensors(["logprobs"], items, model.task.signature.parse({}))


def test_pieces_of_a_stream_are_the_answer(architecture: str) -> None:
    model = served(architecture)
    for text in PROMPTS:
        parsed = model.task.signature.parse({"max_new_tokens": 40})
        (example,) = model.task.examples({"text_inputs": [text]}, parsed)
        writer = model.task.writer(example, parsed)  # type: ignore[attr-defined]
        assert isinstance(writer, TextStream)
        (items,) = answered(model, [({"text_inputs": [text]}, {"max_new_tokens": 40})])
        outputs = items[0].outputs[0]
        tokens = outputs["sequences"][0, : outputs["lengths"][0]].tolist()
        streamed = "".join(map(writer.push, tokens)) + writer.finish()
        assert text + streamed == model.task.postprocess(items[0], parsed)[0]["generated_text"]


def test_more_than_there_is_room_for_ends_at_the_room(architecture: str) -> None:
    """The tiny models take 128 tokens."""
    model = served(architecture)
    parameters = {"max_new_tokens": 500, "min_new_tokens": 500, "return_tensors": True}
    ((entry,),) = results(model, {"text_inputs": ["Anna"]}, **parameters)
    assert len(entry["generated_token_ids"]) == tiny.MAX_TOKENS


def test_an_empty_prompt_begins_at_the_beginning(architecture: str) -> None:
    ((entry,),) = results(served(architecture), {"text_inputs": [""]}, max_new_tokens=4)
    wanted = pipeline(architecture)("", max_new_tokens=4, do_sample=False)
    assert entry == wanted[0]


# -- chats ---------------------------------------------------------------------------------------

CHAT = [{"role": "user", "content": "Who paid for the coffee?"}]


@pytest.mark.parametrize(
    "inputs",
    [
        {"messages": CHAT},
        {"messages": [CHAT]},
        {"messages": [json.dumps(CHAT)]},
        {"messages": [{"messages": CHAT}]},
        {"text_inputs": [CHAT]},
        {"text_inputs": CHAT},
        {
            "messages": [
                {
                    "uuid": "1",
                    "past_user_inputs": [],
                    "generated_responses": [],
                    "new_user_input": CHAT[0]["content"],
                }
            ]
        },
    ],
)
def test_every_form_of_a_chat(inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = chatty("llama", monkeypatch)
    ((entry,),) = results(model, inputs, max_new_tokens=8)
    *asked, told = entry["generated_text"]
    assert asked == CHAT
    prompt = "user: Who paid for the coffee?\nassistant:"
    (wanted,) = together(model, [(prompt, {"max_new_tokens": 8, "add_special_tokens": False})])
    assert told == {"role": "assistant", "content": wanted}


def test_a_chat_is_what_the_pipeline_says(monkeypatch: pytest.MonkeyPatch) -> None:
    model = chatty("llama", monkeypatch)
    monkeypatch.setattr(pipeline("llama").tokenizer, "chat_template", TEMPLATE)
    for chat in (
        CHAT,
        [*CHAT, {"role": "assistant", "content": "Nobody"}],
        [{"role": "system", "content": "x"}, *CHAT],
    ):
        wanted = pipeline("llama")([chat], max_new_tokens=8, do_sample=False)
        assert results(model, {"messages": [chat]}, max_new_tokens=8) == wanted


def test_a_conversation_takes_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    model = chatty("llama", monkeypatch)
    old = {
        "past_user_inputs": ["Hi", "How?"],
        "generated_responses": ["Hello", "So"],
        "new_user_input": "Why?",
    }
    ((entry,),) = results(model, {"messages": [old]}, max_new_tokens=3)
    assert [(m["role"], m["content"]) for m in entry["generated_text"][:-1]] == [
        ("user", "Hi"), ("assistant", "Hello"), ("user", "How?"), ("assistant", "So"), ("user", "Why?"),
    ]  # fmt: skip


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "parameters", "message"),
    [
        ({"text_inputs": ["a"], "messages": [CHAT]}, {}, "both messages and text_inputs"),
        ({"text_inputs": [3]}, {}, r"got int 3, expected a text @ text_inputs\[0\]"),
        ({"text_inputs": ["a " * 200]}, {}, "expected at most 12"),
        ({"text_inputs": ["a"]}, {"max_new_tokens": 2000}, r"got 2000, expected 1\.\.1024 @ max_new_tokens"),
        ({"text_inputs": ["a b c d"]}, {"max_length": 2}, "got 2, expected more than the"),
        ({"text_inputs": ["a"]}, {"num_return_sequences": 2}, "expected do_sample=true"),
        ({"text_inputs": ["a"]}, {"suppress_tokens": [10**6]}, "got the token id 1000000"),
        ({"text_inputs": ["a"]}, {"eos_token_id": 10**6}, "got the token id 1000000"),
        ({"text_inputs": ["a"]}, {"return_full_text": True, "return_tensors": True}, "expected one of them"),
        ({"messages": ["no json"]}, {}, r"no JSON .* @ messages\[0\]"),
        ({"messages": [[{"role": "user"}]]}, {}, "expected an object with role and content"),
        ({"messages": [[{"role": "user", "content": 3}]]}, {}, "expected texts as role and content"),
        ({"messages": [[]]}, {}, "an empty batch"),
        ({"messages": [CHAT, []]}, {}, r"expected a list of 1\.\.1024 messages"),
        ({"messages": [[{"role": "robot", "content": "x"}]]}, {}, "roles are user and assistant"),
    ],
)
def test_bad_input(
    inputs: dict[str, Any], parameters: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = chatty("llama", monkeypatch)
    with pytest.raises(InvalidRequest, match=message):
        model.task.examples(inputs, model.task.signature.parse(parameters))


@pytest.mark.parametrize(
    "parameters",
    [
        {"custom_generate": "x/y"},
        {"assistant_model": "x/y"},
        {"prompt_lookup_num_tokens": 3},
        {"temperature": 0},
        {"temperature": 1e-38},
        {"temperature": "hot"},
        {"top_p": 1.5},
        {"top_k": -1},
        {"max_new_tokens": 0},
        {"max_new_tokens": True},
        {"num_beams": 10**6},
        {"stop": [""]},
        {"stop": ["x"] * 100},
        {"seed": -1},
        {"num_beams": 2, "num_return_sequences": 3},
    ],
)
def test_bad_parameters(parameters: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(parameters)).split("_")[0]):
        served("llama").task.signature.parse(parameters)


def test_a_models_own_temperature_is_no_less_than_a_request_may_ask_for() -> None:
    task = served("llama").task
    config = transformers.GenerationConfig(do_sample=True, temperature=1e-40)
    choices = Choices(dataclasses.replace(task.model, generation_config=config))
    assert choices.sampling(task.signature.parse({})).temperature == MIN_TEMPERATURE
    assert choices.sampling(task.signature.parse({"temperature": 0.5})).temperature == 0.5


def test_a_model_without_a_chat_template() -> None:
    model = served("gpt2")
    with pytest.raises(InvalidRequest, match="no chat template"):
        model.task.examples({"messages": [CHAT]}, model.task.signature.parse({}))


def test_settings_limit_what_may_be_asked_for() -> None:
    model = served("gpt2", max_new_tokens=7, max_prompt_tokens=9, kv_cache_tokens=12)
    parse = model.task.signature.parse
    with pytest.raises(InvalidRequest, match=r"1\.\.7 @ max_new_tokens"):
        model.task.examples({"text_inputs": ["a"]}, parse({"max_new_tokens": 8}))
    with pytest.raises(InvalidRequest, match="expected at most 9"):
        model.task.examples({"text_inputs": ["a b c d e f g h i j k l"]}, parse({}))
    (cut,) = model.task.examples({"text_inputs": ["a b c d e f g h i j k l"]}, parse({"truncation": True}))
    assert len(cut.context.tokens) <= 9
    assert cut.context.prompts[0].reserved <= 12
    with pytest.raises(RequestTooLarge):
        model.task.examples({"text_inputs": ["x"] * 2000}, parse({}))
    with pytest.raises(RequestTooLarge):
        many = {"num_return_sequences": 60, "do_sample": True}
        model.task.examples({"text_inputs": ["x"] * 20}, parse(many))
