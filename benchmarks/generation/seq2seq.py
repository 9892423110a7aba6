"""A translator of Marian's shape: one text after another, batches of `generate()`, and the incumbent."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, GenerationConfig

from benchmarks import load, texts, v2
from benchmarks.report import Figure, Findings, Table, number
from benchmarks.rounds import Spread, ratios, take_turns
from benchmarks.server import running
from benchmarks.session import Session
from benchmarks.shapes import Shape, tokenizer_of
from benchmarks.versus.fleet import as_shared
from benchmarks.versus.systems import FP32, PLAIN, System
from mlserver_hftasks.engine.rows import Decoding, Row
from mlserver_hftasks.generation.generate import GenerateBackend
from mlserver_hftasks.generation.keys import GenerateKey

MARIAN = Shape(
    "marian",
    "marian",
    {
        "d_model": 512,
        "encoder_layers": 6,
        "encoder_attention_heads": 8,
        "decoder_layers": 3,
        "decoder_attention_heads": 8,
        "encoder_ffn_dim": 2048,
        "decoder_ffn_dim": 2048,
    },
    token_types=False,
)
NEW_TOKENS = 16
MOST_TOKENS = 512
BEAMS = (1, 4)
CLIENTS, BATCH = 16, 16
ONE_BY_ONE, BATCHED, OURS, INCUMBENT = 6, 32, 32, 8
"""Texts of each system per round."""
LIMIT_S = 240.0
AGAINST_ONE, AGAINST_INCUMBENT = 2.0, 2.0


def measure(session: Session) -> Findings:
    """Texts per second with and without beams."""
    findings = Findings()
    for beams in BEAMS:
        folder = folder_of(session, beams)
        findings.add(_in_process(session, folder, beams))
        findings.add(_served(session, as_shared(folder), beams))
    return findings


def folder_of(session: Session, beams: int) -> Path:
    """The model's folder, made at first use. All answers have the same length: its weights are random."""
    folder = session.models / f"generation-{MARIAN.name}-{beams}"
    if folder.is_dir():
        return folder
    tokenizer = tokenizer_of(MARIAN)
    pad, end = tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids("[SEP]")
    special = {"pad_token_id": pad, "eos_token_id": end, "decoder_start_token_id": pad}
    config = AutoConfig.for_model(
        MARIAN.model_type,
        **MARIAN.sizes,
        vocab_size=len(tokenizer),
        max_position_embeddings=MOST_TOKENS,
        forced_eos_token_id=end,
        **special,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = AutoModelForSeq2SeqLM.from_config(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    length = NEW_TOKENS + 1  # the first token of all counts
    GenerationConfig(
        **special, num_beams=beams, max_length=length, min_length=length, forced_eos_token_id=end
    ).save_pretrained(folder)
    return folder


# -- in process ----------------------------------------------------------------------------------


def _in_process(session: Session, folder: Path, beams: int) -> Findings:
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(folder)
    tokenizer = tokenizer_of(MARIAN)
    backend = GenerateBackend(
        model, device=torch.device("cpu"), pad_token_id=tokenizer.pad_token_id, decode=tokenizer.decode
    )
    rows = [_row(tokenizer(text)["input_ids"], beams) for text in texts.mixed(BATCHED)]
    systems = {
        "one after another": partial(_rate, backend, rows[:ONE_BY_ONE], 1),
        f"batches of {BATCH}": partial(_rate, backend, rows, BATCH),
    }
    runs = take_turns(session.plan.few_rounds, systems, session.tell)
    for name, each in runs.items():
        for index, rate in enumerate(each):
            session.journal.record(
                "seq2seq-in-process",
                name,
                shape=MARIAN.described,
                beams=beams,
                round=index,
                texts_per_s=rate,
            )
    one, batched = runs["one after another"], runs[f"batches of {BATCH}"]
    return Findings(
        [
            Figure(
                f"batches of {BATCH} against one after another, texts/s ({_name(beams)})",
                Spread.of(ratios(batched, one)),
                at_least=AGAINST_ONE,
                detail=f"{_shown(batched)} against {_shown(one)} texts/s, {NEW_TOKENS} new tokens each",
            )
        ]
    )


def _row(ids: Sequence[int], beams: int) -> Row:
    key = GenerateKey.of({"num_beams": beams})
    return Row(
        {"input_ids": np.array(ids, dtype=np.int64)}, key, decoding=Decoding(NEW_TOKENS, NEW_TOKENS, beams)
    )


def _rate(backend: GenerateBackend, rows: Sequence[Row], size: int) -> float:
    began = time.perf_counter()
    for start in range(0, len(rows), size):
        backend.forward(rows[start : start + size])
    return len(rows) / (time.perf_counter() - began)


# -- over a server -------------------------------------------------------------------------------


def _served(session: Session, folder: Path, beams: int) -> Findings:
    name = folder.name

    def server(system: System) -> Any:
        return running(system.model(name, folder, "translation"), **system.server_options())

    with server(FP32) as ours, server(PLAIN) as incumbent:
        target, other = (
            v2.Texts(each.host, each.port, name, texts.mixed(BATCHED)) for each in (ours, incumbent)
        )
        systems = {
            f"ours, {CLIENTS} clients": partial(_load, target, CLIENTS, OURS),
            "ours, one client": partial(_load, target, 1, ONE_BY_ONE),
            f"incumbent, {CLIENTS} clients": partial(_load, other, CLIENTS, INCUMBENT),
            "incumbent, one client": partial(_load, other, 1, ONE_BY_ONE),
        }
        systems[f"ours, {CLIENTS} clients"]()
        runs = take_turns(session.plan.few_rounds, systems, session.tell)
    rates = {system: [run.per_second for run in each] for system, each in runs.items()}
    faults = [
        sum(run.faults for name, each in runs.items() if name.startswith(who) for run in each)
        for who in ("ours", "incumbent")
    ]
    for system, each in rates.items():
        for index, rate in enumerate(each):
            session.journal.record(
                "seq2seq-served", system, shape=MARIAN.described, beams=beams, round=index, texts_per_s=rate
            )
    seen = f"faults: {faults[0]} and {faults[1]}"
    many = [rates[f"{who}, {CLIENTS} clients"] for who in ("ours", "incumbent")]
    single = [rates[f"{who}, one client"] for who in ("ours", "incumbent")]
    return Findings(
        [
            Figure(
                f"{CLIENTS} clients against mlserver-huggingface, texts/s ({_name(beams)})",
                Spread.of(ratios(*many)),
                at_least=AGAINST_INCUMBENT,
                detail=f"{_shown(many[0])} against {_shown(many[1])} texts/s; {seen}",
            ),
            Figure(
                f"one client against mlserver-huggingface, texts/s ({_name(beams)})",
                Spread.of(ratios(*single)),
                detail=f"{_shown(single[0])} against {_shown(single[1])} texts/s",
            ),
        ],
        [
            Table(
                f"Translation served, texts/s ({MARIAN.described}, {_name(beams)})",
                list(rates),
                [[_shown(each) for each in rates.values()]],
            )
        ],
    )


def _load(target: v2.Texts, clients: int, counted: int) -> load.Load:
    return load.run(load.closed_loop(target, clients, counted, limit_s=LIMIT_S))


def _shown(rates: Sequence[float]) -> str:
    return number(Spread.of(rates).median)


def _name(beams: int) -> str:
    return f"translation, {beams} beams" if beams > 1 else "translation, greedy"
