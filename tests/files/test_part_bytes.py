"""Bytes come into a part file by `write` or by `receive`, and both keep the same promises."""

import asyncio
import errno
import hashlib
import os
import resource
import selectors
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bits_async.errors import ErrorCode, ErrorContext, InvalidArgument, InvalidState, LocalFileError, NetworkError
from bits_async.files import reservation
from bits_async.files.part import PartFile
from bits_async.files.reservation import RESERVE_AHEAD
from bits_async.identity import kernel, native
from bits_async.identity.threads import TokenExecutor
from bits_async.transport.ranges import Detached, Slice
from tests.files.putting import JOB, Put, open_below, plugged, put_by_receive, write
from tests.waiting import DEADLINE, until

DATA = os.urandom(3 << 20)


@pytest.fixture
def largest_file() -> Iterator[int]:
    """For once, no file of this process may be longer than 1 MiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    yield 1 << 20
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def interrupted() -> Iterator[list[int]]:
    """A signal every millisecond; the list gets one entry for each."""
    seen: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _: seen.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    yield seen
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


class TestPut:
    """The contract of `write` and `receive`."""

    async def test_bytes_stand_where_they_were_put(self, part: PartFile, put: Put) -> None:
        await put(part, 0, DATA)
        await put(part, len(DATA) + 5000, DATA[:1000])
        await put(part, 10, b"in between")
        expected = bytearray(DATA + bytes(5000) + DATA[:1000])
        expected[10:20] = b"in between"
        assert await part.length() == len(expected)
        assert part.path.read_bytes() == expected

    async def test_nothing_may_be_put(self, part: PartFile, put: Put) -> None:
        await put(part, 1000, b"")
        assert await part.length() == 0

    async def test_two_slices_at_a_time(self, part: PartFile, put: Put) -> None:
        half = len(DATA) // 2
        await asyncio.gather(put(part, half, DATA[half:]), put(part, 0, DATA[:half]))
        assert part.path.read_bytes() == DATA

    async def test_running_digests_follow_bytes_that_come_in_order(self, part: PartFile, put: Put) -> None:
        await part.start_digest(["sha256", "md5"], 0)
        await put(part, 0, DATA[:1000])
        await put(part, 1000, DATA[1000:])
        assert part.digest_position == len(DATA)
        assert await part.digest("sha256") == hashlib.sha256(DATA).hexdigest()
        assert await part.digest("md5") == hashlib.md5(DATA).hexdigest()

    async def test_bytes_put_behind_the_digest_make_it_worthless_and_never_wrong(self, part: PartFile, put: Put) -> None:
        await part.start_digest(["sha256"], 0)
        await put(part, 0, DATA)
        await put(part, 5, b"changed")
        assert part.digest_position is None
        with pytest.raises(InvalidState):
            await part.digest("sha256")
        await part.start_digest(["sha256"], len(DATA))
        assert await part.digest("sha256") == hashlib.sha256(part.path.read_bytes()).hexdigest()

    async def test_bytes_ahead_of_the_digest_wait_for_a_new_start(self, part: PartFile, put: Put) -> None:
        await part.start_digest(["sha256"], 0)
        await put(part, 1000, DATA[1000:])
        await put(part, 0, DATA[:1000])
        assert part.digest_position == 1000
        await part.start_digest(["sha256"], len(DATA))
        assert await part.digest("sha256") == hashlib.sha256(DATA).hexdigest()

    async def test_after_discard_no_byte_is_put(self, part: PartFile, put: Put, tmp_path: Path) -> None:
        await part.discard()
        with pytest.raises(LocalFileError) as caught:
            await put(part, 0, b"late")
        assert caught.value.path == tmp_path / "file.iso"
        assert os.listdir(tmp_path) == []

    async def test_what_fits_of_a_short_write_is_there_and_the_rest_is_an_error(
        self, part: PartFile, put: Put, largest_file: int, tmp_path: Path
    ) -> None:
        with pytest.raises(LocalFileError) as caught:
            await put(part, largest_file - 1000, DATA[:5000])
        assert caught.value.code == ErrorCode.ERROR_FILE_TOO_LARGE
        assert caught.value.path == tmp_path / "file.iso"
        assert await part.length() == largest_file
        assert part.path.read_bytes()[-1000:] == DATA[:1000]

    @pytest.mark.privileged
    async def test_a_full_disk_is_transient_and_the_file_goes_on_when_there_is_room(
        self, files: TokenExecutor, put: Put, small_volume: Path
    ) -> None:
        (small_volume / "others").write_bytes(bytes(512 << 10))
        part = await PartFile.create(files, small_volume / "file", JOB)
        with pytest.raises(LocalFileError) as caught:
            await put(part, 0, DATA[: 900 << 10])
        error = caught.value
        assert (error.code, error.context, error.transient) == (ErrorCode.ERROR_DISK_FULL, ErrorContext.LOCAL_FILE, True)
        assert (error.path, error.identity) == (small_volume / "file", "root")
        length = await part.length()
        assert length < 600 << 10
        assert part.path.read_bytes() == DATA[:length]
        (small_volume / "others").unlink()
        await put(part, length, DATA[length : 900 << 10])
        assert part.path.read_bytes() == DATA[: 900 << 10]
        await part.close()

    async def test_signals_cost_no_byte(self, part: PartFile, put: Put, interrupted: list[int]) -> None:
        for _ in range(10):
            await put(part, await part.length(), DATA)
        await until(lambda: len(interrupted) > 10)
        assert part.path.read_bytes() == DATA * 10

    async def test_bytes_are_moved_by_the_tokens_threads_alone(self, part: PartFile, put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = watch_threads(monkeypatch)
        await put(part, 0, DATA)
        await part.append(Slice.fresh(len(DATA), 1 << 30), [DATA])
        await part.sync()
        await part.commit(mtime=None)
        await part.close()
        assert {"pwrite_all", "datasync", "preallocate", "rename_at", "stat_at", "room", "close"} <= seen.keys()
        threads = {name for names in seen.values() for name in names}
        assert all(name.startswith("bits-files-") for name in threads), seen


def watch_threads(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """Which threads make which calls from now on."""
    seen: dict[str, set[str]] = {}

    def watched(name: str, func: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            seen.setdefault(name, set()).add(threading.current_thread().name)
            return func(*args, **kwargs)

        return call

    for name in ("pwrite_all", "datasync", "preallocate", "rename_at", "stat_at", "set_mode", "sync_directory", "room"):
        monkeypatch.setattr(native, name, watched(name, getattr(native, name)))
    monkeypatch.setattr(os, "close", watched("close", os.close))
    return seen


# -- write ---------------------------------------------------------------------------------------------------------------------


async def test_a_batch_of_thousands_of_chunks_is_one_hop(part: PartFile, monkeypatch: pytest.MonkeyPatch) -> None:
    hops: list[object] = []
    run = TokenExecutor.run

    def counted(*args: object) -> object:
        hops.append(args)
        return run(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(TokenExecutor, "run", counted)
    chunks = [DATA[i : i + 100] for i in range(0, 300_000, 100)]
    await write(part, 0, chunks)
    assert len(hops) == 1
    assert part.path.read_bytes() == DATA[:300_000]


async def test_a_position_out_of_range_is_a_local_file_error(part: PartFile) -> None:
    for offset in (1 << 63, 1 << 70):
        with pytest.raises(LocalFileError):
            await write(part, offset, [b"x"])


async def test_truncate_cuts_the_file_and_what_is_known_of_it(part: PartFile) -> None:
    await part.start_digest(["sha256"], 0)
    await write(part, 0, [DATA])
    await part.truncate(1000)
    assert await part.length() == 1000
    assert part.digest_position is None
    await part.start_digest(["sha256"], 1000)
    assert await part.digest("sha256") == hashlib.sha256(DATA[:1000]).hexdigest()


# -- digests -------------------------------------------------------------------------------------------------------------------


async def test_after_a_resume_the_head_is_read_again_for_the_digest(files: TokenExecutor, tmp_path: Path) -> None:
    head = DATA * 7  # several hops
    part = await PartFile.create(files, tmp_path / "file", JOB)
    await write(part, 0, [head])
    await part.close()
    again = await PartFile.reopen(files, tmp_path / "file", part.record)
    assert again is not None
    await again.start_digest(["sha256", "sha512"], len(head))
    await write(again, len(head), [b"tail"])
    assert await again.digest("sha256") == hashlib.sha256(head + b"tail").hexdigest()
    assert await again.digest("sha512") == hashlib.sha512(head + b"tail").hexdigest()
    with pytest.raises(InvalidState):
        await again.digest("md5")
    await again.close()


async def test_a_head_that_is_shorter_than_believed_is_an_error(part: PartFile, tmp_path: Path) -> None:
    await write(part, 0, [b"short"])
    with pytest.raises(LocalFileError) as caught:
        await part.start_digest(["sha256"], 6)
    assert caught.value.code == ErrorCode.BG_E_LOCAL_FILE_CHANGED
    assert caught.value.path == tmp_path / "file.iso"


@pytest.mark.parametrize("algorithm", ["sha257", "", "shake_128"])
async def test_an_unknown_algorithm_is_refused(part: PartFile, algorithm: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await part.start_digest([algorithm], 0)
    assert caught.value.code == ErrorCode.BG_E_INVALID_HASH_ALGORITHM


# -- receive -------------------------------------------------------------------------------------------------------------------


async def test_receive_takes_nothing_that_belongs_to_the_next_answer(part: PartFile) -> None:
    with plugged(DATA[10:5000] + b"HTTP/1.1 200", keep_open=True) as ours:
        assert await part.receive(Detached(ours, DATA[:10], 5000), Slice.fresh(0, None), None, None) == 5000
        assert ours.recv(100) == b"HTTP/1.1 200"
    assert part.path.read_bytes() == DATA[:5000]


async def test_receive_stays_inside_its_slice(part: PartFile) -> None:
    piece = Slice.fresh(100, 600)
    with plugged(DATA[10:5000]) as ours:
        assert await part.receive(Detached(ours, DATA[:10], 5000), piece, None, None) == 500
    assert piece.done
    assert part.path.read_bytes() == bytes(100) + DATA[:500]


async def test_receive_may_already_have_everything(part: PartFile) -> None:
    with plugged(b"", keep_open=True) as ours:
        assert await part.receive(Detached(ours, b"all of it", 9), Slice.fresh(0, 9), None, None) == 9
    assert part.path.read_bytes() == b"all of it"


async def test_receive_works_on_a_socket_that_does_not_block(part: PartFile) -> None:
    with plugged(DATA) as ours:
        ours.setblocking(False)
        assert await part.receive(Detached(ours, b"", len(DATA)), Slice.fresh(0, len(DATA)), None, None) == len(DATA)
    assert part.path.read_bytes() == DATA


async def test_receive_stops_when_told_and_goes_on_from_there(part: PartFile) -> None:
    stop, piece = threading.Event(), Slice.fresh(0, len(DATA))
    with plugged(DATA[:5000], keep_open=True) as ours:
        detached = Detached(ours, DATA[:1000], len(DATA))
        task = asyncio.ensure_future(part.receive(detached, piece, None, stop))
        await until(lambda: piece.written == 6000)
        assert not task.done()
        stop.set()
        assert await task == 6000
    assert await part.length() == 6000
    with plugged(DATA[6000:]) as ours:
        await part.receive(Detached(ours, b"", len(DATA) - 6000), piece, None, None)
    assert part.path.read_bytes()[6000:] == DATA[6000:]
    assert piece.done


async def test_receive_gives_a_silent_connection_up(part: PartFile) -> None:
    piece = Slice.fresh(0, 100)
    with plugged(b"only this", keep_open=True) as ours:
        with pytest.raises(NetworkError) as caught:
            await part.receive(Detached(ours, b"", 100), piece, None, None, idle=0.2)
    assert caught.value.code == ErrorCode.ERROR_WINHTTP_TIMEOUT
    assert caught.value.transient
    assert piece.written == await part.length() == 9


class Liar(selectors.SelectSelector):
    """Says that there is something to read; there is not."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        time.sleep(0.001)
        return [(key, selectors.EVENT_READ) for key in self.get_map().values()]


