"""`pytest --jitter SEED`: a machine that is busy elsewhere at the worst moments, to find tests and code that count on a quiet one.

Each test gets, from the seed and its own name: how often and how long its event loop stands still before a callback, and a
thread rests before it does what it was asked for, and before and after it hands something to a loop; how readily threads give
way to each other; whether the fake clock jumps without patience; how rarely a test looks, and whether it gives anything a
moment to happen (`waiting.py`). Nothing else changes: what fails here and not without it depends on time. A failure comes back
with the same seed, as far as the scheduler of threads lets it.
"""

import asyncio
import concurrent.futures.thread
import functools
import random
import sys
import threading
import time
from collections.abc import Callable
from contextvars import Context
from typing import Any, Final

import pytest

from bits_async import testing
from bits_async.identity import threads
from tests.waiting import Pace

BUDGET: Final = 2.0  # seconds in which one test is kept waiting: far less than the time it has
ODDS: Final = (0.0, 0.002, 0.02, 0.2, 1.0)  # that a callback, or a thread at the seam, has to wait
LONGEST: Final = (0.002, 0.02, 0.1, 0.4)  # seconds
TURNS: Final = (1e-5, 0.005, 0.1)  # seconds that a thread keeps the interpreter while others want it
JUMPS: Final = (0.0, testing.JUMP_AFTER)
LOOKS: Final = (0.0, Pace.between_looks, 0.05)
_sleep: Final = time.sleep  # the guard of the event loop puts its own there


class Jitter:
    """How busy the machine is for the test that runs now."""

    def __init__(self, seed: str) -> None:
        self.seed = seed
        self.left = 0.0
        self.random = random.Random(seed)
        self.loop_odds = self.thread_odds = self.loop_longest = self.thread_longest = 0.0

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        self.random = random.Random(f"{self.seed} {item.nodeid}")
        self.loop_odds, self.thread_odds = self.random.choice(ODDS), self.random.choice(ODDS)
        self.loop_longest, self.thread_longest = self.random.choice(LONGEST), self.random.choice(LONGEST)
        self.left = BUDGET
        sys.setswitchinterval(self.random.choice(TURNS))
        testing.JUMP_AFTER = self.random.choice(JUMPS)  # type: ignore[misc]
        Pace.between_looks, Pace.moment = self.random.choice(LOOKS), self.random.random() < 0.5
        yield
        self.left = 0.0

    def wait(self, odds: float, longest: float) -> None:
        if self.left > 0 and self.random.random() < odds:
            pause = self.random.random() * longest
            self.left -= pause
            _sleep(pause)

    def install(self) -> None:
        run: Callable[[asyncio.Handle], None] = asyncio.Handle._run
        hand_over = asyncio.BaseEventLoop.call_soon_threadsafe

        def late_run(handle: asyncio.Handle) -> None:
            self.wait(self.loop_odds, self.loop_longest)
            run(handle)

        def late_hand_over(
            loop: asyncio.BaseEventLoop, callback: Callable[..., object], *args: object, context: Context | None = None
        ) -> asyncio.Handle:
            other = threading.get_ident() != getattr(loop, "_thread_id", None)
            if other:
                self.wait(self.thread_odds, self.thread_longest)
            handle = hand_over(loop, callback, *args, context=context)
            if other:
                self.wait(self.thread_odds, self.thread_longest)
            return handle

        def late(work: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(work)
            def late_work(*args: Any) -> Any:
                self.wait(self.thread_odds, self.thread_longest)
                return work(*args)

            return late_work

        threads._Crew.perform = late(threads._Crew.perform)  # type: ignore[method-assign]
        concurrent.futures.thread._WorkItem.run = late(concurrent.futures.thread._WorkItem.run)  # type: ignore[attr-defined]
        asyncio.Handle._run = late_run  # type: ignore[method-assign]
        asyncio.BaseEventLoop.call_soon_threadsafe = late_hand_over  # type: ignore[method-assign,assignment]
