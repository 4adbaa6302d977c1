"""Threads born in a token: what they promise to whoever waits, cancels, or closes. Run as whoever runs the tests."""

import asyncio
import concurrent.futures
import contextvars
import gc
import os
import threading
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Any

import aiofiles
import aiofiles.os
import pytest
import spnego

from bits_async.errors import ImpersonationFailed, ManagerClosed, TokenRequired
from bits_async.identity import threads
from bits_async.identity.ambient import current_token, impersonate
from bits_async.identity.threads import TokenExecutor, TokenExecutors, in_own_thread, run_as
from bits_async.identity.tokens import LocalIdentity, Token
from tests.identity import child
from tests.waiting import Deadlines, until


class Chameleon:
    """An identity that can be made to fail; as harmless as the process's own."""

    key, elevated, is_process = "uid:1", False, True

    def __init__(self) -> None:
        self.name = "alice"
        self.born: list[str] = []
        self.checks = 0
        self.refuse_birth: Exception | None = None
        self.lost = False

    def assume(self) -> None:
        self.born.append(threading.current_thread().name)
        if self.refuse_birth is not None:
            raise self.refuse_birth

    def check(self) -> None:
        self.checks += 1
        if self.lost:
            raise ImpersonationFailed("found as somebody else", identity=self.name)

    def fresh(self) -> LocalIdentity:
        return self

    def close(self) -> None: ...

    def lose(self) -> str:
        self.lost = True
        return "a secret"


@pytest.fixture
def identity() -> Chameleon:
    return Chameleon()


@pytest.fixture
def token(identity: Chameleon) -> Token:
    return Token._make(identity)


@pytest.fixture
async def executor(no_leaks: None, token: Token) -> AsyncIterator[TokenExecutor]:
    executor = TokenExecutor(token, threads=2)
    yield executor
    await executor.aclose()


