"""What must be so for a job to run, apart from its turn: the network is there; and how fast its bytes may move.

Asked about one job at a time, it answers at once and never waits: what it does not know yet it finds out, and then wakes the engine, which
asks again. So a job is held up and let go by the same question, and no event can be missed between two of them.

Nothing here changes a job.
"""

import asyncio
import contextvars
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from ..clock import Clock
from ..errors import BitsError, ErrorCode, ErrorContext, make_error
from ..limits import Bucket
from ..transport.network import Connectivity, peer_host
from ..transport.proxies import ProxySettings
from .model import JobRecord, WaitingReason

log = logging.getLogger("bits_async.jobs")


@dataclass(frozen=True, slots=True)
class Hindrance:
    """Why a job cannot run now. It waits until that ends, and not for a while."""

    reason: WaitingReason
    error: BitsError


class Conditions:
    """The conditions under which the jobs of one engine run.

    Args:
        clock: seconds of this one.
        connectivity: entered by `open`; None: every host may be reached.
        maximum_bandwidth: bytes per second of all jobs together; None: no limit.

    Raises:
        InvalidArgument: the bandwidth is not a positive finite number.
    """

    def __init__(self, *, clock: Clock, connectivity: Connectivity | None = None, maximum_bandwidth: float | None = None) -> None:
        self._clock = clock
        self._connectivity = connectivity
        self.machine = Bucket(maximum_bandwidth, clock.monotonic)  # safe from threads: the clock only reads
        self._wake: Callable[[], None] = lambda: None
        self._back: Callable[[], None] = lambda: None
        self._opened = False
        self._reach: dict[str, bool] = {}  # what is known of hosts while the network is away; forgotten at each news
        self._tasks: dict[tuple[str, ...], asyncio.Task[None]] = {}

    # -- life -------------------------------------------------------------------------------------------------------------------------

    async def open(self, wake: Callable[[], None], back: Callable[[], None]) -> None:
        """Begin to watch.

        Args:
            wake: called when an answer may have become another.
            back: called when a network came (back).
        """
        self._wake, self._back = wake, back
        if self._connectivity is None:
            return
        try:
            await self._connectivity.__aenter__()
        except OSError as exc:  # a sandbox that lets us look once and then no more
            log.warning("the network cannot be watched: %s", exc)
            self._connectivity = None
            return
        self._opened = True
        self._start(self._watch_network(self._connectivity), "network")

    async def aclose(self) -> None:
        """Stop watching."""
        for task in self._tasks.values():
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks.values())
        if self._opened and self._connectivity is not None:
            self._opened = False
            await self._connectivity.__aexit__(None, None, None)

    def _start(self, work: Coroutine[Any, Any, None], *key: str) -> None:
        """A task of our own, in an empty context: no caller's identity leaks into it."""
        task = asyncio.get_running_loop().create_task(work, name=f"bits-{key[0]}", context=contextvars.Context())
        self._tasks[key] = task
        task.add_done_callback(lambda _: self._tasks.pop(key, None))

    async def _watch_network(self, network: Connectivity) -> None:
        while True:
            back = await network.changed()
            log.info("the network is %s", "there" if back else "lost")
            self._reach.clear()
            if back:
                self._back()
            self._wake()

    # -- speed ------------------------------------------------------------------------------------------------------------------------

    def bucket(self, job: JobRecord) -> Bucket:
        """For the job's own limit."""
        return Bucket(job.maximum_bandwidth, self._clock.monotonic)

    def levels(self, job: JobRecord, own: Bucket) -> tuple[Bucket, ...]:
        """What limits the bytes of a job, from the machine to the job."""
        return (self.machine, own)

    # -- answers ----------------------------------------------------------------------------------------------------------------------

    def hindrance(self, job: JobRecord, url: str | None) -> Hindrance | None:
        """What keeps the job from running now, as far as known; None: nothing.

        Args:
            url: what it is to fetch next; None: nothing.
        """
        if url is not None and self.in_reach(job.proxy, url) is False:
            return Hindrance(WaitingReason.NETWORK, network_lost(url))
        return None

    def in_reach(self, settings: ProxySettings, url: str) -> bool | None:
        """Whether the server of that URL, or the proxy before it, may be reached: False only with proof; None: that is being found out."""
        network = self._connectivity
        if network is None or network.connected:
            return True
        host = _peer(settings, url)
        if host is None:
            return True
        known = self._reach.get(host)
        if known is None and ("reach", host) not in self._tasks:
            self._start(self._ask(host), "reach", host)
        return known

    async def reaches(self, settings: ProxySettings, url: str) -> bool:
        """As `in_reach`, but waits until it is known."""
        host = _peer(settings, url)
        return host is None or await self._reaches(host)

    async def _reaches(self, host: str) -> bool:
        if self._connectivity is None:
            return True
        self._reach[host] = reached = await self._connectivity.reaches(host)
        return reached

    async def _ask(self, host: str) -> None:
        await self._reaches(host)
        self._wake()


def _peer(settings: ProxySettings, url: str) -> str | None:
    """Whom a request needs to reach; None: an attempt says better why it cannot be made."""
    try:
        return peer_host(settings, url)
    except BitsError:
        return None


def network_lost(url: str) -> BitsError:
    """Why a job does not run whose server is out of reach."""
    code, message = ErrorCode.BG_E_NETWORK_DISCONNECTED, "the network is lost, and the server out of reach"
    return make_error(code, ErrorContext.GENERAL_TRANSPORT, message, url=url)
