"""Very many jobs: only those at work, those that somebody holds and the next ones are in memory, and nobody notices.

With 100,000 jobs things are counted; with few, and a line that is as long as two jobs, everything that was forgotten must come back.
"""

import asyncio
import gc
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

import bits_async as bits
from bits_async import CostFlags, ErrorCode, JobPriority, JobState, WaitingReason
from bits_async.jobs import engine as engine_module
from bits_async.jobs import roster as roster_module
from bits_async.jobs.policies import DAYS, GroupPolicy
from bits_async.jobs.roster import AHEAD, SPARE, Entry, Roster
from bits_async.jobs.store import SqliteStore
from bits_async.testing import FakeNetwork, fake_token
from tests.jobs.crowd import copy_of, make_crowd
from tests.waiting import DEADLINE, let_things_happen, until

CROWD = 100_000
NEXT = 1 + SPARE  # jobs in line where one runs at a time
URL = "https://crowd.test/"
BODY = b"some bytes" * 1000
S = JobState
BLOCKED = """
[[bandwidth_limits.work]]
days = ["{today}"]
from = 0
to = 24
limits = {{ high = 0, normal = 0, low = 0 }}
"""


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A journal of 100,000 queued jobs of priority NORMAL; make a copy of it."""
    directory = tmp_path_factory.mktemp("crowd", numbered=True)
    directory.chmod(0o700)
    asyncio.run(make_crowd(directory / "queue.db", CROWD, url=URL))
    return directory


@pytest.fixture
def crowded(crowd: Path, tmp_path: Path) -> Path:
    shutil.copytree(crowd, tmp_path / "journal")
    return tmp_path / "journal" / "queue.db"


@pytest.fixture
def network() -> Iterator[FakeNetwork]:
    with FakeNetwork() as fake:
        fake.clock.freeze()  # no job has waited for too long where the servers are silent
        fake.serve(URL, BODY)
        yield fake


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "queue.db"


@pytest.fixture
def two_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two jobs of each priority are in line, and two are read at once."""
    monkeypatch.setattr(roster_module, "AHEAD", 2)
    monkeypatch.setattr(roster_module, "PAGE", 2)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many jobs were asked of the journal at once, each time."""
    counts: list[int] = []
    honest = SqliteStore.load

    async def load(self: SqliteStore, job_ids: Any = None) -> Any:
        assert job_ids is not None, "all jobs were read"
        counts.extend([len(job_ids)] if job_ids else [])
        return await honest(self, job_ids)

    monkeypatch.setattr(SqliteStore, "load", load)
    return counts


def in_memory(manager: bits.BitsManager) -> Roster:
    assert manager._desk is not None
    return manager._desk.engine.roster


async def a_job(manager: bits.BitsManager, path: Path, url: str = URL, **kwargs: Any) -> bits.Job:
    job = await manager.create_job(path.name, **kwargs)
    await job.add_file(url, path)
    return job


async def forgotten(manager: bits.BitsManager, path: Path, prepare: Callable[[bits.Job], Awaitable[object]], **kwargs: Any) -> Any:
    """The id of a job that was made, and that nobody holds any more."""
    job = await a_job(manager, path, **kwargs)
    await prepare(job)
    job_id = job.id
    del job
    await until(lambda: in_memory(manager).live(job_id) is None)
    return job_id


# -- 100,000


async def test_of_100_000_queued_jobs_only_the_next_ones_are_read(network: FakeNetwork, crowded: Path, loaded: list[int]) -> None:
    network.pause()
    async with bits.BitsManager(store=crowded) as manager:
        await until(lambda: network.requests)
        last = await manager.get_job(copy_of(CROWD - 1))
        await last.set_description("wakes the engine")
        await until(lambda: len(in_memory(manager)) == NEXT + 2)  # and the place of the one that runs was taken by another
        assert sorted(loaded) == [1, 1, NEXT]
        assert network.requests[0].url == URL


async def test_the_last_of_100_000_jobs_is_found_and_goes_first_when_it_is_more_important(
    network: FakeNetwork, crowded: Path, loaded: list[int]
) -> None:
    network.serve(f"{URL}{CROWD - 1}", BODY)
    network.pause()
    async with bits.BitsManager(store=crowded) as manager:
        await until(lambda: network.requests)
        last = await manager.get_job(copy_of(CROWD - 1))
        assert (last.state, str(last.waiting)) == (S.QUEUED, "waiting for its turn")
        await last.set_priority(JobPriority.HIGH)
        await until(lambda: len(network.requests) == 2)
        network.resume()
        await last.wait()
        assert [request.url for request in network.requests[:2]] == [URL, f"{URL}{CROWD - 1}"]
        assert sum(loaded) < 3 * AHEAD
        assert len(in_memory(manager)) < 2 * AHEAD


async def test_100_000_jobs_of_an_absent_owner_do_not_keep_others_from_running(
    network: FakeNetwork, crowded: Path, loaded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    network.pause()
    async with bits.BitsManager(store=crowded, run=False) as manager:
        job = await a_job(manager, crowded.parent / "other", owner=fake_token("alice"))
        await job.resume()
    asked = []

    async def logon(job: bits.Job) -> bits.Token | None:
        asked.append(job.owner_name)
        return fake_token("alice") if job.owner_name == "alice" else None

    monkeypatch.setattr("bits_async.jobs.manager._stand_in", nobody)
    async with bits.BitsManager(store=crowded, logon=logon) as manager:
        await until(lambda: network.requests)
        assert network.requests[0].identity == "alice"
        assert asked[-1] == "alice"
        assert len(asked) == 2
        assert sum(loaded) <= AHEAD + 2
        await manager.get_job(copy_of(1))  # its owner: the absent one has come
        network.resume()
        await until(lambda: len(network.requests) > 1)
        assert (network.requests[1].url, network.requests[1].identity) == (URL, bits.Token.for_process().name)


async def nobody(*_: object) -> None:
    """The token of an owner who must come himself."""


async def test_a_limit_of_jobs_counts_those_that_are_not_in_memory(network: FakeNetwork, crowded: Path, loaded: list[int]) -> None:
    network.pause()
    alice = fake_token("alice")
    async with bits.BitsManager(store=crowded, limits=bits.Limits(jobs_per_machine=CROWD + 1, jobs_per_user=CROWD)) as manager:
        await manager.create_job("one more", owner=alice)
        with pytest.raises(bits.AccessDenied) as caught:
            await manager.create_job("too much", owner=alice)
        assert caught.value.code == ErrorCode.BG_E_TOO_MANY_JOBS_PER_MACHINE
        assert len(in_memory(manager)) <= AHEAD + 1


# -- what comes back


async def test_all_jobs_run_in_their_order_however_short_the_line_is(network: FakeNetwork, store: Path, two_ahead: None) -> None:
    await make_crowd(store, 12, url=URL)
    for number in range(1, 12):
        network.serve(f"{URL}{number}", BODY)
    network.pause()
    async with bits.BitsManager(store=store) as manager:
        await until(lambda: network.requests)
        assert len(in_memory(manager)) <= 3
        network.resume()
        await manager.join()
        assert [request.url for request in network.requests] == [URL, *(f"{URL}{number}" for number in range(1, 12))]
        await until(lambda: len(in_memory(manager)) == 0)
        jobs = [job async for job in manager.enum_jobs()]
        assert [job.state for job in jobs] == [S.TRANSFERRED] * 12
        assert [job.id for job in jobs[1:]] == [copy_of(number) for number in range(1, 12)]


async def test_jobs_are_listed_a_page_at_a_time(network: FakeNetwork, store: Path, two_ahead: None) -> None:
    await make_crowd(store, 9, url=URL)
    most, numbers = 0, []
    async with bits.BitsManager(store=store, run=False) as manager:
        async for job in manager.enum_jobs():
            numbers.append(job.id)
            await manager.create_job("meanwhile")  # not one of those that were there
            del job
            most = max(most, len(in_memory(manager)))
    assert (len(numbers), len(set(numbers))) == (9, 9)
    assert most <= 4


async def test_jobs_of_one_class_go_on_in_turn_though_they_are_forgotten_meanwhile(
    network: FakeNetwork, store: Path, two_ahead: None
) -> None:
    await make_crowd(store, 5, url=URL)
    for number in range(1, 5):
        network.serve(f"{URL}{number}", BODY)
    network.pause()
    order = [URL, *(f"{URL}{number}" for number in range(1, 5))]
    async with bits.BitsManager(store=store, limits=bits.Limits(time_slice=7)) as manager:
        for count in range(1, 9):
            await until(lambda count=count: len(network.requests) == count)  # type: ignore[misc]
            await until(lambda: len(in_memory(manager)) <= 3)
            await until(lambda: manager._desk.engine.roster.running)  # type: ignore[union-attr]
            await asyncio.sleep(0.05)
            network.clock.advance(6.5)
            await asyncio.sleep(0.05)
            assert len(network.requests) == count, "its slice is not over"
            network.clock.advance(0.5)
    assert [request.url for request in network.requests] == [*order, *order][: len(network.requests)]


async def test_after_a_restart_the_job_that_was_running_goes_on_first(network: FakeNetwork, store: Path, two_ahead: None) -> None:
    await make_crowd(store, 5, url=URL)
    network.pause()
    for _ in range(2):
        async with bits.BitsManager(store=store):
            await until(lambda: network.requests)
            assert network.requests.pop().url == URL


async def test_dynamic_content_that_may_not_run_keeps_nobody_back(
    network: FakeNetwork, store: Path, tmp_path: Path, two_ahead: None
) -> None:
    async with bits.BitsManager(store=store) as manager:
        for number in range(4):
            dynamic = await a_job(manager, tmp_path / f"d{number}")
            await dynamic.set_dynamic_content(True)
            await dynamic.resume()
        plain = await a_job(manager, tmp_path / "plain")
        await plain.resume()
        await plain.wait()
        assert dynamic.waiting is not None
        assert dynamic.waiting.reason is WaitingReason.NOT_FOREGROUND


@pytest.mark.parametrize("careful", [1, NEXT, 3 * NEXT])
async def test_jobs_that_wait_for_the_cost_of_the_connection_keep_nobody_back(
    network: FakeNetwork, store: Path, tmp_path: Path, careful: int
) -> None:
    """However many stand before the one that can run: nobody has said yet what the connection costs."""

    class Silent:
        async def watch(self) -> AsyncIterator[CostFlags]:
            await asyncio.Event().wait()
            yield CostFlags.UNRESTRICTED

    async with bits.BitsManager(store=store, run=False) as manager:
        for number in range(careful):
            job = await a_job(manager, tmp_path / f"{number}")
            await job.set_cost_flags(CostFlags.TRANSFER_NOT_ROAMING)
            await job.resume()
        plain = await a_job(manager, tmp_path / "plain")
        await plain.resume()
    async with bits.BitsManager(store=store, cost_source=Silent()) as manager:
        await (await manager.get_job(plain.id)).wait()
        assert len(network.requests) == 1


async def test_jobs_of_several_absent_owners_are_passed_over_and_go_on_when_theirs_comes(
    network: FakeNetwork, store: Path, tmp_path: Path, two_ahead: None
) -> None:
    people = ["alice", "bob", "carol"]
    async with bits.BitsManager(store=store, run=False) as manager:
        for number in range(12):
            job = await a_job(manager, tmp_path / f"{number}", owner=fake_token(people[number % 3]))
            await job.resume()
        mine = await a_job(manager, tmp_path / "mine")
        await mine.resume()
    async with bits.BitsManager(store=store) as manager:
        await (await manager.get_job(mine.id)).wait()
        await until(lambda: not manager._desk.engine.roster.running)  # type: ignore[union-attr]
        assert len(network.requests) == 1
        with bits.impersonate(fake_token("root", elevated=True)):
            theirs = await manager.get_job(job.id)
        assert theirs.waiting is not None
        assert theirs.waiting.reason is WaitingReason.NO_OWNER_TOKEN
        with bits.impersonate(fake_token("carol")):
            await manager.get_job(job.id)
        await theirs.wait()
        await until(lambda: len(network.requests) == 5)
        assert {request.identity for request in network.requests[1:]} == {"carol"}


async def test_a_job_that_nobody_holds_is_tried_again_and_given_up_in_time(network: FakeNetwork, store: Path, tmp_path: Path) -> None:
    network.serve(URL, b"", status=503)

    async def fail(job: bits.Job) -> None:
        await job.set_no_progress_timeout(1300)
        await job.resume()
        await until(lambda: job.state is S.TRANSIENT_ERROR)

    async with bits.BitsManager(store=store) as manager:
        job_id = await forgotten(manager, tmp_path / "f", fail)
        for count in (2, 3):
            network.clock.advance(599)
            await asyncio.sleep(0.05)
            assert len(network.requests) == count - 1
            network.clock.advance(1)
            await until(lambda count=count: len(network.requests) == count)  # type: ignore[misc]
            await until(lambda: in_memory(manager).live(job_id) is None)
        job = await manager.get_job(job_id)
        assert (job.state, job.error_count) == (S.ERROR, 3)
        assert job.error is not None
        assert job.error.code == ErrorCode.BG_E_NO_PROGRESS


@pytest.mark.parametrize("days", [-30, 30])
async def test_a_change_of_the_wall_clock_moves_no_retry(network: FakeNetwork, store: Path, tmp_path: Path, days: int) -> None:
    network.serve(URL, b"", status=503)
    clock = network.clock

    async def fail(job: bits.Job) -> None:
        await job.resume()
        await until(lambda: job.state is S.TRANSIENT_ERROR)

    async with bits.BitsManager(store=store) as manager:
        await forgotten(manager, tmp_path / "forgotten", fail)
        held = await a_job(manager, tmp_path / "held")
        await fail(held)
        clock.set_wall_clock(days * 24 * 3600)
        await asyncio.sleep(0.05)
        clock.advance(599)
        await asyncio.sleep(0.05)
        assert len(network.requests) == 2
        clock.advance(1)
        await until(lambda: len(network.requests) == 4)
        await until(lambda: held.error_count == 2)
        assert held.waiting is not None
        assert held.waiting.until == clock.now() + timedelta(seconds=600)


async def test_retries_of_jobs_whose_owner_is_not_here_do_not_look_through_the_line(
    network: FakeNetwork, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line passes them over: of many, that is a look at each of them."""
    network.serve(URL, b"", status=503)
    alice, looks, honest = fake_token("alice"), 0, SqliteStore.in_line
    async with bits.BitsManager(store=store) as manager:
        queued = await a_job(manager, tmp_path / "queued", owner=alice)
        jobs = [await a_job(manager, tmp_path / f"{number}", owner=alice) for number in range(3)]
        for number, job in enumerate(jobs):
            await job.set_minimum_retry_delay(60 * (number + 1))
            await job.resume()
            await until(lambda job=job: job.state is S.TRANSIENT_ERROR)  # type: ignore[misc]
        network.pause()
        await queued.resume()
        await until(lambda: queued.state is S.CONNECTING)

    async def counted(*args: Any, **named: Any) -> Any:
        nonlocal looks
        looks += 1
        return await honest(*args, **named)

    monkeypatch.setattr(SqliteStore, "in_line", counted)
    async with bits.BitsManager(store=store) as manager:
        await until(lambda: looks == 2)  # the first met an owner who is not here, the second passed him over
        await let_things_happen()
        network.clock.advance(600)
        with bits.impersonate(fake_token("admin", elevated=True)):
            handles = [await manager.get_job(job.id) for job in jobs]
        await until(lambda: all(job.state is S.QUEUED for job in handles))
        await let_things_happen()
        assert looks == 2
        network.serve(URL, BODY)
        network.resume()
        with bits.impersonate(alice):
            await manager.get_job(jobs[0].id)
        for job in handles:
            await job.wait()


