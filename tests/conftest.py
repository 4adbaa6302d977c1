"""What every test has: a guard of the event loop, a check for leaks, directories, users, certificates, and the realm.

The peers on loopback are classes, made by the test that needs them (`peers.py`); the servers of the realm are fixtures of
the session.
"""

import asyncio
import gc
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

from tests import acceptor
from tests.active_directory import ActiveDirectory
from tests.again import Again
from tests.jitter import Jitter
from tests.left_out import LeftOut
from tests.peers import Authority, SilentKdc
from tests.realms import SILENT_REALM, Apache, MitKdc, Nginx, Squid, make_world_directory, write_krb5_conf

if TYPE_CHECKING:
    from blockbuster import BlockBuster

    from tests.local_users import LocalUser  # imports pwd and fcntl

pytest_plugins = ["pytester"]
LEAK_PATIENCE = 30.0
collect_ignore = [] if sys.platform == "win32" else ["windows"]  # run there by `make test-windows`


if sys.platform == "win32":  # under Wine, on a machine that has more to do
    hypothesis.settings.register_profile("windows", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], max_examples=20)
    hypothesis.settings.load_profile("windows")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--jitter", metavar="SEED", help="make the loop and the threads of each test late at random moments")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(LeftOut(), "left-out")
    config.pluginmanager.register(Again(), "again")
    if seed := config.getoption("jitter"):
        jitter = Jitter(seed)
        jitter.install()
        config.pluginmanager.register(jitter, "jitter")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell did so that started the tests with `&`, and what they start inherits it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.platform != "win32":  # where it is not installed
        from hypothesis import settings

        # how long an example takes is the machine's business; new ones are looked for by `make soak`, not by whoever lands a change
        settings.register_profile("untimed", deadline=None, derandomize=True)
        settings.load_profile("untimed")


@pytest.hookimpl(tryfirst=True)  # before somebody asks which markers there are
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "directory_server" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.privileged)  # Samba's domain controller runs as root only
            item.add_marker(pytest.mark.timeout(240))  # the first of them may have to provision the directory


# -- the event loop


@pytest.fixture(scope="session", autouse=True)
def blocked_loop_is_an_error() -> Iterator["BlockBuster | None"]:
    """A call of the package that blocks the event loop raises BlockingError. The tests and their peers may block it.

    Not on Windows: a part of blockbuster has no wheel for it, and the calls are the same.
    """
    if sys.platform == "win32":
        yield None
        return
    from blockbuster import blockbuster_ctx

    with blockbuster_ctx("bits_async") as guard:
        # An application is told to import what it uses before its loop runs; the first use may still load a module.
        for function in guard.functions.values():
            function.can_block_in("<frozen importlib._bootstrap>", {"_find_and_load"})
        # Relative paths are resolved at the call, as promised; getcwd() waits for nothing.
        guard.functions["os.path.abspath"].deactivate()
        guard.functions["os.getcwd"].deactivate()
        # `current_token()` is no coroutine; what the kernel makes up under /proc waits for no disk.
        for name in ("os.read", "os.close", "os.open"):
            if name in guard.functions:
                guard.functions[name].can_block_in("bits_async/identity/kernel.py", {"status"})
        yield guard


def _threads() -> set[str]:
    # "asyncio_N" resolve host names for the loop, which ends them when it is closed.
    return {f"{thread.name} ({thread.ident})" for thread in threading.enumerate() if not thread.name.startswith("asyncio_")}


def _descriptors() -> set[str]:
    found: set[str] = set()
    if sys.platform == "win32":
        return found  # nothing lists them
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add(f"fd {number}: {os.readlink(f'/proc/self/fd/{number}')}")
        except OSError:
            pass  # the one that listed the directory
    return found


@pytest.fixture
async def no_leaks() -> AsyncIterator[None]:
    """After the test no thread, task, socket or file descriptor is left that was not there before; they have LEAK_PATIENCE
    seconds to go.

    Name it first, so that it looks last.
    """
    acceptor.start()  # lives as long as the session
    gc.collect()
    loop_tasks = asyncio.all_tasks()
    before = _threads() | _descriptors()
    yield
    end = time.monotonic() + LEAK_PATIENCE
    while True:
        gc.collect()
        tasks = {repr(task) for task in asyncio.all_tasks() - loop_tasks if task is not asyncio.current_task()}
        left = (_threads() | _descriptors()) - before | tasks
        if not left:
            return
        if time.monotonic() > end:
            pytest.fail("left behind: " + "; ".join(sorted(left)))
        await asyncio.sleep(0.02)


# -- the machine


