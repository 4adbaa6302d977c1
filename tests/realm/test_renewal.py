"""Kerberos tickets that end while jobs are at work, with a real KDC: renewed in time where they can be, else the end of an identity."""

import asyncio
import contextlib
import shutil
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import spnego

import bits_async as bits
from bits_async import AuthScheme, AuthTarget, ErrorCode, HelperTokenFlags, Job, JobState, Token, TokenRequired, impersonate
from bits_async.auth.policy import Offer
from bits_async.auth.tickets import Tickets
from bits_async.identity.kerberos import look_into
from bits_async.identity.threads import TokenExecutors
from tests.peers import Fault, Hold, Origin
from tests.realms import Apache, MitKdc, Squid
from tests.waiting import DEADLINE, until

if TYPE_CHECKING:
    from tests.local_users import LocalUser

pytestmark = pytest.mark.realm

LIVES = (5, 20, 60)  # seconds; tickets begin at a whole one
NETWORK = HelperTokenFlags.NETWORK


@pytest.fixture(autouse=True)
def private_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


class Meanwhile:
    """A file that is under way until `go_on`, between two that need a login."""

    def __init__(self, origin: Origin) -> None:
        self._origin = origin
        self._holds: list[Hold] = []

    def url(self) -> str:
        url = self._origin.serve(f"/{len(self._holds)}", b"x" * 2000)
        hold = Hold(after=1000)
        self._origin.fault(f"/{len(self._holds)}", Fault(hold=hold))
        self._holds.append(hold)
        return url

    @property
    def all_reached(self) -> bool:
        return all(hold.reached.is_set() for hold in self._holds)

    def go_on(self) -> None:
        for hold in self._holds:
            hold.release()


@pytest.fixture
async def meanwhile() -> AsyncIterator[Meanwhile]:
    async with Origin() as origin:
        yield Meanwhile(origin)


@contextlib.asynccontextmanager
async def manager(tmp_path: Path) -> AsyncIterator[bits.BitsManager]:
    async with bits.BitsManager(store=tmp_path / "queue.db") as opened:
        yield opened


def cached(cache: str) -> Token:
    return Token.for_network(spnego.KerberosCCache(cache))


async def begun(
    manager: bits.BitsManager, urls: list[str], directory: Path, *, owner: Token | None = None, helper: Token | None = None, proxy: str = ""
) -> Job:
    job = await manager.create_job("long", owner=owner, priority=bits.JobPriority.FOREGROUND)
    await job.set_proxy_settings(bits.ProxySettings.override(proxy) if proxy else bits.ProxySettings.no_proxy())
    for url in urls:
        await job.add_file(url, directory / f"{job.id}-{len(job.files)}")
    for target in AuthTarget:
        await job.set_credentials(target, AuthScheme.NEGOTIATE, None, None)
    if helper is not None:
        await help_with(job, helper)
    await job.resume()
    return job


async def help_with(job: Job, helper: Token) -> None:
    options = await job.token_options()
    with impersonate(helper):
        await options.set_helper_token()
    await options.set_helper_token_flags(NETWORK)


async def test_tickets_of_owner_and_helper_are_renewed_while_a_transfer_goes_on_at_origin_and_proxy(
    kdc: MitKdc, apache: Apache, squid_negotiate: Squid, tmp_path: Path
) -> None:
    """Each job logs on once more after the first ticket's end: in the log of the origin, and of the proxy, as the same principal.

    Who has not logged on, or not renewed, within the last fifth of a ticket's life has no ticket any more: where the machine is too slow
    for short ones, they are longer.
    """
    for life in LIVES:
        directory = tmp_path / str(life)
        directory.mkdir()
        try:
            async with Origin() as origin:
                await renewed_meanwhile(kdc, apache, squid_negotiate, directory, Meanwhile(origin), life)
        except bits.BitsError:
            if life == LIVES[-1]:
                raise
        else:
            return


async def renewed_meanwhile(kdc: MitKdc, apache: Apache, squid: Squid, directory: Path, meanwhile: Meanwhile, life: int) -> None:
    by_cache, by_password, by_key = (f"{name}{life}" for name in ("cached", "brief", "short"))
    for name in (by_cache, by_password, by_key):
        kdc.add_user(name, f"{name}-password", f'-maxlife "{life} seconds"', '-maxrenewlife "1 day"')
    helper = Token.for_network(spnego.Password(kdc.principal(by_password), f"{by_password}-password"))
    keytab = Token.for_network(spnego.KerberosKeytab(str(kdc.keytab(by_key)), kdc.principal(by_key)))
    url = apache.url("/neg/big")
    async with manager(directory) as queue:
        cache = kdc.ccache(by_cache, directory=directory, life=life, renewable=600)
        before = look_into(cache)[1]
        jobs = {
            by_cache: await begun(queue, [url, meanwhile.url(), url], directory, owner=cached(cache)),
            by_password: await begun(queue, [url, meanwhile.url(), url], directory, helper=helper, proxy=squid.url),
            by_key: await begun(queue, [url, meanwhile.url(), url], directory, owner=keytab, proxy=squid.url),
        }
        working = asyncio.gather(*(job.wait(transient=True) for job in jobs.values()))
        await until(lambda: meanwhile.all_reached or working.done())
        ended = max(before.ends, time.time() + life) + 1
        await until(lambda: time.time() > ended or working.done(), deadline=life + DEADLINE)
        meanwhile.go_on()
        await working
        for job in jobs.values():
            await job.complete()
    for name in jobs:
        assert len(apache.hits(expect=2, user=kdc.principal(name), status=200)) == 2
    for name in (by_password, by_key):
        assert len(squid.hits(expect=3, user=kdc.principal(name), status=200)) == 3
    assert look_into(cache)[1] == before, "what kinit wrote is its own business"


