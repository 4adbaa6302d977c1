"""Files of a job over real sockets: what ranges look like on the wire, and that they are of one version whatever happens."""

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from email.utils import formatdate
from pathlib import Path

import pytest

import bits_async as bits
from bits_async import ErrorCode, FileRange
from bits_async.files.part import PartFile
from bits_async.jobs import transfer
from tests.peers import Fault, Hold, Origin, answer, redirect
from tests.waiting import until

SIZE = 600_000
OLD, NEW = os.urandom(SIZE), os.urandom(SIZE)
RANGES = [FileRange(300_000, 200_000), FileRange(10, 90), FileRange(100_000, 150_000), FileRange(599_000)]
ON_THE_WIRE = ["bytes=300000-499999", "bytes=10-99", "bytes=100000-249999", "bytes=599000-599999"]
STAMP = 1_700_000_000.0
HELD = 200_090 + 100_000 - (32 << 10)  # bytes in the file when the third answer stopped after 100,000, but for less than one write
ROOT = Path(__file__).parents[2]


def joined(body: bytes) -> bytes:
    return b"".join(body[each.initial_offset : each.end] for each in RANGES)


@pytest.fixture(autouse=True)
def small_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "WRITE_BATCH", 32 << 10)
    monkeypatch.setattr(transfer, "RECONNECT_DELAYS", (0.01,) * transfer.RECONNECTS)


@dataclass
class Scene:
    origin: Origin
    out: Path
    store: Path

    @property
    def url(self) -> str:
        return self.origin.url("/file")

    def manager(self) -> bits.BitsManager:
        return bits.BitsManager(store=self.store)

    async def job(self, manager: bits.BitsManager, ranges: list[FileRange] | None = None) -> bits.Job:
        job = await manager.create_job("files", priority=bits.JobPriority.FOREGROUND)
        await job.add_file_with_ranges(self.url, self.out / "file", RANGES if ranges is None else ranges)
        await job.resume()
        return job

    async def finish(self, job: bits.Job) -> bytes:
        await job.wait()
        (path,) = await job.complete()
        assert os.listdir(self.out) == ["file"]
        return path.read_bytes()

    @property
    def wire(self) -> list[str | None]:
        return [seen.range for seen in self.origin.requests]


@pytest.fixture
async def scene(memory_dir: Path) -> AsyncIterator[Scene]:
    out = memory_dir / "out"
    out.mkdir()
    async with Origin() as origin:
        origin.serve("/file", OLD, last_modified=STAMP)
        yield Scene(origin, out, memory_dir / "queue.db")


async def failed(job: bits.Job) -> bits.BitsError:
    with pytest.raises(bits.BitsError) as caught:
        await job.wait()
    return caught.value


# -- ranges on the wire ---------------------------------------------------------------------------------------------------------------


async def test_each_range_is_one_request_on_one_connection_and_all_but_the_first_name_the_version(scene):
    async with scene.manager() as manager:
        assert await scene.finish(await scene.job(manager)) == joined(OLD)
    assert scene.wire == ON_THE_WIRE
    assert [seen.header("If-Range") for seen in scene.origin.requests] == [None, '"v1"', '"v1"', '"v1"']
    assert [seen.status for seen in scene.origin.requests] == [206] * 4
    assert scene.origin.connections == 1
    assert (scene.out / "file").stat().st_mtime == STAMP


async def test_ranges_behind_a_redirect(scene):
    scene.origin.always("/old", redirect(scene.url))
    async with scene.manager() as manager:
        job = await manager.create_job("redirected")
        await job.add_file_with_ranges(scene.origin.url("/old"), scene.out / "file", RANGES)
        await job.resume()
        assert await scene.finish(job) == joined(OLD)


