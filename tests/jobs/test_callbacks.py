"""An application is told what became of its jobs, at least once and in order: by callbacks, and by commands that run as whoever set them.

Real manager, real journal, real files; the clock stands still and no program is run, except where a test says so.
"""

import asyncio
import contextlib
import contextvars
import gc
import logging
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import spnego

import bits_async as bits
from bits_async import ErrorCode, JobState, NotifyFlags, WaitingReason
from bits_async.identity.logon import NetworkOnly
from bits_async.jobs import callbacks
from bits_async.jobs.callbacks import commander
from bits_async.testing import FakeNetwork, fake_token
from tests.waiting import let_things_happen, until

F = NotifyFlags
URLS = tuple(f"https://h.test/{name}" for name in "abc")
MISSING = "https://h.test/missing"
ALL = F.JOB_TRANSFERRED | F.JOB_ERROR | F.JOB_MODIFICATION | F.FILE_TRANSFERRED | F.FILE_RANGES_TRANSFERRED
ENDS_AND_FILES = F.JOB_TRANSFERRED | F.JOB_ERROR | F.FILE_TRANSFERRED
DEADLINE = 10.0


class Told(bits.BackgroundCopyCallback):
    """Writes down what it is told; `react` is called first, with the name."""

    def __init__(self, react: Callable[[str], Awaitable[None] | None] = lambda _: None) -> None:
        self.heard: list[Any] = []
        self._react = react

    async def _note(self, name: str, *rest: Any) -> None:
        answer = self._react(name)
        if answer is not None:
            await answer
        self.heard.append((name, *rest) if rest else name)

    def job_transferred(self, job: bits.Job) -> Awaitable[None]:
        return self._note("transferred")

    def job_error(self, job: bits.Job, error: bits.BitsError) -> Awaitable[None]:
        return self._note("error", error.code)

    def job_modification(self, job: bits.Job) -> Awaitable[None]:
        return self._note("modification")

    def file_transferred(self, job: bits.Job, file: bits.JobFile) -> Awaitable[None]:
        return self._note("file", file.local_name.name)

    def file_ranges_transferred(self, job: bits.Job, file: bits.JobFile, ranges: Sequence[bits.FileRange]) -> Awaitable[None]:
        return self._note("ranges", file.local_name.name, *ranges)


class Broken(Told):
    """Fails as long as it is broken."""

    broken = True

    def __init__(self) -> None:
        super().__init__(self._break)
        self.asked: list[str] = []

    def _break(self, name: str) -> None:
        self.asked.append(name)
        if self.broken:
            raise RuntimeError("the password is s3cret")


class Scene:
    def __init__(self, network: FakeNetwork, directory: Path) -> None:
        self.network = network
        self.directory = directory
        self.manager = self.new()

    def new(self, **options: Any) -> bits.BitsManager:
        return bits.BitsManager(store=self.directory / "queue.db", **options)

    async def job(self, *urls: str, owner: bits.Token | None = None, flags: NotifyFlags | None = None, name: str = "") -> bits.Job:
        job = await self.manager.create_job("told", owner=owner, priority=bits.JobPriority.FOREGROUND)
        for url in urls or URLS[:1]:
            await job.add_file(url, self.directory / (name + url.rpartition("/")[2]))
        if flags is not None:
            await job.set_notify_flags(flags)
        return job

    async def reopened(self, job: bits.Job, **options: Any) -> None:
        """Another manager on the journal."""
        await self.manager.aclose()
        self.manager = self.new(**options)
        await self.manager.__aenter__()

    def advance(self, seconds: float) -> None:
        self.network.clock.advance(seconds)


@pytest.fixture
def network() -> Iterator[FakeNetwork]:
    with FakeNetwork() as network:
        network.clock.freeze()
        for url in URLS:
            network.serve(url, url.encode() * 1000)
        yield network


@pytest.fixture
async def scene(network: FakeNetwork, tmp_path: Path) -> AsyncIterator[Scene]:
    scene = Scene(network, tmp_path)
    await scene.manager.__aenter__()
    yield scene
    await scene.manager.aclose()


# -- callbacks ------------------------------------------------------------------------------------------------------------------------


async def test_a_callback_is_told_of_each_file_and_then_of_the_job(scene: Scene) -> None:
    job, told = await scene.job(*URLS, flags=ENDS_AND_FILES), Told()
    await job.set_notify_interface(told)
    assert job.notify_interface is told
    await job.resume()
    await until(lambda: "transferred" in told.heard)
    assert told.heard == [("file", "a"), ("file", "b"), ("file", "c"), "transferred"]


