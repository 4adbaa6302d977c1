"""Who is logged on: the end of logon sessions, as the system's session manager tells it.

On Linux that is logind (org.freedesktop.login1 on the system bus; systemd-logind or elogind, through dbus-fast of the extra `sessions`).
Where there is none (a container, cron, no bus, no dbus-fast) nobody is ever logged off: only an end that was seen is an end. What ends
while logind is restarted, or while the bus is away, is told when it is back: the sessions that were known are compared with those
that are left.

On Windows it is Remote Desktop Services (`wts`), asked every two seconds: a service has no window that could be told.

Nothing here knows what a token or a job is.
"""

import asyncio
import contextlib
import logging
import os
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from . import wts
from .threads import in_own_thread

if TYPE_CHECKING:
    from dbus_fast import Message
    from dbus_fast.aio import MessageBus

LOGIND: Final = "org.freedesktop.login1"
LOGIND_PATH: Final = "/org/freedesktop/login1"
MANAGER: Final = "org.freedesktop.login1.Manager"
BUS: Final = "org.freedesktop.DBus"
SYSTEM_BUS: Final = "unix:path=/run/dbus/system_bus_socket"
CALL_DEADLINE: Final = 5.0  # seconds for one answer of logind
LOOK_EVERY: Final = 2.0  # seconds between two looks at the sessions of Windows
BACK_AFTER: Final = (1.0, 5.0, 30.0)  # seconds between two looks for a bus that went away

log = logging.getLogger("bits_async.sessions")


@dataclass(frozen=True, slots=True)
class SessionEnded:
    """Somebody logged off.

    Attributes:
        user: whose session it was, as `LocalIdentity.key` names users ("uid:1000"); None: nobody knows any more.
        session: which session; None: the user has none left.
    """

    user: str | None
    session: str | None


class Sessions(Protocol):
    """The logon sessions of this machine, from the moment that they are watched."""

    async def ended(self) -> SessionEnded:
        """The next log-off; never returns where nobody tells of any."""

    async def user_of(self, session: str) -> str | None:
        """Whose session it is now (`LocalIdentity.key`); None: there is no such session.

        Raises:
            LookupError: nobody knows.
        """


@asynccontextmanager
async def watch_sessions(address: str | None = None) -> AsyncIterator[Sessions]:
    """Watch while the block is open.

    Args:
        address: of the system bus; None: DBUS_SYSTEM_BUS_ADDRESS, else the usual one. Windows has none.
    """
    if sys.platform != "win32" and not _has_dbus():
        yield NoSessions()
        return
    watcher = Wts() if sys.platform == "win32" else _Logind(address or os.environ.get("DBUS_SYSTEM_BUS_ADDRESS") or SYSTEM_BUS)
    await watcher.start()
    try:
        yield watcher
    finally:
        await watcher.stop()


WatchSessions = Callable[[], AbstractAsyncContextManager[Sessions]]


def _has_dbus() -> bool:
    try:
        import dbus_fast  # noqa: F401
    except ImportError:
        log.info("dbus-fast is not installed (extra 'sessions'): log-offs are not seen")
        return False
    return True


class NoSessions:
    """Nobody tells of log-offs."""

    async def ended(self) -> SessionEnded:
        await asyncio.get_running_loop().create_future()
        raise AssertionError("never")

    async def user_of(self, session: str) -> str | None:
        raise LookupError("nobody manages sessions here")


