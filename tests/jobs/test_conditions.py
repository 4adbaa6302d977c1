"""Group policy and the cost of the connection: jobs that may not run wait for the event, and say for which.

Speeds are in `test_bandwidth`, the network in `test_network_loss`; what a policy means at which moment is in `test_policies`.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

import bits_async as bits
from bits_async import CostFlags, ErrorCode, InvalidArgument, JobPriority, JobState, WaitingReason
from bits_async.jobs.policies import GroupPolicy
from bits_async.jobs.roster import Entry
from bits_async.testing import FakeNetwork, fake_token
from tests.waiting import let_things_happen, until

S = JobState
URL = "https://h.test/file"
BODY = bytes(range(256)) * 1024
HOUR = 3600.0
WORK = """
[[bandwidth_limits.work]]
days = ["mon", "tue", "wed", "thu", "fri"]
from = 8
to = 17
limits = { high = "unlimited", normal = "unlimited", low = 0 }
"""


def in_zone(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("TZ", name)
    time.tzset()


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The fake clock begins on a Tuesday at midnight."""
    in_zone(monkeypatch, "UTC")
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.fixture
def network() -> Iterator[FakeNetwork]:
    with FakeNetwork() as fake:
        fake.clock.freeze()
        fake.serve(URL, BODY)
        yield fake


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "queue.db"


class Cost:
    """A source whose cost the test changes."""

    def __init__(self, *costs: CostFlags) -> None:
        self.news: asyncio.Queue[CostFlags | Exception | None] = asyncio.Queue()
        for cost in costs:
            self.tell(cost)

    def tell(self, cost: CostFlags | Exception | None) -> None:
        self.news.put_nowait(cost)

    async def watch(self) -> AsyncIterator[CostFlags]:
        while (cost := await self.news.get()) is not None:
            if isinstance(cost, Exception):
                raise cost
            yield cost


async def a_job(manager: bits.BitsManager, path: Path, priority: JobPriority = JobPriority.NORMAL, **more: Any) -> bits.Job:
    job = await manager.create_job("a job", priority=priority, **more)
    await job.add_file(URL, path / job.id.hex)
    return job


def waits(job: bits.Job, reason: WaitingReason) -> bool:
    return job.state is S.TRANSIENT_ERROR and job.waiting is not None and job.waiting.reason is reason


# -- group policy


async def test_a_running_job_that_policy_blocks_waits_until_the_interval_ends(network: FakeNetwork, store: Path, tmp_path: Path) -> None:
    network.pause()
    async with bits.BitsManager(store=store, policy=GroupPolicy.from_toml(WORK)) as manager:
        job = await a_job(manager, tmp_path, JobPriority.LOW)
        await job.resume()
        await until(lambda: network.requests)
        network.clock.advance(8 * HOUR)
        await until(lambda: waits(job, WaitingReason.POLICY))
        assert str(job.waiting) == "held up by group policy until 2030-01-01 17:00"
        assert job.error is not None
        assert type(job.error) is bits.BitsError
        assert (job.error.code, job.error.context) == (ErrorCode.BG_E_BLOCKED_BY_POLICY, bits.ErrorContext.GENERAL_QUEUE_MANAGER)
        assert job.error.advice == "the job goes on by itself when the policy allows it; FOREGROUND jobs are exempt"
        assert "bandwidth_limits.work" in job.error.message
        assert job.error_count == 1
        network.resume()
        network.clock.advance(9 * HOUR - 1)
        await let_things_happen()
        assert waits(job, WaitingReason.POLICY)
        network.clock.advance(1)
        await job.wait()


@pytest.mark.parametrize("days", [-1, 1])
async def test_a_wall_clock_that_is_set_counts_for_a_schedule_at_once(network: FakeNetwork, store: Path, tmp_path: Path, days: int) -> None:
    network.clock.advance(9 * HOUR)
    async with bits.BitsManager(store=store, policy=GroupPolicy.from_toml(WORK)) as manager:
        job = await a_job(manager, tmp_path, JobPriority.LOW)
        await job.resume()
        await until(lambda: waits(job, WaitingReason.POLICY))
        network.clock.set_wall_clock(days * 24 * HOUR)
        await let_things_happen()
        there = network.clock.now()
        assert str(job.waiting) == f"held up by group policy until {there:%Y-%m-%d} 17:00", "the same hour of another working day"
        network.clock.set_wall_clock(-2 * HOUR if days < 0 else 8 * HOUR)
        await job.wait()
        assert network.clock.monotonic() == 9 * HOUR


