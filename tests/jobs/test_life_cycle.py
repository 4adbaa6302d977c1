"""The life of a job, against BITS's words ("Life Cycle of a BITS Job") and against the table of `model`: every command in every
state, and the ways from state to state that the engine takes. Random lives are in `test_random_lives`.

Real manager, real journal, real files; the clock stands still and the servers say what they are told to.
"""

import asyncio
import contextlib
import itertools
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import bits_async as bits
from bits_async import ErrorCode, InvalidState, JobPriority, JobState
from bits_async.identity.threads import TokenExecutors
from bits_async.jobs.engine import Engine
from bits_async.jobs.model import NEXT, Command
from bits_async.testing import FakeNetwork, fake_token
from tests.diagram import README, with_diagram
from tests.waiting import let_things_happen, until

S = JobState
SMALL, BIG, MORE = "https://h.test/small", "https://h.test/big", "https://h.test/more"
OCCUPANT = "https://h.test/occupant"
BODIES = {SMALL: b"s" * 1000, BIG: b"b" * 300_000, MORE: b"m" * 2000}
DEADLINE = 10.0


def legal(before: JobState, after: JobState) -> bool:
    """Whether the table has a row that leads from one state to the other, or nothing changed."""
    return before is after or any(state is before and next_state is after for (state, _), next_state in NEXT.items())


@contextlib.asynccontextmanager
async def followed(job: bits.Job) -> AsyncIterator[list[JobState]]:
    """The states that a listener hears of, as they come; the first one is the job's as it is."""
    states: list[JobState] = []

    async def listen(stream: bits.EventStream) -> None:
        async for event in stream:
            if isinstance(event, bits.JobChanged):
                states.append(event.state)

    async with job.events(follow=True) as stream:
        listener = asyncio.ensure_future(listen(stream))
        try:
            await until(lambda: states)
            yield states
            await until(lambda: not stream._queue)
        finally:
            listener.cancel()
            await asyncio.wait([listener])


@dataclass
class Scene:
    """A manager over a frozen clock and servers under control."""

    network: FakeNetwork
    directory: Path
    store: Path
    manager: bits.BitsManager = field(init=False)

    async def job(self, *urls: str, priority: JobPriority = JobPriority.NORMAL) -> bits.Job:
        job = await self.manager.create_job("a life", priority=priority)
        for url in urls or (SMALL, BIG):
            await job.add_file(url, self.path(url))
        return job

    def path(self, url: str) -> Path:
        return self.directory / url.rpartition("/")[2]

    async def reach(self, job: bits.Job, state: JobState) -> bits.Job:
        await until(lambda: job.state is state, f"for {state.name}, it is {job.state.name}")
        return job

    async def occupy(self) -> None:
        """Another job has the only place for background jobs, and keeps it."""
        self.network.serve(OCCUPANT, b"")
        self.network.pause()
        occupant = await self.manager.create_job("occupant", priority=JobPriority.HIGH)
        await occupant.add_file(OCCUPANT, self.store.with_name("occupant"))
        await occupant.resume()
        await until(lambda: self.network.requests and self.network.requests[-1].url == OCCUPANT)

    @property
    def left(self) -> dict[str, bytes]:
        """What is in the directory; part files under the name of their destination."""
        found = {each.name: each.read_bytes() for each in self.directory.iterdir()}
        return {name[1:].partition(".")[0] + " (part)" if name.startswith(".") else name: body for name, body in found.items()}

    @property
    def journal(self) -> list[str]:
        with contextlib.closing(sqlite3.connect(f"file:{self.store}?mode=ro", uri=True)) as db:
            return list(db.iterdump())


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    directory = tmp_path / "out"
    directory.mkdir()
    with FakeNetwork() as network:
        network.clock.freeze()
        for url, body in BODIES.items():
            network.serve(url, body)
        found = Scene(network, directory, tmp_path / "queue.db")
        async with bits.BitsManager(store=found.store) as found.manager:
            yield found


# -- every command in every state ----------------------------------------------------------------------------------------------------
#
# A job with two files is brought into each state, a small one that arrives and a big one that is the trouble. Where the engine would go
# on by itself afterwards, another job has the only place for background jobs.


