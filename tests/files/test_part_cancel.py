"""Whatever is cancelled has finished or never begun when the cancel goes on, and leaves no descriptor and no file behind."""

import asyncio
import contextlib
import itertools
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from bits_async.errors import ImpersonationFailed, LocalFileError
from bits_async.files import part as part_module
from bits_async.files.batches import WholeFile, store_whole
from bits_async.files.hops import Closed
from bits_async.files.leftovers import committed_length, discard_part
from bits_async.files.names import new_draft
from bits_async.files.part import PartFile
from bits_async.files.records import PartRecord
from bits_async.identity import native, threads
from bits_async.identity.threads import TokenExecutor
from bits_async.identity.tokens import Token
from bits_async.transport.ranges import Detached, Slice
from tests.files.putting import JOB, open_below, plugged, write
from tests.waiting import until

DATA = os.urandom(1 << 20)
Method = Callable[[PartFile], Awaitable[object]]


class Gate:
    """A system call that waits until it is let through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        self.passed = 0
        original = getattr(native, name)

        def gated(*args: object) -> object:
            self.reached.set()
            assert self.open.wait(30)
            self.passed += 1
            return original(*args)

        monkeypatch.setattr(native, name, gated)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Gate]]:
    gates: list[Gate] = []

    def make(name: str) -> Gate:
        gates.append(Gate(monkeypatch, name))
        return gates[-1]

    yield make
    for each in gates:
        each.open.set()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancel waits 0.1 s for a thread."""
    monkeypatch.setattr(threads, "CANCEL_PATIENCE", 0.1)
    monkeypatch.setattr(part_module, "_PATIENCE", 0.1)


async def cancelled(task: "asyncio.Future[object]") -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


METHODS: dict[str, tuple[str, Method]] = {
    "write": ("pwrite_all", lambda part: write(part, 0, [DATA])),
    "sync": ("datasync", lambda part: part.sync()),
    "write, ahead": ("preallocate", lambda part: part.append(Slice.fresh(0, 1 << 30), [DATA])),
    "commit, bytes": ("datasync", lambda part: part.commit(mtime=None)),
    "commit, mode": ("set_mode", lambda part: part.commit(mtime=None)),
    "commit, rename": ("rename_at", lambda part: part.commit(mtime=None)),
    "commit, directory": ("sync_directory", lambda part: part.commit(mtime=None)),
    "discard": ("unlink_at", lambda part: part.discard()),
}


@pytest.mark.parametrize(("call", "method"), METHODS.values(), ids=METHODS.keys())
async def test_a_cancelled_call_ends_before_the_cancel_goes_on(
    part: PartFile, tmp_path: Path, gate: Callable[[str], Gate], call: str, method: Method
) -> None:
    door = gate(call)
    task = asyncio.ensure_future(method(part))
    await until(door.reached.is_set)
    task.cancel()
    for _ in range(5):
        await asyncio.sleep(0.01)
        task.cancel()  # more of them change nothing
    assert not task.done()
    door.open.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert door.passed >= 1
    if not call.startswith(("unlink", "rename", "sync_dir", "set_mode")):
        await write(part, 0, [b"still usable"])
    await part.close()
    assert open_below(tmp_path) == []


async def test_a_cancelled_write_has_moved_the_position(part: PartFile, gate: Callable[[str], Gate]) -> None:
    door = gate("pwrite_all")
    piece = Slice.fresh(0, None)
    task = asyncio.ensure_future(part.append(piece, [DATA]))
    await until(door.reached.is_set)
    asyncio.get_running_loop().call_later(0.05, door.open.set)
    await cancelled(task)
    assert piece.written == len(DATA)
    assert part.path.read_bytes() == DATA


