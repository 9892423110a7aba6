"""asyncio in front, the device thread behind, the scheduler between them.

The device thread takes its next batch itself, at the moment it is free: a batch is formed as late as
can be, and the device never waits for the event loop. When the device is idle the event loop forms the batch,
once the requests that came with one look at the sockets have all queued their rows, and runs it right there
if it is short: handing over to a thread and back costs more than such a batch. A second scheduler, where
there is one, holds rows of the background: their batches run while no other row waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mlserver_hftasks.engine.rows import Batch, Job, Outputs, Row, Ticket
from mlserver_hftasks.engine.scheduler import Scheduler
from mlserver_hftasks.errors import ForwardFailed, HFTasksError, Unavailable

Result = Outputs | Exception
_Taken = tuple[Scheduler, Batch]
"""A batch, and the scheduler that formed it."""


class Forward(Protocol):
    """The part of a backend that the engine needs."""

    def forward(self, rows: Sequence[Row]) -> Sequence[Outputs]:
        """Run the rows as one batch; one mapping of outputs per row, in order."""


BACKGROUND_PATIENCE_S = 1.0
"""Seconds after which a batch of the background runs though other rows wait, so that nothing starves."""


INLINE_S = 2e-3
"""What `inline_s` may be where the event loop has other things to do: so long at most are they held up."""


@dataclass(frozen=True, slots=True)
class BatchReport:
    """What there is to measure about one batch."""

    rows: int
    tokens: int
    cost: int
    """Tokens with padding."""
    queue_wait_s: Sequence[float]
    """One per row."""
    forward_s: float
    failed_rows: int


@dataclass(eq=False, slots=True)
class _Waiter:
    future: asyncio.Future[list[Outputs]]
    outputs: list[Outputs | None]
    missing: int = field(init=False)

    def __post_init__(self) -> None:
        self.missing = len(self.outputs)


class Batcher:
    """Runs rows of concurrent callers in shared batches, one batch at a time.

    Made on the event loop that will await `run`. There `observe` is called after each batch, and
    `observe_queue` with the number of waiting rows whenever it has changed. Batches run on a thread of their
    own, but those of the foreground that are predicted to take up to `inline_s` on the event loop.
    `on_thread_start` is called when the thread starts, and before a batch runs on the event loop.
    """

    def __init__(
        self,
        backend: Forward,
        scheduler: Scheduler,
        *,
        on_thread_start: Callable[[], None] = lambda: None,
        inline_s: float = 0.0,
        observe: Callable[[BatchReport], None] = lambda report: None,
        observe_queue: Callable[[int], None] = lambda rows: None,
        name: str = "device",
    ) -> None:
        self._backend = backend
        self._scheduler = scheduler
        self._background: Scheduler | None = None
        self._background_due = 0.0
        self._on_thread_start = on_thread_start
        self._inline_s = inline_s
        self._observe = observe
        self._observe_queue = observe_queue
        self._loop = asyncio.get_running_loop()
        self._waiters: dict[Job, _Waiter] = {}
        self._wake = threading.Condition()
        self._closed = False
        self._running = False
        """Whether a batch is on its way, from the moment that it was formed; the next follows by itself."""
        self._handed: _Taken | None = None
        """Formed by the event loop for the device thread."""
        self._dispatching = False
        self._context = contextvars.Context()
        self._idle = threading.Event()
        self._idle.set()
        self._thread = threading.Thread(target=self._run_device, name=f"hftasks-{name}", daemon=True)
        self._thread.start()

    def open_background(self, scheduler: Scheduler) -> None:
        """Take rows of the background from now on."""
        with self._wake:
            self._background = scheduler

    async def run(
        self, rows: Sequence[Row], *, background: bool = False, since: float | None = None
    ) -> list[Outputs]:
        """The outputs of the rows, in order.

        `background` rows wait for all others, though not for ever. `since`, a time of `time.monotonic`,
        counts as their arrival where they go on with what began earlier.

        Raises `Overloaded` at once, `Unavailable` when closing, `ForwardFailed` if the model raised on
        one of these rows. Cancelling the call takes its waiting rows out of the queue, and ends those
        that a model continues step by step.
        """
        if not rows:
            return []
        scheduler = self._background if background else self._scheduler
        if scheduler is None:
            raise ValueError("this engine has no background")
        waiter = _Waiter(self._loop.create_future(), [None] * len(rows))
        with self._wake:
            if self._closed:
                raise Unavailable("the model is being unloaded, expected a model that is ready")
            now = time.monotonic()
            if background and not scheduler.queued_rows:
                self._background_due = now + BACKGROUND_PATIENCE_S
            job = scheduler.submit(rows, now if since is None else since)
            if not background:
                self._idle.clear()
            self._waiters[job] = waiter
            if not self._running:
                self._dispatch_soon()
        if self._running:
            self._observe_queue(self.queued_rows)
        try:
            return await waiter.future
        finally:
            self._waiters.pop(job, None)
            if waiter.missing:
                for row in rows:
                    row.abandon()
                with self._wake:
                    scheduler.cancel(job)
                self._observe_queue(self.queued_rows)

    def check_admission(self) -> None:
        """Raise `Overloaded` if even the smallest request would be refused now."""
        with self._wake:
            self._scheduler.check_admission(1, 1, time.monotonic())

    @property
    def queued_rows(self) -> int:
        """Rows that wait for the device, without those of the background."""
        return self._scheduler.queued_rows

    def wait_until_idle(self, seconds: float) -> bool:
        """Hold the calling thread while rows wait or run, those of the background aside, for so long at most.

        Whether there are none now.
        """
        return self._idle.wait(seconds)

    async def close(self) -> None:
        """Let the running batch end, fail what still waits, and end the thread."""
        with self._wake:
            self._closed = True
            self._idle.set()
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)
        self._fail_all(Unavailable("the model was unloaded while the request waited"))

    # -- device thread ---------------------------------------------------------------------------

    def _run_device(self) -> None:
        try:
            self._on_thread_start()
            while (taken := self._wait_for_batch()) is not None:
                while taken is not None:
                    self._post(self._deliver, *self._run_batch(*taken))
                    taken = self._following()
        except BaseException as error:
            # Only a defect of ours gets here; whoever waits must be told all the same.
            self._post(self._fail_all, ForwardFailed(f"the device thread failed: {error!r}"))

    def _post(self, callback: Callable[..., None], *args: object) -> None:
        # At the end of the process the loop may be gone before this daemon thread is.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback, *args)

    def _wait_for_batch(self) -> _Taken | None:
        """What the event loop hands over; None at the end."""
        with self._wake:
            while not self._closed:
                if self._handed is not None:
                    taken, self._handed = self._handed, None
                    return taken
                self._wake.wait()
        return None

    def _following(self) -> _Taken | None:
        """The next batch, right after one has run; None if no rows wait, or at the end."""
        with self._wake:
            taken = None if self._closed else self._next(time.monotonic())
            self._running = taken is not None
        return taken

    # -- on whichever of the two -----------------------------------------------------------------

    def _run_batch(self, scheduler: Scheduler, batch: Batch) -> tuple[Batch, list[Result], BatchReport]:
        left_at = time.monotonic()
        results = self._execute(batch.tickets)
        seconds = time.monotonic() - left_at
        failed = sum(isinstance(result, Exception) for result in results)
        with self._wake:
            scheduler.finished(batch, None if failed else seconds)
        return batch, results, self._report(batch, left_at, seconds, failed)

    def _next(self, now: float) -> _Taken | None:
        """Form the next batch. The lock is held."""
        taken = self._take_background(now) if now > self._background_due else None
        return taken or self._take_foreground(now) or self._take_background(now)

    def _take_foreground(self, now: float) -> _Taken | None:
        batch = self._scheduler.next_batch(now)
        if batch is None:
            self._idle.set()
            return None
        return self._scheduler, batch

    def _take_background(self, now: float) -> _Taken | None:
        batch = self._background.next_batch(now) if self._background is not None else None
        if batch is None or self._background is None:
            return None
        self._background_due = now + BACKGROUND_PATIENCE_S
        return self._background, batch

    def _execute(self, tickets: Sequence[Ticket]) -> list[Result]:
        """Outputs or an error per row. A batch that fails is halved until the failing row is alone."""
        try:
            outputs = self._backend.forward([ticket.row for ticket in tickets])
            if len(outputs) != len(tickets):
                raise RuntimeError(f"{len(outputs)} outputs for {len(tickets)} rows")
            return list(outputs)
        except Exception as error:
            if len(tickets) == 1:
                return [error]
        middle = len(tickets) // 2
        return self._execute(tickets[:middle]) + self._execute(tickets[middle:])

    def _report(self, batch: Batch, left_at: float, seconds: float, failed: int) -> BatchReport:
        return BatchReport(
            rows=len(batch.tickets),
            tokens=batch.tokens,
            cost=batch.cost,
            queue_wait_s=[left_at - ticket.job.enqueued_at for ticket in batch.tickets],
            forward_s=seconds,
            failed_rows=failed,
        )

    # -- event loop ------------------------------------------------------------------------------

    def _dispatch_soon(self) -> None:
        if not self._dispatching:
            self._dispatching = True
            self._loop.call_soon(self._dispatch, context=self._context)

    def _dispatch(self) -> None:
        """Form the batch that an idle device shall run; run it here if it is short."""
        self._dispatching = False
        try:
            taken = self._take_short()
            if taken is not None:
                self._run_here(*taken)
            else:
                self._observe_queue(self.queued_rows)  # what the thread was not handed waits
        except BaseException as error:  # as in `_run_device`
            self._fail_all(ForwardFailed(f"the engine failed: {error!r}"))
            raise

    def _take_short(self) -> _Taken | None:
        """The batch that an idle device shall run, if it is short; any other is handed to the thread."""
        with self._wake:
            taken = None if self._running or self._closed else self._next(time.monotonic())
            if taken is None:
                return None
            self._running = True
            if self._is_short(*taken):
                return taken
            self._handed = taken
            self._wake.notify()
        return None

    def _is_short(self, scheduler: Scheduler, batch: Batch) -> bool:
        cost = scheduler.cost
        return scheduler is self._scheduler and cost.knows and cost.seconds(batch.cost) <= self._inline_s

    def _run_here(self, scheduler: Scheduler, batch: Batch) -> None:
        self._on_thread_start()
        ran = self._run_batch(scheduler, batch)
        with self._wake:
            self._running = False
        self._dispatch_soon()  # later: what came meanwhile is read first
        try:
            self._deliver(*ran)
        except Exception as error:  # an observer's: reported, as if the device thread had posted this
            self._loop.call_exception_handler({"message": "a batch was not reported", "exception": error})

    def _deliver(self, batch: Batch, results: Sequence[Result], report: BatchReport) -> None:
        for ticket, result in zip(batch.tickets, results, strict=True):
            if isinstance(result, Exception):
                self._fail(ticket.job, _as_ours(result))
            elif (waiter := self._waiters.get(ticket.job)) is not None:
                waiter.outputs[ticket.index] = result
                waiter.missing -= 1
                if not waiter.missing and not waiter.future.done():
                    waiter.future.set_result([output for output in waiter.outputs if output is not None])
        self._observe(report)
        self._observe_queue(self.queued_rows)

    def _fail_all(self, error: HFTasksError) -> None:
        self._closed = True
        for job in list(self._waiters):
            self._fail(job, error)

    def _fail(self, job: Job, error: HFTasksError) -> None:
        waiter = self._waiters.get(job)
        if waiter is not None and not waiter.future.done():
            waiter.future.set_exception(error)


def _as_ours(error: Exception) -> HFTasksError:
    if isinstance(error, HFTasksError):
        return error
    return ForwardFailed(f"the model failed on this input: {type(error).__name__}: {error}")
