"""What applications need to test against us: a real manager and real files, with a fake network, fake identities and fake time.

    with FakeNetwork() as network:
        network.serve("https://example.test/file", b"...", cut_after=3)
        await bits_async.download("https://example.test/file", tmp_path / "file")

Managers made inside the `with` use the fake. Answers pass the same judge as real ones. Time jumps: whenever the engine only waits for a
moment (a retry, say), that moment comes at once, so that a test of an hour of retries takes a fraction of it.
Callbacks are called as ever; notification commands are written down (`network.commands`) and not run.
To look at what happens between two moments, stop the clock (`network.clock.freeze()`) and the servers (`network.pause()`): where only
the servers are silent, the next moment may be the one at which a job has waited for too long, three months later.
"""

import asyncio
import contextlib
import hashlib
import heapq
import itertools
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextvars import ContextVar
from contextvars import Token as Undo
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Final, Self, final

from .auth.policy import Origin
from .errors import AuthFailed, BitsError, ErrorCode, ErrorContext, NetworkError, RemoteFileError, error_from_status, make_error
from .identity.sessions import SessionEnded, Sessions
from .identity.tokens import ImpersonationLevel, LocalIdentity, Token
from .jobs.manager import Seams, seams
from .transport.answers import Accept, AlreadyComplete, Answer, Asked, Complete, FileChanged, HeaderFields, Refuse, Restart, judge
from .transport.digests import Digests
from .transport.lane import Body, Party
from .transport.network import Connectivity
from .transport.ranges import Detached, Validator

PIECE: Final = 64 << 10
JUMP_AFTER: Final = 0.02  # real seconds during which nothing else may be about to happen
STILL: Final = 20  # turns of the event loop in a row in which nobody is at work: on a busy machine that time may pass without one


_at_work: ContextVar[bool] = ContextVar("bits_async_at_work", default=False)


class FakeClock:
    """A clock that jumps to the next moment somebody waits for, as soon as the event loop has been idle for an instant.

    Or, after `freeze()` and until `thaw()`, one that only `advance()` moves.
    """

    def __init__(self) -> None:
        self._elapsed = 0.0
        self._start = datetime(2030, 1, 1, tzinfo=UTC)
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()
        self._jump: asyncio.Handle | None = None
        self._frozen = False
        self._settings: set[asyncio.Future[None]] = set()  # who waits for a change of it
        self._busy = 0  # attempts that do something other than sleep: time does not jump over them

    def now(self) -> datetime:
        """1 January 2030 plus what has passed, and by how much it was set."""
        return self._start + timedelta(seconds=self._elapsed)

    def monotonic(self) -> float:
        """Seconds that have passed."""
        return self._elapsed

    def freeze(self) -> None:
        """Time stands still from now on, but for `advance()`, until `thaw()`."""
        self._frozen = True

    def thaw(self) -> None:
        """Time goes on by itself again."""
        self._frozen = False
        if self._sleepers:
            self._arm()

    def advance(self, seconds: float) -> None:
        """Let that much time pass, and wake everybody who waits for a moment in it."""
        self._elapsed += seconds
        while self._sleepers and self._sleepers[0][0] <= self._elapsed:
            _, _, future = heapq.heappop(self._sleepers)
            if not future.done():
                future.set_result(None)

    def set_wall_clock(self, by: float) -> None:
        """Somebody changes the wall clock by so many seconds, forwards or (below 0) backwards; `monotonic` goes on as it was."""
        self._start += timedelta(seconds=by)
        for future in self._settings:
            if not future.done():
                future.set_result(None)

    async def changed(self) -> None:
        """Return when `set_wall_clock()` is called."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._settings.add(future)
        try:
            await future
        finally:
            self._settings.discard(future)

    async def sleep(self, seconds: float) -> None:
        """Return when the clock has come there."""
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._elapsed + seconds, next(self._numbers), future))
        self._arm()
        with self.resting():
            await future

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Time stands still while somebody works."""
        self._busy += 1
        undo = _at_work.set(True)
        try:
            yield
        finally:
            _at_work.reset(undo)
            self._busy -= 1

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """Time goes on while somebody at work waits."""
        at_work = _at_work.get()
        self._busy -= at_work
        try:
            yield
        finally:
            self._busy += at_work

    def _arm(self) -> None:
        if self._jump is not None:
            self._jump.cancel()
        self._jump = None if self._frozen else asyncio.get_running_loop().call_later(JUMP_AFTER, self._leap, STILL)

    def _leap(self, turns: int) -> None:
        """The jump, `turns` turns of the loop from now, if nobody is at work until then."""
        if turns and self._sleepers and not self._busy:
            self._jump = asyncio.get_running_loop().call_soon(self._leap, turns - 1)
            return
        self._jump = None
        while self._sleepers and not self._busy and not self._frozen:
            moment, _, future = heapq.heappop(self._sleepers)
            if not future.done():
                self._elapsed = max(self._elapsed, moment)
                future.set_result(None)
                break
        if self._sleepers:
            self._arm()