async def suspended(scene: Scene) -> bits.Job:
    await scene.occupy()
    return await scene.job()


async def queued(scene: Scene) -> bits.Job:
    await scene.occupy()
    job = await scene.job()
    await job.resume()
    return job


async def connecting(scene: Scene) -> bits.Job:
    scene.network.pause()
    job = await scene.job()
    await job.resume()
    await until(lambda: scene.network.requests)
    return job


async def transferring(scene: Scene) -> bits.Job:
    scene.network.pause(after=len(BODIES[SMALL]))
    job = await scene.job()
    await job.resume()
    await until(lambda: job.progress.bytes_transferred > len(BODIES[SMALL]))
    return job


async def in_trouble(scene: Scene, status: int, state: JobState) -> bits.Job:
    scene.network.serve(BIG, b"", status=status)
    job = await scene.job()
    await job.resume()
    await scene.reach(job, state)
    scene.network.serve(BIG, BODIES[BIG])
    await scene.occupy()
    return job


async def in_error(scene: Scene) -> bits.Job:
    return await in_trouble(scene, 404, S.ERROR)


async def in_transient_error(scene: Scene) -> bits.Job:
    return await in_trouble(scene, 503, S.TRANSIENT_ERROR)


async def transferred(scene: Scene) -> bits.Job:
    job = await scene.job()
    await job.resume()
    await job.wait()
    await scene.occupy()
    return job


async def acknowledged(scene: Scene) -> bits.Job:
    job = await transferred(scene)
    await job.complete()
    return job


async def cancelled(scene: Scene) -> bits.Job:
    job = await transferred(scene)
    await job.cancel()
    return job


BRING: dict[JobState, Callable[[Scene], Awaitable[bits.Job]]] = {
    S.QUEUED: queued,
    S.CONNECTING: connecting,
    S.TRANSFERRING: transferring,
    S.SUSPENDED: suspended,
    S.ERROR: in_error,
    S.TRANSIENT_ERROR: in_transient_error,
    S.TRANSFERRED: transferred,
    S.ACKNOWLEDGED: acknowledged,
    S.CANCELLED: cancelled,
}
UNFINISHED = [state for state in S if not state.is_final]
SAME = {state: state for state in UNFINISHED}


async def add_file(job: bits.Job) -> object:
    return await job.add_file(MORE, job.files[0].local_name.with_name("more"))


@dataclass(frozen=True)
class Order:
    """A command: how it is given, and where BITS says it leads. A state that is not named refuses it."""

    give: Callable[[bits.Job], Awaitable[object]]
    leads: dict[JobState, JobState]
    code: ErrorCode = ErrorCode.BG_E_INVALID_STATE  # of the refusal while the job is in the queue


async def add_file_with_ranges(job: bits.Job) -> object:
    return await job.add_file_with_ranges(MORE, job.files[0].local_name.with_name("more"), [bits.FileRange(10, 10), bits.FileRange(0, 5)])


