"""Random lives: jobs under random commands, in bad weather, over restarts and pulled plugs, compared with a model after each step.

The model knows BITS's words, the table of `bits_async.jobs.model`, what the servers say, and nothing of the engine. The clock stands
still and the servers fall silent on demand, so after each step everything comes to rest, and then every state is foretold.

A few seconds, the same lives each time. For longer runs with new ones:

    LIVES=2000 python -m pytest tests/jobs/test_random_lives.py
"""

import asyncio
import contextlib
import os
import re
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import bits_async as bits
from bits_async import ErrorCode, InvalidState, JobPriority, JobState, files
from bits_async.jobs import engine
from bits_async.jobs.model import NEXT
from bits_async.testing import FakeNetwork
from bits_async.transport.answers import Asked
from bits_async.transport.lane import Body, Party

LIVES = int(os.environ.get("LIVES", "0"))
PATIENCE = 20.0  # real seconds for things to come to rest
TIME_SLICE = 30.0
A_FEW = 10  # bytes after which a server falls silent, or a connection is cut; bodies are much longer
S = JobState
ACTIVE = (S.CONNECTING, S.TRANSFERRING)
RUNNABLE = (S.QUEUED, *ACTIVE)
HELD = "held"  # an attempt that waits for a silent server
PART = re.compile(r"\.(?P<name>[^.]+)\.(?P<job>[0-9a-f]{32})\.[0-9a-f]+\.bits-part")
Give = Callable[[bits.Job], Awaitable[object]]

RESUMED = dict.fromkeys([S.SUSPENDED, S.ERROR, S.TRANSIENT_ERROR], S.QUEUED)
COMMANDS: dict[str, Give] = {
    "resume": lambda job: job.resume(),
    "suspend": lambda job: job.suspend(),
    "cancel": lambda job: job.cancel(),
    "complete": lambda job: job.complete(),
    "complete partial": lambda job: job.complete(partial=True),
    "high": lambda job: job.set_priority(JobPriority.HIGH),
    "low": lambda job: job.set_priority(JobPriority.LOW),
    "foreground": lambda job: job.set_priority(JobPriority.FOREGROUND),
    "retry soon": lambda job: job.set_minimum_retry_delay(5),
    "retry never": lambda job: job.set_no_progress_timeout(0),
    "retry": lambda job: job.set_no_progress_timeout(14 * 86400),
}
names = st.sampled_from(list(COMMANDS))
numbers = st.integers(0, 11)


def legal(before: JobState, after: JobState) -> bool:
    """Whether the table has a row that leads from one state to the other, or nothing changed."""
    return before is after or any(state is before and next_state is after for (state, _), next_state in NEXT.items())


@dataclass(eq=False)
class File:
    """A file as the model knows it, with its server."""

    number: int
    version: int = 0
    status: int = 200
    failures: int = 0  # requests that are still to fail
    bodies: list[bytes] = field(default_factory=list)
    possible: set[int] = field(default_factory=set)  # versions that the attempt may have met
    done: frozenset[int] | None = None  # transferred: which versions it may be
    maybe: set[int] = field(default_factory=set)  # versions that may stand in the part file, whole, since the plug was pulled
    changes: int = 0  # of the version, since the last resume
    kept: bool = False  # it may stand at its destination

    @property
    def url(self) -> str:
        return f"https://h{self.number}.test/file"

    @property
    def name(self) -> str:
        return f"file{self.number}"

    def is_whole(self, path: Path) -> bool:
        """What is there is one of the versions that were transferred."""
        return self.done is not None and path.read_bytes() in [self.bodies[version] for version in self.done]


@dataclass(eq=False)
class Life:
    """A job as the model knows it."""

    handle: bits.Job
    priority: JobPriority
    state: JobState = S.SUSPENDED  # as a listener heard
    files: list[File] = field(default_factory=list)
    retry_delay: float = 600.0
    fatal: bool = False  # no transient errors
    resumed: bool = False
    retry_due: float | None = None
    picked: float = 0.0  # when the running attempt began
    told: set[JobState] = field(default_factory=set)  # where the command under way leads
    heard: list[JobState] = field(default_factory=list)  # since then
    damaged: bool = False  # a cancel() was itself cancelled: finished parts may be gone

    @property
    def unfinished(self) -> list[File]:
        return [file for file in self.files if file.done is None]

    @property
    def refusal(self) -> tuple[type[bits.BitsError], ...]:
        """What a command gets that the state does not know. The handle of a job that has left the queue may be that of an earlier manager."""
        return (InvalidState, bits.ManagerClosed) if self.state.is_final else (InvalidState,)

    @property
    def background(self) -> bool:
        return self.priority is not JobPriority.FOREGROUND


