"""kill -9 at any moment of a download: the next run ends with the right file, and what was written is not fetched again."""

import hashlib
import os
import signal
import sqlite3
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import bits_async as bits
from tests.peers import Fault, Hold, Origin, Seen
from tests.process import downloader
from tests.waiting import until

MIB = 1 << 20
PATIENCE = 150.0  # seconds for one process: a fraction of one where it has a processor to itself


@dataclass
class Scene:
    """One origin in this process, one destination, and the processes that download."""

    origin: Origin
    out: Path
    store: Path
    url: str = ""
    body: bytes = b""
    children: list["subprocess.Popen[str]"] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return self.out / "file"

    @property
    def left(self) -> list[str]:
        return sorted(each.name for each in self.out.iterdir())

    @property
    def part(self) -> Path:
        (found,) = self.out.glob(".*.bits-part")
        return found

    @property
    def length(self) -> int:
        """Of the part file; 0 where there is none."""
        return max((each.stat().st_size for each in self.out.glob(".*.bits-part")), default=0)

    def serve(self, body: bytes, **version: Any) -> None:
        self.body, self.url = body, self.origin.serve("/file", body, **version)

    def start(self, **more: Any) -> "subprocess.Popen[str]":
        child = downloader.start(self.url, self.path, **more)
        self.children.append(child)
        return child

    async def killed_at(self, moment: Callable[[], object], **more: Any) -> int:
        """Start a download and kill it at that moment. Returns the length of the part file it left."""
        child = self.start(**more)
        await until(lambda: moment() or child.poll() is not None, deadline=PATIENCE)
        child.kill()
        await self.dead(child)
        return self.length

    async def dead(self, child: "subprocess.Popen[str]") -> None:
        await until(lambda: child.poll() is not None, deadline=PATIENCE)
        assert child.returncode == -signal.SIGKILL, child.communicate()[1]
        await self.quiet()

    async def finished(self, child: "subprocess.Popen[str]") -> None:
        await until(lambda: child.poll() is not None, deadline=PATIENCE)
        assert child.returncode == 0, child.communicate()[1]

    async def quiet(self) -> None:
        """The origin has noticed that the process is gone, also where it was told to hold an answer."""
        self.origin.drop_connections()
        await until(lambda: not self.origin.open_connections)

    def check(self) -> None:
        assert hashlib.sha256(self.path.read_bytes()).digest() == hashlib.sha256(self.body).digest()
        assert self.left == ["file"]

    # the journal

    def journal(self, sql: str) -> list[tuple[Any, ...]]:
        database = sqlite3.connect(self.store)
        try:
            with database:
                return list(database.execute(sql))
        finally:
            database.close()

    @property
    def durable(self) -> int:
        ((found,),) = self.journal("SELECT durable FROM slices")
        return int(found)

    @property
    def journalled(self) -> int:
        """`durable`, also before there is a journal to read."""
        try:
            return self.durable
        except (sqlite3.Error, ValueError):
            return 0

    def reboot(self) -> None:
        """The journal was written in another boot than this."""
        self.journal("UPDATE files SET boot_id = 'another boot'")


@pytest.fixture
async def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Scene]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    out = tmp_path / "out"
    out.mkdir()
    async with Origin() as origin:
        found = Scene(origin, out, tmp_path / "queue.db")
        yield found
        for child in found.children:
            child.kill()
            child.communicate()


@pytest.fixture(scope="module")
def large() -> bytes:
    return os.urandom(200 * MIB)


@pytest.fixture(scope="module")
def small() -> bytes:
    return os.urandom(6 * MIB)


def starts(requests: list[Seen]) -> list[int]:
    """Where each request began; its range is open to the end of the file."""
    found = [seen.range for seen in requests]
    assert all(text is None or (text.startswith("bytes=") and text.endswith("-")) for text in found)
    return [0 if text is None else int(text[6:-1]) for text in found]


# -- in the middle


@pytest.mark.timeout(600)  # a few seconds on an idle machine
async def test_a_200_mib_download_killed_again_and_again_fetches_nothing_twice(scene, large):
    scene.serve(large)
    digest = hashlib.sha256(large).hexdigest()
    lengths = []
    for moment in (20 * MIB, 75 * MIB, 150 * MIB):
        lengths.append(await scene.killed_at(lambda at=moment: scene.length >= at, sha256=digest))
    assert 20 * MIB <= lengths[0] < lengths[1] < lengths[2] < 200 * MIB
    await scene.finished(scene.start(sha256=digest))
    scene.check()
    assert starts(scene.origin.requests) == [0, *lengths]
    assert [seen.status for seen in scene.origin.requests] == [200, 206, 206, 206]
    assert {seen.header("If-Range") for seen in scene.origin.requests[1:]} == {'"v1"'}
    assert scene.origin.requests[-1].sent == 200 * MIB - lengths[-1]
    assert [each for each in (scene.out.parent / "state").rglob("*") if each.is_file()] == [], "nothing is left to continue"


