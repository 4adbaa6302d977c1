"""Hostile peers, by the public API: what they do not get, what they cannot make us do, and what the error says.

Where a peer draws things out, the test also sees that nothing of us is left, and that it took no longer than it was given.
"""

import asyncio
import contextlib
import os
import socket
import ssl
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import spnego

import bits_async as bits
from bits_async import AuthCredentials, AuthScheme, AuthTarget, ErrorCode, ErrorContext, JobPriority, JobState, Timeouts, Token
from bits_async.identity import kernel
from tests.peers import USERS, Door, Fault, Misbehaviour, Origin, Proxy, Server, ServerTls, answer, header_bomb, redirect
from tests.realms import write_krb5_conf
from tests.rules import NTLM_OVER_HTTP
from tests.waiting import until

ALICE, HELPER = USERS
BODY = os.urandom(100_000)
SERVER, PROXY = AuthTarget
HTTP_401, HTTP_407 = 0x80190191, 0x80190197
MIB = 1 << 20
QUICK = Timeouts(connect=0.5, response=0.5, idle=0.5, auth=0.5)  # where a peer that answers at all is not the point
QUICKER_THAN = 25.0  # seconds: less than the defaults, more than a busy machine makes of half a second


@pytest.fixture(autouse=True)
def private_state(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def login(target: AuthTarget, scheme: AuthScheme, user: str = ALICE) -> AuthCredentials:
    return AuthCredentials(target, scheme, user, USERS[user])


def every_login() -> list[AuthCredentials]:
    """All that could be asked for."""
    return [login(target, scheme) for target in AuthTarget for scheme in AuthScheme]


def shown(server: Server) -> list[str]:
    """All answers to challenges that reached this peer."""
    headers = [seen.header(name) for seen in server.requests for name in ("Authorization", "Proxy-Authorization")]
    return [value for value in headers if value]


async def fetch(
    tmp_path: Path,
    url: str,
    credentials: Iterable[AuthCredentials] = (),
    *,
    proxy: str | None = None,
    owner: Token | None = None,
    ssl: ssl.SSLContext | None = None,
    timeouts: Timeouts = Timeouts(),  # noqa: B008 - a frozen value
) -> bytes:
    """One attempt, by a queue's job."""
    async with bits.BitsManager(auth_rules=NTLM_OVER_HTTP, store=tmp_path / "queue.db", ssl=ssl, timeouts=timeouts) as manager:
        job = await manager.create_job("hostile", priority=JobPriority.FOREGROUND, owner=owner)
        await job.set_no_progress_timeout(0)
        await job.set_proxy_settings(bits.ProxySettings.override(proxy) if proxy else bits.ProxySettings.no_proxy())
        await job.add_file(url, tmp_path / "f")
        for given in credentials:
            await job.set_credentials(given.target, given.scheme, given.user_name, given.password)
        await job.resume()
        try:
            await job.wait()
        except bits.BitsError:
            assert job.state is JobState.ERROR
            await job.cancel()
            assert [path.name for path in tmp_path.iterdir() if "bits-part" in path.name] == []
            raise
        (path,) = await job.complete()
        return path.read_bytes()


async def failure(*args: Any, **kwargs: Any) -> bits.BitsError:
    with pytest.raises(bits.BitsError) as caught:
        await fetch(*args, **kwargs)
    assert not caught.value.message.startswith("a defect"), caught.value
    return caught.value


class Connection:
    """One connection of a `Raw`, from its side."""

    def __init__(self, peer: "Raw", reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.peer, self.reader, self.writer = peer, reader, writer
        self.number = peer.connections

    async def request(self) -> bytes:
        head = await self.reader.readuntil(b"\r\n\r\n")
        self.peer.requests.append(head)
        return head

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()
        self.peer.written += len(data)

    async def pour(self, data: bytes, *, limit: int = 400 * MIB) -> None:
        """The same bytes for ever, or until nobody takes them any more."""
        while self.peer.written < limit:
            await self.send(data)

    async def drip(self, data: bytes) -> None:
        """A byte now and then."""
        for byte in data:
            await self.send(bytes([byte]))
            await asyncio.sleep(0.05)


Talk = Callable[[Connection], Awaitable[None]]


class Raw:
    """A peer that says byte for byte what it likes: `talk` is run for each connection."""

    def __init__(self, talk: Talk | bytes, *, tls: ServerTls | None = None) -> None:
        self._talk, self._tls = talk, tls
        self.connections = self.written = 0
        self.requests: list[bytes] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "Raw":
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=self._tls.context if self._tls else None)
        self.base_url = f"{'https' if self._tls else 'http'}://localhost:{self._server.sockets[0].getsockname()[1]}"
        self.url = f"{self.base_url}/f"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0)

    @property
    def shown(self) -> list[bytes]:
        return [head for head in self.requests if b"authorization:" in head.lower()]

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._tasks.add(asyncio.get_running_loop().create_task(self._run(Connection(self, reader, writer))))

    async def _run(self, connection: Connection) -> None:
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                if isinstance(self._talk, bytes):
                    await connection.request()
                    await connection.send(self._talk)
                    if connection.writer.can_write_eof():
                        connection.writer.write_eof()
                    await connection.reader.read()
                else:
                    await self._talk(connection)
        finally:
            connection.writer.transport.abort()


def head(status: str, *headers: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, "", ""]).encode("latin-1")


@contextlib.contextmanager
def little_memory(most: int = 40 * MIB):
    """What Python allocates inside never grows above this."""
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < most


NOTHING_LEFT = pytest.mark.usefixtures("no_leaks")


