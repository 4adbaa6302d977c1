"""Peers for one connection at a time: small enough that a test says on one screen what each byte on the wire was.

`Server` runs a coroutine per connection and keeps a log; `Origin` and `Proxy` are the two usual ones, with gates that ask
for a login (`basic`, `digest`, `ntlm`). The NTLM acceptor is pyspnego's own, so a login that passes here is a real one.
"""

import asyncio
import base64
import gc
import hashlib
import os
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import spnego

from bits_async.auth.policy import AuthScheme, AuthTarget, Grant
from bits_async.auth.policy import Origin as Place
from bits_async.transport.answers import Asked
from bits_async.transport.lane import Lanes, Party
from tests.waiting import until

ALICE = ("DOM\\alice", "Passw0rd-of-alice")
BOB = ("DOM\\bob", "Passw0rd-of-bob")
CONTENT = bytes(range(256)) * 400  # 100 KiB that show where they come from


# -- servers ------------------------------------------------------------------------------------------------------------------


@dataclass
class Request:
    method: str
    target: str
    headers: list[tuple[str, str]]
    connection: int

    def get(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)


@dataclass
class Connection:
    number: int
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    state: dict[str, Any] = field(default_factory=dict)

    async def request(self) -> Request | None:
        """The next request's head; None at the end."""
        try:
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        first, *lines = head[:-4].split("\r\n")
        method, target, _ = first.split(" ")
        return Request(method, target, [tuple(line.split(": ", 1)) for line in lines], self.number)  # type: ignore[misc]

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self, status: int, body: bytes = b"", *headers: str, length: bool = True) -> None:
        lines = [f"HTTP/1.1 {status} Something", *headers]
        if length:
            lines.append(f"Content-Length: {len(body)}")
        await self.send("\r\n".join([*lines, "", ""]).encode("latin-1") + body)

    @property
    def gone(self) -> bool:
        """The client closed it, whatever it had sent before."""
        return self.reader._eof or self.reader.exception() is not None  # type: ignore[attr-defined]

    def cut(self) -> None:
        with suppress(AttributeError):  # asyncio's TLS transport, when it was closed twice
            self.writer.transport.abort()


Handler = Callable[[Connection], Awaitable[None]]


