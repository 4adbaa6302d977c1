"""Client certificates of a job, by the public API over real sockets: where they are found, who opens them, who sees them."""

import asyncio
import os
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives import hashes

import bits_async as bits
from bits_async import ErrorCode, HelperTokenFlags, JobState, SecurityFlags, Token, impersonate, run_as
from bits_async.testing import FakeNetwork, fake_token
from bits_async.transport.client_certificates import MAX_FILE, read_key_pair
from tests.certificates import Authority, ClientTls, ServerTls
from tests.peers import Connection, Origin, redirect
from tests.waiting import until

if TYPE_CHECKING:
    from tests.local_users import LocalUser

BODY = b"for those who are known" * 1000
PASSWORD = b"opens-the-key"


class Asking(Origin):
    """Remembers the common name that each request's connection was authenticated by; None: by none."""

    def __init__(self, tls: ServerTls) -> None:
        super().__init__(tls=tls)
        self.names: list[str | None] = []

    async def _serve(self, connection: Connection, *args: Any) -> bool:
        shown = connection.writer.get_extra_info("peercert")
        self.names.append(dict(part[0] for part in shown["subject"])["commonName"] if shown else None)
        return await super()._serve(connection, *args)


@dataclass
class Place:
    directory: Path

    def manager(self, **options: Any) -> bits.BitsManager:
        return bits.BitsManager(store=self.directory / "queue.db", **options)

    async def job(self, manager: bits.BitsManager, *urls: str, owner: Token | None = None) -> bits.Job:
        job = await manager.create_job("certified", priority=bits.JobPriority.FOREGROUND, owner=owner)
        for url in urls:
            await job.add_file(url, self.directory / "out" / f"{job.id}-{len(job.files)}")
        await job.set_proxy_settings(bits.ProxySettings.no_proxy())
        return job

    def write(self, name: str, content: bytes) -> Path:
        path = self.directory / name
        path.write_bytes(content)
        return path


@pytest.fixture
def place(memory_dir: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("XDG_STATE_HOME", str(memory_dir / "state"))
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca_file))
    (memory_dir / "out").mkdir()
    return Place(memory_dir)


@pytest.fixture(scope="module")
def alice(authority: Authority) -> ClientTls:
    return authority.issue_client()


@pytest.fixture(scope="module")
def bob(authority: Authority) -> ClientTls:
    return authority.issue_client(name="bob")


async def whole(job: bits.Job) -> None:
    await job.resume()
    await job.wait(transient=True)
    paths = await job.complete()
    assert [path.read_bytes() for path in paths] == [BODY] * len(paths)


async def failed(job: bits.Job, code: ErrorCode, state: JobState = JobState.ERROR) -> bits.BitsError:
    await job.resume()
    with pytest.raises(bits.BitsError) as caught:
        await job.wait(transient=True)
    assert bits.errors.code_name(caught.value.code) == bits.errors.code_name(code)
    assert job.state is state
    assert caught.value.advice
    return caught.value


async def refused(call: Awaitable[object], code: ErrorCode) -> bits.BitsError:
    with pytest.raises(bits.BitsError) as caught:
        await call
    assert caught.value.code == code
    return caught.value


# -- where it is


def in_one_file(place: Place, me: ClientTls) -> dict[str, Path]:
    return {"file": place.write("me.pem", me.pem + me.key())}


def with_its_key_beside(place: Place, me: ClientTls) -> dict[str, Path]:
    place.write("me.key", me.key())
    return {"file": place.write("me.crt", me.pem)}


def with_a_named_key(place: Place, me: ClientTls) -> dict[str, Path]:
    return {"file": place.write("me.crt", me.pem), "key": place.write("secret", me.key())}


def with_an_encrypted_key(place: Place, me: ClientTls) -> dict[str, Path]:
    content = me.pem + me.key(PASSWORD)
    return {"file": place.write("me.pem", content), "password_file": place.write("password", PASSWORD + b"\r\nand more")}


