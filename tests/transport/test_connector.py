"""Opening a connection: CONNECT with several legs, what a hostile proxy may try, certificates, and that nothing is left open."""

import asyncio
import inspect
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
import trustme
from aiohttp.client_proto import ResponseHandler

from bits_async.auth.policy import Origin as Place
from bits_async.auth.policy import Seat
from bits_async.errors import AuthFailed, BitsError, ErrorCode, ErrorContext, NetworkError
from bits_async.transport import connector as module
from bits_async.transport.connector import LEG_BODY_LIMIT, LaneConnector, Login, Route
from bits_async.transport.exchange import HEAD_LIMIT, Wire, request_head
from bits_async.transport.timeouts import Timeouts
from bits_async.transport.tls import TlsSettings
from tests.realms import closed_port
from tests.transport.wire import Connection, Origin, Proxy, Request, Server, nothing_left_over
from tests.waiting import until

TIMEOUTS = Timeouts(connect=30, response=30, idle=30, auth=30)
TUNNEL = b"HTTP/1.1 200 Connection established\r\n\r\n"


class Flow:
    """A login of two legs that belongs to the connection; keeps what it was asked."""

    def __init__(self, certificate: bytes | None) -> None:
        self.certificate = certificate
        self.asked: list[tuple[tuple[str, ...], str, str]] = []
        self.restarts = 0
        self.concluded: list[int] = []
        self.connection_bound = True
        self.authenticated = False
        self.user = None
        self.judged = False

    def challenged(self, lines: Sequence[str]) -> None:
        pass

    async def answer(self, lines: Sequence[str], *, method: str, target: str) -> str:
        self.asked.append((tuple(lines), method, target))
        return f"Fake {len(self.asked)}"

    async def conclude(self, status: int, challenge_lines: Sequence[str], info_lines: Sequence[str]) -> None:
        self.concluded.append(status)
        self.authenticated = True

    async def unasked(self, *, method: str, target: str) -> str | None:
        return None

    def new_connection(self) -> None:
        if self.asked and not self.authenticated:
            self.restarts += 1
        if self.restarts > 2:
            raise AuthFailed("again and again")


@asynccontextmanager
async def opening(
    proxy: Server, trust: ssl.SSLContext, origin: str = "https://localhost:1", timeouts: Timeouts = TIMEOUTS
) -> AsyncIterator[tuple[LaneConnector, Callable[[], Any], list[Flow]]]:
    """(connector, a function that opens its tunnel to `origin`, the flows that were made)."""
    flows: list[Flow] = []

    def make(seat: Seat, certificate: bytes | None, near: str | None, per_request: bool) -> Any:
        assert seat is Seat.PROXY
        assert not per_request
        flows.append(Flow(certificate))
        return flows[-1]

    connector = LaneConnector(Route(Place.of(origin), proxy.base), TlsSettings(trust), Login(Seat.PROXY, make))
    try:
        yield connector, lambda: connector.open(f"{origin}/file?secret=1", timeouts), flows
    finally:
        await connector.aclose()


def answering(*answers: bytes | Callable[[Connection], Any], per_connection: bool = False) -> Server:
    """A proxy that gives these answers in turn (the last one for ever), and whose tunnels lead nowhere."""
    turn = iter(range(10_000))

    async def handle(connection: Connection) -> None:
        while (request := await connection.request()) is not None:
            server.log.append(request)
            answer = answers[min(next(turn), len(answers) - 1)]
            await (connection.send(answer) if isinstance(answer, bytes) else answer(connection))

    server = Server(handle)
    return server


