"""The policy of generation on a simulated clock: nothing lost, nothing over budget, nobody starved."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from mlserver_hftasks.engine.sequences import Chunk, FinishReason, GenerationJob
from mlserver_hftasks.engine.steps import SHARE, StepLimits, StepScheduler
from mlserver_hftasks.errors import Overloaded, RequestTooLarge
from tests.unit.engine.stepper import HashStepper, continued, prompt

STEP_S = 0.01


class Simulation:
    """A scheduler, a model and a clock."""

    def __init__(self, cache_tokens: int = 1000, **limits: int) -> None:
        self.scheduler = StepScheduler(StepLimits(**limits), cache_tokens)
        self.stepper = HashStepper(cache_tokens)
        self.now = 0.0

    def submit(self, *prompts: object, **options: object) -> GenerationJob:
        return self.scheduler.submit(prompts, self.now, **options)  # type: ignore[arg-type]

    def step(self) -> list[Chunk]:
        self.scheduler.expired(self.now)
        chunks = self.scheduler.next_step(self.now)
        if chunks:
            results = self.stepper.step(chunks)
            self.now += STEP_S
            self.scheduler.finished(chunks, results, self.now, STEP_S)
        return chunks

    def run(self) -> int:
        """Until nothing is left; the number of steps."""
        steps = 0
        while self.step():
            steps += 1
            assert steps < 10_000
        return steps


def tokens_of(job: GenerationJob) -> list[list[int]]:
    return [sequence.tokens for sequence in job.sequences]


class AnyOrder(RuleBasedStateMachine):
    """Requests come, go and expire in any order."""

    jobs = Bundle("jobs")

    @initialize(cache=st.integers(20, 200), sequences=st.integers(1, 6), prefill=st.integers(1, 30))
    def begin(self, cache: int, sequences: int, prefill: int) -> None:
        self.sim = Simulation(
            cache, max_sequences=sequences, prefill_tokens=prefill, max_queue_rows=12, max_queue_tokens=400
        )
        self.live: list[GenerationJob] = []
        self.cancelled: list[GenerationJob] = []

    @rule(
        target=jobs,
        lengths=st.lists(st.tuples(st.integers(1, 25), st.integers(1, 9)), min_size=1, max_size=6),
        patience=st.none() | st.floats(0.0, 0.3),
    )
    def submit(self, lengths: list[tuple[int, int]], patience: float | None) -> GenerationJob | None:
        prompts = [
            prompt(*range(5 + number, 5 + number + length), new=new)
            for number, (length, new) in enumerate(lengths)
        ]
        deadline = None if patience is None else self.sim.now + patience
        before = self.sim.scheduler.waiting, self.sim.scheduler.waiting_tokens
        try:
            job = self.sim.submit(*prompts, deadline=deadline)
        except (Overloaded, RequestTooLarge):
            assert before == (self.sim.scheduler.waiting, self.sim.scheduler.waiting_tokens)
            return None
        self.live.append(job)
        return job

    @rule(job=consumes(jobs))
    def cancel(self, job: GenerationJob | None) -> None:
        if job is not None and job in self.live:
            self.sim.scheduler.cancel(job)
            self.live.remove(job)

    @rule(seconds=st.floats(0.0, 0.2))
    def wait(self, seconds: float) -> None:
        self.sim.now += seconds

    @rule()
    def step(self) -> None:
        limits = self.sim.scheduler.limits
        decoding = sum(each.decodes for job in self.live for each in job.sequences if each.extent >= 0)
        chunks = self.sim.step()
        assert len({chunk.sequence for chunk in chunks}) == len(chunks) <= limits.max_sequences
        assert sum(chunk.count for chunk in chunks) <= decoding + limits.prefill_tokens

    @rule()
    def finish(self) -> None:
        self.sim.run()
        for job in self.live:
            for sequence in job.sequences:
                assert sequence.done
        assert self.sim.scheduler.cache.used == 0
        assert self.sim.scheduler.waiting == self.sim.scheduler.waiting_tokens == 0

    @invariant()
    def every_token_is_what_the_prompt_alone_gets(self) -> None:
        for job in getattr(self, "live", []):
            for sequence in job.sequences:
                wanted = continued(sequence.prompt.tokens.tolist(), len(sequence.tokens))
                assert sequence.tokens == wanted
                if sequence.finish is FinishReason.LENGTH:
                    assert len(wanted) == sequence.prompt.max_new_tokens

    @invariant()
    def the_cache_holds_what_runs_and_nothing_else(self) -> None:
        if not hasattr(self, "sim"):
            return
        held = [each for job in self.live for each in job.sequences if each.extent >= 0]
        assert self.sim.scheduler.cache.used == sum(each.prompt.reserved for each in held)
        assert self.sim.scheduler.running == len(held)
        waiting = [each for job in self.live for each in job.waiting]
        assert self.sim.scheduler.waiting == len(waiting)
        ends = sorted((each.extent, each.extent + each.prompt.reserved) for each in held)
        assert all(end <= start for (_, end), (start, _) in pairwise(ends))


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_prompt_is_fed_in_pieces_while_others_decode() -> None:
    sim = Simulation(prefill_tokens=10)
    short = sim.submit(prompt(1, new=8))
    sim.step()
    long = sim.submit(prompt(*range(25), new=2))
    fed = [sum(chunk.count for chunk in sim.step() if chunk.sequence.job is long) for _ in range(4)]
    assert fed == [10, 10, 5, 1]
    assert len(short.sequences[0].tokens) == 5, "it had a token in every step"


def test_a_full_cache_queues() -> None:
    sim = Simulation(cache_tokens=20)
    jobs = [sim.submit(prompt(*range(8), new=5)) for _ in range(4)]
    sim.step()
    assert (sim.scheduler.running, sim.scheduler.waiting) == (1, 3)
    sim.run()
    assert all(tokens_of(job) == [continued(range(8), 5)] for job in jobs)


def test_what_never_fits_is_refused() -> None:
    sim = Simulation(cache_tokens=20)
    with pytest.raises(RequestTooLarge, match="21 tokens, expected at most 20"):
        sim.submit(prompt(*range(17), new=5))


def test_a_full_queue_refuses_and_says_when_to_come_again() -> None:
    sim = Simulation(max_sequences=1, max_queue_rows=3)
    sim.submit(prompt(1), prompt(2), prompt(3))
    with pytest.raises(Overloaded, match="3 rows wait") as refused:
        sim.submit(prompt(4))
    assert refused.value.retry_after_s > 0
    with pytest.raises(RequestTooLarge):
        sim.submit(*[prompt(1)] * 4)


def test_one_prompt_does_not_wait_for_a_hundred() -> None:
    sim = Simulation(max_sequences=8)
    bulk = sim.submit(*[prompt(number, new=20) for number in range(80)])
    for _ in range(5):
        sim.step()
    assert bulk.running == int(SHARE * 8)
    single = sim.submit(prompt(1, 2, 3, new=20))
    sim.step()
    assert single.running == 1
    sim.run()
    assert all(len(tokens) == 20 for tokens in tokens_of(bulk))


def test_a_large_prompt_is_not_starved_by_small_ones() -> None:
    sim = Simulation(cache_tokens=40, max_sequences=8)
    sim.submit(prompt(*range(10), new=6))
    large = sim.submit(prompt(*range(30), new=8))
    for number in range(400):
        sim.submit(prompt(number, 1, 2, 3, 4, 5, new=6))
        sim.step()
        if large.sequences[0].tokens:
            break
    assert large.sequences[0].tokens, "small ones went first for ever"


def test_late_ones_end_with_what_they_have() -> None:
    sim = Simulation(max_sequences=1)
    job = sim.submit(prompt(1, new=50), prompt(2, new=50), deadline=3.5 * STEP_S)
    sim.step()
    other = sim.submit(prompt(3, new=4))
    sim.run()
    assert [each.finish for each in job.sequences] == [FinishReason.TIMEOUT] * 2
    assert [len(tokens) for tokens in tokens_of(job)] == [4, 0]
    assert tokens_of(other) == [continued([3], 4)]
    assert sim.scheduler.cache.used == 0


def test_reasons_to_end() -> None:
    sim = Simulation()
    answer = continued([1, 2], 9)
    end, stop = answer[3], answer[6]
    ends = sim.submit(prompt(1, 2, new=9, eos=frozenset({end})))
    held = sim.submit(prompt(1, 2, new=9, eos=frozenset({end}), min_new_tokens=0))
    stops = sim.submit(prompt(1, 2, new=9, stopper=lambda: lambda token: token == stop))
    whole = sim.submit(prompt(1, 2, new=9))
    sim.run()
    assert tokens_of(ends) == tokens_of(held) == [answer[: answer.index(end) + 1]]
    assert tokens_of(stops) == [answer[: answer.index(stop) + 1]]
    assert tokens_of(whole) == [answer]
    reasons = [job.sequences[0].finish for job in (ends, stops, whole)]
    assert reasons == [FinishReason.EOS, FinishReason.STOP, FinishReason.LENGTH]


def test_a_cancelled_job_frees_its_cache_also_while_a_step_runs() -> None:
    sim = Simulation()
    job = sim.submit(prompt(*range(10), new=9))
    chunks = sim.scheduler.next_step(sim.now)
    results = sim.stepper.step(chunks)
    sim.scheduler.cancel(job)
    assert sim.scheduler.cache.used == 0
    assert sim.scheduler.finished(chunks, results, sim.now, STEP_S) == []
    assert not job.sequences[0].tokens


def test_seeds_make_draws_repeatable() -> None:
    sim = Simulation()
    jobs = [sim.submit(prompt(1, seed=seed)) for seed in (7, 7, 8, None, None)]
    draws = [job.sequences[0].random.random() for job in jobs]
    assert draws[0] == draws[1]
    assert len(set(draws)) == 4


def test_a_step_that_was_made_keeps_its_places_when_a_request_is_cancelled() -> None:
    """The device thread may read them later; elsewhere in the cache are another request's tokens."""
    scheduler = StepScheduler(StepLimits(), 100)
    jobs = [scheduler.submit([prompt(1, 2, 3)], 0.0) for _ in range(2)]
    chunks = scheduler.next_step(0.0)
    before = [chunk.extent for chunk in chunks]
    scheduler.cancel(jobs[1])
    assert [chunk.extent for chunk in chunks] == before
    assert jobs[1].sequences[0].extent == -1
