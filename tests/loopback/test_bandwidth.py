"""Limits of speed that come and go, over real sockets: by counting, never by the clock. What every way owes a limit is in test_paths."""

import hashlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import bits_async as bits
from bits_async.files.part import PartFile
from bits_async.identity import native
from bits_async.limits import Bucket
from bits_async.transport import lane
from tests.peers import Fault, Hold, Origin
from tests.waiting import until

SIZE = 2 << 20
BODY = os.urandom(SIZE)
FAST = 200e6  # bytes per second: nothing takes long


@dataclass
class Counts:
    """What happened: bytes that buckets were asked for, bytes that were spliced, with or without a limit for each thread."""

    taken: int = 0
    spliced: int = 0
    limited: list[bool] = field(default_factory=list)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    counts = Counts()
    take, move, receive = Bucket.take, native.Splicer.move, PartFile.receive

    def counted_take(self: Bucket, account: Any, count: int) -> float:
        counts.taken += 0 if self.rate is None else count
        return take(self, account, count)

    def counted_move(*given: Any) -> int:
        moved = move(*given)
        counts.spliced += moved
        return moved

    async def counted_receive(self: PartFile, detached: Any, piece: Any, limiter: Any, *more: Any, **options: Any) -> int:
        counts.limited.append(limiter is not None)
        return await receive(self, detached, piece, limiter, *more, **options)

    monkeypatch.setattr(Bucket, "take", counted_take)
    monkeypatch.setattr(native.Splicer, "move", counted_move)
    monkeypatch.setattr(PartFile, "receive", counted_receive)
    return counts


@pytest.fixture(params=["spliced", "received", "iterated"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Between the kernel's socket and file; into a thread's buffer, because a digest is wanted; through the event loop."""
    monkeypatch.setattr(lane, "DETACH_FROM", SIZE * 2 if request.param == "iterated" else 1)
    return str(request.param)


@pytest.fixture
async def origin() -> AsyncIterator[Origin]:
    async with Origin() as origin:
        origin.serve("/file", BODY)
        yield origin


async def a_job(manager: bits.BitsManager, origin: Origin, path: Path, way: str) -> bits.Job:
    job = await manager.create_job("limited")
    await job.add_file(origin.url("/file"), path / "file", sha256=hashlib.sha256(BODY).hexdigest() if way == "received" else None)
    return job


async def finished(job: bits.Job) -> bytes:
    await job.wait()
    (path,) = await job.complete()
    return path.read_bytes()


async def test_no_limit_costs_nothing_on_any_way(origin: Origin, memory_dir: Path, way: str, counts: Counts) -> None:
    async with bits.BitsManager(store=memory_dir / "queue.db") as manager:
        job = await a_job(manager, origin, memory_dir, way)
        await job.resume()
        assert await finished(job) == BODY
    assert counts.taken == 0
    assert counts.limited == ([] if way == "iterated" else [False])


@pytest.mark.parametrize("by", ["job", "manager"])
async def test_a_limit_set_and_lifted_reaches_a_transfer_under_way(
    origin: Origin, memory_dir: Path, way: str, counts: Counts, by: str
) -> None:
    first, second = Hold(after=SIZE // 4), Hold(after=SIZE // 4)
    origin.fault("/file", Fault(hold=first), Fault(hold=second))
    async with bits.BitsManager(store=memory_dir / "queue.db") as manager:
        job = await a_job(manager, origin, memory_dir, way)

        async def limit(rate: float | None) -> None:
            if by == "job":
                await job.set_maximum_bandwidth(rate)
            else:
                manager.set_maximum_bandwidth(rate)

        await job.resume()
        await until(lambda: job.progress.bytes_transferred == SIZE // 4)
        await limit(FAST)
        await until(lambda: way == "iterated" or counts.limited == [False, True])
        first.release()
        assert await finished(job) == BODY
        assert SIZE * 3 // 4 <= counts.taken <= SIZE
        counts.limited.clear()
        job = await a_job(manager, origin, memory_dir, way)
        await limit(FAST)
        await job.resume()
        await until(lambda: job.progress.bytes_transferred == SIZE // 4)
        await limit(None)
        await until(lambda: way == "iterated" or counts.limited == [True, False])
        counts.taken = 0
        second.release()
        assert await finished(job) == BODY
        assert counts.taken == 0
    assert len(origin.requests) == 2, "the request went on"
