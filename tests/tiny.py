"""Tiny models of real architectures, with real tokenizers trained on `corpus.txt`, saved as folders.

Weights are random but seeded, and large, so that different texts get clearly different outputs. A folder is
made once per process and removed at its end.
"""

from __future__ import annotations

import atexit
import copy
import functools
import hashlib
import json
import math
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoConfig, PreTrainedTokenizerFast

HeadName = Literal["sequence", "token", "mask", "qa", "base", "causal", "seq2seq"]

CORPUS = Path(__file__).with_name("corpus.txt")
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['user', 'assistant', 'system'] %}"
    "{{ raise_exception('roles are user and assistant') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
MAX_TOKENS = 128
"""The longest text that any of the models takes."""

AUTO_CLASSES = {
    "sequence": "AutoModelForSequenceClassification",
    "token": "AutoModelForTokenClassification",
    "mask": "AutoModelForMaskedLM",
    "qa": "AutoModelForQuestionAnswering",
    "base": "AutoModel",
    "causal": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
}
GENERATING = ("causal", "seq2seq")
DEFAULT_LABELS = {"sequence": ("NEGATIVE", "POSITIVE"), "token": ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")}

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": MAX_TOKENS,
}


@dataclass(frozen=True)
class Family:
    """How an architecture is made small: its tokenizer, its heads and its config."""

    tokenizer: str
    config: dict[str, Any]
    token_types: bool = False
    heads: tuple[HeadName, ...] = ("sequence", "token", "mask", "qa", "base")
    """Those that run in one pass; all of an architecture's others can be had too."""
    start: Literal["eos_token_id", "pad_token_id"] | None = None
    """The first token of a decoder that follows an encoder."""


_OFFSET = {**SIZES, "max_position_embeddings": MAX_TOKENS + 2}
"""Positions that count from padding_idx + 1."""
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_inner": 64, "n_positions": MAX_TOKENS}
_ROPE = {**SIZES, "head_dim": 16}
_BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": MAX_TOKENS,
}