def as_pkcs12(place: Place, me: ClientTls) -> dict[str, Path]:
    return {"file": place.write("me.p12", me.pkcs12())}


def as_encrypted_pkcs12(place: Place, me: ClientTls) -> dict[str, Path]:
    return {"file": place.write("me.p12", me.pkcs12(PASSWORD)), "password_file": place.write("password", PASSWORD)}


FORMS = [in_one_file, with_its_key_beside, with_a_named_key, with_an_encrypted_key, as_pkcs12, as_encrypted_pkcs12]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
async def test_a_job_shows_the_certificate_of_a_file(place, authority, alice, form):
    files = form(place, alice)
    async with Asking(authority.asking()) as origin, place.manager() as manager:
        job = await place.job(manager, origin.serve("/file", BODY))
        await job.set_client_certificate_by_file(**files)
        await whole(job)
    assert origin.names == ["alice"]
    assert PASSWORD not in b"".join(each.read_bytes() for each in place.directory.glob("queue.db*")), "no password is kept"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("kind", [hashes.SHA1(), hashes.SHA256()], ids=lambda kind: kind.name)
async def test_a_certificate_is_found_in_a_directory_by_its_thumbprint(place, authority, alice, bob, kind, version):
    place.write("a.pem", alice.pem + alice.key())
    place.write("b.p12", bob.pkcs12())
    place.write("c.txt", b"nothing to see")
    server = authority.asking()
    server.context.maximum_version = version
    thumbprint = bob.certificate.fingerprint(kind)
    async with Asking(server) as origin, place.manager() as manager:
        for given in (thumbprint, thumbprint.hex(":").upper()):
            job = await place.job(manager, origin.serve("/file", BODY))
            await job.set_client_certificate_by_id(place.directory, given)
            assert job.client_certificate == bits.ClientCertificate(source=place.directory, thumbprint=thumbprint)
            await whole(job)
    assert origin.names == ["bob", "bob"]


@pytest.mark.parametrize(("name", "meant"), [("ALI", "alice"), ("Lab, bob", "bob"), ("lab", "alice")])
async def test_a_certificate_is_found_by_a_part_of_its_subject_and_the_first_for_clients_wins(place, authority, alice, bob, name, meant):
    place.write("0.pem", authority.issue_client(servers_only=True).pem)
    place.write("1.crt", alice.pem)
    place.write("1.key", alice.key())
    place.write("2.pem", bob.pem + bob.key())
    async with Asking(authority.asking()) as origin, place.manager() as manager:
        job = await place.job(manager, origin.serve("/file", BODY))
        await job.set_client_certificate_by_name(place.directory, name)
        await whole(job)
    assert origin.names == [meant]