@pytest.mark.parametrize("call", ["open_directory", "stat_at", "max_name", "create_exclusive"])
async def test_a_cancelled_create_leaves_no_file_and_no_descriptor(
    files: TokenExecutor, tmp_path: Path, gate: Callable[[str], Gate], call: str
) -> None:
    door = gate(call)
    task = asyncio.ensure_future(PartFile.create(files, tmp_path / "file", JOB))
    await until(door.reached.is_set)
    asyncio.get_running_loop().call_later(0.05, door.open.set)
    await cancelled(task)
    assert os.listdir(tmp_path) == []
    assert open_below(tmp_path) == []


@pytest.mark.parametrize("call", ["open_directory", "stat_at", "open_existing"])
async def test_a_cancelled_reopen_leaves_the_file_and_no_descriptor(
    files: TokenExecutor, part: PartFile, tmp_path: Path, gate: Callable[[str], Gate], call: str
) -> None:
    await part.close()
    door = gate(call)
    task = asyncio.ensure_future(PartFile.reopen(files, tmp_path / "file.iso", part.record))
    await until(door.reached.is_set)
    asyncio.get_running_loop().call_later(0.05, door.open.set)
    await cancelled(task)
    assert os.listdir(tmp_path) == [part.record.name]
    assert open_below(tmp_path) == []


async def test_a_cancelled_receive_stops_and_its_slice_says_how_far_it_came(part: PartFile, tmp_path: Path) -> None:
    piece = Slice.fresh(0, len(DATA))
    with plugged(DATA[:5000], keep_open=True) as ours:
        task = asyncio.ensure_future(part.receive(Detached(ours, b"", len(DATA)), piece, None, None))
        await until(lambda: piece.written == 5000)
        await cancelled(task)
    assert part.path.read_bytes() == DATA[:5000]
    await write(part, 5000, [DATA[5000:]])
    assert part.path.read_bytes() == DATA
    await part.close()
    assert open_below(tmp_path) == []


class Counted(Coroutine[Any, Any, None]):
    """A coroutine that calls `reached` when it waits for the nth time, with what it waits for: so often, however long threads take."""

    def __init__(self, coro: Coroutine[Any, Any, None], nth: int, reached: Callable[["asyncio.Future[Any]"], object]) -> None:
        self._coro, self._left, self._reached = coro, nth, reached

    def send(self, value: Any) -> Any:
        waits_for = self._coro.send(value)
        self._left -= 1
        if self._left == 0:
            self._reached(waits_for)
        return waits_for

    def throw(self, *error: Any) -> Any:
        return self._coro.throw(*error)

    def close(self) -> None:
        self._coro.close()

    def __await__(self) -> Any:
        raise NotImplementedError("a task drives it")


@pytest.mark.parametrize("when", ["at once", "while a thread is at work", "as it has ended"])
async def test_a_cancel_at_any_moment_leaves_nothing_open(token: Token, tmp_path: Path, when: str) -> None:
    """The whole life of a part file, cancelled when it waits for the first time, the second, until one life is not cut short."""
    files = TokenExecutor(token)

    async def life() -> None:
        destination = tmp_path / "file"
        part = await PartFile.create(files, destination, JOB)
        try:
            await part.start_digest(["sha256"], 0)
            await write(part, 0, [b"x" * 100])
            with plugged(b"y" * 100) as ours:
                await part.receive(Detached(ours, b"", 100), Slice.fresh(100, 200), None, None)
            await part.length()
            await part.digest("sha256")
            await part.sync()
        finally:
            await part.close()
        again = await PartFile.reopen(files, destination, part.record)
        assert again is not None
        try:
            await again.truncate(50)
            await again.start_digest(["sha256"], 50)
            await again.commit(mtime=0.0)
            assert await committed_length(files, destination, again.record) == 50
            await again.discard()
        finally:
            await again.close()
        await discard_part(files, destination, again.record)

    async def cut_short(nth: int) -> bool:
        """Whether it waited as often as that."""
        reached = False

        def cancel(awaited: "asyncio.Future[Any]") -> None:
            nonlocal reached
            reached = True
            if when == "as it has ended":
                awaited.add_done_callback(lambda _: task.cancel())  # before the task itself hears of it
            else:
                asyncio.get_running_loop().call_later(0 if when == "at once" else 0.0005, task.cancel)

        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(Counted(life(), nth, cancel))
        with contextlib.suppress(asyncio.CancelledError):
            await task
        return reached

    for nth in itertools.count(1):
        cut = await cut_short(nth)
        assert open_below(tmp_path) == []
        if not cut:
            break
    assert nth > 10
    await files.aclose()


