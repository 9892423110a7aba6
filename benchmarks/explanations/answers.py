"""What it takes to explain a generated answer, and what that costs those who generate meanwhile."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import torch
import transformers
from captum.attr import LayerIntegratedGradients, LLMGradientAttribution, TextTokenInput

from benchmarks.explanations.interference import LATENCY_RATIO
from benchmarks.generation.served import LIMIT_S, _pieces
from benchmarks.generation.work import GPT2, Ask, asks, folder_of
from benchmarks.load import percentile
from benchmarks.report import Figure, Findings, number
from benchmarks.rounds import Spread, ratios, take_turns
from benchmarks.server import Model, Server, running
from benchmarks.session import Session
from mlserver_hftasks.explain.result import Explanation
from mlserver_hftasks.loading import Served, load
from mlserver_hftasks.settings import Settings
from tests.explaining import explaining

FASTER, APART = 5.0, 1e-4
STEPS = 10
"""Of both: captum's cost grows with them, and with the answer's tokens."""
PROMPTS, ANSWER = 3, " the river was quiet"
STREAMS, ANSWERS, NEW_TOKENS = 4, 3, 48
"""Streams at once, answers that each asks for one after another, and tokens of an answer."""
EXPLAINING_CLIENTS = 4


def measure(session: Session) -> Findings:
    """Speed against captum's, and the gaps between the tokens of streams."""
    return Findings([*_speed(session), _gaps(session)])


# -- against captum ------------------------------------------------------------------------------


def _speed(session: Session) -> list[Figure]:
    """Attributions for a whole answer, by the same rule."""
    folder, prompts = folder_of(session, GPT2), [ask.text for ask in asks(PROMPTS)]
    served = load(Settings(task="text-generation", pretrained_model=str(folder), intra_op_threads=1))
    torch.set_num_threads(1)
    ours = asyncio.run(_ours(served, prompts))
    captum = _Captum(str(folder))
    theirs = [captum.attribute(prompt) for prompt in prompts]
    took, of_captum = ours[1], sum(seconds for _, seconds in theirs)
    apart = [
        float(np.abs(one.attributions[0, : len(each)] - each).max() / np.abs(each).max())
        for (each, _), one in zip(theirs, ours[0], strict=True)
    ]
    return [
        Figure(
            "explanations of an answer against captum's LLMGradientAttribution, which takes a turn per token",
            Spread.of([of_captum / took]),
            at_least=FASTER,
            detail=f"{1e3 * took / PROMPTS:.0f} against {1e3 * of_captum / PROMPTS:.0f} ms each",
        ),
        Figure(
            "largest difference from captum's, of the largest attribution", Spread.of(apart), at_most=APART
        ),
    ]


async def _ours(served: Served, prompts: Sequence[str]) -> tuple[list[Explanation], float]:
    method: dict[str, Any] = {
        "method": "integrated-gradients-fixed",
        "max_evals": STEPS + 2,
        "baseline": "pad",
    }
    async with explaining(served) as explain:
        await explain({"text_inputs": prompts[:1]}, target=ANSWER, method="input-x-gradient")
        began = time.perf_counter()
        made = await explain({"text_inputs": prompts}, target=ANSWER, **method)
        return made, time.perf_counter() - began


class _Captum:
    def __init__(self, folder: str) -> None:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self._answer = torch.tensor(self._tokenizer(ANSWER, add_special_tokens=False)["input_ids"])
        layer = LayerIntegratedGradients(model, model.get_input_embeddings())
        self._method = LLMGradientAttribution(layer, self._tokenizer)

    def attribute(self, prompt: str) -> tuple[npt.NDArray[np.float32], float]:
        """[prompt], and the seconds it took."""
        ids = torch.tensor([self._tokenizer(prompt)["input_ids"]])
        given = TextTokenInput(prompt, self._tokenizer, baselines=self._tokenizer.pad_token_id)
        tokenizer = self._tokenizer
        kept = [tokenizer.cls_token_id, tokenizer.sep_token_id]
        baselines = torch.isin(ids, torch.tensor(kept)).long()  # 1 where a token is never absent
        began = time.perf_counter()
        made = self._method.attribute(given, target=self._answer, n_steps=STEPS, baselines=baselines)
        return made.seq_attr.numpy(), time.perf_counter() - began


# -- among streams -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Run:
    """Between the tokens of streams, and explanations beside them."""

    p50_ms: float
    p95_ms: float
    explanations: int
    seconds: float


def _gaps(session: Session) -> Figure:
    extra = {"task": "text-generation", "intra_op_threads": 1}
    with running(Model("gpt2", folder_of(session, GPT2), extra)) as server:
        asyncio.run(_streams(server, explained=True))  # the explainer is made when it is first asked
        runs = take_turns(
            session.plan.few_rounds,
            {
                "without": lambda: asyncio.run(_streams(server, explained=False)),
                "with": lambda: asyncio.run(_streams(server, explained=True)),
            },
            session.tell,
        )
    among, alone = runs["with"], runs["without"]
    median = {name: Spread.of([run.p95_ms for run in each]).median for name, each in runs.items()}
    p50 = {name: Spread.of([run.p50_ms for run in each]).median for name, each in runs.items()}
    rate = Spread.of([run.explanations / run.seconds for run in among]).median
    return Figure(
        "p95 of the time between tokens of streams while answers are explained, against without",
        Spread.of(ratios([run.p95_ms for run in among], [run.p95_ms for run in alone])),
        at_most=LATENCY_RATIO,
        detail=f"{number(median['with'])} against {number(median['without'])} ms (p50 {number(p50['with'])} "
        f"against {number(p50['without'])}), {number(rate)} explanations/s beside them",
    )


async def _streams(server: Server, *, explained: bool) -> Run:
    gaps: list[float] = []
    over, began = asyncio.Event(), time.perf_counter()
    async with httpx.AsyncClient(timeout=LIMIT_S) as client:
        busy = [
            asyncio.create_task(_explain(client, server, number, over))
            for number in range(EXPLAINING_CLIENTS if explained else 0)
        ]
        await asyncio.gather(*(_stream(client, server, number, gaps) for number in range(STREAMS)))
        over.set()
        answered = sum(await asyncio.gather(*busy))
    seconds = time.perf_counter() - began
    return Run(percentile(gaps, 50), percentile(gaps, 95), answered, seconds)


async def _stream(client: httpx.AsyncClient, server: Server, number: int, gaps: list[float]) -> None:
    url = f"http://{server.host}:{server.port}/v2/models/gpt2/infer_stream"
    for ask in asks(STREAMS * ANSWERS)[number::STREAMS]:
        pieces = _pieces(client, url, Ask(ask.text, ask.tokens, NEW_TOKENS))
        times = [time.perf_counter() async for _ in pieces]
        gaps += [1e3 * (later - earlier) for earlier, later in itertools.pairwise(times)]


async def _explain(client: httpx.AsyncClient, server: Server, number: int, over: asyncio.Event) -> int:
    """One client, who always waits for the explanation of an answer. How many came by the end."""
    answered = 0
    for ask in itertools.cycle(asks(EXPLAINING_CLIENTS * 4)[number::EXPLAINING_CLIENTS]):
        tensor = {"name": "text_inputs", "shape": [1], "datatype": "BYTES", "data": [ask.text]}
        body = {"inputs": [tensor], "parameters": {"max_new_tokens": 8}}
        url = f"http://{server.host}:{server.port}/v2/models/gpt2/explain"
        response = await client.post(url, json=body)
        if over.is_set():
            return answered
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {response.text:.500}")
        answered += 1
    return answered
