"""Finding programs, keeping them, and what is said where one cannot be served. No model is exported here."""

import json
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from mlserver_hftasks.backends.onnx import check_options, default_threads
from mlserver_hftasks.backends.program import Layout, Plan, Reads
from mlserver_hftasks.errors import InvalidSettings
from mlserver_hftasks.loading import light, load, programs
from mlserver_hftasks.loading.cache import kept, key_of, new_folder, place_of
from mlserver_hftasks.loading.manifest import Manifest, find_program
from mlserver_hftasks.loading.runners import open_runner
from mlserver_hftasks.settings import Settings
from tests import tiny

PLAN = Plan(Layout.LANES, 3, Reads.SELECTED, 1)
MANIFEST = Manifest("onnx", "model.onnx", "fill-mask", PLAN, 128, tokenizer={"pad_token_id": 3})


def prepared(folder: Path, manifest: Manifest = MANIFEST) -> Path:
    """A folder as `hftasks prepare` leaves it, with a program that is none."""
    manifest.write(folder)
    (folder / manifest.file).write_bytes(b"no program")
    return folder


def found(folder: Path, **settings: Any) -> Any:
    return find_program(folder, Settings(pretrained_model=str(folder), **settings))


# -- finding ---------------------------------------------------------------------------------------


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    MANIFEST.write(tmp_path)
    assert Manifest.read(tmp_path) == MANIFEST


def test_a_program_of_ours_is_served_without_being_asked_for(tmp_path: Path) -> None:
    program = found(prepared(tmp_path))
    assert program is not None and program.path == tmp_path / "model.onnx" and program.manifest == MANIFEST


def test_a_manifest_of_transformers_alone_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "export.json").write_text(
        json.dumps({"schema_version": 1, "export_format": "onnx", "components": {}})
    )
    assert found(tmp_path) is None


def test_weights_beside_the_program_are_served_when_asked_for(tmp_path: Path) -> None:
    prepared(tmp_path)
    with pytest.raises(
        InvalidSettings, match=r"holds a program, expected \"onnx\" .* @ parameters.extra.backend"
    ):
        found(tmp_path, backend="torch")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert found(tmp_path, backend="torch") is None


@pytest.mark.parametrize(
    ("settings", "files", "expected"),
    [
        ({"optimum_model": True}, ["onnx/model.onnx"], "onnx/model.onnx"),
        ({"backend": "onnx"}, ["model.onnx", "onnx/model.onnx"], "model.onnx"),
        (
            {"backend": "onnx", "quantization": "int8"},
            ["model.onnx", "model_quantized.onnx"],
            "model_quantized.onnx",
        ),
        (
            {"backend": "onnx", "file_name": "onnx/model_O3.onnx"},
            ["onnx/model_O3.onnx"],
            "onnx/model_O3.onnx",
        ),
        ({"backend": "openvino"}, ["openvino/openvino_model.xml"], "openvino/openvino_model.xml"),
        ({"backend": "torchscript"}, ["traced_model.pt"], "traced_model.pt"),
        ({}, ["model.onnx"], None),
        ({"backend": "onnx"}, ["other.onnx"], None),
    ],
)
def test_programs_of_other_tools(
    tmp_path: Path, settings: Any, files: list[str], expected: str | None
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    program = found(tmp_path, **settings)
    assert (program and str(program.path.relative_to(tmp_path))) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantization": "int8"}, 'got "int8", expected "none", which the program in the folder is'),
        ({"backend": "openvino"}, "@ parameters.extra.backend"),
    ],
)
def test_settings_that_contradict_the_program(tmp_path: Path, settings: Any, message: str) -> None:
    with pytest.raises(InvalidSettings) as caught:
        found(prepared(tmp_path), **settings)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["../model.onnx", "/etc/passwd", "a/../../model.onnx"])
def test_a_file_outside_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        InvalidSettings, match=r"expected a file in the model's folder @ parameters.extra.file_name"
    ):
        found(tmp_path, backend="onnx", file_name=name)


