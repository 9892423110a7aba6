"""From settings to something that serves: hub ids, folders, labels, limits, and what is refused and how."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mlserver_hftasks.errors import InvalidSettings
from mlserver_hftasks.loading import load
from mlserver_hftasks.settings import Settings
from tests import tiny

HUB_SCRIPT = """
from mlserver_hftasks.loading import load
from mlserver_hftasks.settings import Settings
served = load(Settings(pretrained_model="somebody/tiny", **{extra}))
print(served.task.name, served.task.model.labels, served.backend.description.packing)
"""


def copied(tmp_path: Path, *tiny_arguments: Any) -> Path:
    """A tiny model's folder that a test may change."""
    return Path(shutil.copytree(tiny.folder(*tiny_arguments), tmp_path / "model"))


def served_from(folder: Path, **settings: Any) -> Any:
    return load(Settings(pretrained_model=str(folder), warmup=False, **settings))


def hub_cache(home: Path, folder: Path, revision: str) -> None:
    """The files of a hub repository as huggingface_hub lays them out on disk."""
    repository = home / "hub" / "models--somebody--tiny"
    shutil.copytree(folder, repository / "snapshots" / revision)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(revision)


@pytest.mark.parametrize("extra", [{}, {"revision": "main"}])
def test_a_hub_id(tmp_path: Path, extra: dict[str, str]) -> None:
    folder = copied(tmp_path, "bert", "sequence")
    (folder / "index_to_name.json").write_text('{"0": "bad", "1": "good"}')
    hub_cache(tmp_path / "home", folder, "0123456789abcdef0123456789abcdef01234567")
    script = HUB_SCRIPT.replace("{extra}", repr(extra))
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.stdout.strip() == "text-classification ('bad', 'good') varlen", done.stderr


def test_a_model_that_is_nowhere_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InvalidSettings) as caught:
        served_from(Path("no/such-model"))
    assert "'no/such-model' cannot be loaded" in str(caught.value)
    assert str(caught.value).endswith("@ parameters.extra.pretrained_model")


@pytest.mark.parametrize(
    ("head", "task"),
    [
        ("sequence", "text-classification"),
        ("token", "token-classification"),
        ("mask", "fill-mask"),
        ("qa", "question-answering"),
        ("base", "feature-extraction"),
    ],
)
def test_a_missing_task_is_inferred(head: Any, task: str) -> None:
    assert served_from(tiny.folder("bert", head)).task.name == task


def test_a_model_of_sentence_transformers_is_an_embedding(tmp_path: Path) -> None:
    folder = copied(tmp_path, "bert", "base")
    kinds = [("Transformer", ""), ("Pooling", "1_Pooling")]
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for kind, path in kinds]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    assert served_from(folder).task.name == "sentence-embedding"


@pytest.mark.parametrize(
    ("setting", "file", "expected"),
    [
        (None, None, ("NEGATIVE", "POSITIVE")),
        (["a", "b"], {"0": "x", "1": "y"}, ("a", "b")),
        ({0: "a", 1: "b"}, None, ("a", "b")),
        (None, {"0": "x", "1": "y"}, ("x", "y")),
        (None, {"label_list": "['it\\'s', 'y']"}, ("it's", "y")),
        (None, {"label_list": ["x", "y"]}, ("x", "y")),
    ],
)
def test_labels(tmp_path: Path, setting: Any, file: Any, expected: tuple[str, ...]) -> None:
    folder = copied(tmp_path, "bert", "sequence")
    if file is not None:
        (folder / "index_to_name.json").write_text(json.dumps(file))
    assert served_from(folder, labels=setting).task.model.labels == expected


def test_dtypes(tmp_path: Path) -> None:
    folder = tiny.folder("bert", "sequence")
    assert served_from(folder).backend.description.dtype == "float32"
    assert served_from(folder, dtype="bfloat16").backend.description.dtype == "bfloat16"
    half = copied(tmp_path, "bert", "sequence")
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    assert served_from(half).backend.description.dtype == "float32", "float16 is slow on a CPU"
    assert served_from(half, dtype="float16").backend.description.dtype == "float16"


def test_the_limit_is_that_of_the_positions() -> None:
    roberta = served_from(tiny.folder("roberta", "sequence"))
    positions = roberta.task.model.config.max_position_embeddings
    assert roberta.task.model.encoder.max_tokens <= positions - 2, "RoBERTa counts from padding_idx + 1"
    assert served_from(tiny.folder("bert", "sequence"), max_length=16).task.model.encoder.max_tokens == 16


def test_lower_case_comes_before_the_tokenizers_own_normalisation() -> None:
    folder = tiny.folder("roberta", "sequence")
    encoder = served_from(folder, do_lower_case=True).task.model.encoder
    assert encoder.encode(["HELLO World"])[0].ids == encoder.encode(["hello world"])[0].ids
    plain = served_from(folder).task.model.encoder
    assert plain.encode(["HELLO World"])[0].ids != plain.encode(["hello world"])[0].ids


def test_another_tokenizer() -> None:
    served = served_from(
        tiny.folder("bert", "sequence"), pretrained_tokenizer=str(tiny.folder("distilbert", "base"))
    )
    assert "token_type_ids" not in served.task.model.encoder.tokenizer.model_input_names


def test_weights_that_are_missing_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    served_from(tiny.folder("bert", "base"), task="text-classification")
    assert "they are random, and so are its answers" in caplog.text


def test_pickled_weights_load_only_when_asked_for(tmp_path: Path) -> None:
    folder = copied(tmp_path, "bert", "sequence")
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InvalidSettings, match="use_safetensors"):
        served_from(folder)
    assert served_from(folder, model_kwargs={"use_safetensors": False}).task.name == "text-classification"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "text-classificaton"}, "did you mean 'text-classification'? @ task"),
        ({"device": "tpu:x"}, '"cuda:1" or "mps" @ parameters.extra.device'),
        ({"device": 7, "task": "ner"}, "@ parameters.extra.device"),
        ({"labels": ["a"]}, "expected them for 0..1 @ parameters.extra.labels"),
        ({"max_length": 10**6}, "the model takes no more @ parameters.extra.max_length"),
        ({"max_length": 1}, "got 1, expected 5.."),
        ({"pretrained_tokenizer": "no/tokenizer"}, "@ parameters.extra.pretrained_tokenizer"),
        ({"model_kwargs": {"attn_implementation": "nonsense"}}, "cannot be loaded"),
    ],
)
def test_what_is_refused_names_the_key(settings: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if torch.cuda.is_available() and "device" in settings:
        pytest.skip("there is such a device")
    with pytest.raises(InvalidSettings) as caught:
        served_from(tiny.folder("bert", "sequence"), **settings)
    assert message in str(caught.value)


def test_a_model_without_its_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = copied(tmp_path, "bert", "sequence")
    for path in folder.iterdir():
        if path.name not in {"config.json", "model.safetensors"}:
            path.unlink()
    with pytest.raises(InvalidSettings, match="no tokenizer files"):
        served_from(folder)


def test_a_bad_label_file_is_named(tmp_path: Path) -> None:
    folder = copied(tmp_path, "bert", "sequence")
    (folder / "index_to_name.json").write_text("[1")
    with pytest.raises(InvalidSettings, match=r"@ index_to_name\.json"):
        served_from(folder)
