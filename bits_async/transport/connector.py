"""Opens a lane's connection: names, TCP, the legs of CONNECT, TLS; keeps the certificates that channel binding needs.

aiohttp sends one CONNECT and hangs up on any status but 200, so a login at a proxy is impossible with it. Here the connection is
opened before the request, with as many CONNECT legs on it as the login needs, and aiohttp's parser (`exchange.Wire`) reads what comes
on it then. So a connection is known, with its certificates, before the first header is written for it.

This is the only module that opens sockets to peers. It knows the route and the logins; it never sees the file that is fetched.
"""

import asyncio
import encodings.idna  # noqa: F401 - host names go through it: else it is loaded on the event loop, in the first handshake
import re
import socket
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, NoReturn, TypeVar, cast

import aiohappyeyeballs
import h11

from .. import __version__
from ..auth.policy import Origin, Seat, is_near
from ..auth.schemes import AuthFlow
from ..errors import (
    HTTP_ERROR,
    AuthFailed,
    BitsError,
    ErrorCode,
    ErrorContext,
    error_from_network,
    make_error,
    scrub,
    show_text,
    status_is_transient,
)
from .answers import HeaderFields, Headers, authority, connect_target, retry_after
from .exchange import HEAD_LIMIT, Reply, Wire, make_wire
from .timeouts import Timeouts
from .tls import SHUTDOWN_TIMEOUT, Deciphered, TappedContext, TlsSettings, peer_certificate

LEG_BODY_LIMIT: Final = 8 << 20
EXCHANGES: Final = 24  # a login of 6 legs, with 2 restarts, at both seats: whoever needs more is playing
HAPPY_EYEBALLS_DELAY: Final = 0.25
READ_SIZE: Final = 64 * 1024


_FRAMING = re.compile(rb"^(?:content-length|transfer-encoding)[ \t]*:", re.IGNORECASE | re.MULTILINE)


USER_AGENT: Final = f"bits_async/{__version__}"


# -- errors at this seam ------------------------------------------------------------------------------------------------------


def throw(error: BitsError, cause: BaseException | None = None) -> NoReturn:
    """Raises `error` with a scrubbed cause and without the context Python adds: that is the original, secrets and all (T14)."""
    try:
        raise error from (scrub(cause) if cause is not None else error.__cause__)
    finally:
        error.__context__ = None


@contextmanager
def network_errors(url: str, doing: str) -> Iterator[None]:
    """Socket, TLS and deadline errors inside become ours."""
    try:
        yield
    except (OSError, EOFError) as exc:  # TimeoutError and ssl.SSLError are OSErrors
        throw(error_from_network(exc, url=url, doing=doing), exc)


def bad_proxy_answer(url: str, why: str, code: int = ErrorCode.BG_E_INVALID_SERVER_RESPONSE) -> BitsError:
    """The proxy broke the protocol in its answer to CONNECT."""
    return make_error(code, ErrorContext.GENERAL_TRANSPORT, f"cannot use the proxy's answer to CONNECT: {why}", url=url)


# -- where to -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Route:
    """The way to an origin: straight there, or by a proxy (its URL)."""

    origin: Origin
    proxy: str | None = None

    @cached_property
    def proxy_origin(self) -> Origin | None:
        """Whom a proxy's credentials are for."""
        return None if self.proxy is None else Origin.of(self.proxy)

    @property
    def tunnelled(self) -> bool:
        """The proxy is asked for a tunnel and sees nothing of the requests."""
        return self.proxy is not None and self.origin.scheme == "https"

    @property
    def forwarded(self) -> bool:
        """The proxy is the peer: it reads each request and may answer for itself."""
        return self.proxy is not None and not self.tunnelled

    @property
    def peer(self) -> Origin:
        """Whom the socket leads to."""
        return self.proxy_origin or self.origin


# -- a seat's login -----------------------------------------------------------------------------------------------------------

_Protocol = TypeVar("_Protocol", bound=asyncio.Protocol)

FlowMaker = Callable[[Seat, bytes | None, str | None, bool], AuthFlow]
"""(seat, its certificate, address of a peer on this machine, only schemes that work request by request) -> a flow with new contexts."""


