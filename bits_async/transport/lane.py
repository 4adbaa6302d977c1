"""Requests on one connection of one identity, its challenges answered, its answers judged: `get(asked)` gives a `Body`.

A lane is one `LaneConnector`: never more than one connection, requests one after the other, each through `exchange.Wire`.
Logins of the NTLM kind belong to the connection they were made on, so whoever shares it is logged in as somebody else. A lane is
therefore used for exactly one key (`LaneKey`: token instance, what may be shown at both seats, rules, TLS settings with the client
certificate, who judges certificates, origin, proxy), and for no other, ever. That is the first security property of the product.

`Lanes` keeps lanes between requests, bounds them per host, and follows redirects; a new origin is a new lane, so nothing travels
with the old one. This module knows no job and no local file, and decides nothing about an answer: `answers.judge` does.
"""

import asyncio
import contextvars
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Final, Protocol

import aiohttp

from ..auth.policy import (
    AuthRules,
    AuthScheme,
    Delegation,
    Grant,
    Offer,
    Offers,
    Origin,
    Refusals,
    Seat,
    choose_offers,
    is_own_name,
    mechanisms,
    unseen,
    without_delegation,
    without_guarded,
)
from ..auth.schemes import BOUND, AuthFlow, channel_binding
from ..auth.tickets import Tickets
from ..errors import (
    HTTP_ERROR,
    AuthFailed,
    BitsError,
    ErrorCode,
    ErrorContext,
    ManagerClosed,
    NetworkError,
    TokenRequired,
    error_from_network,
    error_from_status,
    make_error,
    show_text,
    show_url,
)
from ..identity.threads import TokenExecutor
from ..identity.tokens import Token
from .answers import (
    Accept,
    AlreadyComplete,
    Answer,
    Asked,
    Challenged,
    Complete,
    FileChanged,
    RawHeaders,
    Redirect,
    Redirected,
    Refuse,
    Restart,
    Verdict,
    authority,
    certificate_wanted,
    check_url,
    judge,
    refused_for,
    request_targets,
)
from .connector import EXCHANGES, LEG_BODY_LIMIT, USER_AGENT, LaneConnector, Login, Route, throw, tokens
from .digests import Digests
from .exchange import HEAD_LIMIT, Reply, request_head
from .options import HttpOptions, SecurityFlags
from .proxies import ProxySettings, route
from .ranges import Detached, Validator
from .timeouts import Pace, Timeouts
from .tls import TlsSettings

CONNECTIONS_PER_HOST: Final = 8
IDLE_LANE: Final = 60.0  # seconds an unused connection is kept
SECURITY_DEADLINE: Final = 10.0  # seconds for one step with a KDC
REDIRECTS: Final = 10
LEFTOVER_LIMIT: Final = 64 * 1024  # an unwanted body up to this size is read, so that the connection can be used again
LEFTOVER_SECONDS: Final = 5.0
PAGE: Final = 1024  # bytes of an error's page that are looked at
_AUTOMATIC: Final = (("Accept", "*/*"), ("User-Agent", USER_AGENT))  # unless the application says otherwise
DETACH_FROM: Final = 4 * 1024 * 1024  # a body with less left is not worth a thread of its own


# -- the seam -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Party:
    """Whose request this is: everything that decides which connections it may use, and in whose threads its logins are made."""

    token: Token
    grants: tuple[Grant, ...]
    proxy: ProxySettings
    tls: TlsSettings
    rules: AuthRules
    timeouts: Timeouts
    security: TokenExecutor
    options: HttpOptions = field(default_factory=HttpOptions)
    judge: "Judge | None" = None
    redirected: bool = False  # the application did not name this peer: nothing is delegated to it
    heard: Callable[[RawHeaders], None] | None = None  # told the headers of each answer that is not a leg of a login


@dataclass(frozen=True)
class Judge:
    """Who is asked about a server's certificate after TLS verified it and before anything is requested."""

    key: object  # connections that it let pass are for those with the very same key
    ask: Callable[[str, int, bytes], Awaitable[None]]  # host, port, certificate (DER); raises BitsError for no


class Body(Protocol):
    """The answer was judged: these are the bytes that were asked for. Iterate once, or `detach`.

    Waiting for the next bytes can be cancelled and begun again; none are lost by it.
    Iterating raises a transient `NetworkError` when fewer bytes come than were promised; more never come out.
    """

    @property
    def url(self) -> str:
        """Where the bytes come from, after redirects."""
        ...

    @property
    def start(self) -> int: ...

    @property
    def length(self) -> int | None:
        """Bytes of this body; None: only its end tells."""
        ...

    @property
    def total(self) -> int | None: ...

    @property
    def validator(self) -> Validator: ...

    @property
    def content(self) -> Digests:
        """What the server says these bytes hash to, where they are a part of the file."""
        ...

    @property
    def headers(self) -> Mapping[str, str]: ...

    def __aiter__(self) -> AsyncIterator[bytes]: ...

    async def detach(self) -> Detached | None:
        """The socket with the rest of the body on it; None: iterate instead. Whoever takes it gives it back by `reattach`."""
        ...

    def reattach(self, moved: int) -> None:
        """So many bytes of what was detached were put away; the socket is not used any more."""
        ...


