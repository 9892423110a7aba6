"""A decoder of 240 million weights, which fit no cache: precisions of torch, by CPU time of one thread.

Each precision has a process of its own, so that memory can be told apart; they take turns. Prompts have one
token, so that decoding is what is timed; reading a long prompt is timed by itself.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.generation.engine import _engine
from benchmarks.generation.work import Ask, folder_of
from benchmarks.report import Figure, Findings, Table, number, spread
from benchmarks.rounds import Spread, ratios, take_turns
from benchmarks.session import Session
from benchmarks.shapes import Shape
from mlserver_hftasks.loading import Served, load, memory
from mlserver_hftasks.settings import Settings

SHAPE = Shape(
    "llama-240m",
    "llama",
    {
        "hidden_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "intermediate_size": 2816,
        "num_key_value_heads": 4,
    },
    token_types=False,
)
DEVIATION = 0.02
"""Of the weights, as models of that width begin; larger ones make sixteen layers a chaos."""
PLAIN = "float32"
EXTRA: dict[str, dict[str, Any]] = {
    PLAIN: {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantization": "int8"},
    "int8-weight-only": {"quantization": "int8-weight-only"},
    "int4-weight-only": {"quantization": "int4-weight-only"},
}
TARGETS = {"int8": (2.0, 2.0), "int8-weight-only": (2.0, 2.0), "int4-weight-only": (2.0, 1.2)}
"""Times float32 with one sequence and with many."""
BYTES = {PLAIN: (4.0, 4.0), "bfloat16": (2.0, 2.0), "int4-weight-only": (0.5 + 4 / 32, 1.0)}
"""Of a weight of the layers and of the output layer; 1 each in int8."""
MANY = 8
NEW_TOKENS = {1: 16, MANY: 12}
PROMPT_TOKENS = 128
TEXTS, TEXT_TOKENS = 4, 48
"""What the logits are compared on."""
CACHE_TOKENS = 2048
READ_BYTES = 2**28
ROUNDS = 2


@dataclass(frozen=True, slots=True)
class Run:
    """One turn of one precision, per second of CPU time."""

    one: float
    """Tokens of one sequence."""
    many: float
    """Tokens of `MANY` sequences together."""
    prompt: float
    """Tokens of a prompt."""


def measure(session: Session) -> Findings:
    """Tokens per second, memory, and how near the logits are."""
    folder = folder_of(session, SHAPE, DEVIATION)
    with ExitStack() as stack:
        workers = {}
        for name, extra in EXTRA.items():
            session.tell(f"loading in {name}")
            workers[name] = stack.enter_context(_worker(folder, extra))
            workers[name](_turn)  # also warms it
        memory_mib = {name: ask(_memory_mib) for name, ask in workers.items()}
        logits = {name: ask(_logits) for name, ask in workers.items()}
        turns: dict[str, Callable[[], Any]] = {name: partial(ask, _turn) for name, ask in workers.items()}
        rounds = min(session.plan.few_rounds, ROUNDS)
        runs = take_turns(rounds, {**turns, "reading memory": _read_rate}, session.tell)
    read = runs.pop("reading memory")
    for name, each in runs.items():
        for index, run in enumerate(each):
            values = {"one_per_s": run.one, "many_per_s": run.many, "prompt_per_s": run.prompt}
            session.journal.record(
                "decoders", name, shape=SHAPE.described, round=index, memory_mib=memory_mib[name], **values
            )
    weights = _weights(folder)
    return Findings(
        [figure for name in TARGETS for figure in _figures(name, runs)],
        [_speeds(runs, read, weights), _answers(memory_mib, logits)],
    )


# -- in a process of its own -----------------------------------------------------------------------

_held: dict[str, Served] = {}
"""The process's model."""


