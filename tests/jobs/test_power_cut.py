"""The power fails at any moment: no job is lost, nothing that was reported is lost, no byte is called durable that is not there.

One run of a queue is recorded: each call that changes a file or a name in the directory, each sync, each transaction of the journal, and
each thing that was reported. Then the power is cut 500 times somewhere in the record. What was synced by then is there; of the rest the
disk has what chance gives it: a beginning of the changes of names (file systems write these in order), any pages of what was written,
zeros in place of others, any beginning of the log of the journal, also torn. The journal is a real one, the product reads what is left,
and a part of the lives go on to their ends in "another boot".
"""

import os
import random
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import bits_async as bits
from bits_async import JobState
from bits_async.files.records import PartRecord
from bits_async.identity import native
from bits_async.jobs import transfer
from bits_async.jobs.model import FileRecord, StoredJob
from bits_async.jobs.store import SqliteStore
from bits_async.testing import FakeNetwork

HOST = "https://files.example.test"
CUTS, TO_THE_END = 500, 20  # every 20th cut the queue is run to its end
PAGE = 4096
Image = tuple[dict[str, int], dict[int, bytes]]


# -- the record


@dataclass
class Disk:
    """What happened, in order: of a directory, of the files in it, and of the journal; and what it leaves when the power fails."""

    directory: Path
    store: Path
    log: list[tuple[Any, ...]] = field(default_factory=list)
    logs: dict[int, bytes] = field(default_factory=dict)  # of the journal, by its length
    lock: threading.Lock = field(default_factory=threading.Lock)
    files: list[int] = field(default_factory=list)  # the inode of each file that was made: one may be used again

    def made(self, name: str, inode: int) -> None:
        with self.lock:
            self.files.append(inode)
            self.log.append(("create", name, len(self.files) - 1))

    def file(self, fd: int) -> int:
        """The number of an open file."""
        return len(self.files) - 1 - self.files[::-1].index(os.fstat(fd).st_ino)

    def note(self, *what: Any) -> None:
        with self.lock:
            self.log.append(what)

    def record(self, patch: pytest.MonkeyPatch) -> None:
        """From now on."""

        def after(name: str, note: Callable[..., None]) -> None:
            honest = getattr(native, name)

            def call(*args: Any) -> Any:
                found = honest(*args)
                note(found, *args)
                return found

            patch.setattr(native, name, call)

        after("create_exclusive", lambda fd, _, name: self.made(name, os.fstat(fd).st_ino))
        after("pwrite_all", lambda n, fd, chunks, at: self.note("write", self.file(fd), at, b"".join(map(bytes, chunks))))
        after("rename_at", lambda _, fd, old, new: self.note("rename", old, new))
        after("unlink_at", lambda _, fd, name: self.note("unlink", name))
        after("sync_directory", lambda _, fd: self.note("sync names"))
        truncate, datasync, transact = os.ftruncate, native.datasync, SqliteStore._transact

        def ftruncate(fd: int, length: int) -> None:
            truncate(fd, length)
            self.note("truncate", self.file(fd), length)

        def syncing(fd: int) -> None:
            upto = len(self.log)
            datasync(fd)
            self.note("sync", self.file(fd), upto)

        def transaction(store: SqliteStore, *args: Any) -> None:
            self.note("begin")
            transact(store, *args)
            content = self.store.with_name(self.store.name + "-wal").read_bytes()
            with self.lock:
                self.logs[len(content)] = content
                self.log.append(("commit", len(content)))

        patch.setattr(os, "ftruncate", ftruncate)
        patch.setattr(native, "datasync", syncing)
        patch.setattr(SqliteStore, "_transact", transaction)

    # what is left

    def names(self, cut: int, chance: random.Random) -> dict[str, int]:
        """Names that were synced are there, and a beginning of the changes since then."""
        last = max((at for at in range(cut) if self.log[at][0] == "sync names"), default=0)
        pending = [at for at in range(last, cut) if self.log[at][0] in ("create", "rename", "unlink")]
        upto = chance.choice([last, *(at + 1 for at in pending)])
        names: dict[str, int] = {}
        for kind, *what in self.log[:upto]:
            if kind == "create":
                names[what[0]] = what[1]
            elif kind == "rename":
                names[what[1]] = names.pop(what[0])
            elif kind == "unlink":
                del names[what[0]]
        return names

    def synced(self, file: int, cut: int) -> int:
        """What was written before that is on the disk."""
        return max((what[2] for what in self.log[:cut] if what[:2] == ("sync", file)), default=0)

    def content(self, file: int, cut: int, chance: random.Random) -> bytes:
        """What was synced is there, and of each page written since then itself, or what was there before."""
        body, kept = bytearray(), 1.0
        synced = self.synced(file, cut)
        fate = chance.choice([0.0, 0.5, 0.9, 1.0])
        for at, (kind, *what) in enumerate(self.log[:cut]):
            kept = 1.0 if at < synced else fate
            if kind == "truncate" and what[0] == file and chance.random() < kept:
                del body[what[1] :]
                body.extend(bytes(what[1] - len(body)))
            elif kind == "write" and what[0] == file:
                self._put(body, what[1], what[2], kept, chance)
        return bytes(body)

    def _put(self, body: bytearray, at: int, data: bytes, kept: float, chance: random.Random) -> None:
        for start in range(0, len(data), PAGE):
            piece, place = data[start : start + PAGE], at + start
            if chance.random() < kept:
                body.extend(bytes(max(0, place - len(body))))
                body[place : place + len(piece)] = piece
            elif chance.random() < kept:  # the length was written, the page was not
                body.extend(bytes(max(0, place + len(piece) - len(body))))

    def journal_log(self, cut: int, chance: random.Random) -> bytes:
        """Transactions that were committed are there; of one that was on its way, any pages."""
        committed = max((what[1] for what in self.log[:cut] if what[0] == "commit"), default=0)
        content = bytearray(self.logs.get(committed, b""))
        began = sum(what[0] == "begin" for what in self.log[:cut]) > sum(what[0] == "commit" for what in self.log[:cut])
        following = [what[1] for what in self.log[cut:] if what[0] == "commit"]
        if began and following:
            more = bytearray(self.logs[following[0]][committed:])
            del more[chance.randrange(len(more) + 1) :]
            for place in range(0, len(more), 512):
                if chance.random() < 0.1:
                    more[place : place + 512] = bytes(len(more[place : place + 512]))
            content += more
        return bytes(content)

    def reported(self, cut: int) -> dict[str, str]:
        """By job, the last that its application was told, or began to ask for ("...")."""
        return {what[1]: what[2] for what in self.log[:cut] if what[0] == "said"}


