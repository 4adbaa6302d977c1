r"""Loopback peers: an origin, a proxy and a KDC that do on purpose what real ones do by accident.

They live on the test's own event loop, so a test changes a file, holds a body or reads the log between two lines of its own:

    async with Origin(door=Door("NTLM")) as origin, Proxy(door=Door("Basic")) as proxy:
        url = origin.serve("/file", b"...", etag='"v1"')
        origin.fault("/file", Fault(cut_after=1000, reset=True))    # the next answer only; then honest again
        ...
        assert [seen.user for seen in origin.passed] == [r"LAB\alice"]

`Origin` serves versions of files; `Fault` says how one answer departs from the truth; `Door` is who may pass, and how it
misbehaves while it asks; `Hold` stops a peer at a point until the test says go. Logins by NTLM, Negotiate and Kerberos are
decided by real acceptors (`doors.py`). HTTP itself is shared with `examples/embedded.py`. A proxy here connects to this
machine only, whatever the host is called, so any host name may be used in a URL.
"""

import asyncio
import contextlib
import select
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from email.utils import formatdate
from typing import Final, Self
from urllib.parse import urlsplit

from examples.embedded import (
    HEAD_LIMIT,
    HOP_BY_HOP,
    ORIGIN,
    PIECE,
    PROXY,
    Head,
    Seat,
    Streams,
    body_pieces,
    port_of,
    read_head,
    wanted_range,
)
from tests.certificates import Authority, ServerTls
from tests.doors import USERS, Admission, Door, Guard, Hold, Misbehaviour

REASONS: Final = {200: "OK", 206: "Partial Content", 302: "Found", 401: "Unauthorized", 407: "Proxy Authentication Required"}


__all__ = [
    "HONEST",
    "USERS",
    "Authority",
    "Door",
    "Fault",
    "Hold",
    "Misbehaviour",
    "Origin",
    "Proxy",
    "Seen",
    "ServerTls",
    "SilentKdc",
    "Version",
    "answer",
    "header_bomb",
    "redirect",
]

# -- what a test says to a peer


@dataclass(frozen=True, kw_only=True)
class Fault:
    """How one answer departs from the truth; fields combine."""

    cut_after: int | None = None  # the connection ends after so many bytes of the body
    reset: bool = False  # ... by RST rather than FIN
    ignore_range: bool = False  # 200 and the whole file, whatever was asked for
    ignore_if_range: bool = False  # 206 of today's version, though the validator names another
    content_range: str | None = None  # in place of the right one; "": the header is missing
    shift: int = 0  # a range begins so many bytes behind where it was asked for, and says so
    length_off: int = 0  # the announced length is so much more than what comes; then the connection ends
    trailers: tuple[tuple[str, str], ...] = ()  # after the last chunk
    no_validator: bool = False  # neither ETag nor Last-Modified
    chunked: bool = False  # no Content-Length, chunks
    close_delimited: bool = False  # no Content-Length, the end of the connection is the end of the body
    rate: float | None = None  # bytes per second
    hold: Hold | None = None
    headers: tuple[tuple[str, str], ...] = ()  # added; one of the same name is replaced
    status: int | None = None  # any other answer than the file, with `body`
    body: bytes = b""
    raw: bytes | None = None  # these bytes in place of any answer, then the connection ends
    then: Callable[[], object] | None = None  # called when the answer is over, also when it was cut


HONEST: Final = Fault()


def redirect(location: str, status: int = 302) -> Fault:
    return Fault(status=status, headers=(("Location", location),))


def answer(status: int, body: bytes = b"", **headers: str) -> Fault:
    """Any answer; `Retry_After="3"` is the header Retry-After."""
    return Fault(status=status, body=body, headers=tuple((name.replace("_", "-"), value) for name, value in headers.items()))


def header_bomb(size: int, *, lines: int = 1) -> Fault:
    """A 200 with `lines` headers of `size` bytes each."""
    return Fault(headers=tuple((f"X-Bomb-{number}", "b" * size) for number in range(lines)))


@dataclass(frozen=True)
class Version:
    """One version of a remote file."""

    body: bytes
    etag: str | None
    last_modified: str | None

    @property
    def validators(self) -> list[tuple[str, str]]:
        found = [("ETag", self.etag), ("Last-Modified", self.last_modified)]
        return [(name, value) for name, value in found if value is not None]

    def agrees(self, if_range: str | None) -> bool:
        return if_range is None or if_range in (self.etag, self.last_modified)