async def test_a_running_job_is_interrupted_when_the_wall_clock_is_set_into_an_interval_that_blocks_it(
    network: FakeNetwork, store: Path, tmp_path: Path
) -> None:
    network.pause()
    async with bits.BitsManager(store=store, policy=GroupPolicy.from_toml(WORK)) as manager:
        job = await a_job(manager, tmp_path, JobPriority.LOW)
        await job.resume()
        await until(lambda: network.requests)
        network.clock.set_wall_clock(8 * HOUR)
        await until(lambda: waits(job, WaitingReason.POLICY))


async def test_a_blocked_priority_waits_and_the_others_run(network: FakeNetwork, store: Path, tmp_path: Path) -> None:
    network.clock.advance(9 * HOUR)
    async with bits.BitsManager(store=store, policy=GroupPolicy.from_toml(WORK)) as manager:
        low, normal = await a_job(manager, tmp_path, JobPriority.LOW), await a_job(manager, tmp_path)
        for job in (low, normal):
            await job.resume()
        await normal.wait()
        await until(lambda: waits(low, WaitingReason.POLICY))
        assert len(network.requests) == 1
        network.disconnect()
        network.reconnect()
        await let_things_happen()
        assert low.error_count == 1, "a network that comes back does not change what policy says"
        await low.set_priority(JobPriority.FOREGROUND)
        await low.wait()


async def test_a_block_without_end_is_an_error_after_the_no_progress_timeout(network: FakeNetwork, store: Path, tmp_path: Path) -> None:
    policy = GroupPolicy.from_toml("[max_internet_bandwidth]\nlimit = 0")
    async with bits.BitsManager(store=store, policy=policy) as manager:
        job = await a_job(manager, tmp_path)
        await job.set_no_progress_timeout(HOUR)
        await job.resume()
        await until(lambda: waits(job, WaitingReason.POLICY))
        assert job.waiting is not None
        assert (job.waiting.until, str(job.waiting)) == (None, "held up by group policy: max_internet_bandwidth")
        await let_things_happen()
        network.clock.advance(HOUR)
        await until(lambda: job.state is S.ERROR)
        assert job.error is not None
        assert job.error.code == ErrorCode.BG_E_NO_PROGRESS
    assert network.requests == []


