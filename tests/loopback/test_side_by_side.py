"""Several ranges of one file, and several files of one job, at once: each on a connection of its own, all for one identity."""

import asyncio
import hashlib
import os
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import bits_async as bits
from bits_async.jobs import transfer
from bits_async.transport import lane
from tests.peers import USERS, Authority, Door, Fault, Hold, Origin, answer
from tests.process import downloader
from tests.waiting import until

SIZE = 4 << 20
SEGMENT = 256 << 10
OLD, NEW = os.urandom(SIZE), os.urandom(SIZE)
SMALL = [os.urandom(20_000 + number) for number in range(7)]


@dataclass
class Scene:
    origin: Origin
    directory: Path
    context: ssl.SSLContext

    def manager(self, **options: Any) -> bits.BitsManager:
        return bits.BitsManager(store=self.directory / "queue.db", ssl=self.context, **options)

    async def job(self, manager: bits.BitsManager, segments: int = 4, sha256: str | None = None) -> bits.Job:
        """One large file."""
        job = await manager.create_job("side by side", priority=bits.JobPriority.FOREGROUND)
        await job.set_segments(segments)
        await job.add_file(self.origin.url("/file"), self.directory / "file", sha256=sha256)
        await job.resume()
        return job

    async def small(self, manager: bits.BitsManager, at_once: int = 3) -> bits.Job:
        """Many small files."""
        job = await manager.create_job("side by side", priority=bits.JobPriority.FOREGROUND)
        await job.set_files_at_once(at_once)
        for number, body in enumerate(SMALL):
            await job.add_file(self.origin.serve(f"/{number}", body), self.directory / f"file{number}")
        await job.resume()
        return job

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """What was asked for, as [start, end)."""
        found = [(seen.range or "").removeprefix("bytes=").partition("-") for seen in self.origin.requests]
        return [(int(first or 0), int(last) + 1 if last else SIZE) for first, _, last in found]

    @property
    def connections(self) -> set[int]:
        return {seen.connection for seen in self.origin.requests}


@pytest.fixture
async def scene(memory_dir: Path, monkeypatch: pytest.MonkeyPatch, authority: Authority) -> AsyncIterator[Scene]:
    monkeypatch.setattr(transfer, "SEGMENT", SEGMENT)
    monkeypatch.setattr(lane, "DETACH_FROM", 64 << 10)
    monkeypatch.setattr(transfer, "RECONNECT_DELAYS", (0.01,) * transfer.RECONNECTS)
    async with Origin() as origin:
        origin.serve("/file", OLD)
        yield Scene(origin, memory_dir, authority.client())


async def finish(job: bits.Job, body: bytes = OLD) -> None:
    await job.wait()
    (path,) = await job.complete()
    assert path.read_bytes() == body


def once(ranges: list[tuple[int, int]], already: int = 0) -> bool:
    """Whether these ranges and so many other bytes are the file, no byte of it twice."""
    return already + sum(end - start for start, end in set(ranges)) == SIZE and len(set(ranges)) == len(ranges)


# -- segments -------------------------------------------------------------------------------------------------------------------------


async def test_a_large_file_comes_in_ranges_each_on_its_own_connection(no_leaks: None, scene: Scene) -> None:
    hold = Hold(after=1000)
    scene.origin.fault("/file", Fault(), *[Fault(hold=hold)] * 4)
    async with scene.manager() as manager:
        job = await scene.job(manager)
        await until(lambda: len(scene.origin.requests) == 5)  # one that asks for the version, and four at once
        hold.release()
        await finish(job)
    assert once(scene.ranges)
    assert len(scene.connections) == 4
    assert {seen.header("If-Range") for seen in scene.origin.requests} == {None, '"v1"'}


async def test_a_file_in_one_stream_is_one_request(scene: Scene) -> None:
    async with scene.manager() as manager:
        await finish(await scene.job(manager, segments=1))
    assert [seen.range for seen in scene.origin.requests] == [None]


async def test_never_more_connections_than_a_host_may_have(scene: Scene) -> None:
    most = 0
    hold = Hold(after=1000)

    def count() -> bool:
        nonlocal most
        most = max(most, scene.origin.open_connections)
        return len(scene.origin.requests) == 3

    scene.origin.fault("/file", Fault(), *[Fault(hold=hold)] * 2)
    async with scene.manager(limits=bits.Limits(connections_per_host=2)) as manager:
        job = await scene.job(manager, segments=8)
        await until(count)
        hold.release()
        await finish(job)
    assert most == len(scene.connections) == 2
    assert once(scene.ranges)


