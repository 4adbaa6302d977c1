"""Challenge in, header out: Basic, Digest and NTLM, at both seats, with every way to end."""

import base64
import hashlib
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
import spnego
from spnego.channel_bindings import GssChannelBindings

from bits_async.auth import schemes
from bits_async.auth.challenge import parse_challenges
from bits_async.auth.policy import AuthRules, AuthScheme, AuthTarget, Grant, Offer, Offers, Origin, Refusals, Seat, choose_offers
from bits_async.auth.schemes import MAX_LEGS, AuthFlow, channel_binding
from bits_async.auth.tickets import Tickets, expired
from bits_async.errors import HTTP_ERROR, AuthFailed, ErrorCode, ErrorContext, ImpersonationFailed, NetworkError, TokenRequired, show_text
from tests.auth.conftest import Threads, a_token
from tests.peers import Authority

BASIC, DIGEST, NTLM, NEGOTIATE = AuthScheme.BASIC, AuthScheme.DIGEST, AuthScheme.NTLM, AuthScheme.NEGOTIATE
FILES = Origin.of("https://files.corp.example")
SECRET = "hunter2-secret"
USERS = f"CORP:alice:{SECRET}\n:carol@corp.example:{SECRET}\n"

MakeFlow = Callable[..., AuthFlow]


@pytest.fixture
def refusals() -> Refusals:
    return Refusals()


@pytest.fixture
def make_flow(security: Threads, refusals: Refusals) -> MakeFlow:
    def make(*offers: Offer, seat: Seat = Seat.ORIGIN, origin: Origin = FILES, **more: Any) -> AuthFlow:
        values: dict[str, Any] = {
            "security": security,
            "rules": AuthRules(),
            "refusals": refusals,
            "encrypted": True,
            "identity": "alice",
            "tickets": Tickets(refusals),
        }
        return AuthFlow(seat, origin, more.pop("offers", offers), **(values | more))

    return make


def offer(scheme: AuthScheme, user: str = "alice", password: str = SECRET, fingerprint: str = "f") -> Offer:
    return Offer(scheme, user_name=user, password=password, fingerprint=fingerprint)


async def answer(flow: AuthFlow, *lines: str, method: str = "GET", target: str = "/f") -> str:
    return await flow.answer(lines, method=method, target=target)


async def refused(flow: AuthFlow, *lines: str) -> AuthFailed:
    with pytest.raises(AuthFailed) as caught:
        await answer(flow, *lines)
    error = caught.value
    assert not error.transient
    assert error.identity == "alice"
    assert SECRET not in str(error)
    return error


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


# -- Basic


async def test_basic_sends_user_and_password_in_utf8(make_flow: MakeFlow) -> None:
    flow = make_flow(offer(BASIC, "jäsøn", "päss:wort"))
    assert await answer(flow, 'Basic realm="x"') == "Basic " + b64("jäsøn:päss:wort".encode())
    await flow.conclude(206, [], [])
    assert flow.authenticated
    assert not flow.connection_bound
    assert flow.user == "jäsøn"
    assert await flow.unasked(method="GET", target="/g") == "Basic " + b64("jäsøn:päss:wort".encode())


async def test_basic_never_goes_over_an_open_connection_unless_asked(make_flow: MakeFlow) -> None:
    error = await refused(make_flow(offer(BASIC), encrypted=False, seat=Seat.PROXY), 'Basic realm="x"')
    assert "not over a connection without TLS" in str(error)
    assert error.code == HTTP_ERROR | 407
    assert error.http_status == 407
    assert error.context is ErrorContext.GENERAL_TRANSPORT
    flow = make_flow(offer(BASIC), encrypted=False, rules=AuthRules(basic_over_http=frozenset(AuthTarget)))
    assert (await answer(flow, "Basic realm=x")).startswith("Basic ")


async def test_basic_refused_once_is_refused_for_all_jobs(make_flow: MakeFlow, refusals: Refusals) -> None:
    flow = make_flow(offer(BASIC))
    await answer(flow, 'Basic realm="x"')
    error = await refused(flow, 'Basic realm="x"')
    assert error.code == HTTP_ERROR | 401
    assert error.context is ErrorContext.REMOTE_FILE
    assert "refused before" in str(await refused(make_flow(offer(BASIC)), 'Basic realm="x"'))
    assert await answer(make_flow(offer(BASIC)), 'Basic realm="another"')
    assert await answer(make_flow(offer(BASIC), origin=Origin.of("https://other.example")), 'Basic realm="x"')
    assert await answer(make_flow(offer(BASIC, password="right", fingerprint="g")), 'Basic realm="x"')
    refusals.forget("f")
    assert await answer(make_flow(offer(BASIC)), 'Basic realm="x"')