async def test_last_modified_alone_proves_the_ranges_to_be_of_one_version(scene):
    scene.origin.serve("/file", OLD, etag=None, last_modified=STAMP)
    async with scene.manager() as manager:
        assert await scene.finish(await scene.job(manager)) == joined(OLD)
    assert scene.origin.requests[-1].header("If-Range") == formatdate(STAMP, usegmt=True)


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (Fault(ignore_range=True), ErrorCode.BG_E_INSUFFICIENT_RANGE_SUPPORT),
        (Fault(no_validator=True), ErrorCode.BG_E_INSUFFICIENT_RANGE_SUPPORT),
        (Fault(headers=(("Content-Type", "multipart/byteranges; boundary=x"),)), ErrorCode.BG_E_INVALID_SERVER_RESPONSE),
        (Fault(content_range="bytes 0-499999/600000"), ErrorCode.BG_E_INVALID_SERVER_RESPONSE),  # joined with what lies before it
        (Fault(content_range="bytes 300000-499999/*"), ErrorCode.BG_E_MISSING_FILE_SIZE),
        (Fault(content_range=""), ErrorCode.BG_E_INVALID_SERVER_RESPONSE),
        (answer(416), ErrorCode.BG_E_INVALID_RANGE),
        (answer(412), 0x80190000 | 412),
    ],
    ids=["no ranges", "no validator", "multipart", "another range", "size untold", "range untold", "416", "412"],
)
async def test_a_server_that_does_not_serve_ranges_as_it_should_stops_the_job(scene, fault, code):
    scene.origin.always("/file", fault)
    async with scene.manager() as manager:
        error = await failed(await scene.job(manager))
    assert (error.code, type(error)) == (code, bits.RemoteFileError)
    assert len(scene.origin.requests) <= 2
    assert b"".join(each.read_bytes() for each in scene.out.iterdir()) in (b"", OLD[300_000:500_000])


async def test_a_server_that_ignores_ranges_half_way_stops_the_job_and_a_resume_goes_on(scene):
    async with scene.manager() as manager:
        ways = 3  # If-Range with the ETag, with the date, and none
        scene.origin.fault("/file", Fault(cut_after=150_000), *[Fault(ignore_range=True)] * ways)
        job = await scene.job(manager)
        assert (await failed(job)).code == ErrorCode.BG_E_INSUFFICIENT_RANGE_SUPPORT
        await job.resume()
        assert await scene.finish(job) == joined(OLD)
    assert scene.wire == [ON_THE_WIRE[0], *["bytes=450000-499999"] * (ways + 1), *ON_THE_WIRE[1:]]


async def test_a_range_beyond_the_end_stops_the_job(scene):
    async with scene.manager() as manager:
        error = await failed(await scene.job(manager, [FileRange(0, 10), FileRange(SIZE)]))
        assert error.code == ErrorCode.BG_E_INVALID_RANGE
        assert os.listdir(scene.out) == []


# -- one version ----------------------------------------------------------------------------------------------------------------------


async def reopened(scene: Scene, change: Callable[[], None]) -> bytes:
    scene.origin.fault("/file", Fault(), Fault(), Fault(cut_after=100_000, then=change))
    async with scene.manager() as manager:
        return await scene.finish(await scene.job(manager))


async def between_two_requests(scene: Scene, change: Callable[[], None]) -> bytes:
    scene.origin.fault("/file", Fault(), Fault(then=change))
    async with scene.manager() as manager:
        return await scene.finish(await scene.job(manager))


async def resumed(scene: Scene, change: Callable[[], None]) -> bytes:
    hold = Hold(after=100_000)
    scene.origin.fault("/file", Fault(), Fault(), Fault(hold=hold))
    async with scene.manager() as manager:
        job = await scene.job(manager)
        await until(lambda: job.progress.bytes_transferred > HELD)
        await job.suspend()
        change()
        await job.resume()
        return await scene.finish(job)


async def opened_again(scene: Scene, change: Callable[[], None]) -> bytes:
    hold = Hold(after=100_000)
    scene.origin.fault("/file", Fault(), Fault(), Fault(hold=hold))
    async with scene.manager() as manager:
        job = await scene.job(manager)
        await until(lambda: job.progress.bytes_transferred > HELD)
    change()
    async with scene.manager() as manager:
        return await scene.finish(await manager.get_job(job.id))


WAYS = [reopened, between_two_requests, resumed, opened_again]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "fault",
    [Fault(), Fault(ignore_if_range=True)],
    ids=["If-Range honoured", "If-Range ignored"],
)
@pytest.mark.parametrize(
    "version",
    [{"etag": '"v2"'}, {"etag": None, "last_modified": STAMP + 1}, {"etag": '"v2"', "last_modified": STAMP}],
    ids=["ETag", "Last-Modified", "ETag, the same time"],
)
async def test_a_file_that_changes_under_its_ranges_arrives_wholly_in_its_new_version(scene, way, fault, version):
    scene.origin.serve("/file", OLD, etag='"v1"' if version["etag"] else None, last_modified=STAMP)

    def change() -> None:
        scene.origin.serve("/file", NEW, **version)
        scene.origin.always("/file", fault)

    assert await way(scene, change) == joined(NEW)


@pytest.mark.parametrize("way", WAYS)
async def test_a_file_that_did_not_change_is_fetched_once(scene, way):
    assert await way(scene, lambda: None) == joined(OLD)
    sent = sum(seen.sent for seen in scene.origin.requests)
    assert sent <= len(joined(OLD)) + 64 * 1024, "only what was on its way when it stopped is fetched again"


