"""What time it is, and waiting: the seam that lets the engine run on a clock of the tests.

`monotonic` measures durations and ignores changes of the wall clock; `now` is for people and the journal. Nothing here knows what is
waited for.
"""

import asyncio
import contextvars
import time
from collections.abc import Coroutine
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Protocol, TypeVar

STEP: Final = timedelta(seconds=2)  # by so much the wall clock may run away from the monotonic one before it was changed
LOOK: Final = 30.0  # seconds between two looks whether it was

T = TypeVar("T")


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

    async def changed(self) -> None:
        """Return when the wall clock was changed (by NTP, by hand, by a sleep of the machine) since the call: soon after, not at once."""
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

    async def changed(self) -> None:
        """Return when the wall clock was changed since the call, half a minute later at most."""
        began = beginning(self)
        while abs(beginning(self) - began) < STEP:  # noqa: ASYNC110 - nothing tells it (timerfd is in Python from 3.13)
            await asyncio.sleep(LOOK)

    def working(self) -> AbstractContextManager[None]:
        """The machine's time passes in any case."""
        return nullcontext()


def beginning(clock: Clock) -> datetime:
    """What the wall clock showed at the beginning of the monotonic one: another value, and somebody has changed it."""
    monotonic, wall = clock.monotonic(), clock.now()
    return wall - timedelta(seconds=monotonic)


async def sooner(event: asyncio.Event, other: Coroutine[Any, Any, None]) -> None:
    """Returns when the event is set or `other` has ended, whichever comes first; `other` is cancelled then."""
    loop = asyncio.get_running_loop()
    tasks = {loop.create_task(event.wait()), loop.create_task(other)}
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def finish(work: Coroutine[Any, Any, T] | asyncio.Task[T]) -> T:
    """Awaits work to its end, through cancels; then lets the cancel through (a failure is its cause)."""
    loop = asyncio.get_running_loop()
    task = work if isinstance(work, asyncio.Task) else loop.create_task(work, context=contextvars.Context())
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as exc:
            cancelled = exc
    if cancelled is not None:
        raise cancelled from (None if task.cancelled() else task.exception())
    return task.result()