# -- redirects -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["Basic", "Digest", "NTLM", "Negotiate"])
@pytest.mark.parametrize("asks", [False, True], ids=["open", "asking"])
async def test_t19_a_redirect_to_another_origin_gets_no_explicit_credentials(authority, tmp_path, word, asks):
    """Neither unasked (Basic and Digest go ahead of the challenge on their own origin) nor in answer to a challenge."""
    async with (
        Origin(door=Door(word), tls=authority.server) as first,
        Origin(door=Door(word) if asks else None, tls=authority.server) as second,
    ):
        first.serve("/f", BODY)
        second.serve("/f", BODY)
        first.always("/f", redirect(second.url("/f")))
        if asks:
            error = await failure(tmp_path, first.url("/f"), [login(SERVER, AuthScheme[word.upper()])], ssl=authority.client())
            assert error.code == HTTP_401
            assert "given for other hosts" in str(error)
            assert str(second.port) in str(error)
        else:
            got = await fetch(tmp_path, first.url("/f"), [login(SERVER, AuthScheme[word.upper()])], ssl=authority.client())
            assert got == BODY
        assert len(first.passed) == 1, "the first origin was shown the credentials"
        assert len(second.requests) == 1
        assert shown(second) == []


async def test_t19_a_redirect_to_another_origin_gets_no_implicit_credentials(tmp_path):
    owner = Token.for_network(spnego.Password(ALICE, USERS[ALICE]))
    async with Origin(door=Door("Negotiate")) as first, Origin(door=Door("Negotiate", "NTLM")) as second:
        first.serve("/f", BODY)
        second.serve("/f", BODY)
        first.always("/f", redirect(second.url("/f")))
        with pytest.raises(bits.AuthFailed, match="given for other hosts"):
            await bits.download(first.url("/f"), tmp_path / "f", owner=owner, auth_rules=NTLM_OVER_HTTP)
        assert {seen.user for seen in first.passed} == {ALICE}
        assert shown(second) == []


async def test_t19_a_redirect_through_the_proxy_keeps_the_proxys_login_and_gives_the_new_origin_nothing(tmp_path):
    async with Origin(door=Door("NTLM")) as first, Origin(door=Door("NTLM")) as second, Proxy(door=Door("NTLM")) as proxy:
        first.serve("/f", BODY)
        second.serve("/f", BODY)
        first.always("/f", redirect(second.url("/f")))
        given = [login(SERVER, AuthScheme.NTLM), login(PROXY, AuthScheme.NTLM, HELPER)]
        error = await failure(tmp_path, first.url("/f"), given, proxy=proxy.url)
        assert error.code == HTTP_401
        assert shown(second) == []
        assert {user for _, _, user in proxy.door.logins} == {HELPER}


async def test_t22_behind_a_proxy_the_machines_own_name_gets_nothing_of_the_processs_own(tmp_path, monkeypatch):
    """The proxy connects back to this machine; no address tells us, but the name does."""
    monkeypatch.setattr("socket.gethostname", lambda: "Box.corp.example")
    async with Origin(door=Door("Negotiate")) as origin, Proxy() as proxy:
        url = origin.serve("/f", BODY).replace("localhost", "box.corp.example")
        given = [bits.AuthCredentials(SERVER, AuthScheme.NEGOTIATE, None, None)]
        error = await failure(tmp_path, url, given, proxy=proxy.url)
        assert "not sent to this machine (box.corp.example)" in str(error)
        assert shown(origin) == []
        assert len(origin.requests) == 1


async def test_a_redirect_to_another_host_of_the_same_address_is_another_origin(tmp_path):
    async with Origin(door=Door("NTLM")) as origin:
        url = origin.serve("/f", BODY)
        origin.always("/f", redirect(url.replace("localhost", "127.0.0.1")))
        error = await failure(tmp_path, url, [login(SERVER, AuthScheme.NTLM)])
        assert "given for other hosts" in str(error)
        assert len(origin.door.logins) == 1


async def test_a_redirect_from_https_to_http_is_refused(authority, tmp_path):
    async with Origin(tls=authority.server) as secure, Origin() as plain:
        secure.serve("/f", BODY)
        plain.serve("/f", BODY)
        secure.always("/f", redirect(plain.url("/f")))
        error = await failure(tmp_path, secure.url("/f"), ssl=authority.client())
        assert (error.code, error.context) == (ErrorCode.ERROR_WINHTTP_REDIRECT_FAILED, ErrorContext.REMOTE_FILE)
        assert "https to http" in str(error)
        assert not error.transient
        assert plain.connections == 0


async def test_a_redirect_loop_and_a_redirect_without_end_are_ended(tmp_path):
    async with Origin() as origin:
        for path in ("/a", "/b", "/self"):
            origin.serve(path, BODY)
        origin.always("/a", redirect(origin.url("/b")))
        origin.always("/b", redirect(origin.url("/a")))
        origin.always("/self", redirect("self"))
        for path, asked in (("/a", 2), ("/self", 1)):
            before = len(origin.requests)
            error = await failure(tmp_path, origin.url(path))
            assert error.code == ErrorCode.ERROR_WINHTTP_REDIRECT_FAILED
            assert not error.transient
            assert len(origin.requests) - before == asked

    numbers = iter(range(1000))

    async def onward(connection: Connection) -> None:
        while await connection.request():
            await connection.send(head("302 Found", f"Location: /{next(numbers)}", "Content-Length: 0"))

    async with Raw(onward) as peer:
        error = await failure(tmp_path, peer.url)
        assert error.code == ErrorCode.ERROR_WINHTTP_REDIRECT_FAILED
        assert len(peer.requests) == 11


# -- proxies -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tls", [False, True], ids=["http", "connect"])
@pytest.mark.parametrize("schemes", [[AuthScheme.BASIC], list(AuthScheme)], ids=["basic", "everything"])
async def test_t25_a_proxy_that_offers_only_basic_over_http_gets_nothing(authority, tmp_path, tls, schemes):
    async with Origin(tls=authority.server if tls else None) as origin, Proxy(door=Door("Basic")) as proxy:
        given = [login(target, scheme) for target in AuthTarget for scheme in schemes]
        error = await failure(tmp_path, origin.serve("/f", BODY), given, proxy=proxy.url, ssl=authority.client())
        assert isinstance(error, bits.AuthFailed)
        assert (error.code, error.transient) == (HTTP_407, False)
        assert "without TLS" in str(error)
        assert shown(proxy) == []
        assert len(proxy.requests) == 1
        assert origin.requests == []


