"""asyncio in front, the device thread behind, `StepScheduler` between them: as `batcher`, step by step.

The device thread asks for its next step itself, at the moment it is free, so requests join and leave at
every step. The event loop hears of each token of a stream, and of the end of everything else.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

from mlserver_hftasks.engine.sequences import (
    Choice,
    Chunk,
    FinishReason,
    GeneratedSequence,
    GenerationJob,
    Prompt,
    Stepper,
)
from mlserver_hftasks.engine.steps import StepScheduler
from mlserver_hftasks.errors import DeadlineExceeded, ForwardFailed, HFTasksError, Unavailable


@dataclass(frozen=True, slots=True)
class Generated:
    """What continues one prompt."""

    tokens: Sequence[int]
    finish: FinishReason
    logprobs: Sequence[float] = ()
    """Of each token, where they were asked for."""


@dataclass(frozen=True, slots=True)
class NewToken:
    """One token of a stream, or its end."""

    index: int
    """Of the prompt in its request."""
    token: int | None
    """None for an end that brings no token: the deadline's."""
    logprob: float | None
    finish: FinishReason | None
    """There with the last token of its prompt."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What there is to measure about one step."""

    prompt_tokens: int
    """Fed to the model."""
    new_tokens: int
    seconds: float
    first_token_s: Sequence[float]
    """From arrival to the first token, of the sequences that have it now."""
    token_gap_s: Sequence[float]
    """From one token of a sequence to the next, of the others."""


@dataclass(frozen=True, slots=True)
class Occupancy:
    """How full the engine is."""

    running: int
    """Sequences that have begun."""
    waiting: int
    """Sequences that have not."""
    cache_share: float
    """What is taken of the cache."""


@dataclass(eq=False, slots=True)
class _Waiter:
    missing: int
    news: deque[NewToken] = field(default_factory=deque)
    error: HFTasksError | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def tell(self, news: NewToken) -> None:
        self.news.append(news)
        self.missing -= news.finish is not None
        if self.missing == 0 or news.token is not None:
            self.changed.set()

    def fail(self, error: HFTasksError) -> None:
        self.error = self.error or error
        self.changed.set()