class Gate:
    """Something that blocks a thread until it is opened."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self._open = threading.Event()
        self.left = False

    def __call__(self) -> str:
        self.entered.release()
        assert self._open.wait(50)
        self.left = True
        return "through"

    def open(self) -> None:
        self._open.set()

    async def reached(self) -> None:
        await until(lambda: self.entered.acquire(blocking=False))


@pytest.fixture
async def gate() -> AsyncIterator[Gate]:
    gate = Gate()
    yield gate
    gate.open()


# -- running


async def test_a_call_runs_in_a_named_daemonic_thread(executor: TokenExecutor) -> None:
    thread = await executor.run(threading.current_thread)
    assert thread.name == "bits-files-alice_1"
    assert thread.daemon
    assert thread is not threading.main_thread()


async def test_arguments_and_outcomes_pass_through(executor: TokenExecutor) -> None:
    assert await executor.run(int, "ff", base=16) == 255
    with pytest.raises(ZeroDivisionError):
        await executor.run(divmod, 1, 0)
    with pytest.raises(RuntimeError, match="StopIteration"):
        await executor.run(next, iter(()))
    with pytest.raises(SystemExit):
        await executor.run(exit_now)


def exit_now() -> None:
    raise SystemExit(3)


async def test_threads_are_born_when_they_are_needed(executor: TokenExecutor, identity: Chameleon, gate: Gate) -> None:
    for _ in range(5):
        await executor.run(os.getpid)
    assert len(identity.born) == 1
    blocked = asyncio.ensure_future(executor.run(gate))
    await gate.reached()
    await executor.run(os.getpid)
    assert len(identity.born) == 2
    both = [asyncio.ensure_future(executor.run(gate)) for _ in range(3)]
    await gate.reached()
    gate.open()
    assert await asyncio.gather(blocked, *both) == ["through"] * 4
    assert len(identity.born) == 2  # no more than it was given


async def test_the_identity_is_checked_right_before_and_right_after(executor: TokenExecutor, identity: Chameleon) -> None:
    assert await executor.run(lambda: identity.checks) == 1
    assert identity.checks == 2


LEAK: contextvars.ContextVar[str] = contextvars.ContextVar("LEAK", default="nothing")


async def test_no_callers_context_reaches_a_thread(executor: TokenExecutor, token: Token) -> None:
    LEAK.set("something")
    with impersonate(token):
        assert await executor.run(lambda: (LEAK.get(), current_token())) == ("nothing", Token.for_process())
        assert await executor.spawn(lambda: LEAK.get()) == "nothing"
        assert await in_own_thread(LEAK.get) == "nothing"
    assert await executor.run(LEAK.set, "inside") is not None
    assert await executor.run(LEAK.get) == "nothing"


@pytest.mark.posix  # the test asks for ids, or starts a child that does
async def test_the_loops_default_executor_is_never_used(executor: TokenExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asyncio.get_running_loop(), "_default_executor", object())
    await executor.run(os.getpid)
    await executor.run_security(os.getpid, deadline=30)
    await executor.spawn(os.getpid)
    await run_as(executor.token, os.getpid)
    await Token.for_user(os.geteuid())
    monkeypatch.undo()


async def test_aiofiles_uses_the_same_threads_and_checks(executor: TokenExecutor, identity: Chameleon, tmp_path: Any) -> None:
    file = await aiofiles.open(tmp_path / "file", "wb", buffering=0, executor=executor.pool)
    try:
        await file.write(b"data")
    finally:
        await file.close()
    assert (await aiofiles.os.stat(tmp_path / "file", executor=executor.pool)).st_size == 4
    assert identity.checks == 8
    assert identity.born == ["bits-files-alice_1"]


# -- an identity that cannot be taken or kept


@pytest.mark.parametrize("error", [ImpersonationFailed("no privilege"), OSError(1, "refused"), RuntimeError("odd")])
async def test_an_executor_that_cannot_take_its_identity_is_broken_for_good(
    executor: TokenExecutor, identity: Chameleon, error: Exception
) -> None:
    identity.refuse_birth = error
    called: list[int] = []
    errors = []
    for use in (
        lambda: executor.run(called.append, 1),
        lambda: executor.run_security(called.append, 2, deadline=30),
        lambda: executor.run(called.append, 3),
    ):
        with pytest.raises(ImpersonationFailed) as caught:
            await use()
        errors.append(caught.value)
    for start in (lambda: executor.spawn(called.append, 4), lambda: executor.pool.submit(called.append, 5)):
        with pytest.raises(ImpersonationFailed) as caught:
            start()
        errors.append(caught.value)
    assert len({id(error) for error in errors}) == 5  # each use raises an error of its own
    assert executor.broken
    assert called == []


async def test_calls_that_wait_fail_with_the_thread_that_could_not_be_born(identity: Chameleon, token: Token) -> None:
    identity.refuse_birth = ImpersonationFailed("no privilege")
    executor = TokenExecutor(token, threads=1)
    outcomes = await asyncio.gather(*(executor.run(os.getpid) for _ in range(10)), return_exceptions=True)
    assert [type(each) for each in outcomes] == [ImpersonationFailed] * 10
    assert len(set(map(id, outcomes))) == 10
    await executor.aclose()


async def test_a_dedicated_thread_that_cannot_be_born_fails_its_call(executor: TokenExecutor, identity: Chameleon) -> None:
    identity.refuse_birth = ImpersonationFailed("no privilege")
    with pytest.raises(ImpersonationFailed, match="no privilege"):
        await executor.spawn(os.getpid)
    assert executor.broken


@pytest.mark.parametrize("manner", ["run", "security", "spawn", "pool"])
async def test_t01_what_was_done_as_somebody_else_is_not_handed_out(executor: TokenExecutor, identity: Chameleon, manner: str) -> None:
    call = {
        "run": lambda: executor.run(identity.lose),
        "security": lambda: executor.run_security(identity.lose, deadline=30),
        "spawn": lambda: executor.spawn(identity.lose),
        "pool": lambda: asyncio.wrap_future(executor.pool.submit(identity.lose)),
    }[manner]
    with pytest.raises(ImpersonationFailed, match="somebody else"):
        await call()
    identity.lost = False
    with pytest.raises(ImpersonationFailed, match="somebody else"):
        await executor.run(os.getpid)


async def test_t01_nothing_is_called_when_the_identity_is_already_lost(executor: TokenExecutor, identity: Chameleon) -> None:
    await executor.run(os.getpid)
    identity.lost = True
    called: list[int] = []
    with pytest.raises(ImpersonationFailed):
        await executor.run(called.append, 1)
    assert called == []


async def test_t01_an_error_of_a_call_that_lost_its_identity_is_replaced(executor: TokenExecutor, identity: Chameleon) -> None:
    def fail() -> None:
        identity.lose()
        raise ValueError("hunter2")

    with pytest.raises(ImpersonationFailed) as caught:
        await executor.run(fail)
    assert "hunter2" not in repr(caught.value.__cause__)
    assert caught.value.__suppress_context__


async def test_a_system_without_threads_is_an_error_and_no_hang(executor: TokenExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    for _ in range(2):
        with pytest.raises(ImpersonationFailed, match="no thread can be started for alice"):
            await executor.run(os.getpid)
    monkeypatch.undo()
    assert await executor.run(os.getpid) == os.getpid()


# -- cancelling a file call


async def test_a_cancelled_file_call_is_waited_for(executor: TokenExecutor, gate: Gate) -> None:
    task = asyncio.create_task(executor.run(gate))
    await gate.reached()
    task.cancel()
    for _ in range(20):
        await asyncio.sleep(0)
    task.cancel()  # impatience changes nothing
    await asyncio.sleep(0.01)
    assert not task.done()
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert gate.left
    assert not executor.broken


async def test_a_cancelled_call_that_still_waits_for_a_thread_is_made(token: Token, gate: Gate) -> None:
    executor = TokenExecutor(token, threads=1)
    first = asyncio.create_task(executor.run(gate))
    await gate.reached()
    closed: list[int] = []
    second = asyncio.create_task(executor.run(closed.append, 1))
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.sleep(0)
    gate.open()
    await asyncio.wait([first, second])
    assert second.cancelled()
    assert closed == [1]  # a close() must not be lost
    await executor.aclose()


@pytest.mark.parametrize("manner", ["run", "security", "spawn"])
async def test_the_error_of_a_cancelled_call_is_not_reported_as_forgotten(executor: TokenExecutor, gate: Gate, manner: str) -> None:
    def fail() -> None:
        gate()
        raise OSError(5, "late")

    async def call() -> None:
        match manner:
            case "run":
                await executor.run(fail)
            case "security":
                await executor.run_security(fail, deadline=30)
            case "spawn":
                await executor.spawn(fail)

    told: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context))
    task = asyncio.create_task(call())
    await gate.reached()
    task.cancel()
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await task
    del task
    await executor.aclose()
    gc.collect()
    assert told == []


async def test_a_timeout_around_a_file_call_still_tells_of_itself(executor: TokenExecutor, gate: Gate) -> None:
    async def open_later() -> None:
        await asyncio.sleep(0.05)
        gate.open()

    opener = asyncio.create_task(open_later())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await executor.run(gate)
    assert gate.left
    await opener


async def test_a_file_call_that_never_returns_is_given_up(executor: TokenExecutor, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "CANCEL_PATIENCE", 0.05)
    task = asyncio.create_task(executor.run(gate))
    await gate.reached()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not gate.left
    assert executor.retired == 1
    with pytest.raises(ImpersonationFailed, match="did not return"):
        await executor.run(os.getpid)
    gate.open()


# -- security calls


async def test_a_security_call_returns_in_time(executor: TokenExecutor) -> None:
    assert await executor.run_security(divmod, 7, 2, deadline=30) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await executor.run_security(divmod, 7, 0, deadline=30)


@pytest.mark.parametrize("how", ["deadline", "cancel"])
async def test_a_security_call_is_abandoned_and_its_thread_replaced(
    executor: TokenExecutor, identity: Chameleon, gate: Gate, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asyncio, "timeout", (deadlines := Deadlines(0.25)).timeout)
    calls = [asyncio.create_task(executor.run_security(gate, deadline=0.25)) for _ in range(2)]
    await gate.reached()
    await gate.reached()
    if how == "deadline":
        deadlines.pass_now()
    for call in calls if how == "cancel" else ():
        call.cancel()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(each) for each in outcomes] == [TimeoutError if how == "deadline" else asyncio.CancelledError] * 2
    assert not gate.left
    assert executor.retired == 2
    assert not executor.broken
    assert await executor.run_security(os.getpid, deadline=30) == os.getpid()  # both threads are stuck, yet there is one
    gate.open()
    await until(lambda: sum(name in {t.name for t in threading.enumerate()} for name in identity.born) == 1)


async def test_a_security_call_that_had_no_thread_in_time_is_never_made(token: Token, gate: Gate) -> None:
    executor = TokenExecutor(token, threads=1)
    stuck = asyncio.create_task(executor.run(gate))
    await gate.reached()
    called: list[int] = []
    with pytest.raises(TimeoutError):
        await executor.run_security(called.append, 1, deadline=0.02)
    gate.open()
    await stuck
    assert await executor.run(lambda: called) == []
    assert executor.retired == 0
    await executor.aclose()


async def test_a_security_call_that_was_over_counts_however_late_the_loop_hears_of_it(
    executor: TokenExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that slept past the deadline has lost nothing."""
    sources: list[concurrent.futures.Future[Any]] = []
    end_of = threads._end_of
    monkeypatch.setattr(threads, "_end_of", lambda source: [sources.append(source), end_of(source)][1])
    monkeypatch.setattr(asyncio, "timeout", (deadlines := Deadlines(0.25)).timeout)
    call = asyncio.create_task(executor.run_security(os.getpid, deadline=0.25))
    await asyncio.sleep(0)
    concurrent.futures.wait(sources)  # the loop stands still
    deadlines.pass_now()
    assert await call == os.getpid()
    assert executor.retired == 0


