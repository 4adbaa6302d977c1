"""Transfers are cancelled all the time, and at any moment: nothing is left behind, and the next call goes on to the right file.

A phase is a place where a download is made to stop: with a peer that is silent, a thread that blocks, or a journal that is slow.
There it is ended in every way there is, and afterwards finished.
"""

import asyncio
import contextlib
import gc
import itertools
import logging
import os
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import spnego

import bits_async as bits
from bits_async import AuthCredentials, AuthScheme, AuthTarget, JobState
from bits_async.files import part as part_module
from bits_async.identity import native, threads
from bits_async.jobs import store as journal
from bits_async.jobs import transfer
from bits_async.transport import lane
from tests.peers import USERS, Authority, Door, Fault, Hold, Misbehaviour, Origin, Proxy
from tests.realms import SILENT_REALM, write_krb5_conf
from tests.rules import NTLM_OVER_HTTP
from tests.waiting import until

BODY = os.urandom(400_000)
HALF = 200_000
SOON = 9.0  # seconds in which a cancel has ended, less than what is stuck takes to end by itself; its thread, if there is one, was let go
ALICE = AuthCredentials(AuthTarget.SERVER, AuthScheme.NTLM, r"LAB\alice", USERS[r"LAB\alice"])
IMPLICIT = AuthCredentials(AuthTarget.SERVER, AuthScheme.NEGOTIATE, None, None)
ALICE_AT_THE_PROXY = AuthCredentials(AuthTarget.PROXY, AuthScheme.NTLM, r"LAB\alice", USERS[r"LAB\alice"])


# -- the scene


@dataclass
class Scene:
    """One origin, one destination, one journal."""

    origin: Origin
    out: Path
    store: Path
    patch: pytest.MonkeyPatch
    authority: Authority
    url: str = ""
    proxy: str | None = None
    credentials: tuple[AuthCredentials, ...] = ()
    tls: ssl.SSLContext = field(default_factory=lambda: ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))  # reads no file, unlike the usual one

    @property
    def path(self) -> Path:
        return self.out / "file"

    @property
    def left(self) -> list[str]:
        return sorted(each.name for each in self.out.iterdir())

    def manager(self) -> bits.BitsManager:
        return bits.BitsManager(auth_rules=NTLM_OVER_HTTP, store=self.store, ssl=self.tls)

    async def job(self, manager: bits.BitsManager) -> bits.Job:
        job = await manager.create_job("cancelled", priority=bits.JobPriority.FOREGROUND)
        await job.add_file(self.url, self.path)
        if self.proxy:
            await job.set_proxy_settings(bits.ProxySettings.override(self.proxy))
        for given in self.credentials:
            await job.set_credentials(given.target, given.scheme, given.user_name, given.password)
        await job.resume()
        return job

    def options(self) -> dict[str, Any]:
        return {"proxy": self.proxy, "credentials": self.credentials}


@pytest.fixture
async def scene(memory_dir: Path, monkeypatch: pytest.MonkeyPatch, authority: Authority) -> AsyncIterator[Scene]:
    monkeypatch.setenv("XDG_STATE_HOME", str(memory_dir / "state"))
    monkeypatch.setattr(transfer, "WRITE_BATCH", 32 << 10)
    out = memory_dir / "out"
    out.mkdir()
    async with Origin() as origin:
        url = origin.serve("/file", BODY)
        yield Scene(origin, out, memory_dir / "queue.db", monkeypatch, authority, url)


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """`no_leaks` collects garbage twice in a test; all that was loaded before need not be looked at each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def nobody_complains(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No task's exception was lost, and no defect or broken journal was reported."""
    caplog.set_level(logging.WARNING)
    yield
    loud = [record.getMessage() for record in caplog.get_records("call") if record.levelno >= logging.ERROR]
    assert not loud


# -- the phases