@dataclass(frozen=True)
class FakeRequest:
    """One request that reached the fake network: what was asked, as whom, and with which custom headers."""

    url: str
    start: int
    end: int | None
    identity: str
    if_range: str | None
    method: str = "GET"
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class FakeCommand:
    """One notification command that a job has run, instead of being run: as whom, the whole argv, and the variables it was given."""

    program: str
    parameters: tuple[str, ...]
    identity: str
    environment: Mapping[str, str]


@dataclass
class _Served:
    body: bytes
    etag: str | None
    status: int
    cut_after: int | None
    require: str | None
    last_modified: str | None
    ranges: bool

    def headers(self) -> list[tuple[str, str]]:
        found = [("ETag", self.etag), ("Last-Modified", self.last_modified)]
        return [(name, value) for name, value in found if value]


@dataclass
class _Failure:
    url: str | None
    times: int
    error: BitsError


class FakeNetwork:
    """Servers that exist in this process only. Managers made inside its `with` use it, in this context and the tasks started from it.

    Attributes:
        requests: every request so far, oldest first.
        commands: every notification command so far; no program is run.
        clock: the fake time that these managers run on.
    """

    def __init__(self) -> None:
        self.requests: list[FakeRequest] = []
        self.commands: list[FakeCommand] = []
        self._statuses: list[int] = []
        self.clock = FakeClock()
        self._served: dict[str, _Served] = {}
        self._failures: list[_Failure] = []
        self._connected = True
        self._changes: list[bool] = []  # each time the network was lost (False) and back
        self._silent_after: int | None = None
        self._news = asyncio.Event()  # of silence and disconnection
        self._undo: Undo[Seams | None] | None = None
        self._ended_sessions: set[str] = set()
        self._session_watchers: list[_FakeSessions] = []

    def __enter__(self) -> Self:
        self._undo = seams.set(Seams(self, self.clock, self._watch, self._run_command, self._watch_sessions))
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        assert self._undo is not None
        seams.reset(self._undo)

    def serve(
        self,
        url: str,
        body: bytes,
        *,
        etag: str | None = "",
        status: int = 200,
        cut_after: int | None = None,
        require: str | None = None,
        last_modified: str | None = None,
        ranges: bool = True,
    ) -> None:
        """Answer requests for `url`, in place of what was served there before.

        Args:
            url: exactly as it is asked for.
            body: the file.
            etag: its version; "" (the default): made from the body; None: the server gives no validator.
            status: anything but 200 is an error answer.
            cut_after: break the connection once, after so many bytes of a body.
            require: the name of the only identity that is let in; others get 401.
            last_modified: the file's time, as HTTP writes it ("Mon, 02 Nov 2026 10:00:00 GMT").
            ranges: False: whatever is asked for, the whole file is the answer.
        """
        if etag == "":
            etag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
        self._served[str(url)] = _Served(body, etag, status, cut_after, require, last_modified, ranges)

    def fail(self, url: str | None = None, *, times: int = 1, error: BitsError | None = None) -> None:
        """Let the next `times` requests (for `url`, or for any) fail with `error`, by default a broken connection."""
        self._failures.append(_Failure(url, times, error or NetworkError("the fake connection broke", transient=True)))

    def fail_command(self, status: int = 1, *, times: int = 1) -> None:
        """Let the next `times` notification commands end with `status`; all others end with 0."""
        self._statuses += [status] * times

    async def _run_command(self, token: Token, program: str, parameters: Sequence[str], variables: Mapping[str, str]) -> int:
        await asyncio.sleep(0)
        self.commands.append(FakeCommand(program, tuple(parameters), token.name, dict(variables)))
        return self._statuses.pop(0) if self._statuses else 0

    def log_off(self, session: str) -> None:
        """The logon session ends, and with it the tokens that are tied to it."""
        self._ended_sessions.add(session)
        for watcher in list(self._session_watchers):
            watcher.tell(SessionEnded(None, session))

    @contextlib.asynccontextmanager
    async def _watch_sessions(self) -> AsyncIterator[Sessions]:
        watcher = _FakeSessions(self._ended_sessions)
        self._session_watchers.append(watcher)
        try:
            yield watcher
        finally:
            self._session_watchers.remove(watcher)

    def disconnect(self) -> None:
        """The network is lost: jobs wait for it (BG_E_NETWORK_DISCONNECTED) until `reconnect()`. Their managers notice at once."""
        self._set_connected(False)

    def reconnect(self) -> None:
        """The network is back, and every server can be reached again."""
        self._set_connected(True)

    def _set_connected(self, connected: bool) -> None:
        if connected is not self._connected:
            self._changes.append(connected)
        self._connected = connected
        self._tell()

    def _watch(self) -> Connectivity:
        return _FakeConnectivity(self)

    def pause(self, *, after: int = 0) -> None:
        """Let every server fall silent until `resume()`: no answer to a request, or, with `after`, so many bytes of a body and no more."""
        self._silent_after = after
        self._tell()

    def resume(self) -> None:
        """Let the servers go on."""
        self._silent_after = None
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def _room(self, sent: int) -> int:
        """How much a server that has said so many bytes may say next; waits while it is silent, and time goes on meanwhile."""
        while self._connected and self._silent_after is not None and self._silent_after <= sent:
            with self.clock.resting():
                await self._news.wait()
        return PIECE if self._silent_after is None else min(PIECE, max(1, self._silent_after - sent))

    # -- the seam -----------------------------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def get(self, party: Party, asked: Asked) -> AsyncIterator[Body]:
        """What `transport.lane.Lanes.get` does, without a network."""
        await asyncio.sleep(0)
        validator = asked.headers().get("If-Range")
        options = party.options
        headers = options.headers_for(Origin.of(asked.url))
        self.requests.append(FakeRequest(asked.url, asked.start, asked.end, party.token.name, validator, options.method, headers))
        await self._room(0)
        self._fail_if_told(asked.url)
        served = self._served.get(asked.url)
        if served is None:
            raise error_from_status(404, url=asked.url)
        if served.require is not None and served.require != party.token.name:
            raise AuthFailed("the fake server wants somebody else", code=0x80190191, url=asked.url, identity=party.token.name)
        answer = _answer(asked, served)
        if party.heard is not None and isinstance(answer.headers, HeaderFields):
            party.heard(tuple((name.encode("latin-1"), value.encode("utf-8", "surrogateescape")) for name, value in answer.headers.items()))
        verdict = judge(asked, answer)
        if isinstance(verdict, Restart):
            raise FileChanged(verdict.validator, verdict.reason, changed=verdict.changed, same=verdict.same)
        if isinstance(verdict, Complete):
            raise AlreadyComplete(verdict.total)
        if isinstance(verdict, Refuse):
            raise verdict.error
        if not isinstance(verdict, Accept):
            raise RemoteFileError("the fake server answered with a redirect or a challenge", url=asked.url)
        yield _FakeBody(self, asked, served, verdict.start, verdict.length, verdict.total, verdict.validator, verdict.content)

    def _fail_if_told(self, url: str) -> None:
        if not self._connected:
            code = ErrorCode.BG_E_NETWORK_DISCONNECTED
            raise make_error(code, ErrorContext.GENERAL_TRANSPORT, "the fake network is disconnected", url=url)
        for failure in self._failures:
            if failure.times > 0 and failure.url in (None, url):
                failure.times -= 1
                raise failure.error.located(url=url)

    async def forget(self, token: Token) -> None:
        """Nothing is kept between requests."""

    async def aclose(self) -> None:
        """Nothing is kept between requests."""


