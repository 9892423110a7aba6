"""Which tokens the next step feeds to the model. Pure policy: no threads, torch or asyncio; told the time.

Sequences join and leave at every step. A step has the last token of each sequence that decodes, then pieces
of prompts up to `prefill_tokens`, so that a long prompt delays nobody's next token by more than such a piece.

Who joins: jobs in the order of their due dates, `enqueued_at + PATIENCE * seconds they take alone`, as in
`scheduler`. A sequence joins with all the cache that it may ever need, so nothing that runs is evicted.
What does not fit into the cache is passed over, until its job is due: then nobody joins before it.
One job takes no more than `SHARE` of the places and of the cache, so that others find some free.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mlserver_hftasks.engine.extents import Extents
from mlserver_hftasks.engine.room import check_room
from mlserver_hftasks.engine.sequences import (
    Choice,
    Chunk,
    FinishReason,
    GeneratedSequence,
    GenerationJob,
    Prompt,
)
from mlserver_hftasks.errors import RequestTooLarge

PATIENCE = 4.0
"""A job is due after this many times the seconds that it takes alone."""
SHARE = 0.75
"""Of places and cache that the sequences of one job may take, save its first sequence."""
PROMPT_TOKEN_COST = 0.1
"""A token of a prompt costs about so much of a generated one: many of them share a step."""
MAX_PASSED_OVER = 8
"""How many jobs that do not fit are passed over in one step."""
USUAL_TOKEN_S = 0.01
"""Seconds per generated token and sequence, until it is known."""
MEMORY = 0.9


@dataclass(frozen=True, slots=True)
class StepLimits:
    """Bounds of one generating engine, all counts."""

    max_sequences: int = 64
    """Most that run at once."""
    prefill_tokens: int = 128
    """Most tokens of prompts in a step."""
    max_queue_rows: int = 8192
    """Most sequences that wait."""
    max_queue_tokens: int = 1_000_000
    """Most tokens of prompts and answers that wait."""


class StepScheduler:
    """Jobs in, steps out."""

    def __init__(self, limits: StepLimits, cache_tokens: int) -> None:
        self.limits = limits
        self.cache = Extents(cache_tokens)
        self._queue: list[tuple[float, int, GenerationJob]] = []
        """A heap of the jobs with sequences that wait."""
        self._running: list[GeneratedSequence] = []
        self._number = itertools.count()
        self._seeds = random.Random()
        self._token_s = USUAL_TOKEN_S
        self._step_rate = USUAL_TOKEN_S
        self.waiting = 0
        self.waiting_tokens = 0

    @property
    def running(self) -> int:
        """Sequences that have begun and are not done."""
        return len(self._running)

    # -- jobs in ---------------------------------------------------------------------------------

    def submit(
        self,
        prompts: Sequence[Prompt],
        now: float,
        *,
        deadline: float | None = None,
        streams: bool = False,
    ) -> GenerationJob:
        """Queue the prompts of one request.

        Raises `Overloaded` when the queue is full, `RequestTooLarge` for what no cache or queue of these
        sizes could take.
        """
        tokens = sum(prompt.reserved for prompt in prompts)
        longest = max(prompt.reserved for prompt in prompts)
        if longest > self.cache.size:
            raise RequestTooLarge(
                f"a prompt and its answer of {longest} tokens, expected at most {self.cache.size} "
                "@ kv_cache_tokens"
            )
        self.check_admission(len(prompts), tokens)
        due = now + PATIENCE * self._seconds_alone(prompts)
        job = GenerationJob(now, due, deadline, streams)
        job.sequences = tuple(
            GeneratedSequence(job, prompt, index, self._generator(prompt), told_at=now)
            for index, prompt in enumerate(prompts)
        )
        job.waiting = list(reversed(job.sequences))
        self._push(job)
        self.waiting += len(prompts)
        self.waiting_tokens += tokens
        return job

    def check_admission(self, sequences: int, tokens: int) -> None:
        """Raise `Overloaded` or `RequestTooLarge` if a job of that size would not be taken now."""
        check_room(
            (
                ("rows", self.waiting, sequences, self.limits.max_queue_rows),
                ("tokens", self.waiting_tokens, tokens, self.limits.max_queue_tokens),
            ),
            lambda: self.waiting_tokens * self._step_rate,
        )

    def cancel(self, job: GenerationJob) -> None:
        """Forget the job; what it holds of the cache is free at once."""
        job.cancelled = True
        self._drop_waiting(job)
        for sequence in [each for each in self._running if each.job is job]:
            self._leave(sequence)

    # -- steps out -------------------------------------------------------------------------------

    def expired(self, now: float) -> list[GeneratedSequence]:
        """Sequences whose deadline has passed; they are done, with the tokens they have."""
        late: list[GeneratedSequence] = []
        for _, _, job in self._queue:
            if job.deadline is not None and job.deadline <= now:
                late += job.waiting
                self._drop_waiting(job)
        running = [each for each in self._running if each.job.deadline is not None]
        for sequence in running:
            if sequence.job.deadline is not None and sequence.job.deadline <= now:
                self._leave(sequence)
                late.append(sequence)
        for sequence in late:
            sequence.finish = FinishReason.TIMEOUT
        return late

    def next_step(self, now: float) -> list[Chunk]:
        """What to feed to the model now; nothing if nobody waits."""
        self._join(now)
        chunks = [Chunk(sequence, 1) for sequence in self._running if sequence.decodes]
        budget = self.limits.prefill_tokens
        for sequence in sorted(
            (each for each in self._running if not each.decodes), key=lambda each: each.job.due
        ):
            count = min(budget, len(sequence.prompt.tokens) - sequence.cached)
            if count < 1:
                break
            chunks.append(Chunk(sequence, count))
            budget -= count
        return chunks

    def finished(
        self,
        chunks: Sequence[Chunk],
        results: Sequence[Choice | Exception | None],
        now: float,
        seconds: float,
    ) -> list[GeneratedSequence]:
        """Take in a step's results; returns the sequences that have a new token or an error."""
        changed: list[GeneratedSequence] = []
        for chunk, result in zip(chunks, results, strict=True):
            sequence = chunk.sequence
            if sequence.job.cancelled or sequence.done:
                continue
            if isinstance(result, Exception):
                sequence.error = result
            else:
                sequence.cached += chunk.count
                if result is None:
                    continue
                self._append(sequence, result, now)
            changed.append(sequence)
            if sequence.done:
                self._leave(sequence)
        self._learn(len(changed), seconds)
        return changed

    def _append(self, sequence: GeneratedSequence, choice: Choice, now: float) -> None:
        sequence.tokens.append(choice.token)
        if choice.logprob is not None:
            sequence.logprobs.append(choice.logprob)
        sequence.gap_s, sequence.told_at = now - sequence.told_at, now
        if choice.token in sequence.prompt.eos:
            sequence.finish = FinishReason.EOS
        elif sequence.stops is not None and sequence.stops(choice.token):
            sequence.finish = FinishReason.STOP
        elif len(sequence.tokens) >= sequence.prompt.max_new_tokens:
            sequence.finish = FinishReason.LENGTH

    # -- joining and leaving ---------------------------------------------------------------------

    def _join(self, now: float) -> None:
        passed_over: list[GenerationJob] = []
        while self._queue and len(self._running) < self.limits.max_sequences:
            job = heapq.heappop(self._queue)[2]
            while job.waiting and len(self._running) < self.limits.max_sequences:
                if not self._may_take(job):
                    break
                if not self._begin(job):
                    break
            if job.waiting:
                passed_over.append(job)
                blocked = self._may_take(job) and job.due <= now
                if blocked or len(passed_over) > MAX_PASSED_OVER:
                    break
        for job in passed_over:
            self._push(job)

    def _may_take(self, job: GenerationJob) -> bool:
        """Whether the job's next sequence leaves others their share."""
        if not job.running:
            return True
        tokens = job.held_tokens + job.waiting[-1].prompt.reserved
        return job.running < SHARE * self.limits.max_sequences and tokens <= SHARE * self.cache.size

    def _begin(self, job: GenerationJob) -> bool:
        sequence = job.waiting[-1]
        extent = self.cache.take(sequence.prompt.reserved)
        if extent is None:
            return False
        job.waiting.pop()
        sequence.extent = extent
        if sequence.prompt.stopper is not None:
            sequence.stops = sequence.prompt.stopper()
        job.running += 1
        job.held_tokens += sequence.prompt.reserved
        self.waiting -= 1
        self.waiting_tokens -= sequence.prompt.reserved
        self._running.append(sequence)
        return True

    def _leave(self, sequence: GeneratedSequence) -> None:
        self._running.remove(sequence)
        self.cache.give_back(sequence.extent, sequence.prompt.reserved)
        sequence.extent = -1
        sequence.job.running -= 1
        sequence.job.held_tokens -= sequence.prompt.reserved

    def _drop_waiting(self, job: GenerationJob) -> None:
        self.waiting -= len(job.waiting)
        self.waiting_tokens -= sum(sequence.prompt.reserved for sequence in job.waiting)
        job.waiting.clear()

    def _push(self, job: GenerationJob) -> None:
        heapq.heappush(self._queue, (job.due, next(self._number), job))

    def jobs(self) -> Iterator[GenerationJob]:
        """The jobs with sequences that wait."""
        return (job for _, _, job in self._queue if job.waiting)

    # -- what it costs ---------------------------------------------------------------------------

    def _seconds_alone(self, prompts: Sequence[Prompt]) -> float:
        """About what the prompts take by themselves, together as far as there are places."""
        longest = max(prompt.max_new_tokens for prompt in prompts)
        total = sum(PROMPT_TOKEN_COST * len(prompt.tokens) + prompt.max_new_tokens for prompt in prompts)
        return self._token_s * max(longest, total / self.limits.max_sequences)

    def _learn(self, tokens: int, seconds: float) -> None:
        if tokens:
            self._token_s = MEMORY * self._token_s + (1 - MEMORY) * seconds
            self._step_rate = MEMORY * self._step_rate + (1 - MEMORY) * seconds / tokens

    def _generator(self, prompt: Prompt) -> random.Random:
        seed = self._seeds.getrandbits(64) if prompt.seed is None else prompt.seed
        return random.Random(seed)
