"""`pytest --jitter SEED`: a machine that is busy elsewhere at the worst moments, to find tests and code that count on a quiet one.

Each test gets, from the seed and its own name, how often and how long its event loop stands still before a callback, and how
long a thread rests before and after it hands something to a loop. Nothing else changes: what fails here and not without it
depends on time. A failure comes back with the same seed, as far as the scheduler of threads lets it.
"""

import asyncio
import random
import threading
import time
from collections.abc import Callable
from contextvars import Context
from typing import Any, Final

import pytest

BUDGET: Final = 4.0  # seconds in which one test is kept waiting: far less than the time it has
ODDS: Final = (0.0, 0.002, 0.02, 0.2)  # that a callback, or a thread at the seam, has to wait
LONGEST: Final = (0.002, 0.02, 0.1, 0.4)  # seconds
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

        asyncio.Handle._run = late_run  # type: ignore[method-assign]
        asyncio.BaseEventLoop.call_soon_threadsafe = late_hand_over  # type: ignore[method-assign,assignment]
