"""The loopback peers are what the other tests take them for: seen with http.client, pyspnego and plain sockets alone."""

import asyncio
import base64
import contextlib
import hashlib
import http.client
import os
import re
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import blockbuster
import pytest
import spnego
from spnego.channel_bindings import GssChannelBindings

import bits_async
from examples.embedded import EmbeddedServers
from tests.peers import (
    HONEST,
    USERS,
    Authority,
    Door,
    Fault,
    Hold,
    Misbehaviour,
    Origin,
    Proxy,
    ServerTls,
    SilentKdc,
    answer,
    header_bomb,
    redirect,
)
from tests.waiting import until

BODY = bytes(range(256)) * 2000
ALICE, HELPER = USERS
SEATS = {401: ("WWW-Authenticate", "Authorization"), 407: ("Proxy-Authenticate", "Proxy-Authorization")}


class Client:
    """http.client on one connection, off the event loop; it answers challenges by the credentials it is given."""

    def __init__(self, url: str, *, proxy: Proxy | None = None, trust: ssl.SSLContext | None = None) -> None:
        self.url = url
        where = urlsplit(proxy.url if proxy else url)
        self.through = proxy is not None
        kind: Callable[..., http.client.HTTPConnection] = http.client.HTTPConnection
        if trust is not None:
            kind = lambda *args, **kwargs: http.client.HTTPSConnection(*args, context=trust, **kwargs)  # noqa: E731
        self.connection = kind("localhost", where.port, timeout=60)
        self.user: str | None = None
        self.password = ""
        self.protocol = "ntlm"
        self.binding: bytes | None = None

    def login(self, user: str, password: str, *, protocol: str = "ntlm", binding: bytes | None = None) -> "Client":
        self.user, self.password, self.protocol, self.binding = user, password, protocol, binding
        return self

    async def get(self, **headers: str) -> tuple[int, bytes, http.client.HTTPMessage]:
        return await asyncio.to_thread(self._get, headers)

    def _ask(self, headers: dict[str, str]) -> tuple[int, bytes, http.client.HTTPMessage]:
        path = urlsplit(self.url).path
        sent = {key.replace("_", "-"): value for key, value in headers.items()}
        self.connection.request("GET", self.url if self.through else path, headers=sent)
        reply = self.connection.getresponse()
        try:
            return reply.status, reply.read(), reply.headers
        except http.client.IncompleteRead as error:
            return reply.status, error.partial, reply.headers

    def _get(self, headers: dict[str, str]) -> tuple[int, bytes, http.client.HTTPMessage]:
        context: Any = None
        for _ in range(8):
            status, body, found = self._ask(headers)
            if status not in SEATS or self.user is None:
                return status, body, found
            ask, tell = SEATS[status]
            scheme, _, text = next(line for line in found.get_all(ask) or [] if line[:4] in ("NTLM", "Nego")).partition(" ")
            if context is None or not text:
                if context is not None:
                    return status, body, found
                bindings = GssChannelBindings(application_data=self.binding) if self.binding else None
                options = spnego.NegotiateOptions.none
                if self.protocol == "negotiate":
                    options = spnego.NegotiateOptions.use_negotiate | spnego.NegotiateOptions.use_ntlm
                context = spnego.client(self.user, self.password, "localhost", "HTTP", bindings, protocol=self.protocol, options=options)
            token = context.step(base64.b64decode(text) or None)
            headers = headers | {tell: f"{scheme} {base64.b64encode(token).decode()}"}
        raise AssertionError("a login without end")

    def close(self) -> None:
        self.connection.close()


@pytest.fixture
def client() -> Iterator[Callable[..., Client]]:
    with contextlib.ExitStack() as stack:

        def make(*args: Any, **kwargs: Any) -> Client:
            return stack.enter_context(contextlib.closing(Client(*args, **kwargs)))

        yield make


def digest_header(challenge: str, user: str, method: str, uri: str, nc: int = 1) -> str:
    given = dict(re.findall(r'(\w+)="?([^",]+)', challenge))
    name = "sha256" if given["algorithm"] == "SHA-256" else "md5"

    def h(*parts: str) -> str:
        return hashlib.new(name, ":".join(parts).encode()).hexdigest()

    response = h(h(user, given["realm"], USERS[user]), given["nonce"], f"{nc:08x}", "c", "auth", h(method, uri))
    shown = user.replace("\\", "\\\\")
    return (
        f'Digest username="{shown}", realm="{given["realm"]}", nonce="{given["nonce"]}", uri="{uri}", response="{response}", '
        f'algorithm={given["algorithm"]}, qop=auth, nc={nc:08x}, cnonce="c"'
    )


