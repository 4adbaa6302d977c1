"""Which token acts where: for every combination of flags, with and without a helper token, by what really happened.

Of files: which thread made the system call on the part file, and as whom (the kernel's own word where users are real; without the
privilege, threads that remember which token they were born in). Of the network: whom the origin and the proxy logged on; tests/realm says
the same of a real KDC, Apache and Squid. `docs/who-acts.md` is the table for people, and must say the same.
"""

import os
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import spnego

import bits_async as bits
from bits_async import AuthScheme, AuthTarget, BitsManager, ErrorCode, HelperTokenFlags, Job, JobState, Token, impersonate
from bits_async.identity import kernel
from tests.certificates import Authority
from tests.identity.somebody import Somebody
from tests.loopback.test_client_certificates import Asking
from tests.peers import USERS, Door, Origin, Proxy
from tests.rules import NTLM_OVER_HTTP
from tests.waiting import until

NONE, LOCAL, NETWORK = HelperTokenFlags.NONE, HelperTokenFlags.LOCAL_FILE, HelperTokenFlags.NETWORK
ALL_FLAGS = (NONE, LOCAL, NETWORK, LOCAL | NETWORK)
DOCUMENT = Path(__file__).parents[2] / "docs" / "who-acts.md"
SEEN_AS = dict(zip(("owner", "helper"), USERS, strict=True))  # the name on the network
BODY = os.urandom(300_000)

FILES = {
    "create": "The part file is created",
    "write": "The part file is written",
    "mode, access list and time": "The part file gets its mode, access list and time",
    "rename": "The part file is renamed (`complete()`)",
    "delete": "The part file is deleted (`cancel()`)",
}
SEATS = {
    "origin": "The origin's challenge is answered with the token's own credentials",
    "proxy": "The proxy's challenge is answered with the token's own credentials",
}
KEY, COMMAND, DISCOVERY = "The client certificate and its key are read", "The notification command runs", "The proxy is found"


def table() -> dict[str, dict[HelperTokenFlags, str]]:
    """What the document says."""
    rows = [line.strip("|\n ").split(" | ") for line in DOCUMENT.read_text().splitlines() if line.startswith("| ")]
    return {first: dict(zip(ALL_FLAGS, cells, strict=True)) for first, *cells in rows[1:]}


TABLE = table()


def test_the_table_for_people_has_a_row_for_everything_that_is_looked_at_here() -> None:
    assert list(TABLE) == [*FILES.values(), *SEATS.values(), KEY, COMMAND, DISCOVERY]


# -- the witness --------------------------------------------------------------------------------------------------------------------------


class Remembers(Somebody):
    """A local identity whose threads know whose they are; for the kernel they are the process."""

    here = threading.local()

    def assume(self) -> None:
        self.here.name = self.name


@dataclass
class Witness:
    """Who made which kind of system call on a part file."""

    who: Callable[[], str]
    seen: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        for name in ("open", "rename", "unlink", "pwritev", "splice", "fchmod", "utime", "getxattr", "setxattr", "removexattr"):
            patch.setattr(os, name, self._watched(name, getattr(os, name)))

    def _watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._is_part(args[1] if name == "splice" else args[0]):
                self.seen[self._kind(name, args)].add(self.who())
            return call(*args, **kwargs)

        return watched

    def _is_part(self, thing: object) -> bool:
        if isinstance(thing, int):
            try:
                thing = os.readlink(f"/proc/self/fd/{thing}")
            except OSError:
                return False
        return isinstance(thing, str | os.PathLike) and ".bits-part" in os.fspath(thing)

    def _kind(self, name: str, args: tuple[Any, ...]) -> str:
        if name == "open":
            return "create" if args[1] & os.O_EXCL else "open"
        return {"unlink": "delete", "pwritev": "write", "splice": "write", "rename": "rename"}.get(name, "mode, access list and time")