# -- the run that is recorded

BODIES = {
    name: random.Random(name).randbytes(size) for name, size in {"a": 150_000, "b": 1, "c": 260_000, "d": 9_000, "new": 200_000}.items()
}
JOBS: dict[str, list[str]] = {
    "finished": ["a", "b"],
    "several": ["b", "d", "d", "a", "b", "d"],
    "cut": ["c"],
    "changed": ["changing"],
    "cancelled": ["slow"],
    "dropped": ["a"],
    "partly": ["a", "gone"],
    "failed": ["gone"],
}
EXPECTED = {"finished": ["a", "b"], "several": JOBS["several"], "cut": ["c"], "changed": ["new"], "partly": ["a"]}


def serve(network: FakeNetwork) -> None:
    for name in ("a", "b", "c", "d"):
        network.serve(f"{HOST}/{name}", BODIES[name], cut_after=100_000 if name == "c" else None)
    network.serve(f"{HOST}/changing", BODIES["c"])
    network.serve(f"{HOST}/slow", BODIES["c"])


async def live(network: FakeNetwork, disk: Disk, manager: bits.BitsManager) -> None:
    """Every job to its end, one after the other; the files are named after the jobs."""
    for name, remotes in JOBS.items():
        say = partial(disk.note, "said", name)
        job = await manager.create_job(name, priority=bits.JobPriority.FOREGROUND)
        say("created")
        await job.add_file_set([bits.FileInfo(f"{HOST}/{each}", disk.directory / f"{name}.{n}") for n, each in enumerate(remotes)])
        say("added")
        if name in ("changed", "cancelled"):
            await stopped(network, job)
            say("suspended")
        if name == "changed":
            network.serve(f"{HOST}/changing", BODIES["new"])
        await end(job, name, say)