@dataclass
class Stuck:
    """A download stops here. `outlasts`: a cancel waits for what is under way, so it must be let go for the cancel to end."""

    reached: Callable[[], Awaitable[object]]
    release: Callable[[], object]
    outlasts: bool = False


Phase = Callable[[Scene], AbstractAsyncContextManager[Stuck]]


class Gate:
    """A way to the origin that is closed at first: nobody accepts (`deaf`), or nobody answers. Open, it passes everything on."""

    def __init__(self, target: int, *, deaf: bool) -> None:
        self._target, self._deaf = target, deaf
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=0)
        self.port: int = self._socket.getsockname()[1]
        self._fillers: list[socket.socket] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._opened = asyncio.Event()
        self.reached = asyncio.Event()

    async def __aenter__(self) -> "Gate":
        self._socket.setblocking(False)
        if self._deaf:
            for _ in range(3):  # the kernel takes one or two, and then no more
                filler = socket.socket()
                filler.setblocking(False)
                filler.connect_ex(("127.0.0.1", self.port))
                self._fillers.append(filler)
            await until(lambda: self._knocking() >= 1)
            self._before = self._knocking()
            self._spawn(self._listen())
        else:
            self._spawn(self._accept())
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for each in (self._socket, *self._fillers):
            each.close()

    def open(self) -> None:
        self._opened.set()

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _knocking(self) -> int:
        """Connections that are being made and got no answer yet (SYN_SENT)."""
        lines = Path("/proc/self/net/tcp").read_text().splitlines()[1:]
        return sum(line.split()[2].endswith(f":{self.port:04X}") and line.split()[3] == "02" for line in lines)

    async def _listen(self) -> None:
        await until(lambda: self._knocking() > self._before)
        self.reached.set()
        await self._opened.wait()
        for filler in self._fillers:
            filler.close()
        await self._accept()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(self._socket)
            self._spawn(self._serve(connection))

    async def _serve(self, connection: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=connection)
        with contextlib.suppress(OSError):
            try:
                first = await reader.read(65536)
                if not first:
                    return
                self.reached.set()
                await self._opened.wait()
                up, down = await asyncio.open_connection("127.0.0.1", self._target)
                try:
                    down.write(first)
                    async with asyncio.TaskGroup() as both:
                        both.create_task(self._copy(reader, down))
                        both.create_task(self._copy(up, writer))
                finally:
                    down.transport.abort()
            finally:
                writer.transport.abort()

    @staticmethod
    async def _copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while piece := await source.read(65536):
                sink.write(piece)
                await sink.drain()
            if sink.can_write_eof():
                sink.write_eof()


def _gate(*, deaf: bool = False, tls: bool = False) -> Phase:
    @asynccontextmanager
    async def phase(scene: Scene) -> AsyncIterator[Stuck]:
        async with contextlib.AsyncExitStack() as stack:
            origin = scene.origin
            if tls:
                origin = await stack.enter_async_context(Origin(tls=scene.authority.server))
                origin.serve("/file", BODY)
                scene.tls = scene.authority.client()
            gate = await stack.enter_async_context(Gate(origin.port, deaf=deaf))
            scene.url = f"{'https' if tls else 'http'}://127.0.0.1:{gate.port}/file"
            yield Stuck(gate.reached.wait, gate.open)

    return phase


@asynccontextmanager
async def name_lookup(scene: Scene) -> AsyncIterator[Stuck]:
    """The resolver does not answer. Its thread is the event loop's own."""
    reached, go = threading.Event(), threading.Event()
    honest = socket.getaddrinfo

    def slow(*args: Any, **kwargs: Any) -> Any:
        reached.set()
        go.wait(30)
        return honest(*args, **kwargs)

    scene.patch.setattr(socket, "getaddrinfo", slow)
    try:
        yield Stuck(lambda: until(reached.is_set), go.set)
    finally:
        go.set()