class Login:
    """One seat's login over the connections of one lane: which header the next request carries.

    The answer to a challenge is made when the next request is about to leave, on the connection it leaves on: only then is
    that connection's certificate known (T24).
    """

    def __init__(self, seat: Seat, make_flow: FlowMaker) -> None:
        self.seat = seat
        self._make = make_flow
        self._flow: AuthFlow | None = None
        self._former: AuthFlow | None = None  # what it was shown was judged, and has yet to be understood
        self._certificate: bytes | None = None
        self._near: str | None = None
        self._challenge: tuple[str, ...] = ()
        self._per_request = False
        self._asked = False

    def opened(self, certificate: bytes | None, near: str | None = None) -> None:
        """The next request leaves on a new connection, whose peer showed this certificate; `near`: it is on this machine, at this
        address (T22).

        Raises:
            AuthFailed: connections keep being closed in the middle of this login.
        """
        if certificate != self._certificate or near != self._near:
            self._begin_anew()  # what it holds was bound to another certificate, or meant for another machine
        elif self._flow is not None:
            self._flow.new_connection()
        self._certificate, self._near = certificate, near

    def challenged(self, lines: Sequence[str], *, per_request: bool = False) -> None:
        """The answer was a challenge of this seat. `per_request`: nothing may be shown that counts for the connection."""
        if self._flow is not None:
            self._flow.challenged(lines)
        if per_request != self._per_request:
            self._begin_anew()
        self._per_request = per_request
        self._challenge = tuple(lines)
        self._asked = True

    async def header(self, *, method: str, target: str) -> str | None:
        """The value of the answer header for the request that leaves now; None: it carries none.

        Raises:
            AuthFailed: there is nothing that may be answered.
            NetworkError: the realm's KDC does not answer.
        """
        if not self._asked:
            return None if self._flow is None else await self._flow.unasked(method=method, target=target)
        former, self._former = self._former, None
        if former is not None:
            await former.answer(self._challenge, method=method, target=target)  # raises if that was a no (T26); for nobody otherwise
        if self._flow is None:
            self._flow = self._make(self.seat, self._certificate, self._near, self._per_request)
        value = await self._flow.answer(self._challenge, method=method, target=target)
        self._asked = False
        return value

    def _begin_anew(self) -> None:
        if self._flow is not None and self._flow.judged:
            self._former = self._flow
        self._flow = None

    async def passed(self, status: int, headers: Headers) -> None:
        """The answer was not a challenge of this seat: what it was shown was taken, and the peer may prove itself in turn.

        Raises:
            AuthFailed: the peer's own proof is wrong.
        """
        if self._flow is not None:
            challenges, info = headers.getall(self.seat.challenge_header, []), headers.getall(self.seat.info_header, [])
            await self._flow.conclude(status, challenges, info)


# -- the legs of CONNECT ------------------------------------------------------------------------------------------------------


