"""The queue at work: the jobs in memory, the commands on them, and the loop that starts and ends their attempts.

The engine knows tokens only as values to hand on; who may open a job is decided at the door (`manager`). Every change of a job is in
the journal before it is told to anybody. A command on a job first holds it (nothing picks it up), stops its attempt at a durable point,
and then moves it along the table of `model`.

Races this module answers: a command and the end of an attempt (commands wait for the attempt's supervisor, then look at the state again);
two commands on one job (`Entry.lock`); two changes of one job's record, by a command and by the end of an attempt (`Entry.changing`); a
cancelled caller (what is in the journal is in memory too: `save` does both, or has not begun); a command that is under way when the manager
closes (`stop` waits for it).
"""

import asyncio
import contextlib
import contextvars
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from ..auth.policy import Origin
from ..clock import Clock
from ..errors import (
    BitsError,
    ErrorCode,
    ErrorContext,
    ImpersonationFailed,
    InvalidState,
    ManagerClosed,
    NetworkError,
    TokenRequired,
    code_name,
    make_error,
    show_text,
    show_url,
)
from ..files import PartFile, PartRecord, committed_length, discard_draft, discard_part, new_draft
from ..identity.threads import TokenExecutor, TokenExecutors
from ..identity.tokens import HelperTokenFlags, Token, TokenPair
from ..limits import Bucket
from ..transport.lane import Party
from ..transport.options import SecurityFlags
from ..transport.ranges import durable, without
from .callbacks import Notifier, Outbox, RunCommand, commander
from .certificates import CertificateJudge
from .conditions import Conditions, Hindrance, network_lost
from .model import (
    NOTHING,
    Cancellation,
    Change,
    Command,
    Completion,
    FileRecord,
    GrantRecord,
    GrantRemoved,
    JobProgress,
    JobRecord,
    JobRemoved,
    JobState,
    NotifyFlags,
    Outcome,
    OwnerKey,
    StoredJob,
    Waiting,
    WaitingReason,
    advance,
    owed_in,
)
from .notify import Event, EventStream, FileRestarted, FileTransferred, JobChanged, Progress, Retrying
from .scheduler import TIME_SLICE, Candidate, Limits, choose, may_retry, retry_delay
from .store import Store, finish
from .transfer import Attempt, Workshop

log = logging.getLogger("bits_async.jobs")


@dataclass(eq=False, slots=True)
class Entry:
    """One job in memory: its records, its tokens and its running attempt."""

    job: JobRecord
    files: list[FileRecord]
    grants: list[GrantRecord]
    owner: Token | None = None
    helper: Token | None = None
    positions: dict[int, int] = field(default_factory=dict)  # bytes written, by file
    farthest: dict[int, int] = field(default_factory=dict)  # of the same version: what counts as progress is beyond
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)  # each change of the record begins with what the last one left
    held: int = 0  # commands at work: the scheduler leaves the job alone
    work: asyncio.Task[None] | None = None
    supervisor: asyncio.Task[None] | None = None
    turn: int = 0
    started: float = 0.0  # monotonic, of the running attempt
    retry_due: float | None = None  # monotonic
    failing_since: float | None = None  # monotonic, of the first transient error without progress
    touched: datetime | None = None  # when bytes last arrived; with the job's own time of change: its last activity
    stopping: bool = False  # the attempt was told to stop; told again, it could not finish what it does to stop
    overdue: bool = False  # the attempt is stopped because the job has been transferring for too long
    hindrance: Hindrance | None = None  # the attempt is stopped because of it
    bucket: Bucket | None = None  # the job's own limit of speed, once it has run
    levels: tuple[Bucket, ...] = ()  # all limits of the running attempt
    paused_by: BitsError | None = None  # why the owner's token could not be had
    restored: bool = False  # from the journal: a process that died may have left a part file that is not in it yet
    judge: CertificateJudge | None = None  # the application's own say about servers' certificates
    answers: dict[int, tuple[tuple[str, str], ...]] = field(default_factory=dict, repr=False)  # last response headers, by file
    outbox: Outbox = field(default_factory=Outbox)  # what it has to tell, and to whom

    def __post_init__(self) -> None:
        for file in self.files:
            position = sum(piece.durable - piece.start for piece in file.slices)
            self.positions.setdefault(file.index, position)
            self.farthest.setdefault(file.index, position)

    def stop(self) -> None:
        """Tell the running attempt to stop at a durable point."""
        if self.work is not None and not self.stopping:
            self.stopping = True
            self.work.cancel()

    @property
    def pair(self) -> TokenPair:
        """The tokens as they are now."""
        return TokenPair(self.owner, self.helper, self.job.helper_flags)

    @property
    def progress(self) -> JobProgress:
        """Over all files."""
        sizes = [file.size for file in self.files]
        total = None if any(size is None for size in sizes) else sum(size or 0 for size in sizes)
        done = sum(1 for file in self.files if file.transferred)
        return JobProgress(total, sum(self.positions.get(file.index, 0) for file in self.files), len(self.files), done)

    @property
    def next_url(self) -> str | None:
        """What is to be fetched next; None: nothing."""
        wanted = (file for file in self.files if (file.outstanding if self.job.on_demand_mode else not file.transferred))
        return next((file.url for file in wanted), None)

    @property
    def satisfied(self) -> bool:
        """On demand: all that was asked for is there."""
        return self.job.on_demand_mode and not any(file.outstanding for file in self.files)

    @property
    def unfinished(self) -> bool:
        """Whether a file is still to be fetched."""
        return any(not file.transferred for file in self.files)