@asynccontextmanager
async def before_the_answer(scene: Scene) -> AsyncIterator[Stuck]:
    hold = Hold()
    scene.origin.fault("/file", Fault(hold=hold))
    yield Stuck(hold.reached.wait, hold.release)
    hold.release()


@asynccontextmanager
async def body(scene: Scene) -> AsyncIterator[Stuck]:
    hold = Hold(after=HALF)
    scene.origin.fault("/file", Fault(hold=hold))
    yield Stuck(hold.reached.wait, hold.release)
    hold.release()


@asynccontextmanager
async def body_moved_by_a_thread(scene: Scene) -> AsyncIterator[Stuck]:
    """As large plain bodies are: a thread of the token reads the socket."""
    scene.patch.setattr(lane, "DETACH_FROM", 1)
    async with body(scene) as stuck:
        yield Stuck(lambda: until(lambda: [each.stat().st_size for each in scene.out.iterdir()] == [HALF]), stuck.release)


@asynccontextmanager
async def in_a_splice(scene: Scene) -> AsyncIterator[Stuck]:
    """That thread is inside the kernel."""
    scene.patch.setattr(lane, "DETACH_FROM", 1)
    scene.origin.fault("/file", Fault(rate=2_000_000))  # so that there is something left to splice
    async with _blocked(scene, native.Splicer, "move") as stuck:
        yield stuck


@asynccontextmanager
async def auth_leg(scene: Scene) -> AsyncIterator[Stuck]:
    hold = Hold()
    async with Origin(door=Door("NTLM", misbehave=Misbehaviour(hold=hold))) as origin:
        scene.url, scene.credentials = origin.serve("/file", BODY), (ALICE,)
        yield Stuck(hold.reached.wait, hold.release)
        hold.release()


@asynccontextmanager
async def connect_leg(scene: Scene) -> AsyncIterator[Stuck]:
    hold = Hold()
    door = Door("NTLM", misbehave=Misbehaviour(hold=hold))
    async with Origin(tls=scene.authority.server) as origin, Proxy(door=door) as proxy:
        scene.url, scene.credentials = origin.serve("/file", BODY), (ALICE_AT_THE_PROXY,)
        scene.proxy, scene.tls = proxy.url, scene.authority.client()
        yield Stuck(hold.reached.wait, hold.release)
        hold.release()


@asynccontextmanager
async def between_two_connections(scene: Scene) -> AsyncIterator[Stuck]:
    scene.patch.setattr(transfer, "RECONNECT_DELAYS", (30.0,) * transfer.RECONNECTS)
    cut = asyncio.Event()
    scene.origin.fault("/file", Fault(cut_after=HALF, then=cut.set))

    async def reached() -> None:
        await cut.wait()
        await asyncio.sleep(0.05)

    yield Stuck(reached, lambda: None)


@asynccontextmanager
async def before_a_retry(scene: Scene) -> AsyncIterator[Stuck]:
    refused = asyncio.Event()
    scene.origin.fault("/file", Fault(status=503, then=refused.set))

    async def reached() -> None:
        await refused.wait()
        await asyncio.sleep(0.05)

    yield Stuck(reached, lambda: None)


@asynccontextmanager
async def _blocked(scene: Scene, owner: object, name: str, number: int = 1) -> AsyncIterator[Stuck]:
    """A function that a thread calls does not return from its `number`-th call."""
    reached, go, honest = threading.Event(), threading.Event(), getattr(owner, name)
    calls = itertools.count(1)

    def slow(*args: Any) -> Any:
        if next(calls) >= number:
            reached.set()
            go.wait(30)
        return honest(*args)

    scene.patch.setattr(owner, name, slow)
    try:
        yield Stuck(lambda: until(reached.is_set), go.set, outlasts=True)
    finally:
        go.set()


def _thread(name: str, number: int = 1) -> Phase:
    """The file call of that name does not return, the `number`-th time."""
    return lambda scene: _blocked(scene, native, name, number)


