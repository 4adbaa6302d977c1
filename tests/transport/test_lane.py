"""Right identity, right bytes: logins at both seats, whose connection it is, redirects, broken bodies, and that nothing is left open."""

import asyncio
import hashlib
import re
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import spnego
import trustme

from bits_async.auth.policy import AuthRules, AuthScheme, AuthTarget, Grant, Refusals
from bits_async.auth.policy import Origin as Place
from bits_async.auth.schemes import channel_binding
from bits_async.errors import (
    AuthFailed,
    BitsError,
    ErrorCode,
    ErrorContext,
    InvalidArgument,
    ManagerClosed,
    NetworkError,
    RemoteFileError,
    TokenRequired,
)
from bits_async.identity.threads import TokenExecutor
from bits_async.identity.tokens import Token
from bits_async.transport.answers import AlreadyComplete, Asked, FileChanged
from bits_async.transport.lane import DETACH_FROM, Lanes, Network, Party
from bits_async.transport.ranges import Detached, Validator
from bits_async.transport.timeouts import Timeouts
from bits_async.transport.tls import TlsSettings
from tests.rules import NTLM_OVER_HTTP, PEERS
from tests.transport.wire import (
    ALICE,
    BOB,
    CONTENT,
    Connection,
    Origin,
    Proxy,
    Request,
    Server,
    basic,
    digest,
    fetch,
    grant,
    nothing_left_over,
    ntlm,
)
from tests.waiting import DEADLINE, until

MakeParty = Callable[..., Party]
SERVER, PROXY = AuthTarget.SERVER, AuthTarget.PROXY


async def failure(call: Awaitable[Any]) -> BitsError:
    """The error of a fetch; what it keeps of other libraries' exceptions was scrubbed."""
    with pytest.raises(BitsError) as caught:
        await call
    error: BaseException | None = caught.value
    while error is not None:
        assert not type(error).__module__.startswith(("aiohttp", "h11", "spnego")), error
        for secret in (ALICE[1], BOB[1], "token=secret"):
            assert secret not in f"{error!r} {error} {vars(error)}"
        error = error.__cause__ or error.__context__
    return caught.value


def scripted(*answers: bytes | Callable[[Connection], Awaitable[None]]) -> Server:
    """An origin that gives these answers in turn, the last one for ever."""
    turn = iter(range(10_000))

    async def handle(connection: Connection) -> None:
        while (request := await connection.request()) is not None:
            server.log.append(request)
            answer = answers[min(next(turn), len(answers) - 1)]
            await (connection.send(answer) if isinstance(answer, bytes) else answer(connection))

    server = Server(handle)
    return server


def whole(body: bytes, *headers: str) -> bytes:
    return "\r\n".join(["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", 'ETag: "v1"', *headers, "", ""]).encode() + body


# -- the bytes that were asked for ---------------------------------------------------------------------------------------------


async def test_a_file_is_fetched_whole_and_in_parts_over_one_connection(lanes: Lanes, party: MakeParty) -> None:
    async with Origin() as origin:
        assert await fetch(lanes, party(), f"{origin.base}/file") == CONTENT
        async with lanes.get(party(), Asked(f"{origin.base}/file", 1000, 3000, Validator('"v1"', None, len(CONTENT)))) as body:
            assert (body.start, body.length, body.total) == (1000, 2000, len(CONTENT))
            assert body.validator.etag == '"v1"'
            assert body.url == f"{origin.base}/file"
            assert body.headers.get("etag") == '"v1"'
            assert await body.detach() is None
            assert b"".join([chunk async for chunk in body]) == CONTENT[1000:3000]
        first, second = origin.log
        assert first.connection == second.connection == 1
        assert first.get("Range") is None
        assert (second.get("Range"), second.get("If-Range")) == ("bytes=1000-2999", '"v1"')
        for request in origin.log:
            assert request.get("Accept-Encoding") == "identity"
            assert (request.get("User-Agent") or "").startswith("bits_async")
            assert request.get("Cookie") is request.get("Authorization") is None


async def test_lanes_are_a_network(lanes: Lanes) -> None:
    network: Network = lanes
    assert network is lanes


async def test_a_url_is_sent_as_it_stands(lanes: Lanes, party: MakeParty) -> None:
    async with Origin() as origin:
        path = "/a%2Fb/%7Euser/c+d?sig=a%2Bb%3D&x=%E4&y=1+2"
        await fetch(lanes, party(), origin.base + path)
        assert origin.log[0].target == path


@pytest.mark.parametrize("url", ["http://localhost:1/a\r\nX: y", "http://localhost:1/a b", "http://u:p@localhost:1/", "ftp://localhost/"])
async def test_a_url_that_would_smuggle_something_is_refused(lanes: Lanes, party: MakeParty, url: str) -> None:
    assert isinstance(await failure(fetch(lanes, party(), url)), InvalidArgument)


async def test_a_changed_and_a_complete_file_are_told_apart_from_errors(lanes: Lanes, party: MakeParty) -> None:
    async with scripted(whole(b"new", "X: y").replace(b'"v1"', b'"v2"')) as origin:
        with pytest.raises(FileChanged) as changed:
            await fetch_pinned(lanes, party(), f"{origin.base}/file", 2)
        assert changed.value.validator is not None
        assert changed.value.validator.etag == '"v2"'
    over = b"HTTP/1.1 416 Range\r\nContent-Range: bytes */3\r\nContent-Length: 0\r\n\r\n"
    async with scripted(over) as origin:
        with pytest.raises(AlreadyComplete) as complete:
            await fetch_pinned(lanes, party(), f"{origin.base}/file", 3)
        assert complete.value.total == 3


async def fetch_pinned(lanes: Lanes, who: Party, url: str, start: int) -> None:
    async with lanes.get(who, Asked(url, start, None, Validator('"v1"', None, 3))) as body:
        assert [chunk async for chunk in body]


async def test_an_error_says_who_and_where_without_the_query(lanes: Lanes, party: MakeParty) -> None:
    async with scripted(b"HTTP/1.1 404 Gone \r\nContent-Length: 5\r\n\r\nsorry") as origin:
        error = await failure(fetch(lanes, party(), f"{origin.base}/file?token=secret"))
        assert isinstance(error, RemoteFileError)
        assert (error.http_status, error.identity) == (404, Token.for_process().name)
        assert error.url == f"{origin.base}/file?…"
        await failure(fetch(lanes, party(), f"{origin.base}/file"))
        assert [request.connection for request in origin.log] == [1, 1], "a small error page does not cost the connection"


# -- bodies that go wrong ------------------------------------------------------------------------------------------------------


async def test_a_short_body_gives_what_came_and_then_a_transient_error(lanes: Lanes, party: MakeParty) -> None:
    async def short(connection: Connection) -> None:
        await connection.send(whole(CONTENT)[:-1000])
        connection.writer.close()

    async with scripted(short) as origin:
        got = b""

        async def read() -> None:
            nonlocal got
            async with lanes.get(party(), Asked(f"{origin.base}/file")) as body:
                async for chunk in body:
                    got += chunk
                    await asyncio.sleep(0.05)  # busy writing while the rest arrives and the connection breaks

        error = await failure(read())
        assert isinstance(error, NetworkError)
        assert (error.code, error.transient) == (ErrorCode.BG_E_CONNECTION_CLOSED, True)
        assert got == CONTENT[:-1000], "no byte that arrived is fetched twice"


