"""Time that jumps, for applications' tests: over nothing that is still about to happen."""

import asyncio

import pytest

from bits_async import testing
from tests.waiting import until


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> testing.FakeClock:
    monkeypatch.setattr(testing, "JUMP_AFTER", 0.0)  # as on a machine so busy that the time is over before the loop has its next turn
    return testing.FakeClock()


async def test_time_waits_for_what_the_loop_still_has_to_do(clock: testing.FakeClock) -> None:
    """Else a busy machine would let a job's deadline pass between two steps of a retry."""
    sleeper = asyncio.create_task(clock.sleep(3600))
    for _ in range(10):
        await asyncio.sleep(0)
        assert clock.monotonic() == 0
    with clock.working():
        for _ in range(50):
            await asyncio.sleep(0)
        assert clock.monotonic() == 0
    await sleeper
    assert clock.monotonic() == 3600


async def test_time_goes_on_while_somebody_at_work_sleeps(clock: testing.FakeClock) -> None:
    with clock.working():
        await clock.sleep(60)
    assert clock.monotonic() == 60


async def test_the_frozen_clock_does_not_jump(clock: testing.FakeClock) -> None:
    clock.freeze()
    sleeper = asyncio.create_task(clock.sleep(60))
    for _ in range(50):
        await asyncio.sleep(0)
    assert (clock.monotonic(), sleeper.done()) == (0, False)
    clock.advance(60)
    await until(sleeper.done)


async def test_the_clock_that_was_frozen_goes_on_when_it_is_thawed(clock: testing.FakeClock) -> None:
    clock.freeze()
    sleeper = asyncio.create_task(clock.sleep(60))
    await asyncio.sleep(0)
    clock.thaw()
    await sleeper
    assert clock.monotonic() == 60