def asks(body: bytes = b"", *headers: str, version: str = "1.1") -> bytes:
    lines = [f"HTTP/{version} 407 Who?", "Proxy-Authenticate: Fake", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


async def failure(opening_it: Any) -> BitsError:
    with pytest.raises(BitsError) as caught:
        await opening_it
    assert "secret" not in str(caught.value)
    assert caught.value.__context__ is None
    return caught.value


# -- aiohttp ------------------------------------------------------------------------------------------------------------------


async def test_the_undocumented_names_of_aiohttp_are_as_we_know_them() -> None:
    """The whole of what we lean on that aiohttp does not promise; a version that changes it must not pass unnoticed."""
    wanted = {"read_until_eof", "auto_decompress", "read_bufsize", "max_line_size", "max_field_size"}
    assert wanted <= inspect.signature(ResponseHandler.set_response_params).parameters.keys()
    assert inspect.iscoroutinefunction(ResponseHandler.read)
    assert list(inspect.signature(aiohttp.StreamReader._read_nowait).parameters) == ["self", "n"]
    handler = ResponseHandler(asyncio.get_running_loop())
    assert isinstance(handler, asyncio.Protocol)
    assert handler.transport is None
    assert handler.is_connected() is False
    assert handler.should_close is False
    assert handler._parser is None
    handler.set_response_params()
    assert handler._parser.feed_eof() is None
    handler.data_received(b"H")
    assert handler._parser.feed_eof() is not None
    assert callable(handler.force_close)
    assert callable(handler.pause_reading)
    assert callable(handler.resume_reading)
    assert list(inspect.signature(ResponseHandler.data_received).parameters) == ["self", "data"]
    assert list(inspect.signature(ResponseHandler.feed_data).parameters) == ["self", "data", "size"]
    assert handler._reading_paused is False
    overridden = {"data_received", "feed_data", "resume_reading"}
    mine = {name for name in vars(Wire) if not name.startswith("__")} - overridden | {"_answer", "_head_size"}
    assert not mine & {name for kind in ResponseHandler.__mro__ for name in vars(kind)}
    assert not mine & set(vars(handler))


def asking(origin: Origin) -> bytes:
    return request_head("GET", "/file", [("Host", str(origin.place).partition("://")[2])])


async def answered(connector: LaneConnector, origin: Origin) -> bytes:
    reply = await connector.ask(asking(origin))
    assert reply.status == 200
    return await reply.content.read()


async def test_requests_go_over_the_connection_that_was_opened_and_never_another(trust: ssl.SSLContext) -> None:
    async with Origin() as origin:
        connector = LaneConnector(Route(origin.place), TlsSettings(trust), Login(Seat.PROXY, lambda *_: pytest.fail("asked")))
        with pytest.raises(ConnectionResetError):
            await connector.ask(asking(origin))
        assert not origin.connections
        await connector.open(f"{origin.base}/file", TIMEOUTS)
        bodies = {await answered(connector, origin) for _ in range(3)}
        assert len(bodies) == 1
        assert connector.ready
        connector.drop()
        assert not connector.ready
        with pytest.raises(ConnectionResetError):
            await connector.ask(asking(origin))
        await connector.aclose()
        assert len(origin.connections) == connector.opened == 1


async def test_a_connection_that_says_something_unasked_is_not_used_again(trust: ssl.SSLContext) -> None:
    """An answer that lies in wait would be taken for the answer to the next request."""
    async with Origin() as origin:
        connector = LaneConnector(Route(origin.place), TlsSettings(trust), Login(Seat.PROXY, lambda *_: pytest.fail("asked")))
        await connector.open(f"{origin.base}/file", TIMEOUTS)
        await answered(connector, origin)
        assert connector.ready
        await origin.connections[0].send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")
        await until(lambda: not connector.ready)
        with pytest.raises(aiohttp.ServerDisconnectedError):
            await connector.ask(asking(origin))
        await connector.aclose()


@pytest.mark.parametrize("unasked", [b"HTTP/1.1 200 OK\r\nX: ", b"\r\n", b"?"])
async def test_t26_a_byte_between_two_answers_ends_the_connection(trust: ssl.SSLContext, unasked: bytes) -> None:
    """A peer that never stops talking on a connection that waits for its next use would fill the memory."""
    async with Origin() as origin:
        connector = LaneConnector(Route(origin.place), TlsSettings(trust), Login(Seat.PROXY, lambda *_: pytest.fail("asked")))
        await connector.open(f"{origin.base}/file", TIMEOUTS)
        await answered(connector, origin)
        await origin.connections[0].send(unasked)
        await until(lambda: origin.connections[0].gone)
        assert not connector.ready
        await connector.aclose()


@pytest.mark.parametrize("unasked", [b"H", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\n\r\nevil"])
@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ngood", b"good"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\ngood\r\n0\r\n\r\n", b"good"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
    ],
    ids=["length", "chunks", "none"],
)
async def test_t26_what_comes_in_one_piece_with_an_answer_never_begins_the_next_one(
    trust: ssl.SSLContext, answer: bytes, body: bytes, unasked: bytes
) -> None:
    """Its rest comes after the next request, and looks like the whole answer. The answer before it is whole, and kept."""

    async def talk(connection: Connection) -> None:
        await connection.request()
        await connection.send(answer + unasked)
        await connection.request()

    async with Server(talk) as server:
        connector = LaneConnector(Route(server.place), TlsSettings(trust), Login(Seat.PROXY, lambda *_: pytest.fail("asked")))
        await connector.open(f"{server.base}/file", TIMEOUTS)
        reply = await connector.ask(request_head("GET", "/file", [("Host", "localhost")]))
        assert await reply.content.read() == body
        assert not connector.ready
        with pytest.raises(aiohttp.ServerDisconnectedError):
            await connector.ask(request_head("GET", "/file", [("Host", "localhost")]))
        await connector.aclose()


async def test_t26_a_byte_before_the_first_request_ends_the_connection(trust: ssl.SSLContext) -> None:
    async def talk(connection: Connection) -> None:
        await connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")
        await connection.request()

    async with Server(talk) as server:
        connector = LaneConnector(Route(server.place), TlsSettings(trust), Login(Seat.PROXY, lambda *_: pytest.fail("asked")))
        await connector.open(f"{server.base}/file", TIMEOUTS)
        await until(lambda: server.connections[0].gone)
        assert not connector.ready
        await connector.aclose()


@pytest.mark.parametrize("more", [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Hints\r\nLink: " + b"a" * 9000 + b"\r\n\r\n"])
async def test_t26_answers_that_announce_the_answer_have_the_room_of_one_head(trust: ssl.SSLContext, more: bytes) -> None:
    async def talk(connection: Connection) -> None:
        await connection.request()
        while not connection.gone:
            await connection.send(more * (HEAD_LIMIT // len(more)))
            await asyncio.sleep(0)

    async with Server(talk) as server:
        connector = LaneConnector(Route(server.place), TlsSettings(trust), Login(Seat.PROXY, lambda *_: pytest.fail("asked")))
        await connector.open(f"{server.base}/file", TIMEOUTS)
        async with asyncio.timeout(TIMEOUTS.response):
            with pytest.raises(aiohttp.http_exceptions.HttpProcessingError, match="Got more than"):
                await connector.ask(request_head("GET", "/file", [("Host", "localhost")]))
        await connector.aclose()


@pytest.mark.parametrize("bad", ["\r", "\n", "\r\nX-More: 1", "\0", "\x7f"])
def test_no_request_leaves_with_a_control_character_in_its_head(bad: str) -> None:
    for target, name, value in ((f"/{bad}", "A", "b"), ("/", f"A{bad}", "b"), ("/", "A", f"b{bad}")):
        with pytest.raises(ValueError, match="control character"):
            request_head("GET", target, [("Host", "h"), (name, value)])
    assert request_head("GET", "/x", [("Host", "h"), ("A", "b\tc")]) == b"GET /x HTTP/1.1\r\nHost: h\r\nA: b\tc\r\n\r\n"


# -- the legs of CONNECT ------------------------------------------------------------------------------------------------------


async def test_all_legs_of_a_login_go_over_one_connection_and_the_tunnel_stands_on_it(
    trust: ssl.SSLContext, server_tls: ssl.SSLContext
) -> None:
    async def gate(connection: Connection, request: Request, ask: str, answer: str) -> list[str] | None:
        given = request.get(answer)
        return None if given == "Fake 2" else [f"{ask}: Fake {given or 'first'}"]

    async with (
        Origin(tls=server_tls) as origin,
        Proxy(gate) as proxy,
        opening(proxy, trust, origin.base) as (connector, go, flows),
    ):
        await go()
        assert connector.ready
        assert len(proxy.connections) == 1
        target = f"localhost:{origin.port}"
        assert [(request.method, request.target, request.get("Proxy-Authorization")) for request in proxy.log] == [
            ("CONNECT", target, None),
            ("CONNECT", target, "Fake 1"),
            ("CONNECT", target, "Fake 2"),
        ]
        assert all(request.get("Proxy-Connection") == "keep-alive" and request.get("Host") == target for request in proxy.log)
        (flow,) = flows
        assert flow.asked == [(("Fake first",), "CONNECT", target), (("Fake Fake 1",), "CONNECT", target)]
        assert flow.concluded == [200]
        assert flow.restarts == 0


@pytest.mark.parametrize("size", [0, 20_000, 4 << 20], ids=["none", "small", "4 MiB"])
@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
async def test_the_body_of_a_407_is_drained_whatever_its_size(trust: ssl.SSLContext, size: int, chunked: bool) -> None:
    body = b"x" * size
    if chunked:
        pieces = [b"%x\r\n%s\r\n" % (len(piece), piece) for i in range(0, size, 65536) if (piece := body[i : i + 65536])]
        head = b"HTTP/1.1 407 Who?\r\nProxy-Authenticate: Fake\r\nTransfer-Encoding: chunked\r\n\r\n"
        answer = head + b"".join(pieces) + b"0\r\n\r\n"
    else:
        answer = asks(body)
    async with (
        answering(answer, answer, b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n") as proxy,
        opening(proxy, trust) as (_, go, _),
    ):
        error = await failure(go())
        assert error.http_status == 403
        assert [request.connection for request in proxy.log] == [1, 1, 1]


async def test_t26_a_leg_with_an_endless_body_costs_its_connection(trust: ssl.SSLContext) -> None:
    async def endless(connection: Connection) -> None:
        await connection.send(b"HTTP/1.1 407 Who?\r\nProxy-Authenticate: Fake\r\nContent-Length: 99999999999\r\n\r\n")
        sent = 0
        while sent < 4 * LEG_BODY_LIMIT:
            await connection.send(b"x" * 65536)
            sent += 65536
        pytest.fail("read far beyond the limit")

    async with (
        answering(endless, b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n") as proxy,
        opening(proxy, trust) as (_, go, flows),
    ):
        assert (await failure(go())).http_status == 403
        assert [request.connection for request in proxy.log] == [1, 2]
        assert len(flows[0].asked) == 1, "the challenge itself was good: it is answered on a new connection"


@pytest.mark.parametrize("header", ["Proxy-Connection: close", "Connection: Close", "Connection: foo, close"])
async def test_a_proxy_that_closes_after_asking_gets_the_answer_on_a_new_connection(trust: ssl.SSLContext, header: str) -> None:
    no = b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n"
    async with answering(asks(b"", header), no) as proxy, opening(proxy, trust) as (_, go, flows):
        assert (await failure(go())).http_status == 403
        assert [(request.connection, request.get("Proxy-Authorization")) for request in proxy.log] == [(1, None), (2, "Fake 1")]
        assert flows[0].restarts == 0


async def test_close_in_the_middle_of_a_handshake_starts_it_again_with_a_fresh_context(trust: ssl.SSLContext) -> None:
    no = b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n"
    async with answering(asks(), asks(b"", "Connection: close"), asks(), no) as proxy, opening(proxy, trust) as (_, go, flows):
        assert (await failure(go())).http_status == 403
        assert [(request.connection, request.get("Proxy-Authorization")) for request in proxy.log] == [
            (1, None),
            (1, "Fake 1"),
            (2, "Fake 2"),
            (2, "Fake 3"),
        ]
        assert flows[0].restarts == 1


async def test_a_handshake_starts_again_twice_and_no_more(trust: ssl.SSLContext) -> None:
    async def handle(connection: Connection) -> None:
        while (request := await connection.request()) is not None:
            proxy.log.append(request)
            await connection.send(asks(b"", *([] if request.get("Proxy-Authorization") is None else ["Connection: close"])))

    async with Server(handle) as proxy, opening(proxy, trust) as (_, go, _):
        error = await failure(go())
        assert isinstance(error, AuthFailed)
        assert not error.transient
        assert len([request for request in proxy.log if request.get("Proxy-Authorization")]) == 3


async def test_t26_challenges_without_end_are_not_answered_for_ever(trust: ssl.SSLContext) -> None:
    async with answering(asks()) as proxy, opening(proxy, trust) as (_, go, _):
        assert isinstance(await failure(go()), AuthFailed)
        assert len(proxy.log) <= module.EXCHANGES


async def test_an_old_proxy_that_keeps_its_connections_is_understood(trust: ssl.SSLContext) -> None:
    kept, no = asks(b"who?", "Proxy-Connection: keep-alive", version="1.0"), b"HTTP/1.0 403 No\r\nContent-Length: 0\r\n\r\n"
    async with answering(kept, kept, no) as proxy, opening(proxy, trust) as (_, go, _):
        assert (await failure(go())).http_status == 403
        assert [request.connection for request in proxy.log] == [1, 1, 1]


# -- hostile answers ----------------------------------------------------------------------------------------------------------


async def test_a_tunnel_has_no_body_whatever_its_length_says(trust: ssl.SSLContext, server_tls: ssl.SSLContext) -> None:
    class Wordy(Proxy):
        async def tunnel(self, connection: Connection, request: Request) -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", origin.port)
            await connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\nTransfer-Encoding: identity\r\n\r\n"[:39] + b"\r\n")
            await self._pump(connection, reader, writer)

    async with Origin(tls=server_tls) as origin, Wordy() as proxy, opening(proxy, trust, origin.base) as (connector, go, _):
        await go()
        assert connector.ready


@pytest.mark.parametrize("later", [False, True], ids=["with the head", "after it"])
async def test_t26_bytes_after_the_head_of_a_tunnel_are_an_error(trust: ssl.SSLContext, later: bool) -> None:
    async def tunnel(connection: Connection) -> None:
        await connection.send(TUNNEL if later else TUNNEL + b"evil")
        if later:
            await connection.send(b"evil")

    class Slow(Flow):
        async def conclude(self, *args: Any) -> None:
            await asyncio.sleep(0.2)  # the peer's proof is being looked at while the bytes arrive

    async with answering(asks(), tunnel) as proxy, opening(proxy, trust) as (connector, go, _):
        connector._proxy_login._make = lambda seat, certificate, near, per_request: Slow(certificate)  # type: ignore[assignment,return-value]
        error = await failure(go())
        assert error.code == ErrorCode.BG_E_INVALID_SERVER_RESPONSE
        assert error.context is ErrorContext.GENERAL_TRANSPORT
        assert not error.transient


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * (HEAD_LIMIT + 1) + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: 12345678\r\n" * (HEAD_LIMIT // 10) + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * (4 * HEAD_LIMIT),
        b"H" * (4 * HEAD_LIMIT),
    ],
    ids=["one line", "many lines", "without end", "no line at all"],
)
async def test_t26_a_head_of_more_than_64_kib_is_refused(trust: ssl.SSLContext, head: bytes) -> None:
    async with answering(head) as proxy, opening(proxy, trust) as (_, go, _):
        error = await failure(go())
        assert error.code in (ErrorCode.BG_E_TOO_LARGE, ErrorCode.BG_E_INVALID_SERVER_RESPONSE)
        assert not error.transient


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.2p1\r\n\r\n",
        b"HTTP/1.1 407 Who?\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nwho?",
        b"HTTP/1.1 407 Who?\r\nContent-Length: 4\r\nContent-Length: 4\r\n\r\nwho?",
        b"HTTP/1.1 407 Who?\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\nwho?",
        b"HTTP/1.1 407 Who?\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 4000,
    ],
    ids=["not HTTP", "two lengths", "a length twice", "length and coding", "a strange coding", "interim for ever"],
)
async def test_t26_an_answer_that_breaks_http_ends_the_attempt(trust: ssl.SSLContext, answer: bytes) -> None:
    async with answering(answer) as proxy, opening(proxy, trust) as (_, go, flows):
        error = await failure(go())
        assert error.code in (ErrorCode.BG_E_INVALID_SERVER_RESPONSE, ErrorCode.BG_E_TOO_LARGE)
        assert error.context is ErrorContext.GENERAL_TRANSPORT
        assert not flows, "nothing was shown to it"


async def test_t26_bytes_beyond_a_407s_body_cost_the_connection(trust: ssl.SSLContext) -> None:
    no = b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n"
    async with answering(asks(b"who?") + b"evil", no) as proxy, opening(proxy, trust) as (_, go, _):
        assert (await failure(go())).http_status == 403
        assert [request.connection for request in proxy.log] == [1, 2]


async def test_t25_a_401_from_connect_is_not_answered(trust: ssl.SSLContext) -> None:
    answer = b"HTTP/1.1 401 Who?\r\nWWW-Authenticate: Fake\r\nProxy-Authenticate: Fake\r\nContent-Length: 0\r\n\r\n"
    async with answering(answer) as proxy, opening(proxy, trust) as (_, go, flows):
        error = await failure(go())
        assert error.http_status == 401
        assert error.context is ErrorContext.GENERAL_TRANSPORT
        assert not flows
        assert len(proxy.log) == 1


@pytest.mark.parametrize(("status", "transient"), [(403, False), (502, True), (503, True), (504, True)])
async def test_a_refused_tunnel_is_the_proxys_fault_and_waiting_may_help(trust: ssl.SSLContext, status: int, transient: bool) -> None:
    answer = b"HTTP/1.1 %d No \x1b[31mway\r\nRetry-After: 7\r\nContent-Length: 0\r\n\r\n" % status
    async with answering(answer.replace(b"\x1b", b"?")) as proxy, opening(proxy, trust) as (_, go, _):
        error = await failure(go())
        assert isinstance(error, NetworkError)
        assert (error.http_status, error.transient) == (status, transient)
        assert error.retry_after == (7 if status == 503 else None)


async def test_a_proxy_that_hangs_up_without_a_word_is_tried_again_later(trust: ssl.SSLContext) -> None:
    async def hang_up(connection: Connection) -> None:
        connection.cut()

    async with answering(hang_up) as proxy, opening(proxy, trust) as (_, go, _):
        error = await failure(go())
        assert error.code == ErrorCode.BG_E_CONNECTION_CLOSED
        assert error.transient


async def test_a_silent_proxy_is_given_up(trust: ssl.SSLContext) -> None:
    async def say_nothing(connection: Connection) -> None:
        await asyncio.sleep(60)

    async with answering(say_nothing) as proxy, opening(proxy, trust, timeouts=Timeouts(auth=0.2)) as (_, go, _):
        error = await failure(go())
        assert error.code == ErrorCode.ERROR_WINHTTP_TIMEOUT
        assert error.transient


# -- TLS ----------------------------------------------------------------------------------------------------------------------


async def test_t24_each_seat_gets_the_certificate_of_its_own_handshake(trust: ssl.SSLContext, ca: trustme.CA) -> None:
    """TLS in TLS, one context for both: the outer certificate is the proxy's, the inner the origin's."""
    shown, der = {}, {}
    for who in ("proxy", "origin"):
        certificate = ca.issue_cert("localhost", common_name=who)
        shown[who] = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate.configure_cert(shown[who])
        der[who] = ssl.PEM_cert_to_DER_cert(certificate.cert_chain_pems[0].bytes().decode())

    async def gate(connection: Connection, request: Request, ask: str, answer: str) -> list[str] | None:
        return None if request.get(answer) else [f"{ask}: Fake"]

    async with Origin(tls=shown["origin"]) as origin, Proxy(gate, tls=shown["proxy"]) as proxy:
        async with opening(proxy, trust, origin.base) as (connector, go, flows):
            await go()
            assert connector.ready
            assert connector.proxy_certificate == der["proxy"]
            assert connector.peer_certificate == der["origin"]
            assert flows[0].certificate == der["proxy"]


async def test_an_untrusted_certificate_is_refused_in_a_tunnel_too(server_tls: ssl.SSLContext) -> None:
    async with Origin(tls=server_tls) as origin, Proxy() as proxy:
        async with opening(proxy, ssl.create_default_context(), origin.base) as (connector, go, _):
            error = await failure(go())
            assert error.code == ErrorCode.ERROR_WINHTTP_SECURE_FAILURE
            assert not error.transient
            assert not connector.ready


async def test_nothing_listens_and_nobody_knows_the_name(trust: ssl.SSLContext) -> None:
    with closed_port() as port:
        for url, code in (
            (f"http://localhost:{port}", ErrorCode.BG_E_CONNECT_FAILURE),
            ("http://nobody.invalid", ErrorCode.ERROR_WINHTTP_NAME_NOT_RESOLVED),
        ):
            connector = LaneConnector(Route(Place.of(url)), TlsSettings(trust), Login(Seat.PROXY, lambda *_: pytest.fail("asked")))
            error = await failure(connector.open(f"{url}/file?secret=1", TIMEOUTS))
            assert error.code == code
            assert error.transient
            await connector.aclose()


# -- nothing is left over -----------------------------------------------------------------------------------------------------


async def _hold(connection: Connection) -> None:
    await asyncio.sleep(60)


@pytest.mark.parametrize(
    "answers",
    [(_hold,), (asks(), _hold), (b"HTTP/1.1 407 Who?\r\nProxy-Authenticate: Fake\r\nContent-Length: 100\r\n\r\n",), (TUNNEL,)],
    ids=["first leg", "second leg", "draining", "in the handshake of TLS"],
)
async def test_a_cancel_in_any_phase_leaves_nothing_open(trust: ssl.SSLContext, answers: tuple[Any, ...]) -> None:
    async with answering(*answers) as proxy, nothing_left_over():
        async with opening(proxy, trust) as (connector, go, _):
            task = asyncio.create_task(go())
            await until(lambda: len(proxy.log) == len(answers))
            await asyncio.sleep(0.05)  # into the phase; that it is the right one does not matter for the promise
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not connector.ready
        await until(lambda: proxy.open == 0)
        proxy.connections[0].writer.close()
        for held in list(proxy._tasks):
            held.cancel()


@pytest.mark.parametrize("answer", [b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n", TUNNEL + b"evil", b"junk\r\n\r\n"])
async def test_a_failure_leaves_nothing_open(trust: ssl.SSLContext, answer: bytes) -> None:
    async with answering(answer) as proxy, nothing_left_over():
        async with opening(proxy, trust) as (_, go, _):
            await failure(go())
        await until(lambda: proxy.open == 0)