def test_a_manifest_that_names_a_file_outside_is_refused(tmp_path: Path) -> None:
    prepared(tmp_path)
    content = json.loads((tmp_path / "export.json").read_text())
    content["hftasks"]["file"] = "../../model.onnx"
    (tmp_path / "export.json").write_text(json.dumps(content))
    with pytest.raises(InvalidSettings, match="expected a file in the model's folder"):
        found(tmp_path)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"hftasks": {"plan": {"layout": "spiral", "reads": "all"}}}']
)
def test_a_corrupt_manifest(tmp_path: Path, content: str) -> None:
    (tmp_path / "export.json").write_text(content)
    with pytest.raises(InvalidSettings, match=r"cannot be read .*expected what `hftasks prepare` writes"):
        found(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [{"file": 3}, {"max_tokens": "many"}, {"backend": "torchscript"}, {"backend": "torch"}, {"new": 1}],
)
def test_a_manifest_that_nothing_of_ours_writes(tmp_path: Path, changes: dict[str, Any]) -> None:
    content = json.loads((prepared(tmp_path) / "export.json").read_text())
    content["hftasks"].update(changes)
    (tmp_path / "export.json").write_text(json.dumps(content))
    with pytest.raises(InvalidSettings, match=r"cannot be read .*expected what `hftasks prepare` writes"):
        found(tmp_path)


# -- keeping ---------------------------------------------------------------------------------------


def test_the_key_is_that_of_the_content(tmp_path: Path) -> None:
    one, other = tmp_path / "a", tmp_path / "b"
    for folder in (one, other):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "README.md").write_text(folder.name)
    assert key_of(one, task="x") == key_of(other, task="x") != key_of(one, task="y")
    (other / "config.json").write_text("{ }")
    assert key_of(one, task="x") != key_of(other, task="x")


def test_modules_and_code_that_is_run_take_part_in_the_key(tmp_path: Path) -> None:
    keys = [key_of(tmp_path)]
    (tmp_path / "1_Pooling").mkdir()
    for mode in ("cls", "mean"):
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": mode}))
        keys.append(key_of(tmp_path))
    for code in ("one", "other"):
        (tmp_path / "modeling_own.py").write_text(code)
        assert key_of(tmp_path) == keys[2], "nobody runs it"
        keys.append(key_of(tmp_path, code=True))
    assert len(set(keys)) == len(keys)


