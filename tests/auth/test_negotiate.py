"""Kerberos under Negotiate, with a real KDC, a real Apache and a real Squid."""

import asyncio
import base64
import http.client
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gssapi
import pytest
import spnego
from gssapi.raw import ChannelBindings

from bits_async.auth.policy import AuthRules, AuthScheme, Grant, Origin, Refusals, Seat, choose_offers
from bits_async.auth.schemes import AuthFlow, channel_binding
from bits_async.auth.tickets import Tickets, target_of
from bits_async.errors import AuthFailed, ErrorCode, NetworkError
from bits_async.identity.threads import TokenExecutor
from bits_async.identity.tokens import Token
from tests.auth.conftest import Threads, a_token
from tests.local_users import LocalUser
from tests.peers import Authority
from tests.realms import PASSWORDS, Apache, MitKdc, Squid, closed_port, write_krb5_conf
from tests.rules import NTLM_OVER_HTTP, PEERS

pytestmark = pytest.mark.realm

NEGOTIATE, NTLM = AuthScheme.NEGOTIATE, AuthScheme.NTLM


@pytest.fixture
async def tickets() -> Any:
    made = Tickets()
    yield made
    await made.aclose()


@pytest.fixture
def refusals() -> Refusals:
    return Refusals()


@pytest.fixture
def make_flow(kdc: MitKdc, security: Threads, tickets: Tickets, refusals: Refusals) -> Callable[..., AuthFlow]:
    def make(url: str, token: Token | None = None, *grants: tuple[AuthScheme, str | None, str | None], **more: Any) -> AuthFlow:
        seat = more.pop("seat", Seat.ORIGIN)
        origin = Origin.of(url)
        given = [Grant(seat.target, *grant, frozenset({origin})) for grant in grants or [(NEGOTIATE, None, None)]]
        values: dict[str, Any] = {
            "security": security,
            "rules": NTLM_OVER_HTTP,
            "refusals": refusals,
            "encrypted": origin.scheme == "https",
            "identity": "alice",
            "tickets": tickets,
        }
        return AuthFlow(seat, origin, choose_offers(seat, origin, given, token or a_token(), (values | more)["rules"]), **(values | more))

    return make


def own(kdc: MitKdc, name: str, kind: str = "keytab") -> Token:
    """A token that the caller built from a credential."""
    credential: spnego.Credential
    if kind == "keytab":
        credential = spnego.KerberosKeytab(str(kdc.keytab(name)), kdc.principal(name))
    elif kind == "ccache":
        credential = spnego.KerberosCCache(kdc.ccache(name))
    else:
        credential = spnego.Password(kdc.principal(name), PASSWORDS[name])
    return a_token(credential, principal=kdc.principal(name))


class Client:
    """One connection, one request after the other, as a lane makes them."""

    def __init__(self, url: str, *flows: AuthFlow, authority: Authority | None = None) -> None:
        origin = Origin.of(url)
        if authority is None:
            self.http = http.client.HTTPConnection(origin.host, origin.port, timeout=30)
        else:
            self.http = http.client.HTTPSConnection(origin.host, origin.port, timeout=30, context=authority.client())
        self.flows = {flow._seat: flow for flow in flows}
        self.statuses: list[int] = []

    async def get(self, target: str) -> bytes:
        headers = {"Range": "bytes=10-19"}
        for seat, flow in self.flows.items():
            if header := await flow.unasked(method="GET", target=target):
                headers[seat.answer_header] = header
        while True:
            self.http.request("GET", target, headers=headers)
            answer = self.http.getresponse()
            body = answer.read()
            self.statuses.append(answer.status)
            asking = next((seat for seat in self.flows if seat.status == answer.status), None)
            for seat, flow in self.flows.items():
                lines = answer.headers.get_all(seat.challenge_header, [])
                if seat is asking:
                    headers[seat.answer_header] = await flow.answer(lines, method="GET", target=target)
                else:
                    await flow.conclude(answer.status, lines, answer.headers.get_all(seat.info_header, []))
            if asking is None:
                return body


@contextmanager
def client(url: str, *flows: AuthFlow, authority: Authority | None = None) -> Iterator[Client]:
    made = Client(url, *flows, authority=authority)
    yield made
    made.http.close()