class Link(asyncio.Protocol):
    """The connection to a proxy while CONNECT is spoken on it. Holds at most what one read of the transport brought."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.pending = bytearray()
        self._ended = False
        self._lost: BaseException | None = None
        self._news = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.pending += data
        if self.transport is not None and len(self.pending) >= READ_SIZE:
            self.transport.pause_reading()
        self._news.set()

    def eof_received(self) -> None:
        self._ended = True
        self._news.set()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._ended, self._lost = True, exc
        self._news.set()

    async def read(self) -> bytes:
        """What has come, or the next that comes; b"" at the end."""
        while not self.pending and not self._ended:
            self._news.clear()
            if self.transport is not None:
                self.transport.resume_reading()
            await self._news.wait()
        if not self.pending and self._lost is not None:
            raise ConnectionResetError(*self._lost.args[:2])
        data, self.pending = bytes(self.pending), bytearray()
        return data

    def write(self, data: bytes) -> None:
        if self.transport is None or self._ended:
            raise ConnectionResetError("closed")
        self.transport.write(data)


@dataclass(frozen=True)
class ConnectAnswer:
    """One answer to CONNECT, its body read or given up."""

    status: int
    reason: str
    headers: HeaderFields
    reusable: bool
    """The next leg may go over the same connection."""


async def exchange_connect(link: Link, target: str, authorization: str | None, *, url: str, timeouts: Timeouts) -> ConnectAnswer:
    """One leg: CONNECT out, the answer's head and body in.

    Raises:
        BitsError: the answer is not HTTP, or its head too large.
        OSError: the proxy hung up or did not answer in time.
    """
    machine = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_LIMIT)
    answer: h11.Response | None = None
    try:
        async with asyncio.timeout(timeouts.auth):
            link.write(connect_request(machine, target, authorization))
            answer = await _read_head(link, machine, url)
            headers = _fields(answer)
            if 200 <= answer.status_code < 300:
                link.pending[:0] = machine.trailing_data[0]
                return ConnectAnswer(answer.status_code, "", headers, True)
            drained = await _drain(link, machine)
    except TimeoutError:
        if answer is None:
            raise
        drained = False  # the head is what counts; the rest of that connection is given up
    reason = answer.reason.decode("latin-1")
    return ConnectAnswer(answer.status_code, reason, headers, drained and _stays_open(answer, headers))


async def _read_head(link: Link, machine: h11.Connection, url: str) -> h11.Response:
    """The final answer's head; interim answers are passed over. Together they have at most 64 KiB.

    Raises:
        BitsError: it is not HTTP, too large, or says twice where the body ends.
        ConnectionResetError: the proxy hung up.
    """
    seen = bytearray()
    try:
        while True:
            event = machine.next_event()
            head = seen[: len(seen) - len(machine.trailing_data[0])]
            if len(head) > HEAD_LIMIT:
                raise bad_proxy_answer(url, "its head is too large", ErrorCode.BG_E_TOO_LARGE)
            if isinstance(event, h11.Response):
                break
            if event is h11.NEED_DATA:
                data = await link.read()
                if not data:
                    raise ConnectionResetError("the proxy closed the connection without an answer")
                seen += data
                machine.receive_data(data)
    except h11.RemoteProtocolError as exc:
        large = exc.error_status_hint == 431
        code = ErrorCode.BG_E_TOO_LARGE if large else ErrorCode.BG_E_INVALID_SERVER_RESPONSE
        throw(bad_proxy_answer(url, "its head is too large" if large else "it breaks the protocol", code))
    if len(_FRAMING.findall(head)) > 1:  # h11 hides a repetition; two of them are the stuff of smuggled answers (T26)
        raise bad_proxy_answer(url, "several headers say where its body ends")
    return event


async def _drain(link: Link, machine: h11.Connection) -> bool:
    """Reads the body of a leg. True: to its very end, and nothing came after it (T26)."""
    size = 0
    try:
        while size <= LEG_BODY_LIMIT:
            event = machine.next_event()
            if event is h11.NEED_DATA:
                machine.receive_data(await link.read())
            elif isinstance(event, h11.Data):
                size += len(event.data)
            else:
                break
        else:
            return False
    except (h11.RemoteProtocolError, ConnectionResetError):
        return False
    return isinstance(event, h11.EndOfMessage) and not machine.trailing_data[0] and not link.pending


def _fields(answer: h11.Response) -> HeaderFields:
    """Values as aiohttp decodes them: what of a challenge is said again are the same bytes, through a tunnel or not."""
    return HeaderFields((name.decode("latin-1"), value.decode("utf-8", "surrogateescape")) for name, value in answer.headers.raw_items())


def _stays_open(answer: h11.Response, headers: HeaderFields) -> bool:
    """Whether the next leg may use this connection: the body had an end, and the proxy does not mean to hang up."""
    words = tokens(headers, "Connection") | tokens(headers, "Proxy-Connection")
    framed = headers.get("Content-Length") or headers.get("Transfer-Encoding")
    if not framed or "close" in words:
        return False
    return answer.http_version != b"1.0" or "keep-alive" in words


def tokens(headers: Headers, name: str) -> set[str]:
    """The comma separated words of a header, in lower case."""
    return {word.strip().lower() for line in headers.getall(name, []) for word in line.split(",")}


def connect_request(machine: h11.Connection, target: str, authorization: str | None) -> bytes:
    """CONNECT's head. `Proxy-Connection: keep-alive` is for proxies that would hang up between two legs without it."""
    headers = [("Host", target), ("User-Agent", USER_AGENT), ("Proxy-Connection", "keep-alive")]
    if authorization is not None:
        headers.append((Seat.PROXY.answer_header, authorization))
    raw = [(name.encode(), value.encode()) for name, value in headers]  # a realm may have other letters than ASCII's
    head = machine.send(h11.Request(method="CONNECT", target=target, headers=raw))
    machine.send(h11.EndOfMessage())
    assert head is not None
    return head


