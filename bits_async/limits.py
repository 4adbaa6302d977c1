"""How fast bytes may move: token buckets in levels, so that every byte pays at the machine, at its priority and at its job.

A transfer reads first and rests afterwards until what it took is paid for (a debt bucket: it keeps its rate as long as the bites are
small, see `largest_chunk`). Several transfers on one bucket are served as if each had a pipe of its own of equal width: a bucket's
rate is shared out evenly between the accounts that owe something, whatever the size of their bites, and an account that owes nothing
leaves its share to the others. A new rate counts from the moment it is set, for those who are resting, too.

    for seconds in limiter.rests(len(chunk)):
        await clock.sleep(seconds)          # or, in a thread, stop.wait(seconds)

Nothing here sleeps, starts a thread or knows what a job, a priority or a policy is; `rate` is bytes per second, None is "no limit".
What may never move at all (a rate of 0) is not a matter of buckets: whoever decides that does not start the transfer.
"""

import heapq
import itertools
import math
import time
from collections.abc import Callable, Iterator
from threading import Lock
from typing import Final

from .errors import InvalidArgument

LONGEST_REST: Final = 1.0  # seconds after which a sleeper asks again
LARGEST_CHUNK: Final = 1 << 20
CHUNKS_PER_SECOND: Final = 60  # a bite of at most rate/60 keeps a rate within 2 % (measured from 1 to 200 MB/s)
BITES_OWED: Final = 4  # all transfers of one bucket together owe at most a quarter of a second
SLACK: Final = 0.1  # seconds of rate that are made up for when a transfer overslept or had to wait for its peer
_MOMENT: Final = 1e-6  # seconds; a shorter rest is rounding


def largest_chunk(rate: float | None, sharing: int = 1) -> int:
    """Bytes that a transfer should take at once at most, when `sharing` transfers use the same bucket: rate/60, or less for many."""
    if rate is None:
        return LARGEST_CHUNK
    return max(1, min(LARGEST_CHUNK, int(rate / max(CHUNKS_PER_SECOND, BITES_OWED * sharing))))


def _checked(rate: float | None) -> float | None:
    if rate is None:
        return None
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not (math.isfinite(rate) and rate > 0):
        raise InvalidArgument(f"a rate is a positive number of bytes per second, or None for no limit, not {rate!r}")
    return float(rate)


_serial = itertools.count()  # makes heap entries of equal debts comparable; next() on it is atomic


class _Account:
    """What one transfer owes one bucket. Belongs to the bucket: only under its lock is it read or written."""

    __slots__ = ("due", "number", "owing")

    def __init__(self) -> None:
        self.due = 0.0  # the level of the bucket at which everything is paid
        self.owing = False  # it is in the bucket's heap; by rounding it may still be there with nothing left to pay
        self.number = next(_serial)


