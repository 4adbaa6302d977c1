"""How tests wait: for what they name, with a deadline; or a moment, for what is expected not to happen."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Final

DEADLINE: Final = 60.0  # seconds: more than a loaded machine needs, less than a test has


class Pace:
    """How long a look at what goes on takes: `--jitter` changes it, and every test holds all the same."""

    between_looks = 0.001  # seconds
    moment = True  # False: nothing has the time to happen


async def until(done: Callable[[], object], what: str = "", *, deadline: float = DEADLINE) -> None:
    """Returns when it is so."""
    end = asyncio.get_running_loop().time() + deadline
    while not done():
        assert asyncio.get_running_loop().time() < end, f"waited in vain {what}"
        await asyncio.sleep(Pace.between_looks)


class Deadlines:
    """Deadlines that are over when the test says so: no machine is too slow for them, and none too quick. Put `timeout` in the place of
    `asyncio.timeout`.

    Args:
        seconds: those deadlines; all others stay as they are.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._held: list[asyncio.Timeout] = []
        self._honest = asyncio.timeout

    def timeout(self, delay: float | None) -> asyncio.Timeout:
        if delay != self._seconds:
            return self._honest(delay)
        self._held.append(asyncio.Timeout(None))
        return self._held[-1]

    def pass_now(self) -> None:
        """Those that somebody still keeps to are over."""
        for held in self._held:
            with contextlib.suppress(RuntimeError):  # what it was for has ended
                held.reschedule(0)
        self._held.clear()


async def let_things_happen() -> None:
    """Nothing is expected to happen: give it a moment to happen all the same. What has to happen is waited for by `until`."""
    for _ in range(50 if Pace.moment else 1):
        await asyncio.sleep(0)
    await asyncio.sleep(0.01 if Pace.moment else 0)
