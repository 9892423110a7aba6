"""Decoders on ONNX Runtime, programs of ours and Optimum's: what the model says on torch, in any company."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
from transformers.exporters import OnnxExporter

from mlserver_hftasks.errors import InvalidRequest, InvalidSettings
from mlserver_hftasks.export.decoder import QUANTIZERS
from mlserver_hftasks.generation import probe
from mlserver_hftasks.generation.past import PastDecoder
from mlserver_hftasks.generation.plain import new_token_logits, probe_texts
from mlserver_hftasks.generation.program import ProgramDecoder
from mlserver_hftasks.loading import Served
from tests import exported, harness, optimum, tiny
from tests.contract.test_text_generation import PROMPTS, answered, results, together

ASKED: list[dict[str, Any]] = [
    {},
    {"do_sample": True, "seed": 5},
    {"do_sample": True, "seed": 5, "top_k": 3, "temperature": 2.0},
    {"do_sample": True, "seed": 6, "top_p": 0.5, "top_k": 0},
    {"do_sample": True, "seed": 7, "top_k": 0, "min_p": 0.02, "repetition_penalty": 1.3},
    {"repetition_penalty": 2.0, "min_new_tokens": 20},
    {"suppress_tokens": [17, 90, 203], "eos_token_id": [5, 60]},
]


def ours(architecture: str) -> Path:
    return exported.folder(architecture, "causal", "onnx")


FOLDERS: dict[str, Callable[[str], Path]] = {
    "ours": ours,
    "optimum": optimum.folder,
    "merged": optimum.merged,
}
NARROW = [("gpt2", "ours"), ("llama", "ours"), ("gpt2", "optimum"), ("gpt2", "merged")]
WIDE = [(architecture, layout) for architecture in ("gpt2", "llama", *tiny.LIKE_LLAMA) for layout in FOLDERS]
MATRIX = WIDE if os.environ.get("HFTASKS_WIDE") else NARROW


@functools.cache
def program(architecture: str, layout: str, **settings: Any) -> Served:
    backend = {} if layout == "ours" else {"backend": "onnx"}
    return harness.serve(FOLDERS[layout](architecture), "text-generation", **backend, **settings)


@functools.cache
def plain(architecture: str) -> Served:
    return harness.serve(tiny.folder(architecture, "causal"), "text-generation")


@pytest.fixture(scope="module", params=MATRIX, ids="-".join)
def pair(request: pytest.FixtureRequest) -> tuple[Served, Served]:
    """A program, and its model on torch."""
    architecture, layout = request.param
    return program(architecture, layout), plain(architecture)


def test_logits_are_the_models(pair: tuple[Served, Served]) -> None:
    decoder = pair[0].decoder
    assert isinstance(decoder, ProgramDecoder | PastDecoder)
    model = pair[1].backend._model  # type: ignore[attr-defined]
    texts = probe_texts(model, 1024)
    for got, text in zip(probe.logits_in_steps(decoder.logits, texts), texts, strict=True):
        assert probe.difference(got, new_token_logits(model, text)) < 1e-4


def test_answers_are_those_of_torch_in_any_company(pair: tuple[Served, Served]) -> None:
    asked: list[tuple[str, dict[str, Any]]] = [
        (text, {"max_new_tokens": 8 + 3 * number, **extra})
        for number, text in enumerate(PROMPTS)
        for extra in ASKED
    ]
    wanted = together(pair[1], asked)
    assert together(pair[0], asked) == wanted
    some = slice(1, None, 4)
    assert together(pair[0], asked[some], max_sequences=3, prefill_tokens=5) == wanted[some]
    assert [together(pair[0], [each])[0] for each in asked[some]] == wanted[some]


def test_how_programs_are_batched(pair: tuple[Served, Served]) -> None:
    how = pair[0].description
    assert (how.backend, how.device, how.dtype) == ("onnx", "cpu", "float32")
    assert how.packing == ("continuous" if isinstance(pair[0].decoder, ProgramDecoder) else "padded")


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_log_probabilities_and_stop_texts(architecture: str) -> None:
    served, torch_served = program(architecture, "ours"), plain(architecture)
    asked = {"max_new_tokens": 9, "logprobs": True, "return_tensors": True}
    for text in PROMPTS:
        ((got,),), ((want,),) = (
            results(each, {"text_inputs": [text]}, **asked) for each in (served, torch_served)
        )
        assert got["generated_token_ids"] == want["generated_token_ids"]
        assert got["logprobs"] == pytest.approx(want["logprobs"], abs=1e-4)
    (whole,) = together(served, [(PROMPTS[0], {"max_new_tokens": 24})])
    (cut,) = together(served, [(PROMPTS[0], {"max_new_tokens": 24, "stop": whole[8:11]})])
    assert cut == whole[: whole.index(whole[8:11])]


@pytest.mark.parametrize("layout", ["ours", "optimum"])
def test_a_prompt_of_one_token_and_an_empty_one(layout: str) -> None:
    for text in ("a", ""):
        got, want = (
            results(each, {"text_inputs": [text]}, max_new_tokens=6)
            for each in (program("gpt2", layout), plain("gpt2"))
        )
        assert got == want


def test_streams_tell_the_answer() -> None:
    served = program("llama", "ours")
    parsed = served.task.signature.parse({"max_new_tokens": 30})
    (example,) = served.task.examples({"text_inputs": [PROMPTS[3]]}, parsed)
    writer = served.task.writer(example, parsed)  # type: ignore[attr-defined]
    (items,) = answered(served, [({"text_inputs": [PROMPTS[3]]}, {"max_new_tokens": 30})])
    outputs = items[0].outputs[0]
    tokens = outputs["sequences"][0, : outputs["lengths"][0]].tolist()
    streamed = "".join(map(writer.push, tokens)) + writer.finish()
    assert PROMPTS[3] + streamed == served.task.postprocess(items[0], parsed)[0]["generated_text"]


def test_a_small_cache_serves_long_and_short_side_by_side() -> None:
    """Slabs split and grow; nothing of it may show in an answer."""
    served = program("llama", "ours", kv_cache_tokens=140)
    asked = [("a", {"max_new_tokens": 110}), *((text, {"max_new_tokens": 6}) for text in PROMPTS)]
    assert together(served, asked) == together(plain("llama"), asked)


def test_what_only_generate_does_is_refused() -> None:
    served = program("gpt2", "ours")
    for parameters in ({"num_beams": 2}, {"no_repeat_ngram_size": 2}, {"bad_words": ["x"]}):
        with pytest.raises(
            InvalidRequest, match='expected none of them, or a model with the backend "torch"'
        ):
            served.task.examples({"text_inputs": ["Anna"]}, served.task.signature.parse(parameters))


def test_a_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = {"messages": [[{"role": "user", "content": "Who paid?"}]]}
    answers = []
    for served in (program("llama", "ours"), plain("llama")):
        tokenizer = served.task.model.encoder.tokenizer
        tokenizer = getattr(tokenizer, "_whole", tokenizer)
        monkeypatch.setattr(tokenizer, "chat_template", tiny.CHAT_TEMPLATE)
        answers.append(results(served, chat, max_new_tokens=8))
    assert answers[0] == answers[1]


def test_the_exporter_says_how_near_the_program_is() -> None:
    report = exported.report("llama", "causal", "onnx")
    assert report.layout == "steps"
    assert report.largest_difference < 1e-5


def test_a_decoder_is_exported_once_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlserver_hftasks.loading import programs

    calls = []

    def made(settings: Any, out: Path, **options: Any) -> None:
        calls.append(settings.task)
        shutil.copytree(ours("llama"), out, dirs_exist_ok=True)

    monkeypatch.setattr(programs, "export_program", made)
    for _ in range(2):
        served = harness.serve(
            tiny.folder("llama", "causal"), "text-generation", optimum_model=True, program_cache=str(tmp_path)
        )
        assert isinstance(served.decoder, ProgramDecoder)
    assert calls == ["text-generation"]


def test_a_decoder_is_served_without_torch_and_transformers() -> None:
    script = (
        "import sys\n"
        "from mlserver_hftasks.loading import load\n"
        "from mlserver_hftasks.settings import Settings\n"
        "import mlserver_hftasks.runtime.generation, mlserver_hftasks.runtime.model\n"
        "served = load(Settings(pretrained_model=sys.argv[1]))\n"
        "parsed = served.task.signature.parse({'do_sample': True, 'logprobs': True, 'stop': 'x'})\n"
        "(example,) = served.task.examples({'text_inputs': ['Anna']}, parsed)\n"
        "served.task.writer(example, parsed).push(7)\n"
        "print(served.task.name, sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(ours("llama"))], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "text-generation []"


# -- what cannot be served -----------------------------------------------------------------------


def copied(source: Path, to: Path) -> Path:
    shutil.copytree(source, to)
    return to


def test_a_corrupt_file(tmp_path: Path) -> None:
    folder = copied(ours("llama"), tmp_path / "corrupt")
    (folder / "model.onnx").write_bytes(b"no program")
    with pytest.raises(InvalidSettings, match=r"'model\.onnx' cannot be opened by ONNX Runtime"):
        harness.serve(folder, "text-generation")


def test_a_program_that_is_no_decoder(tmp_path: Path) -> None:
    folder = copied(ours("llama"), tmp_path / "other")
    shutil.copy(optimum.folder("gpt2") / "onnx" / "model.onnx", folder)
    with pytest.raises(InvalidSettings, match=r"'model\.onnx' has no decode_ids, expected a decoder"):
        harness.serve(folder, "text-generation")


def test_an_optimum_file_without_a_cache(tmp_path: Path) -> None:
    folder = copied(optimum.folder("gpt2"), tmp_path / "plain")
    path = folder / "onnx" / "model.onnx"
    model = onnx.load(path)
    for name, what in ((r"past_key_values\.0\.key", "cache_in"), ("position_ids", "turns")):
        for part in (*model.graph.input, *model.graph.node):
            if isinstance(part, onnx.NodeProto):
                part.input[:] = [what if each == name.replace("\\", "") else each for each in part.input]
            elif part.name == name.replace("\\", ""):
                part.name = what
        onnx.save(model, path)
        with pytest.raises(InvalidSettings, match="has no past_key_values"):
            harness.serve(folder, "text-generation", backend="onnx")


def test_a_file_that_cannot_be_batched_takes_turns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its positions are counted from the padding on: wrong in a padded batch, right alone."""
    folder = copied(optimum.folder("gpt2"), tmp_path / "turns")
    path = folder / "onnx" / "model.onnx"
    model = onnx.load(path)
    graph = model.graph
    (positions,) = (each for each in graph.input if each.name == "position_ids")
    graph.input.remove(positions)
    helper, int64 = onnx.helper, onnx.TensorProto.INT64
    for name, value in (("t_one", 1), ("t_zero", 0), ("t_end", 1 << 30)):
        graph.initializer.append(helper.make_tensor(name, int64, [1], [value]))
    made = [
        helper.make_node("CumSum", ["attention_mask", "t_axis"], ["t_counted"]),
        helper.make_node("Mul", ["t_counted", "t_zero"], ["t_nothing"]),
        helper.make_node("Shape", ["attention_mask"], ["t_shape"]),
        helper.make_node("Expand", ["t_one", "t_shape"], ["t_ones"]),
        helper.make_node("CumSum", ["t_ones", "t_axis"], ["t_places"]),
        helper.make_node("Sub", ["t_places", "t_one"], ["t_from_zero"]),
        helper.make_node("Add", ["t_from_zero", "t_nothing"], ["t_all"]),
        helper.make_node("Shape", ["input_ids"], ["t_ids"]),
        helper.make_node("Gather", ["t_ids", "t_one"], ["t_new"]),
        helper.make_node("Neg", ["t_new"], ["t_begin"]),
        helper.make_node("Slice", ["t_all", "t_begin", "t_end", "t_one"], ["position_ids"]),
    ]
    graph.initializer.append(helper.make_tensor("t_axis", int64, [], [1]))
    nodes = [*made, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save(model, path)
    served = harness.serve(folder, "text-generation", backend="onnx")
    assert served.description.packing == "single"
    assert "its sequences take turns" in caplog.text
    asked = [(text, {"max_new_tokens": 8}) for text in PROMPTS]
    assert together(served, asked) == together(plain("gpt2"), asked)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": 0}, r"got 0 for a decoder with the backend \"onnx\", expected the CPU"),
        ({"dtype": "bfloat16"}, 'got "bfloat16" with the backend "onnx"'),
        ({"provider_options": {"device_id": 1}}, "got 'device_id'"),
        ({"task": "text-classification"}, "the program was exported for 'text-generation'"),
    ],
)
def test_settings_that_do_not_go_with_a_decoder(settings: dict[str, Any], message: str) -> None:
    from mlserver_hftasks.loading import load
    from mlserver_hftasks.settings import Settings

    with pytest.raises(InvalidSettings, match=message):
        load(Settings(**{"task": "text-generation", "pretrained_model": str(ours("llama")), **settings}))


