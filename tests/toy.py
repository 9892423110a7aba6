"""A small sentiment model whose relevant words are known, trained in seconds.

A text is of neutral words and of up to three words of each sentiment, at random places. The model learns the
log-odds: the number of words of one sentiment less that of the other. So each such word counts alike, and
nothing else can tell it.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

LABELS = ("NEGATIVE", "POSITIVE")
NEUTRAL = tuple(f"thing{number}" for number in range(60))
TELLING = (
    tuple(f"awful{number}" for number in range(8)),
    tuple(f"lovely{number}" for number in range(8)),
)
"""The words of each label."""
SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
STEPS, BATCH, MOST_TOKENS = 160, 32, 64


@functools.cache
def folder() -> Path:
    """The saved model. The seed is fixed."""
    path = Path(tempfile.mkdtemp(prefix="hftasks-toy-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    tokenizer = _tokenizer()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = _trained(tokenizer)
    torch.set_num_threads(threads)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def texts(count: int, seed: int, least: int = 8, most: int = 24) -> tuple[list[str], list[int]]:
    """Texts of so many words, and the log-odds of the second label."""
    draw = np.random.default_rng(seed)
    made = [_text(draw, int(draw.integers(least, most + 1))) for _ in range(count)]
    return [text for text, _ in made], [odds for _, odds in made]


def is_telling(word: str) -> bool:
    """Whether the word has a sentiment."""
    return any(word in words for words in TELLING)


def _text(draw: np.random.Generator, length: int) -> tuple[str, int]:
    words = [str(word) for word in draw.choice(NEUTRAL, length)]
    against, speaking_for = draw.integers(0, 4, 2).tolist()
    places = draw.choice(length, against + speaking_for, replace=False)
    for index, place in enumerate(places):
        words[place] = str(draw.choice(TELLING[int(index >= against)]))
    return " ".join(words), speaking_for - against


def _trained(tokenizer: PreTrainedTokenizerFast) -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=MOST_TOKENS,
        pad_token_id=tokenizer.pad_token_id,
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
    )
    model = BertForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS)
    for step in range(STEPS):
        batch, odds = texts(BATCH, seed=1000 + step)
        logits = model(**_with_masks(tokenizer, batch, step)).logits
        wanted = torch.sigmoid(torch.tensor([[-each, each] for each in odds], dtype=torch.float32))
        loss = torch.nn.functional.cross_entropy(logits, wanted)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def _with_masks(
    tokenizer: PreTrainedTokenizerFast, batch: Sequence[str], step: int
) -> dict[str, torch.Tensor]:
    """The texts with some neutral words masked, so that the mask token is nothing new to the model."""
    draw = np.random.default_rng(step)
    masked = [
        " ".join("[MASK]" if not is_telling(word) and draw.random() < 0.3 else word for word in text.split())
        for text in batch
    ]
    inputs: dict[str, torch.Tensor] = dict(tokenizer(masked, padding=True, return_tensors="pt"))
    return inputs


def _tokenizer() -> PreTrainedTokenizerFast:
    words = [*SPECIAL.values(), *NEUTRAL, *TELLING[0], *TELLING[1]]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MOST_TOKENS,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **SPECIAL,
    )