async def test_a_digest_is_checked_over_the_whole_file(scene: Scene) -> None:
    async with scene.manager() as manager:
        await finish(await scene.job(manager, sha256=hashlib.sha256(OLD).hexdigest()))
        wrong = await scene.job(manager, sha256=hashlib.sha256(NEW).hexdigest())
        with pytest.raises(bits.BitsError, match="sha256"):
            await wrong.wait()


async def test_a_suspended_job_goes_on_in_every_range_and_fetches_nothing_twice(no_leaks: None, scene: Scene) -> None:
    hold = Hold(after=SEGMENT)
    scene.origin.fault("/file", Fault(), *[Fault(hold=hold)] * 4)
    async with scene.manager() as manager:
        job = await scene.job(manager)
        await until(lambda: job.progress.bytes_transferred == 5 * SEGMENT)
        await job.suspend()
        hold.release()
        before = len(scene.origin.requests)
        await job.resume()
        await finish(job)
    assert once(scene.ranges[before:], 5 * SEGMENT)
    assert len(scene.origin.requests) > before + 3


async def test_the_next_manager_goes_on_in_every_range_also_in_one_stream(no_leaks: None, scene: Scene) -> None:
    hold = Hold(after=SEGMENT)
    scene.origin.fault("/file", Fault(), *[Fault(hold=hold)] * 4)
    async with scene.manager() as manager:
        job = await scene.job(manager)
        await until(lambda: job.progress.bytes_transferred == 5 * SEGMENT)
        await job.set_segments(1)
    hold.release()
    before = len(scene.origin.requests)
    async with scene.manager() as manager:
        (job,) = [each async for each in manager.enum_jobs()]
        await finish(job)
    assert once(scene.ranges[before:], 5 * SEGMENT)
    assert len({seen.connection for seen in scene.origin.requests[before:]}) == 1


async def test_a_range_that_meets_another_version_restarts_the_whole_file(no_leaks: None, scene: Scene) -> None:
    hold = Hold(after=SEGMENT)
    scene.origin.fault("/file", Fault(), *[Fault(hold=hold)] * 3, Fault(then=lambda: scene.origin.serve("/file", NEW, etag='"v2"')))
    scene.origin.fault("/file", Fault(cut_after=1000))
    async with scene.manager() as manager:
        job = await scene.job(manager)
        await until(lambda: len(scene.origin.requests) == 5)
        scene.origin.drop_connections()
        hold.release()
        await finish(job, NEW)