async def test_a_call_that_raises_timeouterror_itself_keeps_its_thread(executor: TokenExecutor) -> None:
    def fail() -> None:
        raise TimeoutError("of the callable")

    with pytest.raises(TimeoutError, match="of the callable"):
        await executor.run_security(fail, deadline=30)
    assert executor.retired == 0


# -- dedicated threads


async def test_long_moves_take_nobodys_place(executor: TokenExecutor, identity: Chameleon, gate: Gate) -> None:
    moves = [executor.spawn(gate) for _ in range(5)]
    for _ in moves:
        await gate.reached()
    assert await executor.run(os.getpid) == os.getpid()
    gate.open()
    assert await asyncio.gather(*moves) == ["through"] * 5
    assert len(set(identity.born)) == 6


async def test_cancelling_a_move_stops_nothing(executor: TokenExecutor, gate: Gate) -> None:
    move = executor.spawn(gate)
    await gate.reached()
    assert move.cancel()
    assert not gate.left
    gate.open()
    await until(lambda: gate.left)


# -- the end of a token, and of an executor


async def test_a_discarded_executor_requires_the_token(token: Token, gate: Gate) -> None:
    executor = TokenExecutor(token, threads=1)
    running = asyncio.create_task(executor.run(gate))
    await gate.reached()
    waiting = asyncio.create_task(executor.run(os.getpid))
    await asyncio.sleep(0)
    executor.discard()
    with pytest.raises(TokenRequired) as caught:
        await waiting
    assert caught.value.identity == "alice"
    for use in (executor.run(os.getpid), executor.run_security(os.getpid, deadline=30)):
        with pytest.raises(TokenRequired):
            await use
    with pytest.raises(TokenRequired):
        executor.spawn(os.getpid)
    gate.open()
    assert await running == "through"
    await executor.aclose()
    with pytest.raises(TokenRequired):
        await executor.run(os.getpid)