def _journal(which: Callable[[Any], bool]) -> Phase:
    """The transaction that `which` chooses does not end."""

    @asynccontextmanager
    async def phase(scene: Scene) -> AsyncIterator[Stuck]:
        reached, go, honest = asyncio.Event(), asyncio.Event(), journal.SqliteStore._save

        async def slow(self: journal.SqliteStore, batch: Any) -> None:
            if which(batch):
                reached.set()
                await go.wait()
            await honest(self, batch)

        scene.patch.setattr(journal.SqliteStore, "_save", slow)
        try:
            yield Stuck(reached.wait, go.set, outlasts=True)
        finally:
            go.set()

    return phase


def _file(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda batch: any(test(file) for file in batch.files.values())


CONNECTING: dict[str, Phase] = {
    "nobody accepts": _gate(deaf=True),
    "the name is looked up": name_lookup,
    "silence in the TLS handshake": _gate(tls=True),
    "silence instead of an answer": _gate(),
    "before the answer": before_the_answer,
    "in a leg of a login": auth_leg,
    "in a leg of CONNECT": connect_leg,
    "before a retry": before_a_retry,
}
MOVING: dict[str, Phase] = {
    "in the body": body,
    "in a body that a thread moves": body_moved_by_a_thread,
    "in a splice": in_a_splice,
    "between two connections": between_two_connections,
    "making the part file": _thread("create_exclusive"),
    "in a write": _thread("pwrite_all"),
    "in fsync": _thread("datasync"),
    "in the journal: the version is known": _journal(_file(lambda file: file.size is not None and not file.transferred)),
    "in the journal: the file is whole, and the job": _journal(_file(lambda file: file.transferred and not file.committed)),
}
COMMITTING: dict[str, Phase] = {
    "in the rename": _thread("rename_at"),
    "in the directory's fsync": _thread("sync_directory", 2),  # the first one makes the part file's name durable
    "in the journal: the job leaves": _journal(lambda batch: bool(batch.removed)),
}
PHASES = CONNECTING | MOVING


def every(phases: dict[str, Phase]) -> Any:
    return pytest.mark.parametrize("phase", phases.values(), ids=list(phases))


async def ended(task: "asyncio.Task[Any]", stuck: Stuck) -> None:
    """The task ends soon; where it has to wait for what is under way, only after that was let go."""
    if stuck.outlasts:
        await asyncio.sleep(0.03)
        stuck.release()
    async with asyncio.timeout(SOON):
        await asyncio.wait({task})


async def cancelled(task: "asyncio.Task[Any]", stuck: Stuck) -> None:
    task.cancel()
    await ended(task, stuck)
    with contextlib.suppress(asyncio.CancelledError):
        task.result()  # a file that was whole at that very moment is no fault


async def finish(scene: Scene, download: Awaitable[Path]) -> None:
    async with asyncio.timeout(20):
        path = await download
    assert path.read_bytes() == BODY
    assert scene.left == ["file"]


# -- in every phase


@every(PHASES | COMMITTING)
async def test_a_cancelled_download_leaves_nothing_and_the_next_call_goes_on(no_leaks, scene, phase):
    async with phase(scene) as stuck:
        task = asyncio.ensure_future(bits.download(scene.url, scene.path, ssl=scene.tls, auth_rules=NTLM_OVER_HTTP, **scene.options()))
        await stuck.reached()
        await cancelled(task, stuck)
        stuck.release()
        assert len(scene.left) <= 1
        await finish(scene, bits.download(scene.url, scene.path, ssl=scene.tls, auth_rules=NTLM_OVER_HTTP, **scene.options()))
    assert [each for each in (scene.out.parent / "state").rglob("*") if each.is_file()] == []


@every(PHASES | COMMITTING)
async def test_a_download_that_is_cancelled_twice_leaves_nothing_and_the_next_call_goes_on(no_leaks, scene, phase):
    async with phase(scene) as stuck:
        task = asyncio.ensure_future(bits.download(scene.url, scene.path, ssl=scene.tls, auth_rules=NTLM_OVER_HTTP, **scene.options()))
        await stuck.reached()
        task.cancel()
        for _ in range(5):
            await asyncio.sleep(0)
        await cancelled(task, stuck)
        stuck.release()
        await finish(scene, bits.download(scene.url, scene.path, ssl=scene.tls, auth_rules=NTLM_OVER_HTTP, **scene.options()))


@every(PHASES | COMMITTING)
async def test_a_download_cancelled_on_a_manager_that_stays_open_can_be_called_again(no_leaks, scene, phase):
    async with phase(scene) as stuck:
        async with scene.manager() as manager:
            task = asyncio.ensure_future(manager.download(scene.url, scene.path, **scene.options()))
            await stuck.reached()
            await cancelled(task, stuck)
            stuck.release()
            await finish(scene, manager.download(scene.url, scene.path, **scene.options()))
            assert [job async for job in manager.enum_jobs()] == []


@every(PHASES)
async def test_a_suspended_job_is_quiet_and_goes_on_when_it_is_resumed(no_leaks, scene, phase):
    async with phase(scene) as stuck:
        async with scene.manager() as manager:
            job = await scene.job(manager)
            await stuck.reached()
            suspending = asyncio.ensure_future(job.suspend())
            await ended(suspending, stuck)
            try:
                suspending.result()
            except bits.InvalidState:  # it was whole at that very moment
                assert job.state is JobState.TRANSFERRED
            else:
                assert job.state is JobState.SUSPENDED
                sizes = [each.stat().st_size for each in scene.out.iterdir()]
                stuck.release()
                await asyncio.sleep(0.05)
                assert [each.stat().st_size for each in scene.out.iterdir()] == sizes
                await job.resume()
            await finish(scene, complete(job))


@every(PHASES)
async def test_a_cancelled_job_is_gone_with_its_part_file(no_leaks, scene, phase):
    async with phase(scene) as stuck:
        async with scene.manager() as manager:
            job = await scene.job(manager)
            await stuck.reached()
            cancelling = asyncio.ensure_future(job.cancel())
            await ended(cancelling, stuck)
            cancelling.result()
            assert job.state is JobState.CANCELLED
            assert scene.left == []
            assert [each async for each in manager.enum_jobs()] == []


@every(PHASES)
async def test_a_closed_manager_has_stopped_and_the_next_one_goes_on(no_leaks, scene, phase):
    async with phase(scene) as stuck:
        async with scene.manager() as manager:
            job = await scene.job(manager)
            waiting = asyncio.ensure_future(job.wait())
            await stuck.reached()
            closing = asyncio.ensure_future(manager.aclose())
            await ended(closing, stuck)
            closing.result()
            (found,) = await asyncio.gather(waiting, return_exceptions=True)
            assert found is None or isinstance(found, bits.ManagerClosed)
        stuck.release()
        async with scene.manager() as manager:
            (job,) = [each async for each in manager.enum_jobs()]
            if job.state is JobState.TRANSIENT_ERROR:
                await job.resume()
            await finish(scene, complete(job))


@every(COMMITTING)
async def test_a_manager_closed_while_a_file_is_put_in_place_lets_it_end(no_leaks, scene, phase):
    async with phase(scene) as stuck:
        async with scene.manager() as manager:
            job = await scene.job(manager)
            completing = asyncio.ensure_future(complete(job))
            await stuck.reached()
            closing = asyncio.ensure_future(manager.aclose())
            await ended(closing, stuck)
            closing.result()
            await finish(scene, completing)
        async with scene.manager() as manager:
            assert [each async for each in manager.enum_jobs()] == []


async def complete(job: bits.Job) -> Path:
    await job.wait()
    (path,) = await job.complete()
    return path


# -- the cancel of a command


COMMANDS: dict[str, Callable[[bits.Job], Awaitable[object]]] = {
    "suspend": lambda job: job.suspend(),
    "cancel": lambda job: job.cancel(),
    "resume": lambda job: job.resume(),
    "set_priority": lambda job: job.set_priority(bits.JobPriority.HIGH),
    "set_credentials": lambda job: job.set_credentials(AuthTarget.PROXY, AuthScheme.BASIC, "somebody", "something"),
    "add_file": lambda job: job.add_file(job.files[0].remote_name + "?2", job.files[0].local_name.with_name("second")),
    "complete": lambda job: job.complete(partial=True),
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=list(COMMANDS))
@pytest.mark.parametrize("suspended", [False, True], ids=["running", "suspended"])
async def test_a_command_cancelled_in_the_journal_has_happened_for_the_job_as_for_the_journal(no_leaks, scene, command, suspended):
    scene.origin.serve("/file?2", BODY)
    hold = Hold(after=HALF)
    scene.origin.fault("/file", Fault(hold=hold))
    scene.origin.always("/file", Fault(hold=Hold(after=0)))  # a job that was resumed is still under way when the manager closes
    async with scene.manager() as manager:
        job = await scene.job(manager)
        await hold.reached.wait()
        if suspended:
            await job.suspend()
        async with _journal(lambda batch: bool(batch.jobs or batch.removed or batch.grants))(scene) as stuck:
            task = asyncio.ensure_future(command(job))
            with contextlib.suppress(TimeoutError):  # a resume of a running job journals nothing
                async with asyncio.timeout(0.3):
                    await stuck.reached()
            await cancelled(task, stuck)
        before = facts(job)
        remembered = [each.id async for each in manager.enum_jobs()]
    async with bits.BitsManager(auth_rules=NTLM_OVER_HTTP, store=scene.store, ssl=scene.tls, run=False) as manager:
        stored = [each async for each in manager.enum_jobs()]
        assert [each.id for each in stored] == remembered
        if stored:
            assert facts(stored[0]) == before


def facts(job: bits.Job) -> object:
    """What a journal and a handle must agree on; whether it is QUEUED or under way is no difference to a journal."""
    state = JobState.QUEUED if job.state.is_active else job.state
    return state, job.priority, [(file.remote_name, file.local_name) for file in job.files], sorted(map(str, job._entry.grants))


@pytest.mark.parametrize("command", COMMANDS.values(), ids=list(COMMANDS))
async def test_a_cancelled_command_does_not_harm_the_job(no_leaks, scene, command):
    """Cancelled after any number of steps of the event loop, the job can be finished or has left the queue."""
    async with scene.manager() as manager:
        for steps in [*range(12), 15, 20, 30, 50]:
            job = await scene.job(manager)
            await until(lambda: job.state is not JobState.QUEUED)  # noqa: B023 - it is waited for here
            task = asyncio.ensure_future(command(job))
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, bits.InvalidState):  # it was whole at that very moment: it cannot be suspended
                await task
            if not job.state.is_final:
                await job.cancel()
            for each in scene.out.iterdir():
                assert each.name in ("file", "second")  # completed before the cancel came
                each.unlink()