async def test_t25_a_proxy_that_passes_itself_off_as_the_origin_gets_only_what_the_origin_may_see(tmp_path):
    """A 401 by the proxy on plain http cannot be told from the origin's; Basic is not shown to it, and nobody gets the proxy's login."""
    answers = head("401 Unauthorized", 'WWW-Authenticate: Basic realm="x"', "Content-Length: 0")
    async with Raw(answers) as proxy:
        error = await failure(tmp_path, "http://intranet.example/f", every_login(), proxy=proxy.base_url)
        assert error.code == HTTP_401
        assert proxy.shown == []


TUNNEL = b"HTTP/1.1 200 Connection established\r\n"


@pytest.mark.parametrize(
    "said",
    [
        TUNNEL + b"Content-Length: 5\r\n\r\nhello",
        TUNNEL + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        TUNNEL + b"\r\n" + b"\x16\x03\x03\x00\x7a",
        TUNNEL + b"\r\nHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil",
    ],
    ids=["length", "chunked", "tls", "answer"],
)
async def test_t26_bytes_after_the_head_of_an_answer_to_connect_are_an_error(authority, tmp_path, said):
    """Whatever its length headers say: a tunnel's answer has no body, and what stands there was not said by the origin."""
    async with Raw(said) as proxy:
        error = await failure(tmp_path, "https://origin.example/f", every_login(), proxy=proxy.base_url, ssl=authority.client())
        assert (error.code, error.context) == (ErrorCode.BG_E_INVALID_SERVER_RESPONSE, ErrorContext.GENERAL_TRANSPORT)
        assert "bytes follow" in str(error)
        assert b"evil" not in str(error).encode()


async def test_the_length_of_a_tunnels_answer_means_nothing(authority, tmp_path):
    """Some proxies say Content-Length: 0, or more, without sending a byte; the tunnel stands."""
    connect = Fault(headers=(("Content-Length", "5000"),))
    async with Origin(tls=authority.server) as origin, Proxy(connect=connect) as proxy:
        assert await fetch(tmp_path, origin.serve("/f", BODY), proxy=proxy.url, ssl=authority.client()) == BODY


@pytest.mark.parametrize("status", [403, 502, 503, 500])
async def test_a_refused_tunnel_is_no_tunnel_whatever_its_body_says(authority, tmp_path, status):
    async with Proxy(connect=answer(status, b"<h1>\x1b[31mclick here</h1>" * 1000)) as proxy:
        error = await failure(tmp_path, "https://origin.example/f", proxy=proxy.url, ssl=authority.client())
        assert error.http_status == status
        assert error.context is ErrorContext.GENERAL_TRANSPORT
        assert "click" not in str(error)


# -- heads that are too large, or broken ---------------------------------------------------------------------------------------------------


async def test_a_head_below_64_kib_passes(tmp_path):
    async with Origin() as origin:
        origin.always("/f", header_bomb(60_000))
        assert await fetch(tmp_path, origin.serve("/f", BODY)) == BODY
        origin.always("/f", header_bomb(1000, lines=60))
        assert await fetch(tmp_path, origin.url("/f")) == BODY


@pytest.mark.parametrize(
    ("size", "lines"), [(65_536, 1), (70_000, 1), (1_000_000, 1), (10_000, 8), (500, 1000), (1, 20_000)], ids=lambda n: f"{n}"
)
async def test_t26_a_head_above_64_kib_is_refused_with_a_clear_error(tmp_path, size, lines):
    async with Origin() as origin:
        origin.always("/f", header_bomb(size, lines=lines))
        error = await failure(tmp_path, origin.serve("/f", BODY))
        assert (error.code, error.context) == (ErrorCode.BG_E_TOO_LARGE, ErrorContext.REMOTE_FILE)
        assert "head is too large" in str(error)
        assert "bbbb" not in str(error)
        assert not error.transient


@pytest.mark.parametrize("size", [60_000, 70_000])
async def test_t26_a_head_of_connect_obeys_the_same_bound(authority, tmp_path, size):
    async with Origin(tls=authority.server) as origin, Proxy(connect=header_bomb(size)) as proxy:
        url = origin.serve("/f", BODY)
        if size < 65_536:
            assert await fetch(tmp_path, url, proxy=proxy.url, ssl=authority.client()) == BODY
        else:
            error = await failure(tmp_path, url, proxy=proxy.url, ssl=authority.client())
            assert (error.code, error.context) == (ErrorCode.BG_E_TOO_LARGE, ErrorContext.GENERAL_TRANSPORT)


@NOTHING_LEFT
@pytest.mark.parametrize("at", ["origin", "connect"])
@pytest.mark.parametrize(
    "stuff",
    [b"X" * 65536, b"X: " + b"y" * 8000 + b"\r\n", b"X-Small: 1\r\n" * 1000, b"HTTP/1.1 100 Continue\r\n\r\n" * 1000],
    ids=["one-name", "large-lines", "small-lines", "interim"],
)
async def test_t26_a_head_without_end_costs_little_memory_and_ends_the_connection(authority, tmp_path, at, stuff):
    async def talk(connection: Connection) -> None:
        await connection.request()
        if not stuff.startswith(b"HTTP"):
            await connection.send(b"HTTP/1.1 200 OK\r\n")
        await connection.pour(stuff)

    async with Raw(talk) as peer:
        with little_memory():
            if at == "origin":
                error = await failure(tmp_path, peer.url)
            else:
                error = await failure(tmp_path, "https://origin.example/f", proxy=peer.base_url, ssl=authority.client())
        assert error.code == ErrorCode.BG_E_TOO_LARGE  # interim answers count together with the head that they go before
        assert peer.written < 32 * MIB


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5, 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: xchunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: +5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: 0x5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999999\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length : 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX: a\x00b\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nX: a\rContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nno colon here\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/9.9 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"ICY 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 2000 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"\x00\x01\x02\x03" * 100,
        b"SSH-2.0-OpenSSH_9.2\r\n",
    ],
    ids=lambda said: said.decode("latin-1")[9:70].encode("unicode_escape").decode(),
)
async def test_t26_an_answer_whose_framing_can_be_read_in_two_ways_is_never_taken_for_a_file(tmp_path, said):
    async with Raw(said) as peer:
        error = await failure(tmp_path, peer.url)
        assert error.code in (ErrorCode.BG_E_INVALID_SERVER_RESPONSE, ErrorCode.BG_E_MISSING_FILE_SIZE)
        assert error.context is ErrorContext.REMOTE_FILE
        assert not error.transient
        assert "hello" not in str(error)
        assert not (tmp_path / "f").exists()