async def test_in_another_boot_nothing_durable_is_fetched_again_and_the_rest_is(scene, large):
    """What the journal does not call durable may be lost: it is garbage here."""
    scene.serve(large)
    scene.origin.fault("/file", Fault(rate=200 * MIB, hold=Hold(after=199 * MIB)))
    length = await scene.killed_at(lambda: 32 * MIB <= scene.journalled < scene.length, store=str(scene.store))
    durable = scene.durable
    assert 32 * MIB <= durable < length
    with scene.part.open("r+b") as part:
        part.seek(durable)
        part.write(b"\0" * (length - durable))
    scene.reboot()
    await bits.download(scene.url, scene.path, store=scene.store)
    scene.check()
    assert starts(scene.origin.requests) == [0, durable]


async def test_in_the_same_boot_more_than_the_journal_knows_is_kept(scene, small):
    """The comparison is with the file as the dead process left it, not with its journal."""
    scene.serve(small)
    scene.origin.fault("/file", Fault(rate=10 * MIB, hold=Hold(after=6 * MIB - 1)))
    length = await scene.killed_at(lambda: 2 * MIB <= scene.journalled < scene.length, store=str(scene.store), checkpoint=2 * MIB)
    durable = scene.durable
    assert 2 * MIB <= durable < length
    await bits.download(scene.url, scene.path, store=scene.store)
    scene.check()
    assert starts(scene.origin.requests) == [0, length]


@pytest.mark.parametrize("lost", ["what is not durable", "more than that", "everything", "the name"])
async def test_after_a_power_cut_the_file_is_right(scene, small, lost):
    scene.serve(small)
    scene.origin.fault("/file", Fault(rate=10 * MIB, hold=Hold(after=6 * MIB - 1)))
    await scene.killed_at(lambda: 2 * MIB <= scene.journalled < scene.length, store=str(scene.store), checkpoint=2 * MIB)
    durable = scene.durable
    keeps = {"what is not durable": durable, "more than that": durable - 1, "everything": 0}
    if lost == "the name":
        scene.part.unlink()
    else:
        os.truncate(scene.part, keeps[lost])
    scene.reboot()
    await bits.download(scene.url, scene.path, store=scene.store)
    scene.check()
    assert starts(scene.origin.requests) == [0, durable if lost == "what is not durable" else 0]