class _Report:
    """An attempt's recorder: journals through the engine and tells the listeners."""

    def __init__(self, engine: "Engine", entry: Entry) -> None:
        self._engine = engine
        self._entry = entry

    @property
    def job(self) -> JobRecord:
        return self._entry.job

    @property
    def files(self) -> Sequence[FileRecord]:
        return self._entry.files

    @property
    def levels(self) -> Sequence[Bucket]:
        return self._entry.levels

    async def keep(self, file: FileRecord) -> None:
        if file.transferred and not self._entry.files[file.index].transferred:
            file = replace(file, owed=NotifyFlags.FILE_TRANSFERRED in self._entry.job.notify_flags)
        await self._engine.save(file, then=partial(self._kept, file))

    def _kept(self, file: FileRecord) -> None:
        entry = self._entry
        before, entry.files[file.index] = entry.files[file.index], file
        if entry.job.on_demand_mode:
            self._engine.notifier.arrived(entry, file.index, without(durable(file.slices), durable(before.slices)))
        if file.transferred and not before.transferred:
            self._transferred(file)

    def answered(self) -> None:
        if self._entry.job.state is JobState.CONNECTING:
            self._engine.move_in_memory(self._entry, Outcome.ANSWERED)

    def moved(self, index: int, position: int) -> None:
        entry = self._entry
        if position > entry.farthest.get(index, 0):
            entry.failing_since = None
            entry.farthest[index] = position
            entry.touched = self._engine.clock.now()
        entry.positions[index] = position
        self._engine.notifier.modified(entry)
        self._engine.publish_progress(entry)

    def restarted(self, index: int, reason: str, *, changed: bool) -> None:
        if changed:
            self._entry.farthest[index] = 0
        file = self._entry.files[index]
        now, job = self._engine.clock.now(), self._entry.job.id
        self._engine.publish(FileRestarted(time=now, job_id=job, url=show_url(file.url), path=file.path, reason=reason))

    def retrying(self, number: int, delay: float, error: BitsError) -> None:
        now, job = self._engine.clock.now(), self._entry.job.id
        self._engine.publish(Retrying(time=now, job_id=job, number=number, delay=delay, error=error))

    def _transferred(self, file: FileRecord) -> None:
        entry = self._entry
        entry.positions[file.index] = file.size or 0
        now, url, size = self._engine.clock.now(), show_url(file.url), file.size or 0
        self._engine.publish(FileTransferred(time=now, job_id=entry.job.id, url=url, path=file.path, size=size))
        entry.outbox.turns[file.index] += 1
        self._engine.notifier.look(entry)