class Bucket:
    """One limit, shared by any number of transfers. Every method may be called from any thread.

    Args:
        rate: bytes per second; None: no limit.
        clock: seconds of a monotonic clock.

    Raises:
        InvalidArgument: the rate is not a positive finite number.
    """

    def __init__(self, rate: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = _checked(rate)
        self._clock = clock
        # The threads of several transfers take bytes while the loop's thread changes the rate. Without the lock two of them would
        # both hand out the time since `_at`, and the bytes paid with it would be paid twice: the limit would not hold.
        self._lock = Lock()
        self._at = clock()  # the moment up to which paid bytes are accounted for
        self._level = 0.0  # bytes that each account which owed all the time has paid: the virtual time of fair queueing
        self._credit = 0.0  # bytes that nobody owed when their time came, at most SLACK seconds of them
        self._owing: list[tuple[float, int, _Account]] = []  # heap; an entry's due may lag behind its account's

    def __repr__(self) -> str:
        return f"<Bucket {'without limit' if self._rate is None else f'{self._rate:g} B/s'}>"

    @property
    def rate(self) -> float | None:
        """Bytes per second; None: no limit."""
        return self._rate

    @property
    def chunk(self) -> int:
        """Bytes that a transfer should take at once now."""
        return largest_chunk(self._rate, len(self._owing) + 1)  # one reference each, read without the lock: it is advice

    def set_rate(self, rate: float | None) -> None:
        """Change the limit from now on; those who rest see it when they ask again, within `LONGEST_REST`.

        What was taken under a higher rate was allowed then: it is worth the seconds it was worth, not its bytes at the new rate.

        Raises:
            InvalidArgument: the rate is not a positive finite number.
        """
        new = _checked(rate)
        with self._lock:
            old = self._rate
            self._advance()
            if new is None:
                self._scale_debts(0.0)
            elif old is not None and new < old:
                self._scale_debts(new / old)
            self._credit = 0.0 if new is None or old is None else min(self._credit, new * SLACK)
            self._rate = new

    def take(self, account: _Account, count: int) -> float:
        """Put `count` bytes on the account; the seconds until it has paid, if those who owe now go on as they do."""
        if self.rate is None:  # one reference, read without the lock: a limit set in this instant counts from the next bytes
            return 0.0
        with self._lock:
            self._advance()
            if self._rate is None:
                return 0.0
            self._charge(account, count)
            seconds = max(0.0, account.due - self._level) * len(self._owing) / self._rate
            return seconds if seconds > _MOMENT else 0.0

    def _advance(self) -> None:
        """Pay with the time that has passed: all who owe, evenly, until each of them owes nothing; the rest is credit."""
        now = self._clock()
        passed, self._at = max(0.0, now - self._at), max(now, self._at)
        if self._rate is None:
            return
        budget = self._rate * passed
        while self._owing and budget > 0:
            due, _, account = self._owing[0]
            if account.due > due:  # it took more since
                heapq.heapreplace(self._owing, (account.due, account.number, account))
                continue
            needed = (due - self._level) * len(self._owing)
            if needed > budget:
                self._level += budget / len(self._owing)
                return
            heapq.heappop(self._owing)
            account.owing = False
            self._level = due
            budget -= needed
        self._credit = min(self._credit + budget, self._rate * SLACK)

    def _charge(self, account: _Account, count: int) -> None:
        free = min(self._credit, count)
        self._credit -= free
        if count <= free:
            return
        account.due = max(account.due, self._level) + count - free
        if not account.owing:
            account.owing = True
            heapq.heappush(self._owing, (account.due, account.number, account))

    def _scale_debts(self, factor: float) -> None:
        for _, _, account in self._owing:
            account.due = self._level + (account.due - self._level) * factor
            account.owing = factor > 0
        self._owing = [(account.due, account.number, account) for _, _, account in self._owing] if factor else []
        heapq.heapify(self._owing)


class Chain:
    """One transfer at all levels that limit it: each byte pays at each of them. Made by `limiter`; not shared between transfers.

    A transfer that ends leaves its debts to the buckets: what it took counts against those who come after it.
    """

    def __init__(self, *levels: Bucket) -> None:
        self._levels = [(bucket, _Account()) for bucket in levels]

    def __repr__(self) -> str:
        return f"<Chain of {', '.join(repr(bucket) for bucket, _ in self._levels)}>"

    @property
    def limited(self) -> bool:
        """Some level has a limit now."""
        for bucket, _ in self._levels:  # noqa: SIM110 - asked for each small file, where a generator costs as much as all else here
            if bucket.rate is not None:
                return True
        return False

    @property
    def chunk(self) -> int:
        """Bytes to take at once at most, now: the rates and the number of transfers may change."""
        return min((bucket.chunk for bucket, _ in self._levels), default=LARGEST_CHUNK)

    def acquire(self, count: int, /) -> float:
        """Take `count` bytes at every level; the seconds to wait before taking more. 0 bytes: what is left to wait."""
        rest = 0.0
        for bucket, account in self._levels:
            rest = max(rest, bucket.take(account, count))
        return rest

    def rests(self, count: int, longest: float = LONGEST_REST) -> Iterator[float]:
        """Take `count` bytes and yield seconds to sleep, one after the other, until they are paid for.

        None is longer than `longest`, and each is worked out when the one before is over: a new rate, and transfers that ended
        meanwhile, count. Leaving early (the transfer was stopped) loses nothing: the debt stays on the account.
        """
        rest = self.acquire(count)
        while rest > 0:
            yield min(rest, longest)
            rest = self.acquire(0)


def limiter(*levels: Bucket | None) -> Chain | None:
    """The limiter of a new transfer under these levels (machine, priority, job), or None if nothing limits it now.

    None lets the transfer take the road without any accounting. A limit set later does not reach such a transfer: stop its request
    and ask again, or use `Chain` itself.
    """
    chain = Chain(*(level for level in levels if level is not None))
    return chain if chain.limited else None
