"""Channel binding over real TLS: acceptors that insist on it take us, and refuse the very same token over another certificate.

The acceptors are python-gssapi's (Kerberos) and pyspnego's (NTLM). The man in the middle ends TLS with a certificate of the same
authority, so that our own verification has nothing against him, and relays every byte.
"""

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import AsyncIterator, Iterable

import pytest
import spnego

import bits_async as bits
from bits_async import AuthCredentials, AuthScheme, AuthTarget, JobPriority, JobState, Token
from tests.peers import USERS, Authority, Door, Origin, Proxy, Server, ServerTls
from tests.rules import NTLM_OVER_HTTP

ALICE, HELPER = USERS
BODY = os.urandom(300_000)
HTTP_401, HTTP_407 = 0x80190191, 0x80190197

KERBEROS = pytest.param("Kerberos", id="kerberos", marks=pytest.mark.realm)
EVERY_MECHANISM = pytest.mark.parametrize("mechanism", [KERBEROS, "NTLM", "Negotiate"])


@pytest.fixture(autouse=True)
def private_state(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


class Realm:
    """One mechanism: its doors, and what the owner is permitted to show them."""

    def __init__(self, mechanism: str, request: pytest.FixtureRequest) -> None:
        self.mechanism = mechanism
        self._kdc = request.getfixturevalue("kdc") if mechanism == "Kerberos" else None

    def door(self, tls: ServerTls) -> Door:
        """Who is bound to another channel than this certificate's, or to none, does not pass."""
        return Door(self.mechanism, keytab=self._kdc and self._kdc.keytab("HTTP/localhost"), binding=tls.binding)

    @property
    def user(self) -> str:
        return self._kdc.principal("alice") if self._kdc else ALICE

    @property
    def owner(self) -> Token:
        if self._kdc:
            return Token.for_network(spnego.KerberosKeytab(str(self._kdc.keytab("alice")), self.user))
        return Token.for_network(spnego.Password(ALICE, USERS[ALICE]))

    @property
    def credentials(self) -> list[AuthCredentials]:
        scheme = AuthScheme.NTLM if self.mechanism == "NTLM" else AuthScheme.NEGOTIATE
        return [AuthCredentials(target, scheme, None, None) for target in AuthTarget]


@pytest.fixture
def realm(mechanism: str, request: pytest.FixtureRequest) -> Realm:
    return Realm(mechanism, request)


@contextlib.asynccontextmanager
async def man_in_the_middle(tls: ServerTls, target: Server, trust: ssl.SSLContext) -> AsyncIterator[str]:
    """Ends our TLS with his own certificate, speaks TLS to the target, and passes every byte on. Gives his base URL."""

    async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while piece := await source.read(65536):
                sink.write(piece)
                await sink.drain()
        sink.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up, down = await asyncio.open_connection("localhost", target.port, ssl=trust)
        await asyncio.gather(copy(reader, down), copy(up, writer))

    tasks: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.get_running_loop().create_task(relay(reader, writer)))

    server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=tls.context)
    try:
        yield f"https://localhost:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        await asyncio.gather(*tasks)


def proofs(requests: Iterable, header: str = "Authorization") -> list[str]:
    """The tokens that prove something (NTLM's first message does not)."""
    values = [seen.header(header) or "" for seen in requests]
    return [value for value in values if value and not value.partition(" ")[2].startswith("TlRMTVNTUAAB")]


# -- the origin ----------------------------------------------------------------------------------------------------------------------------


@EVERY_MECHANISM
async def test_t24_an_acceptor_that_insists_on_the_binding_takes_us(authority, realm, tmp_path):
    async with Origin(door=realm.door(authority.server), tls=authority.server) as origin:
        async with bits.BitsManager(store=tmp_path / "queue.db", ssl=authority.client()) as manager:
            for number in range(2):  # the second request is bound as well, asked or not
                url = origin.serve(f"/{number}", BODY)
                path = await manager.download(url, tmp_path / f"{number}", owner=realm.owner, credentials=realm.credentials)
                assert path.read_bytes() == BODY
        assert {seen.user for seen in origin.passed} == {realm.user}


