"""An origin and a proxy on loopback that really authenticate, for the demo, the examples and the tests.

Both speak NTLM through the acceptor of pyspnego. The acceptor finds its users in a file that the environment variable
NTLM_USER_FILE names, so the two servers live in a process of their own and the environment of yours stays as it is.
The origin holds one file, obeys Range and If-Range, and can cut the connection once in the middle of the body. Each
request leaves a line in a log: who, what, which bytes.

    with EmbeddedServers(users={r"DEMO\\alice": "secret"}, cut_after=1_000_000) as servers:
        print(servers.origin_url, servers.proxy_url, servers.sha256)

Run it alone (``python examples/embedded.py``) to try the command line against it. It is for use on one machine only:
it listens on 127.0.0.1, and its proxy connects to nothing else.
"""

import argparse
import asyncio
import base64
import contextlib
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PIECE = 256 * 1024
HEAD_LIMIT = 1024 * 1024
HOP_BY_HOP = frozenset({"connection", "keep-alive", "proxy-connection", "proxy-authorization", "te", "trailer", "upgrade"})


# -- HTTP/1.1, as much of it as two small servers need


@dataclass
class Head:
    """The first line and the header lines of a request or an answer."""

    first: str
    headers: list[tuple[str, str]] = field(default_factory=list)

    def getall(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key.lower() == name.lower()]

    def get(self, name: str) -> str | None:
        return next(iter(self.getall(name)), None)

    @property
    def method(self) -> str:
        return self.first.split(" ", 2)[0]

    @property
    def target(self) -> str:
        return self.first.split(" ", 2)[1]

    @property
    def status(self) -> int:
        return int(self.first.split(" ", 2)[1])

    def without(self, names: Iterable[str]) -> "Head":
        dropped = {name.lower() for name in names}
        return Head(self.first, [(key, value) for key, value in self.headers if key.lower() not in dropped])

    def encode(self) -> bytes:
        lines = [self.first, *(f"{key}: {value}" for key, value in self.headers)]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")


Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def read_head(reader: asyncio.StreamReader) -> Head | None:
    """The next head; None where the peer has nothing more to say."""
    try:
        block = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
        return None
    first, *lines = block.decode("latin-1")[:-4].split("\r\n")
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return Head(first, [(key.strip(), value.strip()) for key, value in pairs])


async def body_pieces(head: Head, reader: asyncio.StreamReader, *, answers: str = "") -> AsyncIterator[bytes]:
    """The body after a head, as it is on the wire.

    `answers` is the method that this head answers; empty where the body is a request's own.
    """
    if answers and (answers == "HEAD" or head.status in (204, 304) or head.status < 200):
        return
    if "chunked" in (head.get("Transfer-Encoding") or "").lower():
        while True:
            size_line = await reader.readuntil(b"\r\n")
            size = int(size_line.split(b";")[0], 16)
            yield size_line + await reader.readexactly(size + 2)
            if not size:
                return
    length = head.get("Content-Length")
    left = int(length) if length is not None else (sys.maxsize if answers else 0)
    while left and (piece := await reader.read(min(left, PIECE))):
        left -= len(piece)
        yield piece
    if left and length is not None:
        raise ConnectionResetError("the peer ended the body early")


def wanted_range(text: str | None, size: int) -> tuple[int, int] | None:
    """The half-open range that a Range header asks for; None: none that can be given."""
    unit, _, numbers = (text or "").partition("=")
    first, dash, last = numbers.partition("-")
    if unit.strip().lower() != "bytes" or not dash or not first.strip().isdigit():
        return None
    start, end = int(first), min(int(last) + 1, size) if last.strip() else size
    return (start, end) if start < end else None


# -- who is there: NTLM on one connection


@dataclass(frozen=True)
class Seat:
    """Whose challenge it is: the origin's 401 or the proxy's 407."""

    status: int
    challenge: str
    answer: str


ORIGIN = Seat(401, "WWW-Authenticate", "Authorization")
PROXY = Seat(407, "Proxy-Authenticate", "Proxy-Authorization")


class Guard:
    """The login at one seat of one connection. NTLM authenticates the connection, so `user` stays until it is closed."""

    def __init__(self, seat: Seat) -> None:
        self.seat = seat
        self.user: str | None = None
        self._context: Any = None

    def challenge(self, head: Head) -> list[tuple[str, str]]:
        """Nothing when the request may pass; otherwise the header lines of the refusal."""
        scheme, _, text = (head.get(self.seat.answer) or "").partition(" ")
        if scheme.upper() != "NTLM":
            return [] if self.user else [(self.seat.challenge, "NTLM")]
        token = self._step(text)
        return [] if self.user else [(self.seat.challenge, f"NTLM {token}".strip())]

    def _step(self, text: str) -> str:
        import spnego  # in the servers' process only

        if self._context is None or self.user:
            self.user, self._context = None, spnego.server(protocol="ntlm")
        try:
            token = self._context.step(base64.b64decode(text))
        except Exception:  # a wrong password and a broken token have many classes, and one answer: begin again
            self._context = None
            return ""
        if self._context.complete:
            self.user = self._context.client_principal
        return base64.b64encode(token or b"").decode()