class _FakeConnectivity:
    """What `transport.network` tells one manager: here nobody polls, and nothing has to settle."""

    def __init__(self, network: FakeNetwork) -> None:
        self._network = network
        self._told = len(network._changes) - (not network._connected)  # so many changes are old; that it is lost now is news

    @property
    def connected(self) -> bool:
        return self._network._connected

    async def changed(self) -> bool:
        while self._told == len(self._network._changes):
            await self._network._news.wait()
        self._told = len(self._network._changes)
        return self.connected

    async def reaches(self, host: str) -> bool:
        return self.connected

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        """Nothing is held."""


def _answer(asked: Asked, served: _Served) -> Answer:
    total = len(served.body)
    headers = served.headers()
    condition = asked.headers().get("If-Range")
    if served.status != 200:
        return Answer(served.status, HeaderFields(headers))
    same = condition is None or condition in (served.etag, served.last_modified)
    if not (asked.ranged and same and served.ranges):
        return Answer(200, HeaderFields([*headers, ("Content-Length", str(total))]))
    if asked.start >= total:
        return Answer(416, HeaderFields([*headers, ("Content-Range", f"bytes */{total}")]))
    end = min(asked.end or total, total)
    content_range = f"bytes {asked.start}-{end - 1}/{total}"
    return Answer(206, HeaderFields([*headers, ("Content-Range", content_range), ("Content-Length", str(end - asked.start))]))