class Network(Protocol):
    """What the engine asks for bytes. `Lanes` is the real one, `bits_async.testing.FakeNetwork` the other."""

    def get(self, party: Party, asked: Asked) -> AbstractAsyncContextManager[Body]:
        """The bytes that were asked for.

        Raises (on entering):
            FileChanged: the file must be fetched anew.
            AlreadyComplete: nothing is left to fetch.
            Redirected: the party's options refuse to follow.
            BitsError: everything else.
        """
        ...

    async def forget(self, token: Token) -> None:
        """A token or credential was replaced or removed: connections made with it are closed when this returns (T25)."""
        ...

    async def aclose(self) -> None: ...


# -- errors at this seam ------------------------------------------------------------------------------------------------------


_OF_THE_WIRE: Final = (aiohttp.ClientError, aiohttp.http_exceptions.HttpProcessingError, OSError, EOFError)


class _WireErrors:
    """aiohttp's errors inside become ours; what it says of headers and URLs stays behind (T14).

    A class, because it is entered for each piece of a body that is waited for: a generator costs several times as much.
    """

    __slots__ = ("_doing", "_url")

    def __init__(self, url: str, doing: str) -> None:
        self._url = url
        self._doing = doing

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, _OF_THE_WIRE):
            throw(_wire_error(error, self._url, self._doing), error)


def _wire_error(exc: BaseException, url: str, doing: str) -> BitsError:
    if isinstance(exc, aiohttp.http_exceptions.HttpProcessingError):
        large = "got more than" in exc.message.lower() or "too many headers" in exc.message.lower()
        return _bad_answer(url, "its head is too large", ErrorCode.BG_E_TOO_LARGE) if large else _bad_answer(url, "it is not HTTP")
    if isinstance(exc.__cause__, ssl.SSLError):
        if exc.__cause__.reason == "SSLV3_ALERT_HANDSHAKE_FAILURE":  # in another handshake, to ask who we are (RFC 5246, 7.4.6)
            return certificate_wanted("the job showed none", url)
        return error_from_network(exc.__cause__, url=url, doing=doing)  # with TLS 1.3 a server judges our certificate after the handshake
    if isinstance(exc, TimeoutError | ssl.SSLError) and not isinstance(exc, aiohttp.ClientError):
        return error_from_network(exc, url=url, doing=doing)
    return error_from_network(ConnectionResetError(), url=url, doing=doing)


def _bad_answer(url: str, why: str, code: int = ErrorCode.BG_E_INVALID_SERVER_RESPONSE) -> BitsError:
    return make_error(code, ErrorContext.REMOTE_FILE, f"cannot use the answer: {why}", url=url)


def _bad_redirect(url: str, why: str) -> BitsError:
    return make_error(ErrorCode.ERROR_WINHTTP_REDIRECT_FAILED, ErrorContext.REMOTE_FILE, f"the redirect is not followed: {why}", url=url)


def _place(error: BaseException, url: str, identity: str) -> None:
    """An error of ours that passes says where and as whom."""
    if isinstance(error, BitsError):
        error.url = error.url or show_url(url)
        error.identity = error.identity or identity


# -- silence ------------------------------------------------------------------------------------------------------------------


class _Watch:
    """Gives a peer up that is waited for too long.

    One timer, which looks at the clock now and then: that costs less than one that is set for each wait, of which a small file has
    several.
    """

    def __init__(self) -> None:
        self.gave_up = False
        """The wait that began last took too long."""
        self._since = self._due = 0.0
        self._give_up: Callable[[], None] | None = None  # None: nobody waits
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, seconds: float, give_up: Callable[[], None]) -> None:
        """`give_up` is called when so much time has passed and `end` was not called. One wait at a time."""
        self.gave_up, self._give_up = False, give_up
        self._since = asyncio.get_running_loop().time()
        self._due = self._since + seconds
        if self._timer is None or self._timer.when() > self._due:
            self._look_at(self._due)

    def end(self) -> float:
        """The seconds since the wait began."""
        self._give_up = None
        return asyncio.get_running_loop().time() - self._since

    def close(self) -> None:
        """Nobody waits any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _look_at(self, moment: float) -> None:
        """The timer carries nobody's identity: it outlives the request for which it was set."""
        self.close()
        self._timer = asyncio.get_running_loop().call_at(moment, self._look, context=contextvars.Context())

    def _look(self) -> None:
        self._timer = None
        if self._give_up is None:
            return
        if self._due <= asyncio.get_running_loop().time():
            self.gave_up = True
            self._give_up()
        else:
            self._look_at(self._due)