BEFORE_RESUME = {S.SUSPENDED: S.SUSPENDED}
ORDERS = {
    "resume": Order(lambda job: job.resume(), SAME | dict.fromkeys([S.SUSPENDED, S.ERROR, S.TRANSIENT_ERROR], S.QUEUED)),
    "suspend": Order(lambda job: job.suspend(), {state: S.SUSPENDED for state in UNFINISHED if state is not S.TRANSFERRED}),
    "cancel": Order(lambda job: job.cancel(), dict.fromkeys(UNFINISHED, S.CANCELLED)),
    # BITS's Complete is `partial`; without it nothing is dropped by mistake, so the job has to be whole
    "complete": Order(lambda job: job.complete(), {S.TRANSFERRED: S.ACKNOWLEDGED}),
    "complete partial": Order(lambda job: job.complete(partial=True), dict.fromkeys(UNFINISHED, S.ACKNOWLEDGED)),
    "add_file": Order(add_file, SAME),
    "add_file_with_ranges": Order(add_file_with_ranges, SAME),
    "replace_remote_prefix": Order(lambda job: job.replace_remote_prefix("https://other.test", "https://h.test"), SAME),
    "set_maximum_bandwidth": Order(lambda job: job.set_maximum_bandwidth(1e6), SAME),
    "set_cost_flags": Order(lambda job: job.set_cost_flags(bits.CostFlags.TRANSFER_STANDARD), SAME),
    "set_maximum_download_size": Order(
        lambda job: job.set_maximum_download_size(10**6), BEFORE_RESUME, ErrorCode.BG_E_READ_ONLY_PROPERTY_AFTER_RESUME
    ),
    "set_dynamic_content": Order(lambda job: job.set_dynamic_content(True), BEFORE_RESUME, ErrorCode.BG_E_READ_ONLY_PROPERTY_AFTER_RESUME),
    "set_on_demand_mode": Order(lambda job: job.set_on_demand_mode(True), BEFORE_RESUME, ErrorCode.BG_E_READ_ONLY_PROPERTY_AFTER_RESUME),
    "set_high_performance": Order(lambda job: job.set_high_performance(True), {}, ErrorCode.BG_E_READ_ONLY_PROPERTY_AFTER_ADDFILE),
    "set_files_at_once": Order(lambda job: job.set_files_at_once(2), SAME),
    "set_segments": Order(lambda job: job.set_segments(2), SAME),
    "set_http_method": Order(lambda job: job.set_http_method("POST"), BEFORE_RESUME, ErrorCode.BG_E_READ_ONLY_PROPERTY_AFTER_RESUME),
    "set_custom_headers": Order(lambda job: job.set_custom_headers([("X-Tenant", "a")]), SAME),
    "make_custom_headers_write_only": Order(lambda job: job.make_custom_headers_write_only(), SAME),
    "set_security_flags": Order(lambda job: job.set_security_flags(bits.SecurityFlags(0)), SAME),
    "set_crl_source": Order(lambda job: job.set_crl_source("/lists"), SAME),
    "set_client_certificate_by_file": Order(lambda job: job.set_client_certificate_by_file("/me.pem"), SAME),
    "set_client_certificate_by_id": Order(lambda job: job.set_client_certificate_by_id("/mine", b"a" * 20), SAME),
    "set_client_certificate_by_name": Order(lambda job: job.set_client_certificate_by_name("/mine", "alice"), SAME),
    "remove_client_certificate": Order(lambda job: job.remove_client_certificate(), SAME),
    "set_server_certificate_validation": Order(
        lambda job: job.set_server_certificate_validation(lambda *_: True),
        {state: state for state in (S.SUSPENDED, S.ERROR, S.TRANSFERRED)},
        ErrorCode.BG_E_READ_ONLY_WHEN_JOB_ACTIVE,
    ),
    "set_priority": Order(lambda job: job.set_priority(JobPriority.LOW), SAME),
    "set_description": Order(lambda job: job.set_description("x"), SAME),
    "set_display_name": Order(lambda job: job.set_display_name("x"), SAME),
    "set_notify_interface": Order(lambda job: job.set_notify_interface(bits.BackgroundCopyCallback()), SAME),
    "set_notify_flags": Order(lambda job: job.set_notify_flags(bits.NotifyFlags.DISABLE), SAME),
    "set_notify_cmd_line": Order(lambda job: job.set_notify_cmd_line("/bin/true"), SAME),
    "set_minimum_notification_interval": Order(lambda job: job.set_minimum_notification_interval(1), SAME),
    "set_use_stored_credentials": Order(lambda job: job.set_use_stored_credentials(bits.AuthTarget.PROXY), SAME),
    "set_minimum_retry_delay": Order(lambda job: job.set_minimum_retry_delay(7), SAME),
    "set_no_progress_timeout": Order(lambda job: job.set_no_progress_timeout(7), SAME),
    "set_maximum_download_time": Order(lambda job: job.set_maximum_download_time(7), SAME),
    "set_proxy_settings": Order(lambda job: job.set_proxy_settings(bits.ProxySettings.no_proxy()), SAME),
    "set_credentials": Order(lambda job: job.set_credentials(bits.AuthTarget.SERVER, bits.AuthScheme.BASIC, "u", "p"), SAME),
    "remove_credentials": Order(lambda job: job.remove_credentials(bits.AuthTarget.SERVER, bits.AuthScheme.BASIC), SAME),
}
ROWS = {
    "resume": Command.RESUME,
    "suspend": Command.SUSPEND,
    "cancel": Command.CANCEL,
    "complete partial": Command.COMPLETE,
}