# -- the origin's files and faults


async def test_an_origin_obeys_range_and_if_range(client: Callable[..., Client]) -> None:
    async with Origin() as origin:
        one = client(origin.serve("/f", BODY, etag='"a"', last_modified=0))
        status, body, headers = await one.get()
        assert (status, body) == (200, BODY)
        assert (headers["ETag"], headers["Last-Modified"]) == ('"a"', "Thu, 01 Jan 1970 00:00:00 GMT")
        status, body, headers = await one.get(Range="bytes=10-19", If_Range='"a"')
        assert (status, body, headers["Content-Range"]) == (206, BODY[10:20], f"bytes 10-19/{len(BODY)}")
        assert (await one.get(Range="bytes=500000-"))[1] == BODY[500000:]
        assert (await one.get(Range="bytes=10-", If_Range='"b"'))[:2] == (200, BODY)
        status, _, headers = await one.get(Range=f"bytes={len(BODY)}-")
        assert (status, headers["Content-Range"]) == (416, f"bytes */{len(BODY)}")
        assert [seen.connection for seen in origin.requests] == [1] * 5
        assert [seen.range for seen in origin.passed][1:3] == ["bytes=10-19", "bytes=500000-"]
        assert (await client(origin.url("/other")).get())[0] == 404


@pytest.mark.parametrize("reset", [False, True])
async def test_a_cut_ends_one_connection_after_its_bytes_and_the_file_may_change_there(client: Callable[..., Client], reset: bool) -> None:
    async with Origin() as origin:
        url = origin.serve("/f", BODY, etag='"old"')
        origin.fault("/f", Fault(cut_after=1000, reset=reset, then=lambda: origin.serve("/f", BODY[::-1], etag='"new"')))
        if reset:
            with pytest.raises(ConnectionResetError):
                await client(url).get()
        else:
            assert (await client(url).get())[1] == BODY[:1000]
        assert origin.requests[0].sent == 1000
        status, body, headers = await client(url).get(Range="bytes=1000-", If_Range='"old"')
        assert (status, body, headers["ETag"]) == (200, BODY[::-1], '"new"')


async def test_faults_come_one_for_each_answer_or_always(client: Callable[..., Client]) -> None:
    async with Origin() as origin:
        url = origin.serve("/f", BODY, etag='"v2"')
        ask = {"Range": "bytes=5-9", "If_Range": '"v1"'}
        origin.fault("/f", HONEST, Fault(ignore_if_range=True), Fault(ignore_range=True), Fault(content_range="bytes 0-4/9"))
        one = client(url)
        assert (await one.get(**ask))[0] == 200
        assert (await one.get(**ask))[:2] == (206, BODY[5:10])
        assert (await one.get(Range="bytes=5-9"))[0] == 200
        assert (await one.get(Range="bytes=5-9"))[2]["Content-Range"] == "bytes 0-4/9"
        origin.always("/f", Fault(no_validator=True))
        for _ in range(2):
            assert "ETag" not in (await one.get())[2]


async def test_an_answer_may_be_chunked_endless_or_anything_else(client: Callable[..., Client]) -> None:
    async with Origin() as origin:
        url = origin.serve("/f", BODY)
        origin.fault("/f", Fault(chunked=True), Fault(close_delimited=True), redirect("http://elsewhere/"), answer(503, Retry_After="3"))
        status, body, headers = await client(url).get()
        assert (body, headers["Transfer-Encoding"]) == (BODY, "chunked")
        status, body, headers = await client(url).get()
        assert (body, headers["Content-Length"]) == (BODY, None)
        status, _, headers = await client(url).get()
        assert (status, headers["Location"]) == (302, "http://elsewhere/")
        status, _, headers = await client(url).get()
        assert (status, headers["Retry-After"]) == (503, "3")
        origin.fault("/f", header_bomb(70_000))
        with pytest.raises(http.client.LineTooLong):
            await client(url).get()
        origin.fault("/f", Fault(raw=b"SMTP ready\r\n\r\n"))
        with pytest.raises(http.client.BadStatusLine):
            await client(url).get()


async def test_a_held_body_waits_for_the_test(client: Callable[..., Client]) -> None:
    async with Origin() as origin:
        url = origin.serve("/f", BODY)
        hold = Hold(after=3000)
        origin.fault("/f", Fault(hold=hold))
        running = asyncio.create_task(client(url).get())
        await until(hold.reached.is_set)
        assert origin.requests[0].sent == 3000
        assert not running.done()
        hold.release()
        assert (await running)[1] == BODY