async def test_basic_sent_unasked_is_answered_for_another_realm_and_refused_for_the_same(make_flow: MakeFlow) -> None:
    flow = make_flow(offer(BASIC))
    await answer(flow, 'Basic realm="x"')
    await flow.conclude(200, [], [])
    assert await flow.unasked(method="GET", target="/other")
    assert await answer(flow, 'Basic realm="y"')
    await flow.conclude(200, [], [])
    assert await flow.unasked(method="GET", target="/other")
    assert "no longer right" in str(await refused(flow, 'Basic realm="y"'))


# -- what may be answered


async def test_tickets_that_ended_leave_another_login_that_is_permitted_and_are_the_error_where_there_is_none(
    make_flow: MakeFlow, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(*_: object) -> NoReturn:
        raise expired("alice@REALM")

    monkeypatch.setattr(schemes, "_begin_kerberos", ended)
    tickets = Offer(NEGOTIATE, spnego.KerberosCCache("FILE:/nowhere"), fingerprint="t", principal="alice@REALM")
    header = await answer(make_flow(tickets, offer(BASIC)), "Negotiate", 'Basic realm="x"')
    assert header.startswith("Basic ")
    with pytest.raises(TokenRequired, match="the Kerberos tickets of alice@REALM have expired"):
        await answer(make_flow(tickets), "Negotiate")


async def test_the_strongest_offer_that_is_asked_for_wins(make_flow: MakeFlow) -> None:
    offers = [offer(NTLM), offer(DIGEST), offer(BASIC)]
    lines = ['Basic realm="x", Digest realm="x", nonce="n", qop="auth"', "NTLM"]
    assert (await answer(make_flow(*offers), *lines)).startswith("NTLM ")
    assert (await answer(make_flow(*offers), *lines[:1])).startswith("Digest ")
    assert (await answer(make_flow(*offers), 'Basic realm="x"')).startswith("Basic ")


async def test_the_error_says_what_was_asked_for_what_was_permitted_and_as_whom(make_flow: MakeFlow) -> None:
    error = await refused(make_flow(offer(NTLM, r"CORP\alice"), seat=Seat.PROXY, origin=Origin.of("http://p:3128")), 'Basic realm="x"')
    assert "the proxy http://p:3128 asks for BASIC (realm x); permitted: NTLM as CORP\\alice" in str(error)
    assert "set credentials for the proxy" in error.advice
    nothing = await refused(make_flow(), "Negotiate", "NTLM")
    assert "asks for NEGOTIATE, NTLM; permitted: nothing; no credentials were given for it" in str(nothing)
    assert "set credentials for the server" in nothing.advice


async def test_the_error_says_why_a_grant_does_not_count(make_flow: MakeFlow) -> None:
    there = Origin.of("http://127.0.0.1:8080")
    grants = [Grant(AuthTarget.SERVER, NEGOTIATE, None, None, frozenset({there}))]
    offers = choose_offers(Seat.ORIGIN, there, grants, a_token())
    assert "not sent to loopback" in str(await refused(make_flow(offers=offers, origin=there), "Negotiate"))


@pytest.mark.parametrize("lines", [[], [""], ["Bearer realm=x"], ['Digest realm="x", nonce="n"'], ["@"]])
async def test_a_challenge_that_nothing_fits_is_not_answered(make_flow: MakeFlow, lines: Sequence[str]) -> None:
    await refused(make_flow(offer(DIGEST), offer(BASIC)), *lines)


async def test_a_peers_text_reaches_the_message_without_escape_codes(make_flow: MakeFlow) -> None:
    error = await refused(make_flow(), 'Basic realm="a\x85\u202eb"')
    assert "a\ufffd\ufffdb" in str(error)
    assert len(str(await refused(make_flow(), *[f"s{number} realm=x" for number in range(500)]))) < 1000


async def test_t26_a_peer_that_asks_for_ever_is_left(make_flow: MakeFlow) -> None:
    flow = make_flow(offer(DIGEST))
    for number in range(MAX_LEGS):
        assert await answer(flow, f'Digest realm="x", nonce="n{number}", qop="auth", stale=true')
    assert f"more than {MAX_LEGS} answers" in str(await refused(flow, 'Digest realm="x", nonce="z", qop="auth", stale=true'))


async def test_legs_are_counted_per_request(make_flow: MakeFlow) -> None:
    flow = make_flow(offer(DIGEST))
    for number in range(3 * MAX_LEGS):
        assert await answer(flow, f'Digest realm="x", nonce="n{number}", qop="auth", stale=true')
        await flow.conclude(200, [], [])


async def test_nothing_goes_unasked_before_a_login(make_flow: MakeFlow) -> None:
    flow = make_flow(offer(BASIC))
    assert await flow.unasked(method="GET", target="/") is None
    await flow.conclude(200, [], [])
    assert not flow.authenticated


async def test_the_other_seats_status_is_no_verdict(make_flow: MakeFlow) -> None:
    origin, proxy = make_flow(offer(BASIC)), make_flow(offer(BASIC), seat=Seat.PROXY)
    for flow in (origin, proxy):
        await answer(flow, "Basic realm=x")
    await origin.conclude(407, [], [])
    assert not origin.authenticated  # the proxy stopped it: the origin never saw it
    await proxy.conclude(401, [], [])
    assert proxy.authenticated  # the origin asks, so the proxy was content
    await origin.conclude(401, [], [])
    assert not origin.authenticated


async def test_repr_shows_no_secret(make_flow: MakeFlow) -> None:
    flow = make_flow(offer(BASIC))
    await answer(flow, "Basic realm=x")
    assert SECRET not in repr(flow)
    assert repr(flow) == "<AuthFlow ORIGIN https://files.corp.example as alice>"
    assert SECRET not in repr(offer(BASIC))


@pytest.mark.parametrize("scheme", [BASIC, DIGEST, NTLM])
async def test_a_password_that_is_no_text_does_not_reach_an_exception(make_flow: MakeFlow, scheme: AuthScheme) -> None:
    lines = ["NTLM", 'Digest realm="x", nonce="n", qop="auth"', "Basic realm=x"]
    header = await answer(make_flow(offer(scheme, "\ud800", "\udfff-secret")), *lines)
    assert header.isascii()


# -- Digest


def fields(header: str) -> dict[str, str]:
    [challenge] = parse_challenges([header])
    assert challenge.scheme == "digest"
    return dict(challenge.params)


RFC_7616 = 'realm="http-auth@example.org", qop="auth, auth-int", {}nonce="7ypf/xlj9XXwfDPEoM4URrv/xwf94BcCAzFZH4GiTo0v", opaque="FQhe/qaU925kfnzjCev0ciny7QMkPqMAFRtzCUYo5tdS"'  # noqa: E501


def fixed_cnonce(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setattr("bits_async.auth.schemes.new_cnonce", lambda: value)


@pytest.mark.parametrize(
    ("algorithm", "response"),
    [
        ("algorithm=MD5, ", "8ca523f5e9506fed4657c9700eebdbec"),
        ("", "8ca523f5e9506fed4657c9700eebdbec"),
        ("algorithm=SHA-256, ", "753927fa0e85d155564e2e272a28d1802ca10daf4496794697cf8db5856cb6c1"),
    ],
)
async def test_digest_answers_as_rfc_7616_does(make_flow: MakeFlow, monkeypatch: pytest.MonkeyPatch, algorithm: str, response: str) -> None:
    fixed_cnonce(monkeypatch, "f2/wE4q74E6zIJEtWaHKaf5wv/H5QzzpXusqGemxURZJ")
    flow = make_flow(offer(DIGEST, "Mufasa", "Circle of Life"))
    header = await answer(flow, "Digest " + RFC_7616.format(algorithm), target="/dir/index.html")
    given = fields(header)
    assert given["response"] == response
    assert given["username"] == "Mufasa"
    assert given["uri"] == "/dir/index.html"
    assert (given["qop"], given["nc"]) == ("auth", "00000001")
    assert given["opaque"] == "FQhe/qaU925kfnzjCev0ciny7QMkPqMAFRtzCUYo5tdS"
    assert given.get("algorithm", "") == algorithm[10:-2]


async def test_digest_prefers_the_stronger_hash(make_flow: MakeFlow) -> None:
    lines = ["Digest " + RFC_7616.format("algorithm=MD5, "), "Digest " + RFC_7616.format("algorithm=SHA-256, ")]
    assert fields(await answer(make_flow(offer(DIGEST)), *lines))["algorithm"] == "SHA-256"
    unknown = 'Digest realm="x", nonce="n", qop="auth", algorithm=SHA-999'
    assert fields(await answer(make_flow(offer(DIGEST)), unknown, lines[0]))["algorithm"] == "MD5"


@pytest.mark.parametrize(
    "challenge",
    [
        'realm="x", nonce="n", qop="auth-int"',
        'realm="x", nonce="n"',
        'realm="x", qop="auth"',
        'realm="x", nonce="n", qop="auth", algorithm=CRC32',
        'realm="x", nonce="n\udce9", qop="auth"',
        'realm="x\x85", nonce="n", qop="auth"',
    ],
)
async def test_a_digest_challenge_that_is_too_weak_or_strange_is_not_answered(make_flow: MakeFlow, challenge: str) -> None:
    assert "Digest" in str(await refused(make_flow(offer(DIGEST)), f"Digest {challenge}"))
    assert (await answer(make_flow(offer(DIGEST), offer(BASIC)), f"Digest {challenge}", "Basic realm=x")).startswith("Basic ")


async def test_a_users_name_goes_hashed_or_in_utf8_as_the_server_likes(make_flow: MakeFlow, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed_cnonce(monkeypatch, "NTg6RKcb9boFIAS3KrFK9BGeh+niz/sm")
    challenge = 'Digest realm="api@example.org", qop="auth", algorithm=SHA-256, nonce="5TsQWLVdgBdmrQ0XsxbDODV", charset=UTF-8'
    who = offer(DIGEST, "Jäsøn Doe", "Secret, or not?")
    hashed = fields(await answer(make_flow(who), challenge + ", userhash=true"))
    assert hashed["username"] == hashlib.sha256("Jäsøn Doe:api@example.org".encode()).hexdigest()
    assert hashed["userhash"] == "true"
    plain = await answer(make_flow(who), challenge)
    assert "username*=UTF-8''J%C3%A4s%C3%B8n%20Doe" in plain
    assert plain.isascii()
    assert fields(plain)["response"] == hashed["response"]


def digest_server(header: str, method: str, password: str, *, cnonce: str | None = None) -> bool:
    """Whether a server of its own making would take the header. `cnonce`: that of the first request (for -sess)."""
    given = fields(header)
    name = given.get("algorithm", "MD5").upper()

    def h(text: str) -> str:
        return hashlib.new("sha256" if "SHA-256" in name else "md5", text.encode()).hexdigest()

    secret = h(f"{given['username']}:{given['realm']}:{password}")
    if name.endswith("-SESS"):
        secret = h(f"{secret}:{given['nonce']}:{cnonce or given['cnonce']}")
    request = h(f"{method}:{given['uri']}")
    return given["response"] == h(f"{secret}:{given['nonce']}:{given['nc']}:{given['cnonce']}:{given['qop']}:{request}")


@pytest.mark.parametrize("algorithm", ["MD5", "MD5-sess", "SHA-256", "sha-256-SESS"])
async def test_the_count_goes_up_with_each_request_of_a_nonce(make_flow: MakeFlow, algorithm: str) -> None:
    flow = make_flow(offer(DIGEST))
    header = await answer(flow, f'Digest realm="x, y", nonce="n", qop="auth", algorithm={algorithm}')
    assert digest_server(header, "GET", SECRET)
    first = fields(header)
    for count in range(2, 5):
        await flow.conclude(206, [], [])
        following = await flow.unasked(method="GET", target=f"/f?{count}")
        assert following is not None
        assert digest_server(following, "GET", SECRET, cnonce=first["cnonce"])
        assert fields(following)["nc"] == f"{count:08x}"
        assert fields(following)["nonce"] == "n"


async def test_a_stale_nonce_is_replaced_and_refuses_nobody(make_flow: MakeFlow, refusals: Refusals) -> None:
    flow = make_flow(offer(DIGEST))
    await answer(flow, 'Digest realm="x", nonce="n1", qop="auth"')
    await flow.conclude(200, [], [])
    await flow.unasked(method="GET", target="/f")
    header = await answer(flow, 'Digest realm="x", nonce="n2", qop="auth", stale=TRUE')
    assert (fields(header)["nonce"], fields(header)["nc"]) == ("n2", "00000001")
    again = await answer(flow, 'Digest realm="x", nonce="n3", qop="auth", stale=true')
    assert fields(again)["nonce"] == "n3"
    assert refusals.revision("f", f"{FILES} x", Seat.ORIGIN) is None


@pytest.mark.parametrize(
    "second",
    [
        'Digest realm="x", nonce="n2", qop="auth"',
        'Digest realm="x", nonce="n2", qop="auth", stale=false',
        'Digest realm="x", nonce="n1", qop="auth", stale=true',
        'Digest realm="y", nonce="n2", qop="auth", stale=true',
        "Basic realm=x",
    ],
)
async def test_a_digest_that_is_not_stale_was_refused(make_flow: MakeFlow, refusals: Refusals, second: str) -> None:
    flow = make_flow(offer(DIGEST))
    await answer(flow, 'Digest realm="x", nonce="n1", qop="auth"')
    assert "the password is wrong" in str(await refused(flow, second))
    assert refusals.refused("f", f"{FILES} x", Seat.ORIGIN)


async def test_the_server_proves_that_it_knows_the_password(make_flow: MakeFlow) -> None:
    flow = make_flow(offer(DIGEST))
    given = fields(await answer(flow, 'Digest realm="x", nonce="n", qop="auth"'))

    def h(text: str) -> str:
        return hashlib.md5(text.encode()).hexdigest()

    secret = h(f"alice:x:{SECRET}")
    proof = h(f"{secret}:n:00000001:{given['cnonce']}:auth:{h(':/f')}")
    info = f'rspauth="{proof}", cnonce="{given["cnonce"]}", nc=00000001, qop=auth, nextnonce="n+1"'
    await flow.conclude(206, [], [info])
    assert flow.authenticated
    following = await flow.unasked(method="GET", target="/f")
    assert following is not None
    assert (fields(following)["nonce"], fields(following)["nc"]) == ("n+1", "00000001")
    assert digest_server(following, "GET", SECRET)


async def test_t26_a_digest_that_was_lost_with_its_connection_and_is_refused_on_the_next_is_not_made_again(
    make_flow: MakeFlow, refusals: Refusals
) -> None:
    """A peer that says nothing of hanging up, and always does."""
    flow = make_flow(offer(DIGEST))
    await answer(flow, 'Digest realm="x", nonce="n1", qop="auth"')
    flow.new_connection()
    assert await flow.unasked(method="GET", target="/f")
    await refused(flow, 'Digest realm="x", nonce="n2", qop="auth"')
    assert refusals.refused("f", f"{FILES} x", Seat.ORIGIN)


@pytest.mark.parametrize("info", ['rspauth="00"', 'rspauth="{}", cnonce="another"', 'rspauth="\udcff"'])
async def test_t26_a_server_that_proves_nothing_is_left(make_flow: MakeFlow, refusals: Refusals, info: str) -> None:
    flow = make_flow(offer(DIGEST))
    await answer(flow, 'Digest realm="x", nonce="n", qop="auth"')
    with pytest.raises(AuthFailed) as caught:
        await flow.conclude(206, [], [info])
    assert caught.value.code == ErrorCode.SEC_E_WRONG_PRINCIPAL
    assert not flow.authenticated
    assert refusals.revision("f", f"{FILES} x", Seat.ORIGIN) is None  # the password was not refused


async def test_the_digest_of_a_tunnel_is_of_its_authority(make_flow: MakeFlow) -> None:
    flow = make_flow(offer(DIGEST), seat=Seat.PROXY)
    header = await answer(flow, 'Digest realm="x", nonce="n", qop="auth"', method="CONNECT", target="files:443")
    assert fields(header)["uri"] == "files:443"
    assert digest_server(header, "CONNECT", SECRET)


# -- NTLM


class NtlmServer:
    """pyspnego's acceptor behind challenge lines."""

    def __init__(self, word: str = "NTLM", protocol: str = "ntlm", binding: bytes | None = None) -> None:
        self.word = word
        bindings = GssChannelBindings(application_data=binding) if binding else None
        options = spnego.NegotiateOptions.use_negotiate if protocol == "negotiate" else spnego.NegotiateOptions.use_ntlm
        self.context = spnego.server(protocol=protocol, channel_bindings=bindings, options=options)

    def take(self, header: str) -> str | None:
        """The next challenge; None: logged in. An exception of pyspnego: refused."""
        word, _, token = header.partition(" ")
        assert word == self.word
        told = self.context.step(base64.b64decode(token))
        return None if self.context.complete else f"{self.word} {b64(told or b'')}"


@pytest.fixture(autouse=True)
def ntlm_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "users").write_text(USERS)
    monkeypatch.setenv("NTLM_USER_FILE", str(tmp_path / "users"))


@pytest.mark.parametrize(("word", "user"), [("NTLM", r"CORP\alice"), ("NTLM", "carol@corp.example"), ("Negotiate", r"CORP\alice")])
@pytest.mark.parametrize("seat", Seat)
async def test_ntlm_logs_the_connection_in(
    make_flow: MakeFlow, word: str, user: str, seat: Seat, security: Threads, spnego_threads: list[str]
) -> None:
    scheme = AuthScheme[word.upper()]
    server = NtlmServer(word, "ntlm" if word == "NTLM" else "negotiate")
    flow = make_flow(offer(scheme, user), seat=seat)
    told = server.take(await answer(flow, "Basic realm=x", word))
    assert flow.connection_bound
    assert not flow.authenticated
    assert told is not None
    assert server.take(await answer(flow, told)) is None
    await flow.conclude(206, [], [])
    assert flow.authenticated
    assert await flow.unasked(method="GET", target="/") is None
    assert server.context.client_principal == user
    assert security.calls == ["_begin_ntlm", "_step_ntlm"]
    assert spnego_threads
    assert all(name.startswith("token") for name in spnego_threads)


async def test_ntlm_with_the_tokens_own_password_or_hash(make_flow: MakeFlow) -> None:
    secret = spnego.Password(r"CORP\alice", SECRET)
    own = choose_offers(
        Seat.ORIGIN, FILES, [Grant(AuthTarget.SERVER, NEGOTIATE, None, None, frozenset({FILES}))], a_token(secret, principal=r"CORP\alice")
    )
    for offers in (own, [Offer(NTLM, spnego.NTLMHash("CORP\\alice", nt_hash=ntlm_hash()), implicit=True, fingerprint="h")]):
        word = "Negotiate" if offers is own else "NTLM"
        server, flow = NtlmServer(word), make_flow(offers=offers)
        told = server.take(await answer(flow, word))
        assert told is not None
        assert server.take(await answer(flow, told)) is None


def ntlm_hash() -> str:
    from spnego._ntlm_raw.crypto import ntowfv1

    return ntowfv1(SECRET).hex()


async def test_a_wrong_ntlm_password_is_refused_once_and_remembered(make_flow: MakeFlow, refusals: Refusals) -> None:
    flow, server = make_flow(offer(NTLM, r"CORP\alice", "wrong")), NtlmServer()
    told = server.take(await answer(flow, "NTLM"))
    assert told is not None
    with pytest.raises(spnego.exceptions.SpnegoError):
        server.take(await answer(flow, told))
    assert "the password is wrong" in str(await refused(flow, "NTLM"))
    assert refusals.refused("f", str(FILES), Seat.ORIGIN)
    assert "refused before" in str(await refused(make_flow(offer(NTLM, r"CORP\alice", "wrong")), "NTLM"))


async def test_a_login_that_begins_anew_in_the_middle_blames_nobody(make_flow: MakeFlow, refusals: Refusals) -> None:
    flow = make_flow(offer(NTLM))
    await answer(flow, "NTLM")
    assert "began the login anew" in str(await refused(flow, "NTLM"))
    assert refusals.revision("f", str(FILES), Seat.ORIGIN) is None


async def test_a_lost_connection_begins_the_handshake_anew_twice_and_no_more(make_flow: MakeFlow) -> None:
    flow = make_flow(offer(NTLM, r"CORP\alice"))
    for _ in range(2):
        told = NtlmServer().take(await answer(flow, "NTLM"))
        assert told is not None
        await answer(flow, told)
        flow.new_connection()
        assert not flow.connection_bound
    await answer(flow, "NTLM")
    with pytest.raises(AuthFailed, match="keeps closing the connection"):
        flow.new_connection()


async def test_a_handshake_on_a_third_connection_may_succeed(make_flow: MakeFlow) -> None:
    flow = make_flow(offer(NTLM, r"CORP\alice"))
    for _ in range(2):
        await answer(flow, "NTLM")
        flow.new_connection()
    server = NtlmServer()
    told = server.take(await answer(flow, "NTLM"))
    assert told is not None
    assert server.take(await answer(flow, told)) is None
    await flow.conclude(200, [], [])
    for _ in range(5):  # an idle connection that is closed is no broken handshake
        flow.new_connection()
        assert not flow.authenticated


async def test_ntlm_asked_for_again_in_a_later_request_begins_anew(make_flow: MakeFlow) -> None:
    flow = make_flow(offer(NTLM, r"CORP\alice"))
    for _ in range(3):
        server = NtlmServer()
        assert await flow.unasked(method="GET", target="/") is None
        told = server.take(await answer(flow, "NTLM"))
        assert told is not None
        assert server.take(await answer(flow, told)) is None
        await flow.conclude(200, [], [])


async def test_a_server_that_lets_us_pass_in_the_middle_has_not_logged_us_in(make_flow: MakeFlow) -> None:
    flow = make_flow(offer(NTLM))
    await answer(flow, "NTLM")
    await flow.conclude(200, [], [])
    assert not flow.authenticated
    assert not flow.connection_bound


@pytest.mark.parametrize(
    "told", ["NTLM A", "NTLM TlRMTVNTUAACAAAA", "NTLM " + b64(b"\0" * 100), "NTLM " + b64(b"NTLMSSP\0\2" + b"\xff" * 90)]
)
async def test_a_broken_ntlm_message_ends_the_login_without_a_trace_of_it(make_flow: MakeFlow, told: str) -> None:
    flow = make_flow(offer(NTLM))
    await answer(flow, "NTLM")
    error = await refused(flow, told)
    seen: BaseException | None = error
    while seen is not None:
        assert type(seen).__module__ in ("bits_async.errors",)
        seen = seen.__cause__ or seen.__context__


async def test_t24_the_channel_binding_is_in_the_first_proof(make_flow: MakeFlow, authority: Authority) -> None:
    binding = b"tls-server-end-point:" + b"\1" * 32
    flow, server = make_flow(offer(NTLM, r"CORP\alice"), binding=binding), NtlmServer(binding=binding)
    told = server.take(await answer(flow, "NTLM"))
    assert told is not None
    assert server.take(await answer(flow, told)) is None

    for other in (b"tls-server-end-point:" + b"\2" * 32, None):
        flow, server = make_flow(offer(NTLM, r"CORP\alice", fingerprint=f"{other!r}"), binding=other), NtlmServer(binding=binding)
        told = server.take(await answer(flow, "NTLM"))
        assert told is not None
        with pytest.raises(spnego.exceptions.BadBindingsError):
            server.take(await answer(flow, told))


async def test_t24_a_refusal_over_tls_says_that_it_may_be_intercepted_and_is_not_tried_without_binding(make_flow: MakeFlow) -> None:
    flow = make_flow(offer(NTLM, r"CORP\alice"), offer(BASIC), binding=b"tls-server-end-point:" + b"\1" * 32)
    told = NtlmServer().take(await answer(flow, "NTLM", "Basic realm=x"))
    assert told is not None
    await answer(flow, told)
    error = await refused(flow, "NTLM", "Basic realm=x")
    assert "intercepted" in error.advice


@pytest.mark.parametrize("algorithm", ["md5", "sha1", "sha224", "sha256", "sha384", "sha512", "ed25519"])
def test_t24_the_binding_is_the_hash_that_the_certificates_signature_names(algorithm: str) -> None:
    old = OLD_CERTIFICATES.get(algorithm)
    certificate = base64.b64decode(old) if old else make_certificate(algorithm)
    name = {"md5": "sha256", "sha1": "sha256", "ed25519": "sha256"}.get(algorithm, algorithm)
    assert channel_binding(certificate) == b"tls-server-end-point:" + hashlib.new(name, certificate).digest()


async def test_t14_tokens_stay_out_of_pyspnegos_log_and_others_keep_theirs(make_flow: MakeFlow, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    flow, server = make_flow(offer(NTLM, r"CORP\alice")), NtlmServer()
    first = await answer(flow, "NTLM")
    assert not [record for record in caplog.records if "output" in record.getMessage()]
    told = server.take(first)
    assert told is not None
    last = await answer(flow, told)
    assert last.partition(" ")[2] not in caplog.text
    assert told.partition(" ")[2] in caplog.text  # the server of this test is another user of pyspnego


# -- the token's threads


async def test_a_thread_that_does_not_come_back_is_a_transient_error(make_flow: MakeFlow) -> None:
    async def late(*_: object) -> None:
        raise TimeoutError

    with pytest.raises(NetworkError) as caught:
        await answer(make_flow(offer(NTLM), security=late), "NTLM")
    assert caught.value.transient
    assert caught.value.code == ErrorCode.ERROR_WINHTTP_TIMEOUT


async def test_an_identity_that_cannot_be_taken_shows_nothing(make_flow: MakeFlow) -> None:
    async def broken(*_: object) -> None:
        raise ImpersonationFailed

    with pytest.raises(ImpersonationFailed):
        await answer(make_flow(offer(NTLM), offer(BASIC), security=broken), "NTLM", "Basic realm=x")


# -- without Kerberos


@pytest.fixture
def no_kerberos(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the extra is not installed."""
    for name in ("gssapi", "gssapi.raw", "krb5"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.posix  # Windows needs no extra
async def test_without_the_extra_kerberos_says_what_to_install(make_flow: MakeFlow, no_kerberos: None) -> None:
    for given in (offer(NEGOTIATE, "alice@REALM"), Offer(NEGOTIATE, spnego.KerberosKeytab("/k", "a@R"), implicit=True, fingerprint="k")):
        error = await refused(make_flow(given), "Negotiate")
        assert error.code == ErrorCode.SEC_E_NO_CREDENTIALS
        assert "bits-async[kerberos]" in error.advice
        assert "not installed" in str(error)


async def test_without_the_extra_all_other_schemes_work(make_flow: MakeFlow, no_kerberos: None) -> None:
    lines = ["Negotiate", "NTLM", 'Digest realm="x", nonce="n", qop="auth"', "Basic realm=x"]
    for scheme in (NTLM, DIGEST, BASIC):
        header = await answer(make_flow(offer(NEGOTIATE, "alice@REALM"), offer(scheme)), *lines)
        assert header.lower().startswith(scheme.word)
    header = await answer(make_flow(offer(NEGOTIATE, r"CORP\alice")), *lines)
    assert base64.b64decode(header.removeprefix("Negotiate ")).startswith(b"NTLMSSP\0")


async def test_ntlm_in_place_of_kerberos_only_by_rule(make_flow: MakeFlow, no_kerberos: None) -> None:
    await refused(make_flow(offer(NEGOTIATE, "carol@corp.example")), "Negotiate")
    flow, server = make_flow(offer(NEGOTIATE, "carol@corp.example"), rules=AuthRules(ntlm_in_negotiate=True)), NtlmServer("Negotiate")
    told = server.take(await answer(flow, "Negotiate"))
    assert told is not None
    assert server.take(await answer(flow, told)) is None
    assert server.context.client_principal == "carol@corp.example"


OLD_CERTIFICATES = {  # of algorithms that no library signs with any more
    "md5": (
        "MIIB9jCCAV+gAwIBAgIUFXZUFfIs6zyPH72wXc3yBSKpMA4wDQYJKoZIhvcNAQEEBQAwDDEKMAgGA1UEAwwBeDAgFw0yNjExMjIwMjEwMTBaGA"
        "8yMDgxMDgyNTAyMTAxMFowDDEKMAgGA1UEAwwBeDCBnzANBgkqhkiG9w0BAQEFAAOBjQAwgYkCgYEAqUgKy9S+L5SfXyM0RTJCprHsrfG7KPRf"
        "1Zi5rFoTEu7u6iFm0uievYFhE0BoZkzd4/0qFb1Nf3IOQMABQNDMVcNzFhzILFhlg0uveQbuG7Ucggkf7KUZgxgJTKqqZpejaaG3KAsfr8iNC+"
        "H8SFVzOAenODuMcsD2bsAiIyb/ftcCAwEAAaNTMFEwHQYDVR0OBBYEFIFktDKySQ5/ldNPBj8ZmBHnd1olMB8GA1UdIwQYMBaAFIFktDKySQ5/"
        "ldNPBj8ZmBHnd1olMA8GA1UdEwEB/wQFMAMBAf8wDQYJKoZIhvcNAQEEBQADgYEAnAAwuNT/ixfMX6jTLVFvCxguV1Xiq97p5S1YuqVo7GFAIy"
        "Yq/2HGsjxumwv6fFNluLlc9LolNHCueSXNEC7rro7KO/lEIOMEWAk1G0pDzxVTEiulWSg5hILi4j6HbvheXi4a6tnFu1ZncPwa1salO8QzbFgU"
        "68lJHboLsGoL45g="
    ),
    "sha1": (
        "MIIBbTCCARSgAwIBAgIUVD5v8ce4bhXKvbVRMR5Pa8YJ7egwCQYHKoZIzj0EATAMMQowCAYDVQQDDAF4MCAXDTI2MTEyMjAyMTAxMFoYDzIwOD"
        "EwODI1MDIxMDEwWjAMMQowCAYDVQQDDAF4MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE1/g9xKnzFW/1Qg9kNuTPsVtqr+s4HcC9dOcDAPow"
        "DQEnJkem64RRzaKiT1hsEathace/wRW7gOJBrJxuf8Yv76NTMFEwHQYDVR0OBBYEFAWOaTuOtiOxqD5z13xrc+CQTaPeMB8GA1UdIwQYMBaAFA"
        "WOaTuOtiOxqD5z13xrc+CQTaPeMA8GA1UdEwEB/wQFMAMBAf8wCQYHKoZIzj0EAQNIADBFAiEAqhEqh4mUipPI2x+zv7UeM0EE2UM669RxTS47"
        "raHvH0YCIC7yn4LYpitLJ5Zv6mCl9V5lJmYmr2bDgUY50LdGGjcs"
    ),
}


def make_certificate(algorithm: str) -> bytes:
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    ed = algorithm == "ed25519"
    key: Any = ed25519.Ed25519PrivateKey.generate() if ed else ec.generate_private_key(ec.SECP256R1())
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(days=1))
    return builder.sign(key, None if ed else getattr(hashes, algorithm.upper())()).public_bytes(serialization.Encoding.DER)


def test_offers_are_a_tuple_that_also_says_what_is_missing() -> None:
    assert Offers() == ()
    assert Offers.of([offer(BASIC)], ["a", "a"]).withheld == ("a",)
    assert show_text(repr(Offers.of([offer(BASIC)], []))).startswith("(Offer(")
