"""What the tests of auth share: tokens that need no machine, and threads that stand for a token's."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import spnego

from bits_async.identity.tokens import DelegationTarget, ImpersonationLevel, Token


class Somebody:
    """A local identity on paper."""

    def __init__(self, name: str = "alice", *, is_process: bool = True) -> None:
        self.name, self.key, self.elevated, self.is_process = name, f"uid:{name}", False, is_process

    def assume(self) -> None: ...
    def check(self) -> None: ...
    def fresh(self) -> "Somebody":
        return self

    def close(self) -> None: ...


def a_token(
    network: spnego.Credential | None = None,
    *,
    principal: str | None = None,
    is_process: bool = True,
    level: ImpersonationLevel = ImpersonationLevel.IMPERSONATE,
    delegates: tuple[DelegationTarget, ...] = (),
) -> Token:
    """A token with this network credential; without one it is, or stands beside, the process."""
    return Token._make(Somebody(is_process=is_process), network=network, principal=principal, level=level, delegates=delegates)


class Threads:
    """Runs what blocks in a thread of its own, as `TokenExecutor.run_security` does, and keeps a list of what ran."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(2, "token")
        self.calls: list[str] = []

    async def __call__(self, function: Callable[..., Any], /, *args: Any) -> Any:
        self.calls.append(function.__name__)
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)

    def close(self) -> None:
        self._pool.shutdown()


@pytest.fixture
async def security() -> AsyncIterator[Threads]:
    threads = Threads()
    yield threads
    threads.close()


@pytest.fixture
def spnego_threads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The threads in which pyspnego built contexts."""
    seen: list[str] = []
    build = spnego.client

    def client(*args: Any, **kwargs: Any) -> Any:
        seen.append(threading.current_thread().name)
        return build(*args, **kwargs)

    monkeypatch.setattr(spnego, "client", client)
    return seen
