"""The generating engine with threads and asyncio, over a model that really keeps a cache."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager

import pytest

from mlserver_hftasks.engine.generator import Generator, Occupancy, StepReport
from mlserver_hftasks.engine.sequences import FinishReason
from mlserver_hftasks.engine.steps import StepLimits, StepScheduler
from mlserver_hftasks.errors import DeadlineExceeded, ForwardFailed, Overloaded, Unavailable
from tests.unit.engine.stepper import POISON, HashStepper, continued, prompt


@asynccontextmanager
async def serving(
    stepper: HashStepper,
    observe: Callable[[StepReport], None] = lambda report: None,
    observe_occupancy: Callable[[Occupancy], None] = lambda occupancy: None,
    **limits: int,
) -> AsyncIterator[tuple[Generator, StepScheduler]]:
    scheduler = StepScheduler(StepLimits(**limits), stepper.cache_tokens)
    generator = Generator(stepper, scheduler, observe=observe, observe_occupancy=observe_occupancy)
    try:
        yield generator, scheduler
    finally:
        stepper.gate.set()
        await generator.close()


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


def test_many_callers_get_what_each_gets_alone() -> None:
    async def main() -> None:
        reports: list[StepReport] = []
        occupied: list[Occupancy] = []
        async with serving(HashStepper(), reports.append, occupied.append, max_sequences=8) as (
            generator,
            scheduler,
        ):
            prompts = [
                [prompt(*range(n, n + 3 + n % 7), new=1 + n % 11) for n in range(k, k + 3)] for k in range(30)
            ]
            results = await asyncio.gather(*(generator.run(each) for each in prompts))
            for asked, answered in zip(prompts, results, strict=True):
                for one, got in zip(asked, answered, strict=True):
                    assert got.tokens == continued(one.tokens.tolist(), one.max_new_tokens)
                    assert got.finish is FinishReason.LENGTH
            assert scheduler.cache.used == 0
        total = sum(one.max_new_tokens for asked in prompts for one in asked)
        assert sum(report.new_tokens for report in reports) == total
        assert sum(report.prompt_tokens for report in reports) == sum(
            len(one.tokens) for asked in prompts for one in asked
        )
        assert sum(len(report.first_token_s) for report in reports) == 90
        assert max(each.running for each in occupied) == 8
        assert max(each.waiting for each in occupied) > 8
        assert occupied[-1] == Occupancy(0, 0, 0.0)

    asyncio.run(main())


def test_a_stream_has_each_token_as_it_comes() -> None:
    async def main() -> None:
        stepper = HashStepper(seconds=0.005)
        async with serving(stepper) as (generator, _):
            wanted = continued([1, 2, 3], 6)
            got: list[int | None] = []
            async for news in generator.stream([prompt(1, 2, 3, new=6, logprobs=True)]):
                assert len(stepper.steps) <= len(got) + len(news) + 1, "it came late"
                got += [each.token for each in news]
                assert [each.logprob for each in news] == [-float(each.token or 0) for each in news]
                reasons = [each.finish for each in news]
            assert got == wanted
            assert reasons[-1] is FinishReason.LENGTH

    asyncio.run(main())


def test_a_stream_that_is_closed_ends_within_a_step_and_frees_its_cache() -> None:
    async def main() -> None:
        stepper = HashStepper(seconds=0.002)
        async with serving(stepper) as (generator, scheduler):
            async with aclosing(generator.stream([prompt(1, new=900)])) as news:
                async for _ in news:
                    break
            assert scheduler.cache.used == 0
            steps = len(stepper.steps)
            await asyncio.sleep(0.05)
            assert len(stepper.steps) <= steps + 1
            assert (await generator.run([prompt(2, new=3)]))[0].tokens == continued([2], 3)

    asyncio.run(main())


def test_a_cancelled_call_ends_too() -> None:
    async def main() -> None:
        stepper = HashStepper(seconds=0.002)
        async with serving(stepper) as (generator, _):
            call = asyncio.create_task(generator.run([prompt(1, new=900), prompt(2, new=50)]))
            await eventually(lambda: len(stepper.steps) > 3)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert generator.occupancy == Occupancy(0, 0, 0.0)

    asyncio.run(main())


def test_a_failing_prompt_fails_alone() -> None:
    async def main() -> None:
        stepper = HashStepper()
        async with serving(stepper) as (generator, scheduler):
            stepper.gate.clear()
            calls = [
                asyncio.create_task(generator.run([prompt(*tokens, new=4)]))
                for tokens in ([1, 2], [3, POISON], [4], [5, 6])
            ]
            await asyncio.sleep(0.01)
            stepper.gate.set()
            good = [await calls[index] for index in (0, 2, 3)]
            with pytest.raises(ForwardFailed, match="token 96"):
                await calls[1]
            assert [result[0].tokens for result in good] == [
                continued(tokens, 4) for tokens in ([1, 2], [4], [5, 6])
            ]
            assert scheduler.cache.used == 0

    asyncio.run(main())


def test_a_deadline_returns_what_there_is() -> None:
    async def main() -> None:
        async with serving(HashStepper(seconds=0.005)) as (generator, scheduler):
            (result,) = await generator.run([prompt(1, new=900)], deadline=time.monotonic() + 0.1)
            assert result.finish is FinishReason.TIMEOUT
            assert 1 <= len(result.tokens) < 30
            assert result.tokens == continued([1], len(result.tokens))
            with pytest.raises(DeadlineExceeded, match="timeout_ms"):
                await generator.run([prompt(1)], deadline=time.monotonic() - 1)
            news = [
                each
                async for some in generator.stream([prompt(1, new=900)], deadline=time.monotonic() + 0.1)
                for each in some
            ]
            assert news[-1].finish is FinishReason.TIMEOUT
            assert news[-1].token is None
            assert scheduler.cache.used == 0

    asyncio.run(main())


def test_overload_and_close() -> None:
    async def main() -> None:
        stepper = HashStepper()
        async with serving(stepper, max_sequences=1, max_queue_rows=1) as (generator, _):
            stepper.gate.clear()
            running = asyncio.create_task(generator.run([prompt(1, new=3)]))
            await eventually(stepper.entered.is_set)
            waiting = asyncio.create_task(generator.run([prompt(2, new=3)]))
            await asyncio.sleep(0.01)
            with pytest.raises(Overloaded):
                generator.check_admission()
            with pytest.raises(Overloaded):
                await generator.run([prompt(3)])
            closing = asyncio.create_task(generator.close())
            await asyncio.sleep(0.01)
            stepper.gate.set()
            await closing
            for call in (running, waiting):
                with pytest.raises(Unavailable):
                    await call
            with pytest.raises(Unavailable):
                await generator.run([prompt(3)])

    asyncio.run(main())


def test_a_thousand_generations_leave_nothing_behind() -> None:
    async def main() -> None:
        async with serving(HashStepper(cache_tokens=200)) as (generator, scheduler):
            for _ in range(20):
                await asyncio.gather(*(generator.run([prompt(n, n + 1, new=3)]) for n in range(50)))
            assert scheduler.cache.used == 0
            assert scheduler.cache.take(200) == 0, "the cache is one piece again"
            assert not generator._waiters
            assert not list(scheduler.jobs())

    asyncio.run(main())
