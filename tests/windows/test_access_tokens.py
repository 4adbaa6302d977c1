"""Access tokens on Windows: made, worn by threads, checked, given back.

All tokens here are duplicates of the one user's that Wine knows, told apart by their own ids: that each thread wears its own, and that
one which lost it is found, is real. What files such a thread may open is not: to Wine they all belong to one Unix user.
"""

import asyncio
import ctypes
import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import bits_async as bits
from bits_async import ErrorCode, HelperTokenFlags, ImpersonationFailed, ImpersonationLevel, LogonFailed, LogonType, Token, run_as
from bits_async.identity import access_tokens, win32, windows, wts
from bits_async.identity.sessions import Wts, watch_sessions
from bits_async.identity.threads import TokenExecutor
from tests.windows.stage import stage

ADVAPI32 = ctypes.WinDLL("advapi32")
ACCESS = win32.TOKEN_QUERY | win32.TOKEN_DUPLICATE


@pytest.fixture
def handle() -> Iterator[int]:
    """A primary token: the process's, by a handle of the test's own."""
    token = win32.process_token(ACCESS)
    yield token.value
    token.close()


@pytest.fixture
async def token(handle: int) -> Token:
    return await Token.for_handle(handle)


def thread_wears() -> int | None:
    """The id of the token that the calling thread wears; None: it is the process."""
    found = win32.thread_token()
    return None if found is None else win32.worn(found).token


def in_a_thread(work: Callable[[], None]) -> None:
    """Runs it in a thread that is the process, whose error is the test's."""
    failed: list[BaseException] = []

    def live() -> None:
        try:
            work()
        except BaseException as exc:
            failed.append(exc)

    thread = threading.Thread(target=live)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


class TestWhoAnAccessTokenIs:
    def test_the_process_says_its_name_its_sid_and_its_powers(self) -> None:
        account = windows.process_identity().account
        assert account.name.endswith("\\root") or account.name
        assert account.sid.startswith("S-1-5-21-")
        assert account.session == 1
        assert (account.elevated, account.elevation_type) in ((True, "full"), (False, "limited"))  # Wine 8; Wine 10
        assert account.integrity == win32.HIGH_INTEGRITY
        assert Token.for_process().elevated is account.elevated

    async def test_a_token_of_a_handle_is_its_user_and_shows_no_handle(self, token: Token) -> None:
        own = Token.for_process()
        assert (token.name, token.sid, token.elevated) == (own.name, own.sid, own.elevated)
        assert token.level is ImpersonationLevel.IMPERSONATE
        assert token.proved
        assert token.logged_on
        assert not token.local.is_process
        assert str(token.local.handle.value) not in repr(token) + repr(token.local)  # type: ignore[attr-defined]

    async def test_the_callers_handle_stays_the_callers(self, handle: int) -> None:
        token = await Token.for_handle(handle)
        token.close()
        del token
        gc.collect()
        win32.duplicated(handle, 2).close()

    def test_a_lowered_process_has_no_administrators_powers(self) -> None:
        assert not windows.is_elevated(windows.Account("alice", "S-1-5-21-1", True, integrity=0x2000))

    async def test_what_is_no_token_is_refused(self) -> None:
        with pytest.raises(ImpersonationFailed, match="cannot be duplicated"):
            await Token.for_handle(0x7FFFFFF4)
        with pytest.raises(TypeError):
            await Token.for_handle("1")  # type: ignore[arg-type]

    async def test_no_level_is_raised(self, handle: int) -> None:
        low = win32.duplicated(handle, ImpersonationLevel.IDENTIFY.value)
        with pytest.raises(ImpersonationFailed) as caught:
            await Token.for_handle(low.value)
        assert "lower level" in str(caught.value)
        named = await Token.for_handle(low.value, level=ImpersonationLevel.IDENTIFY)
        with pytest.raises(ImpersonationFailed, match="IDENTIFY cannot act"):
            await run_as(named, thread_wears)

    async def test_a_name_alone_makes_nobody(self) -> None:
        with pytest.raises(ImpersonationFailed, match="comes from a logon"):
            await Token.for_user("somebody-else")


