"""What a low-rights owner, a helper and a server try with the two tokens of a job, as attacks that worked, or would."""

import asyncio
import os
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import spnego

import bits_async as bits
from bits_async import AuthScheme, AuthTarget, BitsManager, ErrorCode, HelperTokenFlags, Job, JobState, Token, TokenOptions, impersonate
from bits_async.identity import kernel
from bits_async.testing import FakeNetwork, fake_token
from tests.certificates import Authority
from tests.identity.somebody import Somebody
from tests.local_users import change_account, own_user
from tests.loopback.test_client_certificates import Asking
from tests.peers import USERS, Door, Fault, Hold, Origin
from tests.rules import NTLM_OVER_HTTP
from tests.waiting import until

if TYPE_CHECKING:
    from tests.local_users import LocalUser

OWNER, HELPER = USERS
NONE, LOCAL, NETWORK = HelperTokenFlags.NONE, HelperTokenFlags.LOCAL_FILE, HelperTokenFlags.NETWORK
BODY = os.urandom(300_000)


@pytest.fixture(autouse=True)
def private_state(monkeypatch: pytest.MonkeyPatch, memory_dir: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(memory_dir / "state"))


def account(name: str) -> Token:
    """Somebody on the network."""
    return Token.for_network(spnego.Password(name, USERS[name]))


async def helped(job: Job, owner: Token, helper: Token, flags: HelperTokenFlags) -> TokenOptions:
    with impersonate(owner):
        options = await job.token_options()
        await options.set_helper_token_flags(flags)
    with impersonate(helper):
        await options.set_helper_token()
    return options


def made_by(user: "LocalUser", directory: Path, mode: int = 0o700) -> Path:
    directory.mkdir()
    directory.chmod(mode)
    os.chown(directory, user.uid, user.gid)
    return directory


# -- a low-rights owner makes somebody else write where he may not ------------------------------------------------------------------------


@pytest.mark.privileged
@pytest.mark.parametrize("turned", ["the directory itself", "a directory above it"])
@pytest.mark.parametrize("count", [1, 3], ids=["one file", "files that are written together"])
async def test_t08_a_link_of_the_owner_does_not_lead_the_helper_to_its_own_keys(
    users: Mapping[str, "LocalUser"], world_dir: Path, memory_dir: Path, turned: str, count: int
) -> None:
    """The helper has seen a harmless path; then the owner, whose directory it is, turns it to the helper's home."""
    alice, bob = users["bitsalice"], users["bitsbob"]
    hers = made_by(alice, world_dir / "hers", 0o755)
    above = made_by(alice, hers / "above", 0o755)
    seen = made_by(alice, above / "outbox", 0o777)
    home = made_by(bob, world_dir / "bob")
    made_by(bob, home / "outbox")
    async with Origin() as origin, BitsManager(store=memory_dir / "queue.db") as manager:
        owner = await Token.for_user("bitsalice")
        job = await manager.create_job("alice's", owner=owner)
        await job.set_proxy_settings(bits.ProxySettings.no_proxy())
        for number in range(count):
            await job.add_file(origin.serve("/keys", b"ssh-ed25519 hers"), seen / f"authorized_keys{number or ''}")
        await helped(job, owner, await Token.for_user("bitsbob"), LOCAL)
        link, target = (seen, home / "outbox") if turned == "the directory itself" else (above, home)
        link.rename(hers / "away")
        link.symlink_to(target)
        os.lchown(link, alice.uid, alice.gid)
        await job.resume()
        with pytest.raises(bits.LocalFileError) as caught:
            await job.wait()
        assert caught.value.code == ErrorCode.ERROR_DIRECTORY
        assert f"uid {alice.uid}" in str(caught.value)
        assert os.listdir(home / "outbox") == []


@pytest.mark.privileged
async def test_a_helper_follows_links_of_its_own_and_of_root(users: Mapping[str, "LocalUser"], world_dir: Path, memory_dir: Path) -> None:
    bob = users["bitsbob"]
    home = made_by(bob, world_dir / "bob")
    (world_dir / "by-root").symlink_to(world_dir / "by-bob")
    (world_dir / "by-bob").symlink_to(home)
    os.lchown(world_dir / "by-bob", bob.uid, bob.gid)
    async with Origin() as origin, BitsManager(store=memory_dir / "queue.db") as manager:
        owner = await Token.for_user("bitsalice")
        job = await manager.create_job("alice's", owner=owner)
        await job.set_proxy_settings(bits.ProxySettings.no_proxy())
        await job.add_file(origin.serve("/f", BODY), world_dir / "by-root" / "f")
        await job.add_file(origin.url("/f"), world_dir / "by-root" / "g")
        await helped(job, owner, await Token.for_user("bitsbob"), LOCAL)
        await job.resume()
        await job.wait()
        await job.complete()
    assert bob.owns(home / "f")
    assert bob.owns(home / "g")