@pytest.mark.parametrize("command", ["set_priority", "set_credentials", "add_file"])
async def test_a_command_that_meets_the_end_of_the_attempt_loses_nothing(no_leaks, scene, command):
    """Both write the job's record: the one that comes second begins with what the first left."""
    scene.origin.serve("/file?2", BODY)
    async with (
        _journal(lambda batch: any(job.state is JobState.TRANSFERRED for job in batch.jobs.values()))(scene) as stuck,
        scene.manager() as manager,
    ):
        job = await scene.job(manager)
        await stuck.reached()
        task = asyncio.ensure_future(COMMANDS[command](job))
        await asyncio.sleep(0.02)
        stuck.release()
        await task
        await until(lambda: job.state.is_settled)
        assert job.priority is (bits.JobPriority.HIGH if command == "set_priority" else bits.JobPriority.FOREGROUND)
        if command == "add_file":
            await job.resume()
            await job.wait()
        found = await job.complete()
        assert [path.read_bytes() for path in found] == [BODY] * (2 if command == "add_file" else 1)


async def test_a_file_added_while_another_is_fetched_is_fetched_too(no_leaks, scene):
    hold = Hold(after=HALF)
    scene.origin.fault("/file", Fault(hold=hold))
    async with scene.manager() as manager:
        job = await scene.job(manager)
        await hold.reached.wait()
        await job.add_file(scene.url, scene.out / "second")
        hold.release()
        await job.wait()
        assert [path.read_bytes() for path in await job.complete()] == [BODY, BODY]