LACKS: dict[str, tuple[Callable[[Place, ClientTls, ClientTls], bits.ClientCertificate], ErrorCode]] = {
    "no file": (lambda p, a, b: bits.ClientCertificate(source=p.directory / "none"), ErrorCode.ERROR_FILE_NOT_FOUND),
    "no store": (lambda p, a, b: bits.ClientCertificate(source=p.directory / "none", subject_name="x"), ErrorCode.ERROR_FILE_NOT_FOUND),
    "not in the store": (lambda p, a, b: bits.ClientCertificate(source=p.directory, subject_name="x"), ErrorCode.CRYPT_E_NOT_FOUND),
    "not a certificate": (lambda p, a, b: bits.ClientCertificate(source=p.write("f", b"0\x80junk")), ErrorCode.CRYPT_E_NOT_FOUND),
    "a damaged certificate": (
        lambda p, a, b: bits.ClientCertificate(source=p.write("f", a.pem.replace(b"M", b"A"))),
        ErrorCode.CRYPT_E_NOT_FOUND,
    ),
    "no key": (lambda p, a, b: bits.ClientCertificate(source=p.write("f", a.pem)), ErrorCode.ERROR_WINHTTP_CLIENT_CERT_NO_PRIVATE_KEY),
    "another's key": (
        lambda p, a, b: bits.ClientCertificate(source=p.write("f", a.pem + b.key())),
        ErrorCode.ERROR_WINHTTP_CLIENT_CERT_NO_PRIVATE_KEY,
    ),
    "no password": (
        lambda p, a, b: bits.ClientCertificate(source=p.write("f", a.pem + a.key(PASSWORD))),
        ErrorCode.ERROR_WINHTTP_CLIENT_CERT_NO_ACCESS_PRIVATE_KEY,
    ),
    "a wrong password": (
        lambda p, a, b: bits.ClientCertificate(source=p.write("f", a.pkcs12(PASSWORD)), password_file=p.write("p", b"wrong")),
        ErrorCode.ERROR_WINHTTP_CLIENT_CERT_NO_ACCESS_PRIVATE_KEY,
    ),
    "a damaged key": (
        lambda p, a, b: bits.ClientCertificate(source=p.write("f", a.pem), key=p.write("k", a.key()[:60])),
        ErrorCode.ERROR_WINHTTP_CLIENT_CERT_NO_ACCESS_PRIVATE_KEY,
    ),
    "too large": (
        lambda p, a, b: bits.ClientCertificate(source=p.write("f", bytes(MAX_FILE + 1))),
        ErrorCode.ERROR_WINHTTP_CLIENT_CERT_NO_ACCESS_PRIVATE_KEY,
    ),
    "a device": (
        lambda p, a, b: bits.ClientCertificate(source=Path("/dev/zero")),
        ErrorCode.ERROR_WINHTTP_CLIENT_CERT_NO_ACCESS_PRIVATE_KEY,
    ),
}


@pytest.mark.parametrize("lack", LACKS)
def test_what_is_wrong_with_a_certificate_is_said_with_its_file_and_identity(place, alice, bob, lack):
    make, code = LACKS[lack]
    wanted = make(place, alice, bob)
    with pytest.raises(bits.LocalFileError) as caught:
        read_key_pair(wanted, "alice")
    assert bits.errors.code_name(caught.value.code) == code.name
    assert (caught.value.identity, bool(caught.value.path), bool(caught.value.advice)) == ("alice", True, True)
    assert caught.value.transient is False


def test_a_key_pair_shows_nothing_of_its_key(place, alice):
    pair = read_key_pair(bits.ClientCertificate(source=place.write("me.pem", alice.pem + alice.key())), "alice")
    assert b"PRIVATE" in pair.pem
    assert "PRIVATE" not in repr(pair)


async def test_files_are_named_by_absolute_paths_and_thumbprints_and_names_have_their_lengths(place):
    async with place.manager() as manager:
        job = await manager.create_job("x")
        for call in (
            job.set_client_certificate_by_file("me.pem"),
            job.set_client_certificate_by_file("/me\0.pem"),
            job.set_client_certificate_by_file("/me.pem", key="me.key"),
            job.set_client_certificate_by_file("/me.pem", password_file="p"),
            job.set_client_certificate_by_id("mine", b"a" * 20),
            job.set_client_certificate_by_id("/mine", b"a" * 19),
            job.set_client_certificate_by_id("/mine", "xyz"),
            job.set_client_certificate_by_name("/mine", ""),
            job.set_client_certificate_by_name("/mine", "a" * 256),
        ):
            await refused(call, ErrorCode.E_INVALIDARG)
        assert job.client_certificate is None
        assert not await job.remove_client_certificate()


# -- what servers say