@EVERY_MECHANISM
async def test_t24_the_acceptor_really_insists_a_token_without_binding_is_refused(authority, realm, tmp_path):
    """Without TLS there is nothing to bind to: the same door over http lets nobody in."""
    async with Origin(door=realm.door(authority.server)) as origin:
        with pytest.raises(bits.AuthFailed) as caught:
            await bits.download(
                origin.serve("/f", BODY), tmp_path / "f", owner=realm.owner, credentials=realm.credentials, auth_rules=NTLM_OVER_HTTP
            )
        assert caught.value.code == HTTP_401
        assert "intercepted" not in str(caught.value), "nothing was encrypted, so nothing was intercepted"
        assert len(proofs(origin.requests)) == 1
        assert origin.passed == []


@EVERY_MECHANISM
async def test_t24_the_same_token_over_another_certificate_is_refused_and_not_tried_without_binding(authority, realm, tmp_path):
    async with (
        Origin(door=realm.door(authority.server), tls=authority.server) as origin,
        man_in_the_middle(authority.issue(), origin, authority.client()) as his,
    ):
        origin.serve("/f", BODY)
        owner = realm.owner
        async with bits.BitsManager(store=tmp_path / "queue.db", ssl=authority.client()) as manager:
            job = await manager.create_job("intercepted", priority=JobPriority.FOREGROUND, owner=owner)
            await job.add_file(f"{his}/f", tmp_path / "f")
            for given in realm.credentials:
                await job.set_credentials(given.target, given.scheme, None, None)
            await job.resume()
            with pytest.raises(bits.AuthFailed) as caught:
                await job.wait()
            assert job.state is JobState.ERROR
            error = caught.value
            assert (error.code, error.transient, error.identity) == (HTTP_401, False, owner.name)
            assert "TLS may be intercepted" in str(error)
            assert len(proofs(origin.requests)) == 1
            assert origin.passed == []
            assert list(tmp_path.glob("*f*.bits-part")) == []

            await job.resume()  # whoever tries again shows nothing any more
            with pytest.raises(bits.AuthFailed):
                await job.wait()
            assert len(proofs(origin.requests)) == 1

            # the control: the very same identity and origin without the man in the middle
            path = await manager.download(origin.url("/f"), tmp_path / "straight", owner=owner, credentials=realm.credentials)
        assert path.read_bytes() == BODY


@EVERY_MECHANISM
async def test_t24_a_server_that_shows_a_new_certificate_gets_tokens_bound_to_it(authority, realm, tmp_path):
    """Certificates are renewed while we run; the binding is that of the connection the token goes over."""
    old, new = authority.issue(), authority.issue()
    owner = realm.owner
    with socket.create_server(("127.0.0.1", 0)) as place:
        async with bits.BitsManager(store=tmp_path / "queue.db", ssl=authority.client()) as manager:
            async with OriginAt(place, door=realm.door(old), tls=old) as origin:
                job = await manager.create_job("renewed", priority=JobPriority.FOREGROUND, owner=owner)
                for given in realm.credentials:
                    await job.set_credentials(given.target, given.scheme, None, None)
                await job.add_file(origin.serve("/f", BODY), tmp_path / "f1")
                await job.resume()
                await job.wait()
            async with OriginAt(place, door=realm.door(new), tls=new) as origin:
                await job.add_file(origin.serve("/f", BODY), tmp_path / "f2")
                await job.resume()
                await job.wait()
                await job.complete()
                assert {seen.user for seen in origin.passed} == {realm.user}
    assert (tmp_path / "f2").read_bytes() == BODY


class OriginAt(Origin):
    """An origin at a place that it shares with an earlier one: nobody else listens there in between."""

    def __init__(self, place: socket.socket, *, door: Door, tls: ServerTls) -> None:
        super().__init__(door=door, tls=tls)
        self._place = place

    async def __aenter__(self) -> "OriginAt":
        assert self.tls is not None
        self._listener = await asyncio.start_server(self._accept, sock=self._place.dup(), ssl=self.tls.context)
        self.port = self._place.getsockname()[1]
        return self