def test_each_device_and_cpu_has_its_own_program(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlserver_hftasks.backends import compiled

    keys: list[str] = []

    def place(key: str, setting: str | None) -> Path:
        keys.append(key)
        raise InterruptedError

    monkeypatch.setattr(programs, "place_of", place)
    for device, compiles, features in (
        ("cpu", False, ["avx2"]),
        ("cpu", False, ["avx512"]),
        (0, False, ["avx2"]),
        ("cpu", True, ["avx2"]),
        ("cpu", True, ["avx512"]),
    ):
        monkeypatch.setattr(compiled, "cpu_features", lambda features=features: features)
        settings = {"device": device, "backend": "export", "compile": {"enable": compiles}}
        with pytest.raises(InterruptedError):
            programs.provide_program(Settings(pretrained_model=str(tiny.folder("bert", "mask")), **settings))
    assert keys[0] == keys[1], "what is not compiled is for every CPU"
    assert len(set(keys)) == 4


def test_of_two_at_once_one_makes_and_both_have_it(tmp_path: Path) -> None:
    made: list[Path] = []

    def make(unfinished: Path) -> None:
        made.append(unfinished)
        time.sleep(0.2)
        (unfinished / "program").write_text("whole")
        assert not (tmp_path / "key").exists(), "nobody sees half a folder"

    threads = [threading.Thread(target=kept, args=(tmp_path / "key", make)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and (tmp_path / "key" / "program").read_text() == "whole"


def test_what_fails_leaves_nothing_and_may_be_tried_again(tmp_path: Path) -> None:
    def fail(unfinished: Path) -> None:
        (unfinished / "half").write_text("")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        kept(tmp_path / "key", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["key.lock"]
    assert kept(tmp_path / "key", lambda unfinished: None).is_dir()


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    with (
        pytest.raises(InvalidSettings, match="cannot be written: No space left on device"),
        new_folder(tmp_path / "out"),
    ):
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc/self").is_dir(), reason="root writes everywhere")
def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidSettings, match=r"cannot be written .*@ parameters.extra.program_cache"):
        place_of("key", str(tmp_path / "file" / "programs"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    temporary = place_of("key", None)
    assert temporary.parent.is_dir() and tmp_path not in temporary.parents
    assert "exported at every start" in caplog.text


def test_a_program_that_is_there_needs_nothing_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*how: Any, **options: Any) -> Any:
        raise OSError(30, "Read-only file system")

    made = tmp_path / "mlserver-hftasks" / "programs" / "key"
    made.mkdir(parents=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    assert place_of("key", None) == place_of("key", str(made.parent)) == made
    assert kept(made, read_only) == made
    assert list(made.parent.iterdir()) == [made], "nor a lock"
    with pytest.raises(InvalidSettings, match="Read-only file system"):
        place_of("another", str(made.parent))


# -- config and tokenizer without transformers -----------------------------------------------------


@pytest.mark.parametrize("architecture", ["bert", "roberta", "albert", "gpt2", "llama", "mpnet"])
def test_the_light_tokenizer_says_what_that_of_transformers_says(architecture: str, tmp_path: Path) -> None:
    own = AutoTokenizer.from_pretrained(tiny.folder(architecture, "base"))
    own.save_pretrained(tmp_path)
    facts = light.facts_of(own, tmp_path)
    assert facts is not None
    mine = light.LightTokenizer(tmp_path, json.loads(json.dumps(facts)))
    text = "Angela met the mayor of Hamburg; 東京 naïve <mask> [SEP]"
    ids = own.encode(text, add_special_tokens=False)
    assert mine.encode(text, add_special_tokens=False) == ids
    assert mine.decode(ids) == own.decode(ids)
    assert mine.decode(ids, skip_special_tokens=True) == own.decode(ids, skip_special_tokens=True)
    assert mine.convert_ids_to_tokens(ids) == own.convert_ids_to_tokens(ids)
    tokens = own.convert_ids_to_tokens(ids)
    assert mine.convert_tokens_to_string(tokens) == own.convert_tokens_to_string(tokens)
    assert mine.get_vocab() == own.get_vocab()
    for name in light.FACTS:
        assert getattr(mine, name) == getattr(own, name, None)
    for pair in (False, True):
        assert mine.num_special_tokens_to_add(pair=pair) == own.num_special_tokens_to_add(pair=pair)
    assert mine.all_special_ids == own.all_special_ids, "what else is asked for comes from transformers"


class Wordy:
    """Stands in for transformers' own tokenizer, which takes seconds to import where it is not asked for."""

    def decode(self, ids: Any, **options: Any) -> str:
        return "cleaned up"


@pytest.mark.parametrize(
    ("architecture", "corrupts", "cleaned"),
    [("gpt2", False, False), ("gpt2", True, True), ("bert", False, True)],
)
def test_spaces_are_cleaned_up_where_transformers_would(
    architecture: str, corrupts: bool, cleaned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = AutoTokenizer.from_pretrained(tiny.folder(architecture, "base"))
    own.clean_up_tokenization_spaces = True
    own.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = corrupts
    own.save_pretrained(tmp_path)
    mine = light.LightTokenizer(tmp_path, light.facts_of(own, tmp_path) or {})
    monkeypatch.setattr(light.LightTokenizer, "_whole", Wordy())
    ids = own.encode("Angela , the mayor .", add_special_tokens=False)
    plain = mine.decode(ids, clean_up_tokenization_spaces=False)
    assert plain != "cleaned up"
    for asked in ({}, {"clean_up_tokenization_spaces": True}):
        assert mine.decode(ids, **asked) == ("cleaned up" if cleaned else plain)
    if not cleaned:
        assert plain == own.decode(ids)


def test_the_light_config_has_none_for_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"id2label": {"0": "a"}, "hidden_size": 8}')
    config = light.read_config(tmp_path)
    assert config.id2label == {0: "a"} and config.hidden_size == 8 and config.sliding_window is None


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "'model.onnx' cannot be opened by ONNX Runtime"),
        ({"task": "text-classification"}, "the program was exported for 'fill-mask'"),
        ({"provider_options": {"enable_everything": 1}}, "got 'enable_everything', expected use_arena"),
        ({"provider": "CUDAExecutionProvider"}, "but this onnxruntime has"),
        ({"dtype": "bfloat16"}, "@ parameters.extra.dtype"),
        ({"device": "mps"}, "@ parameters.extra.device"),
        ({"max_length": 10_000}, "@ parameters.extra.max_length"),
    ],
)
def test_what_is_refused_names_the_key(tmp_path: Path, settings: Any, message: str) -> None:
    import shutil

    folder = Path(shutil.copytree(tiny.folder("bert", "mask"), tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plan = Plan(Layout.LANES, tokenizer.pad_token_id, Reads.SELECTED)
    facts = light.facts_of(tokenizer, folder)
    prepared(folder, Manifest("onnx", "model.onnx", "fill-mask", plan, 128, tokenizer=facts))
    with pytest.raises(InvalidSettings) as caught:
        load(Settings(pretrained_model=str(folder), **settings))
    assert message in str(caught.value)
    assert "@ " in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("compiled_for", "settings", "message"),
    [
        (None, {}, 'expected backend="export" or trust_remote_code=true .* @ parameters.extra.backend'),
        (None, {"backend": "export"}, "cannot be read by torch.export"),
        (None, {"trust_remote_code": True}, "cannot be read by torch.export"),
        (["x"], {}, "machine code, .*compile=true or trust_remote_code=true .* @ parameters.extra.compile"),
        (["x"], {"backend": "export"}, "the folder holds machine code"),
        (["x"], {"compile": {"enable": False}}, "the folder holds machine code"),
        (["x"], {"compile": {"enable": True}}, "compiled for a CPU with x"),
        (["x"], {"trust_remote_code": True}, "compiled for a CPU with x"),
    ],
)
def test_what_runs_when_it_is_read_must_be_asked_for(
    tmp_path: Path, compiled_for: Any, settings: Any, message: str
) -> None:
    folder = prepared(
        tmp_path, Manifest("export", "model.pt2", "fill-mask", PLAN, 128, compiled_for=compiled_for)
    )
    program, asked = found(folder, **settings), Settings(pretrained_model=str(folder), **settings)
    with pytest.raises(InvalidSettings, match=message):
        open_runner(asked, program, PLAN.layout)


@pytest.mark.parametrize(("backend", "package"), [("onnx", "onnxruntime"), ("openvino", "openvino")])
def test_a_missing_extra_names_what_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: Any, package: str
) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    (tmp_path / "program").write_bytes(b"")
    with pytest.raises(InvalidSettings, match=rf"pip install 'mlserver-hftasks\[{backend}\]'"):
        if backend == "onnx":
            from mlserver_hftasks.backends.onnx import OnnxRunner

            OnnxRunner(tmp_path / "program")
        else:
            from mlserver_hftasks.backends.openvino import OpenVINORunner

            OpenVINORunner(tmp_path / "program")


def test_options_of_another_provider_are_refused() -> None:
    check_options("CUDAExecutionProvider", {"device_id": 0})
    with pytest.raises(InvalidSettings, match=r"@ parameters.extra.provider_options"):
        check_options(None, {"device_id": 0})


def test_threads_are_counted_as_torch_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert default_threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert default_threads() >= 1