def refused_connect(answer: ConnectAnswer, url: str) -> BitsError:
    """The error for an answer to CONNECT that is neither a tunnel nor a challenge of the proxy.

    A 401 is a server's status: whoever sends it here has no seat, and is shown nothing (T25).
    """
    status = answer.status
    why = "which only a server may ask" if status == 401 else show_text(answer.reason, 60)
    return make_error(
        HTTP_ERROR | status,
        ErrorContext.GENERAL_TRANSPORT,
        f"the proxy answered CONNECT with HTTP {status} {why}".rstrip(),
        transient=status_is_transient(status),
        url=url,
        http_status=status,
        retry_after=retry_after(answer.headers) if status == 503 else None,
    )


# -- the connector ------------------------------------------------------------------------------------------------------------


class LaneConnector:
    """The connections of one lane: never more than one at a time. `open()` makes the next one; `ask()` uses it and never opens one."""

    def __init__(self, route: Route, tls: TlsSettings, proxy_login: Login) -> None:
        self.route = route
        self.opened = 0
        """How many connections were made."""
        self.peer_certificate: bytes | None = None
        self.proxy_certificate: bytes | None = None
        self.near: str | None = None
        """The address of the peer of the socket, if that is on this machine."""
        self._tls = tls
        self._proxy_tls = tls.proxy or tls
        self._proxy_login = proxy_login
        self._current: Wire | None = None
        self._wire: asyncio.Transport | None = None  # TCP itself, under all TLS: to abort it always works
        self._tunnel: asyncio.Transport | None = None  # TLS with the proxy,
        self._inner: asyncio.Transport | None = None  # under that with the origin
        self._taps: list[TappedContext] = []  # of this connection's TLS, the outer first
        self._lent: Deciphered | None = None
        self._line: socket.socket | None = None  # another descriptor of the connection, while somebody else reads it
        self._at_home = asyncio.Event()
        self._at_home.set()

    # -- for the lane

    @property
    def ready(self) -> bool:
        """The connection stands, and nothing lies in it that we did not ask for."""
        return self._current is not None and self._current.ready

    def ask(self, head: bytes) -> Coroutine[Any, Any, Reply]:
        """See `Wire.ask`."""
        if self._current is None:
            raise ConnectionResetError("no connection")
        return self._current.ask(head)

    async def open(self, url: str, timeouts: Timeouts) -> None:
        """Opens the connection for the next request, through the proxy's login where there is one.

        Raises:
            NetworkError: no way there, TLS failed, or the proxy refused the tunnel.
            AuthFailed: the proxy wants a login that may not be given, or refused it.
        """
        self.drop()
        self.peer_certificate = self.proxy_certificate = None
        try:
            if self.route.tunnelled:
                await self._open_tunnel(url, timeouts)
            else:
                await self._open_straight(url, timeouts)
        except BaseException:
            self.drop()
            raise
        self.opened += 1

    def drop(self) -> None:
        """Closes the connection at once; without the farewell of TLS, which a peer may draw out.

        A lent one is cut, which its reader notices, and closed when it comes back: until then only the reader touches its TLS.
        """
        self._current = None
        if self._line is not None:
            with suppress(OSError):  # the peer was quicker
                self._line.shutdown(socket.SHUT_RDWR)  # closing our descriptor would not end it
        elif self._wire is not None:
            if self._inner is not None:
                self._inner.abort()  # first: asyncio before Python 3.12 stumbles over unread bytes when it is closed in peace
            self._wire.abort()
            self._wire = self._tunnel = self._inner = None

    @property
    def ended_by_peer(self) -> bool:
        """Of a connection that is at its end: the peer ended it, as far as anybody can know. With TLS that is its close_notify (RFC 9112,
        9.8)."""
        return not self._taps or self._taps[-1].ended_by_peer()

    # -- lending

    @property
    def lendable(self) -> bool:
        """The connection stands, with nothing left to send."""
        wire = self._wire
        return wire is not None and not wire.is_closing() and not wire.get_write_buffer_size()

    async def lend(self) -> socket.socket | Deciphered:
        """What the rest of a body can be read from, in any one thread, until `take_back`. The transport above is paused already.

        Reading that was asked for before the pause is begun by the loop in its next round, so it is paused once more. TLS in the TLS of a
        proxy is deciphered twice.
        """
        assert self._wire is not None, "only what is lendable is lent"
        self._pause()
        raw: socket.socket = self._wire.get_extra_info("socket")
        self._line = socket.fromfd(raw.fileno(), raw.family, raw.type)
        self._line.setblocking(False)
        self._at_home.clear()
        await asyncio.sleep(0)
        self._pause()
        for tap in self._taps:
            assert tap.last is not None, "the handshake is over"
            self._lent = Deciphered(self._lent or self._line, *tap.last)
        return self._lent or self._line

    def _pause(self) -> None:
        for each in (self._wire, self._tunnel):
            if each is not None:
                each.pause_reading()

    def take_back(self, *, whole: bool) -> bool:
        """Nobody else reads it any more. True: all was read (`whole`) and nothing has come behind it, so it may serve again (T26)."""
        line, lent = self._line, self._lent
        if line is None:
            return False
        quiet = whole and (_is_quiet(line) if lent is None else lent.quiet())
        line.close()
        self._line = self._lent = None
        self._at_home.set()
        if self._current is None:
            self.drop()
        else:
            for each in (self._wire, self._tunnel):
                if each is not None:
                    each.resume_reading()
        return quiet

    def hold(self) -> None:
        """Nothing more is read until `go_on`."""
        assert self._current is not None, "only what is lendable is held"
        self._current.pause_reading()

    def go_on(self) -> bool:
        """The next answer may come; False: the connection is gone."""
        if self._current is not None:
            self._current.resume_reading()
        return self._current is not None

    async def aclose(self) -> None:
        """Drops the connection; returns when nobody else reads it and its socket is closed."""
        self.drop()
        await self._at_home.wait()
        await asyncio.sleep(0)  # an aborted transport closes its socket in the loop's next round

    # -- opening

    async def _open_straight(self, url: str, timeouts: Timeouts) -> None:
        peer = self.route.proxy or url
        who = "proxy" if self.route.forwarded else "server"
        with network_errors(url, f"reach the {who} {connect_target(peer)}"):
            async with asyncio.timeout(timeouts.connect):
                transport, protocol = await self._dial(peer, make_wire, self._proxy_tls if self.route.forwarded else self._tls)
        self._current = protocol
        certificate = peer_certificate(transport)
        if self.route.forwarded:
            self.proxy_certificate = certificate
        else:
            self.peer_certificate = certificate

    async def _open_tunnel(self, url: str, timeouts: Timeouts) -> None:
        """CONNECT, as often as the login needs it; over a new connection wherever the proxy closes the old one."""
        proxy = self.route.proxy
        assert proxy is not None
        for _ in range(EXCHANGES):
            with network_errors(url, f"reach the proxy {connect_target(proxy)}"):
                async with asyncio.timeout(timeouts.connect):
                    transport, link = await self._dial(proxy, Link, self._proxy_tls)
                self.proxy_certificate = peer_certificate(transport)
                self._proxy_login.opened(self.proxy_certificate, self.near)
                stands = await self._connect_legs(link, url, timeouts)
            if stands:
                await self._secure(transport, link, url, timeouts)
                return
            self.drop()
        raise AuthFailed("the proxy asks for one login after the other", url=url)

    async def _connect_legs(self, link: Link, url: str, timeouts: Timeouts) -> bool:
        """All legs that this connection carries. True: the tunnel stands; False: the proxy asks, and the answer needs another."""
        target, login = connect_target(url), self._proxy_login
        for _ in range(EXCHANGES):
            header = await login.header(method="CONNECT", target=target)
            answer = await exchange_connect(link, target, header, url=url, timeouts=timeouts)
            if 200 <= answer.status < 300:
                await login.passed(answer.status, answer.headers)
                return True
            if answer.status != Seat.PROXY.status:
                raise refused_connect(answer, url)
            login.challenged(answer.headers.getall(Seat.PROXY.challenge_header, []))
            if not answer.reusable:
                return False
        raise AuthFailed("the proxy asks for one login after the other", url=url)

    async def _secure(self, transport: asyncio.Transport, link: Link, url: str, timeouts: Timeouts) -> None:
        """TLS with the origin, inside the tunnel."""
        protocol = make_wire()
        with network_errors(url, f"agree on TLS with the server {connect_target(url)}"):
            if link.pending:
                raise bad_proxy_answer(url, "bytes follow the tunnel's head")
            async with asyncio.timeout(timeouts.connect):
                inner = await self._start_tls(transport, protocol, url, self._tls)
        self._current = protocol
        if transport is not self._wire:
            self._tunnel, self._inner = transport, inner
        self.peer_certificate = peer_certificate(inner)

    async def _dial(self, peer: str, factory: "Callable[[], _Protocol]", settings: TlsSettings) -> "tuple[asyncio.Transport, _Protocol]":
        """A connection to the peer of the route (a URL), with TLS where its scheme says so."""
        loop, tls = asyncio.get_running_loop(), peer[:6].lower() == "https:"
        connected = await _connected_socket(*authority(peer))
        protocol = factory()
        self._taps.clear()
        try:
            there, here = connected.getpeername()[0], connected.getsockname()[0]
            self.near = there if is_near(there, here) else None
            self._wire, _ = await loop.create_connection(asyncio.Protocol if tls else lambda: protocol, sock=connected)
        except BaseException:
            connected.close()
            raise
        transport = await self._start_tls(self._wire, protocol, peer, settings) if tls else self._wire
        return transport, protocol

    async def _start_tls(
        self, transport: asyncio.Transport, protocol: asyncio.Protocol, url: str, settings: TlsSettings
    ) -> asyncio.Transport:
        """TLS over what stands already, with the host of the URL. The deadline is the caller's."""
        tap = TappedContext(settings.effective())
        self._taps.append(tap)
        host = authority(url)[0].removesuffix(".")  # a trailing dot is the resolver's affair
        inner = await asyncio.get_running_loop().start_tls(
            transport,
            protocol,
            tap,
            server_hostname=host,
            ssl_shutdown_timeout=SHUTDOWN_TIMEOUT,
        )
        if inner is None:
            raise ConnectionAbortedError("closed in the handshake")
        settings.check_leaf(peer_certificate(inner), host, url)
        protocol.connection_made(inner)
        return inner


def _is_quiet(connection: socket.socket) -> bool:
    """Whether nothing lies in a non-blocking socket that nobody asked for; its end is nothing."""
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    except OSError:  # the connection is gone
        return True


async def _connected_socket(host: str, port: int) -> socket.socket:
    """A TCP connection: every address of the name, the families in turn, none waited for long (RFC 8305)."""
    addresses = await _resolve(host, port)
    return await aiohappyeyeballs.start_connection(addresses, happy_eyeballs_delay=HAPPY_EYEBALLS_DELAY, interleave=1)


async def _resolve(host: str, port: int) -> list[Any]:
    """The addresses of a host. A literal (`authority` lets only the usual forms pass) needs no resolver and no thread."""
    for family, address in ((socket.AF_INET, (host, port)), (socket.AF_INET6, (host, port, 0, 0))):
        try:
            socket.inet_pton(family, host)
            return [(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", address)]
        except OSError:
            pass  # not a literal of this family
    return await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