def _load(folder: Path, extra: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    memory.manage()
    settings = Settings(
        task="text-generation", pretrained_model=str(folder), kv_cache_tokens=CACHE_TOKENS, **extra
    )
    _held["model"] = load(settings)
    memory.settle()


def _turn() -> Run:
    one, many = (_rate(count, 1, new) for count, new in NEW_TOKENS.items())
    return Run(one, many, _rate(1, PROMPT_TOKENS, 1))


def _rate(sequences: int, prompt_tokens: int, new_tokens: int) -> float:
    stepper = _held["model"].decoder
    assert stepper is not None, "the model does not step"
    draw = np.random.default_rng(3)
    work = [Ask("", tuple(map(int, row)), new_tokens) for row in _tokens(draw, sequences, prompt_tokens)]
    began = time.process_time()
    _engine(stepper, work, sequences)
    return sequences * max(prompt_tokens, new_tokens) / (time.process_time() - began)


def _tokens(draw: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return draw.integers(100, 30_000, (rows, columns))


def _logits() -> np.ndarray:
    """After each token of some texts, [texts, tokens, vocabulary]."""
    model = _held["model"].backend._model  # type: ignore[attr-defined]  # the model itself, without an engine
    ids = torch.from_numpy(_tokens(np.random.default_rng(5), TEXTS, TEXT_TOKENS))
    with torch.inference_mode():
        found: np.ndarray = model(input_ids=ids, use_cache=False).logits.float().numpy()
    return found


def _memory_mib() -> float:
    memory.give_back()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


@contextmanager
def _worker(folder: Path, extra: dict[str, Any]) -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Runs functions in a process that has the model."""
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawned, initializer=_load, initargs=(folder, extra)) as pool:
        yield lambda function: pool.submit(function).result()


# -- beside it -------------------------------------------------------------------------------------


def _read_rate() -> float:
    """Bytes per second that one thread reads, more than any cache holds."""
    block = torch.ones(READ_BYTES // 4)
    rates = []
    for _ in range(4):
        began = time.process_time()
        block.sum()
        rates.append(READ_BYTES / (time.process_time() - began))
    return max(rates)


def _weights(folder: Path) -> tuple[int, int]:
    """Weights that a step multiplies with: of the layers, and of the output layer."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    key_value = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    width = 2 * config.hidden_size + 2 * key_value + 3 * config.intermediate_size
    return config.num_hidden_layers * config.hidden_size * width, config.hidden_size * config.vocab_size


def _figures(name: str, runs: dict[str, list[Run]]) -> list[Figure]:
    made = []
    for (what, rates), target in zip(_rates(runs[name], runs[PLAIN]).items(), TARGETS[name], strict=False):
        mine, base = rates
        made.append(
            Figure(
                f"torch {name} against {PLAIN}, tokens/s of {what} ({SHAPE.name})",
                Spread.of(ratios(mine, base)),
                at_least=target,
                detail=f"{number(Spread.of(mine).median)} against {number(Spread.of(base).median)}",
            )
        )
    return made


def _rates(mine: list[Run], base: list[Run]) -> dict[str, tuple[list[float], list[float]]]:
    return {
        "one sequence": ([run.one for run in mine], [run.one for run in base]),
        f"{MANY} sequences": ([run.many for run in mine], [run.many for run in base]),
        "a prompt": ([run.prompt for run in mine], [run.prompt for run in base]),
    }


def _speeds(runs: dict[str, list[Run]], read: list[float], weights: tuple[int, int]) -> Table:
    lines = []
    for name, each in runs.items():
        rates = _rates(each, runs[PLAIN])
        cells = [
            cell
            for mine, base in rates.values()
            for cell in (number(Spread.of(mine).median), spread(Spread.of(ratios(mine, base))))
        ]
        a_step = sum(count * size for count, size in zip(weights, BYTES.get(name, (1.0, 1.0)), strict=True))
        share = Spread.of(ratios([run.one * a_step for run in each], read))
        rate = 2 * sum(weights) * Spread.of([run.prompt for run in each]).median
        lines.append((name, *cells[:2], spread(share), *cells[2:], f"{rate / 1e9:.0f}"))
    columns = (
        "",
        "one sequence, tokens/s",
        f"times {PLAIN}",
        "of the memory's rate",
        f"{MANY} sequences, tokens/s",
        f"times {PLAIN}",
        f"a prompt of {PROMPT_TOKENS}, tokens/s",
        f"times {PLAIN}",
        "its G operations/s",
    )
    at = f"{Spread.of(read).median / 1e9:.1f} GB/s"
    return Table(f"Decoders on torch by CPU time ({SHAPE.described}); memory is read at {at}", columns, lines)


def _answers(memory_mib: dict[str, float], logits: dict[str, np.ndarray]) -> Table:
    wanted = logits[PLAIN]
    lines = [
        (
            name,
            f"{memory_mib[name]:.0f}",
            number(float(np.abs(found - wanted).max())),
            number(float((found - wanted).std())),
            f"{(found.argmax(-1) == wanted.argmax(-1)).mean():.3f}",
        )
        for name, found in logits.items()
    ]
    columns = ("", "memory of the process, MiB", "largest difference", "its deviation", "same next token")
    title = f"Their logits, which deviate by {wanted.std():.2f} ({SHAPE.name}, random weights)"
    return Table(title, columns, lines)