# -- the body -----------------------------------------------------------------------------------------------------------------


class LaneBody:
    """A body on a lane's connection."""

    def __init__(self, lane: "Lane", reply: Reply, asked: Asked, verdict: Accept) -> None:
        self.url = asked.url
        self.start = verdict.start
        self.length = verdict.length
        self.total = verdict.total
        self.validator = verdict.validator
        self.content = verdict.content
        self.headers: Mapping[str, str] = reply.headers
        self._lane = lane
        self._reply = reply
        self._left = verdict.length
        self._seen = 0  # bytes that were taken from the stream
        self._unframed = verdict.length is None and "Transfer-Encoding" not in reply.headers
        self._idle = lane.timeouts.idle
        self._pace = Pace(lane.timeouts)
        self._ended = False

    def __aiter__(self) -> "LaneBody":
        return self

    async def __anext__(self) -> bytes:
        """The next bytes, as they came: a copy or a cut would cost more than it brings."""
        if self._ended:
            raise StopAsyncIteration
        try:
            self._lane.check(self.url)
            if self._pace.too_slow:
                code = ErrorCode.ERROR_WINHTTP_TIMEOUT
                raise make_error(code, ErrorContext.GENERAL_TRANSPORT, f"the server is too slow: {self._pace.told}")
            chunk = await self._read()
            if not chunk:
                self._lane.check(self.url)  # a connection that we cut may look like one that the server ended
                self._end()
                raise StopAsyncIteration
            self._seen += len(chunk)
            self._pace.came(len(chunk))
            if self._left is not None:
                self._left -= len(chunk)
                if self._left < 0:
                    raise _bad_answer(self.url, "it is longer than it said")
            return chunk
        except BitsError as error:
            _place(error, self.url, self._lane.identity)
            raise

    async def _read(self) -> bytes:
        content, watch = self._reply.content, self._lane.watch
        if content.exception() is None:  # else, and where nothing lies there yet, somebody has to be waited for
            if content.total_bytes > self._seen:
                return content.read_nowait()
            if content.is_eof():
                return b""
        with _WireErrors(self.url, "receive the file"):
            watch.begin(self._idle, self._give_up)
            try:
                return await content.readany()
            except (aiohttp.ClientError, aiohttp.http_exceptions.HttpProcessingError, OSError):
                if watch.gave_up:
                    raise TimeoutError from None
                if chunk := rest_of(content):
                    return chunk
                raise
            finally:
                self._pace.waited(watch.end())

    def _give_up(self) -> None:
        self._lane.drop()
        self._reply.give_up()

    def _end(self) -> None:
        self._ended = True
        if self._left or (self._unframed and not self._lane.connector.ended_by_peer):
            throw(error_from_network(EOFError(), url=self.url, doing="receive the whole file"))

    async def detach(self) -> Detached | None:
        """With a known length, and enough of it left to be worth a thread; None otherwise, then iterate.

        Between here and `reattach` nobody reads this connection but the holder of the socket.
        """
        left, content, connector = self._left, self._reply.content, self._lane.connector
        if sys.platform == "win32" or left is None or left < DETACH_FROM or self._ended or self._lane.withdrawn:
            return None
        if self._reply.content_length != left:
            return None  # in chunks: a range tells its length, but between the bytes there is framing
        if content.exception() is not None or content.is_eof() or not connector.lendable:
            return None
        already = rest_of(content)  # no await until reading is paused: nothing can come in between
        connector.hold()
        return Detached(await connector.lend(), already, left)

    def reattach(self, moved: int) -> None:
        """The holder has put `moved` bytes away and does not use the socket any more. A body that is whole frees its connection."""
        assert self._left is not None, "detach gives nothing without a length"
        self._left -= moved
        if not self._lane.connector.take_back(whole=self._left == 0):
            self._lane.drop()  # more than was framed: the rest would be taken for the next answer (T26)
        if self._left == 0 and self._lane.connector.go_on():
            self._reply.content.feed_eof()
        self._ended = True

    def close(self) -> None:
        """Read to its end: the connection may serve again. Left early: it goes."""
        if not self._reply.content.at_eof() or self._left:
            self._lane.connector.take_back(whole=False)  # lent to nobody in the end
            self._lane.drop()
            self._reply.give_up()
        self._ended = True