@pytest.mark.parametrize("kind", ["keytab", "ccache", "password"])
async def test_apache_knows_us_by_our_ticket_on_every_request(
    kdc: MitKdc, apache: Apache, make_flow: Callable[..., AuthFlow], kind: str, security: Threads, spnego_threads: list[str]
) -> None:
    flow = make_flow(apache.url(), own(kdc, "alice", kind))
    with client(apache.url(), flow) as peer:
        for _ in range(3):
            assert await peer.get("/neg/big") == apache.data[10:20]
    assert peer.statuses == [401, 206, 206, 206]
    assert flow.authenticated
    assert not flow.connection_bound
    assert flow.user == kdc.principal("alice")
    assert len(apache.hits(expect=3, user=kdc.principal("alice"), status=206)) == 3
    assert security.calls.count("_begin_kerberos") == 3
    assert security.calls.count("_step_kerberos") == 3  # each time Apache proves itself
    assert all(name.startswith("token") for name in spnego_threads)


async def test_an_explicit_name_with_a_realm_means_kerberos(kdc: MitKdc, apache: Apache, make_flow: Callable[..., AuthFlow]) -> None:
    flow = make_flow(apache.url(), None, (NEGOTIATE, kdc.principal("helper"), PASSWORDS["helper"]))
    with client(apache.url(), flow) as peer:
        assert await peer.get("/neg/big") == apache.data[10:20]
    apache.hits(expect=1, user=kdc.principal("helper"))


async def test_squid_sends_no_proof_and_that_is_fine(
    kdc: MitKdc, apache: Apache, squid_negotiate: Squid, make_flow: Callable[..., AuthFlow]
) -> None:
    proxy = make_flow(squid_negotiate.url, own(kdc, "helper"), seat=Seat.PROXY)
    origin = make_flow(apache.url(), own(kdc, "alice"))
    with client(squid_negotiate.url, proxy, origin) as peer:
        for _ in range(2):
            assert await peer.get(apache.url("/neg/big")) == apache.data[10:20]
    assert peer.statuses == [407, 401, 206, 206]
    assert proxy.authenticated
    assert origin.authenticated
    squid_negotiate.hits(expect=2, user=kdc.principal("helper"), status=206)
    apache.hits(expect=2, user=kdc.principal("alice"), status=206)


