"""One promise over all ways that bytes come into a file: a thread that reads the socket (splice, copy, TLS), or chunks from the loop.

A way is a kind of peer and a kind of job; what is asked of it is the same for all.
"""

import asyncio
import hashlib
import os
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvloop

import bits_async as bits
from bits_async.files import PartFile
from bits_async.identity import native
from bits_async.jobs import transfer
from bits_async.transport import lane
from tests.peers import Authority, Fault, Hold, Origin, Proxy

SIZE = 3 << 20
HALF = 1 << 20  # the rest is more than what aiohttp would read with the head
OLD, NEW = os.urandom(SIZE), os.urandom(SIZE)


@dataclass(frozen=True)
class Way:
    """How the bytes come. `by`: who moves them, "splice" and "copy" in a thread of the file token, or "chunks"."""

    by: str
    tls: bool = False
    proxy: bool = False
    chunked: bool = False
    digest: bool = False
    splice: bool = True


WAYS = {
    "splice": Way("splice"),
    "copy where nothing can be spliced": Way("copy", splice=False),
    "copy for a digest": Way("copy", digest=True),
    "TLS": Way("copy", tls=True),
    "TLS for a digest": Way("copy", tls=True, digest=True),
    "TLS through a proxy": Way("copy", tls=True, proxy=True),
    "a forwarding proxy": Way("splice", proxy=True),
    "chunks": Way("chunks", chunked=True),
    "chunks over TLS": Way("chunks", tls=True, chunked=True),
}


@dataclass
class Scene:
    way: Way
    origin: Origin
    proxy: Proxy | None
    directory: Path
    context: ssl.SSLContext
    moved: list[str] = field(default_factory=list)  # who moved something

    def manager(self, **options: Any) -> bits.BitsManager:
        return bits.BitsManager(store=self.directory / "queue.db", ssl=self.context, **options)

    def fault(self, **more: Any) -> None:
        """Of the next answer; chunks stay chunks."""
        self.origin.fault("/file", Fault(chunked=self.way.chunked, **more))

    async def job(self, manager: bits.BitsManager, files: int = 1, body: bytes = OLD) -> bits.Job:
        job = await manager.create_job("by one way", priority=bits.JobPriority.FOREGROUND)
        digest = hashlib.sha256(body).hexdigest() if self.way.digest else None
        for number in range(files):
            await job.add_file(self.origin.url("/file"), self.path(number), sha256=digest)
        proxy = bits.ProxySettings.no_proxy() if self.proxy is None else bits.ProxySettings.override(self.proxy.url)
        await job.set_proxy_settings(proxy)
        await job.resume()
        return job

    def path(self, number: int = 0) -> Path:
        return self.directory / f"file{number}"

    @property
    def arrived(self) -> int:
        """Bytes in part files."""
        return sum(each.stat().st_size for each in self.directory.glob(".file*"))

    @property
    def starts(self) -> list[int]:
        """Where each answer began."""
        return [int((seen.range or "bytes=0-").removeprefix("bytes=").partition("-")[0]) for seen in self.origin.requests]

    async def finish(self, job: bits.Job, body: bytes = OLD) -> None:
        await job.wait()
        for path in await job.complete():
            assert path.read_bytes() == body
        assert self.way.by in self.moved
        assert ("chunks" in self.moved) == (self.way.by == "chunks")
        assert ("splice" in self.moved) == (self.way.by == "splice")  # the first bytes, which came with the head, are copied