async def test_receive_is_never_caught_in_a_read(part: PartFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selectors, "DefaultSelector", Liar)
    with plugged(b"only this", keep_open=True) as ours:
        with pytest.raises(NetworkError) as caught:
            await part.receive(Detached(ours, b"", 100), Slice.fresh(0, 100), None, None, idle=0.2)
    assert caught.value.code == ErrorCode.ERROR_WINHTTP_TIMEOUT


async def test_receive_counts_what_came_before_the_connection_ended(part: PartFile) -> None:
    piece = Slice.fresh(0, 100)
    with plugged(b"only this") as ours:
        with pytest.raises(NetworkError) as caught:
            await part.receive(Detached(ours, b"and ", 100), piece, None, None)
    assert caught.value.code == ErrorCode.BG_E_CONNECTION_CLOSED
    assert caught.value.transient
    assert piece.written == 13
    assert part.path.read_bytes() == b"and only this"


async def test_receive_reports_a_connection_that_was_cut(part: PartFile) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as ours:
        theirs, _ = server.accept()
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        theirs.close()
        with pytest.raises(NetworkError) as caught:
            await part.receive(Detached(ours, b"", 100), Slice.fresh(0, 100), None, None)
    assert caught.value.code == ErrorCode.BG_E_CONNECTION_CLOSED
    assert isinstance(caught.value.__cause__, ConnectionResetError)


