"""The sessions of Windows, as they are compared from look to look. What Windows says is played."""

import asyncio

import pytest

from bits_async.identity.sessions import SessionEnded, Wts
from bits_async.identity.wts import LoggedOn

ALICE, BOB = LoggedOn("LAB\\alice", "S-1-5-21-1"), LoggedOn("LAB\\bob", "S-1-5-21-2")


class Looks:
    """What each look finds; the last one stays. An error is raised."""

    def __init__(self, *found: dict[str, LoggedOn] | OSError) -> None:
        self._found = list(found)

    def __call__(self) -> dict[str, LoggedOn]:
        found = self._found.pop(0) if len(self._found) > 1 else self._found[0]
        if isinstance(found, OSError):
            raise found
        return found


async def told(*found: dict[str, LoggedOn] | OSError, count: int) -> list[SessionEnded]:
    sessions = Wts(Looks(*found), every=0)
    await sessions.start()
    try:
        async with asyncio.timeout(30):
            return [await sessions.ended() for _ in range(count)]
    finally:
        await sessions.stop()


async def test_the_last_session_of_a_user_ends_the_user_too() -> None:
    ends = await told({"1": ALICE, "2": BOB}, {"2": BOB}, count=2)
    assert ends == [SessionEnded(ALICE.sid, "1"), SessionEnded(ALICE.sid, None)]


async def test_a_user_with_another_session_is_still_there() -> None:
    ends = await told({"1": ALICE, "2": ALICE}, {"2": ALICE}, {}, count=3)
    assert ends == [SessionEnded(ALICE.sid, "1"), SessionEnded(ALICE.sid, "2"), SessionEnded(ALICE.sid, None)]


async def test_a_session_that_is_anothers_now_has_ended() -> None:
    """The console's number stays when the next one logs on there."""
    ends = await told({"1": ALICE}, {"1": BOB}, count=2)
    assert ends == [SessionEnded(ALICE.sid, "1"), SessionEnded(ALICE.sid, None)]


async def test_nobody_is_logged_off_because_windows_did_not_answer() -> None:
    ends = await told({"1": ALICE}, OSError("not up yet"), {"1": ALICE}, {}, count=2)
    assert set(ends) == {SessionEnded(ALICE.sid, "1"), SessionEnded(ALICE.sid, None)}


async def test_nobody_is_logged_off_because_a_domain_did_not_answer() -> None:
    ends = await told({"1": ALICE}, {"1": LoggedOn(ALICE.name, None)}, {"1": ALICE}, {}, count=2)
    assert set(ends) == {SessionEnded(ALICE.sid, "1"), SessionEnded(ALICE.sid, None)}


async def test_whose_a_session_is() -> None:
    sessions = Wts(Looks({"1": ALICE, "2": LoggedOn("GONE\\carol", None)}))
    assert await sessions.user_of("1") == ALICE.sid
    assert await sessions.user_of("7") is None
    with pytest.raises(LookupError, match="SID"):
        await sessions.user_of("2")
    with pytest.raises(LookupError, match="do not answer"):
        await Wts(Looks(OSError())).user_of("1")