@pytest.mark.parametrize("name", ROWS)
def test_the_table_says_what_bits_says(name: str) -> None:
    assert {state: after for (state, event), after in NEXT.items() if event is ROWS[name]} == ORDERS[name].leads


def looks(scene: Scene, job: bits.Job) -> dict[str, Any]:
    """All that can be seen of a job, and on the disk."""
    shown = {name: getattr(job, name) for name, value in vars(bits.Job).items() if isinstance(value, property)}
    shown["error"] = job.error and job.error.fields()
    shown["files"] = [(file.remote_name, file.local_name, file.progress) for file in job.files]
    return shown | {"left": scene.left, "journal": scene.journal, "requests": len(scene.network.requests)}


@pytest.mark.parametrize("state", S, ids=lambda state: state.name)
@pytest.mark.parametrize("name", ORDERS)
async def test_every_command_in_every_state_does_what_bits_says_or_is_refused_and_changes_nothing(
    scene: Scene, name: str, state: JobState
) -> None:
    job, order = await BRING[state](scene), ORDERS[name]
    assert job.state is state
    before = looks(scene, job)
    async with followed(job) as states:
        if state in order.leads:
            await order.give(job)
            assert job.state is order.leads[state]
        else:
            with pytest.raises(InvalidState) as caught:
                await order.give(job)
            assert caught.value.code == (ErrorCode.BG_E_INVALID_STATE if state.is_final else order.code)
            assert caught.value.job_id == job.id
            await let_things_happen()
            assert looks(scene, job) == before
        await let_things_happen()
        assert job.state is order.leads.get(state, state)
    assert (states[0], states[-1]) == (state, job.state)
    assert all(legal(*pair) for pair in itertools.pairwise(states)), states


@pytest.mark.parametrize("name", [name for name in vars(bits.Job) if name.startswith(("set_", "add_", "replace_", "remove_"))])
async def test_every_change_of_a_job_that_has_left_the_queue_is_in_the_table(name: str) -> None:
    assert name in ORDERS or name == "add_file_set"  # which add_file is


@pytest.mark.parametrize("state", [S.ACKNOWLEDGED, S.CANCELLED], ids=lambda state: state.name)
async def test_a_job_that_has_left_the_queue_takes_no_helper_and_cannot_be_had_again(scene: Scene, state: JobState) -> None:
    job = await transferred(scene)
    options = await job.token_options()
    await (job.complete() if state is S.ACKNOWLEDGED else job.cancel())
    with bits.impersonate(bits.Token.for_process()):
        for call in (options.set_helper_token, options.clear_helper_token):
            with pytest.raises(InvalidState):
                await call()
    with pytest.raises(InvalidState):
        await options.set_helper_token_flags(bits.HelperTokenFlags.NETWORK)
    with pytest.raises(bits.NotFound):
        await scene.manager.get_job(job.id)
    assert job.id not in [each.id async for each in scene.manager.enum_jobs()]


@pytest.mark.parametrize("state", UNFINISHED, ids=lambda state: state.name)
async def test_cancel_leaves_no_file_in_any_state(scene: Scene, state: JobState) -> None:
    job = await BRING[state](scene)
    await job.cancel()
    assert scene.left == {}


@pytest.mark.parametrize("state", UNFINISHED, ids=lambda state: state.name)
async def test_bits_complete_keeps_the_finished_files_and_drops_the_rest_in_any_state(scene: Scene, state: JobState) -> None:
    kept = {S.SUSPENDED: [], S.QUEUED: [], S.CONNECTING: [], S.TRANSFERRED: [SMALL, BIG]}.get(state, [SMALL])
    job = await BRING[state](scene)
    assert list(await job.complete(partial=True)) == [scene.path(url) for url in kept]
    assert scene.left == {scene.path(url).name: BODIES[url] for url in kept}