async def test_without_flags_a_callback_is_told_of_the_end_only(scene: Scene) -> None:
    job, told = await scene.job(*URLS), Told()
    assert job.notify_flags == F.JOB_TRANSFERRED | F.JOB_ERROR
    await job.set_notify_interface(told)
    await job.resume()
    await until(lambda: told.heard)
    await let_things_happen()
    assert told.heard == ["transferred"]


async def test_a_job_in_error_is_told_of_with_its_error_and_once_for_each_time_it_fails(scene: Scene) -> None:
    job, told = await scene.job(MISSING), Told()
    await job.set_notify_interface(told)
    for times in (1, 2):
        await job.resume()
        await until(lambda times=times: len(told.heard) == times)
    await let_things_happen()
    assert told.heard == [("error", 0x80190194)] * 2


async def test_a_callback_may_be_a_plain_function_and_complete_its_job(scene: Scene) -> None:
    class Completes(bits.BackgroundCopyCallback):
        def file_transferred(self, job: bits.Job, file: bits.JobFile) -> None:
            seen.append(file.temporary_name is not None)

        async def job_transferred(self, job: bits.Job) -> None:
            seen.append(await job.complete())

    seen: list[Any] = []
    job = await scene.job(flags=ENDS_AND_FILES)
    await job.set_notify_interface(Completes())
    await job.resume()
    await until(lambda: job.state is JobState.ACKNOWLEDGED)
    await let_things_happen()
    assert seen == [True, (scene.directory / "a",)]
    assert (scene.directory / "a").read_bytes() == URLS[0].encode() * 1000
    await scene.manager.aclose()
    with contextlib.closing(sqlite3.connect(scene.directory / "queue.db")) as db:
        assert db.execute("SELECT id FROM jobs").fetchall() == []  # that it was told did not bring it back


async def test_what_happened_before_the_callback_was_set_is_told_at_once(scene: Scene) -> None:
    job, told = await scene.job(*URLS, flags=ENDS_AND_FILES), Told()
    await job.resume()
    await job.wait()
    await job.set_notify_interface(told)
    await until(lambda: len(told.heard) == 4)
    assert told.heard[-1] == "transferred"
    again = Told()
    await job.set_notify_interface(again)
    await let_things_happen()
    assert again.heard == []  # it was told


async def test_what_is_owed_when_the_manager_closes_is_told_to_the_callback_that_is_set_after_the_restart(scene: Scene) -> None:
    good, bad = await scene.job(*URLS, flags=ENDS_AND_FILES), await scene.job(MISSING)
    for job in (good, bad):
        await job.resume()
        await scene.manager.join()
    await scene.reopened(good)
    first, second = Told(), Told()
    await (await scene.manager.get_job(good.id)).set_notify_interface(first)
    await (await scene.manager.get_job(bad.id)).set_notify_interface(second)
    await until(lambda: len(first.heard) == 4 and second.heard)
    assert first.heard == [("file", "a"), ("file", "b"), ("file", "c"), "transferred"]
    assert second.heard == [("error", 0x80190194)]


async def test_what_was_told_is_not_told_again_after_a_restart(scene: Scene) -> None:
    job, told = await scene.job(flags=ENDS_AND_FILES), Told()
    await job.set_notify_interface(told)
    await job.resume()
    await until(lambda: len(told.heard) == 2)
    modified = job.times.modification_time
    await scene.reopened(job)
    again, found = Told(), await scene.manager.get_job(job.id)
    await found.set_notify_interface(again)
    await let_things_happen()
    assert again.heard == []
    assert found.times.modification_time == modified  # being told is no change of the job


