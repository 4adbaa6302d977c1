"""The machine's clock, as it is set while somebody waits by it."""

import asyncio
from datetime import datetime, timedelta

import pytest

from bits_async import clock
from bits_async.clock import SystemClock
from tests.waiting import let_things_happen


class Adjustable(SystemClock):
    """The machine's, which somebody sets."""

    by = timedelta()

    def now(self) -> datetime:
        return super().now() + self.by


@pytest.mark.parametrize("seconds", [-3600, 3, 86400])
async def test_a_change_of_the_wall_clock_is_seen_and_a_second_is_none(seconds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "LOOK", 0.001)
    machine = Adjustable()
    seen = asyncio.ensure_future(machine.changed())
    await let_things_happen()
    machine.by = timedelta(seconds=1)
    await let_things_happen()
    assert not seen.done()
    machine.by = timedelta(seconds=seconds)
    await asyncio.wait_for(seen, 10)
