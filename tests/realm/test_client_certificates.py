"""Client certificates, shown to Debian's nginx and Apache: who is in their logs, and what is said where nobody is let in."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives import hashes

import bits_async as bits
from bits_async import AuthScheme, AuthTarget, ErrorCode, HelperTokenFlags, Job, JobState, Token, impersonate
from tests.certificates import Authority, ClientTls
from tests.realms import Apache, MitKdc, Nginx, Squid

if TYPE_CHECKING:
    from tests.local_users import LocalUser

pytestmark = pytest.mark.realm

BODY = b"for those who are known" * 1000
PASSWORD = b"opens-the-key"


@dataclass
class Place:
    """A user's certificates, and a queue that trusts the lab's authority."""

    directory: Path
    alice: ClientTls
    bob: ClientTls

    def manager(self) -> bits.BitsManager:
        return bits.BitsManager(store=self.directory / "queue.db")

    def write(self, name: str, content: bytes) -> Path:
        path = self.directory / name
        path.write_bytes(content)
        return path

    async def job(self, manager: bits.BitsManager, url: str, *, owner: Token | None = None, directory: Path | None = None) -> Job:
        job = await manager.create_job("known", priority=bits.JobPriority.FOREGROUND, owner=owner)
        await job.add_file(url, (directory or self.directory) / f"got-{job.id}")
        await job.set_proxy_settings(bits.ProxySettings.no_proxy())
        return job

    async def present(self, job: Job, how: str) -> None:
        """Alice's certificate, found in one of the ways there are."""
        me = self.alice
        match how:
            case "PEM":
                await job.set_client_certificate_by_file(self.write("me.pem", me.pem + me.key()))
            case "PEM with an encrypted key":
                key, password = self.write("me.key", me.key(PASSWORD)), self.write("password", PASSWORD + b"\n")
                await job.set_client_certificate_by_file(self.write("me.crt", me.pem), key=key, password_file=password)
            case "PKCS#12":
                await job.set_client_certificate_by_file(self.write("me.p12", me.pkcs12()))
            case "PKCS#12 with a password":
                password = self.write("password", PASSWORD)
                await job.set_client_certificate_by_file(self.write("me.p12", me.pkcs12(PASSWORD)), password_file=password)
            case "thumbprint":
                await job.set_client_certificate_by_id(self.store(), me.certificate.fingerprint(hashes.SHA1()))
            case "subject name":
                await job.set_client_certificate_by_name(self.store(), "lab, alice")

    def store(self) -> Path:
        store = self.directory / "store"
        store.mkdir()
        for name, me in (("a", self.bob), ("b", self.alice)):
            (store / f"{name}.pem").write_bytes(me.pem + me.key())
        return store


WAYS = ("PEM", "PEM with an encrypted key", "PKCS#12", "PKCS#12 with a password", "thumbprint", "subject name")


@pytest.fixture
def place(tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca_file))
    return Place(tmp_path, authority.issue_client(), authority.issue_client(name="bob"))


async def whole(job: Job, body: bytes) -> None:
    await job.resume()
    await job.wait(transient=True)
    (path,) = await job.complete()
    assert path.read_bytes() == body


async def failed(job: Job, *codes: int) -> bits.BitsError:
    await job.resume()
    with pytest.raises(bits.BitsError) as caught:
        await job.wait(transient=True)
    assert caught.value.code in codes, str(caught.value)
    assert job.state is JobState.ERROR
    return caught.value


def required(nginx: Nginx) -> str:
    (nginx.root / "file").write_bytes(BODY)
    return f"https://localhost:{nginx.required_port}/file"


def optional(nginx: Nginx, path: str = "/known/file") -> str:
    (nginx.root / "file").write_bytes(BODY)
    return f"https://localhost:{nginx.optional_port}{path}"


@pytest.fixture
def known(apache: Apache) -> dict[str, str]:
    """Where Apache asks when it has seen the path: within the handshake that follows, and by another handshake."""
    return {"TLS 1.3": apache.url("/known/big", tls=True), "TLS 1.2": f"https://localhost:{apache.tls12_port}/known/big"}


# -- shown


@pytest.mark.parametrize("how", WAYS)
async def test_every_way_to_find_a_certificate_lets_alice_in_at_nginx(nginx: Nginx, place: Place, how: str) -> None:
    async with place.manager() as manager:
        job = await place.job(manager, required(nginx))
        await place.present(job, how)
        await whole(job, BODY)
    assert [hit.user for hit in nginx.hits(expect=1)] == ["alice"]


@pytest.mark.parametrize("version", ["TLS 1.3", "TLS 1.2"])
async def test_apache_may_ask_for_it_when_it_has_seen_the_path(apache: Apache, known: dict[str, str], place: Place, version: str) -> None:
    async with place.manager() as manager:
        job = await place.job(manager, known[version])
        await place.present(job, "PEM")
        await whole(job, apache.data)
    assert {hit.user for hit in apache.hits(expect=1, status=200)} == {"alice"}


async def test_a_server_that_would_like_to_know_serves_what_is_public_and_knows_who_shows_one(nginx: Nginx, place: Place) -> None:
    async with place.manager() as manager:
        await whole(await place.job(manager, optional(nginx, "/file")), BODY)
        job = await place.job(manager, optional(nginx))
        await place.present(job, "PEM")
        await whole(job, BODY)
    assert [hit.user for hit in nginx.hits(expect=2)] == [None, "alice"]