@pytest.fixture
def memory_dir() -> Iterator[Path]:
    """A directory that needs no disk where there is one: for many small tests in which nothing has to survive."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="bits-test-", dir=memory) as directory:
        yield Path(directory)


@pytest.fixture
def world_dir() -> Iterator[Path]:
    """A directory that every user may enter, unlike `tmp_path`."""
    directory = make_world_directory("test")
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def users() -> Iterator[Mapping[str, "LocalUser"]]:
    """Local users bitsalice, bitsbob and bitshelper: name, uid, gid, home (0700). For `privileged` tests."""
    from tests.local_users import local_users

    with local_users() as found:
        yield found


# -- certificates


@pytest.fixture(scope="session")
def authority() -> Iterator[Authority]:
    directory = make_world_directory("authority")
    yield Authority(directory)
    shutil.rmtree(directory, ignore_errors=True)


# -- the realm


@pytest.fixture(scope="session")
def silent_kdc() -> Iterator[SilentKdc]:
    """The KDC of SILENT.TEST."""
    with SilentKdc() as kdc:
        yield kdc


@pytest.fixture(scope="session", autouse=True)
def a_realm_has_time() -> Iterator[None]:
    """A KDC of the tests answers when the machine lets it. A test of what a silent one costs sets a deadline of its own."""
    from bits_async.auth import renewal, tickets
    from bits_async.identity import logon
    from bits_async.transport import lane

    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((renewal, "KDC_DEADLINE"), (tickets, "KDC_DEADLINE"), (logon, "LOGON_DEADLINE"), (lane, "SECURITY_DEADLINE")):
            patch.setattr(module, name, 45.0)
        yield


@pytest.fixture(scope="session", autouse=True)
def own_environment(silent_kdc: SilentKdc) -> Iterator[None]:
    """The machine's Kerberos, proxies and certificates are not the tests'. Set before the first test, put back after the last."""
    foreign = {"KRB5CCNAME", "KRB5_KTNAME", "KRB5_CLIENT_KTNAME", "NTLM_USER_FILE", "SSL_CERT_FILE", "SSL_CERT_DIR"}
    foreign |= {name for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "all_proxy", "no_proxy")}
    directory = make_world_directory("krb5")
    if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a run that was started with nohup: programs under test inherit it
    with pytest.MonkeyPatch.context() as patch:
        for name in foreign:
            patch.delenv(name, raising=False)
        patch.setenv("KRB5_CONFIG", str(write_krb5_conf(directory / "krb5.conf", {SILENT_REALM: silent_kdc.port})))
        yield
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def kdc(own_environment: None, silent_kdc: SilentKdc) -> Iterator[MitKdc]:
    """The realm BITS.TEST; from here on KRB5_CONFIG of this process names it, and SILENT.TEST beside it."""
    with MitKdc(silent_kdc.port) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("KRB5_CONFIG", str(server.krb5_conf))
        yield server


@pytest.fixture(scope="session")
def apache_server(kdc: MitKdc, authority: Authority) -> Iterator[Apache]:
    with Apache(kdc, authority) as server:
        yield server


@pytest.fixture
def apache(apache_server: Apache) -> Apache:
    """The session's Apache; `hits` counts from the beginning of this test."""
    apache_server.log.clear()
    return apache_server


@pytest.fixture(scope="session")
def nginx_server(authority: Authority) -> Iterator[Nginx]:
    with Nginx(authority) as server:
        yield server


@pytest.fixture
def nginx(nginx_server: Nginx) -> Nginx:
    """The session's nginx; `hits` counts from the beginning of this test."""
    nginx_server.log.clear()
    return nginx_server


@pytest.fixture(scope="session")
def squid_servers(kdc: MitKdc) -> Iterator["Squids"]:
    found = Squids(kdc)
    yield found
    found.stop()


class Squids:
    """One Squid for each scheme, started when it is first asked for."""

    def __init__(self, kdc: MitKdc) -> None:
        self._kdc = kdc
        self._running: dict[str, Squid] = {}

    def of(self, auth: str) -> Squid:
        if auth not in self._running:
            self._running[auth] = Squid(auth, self._kdc).__enter__()
        self._running[auth].log.clear()
        return self._running[auth]

    def stop(self) -> None:
        for server in self._running.values():
            server.ask_to_stop()
        for server in self._running.values():
            server.stop()


@pytest.fixture
def squid_negotiate(squid_servers: Squids) -> Squid:
    """Squid with Kerberos; `hits` counts from the beginning of this test, here and below."""
    return squid_servers.of("negotiate")


@pytest.fixture
def squid_basic(squid_servers: Squids) -> Squid:
    return squid_servers.of("basic")


@pytest.fixture
def squid_digest(squid_servers: Squids) -> Squid:
    return squid_servers.of("digest")


@pytest.fixture
def squid_ntlmfake(squid_servers: Squids) -> Squid:
    """The shape of the handshake only: any password is right, and the user in the log is mangled."""
    return squid_servers.of("ntlmfake")


# -- Active Directory


@pytest.fixture(scope="session")
def directory_server(own_environment: None) -> Iterator[ActiveDirectory]:
    """The domain controller of AD.BITS.TEST; `active_directory` is what a test asks for."""
    with ActiveDirectory() as server:
        yield server


@pytest.fixture
def active_directory(directory_server: ActiveDirectory, monkeypatch: pytest.MonkeyPatch) -> ActiveDirectory:
    """The session's domain controller; during this test KRB5_CONFIG names its realm, and no other."""
    monkeypatch.setenv("KRB5_CONFIG", str(directory_server.krb5_conf))
    return directory_server


@pytest.fixture(scope="session")
def directory_apache_server(directory_server: ActiveDirectory, authority: Authority) -> Iterator[Apache]:
    with Apache(directory_server, authority, size=256 * 1024) as server:
        yield server


@pytest.fixture
def directory_apache(active_directory: ActiveDirectory, directory_apache_server: Apache) -> Apache:
    """An Apache in the domain, as HTTP/localhost; `hits` counts from the beginning of this test."""
    directory_apache_server.log.clear()
    return directory_apache_server