class Server:
    """A listener on loopback; `handle` has a connection for as long as it runs."""

    def __init__(self, handle: Handler | None = None, tls: ssl.SSLContext | None = None) -> None:
        self.tls = tls
        self.connections: list[Connection] = []
        self.log: list[Request] = []
        self._handle = handle
        self._tasks: set[asyncio.Task[None]] = set()

    async def handle(self, connection: Connection) -> None:
        assert self._handle is not None
        await self._handle(connection)

    async def __aenter__(self) -> "Server":
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=self.tls, limit=1 << 20)
        self.port = self._server.sockets[0].getsockname()[1]
        self.scheme = "https" if self.tls else "http"
        self.base = f"{self.scheme}://localhost:{self.port}"
        self.place = Place.of(self.base)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        for connection in self.connections:
            connection.cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(len(self.connections) + 1, reader, writer)
        self.connections.append(connection)
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self.handle(connection)
        except (ConnectionError, ssl.SSLError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            with suppress(Exception):
                writer.close()

    @property
    def open(self) -> int:
        """Connections that the client still holds."""
        return sum(not connection.gone for connection in self.connections)


# -- gates --------------------------------------------------------------------------------------------------------------------

Gate = Callable[[Connection, Request, str, str], Awaitable[list[str] | None]]
"""(connection, request, challenge header, answer header) -> challenge lines, or None: pass (`connection.state["user"]`)."""


def basic(name: str, password: str) -> Gate:
    async def gate(connection: Connection, request: Request, ask: str, answer: str) -> list[str] | None:
        wanted = "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()
        if request.get(answer) != wanted:
            return [f'{ask}: Basic realm="here"']
        connection.state["user"] = name
        return None

    return gate


def digest(name: str, password: str, algorithm: str = "SHA-256") -> Gate:
    """RFC 7616 with qop=auth; each nonce is good for three uses, then it is stale; nc must rise."""
    uses: dict[str, int] = {}
    digest_of = {"MD5": hashlib.md5, "SHA-256": hashlib.sha256}[algorithm]

    def h(text: str) -> str:
        return digest_of(text.encode()).hexdigest()

    async def gate(connection: Connection, request: Request, ask: str, answer: str) -> list[str] | None:
        def challenge(stale: bool) -> list[str]:
            nonce = os.urandom(8).hex()
            uses[nonce] = 0
            line = f'{ask}: Digest realm="here", qop="auth", algorithm={algorithm}, nonce="{nonce}"'
            return [line + (", stale=true" if stale else "")]

        given = dict(re.findall(r'(\w+)="?([^",]+)"?', (request.get(answer) or "").partition(" ")[2]))
        nonce = given.get("nonce")
        if nonce not in uses:
            return challenge(nonce is not None)
        a1, a2 = h(f"{name}:here:{password}"), h(f"{request.method}:{given['uri']}")
        if given["response"] != h(f"{a1}:{nonce}:{given['nc']}:{given['cnonce']}:auth:{a2}"):
            return challenge(False)
        assert int(given["nc"], 16) == uses[nonce] + 1, "a nonce count that does not rise by one"
        uses[nonce] += 1
        if uses[nonce] > 3:
            del uses[nonce]
            return challenge(True)
        connection.state["user"] = name
        return None

    return gate


def ntlm(word: str = "NTLM", legs: list[int] | None = None) -> Gate:
    """A login that belongs to the connection; `legs` gets the number of each connection a leg came over."""

    async def gate(connection: Connection, request: Request, ask: str, answer: str) -> list[str] | None:
        given = request.get(answer)
        if given is None:
            return None if "user" in connection.state else [f"{ask}: {word}"]
        if legs is not None:
            legs.append(connection.number)
        token = base64.b64decode(given.partition(" ")[2])
        if "context" not in connection.state:
            connection.state["context"] = spnego.server(protocol="ntlm" if word == "NTLM" else "negotiate")
        context = connection.state["context"]
        try:
            out = context.step(token)
        except spnego.exceptions.SpnegoError:
            connection.state.pop("context")
            return [f"{ask}: {word}"]
        if context.complete:
            connection.state["user"] = context.client_principal
            connection.state.pop("context")
            if out:
                connection.state["final"] = f"{ask}: {word} {base64.b64encode(out).decode()}"
            return None
        return [f"{ask}: {word} {base64.b64encode(out or b'').decode()}"]

    return gate


# -- the two usual peers ------------------------------------------------------------------------------------------------------


class Origin(Server):
    """Serves CONTENT at every path, in ranges; `gate` asks for a login first."""

    def __init__(
        self, gate: Gate | None = None, *, tls: ssl.SSLContext | None = None, refusal: bytes = b"who?", extra: Sequence[str] = ()
    ) -> None:
        super().__init__(tls=tls)
        self.gate = gate
        self.refusal = refusal
        self.extra = extra
        self.users: list[str | None] = []
        self.redirects: dict[str, str] = {}

    async def handle(self, connection: Connection) -> None:
        while (request := await connection.request()) is not None:
            self.log.append(request)
            lines = await self.gate(connection, request, "WWW-Authenticate", "Authorization") if self.gate else None
            if lines is not None:
                await connection.answer(401, self.refusal, *lines, *self.extra)
                continue
            self.users.append(connection.state.get("user"))
            await self.serve(connection, request)

    async def serve(self, connection: Connection, request: Request) -> None:
        path = urlsplit(request.target).path
        final = [connection.state.pop("final")] if "final" in connection.state else []
        if path in self.redirects:
            await connection.answer(302, b"", f"Location: {self.redirects[path]}")
            return
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.get("Range") or "")
        if match is None:
            await connection.answer(200, CONTENT, 'ETag: "v1"', "Accept-Ranges: bytes", *final)
            return
        start, end = int(match[1]), int(match[2] or len(CONTENT) - 1) + 1
        where = f"Content-Range: bytes {start}-{end - 1}/{len(CONTENT)}"
        await connection.answer(206, CONTENT[start:end], 'ETag: "v1"', where, *final)