class Engine:
    """All jobs of one journal.

    Args:
        store: the open journal; closed by its owner after `stop`.
        shop: what attempts work with.
        limits: how much may run at once.
        conditions: what must be so for a job to run; opened and closed here, if `run`.
        run: False: jobs can be edited, nothing is transferred.
        party: the network side of a job's file, for the token that acts there and its security threads.
        find_owner: asks for the token of a job whose owner has none in this process; None: not to be had now.
        run_command: how notification commands are run.
    """

    def __init__(
        self,
        *,
        store: Store,
        shop: Workshop,
        limits: Limits,
        conditions: Conditions,
        run: bool,
        party: Callable[[Entry, Token, TokenExecutor, int], Awaitable[Party]],
        find_owner: Callable[[Entry], Awaitable[Token | None]],
        run_command: RunCommand,
        time_slice: float = TIME_SLICE,
    ) -> None:
        self.entries: dict[UUID, Entry] = {}
        self.clock: Clock = shop.clock
        self.failure: BitsError | None = None
        self.closed = False
        self._store = store
        self._shop = shop
        self._limits = limits
        self._conditions = conditions
        self._run = run
        self._party = party
        self._find_owner = find_owner
        self._time_slice = time_slice
        self._stopped = False
        self._commands: set[asyncio.Future[None]] = set()  # under way
        self._streams: set[EventStream] = set()
        self._changed: set[asyncio.Future[None]] = set()
        self._wake = asyncio.Event()
        self._turns = 0
        self._loop_task: asyncio.Task[None] | None = None
        self._searches: dict[str, asyncio.Task[None]] = {}
        self.notifier = Notifier(clock=self.clock, task=self.task, told=self._told, changed=self.announce, run_command=run_command)

    @property
    def executors(self) -> TokenExecutors:
        """The threads that act as the tokens."""
        return self._shop.executors

    # -- life -----------------------------------------------------------------------------------------------------------------------

    async def start(self, adopt: Callable[[OwnerKey], Awaitable[Token | None]], *, hold: bool = False) -> None:
        """Put the jobs of the journal back in the queue, or with `hold` let them wait for a resume.

        `adopt` says for whom the process may stand in.

        Raises:
            StoreError: the journal cannot be read.
        """
        self.notifier.commands = self._run and not hold
        for stored in await self._store.load():
            entry = await self._restore(stored, await adopt(stored.job.owner), hold=hold)
            if stored.job.notify_setter is not None:
                setter = await adopt(stored.job.notify_setter)
                entry.outbox.commander = None if setter is None else (stored.job.notify_setter, setter)
            self.notifier.look(entry)
        if self._run:
            await self._conditions.open(self._wake.set, self._network_back)
            self._loop_task = self.task(self._loop(), "bits-engine")

    async def _restore(self, stored: StoredJob, owner: Token | None, *, hold: bool) -> Entry:
        """After a restart: running jobs are queued again, and a job that needs a helper token has lost it (BG_E_TOKEN_REQUIRED)."""
        job = stored.job
        entry = Entry(job, list(stored.files), list(stored.grants), owner=owner, restored=True)
        self.entries[job.id] = entry
        if job.helper_flags is not HelperTokenFlags.NONE and not job.state.is_settled:
            error = TokenRequired("the helper token did not survive the restart", job_id=job.id)
            await self._refuse_restored(entry, error)
        elif job.id in self._store.lost_secrets and not job.state.is_settled:
            message = "the journal's key file was lost or replaced, and a secret of this job cannot be read"
            code = ErrorCode.BG_E_INVALID_CREDENTIALS
            await self._refuse_restored(entry, make_error(code, ErrorContext.GENERAL_QUEUE_MANAGER, message, job_id=job.id))
        elif hold and not job.state.is_settled:
            entry.job = replace(job, state=JobState.SUSPENDED, retry_at=None)
        elif job.state.is_active:
            entry.job = replace(job, state=advance(job.state, Outcome.REOPENED))
        elif job.state is JobState.TRANSIENT_ERROR:
            left = 0.0 if job.retry_at is None else (job.retry_at - self.clock.now()).total_seconds()
            longest = job.minimum_retry_delay if job.error is None else retry_delay(job.minimum_retry_delay, job.error)
            entry.retry_due = self.clock.monotonic() + min(max(left, 0.0), longest)  # the wall clock may have been changed
            entry.failing_since = self.clock.monotonic() - job.stalled
        return entry

    async def _refuse_restored(self, entry: Entry, error: BitsError) -> None:
        job = entry.job
        owed = owed_in(JobState.ERROR, job.notify_flags)
        entry.job = replace(job, state=JobState.ERROR, error=error, error_count=job.error_count + 1, retry_at=None, owed=owed)
        await self._store.save(entry.job)

    async def stop(self, grace: float) -> None:
        """Stop every attempt at a durable point and let commands end; what does not within `grace` seconds is left behind.

        The journal is closed by its owner, the manager, afterwards.
        """
        self.closed = True
        if self._loop_task is not None:
            self._loop_task.cancel()
            await asyncio.wait({self._loop_task})
        for task in self._searches.values():
            task.cancel()
        telling = self.task(self.notifier.stop(grace), "bits-notifier-end")
        supervisors = {entry.supervisor for entry in self.entries.values() if entry.supervisor is not None}
        for entry in self.entries.values():
            entry.stop()
        waiting = supervisors | set(self._searches.values()) | self._commands
        if waiting:
            _, late = await asyncio.wait(waiting, timeout=grace)
            for each in late:
                log.warning("an attempt or a command did not end within %.1f s", grace)
                each.cancel()
        await self._conditions.aclose()
        await asyncio.wait({telling})
        self._stopped = True
        for stream in list(self._streams):
            stream.finish(self.failure)
        self._tell_waiters()

    def fail(self, error: BitsError) -> None:
        """The journal broke: nothing more is transferred, and everybody who waits hears of it."""
        if self.failure is None:
            self.failure = error
            log.error("the engine has stopped: %s", error)
            self.notifier.halt()
            for entry in self.entries.values():
                entry.stop()
        self._wake.set()
        self._tell_waiters()

    def check(self) -> None:
        """Raise what every call must hear first: the engine failed, or is closed."""
        if self.failure is not None:
            raise self.failure.located()
        if self.closed:
            raise ManagerClosed

    def task(self, coro: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """A task of the engine's own, in an empty context: no caller's identity leaks into it."""
        return asyncio.get_running_loop().create_task(coro, name=name, context=contextvars.Context())

    # -- the journal and the listeners ------------------------------------------------------------------------------------------------

    async def save(self, *changes: Change, then: Callable[[], object] = lambda: None) -> None:
        """One durable transaction, and `then` what it means in memory; a cancelled caller has both.

        Raises:
            StoreError: neither; the engine has stopped. ManagerClosed: neither; it came too late.
        """
        self.check_failure()
        await finish(self._save(changes, then))

    async def _save(self, changes: Sequence[Change], then: Callable[[], object]) -> None:
        try:
            if changes:
                await self._store.save(*changes)
        except BitsError as error:
            if self._stopped:
                raise ManagerClosed from None
            self.fail(error)
            raise
        then()

    def check_failure(self) -> None:
        """Raise the engine's failure, if it has failed."""
        if self.failure is not None:
            raise self.failure.located()

    async def change(self, entry: Entry, *, files: Sequence[FileRecord] = (), **fields: Any) -> None:
        """Journal new values of a job (and of files of it), then show them."""
        async with entry.changing:
            fields["modified"] = self.clock.now()
            if "state" in fields:
                fields["owed"] = owed_in(fields["state"], entry.job.notify_flags)
            await self.save(replace(entry.job, **fields), *files, then=partial(self._show, entry, files, fields))

    def _show(self, entry: Entry, files: Sequence[FileRecord], fields: dict[str, Any]) -> None:
        before = entry.job.state
        entry.job = replace(entry.job, **fields)  # a server may have answered in the meantime
        for file in files:
            entry.files[file.index : file.index + 1] = [file]
        if entry.bucket is not None and "maximum_bandwidth" in fields:
            entry.bucket.set_rate(entry.job.maximum_bandwidth)
        if "state" in fields:
            entry.outbox.turns[None] += 1
        if entry.job.state is not before or "retry_at" in fields:
            self.announce(entry)
        if entry.job.state not in (JobState.TRANSFERRED, JobState.ERROR) or entry.job.state is before:
            self.notifier.modified(entry)
        self._wake.set()

    async def _told(self, entry: Entry, index: int | None, turn: int) -> None:
        """The application was told of a file, or (None) of the job's end. That is no change of the job: its time stays."""
        async with entry.lock, entry.changing:
            if entry.outbox.turns[index] != turn or entry.job.state.is_final:
                return  # it has happened again since, or a command has taken the job out of the queue

            def show() -> None:
                if index is None:
                    entry.job = replace(entry.job, owed=NOTHING)
                else:
                    entry.files[index] = replace(entry.files[index], owed=False)

            await self.save(replace(entry.job, owed=NOTHING) if index is None else replace(entry.files[index], owed=False), then=show)

    def move_in_memory(self, entry: Entry, event: Outcome) -> None:
        """A change of state that need not be journalled, because a restart maps both states to QUEUED."""
        entry.job = replace(entry.job, state=advance(entry.job.state, event))
        self.announce(entry)
        self.notifier.modified(entry)

    def announce(self, entry: Entry) -> None:
        """Tell everybody how the job stands."""
        log.info("job %s (%s): %s", entry.job.id, show_text(entry.job.display_name, 80), entry.job.state.name)
        self.publish(self.snapshot(entry))
        self._tell_waiters()
        self.notifier.look(entry)

    def snapshot(self, entry: Entry) -> JobChanged:
        """The job as it is."""
        job = entry.job
        error = job.error if job.state in (JobState.ERROR, JobState.TRANSIENT_ERROR) else None
        now = self.clock.now()
        return JobChanged(time=now, job_id=job.id, state=job.state, waiting=self.waiting(entry), error=error, progress=entry.progress)

    def publish_progress(self, entry: Entry) -> None:
        """Tell the listeners how far the job is."""
        if not self._streams:
            return
        p = entry.progress
        self.publish(
            Progress(
                time=self.clock.now(),
                job_id=entry.job.id,
                state=entry.job.state,
                bytes_total=p.bytes_total,
                bytes_transferred=p.bytes_transferred,
                files_total=p.files_total,
                files_transferred=p.files_transferred,
            )
        )

    def publish(self, event: Event) -> None:
        """Hand an event to every stream."""
        for stream in list(self._streams):
            stream.publish(event)

    def stream(self, wants: Callable[[UUID], bool], ends: Callable[[JobState], bool]) -> EventStream:
        """A new reader."""

        def snapshot(job_id: UUID) -> JobChanged | None:
            entry = self.entries.get(job_id)
            return None if entry is None else self.snapshot(entry)

        stream = EventStream(wants=wants, snapshot=snapshot, ends=ends, closed=self._streams.discard)
        self._streams.add(stream)
        return stream

    def waiting(self, entry: Entry) -> Waiting | None:
        """Why nothing moves."""
        job = entry.job
        if job.state is JobState.TRANSIENT_ERROR:
            if (reason := _awaited(job)) is not None:
                return Waiting(reason)
            return Waiting(WaitingReason.RETRY, job.retry_at, f"{job.retry_number}: {_short(job.error)}")
        if job.state is JobState.SUSPENDED:
            return Waiting(WaitingReason.SUSPENDED)
        if job.state is not JobState.QUEUED:
            return self.notifier.waiting(entry)
        if not self._run:
            return Waiting(WaitingReason.MANAGER_CLOSED)
        if entry.owner is None:
            return Waiting(WaitingReason.NO_OWNER_TOKEN, detail=str(entry.paused_by.message) if entry.paused_by else "")
        if not job.may_run:
            return Waiting(WaitingReason.NOT_FOREGROUND)
        return Waiting(WaitingReason.QUEUE)

    async def until(self, done: Callable[[], bool]) -> None:
        """Wait until `done()`; it is asked again after every change of any job.

        Raises:
            StoreError: the engine failed. ManagerClosed: it was closed.
        """
        while not done():
            self.check()
            future = asyncio.get_running_loop().create_future()
            self._changed.add(future)
            try:
                await future
            finally:
                self._changed.discard(future)

    def _tell_waiters(self) -> None:
        for future in self._changed:
            if not future.done():
                future.set_result(None)

    # -- commands ---------------------------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def command(self, entry: Entry) -> Any:
        """Hold the job: one command at a time, and the scheduler leaves it alone."""
        self.check()
        async with entry.lock:
            entry.held += 1
            self._commands.add(ended := asyncio.get_running_loop().create_future())
            try:
                self.check()
                if entry.job.state.is_final:
                    raise InvalidState(f"the job is {entry.job.state.name} and has left the queue", job_id=entry.job.id)
                yield
            finally:
                entry.held -= 1
                self._commands.discard(ended)
                ended.cancel()  # done, for those who wait for it
                self._wake.set()

    async def halt(self, entry: Entry) -> None:
        """Stop the running attempt at a durable point; the job is then QUEUED, or where the attempt's end brought it."""
        if entry.supervisor is not None:
            entry.stop()
            await asyncio.wait({entry.supervisor})

    async def add(self, job: JobRecord, owner: Token, files: Sequence[FileRecord] = (), grants: Sequence[GrantRecord] = ()) -> Entry:
        """Put a new job into the journal."""
        files = [_drafted(file) for file in files]
        entry = Entry(job, files, list(grants), owner=owner)
        await self.save(job, *files, *grants, then=partial(self._enter, entry))
        return entry

    def _enter(self, entry: Entry) -> None:
        self.entries[entry.job.id] = entry
        self.announce(entry)

    async def add_files(self, entry: Entry, files: Sequence[FileRecord]) -> None:
        """Append files in one transaction."""
        await self.change(entry, files=[_drafted(file) for file in files])

    async def rename(self, entry: Entry, urls: Mapping[int, str]) -> None:
        """Other URLs for files, by index; an attempt that uses the old ones ends. What was fetched is kept."""
        await self.halt(entry)
        await self.change(entry, files=[_renamed(entry.files[index], url) for index, url in urls.items()])

    async def ask_for(self, entry: Entry, index: int, **fields: Any) -> None:
        """On demand: other wishes for a file. A running attempt ends, and the next one follows them."""
        await self.halt(entry)
        await self.change(entry, files=[replace(entry.files[index], **fields)])

    async def refuse_content(self, entry: Entry, index: int) -> None:
        """The application found a finished file to be wrong: its bytes are dropped, and the job fails (BG_E_VALIDATION_FAILED)."""
        await self.halt(entry)
        await finish(self._refuse_content(entry, index))

    async def _refuse_content(self, entry: Entry, index: int) -> None:
        job, file = entry.job, entry.files[index]
        left = await self._discard_parts(entry, [file])
        dropped = replace(
            file, part=file.part if left else None, slices=(), validator=None, boot_id=None, transferred=False, validated=False
        )
        message, where = "the application refused the content of the file", {"url": file.url, "path": file.path, "job_id": job.id}
        error = make_error(ErrorCode.BG_E_VALIDATION_FAILED, ErrorContext.REMOTE_FILE, message, **where)
        state = job.state if job.state is JobState.ERROR else advance(job.state, Outcome.FAILED)
        entry.retry_due = entry.failing_since = None
        entry.positions[index] = 0
        entry.farthest.pop(index, None)
        fields: dict[str, Any] = {"error": error, "error_file": index, "error_count": job.error_count + 1, "retry_at": None}
        await self.change(entry, files=[dropped], state=state, **fields)

    async def resume(self, entry: Entry, bind: Callable[[Entry], Sequence[GrantRecord]]) -> None:
        """Back into the queue. `bind` gives the grants their origins at the first resume (T19)."""
        async with self.command(entry):
            if not entry.files:
                raise make_error(ErrorCode.BG_E_EMPTY, ErrorContext.NONE, "a job without files cannot be resumed", job_id=entry.job.id)
            event = Command.RESUME_UNFINISHED if entry.unfinished else Command.RESUME
            state = advance(entry.job.state, event)
            if entry.job.state in (JobState.SUSPENDED, JobState.ERROR, JobState.TRANSIENT_ERROR) or state is not entry.job.state:
                await self._queue_again(entry, state, bind)

    async def _queue_again(self, entry: Entry, state: JobState, bind: Callable[[Entry], Sequence[GrantRecord]]) -> None:
        http = entry.job.http
        if not entry.job.resumed:
            http = http.bound(Origin.of(file.original_url) for file in entry.files)
            bound = bind(entry)
            await self.save(*bound, then=partial(entry.grants.__setitem__, slice(None), bound))
        entry.retry_due = entry.failing_since = None
        files = [replace(file, restarts=0, refetches=0, wrong_digest=None) for file in entry.files if file.restarts or file.refetches]
        fresh: dict[str, Any] = {"active": 0.0, "error": None, "error_file": None, "retry_number": 0, "retry_at": None, "stalled": 0.0}
        await self.change(entry, files=files, state=state, resumed=True, http=http, **fresh)

    async def suspend(self, entry: Entry) -> None:
        """No byte is written after it returns."""
        async with self.command(entry):
            self._next(entry, Command.SUSPEND)
            await self.halt(entry)
            state = self._next(entry, Command.SUSPEND)
            if entry.job.state is state:
                return
            entry.retry_due = entry.failing_since = None
            await self.change(entry, state=state, retry_at=None)

    def _next(self, entry: Entry, event: Command) -> JobState:
        try:
            return advance(entry.job.state, event)
        except InvalidState as error:
            raise error.located(job_id=entry.job.id) from None

    async def cancel(self, entry: Entry) -> Cancellation:
        """The job leaves the queue; its part files are gone. Cancelled itself, it is finished first."""
        async with self.command(entry):
            await self.halt(entry)
            return await finish(self._cancel(entry, advance(entry.job.state, Command.CANCEL)))

    async def _cancel(self, entry: Entry, state: JobState) -> Cancellation:
        left = await self._discard_parts(entry, [file for file in entry.files if not file.committed])
        await self._leave(entry, state)
        return Cancellation(tuple(left))

    async def complete(self, entry: Entry, *, partial: bool) -> Completion:
        """Rename finished part files to their destinations; the job leaves the queue.

        Raises:
            InvalidState: not `partial`, and not TRANSFERRED or with a file that was added since.
            LocalFileError: a file could not be renamed; the job keeps its state, renamed files are available, and it can be called again.
            TokenRequired: the token that must do it is gone.
        """
        async with self.command(entry):
            if not partial and entry.job.state is not JobState.TRANSFERRED:
                raise InvalidState(f"a job in state {entry.job.state.name} is not transferred", job_id=entry.job.id)
            if not partial and entry.unfinished:
                message = "a file was added, or lost its part file, and is to be fetched: resume() first, or complete without it (partial)"
                raise InvalidState(message, job_id=entry.job.id)
            await self.halt(entry)
            state = advance(entry.job.state, Command.COMPLETE)
            for file in [file for file in entry.files if file.transferred and not file.committed]:
                await self._commit(entry, file)
            dropped = [file for file in entry.files if not file.transferred]
            left = await self._discard_parts(entry, dropped)
            await self._leave(entry, state)
            return Completion([file.path for file in entry.files if file.committed], left, partial=bool(dropped))

    async def _commit(self, entry: Entry, file: FileRecord) -> None:
        token = entry.pair.acting_for(HelperTokenFlags.LOCAL_FILE)
        assert file.part is not None
        with self.executors.lease(token, "files") as files:
            part = await PartFile.reopen(files, file.path, file.part)
            if part is None:
                if await committed_length(files, file.path, file.part) != file.size:
                    # the record stays: if the file is another identity's, the next attempt still has to remove it
                    await self.change(entry, files=[_uncounted(file)])
                    message = "the part file was changed or removed, or another identity made it; resume fetches the file anew"
                    code = ErrorCode.BG_E_LOCAL_FILE_CHANGED
                    raise make_error(code, ErrorContext.LOCAL_FILE, message, path=file.path, identity=token.name, job_id=entry.job.id)
            else:
                try:
                    modified = file.validator.modified if file.validator else None
                    await part.commit(mtime=modified.timestamp() if modified else None)
                finally:
                    await part.close()
        await self.change(entry, files=[replace(file, committed=True, validated=True)])

    async def _discard_parts(self, entry: Entry, files: Sequence[FileRecord]) -> list[Path]:
        """Delete part files as the token that made them; without it they stay, and are named (BG_S_UNABLE_TO_DELETE_FILES)."""
        await self._uncount(entry, [file for file in files if file.transferred and file.part])
        left_behind: list[Path] = []
        for file in files:
            if entry.restored and entry.job.resumed:
                await self._discard_draft(entry, file)
            if file.part is None:
                continue
            left = file.part.path
            try:
                with self.executors.lease(self._maker(entry, file.part), "files") as executor:
                    gone = await discard_part(executor, file.path, file.part)
            except BitsError as error:
                log.warning("job %s: BG_S_UNABLE_TO_DELETE_FILES %s: %s", entry.job.id, left, error)
                left_behind.append(left)
            else:
                if not gone:
                    log.warning("job %s: %s is not the job's part file any more and was left alone", entry.job.id, left)
        return left_behind

    async def _uncount(self, entry: Entry, files: Sequence[FileRecord]) -> None:
        """Before finished bytes are deleted the journal stops counting on them: of a process that dies in between it keeps a job that can
        be resumed or cancelled again, not a TRANSFERRED one without files. In memory the command that does it says what becomes of it."""
        if not files:
            return
        async with entry.changing:
            state = JobState.SUSPENDED if entry.job.state is JobState.TRANSFERRED else entry.job.state
            await self.save(replace(entry.job, state=state), *(_uncounted(file) for file in files))

    def _maker(self, entry: Entry, part: PartRecord) -> Token:
        """The token that made the part file (T17); if the job has it no more, the one that acts on local files, to say so."""
        tokens = (entry.owner, entry.helper)
        made = next((token for token in tokens if token is not None and part.was_made_by(token)), None)
        return made or entry.pair.acting_for(HelperTokenFlags.LOCAL_FILE)

    async def _discard_draft(self, entry: Entry, file: FileRecord) -> None:
        if not file.draft:
            return
        try:
            token = entry.pair.acting_for(HelperTokenFlags.LOCAL_FILE)
            with self.executors.lease(token, "files") as executor:
                await discard_draft(executor, file.path, entry.job.id, file.draft)
        except BitsError as error:
            log.info("job %s: no look for what a process that died may have left beside %s: %s", entry.job.id, file.path, error)

    async def take_over(self, entry: Entry, key: OwnerKey, owner: Token) -> Entry:
        """Another owner; what the old one entrusted to the job is dropped (BITS: TakeOwnership).

        A handle is a right to use the job, and the old owner still holds his: the job goes on as another entry, which his handles do not
        lead to. Else he would add files that the new owner writes.
        """
        await self.drop_lanes(entry, entry.owner, entry.helper)
        return await finish(self._take_over(entry, key, owner))

    async def _take_over(self, entry: Entry, key: OwnerKey, owner: Token) -> Entry:
        await self._discard_parts(entry, [file for file in entry.files if not file.committed])
        async with entry.changing:
            # the new owner looks at what the old one chose (destinations, proxy), and then resumes it or not
            http = replace(entry.job.http, headers=(), header_origins=None, flags=SecurityFlags(0), crl_source=None)
            fields: dict[str, Any] = {"error": None, "retry_at": None, "notify_cmd_line": None, "notify_setter": None, "owed": NOTHING}
            job = replace(entry.job, owner=key, state=JobState.SUSPENDED, http=http, modified=self.clock.now(), **fields)
            files = [
                file if file.committed else replace(file, part=None, slices=(), validator=None, transferred=False) for file in entry.files
            ]
            taken = Entry(job, files, [], owner=owner)
            removed = [GrantRemoved(job.id, grant.target, grant.scheme) for grant in entry.grants]
            await self.save(job, *files, *removed, then=partial(self._taken_over, entry, taken))
        return taken

    def _taken_over(self, entry: Entry, taken: Entry) -> None:
        entry.job = replace(entry.job, state=JobState.CANCELLED, error=None)  # for those who hold the old entry it has left the queue
        entry.grants.clear()
        entry.owner = entry.helper = entry.judge = entry.retry_due = None
        self.announce(entry)
        self.entries[taken.job.id] = taken
        self.announce(taken)
        self._wake.set()

    async def _leave(self, entry: Entry, state: JobState) -> None:
        await self.save(JobRemoved(entry.job.id), then=partial(self._left, entry, state))

    def _left(self, entry: Entry, state: JobState) -> None:
        entry.job = replace(entry.job, state=state, modified=self.clock.now(), error=None)
        entry.grants.clear()
        self.announce(entry)
        self.entries.pop(entry.job.id, None)
        entry.owner = entry.helper = None
        self._wake.set()

    # -- the loop ---------------------------------------------------------------------------------------------------------------------

    async def _loop(self) -> None:
        """Start, end and retry attempts until cancelled. Woken by every change, else by the next deadline."""
        try:
            while self.failure is None:
                self._wake.clear()
                began = self.clock.monotonic()
                await self._retry_due()
                await self._expire()
                await self._let_go()
                await self._hold_up()
                self._search_owners()
                self._schedule()
                await self._sleep_until_woken(self._next_deadline(began))
        except BitsError as error:
            self.fail(error)

    async def _sleep_until_woken(self, delay: float | None) -> None:
        if delay is None:
            await self._wake.wait()
            return
        loop = asyncio.get_running_loop()
        tasks = {loop.create_task(self._wake.wait()), loop.create_task(self._timer(delay))}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _timer(self, delay: float) -> None:
        await self.clock.sleep(delay)

    async def _retry_due(self) -> None:
        now = self.clock.monotonic()
        for entry in list(self.entries.values()):
            due = entry.retry_due is not None and entry.retry_due <= now
            if due and not entry.held and entry.job.state is JobState.TRANSIENT_ERROR:
                entry.retry_due = None
                await self.change(entry, state=advance(entry.job.state, Outcome.RETRY_DUE), retry_at=None)

    def _network_back(self) -> None:
        """A network came (back): whatever a job waits for, it may be better now (BITS: "Life Cycle of a BITS Job")."""
        now = self.clock.monotonic()
        for entry in self.entries.values():
            if entry.job.state is JobState.TRANSIENT_ERROR and _awaited(entry.job) is None:
                entry.retry_due = now

    async def _let_go(self) -> None:
        """Queue the jobs again whose hindrance has ended."""
        for entry in list(self.entries.values()):
            if entry.job.state is JobState.TRANSIENT_ERROR and _awaited(entry.job) is not None and not entry.held:
                url = entry.next_url
                if url is None or self._conditions.in_reach(entry.job.proxy, url):
                    await self.change(entry, state=advance(entry.job.state, Outcome.NETWORK_BACK))

    async def _hold_up(self) -> None:
        """Interrupt the jobs that cannot run now, those that only wait for their turn too (BITS: TRANSIENT_ERROR)."""
        for entry in list(self.entries.values()):
            idle = entry.job.state is JobState.QUEUED and not entry.held and entry.supervisor is None
            if not idle and (entry.work is None or entry.stopping):
                continue
            hindrance = self._conditions.hindrance(entry.job, entry.next_url)
            if hindrance is None:
                continue
            if idle:
                await self._put_off(entry, hindrance.error, entry.job.active, untimed=True)
            else:
                entry.hindrance = hindrance
                entry.stop()

    async def _expire(self) -> None:
        """End attempts that have had their time (MaximumDownloadTime), and cancel jobs that nobody has touched for too long."""
        now, limit = self.clock.monotonic(), self._limits.job_inactivity_timeout
        for entry in list(self.entries.values()):
            if entry.work is not None and now >= self._download_deadline(entry):
                entry.overdue = True
                entry.stop()
            elif (deadline := self._progress_deadline(entry)) is not None and now >= deadline and not entry.held:
                assert entry.job.error is not None
                await self._give_up(entry, _no_progress(entry.job.error, entry.job.no_progress_timeout), entry.job.active)
            elif limit is None or entry.held or entry.job.state.is_active or entry.job.state.is_final:  # final since the last await
                continue
            elif self._idle(entry) >= limit:
                log.warning("job %s: cancelled after %g s without activity", entry.job.id, limit)
                await self.cancel(entry)

    def _download_deadline(self, entry: Entry) -> float:
        return entry.started + max(0.0, entry.job.maximum_download_time - entry.job.active)

    def _progress_deadline(self, entry: Entry) -> float | None:
        """When a job that waits for an event has waited too long; None: it does not, or may for ever."""
        job, since = entry.job, entry.failing_since
        if job.state is not JobState.TRANSIENT_ERROR or _awaited(job) is None or since is None or not job.no_progress_timeout:
            return None  # without a timeout the next error is fatal; this one was not
        return since + job.no_progress_timeout

    def _idle(self, entry: Entry) -> float:
        last = entry.job.modified if entry.touched is None else max(entry.job.modified, entry.touched)
        return (self.clock.now() - last).total_seconds()

    def _next_deadline(self, began: float) -> float | None:
        """Seconds until something is due that was not when this round of the loop began; None: only a change brings something."""
        now = self.clock.monotonic()
        due = [entry.retry_due for entry in self.entries.values() if entry.retry_due is not None]
        due += [self._download_deadline(entry) for entry in self.entries.values() if entry.work is not None]
        due += [moment for entry in self.entries.values() if (moment := self._progress_deadline(entry)) is not None]
        limit = self._limits.job_inactivity_timeout
        if limit is not None:
            due += [now + limit - self._idle(entry) for entry in self.entries.values()]
        if any(entry.job.state is JobState.QUEUED for entry in self.entries.values()):
            due += [entry.started + self._time_slice for entry in self.entries.values() if entry.work is not None]
        return min((max(0.0, moment - now) for moment in due if moment > began), default=None)

    def _search_owners(self) -> None:
        """Ask once per owner for the token of queued jobs that have none."""
        for entry in self.entries.values():
            wanted = entry.job.state is JobState.QUEUED or self.notifier.waits_for_owner(entry)
            if wanted and entry.owner is None and entry.job.owner.sid not in self._searches:
                self._searches[entry.job.owner.sid] = self.task(self._search(entry), "bits-owner")

    async def _search(self, entry: Entry) -> None:
        try:
            token = await self._find_owner(entry)
        except Exception as error:  # whatever the application's logon() raises must not end the queue
            message = f"logon() failed: {type(error).__name__}"
            entry.paused_by = error if isinstance(error, BitsError) else ImpersonationFailed(message)
            log.warning("job %s: no token for its owner %s: %s", entry.job.id, entry.job.owner.name, entry.paused_by)
            self.announce(entry)
            return
        if token is not None:
            self.owner_found(entry, token)
        else:
            self.announce(entry)

    def owner_found(self, entry: Entry, token: Token) -> None:
        """A token that matches the owner key: every job of that very owner has its owner again."""
        for other in self.entries.values():
            if other.owner is None and other.job.owner == entry.job.owner:
                other.owner, other.paused_by = token, None
                self.announce(other)
        self.setter_found(entry.job.owner, token)
        self._wake.set()

    def setter_found(self, key: OwnerKey, token: Token) -> None:
        """A token that matches the key of whoever set commands: those that wait for it are run."""
        for entry in self.entries.values():
            if entry.job.notify_setter == key and commander(entry) is None:
                entry.outbox.commander = key, token
                self.announce(entry)

    def _schedule(self) -> None:
        now = self.clock.monotonic()
        # a job that a command holds, or whose last attempt is being wound up, is not started; while it runs, it has its place
        looked_at = [e for e in self.entries.values() if e.job.state.is_active or not (e.held or e.supervisor)]
        choice = choose([self._candidate(entry, now) for entry in looked_at], self._limits)
        for job_id in choice.yield_:
            self.entries[job_id].stop()
        for job_id in choice.start:
            self._start(self.entries[job_id])

    def _candidate(self, entry: Entry, now: float) -> Candidate:
        job = entry.job
        over = entry.work is not None and now - entry.started >= self._time_slice
        return Candidate(job.id, job.state, job.priority, entry.turn, entry.owner is not None and job.may_run, over)

    def _start(self, entry: Entry) -> None:
        self._turns += 1
        entry.turn = self._turns
        entry.started = self.clock.monotonic()
        entry.stopping = entry.overdue = False
        entry.hindrance = None
        entry.bucket = entry.bucket or self._conditions.bucket(entry.job)
        entry.levels = self._conditions.levels(entry.job, entry.bucket)
        self.move_in_memory(entry, Outcome.PICKED)
        entry.work = self.task(self._work(entry), f"bits-attempt-{entry.job.id}")
        entry.supervisor = self.task(self._supervise(entry, entry.work), f"bits-supervisor-{entry.job.id}")

    async def _work(self, entry: Entry) -> None:
        await Attempt(self._shop, _Report(self, entry), entry.pair, partial(self._party, entry)).run()

    async def _supervise(self, entry: Entry, work: asyncio.Task[None]) -> None:
        """Wait for the attempt and say what becomes of the job; never cancelled itself, so that the outcome survives."""
        await asyncio.wait({work})
        entry.work = None
        try:
            with self.clock.working():
                await self._settle(entry, work)
        except BitsError as error:
            self.fail(error)
        finally:
            entry.supervisor = None
            self._wake.set()

    async def _settle(self, entry: Entry, work: asyncio.Task[None]) -> None:
        active = entry.job.active + self.clock.monotonic() - entry.started
        failure = None if work.cancelled() else work.exception()
        if self.failure is not None:
            return
        if failure is not None:
            await self._failed(entry, self._understand(entry, failure), active)
        elif not entry.unfinished:  # perhaps it was told to stop at that moment
            now = self.clock.now()
            state = advance(entry.job.state, Outcome.ALL_FILES_DONE)
            await self.change(entry, state=state, active=active, completed=now, error=None, retry_number=0, stalled=0.0)
        elif work.cancelled() and entry.overdue:
            message = f"the job has been transferring for {entry.job.maximum_download_time:g} s"
            error = make_error(ErrorCode.BG_E_MAXDOWNLOAD_TIMEOUT, ErrorContext.GENERAL_QUEUE_MANAGER, message, job_id=entry.job.id)
            await self._failed(entry, error, active)
        elif work.cancelled() and entry.hindrance is not None:
            await self._failed(entry, entry.hindrance.error, active)
        elif entry.satisfied and not work.cancelled():
            state = advance(entry.job.state, Outcome.RANGES_DONE)
            await self.change(entry, state=state, active=active, error=None, retry_number=0, stalled=0.0)
        else:  # it was stopped, or a file was added at the last moment
            await self.change(entry, state=advance(entry.job.state, Outcome.YIELDED), active=active)

    def _understand(self, entry: Entry, failure: BaseException) -> BitsError:
        if isinstance(failure, BitsError):
            return failure.located(job_id=entry.job.id)
        log.error("job %s: a defect in bits_async ended the attempt", entry.job.id, exc_info=failure)
        message = f"a defect in bits_async ended the attempt ({type(failure).__name__}); its log has the details"
        return make_error(ErrorCode.E_FAIL, ErrorContext.UNKNOWN, message, job_id=entry.job.id)

    async def _failed(self, entry: Entry, error: BitsError, active: float) -> None:
        job = entry.job
        if error.transient and not job.http.plain:
            error.transient = False  # only the application knows whether such a request may be made twice
            error.advice = f"resume the job if its {job.http.method} may be made again"
        if error.transient and entry.hindrance is None and isinstance(error, NetworkError):
            error = await self._lost(entry, error)
        await self._put_off(entry, error, active, untimed=entry.hindrance is not None)

    async def _lost(self, entry: Entry, error: BitsError) -> BitsError:
        """BG_E_NETWORK_DISCONNECTED in the place of an error that shows only that the host is out of reach."""
        url = error.url or entry.next_url
        if url is None or await self._conditions.reaches(entry.job.proxy, url):
            return error
        lost = network_lost(url).located(job_id=entry.job.id, identity=error.identity)
        lost.__cause__ = error
        entry.hindrance = Hindrance(WaitingReason.NETWORK, lost)
        return lost

    async def _put_off(self, entry: Entry, error: BitsError, active: float, *, untimed: bool) -> None:
        """An error: the next attempt is after a while, or, `untimed`, when what hinders the job has ended; or there is none."""
        job, now = entry.job, self.clock.monotonic()
        if error.transient and entry.failing_since is None:
            entry.failing_since = now
        stalled = 0.0 if entry.failing_since is None else now - entry.failing_since
        delay = 0.0 if untimed else retry_delay(job.minimum_retry_delay, error)
        if not may_retry(error, stalled=stalled, delay=delay, no_progress_timeout=job.no_progress_timeout):
            if error.transient and job.no_progress_timeout > 0:
                error = _no_progress(error, job.no_progress_timeout)
            await self._give_up(entry, error, active)
            return
        entry.retry_due = None if untimed else now + delay
        until = None if untimed else self.clock.now() + timedelta(seconds=delay)
        log.warning("%s; %s", error.located(job_id=job.id), "the job waits" if untimed else f"next attempt in {delay:g} s")
        fields: dict[str, Any] = {"retry_number": 1 if stalled == 0.0 else job.retry_number + 1, "retry_at": until, "stalled": stalled}
        state = advance(job.state, Outcome.FAILED_FOR_NOW)
        await self.change(entry, state=state, error=error, error_count=job.error_count + 1, active=active, **fields)

    async def _give_up(self, entry: Entry, error: BitsError, active: float) -> None:
        job = entry.job
        entry.retry_due = entry.failing_since = None
        fields: dict[str, Any] = {"error_count": job.error_count + 1, "retry_at": None, "stalled": 0.0, "active": active}
        log.info("%s", error.located(job_id=job.id))
        await self.change(entry, state=advance(job.state, Outcome.FAILED), error=error, **fields)

    # -- tokens -----------------------------------------------------------------------------------------------------------------------

    async def drop_lanes(self, entry: Entry, *tokens: Token | None) -> None:
        """A token or credential of the job was replaced or removed: its attempt ends, and its connections are closed at once (T25)."""
        await self.halt(entry)
        for token in tokens:
            if token is not None:
                await self._shop.network.forget(token)

    def jobs(self) -> Iterator[Entry]:
        """Every job in the queue."""
        yield from list(self.entries.values())


def _drafted(file: FileRecord) -> FileRecord:
    """With a name for its part file, which the journal then knows before the file is made."""
    return replace(file, draft=file.draft or new_draft())


def _uncounted(file: FileRecord) -> FileRecord:
    """Nothing of it counts as fetched; its part file is still known, to be removed."""
    return replace(file, transferred=False, validated=False, slices=(), validator=None, boot_id=None)


def _renamed(file: FileRecord, url: str) -> FileRecord:
    """The file under another URL; what pins the version of an unfinished one counts there too, as far as it can."""
    validator = file.validator
    if validator is not None and not file.transferred and file.url.partition("?")[0] != url.partition("?")[0]:
        validator = validator.at_another_url()
    return replace(file, url=url, original_url=url, validator=validator, restarts=0, refetches=0, wrong_digest=None)


_AWAITED: Final[Mapping[int, WaitingReason]] = {ErrorCode.BG_E_NETWORK_DISCONNECTED: WaitingReason.NETWORK}


def _awaited(job: JobRecord) -> WaitingReason | None:
    """What a job in TRANSIENT_ERROR waits for; None: for its next attempt."""
    return None if job.retry_at is not None or job.error is None else _AWAITED.get(job.error.code)


def _short(error: BitsError | None) -> str:
    if error is None:
        return ""
    return f"HTTP {error.http_status}" if error.http_status is not None else error.message


def _no_progress(error: BitsError, timeout: float) -> BitsError:
    """BG_E_NO_PROGRESS, in the context of the error that kept the job from moving, whose sentence it repeats."""
    fields = error.fields()
    for name in ("code", "context", "message", "transient", "retry_after"):
        del fields[name]
    message = f"no progress, and the next attempt would be after {timeout:g} s; the last error: {code_name(error.code)}: {error.message}"
    made = make_error(ErrorCode.BG_E_NO_PROGRESS, error.context, message, transient=False, **fields)
    made.__cause__ = error
    return made