FAMILIES: dict[str, Family] = {
    "bert": Family("bert", {**SIZES, "type_vocab_size": 2}, token_types=True),
    "distilbert": Family(
        "bert",
        {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": MAX_TOKENS},
    ),
    "roberta": Family("roberta", {**_OFFSET, "type_vocab_size": 1}),
    "xlm-roberta": Family("xlm-roberta", {**_OFFSET, "type_vocab_size": 1}),
    "camembert": Family("xlm-roberta", {**_OFFSET, "type_vocab_size": 1}),
    "electra": Family("bert", {**SIZES, "embedding_size": 16}, token_types=True),
    "mpnet": Family("mpnet", _OFFSET),
    "albert": Family("albert", {**SIZES, "embedding_size": 16}, token_types=True),
    "modernbert": Family("modernbert", {**SIZES, "num_hidden_layers": 4, "local_attention": 16}),
    "deberta-v2": Family(
        "bert",
        {
            **SIZES,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
            "share_att_key": True,
            "position_buckets": 32,
            "norm_rel_ebd": "layer_norm",
            "type_vocab_size": 0,
        },
        token_types=True,
    ),
    "nomic_bert": Family("bert", SIZES, token_types=True, heads=("sequence", "token", "mask", "base")),
    "ernie": Family("bert", {**SIZES, "use_task_id": True, "task_type_vocab_size": 3}, token_types=True),
    "gpt2": Family("gpt2", _GPT2, heads=("sequence", "token", "base")),
    "llama": Family("llama", {**_ROPE, "num_key_value_heads": 1}, heads=("sequence", "token", "base")),
    "eurobert": Family(
        "eurobert", {**_ROPE, "num_key_value_heads": 1}, heads=("sequence", "token", "mask", "base")
    ),
    "bart": Family("roberta", _BART, heads=("sequence",), start="eos_token_id"),
    "mbart": Family("mbart", {**_BART, "scale_embedding": True}, heads=(), start="eos_token_id"),
    "m2m_100": Family("mbart", {**_BART, "scale_embedding": True}, heads=(), start="eos_token_id"),
    "marian": Family("t5", {**_BART, "scale_embedding": True}, heads=(), start="pad_token_id"),
    "t5": Family(
        "t5",
        {
            "d_model": 32,
            "d_kv": 16,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 2,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 32,
        },
        heads=(),
        start="pad_token_id",
    ),
}
SEQ2SEQ = tuple(name for name, family in FAMILIES.items() if family.start)
"""Encoders with a decoder: the head `seq2seq`."""


def folder(architecture: str, head: HeadName, labels: Sequence[str] | None = None, **config: Any) -> Path:
    """A saved model: config, safetensors and tokenizer. `config` overrides the family's own.

    `labels` name the outputs of the heads `sequence` and `token`. The folder is shared: do not write to it.
    """
    chosen = labels if labels is not None else DEFAULT_LABELS.get(head)
    return _folder(architecture, head, tuple(chosen) if chosen else None, json.dumps(config, sort_keys=True))


@functools.cache
def _folder(architecture: str, head: HeadName, labels: tuple[str, ...] | None, overrides: str) -> Path:
    name = hashlib.sha256(repr((labels, overrides)).encode()).hexdigest()[:8]
    path = _root() / f"{architecture}-{head}-{name}"
    tokenizer = tokenizer_of(architecture)
    config = _config(architecture, head, tokenizer, labels, json.loads(overrides))
    torch_state = torch.random.get_rng_state()
    model = getattr(transformers, AUTO_CLASSES[head]).from_config(config)
    torch.random.set_rng_state(torch_state)
    fill_weights(model, seed=zlib.crc32(f"{architecture}-{head}".encode()))
    if head in GENERATING:
        _make_talkative(model, tokenizer.eos_token_id)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@functools.cache
def chat_tokenizer(architecture: str) -> Path:
    """A folder with the family's tokenizer and a chat template."""
    path = _root() / f"{architecture}-chat"
    tokenizer = copy.deepcopy(tokenizer_of(architecture))
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(path)
    return path


@functools.cache
def _root() -> Path:
    path = tempfile.mkdtemp(prefix="hftasks-tiny-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return Path(path)


def _config(
    architecture: str,
    head: HeadName,
    tokenizer: PreTrainedTokenizerFast,
    labels: tuple[str, ...] | None,
    overrides: dict[str, Any],
) -> Any:
    special: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id}
    for name in {"modernbert": ("bos", "eos", "cls", "sep"), "eurobert": ("bos", "eos", "mask")}.get(
        architecture, ("bos", "eos")
    ):
        special[f"{name}_token_id"] = getattr(tokenizer, f"{name}_token_id")
    if start := FAMILIES[architecture].start:
        special["decoder_start_token_id"] = getattr(tokenizer, start)
    if architecture in ("bart", "mbart", "marian"):
        special["forced_eos_token_id"] = tokenizer.eos_token_id
    if head in GENERATING:
        special["tie_word_embeddings"] = False  # else a token is followed by itself
    names: dict[str, Any] = {}
    if labels:
        names = {
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
        }
    values = {**FAMILIES[architecture].config, "vocab_size": len(tokenizer), **special, **names, **overrides}
    return AutoConfig.for_model(architecture, **values)


def fill_weights(model: torch.nn.Module, seed: int) -> None:
    """Weights that do not depend on how a version of transformers initialises them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim >= 2:
                weight.copy_(0.3 * noise)
            elif name.endswith("weight"):  # of a normalisation
                weight.copy_(1 + 0.1 * noise)
            else:
                weight.copy_(0.1 * noise)


def _make_talkative(model: Any, eos_token_id: int) -> None:
    """Answers that hang on the tokens before, and end now and then, so that they differ in length."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("attn.out_proj.weight"):
                weight.mul_(0.3)  # what is attended to is much the same at every step
        model.get_output_embeddings().weight[eos_token_id].mul_(2)


# -- tokenizers ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Style:
    algorithm: Literal["wordpiece", "bpe", "unigram"]
    tokens: dict[str, str | AddedToken]
    """Special tokens by the name of their setting; the ids follow their order."""
    single: str
    pair: str


_BERT_TOKENS: dict[str, str | AddedToken] = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
_ROBERTA_TOKENS: dict[str, str | AddedToken] = {
    "bos_token": "<s>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "mask_token": AddedToken("<mask>", lstrip=True, normalized=False, special=True),
    "cls_token": "<s>",
    "sep_token": "</s>",
}
_LLAMA_TOKENS: dict[str, str | AddedToken] = {
    "bos_token": "<|begin_of_text|>",
    "eos_token": "<|end_of_text|>",
    "pad_token": "<|pad|>",
}

_STYLES = {
    "bert": _Style("wordpiece", _BERT_TOKENS, "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"),
    "mpnet": _Style("wordpiece", _ROBERTA_TOKENS, "<s> $A </s>", "<s> $A </s> </s> $B </s>"),
    "albert": _Style(
        "unigram",
        {**_BERT_TOKENS, "pad_token": "<pad>", "unk_token": "<unk>"},
        "[CLS] $A [SEP]",
        "[CLS] $A [SEP] $B:1 [SEP]:1",
    ),
    "roberta": _Style("bpe", _ROBERTA_TOKENS, "<s> $A </s>", "<s> $A </s> </s> $B </s>"),
    "xlm-roberta": _Style("unigram", _ROBERTA_TOKENS, "<s> $A </s>", "<s> $A </s> </s> $B </s>"),
    "t5": _Style(
        "unigram",
        {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
        "$A </s>",
        "$A </s> $B </s>",
    ),
    "modernbert": _Style("bpe", _BERT_TOKENS, "[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]"),
    "gpt2": _Style(
        "bpe",
        dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
        "$A",
        "$A $B",
    ),
    "llama": _Style(
        "bpe", _LLAMA_TOKENS, "<|begin_of_text|> $A", "<|begin_of_text|> $A <|begin_of_text|> $B"
    ),
    "eurobert": _Style(
        "bpe",
        {**_LLAMA_TOKENS, "mask_token": "<|mask|>"},
        "<|begin_of_text|> $A <|end_of_text|>",
        "<|begin_of_text|> $A <|end_of_text|> $B <|end_of_text|>",
    ),
}


@functools.cache
def tokenizer_of(architecture: str) -> PreTrainedTokenizerFast:
    """The family's tokenizer. Shared: do not change its settings."""
    family = FAMILIES[architecture]
    if family.tokenizer == "mbart":
        return _multilingual()
    style = _STYLES[family.tokenizer]
    types = ["token_type_ids"] if family.token_types else []
    return PreTrainedTokenizerFast(
        tokenizer_object=_trained(family.tokenizer),
        model_max_length=MAX_TOKENS,
        model_input_names=["input_ids", *types, "attention_mask"],
        clean_up_tokenization_spaces=False,
        **style.tokens,
    )


@functools.cache
def _trained(name: str) -> Tokenizer:
    style = _STYLES[name]
    special = list(dict.fromkeys(str(token) for token in style.tokens.values()))
    tokenizer = {"wordpiece": _wordpiece, "bpe": _bpe, "unigram": _unigram}[style.algorithm](style, special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=style.single,
        pair=style.pair,
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in special],
    )
    return tokenizer


def _pieces(words: Counter[str], mark: str) -> list[tuple[str, int]]:
    """Pieces of words and how often they occur: all letters, then the most frequent beginnings and insides.

    `mark` goes before an inside. The trainers of `tokenizers` for WordPiece and Unigram break ties at
    random; this gives the same vocabulary every time.
    """
    count: Counter[str] = Counter()
    for word, times in words.items():
        begins = {word[:size] for size in (1, 2, 3, 4)} | {word}
        insides = {word[start:end] for start in range(1, len(word)) for end in range(start + 1, start + 4)}
        count.update(dict.fromkeys(begins | {mark + inside for inside in insides}, times))
    letters = {mark_or_not + letter for word in words for letter in word for mark_or_not in ("", mark)}
    order = sorted(count, key=lambda piece: (-count[piece], piece))
    return [(piece, max(count[piece], 1)) for piece in dict.fromkeys([*sorted(letters), *order[:600]])]


def _multilingual() -> PreTrainedTokenizerFast:
    """mBART's own class, which knows languages by codes such as en_XX."""
    lines = CORPUS.read_text(encoding="utf-8").splitlines()
    splitter = pre_tokenizers.Metaspace()
    pieces = _pieces(Counter(word for line in lines for word, _ in splitter.pre_tokenize_str(line)), "")
    special = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    vocabulary = [*special, *_scored(pieces)]
    return transformers.MBartTokenizer(vocab=vocabulary, model_max_length=MAX_TOKENS)


def _scored(pieces: Sequence[tuple[str, int]]) -> list[tuple[str, float]]:
    total = sum(times for _, times in pieces)
    return [(piece, math.log(times / total)) for piece, times in pieces]


def _wordpiece(style: _Style, special: list[str]) -> Tokenizer:
    normalizer = normalizers.BertNormalizer(lowercase=True)
    splitter = pre_tokenizers.BertPreTokenizer()
    text = normalizer.normalize_str(CORPUS.read_text(encoding="utf-8"))
    words = Counter(word for word, _ in splitter.pre_tokenize_str(text))
    vocabulary = [*special, *(piece for piece, _ in _pieces(words, "##"))]
    ids = {piece: index for index, piece in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token=style.tokens["unk_token"]))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(special)
    return tokenizer


def _unigram(style: _Style, special: list[str]) -> Tokenizer:
    splitter = pre_tokenizers.Metaspace()
    lines = CORPUS.read_text(encoding="utf-8").splitlines()
    pieces = _pieces(Counter(word for line in lines for word, _ in splitter.pre_tokenize_str(line)), "")
    unknown = special.index(str(style.tokens["unk_token"]))
    vocabulary = [*((token, 0.0) for token in special), *_scored(pieces)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unknown, False))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer, tokenizer.decoder = splitter, decoders.Metaspace()
    tokenizer.add_special_tokens(special)
    return tokenizer


def _bpe(style: _Style, special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train([str(CORPUS)], trainer)
    return tokenizer
