"""Many small files of one job go to the disk together: each is still right, told of, kept at a stop, and blamed for its own faults.

Real manager, real journal, real files; the network is fake.
"""

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import bits_async as bits
from bits_async import ErrorCode, JobState
from bits_async.files.batches import WholeFile, store_whole
from bits_async.identity import native
from bits_async.jobs import transfer
from bits_async.jobs.model import FileRecord
from bits_async.testing import JUMP_AFTER, FakeNetwork
from tests.waiting import until

HOST = "https://files.example.test"
BODIES = [os.urandom(1000 + number) for number in range(10)]


@pytest.fixture
def network() -> Iterator[FakeNetwork]:
    with FakeNetwork() as fake:
        for number, body in enumerate(BODIES):
            fake.serve(f"{HOST}/{number}", body)
        yield fake


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The names of the files of each batch that was written."""
    seen: list[list[str]] = []

    async def noted(executor: Any, wholes: Sequence[WholeFile], **more: Any) -> Any:
        seen.append([each.destination.name for each in wholes])
        return await store_whole(executor, wholes, **more)

    monkeypatch.setattr(transfer, "store_whole", noted)
    return seen


@pytest.fixture
def out(tmp_path: Path) -> Path:
    directory = tmp_path / "out"
    directory.mkdir()
    return directory


@pytest.fixture
async def manager(network: FakeNetwork, tmp_path: Path) -> AsyncIterator[bits.BitsManager]:
    async with bits.BitsManager(store=tmp_path / "queue.db") as opened:
        yield opened


@pytest.fixture
async def job(manager: bits.BitsManager, out: Path) -> bits.Job:
    return await job_of(manager, out)


async def job_of(manager: bits.BitsManager, out: Path, **options: Any) -> bits.Job:
    job = await manager.create_job("small files", priority=bits.JobPriority.FOREGROUND, **options)
    await job.add_file_set([bits.FileInfo(f"{HOST}/{number}", out / str(number)) for number in range(len(BODIES))])
    return job


async def complete(job: bits.Job, out: Path, bodies: Sequence[bytes] = BODIES) -> None:
    await job.wait()
    await job.complete()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {str(number): body for number, body in enumerate(bodies)}


async def failed(job: bits.Job) -> bits.BitsError:
    await job.resume()
    with pytest.raises(bits.BitsError) as caught:
        await job.wait()
    assert job.state is JobState.ERROR
    return caught.value


def transferred(job: bits.Job) -> list[int]:
    return [number for number, file in enumerate(job._entry.files) if file.transferred]


async def test_small_files_are_written_together_and_told_of_one_by_one(network, job, out, batches):
    async with job.events() as events:
        await job.resume()
        await complete(job, out)
        told = [event async for event in events if isinstance(event, bits.FileTransferred)]
    assert batches == [[str(number) for number in range(len(BODIES))]]
    assert [(event.path, event.size) for event in told] == [(out / str(number), len(body)) for number, body in enumerate(BODIES)]
    assert len(network.requests) == len(BODIES)


@pytest.mark.parametrize("at_once", [1, 4])
async def test_there_are_as_many_batches_as_it_takes_and_the_next_is_fetched_meanwhile(
    network, manager, out, batches, monkeypatch, at_once
):
    monkeypatch.setattr(transfer, "SHELF_FILES", 4)
    job = await job_of(manager, out, files_at_once=at_once)
    await job.resume()
    await complete(job, out)
    assert sum(map(len, batches)) == len(BODIES)
    assert all(len(batch) <= 4 for batch in batches)


async def test_while_a_batch_is_written_no_more_than_another_is_gathered(network, job, out, monkeypatch):
    """So memory is bounded, however slow the disk is."""
    monkeypatch.setattr(transfer, "SHELF_FILES", 2)
    go_on = asyncio.Event()

    async def slow(*args: Any, **more: Any) -> Any:
        await go_on.wait()
        return await store_whole(*args, **more)

    monkeypatch.setattr(transfer, "store_whole", slow)
    await job.resume()
    await until(lambda: len(network.requests) >= 4)
    await asyncio.sleep(0.05)
    assert len(network.requests) == 4
    go_on.set()
    await complete(job, out)


async def test_a_file_is_in_the_journal_soon_though_the_next_one_does_not_come(network, job, out):
    network.clock.freeze()
    with held_at(network, 2, after=0):
        await job.resume()
        await until(lambda: transferred(job) == [0, 1])
        assert job.state is JobState.TRANSFERRING
    await complete(job, out)


async def test_what_came_whole_is_kept_when_the_job_is_suspended(network, job, out, batches):
    await stop_in_the_body_of(network, job, 3)
    assert transferred(job) == [0, 1, 2]
    assert sorted(path.name.split(".")[1] for path in out.iterdir()) == ["0", "1", "2", "3"]
    await job.resume()
    await complete(job, out)
    assert [each.url for each in network.requests].count(f"{HOST}/2") == 1


@contextmanager
def held_at(network: FakeNetwork, number: int, after: int) -> Iterator[None]:
    """The body of that file stands still after so many bytes."""
    honest = network.get

    def get(party: Any, asked: Any) -> Any:
        if asked.url == f"{HOST}/{number}":
            network.pause(after=after)
        return honest(party, asked)

    network.get = get  # type: ignore[method-assign]
    yield
    network.get = honest  # type: ignore[method-assign]
    network.resume()


async def stop_in_the_body_of(network: FakeNetwork, job: bits.Job, number: int) -> None:
    """Some bytes of that file have come when it is suspended."""
    network.clock.freeze()
    with held_at(network, number, after=500):
        await job.resume()
        await until(lambda: len(network.requests) == number + 1 and job.progress.bytes_transferred > sum(map(len, BODIES[:number])))
        await job.suspend()
    network.clock.thaw()


async def test_bytes_that_came_of_a_small_file_are_not_fetched_again_after_a_suspend(network, job, out):
    await stop_in_the_body_of(network, job, 3)
    await job.resume()
    await complete(job, out)
    assert [each.start for each in network.requests if each.url == f"{HOST}/3"] == [0, 500]


async def test_a_body_that_is_cut_goes_on_where_it_was(network, manager, out, monkeypatch):
    monkeypatch.setattr(transfer, "RECONNECT_DELAYS", (0.0,) * transfer.RECONNECTS)
    network.serve(f"{HOST}/4", BODIES[4], cut_after=700)
    job = await job_of(manager, out)
    await job.resume()
    await complete(job, out)
    assert [each.start for each in network.requests if each.url == f"{HOST}/4"] == [0, 700]


async def test_large_empty_and_small_files_of_one_job_are_all_right(network, manager, out, batches):
    bodies = [BODIES[0], os.urandom(3 << 20), b"", *BODIES[3:]]
    for number in (1, 2):
        network.serve(f"{HOST}/{number}", bodies[number])
    job = await job_of(manager, out)
    await job.resume()
    await complete(job, out, bodies)
    assert {name for batch in batches for name in batch} == {"0", *(str(number) for number in range(3, len(bodies)))}


async def test_an_empty_file_that_is_asked_for_in_a_range_is_empty_too(network, manager, out):
    """Servers refuse the first range of nothing (416, `bytes */0`)."""
    network.serve(f"{HOST}/2", b"")
    job = await job_of(manager, out, segments=3)
    await job.resume()
    await complete(job, out, [*BODIES[:2], b"", *BODIES[3:]])
    assert all(request.end for request in network.requests)


# -- what is wrong with one of them


async def test_the_file_that_cannot_be_made_is_the_one_that_is_blamed(network, job, out):
    (out / "4").mkdir()
    error = await failed(job)
    assert (error.path, error.context) == (out / "4", bits.ErrorContext.LOCAL_FILE)
    assert transferred(job)[:4] == [0, 1, 2, 3]
    (out / "4").rmdir()
    await job.resume()
    await complete(job, out)


async def test_wrong_bytes_are_refused_for_their_file_only(network, manager, out):
    job = await manager.create_job("small files", priority=bits.JobPriority.FOREGROUND)
    for number, body in enumerate(BODIES):
        right = hashlib.sha256(body).hexdigest()
        await job.add_file(f"{HOST}/{number}", out / str(number), sha256="0" * 64 if number == 2 else right)
    error = await failed(job)
    assert (error.code, error.path) == (ErrorCode.BG_E_VALIDATION_FAILED, out / "2")
    assert transferred(job)[:2] == [0, 1]
    assert 2 not in transferred(job)
    assert not [path for path in out.iterdir() if path.name.startswith(".2.")]


@pytest.mark.parametrize("call", ["pwrite_all", "datasync", "create_exclusive"])
async def test_after_a_fault_of_the_disk_nothing_is_left_that_nobody_knows(network, job, out, monkeypatch, call):
    await job.set_no_progress_timeout(0)  # else it would be tried again
    monkeypatch.setattr(native, call, failing(getattr(native, call), after=3))
    error = await failed(job)
    assert (error.code, error.context) == (ErrorCode.ERROR_DISK_FULL, bits.ErrorContext.LOCAL_FILE)
    monkeypatch.undo()
    known = {file.part.name for file in job._entry.files if file.part}
    assert {path.name for path in out.iterdir()} <= known
    await job.resume()
    await complete(job, out)


def failing(honest: Callable[..., Any], after: int) -> Callable[..., Any]:
    calls = 0

    def call(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(28, "No space left on device")
        return honest(*args)

    return call


async def test_what_a_process_left_that_died_while_it_wrote_is_replaced(network, job, out):
    """It had made the file and written it, and not yet journalled it: the journal knows no more than a part of its name."""
    file = job._entry.files[3]
    stray = out / f".3.{job.id.hex}.{file.draft}.bits-part"
    stray.write_bytes(b"half of it")
    stray.chmod(0o600)
    await job.resume()
    await complete(job, out)
    assert len(network.requests) == len(BODIES)


async def test_a_file_of_somebody_else_with_that_name_stays(network, job, out):
    file = job._entry.files[3]
    theirs = out / f".3.{job.id.hex}.{file.draft}.bits-part"
    theirs.write_bytes(b"theirs")
    os.link(theirs, out / "theirs")
    await job.resume()
    await job.wait()
    await job.complete()
    assert (out / "3").read_bytes() == BODIES[3]
    assert theirs.read_bytes() == b"theirs"


async def test_a_job_that_is_suspended_at_once_leaves_nothing_behind_and_goes_on(job, out):
    for rounds in range(6):
        await job.resume()
        for _ in range(rounds):
            await asyncio.sleep(0)
        await job.suspend()
    await job.resume()
    await complete(job, out)


async def test_a_slow_disk_is_not_taken_for_a_wait_when_time_is_fake(network, manager, out, monkeypatch):
    """Else the clock of an application's test jumps three months, to the job's maximum download time, while files are written."""
    slow = asyncio.Event()

    async def slowly(executor: Any, wholes: Sequence[WholeFile], **more: Any) -> Any:
        asyncio.get_running_loop().call_later(5 * JUMP_AFTER, slow.set)
        await slow.wait()
        return await store_whole(executor, wholes, **more)

    monkeypatch.setattr(transfer, "store_whole", slowly)
    network.serve(f"{HOST}/9", b"", status=404)
    job = await job_of(manager, out)
    await job.resume()
    with pytest.raises(bits.RemoteFileError):
        await job.wait()


async def test_one_bad_file_keeps_no_other_that_has_come_from_the_disk_when_the_attempt_ends(network, job, out):
    (out / "0").mkdir()
    network.serve(f"{HOST}/9", b"", status=404)
    await failed(job)
    assert transferred(job) == list(range(1, 9))


async def test_a_listener_of_a_job_of_many_files_costs_no_look_at_all_of_them_at_each_event(network, manager, out, monkeypatch):
    count, looks, size = 100, 0, FileRecord.size.fget

    def counted(file: FileRecord) -> int | None:
        nonlocal looks
        looks += 1
        return size(file)

    monkeypatch.setattr(transfer, "SHELF_FILES", 4)
    for number in range(count):
        network.serve(f"{HOST}/{number}", b"x" * (number + 1))
    job = await manager.create_job("many")
    await job.add_file_set([bits.FileInfo(f"{HOST}/{number}", out / str(number)) for number in range(count)])
    monkeypatch.setattr(FileRecord, "size", property(counted))
    async with job.events() as events:
        await job.resume()
        await job.wait()
        await job.complete()
        told = [event async for event in events]
    assert sum(isinstance(event, bits.Progress) for event in told) > 1
    assert looks <= 12 * count
    assert isinstance(told[-1], bits.JobChanged)
    last = told[-1].progress
    assert (last.files_transferred, last.bytes_transferred, last.bytes_total) == (count, 5050, 5050)