@dataclass
class Seen:
    """One request, as a peer saw it."""

    connection: int
    head: Head
    user: str | None = None
    status: int = 0
    sent: int = 0  # bytes of the body

    @property
    def method(self) -> str:
        return self.head.method

    @property
    def target(self) -> str:
        return self.head.target

    @property
    def range(self) -> str | None:
        return self.head.get("Range")

    def header(self, name: str) -> str | None:
        return self.head.get(name)


# -- servers


class Cut(Exception):
    """The connection ends here, on purpose."""


def _abort(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(AttributeError):  # CPython 3.11 stumbles over a TLS connection that was closed twice before
        writer.transport.abort()


@dataclass
class Connection:
    number: int
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    guard: Guard | None
    ways: dict[int, Streams] = field(default_factory=dict)  # a proxy's connections to origins, by port

    async def way(self, port: int) -> Streams:
        if port not in self.ways:
            self.ways[port] = await asyncio.open_connection("127.0.0.1", port, limit=HEAD_LIMIT)
        return self.ways[port]

    async def close(self) -> None:
        """What was written still goes out, unless the client does not take it."""
        for _, writer in self.ways.values():
            _abort(writer)
        self.writer.close()
        try:
            async with asyncio.timeout(10):
                await self.writer.wait_closed()
        except (OSError, TimeoutError):
            _abort(self.writer)

    def end(self, *, reset: bool) -> None:
        """Close without flushing by RST, or after what was written by FIN."""
        if reset:
            sock = self.writer.get_extra_info("socket")
            with contextlib.suppress(OSError):  # the client was quicker
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
            _abort(self.writer)
        else:
            self.writer.close()


class Server:
    """What an origin and a proxy share: listening, counting connections, the door, the log."""

    seat: Seat
    host = "localhost"
    port: int

    def __init__(self, *, door: Door | None = None, tls: ServerTls | None = None) -> None:
        self.door, self.tls = door, tls
        self.requests: list[Seen] = []
        self.connections = 0  # accepted so far
        self.close_handshakes = 0  # so many new connections are closed before a byte is read
        self._open: set[asyncio.Task[None]] = set()

    @property
    def base_url(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.host}:{self.port}"

    @property
    def passed(self) -> list[Seen]:
        """The requests that were let in."""
        return [seen for seen in self.requests if seen.status not in (401, 407)]

    @property
    def open_connections(self) -> int:
        return len(self._open)

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_server(
            self._accept, "127.0.0.1", 0, ssl=self.tls.context if self.tls else None, limit=HEAD_LIMIT
        )
        self.port = self._listener.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._listener.close()
        self.drop_connections()
        await asyncio.gather(*self._open, return_exceptions=True)
        await asyncio.sleep(0)  # aborted transports close their sockets in the loop's next round

    def drop_connections(self) -> None:
        """End every connection at once, as a server that is restarted does."""
        for task in self._open:
            task.cancel()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        guard = Guard(self.door, self.seat, self.connections) if self.door else None
        task = asyncio.get_running_loop().create_task(self._run(Connection(self.connections, reader, writer, guard)))
        self._open.add(task)
        task.add_done_callback(self._open.discard)

    async def _run(self, connection: Connection) -> None:
        if self.close_handshakes:
            self.close_handshakes -= 1
            connection.end(reset=False)
            return
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, Cut):  # the client went away, or a fault ends it here
                while (head := await read_head(connection.reader)) is not None:
                    if not await self._answer(connection, head):
                        break
                    await connection.writer.drain()
            await connection.close()
        except asyncio.CancelledError:
            connection.end(reset=True)
        finally:
            for _, writer in connection.ways.values():
                _abort(writer)
            if connection.guard is not None:
                connection.guard.close()

    async def _answer(self, connection: Connection, head: Head) -> bool:
        """Let the request in or refuse it; False when the connection ends here."""
        seen = Seen(connection.number, head)
        self.requests.append(seen)
        extra: list[tuple[str, str]] = []
        if connection.guard is not None:
            admission = await connection.guard.admit(head)
            seen.user, extra = admission.user, admission.headers
            if admission.user is None:
                return await self._refuse(connection, seen, admission)
        return await self._serve(connection, seen, extra)

    async def _refuse(self, connection: Connection, seen: Seen, admission: Admission) -> bool:
        assert self.door is not None
        ways = self.door.misbehave
        seen.status = self.seat.status
        closing = ways.close_legs > 0 if admission.in_progress else ways.close_first > 0
        headers = [*admission.headers, *ways.refusal_headers]
        if closing and admission.in_progress:
            ways.close_legs -= 1
        elif closing:
            ways.close_first -= 1
        if closing:
            headers.append(("Connection" if self.seat is ORIGIN else "Proxy-Connection", "close"))
        body = b"" if seen.method == "HEAD" else b"r" * ways.refusal_body
        await self._write(connection, seen, headers, body, Fault(status=self.seat.status, chunked=ways.refusal_chunked))
        return not closing

    async def _serve(self, connection: Connection, seen: Seen, extra: list[tuple[str, str]]) -> bool:
        raise NotImplementedError

    async def _write(
        self, connection: Connection, seen: Seen, headers: list[tuple[str, str]], body: bytes | memoryview, fault: Fault
    ) -> None:
        """An answer of `seen.status`, as far as the fault lets it come."""
        if fault.hold is not None and fault.hold.after is None:
            await fault.hold.here()
        headers = _replaced(headers, fault.headers)
        if fault.chunked:
            headers.append(("Transfer-Encoding", "chunked"))
        elif fault.close_delimited:
            headers.append(("Connection", "close"))
        else:
            headers = [("Content-Length", str(len(body) + fault.length_off)), *headers]
        connection.writer.write(Head(f"HTTP/1.1 {seen.status} {REASONS.get(seen.status, 'Status')}", headers).encode())
        if seen.method == "HEAD":
            return
        async for piece in _paced(body, fault):
            connection.writer.write(b"%x\r\n%b\r\n" % (len(piece), piece) if fault.chunked else piece)
            await connection.writer.drain()
            seen.sent += len(piece)
        if fault.cut_after is not None and seen.sent < len(body):
            connection.end(reset=fault.reset)
            raise Cut
        if fault.length_off:
            connection.end(reset=False)
            raise Cut
        if fault.chunked:
            trailers = "".join(f"{name}: {value}\r\n" for name, value in fault.trailers)
            connection.writer.write(b"0\r\n%b\r\n" % trailers.encode())