async def test_a_closed_token_is_used_no_more(executor: TokenExecutor) -> None:
    await executor.run(os.getpid)
    executor.token.close()
    with pytest.raises(TokenRequired):
        await executor.run(os.getpid)
    with pytest.raises(TokenRequired):
        executor.pool.submit(os.getpid)
    with pytest.raises(TokenRequired):
        TokenExecutor(executor.token)
    with pytest.raises(TokenRequired):
        await run_as(executor.token, os.getpid)


async def test_closing_serves_what_waits_and_leaves_no_thread(no_leaks: None, token: Token) -> None:
    executor = TokenExecutor(token, threads=2)
    before, done = set(threading.enumerate()), list[int]()
    calls = [asyncio.create_task(executor.run(done.append, number)) for number in range(50)]
    move = executor.spawn(done.append, 50)
    await asyncio.sleep(0)
    await executor.aclose()
    await asyncio.gather(*calls, move)
    assert sorted(done) == list(range(51))
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("bits-files-alice")]
    with pytest.raises(RuntimeError, match="closed"):
        await executor.run(os.getpid)
    await executor.aclose()


async def test_closing_gives_up_threads_that_do_not_end(token: Token, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "CLOSE_PATIENCE", 0.05)
    executor = TokenExecutor(token)
    stuck = asyncio.create_task(executor.run(gate))
    move = executor.spawn(gate)
    await gate.reached()
    await gate.reached()
    await executor.aclose()
    assert executor.retired == 2
    gate.open()
    await asyncio.gather(stuck, move)