async def test_a_body_cut_by_a_reset_is_a_transient_error(lanes: Lanes, party: MakeParty) -> None:
    async def reset(connection: Connection) -> None:
        await connection.send(whole(CONTENT)[:-1000])
        await asyncio.sleep(0.05)
        connection.cut()

    async with scripted(reset) as origin:
        error = await failure(fetch(lanes, party(), f"{origin.base}/file"))
        assert error.code == ErrorCode.BG_E_CONNECTION_CLOSED
        assert error.transient


@pytest.mark.parametrize(
    "body",
    [b"5\r\nhello\r\n", b"5\r\nhello\r\nxyz\r\nevil\r\n0\r\n\r\n", b"5\r\nhelloevil"],
    ids=["no end", "a bad size", "no end of a piece"],
)
async def test_broken_chunks_are_never_the_end_of_a_file(lanes: Lanes, party: MakeParty, body: bytes) -> None:
    async def chunked(connection: Connection) -> None:
        await connection.send(b'HTTP/1.1 200 OK\r\nETag: "v1"\r\nTransfer-Encoding: chunked\r\n\r\n' + body)
        connection.writer.close()

    async with scripted(chunked) as origin:
        error = await failure(fetch(lanes, party(), f"{origin.base}/file"))
        assert isinstance(error, NetworkError | RemoteFileError)


async def test_chunks_that_say_more_than_the_range_are_refused(lanes: Lanes, party: MakeParty) -> None:
    head = b'HTTP/1.1 206 Part\r\nETag: "v1"\r\nContent-Range: bytes 0-4/100\r\nTransfer-Encoding: chunked\r\n\r\n'
    async with scripted(head + b"9\r\nhelloevil\r\n0\r\n\r\n") as origin:
        got: list[bytes] = []

        async def read() -> None:
            async with lanes.get(party(), Asked(f"{origin.base}/file", 0, 5)) as body:
                got.extend([chunk async for chunk in body])

        error = await failure(read())
        assert error.code == ErrorCode.BG_E_INVALID_SERVER_RESPONSE
        assert b"".join(got) in (b"", b"hello")


async def test_silence_in_the_body_ends_after_the_idle_timeout_and_slow_writing_does_not(lanes: Lanes, party: MakeParty) -> None:
    async def stall(connection: Connection) -> None:
        await connection.send(whole(CONTENT)[: -len(CONTENT) // 2])
        await asyncio.sleep(3600)

    patience = Timeouts(connect=3600, response=3600, idle=0.2, auth=3600)
    async with scripted(whole(CONTENT), stall) as origin:
        async with lanes.get(party(timeouts=patience), Asked(f"{origin.base}/file")) as body:
            async for _ in body:
                await asyncio.sleep(0.5)  # our own slowness is not the server's silence
        error = await failure(fetch(lanes, party(timeouts=patience), f"{origin.base}/file"))
        assert (error.code, error.transient) == (ErrorCode.ERROR_WINHTTP_TIMEOUT, True)


async def test_a_head_that_never_comes_ends_after_the_response_timeout(lanes: Lanes, party: MakeParty) -> None:
    async def silent(connection: Connection) -> None:
        await asyncio.sleep(60)

    async with scripted(silent) as origin:
        error = await failure(fetch(lanes, party(timeouts=Timeouts(response=0.2)), f"{origin.base}/file"))
        assert (error.code, error.transient) == (ErrorCode.ERROR_WINHTTP_TIMEOUT, True)


async def test_leaving_a_body_early_closes_its_connection(lanes: Lanes, party: MakeParty) -> None:
    big = whole(bytes(8 << 20))
    async with scripted(big) as origin:
        async with lanes.get(party(), Asked(f"{origin.base}/file")) as body:
            async for _ in body:
                break
        await until(lambda: origin.open == 0)
        async with lanes.get(party(), Asked(f"{origin.base}/file")) as body:
            assert sum([len(chunk) async for chunk in body]) == 8 << 20
        assert len(origin.connections) == 2


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"".join(b"X%d: %s\r\n" % (i, b"x" * 1000) for i in range(100)) + b"Content-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nfile",
        b"HTTP/1.1 401 Who?\r\nContent-Length: 4\r\nContent-Length: 4\r\nWWW-Authenticate: NTLM\r\n\r\nwho?",
        b"SSH-2.0-OpenSSH_9.2p1\r\n\r\n",
    ],
    ids=["a large header", "many KiB", "many headers", "length and coding", "two lengths", "a length twice", "not HTTP"],
)
async def test_t26_header_bombs_and_double_framing_are_refused(lanes: Lanes, party: MakeParty, head: bytes) -> None:
    async with scripted(head) as origin:
        permitted = grant(origin, AuthScheme.NTLM, ALICE)
        error = await failure(fetch(lanes, party(permitted), f"{origin.base}/file"))
        assert error.code in (ErrorCode.BG_E_INVALID_SERVER_RESPONSE, ErrorCode.BG_E_TOO_LARGE)
        assert not error.transient
        assert len(origin.log) == 1


async def test_a_header_of_less_than_64_kib_passes(lanes: Lanes, party: MakeParty) -> None:
    """A Negotiate token with a large PAC is longer than what aiohttp allows by itself."""
    async with scripted(whole(b"file", "WWW-Authenticate: Negotiate " + "A" * 60_000)) as origin:
        assert await fetch(lanes, party(), f"{origin.base}/file") == b"file"


# -- logins at the origin ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
@pytest.mark.parametrize("word", ["NTLM", "Negotiate"])
async def test_ntlm_logs_in_once_per_connection_and_all_legs_go_over_it(
    lanes: Lanes, party: MakeParty, server_tls: ssl.SSLContext, word: str, tls: bool
) -> None:
    legs: list[int] = []
    async with Origin(ntlm(word, legs), tls=server_tls if tls else None) as origin:
        permitted = grant(origin, AuthScheme.NTLM if word == "NTLM" else AuthScheme.NEGOTIATE, ALICE)
        for _ in range(3):
            assert await fetch(lanes, party(permitted), f"{origin.base}/file") == CONTENT
        assert legs == [1, 1]
        assert len(origin.connections) == 1
        assert origin.users == [r"DOM\alice"] * 3
        assert [request.get("Authorization") is not None for request in origin.log] == [False, True, True, False, False]


async def test_a_login_is_made_in_the_tokens_own_threads(lanes: Lanes, party: MakeParty) -> None:
    token = Token.for_network(spnego.Password(*ALICE))
    executor = TokenExecutor(token, name="security")
    async with Origin(ntlm()) as origin:
        who = party(Grant(SERVER, AuthScheme.NTLM, None, None, frozenset({origin.place})), token=token, security=executor)
        assert await fetch(lanes, who, f"{origin.base}/file") == CONTENT
        assert origin.users == [r"DOM\alice"]
    await executor.aclose()


@pytest.mark.parametrize("algorithm", ["MD5", "SHA-256"])
async def test_digest_uses_a_nonce_again_and_takes_a_new_one_when_it_is_stale(lanes: Lanes, party: MakeParty, algorithm: str) -> None:
    async with Origin(digest(*ALICE, algorithm=algorithm)) as origin:
        for _ in range(5):
            assert await fetch(lanes, party(grant(origin, AuthScheme.DIGEST, ALICE)), f"{origin.base}/a%20b?x=y") == CONTENT
        assert origin.users == [r"DOM\alice"] * 5
        assert len(origin.log) == 7, "one challenge at first, one when the nonce had been used three times"


async def test_digest_goes_on_unasked_over_the_next_connection_too(lanes: Lanes, party: MakeParty) -> None:
    async with Origin(digest(*ALICE)) as origin:
        who = party(grant(origin, AuthScheme.DIGEST, ALICE))
        await fetch(lanes, who, f"{origin.base}/file")
        origin.connections[0].writer.close()
        await until(lambda: origin.open == 0)
        await fetch(lanes, who, f"{origin.base}/file")
        assert [request.connection for request in origin.log] == [1, 1, 2]