async def test_jobs_that_nobody_holds_are_cancelled_when_nobody_touches_them(
    network: FakeNetwork, store: Path, tmp_path: Path, two_ahead: None
) -> None:
    async def finish(job: bits.Job) -> None:
        await job.resume()
        await job.wait()

    async with bits.BitsManager(store=store, limits=bits.Limits(job_inactivity_timeout=3600)) as manager:
        ids = [await forgotten(manager, tmp_path / f"{number}", finish) for number in range(5)]
        network.clock.advance(1800)
        touched = await manager.get_job(ids[1])
        await touched.set_description("still wanted")
        assert len(list(tmp_path.glob(".*bits-part"))) == 5
        network.clock.advance(1800)
        await until(lambda: len(list(tmp_path.glob(".*bits-part"))) == 1)
        async with asyncio.timeout(DEADLINE):  # a job leaves the journal after its part file
            while [job.id async for job in manager.enum_jobs()] != [ids[1]]:  # noqa: ASYNC110 - the journal is asked
                await asyncio.sleep(0.001)


async def test_tokens_rules_and_answers_outlive_that_nobody_holds_the_job(network: FakeNetwork, store: Path, tmp_path: Path) -> None:
    alice, helper = fake_token("alice"), fake_token("helper")
    network.serve(URL, BODY, require="helper")

    async def entrust(job: bits.Job) -> None:
        with bits.impersonate(alice):
            options = await job.token_options()
        with bits.impersonate(helper):
            await options.set_helper_token()
            await options.set_helper_token_flags(bits.HelperTokenFlags.NETWORK)

    async with bits.BitsManager(store=store) as manager:
        job_id = await forgotten(manager, tmp_path / "f", entrust, owner=alice)
        with bits.impersonate(alice):
            job = await manager.get_job(job_id)
            assert (await job.token_options()).helper_token_sid == helper.sid
        await job.resume()
        await job.wait()
        answered = job.files[0].http_response_headers
        assert answered
        del job
        await until(lambda: in_memory(manager).live(job_id) is None)
        with bits.impersonate(alice):
            assert (await manager.get_job(job_id)).files[0].http_response_headers == answered
            await (await manager.get_job(job_id)).complete()
        assert not manager._desk.engine.roster._remnants  # type: ignore[union-attr]


