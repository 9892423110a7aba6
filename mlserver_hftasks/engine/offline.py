"""Without a server: the batches that the engine would make of rows that all wait, and answers in steps."""

from __future__ import annotations

from collections.abc import Sequence

from mlserver_hftasks.engine.cost import CostModel
from mlserver_hftasks.engine.rows import Row
from mlserver_hftasks.engine.scheduler import Limits, Scheduler
from mlserver_hftasks.engine.sequences import Prompt, Stepper
from mlserver_hftasks.engine.steps import StepLimits, StepScheduler


def batches_of(rows: Sequence[Row], cost: CostModel, *, padded: bool) -> list[list[Row]]:
    """One job per row, in order of arrival."""
    scheduler = Scheduler(Limits(), cost, padded=padded)
    for index, row in enumerate(rows):
        scheduler.submit([row], now=float(1000 * index))
    batches = []
    while (batch := scheduler.next_batch(0.0)) is not None:
        batches.append([ticket.row for ticket in batch.tickets])
    return batches


def answers_of(stepper: Stepper, prompts: Sequence[Prompt], *, clients: int) -> list[list[int]]:
    """The new tokens of each prompt, so many of them at a time. Raises whatever the model raises."""
    scheduler = StepScheduler(StepLimits(max_sequences=clients), stepper.cache_tokens)
    jobs = [scheduler.submit([prompt], now=float(index)) for index, prompt in enumerate(prompts)]
    while chunks := scheduler.next_step(0.0):
        scheduler.finished(chunks, stepper.step(chunks), now=0.0, seconds=1e-3)
    return [job.sequences[0].tokens for job in jobs]