async def test_a_callback_that_fails_is_told_again_later_and_nothing_behind_it_before(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    job, told = await scene.job(*URLS[:2], flags=ENDS_AND_FILES), Broken()
    await job.set_notify_interface(told)
    await job.resume()
    await job.wait()
    waits = [5, 10, 20]
    for number, seconds in enumerate(waits, 1):
        await until(lambda number=number: len(told.asked) == number and job.waiting)
        assert job.waiting is not None
        assert job.waiting.reason is WaitingReason.NOTIFICATION
        assert "RuntimeError (test_callbacks.py, line" in job.waiting.detail
        await let_things_happen()
        scene.advance(seconds - 1)
        await let_things_happen()
        assert len(told.asked) == number
        told.broken = seconds != waits[-1]
        scene.advance(1)
    await until(lambda: len(told.heard) == 3)
    assert told.heard == [("file", "a"), ("file", "b"), "transferred"]
    assert job.waiting is None
    assert "s3cret" not in caplog.text
    assert "callback's file_transferred failed: RuntimeError" in caplog.text


async def test_what_happens_again_while_it_is_told_is_told_again(scene: Scene) -> None:
    class Resumes(Told):
        async def job_error(self, job: bits.Job, error: bits.BitsError) -> None:
            self.heard.append(job.error_count)
            if len(self.heard) == 1:
                await job.resume()
                await until(lambda: job.state is JobState.ERROR)

    job, told = await scene.job(MISSING), Resumes()
    await job.set_notify_interface(told)
    await job.resume()
    await until(lambda: len(told.heard) == 2)
    await let_things_happen()
    assert told.heard == [1, 2]


async def test_a_callback_that_fails_after_it_dealt_with_the_job_delays_nothing(scene: Scene) -> None:
    class Resumes(Told):
        async def job_error(self, job: bits.Job, error: bits.BitsError) -> None:
            self.heard.append(job.error_count)
            if len(self.heard) == 1:
                scene.network.pause()
                await job.resume()
                raise RuntimeError

    job, told = await scene.job(MISSING), Resumes()
    await job.set_notify_interface(told)
    await job.resume()
    await until(lambda: len(told.heard) == 1 and job.state is not JobState.ERROR)
    await let_things_happen()
    scene.network.resume()
    await until(lambda: len(told.heard) == 2)  # the clock stands still


async def test_a_file_whose_content_was_refused_is_not_told_of(scene: Scene) -> None:
    job, told = await scene.job(flags=ENDS_AND_FILES), Told()
    await job.resume()
    await job.wait()
    await job.files[0].set_validation_state(False)
    await job.set_notify_interface(told)
    await until(lambda: told.heard)
    await let_things_happen()
    assert told.heard == [("error", ErrorCode.BG_E_VALIDATION_FAILED)]


async def test_an_end_that_is_over_is_not_told_of_any_more(scene: Scene) -> None:
    job, told = await scene.job(MISSING), Told()
    await job.resume()
    await scene.manager.join()
    await job.suspend()
    await job.set_notify_interface(told)
    await let_things_happen()
    assert told.heard == []


async def test_flags_count_from_when_they_are_set_and_are_kept_by_the_journal(scene: Scene) -> None:
    job, told = await scene.job(*URLS, flags=F.DISABLE), Told()
    await job.set_notify_interface(told)
    await job.resume()
    await job.wait()
    await job.set_notify_flags(ENDS_AND_FILES)  # too late
    await let_things_happen()
    assert told.heard == []
    failed, silent = await scene.job(MISSING), Told()
    await failed.resume()
    await scene.manager.join()
    await failed.set_notify_flags(F.DISABLE)
    await failed.set_notify_interface(silent)
    await let_things_happen()
    assert silent.heard == []
    await failed.set_notify_flags(ENDS_AND_FILES)  # it is still owed
    await until(lambda: silent.heard)
    await scene.reopened(job)
    assert (await scene.manager.get_job(job.id)).notify_flags == ENDS_AND_FILES


@pytest.mark.parametrize(
    ("flags", "code"), [(F(0), ErrorCode.E_NOTIMPL), (F.DISABLE | F.JOB_ERROR, ErrorCode.E_NOTIMPL), (3, ErrorCode.E_INVALIDARG)]
)
async def test_flags_that_mean_nothing_are_refused(scene: Scene, flags: Any, code: int) -> None:
    job = await scene.job()
    with pytest.raises(bits.InvalidArgument) as caught:
        await job.set_notify_flags(flags)
    assert caught.value.code == code
    with pytest.raises(bits.InvalidArgument):
        await job.set_notify_interface(lambda *_: None)  # type: ignore[arg-type]


async def test_at_most_four_callbacks_of_a_user_are_at_work_and_the_queue_goes_on(scene: Scene) -> None:
    alice, bob = fake_token("alice"), fake_token("bob")
    go, at_work = asyncio.Event(), {"alice": 0, "bob": 0}

    def hanging(user: str) -> Callable[[str], Awaitable[None]]:
        async def hang(_: str) -> None:
            at_work[user] += 1
            await go.wait()

        return hang

    jobs: list[tuple[bits.Job, Told]] = []
    for number in range(7):
        user = bob if number == 6 else alice
        with bits.impersonate(user):
            job, told = await scene.job(name=str(number)), Told(hanging(user.name))
            await job.set_notify_interface(told)
        await job.resume()
        jobs.append((job, told))
    for job, _ in jobs:
        await job.wait()  # nobody waits for a callback
    await until(lambda: at_work == {"alice": 4, "bob": 1})
    await let_things_happen()
    assert at_work == {"alice": 4, "bob": 1}
    go.set()
    await until(lambda: all(told.heard for _, told in jobs))
    assert at_work == {"alice": 6, "bob": 1}


async def test_a_callback_that_waits_for_its_place_is_not_called_when_another_took_it_or_the_job_left(scene: Scene) -> None:
    go = asyncio.Event()

    async def hang(_: str) -> None:
        await go.wait()

    jobs: list[tuple[bits.Job, Told]] = []
    for number in range(6):
        job, told = await scene.job(name=str(number)), Told(hang)
        await job.set_notify_interface(told)
        await job.resume()
        await job.wait()
        jobs.append((job, told))
    await let_things_happen()
    (replaced, old), (gone, unheard) = jobs[4:]
    new = Told()
    await replaced.set_notify_interface(new)
    await gone.cancel()
    go.set()
    await until(lambda: new.heard and all(told.heard for _, told in jobs[:4]))
    await let_things_happen()
    assert (old.heard, unheard.heard, new.heard) == ([], [], ["transferred"])


async def test_t11_a_callback_runs_in_the_context_in_which_it_was_set(scene: Scene) -> None:
    mark: contextvars.ContextVar[str] = contextvars.ContextVar("mark", default="none")
    seen: list[tuple[str, str]] = []
    told = Told(lambda _: seen.append((bits.current_token().name, mark.get())))
    with bits.impersonate(fake_token("alice")):
        job = await scene.job()
    mark.set("set")
    with bits.impersonate(fake_token("bob")):
        await job.set_notify_interface(told)
    mark.set("changed")
    with bits.impersonate(fake_token("carol")):
        await job.resume()
    await until(lambda: told.heard)
    assert seen == [("bob", "set")]


async def test_modifications_are_merged_until_the_interval_is_over(scene: Scene) -> None:
    job, told = await scene.job(flags=F.JOB_MODIFICATION), Told()
    assert job.minimum_notification_interval == 0.5
    await job.set_notify_interface(told)
    await job.set_description("one")
    await until(lambda: told.heard)
    for text in ("two", "three", "four"):
        await job.set_description(text)
    scene.advance(0.4)  # also before the wait for the end of the interval has begun
    await let_things_happen()
    assert told.heard == ["modification"]
    scene.advance(0.1)
    await until(lambda: len(told.heard) == 2)
    scene.advance(100)
    await let_things_happen()
    assert told.heard == ["modification"] * 2  # no echo of being told


async def test_the_interval_ends_in_time_however_late_the_wait_for_its_end_begins(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = callbacks.sooner

    async def late(*what: Any) -> None:
        if not scene.network.clock.monotonic():
            scene.advance(0.4)
        await honest(*what)

    monkeypatch.setattr(callbacks, "sooner", late)
    job, told = await scene.job(flags=F.JOB_MODIFICATION), Told()
    await job.set_notify_interface(told)
    await job.set_description("one")
    await until(lambda: told.heard)
    await job.set_description("two")
    await until(lambda: scene.network.clock.monotonic() == 0.4)
    scene.advance(0.1)
    await until(lambda: len(told.heard) == 2)


async def test_the_interval_is_a_property_of_the_job(scene: Scene) -> None:
    job, told = await scene.job(flags=F.JOB_MODIFICATION), Told()
    await job.set_minimum_notification_interval(0)
    await job.set_notify_interface(told)
    for number in range(3):
        await job.set_description(str(number))
        await until(lambda number=number: len(told.heard) == number + 1)
    for wrong in (-1, float("nan"), 2**32, "1", True):
        with pytest.raises(bits.InvalidArgument):
            await job.set_minimum_notification_interval(wrong)  # type: ignore[arg-type]
    await scene.reopened(job)
    assert (await scene.manager.get_job(job.id)).minimum_notification_interval == 0


async def test_the_way_to_the_end_is_a_modification_and_the_end_is_not(scene: Scene) -> None:
    job, told = await scene.job(flags=F.JOB_MODIFICATION | F.JOB_TRANSFERRED), Told()
    await job.set_minimum_notification_interval(0)
    scene.network.pause(after=100)
    await job.set_notify_interface(told)
    await job.resume()
    await until(lambda: job.progress.bytes_transferred == 100 and told.heard)
    scene.network.resume()
    await until(lambda: told.heard[-1] == "transferred")
    await let_things_happen()
    assert told.heard[-1] == "transferred"
    assert set(told.heard[:-1]) == {"modification"}


async def test_a_job_that_left_the_queue_tells_nothing(scene: Scene) -> None:
    job, told = await scene.job(flags=ALL), Told()
    await job.set_notify_interface(told)
    await job.cancel()
    await let_things_happen()
    assert told.heard == []


async def test_ranges_are_told_of_when_they_are_there_for_good_and_each_byte_once(scene: Scene) -> None:
    job, told = await scene.job(flags=F.FILE_RANGES_TRANSFERRED | F.JOB_TRANSFERRED), Told()
    await job.set_on_demand_mode(True)
    await job.set_notify_interface(told)

    def found() -> list[tuple[int, int | None]]:
        heard = [ranges for what, name, *ranges in told.heard if (what, name) == ("ranges", "a")]
        return [(each.initial_offset, each.length) for ranges in heard for each in ranges]

    for ranges in ([bits.FileRange(100, 50), bits.FileRange(300, 10)], [bits.FileRange(120, 100)]):
        told_before = len(found())
        await job.files[0].request_file_ranges(ranges)
        await job.resume()
        await job.wait()
        scene.advance(1)
        await until(lambda told_before=told_before: len(found()) > told_before)
    await let_things_happen()
    assert found() == [(100, 50), (300, 10), (150, 70)]


async def test_ranges_are_told_of_before_the_end_whatever_the_interval(scene: Scene) -> None:
    job, told = await scene.job(flags=F.FILE_RANGES_TRANSFERRED | F.JOB_TRANSFERRED), Told()
    await job.set_on_demand_mode(True)
    await job.set_notify_interface(told)
    for ranges in ([bits.FileRange(0, 10)], [bits.FileRange(0)]):
        await job.files[0].request_file_ranges(ranges)
        await job.resume()
        await job.wait()
    await until(lambda: "transferred" in told.heard)
    assert [each if isinstance(each, str) else each[0] for each in told.heard] == ["ranges", "ranges", "transferred"]


async def test_a_callback_and_a_command_are_kept_when_nobody_holds_their_jobs(scene: Scene) -> None:
    told = Told()

    async def leave_alone() -> None:
        heard = await scene.job(MISSING)
        await heard.set_notify_interface(told)
        commanded = await scene.job(name="x")
        with bits.impersonate(fake_token("bob")):
            await commanded.set_notify_cmd_line(PROGRAM)
        scene.network.pause()
        for job in (heard, commanded):
            await job.resume()

    await leave_alone()
    gc.collect()
    scene.network.resume()
    await until(lambda: told.heard and scene.network.commands)
    assert scene.network.commands[0].identity == "bob"


async def test_a_callback_is_replaced_and_removed(scene: Scene) -> None:
    job, first, second = await scene.job(MISSING), Told(), Told()
    await job.set_notify_interface(first)
    await job.set_notify_interface(second)
    await job.resume()
    await until(lambda: second.heard)
    await job.set_notify_interface(None)
    assert job.notify_interface is None
    await job.resume()
    await scene.manager.join()
    await let_things_happen()
    assert (first.heard, len(second.heard)) == ([], 1)


async def test_a_callback_at_work_when_the_manager_closes_has_the_grace_to_end(no_leaks: None, scene: Scene) -> None:
    started, go = asyncio.Event(), asyncio.Event()

    async def work(_: str) -> None:
        started.set()
        await go.wait()

    job, told = await scene.job(), Told(work)
    await job.set_notify_interface(told)
    await job.resume()
    await started.wait()
    closing = asyncio.ensure_future(scene.manager.aclose(grace=5))
    await let_things_happen()
    assert not closing.done()
    go.set()
    await closing
    assert told.heard == ["transferred"]
    scene.manager = scene.new()
    await scene.manager.__aenter__()
    again = Told()
    await (await scene.manager.get_job(job.id)).set_notify_interface(again)
    await let_things_happen()
    assert again.heard == []


async def test_a_callback_that_outlasts_the_grace_is_cancelled_and_what_it_was_told_stays_owed(no_leaks: None, scene: Scene) -> None:
    started, ended = asyncio.Event(), []

    async def work(_: str) -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    job = await scene.job()
    await job.set_notify_interface(Told(work))
    await job.resume()
    await started.wait()
    await scene.manager.aclose(grace=0.01)
    assert ended == [True]
    scene.manager = scene.new()
    await scene.manager.__aenter__()
    again = Told()
    await (await scene.manager.get_job(job.id)).set_notify_interface(again)
    await until(lambda: again.heard == ["transferred"])


async def test_whoever_takes_a_job_over_is_told_nothing_by_the_old_owner_s_callback_and_has_no_command(scene: Scene) -> None:
    with bits.impersonate(fake_token("alice")):
        job, told = await scene.job(), Told()
        await job.set_notify_interface(told)
        await job.set_notify_cmd_line("/bin/true")
    with bits.impersonate(fake_token("admin", elevated=True)):
        taken = await scene.manager.get_job(job.id)
        await taken.take_ownership()
    assert (taken.notify_cmd_line, taken.notify_interface) == (None, None)
    await taken.resume()
    await taken.wait()
    await let_things_happen()
    assert (told.heard, scene.network.commands) == ([], [])


# -- commands -------------------------------------------------------------------------------------------------------------------------

PROGRAM = "/usr/local/bin/fetched"
ARGUMENTS = (PROGRAM, "a b", '"quoted"')


async def test_a_command_runs_as_whoever_set_it_and_learns_of_which_job(scene: Scene) -> None:
    with bits.impersonate(fake_token("alice")):
        job = await scene.job()
    with bits.impersonate(fake_token("bob")):
        await job.set_notify_cmd_line(PROGRAM, ARGUMENTS)
    with bits.impersonate(fake_token("carol")):
        await job.resume()
    await until(lambda: scene.network.commands)
    (command,) = scene.network.commands
    assert (command.identity, command.program, command.parameters) == ("bob", PROGRAM, ARGUMENTS)
    assert command.environment == {"BITS_JOB_ID": str(job.id), "BITS_JOB_STATE": "TRANSFERRED", "BITS_JOB_ERROR": "0x00000000"}
    assert job.notify_cmd_line == bits.NotifyCmdLine(PROGRAM, ARGUMENTS)
    assert "quoted" not in repr(job.notify_cmd_line)


async def test_a_command_learns_the_code_of_the_error(scene: Scene) -> None:
    job = await scene.job(MISSING)
    await job.set_notify_cmd_line(PROGRAM, 'fetched "a b" "\\"quoted\\""')
    await job.resume()
    await until(lambda: scene.network.commands)
    assert scene.network.commands[0].environment["BITS_JOB_ERROR"] == "0x80190194"
    assert scene.network.commands[0].parameters == ARGUMENTS


async def test_a_command_that_fails_runs_again_after_the_retry_delay_until_it_ends_with_0(scene: Scene) -> None:
    job = await scene.job()
    await job.set_minimum_retry_delay(60)
    await job.set_notify_cmd_line(PROGRAM)
    scene.network.fail_command(3, times=2)
    await job.resume()
    for runs in (1, 2):
        await until(lambda runs=runs: len(scene.network.commands) == runs and job.waiting)
        assert job.waiting is not None
        assert job.waiting.detail == "the command failed: it ended with status 3"
        await let_things_happen()
        scene.advance(59)
        await let_things_happen()
        assert len(scene.network.commands) == runs
        scene.advance(1)
    async with job.events(follow=True) as stream:
        await until(lambda: len(scene.network.commands) == 3 and not job.waiting)
        await let_things_happen()
        await job.cancel()
        seen = [event.waiting async for event in stream if isinstance(event, bits.JobChanged)]
    assert seen[0] is not None
    assert seen[1] is None  # whoever watches sees that it is over
    scene.advance(10_000)
    await let_things_happen()
    assert len(scene.network.commands) == 3


async def test_a_command_does_not_run_again_for_a_job_that_was_completed_meanwhile(scene: Scene) -> None:
    job = await scene.job()
    await job.set_notify_cmd_line(PROGRAM)
    scene.network.fail_command()
    await job.resume()
    await until(lambda: scene.network.commands and job.waiting)
    await job.complete()
    scene.advance(10_000)
    await let_things_happen()
    assert len(scene.network.commands) == 1


async def test_a_command_does_not_run_where_a_callback_was_told_and_runs_where_it_failed(scene: Scene) -> None:
    well, told = await scene.job(), Told()
    await well.set_notify_cmd_line(PROGRAM)
    await well.set_notify_interface(told)
    await well.resume()
    await until(lambda: told.heard)
    await let_things_happen()
    assert scene.network.commands == []
    badly, broken = await scene.job(name="x"), Broken()
    await badly.set_notify_cmd_line(PROGRAM)
    await badly.set_notify_interface(broken)
    await badly.resume()
    await until(lambda: scene.network.commands)
    await let_things_happen()
    scene.advance(10_000)
    await let_things_happen()
    assert (broken.asked, len(scene.network.commands)) == (["transferred"], 1)


async def test_a_command_is_told_of_the_end_only_and_not_at_all_with_disable(scene: Scene) -> None:
    for flags, runs in ((ALL, 1), (F.DISABLE, 1), (F.FILE_TRANSFERRED, 1)):
        job = await scene.job(*URLS, flags=flags, name=str(flags.value))
        await job.set_notify_cmd_line(PROGRAM)
        await job.resume()
        await job.wait()
        await until(lambda runs=runs: len(scene.network.commands) >= runs)
        await let_things_happen()
        assert len(scene.network.commands) == runs


async def test_at_most_four_commands_of_a_user_run_at_a_time(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    go, running = asyncio.Event(), []

    async def run(token: bits.Token, *rest: Any) -> int:
        running.append(token.name)
        await go.wait()
        return 0

    monkeypatch.setattr(scene.manager._desk.engine.notifier, "_run_command", run)
    alice, jobs = fake_token("alice"), []
    for number in range(8):
        job = await scene.job(name=str(number))
        with bits.impersonate(alice if number < 7 else fake_token("bob")):
            await job.set_notify_cmd_line(PROGRAM)
        await job.resume()
        await job.wait()
        jobs.append(job)
    await until(lambda: len(running) == 5)
    await let_things_happen()
    assert sorted(running) == ["alice"] * 4 + ["bob"]
    with bits.impersonate(fake_token("carol")):
        await jobs[5].set_notify_cmd_line(PROGRAM)  # while it waits for its place
    await jobs[6].complete()
    go.set()
    await until(lambda: len(running) == 7)
    await let_things_happen()
    assert sorted(running) == ["alice"] * 5 + ["bob", "carol"]


async def test_a_command_that_is_owed_at_a_restart_waits_for_its_setter_s_token_and_says_so(scene: Scene) -> None:
    with bits.impersonate(fake_token("alice")):
        job = await scene.job()
    with bits.impersonate(fake_token("bob")):
        await job.set_notify_cmd_line(PROGRAM, ARGUMENTS)
    scene.network.fail_command()
    await job.resume()
    await until(lambda: scene.network.commands)
    await scene.reopened(job)
    with bits.impersonate(fake_token("alice")):
        found = await scene.manager.get_job(job.id)
    await let_things_happen()
    assert len(scene.network.commands) == 1
    assert str(found.waiting) == "a notification is owed: the command waits for the token of bob"
    with bits.impersonate(fake_token("admin", elevated=True)):
        await scene.manager.get_job(job.id)
    await let_things_happen()
    assert len(scene.network.commands) == 1  # not as whoever looks at the job
    with bits.impersonate(fake_token("bob", elevated=True)):
        await scene.manager.get_job(job.id)
    await until(lambda: len(scene.network.commands) == 2 and not found.waiting)
    assert scene.network.commands[1].identity == "bob"


async def test_a_command_of_the_owner_that_is_owed_at_a_restart_runs_when_logon_brings_the_owner(scene: Scene) -> None:
    with bits.impersonate(fake_token("alice")):
        job = await scene.job()
        await job.set_notify_cmd_line(PROGRAM)
    scene.network.fail_command()
    await job.resume()
    await until(lambda: scene.network.commands)
    asked: list[bits.Job] = []

    async def logon(job: bits.Job) -> bits.Token:
        asked.append(job)
        return fake_token("alice")

    await scene.reopened(job, logon=logon)
    await until(lambda: len(scene.network.commands) == 2)
    assert asked == [job]
    assert scene.network.commands[1].identity == "alice"


async def test_the_process_s_own_command_needs_nobody_after_a_restart(scene: Scene) -> None:
    job = await scene.job()
    await job.set_notify_cmd_line(PROGRAM)
    scene.network.fail_command()
    await job.resume()
    await until(lambda: scene.network.commands)
    await scene.reopened(job, run=False)
    await let_things_happen()
    assert len(scene.network.commands) == 1  # a manager that transfers nothing runs nothing
    await scene.reopened(job)
    await until(lambda: len(scene.network.commands) == 2)


async def test_a_command_whose_setter_s_token_was_closed_is_not_run(scene: Scene) -> None:
    bob = fake_token("bob")
    job = await scene.job()
    with bits.impersonate(bob):
        await job.set_notify_cmd_line(PROGRAM)
    bob.close()
    await job.resume()
    await job.wait()
    await let_things_happen()
    assert scene.network.commands == []
    assert job.waiting is not None
    assert job.waiting.detail == "the command waits for the token of bob"
    with bits.impersonate(fake_token("carol")):
        await job.set_notify_cmd_line(PROGRAM)
    await until(lambda: scene.network.commands)
    assert scene.network.commands[0].identity == "carol"


async def test_a_command_whose_setter_logged_off_waits_for_him(scene: Scene) -> None:
    job = await scene.job()
    with bits.impersonate(fake_token("bob", session="s1")):
        await job.set_notify_cmd_line(PROGRAM)
    scene.network.log_off("s1")
    await until(lambda: commander(job._entry) is None)
    await job.resume()
    await job.wait()
    await let_things_happen()
    assert scene.network.commands == []
    assert "waits for the token of bob" in str(job.waiting)
    with bits.impersonate(fake_token("bob", session="s2", elevated=True)):
        await scene.manager.get_job(job.id)
    await until(lambda: scene.network.commands)


async def test_t09_a_token_that_is_somebody_on_the_network_only_sets_no_command(scene: Scene) -> None:
    job = await scene.job()
    nobody = bits.Token._make(NetworkOnly("alice@REALM"), principal="alice@REALM")
    for token in (bits.Token.for_network(spnego.Password("alice@REALM", "guess")), nobody):
        with bits.impersonate(token), pytest.raises(bits.AccessDenied, match="no user of this machine"):
            await job.set_notify_cmd_line(PROGRAM)
    assert job.notify_cmd_line is None


@pytest.mark.parametrize(
    ("program", "parameters", "code"),
    [
        ("fetched", None, ErrorCode.E_INVALIDARG),
        ("/" + "x" * 260, None, ErrorCode.BG_E_STRING_TOO_LONG),
        (PROGRAM, (PROGRAM, "x" * 4000), ErrorCode.BG_E_STRING_TOO_LONG),
        (PROGRAM, "/bin/other x", ErrorCode.E_INVALIDARG),
        (PROGRAM, (), ErrorCode.E_INVALIDARG),
        (PROGRAM, (PROGRAM, "nul\0"), ErrorCode.E_INVALIDARG),
        (None, PROGRAM, ErrorCode.E_INVALIDARG),
    ],
)
async def test_a_command_that_cannot_be_meant_is_refused(scene: Scene, program: Any, parameters: Any, code: int) -> None:
    job = await scene.job()
    with pytest.raises(bits.InvalidArgument) as caught:
        await job.set_notify_cmd_line(program, parameters)
    assert caught.value.code == code


async def test_t05_a_token_runs_the_commands_of_the_setter_it_was_brought_for_and_no_other(scene: Scene) -> None:
    job = await scene.job()
    with bits.impersonate(fake_token("bob")):
        await job.set_notify_cmd_line(PROGRAM)
    entry = job._entry
    found = commander(entry)
    assert found is not None
    assert found.name == "bob"
    entry.job = replace(entry.job, notify_setter=entry.job.owner)  # another setter's command, and bob's token still there
    assert commander(entry) is entry.owner
    entry.job = replace(entry.job, notify_setter=replace(entry.job.owner, sid="fake:dave"))
    assert commander(entry) is None


async def test_a_command_is_removed(scene: Scene) -> None:
    job = await scene.job()
    await job.set_notify_cmd_line(PROGRAM)
    await job.set_notify_cmd_line(None)
    assert job.notify_cmd_line is None
    await job.resume()
    await job.wait()
    await let_things_happen()
    assert scene.network.commands == []


async def test_no_parameter_of_a_command_is_logged(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "bits_async")
    job = await scene.job()
    await job.set_notify_cmd_line(PROGRAM, (PROGRAM, "s3cret"))
    scene.network.fail_command()
    await job.resume()
    await until(lambda: job.waiting)
    assert "s3cret" not in caplog.text