async def test_a_slow_body_keeps_its_rate(client: Callable[..., Client]) -> None:
    async with Origin() as origin:
        url = origin.serve("/f", BODY[:20_000])
        origin.fault("/f", Fault(rate=100_000))
        loop = asyncio.get_running_loop()
        started = loop.time()
        await client(url).get()
        assert loop.time() - started > 0.15


async def test_connections_can_be_dropped_and_refused(client: Callable[..., Client]) -> None:
    async with Origin() as origin:
        one = client(origin.serve("/f", BODY))
        await one.get()
        origin.drop_connections()
        with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
            await one.get()
        origin.close_handshakes = 1
        with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
            await client(one.url).get()
        assert (await client(one.url).get())[0] == 200


# -- doors


@pytest.mark.parametrize("scheme", ["NTLM", "Negotiate"])
async def test_ntlm_authenticates_the_connection_and_no_other(client: Callable[..., Client], scheme: str) -> None:
    async with Origin(door=Door(scheme)) as origin:
        url = origin.serve("/f", BODY)
        alice = client(url).login(ALICE, USERS[ALICE], protocol=scheme.lower())
        assert (await alice.get())[1] == BODY
        alice.user = None
        assert (await alice.get(Range="bytes=1-2"))[0] == 206
        assert (await client(url).get())[0] == 401
        assert [(seen.user, seen.connection) for seen in origin.passed] == [(ALICE, 1), (ALICE, 1)]
        assert origin.door
        assert origin.door.logins == [(1, scheme, ALICE)]
        wrong = client(url).login(ALICE, "wrong", protocol=scheme.lower())
        assert (await wrong.get())[0] == 401


async def test_basic_and_digest_know_right_from_wrong(client: Callable[..., Client]) -> None:
    async with Origin(door=Door("Basic", "Digest")) as origin:
        one = client(origin.serve("/f", BODY))
        challenges = (await one.get())[2].get_all("WWW-Authenticate") or []
        assert [line.split()[0] for line in challenges] == ["Basic", "Digest", "Digest"]
        right = base64.b64encode(f"{ALICE}:{USERS[ALICE]}".encode()).decode()
        assert (await one.get(Authorization=f"Basic {right}"))[0] == 200
        assert (await one.get(Authorization="Basic d3Jvbmc6"))[0] == 401
        for challenge in challenges[1:]:
            status, _, headers = await one.get(Authorization=digest_header(challenge, HELPER, "GET", "/f"))
            assert status == 200
            assert 'rspauth="' in headers["Authentication-Info"]
            again = await one.get(Authorization=digest_header(challenge, HELPER, "GET", "/f"))
            assert again[0] == 401, "the same count twice is a replay"
            assert "stale=true" in str(again[2].get_all("WWW-Authenticate"))
            assert (await one.get(Authorization=digest_header(challenge, HELPER, "GET", "/f", nc=2)))[0] == 200
            assert (await one.get(Authorization=digest_header(challenge, HELPER, "GET", "/g", nc=3)))[0] == 401
        assert [seen.user for seen in origin.passed] == [ALICE, *[HELPER] * 4]


async def test_a_door_misbehaves_as_it_is_told(client: Callable[..., Client]) -> None:
    ways = Misbehaviour(one_line=True, refusal_body=100_000, refusal_chunked=True, close_first=1)
    async with Origin(door=Door("NTLM", "Basic", misbehave=ways)) as origin:
        one = client(origin.serve("/f", BODY))
        status, body, headers = await one.get()
        assert (status, len(body), headers["Connection"]) == (401, 100_000, "close")
        assert headers.get_all("WWW-Authenticate") == ['NTLM, Basic realm="lab", charset="UTF-8"']
        assert (await one.get())[2]["Connection"] is None

    async with Origin(door=Door("NTLM", misbehave=Misbehaviour(close_legs=1))) as origin:
        two = client(origin.serve("/f", BODY)).login(ALICE, USERS[ALICE])
        assert (await two.get())[0] == 401, "the leg's answer came on a connection that ended"
        assert (await two.get())[0] == 200

    async with Origin(door=Door("NTLM", misbehave=Misbehaviour(endless=True))) as origin:
        three = client(origin.serve("/f", BODY)).login(ALICE, USERS[ALICE])
        with pytest.raises(AssertionError, match="without end"):
            await three.get()

    async with Origin(door=Door("Negotiate", misbehave=Misbehaviour(wrong_final=True))) as origin:
        four = client(origin.serve("/f", BODY)).login(ALICE, USERS[ALICE], protocol="negotiate")
        assert (await four.get())[2]["WWW-Authenticate"].startswith("Negotiate ")