class Generator:
    """Continues prompts of concurrent callers in shared steps on one device thread.

    Made on the event loop that will await `run`. There `observe` is called after each step, and
    `observe_occupancy` whenever that has changed.
    """

    def __init__(
        self,
        backend: Stepper,
        scheduler: StepScheduler,
        *,
        on_thread_start: Callable[[], None] = lambda: None,
        observe: Callable[[StepReport], None] = lambda report: None,
        observe_occupancy: Callable[[Occupancy], None] = lambda occupancy: None,
        name: str = "device",
    ) -> None:
        self._backend = backend
        self._scheduler = scheduler
        self._on_thread_start = on_thread_start
        self._observe = observe
        self._observe_occupancy = observe_occupancy
        self._loop = asyncio.get_running_loop()
        self._waiters: dict[GenerationJob, _Waiter] = {}
        self._wake = threading.Condition()
        self._closed = False
        self._idle = threading.Event()
        self._thread = threading.Thread(target=self._run_device, name=f"hftasks-{name}", daemon=True)
        self._thread.start()

    async def run(self, prompts: Sequence[Prompt], *, deadline: float | None = None) -> list[Generated]:
        """What continues each prompt, in order. `deadline`, in seconds of `time.monotonic`, ends them all.

        Raises `Overloaded` at once, `Unavailable` when closing, `ForwardFailed` if the model raised on one
        of these prompts, `DeadlineExceeded` if none had a token by then. Cancelling the call ends them.
        """
        job, waiter = self._submit(prompts, deadline, streams=False)
        try:
            while waiter.missing and waiter.error is None:
                await waiter.changed.wait()
                waiter.changed.clear()
            if waiter.error is not None:
                raise waiter.error
            return _results(job)
        finally:
            self._forget(job, waiter)

    async def stream(
        self, prompts: Sequence[Prompt], *, deadline: float | None = None
    ) -> AsyncGenerator[Sequence[NewToken], None]:
        """Each token as it comes: all that came since the last time, at least one. Raises as `run`.

        Closing the iterator ends the generation within a step.
        """
        job, waiter = self._submit(prompts, deadline, streams=True)
        try:
            while waiter.missing or waiter.news:
                await waiter.changed.wait()
                waiter.changed.clear()
                news = list(waiter.news)
                waiter.news.clear()
                if news:
                    yield news
                if waiter.error is not None:
                    raise waiter.error
            _results(job)
        finally:
            self._forget(job, waiter)

    def check_admission(self) -> None:
        """Raise `Overloaded` if even the smallest request would be refused now."""
        with self._wake:
            self._scheduler.check_admission(1, 1)

    def wait_until_idle(self, seconds: float) -> bool:
        """Hold the calling thread while sequences run or wait, for so long at most.

        Whether there are none now.
        """
        return self._idle.wait(seconds)

    @property
    def occupancy(self) -> Occupancy:
        """How full it is now."""
        scheduler = self._scheduler
        share = scheduler.cache.used / scheduler.cache.size
        return Occupancy(scheduler.running, scheduler.waiting, share)

    async def close(self) -> None:
        """Let the running step end, fail what is not done, and end the thread."""
        with self._wake:
            self._closed = True
            self._idle.set()
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)
        self._fail_all(Unavailable("the model was unloaded while the request waited"))

    def _submit(
        self, prompts: Sequence[Prompt], deadline: float | None, *, streams: bool
    ) -> tuple[GenerationJob, _Waiter]:
        with self._wake:
            if self._closed:
                raise Unavailable("the model is being unloaded, expected a model that is ready")
            job = self._scheduler.submit(prompts, time.monotonic(), deadline=deadline, streams=streams)
            waiter = self._waiters[job] = _Waiter(len(prompts))
            self._idle.clear()
            self._wake.notify()
        self._observe_occupancy(self.occupancy)
        return job, waiter

    def _forget(self, job: GenerationJob, waiter: _Waiter) -> None:
        self._waiters.pop(job, None)
        if waiter.missing:
            with self._wake:
                self._scheduler.cancel(job)
            self._observe_occupancy(self.occupancy)

    # -- device thread ---------------------------------------------------------------------------

    def _run_device(self) -> None:
        try:
            self._on_thread_start()
            while (chunks := self._take_step()) is not None:
                self._run_step(chunks)
        except BaseException as error:
            # Only a defect of ours gets here; whoever waits must be told all the same.
            self._post(self._fail_all, ForwardFailed(f"the device thread failed: {error!r}"))

    def _take_step(self) -> Sequence[Chunk] | None:
        with self._wake:
            while not self._closed:
                now = time.monotonic()
                if late := self._scheduler.expired(now):
                    self._post(self._deliver, [_news(sequence, with_token=False) for sequence in late], None)
                if chunks := self._scheduler.next_step(now):
                    return chunks
                self._idle.set()
                self._wake.wait()
        return None

    def _run_step(self, chunks: Sequence[Chunk]) -> None:
        began = time.monotonic()
        prompt_tokens = sum(chunk.count for chunk in chunks if not chunk.sequence.decodes)
        results = self._execute(chunks)
        now = time.monotonic()
        with self._wake:
            changed = self._scheduler.finished(chunks, results, now, now - began)
            report = self._report(changed, prompt_tokens, now - began)
        news = [_news(each) for each in changed if each.job.streams or each.done]
        self._post(self._deliver, news, report)

    def _execute(self, chunks: Sequence[Chunk]) -> list[Choice | Exception | None]:
        """A choice or an error per chunk. A step that fails is halved until the failing chunk is alone."""
        try:
            results = self._backend.step(chunks)
            if len(results) != len(chunks):
                raise RuntimeError(f"{len(results)} results for {len(chunks)} chunks")
            return list(results)
        except Exception as error:
            if len(chunks) == 1:
                return [error]
        middle = len(chunks) // 2
        return self._execute(chunks[:middle]) + self._execute(chunks[middle:])

    def _report(self, changed: Sequence[GeneratedSequence], prompt_tokens: int, seconds: float) -> StepReport:
        chosen = [each for each in changed if each.error is None]
        return StepReport(
            prompt_tokens=prompt_tokens,
            new_tokens=len(chosen),
            seconds=seconds,
            first_token_s=[each.gap_s for each in chosen if len(each.tokens) == 1],
            token_gap_s=[each.gap_s for each in chosen if len(each.tokens) > 1],
        )

    def _post(self, callback: Callable[..., None], *args: object) -> None:
        # At the end of the process the loop may be gone before this daemon thread is.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback, *args)

    # -- event loop ------------------------------------------------------------------------------

    def _deliver(
        self,
        news: Sequence[tuple[GenerationJob, NewToken | HFTasksError]],
        report: StepReport | None,
    ) -> None:
        for job, what in news:
            waiter = self._waiters.get(job)
            if waiter is None:
                continue
            if isinstance(what, HFTasksError):
                waiter.fail(what)
            else:
                waiter.tell(what)
        if report is not None:
            self._observe(report)
        self._observe_occupancy(self.occupancy)

    def _fail_all(self, error: HFTasksError) -> None:
        self._closed = True
        for waiter in self._waiters.values():
            waiter.fail(error)


def _news(
    sequence: GeneratedSequence, *, with_token: bool = True
) -> tuple[GenerationJob, NewToken | HFTasksError]:
    if sequence.error is not None:
        return sequence.job, _as_ours(sequence.error)
    token = sequence.tokens[-1] if with_token else None
    logprob = sequence.logprobs[-1] if with_token and sequence.logprobs else None
    return sequence.job, NewToken(sequence.index, token, logprob, sequence.finish)


def _results(job: GenerationJob) -> list[Generated]:
    """Raises `DeadlineExceeded` if there is nothing at all."""
    if not any(sequence.tokens for sequence in job.sequences):
        raise DeadlineExceeded("no token within the time allowed, expected one by then @ timeout_ms")
    return [
        Generated(sequence.tokens, sequence.finish or FinishReason.TIMEOUT, sequence.logprobs)
        for sequence in job.sequences
    ]


def _as_ours(error: Exception) -> HFTasksError:
    if isinstance(error, HFTasksError):
        return error
    return ForwardFailed(f"the model failed on this input: {type(error).__name__}: {error}")