async def test_a_call_that_was_still_waiting_for_a_thread_is_never_made(token: Token, tmp_path: Path) -> None:
    files = TokenExecutor(token, threads=1)
    part = await PartFile.create(files, tmp_path / "file", JOB)
    busy = threading.Event()
    blocker = asyncio.ensure_future(files.run(busy.wait))
    waiting = asyncio.ensure_future(write(part, 0, [b"too late"]))
    await asyncio.sleep(0.01)
    waiting.cancel()
    asyncio.get_running_loop().call_later(0.1, busy.set)
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await blocker
    content = part.path.read_bytes()
    await write(part, 0, [b"the part file lives on"])
    assert content in (b"", b"too late")  # never begun, or wholly done
    await part.discard()
    await files.aclose()


class Late(TokenExecutor):
    """Whatever it is given it gets to when nobody waits any more."""

    kept: Callable[[], object]

    async def run(self, func: Callable[..., object], /, *args: object, **kwargs: object) -> None:  # type: ignore[override]
        self.kept = func
        await asyncio.Event().wait()


async def test_a_call_whose_thread_begins_after_the_cancel_does_nothing(
    part: PartFile, token: Token, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = Late(token)
    with monkeypatch.context() as patch:
        patch.setattr(part, "_files", late)
        task = asyncio.ensure_future(write(part, 0, [b"a byte too late"]))
        await asyncio.sleep(0)
        await cancelled(task)
    with pytest.raises(Closed):
        late.kept()
    assert await part.length() == 0
    await late.aclose()


# -- threads that do not come back ---------------------------------------------------------------------------------------------


@pytest.fixture
async def others(token: Token) -> AsyncIterator[TokenExecutor]:
    """New threads of the same identity, as the manager makes them after it has lost some."""
    executor = TokenExecutor(token)
    yield executor
    await executor.aclose()


@pytest.mark.usefixtures("impatient")
async def test_a_part_file_with_a_lost_thread_is_unusable_and_its_descriptors_outlive_the_thread(
    token: Token, others: TokenExecutor, tmp_path: Path, gate: Callable[[str], Gate]
) -> None:
    files = TokenExecutor(token)
    part = await PartFile.create(files, tmp_path / "file", JOB)
    door = gate("pwrite_all")
    task = asyncio.ensure_future(write(part, 0, [b"by the lost thread"]))
    await until(door.reached.is_set)
    begin = time.monotonic()
    await cancelled(task)
    assert time.monotonic() - begin < 9, "else it would be the 10 s of everybody else"
    for use in (write(part, 0, [b"x"]), part.length(), part.sync(), part.commit(mtime=None), part.discard()):
        with pytest.raises((LocalFileError, ImpersonationFailed)):
            await use
    await part.close()
    assert len(open_below(tmp_path)) == 2  # the lost thread still has them
    assert await PartFile.reopen(others, tmp_path / "file", part.record) is None
    assert part.path.exists()
    door.open.set()
    await until(lambda: open_below(tmp_path) == [])
    assert part.path.read_bytes() == b"by the lost thread"  # and into no other file
    again = await PartFile.reopen(others, tmp_path / "file", part.record)
    assert again is not None
    await again.close()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("call", ["open_directory", "create_exclusive"])
async def test_a_create_that_nobody_waits_for_any_more_removes_what_it_made(
    token: Token, tmp_path: Path, gate: Callable[[str], Gate], call: str
) -> None:
    files = TokenExecutor(token)
    door = gate(call)
    task = asyncio.ensure_future(PartFile.create(files, tmp_path / "file", JOB))
    await until(door.reached.is_set)
    await cancelled(task)
    door.open.set()
    await until(lambda: door.passed == 1 and open_below(tmp_path) == [])
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("call", ["open_directory", "max_name", "stat_at"])
async def test_t17_a_batch_that_nobody_waits_for_any_more_takes_no_part_file_from_the_one_who_goes_on(
    token: Token, others: TokenExecutor, tmp_path: Path, gate: Callable[[str], Gate], monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """The name was journalled before the batch was begun, so whoever goes on with the file uses the same."""
    files, draft = TokenExecutor(token), new_draft()
    wholes = [WholeFile(tmp_path / "file", JOB, draft, [b"of the lost thread"])]
    honest = getattr(native, call)
    door = gate(call)
    task = asyncio.ensure_future(store_whole(files, wholes))
    await until(door.reached.is_set)
    await cancelled(task)
    gated = getattr(native, call)
    monkeypatch.setattr(native, call, honest)
    part = await PartFile.create(others, tmp_path / "file", JOB, draft=draft)
    await write(part, 0, [b"of the one who goes on"])
    monkeypatch.setattr(native, call, gated)
    door.open.set()
    await until(lambda: door.passed >= 1 and len(open_below(tmp_path)) == 2)
    assert part.path.read_bytes() == b"of the one who goes on"
    assert part.record.is_file(os.stat(part.path))
    await part.close()


@pytest.mark.usefixtures("impatient")
async def test_a_receive_that_does_not_come_back_makes_the_part_file_unusable(
    files: TokenExecutor, tmp_path: Path, gate: Callable[[str], Gate]
) -> None:
    part = await PartFile.create(files, tmp_path / "file", JOB)
    door = gate("pwrite_all")
    with plugged(DATA) as ours:
        await part.start_digest(["sha256"], 0)  # somebody has to see the bytes: no splice
        task = asyncio.ensure_future(part.receive(Detached(ours, b"", len(DATA)), Slice.fresh(0, len(DATA)), None, None))
        await until(door.reached.is_set)
        await cancelled(task)
    with pytest.raises(LocalFileError):
        await write(part, 0, [b"x"])
    await part.close()
    door.open.set()
    await until(lambda: open_below(tmp_path) == [])


async def test_when_the_token_is_gone_the_descriptors_are_closed_all_the_same(token: Token, tmp_path: Path) -> None:
    files = TokenExecutor(token)
    part = await PartFile.create(files, tmp_path / "file", JOB)
    files.discard()
    with pytest.raises(Exception, match="token"):
        await write(part, 0, [b"x"])
    with pytest.raises(Exception, match="token"):
        await part.discard()
    assert open_below(tmp_path) == []
    assert part.path.exists()  # it is deleted by its token or not at all (T17)


async def test_t01_an_identity_lost_during_create_hands_nothing_out(token: Token, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = TokenExecutor(token)
    create = native.create_exclusive

    def lose_identity(directory: int, name: str) -> int:
        monkeypatch.setattr(type(token.local), "check", refuse)
        return create(directory, name)

    def refuse(_: object) -> None:
        raise ImpersonationFailed("somebody called seteuid")

    monkeypatch.setattr(native, "create_exclusive", lose_identity)
    with pytest.raises(ImpersonationFailed):
        await PartFile.create(files, tmp_path / "file", uuid4())
    assert open_below(tmp_path) == []


async def test_a_record_is_a_value(part: PartFile) -> None:
    record = part.record
    assert record == PartRecord(**{name: getattr(record, name) for name in PartRecord.__slots__})
    assert hash(record) == hash(record)