# -- closing


@every(MOVING)
async def test_a_close_that_is_cancelled_still_closes(no_leaks, scene, phase):
    async with phase(scene) as stuck:
        async with scene.manager() as manager:
            await scene.job(manager)
            await stuck.reached()
            closing = asyncio.ensure_future(manager.aclose())
            await asyncio.sleep(0)
            await cancelled(closing, stuck)
            stuck.release()
            async with scene.manager() as following:  # the journal is free when the cancel has ended
                (job,) = [each async for each in following.enum_jobs()]
                await finish(scene, complete(job))


async def test_a_manager_that_is_left_while_it_is_being_closed_is_closed_when_it_is_left(no_leaks, scene):
    async with _journal(_file(lambda file: file.transferred))(scene) as stuck:
        async with scene.manager() as manager:
            await scene.job(manager)
            await stuck.reached()
            closing = asyncio.ensure_future(manager.aclose())
            await asyncio.sleep(0.02)
            asyncio.get_running_loop().call_later(0.05, stuck.release)
        async with scene.manager() as manager:
            assert len([each async for each in manager.enum_jobs()]) == 1
        await closing


async def test_a_job_made_while_the_manager_closes_is_made_or_refused(no_leaks, scene):
    async with scene.manager() as manager:
        making = [asyncio.ensure_future(manager.create_job(f"job {n}")) for n in range(20)]
        await asyncio.sleep(0)
        await manager.aclose()
        found = await asyncio.gather(*making, return_exceptions=True)
    refused = [each for each in found if isinstance(each, bits.ManagerClosed)]
    made = [each for each in found if isinstance(each, bits.Job)]
    assert len(made) + len(refused) == 20
    async with scene.manager() as manager:
        assert {job.id async for job in manager.enum_jobs()} == {job.id for job in made}