@pytest.mark.privileged
@pytest.mark.parametrize("when", ["before an attempt", "before it is completed"])
async def test_t12_a_helper_that_became_an_administrator_lends_none_of_that(
    users: Mapping[str, "LocalUser"], world_dir: Path, memory_dir: Path, when: str
) -> None:
    """The owner would not have been given an administrator's token (T10); the groups of today are those that count (T12)."""
    async with Origin() as origin, BitsManager(store=memory_dir / "queue.db") as manager:
        with own_user() as user:
            owner, helper = await Token.for_user("bitsalice"), await Token.for_user(user.name)
            job = await manager.create_job("alice's", owner=owner)
            await job.set_proxy_settings(bits.ProxySettings.no_proxy())
            await job.add_file(origin.serve("/f", BODY), made_by(user, world_dir / "his") / "f")
            options = await helped(job, owner, helper, LOCAL)
            if when == "before it is completed":
                await job.resume()
                await job.wait()
            change_account(user.name, "--append", "--groups", "disk")
            with pytest.raises(bits.TokenRequired, match="administrator"):
                if when == "before it is completed":
                    await job.complete()
                else:
                    await job.resume()
                    await job.wait()
            assert not (world_dir / "his" / "f").exists()
            with impersonate(await Token.for_user(user.name)), pytest.raises(bits.AccessDenied):
                await options.set_helper_token()
            await job.cancel()


# -- whose credentials are shown ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [NONE, NETWORK])
async def test_t19_an_owner_does_not_get_the_cookies_of_the_helpers_login(memory_dir: Path, flags: HelperTokenFlags) -> None:
    """With such a cookie he would be the helper for that server, without its token and without asking us."""
    async with Origin(door=Door("NTLM")) as origin, BitsManager(store=memory_dir / "queue.db", auth_rules=NTLM_OVER_HTTP) as manager:
        url, owner = origin.serve("/f", BODY), account(OWNER)
        origin.always("/f", Fault(headers=(("Set-Cookie", "session=secret"), ("set-cookie2", "s=2"), ("X-Other", "seen"))))
        job = await manager.create_job("alice's", owner=owner)
        await job.set_proxy_settings(bits.ProxySettings.no_proxy())
        await job.add_file(url, memory_dir / "f")
        await job.set_credentials(AuthTarget.SERVER, AuthScheme.NTLM, None, None)
        await helped(job, owner, account(HELPER), flags)
        await job.resume()
        await job.wait()
        names = {name.lower() for name, _ in job.files[0].http_response_headers}
        assert "x-other" in names
        assert ("set-cookie" in names, "set-cookie2" in names) == (flags is NONE, flags is NONE)
        assert {user for _, _, user in origin.door.logins} == {OWNER if flags is NONE else HELPER}
        await job.cancel()


