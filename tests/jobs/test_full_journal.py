"""A journal that cannot be written for a while: everything stands still and says so, nothing is lost, and it goes on by itself.

Real manager, real journal, real files; network and time are fake. The faults are SQLite's own words, put in its mouth, and once a volume
that is really full.
"""

import asyncio
import contextlib
import errno
import gc
import logging
import os
import sqlite3
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import bits_async as bits
from bits_async import ErrorCode, JobState, WaitingReason
from bits_async.jobs import statements, transfer
from bits_async.jobs import store as store_module
from bits_async.jobs.faults import LONGEST_PAUSE, REMINDER, JournalFault
from bits_async.jobs.store import SqliteStore
from bits_async.testing import FakeNetwork, fake_token
from tests.waiting import let_things_happen, until

URL = "https://files.example.test/a.bin"
BODY = os.urandom(3 << 20)

FAULTS = {
    sqlite3.SQLITE_FULL: ErrorCode.ERROR_DISK_FULL,
    sqlite3.SQLITE_READONLY: ErrorCode.ERROR_WRITE_FAULT,
    sqlite3.SQLITE_IOERR | 3 << 8: ErrorCode.ERROR_WRITE_FAULT,  # IOERR_WRITE: what a quota gives
    sqlite3.SQLITE_BUSY: ErrorCode.ERROR_SHARING_VIOLATION,
    sqlite3.SQLITE_LOCKED: ErrorCode.ERROR_SHARING_VIOLATION,
}