KILLED = """
import asyncio, sys
import bits_async as bits
from bits_async import FileRange
from bits_async.jobs import transfer
transfer.WRITE_BATCH = 16 << 10

async def main(url, path, store):
    async with bits.BitsManager(store=store) as manager:
        job = await manager.create_job("killed", priority=bits.JobPriority.FOREGROUND)
        await job.add_file_with_ranges(url, path, [FileRange(*each) for each in {ranges}])
        await job.resume()
        await job.wait()

asyncio.run(main(*sys.argv[1:]))
"""


async def test_after_kill_9_in_the_third_range_nothing_is_fetched_twice(scene):
    hold = Hold(after=100_000)
    scene.origin.fault("/file", Fault(), Fault(), Fault(hold=hold))
    script = KILLED.replace("{ranges}", repr([(each.initial_offset, each.length) for each in RANGES]))
    command = [sys.executable, "-c", script, scene.url, str(scene.out / "file"), str(scene.store)]
    child = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"})
    try:
        await hold.reached.wait()
        await until(lambda: next(scene.out.iterdir()).stat().st_size > 220_090)
    finally:
        child.send_signal(signal.SIGKILL)
        await until(lambda: child.poll() is not None)
    size = next(scene.out.iterdir()).stat().st_size
    async with scene.manager() as manager:
        (job,) = [each async for each in manager.enum_jobs()]
        assert await scene.finish(job) == joined(OLD)
    assert scene.wire[3:] == [f"bytes={100_000 + size - 200_090}-249999", ON_THE_WIRE[3]]


MIB = 1 << 20
LARGE = os.urandom(14 * MIB)


