"""The scheduler on a simulated clock: nothing lost, doubled, over budget, out of turn or starved."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from mlserver_hftasks.engine.cost import CostModel
from mlserver_hftasks.engine.rows import Batch, Job, Row
from mlserver_hftasks.engine.scheduler import (
    LEAST_BUDGET_TOKENS,
    MIN_BUDGET_TOKENS,
    Limits,
    Scheduler,
)
from mlserver_hftasks.errors import Overloaded, RequestTooLarge

OVERHEAD_S, PER_TOKEN_S = 2e-3, 1e-3


def row(tokens: int, key: Hashable = None) -> Row:
    return Row({"input_ids": np.zeros(tokens, dtype=np.int64)}, key)


def rows(*tokens: int, key: Hashable = None) -> list[Row]:
    return [row(count, key) for count in tokens]


def cost_model(overhead_s: float = OVERHEAD_S, per_token_s: float = PER_TOKEN_S) -> CostModel:
    """One that knows, and that batches do not change, since they take as long as it says."""
    model = CostModel()
    for cost in (1, 10, 100, 1000):
        model.observe(cost, overhead_s + per_token_s * cost, lasting=True)
    return model


def scheduler(*, padded: bool = False, cost: CostModel | None = None, **limits: float) -> Scheduler:
    return Scheduler(Limits(**limits), cost or cost_model(), padded=padded)  # type: ignore[arg-type]


def paid(batch: Batch, *, padded: bool) -> int:
    costs = [ticket.row.cost for ticket in batch.tickets]
    return len(costs) * max(costs) if padded else sum(costs)


def check_batch(batch: Batch, of: Scheduler, budget: int, *, padded: bool) -> None:
    assert batch.cost == paid(batch, padded=padded)
    assert len(batch.tickets) <= of.limits.max_batch_rows
    assert len(batch.tickets) == 1 or batch.cost <= budget
    assert budget <= of.limits.max_batch_tokens
    assert len({ticket.row.key for ticket in batch.tickets}) == 1


# -- any order of events -------------------------------------------------------------------------


class Events(RuleBasedStateMachine):
    """Submits, cancels and batches in any order, with a cost model that keeps changing its mind."""

    jobs: Bundle[Job] = Bundle("jobs")

    @initialize(
        padded=st.booleans(),
        batch_rows=st.integers(1, 6),
        batch_tokens=st.integers(1, 60),
        latency_target=st.booleans(),
    )
    def start(self, padded: bool, batch_rows: int, batch_tokens: int, latency_target: bool) -> None:
        self.padded, self.now = padded, 100.0
        limits = Limits(batch_rows, batch_tokens, 40, 300, 5.0 if latency_target else None)
        self.scheduler = Scheduler(limits, CostModel(), padded=padded)
        self.waiting: dict[Job, Counter[int]] = {}
        self.running: Batch | None = None

    @rule(
        target=jobs,
        tokens=st.lists(st.integers(1, 30), min_size=1, max_size=12),
        key=st.sampled_from(["a", "b", ("c", 1)]),
        later=st.floats(0, 3),
    )
    def submit(self, tokens: list[int], key: Hashable, later: float) -> Job | None:
        self.now += later
        before = self.scheduler.queued_rows, self.scheduler.queued_tokens, list(self.scheduler.jobs())
        try:
            job = self.scheduler.submit(rows(*tokens, key=key), self.now)
        except Overloaded as refusal:
            assert refusal.retry_after_s >= 0
            after = self.scheduler.queued_rows, self.scheduler.queued_tokens, list(self.scheduler.jobs())
            assert after == before
            return None
        self.waiting[job] = Counter(range(len(tokens)))
        return job

    @rule(job=consumes(jobs))
    def cancel(self, job: Job | None) -> None:
        if job is not None:
            self.scheduler.cancel(job)
            self.scheduler.cancel(job)
            self.waiting.pop(job, None)

    @rule(seconds=st.floats(0, 4))
    def batch_ends(self, seconds: float) -> None:
        self.now += seconds
        if self.running is not None:
            self.scheduler.finished(self.running, seconds or None)
            self.running = None

    @rule()
    def batch_begins(self) -> None:
        if self.running is None:
            self._next_batch()

    def _next_batch(self) -> Batch | None:
        budget = self.scheduler.budget_tokens
        batch = self.scheduler.next_batch(self.now)
        assert (batch is None) == (not self.waiting)
        if batch is None:
            return None
        check_batch(batch, self.scheduler, budget, padded=self.padded)
        for ticket in batch.tickets:
            assert self.waiting[ticket.job][ticket.index] == 1  # waiting, and only once in the batch
            del self.waiting[ticket.job][ticket.index]
            if not self.waiting[ticket.job]:
                del self.waiting[ticket.job]
        self.running = batch
        return batch

    @invariant()
    def counters_add_up(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        left = [job.rows[index].cost for job, indices in self.waiting.items() for index in indices]
        assert self.scheduler.queued_rows == len(left)
        assert self.scheduler.queued_tokens == sum(left)
        assert set(self.scheduler.jobs()) == set(self.waiting)
        for job, indices in self.waiting.items():
            assert sorted(job.pending) == sorted(indices)
            assert job.remaining_tokens == sum(job.rows[index].cost for index in indices)

    def teardown(self) -> None:
        if hasattr(self, "scheduler"):
            while self._next_batch() is not None:
                pass
            assert (self.scheduler.queued_rows, self.scheduler.queued_tokens) == (0, 0)
            assert not self.waiting
            assert self.scheduler.next_batch(self.now) is None


TestEvents = Events.TestCase
TestEvents.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


# -- a device that takes as long as the cost model says ------------------------------------------


@dataclass
class Device:
    """Runs batches one after another; `arrivals` are (time, rows), in order."""

    scheduler: Scheduler
    padded: bool = False
    now: float = 0.0
    jobs: list[Job] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)
    done_at: dict[Job, float] = field(default_factory=dict)

    def submit(self, *of: Row, at: float | None = None) -> Job:
        self.jobs.append(self.scheduler.submit(of, self.now if at is None else at))
        return self.jobs[-1]

    def step(self) -> Batch | None:
        budget = self.scheduler.budget_tokens
        batch = self.scheduler.next_batch(self.now)
        if batch is not None:
            check_batch(batch, self.scheduler, budget, padded=self.padded)
            seconds = OVERHEAD_S + PER_TOKEN_S * batch.cost
            self.now += seconds
            self.scheduler.finished(batch, None)  # so that the model stays exactly as it is
            self.batches.append(batch)
            for ticket in batch.tickets:
                if not ticket.job.pending:
                    self.done_at[ticket.job] = self.now
        return batch

    def run(
        self, arrivals: Iterable[tuple[float, Sequence[Row]]] = (), until: Callable[[], bool] = bool
    ) -> None:
        """Run until no more arrives and nothing waits, or until `until` says so."""
        coming = iter([*arrivals])
        arrival = next(coming, None)
        while not until():
            while arrival is not None and arrival[0] <= self.now:
                self.submit(*arrival[1], at=arrival[0])
                arrival = next(coming, None)
            if self.step() is None:
                if arrival is None:
                    return
                self.now = arrival[0]


@pytest.fixture(params=[False, True], ids=["packed", "padded"])
def padded(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@given(
    arrivals=st.lists(
        st.tuples(
            st.floats(0, 0.5),
            st.sampled_from([(5,), (9,), (3, 8), (5, 5, 5), tuple(range(1, 20)), (30,) * 40]),
            st.sampled_from("ab"),
        ),
        max_size=40,
    ),
    padded=st.booleans(),
    batch_rows=st.integers(1, 20),
    batch_tokens=st.integers(1, 200),
)
@settings(max_examples=150, deadline=None)
def test_first_come_first_served_among_equals(
    arrivals: list[tuple[float, tuple[int, ...], str]], padded: bool, batch_rows: int, batch_tokens: int
) -> None:
    made = scheduler(padded=padded, max_batch_rows=batch_rows, max_batch_tokens=batch_tokens)
    device, time = Device(made, padded), 0.0
    timed = []
    for gap, tokens, key in arrivals:
        time += gap
        timed.append((time, rows(*tokens, key=key)))
    device.run(timed)
    assert len(device.done_at) == len(arrivals)
    last_of: dict[tuple[Hashable, tuple[int, ...]], float] = {}
    for job in device.jobs:
        size = job.key, tuple(row.cost for row in job.rows)
        assert device.done_at[job] >= last_of.get(size, 0)
        last_of[size] = device.done_at[job]


@pytest.mark.parametrize("other_key", [False, True])
def test_a_short_job_goes_into_the_next_batch(padded: bool, other_key: bool) -> None:
    """At whatever point of a bulk job it comes."""
    bulk = rows(*np.random.default_rng(0).integers(5, 120, 200).tolist())
    whole = Device(scheduler(padded=padded), padded)
    whole.submit(*bulk)
    whole.run()
    assert len(whole.batches) > 30
    for batches in range(len(whole.batches)):
        device = Device(scheduler(padded=padded), padded)
        device.submit(*bulk)
        for _ in range(batches):
            device.step()
        short = device.submit(row(12, key="other" if other_key else None))
        batch = device.step()
        assert batch is not None
        assert short in {ticket.job for ticket in batch.tickets}


def test_an_idle_device_takes_a_job_at_once(padded: bool) -> None:
    device = Device(scheduler(padded=padded), padded)
    for tokens in (1, 400, 7):
        device.submit(row(tokens))
        batch = device.step()
        assert batch is not None
        assert [ticket.row.cost for ticket in batch.tickets] == [tokens]
    assert device.step() is None


@pytest.mark.parametrize("load", [0.5, 0.95, 1.5])
def test_a_bulk_job_does_not_starve_under_short_ones(padded: bool, load: float) -> None:
    device = Device(scheduler(padded=padded, max_queue_rows=10**6, max_queue_tokens=10**9), padded)
    bulk = device.submit(*rows(*[40] * 100))
    alone = 100 * 40 * PER_TOKEN_S * 1.05
    # Short jobs of 20 tokens for far longer than the bulk job may take, arriving at that share of the rate.
    gap = 20 * PER_TOKEN_S * 1.05 / load
    device.run(((i * gap, [row(20)]) for i in range(int(100 * alone / gap))), lambda: bulk in device.done_at)
    # It may be passed for four times as long as it takes, by as much as came in that time.
    assert device.done_at[bulk] <= (4 * max(load, 1) + 2) * alone


def test_no_key_starves_another(padded: bool) -> None:
    device = Device(scheduler(padded=padded, max_queue_rows=10**6, max_queue_tokens=10**9), padded)
    gap = 20 * PER_TOKEN_S
    arrivals = [(i * gap, [row(20, key="many")]) for i in range(5000)]
    arrivals.insert(100, (100 * gap, [row(60, key="few")]))
    device.run(arrivals, until=lambda: any(job.key == "few" for job in device.done_at))
    assert device.now < 120 * gap + 10 * 60 * PER_TOKEN_S


def test_short_jobs_wait_little_while_a_bulk_job_runs(padded: bool) -> None:
    """What long jobs fill up for a short one is half a batch.

    The short jobs bring half of what the device can carry, so the bulk job takes twice as long as alone.
    """
    device = Device(scheduler(padded=padded), padded)
    generator = np.random.default_rng(1)
    bulk = device.submit(*rows(*generator.integers(5, 60, 512).tolist()))
    arrivals = [(float(t), [row(int(generator.integers(5, 60)))]) for t in np.arange(0.05, 60, 0.07)]
    device.run(arrivals)
    longest_batch = max(OVERHEAD_S + PER_TOKEN_S * batch.cost for batch in device.batches)
    during = [job for job in device.jobs[1:] if job.enqueued_at < device.done_at[bulk]]
    assert len(during) >= 300
    waits = [device.done_at[job] - job.enqueued_at for job in during]
    assert np.quantile(waits, 0.95) <= 1.5 * longest_batch  # 1.7 and 1.8 if bulk filled every batch up
    assert device.done_at[bulk] <= 33  # 31 and 33 then: the bulk job pays little for it


def test_packed_batches_are_filled_with_what_fits() -> None:
    made = scheduler(max_batch_tokens=128)
    for tokens in (60, 90, 40, 28, 1):
        made.submit(rows(tokens), now=0.0)
    batch = made.next_batch(0.0)
    assert batch is not None
    assert sorted(ticket.row.cost for ticket in batch.tickets) == [1, 28, 40]  # the shortest are due first
    batch = made.next_batch(0.0)
    assert batch is not None
    assert [ticket.row.cost for ticket in batch.tickets] == [60]


def test_packed_batches_look_past_what_does_not_fit() -> None:
    unknowing = Scheduler(
        Limits(max_batch_tokens=100), CostModel(), padded=False
    )  # serves in order of arrival
    for tokens in (60, 90, 30, 80, 10):
        unknowing.submit(rows(tokens), now=0.0)
    batches = [unknowing.next_batch(0.0) for _ in range(3)]
    assert [[t.row.cost for t in batch.tickets] for batch in batches if batch] == [[60, 30, 10], [90], [80]]


def test_padded_batches_hold_rows_of_like_length() -> None:
    generator = np.random.default_rng(2)
    device = Device(scheduler(padded=True, max_batch_rows=32, max_batch_tokens=2048), padded=True)
    tokens = generator.integers(4, 200, 512)
    for chunk in tokens.reshape(-1, 8):
        device.submit(*rows(*chunk.tolist()))
    device.run()
    assert sum(batch.cost for batch in device.batches) < 1.15 * tokens.sum()


def test_padded_batches_take_the_more_urgent_of_two_rows_of_one_length() -> None:
    unknowing = Scheduler(Limits(max_batch_tokens=18), CostModel(), padded=True)  # serves in order of arrival
    jobs = [unknowing.submit(rows(tokens), now=now) for now, tokens in enumerate((6, 5, 5, 5))]
    batch = unknowing.next_batch(5.0)
    assert batch is not None
    assert {ticket.job for ticket in batch.tickets} == set(jobs[:3])


@pytest.mark.parametrize("model", [CostModel(), cost_model(0.0)], ids=["unknown", "no overhead"])
def test_equal_rows_share_a_padded_batch_whatever_the_cost_model_knows(model: CostModel) -> None:
    made = Scheduler(Limits(), model, padded=True)
    for _ in range(8):
        made.submit(rows(10), 0.0)
    batch = made.next_batch(0.0)
    assert batch is not None
    assert len(batch.tickets) == 8


def test_a_row_over_the_budget_goes_alone(padded: bool) -> None:
    made = scheduler(padded=padded, max_batch_tokens=50)
    made.submit(rows(80, 10, 10), now=0.0)
    batches = [made.next_batch(0.0) for _ in range(2)]
    assert sorted(sorted(t.row.cost for t in batch.tickets) for batch in batches if batch) == [[10, 10], [80]]


def test_rows_of_one_job_share_one_key() -> None:
    made = scheduler()
    for wrong in ([], [row(3, "a"), row(3, "b")]):
        with pytest.raises(ValueError, match="one key"):
            made.submit(wrong, 0.0)
    assert made.queued_rows == 0


# -- budget --------------------------------------------------------------------------------------


def test_budget_is_the_knee_within_the_limits() -> None:
    knee = 19 * OVERHEAD_S / PER_TOKEN_S
    assert scheduler(cost=cost_model(overhead_s=10 * OVERHEAD_S)).budget_tokens == pytest.approx(
        10 * knee, abs=1
    )
    assert scheduler(cost=cost_model(overhead_s=10 * OVERHEAD_S), max_batch_tokens=200).budget_tokens == 200
    assert scheduler().budget_tokens == 128  # the knee, 38, is less than the least budget
    assert scheduler(cost=CostModel(), max_batch_tokens=777).budget_tokens == 777


def test_with_a_target_two_batches_fit_into_what_admission_allows() -> None:
    made = scheduler(cost=cost_model(overhead_s=0.02), latency_target_s=0.75)
    assert made.cost.seconds(made.budget_tokens) == pytest.approx(
        made.admission_share * 0.75 / 2, abs=2 * PER_TOKEN_S
    )


def test_a_small_target_makes_small_batches() -> None:
    assert scheduler(latency_target_s=0.1).budget_tokens < MIN_BUDGET_TOKENS
    assert scheduler(latency_target_s=1e-6).budget_tokens == LEAST_BUDGET_TOKENS


# -- admission -----------------------------------------------------------------------------------


def state(of: Scheduler) -> tuple[int, int, list[Job]]:
    return of.queued_rows, of.queued_tokens, list(of.jobs())


def test_queue_limits() -> None:
    made = scheduler(max_queue_rows=4, max_queue_tokens=100)
    made.submit(rows(20, 20, 20), 0.0)
    before = state(made)
    with pytest.raises(Overloaded, match="max_queue_rows") as refusal:
        made.submit(rows(1, 1), 0.0)
    assert refusal.value.retry_after_s == pytest.approx(made.seconds_of(60))
    with pytest.raises(Overloaded, match="max_queue_tokens"):
        made.submit(rows(41), 0.0)
    assert state(made) == before
    made.submit(rows(40), 0.0)
    with pytest.raises(Overloaded):
        made.check_admission(1, 1, 0.0)
    made.next_batch(0.0)
    made.check_admission(1, 1, 0.0)


def test_cancel_gives_exactly_the_waiting_rows_back() -> None:
    made = scheduler(max_batch_rows=2)
    job = made.submit(rows(10, 20, 30), 0.0)
    other = made.submit(rows(5), 0.0)
    first = made.next_batch(0.0)
    assert first is not None
    assert [(t.job, t.row.cost) for t in first.tickets] == [(other, 5), (job, 10)]
    assert (made.queued_rows, made.queued_tokens) == (2, 50)
    made.cancel(job)
    made.cancel(job)
    assert (made.queued_rows, made.queued_tokens) == (0, 0)
    assert made.next_batch(0.0) is None
    made.cancel(other)  # too late: it runs
    assert (made.queued_rows, made.queued_tokens) == (0, 0)


def test_an_idle_engine_admits_whatever_the_target(padded: bool) -> None:
    made = scheduler(padded=padded, latency_target_s=0.001)
    made.submit(rows(*[100] * 50), 0.0)


def test_a_request_that_alone_is_over_a_queue_limit_can_never_be_taken() -> None:
    made = scheduler(max_queue_rows=2, max_queue_tokens=100)
    with pytest.raises(RequestTooLarge, match="brings 3 rows, expected at most 2 @ max_queue_rows"):
        made.submit(rows(1, 1, 1), 0.0)
    with pytest.raises(RequestTooLarge, match="max_queue_tokens"):
        made.submit(rows(101), 0.0)


def test_predicted_latency_over_the_target_is_refused() -> None:
    made = scheduler(latency_target_s=0.55, max_batch_tokens=100)
    seconds = OVERHEAD_S + 0.1
    made.submit(rows(*[100] * 3), 0.0)
    assert made.next_batch(0.0) is not None
    # One batch runs and two wait, ahead of a job that is as long. A job of one batch goes before them.
    assert made.predicted_latency_s(300, 0.0) == (True, pytest.approx(4 * seconds))
    assert made.predicted_latency_s(100, 0.0) == (True, pytest.approx(2 * seconds))
    made.submit(rows(100), 0.0)
    # Rows that do not fit into the last batch ahead need one more.
    assert made.predicted_latency_s(100, 0.0) == (True, pytest.approx(3 * seconds))
    made.submit(rows(60), 0.0)
    assert made.predicted_latency_s(40, 0.0)[1] == pytest.approx(3 * seconds)
    assert made.predicted_latency_s(41, 0.0)[1] == pytest.approx(4 * seconds)
    before = state(made)
    with pytest.raises(Overloaded, match="latency_target_ms") as refusal:
        made.submit(rows(*[100] * 3), 0.0)
    assert refusal.value.retry_after_s == pytest.approx(6 * seconds)
    assert state(made) == before
    made.check_admission(1, 30, 0.0)
    # What has run no longer counts.
    for at in (1.0, 2.0, 3.0, 4.0):
        assert made.next_batch(at) is not None
    made.check_admission(3, 300, 4.0)


def test_the_queue_closes_for_usual_jobs_of_all_lengths_at_once() -> None:
    made = scheduler(latency_target_s=0.55, max_batch_tokens=100)
    made.submit(rows(*[100] * 3), 0.0)
    assert made.next_batch(0.0) is not None
    for _ in range(2):
        made.submit(rows(100), 0.0)
    made.submit(rows(88), 0.0)
    usual = {made.predicted_latency_s(tokens, 0.0) for tokens in range(1, 13)}
    assert len(usual) == 1
    made.submit(rows(1), 0.0)  # an eighth of a batch is not left
    assert made.predicted_latency_s(1, 0.0)[1] == made.predicted_latency_s(12, 0.0)[1] > usual.pop()[1]
    with pytest.raises(Overloaded):
        made.check_admission(1, 1, 0.0)


@pytest.mark.parametrize("noise", [0.0, 0.15])
@pytest.mark.parametrize("target", [0.1, 0.2])
def test_the_target_is_kept_at_four_times_capacity(target: float, noise: float) -> None:
    """Poisson arrivals of mixed lengths; batches take as long as predicted, give or take the noise."""
    generator = np.random.default_rng(0)
    made = scheduler(cost=cost_model(overhead_s=0.004, per_token_s=0.00028), latency_target_s=target)
    lengths = np.clip(np.exp(generator.normal(3.0, 0.8, 4000)), 3, 150).astype(int)
    capacity = 1 / made.seconds_of(1)  # tokens per second
    arrivals = np.cumsum(generator.exponential(lengths.mean() / (4 * capacity), len(lengths)))
    latencies, kept_tokens, ends, batch = [], 0, 0.0, None
    for at, length in zip(arrivals.tolist(), lengths.tolist(), strict=True):
        while batch is not None and ends <= at:
            took = [(ends - ticket.job.enqueued_at, ticket.row.cost) for ticket in batch.tickets]
            latencies += [seconds for seconds, _ in took]
            kept_tokens += sum(tokens for seconds, tokens in took if seconds <= target)
            made.finished(batch, None)
            batch, began = made.next_batch(ends), ends
            if batch is not None:
                ends = began + made.cost.seconds(batch.cost) * (1 + noise * generator.standard_normal())
        with contextlib.suppress(Overloaded):
            made.submit([row(length)], at)
        if batch is None:
            batch = made.next_batch(at)
            assert batch is not None
            ends = at + made.cost.seconds(batch.cost)
    assert np.percentile(latencies, 95) <= target
    assert kept_tokens > 0.9 * capacity * arrivals[-1]


def test_refusals_keep_the_target_for_those_admitted() -> None:
    """At four times the load that can be carried."""
    target = 0.6
    device = Device(scheduler(latency_target_s=target, max_batch_tokens=100))
    gap = 50 * PER_TOKEN_S / 4
    refused, next_at = 0, 0.0
    while next_at < 60:
        while next_at <= device.now:
            try:
                device.submit(row(50), at=next_at)
            except Overloaded:
                refused += 1
            next_at += gap
        if device.step() is None:
            device.now = next_at
    latencies = [device.done_at[job] - job.enqueued_at for job in device.jobs if job in device.done_at]
    assert max(latencies) <= target
    assert 0.7 < refused / (refused + len(device.jobs)) < 0.8
    assert len(latencies) * 50 * PER_TOKEN_S > 0.9 * 60  # and the device stayed busy
