"""One promise over all ways that bytes come into a file: a thread that reads the socket (splice, copy, TLS), or chunks from the loop;
in one stream, in several ranges of one file at once, or several files at once.

A way is a kind of peer and a kind of job; what is asked of it is the same for all.
"""

import asyncio
import hashlib
import os
import ssl
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvloop

import bits_async as bits
from bits_async.files.part import PartFile
from bits_async.identity import native
from bits_async.jobs import transfer
from bits_async.limits import Bucket
from bits_async.transport import lane
from tests.peers import Authority, Fault, Hold, Origin, Proxy
from tests.waiting import DEADLINE, until

SIZE = 3 << 20
HALF = 1 << 20  # the rest is more than what aiohttp would read with the head
SEGMENT = 1 << 19  # two of them fit into what is left behind the first
OLD, NEW = os.urandom(SIZE), os.urandom(SIZE)


@dataclass(frozen=True)
class Way:
    """How the bytes come. `by`: who moves them, "splice" and "copy" in a thread of the file token, or "chunks"."""

    by: str
    tls: bool = False
    proxy: bool = False
    proxy_tls: bool = False
    chunked: bool = False
    digest: bool = False
    splice: bool = True
    segments: int = 1
    at_once: int = 1

    @property
    def connections(self) -> int:
        return max(self.segments, self.at_once)

    @property
    def requests(self) -> int:
        """For one file."""
        return 1 if self.segments == 1 else 1 + self.segments  # the first one asks for the version, too

    @property
    def held(self) -> int:
        """Bytes that come if each connection carries `HALF` of its answer only."""
        return HALF * self.connections + (0 if self.segments == 1 else SEGMENT)


WAYS = {
    "splice": Way("splice"),
    "copy where nothing can be spliced": Way("copy", splice=False),
    "copy for a digest": Way("copy", digest=True),
    "TLS": Way("copy", tls=True),
    "TLS for a digest": Way("copy", tls=True, digest=True),
    "TLS through a proxy": Way("copy", tls=True, proxy=True),
    "TLS in the TLS of a proxy": Way("copy", tls=True, proxy=True, proxy_tls=True),
    "a forwarding proxy": Way("splice", proxy=True),
    "chunks": Way("chunks", chunked=True),
    "chunks over TLS": Way("chunks", tls=True, chunked=True),
    "segments": Way("splice", segments=2),
    "segments over TLS": Way("copy", tls=True, segments=2),
    "files at once": Way("splice", at_once=2),
    "files at once in chunks": Way("chunks", chunked=True, at_once=2),
}


@dataclass
class Scene:
    way: Way
    origin: Origin
    proxy: Proxy | None
    directory: Path
    context: ssl.SSLContext
    moved: list[str] = field(default_factory=list)  # who moved something
    written: dict[Path, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))  # [start, end) of each write
    paid: int = 0  # bytes that buckets with a limit were asked for

    def manager(self, **options: Any) -> bits.BitsManager:
        return bits.BitsManager(store=self.directory / "queue.db", ssl=self.context, **options)

    def fault(self, **more: Any) -> None:
        """Of the next answer on each connection; chunks stay chunks."""
        if self.way.segments > 1:
            self.origin.fault("/file", Fault())
        self.origin.fault("/file", *[Fault(chunked=self.way.chunked, **more)] * self.way.connections)

    async def job(
        self,
        manager: bits.BitsManager,
        files: int | None = None,
        body: bytes = OLD,
        priority: bits.JobPriority = bits.JobPriority.FOREGROUND,
        limit: float | None = None,
    ) -> bits.Job:
        """As many files as come at once, if the number does not matter."""
        way = self.way
        job = await manager.create_job("by one way", priority=priority, segments=way.segments, files_at_once=way.at_once)
        digest = hashlib.sha256(body).hexdigest() if way.digest else None
        for number in range(way.at_once if files is None else files):
            await job.add_file(self.origin.url("/file"), self.path(number), sha256=digest)
        await job.set_maximum_bandwidth(limit)
        proxy = bits.ProxySettings.no_proxy() if self.proxy is None else bits.ProxySettings.override(self.proxy.url)
        await job.set_proxy_settings(proxy)
        await job.resume()
        return job

    def path(self, number: int = 0) -> Path:
        return self.directory / f"file{number}"

    def note(self, who: str, path: Path, offset: int, count: int) -> None:
        if path.name != "urgent":
            self.moved.append(who)
            self.written[path].append((offset, offset + count))

    @property
    def arrived(self) -> int:
        """Bytes in part files."""
        return sum(end - start for writes in self.written.values() for start, end in writes)

    @property
    def starts(self) -> list[int]:
        """Where each answer began."""
        return [int((seen.range or "bytes=0-").removeprefix("bytes=").partition("-")[0]) for seen in self.origin.requests]

    def check_nothing_came_twice(self) -> None:
        for writes in self.written.values():
            position = 0
            for start, end in sorted(writes):
                assert start == position, f"written: {sorted(writes)}"
                position = end
            assert position == SIZE
        if self.way.connections == 1:
            assert self.starts == [0, HALF]  # nor was it asked for

    async def finish(self, job: bits.Job, body: bytes = OLD) -> None:
        await job.wait()
        for path in await job.complete():
            assert path.read_bytes() == body
        assert self.way.by in self.moved
        if self.way.segments == 1:  # the first of several answers is small: it may be there before anybody looks
            assert ("chunks" in self.moved) == (self.way.by == "chunks")
        assert ("splice" in self.moved) == (self.way.by == "splice")  # the first bytes, which came with the head, are copied