@contextmanager
def refusing(context: ssl.SSLContext) -> Iterator[str]:
    """The URL of a server that tells one client after the other what it does not like (asyncio's servers hang up without a word)."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=_refuse_each, args=(listener, context), daemon=True)
        thread.start()
        yield f"https://127.0.0.1:{listener.getsockname()[1]}/file"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)
    assert not thread.is_alive()


def _refuse_each(listener: socket.socket, context: ssl.SSLContext) -> None:
    with suppress(OSError):
        while True:
            tls = context.wrap_socket(listener.accept()[0], server_side=True, do_handshake_on_connect=False)
            with suppress(ssl.SSLError):
                tls.do_handshake()
            with socket.socket(fileno=tls.detach()) as wire:
                wire.settimeout(10)
                wire.shutdown(socket.SHUT_WR)
                while wire.recv(4096):
                    pass


@pytest.mark.parametrize("shown", ["none", "a stranger's", "an expired one"])
async def test_a_server_that_wants_a_certificate_and_gets_none_or_a_stranger_s_is_a_clear_error(place, authority, tmp_path, shown):
    me = {
        "none": None,
        "a stranger's": Authority(tmp_path).issue_client(),
        "an expired one": authority.issue_client(not_after=datetime.now(UTC) - timedelta(hours=1)),
    }[shown]
    with refusing(authority.asking().context) as url:
        async with place.manager() as manager:
            job = await place.job(manager, url)
            if me is not None:
                await job.set_client_certificate_by_file(place.write("me.pem", me.pem + me.key()))
            error = await failed(job, ErrorCode.ERROR_WINHTTP_CLIENT_AUTH_CERT_NEEDED)
    assert "client certificate" in str(error)


def _answer_when_shown(listener: socket.socket, context: ssl.SSLContext) -> None:
    """Asks for the certificate after it saw the request, as Apache does for a directory; the body is the subject's common name."""
    wire, _ = listener.accept()
    wire.settimeout(10)
    with context.wrap_socket(wire, server_side=True) as tls:
        assert tls.recv(65536).startswith(b"GET /file ")
        assert tls.getpeercert() is None
        tls.verify_client_post_handshake()
        tls.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\n")  # writes the question first
        tls.settimeout(0.02)
        deadline = time.monotonic() + 10
        while not (shown := tls.getpeercert()) and time.monotonic() < deadline:
            with suppress(TimeoutError):  # what comes is no data: reading deals with it and goes on waiting
                tls.recv(1)
        assert shown
        tls.sendall(dict(part[0] for part in shown["subject"])["commonName"].encode())


async def test_a_server_may_ask_when_it_has_seen_the_path(place, authority, alice):
    context = authority.issue().context
    context.load_verify_locations(authority.ca_file)
    context.verify_mode, context.post_handshake_auth = ssl.CERT_REQUIRED, True
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=_answer_when_shown, args=(listener, context), daemon=True)
        thread.start()
        async with place.manager() as manager:
            job = await place.job(manager, f"https://127.0.0.1:{listener.getsockname()[1]}/file")
            await job.set_client_certificate_by_file(place.write("me.pem", alice.pem + alice.key()))
            await job.resume()
            await job.wait(transient=True)
            (path,) = await job.complete()
        assert path.read_bytes() == b"alice"
    await asyncio.to_thread(thread.join, 10)


async def test_a_server_that_only_asks_serves_a_job_without_a_certificate(place, authority):
    async with Asking(authority.asking(ssl.CERT_OPTIONAL)) as origin, place.manager() as manager:
        await whole(await place.job(manager, origin.serve("/file", BODY)))
    assert origin.names == [None]


async def test_security_flags_and_a_certificate_work_together(place, authority, alice, monkeypatch, tmp_path):
    monkeypatch.setenv("SSL_CERT_FILE", str(Authority(tmp_path).ca_file))  # the server's is unknown
    async with Asking(authority.asking()) as origin, place.manager() as manager:
        job = await place.job(manager, origin.serve("/file", BODY))
        await job.set_client_certificate_by_file(place.write("me.pem", alice.pem + alice.key()))
        await failed(job, ErrorCode.ERROR_WINHTTP_SECURE_FAILURE)
        await job.set_security_flags(SecurityFlags.SSL_IGNORE_UNKNOWN_CA)
        await whole(job)
    assert origin.names == ["alice"]


# -- who sees it


