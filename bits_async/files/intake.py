"""A socket's bytes into a file: the loop that one thread of the token runs from begin to end. Knows neither descriptors nor names."""

import errno
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, Protocol, cast

from ..errors import BitsError, ErrorCode, ErrorContext, make_error, scrub
from ..identity import native
from .records import Chunk

if TYPE_CHECKING:
    from ..transport.ranges import Detached, Slice

_RECEIVE: Final = 1 << 20
_GLANCE: Final = 0.1  # seconds between two looks at the stop flag while nothing arrives
_DONTWAIT: Final[int] = getattr(socket, "MSG_DONTWAIT", 0)
_OF_THE_SOCKET: Final = {
    getattr(errno, name, -1) for name in ("EHOSTUNREACH", "EHOSTDOWN", "ENETUNREACH", "ENETDOWN", "ENETRESET", "ENOTCONN", "ESHUTDOWN")
}


class Limiter(Protocol):
    """A token bucket as a thread sees it."""

    @property
    def chunk(self) -> int:
        """Bytes to take at once at most, now."""
        ...

    def rests(self, count: int, /) -> Iterator[float]:
        """Take `count` bytes; seconds to wait, one after the other, before taking more."""
        ...


class Pace(Protocol):
    """Who is told how fast a body comes."""

    @property
    def too_slow(self) -> bool: ...
    @property
    def told(self) -> str: ...
    def waited(self, seconds: float, /) -> None: ...
    def came(self, count: int, /) -> None: ...


class Stop(Protocol):
    """What `threading.Event` offers a reader."""

    def is_set(self) -> bool: ...


class Source(Protocol):
    """What a `socket.socket` offers whoever receives from it. One that is none deciphers what comes over the wire."""

    def fileno(self) -> int: ...

    def recv_into(self, buffer: memoryview, nbytes: int = 0, flags: int = 0, /) -> int:
        """Raises BlockingIOError when nothing is there; 0: the end."""
        ...


class Intake:
    """The loop that moves a socket's bytes into a file, run by one thread of the token from begin to end."""

    def __init__(
        self,
        reserve: Callable[[int, int], None],
        store: Callable[[int, Sequence[Chunk]], None],
        splice: Callable[[native.Splicer, int, int, int], int] | None,
        piece: "Slice",
        limiter: Limiter | None,
        stop: Stop | None,
        pace: Pace | None,
    ) -> None:
        self._pace = pace
        self._reserve = reserve
        self._store = store
        self._splice = splice
        self._piece = piece
        self._limiter = limiter
        self._stop = stop
        self._halt = threading.Event()  # set when the task that waits for us is cancelled
        self.moved = 0

    def halt(self) -> None:
        self._halt.set()

    @property
    def _stopped(self) -> bool:
        return self._halt.is_set() or (self._stop is not None and self._stop.is_set())

    def run(self, detached: "Detached", idle: float) -> int:
        """Move until all is there or somebody says stop."""
        total = detached.length if self._piece.remaining is None else min(detached.length, self._piece.remaining)
        self._make_room(total)
        self._keep(memoryview(detached.already)[:total])
        if self.moved >= total or self._stopped:
            return self.moved
        splicer = None if self._splice is None else native.splicer()
        if splicer is None:
            self._copy_through(cast(Source, detached.socket), total, idle)
        else:
            try:
                self._splice_through(splicer, cast(socket.socket, detached.socket), total, idle)
            finally:
                splicer.close()
        return self.moved

    def _splice_through(self, splicer: native.Splicer, connection: socket.socket, total: int, idle: float) -> None:
        assert self._splice is not None
        source, splice = connection.fileno(), self._splice
        connection.setblocking(False)  # splice heeds nothing else
        with selectors.DefaultSelector() as selector:
            selector.register(connection, selectors.EVENT_READ)

            def take() -> int:
                self._make_room(total)
                return splice(splicer, source, self._piece.written, self._bite(total))

            while self.moved < total and (count := self._when_there(selector, take, idle)):
                self._count(count)

    def _copy_through(self, connection: Source, total: int, idle: float) -> None:
        buffer = memoryview(bytearray(min(total - self.moved, _RECEIVE)))
        if isinstance(connection, socket.socket):
            connection.setblocking(False)  # whoever looks at it afterwards shall not wait either
        with selectors.DefaultSelector() as selector:
            selector.register(connection.fileno(), selectors.EVENT_READ)

            def take() -> int:
                return connection.recv_into(buffer[: self._bite(total)], 0, _DONTWAIT)

            while self.moved < total and (count := self._when_there(selector, take, idle)):
                self._make_room(total)
                self._keep(buffer[:count])

    def _keep(self, view: memoryview) -> None:
        if not view:
            return
        self._store(self._piece.written, [view])
        self._count(len(view))

    def _make_room(self, total: int) -> None:
        """In the file, for what comes next of the piece; of a piece without an end, for this body."""
        end = self._piece.written + total - self.moved if self._piece.end is None else self._piece.end
        self._reserve(self._piece.written, end)

    def _bite(self, total: int) -> int:
        """Bytes to take at once; a limiter keeps its rate with small bites only."""
        left = total - self.moved
        return left if self._limiter is None else min(left, self._limiter.chunk)

    def _count(self, moved: int) -> None:
        """So many bytes are in the file; rest until they are paid for."""
        self._piece.advance(moved)
        self.moved += moved
        if self._limiter is not None:
            for seconds in self._limiter.rests(moved):
                self._rest(seconds)
                if self._stopped:
                    return

    def _rest(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._stopped and (left := until - time.monotonic()) > 0:
            self._halt.wait(min(left, _GLANCE))

    def _when_there(self, selector: selectors.BaseSelector, take: Callable[[], int], idle: float) -> int:
        """What `take` gets, as soon as there is something; 0: stopped. Looks before it waits: on a fast line there is always more."""
        began = time.monotonic()
        until = began + idle
        if self._pace is not None and self._pace.too_slow:
            raise _broken(ErrorCode.ERROR_WINHTTP_TIMEOUT, f"the server is too slow: {self._pace.told}")
        while not self._stopped:
            try:
                if count := take():
                    if self._pace is not None:
                        self._pace.came(count)
                    return count
                raise _broken(ErrorCode.BG_E_CONNECTION_CLOSED, "the connection ended before the file did")
            except (BlockingIOError, TimeoutError):
                selector.select(min(_GLANCE, idle))
                if self._pace is not None:
                    now = time.monotonic()
                    self._pace.waited(now - began)
                    began = now
            except OSError as exc:
                if not isinstance(exc, ConnectionError) and exc.errno not in _OF_THE_SOCKET:
                    raise  # splice fails for either end: this is the file's
                raise _broken(ErrorCode.BG_E_CONNECTION_CLOSED, "the connection was cut") from scrub(exc)
            if time.monotonic() >= until:
                raise _broken(ErrorCode.ERROR_WINHTTP_TIMEOUT, f"no byte for {idle:g} seconds")
        return 0


def _broken(code: ErrorCode, message: str) -> BitsError:
    return make_error(code, ErrorContext.GENERAL_TRANSPORT, message)