# -- line breaks ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad", ["/a\r\nX-Evil: 1", "/a\nX-Evil: 1", "/a\r", "/a\x00", "/a b", "/a\x7f", "/a\x85b", "/?q=\r\nGET /evil HTTP/1.1"], ids=repr
)
async def test_t23_a_url_with_line_breaks_is_refused_before_anything_is_sent(tmp_path, bad):
    async with Origin() as origin:
        with pytest.raises(bits.InvalidArgument) as caught:
            await bits.download(origin.base_url + bad, tmp_path / "f")
        assert "\r" not in str(caught.value)
        assert "\n" not in str(caught.value)
        assert origin.connections == 0


@pytest.mark.parametrize("bad", ["/x\r\nX-Evil: 1", "http://h\n.example/", "/a\x00b"], ids=repr)
async def test_t23_a_location_with_control_characters_is_no_place_to_go(tmp_path, bad):
    """Raw ones end the header or the connection; those that survive are refused. Escaped ones stay escaped."""
    said = b"HTTP/1.1 302 Found\r\nLocation: " + bad.encode() + b"\r\nContent-Length: 0\r\n\r\n"
    async with Raw(said) as peer:
        with pytest.raises(bits.BitsError):
            await fetch(tmp_path, peer.url)
        assert b"X-Evil" not in b"".join(peer.requests)


async def test_t23_escaped_line_breaks_in_a_redirect_stay_escaped(tmp_path):
    async with Origin() as origin:
        origin.serve("/f", BODY)
        origin.always("/f", redirect("/g%0d%0aX-Evil:%201"))
        origin.serve("/g%0d%0aX-Evil:%201", BODY)
        assert await fetch(tmp_path, origin.url("/f")) == BODY
        assert origin.requests[-1].target == "/g%0d%0aX-Evil:%201"
        assert origin.requests[-1].header("X-Evil") is None


@pytest.mark.parametrize(
    "challenge", ['Basic realm="a\rb"', 'Digest realm="x", nonce="a\x01b", qop="auth"', "NTLM \x00", 'Digest nonce="\x7f"'], ids=repr
)
async def test_t23_a_challenge_with_control_characters_is_not_answered(authority, tmp_path, challenge):
    """What is echoed in the answer must not carry what ends a line."""
    said = b"HTTP/1.1 401 no\r\nWWW-Authenticate: " + challenge.encode() + b"\r\nContent-Length: 0\r\n\r\n"
    async with Raw(said, tls=authority.server) as peer:
        await failure(tmp_path, peer.url, every_login(), ssl=authority.client())
        assert peer.shown == []


async def test_the_text_of_a_peer_reaches_the_error_without_control_characters(tmp_path):
    said = b"HTTP/1.1 404 \x1b[2J\xc2\x9b31mgone " + b"x" * 5000 + b"\r\nContent-Length: 0\r\n\r\n"
    async with Raw(said) as peer:
        error = await failure(tmp_path, peer.url)
        text = str(error)
        assert "\x1b" not in text
        assert "\x9b" not in text
        assert len(text) < 1000


# -- logins without end --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["Basic", "Digest", "NTLM", "Negotiate"])
@pytest.mark.parametrize("at", [SERVER, PROXY], ids=["origin", "proxy"])
async def test_t26_a_peer_that_answers_every_leg_with_a_new_challenge_is_given_up(authority, tmp_path, word, at):
    """A bounded number of legs, an error that is not transient, and no attempt more."""
    door = Door(word, misbehave=Misbehaviour(endless=True))
    doors = (door, None) if at is SERVER else (None, door)
    async with Origin(door=doors[0], tls=authority.server) as origin, Proxy(door=doors[1], tls=authority.issue()) as proxy:
        url, peer = origin.serve("/f", BODY), origin if at is SERVER else proxy
        error = await failure(tmp_path, url, [login(at, AuthScheme[word.upper()])], proxy=proxy.url, ssl=authority.client())
        assert isinstance(error, bits.AuthFailed)
        assert (error.transient, error.http_status) == (False, peer.seat.status)
        assert len(peer.requests) <= 7
        assert peer.passed == []


@pytest.mark.parametrize(
    "challenge",
    [
        "NTLM TlRMTVNTUAACAAAA",
        "NTLM " + "A" * 20_000,
        "NTLM !!!",
        'Digest realm="{n}", nonce="{n}", qop="auth"',
        'Digest realm="x", nonce="{n}", qop="auth", stale=true',
    ],
    ids=["short", "long", "no-base64", "new-realms", "stale-for-ever"],
)
async def test_t26_a_peer_that_invents_challenges_is_given_up(authority, tmp_path, challenge):
    """Broken tokens, tokens of any size, and a new realm each time: another realm would be another try of the password."""
    numbers = iter(range(1000))

    async def talk(connection: Connection) -> None:
        while await connection.request():
            text = challenge.replace("{n}", str(next(numbers)))
            await connection.send(head("401 again", f"WWW-Authenticate: {text}", "Content-Length: 0"))

    async with Raw(talk, tls=authority.server) as peer:
        error = await failure(tmp_path, peer.url, every_login(), ssl=authority.client())
        assert isinstance(error, bits.AuthFailed)
        assert not error.transient
        assert len(peer.requests) <= 7