def _replaced(headers: list[tuple[str, str]], others: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    names = {name.lower() for name, _ in others}
    return [*((name, value) for name, value in headers if name.lower() not in names), *others]


async def _paced(body: bytes | memoryview, fault: Fault) -> AsyncIterator[bytes]:
    """The pieces of a body up to a cut, with the hold and the rate of the fault."""
    stops = {0, len(body) if fault.cut_after is None else min(fault.cut_after, len(body))}
    hold_at = fault.hold.after if fault.hold is not None else None
    end = max(stops)
    position = 0
    step = PIECE if fault.rate is None else max(1, min(PIECE, int(fault.rate / 20)))
    while True:
        if hold_at is not None and position >= hold_at:
            assert fault.hold is not None
            hold_at = None
            await fault.hold.here()
        if position >= end:
            return
        until = min(position + step, end, *([hold_at] if hold_at is not None else []))
        yield bytes(body[position:until])
        if fault.rate is not None:
            await asyncio.sleep((until - position) / fault.rate)
        position = until


class Origin(Server):
    """Serves versions of files, obeying Range and If-Range, unless a fault says otherwise."""

    seat = ORIGIN

    def __init__(self, *, door: Door | None = None, tls: ServerTls | None = None) -> None:
        super().__init__(door=door, tls=tls)
        self._files: dict[str, Version] = {}
        self._next: dict[str, list[Fault]] = {}
        self._always: dict[str, Fault] = {}

    def url(self, path: str) -> str:
        return self.base_url + path

    def serve(self, path: str, body: bytes, *, etag: str | None = '"v1"', last_modified: str | float | None = None) -> str:
        """The file's version from now on; returns its URL. A number for `last_modified` is seconds since 1970."""
        stamp = formatdate(last_modified, usegmt=True) if isinstance(last_modified, (int, float)) else last_modified
        self._files[path] = Version(body, etag, stamp)
        return self.url(path)

    def fault(self, path: str, *faults: Fault) -> None:
        """How the next answers to this path go wrong, one fault each; HONEST for one that does not.

        Refusals at the door do not count.
        """
        self._next.setdefault(path, []).extend(faults)

    def always(self, path: str, fault: Fault) -> None:
        """How every answer to this path goes wrong."""
        self._always[path] = fault

    async def _serve(self, connection: Connection, seen: Seen, extra: list[tuple[str, str]]) -> bool:
        async for _ in body_pieces(seen.head, connection.reader):
            pass
        path = seen.target.partition("?")[0]
        faults = self._next.get(path)
        fault = faults.pop(0) if faults else self._always.get(path, HONEST)
        try:
            return await self._send(connection, seen, extra, path, fault)
        finally:
            if fault.then is not None:
                fault.then()

    async def _send(self, connection: Connection, seen: Seen, extra: list[tuple[str, str]], path: str, fault: Fault) -> bool:
        if fault.raw is not None:
            connection.writer.write(fault.raw)
            await connection.writer.drain()
            return False
        version = self._files.get(path)
        if fault.status is not None or version is None:
            seen.status = fault.status or 404
            await self._write(connection, seen, extra, fault.body, fault)
        else:
            headers, body = self._judge(seen, version, fault)
            await self._write(connection, seen, [*extra, *headers], body, fault)
        return not fault.close_delimited and (seen.header("Connection") or "").lower() != "close"

    def _judge(self, seen: Seen, version: Version, fault: Fault) -> tuple[list[tuple[str, str]], memoryview]:
        """The headers and the part of the file that the request gets."""
        size = len(version.body)
        headers = [] if fault.no_validator else version.validators
        headers.append(("Accept-Ranges", "bytes"))
        heeded = seen.range is not None and not fault.ignore_range
        if heeded and not fault.ignore_if_range:
            heeded = version.agrees(seen.header("If-Range"))
        if not heeded:
            seen.status = 200
            return headers, memoryview(version.body)
        span = wanted_range(seen.range, size)
        if span is not None and fault.shift:
            start = max(0, min(span[0] + fault.shift, span[1] - 1))
            span = (start, span[1])
        if span is None:
            seen.status = 416
            return [*headers, ("Content-Range", f"bytes */{size}")], memoryview(b"")
        seen.status = 206
        stated = f"bytes {span[0]}-{span[1] - 1}/{size}" if fault.content_range is None else fault.content_range
        if stated:
            headers.append(("Content-Range", stated))
        return headers, memoryview(version.body)[slice(*span)]


class Proxy(Server):
    """Forwards requests and opens tunnels, to this machine only.

    Args:
        session_based: A client's connection has its own connection to the origin, and a 401 says so (``Proxy-Support:
            Session-Based-Authentication``, RFC 4559). False: each request goes to the origin on a new connection.
        connect: How CONNECT is answered once the door is passed: `status`, `body`, `headers`, `raw` and `hold` of a Fault.
        forward_cut: After so many bytes from the origin, forwarded or tunnelled, the client's connection ends, once.
        reset: ... by RST rather than FIN.
    """

    seat = PROXY

    def __init__(
        self,
        *,
        door: Door | None = None,
        tls: ServerTls | None = None,
        session_based: bool = True,
        connect: Fault = HONEST,
        forward_cut: int | None = None,
        reset: bool = False,
    ) -> None:
        super().__init__(door=door, tls=tls)
        self.session_based, self.connect = session_based, connect
        self.forward_cut, self.reset = forward_cut, reset

    @property
    def url(self) -> str:
        return self.base_url

    @property
    def tunnels(self) -> list[Seen]:
        """The CONNECT requests that were let in."""
        return [seen for seen in self.passed if seen.method == "CONNECT"]

    async def _serve(self, connection: Connection, seen: Seen, extra: list[tuple[str, str]]) -> bool:
        if seen.method == "CONNECT":
            return await self._open_tunnel(connection, seen, extra)
        return await self._forward(connection, seen, extra)

    # forwarding

    async def _forward(self, connection: Connection, seen: Seen, extra: list[tuple[str, str]]) -> bool:
        url = urlsplit(seen.target)
        path = (url.path or "/") + (f"?{url.query}" if url.query else "")
        request = Head(f"{seen.method} {path} HTTP/1.1", seen.head.headers).without(HOP_BY_HOP)
        body = b"".join([piece async for piece in body_pieces(seen.head, connection.reader)])
        found = await self._ask(connection, port_of(seen.target), request.encode() + body)
        if found is None:
            seen.status = 502
            await self._write(connection, seen, extra, b"no answer from the origin", HONEST)
            return True
        head, source = found
        seen.status = head.status
        reply = Head(head.first, [*head.without(HOP_BY_HOP).headers, *extra])
        if head.status == 401 and self.session_based:
            reply.headers.append(("Proxy-Support", "Session-Based-Authentication"))
        closing = "close" in (head.get("Connection") or "").lower()
        if closing:
            reply.headers.append(("Connection", "close"))
        connection.writer.write(reply.encode())
        async for piece in body_pieces(head, source, answers=seen.method):
            await self._pass_on(connection, seen, piece)
        return not closing

    async def _ask(self, connection: Connection, port: int, request: bytes) -> tuple[Head, asyncio.StreamReader] | None:
        """Send the request to the origin and read the answer's head; a connection that has gone stale is replaced once."""
        for fresh in (not self.session_based, True):
            if fresh and port in connection.ways:
                _, stale = connection.ways.pop(port)
                _abort(stale)
            try:
                reader, writer = await connection.way(port)
                writer.write(request)
                head = await read_head(reader)
            except OSError:
                head = None
            if head is not None:
                return head, reader
        return None

    async def _pass_on(self, connection: Connection, seen: Seen, piece: bytes) -> None:
        """Bytes from the origin to the client, until the cut."""
        kept = piece if self.forward_cut is None else piece[: self.forward_cut]
        connection.writer.write(kept)
        await connection.writer.drain()
        seen.sent += len(kept)
        if self.forward_cut is None:
            return
        self.forward_cut -= len(kept)
        if len(kept) < len(piece):
            self.forward_cut = None
            connection.end(reset=self.reset)
            raise Cut

    # tunnels

    async def _open_tunnel(self, connection: Connection, seen: Seen, extra: list[tuple[str, str]]) -> bool:
        fault = self.connect
        if fault.hold is not None:
            await fault.hold.here()
        if fault.raw is not None:
            connection.writer.write(fault.raw)
            return False
        seen.status = fault.status or 200
        if not 200 <= seen.status < 300:
            await self._write(connection, seen, extra, fault.body, replace(fault, hold=None))
            return True
        headers = [*extra, *fault.headers, *([("Content-Length", str(len(fault.body)))] if fault.body else [])]
        try:
            reader, writer = await connection.way(port_of(seen.target))
        except OSError:
            seen.status = 502
            await self._write(connection, seen, extra, b"no way to the origin", HONEST)
            return True
        connection.writer.write(Head(f"HTTP/1.1 {seen.status} Connection established", headers).encode() + fault.body)
        await self._copy_both_ways(connection, seen, reader, writer)
        return False

    async def _copy_both_ways(self, connection: Connection, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def up() -> None:
            while piece := await connection.reader.read(PIECE):
                writer.write(piece)
                await writer.drain()

        async def down() -> None:
            while piece := await reader.read(PIECE):
                await self._pass_on(connection, seen, piece)

        directions = [asyncio.ensure_future(up()), asyncio.ensure_future(down())]
        try:
            done, _ = await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
            for direction in done:
                direction.result()
        finally:
            for direction in directions:
                direction.cancel()
            await asyncio.gather(*directions, return_exceptions=True)


class SilentKdc:
    """A KDC that takes every connection and datagram and never answers: half a minute of silence for libkrb5."""

    def __enter__(self) -> Self:
        while True:
            self._tcp = socket.create_server(("127.0.0.1", 0))  # the kernel accepts; nobody reads
            self.port: int = self._tcp.getsockname()[1]
            self._udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            try:
                self._udp.bind(("127.0.0.1", self.port))
            except OSError:  # its number is taken there
                self.__exit__()
            else:
                return self

    @property
    def asked(self) -> bool:
        """Somebody waits for an answer."""
        return bool(select.select([self._tcp, self._udp], [], [], 0)[0])

    def __exit__(self, *_: object) -> None:
        self._tcp.close()
        self._udp.close()