def rest_of(content: aiohttp.StreamReader) -> bytes:
    """What had arrived before the connection broke: aiohttp keeps it but will not give it out."""
    rest: bytes = content._read_nowait(-1)
    return rest


# -- one lane -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LaneKey:
    """What two requests must have in common to share a connection. A token and a TLS context are equal only to themselves."""

    token: Token
    shown: tuple[tuple[Seat, str, str, bool, Delegation], ...]
    """For each seat what may be shown there: scheme, keyed fingerprint of the credential, implicit or not, and the delegation."""
    rules: AuthRules
    tls: object
    judge: object
    origin: Origin
    proxy: str | None


class Lane:
    """One connection at a time, one key, one request at a time."""

    def __init__(self, key: LaneKey, offers: Mapping[Seat, Offers], party: Party, refusals: Refusals, tickets: Tickets) -> None:
        self.key = key
        self.identity = party.token.name
        self.withdrawn = False
        self.watch = _Watch()
        """Of the request that is being made: one at a time."""
        self.failed = False
        """A request had no answer: whatever state its logins are in, they are not tried again."""
        self._offers = offers
        self._party = party
        self._refusals = refusals
        self._tickets = tickets
        self._route = Route(key.origin, key.proxy)
        proxy = Login(Seat.PROXY, self._make_flow)
        origin = Login(Seat.ORIGIN, self._make_flow)
        self._logins = (proxy, origin) if self._route.forwarded else (origin,)
        self.connector = LaneConnector(self._route, party.tls.toward(key.origin), proxy)
        self._host = str(key.origin).partition("://")[2]
        """The value of `Host` (RFC 9110, 7.2): the port only where it is not the usual one."""
        self._usual: tuple[HttpOptions, Sequence[tuple[str, str]]] | None = None

    @property
    def timeouts(self) -> Timeouts:
        """Of the request that is being made."""
        return self._party.timeouts

    @property
    def connected(self) -> bool:
        """The next request needs no new connection."""
        return self.connector.ready

    @property
    def opened(self) -> int:
        """Connections made so far."""
        return self.connector.opened

    # -- asking

    async def ask(self, party: Party, asked: Asked) -> tuple[Verdict, Reply]:
        """One question, with as many legs as its logins need, and the verdict on the answer.

        Raises:
            BitsError: no answer, or a challenge that may not be answered.
        """
        self._party = party
        if not party.options.plain:
            self.drop()  # a kept connection that breaks would leave open whether the request was carried out
        reply: Reply | None = None
        try:
            for _ in range(EXCHANGES):
                reply = await self._exchange(asked)
                verdict = self._judge(asked, reply)
                if not isinstance(verdict, Challenged):
                    for login in self._logins:
                        await login.passed(reply.status, reply.headers)
                    return verdict, reply
                await self._take_challenge(verdict, asked, reply)
            raise AuthFailed("the peer asks for one login after the other")
        except BaseException:
            self.drop()
            if reply is not None:
                reply.give_up()
            self.failed = True
            raise

    def _judge(self, asked: Asked, reply: Reply) -> Verdict:
        raw = reply.raw_headers
        if sum(map(len, chain.from_iterable(raw))) + 4 * len(raw) > HEAD_LIMIT:
            raise _bad_answer(asked.url, "its head is too large", ErrorCode.BG_E_TOO_LARGE)
        return judge(asked, Answer(reply.status, reply.headers, show_text(reply.reason or "", 60)), now=time.time())

    async def _take_challenge(self, verdict: Challenged, asked: Asked, reply: Reply) -> None:
        """Hands the challenge to its seat. The route decides which seats there are, then the status which one asks (T25)."""
        asking = next((login for login in self._logins if login.seat.status == verdict.seat_status), None)
        if asking is None:
            raise make_error(
                HTTP_ERROR | verdict.seat_status,
                ErrorContext.REMOTE_FILE,
                f"the server answered HTTP {verdict.seat_status}, which only a proxy may ask; nothing was shown to it",
                http_status=verdict.seat_status,
            )
        if asking.seat is Seat.ORIGIN:  # a proxy that let the request through was content
            for login in self._logins:
                if login is not asking:
                    await login.passed(reply.status, reply.headers)
        keeps = "session-based-authentication" in tokens(reply.headers, "Proxy-Support")
        asking.challenged(
            reply.headers.getall(asking.seat.challenge_header, []),
            per_request=asking.seat is Seat.ORIGIN and self._route.forwarded and not keeps,
        )
        await self.settle(reply, LEG_BODY_LIMIT, self.timeouts.auth)
        if self._route.forwarded and "close" in tokens(reply.headers, "Proxy-Connection"):
            self.drop()

    # -- one exchange

    async def _exchange(self, asked: Asked) -> Reply:
        """One request and the head of its answer.

        A kept connection may have been closed by the peer at the very moment it is used again; then, and only then, the request
        is made once more on a new one. A GET only: asking twice does no harm, and the logins know that the connection changed.
        """
        if self.connector.ready:
            try:
                return await self._send(asked)
            except NetworkError as error:
                if error.code != ErrorCode.BG_E_CONNECTION_CLOSED or not self._party.options.plain:
                    raise
        await self._connect(asked.url)
        return await self._send(asked)

    def check(self, url: str) -> None:
        """Raises TokenRequired when the token was closed, NetworkError (transient) when the lane was withdrawn."""
        if self.key.token.closed:
            raise TokenRequired(f"the token of {self.identity} was closed", identity=self.identity)
        if self.withdrawn:
            throw(error_from_network(ConnectionAbortedError(), url=url, doing="go on as this identity"))

    async def _connect(self, url: str) -> None:
        self.check(url)
        await self.connector.open(url, self.timeouts)
        for login in self._logins:
            proxy = login.seat is Seat.PROXY
            near = self.connector.near if proxy or self._route.proxy is None else self._own_name()
            login.opened(self.connector.proxy_certificate if proxy else self.connector.peer_certificate, near)
        judge, certificate = self._party.judge, self.connector.peer_certificate
        if judge is not None and certificate is not None:
            await judge.ask(*authority(url), certificate)

    async def _send(self, asked: Asked) -> Reply:
        options = self._party.options
        whole, path = request_targets(asked.url)
        fields = [*self._usual_fields(options), *asked.headers().items()]
        for login in self._logins:
            value = await login.header(method=options.method, target=whole if login.seat is Seat.PROXY else path)
            if value is not None:
                fields.append((login.seat.answer_header, value))
        head = request_head(options.method, whole if self._route.forwarded else path, fields)
        self.check(asked.url)  # while the headers were made, or while the connection was
        with _WireErrors(asked.url, "get an answer"):
            self.watch.begin(self.timeouts.response, self.drop)
            try:
                return await self.connector.ask(head)
            except (aiohttp.ClientError, OSError):
                if self.watch.gave_up:
                    raise TimeoutError from None
                raise
            finally:
                self.watch.end()

    def _usual_fields(self, options: HttpOptions) -> Sequence[tuple[str, str]]:
        """What each request with these options carries; the last one is kept, as a job has one for all of its files."""
        if self._usual is None or self._usual[0] is not options:
            fields = [("Host", self._host), *options.headers_for(self._route.origin)]
            given = {name.lower() for name, _ in fields}
            fields.extend((name, value) for name, value in _AUTOMATIC if name.lower() not in given)
            if self._route.forwarded:
                fields.append(("Proxy-Connection", "keep-alive"))
            if not options.plain:
                fields.append(("Content-Length", "0"))  # the other methods that are allowed may have a body (RFC 9110, 8.6)
            self._usual = options, tuple(fields)
        return self._usual[1]

    # -- after an answer

    async def settle(self, reply: Reply, limit: int, seconds: float) -> bytes:
        """Reads a body that nobody wants, so that the connection can go on; a larger or slower one costs the connection (T26).

        Returns its beginning.
        """
        left, settled, page = limit, False, b""
        try:
            announced = reply.content_length or 0
            async with asyncio.timeout(seconds):
                while announced <= limit and left >= 0 and not settled:
                    chunk = await reply.content.readany()
                    left -= len(chunk)
                    settled = not chunk
                    page += chunk[: PAGE - len(page)]
        except (aiohttp.ClientError, aiohttp.http_exceptions.HttpProcessingError, OSError):
            pass  # the connection is given up below, whatever is wrong with it
        finally:
            if not settled:
                self.drop()
                reply.give_up()
        return page

    def drop(self) -> None:
        """Closes the connection at once; the next request opens another."""
        self.connector.drop()

    def withdraw(self) -> None:
        """The identity was taken away: nothing more leaves on this lane, whoever still holds it."""
        self.withdrawn = True
        self.drop()

    async def aclose(self) -> None:
        self.watch.close()
        await self.connector.aclose()

    # -- logins

    def _make_flow(self, seat: Seat, certificate: bytes | None, near: str | None, per_request: bool) -> AuthFlow:
        peer = self._route.proxy_origin if seat is Seat.PROXY else self._route.origin
        assert peer is not None
        offers, rules = self._offers[seat], self._party.rules
        if near is not None:
            offers = without_guarded(offers, near)
        elif seat is Seat.ORIGIN and self._route.proxy is not None:
            offers = unseen(offers)
        if per_request:
            rules = replace(rules, ntlm_in_negotiate=False)
            offers = _per_request(offers, rules)
        binding = None
        if certificate is not None and any(offer.scheme in BOUND for offer in offers):
            binding = channel_binding(certificate)
        return AuthFlow(
            seat,
            peer,
            offers,
            security=self._run_security,
            rules=rules,
            refusals=self._refusals,
            encrypted=peer.scheme == "https",
            binding=binding,
            identity=self.identity,
            tickets=self._tickets,
        )

    def _own_name(self) -> str | None:
        """The server's name, if it is this machine's own; that is all that is known of a server behind a proxy."""
        host = self._route.origin.host
        return host if is_own_name(host, socket.gethostname()) else None

    async def _run_security(self, func: Any, /, *args: Any, **kwargs: Any) -> Any:
        """In the threads of the request that is being made; the lane outlives the executor it was made with."""
        return await self._party.security.run_security(func, *args, deadline=SECURITY_DEADLINE, **kwargs)