async def test_t26_a_proxy_that_asks_for_one_seat_and_then_the_other_is_given_up(tmp_path):
    numbers = iter(range(1000))

    async def talk(connection: Connection) -> None:
        while await connection.request():
            number = next(numbers)
            seat, ask = ("401", "WWW-Authenticate") if number % 2 else ("407", "Proxy-Authenticate")
            challenge = f'{ask}: Digest realm="x", nonce="{number}", qop="auth", stale=true'
            await connection.send(head(f"{seat} again", challenge, "Content-Length: 0"))

    async with Raw(talk) as peer:
        given = [login(target, AuthScheme.DIGEST) for target in AuthTarget]
        error = await failure(tmp_path, "http://origin.example/f", given, proxy=peer.base_url)
        assert isinstance(error, bits.AuthFailed)
        assert not error.transient
        assert len(peer.requests) <= 24


@NOTHING_LEFT
@pytest.mark.parametrize("at", ["origin", "connect"])
@pytest.mark.parametrize(
    "framing", ["", "Transfer-Encoding: chunked", "Content-Length: 99999999999"], ids=["unframed", "chunked", "length"]
)
async def test_t26_a_challenge_with_an_endless_body_is_answered_on_another_connection(authority, tmp_path, at, framing):
    seat, ask = ("401", "WWW-Authenticate") if at == "origin" else ("407", "Proxy-Authenticate")
    challenge = [f'{ask}: Digest realm="x", nonce="abc", qop="auth"', *([framing] if framing else [])]

    async def talk(connection: Connection) -> None:
        if b"uthorization: Digest" in await connection.request():
            await connection.send(head("404 here it ends", "Content-Length: 0"))
            return
        await connection.send(head(f"{seat} no", *challenge))
        piece = b"z" * 65536
        await connection.pour(b"%x\r\n%b\r\n" % (len(piece), piece) if "chunked" in framing else piece)

    async with Raw(talk) as peer:
        with little_memory():
            if at == "origin":
                error = await failure(tmp_path, peer.url, [login(SERVER, AuthScheme.DIGEST)], timeouts=Timeouts(auth=5))
            else:
                given = [login(PROXY, AuthScheme.DIGEST)]
                proxied = {"proxy": peer.base_url, "ssl": authority.client(), "timeouts": Timeouts(auth=5)}
                error = await failure(tmp_path, "https://origin.example/f", given, **proxied)
        assert error.http_status == 404
        assert peer.connections == 2
        assert peer.written < 32 * MIB


@NOTHING_LEFT
@pytest.mark.parametrize("at", ["origin", "connect"])
async def test_t26_a_challenge_whose_body_drips_is_answered_when_its_time_is_over(authority, tmp_path, at):
    seat, ask = ("401", "WWW-Authenticate") if at == "origin" else ("407", "Proxy-Authenticate")

    async def talk(connection: Connection) -> None:
        if b"uthorization: Digest" in await connection.request():
            await connection.send(head("404 here it ends", "Content-Length: 0"))
            return
        await connection.send(head(f"{seat} no", f'{ask}: Digest realm="x", nonce="abc", qop="auth"', "Content-Length: 1000"))
        await connection.drip(b"z" * 1000)

    async with Raw(talk) as peer:
        began = time.monotonic()
        given, timeouts = [login(target, AuthScheme.DIGEST) for target in AuthTarget], Timeouts(auth=1)
        if at == "origin":
            error = await failure(tmp_path, peer.url, given, timeouts=timeouts)
        else:
            proxied = {"proxy": peer.base_url, "ssl": authority.client(), "timeouts": timeouts}
            error = await failure(tmp_path, "https://origin.example/f", given, **proxied)
        assert error.http_status == 404
        assert time.monotonic() - began < QUICKER_THAN


# -- bodies --------------------------------------------------------------------------------------------------------------------------------


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "bomb",
    [
        b"f" * 17 + b"\r\nx",
        b"f" * 100_000 + b"\r\n",
        b"ffffffffffffffff\r\n",
        b"-5\r\nhello\r\n0\r\n\r\n",
        b"5\r\nhelloXX5\r\nhello\r\n0\r\n\r\n",
        b"0x5\r\nhello\r\n0\r\n\r\n",
        b"\r\n5\r\nhello\r\n0\r\n\r\n",
        b"5;" + b"a" * 200_000 + b"\r\n",
    ],
    ids=["17-digits", "100K-digits", "2^64", "negative", "no-crlf", "0x", "empty", "long-extension"],
)
async def test_t26_a_chunk_bomb_is_no_file(tmp_path, bomb):
    async with Raw(CHUNKED + bomb) as peer:
        with little_memory():
            error = await failure(tmp_path, peer.url)
        assert error.code in (ErrorCode.BG_E_INVALID_SERVER_RESPONSE, ErrorCode.BG_E_CONNECTION_CLOSED)
        assert not (tmp_path / "f").exists()