@asynccontextmanager
async def staged(way: Way, directory: Path, monkeypatch: pytest.MonkeyPatch, authority: Authority) -> AsyncIterator[Scene]:
    monkeypatch.setattr(lane, "DETACH_FROM", 64 << 10)
    monkeypatch.setattr(transfer, "SEGMENT", SEGMENT)
    monkeypatch.setattr(transfer, "RECONNECT_DELAYS", (0.01,) * transfer.RECONNECTS)
    if not way.splice:
        monkeypatch.setattr(native, "splicer", lambda: None)
    async with AsyncExitStack() as stack:
        origin = await stack.enter_async_context(Origin(tls=authority.server if way.tls else None))
        proxy = await stack.enter_async_context(Proxy(tls=authority.server if way.proxy_tls else None)) if way.proxy else None
        origin.serve("/file", OLD)
        if way.chunked:
            origin.always("/file", Fault(chunked=True))
        scene = Scene(way, origin, proxy, directory, authority.client())
        watch(scene, monkeypatch)
        yield scene


@pytest.fixture(params=WAYS.values(), ids=WAYS.keys())
async def scene(
    request: pytest.FixtureRequest, memory_dir: Path, monkeypatch: pytest.MonkeyPatch, authority: Authority
) -> AsyncIterator[Scene]:
    async with staged(request.param, memory_dir, monkeypatch, authority) as scene:
        yield scene