@pytest.mark.parametrize("state", [S.SUSPENDED, S.QUEUED, S.CONNECTING, S.TRANSFERRING, S.ERROR, S.TRANSIENT_ERROR], ids=lambda s: s.name)
async def test_a_file_can_be_added_in_any_state_and_is_fetched_with_the_others(scene: Scene, state: JobState) -> None:
    job = await BRING[state](scene)
    await add_file(job)
    await job.resume()
    scene.network.resume()
    await job.wait()
    await job.complete()
    assert scene.left == {scene.path(url).name: body for url, body in BODIES.items()}


async def test_resume_without_a_file_is_refused_and_the_job_stays_suspended(scene: Scene) -> None:
    job = await scene.manager.create_job("empty")
    with pytest.raises(InvalidState) as caught:
        await job.resume()
    assert caught.value.code == ErrorCode.BG_E_EMPTY
    assert job.state is S.SUSPENDED


async def test_complete_of_a_transferred_job_does_not_drop_a_file_that_was_added_since(scene: Scene) -> None:
    job = await transferred(scene)
    await add_file(job)
    before = looks(scene, job)
    with pytest.raises(InvalidState, match="added"):
        await job.complete()
    assert looks(scene, job) == before
    assert len(await job.complete(partial=True)) == 2


# -- the ways that the engine takes --------------------------------------------------------------------------------------------------


def way(states: list[JobState]) -> list[str]:
    """The states one after the other, each time it was entered."""
    return [state.name for state, _ in itertools.groupby(states)]


async def test_a_job_that_meets_no_trouble(scene: Scene) -> None:
    job = await scene.job()
    async with followed(job) as states:
        await job.resume()
        await job.wait()
        await job.complete()
    assert way(states) == ["SUSPENDED", "QUEUED", "CONNECTING", "TRANSFERRING", "TRANSFERRED", "ACKNOWLEDGED"]


@pytest.mark.parametrize(
    ("where", "left"),
    [
        (connecting, ["CONNECTING", "QUEUED", "CONNECTING"]),
        (transferring, ["TRANSFERRING", "QUEUED", "CONNECTING", "TRANSFERRING"]),
    ],
)
async def test_a_running_job_goes_back_to_the_queue_when_its_time_slice_ends_and_another_one_waits(
    scene: Scene, where: Callable[[Scene], Awaitable[bits.Job]], left: list[str]
) -> None:
    job = await where(scene)
    other = await scene.job(MORE)
    async with followed(job) as states:
        await other.resume()
        await let_things_happen()  # the engine waits for the end of the time slice now; here and below
        scene.network.clock.advance(29)
        await let_things_happen()
        assert (len(states), other.state) == (1, S.QUEUED)
        scene.network.clock.advance(1)
        await until(lambda: other.state.is_active)
        await scene.reach(job, S.QUEUED)
        await let_things_happen()
        scene.network.clock.advance(30)
        await until(lambda: job.state.is_active and other.state is S.QUEUED)
        await until(lambda: way(states) == left)


async def test_a_job_alone_in_its_class_keeps_its_place_when_its_time_slice_ends(scene: Scene) -> None:
    job = await transferring(scene)
    low = await scene.job(MORE, priority=JobPriority.LOW)
    async with followed(job) as states:
        await low.resume()
        scene.network.clock.advance(3600)
        await let_things_happen()
    assert way(states) == ["TRANSFERRING"]
    assert low.state is S.QUEUED


async def test_a_running_job_goes_back_to_the_queue_when_a_more_important_one_comes(scene: Scene) -> None:
    job = await transferring(scene)
    high = await scene.job(MORE, priority=JobPriority.HIGH)
    async with followed(job) as states:
        await high.resume()
        await until(lambda: high.state.is_active)
        assert job.state is S.QUEUED
        scene.network.resume()
        await job.wait()
    assert way(states) == ["TRANSFERRING", "QUEUED", "CONNECTING", "TRANSFERRING", "TRANSFERRED"]
    starts = [request.start for request in scene.network.requests if request.url == BIG]
    assert starts == [0, len(BODIES[SMALL])]  # so many bytes of the big one had come