async def test_killed_twice_in_the_boot_after_the_second_run_counts_too(scene, small):
    """The second boot's own bytes are trusted in it, before its first checkpoint."""
    scene.serve(small)
    first, second = Hold(after=3 * MIB), Hold(after=2 * MIB)
    scene.origin.fault("/file", Fault(hold=first), Fault(hold=second))
    await scene.killed_at(lambda: scene.length >= 2 * MIB and scene.journalled >= MIB, store=str(scene.store), checkpoint=MIB)
    durable = scene.durable
    scene.reboot()
    length = await scene.killed_at(lambda: second.reached.is_set() and scene.length > durable + MIB // 2, store=str(scene.store))
    assert length > durable + MIB // 2
    await bits.download(scene.url, scene.path, store=scene.store)
    scene.check()
    assert starts(scene.origin.requests) == [0, durable, length]


async def test_the_queue_goes_on_by_itself_when_the_next_manager_opens_it(scene, small):
    scene.serve(small)
    scene.origin.fault("/file", Fault(hold=Hold(after=4 * MIB)))
    length = await scene.killed_at(lambda: scene.length >= 3 * MIB, store=str(scene.store), queue=True)
    async with bits.BitsManager(store=scene.store) as manager:
        (job,) = [each async for each in manager.enum_jobs()]
        await job.wait()
        await job.complete()
    scene.check()
    assert starts(scene.origin.requests) == [0, length]


async def test_a_file_that_changed_between_two_processes_is_wholly_the_new_version(scene, small):
    scene.serve(small)
    scene.origin.fault("/file", Fault(hold=Hold(after=4 * MIB)))
    await scene.killed_at(lambda: scene.length >= 3 * MIB)
    scene.serve(small[::-1], etag='"v2"')
    await bits.download(scene.url, scene.path)
    scene.check()


# -- before the first byte


@pytest.mark.parametrize("hold", [None, 0], ids=["no answer", "no byte of the body"])
async def test_killed_before_the_first_byte_nothing_is_left_but_the_file_of_the_next_run(scene, small, hold):
    scene.serve(small)
    held = Hold(after=hold)
    scene.origin.fault("/file", Fault(hold=held))
    assert await scene.killed_at(held.reached.is_set) == 0
    await bits.download(scene.url, scene.path)
    scene.check()
    assert starts(scene.origin.requests) == [0, 0]


# -- at a point of our own choice


def journal_points() -> Iterator[str]:
    """Each transaction of a download, in order: the job, its settings, its resume, the version, the whole file and with it the job, the
    end of the job."""
    yield from (f"before save {number}" for number in (1, 2, 3, 4, 5, 6))


@pytest.mark.parametrize(
    "point", [*journal_points(), "halfway pwrite_all 2", "after pwrite_all 2", "before datasync 1", "after datasync 1"]
)
async def test_killed_at_any_point_the_next_run_has_the_file_and_leaves_nothing_else(scene, small, point):
    scene.serve(small)
    if "pwrite" in point:
        scene.origin.always("/file", Fault(chunked=True))  # such a body is written batch by batch
    await scene.dead(scene.start(die=point))
    length, in_place = scene.length, scene.path.exists()
    asked = len(scene.origin.requests)
    await bits.download(scene.url, scene.path)
    scene.check()
    again = scene.origin.requests[asked:]
    whole = in_place or length == len(small)
    assert starts(again) == ([] if whole else [length])


@pytest.mark.parametrize(
    "point",
    ["halfway pwrite_all 2", "after pwrite_all 4", "after datasync 1", "before save 5", "after save 5"],
)
async def test_killed_while_small_files_are_written_together_the_next_run_has_them_all_and_leaves_nothing_else(scene, point):
    """The fifth save is that of the batch: what it holds is not fetched again, and of what was not journalled nothing stays."""
    scene.serve(os.urandom(50_000))
    await scene.dead(scene.start(die=point, store=str(scene.store), queue=True, copies=4))
    asked = len(scene.origin.requests)
    async with bits.BitsManager(store=scene.store) as manager:
        (job,) = [each async for each in manager.enum_jobs()]
        await job.wait()
        await job.complete()
    assert scene.left == ["file", "file1", "file2", "file3"]
    assert all((scene.out / name).read_bytes() == scene.body for name in scene.left)
    assert len(scene.origin.requests) - asked == (0 if point == "after save 5" else 4)


@pytest.mark.parametrize("point", ["after create_exclusive 1", "before save 4"])
async def test_killed_when_the_part_file_was_just_made_nothing_of_it_is_left_after_the_next_run(scene, small, point):
    """The journal knows the name of a part file before the file exists."""
    scene.serve(small)
    await scene.dead(scene.start(die=point))
    (orphan,) = scene.left
    assert (scene.out / orphan).stat().st_size == 0
    await bits.download(scene.url, scene.path)
    scene.check()


@pytest.mark.parametrize("point", ["after create_exclusive 1", "before save 4"])
async def test_killed_when_the_part_file_was_just_made_a_cancel_in_the_next_run_leaves_nothing(scene, small, point):
    scene.serve(small)
    await scene.dead(scene.start(die=point, store=str(scene.store)))
    assert len(scene.left) == 1
    async with bits.BitsManager(store=scene.store, run=False) as manager:
        (job,) = [each async for each in manager.enum_jobs()]
        await job.cancel()
    assert scene.left == []


@pytest.mark.parametrize("point", ["before unlink_at 1", "after unlink_at 1"])
async def test_a_finished_job_whose_cancel_was_killed_can_be_cancelled_or_resumed_and_is_not_called_finished(scene, small, point):
    scene.serve(small)
    await scene.dead(scene.start(die=point, store=str(scene.store), queue=True, cancel=True))
    async with bits.BitsManager(store=scene.store) as manager:
        (job,) = [each async for each in manager.enum_jobs()]
        assert (job.state, job.progress.files_transferred) == (bits.JobState.SUSPENDED, 0)
        await job.resume()
        await job.wait()
        await job.complete()
    scene.check()


async def test_a_file_of_somebody_else_with_the_name_of_the_next_part_file_is_left_alone(scene, small):
    scene.serve(small)
    await scene.dead(scene.start(die="after create_exclusive 1", store=str(scene.store)))
    (planted,) = scene.left
    (scene.out / planted).write_bytes(b"theirs")
    os.link(scene.out / planted, scene.out / "theirs")  # so it is not ours alone
    await bits.download(scene.url, scene.path, store=scene.store)
    assert scene.left == sorted([planted, "file", "theirs"])
    assert (scene.out / planted).read_bytes() == b"theirs"
    assert scene.path.read_bytes() == small


@pytest.mark.parametrize("point", ["before rename_at 1", "after rename_at 1", "after sync_directory 1", "before save 6"])
@pytest.mark.parametrize("replaced", [False, True], ids=["new", "replacing"])
async def test_killed_while_the_file_is_put_in_its_place_the_next_run_finds_it_there(scene, small, point, replaced):
    scene.serve(small)
    if replaced:
        scene.path.write_bytes(b"yesterday's")
    await scene.dead(scene.start(die=point))
    asked = len(scene.origin.requests)
    if scene.path.exists():
        assert scene.path.read_bytes() in (small, b"yesterday's"), "whole, the old one or the new one"
    await bits.download(scene.url, scene.path)
    scene.check()
    assert len(scene.origin.requests) == asked == 1


async def test_a_file_found_in_its_place_after_a_kill_is_made_durable_there(scene, small, monkeypatch):
    """The rename was done, the directory not yet synced: the run that reports success does that."""
    from bits_async.identity import native

    synced: list[int] = []
    scene.serve(small)
    await scene.dead(scene.start(die="after rename_at 1"))
    honest = native.sync_directory
    monkeypatch.setattr(native, "sync_directory", lambda fd: (synced.append(os.fstat(fd).st_ino), honest(fd))[1])
    await bits.download(scene.url, scene.path)
    assert scene.out.stat().st_ino in synced