async def test_an_executor_that_is_forgotten_ends_its_threads(token: Token, identity: Chameleon) -> None:
    executor = TokenExecutor(token)
    await executor.run(os.getpid)
    del executor
    gc.collect()
    await until(lambda: not {thread.name for thread in threading.enumerate()} & set(identity.born))


@pytest.mark.posix  # the test asks for ids, or starts a child that does
def test_a_stuck_thread_does_not_keep_the_interpreter_from_exiting() -> None:
    out = child.run(
        """
        async def main():
            executor = TokenExecutor(Token.for_process())
            executor.spawn(time.sleep, 600)
            call = asyncio.create_task(executor.run_security(hang, deadline=600))
            while not begun.is_set():
                await asyncio.sleep(0.001)
            call.cancel()
            await asyncio.wait([call])
            print("abandoned", executor.retired)

        def hang():
            begun.set()
            time.sleep(600)

        begun = threading.Event()

        asyncio.run(main())
        """
    )
    assert out == "abandoned 1\n"


# -- run_as


async def test_run_as_has_the_token_as_ambient_identity(no_leaks: None, token: Token) -> None:
    name = await run_as(token, lambda: (current_token(), threading.current_thread().name))
    assert name == (token, "bits-as-alice_1")
    assert await run_as(token, divmod, 7, 2) == (3, 1)
    assert current_token() is Token.for_process()


async def test_a_cancelled_run_as_is_waited_for(token: Token, gate: Gate) -> None:
    task = asyncio.create_task(run_as(token, gate))
    await gate.reached()
    task.cancel()
    await asyncio.sleep(0.01)
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert gate.left


async def test_run_as_fails_closed(token: Token, identity: Chameleon) -> None:
    with pytest.raises(ImpersonationFailed):
        await run_as(token, identity.lose)
    with pytest.raises(ImpersonationFailed):
        await run_as(token, os.getpid)


# -- the manager's executors


@pytest.fixture
async def executors(no_leaks: None) -> AsyncIterator[TokenExecutors]:
    executors = TokenExecutors()
    yield executors
    await executors.aclose()