async def test_a_door_with_a_binding_wants_the_token_bound_to_its_certificate(client: Callable[..., Client], authority: Authority) -> None:
    tls = authority.server
    async with Origin(door=Door("NTLM", binding=tls.binding), tls=tls) as origin:
        url = origin.serve("/f", BODY)
        for binding, status in ((tls.binding, 200), (authority.issue().binding, 401), (None, 401)):
            one = client(url, trust=authority.client()).login(ALICE, USERS[ALICE], binding=binding)
            assert (await one.get())[0] == status


# -- the proxy


async def test_a_proxy_forwards_and_keeps_both_seats_logins_apart(client: Callable[..., Client]) -> None:
    async with Origin(door=Door("NTLM")) as origin, Proxy(door=Door("NTLM", users={HELPER: USERS[HELPER]})) as proxy:
        url = origin.serve("/f", BODY)
        helper = client(url, proxy=proxy).login(HELPER, USERS[HELPER])
        status, _, headers = await helper.get()
        assert (status, headers["Proxy-Support"]) == (401, "Session-Based-Authentication")
        assert (await helper.login(ALICE, USERS[ALICE]).get())[1] == BODY
        assert [seen.user for seen in origin.passed] == [ALICE]
        assert {seen.user for seen in proxy.passed} == {HELPER}
        assert proxy.door
        assert len(proxy.door.logins) == 1
        assert all(seen.header("Proxy-Authorization") is None for seen in origin.requests)


async def test_a_proxy_that_pools_its_connections_breaks_ntlm_and_does_not_claim_otherwise(client: Callable[..., Client]) -> None:
    async with Origin(door=Door("NTLM")) as origin, Proxy(session_based=False) as proxy:
        one = client(origin.serve("/f", BODY), proxy=proxy).login(ALICE, USERS[ALICE])
        status, _, headers = await one.get()
        assert status == 401
        assert headers["Proxy-Support"] is None
        assert origin.connections > 1


async def test_a_tunnel_carries_tls_and_can_be_cut(client: Callable[..., Client], authority: Authority) -> None:
    async with Origin(tls=authority.server) as origin, Proxy() as proxy:
        url = origin.serve("/f", BODY)
        for cut in (None, 200_000):
            proxy.forward_cut = cut
            tunnel = http.client.HTTPSConnection("localhost", proxy.port, timeout=60, context=authority.client())
            tunnel.set_tunnel("localhost", origin.port)
            one = client(url)
            one.connection = tunnel
            if cut is None:
                assert (await one.get())[1] == BODY
            else:
                with contextlib.suppress(OSError):  # TLS may see the missing end first
                    assert len((await one.get())[1]) < cut
            tunnel.close()
        assert [seen.target for seen in proxy.tunnels] == [f"localhost:{origin.port}"] * 2


def raw(port: int, text: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), 60) as opened:
        opened.sendall(text)
        return opened.recv(65536)


async def test_connect_may_be_answered_with_a_body_or_anything(client: Callable[..., Client]) -> None:
    async with Origin() as origin, Proxy(connect=Fault(body=b"hello")) as proxy:
        request = f"CONNECT localhost:{origin.port} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        assert (await asyncio.to_thread(raw, proxy.port, request)).endswith(b"Content-Length: 5\r\n\r\nhello")
        proxy.connect = answer(401, WWW_Authenticate="Basic")
        assert (await asyncio.to_thread(raw, proxy.port, request)).startswith(b"HTTP/1.1 401 ")
        proxy.connect = Fault(raw=b"HTTP/1.1 200 " + b"x" * 70_000)
        assert len(await asyncio.to_thread(raw, proxy.port, request)) > 10_000
        proxy.door = Door("Basic", misbehave=Misbehaviour(close_first=1))
        assert b"Proxy-Connection: close" in await asyncio.to_thread(raw, proxy.port, request)


# -- Kerberos at our own door, and silence