# -- the two servers


@dataclass
class Site:
    """What the two servers share: the file, the one cut that is still to come, and the log."""

    content: bytes
    cut_after: int | None
    rate: float | None
    log: Any
    connections: int = 0

    @property
    def etag(self) -> str:
        return f'"{hashlib.sha256(self.content).hexdigest()[:16]}"'

    def note(self, server: str, connection: int, guard: Guard, head: Head, status: int) -> None:
        entry = {"server": server, "connection": connection, "user": guard.user, "method": head.method, "target": head.target}
        self.log.write(json.dumps(entry | {"range": head.get("Range"), "status": status}) + "\n")
        self.log.flush()

    def next_connection(self) -> int:
        self.connections += 1
        return self.connections


def answer(status: int, reason: str, headers: Iterable[tuple[str, str]] = (), length: int = 0) -> bytes:
    return Head(f"HTTP/1.1 {status} {reason}", [*headers, ("Content-Length", str(length))]).encode()


class Origin:
    """Serves the one file to whoever logs in."""

    def __init__(self, site: Site) -> None:
        self.site = site

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number, guard = self.site.next_connection(), Guard(ORIGIN)
        while (head := await read_head(reader)) is not None:
            challenge = guard.challenge(head)
            if challenge:
                self.site.note("origin", number, guard, head, 401)
                writer.write(answer(401, "Unauthorized", challenge))
            else:
                await self._send_file(head, writer, number, guard)
            await writer.drain()

    async def _send_file(self, head: Head, writer: asyncio.StreamWriter, number: int, guard: Guard) -> None:
        content = self.site.content
        span = wanted_range(head.get("Range"), len(content))
        if head.get("If-Range") not in (None, self.site.etag):
            span = None
        start, end = span or (0, len(content))
        headers = [("ETag", self.site.etag), ("Accept-Ranges", "bytes"), ("Content-Type", "application/octet-stream")]
        if span:
            headers.append(("Content-Range", f"bytes {start}-{end - 1}/{len(content)}"))
        self.site.note("origin", number, guard, head, 206 if span else 200)
        writer.write(answer(206 if span else 200, "Partial Content" if span else "OK", headers, end - start))
        if head.method != "HEAD":
            await self._send_body(writer, start, end)

    async def _send_body(self, writer: asyncio.StreamWriter, start: int, end: int) -> None:
        cut = self.site.cut_after
        stop = end if cut is None else min(end, start + cut)
        for position in range(start, stop, PIECE):
            piece = self.site.content[position : min(position + PIECE, stop)]
            writer.write(piece)
            await writer.drain()
            if self.site.rate:
                await asyncio.sleep(len(piece) / self.site.rate)
        if stop < end:
            self.site.cut_after = None
            writer.close()  # the bytes already written still arrive; the rest never does
            raise ConnectionAbortedError("cut on purpose")


class Proxy:
    """Forwards requests and opens tunnels for whoever logs in, to this machine only."""

    def __init__(self, site: Site) -> None:
        self.site = site

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number, guard = self.site.next_connection(), Guard(PROXY)
        async with contextlib.AsyncExitStack() as stack:
            ways: dict[int, Streams] = {}
            while (head := await read_head(reader)) is not None:
                challenge = guard.challenge(head)
                self.site.note("proxy", number, guard, head, 407 if challenge else 200)
                if challenge:
                    writer.write(answer(407, "Proxy Authentication Required", challenge))
                    await writer.drain()
                    continue
                # The way to an origin belongs to this connection alone: a login at the origin authenticates that way.
                port = port_of(head.target)
                if port not in ways:
                    ways[port] = await stack.enter_async_context(connect_here(port))
                if head.method == "CONNECT":
                    writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
                    await tunnel(reader, writer, *ways[port])
                    return
                if not await forward(head, reader, writer, *ways[port]):
                    return


def port_of(target: str) -> int:
    """The port that a proxy's client means, by a whole URL or by CONNECT's host:port."""
    return urlsplit(target if "://" in target else f"//{target}").port or 80


