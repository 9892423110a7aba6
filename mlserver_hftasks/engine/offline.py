"""Without a server: the batches that the engine would make of rows that all wait."""

from __future__ import annotations

from collections.abc import Sequence

from mlserver_hftasks.engine.cost import CostModel
from mlserver_hftasks.engine.rows import Row
from mlserver_hftasks.engine.scheduler import Limits, Scheduler


def batches_of(rows: Sequence[Row], cost: CostModel, *, padded: bool) -> list[list[Row]]:
    """One job per row, in order of arrival."""
    scheduler = Scheduler(Limits(), cost, padded=padded)
    for index, row in enumerate(rows):
        scheduler.submit([row], now=float(1000 * index))
    batches = []
    while (batch := scheduler.next_batch(0.0)) is not None:
        batches.append([ticket.row for ticket in batch.tickets])
    return batches