async def test_tickets_that_cannot_be_renewed_end_the_identity_and_a_job_goes_on_with_new_ones_or_without_the_helper(
    kdc: MitKdc, apache: Apache, tmp_path: Path, meanwhile: Meanwhile
) -> None:
    """They end in the middle: what kinit writes then lives no longer than a moment."""
    files = {name: tmp_path / name for name in ("alice", "bob", "bob too")}
    url = apache.url("/neg/big")
    for name, file in files.items():
        kdc.ccache(name.split()[0], file=file)
    alice, bob, bob_too = (cached(f"FILE:{file}") for file in files.values())
    async with manager(tmp_path) as queue:
        of_owner = await begun(queue, [url, meanwhile.url(), url], tmp_path, owner=alice)
        of_helper = [await begun(queue, [url, meanwhile.url(), url], tmp_path, helper=each) for each in (bob, bob_too)]
        await until(lambda: meanwhile.all_reached)
        for name, file in files.items():
            kdc.ccache(name.split()[0], file=file, life=1)
        ended = time.time() + 2
        await until(lambda: time.time() > ended)
        meanwhile.go_on()
        for job, name in ((of_owner, "alice"), *((each, "bob") for each in of_helper)):
            with pytest.raises(TokenRequired, match=rf"the Kerberos tickets of {name}@BITS\.TEST have expired") as caught:
                await job.wait(transient=True)
            assert (caught.value.code, job.state) == (ErrorCode.BG_E_TOKEN_REQUIRED, JobState.ERROR)
            assert "kinit" in caught.value.advice
            assert "set_helper" in caught.value.advice or "helper token" in caught.value.advice
        kdc.ccache("alice", file=files["alice"])
        await of_owner.resume()
        again, without = of_helper
        await help_with(again, cached(kdc.ccache("helper", directory=tmp_path)))
        await again.resume()
        options = await without.token_options()
        await options.set_helper_token_flags(HelperTokenFlags.NONE)
        await without.files[2].set_remote_name(apache.url("/pub/big"))
        await without.resume()
        for job in (of_owner, *of_helper):
            await job.wait(transient=True)
            await job.complete()
    assert len(apache.hits(expect=2, user=kdc.principal("alice"), status=200)) == 2
    assert len(apache.hits(expect=2, user=kdc.principal("bob"), status=200)) == 2
    assert len(apache.hits(expect=1, user=kdc.principal("helper"), status=200)) == 1


@pytest.mark.privileged
async def test_t04_a_user_s_cache_is_renewed_by_his_own_threads_and_somebody_else_s_is_not(
    kdc: MitKdc, users: Mapping[str, "LocalUser"], world_dir: Path
) -> None:
    """The process may read every cache; the threads of bitsalice may read hers."""
    ahead = 0.0
    tickets, executors = Tickets(clock=lambda: time.time() + ahead), TokenExecutors()
    mine = kdc.ccache("alice", directory=world_dir, owner=users["bitsalice"].uid, renewable=7 * 86400)
    token = await Token.for_user("bitsalice", network=spnego.KerberosCCache(mine))
    offer = Offer(AuthScheme.NEGOTIATE, token.network, principal=token.principal, holder=token, process=False, fingerprint="1")
    with executors.lease(token, "security") as security:
        assert await security.run_security(tickets.ready, offer, deadline=45) == token.network
        (renewal,) = tickets.renewals()
        ahead = renewal.when - time.time() + 1
        begun = look_into(mine)[1].starts
        await until(lambda: time.time() > begun + 1.1, "for another second to begin: else both tickets end in the same")
        await security.run_security(tickets.renew, renewal, deadline=45)
        renewed = await security.run_security(tickets.ready, offer, deadline=45)
        assert isinstance(renewed, spnego.KerberosCCache)
        assert (renewed.ccache.startswith("MEMORY:bits-"), renewed.principal) == (True, kdc.principal("alice"))
        shutil.chown(mine.removeprefix("FILE:"), 0)
        with pytest.raises(bits.AuthFailed, match="may not be read"):
            await security.run_security(tickets.renew, renewal, deadline=45)
        with pytest.raises(bits.AuthFailed, match="may not be read"):
            await security.run_security(tickets.ready, offer, deadline=45)
    assert tickets.renewals() == [], "what was renewed went with the right to it"
    await executors.aclose()
    await tickets.aclose()