async def test_a_job_whose_secret_is_lost_says_so_when_its_turn_comes_and_only_once(
    network: FakeNetwork, store: Path, tmp_path: Path, two_ahead: None
) -> None:
    async def entrust(job: bits.Job) -> None:
        await job.set_credentials(bits.AuthTarget.SERVER, bits.AuthScheme.BASIC, "user", "password")
        await job.resume()

    async with bits.BitsManager(store=store, run=False) as manager:
        ids = [await forgotten(manager, tmp_path / f"{number}", entrust) for number in range(3)]
    store.with_name("queue.db.key").unlink()
    async with bits.BitsManager(store=store) as manager:
        await manager.join()
        for job_id in ids:
            job = await manager.get_job(job_id)
            assert (job.state, job.error_count) == (S.ERROR, 1)
            assert job.error is not None
            assert job.error.code == ErrorCode.BG_E_INVALID_CREDENTIALS
        assert network.requests == []
        await job.resume()
        del job
        await manager.join()
        assert (await manager.get_job(ids[-1])).state is S.TRANSFERRED


async def test_a_job_with_a_callback_is_told_though_nobody_holds_it(network: FakeNetwork, store: Path, tmp_path: Path) -> None:
    told: list[object] = []

    class Callback(bits.BackgroundCopyCallback):
        def job_transferred(self, job: bits.Job) -> None:
            told.append(job.state)

    async with bits.BitsManager(store=store) as manager:
        job = await a_job(manager, tmp_path / "f")
        await job.set_notify_interface(Callback())
        await job.resume()
        del job
        gc.collect()
        await until(lambda: told)
    assert told == [S.TRANSFERRED]