async def test_t24_no_connection_shows_the_owners_certificate_and_the_helpers_login(
    memory_dir: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flags are taken back while an attempt is at work as the helper, and a certificate is set: its next file must not mix the two."""
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca_file))
    pair, hold = authority.issue_client(name="the owner"), Hold(after=100_000)
    (memory_dir / "me.pem").write_bytes(pair.pem + pair.key())
    owner = Token._make(Somebody("owner", f"uid:{os.geteuid()}"))
    helper = Token._make(Somebody("helper", f"uid:{os.geteuid()}"), network=spnego.Password(HELPER, USERS[HELPER]), principal=HELPER)
    async with (
        Asking(authority.asking(ssl.CERT_OPTIONAL)) as origin,
        BitsManager(store=memory_dir / "queue.db", auth_rules=NTLM_OVER_HTTP) as manager,
    ):
        origin.door = Door("NTLM")
        urls = [origin.serve(f"/{number}", BODY) for number in range(2)]
        origin.fault("/0", Fault(hold=hold))
        job = await manager.create_job("two files", owner=owner)
        await job.set_proxy_settings(bits.ProxySettings.no_proxy())
        for number, url in enumerate(urls):
            await job.add_file(url, memory_dir / str(number))
        await job.set_credentials(AuthTarget.SERVER, AuthScheme.NTLM, None, None)
        options = await helped(job, owner, helper, NETWORK)
        await job.resume()
        await hold.reached.wait()
        await options.set_helper_token_flags(NONE)
        with impersonate(helper):
            await job.set_client_certificate_by_file(memory_dir / "me.pem")
        hold.release()
        with pytest.raises(bits.BitsError) as caught:
            await job.wait()
        assert caught.value.code == ErrorCode.ERROR_WINHTTP_CLIENT_CERT_NO_ACCESS_PRIVATE_KEY
        assert set(origin.names) == {None}
        assert {user for _, _, user in origin.door.logins} == {HELPER}


# -- what is left behind ------------------------------------------------------------------------------------------------------------------


def worn() -> set[int]:
    """The file system uids of this process's threads, by the kernel's word."""
    found = set()
    for thread in os.listdir("/proc/self/task"):
        try:
            status = kernel.status(f"/proc/self/task/{thread}/status")
        except OSError:
            continue  # it has just ended
        found.add(int(status[b"Uid"].split()[3]))
    return found


@pytest.mark.privileged
@pytest.mark.parametrize("end", ["suspend", "cancel", "clear the token", "close the token", "a call is cancelled", "close the manager"])
async def test_t01_no_thread_goes_on_as_a_user_when_what_it_was_for_has_ended(
    users: Mapping[str, "LocalUser"], world_dir: Path, memory_dir: Path, end: str
) -> None:
    home, hold = made_by(users["bitsbob"], world_dir / "bob"), Hold(after=100_000)
    owner, helper = await Token.for_user("bitsalice"), await Token.for_user("bitsbob")
    async with Origin() as origin:
        async with BitsManager(store=memory_dir / "queue.db") as manager:
            url = origin.serve("/f", BODY)
            origin.fault("/f", Fault(hold=hold))
            job = await manager.create_job("alice's", owner=owner)
            await job.set_proxy_settings(bits.ProxySettings.no_proxy())
            await job.add_file(url, home / "f")
            options = await helped(job, owner, helper, LOCAL)
            await job.resume()
            await until(lambda: users["bitsbob"].uid in worn(), "for what the test is about")
            assert users["bitsbob"].uid != kernel.fsuid(), "and never in the event loop's thread"
            if end == "a call is cancelled":
                call = asyncio.ensure_future(options.clear_helper_token())
                await asyncio.sleep(0)
                call.cancel()
                await asyncio.wait({call})
            elif end == "close the token":
                helper.close()
                hold.release()
            elif end != "close the manager":
                await {"suspend": job.suspend, "cancel": job.cancel, "clear the token": options.clear_helper_token}[end]()
            hold.release()
        await until(lambda: worn() == {os.geteuid()}, "for the end of the threads")


async def test_t10_a_closed_token_opens_no_job(memory_dir: Path) -> None:
    """Its user has logged off: whoever still holds the token is not him."""
    with FakeNetwork() as network:
        network.serve("https://files.test/f", BODY)
        async with BitsManager(store=memory_dir / "queue.db") as manager:
            alice, root = fake_token("alice"), fake_token("root", elevated=True)
            job = await manager.create_job("alice's", owner=fake_token("alice"))
            for token in (alice, root):
                token.close()
                with impersonate(token):
                    calls: list[Any] = [manager.get_job(job.id), job.token_options(), manager.create_job("another"), job.take_ownership()]
                    for call in calls:
                        with pytest.raises((bits.TokenRequired, bits.AccessDenied)):
                            await call
                    assert [each async for each in manager.enum_jobs()] == []
                    with pytest.raises((bits.TokenRequired, bits.AccessDenied)):
                        [each async for each in manager.enum_jobs(all_users=True)]
            assert job.state is JobState.SUSPENDED


async def test_a_download_with_a_helper_that_is_refused_leaves_no_job(memory_dir: Path) -> None:
    with FakeNetwork() as network:
        network.serve("https://files.test/f", BODY)
        async with BitsManager(store=memory_dir / "queue.db") as manager:
            with impersonate(fake_token("alice")):
                for helper in (fake_token("root", elevated=True), closed(fake_token("bob"))):
                    with pytest.raises((bits.AccessDenied, bits.TokenRequired)):
                        await manager.download("https://files.test/f", memory_dir / "f", helper=helper, helper_flags=NETWORK)
            with impersonate(fake_token("admin", elevated=True)):
                assert [job async for job in manager.enum_jobs(all_users=True)] == []


def closed(token: Token) -> Token:
    token.close()
    return token