class Meter:
    """A limiter that allows a rate, and remembers what it was asked."""

    chunk = 64 << 10

    def __init__(self, rate: float) -> None:
        self.asked: list[int] = []
        self._rate = rate

    def rests(self, count: int, /) -> Iterator[float]:
        self.asked.append(count)
        yield from [count / self._rate / 2] * 2


@pytest.mark.parametrize("way", ["spliced", "received"])
async def test_receive_rests_as_its_limiter_says(part: PartFile, way: str) -> None:
    if way == "received":
        await part.start_digest(["sha256"], 0)
    meter, begin = Meter(2 << 20), time.monotonic()
    await put_by_receive(part, 0, DATA[: 1 << 20], meter)
    assert time.monotonic() - begin >= 0.49
    assert sum(meter.asked) == 1 << 20
    assert max(meter.asked[1:]) <= 64 << 10
    assert part.path.read_bytes() == DATA[: 1 << 20]


async def test_receive_can_be_stopped_while_it_rests(part: PartFile) -> None:
    stop, piece = threading.Event(), Slice.fresh(0, len(DATA))
    with plugged(DATA) as ours:
        task = asyncio.ensure_future(part.receive(Detached(ours, b"", len(DATA)), piece, Meter(1), stop))
        await until(lambda: piece.written > 0)
        stop.set()
        async with asyncio.timeout(DEADLINE):
            assert await task == piece.written