# -- an https proxy ------------------------------------------------------------------------------------------------------------------------


@EVERY_MECHANISM
@pytest.mark.parametrize("inner", [False, True], ids=["http-origin", "https-origin"])
async def test_t24_the_proxys_token_is_bound_to_the_outer_certificate_and_the_origins_to_the_inner(authority, realm, tmp_path, inner):
    outside, inside = authority.issue(), authority.issue()
    unbound = Door("NTLM") if realm.mechanism == "NTLM" else None
    origin_door = realm.door(inside) if inner else unbound
    async with (
        Origin(door=origin_door, tls=inside if inner else None) as origin,
        Proxy(door=realm.door(outside), tls=outside) as proxy,
    ):
        path = await bits.download(
            origin.serve("/f", BODY),
            tmp_path / "f",
            proxy=proxy.url,
            owner=realm.owner,
            credentials=realm.credentials,
            auth_rules=NTLM_OVER_HTTP,
            ssl=authority.client(),
        )
        assert path.read_bytes() == BODY
        assert {seen.user for seen in proxy.passed} == {realm.user}
        assert {seen.user for seen in origin.passed} == ({realm.user} if origin_door else {None})


@EVERY_MECHANISM
@pytest.mark.parametrize("swapped", ["proxy", "origin"])
async def test_t24_a_seat_that_expects_the_other_certificate_refuses(authority, realm, tmp_path, swapped):
    """What makes the test above mean something: with the bindings exchanged neither door opens."""
    outside, inside = authority.issue(), authority.issue()
    origin_door = realm.door(outside if swapped == "origin" else inside)
    proxy_door = realm.door(inside if swapped == "proxy" else outside)
    async with Origin(door=origin_door, tls=inside) as origin, Proxy(door=proxy_door, tls=outside) as proxy:
        with pytest.raises(bits.AuthFailed, match="intercepted") as caught:
            await bits.download(
                origin.serve("/f", BODY),
                tmp_path / "f",
                proxy=proxy.url,
                owner=realm.owner,
                credentials=realm.credentials,
                auth_rules=NTLM_OVER_HTTP,
                ssl=authority.client(),
            )
        assert caught.value.code == (HTTP_407 if swapped == "proxy" else HTTP_401)
        assert len(proofs(proxy.requests, "Proxy-Authorization")) == 1
        assert len(proofs(origin.requests)) == (0 if swapped == "proxy" else 1)


@EVERY_MECHANISM
async def test_t24_a_man_in_the_middle_of_the_way_to_the_proxy_gains_nothing(authority, realm, tmp_path):
    outside = authority.issue()
    async with (
        Origin() as origin,
        Proxy(door=realm.door(outside), tls=outside) as proxy,
        man_in_the_middle(authority.issue(), proxy, authority.client()) as his,
    ):
        with pytest.raises(bits.AuthFailed, match="TLS may be intercepted") as caught:
            await bits.download(
                origin.serve("/f", BODY),
                tmp_path / "f",
                proxy=his,
                owner=realm.owner,
                credentials=realm.credentials,
                auth_rules=NTLM_OVER_HTTP,
                ssl=authority.client(),
            )
        assert (caught.value.code, caught.value.http_status) == (HTTP_407, 407)
        assert len(proofs(proxy.requests, "Proxy-Authorization")) == 1
        assert origin.requests == []


async def test_t24_a_certificate_of_another_authority_gets_no_token_at_all(authority, tmp_path, tmp_path_factory):
    other = Authority(tmp_path_factory.mktemp("other"))
    async with Origin(door=Door("NTLM"), tls=other.server) as origin:
        url = origin.serve("/f", BODY)
        given = [AuthCredentials(AuthTarget.SERVER, AuthScheme.NTLM, ALICE, USERS[ALICE])]
        with pytest.raises(bits.NetworkError) as caught:
            await bits.download(url, tmp_path / "f", credentials=given, ssl=authority.client(), retry_for=0)
        assert caught.value.code == bits.ErrorCode.ERROR_WINHTTP_SECURE_FAILURE
        assert not caught.value.transient
        assert origin.requests == []