async def test_a_foreground_job_disturbs_nobody(scene: Scene) -> None:
    job = await transferring(scene)
    foreground = await scene.job(MORE, priority=JobPriority.FOREGROUND)
    async with followed(job) as states:
        await foreground.resume()
        await scene.reach(foreground, S.TRANSFERRING)
    assert way(states) == ["TRANSFERRING"]


@pytest.mark.parametrize("name", ["set_priority", "set_description", "add_file"])
async def test_a_command_on_a_running_job_gives_its_place_to_nobody(scene: Scene, name: str) -> None:
    job = await transferring(scene)
    waiter = await scene.job(MORE, priority=JobPriority.LOW)
    await waiter.resume()
    async with followed(waiter) as states:
        for _ in range(20):
            await ORDERS[name].give(job)
    assert way(states) == ["QUEUED"]


@pytest.mark.parametrize(("status", "state"), [(503, S.TRANSIENT_ERROR), (404, S.ERROR)])
async def test_an_error_stops_a_job_from_connecting_and_from_transferring(scene: Scene, status: int, state: JobState) -> None:
    scene.network.serve(SMALL, b"", status=status)
    job = await scene.job()
    async with followed(job) as states:
        await job.resume()
        await scene.reach(job, state)
        scene.network.serve(SMALL, BODIES[SMALL])
        scene.network.serve(BIG, b"", status=status)
        await job.resume()
        await until(lambda: states.count(state) == 2)
        assert not [request for request in scene.network.requests if request.url == MORE]
        scene.network.serve(BIG, BODIES[BIG])
        await job.resume()
        await job.wait()
    stopped = ["QUEUED", "CONNECTING", state.name]
    again = ["QUEUED", "CONNECTING", "TRANSFERRING", state.name]
    assert way(states) == ["SUSPENDED", *stopped, *again, "QUEUED", "CONNECTING", "TRANSFERRING", "TRANSFERRED"]
    assert [request.url for request in scene.network.requests].count(SMALL) == 2


@pytest.mark.parametrize("where", [connecting, transferring])
async def test_a_lost_network_is_a_transient_error(scene: Scene, where: Callable[[Scene], Awaitable[bits.Job]]) -> None:
    job = await where(scene)
    async with followed(job) as states:
        scene.network.disconnect()
        while job.state is not S.TRANSIENT_ERROR:  # where bytes had come, the connection is first opened again
            await let_things_happen()
            scene.network.clock.advance(1)
        assert job.error is not None
        assert job.error.code == ErrorCode.BG_E_NETWORK_DISCONNECTED
    assert way(states)[-1] == "TRANSIENT_ERROR"


async def test_a_transient_error_ends_with_the_retry_delay_or_with_resume(scene: Scene) -> None:
    scene.network.serve(BIG, b"", status=503)
    job = await scene.job(BIG)
    await job.resume()
    await scene.reach(job, S.TRANSIENT_ERROR)
    async with followed(job) as states:
        scene.network.clock.advance(599)
        await let_things_happen()
        assert states == [S.TRANSIENT_ERROR]
        scene.network.clock.advance(1)
        await until(lambda: len(scene.network.requests) == 2)
        await scene.reach(job, S.TRANSIENT_ERROR)
        await job.resume()
        await until(lambda: len(scene.network.requests) == 3)
        await scene.reach(job, S.TRANSIENT_ERROR)
    assert way(states) == ["TRANSIENT_ERROR", *["QUEUED", "CONNECTING", "TRANSIENT_ERROR"] * 2]


@pytest.mark.parametrize("readings", range(1, 6))
async def test_a_retry_that_comes_due_while_the_engine_looks_around_is_not_forgotten(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, readings: int
) -> None:
    scene.network.serve(BIG, b"", status=503)
    job = await scene.job(BIG)
    await job.resume()
    await scene.reach(job, S.TRANSIENT_ERROR)
    await let_things_happen()
    clock = scene.network.clock
    clock.advance(600 - readings + 0.5)
    honest = clock.monotonic

    def moves_on() -> float:
        clock.advance(1)
        return honest() - 1

    monkeypatch.setattr(clock, "monotonic", moves_on)
    await job.set_description("wakes the engine")
    await let_things_happen()
    monkeypatch.undo()
    clock.advance(10)
    await until(lambda: len(scene.network.requests) == 2)