class Journal:
    """What writes to the journal come to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fault: int | None = None
        self.writes_left = 0
        self.refused = 0

    def break_(self, fault: int = sqlite3.SQLITE_FULL, *, after: int = 0, when: Callable[[], bool] = lambda: True) -> None:
        """Every write fails, after so many more, once it is so."""
        self.fault, self.writes_left, self._when = fault, after, when

    def mend(self) -> None:
        self.fault = None

    def write(self) -> None:
        if self.fault is not None and self._when():
            self.writes_left -= 1
        if self.fault is not None and self.writes_left < 0:
            self._when = lambda: True
            self.refused += 1
            error = sqlite3.OperationalError("told to fail")
            error.sqlite_errorcode, error.sqlite_errorname = self.fault, "SQLITE_TOLD"
            raise error


@pytest.fixture(autouse=True)
def checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """One after each MiB."""
    monkeypatch.setattr(transfer, "CHECKPOINT_BYTES", 1 << 20)


@pytest.fixture
def network() -> Iterator[FakeNetwork]:
    with FakeNetwork() as fake:
        fake.serve(URL, BODY)
        yield fake


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Journal:
    journal, honest = Journal(tmp_path / "queue.db"), statements.all_or_nothing

    @contextlib.contextmanager
    def told(db: sqlite3.Connection) -> Any:
        with honest(db):
            yield db
            journal.write()

    monkeypatch.setattr(statements, "all_or_nothing", told)
    return journal


@pytest.fixture
def out(tmp_path: Path) -> Path:
    directory = tmp_path / "out"
    directory.mkdir()
    return directory


@pytest.fixture
async def manager(network: FakeNetwork, journal: Journal) -> AsyncIterator[bits.BitsManager]:
    async with bits.BitsManager(store=journal.path) as opened:
        yield opened


async def job_of(manager: bits.BitsManager, out: Path, *names: str, **options: Any) -> bits.Job:
    job = await manager.create_job("night", **options)
    await job.add_file_set([bits.FileInfo(URL, out / name) for name in names or ("a.bin",)])
    return job


def stands_still(manager: bits.BitsManager) -> bool:
    return manager.journal_fault is not None and not manager._desk.engine.roster.running


async def journalled(manager: bits.BitsManager, job: bits.Job) -> tuple[object, ...]:
    """What the journal has of it that a command could have changed."""
    (stored,) = await manager._store.load([job.id])
    return _what_counts(stored.job, stored.files)


def _what_counts(record: Any, files: Any) -> tuple[object, ...]:
    state = JobState.QUEUED if record.state.is_active else record.state
    return state, record.display_name, record.priority, [(file.path, file.transferred, file.committed, file.part) for file in files]


def in_memory(job: bits.Job) -> tuple[object, ...]:
    return _what_counts(job._entry.job, job._entry.files)


@pytest.mark.parametrize("fault", FAULTS, ids=["full", "read-only", "quota", "busy", "locked"])
async def test_a_journal_that_cannot_be_written_pauses_everything_and_says_so_and_then_all_goes_on(
    network, manager, journal, out, caplog, fault
):
    job = await job_of(manager, out)
    journal.break_(fault, when=lambda: job.progress.bytes_transferred >= 2 << 20)
    async with job.events() as events:
        await job.resume()
        await until(lambda: stands_still(manager))
        told = manager.journal_fault
        assert (told.code, told.path, told.transient) == (FAULTS[fault], journal.path, True)
        assert job.state is JobState.QUEUED
        assert (job.waiting.reason, str(journal.path) in job.waiting.detail) == (WaitingReason.JOURNAL, True)
        waiting = asyncio.ensure_future(job.wait())
        refused, clock = journal.refused, network.clock.monotonic()
        await until(lambda: network.clock.monotonic() > clock + 600)
        minutes = (network.clock.monotonic() - clock) / 60
        assert 0.9 * minutes - 1 <= journal.refused - refused <= 3 * minutes  # about once a minute, none of it a job's
        assert not waiting.done()
        journal.mend()
        await waiting
        assert manager.journal_fault is None
        await job.complete()
        reasons = [event.waiting.reason async for event in events if isinstance(event, bits.JobChanged) and event.waiting]
    assert WaitingReason.JOURNAL in reasons
    assert (out / "a.bin").read_bytes() == BODY
    assert [request.start for request in network.requests] == [0, 2 << 20]  # nothing that was written is fetched again
    assert os.listdir(out) == ["a.bin"]
    said = [record for record in caplog.records if str(journal.path) in record.getMessage()]
    assert [record.levelno for record in said if record.levelno >= logging.WARNING] == [
        logging.ERROR,
        logging.WARNING,
    ]


async def test_commands_that_cannot_be_journalled_are_refused_with_the_journals_name_and_change_nothing(network, manager, journal, out):
    job, done = await job_of(manager, out), await job_of(manager, out, "done.bin")
    await done.resume()
    await done.wait()
    before = [(in_memory(each), await journalled(manager, each)) for each in (job, done)]
    assert [memory == journal for memory, journal in before] == [True, True]
    commands = [
        lambda: manager.create_job("new"),
        job.resume,
        job.cancel,
        lambda: job.add_file(URL, out / "b.bin"),
        lambda: job.set_display_name("other"),
        lambda: job.set_priority(bits.JobPriority.HIGH),
        done.cancel,
        done.resume,
    ]
    journal.break_()
    for each in (commands[0], *commands):  # the first finds it out, the others hear of it
        with pytest.raises(bits.StoreError) as caught:
            await each()
        assert (caught.value.code, caught.value.path) == (ErrorCode.ERROR_DISK_FULL, journal.path)
    assert [(in_memory(each), await journalled(manager, each)) for each in (job, done)] == before
    assert {each.id async for each in manager.enum_jobs()} == {job.id, done.id}  # it can be read
    assert (await manager.get_job(job.id)).id == job.id
    journal.mend()
    await until(lambda: manager.journal_fault is None)
    await done.complete()
    await job.resume()
    await job.wait()
    await job.complete()
    assert sorted(os.listdir(out)) == ["a.bin", "done.bin"]


@pytest.mark.parametrize("names", [["a"], ["a", "b", "c"]], ids=["one large file", "small files together"])
@pytest.mark.parametrize("writes", range(4))
async def test_whenever_the_journal_breaks_no_part_file_is_left_behind(network, manager, journal, out, names, writes):
    if len(names) > 1:
        network.serve(URL, BODY[:1000])
    job = await job_of(manager, out, *names)
    journal.break_(after=writes, when=lambda: job._entry.work is not None)
    await job.resume()
    await until(lambda: stands_still(manager) or job.state is JobState.TRANSFERRED)
    assert set(os.listdir(out)) <= {file.part.path.name for file in job._entry.files if file.part}
    journal.mend()
    await job.wait()
    await until(lambda: manager.journal_fault is None)
    await job.complete()
    assert sorted(os.listdir(out)) == sorted(names)


async def test_a_cancel_that_breaks_off_after_the_bytes_are_gone_leaves_a_job_that_can_be_resumed(network, manager, journal, out):
    job = await job_of(manager, out)
    await job.resume()
    await job.wait()
    journal.break_(after=1)
    with pytest.raises(bits.StoreError):
        await job.cancel()
    assert os.listdir(out) == []
    assert in_memory(job) == await journalled(manager, job)
    assert job.state is JobState.SUSPENDED
    journal.mend()
    await until(lambda: manager.journal_fault is None)
    await job.resume()
    await job.wait()
    assert await job.complete() == (out / "a.bin",)


async def test_an_outcome_that_cannot_be_journalled_is_found_again(network, manager, journal, out):
    """Not lost, and not told before it is durable."""
    job = await job_of(manager, out)
    network.serve(URL, b"", status=404)
    journal.break_(when=lambda: bool(network.requests))
    await job.resume()
    await until(lambda: stands_still(manager))
    assert (job.state, job.error) == (JobState.QUEUED, None)
    journal.mend()
    with pytest.raises(bits.RemoteFileError):
        await job.wait()
    assert job.state is JobState.ERROR


async def test_a_callback_whose_news_cannot_be_marked_as_told_hears_it_again_afterwards(network, manager, journal, out):
    heard: list[str] = []

    class Callback(bits.BackgroundCopyCallback):
        async def job_transferred(self, job: bits.Job) -> None:
            heard.append(job.display_name)
            if len(heard) == 1:
                journal.break_()

    job = await job_of(manager, out)
    await job.set_notify_interface(Callback())
    await job.resume()
    await until(lambda: manager.journal_fault is not None)
    clock = network.clock.monotonic()
    await until(lambda: network.clock.monotonic() > clock + 600)
    assert heard == ["night"]
    journal.mend()
    await until(lambda: len(heard) == 2)
    await until(lambda: not job._entry.job.owed)


async def test_a_manager_that_is_closed_while_the_fault_lasts_says_so_and_the_next_one_goes_on(network, journal, out):
    with pytest.raises(bits.StoreError) as caught:
        async with bits.BitsManager(store=journal.path) as manager:
            job = await job_of(manager, out)
            journal.break_(when=lambda: job.progress.bytes_transferred >= 2 << 20)
            await job.resume()
            await until(lambda: stands_still(manager))
    assert caught.value.path == journal.path
    journal.mend()
    async with bits.BitsManager(store=journal.path) as manager:
        job = await manager.get_job(job.id)
        await job.wait()
        await job.complete()
    assert (out / "a.bin").read_bytes() == BODY
    assert network.requests[1].start > 0


async def test_a_manager_that_is_closed_when_the_fault_is_just_over_says_nothing(network, journal, out):
    network.clock.freeze()
    async with bits.BitsManager(store=journal.path) as manager:
        journal.break_()
        with pytest.raises(bits.StoreError):
            await job_of(manager, out)
        journal.mend()


async def test_a_download_waits_for_its_journal_as_long_as_it_tries_errors_again(network, journal, out):
    seen: list[bits.Progress] = []
    journal.break_(when=lambda: bool(network.requests) and seen[-1].state is JobState.TRANSFERRING)
    going = asyncio.ensure_future(bits.download(URL, out / "a.bin", store=journal.path, retry_for=300, progress=seen.append))
    await until(lambda: seen and seen[-1].waiting and seen[-1].waiting.reason is WaitingReason.JOURNAL)
    journal.mend()
    assert await going == out / "a.bin"
    assert (out / "a.bin").read_bytes() == BODY


@pytest.mark.parametrize("patience", [0, 300])
async def test_a_download_whose_journal_stays_full_fails_with_its_name_and_a_later_one_goes_on(network, journal, out, patience):
    seen: list[bits.Progress] = []
    journal.break_(when=lambda: bool(network.requests) and seen[-1].state is JobState.TRANSFERRING)
    began = network.clock.monotonic()
    going = asyncio.ensure_future(bits.download(URL, out / "a.bin", store=journal.path, retry_for=patience, progress=seen.append))
    with pytest.raises(bits.StoreError) as caught:
        await going
    assert (caught.value.code, caught.value.path) == (ErrorCode.ERROR_DISK_FULL, journal.path)
    assert patience <= network.clock.monotonic() - began < patience + 2 * LONGEST_PAUSE
    journal.mend()
    await bits.download(URL, out / "a.bin", store=journal.path)
    assert (out / "a.bin").read_bytes() == BODY
    assert network.requests[-1].start > 0


async def test_a_download_that_is_cancelled_while_its_managers_journal_is_full_is_suspended_afterwards(network, manager, journal, out):
    journal.break_(when=lambda: bool(network.requests))
    going = asyncio.ensure_future(manager.download(URL, out / "a.bin"))
    await until(lambda: stands_still(manager))
    (job,) = [job async for job in manager.enum_jobs()]
    going.cancel()
    with pytest.raises(asyncio.CancelledError):
        await going
    network.clock.freeze()
    network.pause()
    await goes_on(network, manager, journal)
    await until(lambda: job.state is JobState.SUSPENDED)


@pytest.fixture
def small_volume(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "volume"
    path.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=0700", "tmpfs", str(path)], check=True)
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    with path.open("ab", buffering=0) as file, pytest.raises(OSError) as caught:
        file.write(b"x" * 4096)
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.privileged
async def test_a_volume_that_is_full_for_journal_and_destination_costs_time_only(network, small_volume, caplog, monkeypatch):
    body, honest, rubbish = BODY[: 3 << 19], statements.all_or_nothing, small_volume / "somebody's"
    network.serve(URL, body)

    def filling(db: sqlite3.Connection) -> Any:
        if job.progress.bytes_transferred >= 1 << 20:
            monkeypatch.setattr(statements, "all_or_nothing", honest)
            fill(rubbish)
        return honest(db)

    async with bits.BitsManager(store=small_volume / "queue.db") as manager:
        job = await job_of(manager, small_volume)
        monkeypatch.setattr(statements, "all_or_nothing", filling)
        await job.resume()
        await until(rubbish.exists)
        with contextlib.suppress(bits.StoreError):
            for number in range(100):  # what fits into the log that is there may still go through
                await job.set_description(f"{number}" * 500)
        await until(lambda: stands_still(manager))
        assert (manager.journal_fault.code, manager.journal_fault.path) == (ErrorCode.ERROR_DISK_FULL, small_volume / "queue.db")
        clock = network.clock.monotonic()
        await until(lambda: network.clock.monotonic() > clock + 300)
        assert not job.state.is_settled
        rubbish.unlink()
        await job.wait()
        await job.complete()
    assert (small_volume / "a.bin").read_bytes() == body
    loud = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(loud) < 12, [record.getMessage() for record in loud]


async def refused(path: Path) -> bits.StoreError:
    with pytest.raises(bits.StoreError) as caught:
        async with bits.BitsManager(store=path):
            pass
    assert caught.value.transient
    assert "then try again" in caught.value.advice
    assert str(path) in str(caught.value)
    return caught.value


def remount(volume: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(volume)], check=True)


@pytest.mark.privileged
async def test_a_journal_that_cannot_be_written_when_it_is_opened_is_left_as_it_was_and_opened_later(network, small_volume, out):
    """An error then, not a pause: whoever starts the program hears of it, and starts it again."""
    path, rubbish = small_volume / "queue.db", small_volume / "somebody's"
    fill(rubbish)
    assert (await refused(path)).code == ErrorCode.ERROR_DISK_FULL
    rubbish.unlink()
    async with bits.BitsManager(store=path) as manager:
        job = await job_of(manager, out)
    fill(rubbish)
    assert (await refused(path)).code == ErrorCode.ERROR_DISK_FULL
    rubbish.unlink()
    remount(small_volume, "ro")
    assert (await refused(path)).code == ErrorCode.ERROR_WRITE_FAULT
    remount(small_volume, "rw")
    async with bits.BitsManager(store=path) as manager:
        job = await manager.get_job(job.id)
        await job.resume()
        await job.wait()
        await job.complete()
    assert (out / "a.bin").read_bytes() == BODY


async def test_a_program_that_holds_the_journal_for_a_moment_when_it_is_opened_is_waited_for(network, journal, out, monkeypatch):
    async with bits.BitsManager(store=journal.path) as manager:
        job = await job_of(manager, out)
    with contextlib.closing(sqlite3.connect(journal.path, isolation_level=None)) as shell:
        shell.execute("BEGIN IMMEDIATE")
        with monkeypatch.context() as impatient:
            impatient.setattr(store_module, "BUSY_TIMEOUT", 0.01)
            assert (await refused(journal.path)).code == ErrorCode.ERROR_SHARING_VIOLATION
        honest, asked = SqliteStore._load_key, asyncio.Event()

        async def noted(store: SqliteStore, *args: Any) -> Any:
            asked.set()
            return await honest(store, *args)

        monkeypatch.setattr(SqliteStore, "_load_key", noted)
        opening = asyncio.ensure_future(bits.BitsManager(store=journal.path).__aenter__())
        await asked.wait()
        await let_things_happen()
        assert not opening.done()
        shell.execute("ROLLBACK")
        manager = await opening
        assert (await manager.get_job(job.id)).id == job.id
        await manager.aclose()


async def test_what_a_night_of_failures_leaves_in_the_log_is_a_line_an_attempt_and_one_at_the_end(network, manager, out, caplog):
    """Every one of them names the job, why, and what to do."""
    job = await job_of(manager, out)
    await job.set_no_progress_timeout(8 * 3600)
    network.serve(URL, b"", status=503)
    began = network.clock.monotonic()
    await job.resume()
    with pytest.raises(bits.BitsError):
        await job.wait()
    hours = (network.clock.monotonic() - began) / 3600
    assert hours > 7
    loud = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(loud) <= 6 * hours + 2
    assert all(str(job.id) in line for line in loud)
    assert "BG_E_NO_PROGRESS" in loud[-1]
    assert "waits to be resumed" in loud[-1]


# -- what was under way when it broke is taken up where it was ----------------------------------------------------------------------


async def test_a_job_whose_line_could_not_be_read_is_looked_for_again(network, manager, journal, out, monkeypatch):
    job, honest = await job_of(manager, out), SqliteStore.in_line

    async def unreadable(*args: Any, **named: Any) -> Any:
        found = await honest(*args, **named)
        if found:
            monkeypatch.setattr(SqliteStore, "in_line", honest)
            raise bits.StoreError("told to fail", code=ErrorCode.ERROR_WRITE_FAULT, transient=True)
        return found

    monkeypatch.setattr(SqliteStore, "in_line", unreadable)
    await job.resume()
    await job.wait()
    assert await job.complete() == (out / "a.bin",)


async def test_jobs_that_were_to_go_on_with_the_network_when_the_journal_broke_go_on_with_the_journal(network, manager, journal, out):
    waiting = [await job_of(manager, out, name) for name in ("a", "b")]
    network.clock.freeze()  # nobody has waited for the network for too long
    network.disconnect()
    for each in waiting:
        await each.resume()
    await until(lambda: all(each.waiting and each.waiting.reason is WaitingReason.NETWORK for each in waiting))
    journal.break_()
    network.reconnect()
    network.clock.thaw()
    await until(lambda: manager.journal_fault is not None)
    journal.mend()
    for each in waiting:
        await each.wait()


async def test_a_command_that_was_found_to_be_owed_when_the_journal_broke_is_run_when_it_can_be_used(network, journal, out, monkeypatch):
    network.fail_command()
    network.clock.freeze()  # the next try is not due yet
    async with bits.BitsManager(store=journal.path) as manager:
        job = await job_of(manager, out)
        await job.set_notify_cmd_line("/bin/true")
        await job.resume()
        await until(lambda: network.commands)
    del job
    network.clock.thaw()
    manager, honest = bits.BitsManager(store=journal.path), SqliteStore.owing

    async def found(store: SqliteStore, *args: Any) -> Any:
        page = await honest(store, *args)
        if page and manager.journal_fault is None:
            monkeypatch.setattr(SqliteStore, "owing", honest)
            journal.break_()
            with pytest.raises(bits.StoreError):
                await manager.create_job("new")
        return page

    monkeypatch.setattr(SqliteStore, "owing", found)
    async with manager:
        await until(lambda: manager.journal_fault is not None)
        assert len(network.commands) == 1
        journal.mend()
        await until(lambda: len(network.commands) == 2)


async def test_news_of_a_job_that_nobody_holds_are_told_again_if_it_could_not_be_journalled_that_they_were(network, manager, journal, out):
    heard: list[str] = []
    out_of_line = asyncio.Event()

    class Callback(bits.BackgroundCopyCallback):
        async def job_transferred(self, job: bits.Job) -> None:
            heard.append(job.display_name)
            await out_of_line.wait()
            if len(heard) == 1:
                journal.break_()

    job = await job_of(manager, out)
    engine, job_id = manager._desk.engine, job.id
    await job.set_notify_interface(Callback())
    await job.resume()
    await until(lambda: heard and not engine.roster.candidates)
    del job
    out_of_line.set()
    await until(lambda: manager.journal_fault is not None and not engine.notifier._at_work)
    gc.collect()
    journal.mend()
    await until(lambda: len(heard) == 2)
    await until(lambda: (entry := engine.roster.live(job_id)) is None or not entry.job.owed)


# -- how long, how often -------------------------------------------------------------------------------------------------------------


def test_the_pauses_grow_to_a_minute_and_start_anew_when_the_journal_was_well_for_a_minute():
    fault, error, now, pauses = JournalFault(), bits.StoreError("full"), 1000.0, []
    fault.begin(error, now)
    for _ in range(9):
        pauses.append(fault.next_try - now)
        now = fault.next_try
        fault.again(error, now)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    fault.end(now)
    fault.begin(error, now + 1)  # it comes and goes
    assert fault.next_try - now - 1 == 60
    fault.end(now)
    fault.begin(error, now + 61)
    assert fault.next_try - now - 61 == 1


def test_of_a_fault_that_lasts_the_log_is_reminded_four_times_an_hour():
    fault, error, said = JournalFault(), bits.StoreError("full"), 0
    fault.begin(error, 0.0)
    while fault.next_try < 4 * REMINDER + 120:
        said += fault.again(error, fault.next_try)
    assert said == 4


# -- identities are given up all the same -----------------------------------------------------------------------------------------------


async def helped(manager: bits.BitsManager, out: Path, helper: bits.Token) -> tuple[bits.Job, bits.TokenOptions]:
    alice = fake_token("alice")
    job = await job_of(manager, out, owner=alice)
    with bits.impersonate(alice):
        options = await job.token_options()
    await options.set_helper_token_flags(bits.HelperTokenFlags.NETWORK)
    with bits.impersonate(helper):
        await options.set_helper_token()
    return job, options


async def paused(network: FakeNetwork, manager: bits.BitsManager, journal: Journal) -> None:
    network.clock.freeze()  # it stays so
    journal.break_()
    with pytest.raises(bits.StoreError):
        await manager.create_job("new")
    assert manager.journal_fault is not None


async def goes_on(network: FakeNetwork, manager: bits.BitsManager, journal: Journal) -> None:
    def tried_again() -> bool:
        network.clock.advance(LONGEST_PAUSE)  # each time: a try that had begun before may still fail
        return manager.journal_fault is None

    journal.mend()
    await until(tried_again)


async def test_t25_a_log_off_takes_the_helpers_token_though_nothing_can_be_journalled(network, manager, journal, out):
    bob = fake_token("bob", session="s1")
    job, options = await helped(manager, out, bob)
    await paused(network, manager, journal)
    network.log_off("s1")
    await until(lambda: bob.closed)
    assert options.helper_token_sid is None
    await goes_on(network, manager, journal)
    await job.resume()
    with pytest.raises(bits.TokenRequired):
        await job.wait()
    assert network.requests == []


async def test_t25_a_log_off_ends_the_tokens_of_jobs_that_cannot_be_read(network, manager, journal, out, monkeypatch, caplog):
    """Nobody holds the job, and its helper's token is all that is in memory of it."""
    bob = fake_token("bob", session="s1")
    job, _ = await helped(manager, out, bob)
    engine, job_id = manager._desk.engine, job.id
    await paused(network, manager, journal)
    del job, _
    gc.collect()
    await until(lambda: engine.roster.live(job_id) is None)
    forgotten = []

    async def unreadable(*args: object) -> None:
        raise bits.StoreError("told to fail", code=ErrorCode.ERROR_SHARING_VIOLATION, transient=True)

    async def forget(token: bits.Token) -> None:
        forgotten.append(token)

    with monkeypatch.context() as broken:
        broken.setattr(manager._store, "load", unreadable)
        broken.setattr(engine._shop.network, "forget", forget)
        network.log_off("s1")
        await until(lambda: bob.closed and bob in forgotten)
    assert not [record for record in caplog.records if record.exc_info]  # the journal's trouble is said once, and not as a defect
    await goes_on(network, manager, journal)


async def test_t25_a_helpers_token_can_be_taken_back_though_nothing_can_be_journalled(network, manager, journal, out):
    job, options = await helped(manager, out, fake_token("bob"))
    await paused(network, manager, journal)
    await options.clear_helper_token()
    assert options.helper_token_sid is None
    await goes_on(network, manager, journal)
    await job.resume()
    with pytest.raises(bits.TokenRequired):
        await job.wait()
    assert network.requests == []
