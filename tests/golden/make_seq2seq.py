"""Regenerate the golden reference for summarization, translation and text2text-generation.

transformers 5 has none of these pipelines.  Ours have to give the results that
transformers 4.41.2 gave, the newest that mlserver-huggingface runs on, so this
script records what its pipelines return for tiny models that it also builds:

* ``s2s_bart/``    byte-level BPE, beams and lengths in generation_config.json,
                   as those of the models that summarize news
* ``s2s_t5/``      Unigram, prefixes and lengths in task_specific_params
* ``s2s_mbart/``   Unigram, languages such as ``en_XX``
* ``s2s_m2m/``     SentencePiece, languages such as ``en``
* ``seq2seq.json``   a list of ``{"model", "task", "inputs", "parameters",
  "expected"}``; call the pipeline of ``task`` over ``model`` with ``inputs`` and
  ``parameters`` and ``expected`` must come out.

To regenerate, in a scratch virtual environment (never in the project's own,
which has transformers 5), from the root of the repository::

    python -m venv SCRATCH
    SCRATCH/bin/pip install "torch>=2.13,<2.14" sentencepiece protobuf
    SCRATCH/bin/pip install "transformers==4.41.2" "numpy<2"
    SCRATCH/bin/python -m tests.golden.make_seq2seq

Add ``--keep-models`` to record the cases anew for the model folders that are
already there.

A case is only kept when its result survives noise of 1e-4 on the logits, so
that the file holds for any machine.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from tests import tiny

HERE = Path(__file__).resolve().parent
NOISE = 1e-4

SHORT = "The harbour was quiet."
MEDIUM = "Anna Keller opened the shutters of the river museum in Berlin, and two ferries left for Morrow."
LONG = f"{MEDIUM} It was 6:45 and nobody had paid for the coffee yet. The mayor met Dr. O'Neill."
UNICODE = "Zürich → Genève 東京 привет 🎉 naïve"
SPACES = "  Two   ferries  left \n for\tMorrow ,  at 6:45 !! "
TEXTS = (SHORT, MEDIUM, LONG, UNICODE, SPACES)
TOO_LONG = MEDIUM * 12

T5_TASKS = {
    "summarization": {
        "early_stopping": True,
        "length_penalty": 2.0,
        "max_length": 24,
        "min_length": 6,
        "no_repeat_ngram_size": 3,
        "num_beams": 4,
        "prefix": "summarize: ",
    },
    "translation_en_to_de": {
        "early_stopping": True,
        "max_length": 18,
        "num_beams": 4,
        "prefix": "translate English to German: ",
    },
    "translation_en_to_fr": {
        "early_stopping": True,
        "max_length": 30,
        "num_beams": 2,
        "prefix": "translate English to French: ",
    },
}
BART_GENERATION = {
    "num_beams": 3,
    "length_penalty": 1.4,
    "max_length": 26,
    "min_length": 9,
    "no_repeat_ngram_size": 3,
    "early_stopping": True,
    "forced_bos_token_id": 0,
    "forced_eos_token_id": 2,
}

# -------------------------------------------------------------------- models


def build(architecture: str, tokenizer: Any, folder: Path, **config: Any) -> None:
    """A model with that tokenizer. Embeddings are tied, as those that both versions load have them."""
    special = {
        name: getattr(tokenizer, name)
        for name in ("bos_token_id", "pad_token_id", "eos_token_id")
        if getattr(tokenizer, name) is not None
    }
    start = tokenizer.pad_token_id if architecture == "t5" else tokenizer.eos_token_id
    values = {**tiny.FAMILIES[architecture].config, "vocab_size": len(tokenizer), **special, **config}
    made = transformers.AutoConfig.for_model(architecture, decoder_start_token_id=start, **values)
    model = transformers.AutoModelForSeq2SeqLM.from_config(made)
    tiny.fill_weights(model, seed=len(architecture))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("fc2.weight", "wo.weight")):
                weight.mul_(4)  # else a token is followed by itself, since the embeddings are tied
            elif name.endswith("attn.out_proj.weight"):
                weight.mul_(0.3)
        model.get_output_embeddings().weight[tokenizer.eos_token_id].mul_(1.7)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder, safe_serialization=True)
    (folder / "model.safetensors").chmod(0o644)


def build_bart(folder: Path) -> None:
    rust = tiny.tokenizer_of("bart").backend_tokenizer
    tokenizer = transformers.BartTokenizerFast(tokenizer_object=rust, model_max_length=tiny.MAX_TOKENS)
    build("bart", tokenizer, folder)
    # A new one: version 4 does not heed a file that says of itself that it was derived from config.json.
    special = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    transformers.GenerationConfig(**BART_GENERATION, **special).save_pretrained(folder)


def build_t5(folder: Path) -> None:
    rust = unigram(["<pad>", "</s>", "<unk>"])
    rust.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = transformers.T5TokenizerFast(
        tokenizer_object=rust, extra_ids=0, model_max_length=tiny.MAX_TOKENS
    )
    build("t5", tokenizer, folder, task_specific_params=T5_TASKS)


def build_mbart(folder: Path) -> None:
    rust = unigram(["<s>", "<pad>", "</s>", "<unk>"])
    tokenizer = transformers.MBartTokenizerFast(tokenizer_object=rust, model_max_length=tiny.MAX_TOKENS)
    build("mbart", tokenizer, folder)


def unigram(special: list[str]) -> Tokenizer:
    """Pieces and white space as SentencePiece has them; special tokens come first, the unknown one last."""
    pieces = json.loads(tiny.tokenizer_of("t5").backend_tokenizer.to_str())["model"]["vocab"][3:]
    vocabulary = [*((token, 0.0) for token in special), *map(tuple, pieces)]
    made = Tokenizer(models.Unigram(vocabulary, len(special) - 1, False))
    space = {"replacement": "▁", "prepend_scheme": "always", "split": True}
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**space)]
    )
    made.decoder = decoders.Metaspace(**space)
    return made


def build_m2m(folder: Path) -> None:
    import sentencepiece

    with tempfile.TemporaryDirectory() as scratch:
        sentencepiece.SentencePieceTrainer.train(
            input=str(tiny.CORPUS), model_prefix=f"{scratch}/spm", vocab_size=300, minloglevel=2,
            bos_id=0, pad_id=1, eos_id=2, unk_id=3, hard_vocab_limit=False, num_threads=1,
            normalization_rule_name="identity",
        )  # fmt: skip
        model = sentencepiece.SentencePieceProcessor(model_file=f"{scratch}/spm.model")
        vocabulary = {model.id_to_piece(index): index for index in range(model.get_piece_size())}
        Path(scratch, "vocab.json").write_text(json.dumps(vocabulary))
        tokenizer = transformers.M2M100Tokenizer(
            f"{scratch}/vocab.json", f"{scratch}/spm.model", model_max_length=tiny.MAX_TOKENS
        )
        languages = tokenizer.encoder_size + len(tokenizer.lang_code_to_id)
        build("m2m_100", tokenizer, folder, vocab_size=languages)


MODELS = {"s2s_bart": build_bart, "s2s_t5": build_t5, "s2s_mbart": build_mbart, "s2s_m2m": build_m2m}

# --------------------------------------------------------------------- cases


def case(model: str, task: str, inputs: Any, **parameters: Any) -> dict[str, Any]:
    return {"model": model, "task": task, "inputs": inputs, "parameters": parameters}


def common_cases(model: str, task: str, **fixed: Any) -> Iterator[dict[str, Any]]:
    """What all three pipelines take."""
    parameters: list[dict[str, Any]] = [
        {},
        {"max_length": 9, "min_length": 0},
        {"max_new_tokens": 5, "min_length": 0},
        {"min_length": 12, "max_length": 20},
        {"min_new_tokens": 11, "max_new_tokens": 15},
        {"num_beams": 1},
        {"num_beams": 1, "no_repeat_ngram_size": 0, "repetition_penalty": 1.6},
        {"num_beams": 5, "early_stopping": False, "length_penalty": 0.3},
        {"num_beams": 4, "num_return_sequences": 3},
        {"num_beams": 3, "early_stopping": "never", "length_penalty": 2.0},
        {"num_beams": 2, "no_repeat_ngram_size": 1},
        {"bad_words_ids": [[60], [70, 71]], "suppress_tokens": [80, 81, 82]},
        {"return_tensors": True},
        {"return_tensors": True, "num_beams": 3, "num_return_sequences": 2},
        {"clean_up_tokenization_spaces": True},
        {"truncation": True},
        {"truncation": "only_first", "return_text": True},
    ]
    for more in parameters:
        for text in TEXTS if not more else (MEDIUM, UNICODE):
            yield case(model, task, text, **{**fixed, **more})
    yield case(model, task, TOO_LONG, truncation=True, **fixed)
    yield case(model, task, [SHORT], **fixed)
    yield case(model, task, list(TEXTS), **fixed)
    yield case(model, task, [MEDIUM, SHORT], num_beams=2, num_return_sequences=2, **fixed)
    yield case(model, task, [MEDIUM, SHORT], return_tensors=True, **fixed)


def make_cases() -> Iterator[dict[str, Any]]:
    yield from common_cases("s2s_bart", "summarization")
    yield from common_cases("s2s_bart", "text2text-generation", min_length=0)
    yield from common_cases("s2s_t5", "summarization")
    yield from common_cases("s2s_t5", "text2text-generation")
    yield from common_cases("s2s_t5", "translation_en_to_fr")
    for task in ("translation", "translation_en_to_de"):
        for text in TEXTS:
            yield case("s2s_t5", task, text)
    yield case("s2s_t5", "translation_ro_to_de", MEDIUM)  # of which the config says nothing
    yield from common_cases("s2s_mbart", "translation", src_lang="en_XX", tgt_lang="de_DE")
    yield from common_cases("s2s_m2m", "translation_en_to_fr")
    for pair in (("en", "de"), ("de", "en"), ("zh", "fr")):
        for text in TEXTS:
            yield case("s2s_m2m", "translation", text, src_lang=pair[0], tgt_lang=pair[1])
            yield case("s2s_m2m", "translation_ro_to_ru", text, src_lang=pair[0], tgt_lang=pair[1])


# ----------------------------------------------------------------- recording


@contextlib.contextmanager
def noise(model: torch.nn.Module, seed: int) -> Iterator[None]:
    generator = torch.Generator().manual_seed(seed)

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        output["logits"] = output["logits"] + NOISE * torch.randn(output["logits"].shape, generator=generator)
        return output

    handle = model.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list) else value


def record(pipe: Any, case: dict[str, Any]) -> tuple[Any, bool]:
    """The pipeline's result, and whether noise leaves it as it is."""

    def call() -> Any:
        return plain(pipe(case["inputs"], **case["parameters"]))

    expected = call()
    for seed in range(3):
        with noise(pipe.model, seed):
            if call() != expected:
                return expected, False
    return expected, True


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--keep-models", action="store_true")
    options = parser.parse_args()
    if transformers.__version__ != "4.41.2":
        raise SystemExit(f"needs transformers 4.41.2, not {transformers.__version__}")
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    if not options.keep_models:
        for name, make in MODELS.items():
            shutil.rmtree(HERE / name, ignore_errors=True)
            (HERE / name).mkdir()
            make(HERE / name)
    golden, unsteady = [], 0
    pipeline = functools.cache(
        lambda task, model: transformers.pipeline(task, model=str(HERE / model), device="cpu")
    )
    for each in make_cases():
        pipe = pipeline(each["task"], each["model"])
        expected, steady = record(pipe, each)
        unsteady += not steady
        if steady:
            golden.append({**each, "expected": expected})
    text = ",\n".join(json.dumps(each, ensure_ascii=False) for each in golden)
    (HERE / "seq2seq.json").write_text(f"[\n{text}\n]\n", encoding="utf-8")
    print(f"{len(golden)} cases; {unsteady} left out, which were too close to call")


if __name__ == "__main__":
    main()
