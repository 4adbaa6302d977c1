"""How tests wait: for what they name, with a deadline; or a moment, for what is expected not to happen."""

import asyncio
from collections.abc import Callable
from typing import Final

DEADLINE: Final = 30.0  # seconds: more than a loaded machine needs, less than a test has


async def until(done: Callable[[], object], what: str = "", *, deadline: float = DEADLINE) -> None:
    """Returns when it is so."""
    end = asyncio.get_running_loop().time() + deadline
    while not done():
        assert asyncio.get_running_loop().time() < end, f"waited in vain {what}"
        await asyncio.sleep(0.001)


async def let_things_happen() -> None:
    """Nothing is expected to happen: give it a moment to happen all the same."""
    for _ in range(50):
        await asyncio.sleep(0)
    await asyncio.sleep(0.01)