@pytest.mark.realm
async def test_a_kerberos_door_with_a_binding_refuses_a_token_without_one(
    client: Callable[..., Client], authority: Authority, kdc: Any
) -> None:
    import spnego

    def header(binding: bytes | None) -> str:
        bindings = GssChannelBindings(application_data=binding) if binding else None
        credential = spnego.KerberosCCache(kdc.ccache("alice"), kdc.principal("alice"))
        context = spnego.client(credential, hostname="localhost", service="HTTP", channel_bindings=bindings, protocol="kerberos")
        return "Negotiate " + base64.b64encode(context.step() or b"").decode()

    tls: ServerTls = authority.server
    door = Door("Kerberos", keytab=kdc.keytab("HTTP/localhost"), binding=tls.binding)
    async with Origin(door=door, tls=tls) as origin:
        one = client(origin.serve("/f", BODY), trust=authority.client())
        for binding, status in ((tls.binding, 200), (authority.issue().binding, 401), (None, 401)):
            assert (await one.get(Authorization=header(binding)))[0] == status
        assert [seen.user for seen in origin.passed] == ["alice@BITS.TEST"]


def test_the_silent_kdc_takes_a_connection_and_says_nothing(silent_kdc: SilentKdc) -> None:
    with socket.create_connection(("127.0.0.1", silent_kdc.port), 60) as opened:
        opened.sendall(b"\0\0\0\1?")
        opened.settimeout(0.1)
        with pytest.raises(TimeoutError):
            opened.recv(1)
    assert str(silent_kdc.port) in Path(os.environ["KRB5_CONFIG"]).read_text()


# -- the servers of the examples


def test_the_embedded_servers_authenticate_cut_once_and_remember_who_came() -> None:
    with EmbeddedServers(USERS, size=1_000_000, cut_after=300_000) as servers:
        port = urlsplit(servers.proxy_url).port
        parts = []
        for wanted in ("bytes=0-", "bytes=300000-"):
            with contextlib.closing(Client(servers.origin_url)) as one:
                one.connection, one.through = http.client.HTTPConnection("localhost", port, timeout=60), True
                assert one.login(HELPER, USERS[HELPER])._get({})[0] == 401
                status, body, _ = one.login(ALICE, USERS[ALICE])._get({"Range": wanted})
            assert status == 206
            parts.append(body)
        assert len(parts[0]) == 300_000
        assert hashlib.sha256(b"".join(parts)).hexdigest() == servers.sha256
        log = servers.log()
        assert [line["range"] for line in log if line["user"] == ALICE] == ["bytes=0-", "bytes=300000-"]
        assert {line["user"] for line in log if line["server"] == "proxy"} == {None, HELPER}
        assert "NTLM_USER_FILE" not in os.environ
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("localhost", port or 0), 60)


# -- what conftest promises


async def test_a_call_of_the_package_that_blocks_the_loop_is_an_error() -> None:
    inside: dict[str, Any] = {}
    exec(compile("import time\ndef block(): time.sleep(0)", f"{bits_async.__path__[0]}/blocks.py", "exec"), inside)
    with pytest.raises(blockbuster.BlockingError):
        inside["block"]()


@pytest.mark.parametrize("what", ["a thread", "a descriptor", "a task"])
def test_whatever_is_left_behind_fails_the_test(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.setattr("tests.conftest.LEAK_PATIENCE", 0.1)
    leak = {
        "a thread": "threading.Thread(target=time.sleep, args=(30,), daemon=True, name='forgotten').start()",
        "a descriptor": "os.open('/dev/null', os.O_RDONLY)",
        "a task": "kept.append(asyncio.create_task(asyncio.sleep(30), name='forgotten'))",
    }[what]
    pytester.makeini("[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\n")
    pytester.makeconftest("from tests.conftest import no_leaks")
    pytester.makepyfile(f"import asyncio, os, threading, time\nkept = []\nasync def test_it(no_leaks):\n    {leak}\n")
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*left behind: *"])


async def test_peers_and_their_acceptors_leave_nothing_behind(no_leaks: None, client: Callable[..., Client]) -> None:
    async with Origin(door=Door("NTLM")) as origin, Proxy() as proxy:
        one = client(origin.serve("/f", BODY), proxy=proxy).login(ALICE, USERS[ALICE])
        assert (await one.get())[0] == 200
        one.close()


@pytest.mark.privileged
def test_local_users_are_real_and_own_their_homes(users: Any) -> None:
    import pwd

    for name, user in users.items():
        assert user.uid >= 20001
        assert pwd.getpwnam(name).pw_uid == user.uid
        assert user.home.stat().st_mode & 0o777 == 0o700
        assert user.owns(user.home)
    assert len({user.uid for user in users.values()}) == 3


@pytest.mark.privileged
def test_a_second_run_shares_the_users_and_the_last_one_removes_them(users: Any) -> None:
    from tests.local_users import local_users

    with local_users() as again:
        assert again == users
    assert users["bitsalice"].home.is_dir(), "the first run still uses them"
