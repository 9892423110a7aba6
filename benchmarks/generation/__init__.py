"""Generation: the engine against `generate()`, its server against the incumbent, memory over many answers.

work        models of known shapes, prompts of 5 to 60 tokens, answers of 16 to 64
engine      in process: one after another, static batches, ours; one client alone
served      real servers: whole answers and streams, beside mlserver-huggingface
memory      a thousand short answers
seq2seq     a translator: batches of `generate()`, and its server beside mlserver-huggingface
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from benchmarks.generation import engine, memory, seq2seq, served
from benchmarks.report import Findings
from benchmarks.session import Session

TITLE = "Benchmark of generation"
EXPERIMENTS: Mapping[str, Callable[[Session], Findings]] = {
    "engine": engine.measure,
    "served": served.measure,
    "memory": memory.measure,
    "seq2seq": seq2seq.measure,
}
QUICK = ("engine", "memory")
