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
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

import bits_async as bits
from bits_async import ErrorCode, InvalidState, JobPriority, JobState
from bits_async.files.part import PartFile
from bits_async.jobs import part_files
from bits_async.jobs.model import NEXT
from bits_async.testing import FakeNetwork
from bits_async.transport.answers import Asked
from bits_async.transport.lane import Body, Party
from tests.waiting import until

LIVES = int(os.environ.get("LIVES", "0"))
PATIENCE = 20.0  # real seconds for things to come to rest
TIME_SLICE = 30.0
A_MOMENT = 0.001  # the journal keeps times to the microsecond
A_FEW = 10  # bytes after which a server falls silent, or a connection is cut; bodies are much longer
S = JobState
ACTIVE = (S.CONNECTING, S.TRANSFERRING)
RUNNABLE = (S.QUEUED, *ACTIVE)
HELD = "held"  # an attempt that waits for a silent server
PART = re.compile(r"\.(?P<name>[^.]+)\.(?P<job>[0-9a-f]{32})\.[0-9a-f]+\.bits-part")
Give = Callable[[bits.Job], Awaitable[object]]

RESUMED = dict.fromkeys([S.SUSPENDED, S.ERROR, S.TRANSIENT_ERROR], S.QUEUED)
LEADING = ("resume", "suspend", "cancel", "complete", "complete partial")
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
WEATHER = ["version", "version", "cut", "fail", 200, 404, 503, "lost", "back", "back", "silent", "stalled", "speak", "speak"]
priorities = st.sampled_from(JobPriority)
numbers = st.integers(0, 11)
ticks = st.integers(0, 150)
silences = st.sampled_from([None, 0, A_FEW])


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
    maybe: set[int] = field(default_factory=set)  # versions that the part file may hold, whole, since an attempt was stopped
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
        """What a command gets that the state does not know. The handle of a finished job may be an earlier manager's."""
        return (InvalidState, bits.ManagerClosed, bits.StoreError) if self.state.is_final else (InvalidState,)

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

    @initialize(places=st.sampled_from([1, 1, 2]), jobs=st.lists(priorities, min_size=1, max_size=4), silence=silences)
    def begin(self, places: int, jobs: list[JobPriority], silence: int | None) -> None:
        async def work() -> None:
            self.places = places
            self.silent(silence)
            await self.open_queue()
            for priority in jobs:
                await self.create(priority)

        self.run(work())

    async def open_queue(self) -> None:
        limits = bits.Limits(background_jobs=self.places)
        self.network.pause()  # nobody gets further than CONNECTING before somebody listens
        self.manager = await bits.BitsManager(store=Path(self.home.name, "queue.db"), limits=limits).__aenter__()
        found = {job.id: job async for job in self.manager.enum_jobs()}
        stream = self.manager.events()
        self.silent(self.silence)
        assert list(found) == [life.handle.id for life in self.living], "jobs were lost, or came back"
        for life in self.living:
            life.handle = found[life.handle.id]
            before, life.state, life.picked = life.state, life.handle.state, self.network.clock.monotonic()
            expected = S.QUEUED if before in ACTIVE else before
            tried_again = expected is S.TRANSIENT_ERROR and life.state is S.CONNECTING
            untold = before in ACTIVE and life.state in (S.TRANSFERRED, S.ERROR, S.TRANSIENT_ERROR)  # the journal knew, and then the plug
            # of a part file with all bytes in it no server is asked: it may be done before somebody listens
            done = expected is S.QUEUED and life.state is S.TRANSFERRED and all(file.maybe for file in life.unfinished)
            assert tried_again or untold or done or legal(expected, life.state), f"{before} before, {life.state} after"
            if untold:
                self.met(life, life.handle.error)
            if untold and life.handle.waiting is not None and life.handle.waiting.until is not None:
                life.retry_due = life.picked + (life.handle.waiting.until - self.network.clock.now()).total_seconds()
            if life.retry_due is not None:
                life.retry_due = min(life.retry_due, life.picked + life.retry_delay)
            elif life.state is S.TRANSIENT_ERROR and self.connected:
                life.retry_due = life.picked  # it waited for the network, which may have come back meanwhile
        self.listener = asyncio.ensure_future(self.listen(stream))

    async def close_queue(self) -> None:
        await self.manager.aclose()
        await self.listener

    def teardown(self) -> None:
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
            self.met(life, event.error)
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
        return self.dues.get(life, float("inf")) <= self.network.clock.monotonic() + A_MOMENT

    def ended(self, life: Life, event: bits.JobChanged) -> None:
        """An attempt has: as the model says, and then the model knows which failure it met."""
        assert (event.error is not None) == (event.state is not S.TRANSFERRED)
        changed = event.error is not None and event.error.code == ErrorCode.BG_E_REMOTE_FILE_CHANGED
        if changed and any(file.changes > 3 for file in life.unfinished):
            return
        fates = self.fates.get(life, set())
        assert event.state in fates, f"{event.state} ({event.error}) instead of {fates}"
        self.met(life, event.error)
        if event.state is S.TRANSFERRED:
            assert not life.unfinished, "TRANSFERRED, and not every file is"
        if event.state is S.TRANSIENT_ERROR:
            assert event.waiting is not None
            waits = event.waiting.reason is bits.WaitingReason.NETWORK
            assert waits is not self.connected, event
            if waits:
                assert event.waiting.until is None
                return
            assert event.waiting.until is not None
            delay = (event.waiting.until - self.network.clock.now()).total_seconds()
            assert life.retry_delay - 5 < delay <= life.retry_delay  # another job's broken connection may have moved the clock
            life.retry_due = self.network.clock.monotonic() + delay

    def met(self, life: Life | None, error: bits.BitsError | None) -> None:
        """A failure that the server had been told to make is spent."""
        if life is not None and error is not None and error.message == "told to fail":
            next(file for file in life.unfinished if file.failures).failures -= 1

    # -- what is foretold

    def foretell(self) -> None:
        """What the weather is now, it will be until everything has come to rest."""
        cases = [dict(zip(("fresh", "whole", "spared"), case, strict=True)) for case in product((False, True), repeat=3)]
        self.fates = {life: {self.fate(life, **case) for case in cases} for life in self.lives}
        self.dues = {life: life.retry_due for life in self.lives if life.retry_due is not None}

    def fate(self, life: Life, *, fresh: bool, whole: bool, spared: bool) -> object:
        """What becomes of an attempt: a new one, or the one that is under way; with those files whole that may be so; and where another
        file came before it, the first connection that breaks is made again.
        """
        trouble = S.ERROR if life.fatal else S.TRANSIENT_ERROR
        for file in life.unfinished:
            if whole and file.maybe:
                continue
            flows = not fresh and self.network.open.get(file.url) == "answered"
            if not self.connected:
                return trouble
            if self.silence == 0 or (flows and self.silence is not None):
                return HELD
            if not flows and file.failures > spared:
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
        while rest < 10:  # the engine's own tasks run on for a few turns of the loop
            self.check_faults()
            trouble = self.restless()
            assert self.loop.time() < end, trouble
            rest = 0 if trouble else rest + 1
            await asyncio.sleep(0 if rest else 0.001)
        for life in self.lives:
            life.told.clear()
        self.check_jobs()
        self.check_disk()

    def restless(self) -> str | None:
        """Who is still on the way; None: nothing can move before something else happens."""
        now = self.network.clock.monotonic()
        for life in self.lives:
            if life.handle.state is not life.state:
                return f"{life.handle} was {life.state} when last heard of"
            if life.state in ACTIVE and not self.is_held(life):
                return f"{life.handle} is not held: {self.fates[life]}, {self.network.open}"
            if life.state is S.QUEUED and life.unfinished and not self.connected:
                return f"{life.handle} waits for its turn, and the network is lost"
            if life.state is S.QUEUED and not life.background:
                return f"{life.handle} waits, and is to be done at once"
            if life.state is S.TRANSIENT_ERROR and life.retry_due is not None and life.retry_due + A_MOMENT <= now:
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
        silent = (where == ["answered"] and life.state is S.TRANSFERRING) or (where == ["asked"] and self.silence == 0)
        return silent and HELD in self.fates[life]

    # -- commands

    @rule(number=numbers, name=st.sampled_from(["resume", "resume", "suspend", "cancel", "complete", "complete partial"]))
    def command(self, number: int, name: str) -> None:
        self.run(self.give_and_settle(number, name))

    @rule(number=numbers, name=st.sampled_from([name for name in COMMANDS if name not in LEADING]))
    def change(self, number: int, name: str) -> None:
        self.run(self.give_and_settle(number, name))

    async def give_and_settle(self, number: int, name: str) -> None:
        await self.give(self.one(number), name)
        await self.settle()

    @rule(number=numbers, priority=priorities, what=st.sampled_from(["version", "cut", "fail", 404, 503]))
    def grow(self, number: int, priority: JobPriority, what: object) -> None:
        """A new job, or, when there are enough, one more file for one of them; its server is in a mood."""

        async def work() -> None:
            if number < 6 and len(self.living) < 5:
                await self.create(priority, what)
            else:
                await self.add(self.one(number), what)
                await self.settle()

        self.run(work())

    async def create(self, priority: JobPriority, what: object = None) -> None:
        life = Life(await self.manager.create_job("a life", priority=priority), priority)
        self.lives.append(life)
        await self.add(life, what)
        await self.give(life, "resume")
        await self.settle()

    def new_file(self) -> File:
        self.count += 1
        file = File(self.count)
        self.serve(file, version=0)
        return file

    async def add(self, life: Life, what: object) -> None:
        if life.state.is_final:
            with pytest.raises(life.refusal):
                await life.handle.add_file("https://h.test/late", self.out / "late")
        else:
            file = self.new_file()
            life.files.append(file)
            file.possible = {0}
            if what is not None:
                self.change_server(life, file, what)
            await life.handle.add_file(file.url, self.out / file.name)

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
            if not (life.damaged and name.startswith("complete") and error.code == ErrorCode.BG_E_LOCAL_FILE_CHANGED):
                raise
            for file in done:
                file.kept = True  # those before it
            self.forget(life)
            return
        self.follow(life, name)
        if name == "resume":
            if before in RESUMED or (before is S.TRANSFERRED and life.unfinished):
                await until(lambda: life.heard[:1] == [S.QUEUED])
        elif name in LEADING:
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

    @rule(number=numbers, name=st.sampled_from(list(COMMANDS)), ticks=ticks)
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
            if name.startswith("complete"):
                for file in life.files:
                    file.kept = file.kept or file.done is not None
            life.damaged = life.damaged or name == "cancel"
            self.forget(life)
            self.follow(life, name)
            await self.settle()

        self.run(work())

    def forget(self, life: Life) -> None:
        """The files whose parts were found to be gone."""
        for file, shown in zip(life.files, life.handle.files, strict=True):
            if life.damaged and file.done is not None and shown.progress.bytes_total is None:
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

    @rule(number=numbers, what=st.sampled_from(WEATHER))
    def weather(self, number: int, what: object) -> None:
        async def work() -> None:
            candidates = [(life, file) for life in self.living for file in life.unfinished]
            if what in ("lost", "back"):
                if what == "back" and not self.connected:
                    for life in self.living:
                        if life.state is S.TRANSIENT_ERROR:
                            life.retry_due = self.network.clock.monotonic()  # whatever it waits for
                self.connected = what == "back"
                (self.network.reconnect if self.connected else self.network.disconnect)()
            elif what in ("silent", "stalled", "speak"):
                self.silent({"silent": 0, "stalled": A_FEW, "speak": None}[str(what)])
            elif candidates:
                self.change_server(*candidates[number % len(candidates)], what)
            await self.settle()

        self.run(work())

    def change_server(self, life: Life, file: File, what: object) -> None:
        if what == "version":
            self.serve(file, version=file.version + 1)
            file.changes += 1
            file.possible = {file.version} | (file.possible if life.state in ACTIVE else set())
        elif what == "cut":
            self.serve(file, cut=True)
        elif what == "fail":
            file.failures += 1
            self.network.fail(file.url, error=bits.NetworkError("told to fail", transient=True))
        else:
            self.serve(file, status=what)

    def silent(self, silence: int | None) -> None:
        self.silence = silence
        self.network.resume() if silence is None else self.network.pause(after=silence)

    @rule(seconds=st.sampled_from([1, 4, 40, 700]))
    def time_passes(self, seconds: float) -> None:
        async def work() -> None:
            self.network.clock.advance(seconds)
            await self.settle()

        self.run(work())

    # -- restarts

    @rule(plug=st.booleans(), stir=st.booleans(), ticks=ticks)
    def begin_again(self, plug: bool, stir: bool, ticks: int) -> None:
        """Close the manager, or pull the plug: from one moment on nothing reaches the disk. Then another one opens what is there."""

        async def work() -> None:
            if stir:
                self.silent(None)
                self.foretell()
            for _ in range(ticks):
                await asyncio.sleep(0)
            with no_power(self.manager) if plug else contextlib.nullcontext():
                await self.close_queue()
            for life in self.living:
                for file in life.unfinished:
                    file.maybe |= file.possible
            await self.go_on()

        self.run(work())

    async def go_on(self) -> None:
        self.check_faults()
        await self.open_queue()
        self.reconcile()
        await self.settle()

    def reconcile(self) -> None:
        """The journal may know of files that nobody was told of."""
        for life in self.living:
            missed = life.handle.progress.files_transferred - sum(file.done is not None for file in life.files)
            assert 0 <= missed <= len(life.unfinished)
            for file in life.unfinished[:missed]:
                file.done = frozenset(file.possible)

    # -- what always holds at rest

    def check_faults(self) -> None:
        assert not self.faults, self.faults

    def check_jobs(self) -> None:
        for life in self.lives:
            job = life.handle
            assert job.state is life.state
            assert (job.error is not None) == (life.state in (S.ERROR, S.TRANSIENT_ERROR))
            assert (job.waiting is not None) == (life.state in (S.QUEUED, S.SUSPENDED, S.TRANSIENT_ERROR))
            assert job.progress.files_total == len(life.files)
            assert job.progress.files_transferred == len(life.files) - len(life.unfinished)
            if life.state is S.TRANSFERRED and not life.unfinished:
                assert job.progress.bytes_transferred == job.progress.bytes_total

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
                assert there == (file.done is not None)
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
        for name in ("create", "append", "sync", "truncate", "commit", "discard"):
            patch.setattr(PartFile, name, dead_file)
        patch.setattr(part_files, "discard_part", dead_file)
        yield


@pytest.mark.timeout(0 if LIVES else 120)
class TestRandomLives(Lives.TestCase):  # type: ignore[misc,valid-type]
    settings = settings(
        max_examples=LIVES or 20,
        stateful_step_count=30,
        derandomize=not LIVES,
        phases=[Phase.generate],  # real time passes between the steps: what is shrunk may be another fault
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
