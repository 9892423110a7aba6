"""The cache of programs: whoever joins, leaves or runs apart, each sequence finds its own keys and values."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlserver_hftasks.engine.sequences import Choice, Chunk, GeneratedSequence, GenerationJob
from mlserver_hftasks.engine.steps import StepLimits, StepScheduler
from mlserver_hftasks.generation.slabs import STRETCH, CacheShape, Pass, SlabCache
from tests.unit.engine.stepper import prompt

SHAPE = CacheShape(layers=2, heads=1, width=1)


class SlabStepper:
    """Writes who and where into the cache, as a program its keys, and looks whether all of it is there."""

    def __init__(self, cache_tokens: int) -> None:
        self.cache = SlabCache(SHAPE, cache_tokens)
        self.cache_tokens = cache_tokens
        self.passes = 0

    def step(self, chunks: Sequence[Chunk]) -> list[Choice | None]:
        seen: list[int] = []
        for run in self.cache.passes(chunks):
            self.passes += 1
            self._check(run, chunks)
            rows = dict(zip(run.decoding, range(len(run.decoding)), strict=True))
            if run.piece is not None:
                rows[run.piece] = run.slab.row_of(chunks[run.piece].sequence)
            assert len(set(rows.values())) == len(rows)
            assert run.slab.spare not in rows.values()
            for index, row in rows.items():
                self._run(run.slab.memory[:, :, row, 0, :, 0], chunks[index])
            run.slab.memory[:, :, run.slab.spare] = np.nan
            seen += rows
        self._spoil_what_is_free()
        assert sorted(seen) == list(range(len(chunks))), "each chunk is run once"
        assert self.cache.area <= 2 * STRETCH * self.cache_tokens
        return [Choice(7) if chunk.chooses else None for chunk in chunks]

    def _spoil_what_is_free(self) -> None:
        for slab in self.cache.slabs:
            free = [row for row, occupant in enumerate(slab.occupants) if occupant is None]
            slab.memory[:, :, free] = np.nan

    def _check(self, run: Pass, chunks: Sequence[Chunk]) -> None:
        assert all(chunks[index].count == 1 for index in run.decoding)
        assert [run.slab.occupants[row] for row in range(len(run.decoding))] == [
            chunks[index].sequence for index in run.decoding
        ]

    def _run(self, row: np.ndarray, chunk: Chunk) -> None:
        mark = float(id(chunk.sequence) % 1_000_003)
        before = np.arange(chunk.position)
        assert np.array_equal(
            row[:, :, : chunk.position], np.broadcast_to(mark + before, (2, 2, len(before)))
        )
        end = chunk.position + chunk.count
        row[:, :, chunk.position : end] = mark + np.arange(chunk.position, end)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_each_sequence_finds_its_own(data: st.DataObject) -> None:
    tokens = data.draw(st.sampled_from([100, 300, 3000]))
    stepper = SlabStepper(tokens)
    limits = StepLimits(
        max_sequences=data.draw(st.integers(1, 9)), prefill_tokens=data.draw(st.integers(1, 20))
    )
    scheduler = StepScheduler(limits, tokens)
    jobs: list[GenerationJob] = []
    for now in range(data.draw(st.integers(5, 40))):
        for _ in range(data.draw(st.integers(0, 3))):
            length = data.draw(st.one_of(st.integers(1, 12), st.integers(1, tokens // 2)))
            new = data.draw(st.integers(1, 20))
            jobs.append(scheduler.submit([prompt(*range(1, length + 1), new=new)], float(now)))
        if jobs and data.draw(st.integers(0, 4)) == 0:
            scheduler.cancel(data.draw(st.sampled_from(jobs)))
        chunks = scheduler.next_step(float(now))
        half = len(chunks) // 2 if data.draw(st.integers(0, 4)) == 0 else len(chunks)
        parts = [part for part in (chunks[:half], chunks[half:]) if part]
        results = [result for part in parts for result in stepper.step(part)]
        scheduler.finished(chunks, results, float(now), 0.01)


def sequence(tokens: int, new: int = 4) -> GeneratedSequence:
    job = GenerationJob(0.0, 0.0, None, False)
    return GeneratedSequence(job, prompt(*range(tokens), new=new), 0, random.Random(), extent=0)


def test_who_leaves_is_replaced_by_the_last_and_nobody_else_moves() -> None:
    cache = SlabCache(SHAPE, 1000)
    running = [sequence(1) for _ in range(4)]
    list(cache.passes([Chunk(each, 1) for each in running]))
    (slab,) = cache.slabs
    first, left, third, last = running
    left.extent = -1
    (run,) = cache.passes([Chunk(each, 1) for each in (first, third, last)])
    assert slab.occupants[:3] == [first, last, third]
    assert run.decoding == (0, 2, 1), "chunks in the order of the rows"


def test_a_long_sequence_does_not_make_room_for_all_as_long() -> None:
    cache = SlabCache(SHAPE, 2000)
    long = sequence(1500)
    everyone = [long, *(sequence(10) for _ in range(12))]
    passes = list(cache.passes([Chunk(each, len(each.prompt.tokens)) for each in everyone]))
    assert len(cache.slabs) > 1
    assert {run.slab for run in passes} == set(cache.slabs)
    assert cache.area <= 2 * STRETCH * 2000


def test_short_sequences_beside_a_long_one_share_a_pass() -> None:
    cache = SlabCache(SHAPE, 131_072)
    everyone = [sequence(7000, new=1000), *(sequence(100, new=400) for _ in range(60))]
    passes = list(cache.passes([Chunk(each, 1) for each in everyone]))
    assert sorted(index for run in passes for index in run.decoding) == list(range(61))
    assert len(passes) == 2


def test_memory_is_given_back_when_nobody_is_left() -> None:
    cache = SlabCache(SHAPE, 1000)
    only = sequence(5)
    list(cache.passes([Chunk(only, 5)]))
    assert cache.area > 0
    only.extent = -1
    assert list(cache.passes([])) == []
    assert cache.area == 0


@pytest.mark.parametrize("rows", [1, 5, 30])
def test_sequences_of_like_length_share_a_pass(rows: int) -> None:
    cache = SlabCache(SHAPE, 64 * 128)
    running = [sequence(1, new=40) for _ in range(rows)]
    (run,) = cache.passes([Chunk(each, 1) for each in running])
    assert len(run.decoding) == rows
