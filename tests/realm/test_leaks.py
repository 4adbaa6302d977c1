"""Thousands of logins leave nothing behind: neither memory that Python cannot see, nor descriptors, threads or ticket caches.

Each count runs in a process of its own, so that nobody else's garbage is in the figures.
"""

import asyncio
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import spnego

import bits_async as bits
from bits_async import AuthScheme, Token
from bits_async.identity import threads
from bits_async.transport import lane
from tests.active_directory import ActiveDirectory
from tests.peers import SilentKdc
from tests.realms import Apache, MitKdc, write_krb5_conf
from tests.waiting import Deadlines, until

pytestmark = pytest.mark.realm

ALLOWED = 1024 * 1024  # for all of them together; a context built from a password by pyspnego leaves 3 KB behind

COUNT = """
import asyncio, gc, json, os, sys, threading, time

import bits_async as bits
from bits_async.auth.policy import AuthScheme, Offer
from bits_async.auth.schemes import _begin_kerberos
from bits_async.auth.tickets import Tickets
from bits_async.identity.threads import TokenExecutors

user, password, keytab, many = sys.argv[1], sys.stdin.read(), sys.argv[2], int(sys.argv[3])


def figures():
    gc.collect()
    while [thread for thread in threading.enumerate() if thread.name.startswith("bits-")]:
        time.sleep(0.001)  # an outcome is there a moment before its thread has ended
    resident = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resident, len(os.listdir("/proc/self/fd")), threading.active_count()


async def contexts(count):
    '''Logins of one token at one service, in its threads, as a lane makes them.'''
    token = await bits.logon_user(user, password, keytab=keytab)
    tickets, executors = Tickets(), TokenExecutors()
    offer = Offer(AuthScheme.NEGOTIATE, token.network, fingerprint="one", principal=token.principal, holder=token, process=False)

    def some():
        for _ in range(100):
            _begin_kerberos(tickets, offer, "localhost", None)

    with executors.lease(token, "security") as executor:
        for _ in range(count // 100):
            await executor.run_security(some, deadline=60)
    await executors.aclose()
    await tickets.aclose()
    token.close()


async def tokens(count):
    '''Tokens that are made, and given up.'''
    for _ in range(count):
        (await bits.s4u_logon(user, service=keytab)).close()


async def main():
    work = {"contexts": contexts, "tokens": tokens}[sys.argv[4]]
    await work(many // 10)  # what is loaded and allocated once
    before = figures()
    await work(many)
    print(json.dumps([after - first for first, after in zip(before, figures())]))


asyncio.run(main())
"""


def growth(directory: ActiveDirectory, what: str, many: int) -> list[int]:
    """Of resident memory, descriptors and threads."""
    keytab = directory.keytab("engine")
    command = [sys.executable, "-c", COUNT, directory.principal("alice"), str(keytab), str(many), what]
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}  # how many there are, and how full, is a matter of which threads meet
    done = subprocess.run(command, env=environment, input=directory.password("alice"), capture_output=True, text=True, check=True)
    found: list[int] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    ("what", "many"),
    [
        ("contexts", 2_000),
        ("tokens", 30),
        pytest.param("contexts", 10_000, marks=[pytest.mark.soak, pytest.mark.timeout(900)]),
        pytest.param("tokens", 1_000, marks=[pytest.mark.soak, pytest.mark.timeout(900)]),
    ],
)
def test_many_logins_leave_neither_memory_nor_descriptors_nor_threads(active_directory: ActiveDirectory, what: str, many: int) -> None:
    memory, descriptors, threads = growth(active_directory, what, many)
    assert memory < ALLOWED, f"{memory / many:.0f} bytes each"
    assert (descriptors, threads) == (0, 0)