async def test_a_tunnel_through_squid(kdc: MitKdc, apache: Apache, squid_negotiate: Squid, make_flow: Callable[..., AuthFlow]) -> None:
    flow = make_flow(squid_negotiate.url, own(kdc, "alice"), seat=Seat.PROXY)
    target = f"localhost:{apache.tls_port}"
    header = await flow.answer(["Negotiate"], method="CONNECT", target=target)
    with socket.create_connection(("localhost", squid_negotiate.port), 10) as link:
        link.sendall(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\nProxy-Authorization: {header}\r\n\r\n".encode())
        assert b" 200 " in link.recv(4096)
    await flow.conclude(200, [], [])
    squid_negotiate.hits(expect=1, user=kdc.principal("alice"), method="CONNECT")


async def test_ntlm_at_apache_under_both_words(apache: Apache, make_flow: Callable[..., AuthFlow]) -> None:
    for scheme in (NTLM, NEGOTIATE):
        flow = make_flow(apache.url(), None, (scheme, r"BITS\alice", PASSWORDS["alice"]))
        with client(apache.url(), flow) as peer:
            for _ in range(2):
                assert await peer.get("/ntlm/big") == apache.data[10:20]
        assert peer.statuses == [401, 401, 206, 206]
        assert flow.connection_bound
    assert {hit.user for hit in apache.hits(expect=4, status=206)} == {r"BITS\alice"}


async def test_digest_and_basic_at_apache(apache: Apache, authority: Authority, make_flow: Callable[..., AuthFlow]) -> None:
    for scheme, path in ((AuthScheme.DIGEST, "/digest/big"), (AuthScheme.BASIC, "/basic/big")):
        url = apache.url(tls=True)
        flow = make_flow(url, None, (scheme, "alice", PASSWORDS["alice"]))
        with client(url, flow, authority=authority) as peer:
            for _ in range(3):
                assert await peer.get(path) == apache.data[10:20]
        assert peer.statuses == [401, 206, 206, 206]
    assert len(apache.hits(expect=6, user="alice", status=206)) == 6


async def test_digest_at_squid(apache: Apache, squid_digest: Squid, make_flow: Callable[..., AuthFlow]) -> None:
    flow = make_flow(squid_digest.url, None, (AuthScheme.DIGEST, "helper", PASSWORDS["helper"]), seat=Seat.PROXY)
    with client(squid_digest.url, flow) as peer:
        for _ in range(3):
            assert await peer.get(apache.url()) == apache.data[10:20]
    assert peer.statuses == [407, 206, 206, 206]
    squid_digest.hits(expect=3, user="helper", status=206)


async def test_t26_a_wrong_password_reaches_the_realm_once(
    kdc: MitKdc, apache: Apache, make_flow: Callable[..., AuthFlow], security: Threads
) -> None:
    for _ in range(2):
        flow = make_flow(apache.url(), None, (NEGOTIATE, kdc.principal("alice"), "wrong"), (AuthScheme.BASIC, "alice", "wrong"))
        with pytest.raises(AuthFailed) as caught:
            await flow.answer(["Negotiate", "Basic realm=x"], method="GET", target="/")
        assert caught.value.code == ErrorCode.SEC_E_LOGON_DENIED
        assert caught.value.identity == "alice"
        assert "NEGOTIATE as alice@BITS.TEST" in str(caught.value)
    assert "refused the credentials" in str(caught.value)


async def test_t26_a_ticket_that_is_not_taken_is_not_shown_again(
    kdc: MitKdc, apache: Apache, make_flow: Callable[..., AuthFlow], refusals: Refusals
) -> None:
    token = own(kdc, "alice", "ccache")
    flow = make_flow(apache.url(), token)
    await flow.answer(["Negotiate"], method="GET", target="/")
    with pytest.raises(AuthFailed, match="does not accept the ticket"):
        await flow.answer(["Negotiate"], method="GET", target="/")
    again = make_flow(apache.url(), token)
    with pytest.raises(AuthFailed, match="refused before"):
        await again.answer(["Negotiate"], method="GET", target="/")
    assert token.network is not None
    os.utime(token.network.ccache.removeprefix("FILE:"), (0, 0))  # type: ignore[union-attr]  # kinit makes a new revision
    assert await make_flow(apache.url(), token).answer(["Negotiate"], method="GET", target="/")


async def test_a_ticket_sent_unasked_that_is_not_taken_is_tried_once_more(
    kdc: MitKdc, apache: Apache, make_flow: Callable[..., AuthFlow]
) -> None:
    flow = make_flow(apache.url(), own(kdc, "alice"))
    await flow.answer(["Negotiate"], method="GET", target="/")
    await flow.conclude(200, [], [])
    first = await flow.unasked(method="GET", target="/")
    second = await flow.answer(["Negotiate"], method="GET", target="/")
    assert first != second
    with pytest.raises(AuthFailed):
        await flow.answer(["Negotiate"], method="GET", target="/")


def acceptor(kdc: MitKdc, binding: bytes | None = None) -> Any:
    make: Any = ChannelBindings
    credentials = gssapi.Credentials(usage="accept", store={"keytab": str(kdc.keytab("HTTP/localhost"))})
    bindings = make(application_data=binding) if binding else None
    return gssapi.SecurityContext(creds=credentials, usage="accept", channel_bindings=bindings)


def token_of(header: str) -> bytes:
    return base64.b64decode(header.removeprefix("Negotiate "))


@pytest.fixture(autouse=True)
def no_replay_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KRB5RCACHENAME", "none:")


async def test_a_wrong_proof_of_the_server_fails_the_request(kdc: MitKdc, make_flow: Callable[..., AuthFlow], refusals: Refusals) -> None:
    for spoil in (
        lambda proof: proof[:-1] + bytes([proof[-1] ^ 1]),
        lambda proof: b"",
        lambda proof: b"\xa1\x07\x30\x05\xa0\x03\x0a\x01\x02",
    ):
        flow = make_flow("http://localhost:1", own(kdc, "alice"))
        proof = acceptor(kdc).step(token_of(await flow.answer(["Negotiate"], method="GET", target="/")))
        lines = ["Negotiate " + (base64.b64encode(spoil(proof)).decode() or "@@")]
        if not spoil(proof):
            lines = ["Negotiate AAAA"]
        with pytest.raises(AuthFailed, match="could not prove that it is HTTP/localhost") as caught:
            await flow.conclude(200, lines, [])
        assert caught.value.code == ErrorCode.SEC_E_WRONG_PRINCIPAL
        assert not caught.value.transient
        assert not flow.authenticated
        assert await flow.unasked(method="GET", target="/") is None
    assert not refusals._refused


async def test_a_right_proof_counts_also_in_the_clothes_of_spnego(kdc: MitKdc, make_flow: Callable[..., AuthFlow]) -> None:
    for dress in (lambda proof: proof, spnego_response):
        flow = make_flow("http://localhost:1", own(kdc, "alice"))
        proof = acceptor(kdc).step(token_of(await flow.answer(["Negotiate"], method="GET", target="/")))
        await flow.conclude(206, ["Negotiate " + base64.b64encode(dress(proof)).decode()], [])
        assert flow.authenticated


def spnego_response(proof: bytes) -> bytes:
    from spnego._spnego import NegState, NegTokenResp

    return NegTokenResp(neg_state=NegState.accept_complete, response_token=proof).pack()


async def test_t24_the_binding_of_this_connections_certificate_is_in_the_first_token(
    kdc: MitKdc, authority: Authority, make_flow: Callable[..., AuthFlow]
) -> None:
    binding = b"tls-server-end-point:" + b"\1" * 32
    for shown, bound in ((binding, True), (None, False)):
        flow = make_flow("https://localhost:1", own(kdc, "alice"), binding=shown)
        context = acceptor(kdc, binding)
        context.step(token_of(await flow.answer(["Negotiate"], method="GET", target="/")))
        assert context.complete
        assert bool(int(context.actual_flags) & 0x800) == bound
    flow = make_flow("https://localhost:1", own(kdc, "alice"), binding=b"tls-server-end-point:" + b"\2" * 32)
    token = token_of(await flow.answer(["Negotiate"], method="GET", target="/"))
    with pytest.raises((gssapi.exceptions.GSSError, AttributeError), match=r"bindings|flags"):  # the binding is what is wrong
        context = acceptor(kdc, binding)
        context.step(token)
        assert not int(context.actual_flags)
    with pytest.raises(AuthFailed) as caught:
        await flow.answer(["Negotiate"], method="GET", target="/")
    assert "intercepted" in caught.value.advice


async def test_t21_a_ticket_for_another_name_does_not_leave(
    kdc: MitKdc, make_flow: Callable[..., AuthFlow], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain = kdc.krb5_conf.read_text()
    canonical = plain.replace("dns_canonicalize_hostname = false", "dns_canonicalize_hostname = true").replace(
        "rdns = false", "rdns = true"
    )
    assert canonical != plain
    (tmp_path / "krb5.conf").write_text(canonical)
    monkeypatch.setenv("KRB5_CONFIG", str(tmp_path / "krb5.conf"))

    fine = make_flow("http://LOCALHOST:1/", own(kdc, "alice"))
    assert target_of(token_of(await fine.answer(["Negotiate"], method="GET", target="/"))) == ("HTTP", "localhost")

    # The resolver of this machine says that 127.0.0.1 is localhost: the library asks for a ticket for that.
    flow = make_flow("http://127.0.0.1:1/", own(kdc, "alice"))
    with pytest.raises(AuthFailed) as caught:
        await flow.answer(["Negotiate"], method="GET", target="/")
    assert caught.value.code == ErrorCode.SEC_E_WRONG_PRINCIPAL
    assert "the ticket is for HTTP/localhost, but the URL names 127.0.0.1" in str(caught.value)
    assert "canonical" in caught.value.advice


async def test_a_host_without_a_service_is_told_as_such_and_another_scheme_may_follow(
    kdc: MitKdc, make_flow: Callable[..., AuthFlow]
) -> None:
    url = "http://unknown.bits.test"
    with pytest.raises(AuthFailed, match="no such service") as caught:
        await make_flow(url, own(kdc, "alice")).answer(["Negotiate"], method="GET", target="/")
    assert caught.value.code == ErrorCode.SEC_E_NO_CREDENTIALS
    both = make_flow(url, None, (NEGOTIATE, kdc.principal("alice"), PASSWORDS["alice"]), (NTLM, r"BITS\alice", "x"))
    assert (await both.answer(["Negotiate", "NTLM"], method="GET", target="/")).startswith("NTLM ")


async def test_implicit_credentials_are_never_talked_down_to_ntlm(kdc: MitKdc, make_flow: Callable[..., AuthFlow]) -> None:
    url = "http://unknown.bits.test"
    with pytest.raises(AuthFailed, match="no such service"):
        await make_flow(url, own(kdc, "alice", "password")).answer(["Negotiate", "NTLM"], method="GET", target="/")
    asked_for = make_flow(url, own(kdc, "alice", "password"), rules=AuthRules(ntlm_in_negotiate=True, ntlm_over_http=PEERS))
    header = await asked_for.answer(["Negotiate", "NTLM"], method="GET", target="/")
    assert token_of(header).startswith(b"NTLMSSP\0")


async def test_a_kdc_that_is_down_is_a_transient_error(
    kdc: MitKdc, make_flow: Callable[..., AuthFlow], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    token = own(kdc, "alice")
    with closed_port() as port, pytest.raises(NetworkError) as caught:
        monkeypatch.setenv("KRB5_CONFIG", str(write_krb5_conf(tmp_path / "krb5.conf", {kdc.realm: port})))
        await make_flow("http://localhost:1", token).answer(["Negotiate"], method="GET", target="/")
    assert caught.value.transient
    assert "no KDC of the realm answers" in str(caught.value)


async def test_t14_no_token_and_no_password_in_the_log(
    kdc: MitKdc, apache: Apache, make_flow: Callable[..., AuthFlow], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(0)
    flow = make_flow(apache.url(), own(kdc, "alice", "password"))
    header = await flow.answer(["Negotiate"], method="GET", target="/")
    assert header.partition(" ")[2] not in caplog.text
    assert PASSWORDS["alice"] not in caplog.text


async def test_the_process_itself_shows_its_own_tickets_to_named_hosts_only(
    kdc: MitKdc, make_flow: Callable[..., AuthFlow], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KRB5CCNAME", kdc.ccache("bob"))
    header = await make_flow("http://origin.bits.test").answer(["Negotiate"], method="GET", target="/")
    assert target_of(token_of(header)) == ("HTTP", "origin.bits.test")
    with pytest.raises(AuthFailed, match="not sent to loopback"):
        await make_flow("http://localhost").answer(["Negotiate"], method="GET", target="/")


async def test_many_identities_at_once_stay_apart(kdc: MitKdc, apache: Apache, make_flow: Callable[..., AuthFlow]) -> None:
    async def download(name: str) -> None:
        flow = make_flow(apache.url(), own(kdc, name))
        with client(apache.url(), flow) as peer:
            for _ in range(3):
                await peer.get("/neg/big")

    await asyncio.gather(*(download(name) for name in ("alice", "helper", "bob")))
    for name in ("alice", "helper", "bob"):
        assert len(apache.hits(expect=3, user=kdc.principal(name), status=206)) == 3
    assert threading.active_count() < 50


@pytest.mark.privileged
async def test_t04_a_users_threads_open_the_users_cache_and_nobody_elses(
    kdc: MitKdc, apache: Apache, users: Mapping[str, LocalUser], make_flow: Callable[..., AuthFlow], world_dir: Path
) -> None:
    alice = users["bitsalice"]
    hers = kdc.ccache("alice", directory=world_dir, owner=alice.uid)
    token = await Token.for_user(alice.name, network=spnego.KerberosCCache(hers, kdc.principal("alice")))
    files = TokenExecutor(token, threads=1, name="security")

    async def security(function: Callable[..., Any], *args: Any) -> Any:
        return await files.run_security(function, *args, deadline=30)

    try:
        flow = make_flow(apache.url(), token, security=security)
        with client(apache.url(), flow) as peer:
            assert await peer.get("/neg/big") == apache.data[10:20]
        apache.hits(expect=1, user=kdc.principal("alice"), status=206)

        shutil.chown(hers.removeprefix("FILE:"), 0)
        with pytest.raises(AuthFailed) as caught:
            await make_flow(apache.url(), token, security=security).answer(["Negotiate"], method="GET", target="/")
        assert caught.value.code == ErrorCode.SEC_E_NO_CREDENTIALS
        assert "may not be read by this identity" in str(caught.value)
    finally:
        await files.aclose()
        token.close()


def test_the_certificate_of_the_lab_has_a_binding(apache: Apache, authority: Authority) -> None:
    import ssl

    certificate = ssl.get_server_certificate(("localhost", apache.tls_port))
    assert channel_binding(ssl.PEM_cert_to_DER_cert(certificate)).startswith(b"tls-server-end-point:")
