"""The main job against a real KDC, Apache (mod_auth_gssapi) and Squid (negotiate_kerberos_auth): who was seen where."""

import os
import shutil
import ssl
from pathlib import Path

import pytest
import spnego

import bits_async as bits
from bits_async import AuthCredentials, AuthScheme, AuthTarget, HelperTokenFlags, Token

pytestmark = pytest.mark.realm

ALICE, HELPER = "alice@BITS.TEST", "helper@BITS.TEST"


@pytest.fixture(autouse=True)
def private_state(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def network_token(kdc, name):
    return Token.for_network(spnego.KerberosKeytab(str(kdc.keytab(name)), kdc.principal(name)))


def trust(apache):
    return ssl.create_default_context(cafile=str(apache.ca_file))


async def test_alices_keytab_answers_apache_and_the_log_shows_her_on_every_range(kdc, apache, tmp_path):
    url = apache.url("/neg/big")
    async with bits.BitsManager(store=tmp_path / "queue.db") as manager:
        job = await manager.create_job("ranges", owner=network_token(kdc, "alice"))
        await job.add_file(url, tmp_path / "big")
        await job.set_credentials(AuthTarget.SERVER, AuthScheme.NEGOTIATE, None, None)
        for _ in range(3):
            async with job.events(follow=True) as stream:
                await job.resume()
                async for event in stream:
                    if isinstance(event, bits.Progress) and event.bytes_transferred > 0:
                        break
            if job.state is not bits.JobState.TRANSFERRED:
                await job.suspend()
        await job.resume()
        await job.wait()
        await job.complete()
    assert (tmp_path / "big").read_bytes() == apache.data
    apache.hits(expect=1, target="/neg/big", user=ALICE)
    hits = apache.hits(target="/neg/big")
    assert {hit.user for hit in hits if hit.status in (200, 206)} == {ALICE}
    assert {hit.status for hit in hits} <= {200, 206, 401}


@pytest.mark.parametrize("tls", [False, True], ids=["http", "connect"])
async def test_both_logs_show_the_helper_when_it_acts_on_the_network(kdc, apache, squid_negotiate, tmp_path, tls):
    path = await bits.download(
        apache.url("/neg/big", tls=tls),
        tmp_path / "big",
        proxy=squid_negotiate.url,
        helper=network_token(kdc, "helper"),
        helper_flags=HelperTokenFlags.NETWORK,
        ssl=trust(apache),
    )
    assert path.read_bytes() == apache.data
    assert {h.user for h in apache.hits(expect=1, target="/neg/big", status=200)} == {HELPER}
    assert {p.user for p in squid_negotiate.hits(expect=1, status=200)} == {HELPER}


@pytest.mark.parametrize("tls", [False, True], ids=["http", "connect"])
async def test_both_logs_show_alice_when_the_owner_acts_alone(kdc, apache, squid_negotiate, tmp_path, tls):
    await bits.download(
        apache.url("/neg/big", tls=tls),
        tmp_path / "big",
        proxy=squid_negotiate.url,
        owner=network_token(kdc, "alice"),
        ssl=trust(apache),
    )
    assert {h.user for h in apache.hits(expect=1, target="/neg/big", status=200)} == {ALICE}
    assert {p.user for p in squid_negotiate.hits(expect=1, status=200)} == {ALICE}


@pytest.mark.parametrize("tls", [False, True], ids=["http", "connect"])
async def test_explicit_credentials_per_target_show_alice_to_the_origin_and_the_helper_to_the_proxy(
    kdc, apache, squid_negotiate, tmp_path, tls
):
    await bits.download(
        apache.url("/neg/big", tls=tls),
        tmp_path / "big",
        proxy=squid_negotiate.url,
        credentials=[
            AuthCredentials(AuthTarget.SERVER, AuthScheme.NEGOTIATE, ALICE, kdc.password("alice")),
            AuthCredentials(AuthTarget.PROXY, AuthScheme.NEGOTIATE, HELPER, kdc.password("helper")),
        ],
        ssl=trust(apache),
    )
    assert (tmp_path / "big").read_bytes() == apache.data
    assert {h.user for h in apache.hits(expect=1, target="/neg/big", status=200)} == {ALICE}
    assert {p.user for p in squid_negotiate.hits(expect=1, status=200)} == {HELPER}


async def test_the_files_of_one_identity_share_one_connection_and_one_tunnel(kdc, apache, squid_negotiate, tmp_path):
    async with bits.BitsManager(store=tmp_path / "queue.db", ssl=trust(apache)) as manager:
        job = await manager.create_job("three files", owner=network_token(kdc, "alice"))
        await job.set_proxy_settings(bits.ProxySettings.override(squid_negotiate.url))
        for target in AuthTarget:
            await job.set_credentials(target, AuthScheme.NEGOTIATE, None, None)
        for n in range(3):
            await job.add_file(apache.url("/neg/big", tls=True), tmp_path / f"f{n}")
        await job.resume()
        await job.wait()
        await job.complete()
    done = apache.hits(expect=3, target="/neg/big", status=200)
    assert len(done) == 3
    assert len({h.client_port for h in done}) == 1
    assert len(squid_negotiate.hits(expect=1, status=200, method="CONNECT")) == 1


# -- as root: files of local users -----------------------------------------------------------------------------------------------------


@pytest.fixture
def private(users, world_dir):
    """A directory of bitsalice that nobody else may enter."""
    alice = users["bitsalice"]
    directory = world_dir / "private"
    directory.mkdir(mode=0o700)
    os.chown(directory, alice.uid, alice.gid)
    return directory


@pytest.mark.privileged
async def test_the_file_is_the_owners_while_the_network_saw_the_helper(kdc, apache, squid_negotiate, users, private):
    owner = await Token.for_user("bitsalice")
    path = await bits.download(
        apache.url("/neg/big"),
        private / "big",
        proxy=squid_negotiate.url,
        owner=owner,
        helper=network_token(kdc, "helper"),
        helper_flags=HelperTokenFlags.NETWORK,
    )
    found = path.stat()
    assert (found.st_uid, found.st_gid) == (users["bitsalice"].uid, users["bitsalice"].gid)
    assert found.st_mode & 0o777 == 0o644 & ~_umask()
    assert path.read_bytes() == apache.data
    assert [p.name for p in private.iterdir()] == ["big"]
    assert {h.user for h in apache.hits(expect=1, target="/neg/big", status=200)} == {HELPER}
    assert {p.user for p in squid_negotiate.hits(expect=1, status=200)} == {HELPER}


@pytest.mark.privileged
async def test_the_mirror_image_the_helper_writes_and_the_owner_is_seen(kdc, apache, users, private, world_dir):
    ccache = kdc.ccache("alice", directory=world_dir, owner=users["bitsbob"].uid)
    owner = await Token.for_user("bitsbob", network=spnego.KerberosCCache(ccache))
    path = await bits.download(
        apache.url("/neg/big"),
        private / "big",
        owner=owner,
        helper=await Token.for_user("bitsalice"),
        helper_flags=HelperTokenFlags.LOCAL_FILE,
        credentials=[AuthCredentials(AuthTarget.SERVER, AuthScheme.NEGOTIATE, None, None)],
    )
    assert path.stat().st_uid == users["bitsalice"].uid
    assert {h.user for h in apache.hits(expect=1, target="/neg/big", status=200)} == {ALICE}


@pytest.mark.privileged
@pytest.mark.parametrize("flags", [HelperTokenFlags(value) for value in range(4)])
async def test_files_and_logs_are_those_of_the_token_that_the_flags_name(kdc, apache, squid_negotiate, users, world_dir, tmp_path, flags):
    """The table of docs/who-acts.md, with real users, tickets, servers and logs."""

    async def token(user, principal):
        cache = kdc.ccache(principal, directory=world_dir, owner=users[user].uid)
        return await Token.for_user(user, network=spnego.KerberosCCache(cache))

    owner, helper = await token("bitsalice", "alice"), await token("bitsbob", "helper")
    writes = users["bitsbob" if HelperTokenFlags.LOCAL_FILE in flags else "bitsalice"]
    seen = HELPER if HelperTokenFlags.NETWORK in flags else ALICE
    home = world_dir / "home"
    home.mkdir(mode=0o700)
    os.chown(home, writes.uid, writes.gid)
    async with bits.BitsManager(store=tmp_path / "queue.db") as manager:
        job = await manager.create_job("both", owner=owner)
        await job.add_file(apache.url("/neg/big"), home / "big")
        await job.set_proxy_settings(bits.ProxySettings.override(squid_negotiate.url))
        for target in AuthTarget:
            await job.set_credentials(target, AuthScheme.NEGOTIATE, None, None)
        with bits.impersonate(owner):
            options = await job.token_options()
        with bits.impersonate(helper):
            await options.set_helper_token()
            await options.set_helper_token_flags(flags)
        await job.resume()
        await job.wait()
        await job.complete()
    assert writes.owns(home / "big")
    assert {h.user for h in apache.hits(expect=1, target="/neg/big", status=200)} == {seen}
    assert {p.user for p in squid_negotiate.hits(expect=1, status=200)} == {seen}


@pytest.mark.privileged
async def test_a_directory_of_somebody_else_is_a_local_error_and_nothing_is_made_there(apache, users, private):
    with pytest.raises(bits.LocalFileError) as caught:
        await bits.download(apache.url("/pub/big"), private / "big", owner=await Token.for_user("bitsbob"))
    error = caught.value
    assert (error.code, error.context) == (bits.ErrorCode.E_ACCESSDENIED, bits.ErrorContext.LOCAL_FILE)
    assert error.identity == "bitsbob"
    assert error.path == private / "big"
    assert list(private.iterdir()) == []


@pytest.mark.privileged
async def test_t15_a_directory_swapped_for_a_link_in_the_middle_changes_nothing_elsewhere(users, world_dir, tmp_path):
    from tests.peers import Fault, Hold, Origin

    alice = users["bitsalice"]
    real, elsewhere = world_dir / "real", world_dir / "elsewhere"
    for directory in (real, elsewhere):
        directory.mkdir(mode=0o700)
        os.chown(directory, alice.uid, alice.gid)
    body = os.urandom(3_000_000)
    async with Origin() as origin:
        url = origin.serve("/f", body)
        hold = Hold(after=1_500_000)
        origin.fault("/f", Fault(hold=hold))
        async with bits.BitsManager(store=tmp_path / "q.db") as manager:
            job = await manager.create_job("swap", owner=await Token.for_user("bitsalice"))
            await job.add_file(url, real / "f")
            await job.resume()
            await hold.reached.wait()
            real.rename(world_dir / "moved")
            real.symlink_to(elsewhere)
            hold.release()
            await job.wait()
            with pytest.raises(bits.LocalFileError):
                await job.complete()
            assert list(elsewhere.iterdir()) == []


def _umask() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("Umask:"):
            return int(line.split()[1], 8)
    raise AssertionError


@pytest.mark.privileged
async def test_a_keytab_is_opened_by_the_tokens_own_threads(kdc, apache, users, private, world_dir):
    """A keytab that only root may read does not serve another user's token."""
    keytab = kdc.keytab("alice")
    shutil.chown(keytab, "root", "root")
    owner = await Token.for_user("bitsalice", network=spnego.KerberosKeytab(str(keytab), ALICE))
    with pytest.raises(bits.AuthFailed) as caught:
        await bits.download(apache.url("/neg/big"), private / "big", owner=owner, retry_for=0)
    assert caught.value.identity == "bitsalice"
    assert list(private.iterdir()) == []