@contextlib.asynccontextmanager
async def connect_here(port: int) -> AsyncIterator[Streams]:
    """A connection to that port of this machine, whatever the request's target called the host."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=HEAD_LIMIT)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def forward(
    head: Head, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, up: asyncio.StreamReader, down: asyncio.StreamWriter
) -> bool:
    """One request to the origin and its answer back; False when the connection must end after it."""
    url = urlsplit(head.target)
    path = (url.path or "/") + (f"?{url.query}" if url.query else "")
    request = Head(f"{head.method} {path} HTTP/1.1", head.headers).without(HOP_BY_HOP)
    down.write(request.encode())
    async for piece in body_pieces(head, reader):
        down.write(piece)
    found = await read_head(up)
    if found is None:
        return False
    reply = found.without(HOP_BY_HOP)
    if found.status == 401:
        reply.headers.append(("Proxy-Support", "Session-Based-Authentication"))  # RFC 4559: the connection behind us is yours alone
    writer.write(reply.encode())
    async for piece in body_pieces(found, up, answers=head.method):
        writer.write(piece)
        await writer.drain()
    await writer.drain()
    return "close" not in (found.get("Connection") or "").lower()


async def tunnel(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, up: asyncio.StreamReader, down: asyncio.StreamWriter) -> None:
    """Bytes in both directions until one side ends."""

    async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while piece := await source.read(PIECE):
                sink.write(piece)
                await sink.drain()

    directions = [asyncio.ensure_future(copy(reader, down)), asyncio.ensure_future(copy(up, writer))]
    try:
        await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for direction in directions:
            direction.cancel()
        await asyncio.gather(*directions, return_exceptions=True)


async def listen(server: Any) -> asyncio.Server:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await server(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass  # a client that goes away, or a cut of ours, ends its own connection and nothing else
        finally:
            writer.close()

    return await asyncio.start_server(serve, "127.0.0.1", 0, limit=HEAD_LIMIT)


# -- the process of their own


async def run_servers(config: Mapping[str, Any]) -> None:
    """Child process: serve until standard input ends, which it does when the parent closes it or dies."""
    content = random.Random(config["size"]).randbytes(config["size"])
    with open(config["log"], "a", encoding="utf-8") as log:
        site = Site(content, config["cut_after"], config["rate"], log)
        origin, proxy = await listen(Origin(site)), await listen(Proxy(site))
        ports = [server.sockets[0].getsockname()[1] for server in (origin, proxy)]
        print(json.dumps({"ports": ports, "sha256": hashlib.sha256(content).hexdigest()}), flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        origin.close()
        proxy.close()


class EmbeddedServers:
    r"""The origin and the proxy, running while the `with` block does.

    Args:
        users: ``DOMAIN\name`` to password (without a colon); each may log in at both seats.
        size: Length of the file.
        cut_after: After so many bytes of a body the origin cuts the connection, once. None: never.
        rate: Bytes per second that the origin sends at most. None: as fast as it can.
    """

    origin_url: str  #: of the file
    proxy_url: str
    sha256: str  #: of the file, in hexadecimal

    def __init__(
        self, users: Mapping[str, str], *, size: int = 8 * 1024 * 1024, cut_after: int | None = None, rate: float | None = None
    ) -> None:
        self.users = dict(users)
        self.size = size
        self._config = {"size": size, "cut_after": cut_after, "rate": rate}

    def __enter__(self) -> "EmbeddedServers":
        self._directory = Path(tempfile.mkdtemp(prefix="bits-embedded-"))
        users, self._log = self._directory / "users", self._directory / "log"
        users.touch(mode=0o600)
        users.write_text("".join(f"{name.replace(chr(92), ':')}:{password}\n" for name, password in self.users.items()))
        self._log.touch()
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--child"],
            env=os.environ | {"NTLM_USER_FILE": str(users)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(self._config | {"log": str(self._log)}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise RuntimeError("the embedded servers did not start; see the error above")
        ready = json.loads(line)
        self.origin_url, self.proxy_url = (f"http://localhost:{port}" for port in ready["ports"])
        self.origin_url += "/file.bin"
        self.sha256 = ready["sha256"]
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def log(self) -> list[dict[str, Any]]:
        """The requests so far, oldest first: server, connection, user, method, target, range, status.

        A line is written before the answer's first byte, so what you have received is in it. Connections are numbered
        over both servers.
        """
        return [json.loads(line) for line in self._log.read_text(encoding="utf-8").splitlines()]

    def close(self) -> None:
        """End the servers and remove their files."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", type=int, default=64 * 1024 * 1024, help="length of the file")
    parser.add_argument("--cut-after", type=int, default=None, help="cut the connection once, after so many bytes")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(run_servers(json.loads(sys.stdin.readline())))
        return
    users = {r"DEMO\alice": "alice's password", r"DEMO\helper": "helper's password"}
    with EmbeddedServers(users, size=options.size, cut_after=options.cut_after) as servers:
        print(f"origin  {servers.origin_url}\nproxy   {servers.proxy_url}\nsha256  {servers.sha256}")
        for name, password in users.items():
            print(f"user    {name}, {password}")
        print("Ctrl-C ends it.")
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