class Proxy(Server):
    """Forwards absolute-form requests, each client's over an upstream connection of its own, and opens tunnels."""

    def __init__(
        self, gate: Gate | None = None, *, tls: ssl.SSLContext | None = None, refusal: bytes = b"who?", promise: bool = False
    ) -> None:
        super().__init__(tls=tls)
        self.gate = gate
        self.refusal = refusal
        self.promise = promise  # Proxy-Support: Session-Based-Authentication
        self.users: list[str | None] = []

    async def handle(self, connection: Connection) -> None:
        try:
            await self.attend(connection)
        finally:
            if "upstream" in connection.state:
                connection.state["upstream"][1].transport.abort()

    async def attend(self, connection: Connection) -> None:
        while (request := await connection.request()) is not None:
            self.log.append(request)
            lines = await self.gate(connection, request, "Proxy-Authenticate", "Proxy-Authorization") if self.gate else None
            if lines is not None:
                await connection.answer(407, self.refusal, *lines)
                continue
            self.users.append(connection.state.get("user"))
            if request.method == "CONNECT":
                await self.tunnel(connection, request)
                return
            await self.forward(connection, request)

    async def tunnel(self, connection: Connection, request: Request) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(request.target.rpartition(":")[2]))
        await connection.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
        await self._pump(connection, reader, writer)

    async def _pump(self, connection: Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with suppress(ConnectionError):
                while data := await source.read(1 << 16):
                    sink.write(data)
                    await sink.drain()
            with suppress(Exception):
                sink.close()

        both = [asyncio.create_task(copy(connection.reader, writer)), asyncio.create_task(copy(reader, connection.writer))]
        try:
            await asyncio.gather(*both)
        finally:
            for task in both:
                task.cancel()
            writer.transport.abort()

    async def forward(self, connection: Connection, request: Request) -> None:
        assert request.target.startswith("http://"), "a forwarding proxy is asked in absolute form"
        parts = urlsplit(request.target)
        if "upstream" not in connection.state:
            connection.state["upstream"] = await asyncio.open_connection("127.0.0.1", parts.port)
        reader, writer = connection.state["upstream"]
        lines = [f"{key}: {value}" for key, value in request.headers if not key.lower().startswith("proxy-")]
        path = parts.path + (f"?{parts.query}" if parts.query else "")
        writer.write("\r\n".join([f"{request.method} {path} HTTP/1.1", *lines, "", ""]).encode("latin-1"))
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        length = re.search(r"(?i)content-length: (\d+)", head)
        assert length is not None
        body = await reader.readexactly(int(length[1]))
        if self.promise:
            head = head.replace("\r\n", "\r\nProxy-Support: Session-Based-Authentication\r\n", 1)
        await connection.send(head.encode("latin-1") + body)


# -- clients ------------------------------------------------------------------------------------------------------------------


class Security:
    """The one call that lanes make of a `TokenExecutor`, in a thread of its own."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1, "security-of-test")
        self.calls = 0

    async def run_security(self, func: Any, /, *args: Any, deadline: float, **kwargs: Any) -> Any:
        self.calls += 1
        async with asyncio.timeout(deadline):
            return await asyncio.get_running_loop().run_in_executor(self.pool, lambda: func(*args, **kwargs))


def grant(peer: Server, scheme: AuthScheme, who: tuple[str, str], target: AuthTarget | None = None) -> Grant:
    """A permission to show `who` to that peer."""
    target = target or (AuthTarget.PROXY if isinstance(peer, Proxy) else AuthTarget.SERVER)
    return Grant(target, scheme, who[0], who[1], frozenset({peer.place}))


async def fetch(lanes: Lanes, party: Party, url: str, start: int = 0, end: int | None = None) -> bytes:
    """The whole body, joined."""
    async with lanes.get(party, Asked(url, start, end)) as body:
        return b"".join([chunk async for chunk in body])


@asynccontextmanager
async def nothing_left_over() -> AsyncIterator[None]:
    """No descriptor and no task more at the end of the block than at its beginning."""

    def count() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks())

    gc.collect()
    before = count()
    yield
    await until(lambda: all(now <= then for now, then in zip(count(), before, strict=True)))
