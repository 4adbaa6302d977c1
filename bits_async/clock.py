"""What time it is, and waiting: the seam that lets the engine run on a clock of the tests.

`monotonic` measures durations and ignores changes of the wall clock; `now` is for people and the journal. Nothing here knows what is
waited for.
"""

import asyncio
import time
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """The engine's time."""

    def now(self) -> datetime:
        """The wall clock, aware UTC."""
        ...

    def monotonic(self) -> float:
        """Seconds since an arbitrary moment; never goes back."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Return after that many seconds of `monotonic`."""
        ...

    def working(self) -> AbstractContextManager[None]:
        """While it is entered somebody is at work, sleeps inside it excepted: a clock of tests does not jump meanwhile."""
        ...


class SystemClock:
    """The machine's clocks."""

    def now(self) -> datetime:
        """The wall clock, aware UTC."""
        return datetime.now(UTC)

    def monotonic(self) -> float:
        """Seconds since an arbitrary moment; never goes back."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Return after that many seconds."""
        await asyncio.sleep(seconds)

    def working(self) -> AbstractContextManager[None]:
        """The machine's time passes in any case."""
        return nullcontext()