async def test_a_token_has_one_executor_of_each_kind(executors: TokenExecutors, token: Token) -> None:
    with executors.lease(token, "files") as files, executors.lease(token, "security") as security:
        with executors.lease(token, "files") as again:
            assert again is files
        assert files is not security
        assert (await security.run(threading.current_thread)).name == "bits-security-alice_1"
    with executors.lease(token, "files") as later:
        assert later is files
    with executors.lease(Token._make(Chameleon()), "files") as others:
        assert others is not files  # of another token, whatever it is called


async def test_an_executor_that_nobody_uses_is_closed(
    executors: TokenExecutors, token: Token, identity: Chameleon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "IDLE_SECONDS", 0.02)
    with executors.lease(token, "files") as files, executors.lease(token, "files"):
        await asyncio.sleep(0.05)
        await files.run(os.getpid)
    await until(lambda: not {thread.name for thread in threading.enumerate()} & set(identity.born))
    with executors.lease(token, "files") as later:
        assert later is not files
        await later.run(os.getpid)


async def test_of_many_tokens_that_take_turns_a_few_keep_their_threads(no_leaks: None, executors: TokenExecutors) -> None:
    tokens = [Token._make(Chameleon()) for _ in range(200)]
    born: list[threading.Thread] = []
    for token in tokens:
        with executors.lease(token, "files") as files, executors.lease(token, "security") as security:
            born += await files.run(threading.current_thread), await security.run(threading.current_thread)
    await until(lambda: sum(thread.is_alive() for thread in born) <= threads.IDLE_EXECUTORS)
    with executors.lease(tokens[-1], "files") as files:
        assert await files.run(threading.current_thread) is born[-2]
        assert sum(thread.is_alive() for thread in born) == threads.IDLE_EXECUTORS, "those that were used last"
    await executors.aclose()


async def test_a_broken_executor_is_replaced_for_those_who_come_later(executors: TokenExecutors, token: Token, identity: Chameleon) -> None:
    with executors.lease(token, "files") as files:
        with pytest.raises(ImpersonationFailed):
            await files.run(identity.lose)
        identity.lost = False
        with executors.lease(token, "files") as later:
            assert later is not files
            await later.run(os.getpid)
        with pytest.raises(ImpersonationFailed):
            await files.run(os.getpid)


async def test_a_discarded_token_is_required_by_whoever_still_uses_it(executors: TokenExecutors, token: Token) -> None:
    with executors.lease(token, "files") as files, executors.lease(token, "security") as security:
        await files.run(os.getpid)
        executors.discard(token)
        for executor in (files, security):
            with pytest.raises(TokenRequired):
                await executor.run(os.getpid)
    executors.discard(token)


async def test_threads_given_up_are_counted(executors: TokenExecutors, token: Token, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asyncio, "timeout", (deadlines := Deadlines(0.25)).timeout)
    with executors.lease(token, "security") as security:
        call = asyncio.create_task(security.run_security(gate, deadline=0.25))
        await gate.reached()
        deadlines.pass_now()
        with pytest.raises(TimeoutError):
            await call
        assert executors.retired == 1
    await executors.aclose()
    assert executors.retired == 1
    gate.open()


async def test_closed_executors_are_leased_no_more(executors: TokenExecutors, token: Token) -> None:
    with ExitStack() as stack:
        files = stack.enter_context(executors.lease(token, "files"))
        await executors.aclose()
        with pytest.raises(RuntimeError):
            await files.run(os.getpid)
    with pytest.raises(ManagerClosed):
        with executors.lease(token, "files"):
            pytest.fail("it was leased")


async def test_a_closed_tokens_executor_is_not_leased(executors: TokenExecutors) -> None:
    token = Token.for_network(spnego.Password("alice@REALM", "pw"))
    token.close()
    with pytest.raises(TokenRequired):
        with executors.lease(token, "files"):
            pytest.fail("it was leased")