@dataclass
class _FakeBody:
    network: FakeNetwork
    asked: Asked
    served: _Served
    start: int
    length: int | None
    total: int | None
    validator: Validator
    content: Digests
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return self.asked.url

    async def detach(self) -> Detached | None:
        return None

    def reattach(self, moved: int) -> None:
        raise AssertionError("nothing was detached")

    def __post_init__(self) -> None:
        self._position = self.start
        self._end = len(self.served.body) if self.length is None else self.start + self.length

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        await asyncio.sleep(0)
        room = PIECE if self._position >= self._end else await self.network._room(self._position - self.start)
        if self._position > self.start and not self.network._connected:
            code = ErrorCode.BG_E_NETWORK_DISCONNECTED
            raise make_error(code, ErrorContext.GENERAL_TRANSPORT, "the fake network is disconnected", url=self.url)
        piece = self.served.body[self._position : min(self._position + room, self._end)]
        cut = self.served.cut_after
        if cut is not None and self._position - self.start + len(piece) > cut:
            piece = piece[: max(0, cut - (self._position - self.start))]
            if not piece:
                self.served.cut_after = None
                raise NetworkError("the fake connection was cut", code=ErrorCode.BG_E_CONNECTION_CLOSED, url=self.url)
        if not piece:
            raise StopAsyncIteration
        self._position += len(piece)
        return piece


@final
class _FakeIdentity:
    """Somebody who exists in tests only; files are written as the process."""

    def __init__(self, name: str, elevated: bool) -> None:
        self.name = name
        self.key = f"fake:{name}"
        self.elevated = elevated
        self.is_process = True

    def assume(self) -> None:
        """Stay who one is."""

    def check(self) -> None:
        """Always."""

    def fresh(self) -> LocalIdentity:
        """Nothing changes."""
        return self

    def close(self) -> None:
        """Nothing is held."""


class _FakeSessions:
    """Every session lives until the test ends it."""

    def __init__(self, ended: set[str]) -> None:
        self._ended = ended
        self._told: asyncio.Queue[SessionEnded] = asyncio.Queue()

    def tell(self, ended: SessionEnded) -> None:
        self._told.put_nowait(ended)

    async def ended(self) -> SessionEnded:
        return await self._told.get()

    async def user_of(self, session: str) -> str | None:
        return None if session in self._ended else f"fake:{session}"


def fake_token(
    name: str,
    *,
    elevated: bool = False,
    session: str | None = None,
    level: ImpersonationLevel = ImpersonationLevel.IMPERSONATE,
) -> Token:
    """An identity for tests: owner of jobs, helper, or whom a fake server requires. A real manager refuses it.

    With `session` it is tied to a logon session, and ends with it (`FakeNetwork.log_off`). Below the level IMPERSONATE nothing can be done
    as it.
    """
    if not name:
        raise ValueError("a fake token has a name")
    return Token._make(_FakeIdentity(name, elevated), level=level, fake=True, session=session)