@pytest.mark.parametrize("jobs_each", [1, pytest.param(20, marks=[pytest.mark.soak, pytest.mark.timeout(900)])])
async def test_fifty_tokens_at_work_have_bounded_threads_and_descriptors_and_give_them_back(
    kdc: MitKdc, apache: Apache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs_each: int
) -> None:
    """While the manager stays open: whoever does nothing any more has neither threads nor connections, and closed tokens no tickets."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(threads, "IDLE_SECONDS", 0.2)
    keytab = spnego.KerberosKeytab(str(kdc.keytab("alice")), kdc.principal("alice"))
    file = apache.root / "neg" / "small"
    file.write_bytes(b"small")
    file.chmod(0o644)
    async with bits.BitsManager(store=tmp_path / "queue.db", limits=bits.Limits(connections_per_host=8)) as manager:
        manager._network._idle_seconds = 0.2  # type: ignore[union-attr]
        await fetch(manager, Token.for_network(keytab), apache, tmp_path / "first")  # what is loaded and opened once
        await until(lambda: quiet(manager), "for the first token to be given up")
        before, most = figures(), [0, 0]
        tokens = [Token.for_network(keytab) for _ in range(50)]
        work = [fetch(manager, token, apache, tmp_path / f"{n}-{m}") for n, token in enumerate(tokens) for m in range(jobs_each)]
        done = asyncio.gather(*work)
        while not done.done():
            most = [max(each) for each in zip(most, figures(), strict=True)]
            await asyncio.sleep(0.01)
        await done
        assert most[0] - before[0] <= 2 * 50 * 4, "four of each kind for each token at the very most"
        assert most[1] - before[1] <= 2 * 8 + 3 * 50 * jobs_each, "sockets for the connections, a directory and two files for each job"
        await until(
            lambda: quiet(manager) and all(now <= then for now, then in zip(figures(), before, strict=True)),
            f"for threads and descriptors to be {before} again",
        )
        for token in tokens:
            await manager._network.forget(token)  # type: ignore[union-attr]
            token.close()
        assert repr(manager._tickets) in ("<Tickets: 0>", "<Tickets: 1>")
    logins = 50 * jobs_each + 1
    assert len(apache.hits(expect=logins, user=kdc.principal("alice"), target="/neg/small", status=200)) == logins


async def fetch(manager: bits.BitsManager, token: Token, apache: Apache, path: Path) -> None:
    job = await manager.create_job(path.name, owner=token, priority=bits.JobPriority.FOREGROUND)
    await job.add_file(apache.url("/neg/small"), path)
    await job.set_proxy_settings(bits.ProxySettings.no_proxy())
    await job.set_credentials(bits.AuthTarget.SERVER, AuthScheme.NEGOTIATE, None, None)
    await job.resume()
    await job.wait(transient=True)
    await job.complete()


def figures() -> tuple[int, int]:
    """Threads and descriptors; those that resolve names for the loop are the loop's."""
    names = [thread.name for thread in threading.enumerate() if not thread.name.startswith("asyncio_")]
    return len(names), len(os.listdir("/proc/self/fd"))


def quiet(manager: bits.BitsManager) -> bool:
    """Nobody has threads, nor a connection."""
    assert manager._executors is not None
    return not (manager._executors._entries or manager._executors._closing) and not manager._network._hosts  # type: ignore[union-attr]


async def test_a_silent_kdc_costs_a_job_the_deadline_and_one_thread_and_the_loop_nothing(
    kdc: MitKdc, apache: Apache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(lane, "SECURITY_DEADLINE", 41.0)
    monkeypatch.setattr(asyncio, "timeout", (deadlines := Deadlines(41.0)).timeout)
    token = Token.for_network(spnego.Password("alice@SILENT.TEST", "password"))
    (apache.root / "neg" / "small").write_bytes(b"small")
    before = figures()[0]
    with SilentKdc() as silent:
        realms = {kdc.realm: kdc.port, "SILENT.TEST": silent.port}
        monkeypatch.setenv("KRB5_CONFIG", str(write_krb5_conf(tmp_path / "krb5.conf", realms)))
        async with bits.BitsManager(store=tmp_path / "queue.db") as manager:
            with pytest.raises(bits.NetworkError, match="KDC did not answer") as caught:
                fetching = asyncio.create_task(fetch(manager, token, apache, tmp_path / "silent"))
                await until(lambda: silent.asked)
                deadlines.pass_now()
                await fetching
            assert caught.value.transient
            assert manager._executors is not None
            assert manager._executors.retired == 1
            monkeypatch.setattr(lane, "SECURITY_DEADLINE", 40.0)
            other = Token.for_network(spnego.Password(kdc.principal("alice"), kdc.password("alice")))
            await fetch(manager, other, apache, tmp_path / "other")
            assert manager._executors.retired == 1
    await until(lambda: figures()[0] <= before, "for the thread that waited for the KDC to hear that it is gone")