async def test_where_group_policy_lets_no_job_run_the_first_ones_say_so_and_the_others_are_left_alone(
    network: FakeNetwork, store: Path, tmp_path: Path, two_ahead: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    await make_crowd(store, 9, url=URL)
    for number in range(1, 9):
        network.serve(f"{URL}{number}", BODY)
    monkeypatch.setattr(engine_module, "AHEAD", 2)
    today = DAYS[network.clock.now().astimezone().weekday()]
    async with bits.BitsManager(store=store, policy=GroupPolicy.from_toml(BLOCKED.format(today=today))) as manager:
        async with asyncio.timeout(DEADLINE):
            while [job.state async for job in manager.enum_jobs()].count(S.TRANSIENT_ERROR) < 2:  # noqa: ASYNC110 - the journal is asked
                await asyncio.sleep(0.001)
        await let_things_happen()
        jobs = [job async for job in manager.enum_jobs()]
        assert [job.state for job in jobs] == [S.TRANSIENT_ERROR] * 2 + [S.QUEUED] * 7
        assert {job.waiting.reason for job in jobs if job.waiting} == {WaitingReason.POLICY}
        assert network.requests == []
        network.clock.advance(86400)
        await manager.join()
        assert len(network.requests) == 9


async def test_two_handles_on_one_job_see_the_same_and_a_stream_keeps_it(network: FakeNetwork, store: Path, tmp_path: Path) -> None:
    async with bits.BitsManager(store=store) as manager:
        job_id = await forgotten(manager, tmp_path / "f", lambda job: job.set_description("x"))
        one, two = await asyncio.gather(manager.get_job(job_id), manager.get_job(job_id))
        await one.set_description("y")
        assert two.description == "y"
        stream = two.events(follow=True)
        del two
        await one.resume()
        await one.wait()
        await one.complete()
        states = [event.state async for event in stream if isinstance(event, bits.JobChanged)]
        assert states[-1] is S.ACKNOWLEDGED


async def test_a_more_important_job_waits_for_one_write_at_most(
    network: FakeNetwork, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, honest = list[int](), Entry.stop

    def stop(entry: Entry) -> None:
        network.resume()  # the rest is there at once
        told.append(entry.progress.bytes_transferred)
        honest(entry)

    monkeypatch.setattr(Entry, "stop", stop)
    network.serve(f"{URL}big", bytes(64 << 20))
    network.pause(after=8 << 20)  # so that it has not come to its end before the other one is there
    async with bits.BitsManager(store=store) as manager:
        low = await a_job(manager, tmp_path / "big", f"{URL}big", priority=JobPriority.LOW)
        high = await a_job(manager, tmp_path / "small", priority=JobPriority.HIGH)
        await low.resume()
        await until(lambda: low.progress.bytes_transferred)
        await high.resume()
        await until(lambda: high.state is not S.QUEUED)
        assert low.state is S.QUEUED
        assert low.progress.bytes_transferred - told[0] <= 4 << 20
        await high.wait()


async def test_so_many_background_jobs_run_at_once_as_the_limits_say(network: FakeNetwork, store: Path, tmp_path: Path) -> None:
    network.pause()
    async with bits.BitsManager(store=store, limits=bits.Limits(background_jobs=3)) as manager:
        jobs = [await a_job(manager, tmp_path / f"{number}") for number in range(5)]
        for job in jobs:
            await job.resume()
        await until(lambda: len(network.requests) == 3)
        await asyncio.sleep(0.05)
        assert [job.state for job in jobs] == [S.CONNECTING] * 3 + [S.QUEUED] * 2
