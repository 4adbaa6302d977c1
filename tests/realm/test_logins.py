r"""Logins at both seats, by the public API over real sockets: which scheme, over which connection, how often, and what a refusal says.

The NTLM and Digest peers are those of `tests/peers.py` (real acceptors); Apache and Squid stand for the servers that people have.
"""

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import spnego

import bits_async as bits
from bits_async import AuthCredentials, AuthScheme, AuthTarget, ErrorCode, ErrorContext, HelperTokenFlags, JobPriority, JobState, Token
from tests.peers import USERS, Authority, Door, Fault, Hold, Misbehaviour, Origin, Proxy, Seen, Server, answer
from tests.rules import NTLM_OVER_HTTP
from tests.waiting import until

ALICE, HELPER = USERS
BODY = os.urandom(300_000)
SERVER, PROXY = AuthTarget
BASIC, DIGEST, NTLM, NEGOTIATE = AuthScheme
HTTP_401, HTTP_407 = 0x80190191, 0x80190197
MIB = 1 << 20
WORD = {BASIC: "Basic", DIGEST: "Digest", NTLM: "NTLM", NEGOTIATE: "Negotiate"}


@pytest.fixture(autouse=True)
def private_state(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def login(target: AuthTarget, scheme: AuthScheme, user: str = ALICE, password: str | None = None) -> AuthCredentials:
    return AuthCredentials(target, scheme, user, USERS[user] if password is None else password)


def account(name: str = ALICE) -> Token:
    """A token that is this process locally and the account on the network."""
    return Token.for_network(spnego.Password(name, USERS[name]))


async def make_job(manager, credentials: Iterable[AuthCredentials] = (), *, proxy: str | None = None, owner: Token | None = None):
    job = await manager.create_job("logins", priority=JobPriority.FOREGROUND, owner=owner)
    await job.set_no_progress_timeout(0)
    await job.set_proxy_settings(bits.ProxySettings.override(proxy) if proxy else bits.ProxySettings.no_proxy())
    for given in credentials:
        await job.set_credentials(given.target, given.scheme, given.user_name, given.password)
    return job


async def fetch(tmp_path: Path, urls: Iterable[str], credentials: Iterable[AuthCredentials] = (), *, proxy=None, owner=None, ssl=None):
    """The files of one job, one after the other; returns their bytes."""
    async with bits.BitsManager(auth_rules=NTLM_OVER_HTTP, store=tmp_path / "queue.db", ssl=ssl) as manager:
        job = await make_job(manager, credentials, proxy=proxy, owner=owner)
        for number, url in enumerate(urls):
            await job.add_file(url, tmp_path / f"file{number}")
        await job.resume()
        await job.wait()
        return [path.read_bytes() for path in await job.complete()]


async def refused(*args: Any, **kwargs: Any) -> bits.AuthFailed:
    with pytest.raises(bits.AuthFailed) as caught:
        await bits.download(*args, auth_rules=NTLM_OVER_HTTP, **kwargs)
    assert not caught.value.transient
    return caught.value


def statuses(server: Server) -> list[int]:
    return [seen.status for seen in server.requests]


def shown(server: Server) -> list[str]:
    """The schemes of all answers to challenges that reached this peer, at either seat."""
    headers = [seen.header(name) for seen in server.requests for name in ("Authorization", "Proxy-Authorization")]
    return [value.split()[0] for value in headers if value]


def connections(seen: Iterable[Seen]) -> set[int]:
    return {each.connection for each in seen}


class Way:
    """How an origin is reached: straight or by a proxy, over http or https (then by CONNECT)."""

    def __init__(self, authority: Authority, *, tls: bool) -> None:
        self.tls = authority.server if tls else None
        self.trust = authority.client()


@pytest.fixture(params=[False, True], ids=["http", "connect"])
def way(request, authority) -> Way:
    """http: the proxy forwards; connect: it opens a tunnel to an https origin."""
    return Way(authority, tls=request.param)


# -- NTLM ----------------------------------------------------------------------------------------------------------------------------------


async def test_all_legs_of_ntlm_at_the_proxy_go_over_one_connection_and_serve_every_file(way, tmp_path):
    async with Origin(tls=way.tls) as origin, Proxy(door=Door("NTLM")) as proxy:
        urls = [origin.serve(f"/{n}", BODY) for n in range(3)]
        got = await fetch(tmp_path, urls, [login(PROXY, NTLM)], proxy=proxy.url, ssl=way.trust)
        assert got == [BODY] * 3
        assert proxy.connections == 1
        assert len(proxy.door.logins) == 1
        assert statuses(proxy) == ([407, 407, 200] if way.tls else [407, 407, 200, 200, 200])
        assert {seen.user for seen in proxy.passed} == {ALICE}
        assert origin.connections == 1
        assert shown(origin) == []


async def test_ntlm_at_the_origin_is_one_handshake_for_all_files(way, tmp_path):
    door = Door("NTLM")
    async with Origin(door=door, tls=way.tls) as origin:
        urls = [origin.serve(f"/{n}", BODY) for n in range(3)]
        assert await fetch(tmp_path, urls, [login(SERVER, NTLM)], ssl=way.trust) == [BODY] * 3
        assert statuses(origin) == [401, 401, 200, 200, 200]
        assert origin.connections == len(door.logins) == 1


@pytest.mark.parametrize("scheme", [NTLM, NEGOTIATE], ids=["ntlm", "negotiate"])
async def test_ntlm_at_both_seats_at_once_shows_each_its_own_user(way, tmp_path, scheme):
    word = WORD[scheme]
    async with Origin(door=Door(word), tls=way.tls) as origin, Proxy(door=Door(word)) as proxy:
        urls = [origin.serve(f"/{n}", BODY) for n in range(2)]
        got = await fetch(tmp_path, urls, [login(SERVER, scheme, ALICE), login(PROXY, scheme, HELPER)], proxy=proxy.url, ssl=way.trust)
        assert got == [BODY] * 2
        assert [user for _, _, user in origin.door.logins] == [ALICE]
        assert [user for _, _, user in proxy.door.logins] == [HELPER]
        assert (origin.connections, proxy.connections) == (1, 1)
        assert set(shown(origin)) == {word}


async def test_a_named_owner_with_a_domain_account_answers_negotiate_by_ntlm(way, tmp_path):
    """DOM\\user can only be NTLM; naming the owner is what permits it."""
    async with Origin(door=Door("Negotiate"), tls=way.tls) as origin, Proxy(door=Door("Negotiate")) as proxy:
        path = await bits.download(
            origin.serve("/f", BODY), tmp_path / "f", proxy=proxy.url, owner=account(), ssl=way.trust, auth_rules=NTLM_OVER_HTTP
        )
        assert path.read_bytes() == BODY
        assert {user for peer in (origin, proxy) for _, _, user in peer.door.logins} == {ALICE}


async def test_a_helper_on_the_network_is_who_the_ntlm_peers_see(way, tmp_path):
    async with Origin(door=Door("Negotiate"), tls=way.tls) as origin, Proxy(door=Door("Negotiate")) as proxy:
        await bits.download(
            origin.serve("/f", BODY),
            tmp_path / "f",
            proxy=proxy.url,
            owner=account(ALICE),
            helper=account(HELPER),
            helper_flags=HelperTokenFlags.NETWORK,
            ssl=way.trust,
            auth_rules=NTLM_OVER_HTTP,
        )
        assert {user for peer in (origin, proxy) for _, _, user in peer.door.logins} == {HELPER}


async def test_ntlm_at_an_origin_behind_a_proxy_that_shares_connections_is_refused_and_nothing_is_shown(tmp_path):
    async with Origin(door=Door("NTLM")) as origin, Proxy(session_based=False) as proxy:
        error = await refused(origin.serve("/f", BODY), tmp_path / "f", proxy=proxy.url, credentials=[login(SERVER, NTLM)])
        assert "Session-Based-Authentication" in str(error)
        assert shown(proxy) == shown(origin) == []


@pytest.mark.realm
@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
@pytest.mark.parametrize("scheme", [NTLM, NEGOTIATE], ids=["ntlm", "negotiate"])
async def test_apache_with_gss_ntlmssp_sees_one_ntlm_login_for_all_files(apache, authority, tmp_path, tls, scheme):
    credentials = [AuthCredentials(SERVER, scheme, r"BITS\alice", "alice-password")]
    if scheme is NEGOTIATE:  # mod_auth_gssapi offers both words; the other one must not be needed
        credentials.append(AuthCredentials(SERVER, NTLM, r"BITS\nobody", "wrong"))
    got = await fetch(tmp_path, [apache.url("/ntlm/big", tls=tls)] * 2, credentials, ssl=authority.client())
    assert got == [apache.data] * 2
    done = apache.hits(expect=2, target="/ntlm/big", status=200)
    assert {hit.user.upper() for hit in done} <= {r"BITS\ALICE", "ALICE"}
    assert len({hit.client_port for hit in apache.hits(target="/ntlm/big")}) == 1
    assert len(apache.hits(target="/ntlm/big", status=401)) <= 2


@pytest.mark.realm
async def test_ntlm_at_apache_through_squid_with_digest_goes_over_the_connection_squid_keeps(apache, squid_digest, tmp_path):
    """Squid promises Session-Based-Authentication and pins the connection."""
    credentials = [
        AuthCredentials(SERVER, NTLM, r"BITS\alice", "alice-password"),
        AuthCredentials(PROXY, DIGEST, "helper", "helper-password"),
    ]
    got = await fetch(tmp_path, [apache.url("/ntlm/big")] * 2, credentials, proxy=squid_digest.url)
    assert got == [apache.data] * 2
    assert len(apache.hits(expect=2, target="/ntlm/big", status=200)) == 2
    assert len({hit.client_port for hit in apache.hits(target="/ntlm/big")}) == 1
    assert {passage.user for passage in squid_digest.hits(expect=2, status=200)} == {"helper"}
    assert len({passage.client_port for passage in squid_digest.hits(expect=2)}) == 1


@pytest.mark.realm
@pytest.mark.parametrize("tls", [False, True], ids=["http", "connect"])
async def test_squids_ntlm_handshake_goes_over_one_connection(apache, authority, squid_ntlmfake, tmp_path, tls):
    credentials = [AuthCredentials(PROXY, NTLM, r"LAB\alice", "whatever")]
    urls = [apache.url("/pub/big", tls=tls)] * 2
    assert await fetch(tmp_path, urls, credentials, proxy=squid_ntlmfake.url, ssl=authority.client()) == [apache.data] * 2
    passages = squid_ntlmfake.hits(expect=3 if tls else 4)
    assert [p.status for p in passages] == ([407, 407, 200] if tls else [407, 407, 200, 200])
    assert len({p.client_port for p in passages}) == 1


# -- Basic and Digest ----------------------------------------------------------------------------------------------------------------------


async def test_basic_over_http_is_refused_at_both_seats_and_nothing_is_shown(tmp_path):
    async with Origin(door=Door("Basic")) as origin, Proxy(door=Door("Basic")) as proxy:
        url = origin.serve("/f", BODY)
        error = await refused(url, tmp_path / "f", credentials=[login(SERVER, BASIC)])
        assert (error.code, error.context, error.http_status) == (HTTP_401, ErrorContext.REMOTE_FILE, 401)
        assert "BASIC" in str(error)
        assert "without TLS" in str(error)
        error = await refused(url, tmp_path / "f", proxy=proxy.url, credentials=[login(PROXY, BASIC), login(SERVER, BASIC)])
        assert (error.code, error.context, error.http_status) == (HTTP_407, ErrorContext.GENERAL_TRANSPORT, 407)
        assert shown(origin) == shown(proxy) == []


async def test_basic_at_a_plain_proxy_is_refused_for_an_https_origin_too(authority, tmp_path):
    """The hop that matters is the one to the proxy: CONNECT goes there in the clear."""
    async with Origin(tls=authority.server) as origin, Proxy(door=Door("Basic")) as proxy:
        error = await refused(
            origin.serve("/f", BODY), tmp_path / "f", proxy=proxy.url, credentials=[login(PROXY, BASIC)], ssl=authority.client()
        )
        assert error.code == HTTP_407
        assert shown(proxy) == []
        assert origin.connections == 0


async def test_basic_over_tls_works_at_both_seats_and_goes_unasked_after_the_first_challenge(authority, tmp_path):
    async with Origin(door=Door("Basic"), tls=authority.server) as origin, Proxy(door=Door("Basic"), tls=authority.issue()) as proxy:
        urls = [origin.serve(f"/{n}", BODY) for n in range(3)]
        credentials = [login(SERVER, BASIC, ALICE), login(PROXY, BASIC, HELPER)]
        assert await fetch(tmp_path, urls, credentials, proxy=proxy.url, ssl=authority.client()) == [BODY] * 3
        assert statuses(origin) == [401, 200, 200, 200]
        assert statuses(proxy) == [407, 200]
        assert ({s.user for s in origin.passed}, {s.user for s in proxy.passed}) == ({ALICE}, {HELPER})


@pytest.mark.realm
async def test_basic_on_apache_is_refused_over_http_and_works_over_https(apache, authority, tmp_path):
    given = [AuthCredentials(SERVER, BASIC, "alice", "alice-password")]
    await refused(apache.url("/basic/big"), tmp_path / "f", credentials=given)
    assert [(hit.status, hit.user) for hit in apache.hits(expect=1)] == [(401, None)]
    path = await bits.download(apache.url("/basic/big", tls=True), tmp_path / "f", credentials=given, ssl=authority.client())
    assert path.read_bytes() == apache.data
    assert len(apache.hits(expect=1, status=200, user="alice")) == 1


@pytest.mark.realm
@pytest.mark.parametrize("tls", [False, True], ids=["http", "connect"])
async def test_basic_on_squid_is_refused_because_the_way_to_it_is_plain(apache, authority, squid_basic, tmp_path, tls):
    given = [AuthCredentials(PROXY, BASIC, "alice", "alice-password")]
    url = apache.url("/pub/big", tls=tls)
    error = await refused(url, tmp_path / "f", proxy=squid_basic.url, credentials=given, ssl=authority.client())
    assert (error.code, error.http_status) == (HTTP_407, 407)
    assert [(p.status, p.user) for p in squid_basic.hits(expect=1)] == [(407, None)]


@pytest.mark.realm
@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
async def test_digest_on_apache_asks_once_and_counts_the_uses_of_its_nonce(apache, authority, tmp_path, tls):
    given = [AuthCredentials(SERVER, DIGEST, "alice", "alice-password")]
    got = await fetch(tmp_path, [apache.url("/digest/big", tls=tls)] * 3, given, ssl=authority.client())
    assert got == [apache.data] * 3
    hits = apache.hits(expect=4, target="/digest/big")
    assert [(hit.status, hit.user) for hit in hits] == [(401, None)] + [(200, "alice")] * 3
    assert len({hit.client_port for hit in hits}) == 1


@pytest.mark.realm
@pytest.mark.parametrize("tls", [False, True], ids=["http", "connect"])
async def test_digest_on_squid_and_on_apache_behind_it_show_two_users(apache, authority, squid_digest, tmp_path, tls):
    given = [
        AuthCredentials(SERVER, DIGEST, "alice", "alice-password"),
        AuthCredentials(PROXY, DIGEST, "helper", "helper-password"),
    ]
    urls = [apache.url("/digest/big", tls=tls)] * 2
    assert await fetch(tmp_path, urls, given, proxy=squid_digest.url, ssl=authority.client()) == [apache.data] * 2
    assert {hit.user for hit in apache.hits(expect=2, status=200)} == {"alice"}
    assert {p.user for p in squid_digest.hits(expect=1 if tls else 2, status=200)} == {"helper"}
    assert len(squid_digest.hits(status=407)) == 1


# -- Digest's nonce ------------------------------------------------------------------------------------------------------------------------


def counts(requests: Iterable[Seen], header: str = "Authorization") -> list[int]:
    """The nonce counts that were shown."""
    found = [re.search(r"nc=([0-9a-f]{8})", seen.header(header) or "") for seen in requests]
    return [int(match[1], 16) for match in found if match]


@pytest.mark.parametrize("algorithms", [("SHA-256", "MD5"), ("MD5", "SHA-256"), ("MD5",), ("SHA-256",)], ids="+".join)
async def test_a_digest_nonce_is_used_again_with_a_rising_count_and_the_stronger_hash(way, tmp_path, algorithms):
    async with Origin(door=Door("Digest", algorithms=algorithms), tls=way.tls) as origin:
        urls = [origin.serve(f"/{n}", BODY) for n in range(3)]
        assert await fetch(tmp_path, urls, [login(SERVER, DIGEST)], ssl=way.trust) == [BODY] * 3
        assert statuses(origin) == [401, 200, 200, 200]
        assert counts(origin.requests) == [1, 2, 3]
        used = {re.search(r"algorithm=([\w-]+)", seen.header("Authorization") or "")[1] for seen in origin.passed}
        assert used == {"SHA-256" if "SHA-256" in algorithms else "MD5"}


@pytest.mark.parametrize("at", [SERVER, PROXY], ids=["origin", "proxy"])
async def test_a_stale_nonce_is_replaced_and_is_no_wrong_password(tmp_path, at):
    door = Door("Digest", misbehave=Misbehaviour(nonce_uses=2))
    doors = (door, None) if at is SERVER else (None, door)
    async with Origin(door=doors[0]) as origin, Proxy(door=doors[1]) as proxy:
        urls = [origin.serve(f"/{n}", BODY) for n in range(4)]
        assert await fetch(tmp_path, urls, [login(at, DIGEST)], proxy=proxy.url) == [BODY] * 4
        peer, header = (origin, "Authorization") if at is SERVER else (proxy, "Proxy-Authorization")
        no = peer.seat.status
        assert statuses(peer) == [no, 200, 200, no, 200, 200]
        assert counts(peer.passed, header) == [1, 2, 1, 2]
        assert peer.connections == 1


# -- challenges ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one_line", [False, True], ids=["many-lines", "one-line"])
@pytest.mark.parametrize(
    ("permitted", "chosen"),
    [((DIGEST, BASIC, NTLM, NEGOTIATE), "Negotiate"), ((BASIC, NTLM, DIGEST), "NTLM"), ((BASIC, DIGEST), "Digest"), ((BASIC,), "Basic")],
    ids=["all", "no-negotiate", "passwords", "basic"],
)
async def test_of_several_challenges_the_strongest_permitted_one_is_answered(authority, tmp_path, one_line, permitted, chosen):
    schemes = ("Basic", "Digest", "NTLM", "Negotiate")
    origin_door, proxy_door = (Door(*schemes, misbehave=Misbehaviour(one_line=one_line)) for _ in range(2))
    async with Origin(door=origin_door, tls=authority.server) as origin, Proxy(door=proxy_door, tls=authority.issue()) as proxy:
        given = [login(SERVER, scheme, ALICE) for scheme in permitted] + [login(PROXY, scheme, HELPER) for scheme in permitted]
        url = origin.serve("/f", BODY)
        path = await bits.download(url, tmp_path / "f", proxy=proxy.url, credentials=given, ssl=authority.client())
        assert path.read_bytes() == BODY
        assert [(scheme, user) for _, scheme, user in origin_door.logins] == [(chosen, ALICE)]
        assert [(scheme, user) for _, scheme, user in proxy_door.logins] == [(chosen, HELPER)]
        assert set(shown(origin)) == set(shown(proxy)) == {chosen}


async def test_a_challenge_for_a_scheme_that_is_not_permitted_says_what_was_asked_and_what_was_permitted(tmp_path):
    async with Origin(door=Door("NTLM", "Negotiate")) as origin:
        error = await refused(origin.serve("/f", BODY), tmp_path / "f", credentials=[login(SERVER, DIGEST)])
        assert "NTLM, NEGOTIATE" in str(error)
        assert rf"DIGEST as {ALICE}" in str(error)
        assert error.identity
        assert shown(origin) == []


# -- bodies of refusals, and connections that close ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
@pytest.mark.parametrize("size", [0, 100_000, 8 * MIB - 1000], ids=["none", "100K", "8M"])
async def test_a_refusal_with_a_body_up_to_8_mib_costs_no_connection(way, tmp_path, size, chunked):
    ways = Misbehaviour(refusal_body=size, refusal_chunked=chunked)
    async with Origin(tls=way.tls) as origin, Proxy(door=Door("NTLM", misbehave=ways)) as proxy:
        got = await fetch(tmp_path, [origin.serve("/f", BODY)], [login(PROXY, NTLM)], proxy=proxy.url, ssl=way.trust)
        assert got == [BODY]
        assert proxy.connections == 1


async def test_a_refusal_with_a_body_above_8_mib_costs_its_connection_only(way, tmp_path):
    """Digest can go on over another connection; NTLM cannot, and says why after a bounded number of tries."""
    ways = Misbehaviour(refusal_body=9 * MIB)
    async with Origin(tls=way.tls) as origin, Proxy(door=Door("Digest", misbehave=ways)) as proxy:
        url = origin.serve("/f", BODY)
        assert await fetch(tmp_path, [url], [login(PROXY, DIGEST)], proxy=proxy.url, ssl=way.trust) == [BODY]
        assert [(s.status, s.connection) for s in proxy.requests] == [(407, 1), (200, 2)]
    async with Origin(tls=way.tls) as origin, Proxy(door=Door("NTLM", misbehave=ways)) as proxy:
        url = origin.serve("/f", BODY)
        error = await refused(url, tmp_path / "f", proxy=proxy.url, credentials=[login(PROXY, NTLM)], ssl=way.trust, retry_for=0)
        assert "closing the connection" in str(error)
        assert proxy.connections <= 5


@pytest.mark.parametrize("seats", [("origin",), ("proxy",), ("origin", "proxy")], ids="+".join)
@pytest.mark.parametrize("scheme", [NTLM, NEGOTIATE], ids=["ntlm", "negotiate"])
async def test_a_close_in_the_middle_of_a_handshake_starts_it_again_with_a_fresh_context(way, tmp_path, seats, scheme):
    """Connection: close from an origin, Proxy-Connection: close from a proxy; first with the challenge, then in a leg."""
    ways = {seat: Misbehaviour(close_first=1, close_legs=1 if len(seats) > 1 else 2) for seat in seats}
    doors = [Door(WORD[scheme], misbehave=ways[seat]) if seat in ways else None for seat in ("origin", "proxy")]
    async with Origin(door=doors[0], tls=way.tls) as origin, Proxy(door=doors[1]) as proxy:
        credentials = [login(SERVER, scheme, ALICE), login(PROXY, scheme, HELPER)]
        got = await fetch(tmp_path, [origin.serve("/f", BODY)], credentials, proxy=proxy.url, ssl=way.trust)
        assert got == [BODY]
        assert {(each.close_first, each.close_legs) for each in ways.values()} == {(0, 0)}
        for peer, user in ((origin, ALICE), (proxy, HELPER)):
            if peer.door is not None:
                connection, _, who = peer.door.logins[-1]
                assert who == user
                assert connection == max(connections(peer.requests)), "all legs of the login that counted were on the last connection"


@pytest.mark.parametrize("at", ["origin", "proxy"])
async def test_a_peer_that_always_closes_in_the_middle_of_the_handshake_is_given_up(way, tmp_path, at):
    ways = Misbehaviour(close_legs=100)
    doors = [Door("NTLM", misbehave=ways) if at == seat else None for seat in ("origin", "proxy")]
    async with Origin(door=doors[0], tls=way.tls) as origin, Proxy(door=doors[1]) as proxy:
        credentials = [login(SERVER, NTLM), login(PROXY, NTLM)]
        url = origin.serve("/f", BODY)
        error = await refused(url, tmp_path / "f", proxy=proxy.url, credentials=credentials, ssl=way.trust)
        assert "in the middle of the login" in str(error)
        assert error.http_status == (401 if at == "origin" else 407)
        assert 2 <= 100 - ways.close_legs <= 3


# -- the wrong seat ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("through", [False, True], ids=["straight", "tunnel"])
async def test_t25_a_407_from_an_origin_is_not_answered(authority, tmp_path, through):
    async with Origin(tls=authority.server) as origin, Proxy(door=Door("NTLM")) as proxy:
        url = origin.serve("/f", BODY)
        origin.always("/f", answer(407, b"no", Proxy_Authenticate='Basic realm="x"'))
        given = [login(PROXY, scheme) for scheme in AuthScheme] + [login(SERVER, scheme) for scheme in AuthScheme]
        error = await refused(
            url,
            tmp_path / "f",
            proxy=proxy.url if through else bits.ProxySettings.no_proxy(),
            credentials=given,
            ssl=authority.client(),
        )
        assert error.code == HTTP_407
        assert "only a proxy may ask" in str(error)
        assert shown(origin) == []
        assert len(origin.requests) == 1


async def test_t25_a_401_from_connect_is_not_answered(authority, tmp_path):
    connect = answer(401, b"no", WWW_Authenticate='Basic realm="x"')
    async with Origin(tls=authority.server) as origin, Proxy(connect=connect, tls=authority.issue()) as proxy:
        given = [login(target, scheme) for target in AuthTarget for scheme in AuthScheme]
        error = await refused(
            origin.serve("/f", BODY), tmp_path / "f", proxy=proxy.url, credentials=given, ssl=authority.client(), retry_for=0
        )
        assert error.code == HTTP_401
        assert "only a server may ask" in str(error)
        assert shown(proxy) == []
        assert origin.connections == 0
        assert len(proxy.requests) == 1


# -- refused credentials -------------------------------------------------------------------------------------------------------------------


def attempts(requests: Iterable[Seen], scheme: str, header: str) -> int:
    """How often a password was really shown: the last leg of each login, whatever the scheme."""
    values = [seen.header(header) or "" for seen in requests]
    mine = [value for value in values if value.startswith(scheme)]
    return sum(1 for value in mine if not value.partition(" ")[2].startswith("TlRMTVNTUAAB"))  # NTLM's first message proves nothing


@pytest.mark.parametrize("word", ["Basic", "Digest", "NTLM", "Negotiate"])
@pytest.mark.parametrize("at", [SERVER, PROXY], ids=["origin", "proxy"])
async def test_t26_a_wrong_password_is_shown_once_over_retries_and_jobs_until_it_is_replaced(authority, tmp_path, word, at):
    scheme = AuthScheme[word.upper()]
    door = Door(word)
    doors = (door, None) if at is SERVER else (None, door)
    async with Origin(door=doors[0], tls=authority.server) as origin, Proxy(door=doors[1], tls=authority.issue()) as proxy:
        url = origin.serve("/f", BODY)
        peer: Server = origin if at is SERVER else proxy
        header = "Authorization" if at is SERVER else "Proxy-Authorization"

        def tried() -> int:
            return attempts(peer.requests, word, header)

        async with bits.BitsManager(auth_rules=NTLM_OVER_HTTP, store=tmp_path / "queue.db", ssl=authority.client()) as manager:
            job = await make_job(manager, [login(at, scheme, ALICE, "wrong")], proxy=proxy.url)
            await job.add_file(url, tmp_path / "one")
            await job.resume()
            with pytest.raises(bits.AuthFailed) as caught:
                await job.wait()
            assert job.state is JobState.ERROR
            error = caught.value
            assert error.code in (HTTP_401 if at is SERVER else HTTP_407, ErrorCode.SEC_E_LOGON_DENIED)
            assert (error.identity, error.http_status) == (job.owner_name, 401 if at is SERVER else 407)
            assert f"{scheme.name} as {ALICE}" in error.message
            assert "wrong" not in error.message.replace("is wrong", "")
            assert tried() == 1

            for _ in range(2):  # the same job again
                await job.resume()
                with pytest.raises(bits.AuthFailed, match="refused before"):
                    await job.wait()
            other = await make_job(manager, [login(at, scheme, ALICE, "wrong")], proxy=proxy.url)
            await other.add_file(url, tmp_path / "two")
            await other.resume()
            with pytest.raises(bits.AuthFailed, match="refused before"):
                await other.wait()
            with pytest.raises(bits.AuthFailed, match="refused before"):
                await manager.download(url, tmp_path / "three", proxy=proxy.url, credentials=[login(at, scheme, ALICE, "wrong")])
            assert tried() == 1

            await job.set_credentials(at, scheme, ALICE, USERS[ALICE])
            await job.resume()
            await job.wait()
            await job.complete()
        assert (tmp_path / "one").read_bytes() == BODY


async def test_t26_a_wrong_password_in_one_scheme_is_not_shown_in_a_weaker_one(authority, tmp_path):
    """Five schemes with one wrong password would be five steps towards a locked account."""
    async with Origin(door=Door("Negotiate", "NTLM", "Digest", "Basic"), tls=authority.server) as origin:
        url = origin.serve("/f", BODY)
        given = [login(SERVER, scheme, ALICE, "wrong") for scheme in AuthScheme]
        async with bits.BitsManager(auth_rules=NTLM_OVER_HTTP, store=tmp_path / "queue.db", ssl=authority.client()) as manager:
            for number in range(5):
                with pytest.raises(bits.AuthFailed):
                    await manager.download(url, tmp_path / f"{number}", credentials=given)
        # one for the account, and one for the realm "lab", which NTLM does not name: it might be another directory of users
        shown_proofs = sum(attempts(origin.requests, word, "Authorization") for word in ("Negotiate", "NTLM", "Digest", "Basic"))
        assert shown_proofs <= 2, shown(origin)


async def test_t26_setting_the_same_password_again_on_a_job_is_a_wish_to_try_it_again(tmp_path):
    """The account may have been unlocked meanwhile; whoever says so by hand is heard, once."""
    async with Origin(door=Door("NTLM")) as origin:
        async with bits.BitsManager(auth_rules=NTLM_OVER_HTTP, store=tmp_path / "queue.db") as manager:
            job = await make_job(manager, [login(SERVER, NTLM, ALICE, "wrong")])
            await job.add_file(origin.serve("/f", BODY), tmp_path / "f")
            for expected in (1, 2):
                await job.resume()
                with pytest.raises(bits.AuthFailed):
                    await job.wait()
                assert attempts(origin.requests, "NTLM", "Authorization") == expected
                await job.set_credentials(SERVER, NTLM, ALICE, "wrong")


@pytest.mark.realm
async def test_t26_a_password_that_the_kdc_refuses_reaches_it_once(kdc, tmp_path):
    name = kdc.add_user("lockme", "right")
    kdc.run("kadmin.local", "-r", kdc.realm, text="modprinc +requires_preauth lockme\n")  # it counts and locks as a domain does
    log = kdc.directory / "kdc.log"

    def failures() -> int:
        return sum("PREAUTH_FAILED" in line and "lockme" in line for line in log.read_text(errors="replace").splitlines())

    async with Origin(door=Door("Kerberos", keytab=kdc.keytab("HTTP/localhost"))) as origin:
        url = origin.serve("/f", BODY)
        async with bits.BitsManager(auth_rules=NTLM_OVER_HTTP, store=tmp_path / "queue.db") as manager:
            for number in range(3):
                with pytest.raises(bits.AuthFailed) as caught:
                    await manager.download(url, tmp_path / f"{number}", credentials=[AuthCredentials(SERVER, NEGOTIATE, name, "guess")])
                error = caught.value
                assert error.code == ErrorCode.SEC_E_LOGON_DENIED
                assert error.identity
                assert f"NEGOTIATE as {name}" in error.message
                assert "guess" not in str(error)
            assert failures() == 1
            assert shown(origin) == []
            credentials = [AuthCredentials(SERVER, NEGOTIATE, name, "right")]
            path = await manager.download(url, tmp_path / "right", credentials=credentials)
        assert path.read_bytes() == BODY
        assert {seen.user for seen in origin.passed} == {name}


@pytest.mark.realm
@pytest.mark.parametrize("tls", [False, True], ids=["http", "connect"])
async def test_t26_a_wrong_password_reaches_apache_and_squid_once(apache, authority, squid_digest, tmp_path, tls):
    wrong = [AuthCredentials(PROXY, DIGEST, "alice", "no")]
    url = apache.url("/pub/big", tls=tls)
    async with bits.BitsManager(auth_rules=NTLM_OVER_HTTP, store=tmp_path / "queue.db", ssl=authority.client()) as manager:
        for number in range(2):
            with pytest.raises(bits.AuthFailed):
                await manager.download(url, tmp_path / f"{number}", proxy=squid_digest.url, credentials=wrong)
    assert [p.status for p in squid_digest.hits(expect=3)] == [407, 407, 407]  # a challenge, the refusal, the second job's challenge
    assert apache.hits() == []


# -- the server's own proof ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [SERVER, PROXY], ids=["origin", "proxy"])
async def test_a_peer_that_cannot_prove_that_it_knows_the_password_gets_nothing_accepted(way, tmp_path, at):
    door = Door("Digest", misbehave=Misbehaviour(wrong_final=True))
    doors = (door, None) if at is SERVER else (None, door)
    async with Origin(door=doors[0], tls=way.tls) as origin, Proxy(door=doors[1]) as proxy:
        url = origin.serve("/f", BODY)
        error = await refused(url, tmp_path / "f", proxy=proxy.url, credentials=[login(at, DIGEST)], ssl=way.trust)
        assert error.code == ErrorCode.SEC_E_WRONG_PRINCIPAL
        assert "rspauth" in str(error)
        assert [p for p in tmp_path.iterdir() if p.name != "state"] == []


@pytest.mark.realm
@pytest.mark.parametrize("at", [SERVER, PROXY], ids=["origin", "proxy"])
async def test_a_false_final_kerberos_token_fails_the_request(way, kdc, tmp_path, at):
    door = Door("Kerberos", keytab=kdc.keytab("HTTP/localhost"), misbehave=Misbehaviour(wrong_final=True))
    doors = (door, None) if at is SERVER else (None, door)
    async with Origin(door=doors[0], tls=way.tls) as origin, Proxy(door=doors[1]) as proxy:
        owner = Token.for_network(spnego.KerberosKeytab(str(kdc.keytab("alice")), kdc.principal("alice")))
        error = await refused(origin.serve("/f", BODY), tmp_path / "f", proxy=proxy.url, owner=owner, ssl=way.trust)
        assert error.code == ErrorCode.SEC_E_WRONG_PRINCIPAL
        assert "HTTP/localhost" in str(error)
        assert [p for p in tmp_path.iterdir() if p.name != "state"] == []
        door.misbehave.wrong_final, door.misbehave.no_final = False, True  # Squid sends none, and is believed
        path = await bits.download(origin.url("/f"), tmp_path / "f", proxy=proxy.url, owner=owner, ssl=way.trust, auth_rules=NTLM_OVER_HTTP)
        assert path.read_bytes() == BODY


# -- lanes: whose connection it is ---------------------------------------------------------------------------------------------------------


class Visits:
    """Jobs of one manager, run one after the other on one origin; which connections each of them used."""

    def __init__(self, tmp_path: Path, origin: Origin, manager: bits.BitsManager) -> None:
        self.tmp_path, self.origin, self.manager = tmp_path, origin, manager
        self.url = origin.serve("/f", BODY)
        self.jobs: list[bits.Job] = []

    async def prepare(self, *, owner: Token | None = None, credentials: Iterable[AuthCredentials] = (), proxy: str | None = None) -> None:
        job = await make_job(self.manager, credentials, owner=owner, proxy=proxy)
        await job.add_file(self.url, self.tmp_path / f"file{len(self.jobs)}")
        self.jobs.append(job)

    async def run(self, number: int) -> set[int]:
        """A file more of that job; the connections it came over."""
        job, before = self.jobs[number], len(self.origin.requests)
        if job.state is JobState.TRANSFERRED:
            await job.add_file(self.url, self.tmp_path / f"file{number}-{len(job.files)}")
        await job.resume()
        await job.wait()
        return connections(self.origin.requests[before:])


@pytest.fixture
def visits(tmp_path) -> Callable[[Origin, bits.BitsManager], Visits]:
    return lambda origin, manager: Visits(tmp_path, origin, manager)


async def test_jobs_of_the_same_key_share_one_connection_and_one_login(tmp_path, visits):
    """What the tests below differ from: with nothing different, everything is shared."""
    owner = account()
    async with Origin(door=Door("NTLM")) as origin, bits.BitsManager(auth_rules=NTLM_OVER_HTTP, store=tmp_path / "queue.db") as manager:
        both = visits(origin, manager)
        for _ in range(2):
            await both.prepare(owner=owner, credentials=[login(SERVER, NTLM)])
        assert [await both.run(n) for n in (0, 1, 0)] == [{1}, {1}, {1}]
        assert len(origin.door.logins) == 1


async def test_one_owner_with_two_explicit_credentials_never_shares(tmp_path, visits):
    owner = account()
    async with Origin(door=Door("NTLM")) as origin, bits.BitsManager(auth_rules=NTLM_OVER_HTTP, store=tmp_path / "queue.db") as manager:
        both = visits(origin, manager)
        await both.prepare(owner=owner, credentials=[login(SERVER, NTLM, ALICE)])
        await both.prepare(owner=owner, credentials=[login(SERVER, NTLM, HELPER)])
        first, second = await both.run(0), await both.run(1)
        assert first.isdisjoint(second)
        assert (await both.run(0), await both.run(1)) == (first, second), "each goes on where it was"
        assert_one_user_per_connection(origin)
        assert {user for _, _, user in origin.door.logins} == {ALICE, HELPER}


async def test_two_tokens_of_one_name_never_share(tmp_path, visits):
    async with Origin(door=Door("NTLM")) as origin, bits.BitsManager(auth_rules=NTLM_OVER_HTTP, store=tmp_path / "queue.db") as manager:
        both = visits(origin, manager)
        for _ in range(2):
            await both.prepare(owner=account(), credentials=[AuthCredentials(SERVER, NTLM, None, None)])
        assert both.jobs[0].owner_name == both.jobs[1].owner_name
        assert (await both.run(0)).isdisjoint(await both.run(1))


async def test_the_owner_and_the_helper_of_one_job_never_share(tmp_path, visits):
    async with Origin(door=Door("NTLM")) as origin, bits.BitsManager(auth_rules=NTLM_OVER_HTTP, store=tmp_path / "queue.db") as manager:
        owner, job = account(ALICE), visits(origin, manager)
        await job.prepare(owner=owner, credentials=[AuthCredentials(SERVER, NTLM, None, None)])
        seen, helper = [await job.run(0)], account(HELPER)
        with bits.impersonate(owner):
            options = await job.jobs[0].token_options()
        with bits.impersonate(helper):
            await options.set_helper_token()
            await options.set_helper_token_flags(HelperTokenFlags.NETWORK)
        with bits.impersonate(helper):  # another file is the helper's own to add (T8)
            seen.append(await job.run(0))
        assert seen[0].isdisjoint(seen[1])
        assert_one_user_per_connection(origin)
        assert [user for _, _, user in origin.door.logins] == [ALICE, HELPER]


async def test_two_tls_settings_never_share(authority, tmp_path, visits):
    async with Origin(tls=authority.server) as origin:
        seen = []
        for number in range(2):
            async with bits.BitsManager(auth_rules=NTLM_OVER_HTTP, store=tmp_path / f"queue{number}.db", ssl=authority.client()) as manager:
                one = visits(origin, manager)
                await one.prepare()
                seen.append(await one.run(0))
        assert seen[0].isdisjoint(seen[1])


async def test_straight_and_by_a_proxy_never_share(tmp_path, visits):
    async with (
        Origin(door=Door("NTLM")) as origin,
        Proxy() as proxy,
        bits.BitsManager(auth_rules=NTLM_OVER_HTTP, store=tmp_path / "queue.db") as manager,
    ):
        both = visits(origin, manager)
        await both.prepare(credentials=[login(SERVER, NTLM)])
        await both.prepare(credentials=[login(SERVER, NTLM)], proxy=proxy.url)
        assert (await both.run(0)).isdisjoint(await both.run(1))


async def test_t19_a_request_of_b_is_never_sent_over_a_connection_logged_in_as_a(way, tmp_path):
    """Four identities, interleaved and at once, through one proxy: each connection has seen one user only, at both ends."""
    users = {rf"LAB\user{n}": f"Password-{n}" for n in range(4)}
    tokens = [Token.for_network(spnego.Password(*user)) for user in users.items()]
    async with Origin(door=Door("NTLM", users=users), tls=way.tls) as origin, Proxy(door=Door("NTLM", users=users)) as proxy:
        urls = [origin.serve(f"/{n}", BODY) for n in range(3)]
        async with bits.BitsManager(auth_rules=NTLM_OVER_HTTP, store=tmp_path / "queue.db", ssl=way.trust) as manager:
            jobs = []
            for number, token in enumerate(tokens):
                given = [AuthCredentials(target, NTLM, None, None) for target in AuthTarget]
                job = await make_job(manager, given, proxy=proxy.url, owner=token)
                for url in urls:
                    await job.add_file(url, tmp_path / f"{number}{url[-1]}")
                jobs.append(job)
            for job in jobs:
                await job.resume()
            await manager.join()
            assert {job.state for job in jobs} == {JobState.TRANSFERRED}
        for peer in (origin, proxy):
            assert_one_user_per_connection(peer)
            assert {user for _, _, user in peer.door.logins} == set(users)
        assert len(origin.passed) == 12


def assert_one_user_per_connection(peer: Server) -> None:
    users: dict[int, set[str | None]] = {}
    for seen in peer.passed:
        users.setdefault(seen.connection, set()).add(seen.user)
    assert users
    assert all(len(found) == 1 for found in users.values()), users


async def test_a_job_that_only_adds_credentials_leaves_the_transfers_of_its_owner_alone(tmp_path):
    """Concurrent downloads of one identity do not cut each other's connections."""
    async with Origin(door=Door("NTLM")) as origin, bits.BitsManager(auth_rules=NTLM_OVER_HTTP, store=tmp_path / "queue.db") as manager:
        hold = Hold(after=1000)
        url = origin.serve("/f", BODY)
        origin.fault("/f", Fault(hold=hold))
        first = await make_job(manager, [login(SERVER, NTLM)])
        await first.add_file(url, tmp_path / "first")
        await first.resume()
        await hold.reached.wait()
        await manager.download(url, tmp_path / "second", credentials=[login(SERVER, NTLM)])
        await manager.download(origin.serve("/g", BODY), tmp_path / "third", credentials=[login(SERVER, NTLM, HELPER)])
        hold.release()
        await first.wait()
        assert [seen.sent for seen in origin.passed if seen.target == "/f"] == [len(BODY)] * 2
        assert {seen.status for seen in origin.passed} == {200}


async def test_t25_a_replaced_credential_closes_its_connections_at_once(tmp_path, visits):
    async with Origin(door=Door("NTLM")) as origin, bits.BitsManager(auth_rules=NTLM_OVER_HTTP, store=tmp_path / "queue.db") as manager:
        one = visits(origin, manager)
        await one.prepare(credentials=[login(SERVER, NTLM)])
        await one.run(0)
        assert origin.open_connections == 1
        await one.jobs[0].set_credentials(SERVER, NTLM, HELPER, USERS[HELPER])
        await until(lambda: not origin.open_connections)