class Wts:
    """The sessions of Windows: looked at again and again, and compared.

    Args:
        look: who is logged on, by session; raises OSError when nobody can say, and then nobody is logged off.
        every: seconds between two looks.
    """

    def __init__(self, look: Callable[[], Mapping[str, wts.LoggedOn]] = wts.sessions, *, every: float = LOOK_EVERY) -> None:
        self._look = look
        self._every = every
        self._known: dict[str, wts.LoggedOn] = {}
        self._ended: deque[SessionEnded] = deque()

    async def start(self) -> None:
        """Watches from here on: what ends after this returned is told."""
        await self._compare()

    async def stop(self) -> None:
        """Nothing goes on between two looks."""

    async def ended(self) -> SessionEnded:
        while not self._ended:
            await asyncio.sleep(self._every)
            await self._compare()
        return self._ended.popleft()

    async def user_of(self, session: str) -> str | None:
        try:
            found = (await in_own_thread(self._look)).get(session)
        except OSError:
            raise LookupError("Remote Desktop Services do not answer") from None
        if found is not None and found.sid is None:
            raise LookupError(f"nobody knows the SID of {found.name}")
        return None if found is None else found.sid

    async def _compare(self) -> None:
        try:
            found = dict(await in_own_thread(self._look))
        except OSError as exc:
            log.info("the sessions of Windows are not told (%s): log-offs are not seen", type(exc).__name__)
            return
        before, self._known = self._known, found
        left = {who.name for who in found.values()}
        for session, who in before.items():
            if session not in found or found[session].name != who.name:
                self._ended.append(SessionEnded(who.sid, session))
        for sid in {who.sid for who in before.values() if who.name not in left and who.sid is not None}:
            self._ended.append(SessionEnded(sid, None))


class _Logind:
    """The sessions that logind manages. One task keeps the connection; signals arrive in between."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._bus: MessageBus | None = None
        self._sender: str | None = None  # logind's own name on the bus: anybody may send us a signal that looks like its
        self._known: dict[str, str] = {}  # session -> user
        self._ended: deque[SessionEnded] = deque()
        self._news = asyncio.Event()
        self._look = asyncio.Event()  # logind is there (again): compare
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Watches from here on: what ends after this returned is told."""
        looked = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._run(looked), name="bits-sessions")
        self._task.add_done_callback(lambda _: self._news.set())
        await asyncio.wait({self._task, looked}, return_when=asyncio.FIRST_COMPLETED)
        if self._task.done():
            self._task.result()

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def ended(self) -> SessionEnded:
        while not self._ended:
            if self._task is not None and self._task.done():
                self._task.result()  # raises what ended it: who waits would wait for ever
            self._news.clear()
            await self._news.wait()
        return self._ended.popleft()

    async def user_of(self, session: str) -> str | None:
        bus = self._bus
        if bus is None:
            raise LookupError("there is no system bus")
        try:
            return (await self._list(bus)).get(session)
        except (OSError, EOFError, TimeoutError, _Refused):
            raise LookupError("logind does not answer") from None

    # -- the connection

    async def _run(self, looked: "asyncio.Future[None]") -> None:
        patience = iter(BACK_AFTER)
        while True:
            try:
                bus = await self._connect()
            except (OSError, EOFError, TimeoutError, _Refused, ValueError) as exc:  # ValueError: no address of a bus
                delay = next(patience, BACK_AFTER[-1])
                log.info("no system bus at %s (%s): log-offs are not seen", self._address, type(exc).__name__)
            else:
                patience = iter(BACK_AFTER)
                delay = BACK_AFTER[0]
                await self._follow(bus, looked)
                log.warning("the system bus went away: log-offs are seen when it is back")
            _done(looked)
            await asyncio.sleep(delay)

    async def _connect(self) -> "MessageBus":
        from dbus_fast.aio import MessageBus

        bus = MessageBus(bus_address=self._address)
        try:
            async with asyncio.timeout(CALL_DEADLINE):
                await bus.connect()
            bus.add_message_handler(self._heard)
            for rule in (
                f"type='signal',sender='{LOGIND}',interface='{MANAGER}'",
                f"type='signal',sender='{BUS}',interface='{BUS}',member='NameOwnerChanged',arg0='{LOGIND}'",
            ):
                await _call(bus, _DAEMON, "AddMatch", "s", [rule])
            with contextlib.suppress(_Refused):  # it does not run yet
                self._sender = (await _call(bus, _DAEMON, "GetNameOwner", "s", [LOGIND])).body[0]
        except BaseException:
            await _hang_up(bus)
            raise
        self._bus = bus
        return bus

    async def _follow(self, bus: "MessageBus", looked: "asyncio.Future[None]") -> None:
        """Compare now and whenever logind is back, until the bus goes away."""
        gone = asyncio.ensure_future(_until_gone(bus))
        self._look.set()
        try:
            while not gone.done():
                if self._look.is_set():
                    self._look.clear()
                    with contextlib.suppress(OSError, EOFError, TimeoutError, _Refused):  # no logind: nobody is logged off
                        self._compare(await self._list(bus))
                    _done(looked)
                look = asyncio.ensure_future(self._look.wait())
                await asyncio.wait({gone, look}, return_when=asyncio.FIRST_COMPLETED)
                look.cancel()
        finally:
            gone.cancel()
            self._bus = self._sender = None
            await _hang_up(bus)

    # -- what logind says

    async def _list(self, bus: "MessageBus") -> dict[str, str]:
        answer = await _call(bus, _Peer(LOGIND, LOGIND_PATH, MANAGER), "ListSessions", "", [])
        return {session: _user(uid) for session, uid, *_ in answer.body[0]}

    def _compare(self, found: dict[str, str]) -> None:
        """Tell what ended while nobody was told."""
        before, self._known = self._known, found
        for session, user in before.items():
            if found.get(session) != user:
                self._tell(SessionEnded(user, session))
        for user in set(before.values()) - set(found.values()):
            self._tell(SessionEnded(user, None))

    def _heard(self, message: "Message") -> None:
        from dbus_fast import MessageType

        if message.message_type is not MessageType.SIGNAL:
            return
        if message.sender == BUS and message.member == "NameOwnerChanged" and message.body[0] == LOGIND:
            self._sender = message.body[2] or None
            if self._sender is not None:
                self._look.set()
        elif message.sender is None or message.sender != self._sender:
            return  # a match rule does not keep away what is addressed to us
        elif message.interface == MANAGER and message.member == "SessionNew":
            self._look.set()  # the signal does not say whose it is
        elif message.interface == MANAGER and message.member == "SessionRemoved":
            # not known: it began and ended between two looks, or logind did not answer yet; its end counts all the same
            self._tell(SessionEnded(self._known.pop(message.body[0], None), message.body[0]))
        elif message.interface == MANAGER and message.member == "UserRemoved":
            self._tell(SessionEnded(_user(message.body[0]), None))

    def _tell(self, ended: SessionEnded) -> None:
        self._ended.append(ended)
        self._news.set()