async def test_a_job_that_goes_back_to_the_queue_and_out_of_it_at_once_can_be_suspended(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Engine._settle

    async def lingering(*args: Any) -> None:
        await honest(*args)
        await let_things_happen()  # the next attempt could begin before the last one is done with

    monkeypatch.setattr(Engine, "_settle", lingering)
    job = await transferring(scene)
    given_up = asyncio.ensure_future(job.suspend())  # the attempt is stopped, and nobody keeps the job from the next one
    await asyncio.sleep(0)
    given_up.cancel()
    await asyncio.wait([given_up])
    asked = len(scene.network.requests)
    await until(lambda: len(scene.network.requests) > asked)
    await asyncio.sleep(0.05)
    await job.suspend()
    scene.network.disconnect()  # an attempt that goes on would notice, and knock again
    await let_things_happen()
    scene.network.clock.advance(1)
    await let_things_happen()
    assert (job.state, len(scene.network.requests)) == (S.SUSPENDED, asked + 1)
    scene.network.reconnect()
    await job.resume()
    await until(lambda: len(scene.network.requests) == asked + 2)


async def test_without_progress_a_transient_error_becomes_an_error(scene: Scene) -> None:
    scene.network.serve(BIG, b"", status=503)
    job = await scene.job(BIG)
    await job.set_no_progress_timeout(1000)
    await job.resume()
    await scene.reach(job, S.TRANSIENT_ERROR)
    async with followed(job) as states:
        scene.network.clock.advance(600)
        await scene.reach(job, S.ERROR)
    assert job.error is not None
    assert job.error.code == ErrorCode.BG_E_NO_PROGRESS
    assert way(states) == ["TRANSIENT_ERROR", "QUEUED", "CONNECTING", "ERROR"]


async def test_a_file_added_to_a_transferred_job_is_fetched_after_resume_and_the_others_are_not(scene: Scene) -> None:
    job = await scene.job()
    await job.resume()
    await job.wait()
    async with followed(job) as states:
        await add_file(job)
        await let_things_happen()
        assert job.state is S.TRANSFERRED
        await job.resume()
        await job.wait()
    assert way(states) == ["TRANSFERRED", "QUEUED", "CONNECTING", "TRANSFERRING", "TRANSFERRED"]
    assert [request.url for request in scene.network.requests] == [SMALL, BIG, MORE]


async def test_a_file_added_while_the_last_one_arrives_is_fetched_too(scene: Scene) -> None:
    job = await transferring(scene)
    await add_file(job)
    async with followed(job) as states:
        scene.network.resume()
        await job.wait()
    assert way(states) == ["TRANSFERRING", "TRANSFERRED"]
    assert job.progress.files_transferred == 3


@pytest.mark.parametrize("state", UNFINISHED, ids=lambda state: state.name)
async def test_a_job_is_where_it_was_when_its_manager_is_opened_again(scene: Scene, state: JobState) -> None:
    job = await BRING[state](scene)
    error = job.error and job.error.fields()
    await scene.manager.aclose()
    async with bits.BitsManager(store=scene.store, run=False) as manager:
        again = await manager.get_job(job.id)
        assert again.state is (S.QUEUED if state.is_active else state)
        assert (again.error and again.error.fields()) == error
        assert again.progress == job.progress
        assert [each.progress for each in again.files] == [each.progress for each in job.files]


async def test_a_server_that_wants_to_be_left_alone_for_an_hour_is_so_after_a_restart_too(scene: Scene) -> None:
    scene.network.fail(BIG, error=bits.NetworkError("too busy", transient=True, retry_after=3600))
    job = await scene.job(BIG)
    await job.resume()
    await scene.reach(job, S.TRANSIENT_ERROR)
    await scene.manager.aclose()
    async with bits.BitsManager(store=scene.store) as manager:
        job = await manager.get_job(job.id)
        scene.network.clock.advance(3599)
        await let_things_happen()
        assert job.state is S.TRANSIENT_ERROR
        scene.network.clock.advance(2)
        await job.wait()


@pytest.mark.parametrize("state", UNFINISHED, ids=lambda state: state.name)
async def test_an_unfinished_job_that_has_lost_its_helper_goes_to_error_when_its_manager_is_opened_again(
    scene: Scene, state: JobState
) -> None:
    job = await BRING[state](scene)
    await (await job.token_options()).set_helper_token_flags(bits.HelperTokenFlags.NETWORK)
    await scene.manager.aclose()
    async with bits.BitsManager(store=scene.store) as manager:
        again = await manager.get_job(job.id)
        assert again.state is (state if state.is_settled else S.ERROR)
        assert again.error is not None or state is S.TRANSFERRED
        if again.error is not None and state is not S.ERROR:
            assert again.error.code == ErrorCode.BG_E_TOKEN_REQUIRED


# -- the diagram ---------------------------------------------------------------------------------------------------------------------


def test_the_diagram_in_the_readme_is_drawn_from_the_table() -> None:
    text = README.read_text("utf-8")
    assert text == with_diagram(text), "the diagram is stale: `make diagram` draws it anew"


@pytest.mark.parametrize("where", ["_schedule", "_settle"])
async def test_a_defect_in_the_queue_is_told_to_whoever_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def broken(*_: object) -> None:
        raise ValueError("a defect")

    with FakeNetwork() as network:
        network.serve(SMALL, BODIES[SMALL])
        with pytest.raises(bits.BitsError, match="a defect in bits_async"):
            async with bits.BitsManager(store=tmp_path / "queue.db") as manager, asyncio.timeout(DEADLINE):
                job = await manager.create_job("j")
                await job.add_file(SMALL, tmp_path / "f")
                monkeypatch.setattr(Engine, where, broken)
                await job.resume()
                await job.wait()


@pytest.mark.parametrize("leaving", ["cancel", "take_ownership"])
async def test_a_change_that_comes_while_a_job_leaves_does_not_bring_it_back(tmp_path: Path, leaving: str) -> None:
    with FakeNetwork() as network:
        network.clock.freeze()
        network.serve(SMALL, BODIES[SMALL])
        network.fail(SMALL)
        async with bits.BitsManager(store=tmp_path / "queue.db") as manager:
            job = await manager.create_job("j", owner=fake_token("alice"))
            await job.add_file(SMALL, tmp_path / "f")
            await job.resume()
            await until(lambda: job.state is S.TRANSIENT_ERROR)
            assert manager._desk is not None
            engine, changes = manager._desk.engine, []
            save = engine._save

            async def slow(*args: Any) -> None:
                if not changes:  # the network comes back at this very moment
                    changes.append(asyncio.ensure_future(engine._hasten(network.clock.now())))
                    await let_things_happen()
                await save(*args)
                await let_things_happen()

            engine._save = slow  # type: ignore[method-assign]
            with bits.impersonate(fake_token("admin", elevated=True)):
                await getattr(job, leaving)()
            await asyncio.wait(changes)
            assert all(change.exception() is None for change in changes)
        async with bits.BitsManager(store=tmp_path / "queue.db", run=False) as manager:
            with bits.impersonate(fake_token("admin", elevated=True)):
                left = [(each.state, each.owner_name) async for each in manager.enum_jobs(all_users=True)]
    assert left == ([] if leaving == "cancel" else [(S.SUSPENDED, "admin")])


async def test_t12_a_job_is_completed_with_the_rights_of_today(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def locked(self: TokenExecutors, token: bits.Token) -> None:
        raise bits.TokenRequired("the account is locked", identity=token.name)

    with FakeNetwork() as network:
        network.serve(SMALL, BODIES[SMALL])
        async with bits.BitsManager(store=tmp_path / "queue.db") as manager:
            job = await manager.create_job("j", owner=fake_token("alice"))
            await job.add_file(SMALL, tmp_path / "f")
            await job.resume()
            await job.wait()
            with monkeypatch.context() as patch, pytest.raises(bits.TokenRequired, match="locked"):
                patch.setattr(TokenExecutors, "refresh", locked)
                await job.complete()
            assert job.state is S.TRANSFERRED
            assert not (tmp_path / "f").exists()
            assert await job.complete() == (tmp_path / "f",)