async def test_basic_is_refused_over_http_unless_asked_and_sent_over_tls(
    lanes: Lanes, party: MakeParty, server_tls: ssl.SSLContext
) -> None:
    async with Origin(basic("alice", "pw")) as origin:
        permitted = grant(origin, AuthScheme.BASIC, ("alice", "pw"))
        error = await failure(fetch(lanes, party(permitted), f"{origin.base}/file"))
        assert isinstance(error, AuthFailed)
        assert not error.transient
        assert all(request.get("Authorization") is None for request in origin.log)
        asked_for = party(permitted, rules=AuthRules(basic_over_http=frozenset(AuthTarget), ntlm_over_http=PEERS))
        assert await fetch(lanes, asked_for, f"{origin.base}/file") == CONTENT
    async with Origin(basic("alice", "pw"), tls=server_tls) as origin:
        who = party(grant(origin, AuthScheme.BASIC, ("alice", "pw")))
        for _ in range(2):
            assert await fetch(lanes, who, f"{origin.base}/file") == CONTENT
        assert [request.get("Authorization") is None for request in origin.log] == [True, False, False]


async def test_a_challenge_without_permission_is_an_error_that_says_what_was_asked(lanes: Lanes, party: MakeParty) -> None:
    async with Origin(ntlm()) as origin:
        error = await failure(fetch(lanes, party(), f"{origin.base}/file"))
        assert isinstance(error, AuthFailed)
        assert "NTLM" in error.message
        assert error.http_status == 401
        assert error.url == f"{origin.base}/file"
        assert len(origin.log) == 1


@pytest.mark.parametrize("size", [0, 20_000, 4 << 20])
async def test_a_401_with_a_body_of_any_size_does_not_block_the_login(lanes: Lanes, party: MakeParty, size: int) -> None:
    legs: list[int] = []
    async with Origin(ntlm(legs=legs), refusal=b"x" * size) as origin:
        assert await fetch(lanes, party(grant(origin, AuthScheme.NTLM, ALICE)), f"{origin.base}/file") == CONTENT
        assert legs == [1, 1]


