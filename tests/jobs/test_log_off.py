"""A log-off takes the tokens that are tied to the session from the jobs, at once and everywhere; what is finished is left alone."""

import asyncio
import contextlib
import dataclasses
import gc
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import bits_async as bits
from bits_async import BitsManager, ErrorCode, HelperTokenFlags, Job, JobState, Token, WaitingReason, impersonate
from bits_async.jobs import logoff
from bits_async.jobs.callbacks import commander
from bits_async.testing import FakeNetwork, _FakeSessions, fake_token
from tests.waiting import until

if TYPE_CHECKING:
    from tests.local_users import LocalUser

URL = "https://files.test/f"
BODY = b"log-off" * 1000
NETWORK, LOCAL = HelperTokenFlags.NETWORK, HelperTokenFlags.LOCAL_FILE


@pytest.fixture
def network() -> Iterator[FakeNetwork]:
    with FakeNetwork() as network:
        network.clock.freeze()  # no job has waited for too long where the servers are silent
        network.serve(URL, BODY)
        yield network


@pytest.fixture
async def manager(network: FakeNetwork, tmp_path: Path) -> AsyncIterator[BitsManager]:
    async with BitsManager(store=tmp_path / "queue.db") as manager:
        yield manager


async def make(
    manager: BitsManager, path: Path, *, owner: Token, helper: Token | None = None, flags: HelperTokenFlags = HelperTokenFlags.NONE
) -> Job:
    job = await manager.create_job(path.name, owner=owner)
    await job.add_file(URL, path)
    await help_with(job, owner, helper, flags)
    return job


async def help_with(job: Job, owner: Token, helper: Token | None, flags: HelperTokenFlags) -> None:
    with impersonate(owner):
        options = await job.token_options()
    await options.set_helper_token_flags(flags)
    if helper is not None:
        with impersonate(helper):
            await options.set_helper_token()


async def state(job: Job, *wanted: JobState) -> None:
    async with asyncio.timeout(20):
        async with job.events(follow=True) as stream:
            async for _ in stream:
                if job.state in wanted:
                    return


async def settled(manager: BitsManager) -> None:
    """The log-off has been worked off: one that came later has an effect."""
    probe = await make(manager, Path("/nowhere/probe"), owner=fake_token("probe", session="probe"), flags=NETWORK)
    manager._seams.network.log_off("probe")  # type: ignore[union-attr,attr-defined]
    await state(probe, JobState.ERROR)
    await probe.cancel()


@pytest.mark.parametrize("flags", [NETWORK, LOCAL, NETWORK | LOCAL])
@pytest.mark.parametrize("before", ["suspended", "queued", "transferring", "retrying"])
async def test_an_unfinished_job_that_needs_its_helper_is_in_error_at_once(
    manager: BitsManager, network: FakeNetwork, tmp_path: Path, before: str, flags: HelperTokenFlags
) -> None:
    helper = fake_token("bob", session="s1")
    job = await make(manager, tmp_path / "f", owner=fake_token("alice"), helper=helper, flags=flags)
    if before == "queued":
        other = await make(manager, tmp_path / "g", owner=fake_token("carol"))
        network.pause()
        await other.resume()
        await state(other, JobState.CONNECTING, JobState.TRANSFERRING)
        await job.resume()
        assert job.state is JobState.QUEUED
    elif before == "transferring":
        network.pause()
        await job.resume()
        await state(job, JobState.CONNECTING, JobState.TRANSFERRING)
    elif before == "retrying":
        network.fail(URL, times=1)
        await job.resume()
        await state(job, JobState.TRANSIENT_ERROR)
    network.log_off("s1")
    await state(job, JobState.ERROR)
    assert job.error is not None
    assert job.error.code == ErrorCode.BG_E_TOKEN_REQUIRED
    assert "logged off" in str(job.error)
    assert job.error_count >= 1
    with impersonate(fake_token("admin", elevated=True)):
        options = await job.token_options()
    assert options.helper_token_sid is None
    assert options.helper_token_flags is flags
    assert helper.closed