# -- a thread that does not come back


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "CANCEL_PATIENCE", 0.2)
    monkeypatch.setattr(threads, "CLOSE_PATIENCE", 0.2)
    monkeypatch.setattr(part_module, "_PATIENCE", 0.2)


@every({name: MOVING[name] for name in ("making the part file", "in a write", "in fsync", "in a splice")})
async def test_a_file_call_that_hangs_costs_its_thread_and_not_the_job(no_leaks, scene, impatient, phase):
    """The volume hangs; the job is suspended all the same. While the thread may still write, its part file is left alone."""
    async with phase(scene) as stuck:
        async with scene.manager() as manager:
            job = await scene.job(manager)
            await stuck.reached()
            async with asyncio.timeout(SOON):
                await job.suspend()
            assert job.state is JobState.SUSPENDED
            scene.patch.undo()  # calls that come now do not hang
            scene.patch.setenv("XDG_STATE_HOME", str(scene.out.parent / "state"))
            await job.resume()
            await job.wait()
            (path,) = await job.complete()
            assert path.read_bytes() == BODY
            stuck.release()
        await asyncio.sleep(0.05)
        assert path.read_bytes() == BODY


async def test_a_manager_closes_though_a_file_call_hangs_and_the_next_one_goes_on(no_leaks, scene, impatient):
    async with _thread("datasync")(scene) as stuck:
        async with scene.manager() as manager:
            await scene.job(manager)
            await stuck.reached()
            async with asyncio.timeout(SOON):
                await manager.aclose(grace=0.1)
        stuck.release()
        async with scene.manager() as manager:
            (job,) = [each async for each in manager.enum_jobs()]
            await job.wait()
            (path,) = await job.complete()
            assert path.read_bytes() == BODY