class TestThreads:
    async def test_each_token_is_worn_by_its_own_threads_and_by_no_other(self, handle: int) -> None:
        first, second = await Token.for_handle(handle), await Token.for_handle(handle)
        executors = [TokenExecutor(each, threads=2) for each in (first, second)]
        try:
            seen = await asyncio.gather(*(executor.run(thread_wears) for executor in executors for _ in range(20)))
        finally:
            for executor in executors:
                await executor.aclose()
        theirs = {win32.worn(each.local.handle).token for each in (first, second)}  # type: ignore[attr-defined]
        assert len(theirs) == 2
        assert None not in seen
        assert set(seen[:20]).isdisjoint(seen[20:])
        assert thread_wears() is None

    async def test_t01_a_thread_that_reverts_is_found_and_nothing_it_did_is_handed_out(self, token: Token) -> None:
        executor = TokenExecutor(token)
        try:
            with pytest.raises(ImpersonationFailed, match="was found as the process"):
                await executor.run(ADVAPI32.RevertToSelf)
            with pytest.raises(ImpersonationFailed):
                await executor.run(thread_wears)
            assert executor.broken
        finally:
            await executor.aclose()

    async def test_t01_a_thread_that_puts_on_another_token_is_found(self, handle: int, token: Token) -> None:
        other = win32.duplicated(handle, 2)
        with pytest.raises(ImpersonationFailed, match="was found as somebody else"):
            await run_as(token, win32.impersonate, other)

    def test_t01_a_thread_of_the_process_that_impersonates_is_not_the_process(self, handle: int) -> None:
        def work() -> None:
            process = windows.process_identity()
            process.check()
            win32.impersonate(win32.duplicated(handle, 2))
            process.check()

        with pytest.raises(ImpersonationFailed, match="impersonating somebody else"):
            in_a_thread(work)

    def test_a_process_that_windows_lets_only_identify_takes_no_identity(self, handle: int) -> None:
        identity = windows.TokenIdentity.of(win32.duplicated(handle, ImpersonationLevel.IDENTIFY.value))
        with pytest.raises(ImpersonationFailed, match="identify, but not impersonate"):
            in_a_thread(identity.assume)

    def test_the_threads_own_token_is_taken_along(self, handle: int) -> None:
        found: list[Token | None] = []

        def work() -> None:
            found.append(Token.for_thread())
            win32.impersonate(win32.duplicated(handle, 2))
            found.append(Token.for_thread())

        in_a_thread(work)
        assert found[0] is None
        assert found[1] is not None
        assert found[1].sid == Token.for_process().sid

    async def test_t02_no_program_is_started_as_the_process_from_a_token_thread(self, token: Token) -> None:
        import subprocess

        with pytest.raises(ImpersonationFailed, match="may start no process"):
            await run_as(token, subprocess.run, ["cmd", "/c", "exit"])