class Servers(FakeNetwork):
    """Also says which requests are open: "asked", or "answered" when bytes flow."""

    def __init__(self) -> None:
        super().__init__()
        self.open: dict[str, str] = {}

    @contextlib.asynccontextmanager
    async def get(self, party: Party, asked: Asked) -> AsyncIterator[Body]:
        self.open[asked.url] = "asked"
        try:
            async with super().get(party, asked) as body:
                self.open[asked.url] = "answered"
                yield body
        finally:
            del self.open[asked.url]


class Lives(RuleBasedStateMachine):
    """One queue and its jobs. Rules have no preconditions: what Hypothesis draws must not depend on how fast things happen."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.home = tempfile.TemporaryDirectory(prefix="bits-lives-")
        self.out = Path(self.home.name, "out")
        self.out.mkdir()
        self.network = Servers()
        self.network.__enter__()
        self.network.clock.freeze()
        self.connected = True
        self.silence: int | None = None
        self.lives: list[Life] = []
        self.born: dict[Any, JobState] = {}
        self.count = 0
        self.faults: list[str] = []

    @property
    def living(self) -> list[Life]:
        return [life for life in self.lives if not life.state.is_final]

    def run(self, work: Awaitable[object]) -> None:
        self.loop.run_until_complete(asyncio.wait_for(work, 60))

    def one(self, number: int) -> Life:
        """Mostly one of those that live."""
        return self.living[number % len(self.living)] if self.living and number else self.lives[number % len(self.lives)]

    # -- the queue

    @initialize(places=st.sampled_from([1, 1, 2]))
    def begin(self, places: int) -> None:
        self.places = places
        self.run(self.open_queue())

    async def open_queue(self) -> None:
        limits = bits.Limits(background_jobs=self.places)
        self.manager = await bits.BitsManager(store=Path(self.home.name, "queue.db"), limits=limits).__aenter__()
        found = {job.id: job async for job in self.manager.enum_jobs()}
        stream = self.manager.events()
        assert list(found) == [life.handle.id for life in self.living], "jobs were lost, or came back"
        for life in self.living:
            life.handle = found[life.handle.id]
            expected = S.QUEUED if life.state in ACTIVE else life.state
            assert legal(expected, life.handle.state), f"{life.state} before, {life.handle.state} after"
            life.state, life.picked = life.handle.state, self.network.clock.monotonic()
        self.listener = asyncio.ensure_future(self.listen(stream))

    async def close_queue(self) -> None:
        await self.manager.aclose()
        await self.listener

    def teardown(self) -> None:
        with contextlib.suppress(BaseException):
            self.network.resume()
        try:
            if hasattr(self, "manager"):
                self.run(self.close_queue())
            self.check_faults()
        finally:
            self.loop.close()
            self.network.__exit__(None, None, None)
            self.home.cleanup()

    # -- what is heard

    async def listen(self, stream: bits.EventStream) -> None:
        with contextlib.suppress(bits.StoreError):  # the plug was pulled
            async for event in stream:
                try:
                    self.hear(event)
                except AssertionError as fault:
                    self.faults.append(str(fault))

    def hear(self, event: bits.Event) -> None:
        life = next((life for life in self.lives if life.handle.id == event.job_id), None)
        if isinstance(event, bits.Retrying):
            self.network.clock.advance(event.delay)
        elif life is None:
            assert isinstance(event, bits.JobChanged), event
            assert event.state is S.SUSPENDED, event
        elif isinstance(event, bits.FileTransferred):
            (file,) = [file for file in life.files if self.out / file.name == event.path]
            assert life.state is S.TRANSFERRING or (life.state is S.CONNECTING and file.maybe), f"a file of a job that is {life.state}"
            assert file.done is None, f"{file.name} was transferred twice"
            file.done = frozenset(file.possible)
        elif isinstance(event, bits.JobChanged) and event.state is not life.state:
            before, life.state = life.state, event.state
            life.heard.append(event.state)
            assert legal(before, event.state), f"{before} to {event.state} is not in the table"
            self.moved(life, before, event)

    def moved(self, life: Life, before: JobState, event: bits.JobChanged) -> None:
        now, state = self.network.clock.monotonic(), event.state
        life.retry_due = None
        if state is S.CONNECTING:
            life.picked = now
            for file in life.unfinished:
                file.possible = {file.version} | file.maybe
        elif state is S.QUEUED and before is S.TRANSIENT_ERROR:
            assert state in life.told or self.was_due(life), "a retry that was not due"
        elif state in (S.QUEUED, S.TRANSFERRING):
            assert before in ACTIVE or state in life.told, f"{before} to {state}: nobody said so"
        elif state in (S.SUSPENDED, S.ACKNOWLEDGED, S.CANCELLED):
            assert state in life.told, f"{before} to {state}: nobody said so"
        else:
            self.ended(life, event)

    def was_due(self, life: Life) -> bool:
        return self.dues.get(life, float("inf")) <= self.network.clock.monotonic()

    def ended(self, life: Life, event: bits.JobChanged) -> None:
        """An attempt has: as the model says, and then the model knows which failure it met."""
        assert (event.error is not None) == (event.state is not S.TRANSFERRED)
        changed = event.error is not None and event.error.code == ErrorCode.BG_E_REMOTE_FILE_CHANGED
        if changed and any(file.changes > 3 for file in life.unfinished):
            return
        fates = self.fates.get(life, set())
        assert event.state in fates, f"{event.state} ({event.error}) instead of {fates}"
        if event.error is not None and event.error.message == "told to fail":
            life.unfinished[0].failures -= 1
        if event.state is S.TRANSFERRED:
            assert not life.unfinished, "TRANSFERRED, and not every file is"
        if event.state is S.TRANSIENT_ERROR:
            assert event.waiting is not None
            assert event.waiting.until is not None
            delay = (event.waiting.until - event.time).total_seconds()
            assert delay == life.retry_delay
            life.retry_due = self.network.clock.monotonic() + delay

    # -- what is foretold

    def foretell(self) -> None:
        """What the weather is now, it will be until everything has come to rest."""
        cases = [(fresh, whole) for fresh in (False, True) for whole in (False, True)]
        self.fates = {life: {self.fate(life, fresh=fresh, whole=whole) for fresh, whole in cases} for life in self.lives}
        self.dues = {life: life.retry_due for life in self.lives if life.retry_due is not None}

    def fate(self, life: Life, *, fresh: bool, whole: bool) -> object:
        """What becomes of an attempt: a new one, or the one that is under way; with those files whole that may be so."""
        trouble = S.ERROR if life.fatal else S.TRANSIENT_ERROR
        for file in life.unfinished:
            if whole and file.maybe:
                continue
            flows = not fresh and self.network.open.get(file.url) == "answered"
            if not self.connected:
                return trouble
            if self.silence == 0 or (flows and self.silence is not None):
                return HELD
            if not flows and file.failures:
                return trouble
            if not flows and file.status != 200:
                return S.ERROR if file.status == 404 else trouble
            if self.silence is not None:
                return HELD
        return S.TRANSFERRED

    async def settle(self) -> None:
        """Let everything come to rest."""
        self.foretell()
        end, rest = self.loop.time() + PATIENCE, 0
        while rest < 3:
            self.check_faults()
            trouble = self.restless()
            assert self.loop.time() < end, trouble
            rest = 0 if trouble else rest + 1
            await asyncio.sleep(0 if rest else 0.001)
        for life in self.lives:
            life.told.clear()

    def restless(self) -> str | None:
        """Who is still on the way; None: nothing can move before something else happens."""
        now = self.network.clock.monotonic()
        for life in self.lives:
            if life.handle.state is not life.state:
                return f"{life.handle} was {life.state} when last heard of"
            if life.state in ACTIVE and not self.is_held(life):
                return f"{life.handle} is not held: {self.fates[life]}, {self.network.open}"
            if life.state is S.QUEUED and not life.background:
                return f"{life.handle} waits, and is to be done at once"
            if life.state is S.TRANSIENT_ERROR and life.retry_due is not None and life.retry_due <= now:
                return f"{life.handle} is to be tried again"
        running = [life for life in self.living if life.background and life.state in ACTIVE]
        waiting = [life for life in self.living if life.background and life.state is S.QUEUED]
        if len(running) > self.places:
            return f"{running} are too many"
        if waiting and len(running) < self.places:
            return f"{waiting} wait, and there is a place"
        for waiter in waiting:
            for life in running:
                if life.priority.value > waiter.priority.value:
                    return f"{waiter.handle} is more important than {life.handle}"
                if life.priority is waiter.priority and now - life.picked >= TIME_SLICE:
                    return f"{life.handle} has had its time, and {waiter.handle} waits"
        return None

    def is_held(self, life: Life) -> bool:
        where = [self.network.open[file.url] for file in life.unfinished if file.url in self.network.open]
        sure = ["asked", "answered"] if self.silence == 0 else ["answered"]
        return HELD in self.fates[life] and len(where) == 1 and where[0] in sure

    # -- commands

    @rule(priority=st.sampled_from(JobPriority), resume=st.booleans())
    def create(self, priority: JobPriority, resume: bool) -> None:
        async def work() -> None:
            if len(self.living) == 5:
                return
            life = Life(await self.manager.create_job("a life", priority=priority), priority)
            self.lives.append(life)
            await self.add(life)
            if resume:
                await self.give(life, "resume")
            await self.settle()

        self.run(work())

    def new_file(self) -> File:
        self.count += 1
        file = File(self.count)
        self.serve(file, version=0)
        return file

    async def add(self, life: Life) -> None:
        file = self.new_file()
        life.files.append(file)
        file.possible = {0}
        await life.handle.add_file(file.url, self.out / file.name)

    @rule(number=numbers)
    def add_file(self, number: int) -> None:
        async def work() -> None:
            if not self.lives:
                return
            life = self.one(number)
            if life.state.is_final:
                with pytest.raises(life.refusal):
                    await life.handle.add_file("https://h.test/late", self.out / "late")
            else:
                await self.add(life)
            await self.settle()

        self.run(work())

    @rule(number=numbers, name=names)
    def command(self, number: int, name: str) -> None:
        async def work() -> None:
            if self.lives:
                await self.give(self.one(number), name)
                await self.settle()

        self.run(work())

    async def give(self, life: Life, name: str) -> None:
        before, target = life.state, self.leads(life, name)
        life.heard.clear()
        if target is None:
            with pytest.raises(life.refusal):
                await COMMANDS[name](life.handle)
            return
        life.told = {target, S.QUEUED} if name == "resume" else {target}
        done = [file for file in life.files if file.done is not None]
        try:
            result = await COMMANDS[name](life.handle)
        except bits.LocalFileError as error:
            assert life.damaged, error
            assert name.startswith("complete"), error
            assert error.code == ErrorCode.BG_E_LOCAL_FILE_CHANGED, error
            for file in done:
                file.kept = True  # those before it
                if self.out / file.name == error.path:
                    file.done = None
                    file.possible = {file.version}
            return
        self.follow(life, name)
        if name == "resume":
            if before in RESUMED or (before is S.TRANSFERRED and life.unfinished):
                await self.until(lambda: life.heard[:1] == [S.QUEUED])
        else:
            assert life.handle.state is target
        if name.startswith("complete"):
            assert result == tuple(self.out / file.name for file in done)
            for file in life.files:
                file.kept = file.done is not None
            assert all((self.out / file.name).exists() for file in done)

    def leads(self, life: Life, name: str) -> JobState | None:
        """Where BITS says that a command leads; None: it is refused."""
        if life.state.is_final:
            return None
        if name == "resume":
            return RESUMED.get(life.state, S.QUEUED if life.state is S.TRANSFERRED and life.unfinished else life.state)
        if name == "suspend":
            return None if life.state is S.TRANSFERRED else S.SUSPENDED
        if name == "cancel":
            return S.CANCELLED
        if name == "complete" and (life.state is not S.TRANSFERRED or life.unfinished):
            return None
        return S.ACKNOWLEDGED if name.startswith("complete") else life.state

    def follow(self, life: Life, name: str) -> None:
        """What a command changes beside the state."""
        if name == "resume" and (life.heard or life.handle.state is not life.state):
            for file in life.files:
                file.changes = 0
        life.resumed = life.resumed or name == "resume"
        life.priority = life.handle.priority
        life.retry_delay = life.handle.minimum_retry_delay
        life.fatal = life.handle.no_progress_timeout == 0

    async def until(self, done: Callable[[], bool]) -> None:
        end = self.loop.time() + PATIENCE
        while not done():
            assert self.loop.time() < end
            await asyncio.sleep(0.001)

    @rule(number=numbers, name=names, ticks=st.integers(0, 150))
    def interrupt(self, number: int, name: str, ticks: int) -> None:
        """A command whose caller is cancelled was given, or it was not."""

        async def work() -> None:
            if not self.living:
                return
            life = self.living[number % len(self.living)]
            target = self.leads(life, name)
            life.heard.clear()
            life.told = {target, S.QUEUED} if target else set()
            giving = asyncio.ensure_future(COMMANDS[name](life.handle))
            for _ in range(ticks):
                await asyncio.sleep(0)
            giving.cancel()
            await asyncio.wait([giving])
            if not giving.cancelled() and giving.exception() is not None:
                assert target is None or life.damaged, giving.exception()
                if isinstance(giving.exception(), bits.LocalFileError):
                    self.forget(life, giving.exception())
            if name.startswith("complete"):
                for file in life.files:
                    file.kept = file.kept or file.done is not None
            life.damaged = life.damaged or name == "cancel"
            self.follow(life, name)
            await self.settle()

        self.run(work())

    def forget(self, life: Life, error: Any) -> None:
        for file in life.files:
            if self.out / file.name == error.path:
                file.done, file.possible = None, {file.version}

    # -- weather

    def serve(self, file: File, **changes: Any) -> None:
        for name, value in changes.items():
            if name != "cut":
                setattr(file, name, value)
        while len(file.bodies) <= file.version:
            number = len(file.bodies)
            file.bodies.append(f"{file.number}:{number};".encode() * (5000 + 100 * (number % 3)))
        cut = A_FEW if changes.get("cut") else None
        self.network.serve(file.url, file.bodies[file.version], status=file.status, cut_after=cut)

    @rule(number=numbers, what=st.sampled_from(["version", "version", "cut", 200, 404, 503]))
    def serve_otherwise(self, number: int, what: object) -> None:
        async def work() -> None:
            candidates = [(life, file) for life in self.living for file in life.unfinished]
            if not candidates:
                return
            life, file = candidates[number % len(candidates)]
            if what == "version":
                self.serve(file, version=file.version + 1)
                file.changes += 1
                file.possible = {file.version} | (file.possible if life.state in ACTIVE else set())
            elif what == "cut":
                self.serve(file, cut=True)
            else:
                self.serve(file, status=what)
            await self.settle()

        self.run(work())

    @rule(number=numbers)
    def fail(self, number: int) -> None:
        async def work() -> None:
            candidates = [file for life in self.living for file in life.unfinished]
            if not candidates:
                return
            file = candidates[number % len(candidates)]
            file.failures += 1
            self.network.fail(file.url, error=bits.NetworkError("told to fail", transient=True))
            await self.settle()

        self.run(work())

    @rule(connected=st.booleans())
    def connection(self, connected: bool) -> None:
        async def work() -> None:
            self.connected = connected
            (self.network.reconnect if connected else self.network.disconnect)()
            await self.settle()

        self.run(work())

    def silent(self, silence: int | None) -> None:
        self.silence = silence
        self.network.resume() if silence is None else self.network.pause(after=silence)

    @rule(silence=st.sampled_from([None, None, 0, A_FEW]))
    def fall_silent(self, silence: int | None) -> None:
        async def work() -> None:
            self.silent(silence)
            await self.settle()

        self.run(work())

    @rule(seconds=st.sampled_from([1, 4, 40, 700]))
    def time_passes(self, seconds: float) -> None:
        async def work() -> None:
            self.network.clock.advance(seconds)
            await self.settle()

        self.run(work())

    # -- restarts

    @rule()
    def restart(self) -> None:
        async def work() -> None:
            await self.close_queue()
            self.check_faults()
            self.check_disk()
            await self.open_queue()
            await self.settle()

        self.run(work())

    @rule(ticks=st.integers(0, 150), stir=st.booleans())
    def pull_the_plug(self, ticks: int, stir: bool) -> None:
        """From one moment on nothing reaches the disk any more; then another manager opens what is there."""

        async def work() -> None:
            if stir:
                self.silent(None)
                self.foretell()
            for _ in range(ticks):
                await asyncio.sleep(0)
            with no_power(self.manager):
                await self.close_queue()
            self.check_faults()
            for life in self.living:
                for file in life.unfinished:
                    file.maybe |= file.possible
            await self.open_queue()
            self.reconcile()
            await self.settle()

        self.run(work())

    def reconcile(self) -> None:
        """The journal may know of a file that nobody was told of."""
        for life in self.living:
            missed = life.handle.progress.files_transferred - sum(file.done is not None for file in life.files)
            assert missed in (0, 1)
            for file in life.unfinished[:missed]:
                file.done = frozenset(file.possible)

    # -- what always holds at rest

    def check_faults(self) -> None:
        assert not self.faults, self.faults

    @invariant()
    def jobs_are_what_they_seem(self) -> None:
        for life in self.lives:
            job = life.handle
            assert job.state is life.state
            assert (job.error is not None) == (life.state in (S.ERROR, S.TRANSIENT_ERROR))
            assert (job.waiting is not None) == (life.state in (S.QUEUED, S.SUSPENDED, S.TRANSIENT_ERROR))
            assert job.progress.files_total == len(life.files)
            assert job.progress.files_transferred == len(life.files) - len(life.unfinished)
            if life.state is S.TRANSFERRED and not life.unfinished:
                assert job.progress.bytes_transferred == job.progress.bytes_total

    @invariant()
    def check_disk(self) -> None:
        """Destinations are absent or wholly one version; part files belong to files of unfinished jobs, one each."""
        found = os.listdir(self.out)
        parts = [match for name in found if (match := PART.fullmatch(name))]
        known = {(life.handle.id.hex, file.name): (life, file) for life in self.lives for file in life.files}
        for life, file in known.values():
            mine = [part.string for part in parts if (part["job"], part["name"]) == (life.handle.id.hex, file.name)]
            assert len(mine) <= (life.resumed and not life.state.is_final), f"{life.handle}: {mine}"
            there = file.name in found
            if there:
                assert file.kept, f"{file.name} of {life.handle}"
                assert file.is_whole(self.out / file.name), f"{file.name} is a mixture"
            if file.done is not None and not life.state.is_final and not life.damaged:
                assert len(mine) + there == 1, f"{file.name} of {life.handle} was transferred: {found}"
                assert file.is_whole(self.out / (mine or [file.name])[0]), f"the part of {file.name} is a mixture"
            if life.state is S.ACKNOWLEDGED:
                assert there == file.kept
        assert {(part["job"], part["name"]) for part in parts} <= set(known)
        assert {name for name in found if not PART.fullmatch(name)} <= {file.name for _, file in known.values()}


@contextlib.contextmanager
def no_power(manager: bits.BitsManager) -> Iterator[None]:
    """Nothing that this manager still does reaches its journal or its files; what a thread is at is finished, as by the kernel."""

    async def dead_journal(*_: object) -> None:
        raise bits.StoreError("the power is off")

    async def dead_file(*_: object, **__: object) -> bool:
        raise bits.LocalFileError("the power is off")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manager._store, "save", dead_journal)
        for name in ("create", "write", "reserve", "sync", "truncate", "commit", "discard"):
            patch.setattr(files.PartFile, name, dead_file)
        patch.setattr(engine, "discard_part", dead_file)
        yield


@pytest.mark.timeout(0 if LIVES else 120)
class TestRandomLives(Lives.TestCase):  # type: ignore[name-defined,misc]
    settings = settings(
        max_examples=LIVES or 20,
        stateful_step_count=30,
        derandomize=not LIVES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