# -- a KDC that does not answer


ENDS: dict[str, Callable[[bits.BitsManager, bits.Job], Awaitable[object]]] = {
    "suspend": lambda manager, job: job.suspend(),
    "cancel": lambda manager, job: job.cancel(),
    "close": lambda manager, job: manager.aclose(),
}


def _callers(port: int) -> int:
    """Connections of this machine to that port."""
    lines = Path("/proc/self/net/tcp").read_text().splitlines()[1:]
    return sum(line.split()[2].endswith(f":{port:04X}") and line.split()[3] == "01" for line in lines)


@pytest.mark.realm
@pytest.mark.parametrize("end", [None, *ENDS.values()], ids=["cancelled download", *ENDS])
async def test_a_silent_kdc_keeps_nobody_waiting(no_leaks, scene, end):
    """Its thread cannot be ended: one is left for each call, until libkrb5 gives up by itself."""
    before = set(threading.enumerate())
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel accepts; in the end it hangs up, and the thread goes
        port = silent.getsockname()[1]
        realm = {SILENT_REALM: port}
        scene.patch.setenv("KRB5_CONFIG", str(write_krb5_conf(scene.store.with_name("krb5.conf"), realm)))
        async with Origin(door=Door("Negotiate")) as origin:
            url = origin.serve("/file", BODY)
            async with scene.manager() as manager:
                owner = bits.Token.for_network(spnego.Password(f"alice@{SILENT_REALM}", "whatever"))
                job = await manager.create_job("silent", owner=owner)
                await job.add_file(url, scene.path)
                await job.set_credentials(IMPLICIT.target, IMPLICIT.scheme, None, None)
                await job.resume()
                await until(lambda: _callers(port) == 1)
                assert job.state is JobState.CONNECTING
                async with asyncio.timeout(SOON):
                    await (end or ENDS["cancel"])(manager, job)
                if end is None:
                    bob = bits.Token.for_network(spnego.Password(f"bob@{SILENT_REALM}", "whatever"))  # he asks for himself
                    going = asyncio.ensure_future(manager.download(url, scene.path, owner=bob, credentials=[IMPLICIT]))
                    await until(lambda: _callers(port) == 2)
                    going.cancel()
                    async with asyncio.timeout(SOON):
                        await asyncio.wait({going})
                    assert going.cancelled()
            stuck = [each for each in set(threading.enumerate()) - before if not each.name.startswith("asyncio_")]
            assert len(stuck) == (2 if end is None else 1)
            assert all(each.daemon for each in stuck)
            assert scene.left == []
    await until(lambda: not any(each.is_alive() for each in stuck), deadline=40)


# -- at any step


@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
async def test_a_download_may_be_cancelled_at_any_step_of_the_event_loop(no_leaks, scene, tls):
    """Not only where we thought of: after so many rounds of the loop, whatever it is doing then."""
    async with Origin(tls=scene.authority.server if tls else None) as origin:
        url, context = origin.serve("/file", BODY), scene.authority.client() if tls else scene.tls
        rounds, whole = 0, False
        while not whole:
            rounds += 7 if rounds < 100 else 23
            task = asyncio.ensure_future(bits.download(url, scene.path, ssl=context, retry_for=0))
            for _ in range(rounds):
                await asyncio.sleep(0)
            task.cancel()
            try:
                await task
                whole = True
            except asyncio.CancelledError:
                pass
            if rounds > 3000:
                await bits.download(url, scene.path, ssl=context)
                whole = True
    assert scene.path.read_bytes() == BODY
    assert scene.left == ["file"]
