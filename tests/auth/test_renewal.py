"""Who renews tickets and when, and what one that fails costs: nothing, while the ticket is good. On a clock of the tests, without a KDC."""

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest
import spnego

from bits_async.auth import renewal as renewing
from bits_async.auth import tickets as module
from bits_async.auth.policy import AuthScheme, Offer, credential_fingerprint
from bits_async.auth.renewal import LONGEST_SLEEP, Renewals
from bits_async.auth.tickets import Tickets
from bits_async.errors import AuthFailed, TokenRequired
from bits_async.identity.kerberos import Cache, Lifetime, silent_kdc
from bits_async.identity.threads import TokenExecutors
from bits_async.identity.tokens import Token
from bits_async.testing import FakeClock
from tests.waiting import Deadlines, let_things_happen, until

ALICE = "alice@BITS.TEST"
HOUR = 600.0  # a short one: time is waited for in steps
SOURCE = "FILE:/srv/alice"


@dataclass
class Kdc:
    """What it was asked, and what it answers with: tickets of ten hours that can be renewed for a day."""

    now: Callable[[], float]
    asked: list[str] = field(default_factory=list)
    failure: Exception | None = None
    silence: threading.Event | None = None
    source: Lifetime | None = None  # of what kinit wrote
    life: float = 10 * HOUR
    renewable: float = 24 * HOUR
    destroyed: list[str] = field(default_factory=list)
    threads: set[str] = field(default_factory=set)
    until: float = 0.0

    def first(self, credential: object, forwardable: bool = False) -> Cache:
        self.until = self.now() + self.renewable if self.renewable else 0.0
        return self._answer("password")

    def renew(self, name: str) -> Cache:
        return self._answer(name)

    def _answer(self, what: str) -> Cache:
        self.asked.append(what)
        self.threads.add(threading.current_thread().name)
        if self.silence is not None:
            self.silence.wait(50)
        if self.failure is not None:
            raise self.failure
        now = self.now()
        ends = now + self.life if not self.until else min(now + self.life, self.until)
        return Kept(f"ours-{len(self.asked)}", ALICE, Lifetime(now, ends, self.until), self.destroyed)

    def look_into(self, name: str) -> tuple[str, Lifetime]:
        assert name == SOURCE
        if self.source is None:
            raise AuthFailed("there are no tickets in the cache")
        return ALICE, self.source


class Kept(Cache):
    def __init__(self, name: str, principal: str, life: Lifetime, destroyed: list[str]) -> None:
        super().__init__(name, principal, life, None, None)
        self._destroyed = destroyed

    def destroy(self) -> None:
        self._destroyed.append(self.name)


@pytest.fixture
def clock() -> FakeClock:
    made = FakeClock()
    made.freeze()
    return made