class _Refused(Exception):
    """An error for an answer."""


@dataclass(frozen=True, slots=True)
class _Peer:
    name: str
    path: str
    interface: str


_DAEMON: Final = _Peer(BUS, "/org/freedesktop/DBus", BUS)


async def _call(bus: "MessageBus", peer: _Peer, member: str, signature: str, body: list[object]) -> "Message":
    from dbus_fast import Message, MessageType

    question = Message(destination=peer.name, path=peer.path, interface=peer.interface, member=member, signature=signature, body=body)
    async with asyncio.timeout(CALL_DEADLINE):
        answer = await bus.call(question)
    if answer is None or answer.message_type is not MessageType.METHOD_RETURN:
        raise _Refused
    return answer


async def _until_gone(bus: "MessageBus") -> None:
    with contextlib.suppress(OSError, EOFError):
        await bus.wait_for_disconnect()  # type: ignore[no-untyped-call]


async def _hang_up(bus: "MessageBus") -> None:
    """The connection is closed, and its descriptor too, when it returns."""
    if bus.connected:
        bus.disconnect()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CALL_DEADLINE):
                await _until_gone(bus)
    elif bus._sock is not None:
        bus._sock.close()  # a connection that never came about: disconnect() leaves it open


def _user(uid: int) -> str:
    return f"uid:{uid}"


def _done(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
