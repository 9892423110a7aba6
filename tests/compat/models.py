"""Models that both servers load: tiny, made by the older transformers, which the newer can read.

`python -m tests.compat.models FOLDER`, run by the incumbent's Python, makes them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "golden"
BUILT = HERE.parents[1] / "build" / "compat" / "models"
TOKENIZERS = {
    "bert": "BertTokenizer",
    "distilbert": "DistilBertTokenizer",
    "roberta": "RobertaTokenizer",
    "gpt2": "GPT2Tokenizer",
}
ENTITIES = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


@dataclass(frozen=True, slots=True)
class Model:
    """One model; `architecture` and `head` are names of `tests.tiny`, or the folder is there already."""

    name: str
    task: str
    architecture: Literal["bert", "distilbert", "roberta", "gpt2"] = "bert"
    head: Literal["sequence", "token", "mask", "qa", "base", "causal"] = "base"
    labels: Sequence[str] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further settings, in forms that clients of the incumbent use."""
    folder: Path | None = None
    by_uri: bool = False
    """Whether `parameters.uri` names the folder, in place of `pretrained_model`."""

    @property
    def path(self) -> Path:
        """Where the model is."""
        return self.folder or BUILT / self.name

    def parameters(self) -> dict[str, Any]:
        """The `parameters` of model-settings.json."""
        extra = {"task": self.task, **self.extra}
        if self.by_uri:
            return {"uri": str(self.path), "version": "v2", "extra": extra}
        return {"extra": {"pretrained_model": str(self.path), **extra}}


MODELS = (
    Model("sentiment", "text-classification", "distilbert", "sequence", extra={"device": -1}),
    Model(
        "topics",
        "text-classification",
        "bert",
        "sequence",
        ["art", "law", "news", "sport", "tech"],
        by_uri=True,
    ),
    Model(
        "tags",
        "text-classification",
        "roberta",
        "sequence",
        ["angry", "funny", "rude", "sad"],
        {"problem_type": "multi_label_classification"},
        {"framework": "pt", "intra_op_threads": "1"},
    ),
    Model("rating", "text-classification", "bert", "sequence", ["LABEL_0"]),
    Model("entities", "token-classification", "bert", "token", ENTITIES),
    Model("entities-roberta", "token-classification", "roberta", "token", ENTITIES, extra={"device": "cpu"}),
    Model("blanks", "fill-mask", "bert", "mask"),
    Model("blanks-roberta", "fill-mask", "roberta", "mask"),
    Model("answers", "question-answering", folder=GOLDEN / "qa_bert"),
    Model("answers-roberta", "question-answering", folder=GOLDEN / "qa_roberta", extra={"device": None}),
    Model(
        "zero-shot",
        "zero-shot-classification",
        "roberta",
        "sequence",
        ["contradiction", "neutral", "entailment"],
        extra={"optimum_model": False},
    ),
    Model("vectors", "feature-extraction", "distilbert", "base"),
    Model("stories", "text-generation", "gpt2", "causal", extra={"device": -1}),
    Model("summaries", "summarization", folder=GOLDEN / "s2s_bart"),
    Model("summaries-t5", "summarization", folder=GOLDEN / "s2s_t5"),
    Model("translations", "translation", folder=GOLDEN / "s2s_t5", extra={"task_suffix": "_en_to_fr"}),
    Model("translations-mbart", "translation", folder=GOLDEN / "s2s_mbart"),
    Model("rewrites", "text2text-generation", folder=GOLDEN / "s2s_t5"),
)


def ensure(python: Path) -> None:
    """Make the models with that Python, unless they are there. Raises `subprocess.CalledProcessError`."""
    stamp = BUILT / ".made-of"
    sources = b"".join(
        (HERE.parent / name).read_bytes() for name in ("compat/models.py", "tiny.py", "corpus.txt")
    )
    made_of = hashlib.sha256(sources).hexdigest()
    if stamp.exists() and stamp.read_text() == made_of:
        return
    print("making the models", flush=True)
    environment = {**os.environ, "USE_TF": "0", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([python, "-m", __name__, str(BUILT)], check=True, cwd=HERE.parents[1], env=environment)
    stamp.write_text(made_of)


def make(folder: Path) -> None:
    """Save the models below `folder`, with tokenizers as they are on the Hub: a class and few settings."""
    import transformers
    from tokenizers.processors import RobertaProcessing

    from tests import tiny

    for model in MODELS:
        if model.folder is not None:
            continue
        to = folder / model.name
        labels = list(model.labels) if model.labels else None
        made = tiny.folder(model.architecture, model.head, labels, **model.config)
        shutil.copytree(made, to, dirs_exist_ok=True)
        tokenizer_class = TOKENIZERS[model.architecture]
        rust = tiny.tokenizer_of(model.architecture).backend_tokenizer
        if model.architecture == "roberta":  # the published ones leave the space before a word out of it
            rust.post_processor = RobertaProcessing(
                ("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False
            )
        getattr(transformers, f"{tokenizer_class}Fast")(tokenizer_object=rust).save_pretrained(to)
        settings = {"tokenizer_class": tokenizer_class, "model_max_length": tiny.MAX_TOKENS}
        (to / "tokenizer_config.json").write_text(json.dumps(settings))


if __name__ == "__main__":
    make(Path(sys.argv[1]))