# -- preallocation -------------------------------------------------------------------------------------------------------------


def allocated(part: PartFile) -> int:
    return part.path.stat().st_blocks * 512


SLACK = 1 << 20  # what a file system adds of its own


@pytest.fixture(autouse=True)
def disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever holds the files of the tests is treated as a disk."""
    monkeypatch.setattr(kernel, "is_memory", lambda fd: False)


@pytest.fixture
def allocations(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What was preallocated, as [start, end)."""
    made = list[tuple[int, int]]()
    preallocate = native.preallocate

    def noted(fd: int, offset: int, length: int) -> bool:
        made.append((offset, offset + length))
        return preallocate(fd, offset, length)

    monkeypatch.setattr(native, "preallocate", noted)
    return made


async def test_t18_preallocation_never_runs_64_mib_ahead_of_what_was_received(part: PartFile) -> None:
    piece = Slice.fresh(0, 8 << 30)
    await part.append(piece, [DATA])
    assert 0 < allocated(part) <= len(DATA) + RESERVE_AHEAD + SLACK
    assert await part.length() == len(DATA)
    await part.append(piece, [DATA])
    assert allocated(part) <= 2 * len(DATA) + RESERVE_AHEAD + SLACK


async def test_the_file_is_preallocated_step_by_step_to_its_end_and_not_beyond(
    part: PartFile, allocations: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reservation, "RESERVE_STEP", 1 << 20)
    monkeypatch.setattr(reservation, "RESERVE_AHEAD", 2 << 20)
    size, piece = len(DATA) + 100_000, Slice.fresh(0, len(DATA) + 100_000)
    with plugged(DATA + b"e" * 100_000) as ours:
        assert await part.receive(Detached(ours, b"", size), piece, None, None) == size
    assert len(allocations) > 2
    assert [start for start, _ in allocations] == [0, *[end for _, end in allocations[:-1]]]
    assert allocations[-1][1] == size
    assert allocated(part) <= size + SLACK


