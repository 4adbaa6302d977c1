"""Log-offs are told once, whatever happens to logind and the bus in between; where nobody tells of any, nobody is logged off."""

import asyncio
import builtins
import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dbus_fast
import pytest

from bits_async.identity import sessions
from bits_async.identity.sessions import SessionEnded, Sessions, watch_sessions

if TYPE_CHECKING:
    from tests.local_users import LocalUser
    from tests.logind import Logind, Session, SystemBus

needs_logind = pytest.mark.logind
PATIENCE = 60.0


@pytest.fixture
def bus() -> Iterator["SystemBus"]:
    from tests.logind import SystemBus

    with SystemBus() as server:
        yield server


@pytest.fixture
def logind(bus: "SystemBus") -> Iterator["Logind"]:
    from tests.logind import Logind

    with Logind(bus) as server:
        yield server


@pytest.fixture(autouse=True)
def back_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "BACK_AFTER", (0.05,))


async def begin(bus: "SystemBus", user: "LocalUser") -> "Session":
    from tests.logind import Session

    return await Session.begin(bus.address, user.uid)


async def heard(watcher: Sessions, count: int) -> list[SessionEnded]:
    async with asyncio.timeout(PATIENCE):
        return [await watcher.ended() for _ in range(count)]


async def known(watcher: Sessions, session: "Session") -> str:
    """Whose it is, once the watcher knows of it."""
    end = asyncio.get_running_loop().time() + PATIENCE
    while asyncio.get_running_loop().time() < end:
        user = None
        with contextlib.suppress(LookupError):  # the bus, or logind, is not back yet
            user = await watcher.user_of(session.name)
        if user is not None and session.name in watcher._known:  # type: ignore[attr-defined]
            return user
        await asyncio.sleep(0.01)
    raise TimeoutError(f"logind does not know {session.name}")


async def nothing(watcher: Sessions) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await watcher.ended()


@needs_logind
async def test_a_log_off_is_the_end_of_the_session_and_of_the_users_last(
    bus: "SystemBus", logind: "Logind", users: Mapping[str, "LocalUser"]
) -> None:
    alice = users["bitsalice"]
    async with watch_sessions(bus.address) as watcher:
        first, second = await begin(bus, alice), await begin(bus, alice)
        assert await known(watcher, first) == await known(watcher, second) == f"uid:{alice.uid}"
        await first.end()
        assert await heard(watcher, 1) == [SessionEnded(f"uid:{alice.uid}", first.name)]
        assert await watcher.user_of(first.name) is None
        await second.end()
        assert await heard(watcher, 2) == [SessionEnded(f"uid:{alice.uid}", second.name), SessionEnded(f"uid:{alice.uid}", None)]


@needs_logind
async def test_a_session_that_was_there_before_the_watch_is_seen_to_end(
    bus: "SystemBus", logind: "Logind", users: Mapping[str, "LocalUser"]
) -> None:
    session = await begin(bus, users["bitsbob"])
    async with watch_sessions(bus.address) as watcher:
        await session.end()
        assert SessionEnded(f"uid:{users['bitsbob'].uid}", session.name) in await heard(watcher, 2)


@needs_logind
async def test_what_ends_while_logind_is_restarted_is_told_when_it_is_back(
    bus: "SystemBus", logind: "Logind", users: Mapping[str, "LocalUser"]
) -> None:
    session = await begin(bus, users["bitsalice"])
    user = f"uid:{users['bitsalice'].uid}"
    async with watch_sessions(bus.address) as watcher:
        await known(watcher, session)
        logind.kill()
        with pytest.raises(LookupError):
            await watcher.user_of(session.name)
        await nothing(watcher)
        await session.abandon()
        logind.start_again()
        assert set(await heard(watcher, 2)) == {SessionEnded(user, session.name), SessionEnded(user, None)}
        later = await begin(bus, users["bitsalice"])
        await known(watcher, later)
        await later.end()
        assert SessionEnded(user, later.name) in await heard(watcher, 2)


@needs_logind
async def test_a_bus_that_goes_away_logs_nobody_off_and_is_followed_again(users: Mapping[str, "LocalUser"]) -> None:
    from tests.logind import Logind, SystemBus

    with SystemBus() as bus:
        async with watch_sessions(bus.address) as watcher:
            bus.ask_to_stop()
            assert bus.process is not None
            bus.process.wait()
            await nothing(watcher)
            bus._start()
            with Logind(bus):
                session = await begin(bus, users["bitsalice"])
                await known(watcher, session)
                await session.end()
                assert SessionEnded(f"uid:{users['bitsalice'].uid}", session.name) in await heard(watcher, 2)


async def test_without_a_bus_nobody_is_logged_off(tmp_path: Path) -> None:
    for address in (f"unix:path={tmp_path}/none", "no address"):
        async with watch_sessions(address) as watcher:
            with pytest.raises(LookupError):
                await watcher.user_of("c1")
            await nothing(watcher)


async def test_without_dbus_fast_nobody_is_logged_off(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = builtins.__import__

    def absent(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "dbus_fast":
            raise ImportError(name)
        return honest(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    async with watch_sessions() as watcher:
        with pytest.raises(LookupError):
            await watcher.user_of("c1")
        await nothing(watcher)


def removed(session: str, *, destination: str | None = None, sender: str | None = None) -> Any:
    """The signal of logind."""
    return dbus_fast.Message(
        message_type=dbus_fast.MessageType.SIGNAL,
        destination=destination,
        sender=sender,
        path=sessions.LOGIND_PATH,
        interface=sessions.MANAGER,
        member="SessionRemoved",
        signature="so",
        body=[session, f"/org/freedesktop/login1/session/{session}"],
    )


async def test_the_end_of_a_session_that_was_not_known_is_told_too() -> None:
    watcher = sessions._Logind("unix:path=/nowhere")
    watcher._sender = ":1.7"
    watcher._heard(removed("c6", sender=":1.66"))
    watcher._heard(removed("c7", sender=":1.7"))
    assert await heard(watcher, 1) == [SessionEnded(None, "c7")]
    await nothing(watcher)


@needs_logind
async def test_nobody_but_logind_logs_others_off(bus: "SystemBus", logind: "Logind", users: Mapping[str, "LocalUser"]) -> None:
    from dbus_fast.aio import MessageBus

    session = await begin(bus, users["bitsalice"])
    async with watch_sessions(bus.address) as watcher:
        await known(watcher, session)
        stranger = await MessageBus(bus_address=bus.address).connect()
        try:
            await stranger.send(removed(session.name, destination=watcher._bus.unique_name))  # type: ignore[attr-defined]
            await nothing(watcher)
        finally:
            stranger.disconnect()
            await stranger.wait_for_disconnect()
        await session.end()
        assert (await heard(watcher, 1))[0].session == session.name


async def test_who_waits_for_a_log_off_hears_that_the_watch_broke(monkeypatch: pytest.MonkeyPatch) -> None:
    watcher = sessions._Logind("unix:path=/nowhere")

    async def dies(looked: "asyncio.Future[None]") -> None:
        looked.set_result(None)
        await asyncio.sleep(0.01)
        raise RuntimeError("a defect")

    monkeypatch.setattr(watcher, "_run", dies)
    await watcher.start()
    with pytest.raises(RuntimeError, match="a defect"):
        await heard(watcher, 1)
    await watcher.stop()