@pytest.mark.parametrize("recovery", ["another helper", "no helper"])
async def test_it_goes_on_with_another_helper_or_without_one(
    manager: BitsManager, network: FakeNetwork, tmp_path: Path, recovery: str
) -> None:
    alice = fake_token("alice")
    job = await make(manager, tmp_path / "f", owner=alice, helper=fake_token("bob", session="s1"), flags=NETWORK)
    network.pause()
    await job.resume()
    await state(job, JobState.CONNECTING, JobState.TRANSFERRING)
    network.log_off("s1")
    await state(job, JobState.ERROR)
    network.resume()
    if recovery == "another helper":
        await help_with(job, alice, fake_token("bob", session="s2"), NETWORK)
    else:
        await help_with(job, alice, None, HelperTokenFlags.NONE)
    await job.resume()
    await job.wait()
    (path,) = await job.complete()
    assert path.read_bytes() == BODY
    assert network.requests[-1].identity == ("bob" if recovery == "another helper" else "alice")


async def test_a_finished_job_is_left_alone_and_says_so_when_it_needs_the_token(
    manager: BitsManager, network: FakeNetwork, tmp_path: Path
) -> None:
    alice = fake_token("alice")
    by_network = await make(manager, tmp_path / "f", owner=alice, helper=fake_token("bob", session="s1"), flags=NETWORK)
    by_file = await make(manager, tmp_path / "g", owner=alice, helper=fake_token("eve", session="s1"), flags=LOCAL)
    for job in (by_network, by_file):
        await job.resume()
        await job.wait()
    network.log_off("s1")
    await settled(manager)
    assert by_network.state is by_file.state is JobState.TRANSFERRED
    assert await by_network.complete() == (tmp_path / "f",)
    with pytest.raises(bits.TokenRequired):
        await by_file.complete()
    assert by_file.state is JobState.TRANSFERRED


async def test_other_sessions_and_tokens_without_one_stay(manager: BitsManager, network: FakeNetwork, tmp_path: Path) -> None:
    alice = fake_token("alice")
    kept = [
        await make(manager, tmp_path / "f", owner=alice, helper=fake_token("bob", session="s2"), flags=NETWORK),
        await make(manager, tmp_path / "g", owner=alice, helper=fake_token("bob"), flags=NETWORK),
    ]
    network.log_off("s1")
    await settled(manager)
    for job in kept:
        await job.resume()
        await job.wait()
    assert [request.identity for request in network.requests] == ["bob", "bob"]


async def test_jobs_of_an_owner_who_logged_off_wait_until_he_is_back(manager: BitsManager, network: FakeNetwork, tmp_path: Path) -> None:
    running = await make(manager, tmp_path / "f", owner=fake_token("alice", session="s1"))
    network.pause()
    await running.resume()
    await state(running, JobState.CONNECTING, JobState.TRANSFERRING)
    network.log_off("s1")
    await state(running, JobState.QUEUED)
    await settled(manager)
    assert running.waiting is not None
    assert running.waiting.reason is WaitingReason.NO_OWNER_TOKEN
    network.resume()
    with impersonate(fake_token("alice", session="s2")):
        back = await manager.get_job(running.id)
    await back.wait()
    assert await back.complete() == (tmp_path / "f",)


async def test_the_owners_log_off_takes_the_helper_along(manager: BitsManager, network: FakeNetwork, tmp_path: Path) -> None:
    job = await make(manager, tmp_path / "f", owner=fake_token("alice", session="s1"), helper=fake_token("bob"), flags=NETWORK)
    network.log_off("s1")
    await state(job, JobState.ERROR)
    assert job.error is not None
    assert job.error.code == ErrorCode.BG_E_TOKEN_REQUIRED
    assert "owner logged off" in str(job.error)


async def test_jobs_that_nobody_holds_are_found_too(manager: BitsManager, network: FakeNetwork, tmp_path: Path) -> None:
    alice = fake_token("alice", session="s1")
    ids = []
    for number in range(5):
        job = await make(manager, tmp_path / f"{number}", owner=alice, helper=fake_token("bob"), flags=NETWORK)
        ids.append(job.id)
        del job
    network.log_off("s1")
    await settled(manager)
    with impersonate(fake_token("admin", elevated=True)):
        jobs = [await manager.get_job(job_id) for job_id in ids]
    assert {job.state for job in jobs} == {JobState.ERROR}


async def test_a_token_whose_session_was_over_already_is_given_up_too(manager: BitsManager, network: FakeNetwork, tmp_path: Path) -> None:
    network.log_off("s1")
    job = await make(manager, tmp_path / "f", owner=fake_token("alice"), helper=fake_token("bob", session="s1"), flags=NETWORK)
    await state(job, JobState.ERROR)
    assert job.error is not None
    assert job.error.code == ErrorCode.BG_E_TOKEN_REQUIRED