@dataclass
class World:
    """An owner, a helper, and a directory in which both may write."""

    owner: Token
    helper: Token
    witness: Witness
    out: Path
    store: Path


def recorded(directory: Path) -> World:
    def token(part: str) -> Token:
        local = Remembers(part, f"uid:{20000 + len(part)}")
        return Token._make(local, network=spnego.Password(SEEN_AS[part], USERS[SEEN_AS[part]]), principal=SEEN_AS[part])

    (directory / "out").mkdir()
    tokens = {part: token(part) for part in SEEN_AS}
    witness = Witness(lambda: getattr(Remembers.here, "name", "the process"))
    return World(tokens["owner"], tokens["helper"], witness, directory / "out", directory / "queue.db")


@pytest.fixture
def world(memory_dir: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setenv("XDG_STATE_HOME", str(memory_dir / "state"))
    world = recorded(memory_dir)
    world.witness.watch(monkeypatch)
    return world


async def real_world(users: Mapping[str, Any], directory: Path) -> World:
    """Real users; the kernel says who a thread is."""
    names = {"owner": "bitsalice", "helper": "bitsbob"}
    tokens = {
        part: await Token.for_user(name, network=spnego.Password(SEEN_AS[part], USERS[SEEN_AS[part]])) for part, name in names.items()
    }
    called = {users[name].uid: part for part, name in names.items()}
    (directory / "out").mkdir(mode=0o777)
    (directory / "out").chmod(0o777)
    witness = Witness(lambda: called.get(kernel.fsuid(), f"uid {kernel.fsuid()}"))
    return World(tokens["owner"], tokens["helper"], witness, directory / "out", directory / "queue.db")


# -- files and challenges -----------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def network() -> AsyncIterator[tuple[Origin, Proxy]]:
    """Both want to know who asks."""
    async with Origin(door=Door("NTLM")) as origin, Proxy(door=Door("NTLM")) as proxy:
        yield origin, proxy


async def make_job(world: World, manager: BitsManager, name: str, flags: HelperTokenFlags, url: str, proxy: str, *, helped: bool) -> Job:
    job = await manager.create_job(name, owner=world.owner, priority=bits.JobPriority.FOREGROUND)
    await job.set_no_progress_timeout(0)
    await job.set_proxy_settings(bits.ProxySettings.override(proxy))
    for target in AuthTarget:
        await job.set_credentials(target, AuthScheme.NTLM, None, None)
    await job.add_file(url, world.out / name)
    with impersonate(world.owner):
        options = await job.token_options()
        await options.set_helper_token_flags(flags)
    if helped:
        with impersonate(world.helper):
            await options.set_helper_token()
    return job


async def look(world: World, flags: HelperTokenFlags) -> dict[str, set[str]]:
    """Who did what for two jobs, one of which is completed, over a file that is there, and one is cancelled at the end."""
    (world.out / "kept").touch()
    (world.out / "kept").chmod(0o666)
    async with network() as (origin, proxy), BitsManager(store=world.store, auth_rules=NTLM_OVER_HTTP) as manager:
        url = origin.serve("/f", BODY, last_modified="Mon, 02 Nov 2026 10:00:00 GMT")
        for name in ("kept", "dropped"):
            job = await make_job(world, manager, name, flags, url, proxy.url, helped=True)
            await job.resume()
            await job.wait()
            await (job.complete() if name == "kept" else job.cancel())
        called = {user: part for part, user in SEEN_AS.items()}
        seats = {seat: {called[user] for _, _, user in peer.door.logins} for seat, peer in (("origin", origin), ("proxy", proxy))}
    assert (world.out / "kept").read_bytes() == BODY
    assert os.listdir(world.out) == ["kept"]
    return seats | {kind: who for kind, who in world.witness.seen.items() if kind != "open"}


def wanted(flags: HelperTokenFlags) -> dict[str, set[str]]:
    return {what: {TABLE[row][flags]} for what, row in (FILES | SEATS).items()}


@pytest.mark.parametrize("flags", ALL_FLAGS)
async def test_files_and_challenges_are_those_of_the_token_that_the_table_names(world: World, flags: HelperTokenFlags) -> None:
    assert await look(world, flags) == wanted(flags)


@pytest.mark.privileged
@pytest.mark.parametrize("flags", ALL_FLAGS)
async def test_it_is_so_for_the_kernel_too(
    users: Mapping[str, Any], world_dir: Path, flags: HelperTokenFlags, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(world_dir / "state"))
    world = await real_world(users, world_dir)
    world.witness.watch(monkeypatch)
    assert await look(world, flags) == wanted(flags)
    acting = users["bitsbob" if LOCAL in flags else "bitsalice"]
    assert (world.out / "kept").stat().st_uid == acting.uid


@pytest.mark.privileged
@pytest.mark.parametrize("flags", ALL_FLAGS)
async def test_a_directory_of_whoever_acts_is_enough_and_one_of_the_other_is_of_no_use(
    users: Mapping[str, Any], world_dir: Path, flags: HelperTokenFlags, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(world_dir / "state"))
    world = await real_world(users, world_dir)
    acting, other = ("bitsbob", "bitsalice") if LOCAL in flags else ("bitsalice", "bitsbob")
    async with network() as (origin, proxy), BitsManager(store=world.store, auth_rules=NTLM_OVER_HTTP) as manager:
        url = origin.serve("/f", BODY)
        for name, user in (("mine", acting), ("theirs", other)):
            world.out = world_dir / name
            world.out.mkdir(mode=0o700)
            os.chown(world.out, users[user].uid, users[user].gid)
            job = await make_job(world, manager, "f", flags, url, proxy.url, helped=True)
            await job.resume()
            if user == acting:
                await job.wait()
                await job.complete()
                assert users[acting].owns(world.out / "f")
                continue
            with pytest.raises(bits.LocalFileError) as caught:
                await job.wait()
            assert caught.value.code == ErrorCode.E_ACCESSDENIED
            assert os.listdir(world.out) == []


@pytest.mark.parametrize("flags", ALL_FLAGS)
async def test_flags_without_a_token_fail_before_anything_has_happened(world: World, flags: HelperTokenFlags) -> None:
    async with network() as (origin, proxy), BitsManager(store=world.store, auth_rules=NTLM_OVER_HTTP) as manager:
        job = await make_job(world, manager, "f", flags, origin.serve("/f", BODY), proxy.url, helped=False)
        await job.resume()
        if flags is NONE:
            await job.wait()
            await job.complete()
            return
        with pytest.raises(bits.TokenRequired) as caught:
            await job.wait()
        assert caught.value.code == ErrorCode.BG_E_TOKEN_REQUIRED == 0x80200056
        assert job.state is JobState.ERROR
        assert not origin.requests
        assert not proxy.requests
        assert not world.witness.seen
        assert os.listdir(world.out) == []


# -- the client certificate ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", ALL_FLAGS)
@pytest.mark.parametrize("elevated", [False, True], ids=["owner", "elevated owner"])
async def test_the_key_of_the_client_certificate_is_read_as_the_owner(
    world: World, flags: HelperTokenFlags, elevated: bool, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.owner = Token._make(Remembers("owner", f"uid:{os.geteuid()}", elevated=elevated))
    certificate, pair = world.store.parent / "me.pem", authority.issue_client(name="owner's")
    certificate.write_bytes(pair.pem + pair.key())
    readers: set[str] = set()
    watched = os.open

    def open_(name: Any, *args: Any, **kwargs: Any) -> int:
        if str(name) == str(certificate):
            readers.add(world.witness.who())
        return watched(name, *args, **kwargs)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca_file))
    async with Asking(authority.asking()) as origin, BitsManager(store=world.store) as manager:
        job = await manager.create_job("f", owner=world.owner, priority=bits.JobPriority.FOREGROUND)
        await job.set_no_progress_timeout(0)
        await job.set_proxy_settings(bits.ProxySettings.no_proxy())
        await job.add_file(origin.serve("/f", BODY), world.out / "f")
        await job.set_client_certificate_by_file(certificate)
        with impersonate(world.owner):
            options = await job.token_options()
            await options.set_helper_token_flags(flags)
        with impersonate(world.helper):
            await options.set_helper_token()
        await job.resume()
        said = TABLE[KEY][flags]
        if said == "owner" or elevated:
            await job.wait()
            assert readers == {"owner"}
            assert set(origin.names) == {"owner's"}
            return
        assert said == "owner, if elevated"
        with pytest.raises(bits.BitsError) as caught:
            await job.wait()
        assert caught.value.code == ErrorCode.ERROR_WINHTTP_CLIENT_CERT_NO_ACCESS_PRIVATE_KEY == 0x80072F9A
        assert (readers, origin.names) == (set(), [])