def _per_request(offers: Offers, rules: AuthRules) -> Offers:
    """The offers that need no connection of their own. A proxy that promises nothing may hand the next request of anybody else to
    the connection where this one was logged in (RFC 4559, 6)."""
    kept = [offer for offer in offers if not _connection_bound(offer, rules)]
    reason = (
        "its login belongs to a connection, and the proxy does not promise to keep one for us (Proxy-Support: Session-Based-Authentication)"
    )
    dropped = [f"{offer.scheme.name}: {reason}" for offer in offers if _connection_bound(offer, rules)]
    return Offers.of(kept, [*offers.withheld, *dropped])


def _connection_bound(offer: Offer, rules: AuthRules) -> bool:
    return offer.scheme in (AuthScheme.NTLM, AuthScheme.NEGOTIATE) and mechanisms(offer, rules) == ("ntlm",)


# -- many lanes ---------------------------------------------------------------------------------------------------------------


class _Host:
    """The connections to one host, over all keys: those in use, and those kept for the next request of their key."""

    def __init__(self, limit: int) -> None:
        self.users = 0
        self.turn = asyncio.Semaphore(limit)  # hands the turns out in the order they were asked for
        self.busy: set[Lane] = set()
        self.idle: dict[Lane, float] = {}  # since when (of the loop's clock); the longest unused first
        self.sweeper: asyncio.TimerHandle | None = None  # one for all of them

    def take(self, key: LaneKey) -> Lane | None:
        """A kept lane of exactly this key; one whose connection still stands, if there is one."""
        fitting = [lane for lane in self.idle if lane.key is key or lane.key == key]
        if not fitting:
            return None
        lane = fitting[0] if len(fitting) == 1 else next((lane for lane in reversed(fitting) if lane.connected), fitting[-1])
        del self.idle[lane]
        return lane

    def oldest(self) -> Lane | None:
        """The lane that was not used for longest, no longer kept."""
        lane = next(iter(self.idle), None)
        if lane is not None:
            del self.idle[lane]
        return lane