async def test_t05_a_command_is_not_run_as_a_setter_who_logged_off_while_nobody_held_the_job(
    manager: BitsManager, network: FakeNetwork, tmp_path: Path
) -> None:
    carol, bob = fake_token("carol"), fake_token("bob", session="s1")
    job = await make(manager, tmp_path / "f", owner=carol)
    with impersonate(bob):
        await job.set_notify_cmd_line("/bin/true")
    job_id = job.id
    del job
    gc.collect()
    assert manager._desk is not None
    roster = manager._desk.engine.roster
    await until(lambda: roster.live(job_id) is None)
    network.log_off("s1")
    await settled(manager)
    assert bob.closed
    with impersonate(carol):
        job = await manager.get_job(job_id)
    await job.resume()
    await job.wait()
    assert commander(job._entry) is None
    assert network.commands == []


async def test_t05_nobody_stands_in_for_a_setter_who_logged_off(manager: BitsManager, network: FakeNetwork, tmp_path: Path) -> None:
    job = await make(manager, tmp_path / "f", owner=fake_token("carol"))
    with impersonate(fake_token("bob", session="s1")):
        await job.set_notify_cmd_line("/bin/true")
    network.log_off("s1")
    await settled(manager)
    assert manager._desk is not None
    setter = job._entry.job.notify_setter
    assert setter is not None
    assert manager._desk.engine.roster._adopted.get(setter, "would be asked for") is None


async def test_an_owners_token_ends_though_nobody_holds_a_job_of_his(manager: BitsManager, network: FakeNetwork, tmp_path: Path) -> None:
    alice = fake_token("alice", session="s1")
    await make(manager, tmp_path / "f", owner=alice)
    gc.collect()
    network.log_off("s1")
    await settled(manager)
    assert alice.closed


async def test_a_job_whose_command_hangs_delays_no_log_off(
    manager: BitsManager, network: FakeNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logoff, "PATIENCE", 0.05)
    bob, eve = fake_token("bob", session="s1"), fake_token("eve", session="s2")
    hung = await make(manager, tmp_path / "f", owner=fake_token("alice"), helper=bob, flags=NETWORK)
    other = await make(manager, tmp_path / "g", owner=fake_token("carol"), helper=bob, flags=NETWORK)
    later = await make(manager, tmp_path / "h", owner=fake_token("carol"), helper=eve, flags=NETWORK)
    assert manager._desk is not None
    async with manager._desk.engine.command(hung._entry):  # as complete() does that waits for a file system
        network.log_off("s1")
        await state(other, JobState.ERROR)
        assert bob.closed
        network.log_off("s2")
        await state(later, JobState.ERROR)
        assert eve.closed
        assert hung.state is JobState.SUSPENDED
    await state(hung, JobState.ERROR)