async def test_schedules_are_meant_in_the_zone_of_the_machine(
    network: FakeNetwork, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_zone(monkeypatch, "America/New_York")
    network.clock.advance(13 * HOUR)  # 08:00 there
    async with bits.BitsManager(store=store, policy=GroupPolicy.from_toml(WORK)) as manager:
        job = await a_job(manager, tmp_path, JobPriority.LOW)
        await job.resume()
        await until(lambda: waits(job, WaitingReason.POLICY))
        assert job.waiting is not None
        assert job.waiting.until is not None
        assert job.waiting.until.isoformat() == "2030-01-01T22:00:00+00:00"


async def test_a_blocked_job_looks_at_the_policy_of_the_next_manager(network: FakeNetwork, store: Path, tmp_path: Path) -> None:
    network.clock.advance(9 * HOUR)
    async with bits.BitsManager(store=store, policy=GroupPolicy.from_toml(WORK)) as manager:
        job = await a_job(manager, tmp_path, JobPriority.LOW)
        await job.resume()
        await until(lambda: waits(job, WaitingReason.POLICY))
    async with bits.BitsManager(store=store) as manager:
        await (await manager.get_job(job.id)).wait()


async def test_the_numbers_of_a_policy_count_for_whoever_is_not_elevated(network: FakeNetwork, store: Path, tmp_path: Path) -> None:
    text = "max_jobs_per_user = 1\nmax_files_per_job = 2\nmax_ranges_per_file = 1\njob_inactivity_timeout = 3600"
    ours = bits.Limits(jobs_per_user=5, connections_per_host=3)
    bob, root = fake_token("bob"), fake_token("root", elevated=True)
    async with bits.BitsManager(store=store, limits=ours, policy=GroupPolicy.from_toml(text)) as manager:
        assert manager.limits == bits.Limits(
            jobs_per_user=1, files_per_job=2, ranges_per_file=1, job_inactivity_timeout=3600, connections_per_host=3
        )
        overridden = {"jobs_per_user", "files_per_job", "ranges_per_file", "job_inactivity_timeout"}
        assert manager.overridden_by_policy == overridden
        job, mine = await a_job(manager, tmp_path, owner=bob), await a_job(manager, tmp_path, owner=root)
        with pytest.raises(bits.AccessDenied) as caught:
            await a_job(manager, tmp_path, owner=bob)
        assert caught.value.code == ErrorCode.BG_E_TOO_MANY_JOBS_PER_USER
        with pytest.raises(bits.AccessDenied) as caught:
            await job.add_file_set([bits.FileInfo(URL, tmp_path / name) for name in "ab"])
        assert caught.value.code == ErrorCode.BG_E_TOO_MANY_FILES_IN_JOB
        await let_things_happen()
        network.clock.advance(HOUR)
        await until(lambda: job.state is S.CANCELLED)
        assert mine.state is S.SUSPENDED


@pytest.mark.parametrize(
    ("who", "own", "expected"),
    [
        pytest.param(fake_token("bob"), None, 100, id="policy for a job that set none"),
        pytest.param(fake_token("bob"), 200, 200, id="the job's own goes before"),
        pytest.param(fake_token("root", elevated=True), None, 90 * 86400, id="administrators are exempt"),
    ],
)
async def test_the_maximum_download_time_of_a_policy(
    network: FakeNetwork, store: Path, tmp_path: Path, who: bits.Token, own: float | None, expected: float
) -> None:
    network.pause()
    async with bits.BitsManager(store=store, policy=GroupPolicy.from_toml("max_download_time = 100")) as manager:
        job = await a_job(manager, tmp_path, owner=who)
        if own is not None:
            await job.set_maximum_download_time(own)
        assert job.maximum_download_time == expected
        await job.resume()
        await until(lambda: network.requests)
        await let_things_happen()
        network.clock.advance(expected - 1)
        await let_things_happen()
        assert job.state is S.CONNECTING
        network.clock.advance(1)
        await until(lambda: job.state is S.ERROR)
        assert job.error is not None
        assert job.error.code == ErrorCode.BG_E_MAXDOWNLOAD_TIMEOUT


async def test_a_policy_is_read_from_its_file_when_the_manager_is_entered(network: FakeNetwork, store: Path, tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_text("max_jobs_per_user = 7")
    async with bits.BitsManager(store=store, policy=file) as manager:
        assert (manager.limits.jobs_per_user, manager.overridden_by_policy) == (7, {"jobs_per_user"})
    assert bits.BitsManager(store=store, policy=str(file)).overridden_by_policy == frozenset()


@pytest.mark.parametrize("what", ["missing", "a directory", "not TOML", "not text", "an unknown key", "too large", "a pipe"])
async def test_a_policy_that_cannot_be_read_is_not_passed_over(network: FakeNetwork, store: Path, tmp_path: Path, what: str) -> None:
    file = tmp_path / "policy.toml"
    if what == "a directory":
        file.mkdir()
    elif what == "a pipe":
        import os

        os.mkfifo(file)
    elif what != "missing":
        file.write_bytes({"not TOML": b"[", "not text": b"\xff", "an unknown key": b"max_jobs = 1"}.get(what, b" " * (2 << 20)))
    with pytest.raises(bits.BitsError) as caught:
        async with bits.BitsManager(store=store, policy=file):
            pass
    assert caught.value.path == file
    assert isinstance(caught.value, bits.LocalFileError if what == "missing" else InvalidArgument)
    if what == "an unknown key":
        assert "max_jobs" in caught.value.message


@pytest.mark.parametrize("mode", [0o664, 0o646])
async def test_t27_a_policy_that_others_may_write_is_refused(network: FakeNetwork, store: Path, tmp_path: Path, mode: int) -> None:
    file = tmp_path / "policy.toml"
    file.write_text("max_jobs_per_user = 7")
    file.chmod(mode)
    with pytest.raises(bits.AccessDenied) as caught:
        async with bits.BitsManager(store=store, policy=file):
            pass
    assert caught.value.path == file


# -- cost


async def test_a_job_waits_while_the_connection_costs_too_much_and_goes_on_when_it_does_not(
    network: FakeNetwork, store: Path, tmp_path: Path
) -> None:
    cost = Cost(CostFlags.UNRESTRICTED)
    network.pause()
    async with bits.BitsManager(store=store, cost_source=cost) as manager:
        jobs = [await a_job(manager, tmp_path), await a_job(manager, tmp_path), await a_job(manager, tmp_path, JobPriority.FOREGROUND)]
        for job in jobs:
            await job.set_cost_flags(CostFlags.TRANSFER_NOT_ROAMING)
            await job.resume()
        at_any_cost = await a_job(manager, tmp_path, JobPriority.FOREGROUND)
        await at_any_cost.resume()
        await until(lambda: len(network.requests) == 3)
        assert [job.state for job in jobs] == [S.CONNECTING, S.QUEUED, S.CONNECTING]
        cost.tell(CostFlags.ROAMING | CostFlags.USAGE_BASED)
        await until(lambda: all(waits(job, WaitingReason.COST) for job in jobs))
        for job in jobs:
            assert job.error is not None
            assert type(job.error) is bits.BitsError
            assert job.error.code == ErrorCode.BG_E_BLOCKED_BY_COST_TRANSFER_POLICY
            assert job.error.context is bits.ErrorContext.GENERAL_QUEUE_MANAGER
            assert job.error.advice == "the job goes on by itself when the cost is allowed; set_cost_flags allows others"
            assert job.waiting is not None
            assert (job.waiting.until, str(job.waiting)) == (None, "held up by the cost of the connection")
        network.resume()
        await at_any_cost.wait()
        network.clock.advance(100_000)
        await let_things_happen()
        assert len(network.requests) == 3
        cost.tell(CostFlags.USAGE_BASED)
        for job in jobs:
            await job.wait()
            assert job.error_count == 1


async def test_an_attempt_that_fails_while_it_is_held_up_waits_for_the_same(
    network: FakeNetwork, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Entry] = []

    def deaf(entry: Entry) -> None:
        entry.stopping = True
        told.append(entry)

    cost = Cost(CostFlags.UNRESTRICTED)
    network.pause()
    network.fail(URL)
    async with bits.BitsManager(store=store, cost_source=cost) as manager:
        job = await a_job(manager, tmp_path)
        await job.set_cost_flags(CostFlags.TRANSFER_NOT_ROAMING)
        await job.resume()
        await until(lambda: network.requests)
        monkeypatch.setattr(Entry, "stop", deaf)  # it is told to stop, and comes to its end before it hears of it
        cost.tell(CostFlags.ROAMING)
        await until(lambda: told)
        network.resume()
        await until(lambda: waits(job, WaitingReason.COST))
        cost.tell(CostFlags.UNRESTRICTED)
        await job.wait()


async def test_other_cost_flags_count_at_once_in_both_directions(network: FakeNetwork, store: Path, tmp_path: Path) -> None:
    network.pause()
    async with bits.BitsManager(store=store, cost_source=Cost(CostFlags.ROAMING)) as manager:
        job = await a_job(manager, tmp_path)
        assert job.cost_flags is CostFlags.TRANSFER_ALWAYS
        await job.resume()
        await until(lambda: network.requests)
        await job.set_cost_flags(CostFlags.TRANSFER_STANDARD)
        await until(lambda: waits(job, WaitingReason.COST))
        network.resume()
        await job.set_cost_flags(CostFlags.TRANSFER_ALWAYS)
        await job.wait()


async def test_a_job_that_does_not_run_at_every_cost_waits_until_the_cost_is_told(
    network: FakeNetwork, store: Path, tmp_path: Path
) -> None:
    cost = Cost()
    async with bits.BitsManager(store=store, cost_source=cost) as manager:
        careful, careless = await a_job(manager, tmp_path), await a_job(manager, tmp_path)
        await careful.set_cost_flags(CostFlags.TRANSFER_UNRESTRICTED)
        for job in (careful, careless):
            await job.resume()
        await careless.wait()
        assert careful.state is S.QUEUED
        assert str(careful.waiting) == "held up by the cost of the connection: nobody has said yet what it is"
        cost.tell(CostFlags.UNRESTRICTED)
        await careful.wait()


@pytest.mark.parametrize("end", [None, OSError("no such service"), "nonsense"], ids=["it ends", "it fails", "it talks nonsense"])
async def test_a_source_that_tells_no_more_leaves_the_last_cost(
    network: FakeNetwork, store: Path, tmp_path: Path, end: Any, caplog: pytest.LogCaptureFixture
) -> None:
    cost = Cost(CostFlags.ROAMING)
    cost.tell(end)
    async with bits.BitsManager(store=store, cost_source=cost) as manager:
        job = await a_job(manager, tmp_path)
        await job.set_cost_flags(CostFlags.TRANSFER_NOT_ROAMING)
        await job.resume()
        await until(lambda: waits(job, WaitingReason.COST))
    cost = Cost()
    cost.tell(end)
    async with bits.BitsManager(store=store, cost_source=cost) as manager:
        await (await manager.get_job(job.id)).wait()  # nobody ever said: unknown costs stop nobody
    assert ("is not told any more" in caplog.text) == (end is not None)


async def test_cost_flags_are_kept_over_a_restart(network: FakeNetwork, store: Path, tmp_path: Path) -> None:
    async with bits.BitsManager(store=store) as manager:
        job = await a_job(manager, tmp_path)
        await job.set_cost_flags(CostFlags.UNRESTRICTED | CostFlags.IGNORE_CONGESTION)
    async with bits.BitsManager(store=store) as manager:
        assert (await manager.get_job(job.id)).cost_flags == CostFlags.UNRESTRICTED | CostFlags.IGNORE_CONGESTION


@pytest.mark.parametrize("flags", [CostFlags(0), CostFlags.IGNORE_CONGESTION, 1, None])
async def test_cost_flags_at_which_a_job_could_never_run_are_refused(network: FakeNetwork, store: Path, tmp_path: Path, flags: Any) -> None:
    async with bits.BitsManager(store=store) as manager:
        job = await a_job(manager, tmp_path)
        with pytest.raises(InvalidArgument):
            await job.set_cost_flags(flags)
        assert job.cost_flags is CostFlags.TRANSFER_ALWAYS