async def test_t18_many_slices_share_what_may_be_preallocated(part: PartFile) -> None:
    for number in range(20):
        await part.append(Slice.fresh(number << 36, (number << 36) + (1 << 30)), [b"x"])
    assert RESERVE_AHEAD // 2 < allocated(part) <= RESERVE_AHEAD + SLACK


async def test_t18_preallocation_leaves_the_reserve_free(part: PartFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "room", lambda fd: 30 << 20)
    part.keep_free = 31 << 20
    await part.append(Slice.fresh(0, 30 << 20), [b"x"])
    assert allocated(part) <= SLACK
    part.keep_free = 26 << 20
    await part.append(Slice.fresh(0, 30 << 20), [b"x"])
    assert 0 < allocated(part) <= (4 << 20) + SLACK


async def test_t18_no_more_is_preallocated_than_is_to_come(part: PartFile) -> None:
    await part.append(Slice.fresh(0, 100 << 10), [b"x"])
    assert allocated(part) <= SLACK


@pytest.mark.parametrize("by", ["append", "receive"])
@pytest.mark.privileged
async def test_a_file_that_the_volume_cannot_hold_is_refused_before_a_byte_is_written(
    files: TokenExecutor, small_volume: Path, by: str
) -> None:
    part, piece = await PartFile.create(files, small_volume / "file", JOB), Slice.fresh(0, 2 << 20)
    with plugged(DATA) as ours, pytest.raises(LocalFileError, match="2097152 bytes are still to come, and it has room for") as caught:
        if by == "append":
            await part.append(piece, [b"x"])
        else:
            await part.receive(Detached(ours, b"x", 2 << 20), piece, None, None)
    assert (caught.value.code, caught.value.transient) == (ErrorCode.ERROR_DISK_FULL, True)
    assert (await part.length(), piece.written) == (0, 0)
    await part.append(Slice.fresh(0, 100_000), [b"x" * 100_000])
    await part.close()


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSPC])
async def test_where_nothing_can_be_preallocated_nothing_is_written_in_its_place(
    part: PartFile, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    asked = list[int]()

    def refuse(fd: int, offset: int, length: int) -> None:
        asked.append(offset)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(kernel, "allocate", refuse)
    piece = Slice.fresh(0, 1 << 30)
    for _ in range(3):
        await part.append(piece, [DATA])
    assert asked == [0]  # and it is not asked again and again
    assert await part.length() == piece.written == 3 * len(DATA)
    assert allocated(part) <= 3 * len(DATA) + SLACK


async def test_what_was_preallocated_and_not_used_is_given_back_at_commit(part: PartFile) -> None:
    await part.append(Slice.fresh(0, 1 << 30), [b"small after all"])
    await part.commit(mtime=None)
    assert part.path.stat().st_blocks * 512 <= SLACK
    assert part.path.read_bytes() == b"small after all"


async def test_nothing_is_left_open(part: PartFile, put: Put, tmp_path: Path) -> None:
    await put(part, 0, DATA)
    await part.close()
    assert open_below(tmp_path) == []


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
async def test_large_writes_bypass_the_page_cache_where_that_is_known_and_are_refused_once_where_not(
    part: PartFile, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    asked: list[int] = []
    honest = os.pwritev

    def pwritev(fd: int, views: list[memoryview], offset: int, flags: int = 0) -> int:
        asked.append(flags)
        if flags and not known:
            raise OSError(errno.EOPNOTSUPP, "unknown flag")
        return honest(fd, views, offset)

    monkeypatch.setattr(os, "pwritev", pwritev)
    piece = Slice.fresh(0, 2 * len(DATA) + 10)
    for chunk in (DATA, DATA, b"0123456789"):
        await part.append(piece, [chunk])
    assert part.path.read_bytes() == DATA * 2 + b"0123456789"
    uncached = native.DONTCACHE
    assert asked == ([uncached, uncached, 0] if known or not uncached else [uncached, 0, 0, 0])
