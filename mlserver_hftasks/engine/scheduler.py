"""Which rows run next. Pure policy: it is told the time, and knows no thread, no torch, no asyncio.

Continuous: `next_batch` never waits for more rows; under load they gather while the device is busy.

Fair: jobs are served in the order of their due dates, `enqueued_at + PATIENCE * seconds they take alone`.
So a short job that comes second overtakes a long one, and goes into the next batch for as long as short
jobs leave the long one a share of 1/PATIENCE of the device; a long one that is due is overtaken by
nobody, so nothing starves. (Earliest due date first, with due dates that bound the slowdown; they never
change, so a heap holds the order.)
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mlserver_hftasks.engine.cost import CostModel
from mlserver_hftasks.engine.room import check_room
from mlserver_hftasks.engine.rows import Batch, Job, Row, Ticket
from mlserver_hftasks.errors import Overloaded

MIN_BUDGET_TOKENS = 128
"""No learned budget goes below this: a lone text of usual length always fits."""
PATIENCE = 4.0
"""A job is due after this many times the seconds that it takes alone. With less, a bulk job would be due,
and hold up everybody, before it is done even on a device that it has almost for itself."""
LEAST_BUDGET_TOKENS = 16
"""The same where a latency target asks for small batches."""
SPARE_SHARE = 0.05
"""Share of the latency target that is left to decoding and encoding."""
DEVIATIONS = 2.6
"""How many deviations of its predictions admission allows for: a few batches in a row may all be slow."""
LEAST_SHARE = 0.125
"""Share of a batch that a job counts for at admission, at least. So the queue closes for usual jobs of all
lengths at once, and whoever is too much can be refused unread: if shorter ones still got in where longer
ones do not, most refusals would come after tokenizing. (Simulated at four times capacity: 98 % before it,
not 26 %, for the same tokens per second.)"""
MAX_MISFITS = 8
"""How many jobs whose next row does not fit are passed over before a packed batch is closed."""
POOL_FACTOR = 4
"""A padded batch is chosen among the most urgent rows of this many times its tokens."""
MAX_POOL_ROWS = 256
MIN_OVERHEAD_S = 1e-4
"""What our own code costs per batch, at least."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one engine; rows and tokens are counts, `latency_target_s` is seconds or None."""

    max_batch_rows: int = 256
    max_batch_tokens: int = 8192
    max_queue_rows: int = 8192
    max_queue_tokens: int = 1_000_000
    latency_target_s: float | None = None


_Entry = tuple[float, int, Job]
"""Due date, number in order of arrival, job."""
_Queue = list[_Entry]
"""A heap."""