def test_seq2seq_and_other_backends_are_refused() -> None:
    with pytest.raises(InvalidSettings, match='Seq2SeqLM, which generates, expected "torch"'):
        harness.serve(tiny.folder("bart", "seq2seq"), "summarization", backend="onnx")
    with pytest.raises(InvalidSettings, match='got "openvino" for a model of the kind CausalLM'):
        harness.serve(tiny.folder("llama", "causal"), "text-generation", backend="openvino")


def test_a_model_that_cannot_be_exported_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mlserver_hftasks.export import decoder

    def refuses(*args: Any, **kwargs: Any) -> Any:
        raise TypeError("attention over a program's cache takes no mask and no position bias")

    monkeypatch.setattr(decoder, "_traced", refuses)
    with pytest.raises(
        InvalidSettings, match=r"ForCausalLM cannot be exported to onnx \(attention over .* no mask"
    ):
        harness.serve(
            tiny.folder("llama", "causal"), "text-generation", backend="onnx", program_cache=str(tmp_path)
        )
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def quantized(name: str, to: Path) -> Path:
    """As the exporter does, from a program that is there."""
    folder = copied(ours("llama"), to)
    program = onnx_ir.load(folder / "model.onnx")
    onnx_ir.external_data.load_to_model(program)
    QUANTIZERS[name](program)
    OnnxExporter.save_program(program, folder / "model.onnx")
    content = json.loads((folder / "export.json").read_text())
    content["hftasks"]["quantization"] = name
    (folder / "export.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("name", "most"), [("int8", 0.1), ("int8-weight-only", 0.1), ("int4-weight-only", 0.6)]
)
def test_quantized_decoders_are_near_and_do_not_hang_on_neighbours(
    name: str, most: float, tmp_path: Path
) -> None:
    served = harness.serve(quantized(name, tmp_path / name), "text-generation")
    assert served.description.dtype == name
    assert isinstance(served.decoder, ProgramDecoder)
    model = plain("llama").backend._model  # type: ignore[attr-defined]
    texts = probe_texts(model, 1024)
    found = probe.logits_in_steps(served.decoder.logits, texts)
    worst = [
        probe.difference(got, new_token_logits(model, text)) for got, text in zip(found, texts, strict=True)
    ]
    assert 0 < max(worst) < most
    asked = [(text, {"max_new_tokens": 10}) for text in PROMPTS]
    alone = [together(served, [each])[0] for each in asked]
    same = np.mean([got == want for got, want in zip(together(served, asked), alone, strict=True)])
    assert same >= 0.8


def test_seeds_choose_what_they_choose_on_torch() -> None:
    draw = {"do_sample": True, "max_new_tokens": 12, "min_new_tokens": 12, "seed": 3}
    (one,) = together(program("gpt2", "ours"), [("Anna", draw)])
    assert [one] == together(plain("gpt2"), [("Anna", draw)])
    (other,) = together(program("gpt2", "ours"), [("Anna", {**draw, "seed": 4})])
    assert other != one
