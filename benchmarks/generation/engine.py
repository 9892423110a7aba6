"""In process, one model thread: one request after another, static batches, the engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.generation.work import CLIENTS, SHAPES, Ask, asks, folder_of, total
from benchmarks.report import Figure, Findings, Table, number
from benchmarks.rounds import Spread, ratios, take_turns
from benchmarks.session import Session
from benchmarks.shapes import Shape
from mlserver_hftasks.engine.generator import Generator
from mlserver_hftasks.engine.sequences import Prompt, Stepper
from mlserver_hftasks.engine.steps import StepLimits, StepScheduler
from mlserver_hftasks.loading.decoder import decoder_of

AGAINST_ONE, AGAINST_STATIC, ALONE = 4.0, 1.3, 0.9
STATIC_SIZES = (4, 8, 16)
CACHE_TOKENS = 8192
ONE_BY_ONE, STATIC, OURS, SINGLE = 6, 16, 48, 6
"""Requests of each system per round."""

Run = tuple[float, list[list[int]]]
"""Useful tokens per second, and the answers."""


def measure(session: Session) -> Findings:
    """Tokens per second of each system, for each shape."""
    findings = Findings()
    for shape in SHAPES:
        findings.add(_measure(session, shape))
    return findings


def _measure(session: Session, shape: Shape) -> Findings:
    folder = folder_of(session, shape)
    model, ours = _plain(folder), _ours(folder)
    work = asks(OURS)
    systems: dict[str, Callable[[], Run]] = {
        "one after another": partial(_one_by_one, model, work[:ONE_BY_ONE]),
        **{f"static batches of {n}": partial(_static, model, work[:STATIC], n) for n in STATIC_SIZES},
        f"ours, {CLIENTS} clients": partial(_engine, ours, work, CLIENTS),
        "ours, one client": partial(_engine, ours, work[:SINGLE], 1),
    }
    _static(model, work[:2], 2)  # allocators settle
    _engine(ours, work[:4], 2)
    runs = take_turns(session.plan.few_rounds, systems, session.tell)
    rates = {name: [rate for rate, _ in each] for name, each in runs.items()}
    for name, each in rates.items():
        for index, rate in enumerate(each):
            session.journal.record(
                "generation-engine", name, shape=shape.described, round=index, tokens_per_s=rate
            )
    static = [
        max(each) for each in zip(*(rates[f"static batches of {n}"] for n in STATIC_SIZES), strict=True)
    ]
    together, one = rates[f"ours, {CLIENTS} clients"], rates["one after another"]
    figures = [
        Figure(
            f"{CLIENTS} clients against one after another, tokens/s ({shape.name})",
            Spread.of(ratios(together, one)),
            at_least=AGAINST_ONE,
            detail=f"{_median(together)} against {_median(one)} tokens/s",
        ),
        Figure(
            f"{CLIENTS} clients against the best static batch, tokens/s ({shape.name})",
            Spread.of(ratios(together, static)),
            at_least=AGAINST_STATIC,
            detail=f"{_median(static)} tokens/s; batches in order of arrival",
        ),
        Figure(
            f"one client against generate(), tokens/s ({shape.name})",
            Spread.of(ratios(rates["ours, one client"], one)),
            at_least=ALONE,
        ),
        Figure(
            f"share of answers equal to generate()'s, token for token ({shape.name})",
            Spread.of([_equal(runs["one after another"], runs[f"ours, {CLIENTS} clients"])]),
            at_least=1.0,
        ),
    ]
    title = f"Generation in process, tokens/s ({shape.described})"
    return Findings(figures, [Table(title, list(rates), [[_median(each) for each in rates.values()]])])


def _plain(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    return model


def _ours(folder: Path) -> Stepper:
    decoder = decoder_of(_plain(folder), torch.device("cpu"), CACHE_TOKENS)
    if decoder is None:
        raise RuntimeError("the model does not step")
    return decoder


def _one_by_one(model: PreTrainedModel, work: Sequence[Ask]) -> Run:
    return _static(model, work, 1)


def _static(model: PreTrainedModel, work: Sequence[Ask], size: int) -> Run:
    began, answers = time.perf_counter(), []
    for start in range(0, len(work), size):
        answers += _generate(model, work[start : start + size])
    return total(list(work)) / (time.perf_counter() - began), answers


def _generate(model: PreTrainedModel, batch: Sequence[Ask]) -> list[list[int]]:
    """A batch runs until its longest answer is done."""
    longest = max(len(ask.tokens) for ask in batch)
    ids, mask = np.zeros((2, len(batch), longest), dtype=np.int64)
    for row, ask in enumerate(batch):
        ids[row, longest - len(ask.tokens) :] = ask.tokens
        mask[row, longest - len(ask.tokens) :] = 1
    with torch.inference_mode():
        made = model.generate(
            torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            max_new_tokens=max(ask.new_tokens for ask in batch),
            do_sample=False,
        )
    return [row[longest : longest + ask.new_tokens] for row, ask in zip(made.tolist(), batch, strict=True)]


def _engine(stepper: Stepper, work: Sequence[Ask], clients: int) -> Run:
    return asyncio.run(_closed_loop(stepper, work, clients))


async def _closed_loop(stepper: Stepper, work: Sequence[Ask], clients: int) -> Run:
    """Clients that send their next request when they have their answer."""
    generator = Generator(
        stepper,
        StepScheduler(StepLimits(), stepper.cache_tokens),
        on_thread_start=partial(torch.set_num_threads, 1),
    )
    pending, answers = iter(enumerate(work)), dict[int, list[int]]()

    async def client() -> None:
        for index, ask in pending:
            prompt = Prompt(np.array(ask.tokens, dtype=np.int64), ask.new_tokens)
            (result,) = await generator.run([prompt])
            answers[index] = list(result.tokens)

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    rate = total(list(work)) / (time.perf_counter() - began)
    await generator.close()
    return rate, [answers[index] for index in range(len(work))]


def _equal(wanted: Sequence[Run], got: Sequence[Run]) -> float:
    pairs = [
        pair for one, other in zip(wanted, got, strict=True) for pair in zip(one[1], other[1], strict=False)
    ]
    return sum(one == other for one, other in pairs) / len(pairs)


def _median(values: Sequence[float]) -> str:
    return number(Spread.of(values).median)