class Scheduler:
    """Jobs in, batches out.

    `padded` says how the backend pays for a batch: rows x longest if true, else the sum of tokens.
    """

    def __init__(self, limits: Limits, cost: CostModel, *, padded: bool) -> None:
        self.limits = limits
        self.cost = cost
        self._padded = padded
        self._queues: dict[Hashable, _Queue] = {}
        self._sequence = itertools.count()
        self._busy_until = 0.0
        self.queued_rows = 0
        self.queued_tokens = 0

    # -- jobs in ---------------------------------------------------------------------------------

    def submit(self, rows: Sequence[Row], now: float) -> Job:
        """Queue the rows of one request, which share one key.

        Raises `Overloaded` when the queue is full or the predicted wait would break the latency target,
        ValueError for no rows or several keys.
        """
        if len({row.key for row in rows}) != 1:
            raise ValueError("a job has at least one row, and all of one key")
        tokens = sum(row.cost for row in rows)
        self.check_admission(len(rows), tokens, now)
        pending = list(range(len(rows) - 1, -1, -1))
        if self._padded:
            pending.sort(key=lambda index: -rows[index].cost)
        job = Job(tuple(rows), now, pending, tokens)
        entry = (self._due(tokens, now), next(self._sequence), job)
        heapq.heappush(self._queues.setdefault(job.key, []), entry)
        self.queued_rows += len(rows)
        self.queued_tokens += tokens
        return job

    def check_admission(self, rows: int, tokens: int, now: float) -> None:
        """Raise `Overloaded` if a job of that size would not be taken now; queues nothing."""
        check_room(
            (
                ("rows", self.queued_rows, rows, self.limits.max_queue_rows),
                ("tokens", self.queued_tokens, tokens, self.limits.max_queue_tokens),
            ),
            lambda: self.seconds_of(self.queued_tokens),
        )
        target = self.limits.latency_target_s
        if target is None or not self.cost.knows:
            return
        waits, latency = self.predicted_latency_s(tokens, now)
        allowed = self.admission_share * target
        if waits and latency > allowed:
            raise Overloaded(
                f"the predicted latency is {1e3 * latency:.0f} ms, expected at most {1e3 * allowed:.0f} ms, "
                "the target less what predictions are usually off @ latency_target_ms",
                retry_after_s=latency,
            )

    def cancel(self, job: Job) -> None:
        """Forget the rows of the job that have not left yet."""
        if job.cancelled:
            return
        job.cancelled = True
        self.queued_rows -= len(job.pending)
        self.queued_tokens -= job.remaining_tokens
        job.pending.clear()
        job.remaining_tokens = 0

    # -- batches out -----------------------------------------------------------------------------

    def next_batch(self, now: float) -> Batch | None:
        """The rows to run now, or None if none wait. They leave the queue."""
        queue = self._most_urgent_queue()
        if queue is None:
            return None
        tickets = self._fill_padded(queue) if self._padded else self._fill_packed(queue)
        batch = Batch(tuple(tickets), self._cost_of(tickets))
        self._busy_until = now + self.cost.seconds(batch.cost)
        return batch

    def finished(self, batch: Batch, seconds: float | None) -> None:
        """The device is free again; learn from the batch, unless it failed (None)."""
        self._busy_until = 0.0
        if seconds is not None:
            self.cost.observe(batch.cost, seconds)

    def _most_urgent_queue(self) -> _Queue | None:
        for key in list(self._queues):
            queue = self._queues[key]
            while queue and not queue[0][2].pending:
                heapq.heappop(queue)
            if not queue:
                del self._queues[key]
        return min(self._queues.values(), default=None, key=lambda queue: queue[0][:2])

    def _fill_packed(self, queue: _Queue) -> list[Ticket]:
        budget = whole = self.budget_tokens
        rows = self.limits.max_batch_rows
        reserve = _reserve(queue, whole)
        tickets: list[Ticket] = []
        touched: list[_Entry] = []
        misfits = 0
        while queue and misfits < MAX_MISFITS and len(tickets) < rows and budget > 0:
            touched.append(heapq.heappop(queue))
            job = touched[-1][2]
            kept = reserve if _is_long(job, whole) else 0
            while job.pending and len(tickets) < rows:
                if tickets and job.rows[job.pending[-1]].cost > budget - kept:
                    misfits += 1
                    break
                ticket = Ticket(job, job.pending.pop())
                self._left(ticket)
                budget -= ticket.row.cost
                tickets.append(ticket)
        self._put_back(queue, touched)
        return tickets

    def _fill_padded(self, queue: _Queue) -> list[Ticket]:
        budget = self.budget_tokens
        reserve = _reserve(queue, budget)
        touched, pool = self._pool(queue, budget)
        budget -= reserve if any(_is_long(job, budget) for _, _, job in touched) else 0
        costs = [ticket.row.cost for ticket in pool]
        most_urgent = min(
            cost for ticket, cost in zip(pool, costs, strict=True) if ticket.job is touched[0][2]
        )
        # Of rows of one length the more urgent ones lie nearer to the most urgent row of all.
        order = sorted(range(len(pool)), key=lambda i: (costs[i], i if costs[i] >= most_urgent else -i))
        seed = sum(cost < most_urgent for cost in costs)
        first, last = self._best_window([costs[i] for i in order], seed, budget)
        chosen = [pool[i] for i in order[first : last + 1]]
        leaving = {(ticket.job, ticket.index) for ticket in chosen}
        for _, _, job in touched:
            job.pending = [index for index in job.pending if (job, index) not in leaving]
        for ticket in chosen:
            self._left(ticket)
        self._put_back(queue, touched)
        return chosen

    def _pool(self, queue: _Queue, budget: int) -> tuple[list[_Entry], list[Ticket]]:
        touched: list[_Entry] = []
        pool: list[Ticket] = []
        tokens = POOL_FACTOR * budget
        while queue and tokens > 0 and len(pool) < MAX_POOL_ROWS:
            touched.append(heapq.heappop(queue))
            job = touched[-1][2]
            for index in itertools.islice(reversed(job.pending), MAX_POOL_ROWS - len(pool)):
                pool.append(Ticket(job, index))
                tokens -= job.rows[index].cost
                if tokens <= 0:
                    break
        return touched, pool

    def _best_window(self, costs: list[int], seed: int, budget: int) -> tuple[int, int]:
        """First and last index of the window around `seed` with the most useful tokens per second."""
        lengths = np.asarray(costs, dtype=np.float64)
        total = np.concatenate(([0.0], np.cumsum(lengths)))
        first = np.arange(seed + 1)[:, None]
        last = np.arange(seed, len(costs))[None, :]
        rows = last - first + 1
        padded = rows * lengths[seed:][None, :]
        useful = total[last + 1] - total[first]
        allowed = (padded <= budget) & (rows <= self.limits.max_batch_rows)
        allowed |= rows == 1
        # No batch is free: without any overhead, batches of one row would always look best.
        overhead, per_token = max(self.cost.overhead_s, MIN_OVERHEAD_S), self.cost.per_token_s
        seconds = overhead + per_token * padded if self.cost.knows else MIN_BUDGET_TOKENS + padded
        rate = np.where(allowed, useful / seconds, -1.0)
        best_first, best_last = np.unravel_index(int(rate.argmax()), rate.shape)
        return int(best_first), seed + int(best_last)

    # -- what it costs ---------------------------------------------------------------------------

    @property
    def budget_tokens(self) -> int:
        """Cost up to which a batch is filled now.

        The knee of the learned throughput curve. With a latency target no more than lets two batches fit
        into what admission allows: a request that just missed a batch waits for it, then runs in its own.
        """
        budget = max(min(self.cost.knee_tokens, self.limits.max_batch_tokens), MIN_BUDGET_TOKENS)
        target = self.limits.latency_target_s
        if target is not None and self.cost.per_token_s > 0:
            batch_s = self.admission_share * target / 2
            budget = min(budget, (batch_s - self.cost.overhead_s) / self.cost.per_token_s)
        return int(min(max(budget, LEAST_BUDGET_TOKENS), self.limits.max_batch_tokens))

    @property
    def admission_share(self) -> float:
        """Share of the latency target that a predicted latency may take, so that the real one keeps it."""
        return (1 - SPARE_SHARE) / (1 + DEVIATIONS * self.cost.deviation)

    def seconds_of(self, tokens: int) -> float:
        """Predicted seconds to run that many tokens in batches of the budget."""
        budget = self.budget_tokens
        return tokens * self.cost.seconds(budget) / budget

    def predicted_latency_s(self, tokens: int, now: float) -> tuple[bool, float]:
        """Whether a job of that many tokens would have to wait, and the seconds until its first answers.

        A row has its answer when its whole batch has, so the jobs ahead count in batches.
        """
        running = max(self._busy_until - now, 0.0)
        due = self._due(tokens, now)
        ahead = sum(
            job.remaining_tokens for queue in self._queues.values() for date, _, job in queue if date <= due
        )
        budget = self.budget_tokens
        batches, rest = divmod(ahead, budget)
        tokens = max(tokens, int(LEAST_SHARE * budget))
        batches += 1 if rest + min(tokens, budget) <= budget else 2
        return running + ahead > 0, running + batches * self.cost.seconds(budget)

    # -- the queue -------------------------------------------------------------------------------

    def jobs(self) -> Iterator[Job]:
        """The jobs that have rows waiting."""
        return (job for queue in self._queues.values() for _, _, job in queue if job.pending)

    def _due(self, tokens: int, now: float) -> float:
        alone, target = self.seconds_of(tokens), self.limits.latency_target_s
        if target is not None and alone <= target / 2:
            return now  # what was admitted within the target must not be overtaken by what comes later
        return now + PATIENCE * alone

    def _put_back(self, queue: _Queue, entries: Sequence[_Entry]) -> None:
        for entry in entries:
            if entry[2].pending:
                heapq.heappush(queue, entry)

    def _left(self, ticket: Ticket) -> None:
        ticket.job.remaining_tokens -= ticket.row.cost
        self.queued_rows -= 1
        self.queued_tokens -= ticket.row.cost

    def _cost_of(self, tickets: Sequence[Ticket]) -> int:
        costs = [ticket.row.cost for ticket in tickets]
        return len(costs) * max(costs) if self._padded else sum(costs)


def _reserve(queue: _Queue, budget: int) -> int:
    """Tokens of the next batch that long jobs may not fill.

    They fill up what a short job leads, but no more than half of it: its answer comes with the whole batch,
    and half a batch costs them little throughput.
    """
    return 0 if _is_long(queue[0][2], budget) else budget // 2


def _is_long(job: Job, budget: int) -> bool:
    """Whether a batch of that budget cannot answer the job, and need not: one row is never split."""
    return len(job.pending) > 1 and job.remaining_tokens > budget
