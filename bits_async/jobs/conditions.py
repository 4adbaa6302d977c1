"""What must be so for a job to run, apart from its turn: the network is there, its price and group policy allow it; and how fast its
bytes may move.

Asked about one job at a time, it answers at once and never waits: what it does not know yet it finds out, and then wakes the engine, which
asks again. So a job is held up and let go by the same question, and no event can be missed between two of them.

Nothing here changes a job.
"""

import asyncio
import contextvars
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import datetime, tzinfo
from typing import Any

from ..clock import Clock
from ..errors import BitsError, ErrorCode, ErrorContext, make_error
from ..limits import Bucket
from ..transport.network import Connectivity, peer_host
from ..transport.proxies import ProxySettings
from .model import CostFlags, JobPriority, JobRecord, WaitingReason
from .policies import Bandwidth, CostSource, GroupPolicy, MachineZone, bandwidth, cost_error, effective_limits, runnable
from .scheduler import Limits

log = logging.getLogger("bits_async.jobs")


@dataclass(frozen=True, slots=True)
class Hindrance:
    """Why a job cannot run now. It waits until that ends, and not for a while."""

    reason: WaitingReason
    error: BitsError


class Conditions:
    """The conditions under which the jobs of one engine run.

    Args:
        clock: its wall clock is the one that group policy goes by.
        machine: the limit of all jobs together.
        connectivity: entered by `open`; None: every host may be reached.
        policy: None: there is none.
        cost: asked from `open` on; None: nothing costs anything.
        zone: in which the schedules of group policy are meant.
    """

    def __init__(
        self,
        *,
        clock: Clock,
        machine: Bucket,
        connectivity: Connectivity | None = None,
        policy: GroupPolicy | None = None,
        cost: CostSource | None = None,
        zone: tzinfo | None = None,
    ) -> None:
        self._clock = clock
        self._connectivity = connectivity
        self._policy = policy
        self._source = cost
        self._zone = zone or MachineZone()
        self._machine = machine
        self._shared = Bucket(None, clock.monotonic)
        self._classes: dict[JobPriority, Bucket] = {
            priority: Bucket(None, clock.monotonic) for priority in JobPriority if priority is not JobPriority.FOREGROUND
        }
        self._followed: dict[JobPriority, Bandwidth] = {}
        self._allowances: dict[JobPriority, tuple[datetime, Bandwidth]] = {}  # and since when it is known
        self._cost: CostFlags | None = None
        self._cost_known = cost is None
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
        if self._source is not None:
            self._start(self._watch_cost(self._source), "cost")
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

    async def _watch_cost(self, source: CostSource) -> None:
        try:
            async for cost in source.watch():
                self._cost, self._cost_known = CostFlags(cost), True
                log.info("the connection costs: %s", self._cost)
                self._wake()
        except Exception as exc:  # whatever the application's source raises must not end the queue
            log.warning("the cost of the connection is not told any more: %s", type(exc).__name__)
        self._cost_known = True
        self._wake()

    # -- speed ------------------------------------------------------------------------------------------------------------------------

    def bucket(self, job: JobRecord) -> Bucket:
        """For the job's own limit."""
        return Bucket(job.maximum_bandwidth, self._clock.monotonic)

    def levels(self, job: JobRecord, own: Bucket) -> tuple[Bucket, ...]:
        """What limits the bytes of a job, from the machine to the job. Group policy does not limit FOREGROUND."""
        if self._policy is None or job.priority is JobPriority.FOREGROUND:
            return (self._machine, own)
        return (self._machine, self._shared, self._classes[job.priority], own)

    def refresh(self) -> bool:
        """Let the limits be those that group policy sets now. Whether it allows anything else than at the last time."""
        if self._policy is None:
            return False
        now: dict[JobPriority, Bandwidth] = {priority: self.allowance(priority) for priority in self._classes}
        changed, self._followed = now != self._followed, now
        for priority, bucket in self._classes.items():
            _set_rate(bucket, None if now[priority].shared else now[priority].limit)
        shared = next((allowed.limit for allowed in now.values() if allowed.shared), None)
        _set_rate(self._shared, shared)
        return changed

    def allowance(self, priority: JobPriority) -> Bandwidth:
        """What group policy allows jobs of that priority now."""
        now = self._clock.now()
        since, known = self._allowances.get(priority, (now, None))
        if known is None or now < since or (known.until is not None and now >= known.until):
            known = bandwidth(self._policy, priority, now.astimezone(self._zone))
            self._allowances[priority] = now, known
        return known

    def next_change(self) -> datetime | None:
        """When group policy allows something else than at the last `refresh`; None: never."""
        return min((allowed.until for allowed in self._followed.values() if allowed.until is not None), default=None)

    def overrides(self, job: JobRecord) -> bool:
        """Whether group policy now limits the job more than its own limit does."""
        limit = self.allowance(job.priority).limit
        return limit is not None and (job.maximum_bandwidth is None or limit < job.maximum_bandwidth)

    # -- numbers ----------------------------------------------------------------------------------------------------------------------

    def limits(self, limits: Limits, *, elevated: bool) -> Limits:
        """Those that count for jobs of such an owner."""
        return limits if elevated else effective_limits(limits, self._policy)

    def maximum_download_time(self, job: JobRecord) -> float:
        """Its own, else that of group policy."""
        policy = None if self._policy is None or job.owner.elevated else self._policy.max_download_time
        return job.maximum_download_time if job.own_download_time or policy is None else float(policy)

    # -- answers ----------------------------------------------------------------------------------------------------------------------

    def hindrance(self, job: JobRecord, url: str | None) -> Hindrance | None:
        """What keeps the job from running now, as far as known; None: nothing.

        Args:
            url: what it is to fetch next; None: nothing.
        """
        if not self.over(WaitingReason.POLICY, job, url):
            return Hindrance(WaitingReason.POLICY, self.allowance(job.priority).error())
        if self._cost is not None and not self.over(WaitingReason.COST, job, url):
            return Hindrance(WaitingReason.COST, cost_error(self._cost))
        if url is not None and self.in_reach(job.proxy, url) is False:
            return Hindrance(WaitingReason.NETWORK, network_lost(url))
        return None

    def over(self, reason: WaitingReason, job: JobRecord, url: str | None) -> bool:
        """Whether that does not keep the job from running (any more), as far as known."""
        if reason is WaitingReason.POLICY:
            return not self.allowance(job.priority).blocked
        if reason is WaitingReason.COST:
            return self._cost is None or runnable(job.cost_flags, self._cost)
        return url is None or self.in_reach(job.proxy, url) is True

    def is_settled(self, job: JobRecord) -> bool:
        """Enough is known to begin: the cost of the connection, for a job that does not run at every cost."""
        return self._cost_known or runnable(job.cost_flags, CostFlags.TRANSFER_ALWAYS)

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


def _set_rate(bucket: Bucket, rate: float | None) -> None:
    """0 is no rate of a bucket: what is blocked does not run."""
    if bucket.rate != (rate or None):
        bucket.set_rate(rate or None)


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