async def test_t19_a_certificate_is_shown_to_the_origins_that_the_job_named_and_not_where_a_redirect_leads(place, authority, alice):
    file = place.write("me.pem", alice.pem + alice.key())
    asking = authority.asking(ssl.CERT_OPTIONAL)
    async with Asking(asking) as named, Asking(asking) as other, place.manager() as manager:
        named.always("/file", redirect(other.serve("/file", BODY)))
        job = await place.job(manager, named.url("/file"))
        await job.set_client_certificate_by_file(file)
        await whole(job)
        assert (named.names, other.names) == (["alice"], [None])
        later = await place.job(manager, named.serve("/late", BODY))
        await later.set_client_certificate_by_file(file)
        await whole_after_a_rename(later, other.url("/file"))
        assert other.names == [None, None], "named after the first resume: not until it is set again"
        again = await place.job(manager, named.url("/late"))
        await again.resume()
        await again.suspend()
        await again.files[0].set_remote_name(other.url("/file"))
        await again.set_client_certificate_by_file(file)
        await whole(again)
        assert other.names == [None, None, "alice"], "set again, it goes to what is named now"


async def whole_after_a_rename(job: bits.Job, url: str) -> None:
    await job.resume()
    await job.suspend()
    await job.files[0].set_remote_name(url)
    await whole(job)


async def test_t07_a_connection_authenticated_by_one_certificate_serves_no_job_with_another_or_none(place, authority, alice, bob):
    files = {name: place.write(f"{name}.pem", me.pem + me.key()) for name, me in (("alice", alice), ("bob", bob))}
    async with Asking(authority.asking(ssl.CERT_OPTIONAL)) as origin, place.manager() as manager:
        url = origin.serve("/file", BODY)
        for name in ("alice", "bob", None, "alice", None):
            job = await place.job(manager, url)
            if name is not None:
                await job.set_client_certificate_by_file(files[name])
            await whole(job)
        assert origin.names == ["alice", "bob", None, "alice", None]
        assert len({seen.connection for seen in origin.requests}) == 3, "jobs of one identity with the same certificate share"


async def test_t25_a_certificate_that_is_removed_closes_its_connections(place, authority, alice):
    async with Asking(authority.asking()) as origin, place.manager() as manager:
        job = await place.job(manager, origin.serve("/file", BODY))
        await job.set_client_certificate_by_file(place.write("me.pem", alice.pem + alice.key()))
        await job.resume()
        await job.wait()
        assert origin.open_connections == 1
        assert await job.remove_client_certificate()
        assert job.client_certificate is None
        await origin_closed(origin)
        await job.complete()


async def origin_closed(origin: Origin) -> None:
    await until(lambda: not origin.open_connections)


async def test_t24_with_an_ssl_context_of_the_application_s_a_certificate_is_refused(place, authority):
    async with place.manager(ssl=authority.client()) as manager:
        job = await manager.create_job("x")
        error = await refused(job.set_client_certificate_by_file("/me.pem"), ErrorCode.E_NOTIMPL)
        assert "ssl=" in error.advice
        assert job.client_certificate is None


async def test_t27_a_key_reaches_openssl_by_memory_without_a_name(place, authority, monkeypatch):
    handed: list[str] = []
    load = ssl.SSLContext.load_cert_chain

    def look(context: ssl.SSLContext, file: str, *args: Any, **more: Any) -> None:
        handed.append(os.readlink(file))
        load(context, file, *args, **more)

    asking = authority.asking()
    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", look)
    async with Asking(asking) as origin, place.manager() as manager:
        job = await place.job(manager, origin.serve("/file", BODY))
        await job.set_client_certificate_by_file(place.write("me.p12", authority.issue_client(name="carol").pkcs12()))
        await whole(job)
    assert handed
    assert all(name.startswith("/memfd:") for name in handed)


@pytest.mark.privileged
async def test_t27_no_thread_of_another_user_reads_a_key_on_its_way_to_openssl(place, authority, monkeypatch):
    """A job names any path as its own certificate, descriptors of this process included: they are opened as that job's owner."""
    stolen: list[bytes] = []
    load, other = ssl.SSLContext.load_cert_chain, await Token.for_user("nobody")

    def steal(context: ssl.SSLContext, file: str, *args: Any, **more: Any) -> None:
        with suppress(PermissionError):
            stolen.append(asyncio.run(run_as(other, Path(file).read_bytes)))
        load(context, file, *args, **more)
        stolen.append(b"")

    asking = authority.asking()
    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", steal)
    async with Asking(asking) as origin, place.manager() as manager:
        job = await place.job(manager, origin.serve("/file", BODY))
        await job.set_client_certificate_by_file(place.write("me.p12", authority.issue_client(name="dora").pkcs12()))
        await whole(job)
    assert stolen == [b""]