@NOTHING_LEFT
@pytest.mark.parametrize(
    "stuff", [b"5;" + b"a" * 65536, b"0\r\n" + b"X: y\r\n" * 1000, b"00000000"], ids=["extension", "trailers", "zeros"]
)
async def test_t26_a_chunk_without_end_costs_little_memory_and_ends(tmp_path, stuff):
    begin, rest = (stuff[:2], stuff[2:]) if stuff.startswith(b"5;") else (stuff[:3], stuff[3:])

    async def talk(connection: Connection) -> None:
        await connection.request()
        await connection.send(CHUNKED + begin)
        await connection.pour(rest * (65536 // len(rest) or 1))

    async with Raw(talk) as peer:
        with little_memory():
            error = await failure(tmp_path, peer.url, timeouts=QUICK)
        assert error.code in (ErrorCode.BG_E_TOO_LARGE, ErrorCode.ERROR_WINHTTP_TIMEOUT)
        assert not (tmp_path / "f").exists()


@NOTHING_LEFT
async def test_t26_bytes_beyond_the_framed_body_are_not_of_the_file_nor_of_the_next_answer(tmp_path):
    poison = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"

    async def talk(connection: Connection) -> None:
        while await connection.request():
            await connection.send(head("200 OK", "Content-Length: 5") + b"right" + poison)

    async with Raw(talk) as peer, bits.BitsManager(auth_rules=NTLM_OVER_HTTP, store=tmp_path / "queue.db") as manager:
        job = await manager.create_job("two", priority=JobPriority.FOREGROUND)
        for number in range(3):
            await job.add_file(peer.url, tmp_path / f"{number}")
        await job.resume()
        await job.wait()
        assert {path.read_bytes() for path in await job.complete()} == {b"right"}


def claims(size: int) -> Talk:
    """The first bytes of a file that is said to be so large."""

    async def claim(connection: Connection) -> None:
        await connection.request()
        await connection.send(head("200 OK", 'ETag: "x"', f"Content-Length: {size}") + b"s" * 1000)
        await asyncio.Event().wait()

    return claim


@pytest.mark.parametrize(("limits", "most"), [(bits.Limits(disk_reserve=0), 32 << 20), (bits.Limits(disk_reserve=1 << 60), 0)])
async def test_t18_a_file_that_is_said_to_be_large_takes_a_step_of_it_or_what_the_reserve_leaves(tmp_path, limits, most, monkeypatch):
    monkeypatch.setattr(kernel, "is_memory", lambda fd: False)
    volume, slack = os.statvfs(tmp_path), 1 << 20
    async with (
        Raw(claims(volume.f_bavail * volume.f_frsize // 2)) as peer,
        bits.BitsManager(store=tmp_path / "queue.db", limits=limits) as manager,
    ):
        job = await manager.create_job("huge", priority=JobPriority.FOREGROUND)
        await job.add_file(peer.url, tmp_path / "f")
        await job.resume()
        await until(lambda: job.progress.bytes_transferred >= 1000)
        (part,) = tmp_path.glob(".f.*.bits-part")
        taken = part.stat().st_blocks * 512
        assert taken <= most + slack
        assert most == 0 or taken >= most, "the disk of the tests has that much"
        await job.cancel()
    assert not list(tmp_path.glob("*f*"))


async def test_t18_a_file_that_is_said_to_be_larger_than_the_disk_is_refused_at_once(tmp_path):
    async with Raw(claims(999_999_999_999_999_999)) as peer:
        error = await failure(tmp_path, peer.url)
    assert (error.code, error.context, error.transient) == (ErrorCode.ERROR_DISK_FULL, bits.ErrorContext.LOCAL_FILE, True)
    assert "999999999999999999 bytes are still to come, and it has room for" in str(error)
    assert not list(tmp_path.glob("*f*"))


# -- slow peers ----------------------------------------------------------------------------------------------------------------------------


async def silence(connection: Connection) -> None:
    await connection.reader.read()
    await asyncio.Event().wait()


async def dripping_head(connection: Connection) -> None:
    await connection.request()
    await connection.drip(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n" + b"X: y\r\n" * 1000)


async def dripping_interim(connection: Connection) -> None:
    """Each one is a whole answer, and none is the last."""
    await connection.request()
    while True:
        await connection.send(b"HTTP/1.1 102 Processing\r\n\r\n")
        await asyncio.sleep(0.05)


async def body_that_stops(connection: Connection) -> None:
    await connection.request()
    await connection.send(head("200 OK", "Content-Length: 5000"))  # a byte of it would be progress, and worth reconnecting
    await asyncio.Event().wait()


async def silence_after_the_tunnel(connection: Connection) -> None:
    await connection.request()
    await connection.send(TUNNEL + b"\r\n")
    await asyncio.Event().wait()


@NOTHING_LEFT
@pytest.mark.parametrize(
    ("at", "talk"),
    [
        ("origin", silence),
        ("origin", dripping_head),
        ("origin", dripping_interim),
        ("origin", body_that_stops),
        ("forward", dripping_head),
        ("connect", silence),
        ("connect", dripping_head),
        ("connect", silence_after_the_tunnel),
        ("tls", silence),
    ],
)
async def test_a_slow_peer_is_given_up_when_its_time_is_over(authority, tmp_path, at, talk):
    async with Raw(talk) as peer:
        url, proxy = {
            "origin": (peer.url, None),
            "forward": ("http://origin.example/f", peer.base_url),
            "connect": ("https://origin.example/f", peer.base_url),
            "tls": (peer.url.replace("http:", "https:"), None),
        }[at]
        began = time.monotonic()
        error = await failure(tmp_path, url, proxy=proxy, ssl=authority.client(), timeouts=QUICK)
        assert error.code == ErrorCode.ERROR_WINHTTP_TIMEOUT
        assert error.transient
        assert 0.4 < time.monotonic() - began < QUICKER_THAN


@NOTHING_LEFT
async def test_a_connection_that_is_reset_at_once_is_an_error_that_may_pass(tmp_path):
    async def reset(connection: Connection) -> None:
        sock = connection.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    async with Raw(reset) as peer:
        error = await failure(tmp_path, peer.url)
        assert isinstance(error, bits.NetworkError)
        assert error.code == ErrorCode.BG_E_CONNECTION_CLOSED


# -- cookies -------------------------------------------------------------------------------------------------------------------------------


async def test_t25_cookies_never_come_back(tmp_path):
    """Set by a challenge, by a redirect and by the file itself, on the very connection that is used again."""
    cookie = ("Set-Cookie", "session=tracked; Path=/")
    door = Door("NTLM", misbehave=Misbehaviour(refusal_headers=(cookie,)))
    async with Origin(door=door) as origin, bits.BitsManager(auth_rules=NTLM_OVER_HTTP, store=tmp_path / "queue.db") as manager:
        for path in ("/a", "/b", "/c"):
            origin.serve(path, BODY)
            origin.always(path, Fault(headers=(cookie,)))
        origin.fault("/a", Fault(status=302, headers=(("Location", "/b"), cookie)))
        job = await manager.create_job("cookies", priority=JobPriority.FOREGROUND)
        await job.set_credentials(SERVER, AuthScheme.NTLM, ALICE, USERS[ALICE])
        for path in ("/a", "/c"):
            await job.add_file(origin.url(path), tmp_path / path[1:])
        await job.resume()
        await job.wait()
        assert len(origin.requests) == 5
        assert {seen.header("Cookie") for seen in origin.requests} == {None}


# -- the process's own credentials ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def process_tickets(kdc, monkeypatch) -> str:
    """The process is logged on as alice."""
    monkeypatch.setenv("KRB5CCNAME", kdc.ccache("alice"))
    return kdc.principal("alice")


def own_credentials() -> list[AuthCredentials]:
    return [AuthCredentials(target, AuthScheme.NEGOTIATE, None, None) for target in AuthTarget]


@pytest.mark.realm
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "LOCALHOST.", "sub.localhost"])
async def test_t22_the_process_own_credentials_never_go_to_loopback(kdc, process_tickets, tmp_path, host):
    """A local listener that wants tokens to relay gets none, by whatever name it is called."""
    door = Door("Kerberos", keytab=kdc.keytab("HTTP/localhost"))
    async with Origin(door=door) as origin, Proxy() as proxy:
        origin.serve("/f", BODY)
        url = f"http://{host}:{origin.port}/f"
        error = await failure(tmp_path, url, own_credentials(), proxy=proxy.url)
        assert error.code == HTTP_401
        assert "process's own credentials" in str(error)
        assert shown(origin) == shown(proxy) == []


@pytest.mark.realm
async def test_t22_a_proxy_on_loopback_does_not_get_the_process_own_credentials_and_an_origin_elsewhere_does(
    kdc, process_tickets, tmp_path
):
    """The control: the same credentials, permission and tickets do log in at a host that is not loopback."""
    async with Origin(door=Door("Kerberos", keytab=kdc.keytab("HTTP/origin.bits.test"))) as origin:
        origin.serve("/f", BODY)
        url = f"http://origin.bits.test:{origin.port}/f"
        async with Proxy() as proxy:
            assert await fetch(tmp_path, url, own_credentials(), proxy=proxy.url) == BODY
            assert {seen.user for seen in origin.passed} == {process_tickets}
        async with Proxy(door=Door("Kerberos", keytab=kdc.keytab("HTTP/localhost"))) as proxy:
            error = await failure(tmp_path, url, own_credentials(), proxy=proxy.url)
            assert error.code == HTTP_407
            assert shown(proxy) == []


@pytest.mark.realm
async def test_the_process_own_credentials_are_never_sent_unless_they_were_asked_for(kdc, process_tickets, tmp_path):
    async with Origin(door=Door("Kerberos", keytab=kdc.keytab("HTTP/origin.bits.test"))) as origin, Proxy() as proxy:
        origin.serve("/f", BODY)
        with pytest.raises(bits.AuthFailed):
            await bits.download(f"http://origin.bits.test:{origin.port}/f", tmp_path / "f", proxy=proxy.url)
        assert shown(proxy) == []


# -- names that lead elsewhere -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def trusting_dns(kdc, monkeypatch, tmp_path) -> Path:
    """libkrb5 as it comes out of the box: it asks the DNS whom it talks to, forwards and backwards."""
    config = write_krb5_conf(tmp_path / "krb5.conf", {kdc.realm: kdc.port})
    text = config.read_text()
    text = text.replace("dns_canonicalize_hostname = false", "dns_canonicalize_hostname = true").replace("rdns = false", "rdns = true")
    assert text.count("= true") >= 2
    config.write_text(text)
    monkeypatch.setenv("KRB5_CONFIG", str(config))
    return config


@NOTHING_LEFT
@pytest.mark.realm
async def test_t21_a_ticket_for_the_name_that_dns_gives_is_not_sent_to_the_name_of_the_url(kdc, trusting_dns, tmp_path):
    """The address 127.0.0.1 is called localhost backwards, and there is a service of that name: its ticket stays here."""
    async with Origin(door=Door("Kerberos", keytab=kdc.keytab("HTTP/localhost"))) as origin:
        url = origin.serve("/f", BODY).replace("localhost", "127.0.0.1")
        owner = Token.for_network(spnego.KerberosKeytab(str(kdc.keytab("alice")), kdc.principal("alice")))
        with pytest.raises(bits.AuthFailed) as caught:
            await bits.download(url, tmp_path / "f", owner=owner)
        assert caught.value.code == ErrorCode.SEC_E_WRONG_PRINCIPAL
        assert "HTTP/localhost" in str(caught.value)
        assert "127.0.0.1" in str(caught.value)
        assert shown(origin) == []
        path = await bits.download(origin.url("/f"), tmp_path / "g", owner=owner)  # the control: under its own name it is
        assert path.read_bytes() == BODY


POISONED = """
import asyncio, sys
import spnego
import bits_async as bits

async def main(url, keytab, principal, path):
    owner = bits.Token.for_network(spnego.KerberosKeytab(keytab, principal))
    try:
        await bits.download(url, path, owner=owner, retry_for=0, proxy=bits.ProxySettings.no_proxy())
    except bits.BitsError as error:
        print(bits.ErrorCode(error.code).name)
        print(error)
    else:
        print("OK")

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.privileged
@pytest.mark.realm
@pytest.mark.parametrize(
    ("name", "outcome"), [("alias.bits.test", "SEC_E_WRONG_PRINCIPAL"), ("origin.bits.test", "OK")], ids=["alias", "itself"]
)
async def test_t21_a_name_that_resolves_to_another_canonical_name_never_gets_the_others_token(kdc, trusting_dns, tmp_path, name, outcome):
    """With canonicalisation and rdns on, in a mount namespace where alias.bits.test is another name of origin.bits.test."""
    hosts, script = tmp_path / "hosts", tmp_path / "poisoned.py"
    hosts.write_text("127.0.0.1 origin.bits.test alias.bits.test localhost\n")
    script.write_text(POISONED)
    async with Origin(door=Door("Kerberos", keytab=kdc.keytab("HTTP/origin.bits.test"))) as origin:
        origin.serve("/f", BODY)
        url = f"http://{name}:{origin.port}/f"
        inside = f'mount --bind "{hosts}" /etc/hosts && exec "$@"'
        command = [sys.executable, str(script), url, str(kdc.keytab("alice")), kdc.principal("alice"), str(tmp_path / "f")]
        child = await asyncio.create_subprocess_exec(
            *("unshare", "--mount", "--propagation", "private", "sh", "-c", inside, "sh", *command),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": os.getcwd()},
        )
        output = (await child.communicate())[0].decode()
        assert output.split("\n")[0] == outcome, output
        if outcome == "OK":
            assert {seen.user for seen in origin.passed} == {kdc.principal("alice")}
        else:
            assert "HTTP/origin.bits.test" in output
            assert name in output
            assert shown(origin) == []
            assert len(origin.requests) == 1


# -- what a redirect or a later proxy may not change


async def test_two_mirrors_with_one_etag_are_never_mixed(tmp_path: Path) -> None:
    """An ETag means something for its own resource; a redirect that leads elsewhere the second time leads to another file."""
    first, second = b"A" * 1_000_000, b"B" * 1_000_000
    async with Origin() as origin, Origin() as one, Origin() as other:
        origin.fault("/file", redirect(one.serve("/file", first, etag='"same"')), redirect(other.serve("/file", second, etag='"same"')))
        origin.always("/file", redirect(other.url("/file")))
        one.fault("/file", Fault(cut_after=500_000))
        path = await bits.download(origin.url("/file"), tmp_path / "file", proxy=bits.ProxySettings.no_proxy())
        assert path.read_bytes() in (first, second)


async def test_t19_a_proxy_set_after_the_first_resume_sees_no_login_to_a_plain_server(tmp_path: Path) -> None:
    async with Origin(door=Door("Digest")) as origin, Proxy() as proxy:
        url = origin.serve("/file", b"x" * 1000)
        async with bits.BitsManager(auth_rules=NTLM_OVER_HTTP, store=tmp_path / "q.db") as manager:
            job = await manager.create_job("later proxy")
            await job.set_proxy_settings(bits.ProxySettings.no_proxy())
            await job.add_file(url, tmp_path / "one")
            await job.set_credentials(AuthTarget.SERVER, AuthScheme.DIGEST, *next(iter(USERS.items())))
            await job.resume()
            await job.wait()
            await job.add_file(url, tmp_path / "two")
            await job.set_proxy_settings(bits.ProxySettings.override(proxy.url))
            await job.resume()
            with pytest.raises(bits.AuthFailed):
                await job.wait()
            assert [seen.header("Authorization") for seen in proxy.requests] == [None]
            await job.set_credentials(AuthTarget.SERVER, AuthScheme.DIGEST, *next(iter(USERS.items())))
            await job.resume()
            await job.wait()


# -- thieves near by -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def rebound_name(monkeypatch) -> str:
    """A name of the intranet that leads to this machine."""
    honest = socket.getaddrinfo
    name = "files.corp.test"

    def lie(host, *args, **kwargs):
        return honest("127.0.0.1" if host == name else host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", lie)
    return name


async def test_t22_a_name_that_leads_to_this_machine_does_not_get_the_processs_own_credentials(rebound_name, tmp_path):
    async with Origin(door=Door("Negotiate")) as origin:
        url = origin.serve("/f", BODY).replace("localhost", rebound_name)
        own = [bits.AuthCredentials(SERVER, AuthScheme.NEGOTIATE, None, None)]
        with pytest.raises(bits.AuthFailed, match="this machine"):
            await bits.download(url, tmp_path / "f", credentials=own)
        assert shown(origin) == []
        with pytest.raises(bits.AuthFailed) as caught:
            await bits.download(url, tmp_path / "f", credentials=own, auth_rules=bits.AuthRules(allow=bits.Hosts([rebound_name])))
        assert "this machine" not in str(caught.value), "listed, it is tried; the process has no ticket here"
        owner = Token.for_network(spnego.Password(ALICE, USERS[ALICE]))
        assert await bits.download(url, tmp_path / "f", owner=owner, auth_rules=NTLM_OVER_HTTP)
        assert {user for _, _, user in origin.door.logins} == {ALICE}


async def test_without_set_credentials_a_rule_may_show_the_tokens_own_to_the_intranet_and_to_no_redirect(tmp_path):
    owner = Token.for_network(spnego.Password(ALICE, USERS[ALICE]))
    rules = replace(NTLM_OVER_HTTP, implicit=bits.ImplicitCredentials.ON_ANY_CHALLENGE, intranet=bits.Hosts(["localhost"]))
    async with Origin(door=Door("NTLM")) as origin, Origin(door=Door("NTLM")) as second:
        url = origin.serve("/f", BODY)
        with pytest.raises(bits.AuthFailed):
            await bits.download(url, tmp_path / "f", owner=owner, credentials=(), auth_rules=NTLM_OVER_HTTP)
        assert shown(origin) == []
        assert await bits.download(url, tmp_path / "f", owner=owner, credentials=(), auth_rules=rules)
        assert {user for _, _, user in origin.door.logins} == {ALICE}
        second.serve("/g", BODY)
        origin.always("/g", redirect(second.url("/g")))
        with pytest.raises(bits.AuthFailed, match="given for other hosts"):
            await bits.download(origin.url("/g"), tmp_path / "g", owner=owner, credentials=(), auth_rules=rules)
        assert shown(second) == []