@pytest.fixture
def moved_by_threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where in the local file a thread began to move a body."""
    begun: list[int] = []
    honest = PartFile.receive

    async def receive(self, detached, piece, *more, **options):
        begun.append(piece.written)
        return await honest(self, detached, piece, *more, **options)

    monkeypatch.setattr(PartFile, "receive", receive)
    return begun


async def test_large_ranges_are_moved_by_threads_to_where_they_belong(scene, moved_by_threads):
    ranges = [FileRange(8 * MIB, 5 * MIB), FileRange(100, 6 * MIB), FileRange(7 * MIB, 10)]
    scene.origin.serve("/file", LARGE)
    scene.origin.fault("/file", Fault(cut_after=MIB // 2))
    async with scene.manager() as manager:
        found = await scene.finish(await scene.job(manager, ranges))
    assert found == b"".join(LARGE[each.initial_offset : each.end] for each in ranges)
    assert moved_by_threads[-1] == 5 * MIB


async def test_large_ranges_on_demand_are_moved_by_threads_to_where_they_belong(scene, moved_by_threads):
    scene.origin.serve("/file", LARGE)
    async with scene.manager() as manager:
        job = await manager.create_job("on demand")
        await job.set_on_demand_mode(True)
        file = await job.add_file(scene.url, scene.out / "file")
        await file.request_file_ranges([FileRange(8 * MIB, 5 * MIB)])
        await job.resume()
        await job.wait()
        assert file.filled_file_ranges == (FileRange(8 * MIB, 5 * MIB),)
        await file.request_file_ranges([FileRange(0)])
        await job.resume()
        assert await scene.finish(job) == LARGE
    assert moved_by_threads == [8 * MIB, 0]


# -- content whose size is not known --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [Fault(chunked=True), Fault(close_delimited=True, no_validator=True)], ids=["chunked", "to the end"])
async def test_dynamic_content_needs_neither_a_size_nor_a_validator(scene, shape):
    scene.origin.always("/file", shape)
    async with scene.manager() as manager:
        job = await manager.create_job("dynamic", priority=bits.JobPriority.FOREGROUND)
        await job.set_dynamic_content(True)
        await job.add_file(scene.url, scene.out / "file")
        scene.origin.fault("/file", replace(shape, chunked=True, close_delimited=False, cut_after=200_000, reset=True))
        await job.resume()
        assert await scene.finish(job) == OLD
    assert scene.wire == [None, None]


async def test_a_file_whose_end_only_the_connection_tells_is_refused_unless_it_is_dynamic(scene):
    scene.origin.always("/file", Fault(close_delimited=True))
    async with scene.manager() as manager:
        job = await manager.create_job("not dynamic")
        await job.add_file(scene.url, scene.out / "file")
        await job.resume()
        assert (await failed(job)).code == ErrorCode.BG_E_MISSING_FILE_SIZE


@pytest.mark.parametrize("chunked", [False, True], ids=["announced", "not announced"])
async def test_a_file_that_is_larger_than_the_job_may_be_is_not_written_beyond_that(scene, chunked):
    scene.origin.always("/file", Fault(chunked=chunked))
    async with scene.manager() as manager:
        job = await manager.create_job("small")
        await job.set_maximum_download_size(250_000)
        await job.add_file(scene.url, scene.out / "file")
        await job.resume()
        error = await failed(job)
        assert (error.code, error.transient) == (ErrorCode.BG_E_MAX_DOWNLOAD_SIZE_LIMIT_REACHED, False)
        assert sum(each.stat().st_size for each in scene.out.iterdir()) <= (250_000 if chunked else 0)
        await job.cancel()
        assert os.listdir(scene.out) == []


# -- on demand ------------------------------------------------------------------------------------------------------------------------


async def test_on_demand_only_what_is_asked_for_is_on_the_wire(scene):
    async with scene.manager() as manager:
        job = await manager.create_job("on demand")
        await job.set_on_demand_mode(True)
        file = await job.add_file(scene.url, scene.out / "file")
        await file.request_file_ranges([FileRange(400_000, 100_000), FileRange(10, 90)])
        await job.resume()
        await job.wait()
        assert scene.wire == ["bytes=10-99", "bytes=400000-499999"]
        there = file.temporary_name.read_bytes()
        assert (there[10:100], there[400_000:]) == (OLD[10:100], OLD[400_000:500_000])
        await file.request_file_ranges([FileRange(0)])
        await file.update_download_position(450_000)
        await job.resume()
        assert await scene.finish(job) == OLD
    assert scene.wire[2:] == ["bytes=500000-599999", "bytes=0-9", "bytes=100-399999"]
    assert {seen.header("If-Range") for seen in scene.origin.requests[1:]} == {'"v1"'}
    assert sum(seen.sent for seen in scene.origin.requests) == SIZE
    assert scene.origin.connections == 1


@pytest.mark.parametrize("change", [False, True])
async def test_what_was_fetched_on_demand_is_of_one_version_after_a_cut_and_a_restart(scene, change):
    async with scene.manager() as manager:
        job = await manager.create_job("on demand")
        await job.set_on_demand_mode(True)
        file = await job.add_file(scene.url, scene.out / "file")
        await file.request_file_ranges([FileRange(300_000, 100_000), FileRange(0, 100_000)])
        hold = Hold(after=50_000)
        scene.origin.fault("/file", Fault(cut_after=60_000), Fault(), Fault(hold=hold))
        await job.resume()
        await hold.reached.wait()
        await until(lambda: job.progress.bytes_transferred > 130_000)
    if change:
        scene.origin.serve("/file", NEW, etag='"v2"')
    async with scene.manager() as manager:
        job = await manager.get_job(job.id)
        await job.files[0].request_file_ranges([FileRange(0)])
        await job.wait()
        assert await scene.finish(job) == (NEW if change else OLD)


async def test_a_file_without_a_length_that_is_asked_for_on_demand_is_whole_when_its_body_ends(scene):
    scene.origin.always("/file", Fault(chunked=True))
    async with scene.manager() as manager:
        job = await manager.create_job("on demand")
        await job.set_on_demand_mode(True)
        file = await job.add_file(scene.url, scene.out / "file")
        await file.request_file_ranges([FileRange(0)])
        await job.resume()
        assert await scene.finish(job) == OLD
    assert scene.wire == [None]


async def test_a_range_to_the_end_that_is_all_of_a_file_without_a_length(scene):
    scene.origin.always("/file", Fault(chunked=True))
    async with scene.manager() as manager:
        assert await scene.finish(await scene.job(manager, [FileRange(0)])) == OLD


async def test_what_comes_slowly_but_steadily_is_written_all_the_same(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a slow line shows no progress for minutes, and a kill takes all that came meanwhile."""
    monkeypatch.setattr(transfer, "WRITE_BATCH", SIZE)
    monkeypatch.setattr(transfer, "WRITE_WITHIN", 0.1)
    scene.origin.fault("/file", Fault(rate=20_000))
    async with scene.manager() as manager:
        job = await manager.create_job("slow", priority=bits.JobPriority.FOREGROUND)
        await job.add_file(scene.url, scene.out / "file")
        await job.resume()
        await until(lambda: job.progress.bytes_transferred)
        assert job.progress.bytes_transferred < SIZE
        await job.cancel()
