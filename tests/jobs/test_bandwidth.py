"""How fast a job's bytes come: limits of the machine, of priorities and of jobs, on a clock that only the transfers move.

The same over real sockets is in `tests/loopback/test_bandwidth.py`; the buckets themselves are in `tests/test_limits.py`.
"""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import bits_async as bits
from bits_async import InvalidArgument, JobPriority, JobState, testing
from bits_async.identity import native
from bits_async.limits import Bucket
from bits_async.testing import FakeClock, FakeNetwork
from tests.waiting import DEADLINE, until

URL = "https://h.test/file"
BODY = bytes(range(256)) * 1024
MB = 1e6


class Zeros:
    """A large body that takes no memory."""

    piece = memoryview(bytes(1 << 20))

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> memoryview:
        start, stop, _ = part.indices(self._size)
        return self.piece[: max(0, stop - start)]


class PacedClock(FakeClock):
    """Short sleeps, which are those of limited transfers, pass as soon as nobody is at work, and the time with them."""

    def __init__(self) -> None:
        super().__init__()
        self.sleeping: list[float] = []

    async def sleep(self, seconds: float) -> None:
        if seconds > 2:
            await super().sleep(seconds)
            return
        due = self.monotonic() + seconds
        self.sleeping.append(due)
        try:
            with self.resting():
                while self._busy or due > min(self.sleeping):  # noqa: ASYNC110 - others are at work, or wake before
                    await asyncio.sleep(0)
        finally:
            self.sleeping.remove(due)
        if due > self.monotonic():
            self.advance(due - self.monotonic())


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNetwork]:
    fake = FakeNetwork()
    fake.clock = PacedClock()
    fake.clock.freeze()
    with fake:
        fake.serve(URL, BODY)
        yield fake


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "queue.db"


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> dict[Bucket, int]:
    """What each bucket was asked for."""
    counts: dict[Bucket, int] = {}
    honest = Bucket.take

    def take(self: Bucket, account: Any, count: int) -> float:
        if self.rate is not None:
            counts[self] = counts.get(self, 0) + count
        return honest(self, account, count)

    monkeypatch.setattr(Bucket, "take", take)
    return counts


@pytest.fixture
def no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "pwrite_all", lambda *_: None)
    monkeypatch.setattr(native, "room", lambda _: None)  # nobody knows how much
    monkeypatch.setattr(testing, "PIECE", 1 << 20)


async def a_job(manager: bits.BitsManager, path: Path, *, priority: JobPriority = JobPriority.FOREGROUND) -> bits.Job:
    job = await manager.create_job("a job", priority=priority)
    await job.set_high_performance(True)
    await job.add_file(URL, path / job.id.hex)
    return job


def moved(job: bits.Job) -> int:
    return job.progress.bytes_transferred


