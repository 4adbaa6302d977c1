"""Thousands of logins leave nothing behind: neither memory that Python cannot see, nor descriptors, threads or ticket caches.

Each count runs in a process of its own, so that nobody else's garbage is in the figures.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.active_directory import ActiveDirectory

pytestmark = pytest.mark.realm

ALLOWED = 1024 * 1024  # for all of them together; a context built from a password by pyspnego leaves 3 KB behind

COUNT = """
import asyncio, gc, json, os, sys, threading

import bits_async as bits
from bits_async.auth.policy import AuthScheme, Offer
from bits_async.auth.schemes import _begin_kerberos
from bits_async.auth.tickets import Tickets
from bits_async.identity.threads import TokenExecutors

user, password, keytab, many = sys.argv[1], sys.stdin.read(), sys.argv[2], int(sys.argv[3])


def figures():
    gc.collect()
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
    done = subprocess.run(command, env=os.environ, input=directory.password("alice"), capture_output=True, text=True, check=True)
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