# -- the command and the proxy ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", ALL_FLAGS)
@pytest.mark.parametrize("setter", ["owner", "helper", "somebody else"])
async def test_the_command_runs_as_whoever_set_it(memory_dir: Path, flags: HelperTokenFlags, setter: str) -> None:
    from bits_async.testing import FakeNetwork, fake_token

    with FakeNetwork() as fake:
        fake.serve("https://files.test/f", BODY)
        async with BitsManager(store=memory_dir / "queue.db") as manager:
            job = await manager.create_job("f", owner=fake_token("owner"))
            await job.add_file("https://files.test/f", memory_dir / "f")
            with impersonate(fake_token("owner")):
                options = await job.token_options()
                await options.set_helper_token_flags(flags)
            with impersonate(fake_token("helper")):
                await options.set_helper_token()
            with impersonate(fake_token(setter)):
                await job.set_notify_cmd_line("/bin/true")
            await job.resume()
            await job.wait()
            await until(lambda: fake.commands)
    assert TABLE[COMMAND][flags] == "its setter"
    assert {command.identity for command in fake.commands} == {setter}


@pytest.mark.privileged
@pytest.mark.parametrize("flags", ALL_FLAGS)
async def test_the_command_is_the_setter_for_the_kernel_too(
    users: Mapping[str, Any], world_dir: Path, flags: HelperTokenFlags, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(world_dir / "state"))
    world = await real_world(users, world_dir)
    setter = await Token.for_user("bitshelper")
    async with network() as (origin, proxy), BitsManager(store=world.store, auth_rules=NTLM_OVER_HTTP) as manager:
        job = await make_job(world, manager, "f", flags, origin.serve("/f", BODY), proxy.url, helped=True)
        with impersonate(setter):
            await job.set_notify_cmd_line("/bin/sh", ["/bin/sh", "-c", f"touch {world.out}/told"])
        await job.resume()
        await job.wait()
        await until((world.out / "told").exists)
        assert users["bitshelper"].owns(world.out / "told")


@pytest.mark.parametrize("flags", ALL_FLAGS)
async def test_the_proxy_is_that_of_the_program_at_the_moment_when_it_makes_the_job(
    world: World, flags: HelperTokenFlags, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with network() as (origin, proxy):
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.setenv("no_proxy", "")
        async with BitsManager(store=world.store, auth_rules=NTLM_OVER_HTTP) as manager:
            job = await manager.create_job("f", owner=world.owner)
            for variable in ("http_proxy", "no_proxy"):
                monkeypatch.delenv(variable)
            await job.add_file(origin.serve("/f", BODY), world.out / "f")
            for target in AuthTarget:
                await job.set_credentials(target, AuthScheme.NTLM, None, None)
            with impersonate(world.owner):
                options = await job.token_options()
                await options.set_helper_token_flags(flags)
            with impersonate(world.helper):
                await options.set_helper_token()
            await job.resume()
            await job.wait()
            assert TABLE[DISCOVERY][flags] == "the creating program"
            assert proxy.passed