BREAKING_OFF = {"cut": Fault(cut_after=SEGMENT // 2), "reset": Fault(cut_after=0, reset=True), "503": answer(503)}
WITHOUT_RANGES = {"ignored": Fault(ignore_range=True), "no validator": Fault(no_validator=True), "chunks": Fault(chunked=True)}


@pytest.mark.parametrize("break_off", BREAKING_OFF.values(), ids=BREAKING_OFF.keys())
async def test_where_several_connections_are_too_many_fewer_are_tried(scene: Scene, break_off: Fault) -> None:
    scene.origin.fault("/file", Fault(), Fault(), break_off, break_off)
    async with scene.manager() as manager:
        await finish(await scene.job(manager))


@pytest.mark.parametrize("ignored", WITHOUT_RANGES.values(), ids=WITHOUT_RANGES.keys())
async def test_a_server_that_serves_no_ranges_of_one_version_sends_one_stream(scene: Scene, ignored: Fault) -> None:
    scene.origin.always("/file", ignored)
    async with scene.manager() as manager:
        await finish(await scene.job(manager))


async def test_a_server_that_stops_serving_ranges_sends_the_file_anew_in_one_stream(scene: Scene) -> None:
    scene.origin.fault("/file", Fault(), *[Fault(ignore_range=True)] * 4)
    async with scene.manager() as manager:
        await finish(await scene.job(manager))


async def test_a_small_and_an_empty_file_are_one_request(scene: Scene) -> None:
    for body in (OLD[:SEGMENT], b""):
        scene.origin.serve("/file", body)
        before = len(scene.origin.requests)
        async with scene.manager() as manager:
            await finish(await scene.job(manager), body)
        assert len(scene.origin.requests) == before + 1


async def test_ranges_over_tls_with_a_login_on_each_connection(scene: Scene, authority: Authority) -> None:
    async with Origin(tls=authority.server, door=Door("NTLM")) as origin:
        scene.origin = origin
        origin.serve("/file", OLD)
        async with scene.manager() as manager:
            job = await manager.create_job("side by side", priority=bits.JobPriority.FOREGROUND)
            await job.set_segments(3)
            await job.set_credentials(bits.AuthTarget.SERVER, bits.AuthScheme.NTLM, r"LAB\alice", USERS[r"LAB\alice"])
            await job.add_file(origin.url("/file"), scene.directory / "file")
            await job.resume()
            await finish(job)
    assert {seen.user for seen in origin.passed} == {r"LAB\alice"}
    assert len({seen.connection for seen in origin.passed}) == 3


async def test_killed_while_a_later_range_is_ahead_of_an_earlier_one_the_next_run_takes_no_hole_for_bytes(scene: Scene) -> None:
    """The part file is as long as the whole file then, in the same boot."""
    hold, last = Hold(after=10), Hold(after=SEGMENT)
    scene.origin.fault("/file", Fault(), *[Fault(hold=hold)] * 3, Fault(hold=last))
    order = {"store": str(scene.directory / "queue.db"), "queue": True, "segments": 4, "segment": SEGMENT}
    child = downloader.start(scene.origin.url("/file"), scene.directory / "file", **order)
    try:
        await until(lambda: any(each.stat().st_size > SIZE * 3 // 4 for each in scene.directory.glob(".file*")), deadline=30)
    finally:
        child.kill()
        await asyncio.get_running_loop().run_in_executor(None, child.communicate)
    hold.release()
    last.release()
    async with scene.manager() as manager:
        (job,) = [each async for each in manager.enum_jobs()]
        await finish(job)


# -- files ----------------------------------------------------------------------------------------------------------------------------


async def test_small_files_come_over_as_many_connections_as_asked_for(no_leaks: None, scene: Scene) -> None:
    hold = Hold(after=1000)
    for number in range(3):
        scene.origin.fault(f"/{number}", Fault(hold=hold))
    async with scene.manager() as manager:
        job = await scene.small(manager)
        await until(lambda: len(scene.origin.requests) == 3)
        hold.release()
        await job.wait()
        paths = await job.complete()
    assert [path.read_bytes() for path in paths] == SMALL
    assert len(scene.origin.requests) == len(SMALL)
    assert len(scene.connections) == 3


async def test_files_at_once_do_not_have_more_connections_than_a_host_may_have(scene: Scene) -> None:
    async with scene.manager(limits=bits.Limits(connections_per_host=2)) as manager:
        job = await scene.small(manager, at_once=7)
        await job.wait()
    assert len(scene.connections) <= 2


async def test_a_file_that_fails_stops_the_others_and_what_they_have_is_kept(no_leaks: None, scene: Scene) -> None:
    hold, failing = Hold(after=10_000), Hold()
    for number in (0, 1):
        scene.origin.fault(f"/{number}", Fault(hold=hold))
    scene.origin.fault("/2", Fault(status=404, hold=failing))
    async with scene.manager() as manager:
        job = await scene.small(manager)
        await until(lambda: job.progress.bytes_transferred == 20_000)
        failing.release()
        with pytest.raises(bits.BitsError) as caught:
            await job.wait()
        assert caught.value.http_status == 404
        assert job.progress.bytes_transferred == 20_000
        hold.release()
        before = len(scene.origin.requests)
        await job.resume()
        await job.wait()
        assert [path.read_bytes() for path in await job.complete()] == SMALL
    assert {"bytes=10000-"} == {seen.range for seen in scene.origin.requests[before:] if seen.target in ("/0", "/1")}


@pytest.mark.parametrize("at_once", [1, 3])
async def test_a_connection_that_breaks_before_a_files_first_byte_does_not_stop_a_job_whose_other_files_come(
    scene: Scene, at_once: int
) -> None:
    for number in (3, 5):
        scene.origin.fault(f"/{number}", Fault(cut_after=0))
    async with scene.manager() as manager:
        job = await scene.small(manager, at_once)
        await job.wait(transient=True)
        await job.complete()
    assert [(scene.directory / f"file{number}").read_bytes() for number in range(len(SMALL))] == SMALL


async def test_a_file_that_never_comes_ends_the_attempt_though_others_came(scene: Scene) -> None:
    scene.origin.always("/3", Fault(cut_after=0))
    async with scene.manager() as manager:
        job = await scene.small(manager, 1)
        with pytest.raises(bits.NetworkError):
            await job.wait(transient=True)
        assert [seen.target for seen in scene.origin.requests].count("/3") == 2


async def test_connections_that_break_together_are_one_trouble(scene: Scene) -> None:
    assert len(SMALL) > transfer.RECONNECTS
    for number in range(len(SMALL)):
        scene.origin.fault(f"/{number}", Fault(cut_after=100))
    async with scene.manager() as manager:
        job = await scene.small(manager, len(SMALL))
        await job.wait(transient=True)
        await job.complete()
    assert [(scene.directory / f"file{number}").read_bytes() for number in range(len(SMALL))] == SMALL


async def test_suspended_files_go_on_where_they_were(no_leaks: None, scene: Scene) -> None:
    hold = Hold(after=10_000)
    for number in range(3):
        scene.origin.fault(f"/{number}", Fault(hold=hold))
    async with scene.manager() as manager:
        job = await scene.small(manager)
        await until(lambda: job.progress.bytes_transferred == 30_000)
        await job.suspend()
        hold.release()
        await job.resume()
        await job.wait()
        assert [path.read_bytes() for path in await job.complete()] == SMALL
    assert [seen.range for seen in scene.origin.requests].count("bytes=10000-") == 3


# -- asking for it ------------------------------------------------------------------------------------------------------------------------


async def test_one_call_fetches_a_large_file_in_ranges(monkeypatch: pytest.MonkeyPatch, scene: Scene) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(scene.directory / "state"))
    path = await bits.download(scene.origin.url("/file"), scene.directory / "file", segments=4)
    assert path.read_bytes() == OLD
    assert once(scene.ranges)
    assert len(scene.origin.requests) == 5


async def test_a_download_goes_on_in_as_many_ranges_as_the_last_call_says(scene: Scene) -> None:
    hold = Hold(after=SEGMENT)
    scene.origin.fault("/file", Fault(hold=hold))
    async with scene.manager() as manager:
        first = asyncio.ensure_future(manager.download(scene.origin.url("/file"), scene.directory / "file"))
        await until(lambda: sum(each.stat().st_size for each in scene.directory.glob(".file*")) >= SEGMENT)
        first.cancel()
        await asyncio.wait({first})
        hold.release()
        path = await manager.download(scene.origin.url("/file"), scene.directory / "file", segments=3)
    assert path.read_bytes() == OLD
    assert len(scene.origin.requests) == 4
    assert once(scene.ranges[1:], already=SEGMENT)


async def test_a_job_is_made_with_as_many_connections_as_it_shall_have(scene: Scene) -> None:
    async with scene.manager() as manager:
        job = await manager.create_job("x", segments=4, files_at_once=8)
        assert (job.segments, job.files_at_once) == (4, 8)
    async with scene.manager(run=False) as manager:
        (job,) = [each async for each in manager.enum_jobs()]
        assert (job.segments, job.files_at_once) == (4, 8)


@pytest.mark.parametrize("count", [0, 65, True, 1.5])
async def test_only_a_number_of_connections_can_be_asked_for(scene: Scene, count: Any) -> None:
    async with scene.manager() as manager:
        job = await manager.create_job("x")
        asked = [
            lambda: job.set_segments(count),
            lambda: job.set_files_at_once(count),
            lambda: manager.create_job("y", segments=count),
            lambda: manager.create_job("y", files_at_once=count),
            lambda: manager.download(scene.origin.url("/file"), scene.directory / "file", segments=count),
            lambda: bits.download(scene.origin.url("/file"), scene.directory / "file", segments=count),
        ]
        for ask in asked:
            with pytest.raises(bits.InvalidArgument, match="takes a whole number from 1 to 64"):
                await ask()
        assert (job.segments, job.files_at_once) == (1, 1)
        assert [each.display_name async for each in manager.enum_jobs()] == ["x"]