@pytest.mark.parametrize("what", ["watching", "asking", "logging off"])
async def test_log_offs_are_seen_again_after_something_broke(
    manager: BitsManager, network: FakeNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(logoff, "AGAIN", 0.02)
    assert manager._log_offs is not None
    assert manager._desk is not None
    broken: list[str] = []

    def breaks(func: Callable[..., Any]) -> Callable[..., Any]:
        def once(*args: Any, **kwargs: Any) -> Any:
            if not broken:
                broken.append(what)
                raise ValueError("a defect")
            return func(*args, **kwargs)

        return once

    if what == "watching":
        monkeypatch.setattr(manager._log_offs, "_watch", breaks(manager._log_offs._watch))
    elif what == "asking":
        monkeypatch.setattr(_FakeSessions, "user_of", breaks(_FakeSessions.user_of))
    else:
        roster = manager._desk.engine.roster
        monkeypatch.setattr(roster, "touched_by", breaks(roster.touched_by))
    job = await make(manager, tmp_path / "f", owner=fake_token("alice"), helper=fake_token("bob", session="s1"), flags=NETWORK)
    network.log_off("s1")
    await state(job, JobState.ERROR)
    assert broken == [what]


async def test_a_session_that_nobody_could_tell_of_is_asked_for_again(
    manager: BitsManager, network: FakeNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logoff, "AGAIN", 0.02)
    answers: list[str | None] = []

    async def user_of(self: object, session: str) -> str | None:
        answers.append(session)
        if len(answers) < 3:
            raise LookupError("the bus is away")
        return None

    monkeypatch.setattr(_FakeSessions, "user_of", user_of)
    job = await make(manager, tmp_path / "f", owner=fake_token("alice"), helper=fake_token("bob", session="s1"), flags=NETWORK)
    await state(job, JobState.ERROR)


@pytest.mark.privileged
@pytest.mark.logind
async def test_a_real_log_off_ends_the_token_of_the_session(
    users: Mapping[str, "LocalUser"], world_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.logind import Logind, Session, SystemBus
    from tests.peers import Origin

    bob = users["bitsbob"]
    world_dir.chmod(0o777)
    with SystemBus() as bus, Logind(bus):
        monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", bus.address)
        session = await Session.begin(bus.address, bob.uid)
        helper = await Token.for_session(session.name)
        assert (helper.local.key, helper.session) == (f"uid:{bob.uid}", session.name)
        async with Origin() as origin, BitsManager(store=tmp_path / "queue.db") as manager:
            url = origin.serve("/f", BODY)
            job = await manager.create_job("real")
            await job.set_minimum_retry_delay(3600)
            await job.add_file(url, world_dir / "f")
            await help_with(job, Token.for_process(), helper, LOCAL)
            await session.end()
            await state(job, JobState.ERROR)
            assert job.error is not None
            assert job.error.code == ErrorCode.BG_E_TOKEN_REQUIRED
            assert helper.closed
            with pytest.raises(bits.ImpersonationFailed, match="no session"):
                await Token.for_session(session.name)


@pytest.mark.privileged
@pytest.mark.logind
async def test_t12_after_a_restart_nobody_stands_in_for_an_owner_who_has_logged_off_meanwhile(
    users: Mapping[str, "LocalUser"], world_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may act for its users, but for who made a job in a logon session only while that lasts, whatever happened while it was away."""
    from tests.logind import Logind, Session, SystemBus
    from tests.peers import Origin

    world_dir.chmod(0o777)
    with SystemBus() as bus, Logind(bus):
        monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", bus.address)
        sessions = {name: await Session.begin(bus.address, users[name].uid) for name in ("bitsalice", "bitsbob")}
        async with Origin() as origin:
            url, jobs = origin.serve("/f", BODY), {}
            async with BitsManager(store=tmp_path / "queue.db", run=False) as manager:
                for name, session in sessions.items():
                    job = await manager.create_job(name, owner=await Token.for_session(session.name))
                    await job.add_file(url, world_dir / name)
                    await job.resume()
                    jobs[name] = job.id
            await sessions["bitsbob"].end()
            async with BitsManager(store=tmp_path / "queue.db") as manager:
                here, gone = await manager.get_job(jobs["bitsalice"]), await manager.get_job(jobs["bitsbob"])
                await here.wait()
                assert (gone.state, gone.waiting.reason) == (JobState.QUEUED, WaitingReason.NO_OWNER_TOKEN)  # type: ignore[union-attr]
                later = await manager.create_job("later", owner=here._entry.owner)
                await later.add_file(url, world_dir / "later")
                await sessions["bitsalice"].end()
                await until(lambda: later._entry.owner is None, "for the log-off to be seen")
                back = await Session.begin(bus.address, users["bitsbob"].uid)
                with impersonate(await Token.for_session(back.name)):
                    await (await manager.get_job(jobs["bitsbob"])).wait()
            async with BitsManager(store=tmp_path / "queue.db") as manager:
                again = await manager.get_job(jobs["bitsbob"])
                assert again._entry.owner is not None, "after another restart too, the owner is in the session in which he came back"
            await back.end()


async def test_a_session_that_another_user_has_now_is_not_the_owner_s_and_where_nobody_knows_he_is_here(tmp_path: Path) -> None:
    class Known:
        async def user_of(self, session: str) -> str | None:
            if session == "unknown":
                raise LookupError("no logind")
            return {"3": "uid:1001", "4": "uid:1000"}.get(session)

    @contextlib.asynccontextmanager
    async def watch() -> AsyncIterator[Any]:
        yield Known()

    with FakeNetwork():
        manager = BitsManager(store=tmp_path / "queue.db")
    manager._seams = dataclasses.replace(manager._seams, sessions=watch)  # type: ignore[type-var,arg-type]
    assert await manager._session_left("uid:1000", ["3"]) is None
    assert await manager._session_left("uid:1000", ["2", "3"]) is None
    assert await manager._session_left("uid:1000", ["3", "4"]) == "4"
    assert await manager._session_left("uid:1000", ["unknown"]) == "unknown"