async def until(done: Callable[[], object], *, seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not done():  # noqa: ASYNC110 - it has no event
            await asyncio.sleep(0.002)


@asynccontextmanager
async def staged(way: Way, directory: Path, monkeypatch: pytest.MonkeyPatch, authority: Authority) -> AsyncIterator[Scene]:
    monkeypatch.setattr(lane, "DETACH_FROM", 64 << 10)
    monkeypatch.setattr(transfer, "RECONNECT_DELAYS", (0.01,) * transfer.RECONNECTS)
    if not way.splice:
        monkeypatch.setattr(native, "splicer", lambda: None)
    async with AsyncExitStack() as stack:
        origin = await stack.enter_async_context(Origin(tls=authority.server if way.tls else None))
        proxy = await stack.enter_async_context(Proxy()) if way.proxy else None
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
    splice, store, append = PartFile._splice, PartFile._store, PartFile.append
    chunks: list[object] = []

    def spliced(self: PartFile, *args: Any) -> int:
        scene.moved.append("splice")
        return splice(self, *args)

    def stored(self: PartFile, *args: Any) -> None:
        if not chunks:
            scene.moved.append("copy")
        store(self, *args)

    async def written(self: PartFile, *args: Any) -> None:
        scene.moved.append("chunks")
        chunks.append(None)
        try:
            await append(self, *args)
        finally:
            chunks.pop()

    monkeypatch.setattr(PartFile, "_splice", spliced)
    monkeypatch.setattr(PartFile, "_store", stored)
    monkeypatch.setattr(PartFile, "append", written)


async def test_files_arrive_whole_and_share_one_connection(no_leaks: None, scene: Scene) -> None:
    async with scene.manager() as manager:
        await scene.finish(await scene.job(manager, files=3))
    assert {seen.connection for seen in scene.origin.requests} == {scene.origin.requests[0].connection}
    assert len(scene.origin.requests) == 3


async def test_a_suspended_job_keeps_what_has_arrived_and_goes_on_there(no_leaks: None, scene: Scene) -> None:
    hold = Hold(after=HALF)
    scene.fault(hold=hold)
    async with scene.manager() as manager:
        job = await scene.job(manager)
        await until(lambda: scene.arrived == HALF)
        await job.suspend()
        assert job.progress.bytes_transferred == scene.arrived == HALF
        hold.release()
        await job.resume()
        await scene.finish(job)
    assert scene.starts == [0, HALF]


async def test_progress_is_told_while_the_bytes_come(scene: Scene) -> None:
    hold = Hold(after=HALF)
    scene.fault(hold=hold)
    async with scene.manager() as manager:
        job = await scene.job(manager)
        await until(lambda: job.progress.bytes_transferred == HALF)
        assert job.progress.bytes_total == (None if scene.way.chunked else SIZE)
        hold.release()
        await scene.finish(job)


async def test_a_connection_that_breaks_is_opened_again_and_nothing_is_fetched_twice(scene: Scene) -> None:
    scene.fault(cut_after=HALF)
    async with scene.manager() as manager:
        await scene.finish(await scene.job(manager))
    assert scene.starts == [0, HALF]


async def test_a_server_that_falls_silent_is_given_up_and_what_came_is_kept(scene: Scene) -> None:
    hold = Hold(after=HALF)
    scene.fault(hold=hold)
    async with scene.manager(timeouts=bits.Timeouts(idle=0.3)) as manager:
        await scene.finish(await scene.job(manager))
    hold.release()
    assert scene.starts == [0, HALF]


async def test_a_file_that_changed_meanwhile_arrives_wholly_in_its_new_version(scene: Scene) -> None:
    scene.fault(cut_after=HALF, then=lambda: scene.origin.serve("/file", NEW, etag='"v2"'))
    async with scene.manager() as manager:
        await scene.finish(await scene.job(manager, body=NEW), NEW)
    assert scene.starts == [0, HALF, 0] or scene.starts == [0, HALF]  # a 200 to the second request brings it at once


async def test_a_manager_that_closes_keeps_what_has_arrived_and_the_next_goes_on_there(scene: Scene) -> None:
    hold = Hold(after=HALF)
    scene.fault(hold=hold)
    async with scene.manager() as manager:
        await scene.job(manager)
        await until(lambda: scene.arrived == HALF)
    hold.release()
    async with scene.manager() as manager:
        (job,) = [each async for each in manager.enum_jobs()]
        await scene.finish(job)
    assert scene.starts == [0, HALF]


async def test_t25_a_credential_that_is_taken_away_cuts_the_connection_at_once(scene: Scene) -> None:
    hold = Hold(after=HALF)
    scene.fault(hold=hold)
    async with scene.manager() as manager:
        job = await scene.job(manager)
        await job.set_credentials(bits.AuthTarget.SERVER, bits.AuthScheme.DIGEST, "alice", "secret")
        await until(lambda: scene.arrived == HALF)
        await job.remove_credentials(bits.AuthTarget.SERVER, bits.AuthScheme.DIGEST)
        hold.release()
        await scene.finish(job)
    assert len({seen.connection for seen in scene.origin.requests}) == 2


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_the_ways_are_the_same_on_uvloop(way: Way, memory_dir: Path, monkeypatch: pytest.MonkeyPatch, authority: Authority) -> None:
    """Nothing leans on asyncio's own transports."""

    async def run() -> None:
        assert isinstance(asyncio.get_running_loop(), uvloop.Loop)
        async with staged(way, memory_dir, monkeypatch, authority) as scene, scene.manager() as manager:
            hold = Hold(after=HALF)
            scene.fault(hold=hold)
            job = await scene.job(manager, files=2)
            await until(lambda: scene.arrived == HALF)
            await job.suspend()
            hold.release()
            await job.resume()
            await scene.finish(job)
            assert scene.starts == [0, HALF, 0]
            assert len({seen.connection for seen in scene.origin.requests}) == 2

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())