class _Request:
    """What `Lanes.get` gives: a class, because each small file enters one, and two generators cost several times as much."""

    __slots__ = ("_asked", "_begun", "_lanes", "_party")

    def __init__(self, lanes: "Lanes", party: Party, asked: Asked) -> None:
        self._lanes = lanes
        self._party = party
        self._asked = asked

    async def __aenter__(self) -> LaneBody:
        self._begun = await self._lanes.begin(self._party, self._asked)
        return self._begun[2]

    async def __aexit__(self, *_: object) -> None:
        self._lanes.end(*self._begun)


class Lanes:
    """The real `Network`: lanes kept per key, bounded per host, closed when they idle.

    Belongs to one event loop. `refusals` and `tickets` are shared by all of its lanes; tickets that it made it also closes.
    """

    def __init__(
        self,
        limit_per_host: int = CONNECTIONS_PER_HOST,
        *,
        refusals: Refusals | None = None,
        tickets: Tickets | None = None,
        idle_seconds: float = IDLE_LANE,
    ) -> None:
        self._limit = limit_per_host
        self._refusals = Refusals() if refusals is None else refusals
        self._tickets = Tickets(self._refusals) if tickets is None else tickets
        self._owns_tickets = tickets is None
        self._idle_seconds = idle_seconds
        self._hosts: dict[str, _Host] = {}
        self._last_key: tuple[tuple[object, ...], tuple[LaneKey, dict[Seat, Offers]]] | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False

    # -- for the engine

    def get(self, party: Party, asked: Asked) -> AbstractAsyncContextManager[Body]:
        """See `Network.get`. Redirects are followed; the body says where it comes from in the end."""
        return _Request(self, party, asked)

    async def begin(self, party: Party, asked: Asked) -> "tuple[_Host, Lane, LaneBody]":
        """The body, and the lane that it comes on, until `end`."""
        url = check_url(asked.url)
        been = {(party.options.method, url)}
        while True:
            host, lane = await self._take(party, url)
            try:
                body, onward = await self._ask(lane, party, asked.at(url))
            except BaseException as error:
                self._give_back(host, lane)
                _place(error, url, party.token.name)
                raise
            if body is not None:
                return host, lane, body
            self._give_back(host, lane)
            try:
                party, url = _follow(party, url, onward, been)
            except BitsError as error:
                _place(error, url, party.token.name)
                raise

    def end(self, host: "_Host", lane: Lane, body: LaneBody) -> None:
        """Whoever had the body needs it no more."""
        try:
            body.close()
        finally:
            self._give_back(host, lane)

    async def forget(self, token: Token) -> None:
        """See `Network.forget`. Requests that are being made on such lanes fail as if the connection had been cut."""
        for host in list(self._hosts.values()):
            for lane in [lane for lane in host.idle if lane.key.token is token]:
                del host.idle[lane]
                self._close_soon(lane)
            for lane in host.busy:
                if lane.key.token is token:
                    lane.withdraw()
        self._last_key = None
        self._forget_empty_hosts()
        self._tickets.forget(token)
        await self._closed_all()

    async def aclose(self) -> None:
        """Closes every connection. Requests that are being made fail; no other can begin."""
        self._closed = True
        for host in list(self._hosts.values()):
            while (lane := host.oldest()) is not None:
                self._close_soon(lane)
            for lane in host.busy:
                lane.withdraw()
                self._close_soon(lane)
        self._forget_empty_hosts()
        await self._closed_all()
        if self._owns_tickets:
            await self._tickets.aclose()

    # -- asking

    async def _ask(self, lane: Lane, party: Party, asked: Asked) -> tuple[LaneBody | None, Redirect]:
        """(the body, anything), or (None, where to go on)."""
        verdict, reply = await lane.ask(party, asked)
        if party.heard is not None:
            party.heard(reply.raw_headers)
        if isinstance(verdict, Accept):
            return LaneBody(lane, reply, asked, verdict), Redirect("")
        if isinstance(verdict, Refuse) and verdict.error.code == ErrorCode.BG_E_INVALID_SERVER_RESPONSE:
            lane.drop()  # who breaks HTTP in one answer is not believed where it ends (T26)
        page = await lane.settle(reply, LEFTOVER_LIMIT, LEFTOVER_SECONDS)
        match verdict:
            case Redirect():
                return None, verdict
            case Restart():
                raise FileChanged(verdict.validator, verdict.reason, changed=verdict.changed, same=verdict.same)
            case Complete():
                raise AlreadyComplete(verdict.total)
            case Refuse():
                raise refused_for(verdict.error, page)
            case Challenged():  # the lane answers or refuses each of them
                raise error_from_status(verdict.seat_status, url=asked.url)

    # -- keeping lanes

    async def _take(self, party: Party, url: str) -> tuple[_Host, Lane]:
        """A lane that may be used for this party and URL, until `_give_back`; waits for its turn at the host."""
        try:
            key, offers = self._key(party, url)
        except BitsError as error:
            _place(error, url, party.token.name)
            raise
        name = key.origin.host
        host = self._hosts.get(name) or self._hosts.setdefault(name, _Host(self._limit))
        host.users += 1
        try:
            await host.turn.acquire()
        except BaseException:
            self._leave(host)
            raise
        try:
            if self._closed:
                raise ManagerClosed()
            lane = host.take(key) or self._new_lane(host, key, offers, party)
        except BaseException:
            host.turn.release()
            self._leave(host)
            raise
        host.busy.add(lane)
        return host, lane

    def _leave(self, host: _Host) -> None:
        host.users -= 1
        if not (host.users or host.idle):
            self._forget_empty_hosts()

    def _key(self, party: Party, url: str) -> tuple[LaneKey, dict[Seat, Offers]]:
        """Without credentials it is the same for each file of a job: the last one is kept, with all that it was made of."""
        if party.grants:
            return self._new_key(party, Origin.of(url), route(party.proxy, url))
        server = url.split("/", 3)[:3]  # scheme and authority: origin and proxy are those of the server, whatever it is asked for
        tls = None if server[0] == "http:" and not party.proxy.proxy_list else party.tls.key  # the defaults may have changed since
        asking = (party.token, party.rules, party.tls, tls, party.judge and party.judge.key, party.redirected, party.proxy)
        made_of = (*asking, *server)
        if self._last_key is None or self._last_key[0] != made_of:
            self._last_key = made_of, self._new_key(party, Origin.of(url), route(party.proxy, url))
        return self._last_key[1]

    def _new_key(self, party: Party, origin: Origin, proxy: str | None) -> tuple[LaneKey, dict[Seat, Offers]]:
        tls = party.tls.toward(origin)
        offers = {Seat.ORIGIN: choose_offers(Seat.ORIGIN, origin, party.grants, party.token, party.rules), Seat.PROXY: Offers()}
        if party.redirected or not tls.verifies:
            offers[Seat.ORIGIN] = without_delegation(offers[Seat.ORIGIN])
        if proxy is not None:
            offers[Seat.PROXY] = choose_offers(Seat.PROXY, Origin.of(proxy), party.grants, party.token, party.rules)
        shown = tuple(
            (seat, offer.scheme.word, offer.fingerprint, offer.implicit, offer.delegation)
            for seat, given in offers.items()
            for offer in given
        )
        judge = None if party.judge is None else party.judge.key
        return LaneKey(party.token, shown, party.rules, tls.key, judge, origin, proxy), offers

    def _new_lane(self, host: _Host, key: LaneKey, offers: Mapping[Seat, Offers], party: Party) -> Lane:
        """Makes room where kept lanes of others fill the host's share."""
        if len(host.busy) + len(host.idle) >= self._limit and (oldest := host.oldest()) is not None:
            self._close_soon(oldest)
        return Lane(key, offers, party, self._refusals, self._tickets)

    def _give_back(self, host: _Host, lane: Lane) -> None:
        """The request is over; somebody else may have the lane, or the host's turn."""
        host.busy.discard(lane)
        self._keep_or_close(host, lane)
        host.turn.release()
        self._leave(host)

    def _keep_or_close(self, host: _Host, lane: Lane) -> None:
        if self._closed:
            return  # aclose() has closed it already
        if lane.withdrawn or lane.failed:
            self._close_soon(lane)
            return
        if not lane.connected:
            lane.drop()  # the peer wants to close it, or something lies in it that nobody asked for
        now = asyncio.get_running_loop().time()
        host.idle[lane] = now
        if host.sweeper is None:
            self._sweep_at(host, now + self._idle_seconds)

    def _sweep_at(self, host: _Host, moment: float) -> None:
        host.sweeper = asyncio.get_running_loop().call_at(moment, self._sweep, host, context=contextvars.Context())

    def _sweep(self, host: _Host) -> None:
        """Closes the lanes that nobody has used for too long."""
        host.sweeper = None
        now = asyncio.get_running_loop().time()
        for lane in [lane for lane, since in host.idle.items() if since + self._idle_seconds <= now]:
            del host.idle[lane]
            self._close_soon(lane)
        if host.idle:
            self._sweep_at(host, min(host.idle.values()) + self._idle_seconds)
        self._forget_empty_hosts()

    def _forget_empty_hosts(self) -> None:
        for name in [name for name, host in self._hosts.items() if not (host.users or host.idle)]:
            if (sweeper := self._hosts.pop(name).sweeper) is not None:
                sweeper.cancel()
        if not self._hosts:
            self._last_key = None  # nor is a token kept that nobody uses

    def _close_soon(self, lane: Lane) -> None:
        """The socket goes now, or, if somebody else reads it, when it is home: a task waits for that, which carries nobody's identity."""
        lane.drop()
        task = asyncio.get_running_loop().create_task(lane.aclose(), context=contextvars.Context(), name="close a lane")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _closed_all(self) -> None:
        while self._closing:
            await asyncio.wait(self._closing)


def _follow(party: Party, url: str, onward: Redirect, been: set[tuple[str, str]]) -> tuple[Party, str]:
    """Who asks next, and where; refuses what the party does not want, what never ends, and what gives up TLS unasked."""
    flags = party.options.flags
    if SecurityFlags.HTTP_REDIRECT_POLICY_DISALLOW in flags:
        error = error_from_status(onward.status, url=url, reason="a redirect, which this job does not follow", identity=party.token.name)
        error.transient = False
        error.advice = "the file's remote name is now where the server redirected to: look at it, then resume the job"
        raise Redirected(onward.location, error)
    if onward.downgrade and SecurityFlags.HTTP_REDIRECT_POLICY_ALLOW_HTTPS_TO_HTTP not in flags:
        raise _bad_redirect(url, "it leads from https to http")
    options = party.options.after_redirect(onward.status)
    if (options.method, onward.location) in been:
        raise _bad_redirect(url, "it leads back to where it came from")
    if len(been) > REDIRECTS:
        raise _bad_redirect(url, f"it is the {REDIRECTS + 1}th")
    been.add((options.method, onward.location))
    return replace(party, options=options, redirected=True), onward.location