class TestHandles:
    @pytest.fixture
    def closed(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """The handles that were closed, in order."""
        found: list[int] = []
        close = win32._CloseHandle

        def count(value: int) -> None:
            found.append(value)
            close(value)

        monkeypatch.setattr(win32, "_CloseHandle", count)
        return found

    def test_a_handle_is_closed_once(self, handle: int, closed: list[int]) -> None:
        mine = win32.duplicated(handle, 2)
        value = mine.value
        mine.close()
        mine.close()
        with pytest.raises(OSError, match="closed"):
            _ = mine.value
        del mine
        gc.collect()
        assert closed.count(value) == 1

    async def test_tokens_that_nobody_has_any_more_give_their_handles_back(self, handle: int, closed: list[int]) -> None:
        tokens = [await Token.for_handle(handle) for _ in range(20)]
        handles = {token.local.handle.value for token in tokens}  # type: ignore[attr-defined]
        closed.clear()
        tokens.clear()
        gc.collect()
        assert len(handles) == 20
        assert sorted(handles) == sorted(value for value in closed if value in handles)


class TestJobs:
    async def test_a_helpers_threads_write_the_file(self, token: Token, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[int | None] = []
        create = windows.create_exclusive

        def watched(directory: Path, name: str) -> int:
            seen.append(thread_wears())
            return create(directory, name)

        monkeypatch.setattr(windows, "create_exclusive", watched)
        path = tmp_path / "big"
        url, flags = stage().url + "/pub/big?helper", HelperTokenFlags.LOCAL_FILE
        await bits.download(url, path, helper=token, helper_flags=flags, sha256=stage().sha256, retry_for=0)
        assert len(seen) == 1
        assert seen[0] is not None
        assert thread_wears() is None


def test_windows_has_every_call_that_is_declared() -> None:
    """Here: Wine. Those of other modules are declared by the same class."""
    assert wts
    for call in win32.CALLS:
        assert call.bind() is not None, call.name


class TestShapesOnly:
    """What Wine answers whatever is asked: these show how Windows is called, and that an answer which is no token makes none."""

    async def test_shape_only_logon_user_is_called_for_each_type(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[tuple[Any, ...]] = []

        def logon(user: str, domain: str | None, secret: Any, logon_type: int, provider: int, handle: Any) -> None:
            asked.append((user, domain, secret.value, logon_type, provider))
            raise win32.failure(1326)

        monkeypatch.setattr(win32, "_LogonUser", logon)
        for user, domain in (("alice@REALM", None), ("LAB\\alice", None), ("bob", "LAB"), ("alice", "."), ("alice", None)):
            for logon_type in set(LogonType) - {LogonType.NEW_CREDENTIALS}:
                with pytest.raises(LogonFailed):
                    await bits.logon_user(user, "secret", domain=domain, logon_type=logon_type)
        names = {(user, domain) for user, domain, *_ in asked}
        assert names == {("alice@REALM", None), ("alice", "LAB"), ("bob", "LAB"), ("alice", ".")}
        assert {logon_type for *_, logon_type, _ in asked} == {2, 3, 4, 5, 8}
        assert {(secret, provider) for _, _, secret, _, provider in asked} == {("secret", 0)}

    @pytest.mark.parametrize(
        ("number", "code"),
        [
            (1326, ErrorCode.ERROR_LOGON_FAILURE),
            (1317, ErrorCode.ERROR_NO_SUCH_USER),
            (1330, ErrorCode.ERROR_PASSWORD_EXPIRED),
            (1907, ErrorCode.ERROR_PASSWORD_EXPIRED),
            (1793, ErrorCode.ERROR_ACCOUNT_EXPIRED),
            (1331, ErrorCode.ERROR_ACCOUNT_DISABLED),
            (1909, ErrorCode.ERROR_ACCOUNT_LOCKED_OUT),
            (1328, ErrorCode.ERROR_ACCOUNT_RESTRICTION),
            (1385, ErrorCode.ERROR_ACCOUNT_RESTRICTION),
            (1311, ErrorCode.ERROR_NO_LOGON_SERVERS),
            (1398, ErrorCode.ERROR_TIME_SKEW),
            (1789, ErrorCode.ERROR_TRUSTED_RELATIONSHIP_FAILURE),
        ],
    )
    async def test_shape_only_each_refusal_has_its_own_code(self, number: int, code: ErrorCode, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: Any) -> None:
            raise win32.failure(number)

        monkeypatch.setattr(win32, "_LogonUser", refuse)
        with pytest.raises(LogonFailed) as caught:
            await bits.logon_user("alice", "secret")
        assert caught.value.code == code
        assert "secret" not in str(caught.value) + repr(caught.value)

    async def test_shape_only_a_logon_that_gives_no_token_logs_nobody_on(self) -> None:
        """LogonUserW of Wine 8 says yes to every password, with a handle that is none."""
        with pytest.raises(LogonFailed, match="no token that can be used"):
            await bits.logon_user("nobody", "wrong")

    async def test_shape_only_new_credentials_keep_the_local_identity_and_ask_nobody(self) -> None:
        token = await bits.logon_user("LAB\\alice", "secret", logon_type=LogonType.NEW_CREDENTIALS)
        assert token.local is Token.for_process().local
        assert (token.principal, token.proved) == ("LAB\\alice", False)

    async def test_shape_only_a_sessions_token_is_asked_for_by_its_number(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """WTSQueryUserToken of Wine 8 gives the process's own for every session."""
        token = await Token.for_session("1")
        assert (token.session, token.sid) == ("1", Token.for_process().sid)

        def refuse(session: int, handle: Any) -> None:
            raise win32.failure(1314)

        monkeypatch.setattr(win32, "_WTSQueryUserToken", refuse)
        with pytest.raises(ImpersonationFailed) as caught:
            await Token.for_session("1")
        assert "LocalSystem" in str(caught.value)
        with pytest.raises(ImpersonationFailed, match="no session"):
            await Token.for_session("c1")

    async def test_shape_only_the_sessions_are_asked_for(self) -> None:
        """WTSEnumerateSessionsW of Wine 8 lists none, that of Wine 10 the user's."""
        own = Token.for_process()
        found = wts.sessions()
        assert found in ({}, {"1": wts.LoggedOn(own.name, own.sid)})
        async with watch_sessions() as sessions:
            assert isinstance(sessions, Wts)
            assert await sessions.user_of("1") == (own.sid if found else None)

    async def test_shape_only_nobody_is_made_without_a_password(self) -> None:
        for arguments in ({"keytab": "alice.keytab"}, {"password": "secret", "keytab": "x"}, {"password": "secret", "local_user": "alice"}):
            with pytest.raises(bits.InvalidArgument):
                await bits.logon_user("alice@REALM", **arguments)  # type: ignore[arg-type]

    def test_shape_only_a_thread_without_a_token_has_none(self) -> None:
        assert access_tokens.of_thread(ImpersonationLevel.IMPERSONATE) is None