async def test_t26_a_401_with_an_endless_body_costs_its_connection(lanes: Lanes, party: MakeParty) -> None:
    async def endless(connection: Connection) -> None:
        await connection.send(b"HTTP/1.1 401 Who?\r\nWWW-Authenticate: NTLM\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(4 * 128):
            await connection.send(b"10000\r\n" + b"x" * 65536 + b"\r\n")
        pytest.fail("read far beyond the limit")

    async with scripted(endless, b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n") as origin:
        error = await failure(fetch(lanes, party(grant(origin, AuthScheme.NTLM, ALICE)), f"{origin.base}/file"))
        assert error.http_status == 403
        assert [request.connection for request in origin.log] == [1, 2]


async def test_t26_a_slow_401_is_given_up_with_its_connection(lanes: Lanes, party: MakeParty) -> None:
    async def slow(connection: Connection) -> None:
        await connection.send(b"HTTP/1.1 401 Who?\r\nWWW-Authenticate: NTLM\r\nContent-Length: 100\r\n\r\nx")

    async with scripted(slow, b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n") as origin:
        who = party(grant(origin, AuthScheme.NTLM, ALICE), timeouts=Timeouts(auth=0.2))
        assert (await failure(fetch(lanes, who, f"{origin.base}/file"))).http_status == 403
        assert [request.connection for request in origin.log] == [1, 2]


async def test_t26_challenges_without_end_end(lanes: Lanes, party: MakeParty) -> None:
    async def again(connection: Connection, request: Request, ask: str, answer: str) -> list[str] | None:
        nonce = len(origin.log)
        return [f'{ask}: Digest realm="r", qop="auth", nonce="{nonce}", stale=true']

    async with Origin(again) as origin:
        error = await failure(fetch(lanes, party(grant(origin, AuthScheme.DIGEST, ALICE)), f"{origin.base}/file"))
        assert isinstance(error, AuthFailed)
        assert not error.transient
        assert len(origin.log) <= 8


async def test_t26_a_refused_password_is_not_offered_again_by_any_lane(party: MakeParty) -> None:
    """Three jobs with an old password must not lock the account."""
    refusals = Refusals()
    legs: list[int] = []
    async with Origin(ntlm(legs=legs)) as origin:
        wrong = party(grant(origin, AuthScheme.NTLM, (ALICE[0], "old password")))
        lanes = Lanes(refusals=refusals)
        for _ in range(3):
            assert isinstance(await failure(fetch(lanes, wrong, f"{origin.base}/file")), AuthFailed)
        await lanes.aclose()
        assert len(legs) == 2, "one handshake"
        again = Lanes(refusals=refusals)
        assert await fetch(again, party(grant(origin, AuthScheme.NTLM, ALICE)), f"{origin.base}/file") == CONTENT
        await again.aclose()


class HangingUp(Origin):
    """Closes the connection with each refusal, and shows another certificate on the next one."""

    ca: trustme.CA | None = None

    async def handle(self, connection: Connection) -> None:
        while (request := await connection.request()) is not None:
            self.log.append(request)
            assert self.gate is not None
            lines = await self.gate(connection, request, "WWW-Authenticate", "Authorization")
            if lines is None:
                await self.serve(connection, request)
            elif "TlR" in lines[0]:  # the second of NTLM's three messages
                await connection.answer(401, b"who?", *lines)
            else:
                if self.ca is not None and self.tls is not None:
                    self.ca.issue_cert("localhost").configure_cert(self.tls)
                await connection.answer(401, b"who?", *lines, "Connection: close")
                connection.writer.close()
                return


@pytest.mark.parametrize("certificates", [False, True], ids=["http", "changing certificates"])
@pytest.mark.parametrize(
    ("scheme", "gate", "legs"),
    [(AuthScheme.BASIC, basic(*ALICE), 1), (AuthScheme.DIGEST, digest(*ALICE), 1), (AuthScheme.NTLM, ntlm(), 2)],
    ids=["BASIC", "DIGEST", "NTLM"],
)
async def test_t26_a_peer_that_hangs_up_after_each_refusal_gets_a_password_once(
    party: MakeParty, ca: trustme.CA, scheme: AuthScheme, gate: Any, legs: int, certificates: bool
) -> None:
    """So do servers without keep-alive and old proxies: six tries of each job lock many an account."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("localhost").configure_cert(context)
    refusals = Refusals()
    async with HangingUp(gate, tls=context if certificates else None) as origin:
        origin.ca = ca
        rules = replace(NTLM_OVER_HTTP, basic_over_http=frozenset(AuthTarget))
        wrong = party(grant(origin, scheme, (ALICE[0].partition("\\")[2], "old password")), rules=rules)
        for _ in range(2):
            lanes = Lanes(refusals=refusals)
            error = await failure(fetch(lanes, wrong, f"{origin.base}/file"))
            await lanes.aclose()
            assert isinstance(error, AuthFailed), error
        assert len([request for request in origin.log if request.get("Authorization")]) == legs


async def test_close_in_the_middle_of_a_handshake_starts_it_again_at_most_twice(lanes: Lanes, party: MakeParty) -> None:
    class Closing(Origin):
        """Hangs up after its first `times` second legs."""

        times = 2

        async def handle(self, connection: Connection) -> None:
            while (request := await connection.request()) is not None:
                self.log.append(request)
                assert self.gate is not None
                lines = await self.gate(connection, request, "WWW-Authenticate", "Authorization")
                if lines is None:
                    await self.serve(connection, request)
                elif request.get("Authorization") and self.times:
                    self.times -= 1
                    await connection.answer(401, b"who?", *lines, "Connection: close")
                    connection.writer.close()
                    return
                else:
                    await connection.answer(401, b"who?", *lines)

    async with Closing(ntlm()) as origin:
        who = party(grant(origin, AuthScheme.NTLM, ALICE))
        assert await fetch(lanes, who, f"{origin.base}/file") == CONTENT
        assert len(origin.connections) == 3
    async with Closing(ntlm()) as origin:
        origin.times = 100
        error = await failure(fetch(lanes, party(grant(origin, AuthScheme.NTLM, ALICE)), f"{origin.base}/file"))
        assert isinstance(error, AuthFailed)
        assert not error.transient
        assert len({request.connection for request in origin.log}) == 3


async def test_a_kept_connection_that_was_closed_meanwhile_costs_a_new_login_and_no_error(lanes: Lanes, party: MakeParty) -> None:
    class Forgetful(Origin):
        """Hangs up when a request comes over a connection that has served before."""

        async def serve(self, connection: Connection, request: Request) -> None:
            if connection.state.get("served"):
                connection.cut()
                return
            connection.state["served"] = True
            await super().serve(connection, request)

    legs: list[int] = []
    async with Forgetful(ntlm(legs=legs)) as origin:
        for _ in range(3):
            assert await fetch(lanes, party(grant(origin, AuthScheme.NTLM, ALICE)), f"{origin.base}/file") == CONTENT
        assert legs == [1, 1, 2, 2, 3, 3]


async def test_a_server_that_always_hangs_up_is_an_error_after_one_more_try(lanes: Lanes, party: MakeParty) -> None:
    async def cut(connection: Connection) -> None:
        connection.cut()

    async with scripted(whole(b"file"), cut) as origin:
        assert await fetch(lanes, party(), f"{origin.base}/file") == b"file"
        error = await failure(fetch(lanes, party(), f"{origin.base}/file"))
        assert (error.code, error.transient) == (ErrorCode.BG_E_CONNECTION_CLOSED, True)
        assert [request.connection for request in origin.log] == [1, 1, 2]


async def test_t25_a_407_from_an_origin_is_not_answered(lanes: Lanes, party: MakeParty) -> None:
    answer = b"HTTP/1.1 407 Who?\r\nProxy-Authenticate: NTLM\r\nWWW-Authenticate: NTLM\r\nContent-Length: 0\r\n\r\n"
    async with scripted(answer) as origin:
        grants = [grant(origin, AuthScheme.NTLM, ALICE, target) for target in (SERVER, PROXY)]
        error = await failure(fetch(lanes, party(*grants), f"{origin.base}/file"))
        assert error.http_status == 407
        assert error.context is ErrorContext.REMOTE_FILE
        assert not error.transient
        assert len(origin.log) == 1


# -- channel binding -----------------------------------------------------------------------------------------------------------


async def test_t24_the_first_token_is_bound_to_the_certificate_of_this_connection(
    lanes: Lanes, party: MakeParty, ca: trustme.CA, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An acceptor that enforces the binding accepts us; the same login over another certificate it would refuse."""
    certificate = ca.issue_cert("localhost")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    der = ssl.PEM_cert_to_DER_cert(certificate.cert_chain_pems[0].bytes().decode())
    make = spnego.server
    for binding, accepted in ((channel_binding(der), True), (b"tls-server-end-point:" + hashlib.sha256(b"other").digest(), False)):
        expected = spnego.channel_bindings.GssChannelBindings(application_data=binding)
        monkeypatch.setattr(spnego, "server", lambda expected=expected, **kw: make(channel_bindings=expected, **kw))
        async with Origin(ntlm(), tls=context) as origin:
            who = party(grant(origin, AuthScheme.NTLM, ALICE))
            if accepted:
                assert await fetch(lanes, who, f"{origin.base}/file") == CONTENT
            else:
                error = await failure(fetch(lanes, who, f"{origin.base}/file"))
                assert "TLS may be intercepted" in error.advice


async def test_t24_a_new_certificate_on_a_new_connection_gets_a_token_bound_to_it(
    lanes: Lanes, party: MakeParty, ca: trustme.CA, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind one name two machines with two certificates: the second login must not carry the binding of the first."""
    seen: list[bytes | None] = []
    monkeypatch.setattr("bits_async.transport.lane.channel_binding", lambda der: seen.append(der) or channel_binding(der))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("localhost").configure_cert(context)
    make = spnego.server

    def server(**kw: Any) -> Any:
        return make(channel_bindings=spnego.channel_bindings.GssChannelBindings(application_data=channel_binding(der)), **kw)

    monkeypatch.setattr(spnego, "server", server)
    async with Origin(ntlm(), tls=context) as origin:
        who = party(grant(origin, AuthScheme.NTLM, ALICE))
        for _ in range(2):
            certificate = ca.issue_cert("localhost")
            certificate.configure_cert(context)
            der = ssl.PEM_cert_to_DER_cert(certificate.cert_chain_pems[0].bytes().decode())
            assert await fetch(lanes, who, f"{origin.base}/file") == CONTENT
            origin.connections[-1].cut()
            await until(lambda: origin.open == 0)
        assert len(set(seen)) == 2


# -- through a proxy -----------------------------------------------------------------------------------------------------------


async def test_ntlm_at_a_forwarding_proxy_logs_in_once_and_keeps_its_connection(lanes: Lanes, party: MakeParty) -> None:
    legs: list[int] = []
    async with Origin() as origin, Proxy(ntlm(legs=legs)) as proxy:
        for _ in range(3):
            assert await fetch(lanes, party(grant(proxy, AuthScheme.NTLM, ALICE), via=proxy), f"{origin.base}/file?x=y") == CONTENT
        assert legs == [1, 1]
        assert len(proxy.connections) == 1
        assert proxy.users == [r"DOM\alice"] * 3
        assert all(request.target == f"{origin.base}/file?x=y" for request in proxy.log)
        assert all(request.get("Proxy-Authorization") is None for request in origin.log)


async def test_ntlm_at_a_tunnelling_proxy_all_legs_on_one_connection_and_one_tunnel_for_all_requests(
    lanes: Lanes, party: MakeParty, server_tls: ssl.SSLContext
) -> None:
    legs: list[int] = []
    async with Origin(tls=server_tls) as origin, Proxy(ntlm(legs=legs), refusal=b"x" * 100_000) as proxy:
        for _ in range(3):
            assert await fetch(lanes, party(grant(proxy, AuthScheme.NTLM, ALICE), via=proxy), f"{origin.base}/file") == CONTENT
        assert legs == [1, 1]
        assert [request.method for request in proxy.log] == ["CONNECT"] * 3
        assert proxy.users == [r"DOM\alice"]
        assert len(origin.connections) == 1


async def test_one_identity_for_the_origin_and_another_for_the_proxy_in_one_request(
    lanes: Lanes, party: MakeParty, server_tls: ssl.SSLContext
) -> None:
    for tls, scheme in ((server_tls, AuthScheme.NTLM), (None, AuthScheme.DIGEST)):
        gate = ntlm() if scheme is AuthScheme.NTLM else digest(*ALICE)
        async with Origin(gate, tls=tls) as origin, Proxy(ntlm()) as proxy:
            who = party(grant(origin, scheme, ALICE), grant(proxy, AuthScheme.NTLM, BOB), via=proxy)
            for _ in range(2):
                assert await fetch(lanes, who, f"{origin.base}/file") == CONTENT
            assert set(origin.users) == {r"DOM\alice"}
            assert set(proxy.users) == {r"DOM\bob"}


async def test_tls_to_the_proxy_and_to_the_origin_inside_it(lanes: Lanes, party: MakeParty, server_tls: ssl.SSLContext) -> None:
    async with Proxy(basic("alice", "pw"), tls=server_tls) as proxy:
        permitted = grant(proxy, AuthScheme.BASIC, ("alice", "pw"))
        for tls in (server_tls, None):
            async with Origin(tls=tls) as origin:
                for _ in range(2):
                    assert await fetch(lanes, party(permitted, via=proxy), f"{origin.base}/file") == CONTENT
                assert len(origin.connections) == 1


async def test_t25_basic_to_a_plain_proxy_is_refused_and_nothing_is_sent(
    lanes: Lanes, party: MakeParty, server_tls: ssl.SSLContext
) -> None:
    async with Origin() as plain, Origin(tls=server_tls) as secure, Proxy(basic("alice", "pw")) as proxy:
        for origin in (plain, secure):
            who = party(grant(proxy, AuthScheme.BASIC, ("alice", "pw")), via=proxy)
            error = await failure(fetch(lanes, who, f"{origin.base}/file"))
            assert isinstance(error, AuthFailed)
            assert error.context is ErrorContext.GENERAL_TRANSPORT
            assert error.http_status == 407
        assert all(request.get("Proxy-Authorization") is None for request in proxy.log)


async def test_t25_a_407_inside_a_tunnel_is_not_answered_and_the_proxys_header_never_enters_it(
    lanes: Lanes, party: MakeParty, server_tls: ssl.SSLContext
) -> None:
    async def impostor(connection: Connection, request: Request, ask: str, answer: str) -> list[str] | None:
        return ["Proxy-Authenticate: NTLM"]

    class Impostor(Origin):
        async def handle(self, connection: Connection) -> None:
            while (request := await connection.request()) is not None:
                self.log.append(request)
                await connection.answer(407, b"", "Proxy-Authenticate: NTLM", "Proxy-Authenticate: Digest")

    async with Impostor(tls=server_tls) as origin, Proxy(ntlm()) as proxy:
        error = await failure(fetch(lanes, party(grant(proxy, AuthScheme.NTLM, ALICE), via=proxy), f"{origin.base}/file"))
        assert error.http_status == 407
        assert error.context is ErrorContext.REMOTE_FILE
        assert len(origin.log) == 1
        assert not [name for name, _ in origin.log[0].headers if name.lower().startswith("proxy-")]


async def test_ntlm_at_an_origin_behind_a_forwarding_proxy_needs_the_proxys_promise(lanes: Lanes, party: MakeParty) -> None:
    legs: list[int] = []
    async with Origin(ntlm(legs=legs)) as origin, Proxy() as proxy:
        permitted = grant(origin, AuthScheme.NTLM, ALICE)
        error = await failure(fetch(lanes, party(permitted, via=proxy), f"{origin.base}/file"))
        assert isinstance(error, AuthFailed)
        assert "Session-Based-Authentication" in error.message
        assert not legs
        assert all(request.get("Authorization") is None for request in origin.log)
    async with Origin(ntlm(legs=legs)) as origin, Proxy(promise=True) as proxy:
        permitted = grant(origin, AuthScheme.NTLM, ALICE)
        for _ in range(2):
            assert await fetch(lanes, party(permitted, via=proxy), f"{origin.base}/file") == CONTENT
        assert len(legs) == 2
        assert origin.users == [r"DOM\alice"] * 2


async def test_without_the_promise_a_scheme_that_works_request_by_request_is_used_instead(lanes: Lanes, party: MakeParty) -> None:
    inner = digest(*ALICE)

    async def either(connection: Connection, request: Request, ask: str, answer: str) -> list[str] | None:
        lines = await inner(connection, request, ask, answer)
        return None if lines is None else [f"{ask}: Negotiate", f"{ask}: NTLM", *lines]

    async with Origin(either) as origin, Proxy() as proxy:
        grants = [grant(origin, scheme, ALICE) for scheme in (AuthScheme.NEGOTIATE, AuthScheme.NTLM, AuthScheme.DIGEST)]
        assert await fetch(lanes, party(*grants, via=proxy), f"{origin.base}/file") == CONTENT
        assert (origin.log[-1].get("Authorization") or "").startswith("Digest ")


async def test_a_forwarding_proxy_that_closes_after_asking_is_answered_on_a_new_connection(lanes: Lanes, party: MakeParty) -> None:
    class Closing(Proxy):
        async def attend(self, connection: Connection) -> None:
            while (request := await connection.request()) is not None:
                self.log.append(request)
                assert self.gate is not None
                lines = await self.gate(connection, request, "Proxy-Authenticate", "Proxy-Authorization")
                if lines is not None and request.get("Proxy-Authorization") is None:
                    await connection.answer(407, b"who?", *lines, "Proxy-Connection: close")
                elif lines is not None:
                    await connection.answer(407, b"who?", *lines)
                else:
                    await self.forward(connection, request)

    async with Origin() as origin, Closing(ntlm()) as proxy:
        who = party(grant(proxy, AuthScheme.NTLM, ALICE), via=proxy)
        assert await fetch(lanes, who, f"{origin.base}/file") == CONTENT
        assert [request.connection for request in proxy.log] == [1, 2, 2]


# -- whose connection it is ----------------------------------------------------------------------------------------------------


async def test_t19_a_request_of_b_is_never_sent_over_a_connection_logged_in_as_a(lanes: Lanes, party: MakeParty) -> None:
    """The first security property of the product: without it B would get what only A may see, and A's name would be in the log."""
    async with Origin(ntlm()) as origin:
        alice, bob = party(grant(origin, AuthScheme.NTLM, ALICE)), party(grant(origin, AuthScheme.NTLM, BOB))
        for who in (alice, bob, alice, bob):
            assert await fetch(lanes, who, f"{origin.base}/file") == CONTENT
        assert origin.users == [r"DOM\alice", r"DOM\bob"] * 2
        assert len(origin.connections) == 2
        assert isinstance(await failure(fetch(lanes, party(), f"{origin.base}/file")), AuthFailed)
        assert len(origin.connections) == 3, "who has nothing to show gets a connection that showed nothing"


async def test_two_tokens_of_one_name_never_share(lanes: Lanes, party: MakeParty) -> None:
    tokens = [Token.for_network(spnego.Password(*ALICE)) for _ in range(2)]
    assert tokens[0].name == tokens[1].name
    async with Origin(ntlm()) as origin:
        own = Grant(SERVER, AuthScheme.NTLM, None, None, frozenset({origin.place}))
        for token in (*tokens, *tokens):
            assert await fetch(lanes, party(own, token=token), f"{origin.base}/file") == CONTENT
        assert len(origin.connections) == 2


async def test_two_tls_settings_two_rules_and_two_routes_never_share(
    lanes: Lanes, party: MakeParty, server_tls: ssl.SSLContext, ca: trustme.CA
) -> None:
    other = ssl.create_default_context()
    ca.configure_trust(other)
    async with Origin(tls=server_tls) as origin, Proxy() as proxy:
        different = [
            party(),
            party(tls=TlsSettings(other)),
            party(rules=AuthRules(basic_over_http=frozenset(AuthTarget), ntlm_over_http=PEERS)),
            party(via=proxy),
        ]
        for who in different * 2:
            assert await fetch(lanes, who, f"{origin.base}/file") == CONTENT
        assert len(origin.connections) == 4


async def test_credentials_for_the_proxy_tell_lanes_apart_too(lanes: Lanes, party: MakeParty, server_tls: ssl.SSLContext) -> None:
    async with Origin(tls=server_tls) as origin, Proxy(ntlm()) as proxy:
        for name in (ALICE, BOB, ALICE, BOB):
            assert await fetch(lanes, party(grant(proxy, AuthScheme.NTLM, name), via=proxy), f"{origin.base}/file") == CONTENT
        assert proxy.users == [r"DOM\alice", r"DOM\bob"]
        assert len(origin.connections) == 2


async def test_permissions_for_others_do_not_tell_lanes_apart(lanes: Lanes, party: MakeParty) -> None:
    elsewhere = Grant(SERVER, AuthScheme.NTLM, *ALICE, frozenset({Place.of("https://elsewhere.example")}))
    async with Origin() as origin:
        for who in (party(), party(elsewhere)):
            await fetch(lanes, who, f"{origin.base}/file")
        assert len(origin.connections) == 1


@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
async def test_t26_bytes_behind_a_detached_body_cost_the_connection(
    lanes: Lanes, party: MakeParty, tls: bool, server_tls: ssl.SSLContext
) -> None:
    body = bytes(DETACH_FROM)
    origin = scripted(whole(body), whole(body) + b"HTTP/1.1 200 OK")
    origin.tls = server_tls if tls else None
    async with origin:
        for _ in range(3):
            async with lanes.get(party(), Asked(f"{origin.base}/file")) as got:
                detached = await got.detach()
                assert detached is not None
                await drained(detached, len(body))
                await asyncio.sleep(0.05)  # what is sent behind it has come too
                got.reattach(len(body))
        assert [request.connection for request in origin.log] == [1, 1, 2]


async def test_a_server_that_says_goodbye_behind_a_detached_body_is_not_asked_on_that_connection(
    lanes: Lanes, party: MakeParty, server_tls: ssl.SSLContext
) -> None:
    body = bytes(DETACH_FROM)

    async def last(connection: Connection) -> None:
        await connection.send(whole(body))
        connection.writer.close()

    origin = scripted(last)
    origin.tls = server_tls
    async with origin:
        for _ in range(2):
            async with lanes.get(party(), Asked(f"{origin.base}/file")) as got:
                detached = await got.detach()
                assert detached is not None
                await drained(detached, len(body))
                got.reattach(len(body))
        assert [request.connection for request in origin.log] == [1, 2]


async def test_a_lane_closed_while_its_body_is_read_elsewhere_ends_when_the_reader_does(
    lanes: Lanes, party: MakeParty, server_tls: ssl.SSLContext
) -> None:
    """Until then nobody else touches its TLS."""

    async def nearly_all(connection: Connection) -> None:
        await connection.send(whole(bytes(DETACH_FROM))[:-1])  # what has come can be read, though the connection was cut
        await connection.request()

    origin = scripted(nearly_all)
    origin.tls = server_tls
    async with origin, lanes.get(party(), Asked(f"{origin.base}/file")) as got:
        detached = await got.detach()
        assert detached is not None
        closing = asyncio.ensure_future(lanes.aclose())
        with pytest.raises((EOFError, ConnectionError)):
            await drained(detached, DETACH_FROM)  # the connection was cut at once
        assert not closing.done()
        got.reattach(0)
        await closing


@pytest.fixture
async def interactive_server(tmp_path: Path, ca: trustme.CA) -> AsyncIterator[tuple[asyncio.subprocess.Process, int]]:
    """openssl's own server, which sends what it is given and renews its keys on a line with K."""
    pem = tmp_path / "server.pem"
    ca.issue_cert("localhost", "127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(pem))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    command = ["stdbuf", "-o0", "openssl", "s_server", "-accept", f"127.0.0.1:{port}", "-cert", str(pem), "-key", str(pem), "-naccept", "1"]
    pipe = asyncio.subprocess.PIPE
    server = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.STDOUT)
    assert server.stdout is not None
    await asyncio.wait_for(server.stdout.readuntil(b"ACCEPT"), DEADLINE)
    yield server, port
    server.kill()
    await server.communicate()


async def test_keys_renewed_in_the_middle_of_a_detached_body(
    lanes: Lanes, party: MakeParty, interactive_server: tuple[asyncio.subprocess.Process, int]
) -> None:
    server, port = interactive_server
    assert server.stdin is not None
    assert server.stdout is not None
    half = DETACH_FROM
    head = whole(b"").replace(b"Content-Length: 0", b"Content-Length: %d" % (2 * half))

    async def answer() -> None:
        assert server.stdin is not None
        assert server.stdout is not None
        await server.stdout.readuntil(b"\r\n\r\n")
        server.stdin.write(head + b"a" * 10)

    answering = asyncio.ensure_future(answer())
    for last in (False, True):
        async with lanes.get(party(), Asked(f"https://localhost:{port}/file")) as got:
            await answering
            detached = await got.detach()
            assert detached is not None
            server.stdin.write(b"a" * (half - 10))
            await drained(detached, half)
            server.stdin.write(b"K\n")  # and the answer is asked for
            await asyncio.wait_for(server.stdout.readuntil(b"SSL_do_handshake"), DEADLINE)
            server.stdin.write(b"b" * half)
            await drained(replace(detached, already=b""), half)
            if not last:  # the next request is read with the keys that we answered with
                answering = asyncio.ensure_future(answer())
            got.reattach(2 * half)


async def drained(detached: Detached, length: int) -> None:
    connection, left = detached.socket, length - len(detached.already)
    buffer = memoryview(bytearray(1 << 20))
    while left:
        try:
            count = connection.recv_into(buffer[:left])  # type: ignore[attr-defined]
        except BlockingIOError:
            await asyncio.sleep(0.001)
            continue
        if not count:
            raise EOFError
        left -= count


async def test_t25_nothing_leaves_as_a_token_that_was_closed(lanes: Lanes, party: MakeParty) -> None:
    token = Token.for_network(spnego.Password(*ALICE))
    async with Origin() as origin:
        who = party(grant(origin, AuthScheme.DIGEST, ALICE), token=token)
        assert await fetch(lanes, who, f"{origin.base}/file") == CONTENT
        token.close()
        assert isinstance(await failure(fetch(lanes, who, f"{origin.base}/file")), TokenRequired)
        assert len(origin.log) == 1


async def test_t25_forget_closes_the_lanes_of_a_token_at_once_and_no_others(lanes: Lanes, party: MakeParty) -> None:
    tokens = [Token.for_network(spnego.Password(*ALICE)) for _ in range(2)]
    async with Origin(ntlm()) as origin:
        own = Grant(SERVER, AuthScheme.NTLM, None, None, frozenset({origin.place}))
        for token in tokens:
            await fetch(lanes, party(own, token=token), f"{origin.base}/file")
        async with lanes.get(party(own, token=tokens[0]), Asked(f"{origin.base}/file")) as busy:
            await lanes.forget(tokens[0])
            await until(lambda: origin.connections[0].gone)
            assert (await failure(busy.__anext__())).transient  # type: ignore[attr-defined]
        assert origin.open == 1
        await fetch(lanes, party(own, token=tokens[1]), f"{origin.base}/file")
        assert len(origin.connections) == 2
        await fetch(lanes, party(own, token=tokens[0]), f"{origin.base}/file")
        assert len(origin.connections) == 3


async def test_t25_a_body_that_only_its_end_frames_is_not_whole_when_its_lane_is_taken_away(lanes: Lanes, party: MakeParty) -> None:
    """Our own cut looks like the server's end of it."""

    async def handle(connection: Connection) -> None:
        await connection.request()
        await connection.send(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhalf")
        await asyncio.Event().wait()

    async with Server(handle) as origin:
        who = party()
        async with lanes.get(who, Asked(f"{origin.base}/file", dynamic=True)) as body:
            chunks = aiter(body)
            assert await anext(chunks) == b"half"
            rest = asyncio.ensure_future(failure(anext(chunks)))
            await asyncio.sleep(0)
            await lanes.forget(who.token)
            assert (await rest).transient


@pytest.mark.parametrize("farewell", [True, False])
async def test_over_tls_a_body_that_only_its_end_frames_is_whole_only_if_the_server_ended_it(
    lanes: Lanes, party: MakeParty, server_tls: ssl.SSLContext, farewell: bool
) -> None:
    """Anybody on the way can end TCP; TLS has a farewell of its own (RFC 9112, 9.8)."""

    async def handle(connection: Connection) -> None:
        await connection.request()
        await connection.send(b"HTTP/1.1 200 OK\r\n\r\nhalf")
        if not farewell:
            connection.cut()

    async def read(url: str) -> bytes:
        async with lanes.get(party(), Asked(url, dynamic=True)) as body:
            return b"".join([chunk async for chunk in body])

    async with Server(handle, tls=server_tls) as origin:
        if farewell:
            assert await read(f"{origin.base}/file") == b"half"
        else:
            error = await failure(read(f"{origin.base}/file"))
            assert (error.code, error.transient) == (ErrorCode.BG_E_CONNECTION_CLOSED, True)


async def test_a_connection_that_the_server_will_close_is_closed_when_its_answer_is_read(lanes: Lanes, party: MakeParty) -> None:
    async with scripted(whole(b"file", "Connection: close")) as origin:
        assert await fetch(lanes, party(), f"{origin.base}/file") == b"file"
        await until(lambda: origin.connections[0].gone)


@pytest.mark.parametrize(
    "odd",
    [
        b"101 Something else",
        b"204 No file\r\nContent-Length: 4",
        b"200 OK\r\nTransfer-Encoding: gzip, chunked",
        b"404 No file\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        b"404 No file\r\nContent-Length: " + b"0" * 5000,  # more digits than Python makes a number of
    ],
)
async def test_t26_an_answer_that_breaks_http_is_the_last_one_of_its_connection(lanes: Lanes, party: MakeParty, odd: bytes) -> None:
    """What follows would be taken for the answer to the next request."""
    async with scripted(b"HTTP/1.1 " + odd + b"\r\n\r\n0\r\n\r\n"[: 9 if b"chunked" in odd else 4], whole(b"file")) as origin:
        error = await failure(fetch(lanes, party(), f"{origin.base}/file"))
        assert error.code == ErrorCode.BG_E_INVALID_SERVER_RESPONSE
        await fetch(lanes, party(), f"{origin.base}/file")
        assert [request.connection for request in origin.log] == [1, 2]


@pytest.mark.parametrize("tunnel", [True, False])
async def test_a_proxys_realm_may_be_in_any_language(lanes: Lanes, party: MakeParty, tunnel: bool) -> None:
    challenge = 'HTTP/1.1 407 Qui ?\r\nContent-Length: 0\r\nProxy-Authenticate: Digest realm="Société", nonce="n", qop="auth"\r\n\r\n'
    async with scripted(challenge.encode(), b"HTTP/1.1 502 No\r\nContent-Length: 0\r\n\r\n") as proxy:
        alice = Grant(PROXY, AuthScheme.DIGEST, "alice", "secret", frozenset({proxy.place}))
        target = "https://files.test" if tunnel else "http://files.test"
        error = await failure(fetch(lanes, party(alice, via=proxy), f"{target}/file"))
        assert error.http_status == 502
        shown = (proxy.log[1].get("Proxy-Authorization") or "").encode("latin-1").decode()
        given = dict(re.findall(r'(\w+)="?([^",]+)"?', shown))
        a1, a2 = (hashlib.md5(each.encode()).hexdigest() for each in ("alice:Société:secret", f"{proxy.log[1].method}:{given['uri']}"))
        assert given["realm"] == "Société"
        assert given["response"] == hashlib.md5(f"{a1}:n:{given['nc']}:{given['cnonce']}:auth:{a2}".encode()).hexdigest()


async def test_t25_a_login_under_way_is_not_finished_after_its_token_was_taken_away(lanes: Lanes, party: MakeParty) -> None:
    inner, arrived, go = ntlm(), asyncio.Event(), asyncio.Event()

    async def slow(connection: Connection, request: Request, ask: str, answer: str) -> list[str] | None:
        if request.get(answer):
            arrived.set()
            await go.wait()
        return await inner(connection, request, ask, answer)

    async with Origin(slow) as origin:
        who = party(grant(origin, AuthScheme.NTLM, ALICE))
        task = asyncio.create_task(failure(fetch(lanes, who, f"{origin.base}/file")))
        await arrived.wait()
        await lanes.forget(who.token)
        go.set()
        assert (await task).transient
        assert len(origin.connections) == 1
        assert not origin.users


async def test_closing_while_a_body_is_read_ends_it(party: MakeParty) -> None:
    lanes = Lanes()
    async with scripted(whole(bytes(8 << 20))) as origin:
        async with lanes.get(party(), Asked(f"{origin.base}/file")) as body:
            await body.__anext__()  # type: ignore[attr-defined]
            await lanes.aclose()
            await until(lambda: origin.open == 0)
            assert (await failure(body.__anext__())).transient  # type: ignore[attr-defined]


async def test_idle_lanes_are_closed(party: MakeParty) -> None:
    lanes = Lanes(idle_seconds=0.1)
    async with Origin() as origin:
        await fetch(lanes, party(), f"{origin.base}/file")
        assert origin.open == 1
        await until(lambda: origin.open == 0)
        await fetch(lanes, party(), f"{origin.base}/file")
        assert len(origin.connections) == 2
    await lanes.aclose()


# -- how many ------------------------------------------------------------------------------------------------------------------


async def test_connections_to_one_host_are_bounded_over_all_identities_and_given_out_in_turn(party: MakeParty) -> None:
    gate = asyncio.Event()

    class Slow(Origin):
        most = 0

        async def serve(self, connection: Connection, request: Request) -> None:
            self.most = max(self.most, self.open)
            await gate.wait()
            await super().serve(connection, request)

    lanes = Lanes(limit_per_host=2)
    async with Slow() as origin:
        tokens = [Token.for_network(spnego.Password(*ALICE)) for _ in range(3)]
        tasks = []
        for number in range(6):
            tasks.append(asyncio.create_task(fetch(lanes, party(token=tokens[number % 3]), f"{origin.base}/{number}")))
            await asyncio.sleep(0)
        await until(lambda: len(origin.log) == 2)
        gate.set()
        assert await asyncio.gather(*tasks) == [CONTENT] * 6
        assert origin.most <= 2
        assert sorted(request.target for request in origin.log[:2]) == ["/0", "/1"]
        assert {request.target for request in origin.log[2:4]} == {"/2", "/3"}
        assert origin.open <= 2
    await lanes.aclose()


async def test_a_waiter_that_is_cancelled_does_not_keep_its_turn(party: MakeParty) -> None:
    lanes = Lanes(limit_per_host=1)
    async with Origin() as origin:
        async with lanes.get(party(), Asked(f"{origin.base}/file")):
            waiting = asyncio.create_task(fetch(lanes, party(), f"{origin.base}/file"))
            await asyncio.sleep(0.05)
            assert not waiting.done()
            waiting.cancel()
            await asyncio.wait([waiting])
        assert await fetch(lanes, party(), f"{origin.base}/file") == CONTENT
    await lanes.aclose()


# -- redirects -----------------------------------------------------------------------------------------------------------------


async def test_a_redirect_is_followed_and_the_body_says_where_it_ended(lanes: Lanes, party: MakeParty) -> None:
    async with Origin() as origin:
        origin.redirects = {"/a": "/dir/b?x=1", "/dir/b": "c"}
        async with lanes.get(party(), Asked(f"{origin.base}/a")) as body:
            assert body.url == f"{origin.base}/dir/c"
            assert b"".join([chunk async for chunk in body]) == CONTENT
        assert [request.target for request in origin.log] == ["/a", "/dir/b?x=1", "/dir/c"]
        assert len(origin.connections) == 1


async def test_an_etag_pins_nothing_behind_a_redirect(lanes: Lanes, party: MakeParty) -> None:
    """It means something for its own resource only: the redirect may lead to another one that happens to share it."""
    async with Origin() as origin:
        origin.redirects = {"/a": "/b"}
        with pytest.raises(FileChanged):
            async with lanes.get(party(), Asked(f"{origin.base}/a", 5, None, Validator('"v1"', None, len(CONTENT)))):
                pass
        assert origin.log[-1].get("If-Range") is None


async def test_t19_a_redirect_to_another_origin_gets_no_credentials(lanes: Lanes, party: MakeParty) -> None:
    """Not even when it asks for them in the same realm; and the user information a redirect names is not sent either."""
    async with Origin(ntlm()) as origin, Origin(ntlm()) as thief:
        origin.redirects = {"/file": f"{thief.base}/file"}
        who = party(grant(origin, AuthScheme.NTLM, ALICE), grant(origin, AuthScheme.BASIC, ("alice", "pw")))
        error = await failure(fetch(lanes, who, f"{origin.base}/file"))
        assert isinstance(error, AuthFailed)
        assert (error.url or "").startswith(thief.base)
        assert origin.users == [r"DOM\alice"]
        assert thief.log
        assert all(request.get("Authorization") is None for request in thief.log)


async def test_t19_the_tokens_own_credentials_stay_with_the_origin_they_were_given_for(lanes: Lanes, party: MakeParty) -> None:
    token = Token.for_network(spnego.Password(*ALICE))
    async with Origin(ntlm()) as origin, Origin(ntlm()) as thief:
        origin.redirects = {"/file": f"{thief.base}/file"}
        own = Grant(SERVER, AuthScheme.NTLM, None, None, frozenset({origin.place}))
        await failure(fetch(lanes, party(own, token=token), f"{origin.base}/file"))
        assert origin.users == [r"DOM\alice"]
        assert all(request.get("Authorization") is None for request in thief.log)


@pytest.mark.parametrize(
    "target",
    ["/a", "http://{host}/a", "http://u:p@{host}/b", "ftp://{host}/b", "/b\x01c", "javascript:alert(1)", ""],
    ids=["itself", "itself in full", "user information", "ftp", "control characters", "a script", "nowhere"],
)
async def test_a_redirect_that_leads_nowhere_good_is_refused(lanes: Lanes, party: MakeParty, target: str) -> None:
    async with Origin() as origin:
        origin.redirects = {"/a": target.format(host=f"localhost:{origin.port}")}
        error = await failure(fetch(lanes, party(), f"{origin.base}/a"))
        assert error.context is ErrorContext.REMOTE_FILE
        assert not error.transient
        assert len(origin.log) == 1


async def test_redirects_end_after_ten(lanes: Lanes, party: MakeParty) -> None:
    async with Origin() as origin:
        origin.redirects = {f"/{number}": f"/{number + 1}" for number in range(20)}
        error = await failure(fetch(lanes, party(), f"{origin.base}/0"))
        assert error.code == ErrorCode.ERROR_WINHTTP_REDIRECT_FAILED
        assert len(origin.log) == 11
        origin.redirects["/10"] = "/file"
        origin.redirects = {key: value for key, value in origin.redirects.items() if key != "/10"}
        assert await fetch(lanes, party(), f"{origin.base}/0") == CONTENT


async def test_https_never_falls_to_http(lanes: Lanes, party: MakeParty, server_tls: ssl.SSLContext) -> None:
    async with Origin(tls=server_tls) as origin, Origin() as plain:
        origin.redirects = {"/file": f"{plain.base}/file"}
        error = await failure(fetch(lanes, party(), f"{origin.base}/file"))
        assert error.code == ErrorCode.ERROR_WINHTTP_REDIRECT_FAILED
        assert not plain.connections


async def test_t25_no_cookie_is_kept_and_no_environment_is_read(
    lanes: Lanes, party: MakeParty, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    (tmp_path / ".netrc").write_text("machine localhost login alice password pw\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    async with scripted(whole(b"file", "Set-Cookie: a=b")) as origin:
        for _ in range(2):
            assert await fetch(lanes, party(), f"{origin.base}/file") == b"file"
        assert all(request.get("Cookie") is None and request.get("Authorization") is None for request in origin.log)


# -- nothing is left over ------------------------------------------------------------------------------------------------------


async def _hold(connection: Connection) -> None:
    await asyncio.sleep(60)


async def _half(connection: Connection) -> None:
    await connection.send(whole(CONTENT)[: -len(CONTENT) // 2])


_THERE = b"HTTP/1.1 302 There\r\nLocation: /b\r\nContent-Length: 0\r\n\r\n"
_ASKS = b"HTTP/1.1 401 Who?\r\nWWW-Authenticate: NTLM\r\nContent-Length: 4\r\n\r\nwho?"


@pytest.mark.parametrize(
    "answers",
    [
        (_hold,),
        (_ASKS, _hold),
        (_ASKS[:-4],),
        (_half,),
        (b"HTTP/1.1 302 There\r\nLocation: /b\r\nContent-Length: 4\r\n\r\n",),
        (_THERE, _hold),
    ],
    ids=["first answer", "second leg", "draining", "body", "redirect", "after it"],
)
async def test_a_cancel_in_any_phase_leaves_nothing_open(party: MakeParty, security: Any, answers: tuple[Any, ...]) -> None:
    await security.run_security(int, deadline=5)  # its thread is there before the count
    async with scripted(*answers) as origin, nothing_left_over():
        lanes = Lanes()
        task = asyncio.create_task(fetch(lanes, party(grant(origin, AuthScheme.NTLM, ALICE)), f"{origin.base}/file"))
        await until(lambda: len(origin.log) == len(answers))
        await asyncio.sleep(0.05)  # into the phase
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: origin.open == 0)
        await lanes.aclose()
        for held in list(origin._tasks):
            held.cancel()


@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
async def test_closing_the_lanes_leaves_nothing_open(party: MakeParty, server_tls: ssl.SSLContext, tls: bool) -> None:
    async with Origin(tls=server_tls if tls else None) as origin, Proxy() as proxy, nothing_left_over():
        lanes = Lanes()
        for who in (party(), party(via=proxy)):
            await fetch(lanes, who, f"{origin.base}/file")
            async with lanes.get(who, Asked(f"{origin.base}/file")) as body:
                await body.__anext__()  # type: ignore[attr-defined]
        await lanes.aclose()
        await until(lambda: origin.open == proxy.open == 0)
        with pytest.raises(ManagerClosed):
            await fetch(lanes, party(), f"{origin.base}/file")


async def test_a_cancel_while_connecting_leaves_nothing_open(party: MakeParty) -> None:
    async with Server(_hold) as listener, nothing_left_over():
        lanes = Lanes()
        url = f"https://localhost:{listener.port}/file"  # the handshake of TLS is never answered
        task = asyncio.create_task(fetch(lanes, party(), url))
        await until(lambda: len(listener.connections) == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: listener.open == 0)
        await lanes.aclose()
        for held in list(listener._tasks):
            held.cancel()
