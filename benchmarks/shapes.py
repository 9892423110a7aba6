"""Models of known shapes: random weights, a real WordPiece tokenizer, answers that differ by text."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from benchmarks import texts

VOCABULARY = 30522
"""As BERT's: the embedding table is part of a model's memory."""
MAX_TOKENS = 512
SPLIT_EVERY = 4
"""Each so many-th word is two tokens, so that a word is 1.25 tokens on average."""
LABELS = ("NEGATIVE", "POSITIVE")
SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


@dataclass(frozen=True, slots=True)
class Shape:
    """An architecture and its sizes."""

    name: str
    model_type: str
    sizes: dict[str, int]
    token_types: bool = True

    @property
    def described(self) -> str:
        """For the tables: `bert 384/6/12`."""
        hidden, layers, heads, *_ = self.sizes.values()
        return f"{self.model_type} {hidden}/{layers}/{heads}"


MINILM = Shape(
    "minilm",
    "bert",
    {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
)
DISTILBERT = Shape(
    "distilbert",
    "distilbert",
    {"dim": 768, "n_layers": 6, "n_heads": 12, "hidden_dim": 3072},
    token_types=False,
)
ONE_LAYER = Shape(
    "one-layer",
    "bert",
    {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
)
"""Next to no model: what is left is the request's own cost."""


def save(shape: Shape, root: Path) -> Path:
    """The folder of that shape's model under `root`, made if it is not there. The seed is fixed."""
    folder = root / shape.name
    if folder.is_dir():
        return folder
    tokenizer = tokenizer_of(shape)
    config = AutoConfig.for_model(
        shape.model_type,
        **shape.sizes,
        vocab_size=VOCABULARY,
        max_position_embeddings=MAX_TOKENS,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
    )
    with _seeded(11):
        model = AutoModelForSequenceClassification.from_config(config).eval()
    _spread_answers(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _spread_answers(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """Scale the classifier so that each logit has mean 0 and deviation 1 over some texts.

    As initialised it says nearly the same of every text, and a comparison of answers would prove little.
    """
    sample = tokenizer(list(texts.mixed(32)), padding=True, return_tensors="pt")
    with torch.inference_mode():
        logits = model(**sample).logits
    classifier = model.classifier
    with torch.no_grad():
        deviation = logits.std(0)
        classifier.weight.div_(deviation[:, None])
        classifier.bias.copy_((classifier.bias - logits.mean(0)) / deviation)


def tokenizer_of(shape: Shape) -> PreTrainedTokenizerFast:
    """WordPiece over the words of `texts`."""
    vocabulary = {piece: index for index, piece in enumerate(_vocabulary())}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=SPECIAL["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    types = ["token_type_ids"] if shape.token_types else []
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_TOKENS,
        model_input_names=["input_ids", *types, "attention_mask"],
        clean_up_tokenization_spaces=False,
        **SPECIAL,
    )


def _vocabulary() -> list[str]:
    """Special tokens, letters, most words whole and the others in two pieces, then unused entries."""
    whole = [word for index, word in enumerate(texts.words()) if index % SPLIT_EVERY]
    split = texts.words()[::SPLIT_EVERY]
    letters = sorted({letter for word in texts.words() for letter in word})
    pieces = [*SPECIAL.values(), *letters, *(f"##{letter}" for letter in letters), *whole]
    pieces += [word[: len(word) // 2] for word in split]
    pieces += [f"##{word[len(word) // 2 :]}" for word in split]
    known = list(dict.fromkeys(pieces))
    return known + [f"[unused{index}]" for index in range(VOCABULARY - len(known))]