async def stopped(network: FakeNetwork, job: bits.Job) -> None:
    network.clock.freeze()  # it has not waited for too long meanwhile
    network.pause(after=120_000)
    await job.resume()
    async with job.events() as events:
        async for _ in events:
            if job.progress.bytes_transferred >= 100_000:
                break
    await job.suspend()
    network.resume()
    network.clock.thaw()


async def end(job: bits.Job, name: str, say: Callable[[str], None]) -> None:
    if name != "cancelled":
        if job.state in (JobState.SUSPENDED, JobState.ERROR):
            await job.resume()
        try:
            await job.wait()
            say("transferred")
        except bits.RemoteFileError:
            say("failed")
    if name in ("cancelled", "dropped"):
        say("cancelling...")
        await job.cancel()
        say("gone")
    elif name != "failed":
        say("completing...")
        await job.complete(partial=name == "partly")
        say("gone")


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "CHECKPOINT_BYTES", 48 << 10)
    monkeypatch.setattr(transfer, "WRITE_BATCH", 16 << 10)
    monkeypatch.setattr(transfer, "SHELF_FILES", 2)


@pytest.fixture
def home() -> Iterator[Path]:
    """In memory where there is such a place: what a sync does is the test's own affair."""
    directory = Path(tempfile.mkdtemp(prefix="power-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def network() -> Iterator[FakeNetwork]:
    with FakeNetwork() as fake:
        serve(fake)
        yield fake


@pytest.fixture
async def disk(network: FakeNetwork, home: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    directory = home / "out"
    directory.mkdir()
    disk = Disk(directory, home / "recorded" / "queue.db")
    with monkeypatch.context() as patch:
        async with bits.BitsManager(store=disk.store) as manager:
            for suffix in ("", ".key"):
                shutil.copy(disk.store.with_name(f"queue.db{suffix}"), home / f"begun{suffix}")
            await manager._store._db.execute_fetchall("PRAGMA wal_autocheckpoint=0")  # the log tells all
            disk.logs[0] = disk.store.with_name("queue.db-wal").read_bytes()
            disk.record(patch)
            await live(network, disk, manager)
    ends = list(disk.logs.values())
    assert all(late.startswith(early) and late != early for early, late in pairwise(ends)), "the log was not begun anew meanwhile"
    assert {path.name for path in directory.iterdir()} == {f"{name}.{n}" for name in EXPECTED for n in range(len(EXPECTED[name]))}
    return disk


# -- the life after


class After:
    """One cut: what is on the disk, and what the product makes of it."""

    def __init__(self, disk: Disk, cut: int, seed: str, home: Path) -> None:
        chance = random.Random(seed)
        self.disk = disk
        self.reported = disk.reported(cut)
        self.removed = {what[1] for what in disk.log[:cut] if what[0] in ("unlink", "rename")}
        self.contents: dict[str, bytes] = {}
        self.cut_to: dict[str, int] = {}  # files that were cut, as versions that are given up are
        self.store = home / "queue.db"
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(mode=0o700)
        for suffix in ("", ".key"):
            shutil.copy(home.parent / f"begun{suffix}", self._private(self.store.with_name(f"queue.db{suffix}")))
        self._private(self.store.with_name("queue.db-wal")).write_bytes(disk.journal_log(cut, chance))
        self.inodes = self._restore(disk.names(cut, chance), cut, chance)

    @staticmethod
    def _private(path: Path) -> Path:
        path.touch(0o600)
        return path

    def _restore(self, names: dict[str, int], cut: int, chance: random.Random) -> dict[int, int]:
        """The files have other inodes than in the record; which is which is told to the product."""
        for path in self.disk.directory.iterdir():
            path.unlink()
        inodes = {}
        for name, file in names.items():
            self.contents[name] = self.disk.content(file, cut, chance)
            since = self.disk.log[self.disk.synced(file, cut) : cut]
            self.cut_to[name] = min((what[2] for what in since if what[:2] == ("truncate", file)), default=1 << 62)
            path = self._private(self.disk.directory / name)
            path.write_bytes(self.contents[name])
            inodes[path.stat().st_ino] = self.disk.files[file]
        return inodes

    def is_file(self, record: PartRecord, found: os.stat_result) -> bool:
        return self.inodes.get(found.st_ino, found.st_ino) == record.inode

    def create(self, honest: Callable[[int, str], int], directory: int, name: str) -> int:
        """A new file may have the inode that one of those had which were put back."""
        fd = honest(directory, name)
        self.inodes.pop(os.fstat(fd).st_ino, None)
        return fd

    async def check(self) -> None:
        store = SqliteStore(self.store)
        await store.open()
        try:
            stored = {each.job.display_name: each for each in await store.load()}
        finally:
            await store.close()
        assert store.set_aside is None
        for name, told in self.reported.items():
            self.check_job(name, told, stored.get(name))
        self.check_names(stored)

    def check_job(self, name: str, told: str, stored: StoredJob | None) -> None:
        if told == "gone":
            assert stored is None
            for number, body in enumerate(EXPECTED.get(name, ())):
                assert self.contents[f"{name}.{number}"] == BODIES[body]
        elif not told.endswith("..."):
            assert stored is not None, f"job {name} is lost"
            expected = {"transferred": JobState.TRANSFERRED, "failed": JobState.ERROR}
            if told in expected and name != "partly":
                assert stored.job.state is expected[told]
            if told != "created":
                assert len(stored.files) == len(JOBS[name])
        for file in stored.files if stored else ():
            self.check_file(name, file)

    def check_file(self, name: str, file: FileRecord) -> None:
        """No byte is called durable that is not there, in its place."""
        remote = JOBS[name][file.index]
        body = BODIES.get(remote, BODIES["c"])
        if remote == "changing" and file.validator is not None and file.validator.size == len(BODIES["new"]):
            body = BODIES["new"]
        if file.committed:
            assert self.contents[file.path.name] == body
            return
        if file.part is None:
            assert not file.transferred
            return
        durable = len(body) if file.transferred else file.slices[0].durable if file.slices else 0
        if file.part.name in self.contents:
            content = self.contents[file.part.name]
            kept = min(durable, self.cut_to[file.part.name])
            assert content[:kept] == body[:kept]
            assert not file.transferred or len(content) == durable == kept
        elif durable:
            assert file.part.name in self.removed, "durable bytes have a durable name"
            assert not file.transferred or self.contents[file.path.name] == body

    def check_names(self, stored: dict[str, StoredJob]) -> None:
        files = [file for each in stored.values() for file in each.files]
        known, drafts = {file.part.name for file in files if file.part}, {file.draft for file in files}
        for name in self.contents:
            if name.startswith("."):
                drafted = name.rsplit(".", 2)[1] in drafts
                assert name in known or drafted, f"a stray part file: {name}, {self.reported}"

    async def go_on(self, network: FakeNetwork) -> None:
        """The queue in another boot: every job that is there comes to its end, right, and nothing is left beside its file."""
        serve(network)
        changed = self.reported.get("changed") not in (None, "created", "added")
        network.serve(f"{HOST}/changing", BODIES["new" if changed else "c"])
        async with bits.BitsManager(store=self.store) as manager:
            jobs = {job.display_name: job async for job in manager.enum_jobs()}
            for name, job in jobs.items():
                if job.files and name != "failed":
                    await end(job, name, lambda _: None)
                elif name == "failed":
                    await job.cancel()
            for name in jobs:
                for number, body in enumerate(EXPECTED.get(name, ()) if jobs[name].state is JobState.ACKNOWLEDGED else ()):
                    wanted = BODIES["c"] if body == "new" and not changed else BODIES[body]
                    assert (self.disk.directory / f"{name}.{number}").read_bytes() == wanted
        assert [path.name for path in self.disk.directory.iterdir() if path.name.startswith(".")] == []


@pytest.mark.timeout(180)
async def test_the_power_fails_500_times_and_nothing_that_was_promised_is_lost(disk, network, home, monkeypatch):
    run = int(os.environ.get("CUTS_SEED", "1"))  # another one cuts at other moments
    chance = random.Random(run)
    monkeypatch.setattr(native, "boot_id", lambda: "another boot")
    for number in range(CUTS):
        cut = chance.randrange(len(disk.log) + 1)
        after = After(disk, cut, f"{run} {number}", home / "after")
        monkeypatch.setattr(PartRecord, "is_file", lambda record, found, after=after: after.is_file(record, found))
        await after.check()
        if number % TO_THE_END == 0:
            with monkeypatch.context() as patch:
                patch.setattr(native, "create_exclusive", partial(after.create, native.create_exclusive))
                await after.go_on(network)