def watch(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Note who moves bytes."""
    splice, store, append, take = PartFile._splice, PartFile._store, PartFile.append, Bucket.take
    chunks: list[object] = []

    def spliced(self: PartFile, handles: Any, splicer: Any, source: int, offset: int, count: int) -> int:
        moved = splice(self, handles, splicer, source, offset, count)
        scene.note("splice", self.destination, offset, moved)
        return moved

    def stored(self: PartFile, handles: Any, offset: int, pieces: Any) -> None:
        store(self, handles, offset, pieces)
        scene.note("chunks" if chunks else "copy", self.destination, offset, sum(map(len, pieces)))

    def taken(self: Bucket, account: Any, count: int) -> float:
        scene.paid += 0 if self.rate is None else count
        return take(self, account, count)

    async def written(self: PartFile, *args: Any) -> None:
        chunks.append(None)
        try:
            await append(self, *args)
        finally:
            chunks.pop()

    monkeypatch.setattr(PartFile, "_splice", spliced)
    monkeypatch.setattr(PartFile, "_store", stored)
    monkeypatch.setattr(PartFile, "append", written)
    monkeypatch.setattr(Bucket, "take", taken)


async def test_files_arrive_whole_and_share_the_connections(no_leaks: None, scene: Scene) -> None:
    async with scene.manager() as manager:
        await scene.finish(await scene.job(manager, files=3))
    assert len({seen.connection for seen in scene.origin.requests}) == scene.way.connections
    assert len(scene.origin.requests) == 3 * scene.way.requests


async def test_a_suspended_job_keeps_what_has_arrived_and_goes_on_there(no_leaks: None, scene: Scene) -> None:
    hold = Hold(after=HALF)
    scene.fault(hold=hold)
    async with scene.manager() as manager:
        job = await scene.job(manager)
        await until(lambda: scene.arrived == scene.way.held)
        await job.suspend()
        assert job.progress.bytes_transferred == scene.arrived == scene.way.held
        hold.release()
        await job.resume()
        await scene.finish(job)
    scene.check_nothing_came_twice()


async def test_a_cancelled_job_stops_at_once_and_leaves_nothing(no_leaks: None, scene: Scene) -> None:
    hold = Hold(after=HALF)
    scene.fault(hold=hold)
    async with scene.manager() as manager:
        job = await scene.job(manager)
        await until(lambda: scene.arrived == scene.way.held)
        async with asyncio.timeout(DEADLINE):
            await job.cancel()
        assert not [each for each in scene.directory.iterdir() if "file" in each.name]
        hold.release()


async def test_a_job_that_gives_way_to_another_goes_on_where_it_stopped(scene: Scene) -> None:
    hold = Hold(after=HALF)
    scene.fault(hold=hold)
    async with scene.manager() as manager:
        job = await scene.job(manager, priority=bits.JobPriority.LOW)
        await until(lambda: scene.arrived == scene.way.held)
        urgent = await manager.create_job("urgent", priority=bits.JobPriority.HIGH)
        await urgent.add_file(scene.origin.serve("/urgent", b"now"), scene.directory / "urgent")
        await urgent.set_proxy_settings(job.proxy_settings)
        await urgent.resume()
        await urgent.wait()
        await urgent.complete()
        hold.release()
        await scene.finish(job)
    scene.origin.requests[:] = [seen for seen in scene.origin.requests if seen.target.endswith("/file")]
    scene.check_nothing_came_twice()


async def test_every_byte_is_paid_for_where_there_is_a_limit_of_speed(scene: Scene) -> None:
    async with scene.manager() as manager:
        await scene.finish(await scene.job(manager, limit=1e9))
    assert scene.paid == SIZE * scene.way.at_once


async def test_a_job_that_rests_for_its_limit_is_stopped_at_once_and_keeps_what_came(scene: Scene) -> None:
    async with scene.manager() as manager:
        job = await scene.job(manager, limit=100)
        await until(lambda: scene.paid)
        async with asyncio.timeout(DEADLINE):
            await job.suspend()
        assert 0 < job.progress.bytes_transferred == scene.arrived < SIZE
        await job.set_maximum_bandwidth(None)
        await job.resume()
        await scene.finish(job)


async def test_progress_is_told_while_the_bytes_come(scene: Scene) -> None:
    hold = Hold(after=HALF)
    scene.fault(hold=hold)
    async with scene.manager() as manager:
        job = await scene.job(manager)
        await until(lambda: job.progress.bytes_transferred == scene.way.held)
        assert job.progress.bytes_total == (None if scene.way.chunked else SIZE * scene.way.at_once)
        hold.release()
        await scene.finish(job)


async def test_a_connection_that_breaks_is_opened_again_and_nothing_is_fetched_twice(scene: Scene) -> None:
    scene.fault(cut_after=HALF)
    async with scene.manager() as manager:
        await scene.finish(await scene.job(manager))
    scene.check_nothing_came_twice()


async def test_a_server_that_falls_silent_is_given_up_and_what_came_is_kept(scene: Scene) -> None:
    hold = Hold(after=HALF)
    scene.fault(hold=hold)
    impatient = bits.Timeouts(idle=1.0)
    async with scene.manager(timeouts=impatient) as manager:
        job = await scene.job(manager)
        await until(lambda: scene.arrived == scene.way.held)
        object.__setattr__(impatient, "idle", 60.0)  # of the next connections: those are slow on a busy machine only
        await scene.finish(job)
    hold.release()
    scene.check_nothing_came_twice()


async def test_a_file_that_changed_meanwhile_arrives_wholly_in_its_new_version(scene: Scene) -> None:
    scene.fault(cut_after=HALF, then=lambda: scene.origin.serve("/file", NEW, etag='"v2"'))
    async with scene.manager() as manager:
        await scene.finish(await scene.job(manager, body=NEW), NEW)
    if scene.way.connections == 1:
        assert scene.starts == [0, HALF, 0] or scene.starts == [0, HALF]  # a 200 to the second request brings it at once


async def test_a_manager_that_closes_keeps_what_has_arrived_and_the_next_goes_on_there(scene: Scene) -> None:
    hold = Hold(after=HALF)
    scene.fault(hold=hold)
    async with scene.manager() as manager:
        await scene.job(manager)
        await until(lambda: scene.arrived == scene.way.held)
    hold.release()
    async with scene.manager() as manager:
        (job,) = [each async for each in manager.enum_jobs()]
        await scene.finish(job)
    scene.check_nothing_came_twice()


async def test_t25_a_credential_that_is_taken_away_cuts_the_connection_at_once(scene: Scene) -> None:
    hold = Hold(after=HALF)
    scene.fault(hold=hold)
    async with scene.manager() as manager:
        job = await scene.job(manager)
        await job.set_credentials(bits.AuthTarget.SERVER, bits.AuthScheme.DIGEST, "alice", "secret")
        await until(lambda: scene.arrived == scene.way.held)
        before = list(scene.origin.requests)
        await job.remove_credentials(bits.AuthTarget.SERVER, bits.AuthScheme.DIGEST)
        hold.release()
        await scene.finish(job)
    cut = {seen.connection for seen in before}
    assert len(cut) == scene.way.connections
    assert not cut & {seen.connection for seen in scene.origin.requests[len(before) :]}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_the_ways_are_the_same_on_uvloop(way: Way, memory_dir: Path, monkeypatch: pytest.MonkeyPatch, authority: Authority) -> None:
    """Nothing leans on asyncio's own transports."""

    async def run() -> None:
        assert isinstance(asyncio.get_running_loop(), uvloop.Loop)
        async with staged(way, memory_dir, monkeypatch, authority) as scene, scene.manager() as manager:
            hold = Hold(after=HALF)
            scene.fault(hold=hold)
            job = await scene.job(manager)
            await until(lambda: scene.arrived == way.held)
            await job.suspend()
            hold.release()
            await job.resume()
            await scene.finish(job)
            scene.check_nothing_came_twice()
            assert len({seen.connection for seen in scene.origin.requests}) == 2 * way.connections

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())