@pytest.mark.parametrize("server", ["nginx", "apache"])
async def test_it_is_shown_through_a_tunnel_to_the_server_and_not_to_the_proxy(
    kdc: MitKdc, nginx: Nginx, apache: Apache, known: dict[str, str], squid_negotiate: Squid, place: Place, server: str
) -> None:
    url, body = (required(nginx), BODY) if server == "nginx" else (known["TLS 1.3"], apache.data)
    async with place.manager() as manager:
        job = await place.job(manager, url)
        await job.set_proxy_settings(bits.ProxySettings.override(squid_negotiate.url))
        await job.set_credentials(AuthTarget.PROXY, AuthScheme.NEGOTIATE, kdc.principal("helper"), kdc.password("helper"))
        await place.present(job, "PKCS#12")
        await whole(job, body)
    hits = nginx.hits(expect=1) if server == "nginx" else apache.hits(expect=1, status=200)
    assert {hit.user for hit in hits} == {"alice"}
    assert {passage.user for passage in squid_negotiate.hits(expect=1, status=200, method="CONNECT")} == {kdc.principal("helper")}


async def test_t07_jobs_with_different_certificates_or_none_never_share_a_connection(nginx: Nginx, place: Place) -> None:
    async with place.manager() as manager:
        for me in (place.alice, place.bob, None, place.alice):
            job = await place.job(manager, optional(nginx, "/file"))
            if me is not None:
                await job.set_client_certificate_by_file(place.write("now.pem", me.pem + me.key()))
            await whole(job, BODY)
    hits = nginx.hits(expect=4)
    assert [hit.user for hit in hits] == ["alice", "bob", None, "alice"]
    assert len({hit.client_port for hit in hits}) == 3, "the last one goes on where alice was"


# -- not let in


async def test_without_a_certificate_where_one_is_wanted_the_job_says_so(
    nginx: Nginx, apache: Apache, known: dict[str, str], place: Place
) -> None:
    async with place.manager() as manager:
        error = await failed(await place.job(manager, required(nginx)), ErrorCode.ERROR_WINHTTP_CLIENT_AUTH_CERT_NEEDED)
        assert "client certificate" in str(error)
        await failed(await place.job(manager, optional(nginx)), bits.errors.HTTP_ERROR | 403)
        await failed(await place.job(manager, known["TLS 1.3"]), bits.errors.HTTP_ERROR | 403)
        await failed(await place.job(manager, known["TLS 1.2"]), ErrorCode.ERROR_WINHTTP_CLIENT_AUTH_CERT_NEEDED)


@pytest.mark.parametrize("shown", ["a stranger's", "an expired one"])
async def test_a_certificate_that_the_server_does_not_accept_is_a_clear_error(
    nginx: Nginx, apache: Apache, known: dict[str, str], place: Place, authority: Authority, tmp_path: Path, shown: str
) -> None:
    yesterday = datetime.now(UTC) - timedelta(hours=1)
    me = Authority(tmp_path).issue_client() if shown == "a stranger's" else authority.issue_client(not_after=yesterday)
    file = place.write("me.pem", me.pem + me.key())
    async with place.manager() as manager:
        for url in (required(nginx), known["TLS 1.3"], known["TLS 1.2"]):
            job = await place.job(manager, url)
            await job.set_client_certificate_by_file(file)
            error = await failed(job, ErrorCode.ERROR_WINHTTP_CLIENT_AUTH_CERT_NEEDED)
            assert "client certificate" in str(error)


# -- whose it is


@pytest.mark.privileged
async def test_t27_the_key_is_the_owner_s_while_a_helper_acts_on_the_network(
    nginx: Nginx, place: Place, users: Mapping[str, "LocalUser"], world_dir: Path
) -> None:
    """An ordinary owner's key is not shown beside a helper's login (BITS); an elevated owner's is, read as himself alone."""
    key = place.alice.pem + place.alice.key()
    world_dir.chmod(0o777)
    file = world_dir / "me.pem"
    file.write_bytes(key)
    file.chmod(0o600)
    helper = await Token.for_user("bitsbob")
    async with place.manager() as manager:
        ordinary = await place.job(manager, required(nginx), owner=await Token.for_user("bitsalice"), directory=world_dir)
        ours = await place.job(manager, required(nginx))
        for job in (ordinary, ours):
            await job.set_client_certificate_by_file(file)
            options = await job.token_options()
            with impersonate(helper):
                await options.set_helper_token()
            await options.set_helper_token_flags(HelperTokenFlags.NETWORK)
        error = await failed(ordinary, ErrorCode.ERROR_WINHTTP_CLIENT_CERT_NO_ACCESS_PRIVATE_KEY)
        assert error.identity == "bitsalice"
        await (await ordinary.token_options()).set_helper_token_flags(HelperTokenFlags.NONE)
        error = await failed(ordinary, ErrorCode.ERROR_WINHTTP_CLIENT_CERT_NO_ACCESS_PRIVATE_KEY)
        assert (error.identity, error.path) == ("bitsalice", file), "root's key is closed to her"
        os.chown(file, users["bitsalice"].uid, users["bitsalice"].gid)
        await whole(ordinary, BODY)
        os.chown(file, 0, 0)
        await whole(ours, BODY)
    assert [hit.user for hit in nginx.hits(expect=2)] == ["alice", "alice"]
    with pytest.raises(PermissionError):
        await bits.run_as(helper, file.read_bytes)