async def test_a_helper_on_the_network_and_a_certificate_of_an_owner_who_is_not_elevated_do_not_go_together(place, authority, alice):
    file = place.write("me.pem", alice.pem + alice.key())
    with FakeNetwork() as network:
        network.serve("https://files.test/f", BODY)
        async with place.manager() as manager:
            job = await place.job(manager, "https://files.test/f", owner=fake_token("alice"))
            await job.set_client_certificate_by_file(file)
            with impersonate(fake_token("alice")):
                options = await job.token_options()
            with impersonate(fake_token("bob")):
                await options.set_helper_token()
                await options.set_helper_token_flags(HelperTokenFlags.NETWORK)
            error = await failed(job, ErrorCode.ERROR_WINHTTP_CLIENT_CERT_NO_ACCESS_PRIVATE_KEY)
            assert error.identity == "alice"
            await options.set_helper_token_flags(HelperTokenFlags.NONE)
            await whole(job)


# -- whose it is


@pytest.mark.privileged
async def test_t27_the_owner_s_permissions_on_the_key_decide(
    users: Mapping[str, "LocalUser"], world_dir: Path, place: Place, authority: Authority, alice: ClientTls
) -> None:
    """The process may read everything; the owner of the job may not, and the key of another user stays closed to him."""
    me, other = users["bitsalice"], users["bitsbob"]
    world_dir.chmod(0o777)
    key, certificate = world_dir / "me.key", world_dir / "me.crt"
    certificate.write_bytes(alice.pem)
    key.write_bytes(alice.key())
    key.chmod(0o600)
    os.chown(key, other.uid, other.gid)
    async with Asking(authority.asking()) as origin, place.manager() as manager:
        job = await manager.create_job("alice's", owner=await Token.for_user("bitsalice"))
        await job.set_proxy_settings(bits.ProxySettings.no_proxy())
        await job.add_file(origin.serve("/file", BODY), world_dir / "file")
        await job.set_client_certificate_by_name(world_dir, "alice")
        error = await failed(job, ErrorCode.ERROR_WINHTTP_CLIENT_CERT_NO_ACCESS_PRIVATE_KEY)
        assert (error.identity, error.path) == ("bitsalice", key)
        assert origin.requests == []
        os.chown(key, me.uid, me.gid)
        await whole(job)
    assert origin.names == ["alice"]


async def test_t07_who_takes_a_job_over_does_not_get_its_certificate(place, authority, alice):
    with FakeNetwork():
        async with place.manager() as manager:
            job = await place.job(manager, "https://files.test/f")
            await job.set_client_certificate_by_file("/srv/me.pem")
            with impersonate(fake_token("admin", elevated=True)):
                taken = await manager.get_job(job.id)
                await taken.take_ownership()
            assert taken.client_certificate is None


async def test_where_the_certificate_is_is_kept_over_a_restart_with_whom_it_may_be_shown_to(place, authority, alice):
    file = place.write("me.pem", alice.pem + alice.key())
    async with Asking(authority.asking()) as origin:
        async with place.manager() as manager:
            job = await place.job(manager, origin.serve("/file", BODY))
            await job.set_client_certificate_by_file(file)
            shutil.move(file, place.directory / "away")
            await failed(job, ErrorCode.ERROR_FILE_NOT_FOUND)
        shutil.move(place.directory / "away", file)
        async with place.manager() as manager:
            job = await manager.get_job(job.id)
            assert job.client_certificate == bits.ClientCertificate(source=file)
            await whole(job)
    assert origin.names == ["alice"]