@pytest.mark.parametrize("where", ["manager", "job"])
@pytest.mark.parametrize(("rate", "piece"), [(1 * MB, 8 << 10), (100 * MB, 1 << 20)])
async def test_a_limit_is_kept_to_5_percent_over_10_seconds(
    network: FakeNetwork, no_disk: None, store: Path, tmp_path: Path, rate: float, piece: int, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(testing, "PIECE", piece)
    network.serve(URL, Zeros(1 << 40), etag='"v1"')  # type: ignore[arg-type]
    async with bits.BitsManager(store=store, maximum_bandwidth=rate if where == "manager" else None) as manager:
        job = await a_job(manager, tmp_path)
        if where == "job":
            await job.set_maximum_bandwidth(rate)
        await job.resume()
        await until(lambda: network.clock.monotonic() >= 10)
        assert moved(job) == pytest.approx(rate * network.clock.monotonic(), rel=0.05)
        await job.cancel()


async def test_a_job_is_slower_than_the_machine_and_leaves_the_others_the_rest(
    network: FakeNetwork, no_disk: None, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(testing, "PIECE", 8 << 10)
    network.serve(URL, Zeros(1 << 40), etag='"v1"')  # type: ignore[arg-type]
    async with bits.BitsManager(store=store, maximum_bandwidth=1 * MB) as manager:
        slow, fast = await a_job(manager, tmp_path), await a_job(manager, tmp_path)
        await slow.set_maximum_bandwidth(0.1 * MB)
        network.pause()
        for job in (slow, fast):
            await job.resume()
        await until(lambda: len(network.requests) == 2)
        network.resume()
        await until(lambda: network.clock.monotonic() >= 5)
        assert moved(slow) == pytest.approx(0.1 * MB * network.clock.monotonic(), rel=0.2)
        assert moved(slow) + moved(fast) == pytest.approx(1 * MB * network.clock.monotonic(), rel=0.05)
        for job in (slow, fast):
            await job.cancel()


async def test_a_limit_set_lowered_and_lifted_reaches_a_running_transfer(
    network: FakeNetwork, no_disk: None, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: dict[Bucket, int]
) -> None:
    monkeypatch.setattr(testing, "PIECE", 8 << 10)
    network.serve(URL, Zeros(1 << 40), etag='"v1"')  # type: ignore[arg-type]
    async with bits.BitsManager(store=store) as manager:
        job = await a_job(manager, tmp_path)
        await job.resume()
        await until(lambda: moved(job) > 4 << 20)
        assert network.clock.monotonic() == 0
        await job.set_maximum_bandwidth(1 * MB)
        for rate, seconds in ((1 * MB, 3), (0.25 * MB, 12)):
            manager.set_maximum_bandwidth(rate)
            assert (manager.maximum_bandwidth, job.maximum_bandwidth) == (rate, 1 * MB)
            begin, clock = moved(job), network.clock.monotonic()
            await until(lambda end=clock + seconds: network.clock.monotonic() >= end)  # type: ignore[misc]
            # up to 1 MiB had been gathered before the limit came
            assert moved(job) - begin == pytest.approx(rate * (network.clock.monotonic() - clock), rel=0.05, abs=1.1 * (1 << 20))
        await job.set_maximum_bandwidth(None)
        manager.set_maximum_bandwidth(None)
        await until(lambda: not network.clock.sleeping)  # type: ignore[attr-defined]
        clock, begin = network.clock.monotonic(), moved(job)
        await until(lambda: moved(job) > begin + (8 << 20))
        assert network.clock.monotonic() <= clock + 1
        await job.cancel()


async def test_without_limits_nobody_counts(
    network: FakeNetwork, store: Path, tmp_path: Path, taken: dict[Bucket, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    rests: list[float] = []
    monkeypatch.setattr(type(network.clock), "sleep", lambda _, seconds: rests.append(seconds) or asyncio.sleep(0))
    async with bits.BitsManager(store=store) as manager:
        job = await a_job(manager, tmp_path)
        await job.resume()
        await job.wait()
    assert taken == {}
    assert [seconds for seconds in rests if seconds < 10] == []


async def test_every_byte_pays_once_at_each_level(network: FakeNetwork, store: Path, tmp_path: Path, taken: dict[Bucket, int]) -> None:
    async with bits.BitsManager(store=store, maximum_bandwidth=100 * MB) as manager:
        job = await a_job(manager, tmp_path)
        await job.set_maximum_bandwidth(50 * MB)
        await job.resume()
        await job.wait()
        assert {bucket.rate: count for bucket, count in taken.items()} == {100 * MB: len(BODY), 50 * MB: len(BODY)}


@pytest.mark.parametrize("how", ["suspend", "cancel"])
async def test_a_job_that_rests_is_stopped_at_once(network: FakeNetwork, store: Path, tmp_path: Path, how: str) -> None:
    network.clock.__class__ = FakeClock  # frozen: whoever rests, rests for ever
    async with bits.BitsManager(store=store) as manager:
        job = await a_job(manager, tmp_path)
        await job.set_maximum_bandwidth(1000)
        await job.resume()
        await until(lambda: moved(job))
        async with asyncio.timeout(DEADLINE):
            await getattr(job, how)()
        if how == "suspend":
            assert moved(job) == testing.PIECE, "what had arrived is kept"
            await job.set_maximum_bandwidth(None)
            await job.resume()
            await job.wait()
            assert [request.start for request in network.requests] == [0, testing.PIECE]
            (path,) = await job.complete()
            assert path.read_bytes() == BODY


async def test_a_job_s_limit_is_kept_over_a_restart(network: FakeNetwork, store: Path, tmp_path: Path, taken: dict[Bucket, int]) -> None:
    async with bits.BitsManager(store=store, run=False) as manager:
        job = await a_job(manager, tmp_path)
        await job.set_maximum_bandwidth(50 * MB)
        await job.resume()
    async with bits.BitsManager(store=store) as manager:
        job = await manager.get_job(job.id)
        assert job.maximum_bandwidth == 50 * MB
        await job.wait()
    assert sum(taken.values()) == len(BODY)


async def test_download_takes_a_limit_and_an_earlier_one_does_not_stay(
    network: FakeNetwork, store: Path, tmp_path: Path, taken: dict[Bucket, int]
) -> None:
    async with bits.BitsManager(store=store) as manager:
        await manager.download(URL, tmp_path / "first", maximum_bandwidth=50 * MB)
        assert sum(taken.values()) == len(BODY)
        network.pause(after=1000)
        left = asyncio.ensure_future(manager.download(URL, tmp_path / "second", maximum_bandwidth=50 * MB))
        await until(lambda: len(network.requests) == 2)
        left.cancel()
        await asyncio.wait([left])
        network.resume()
        taken.clear()
        await manager.download(URL, tmp_path / "second")
        assert taken == {}


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf"), True, "fast"])
async def test_a_rate_that_is_none_is_refused(network: FakeNetwork, store: Path, tmp_path: Path, rate: Any) -> None:
    with pytest.raises(InvalidArgument):
        bits.BitsManager(store=store, maximum_bandwidth=rate)
    async with bits.BitsManager(store=store) as manager:
        job = await a_job(manager, tmp_path)
        with pytest.raises(InvalidArgument):
            await job.set_maximum_bandwidth(rate)
        with pytest.raises(InvalidArgument):
            manager.set_maximum_bandwidth(rate)
        assert job.state is JobState.SUSPENDED
        assert (manager.maximum_bandwidth, job.maximum_bandwidth) == (None, None)


# -- group policy

INTERNET = """
[max_internet_bandwidth]
limit = 8000
from = 8
to = 17
limit_outside = 800
"""
CLASSES = """
[bandwidth_limits.non_work]
high = 8000
normal = 800
low = 80
"""


@pytest.fixture
def endless(network: FakeNetwork, no_disk: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(testing, "PIECE", 2 << 10)
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    network.serve(URL, Zeros(1 << 40), etag='"v1"')  # type: ignore[arg-type]
    yield
    monkeypatch.undo()
    time.tzset()


async def together(network: FakeNetwork, *jobs: bits.Job) -> None:
    """Let their first bytes come at the same moment."""
    network.pause()
    for job in jobs:
        await job.resume()
    await until(lambda: len(network.requests) == len(jobs))
    network.resume()


async def pace(network: FakeNetwork, *jobs: bits.Job, seconds: float) -> list[float]:
    """Bytes per second of each job, from now on."""
    begin, counts = network.clock.monotonic(), [moved(job) for job in jobs]
    await until(lambda: network.clock.monotonic() >= begin + seconds)
    passed = network.clock.monotonic() - begin
    return [(moved(job) - count) / passed for job, count in zip(jobs, counts, strict=True)]


async def test_one_limit_for_all_background_jobs_and_none_for_the_foreground(
    network: FakeNetwork, endless: None, store: Path, tmp_path: Path
) -> None:
    policy, limits = bits.GroupPolicy.from_toml(INTERNET), bits.Limits(background_jobs=2)
    async with bits.BitsManager(store=store, policy=policy, limits=limits) as manager:
        jobs = [await a_job(manager, tmp_path, priority=priority) for priority in (JobPriority.HIGH, JobPriority.LOW)]
        front = await a_job(manager, tmp_path)
        assert await front.set_maximum_bandwidth(0.5 * MB) == bits.ErrorCode.S_OK, "its own limit counts"
        await together(network, *jobs, front)
        found = await pace(network, *jobs, front, seconds=3)
        assert found == pytest.approx([0.05 * MB, 0.05 * MB, 0.5 * MB], rel=0.1)


async def test_the_limit_changes_at_the_end_of_the_interval(network: FakeNetwork, endless: None, store: Path, tmp_path: Path) -> None:
    async with bits.BitsManager(store=store, policy=bits.GroupPolicy.from_toml(INTERNET)) as manager:
        job = await a_job(manager, tmp_path, priority=JobPriority.NORMAL)
        await together(network, job)
        assert await pace(network, job, seconds=2) == pytest.approx([0.1 * MB], rel=0.1)
        network.clock.advance(8 * 3600 - network.clock.monotonic())
        assert await pace(network, job, seconds=2) == pytest.approx([1 * MB], rel=0.1)
        assert len(network.requests) == 1


async def test_each_priority_has_its_own_limit_and_a_job_moves_with_its_priority(
    network: FakeNetwork, endless: None, store: Path, tmp_path: Path
) -> None:
    async with bits.BitsManager(store=store, policy=bits.GroupPolicy.from_toml(CLASSES)) as manager:
        assert manager.overridden_by_policy == {"bandwidth"}
        job = await a_job(manager, tmp_path, priority=JobPriority.NORMAL)
        await together(network, job)
        assert await pace(network, job, seconds=3) == pytest.approx([0.1 * MB], rel=0.1)
        await job.set_priority(JobPriority.HIGH)
        assert await pace(network, job, seconds=3) == pytest.approx([1 * MB], rel=0.1)
        await job.set_priority(JobPriority.FOREGROUND)
        begin, clock = moved(job), network.clock.monotonic()
        await until(lambda: moved(job) > begin + (8 << 20))
        assert network.clock.monotonic() <= clock + 1
        assert len(network.requests) == 1, "the request went on"


async def test_a_job_s_limit_above_the_policy_s_is_set_and_said_to_be_overridden(network: FakeNetwork, store: Path, tmp_path: Path) -> None:
    async with bits.BitsManager(store=store, policy=bits.GroupPolicy.from_toml(CLASSES)) as manager:
        job = await a_job(manager, tmp_path, priority=JobPriority.NORMAL)
        for own, code in ((0.2 * MB, "BG_S_OVERRIDDEN_BY_POLICY"), (None, "BG_S_OVERRIDDEN_BY_POLICY"), (0.05 * MB, "S_OK")):
            assert (await job.set_maximum_bandwidth(own)).name == code
            assert job.maximum_bandwidth == own