@pytest.fixture
def kdc(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> Kdc:
    made = Kdc(lambda: clock.now().timestamp())
    monkeypatch.setattr(module, "_first_ticket", made.first)
    monkeypatch.setattr(module, "renew", made.renew)
    monkeypatch.setattr(module, "look_into", made.look_into)
    monkeypatch.setattr(module, "require_kerberos", lambda: None)
    return made


@dataclass
class Place:
    """A manager's tickets, at work."""

    tickets: Tickets
    executors: TokenExecutors
    clock: FakeClock
    kdc: Kdc
    at_work: int = 0  # so many are in any case

    async def login(self, token: Token) -> str:
        """As a lane does; the cache that is shown."""
        offer = Offer(AuthScheme.NEGOTIATE, token.network, None, None, True, credential_fingerprint(token.network, b"k"), ALICE, token)
        with self.executors.lease(token, "security") as security:
            found = await security.run_security(self.tickets.ready, offer, deadline=30)
        assert isinstance(found, spnego.KerberosCCache)
        return found.ccache

    async def passes(self, seconds: float) -> None:
        """Time, in steps in which somebody can wake."""
        while seconds > 0:
            await self.rest()
            self.clock.advance(min(seconds, LONGEST_SLEEP))
            seconds -= LONGEST_SLEEP
        await let_things_happen()
        await self.rest()

    async def rest(self) -> None:
        """Until whoever woke is asleep again: nobody uses a thread, and nobody begins to while the loop goes round."""
        still = 0
        while still < 20:
            await asyncio.sleep(0)
            users = sum(entry.users for entry in self.executors._entries.values())
            still = still + 1 if users == self.at_work else 0


@pytest.fixture
async def place(clock: FakeClock, kdc: Kdc) -> AsyncIterator[Place]:
    tickets, executors = Tickets(clock=kdc.now), TokenExecutors()
    renewals = Renewals(tickets, executors, clock)
    renewals.start()
    yield Place(tickets, executors, clock, kdc)
    await renewals.aclose()
    await tickets.aclose()
    await executors.aclose()


def by_password() -> Token:
    return Token.for_network(spnego.Password(ALICE, "secret-password"))


def by_cache() -> Token:
    return Token.for_network(spnego.KerberosCCache(SOURCE, ALICE))


async def test_a_ticket_is_renewed_before_it_ends_in_the_threads_of_its_token_without_anybody_asking_for_it(place: Place) -> None:
    token = by_password()
    first = await place.login(token)
    await place.passes(7 * HOUR)
    assert place.kdc.asked == ["password"]
    await place.passes(HOUR)
    assert place.kdc.asked == ["password", first]
    assert all(name.startswith("bits-security-") for name in place.kdc.threads)
    await place.passes(3 * HOUR)
    assert await place.login(token) == "ours-2", "the first one has ended"


async def test_a_cache_that_kinit_wrote_is_renewed_into_one_of_ours_and_left_as_soon_as_kinit_does_it(place: Place) -> None:
    now = place.kdc.now()
    place.kdc.source = Lifetime(now, now + 10 * HOUR, now + 24 * HOUR)
    place.kdc.until = now + 24 * HOUR
    token = by_cache()
    assert await place.login(token) == SOURCE
    await place.passes(8 * HOUR)
    assert place.kdc.asked == [SOURCE]
    assert await place.login(token) == "ours-1"
    place.kdc.source = Lifetime(now, now + 30 * HOUR, now + 48 * HOUR)
    assert await place.login(token) == SOURCE
    assert place.kdc.destroyed == ["ours-1"]


async def test_when_kinit_s_cache_is_emptied_ours_goes_with_it(place: Place) -> None:
    now = place.kdc.now()
    place.kdc.source = Lifetime(now, now + 10 * HOUR, now + 24 * HOUR)
    token = by_cache()
    await place.login(token)
    await place.passes(8 * HOUR)
    assert await place.login(token) == "ours-1"
    place.kdc.source = None
    with pytest.raises(AuthFailed, match="no tickets"):
        await place.login(token)
    assert place.kdc.destroyed == ["ours-1"]
    assert place.tickets.renewals() == []


async def test_t04_when_kinit_s_cache_is_removed_ours_goes_though_nobody_logs_on_any_more(place: Place) -> None:
    now = place.kdc.now()
    place.kdc.source = Lifetime(now, now + 10 * HOUR, now + 40 * HOUR)
    place.kdc.until = now + 40 * HOUR
    token = by_cache()
    await place.login(token)
    await place.passes(8 * HOUR)
    assert await place.login(token) == "ours-1"
    place.kdc.source = None  # kdestroy
    await place.passes(8 * HOUR)
    assert place.kdc.destroyed == ["ours-1"]
    assert place.tickets.renewals() == []


async def test_t25_a_login_under_way_leaves_no_tickets_of_a_token_that_is_closed_and_forgotten_meanwhile(place: Place) -> None:
    """The thread has its offer, and the KDC is not asked yet."""
    token = by_password()
    offer = Offer(AuthScheme.NEGOTIATE, token.network, None, None, True, credential_fingerprint(token.network, b"k"), ALICE, token)
    token.close()
    place.tickets.forget(token)
    with pytest.raises(TokenRequired):
        await asyncio.to_thread(place.tickets.ready, offer)
    assert (place.kdc.asked, repr(place.tickets)) == ([], "<Tickets: 0>")


async def test_a_kdc_that_fails_costs_nothing_while_the_ticket_is_good_and_is_asked_again_a_bounded_number_of_times(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    token = by_password()
    first = await place.login(token)
    place.kdc.failure = silent_kdc()
    await place.passes(9.9 * HOUR)
    assert await place.login(token) == first
    assert 5 < len(place.kdc.asked) < 30
    assert "alice@BITS.TEST were not renewed: the KDC did not answer" in caplog.text
    assert "secret-password" not in caplog.text
    place.kdc.failure = None
    await place.passes(0.1 * HOUR)
    assert await place.login(token) != first


async def test_a_kdc_that_is_silent_keeps_one_thread_and_no_login_waits_for_it(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renewing, "KDC_DEADLINE", 0.5)
    monkeypatch.setattr(asyncio, "timeout", (deadlines := Deadlines(0.5)).timeout)
    token = by_password()
    first = await place.login(token)
    place.kdc.silence = threading.Event()
    passing = asyncio.create_task(place.passes(8 * HOUR))
    await until(lambda: place.kdc.asked == ["password", first])
    deadlines.pass_now()
    await until(lambda: place.executors.retired == 1, "for the thread to be given up")
    await passing
    await place.passes(1.5 * HOUR)
    assert await place.login(token) == first
    assert (place.kdc.asked, place.executors.retired) == (["password", first], 1)
    place.kdc.silence.set()


async def test_a_ticket_that_cannot_be_renewed_is_replaced_with_the_password_when_it_nears_its_end_and_nobody_waits(place: Place) -> None:
    place.kdc.renewable = 0.0
    token = by_password()
    first = await place.login(token)
    await place.passes(9.95 * HOUR)
    assert place.kdc.asked == ["password"]
    assert await place.login(token) == first
    await until(lambda: len(place.kdc.asked) == 2)
    await place.rest()
    assert await place.login(token) == "ours-2"


async def test_past_the_realm_s_limit_of_renewals_another_is_got_with_the_password(place: Place) -> None:
    token = by_password()
    await place.login(token)
    for _ in range(3):
        await place.passes(9 * HOUR)
        await place.login(token)
    await place.passes(HOUR)
    assert place.kdc.asked[0] == "password"
    assert place.kdc.asked.count("password") == 2


async def test_what_nobody_uses_is_left_to_end_and_nothing_ticks_where_there_are_no_tickets(place: Place, clock: FakeClock) -> None:
    await let_things_happen()
    assert not clock._sleepers
    token = by_password()
    await place.login(token)
    await place.passes(8 * HOUR)
    await place.passes(20 * HOUR)
    assert len(place.kdc.asked) == 2, "renewed once, for whoever used it; then nobody did"
    assert not clock._sleepers


async def test_what_is_at_work_is_renewed_though_it_does_not_log_on_again(place: Place) -> None:
    token = by_password()
    await place.login(token)
    place.at_work = 1
    with place.executors.lease(token, "security"):
        await place.passes(20 * HOUR)
    assert len(place.kdc.asked) == 3


async def test_renewals_keep_no_token_alive_and_none_is_renewed_that_was_closed(place: Place) -> None:
    token = by_password()
    await place.login(token)
    gone = weakref.ref(token)
    await place.executors.aclose()
    del token
    gc.collect()
    assert gone() is None
    await place.passes(8 * HOUR)
    assert len(place.kdc.asked) == 1


async def test_a_closed_token_s_tickets_are_destroyed_when_they_are_due(place: Place) -> None:
    token = by_password()
    await place.login(token)
    token.close()
    await place.passes(8 * HOUR)
    assert (place.kdc.asked, place.kdc.destroyed) == (["password"], ["ours-1"])


async def test_a_kdc_whose_clock_is_far_behind_is_not_asked_for_one_ticket_after_the_other(place: Place) -> None:
    place.kdc.now = lambda: place.clock.now().timestamp() - 9 * HOUR
    token = by_password()
    with place.executors.lease(token, "security"):
        await place.login(token)
        for _ in range(10):
            await let_things_happen()
    assert len(place.kdc.asked) == 1
    place.at_work = 1
    with place.executors.lease(token, "security"):
        await place.passes(HOUR)
    assert len(place.kdc.asked) <= 3


async def test_fifty_tokens_are_renewed_together(place: Place) -> None:
    tokens = [by_password() for _ in range(50)]
    for token in tokens:
        await place.login(token)
    await place.passes(8 * HOUR)
    assert len(place.kdc.asked) == 100
