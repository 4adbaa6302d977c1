"""The queue at work: the commands on jobs, and the loop that starts and ends their attempts. Which jobs are in memory says the roster.

The engine knows tokens only as values to hand on; who may open a job is decided at the door (`door`). Every change of a job is in
the journal before it is told to anybody. A command on a job first holds it (nothing picks it up), stops its attempt at a durable point,
and then moves it along the table of `model`.

Races this module answers: a command and the end of an attempt (commands wait for the attempt's supervisor, then look at the state again);
two commands on one job (`Entry.lock`); two changes of one job's record, by a command and by the end of an attempt (`Entry.changing`); a
cancelled caller (what is in the journal is in memory too: `save` does both, or has not begun); a command that is under way when the manager
closes (`stop` waits for it).

A journal that cannot be used for now (a full volume) pauses everything: attempts end, commands are refused, and nothing is journalled or
told until a write goes through again. A job whose attempt ended meanwhile is QUEUED, as after a restart, whatever the attempt's outcome
was: the next attempt finds it again.
"""

import asyncio
import contextlib
import contextvars
import logging
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from ..auth.policy import Origin
from ..clock import STEP, Clock, beginning, finish, sooner
from ..errors import (
    BitsError,
    ErrorCode,
    ErrorContext,
    ImpersonationFailed,
    InvalidState,
    ManagerClosed,
    NetworkError,
    StoreError,
    TokenRequired,
    code_name,
    make_error,
    show_text,
    show_url,
)
from ..identity.threads import TokenExecutor, TokenExecutors
from ..identity.tokens import HelperTokenFlags, Token
from ..limits import Bucket
from ..transport.lane import Party
from ..transport.options import SecurityFlags
from ..transport.ranges import durable, without
from . import part_files
from .callbacks import Notifier, RunCommand, commander
from .conditions import Conditions, Hindrance, network_lost
from .faults import JournalFault
from .model import (
    NOTHING,
    Cancellation,
    Change,
    Command,
    Completion,
    FileCommitted,
    FileRecord,
    GrantRecord,
    GrantRemoved,
    JobPriority,
    JobRecord,
    JobRemoved,
    JobState,
    NotifyFlags,
    Outcome,
    OwnerKey,
    Waiting,
    WaitingReason,
    advance,
    owed_in,
    shortest_change,
)
from .notify import Event, EventStream, FileRestarted, FileTransferred, JobChanged, Progress, Retrying
from .roster import AHEAD, Entry, Roster
from .scheduler import Candidate, Limits, choose, may_retry, retry_delay
from .store import Store
from .transfer import Attempt, Workshop

COMMIT_AT_ONCE: Final = 256  # files that are renamed in one hop and journalled in one transaction

log = logging.getLogger("bits_async.jobs")


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
    def known_size(self) -> int:
        return self._entry.known_size

    @property
    def levels(self) -> Sequence[Bucket]:
        return self._entry.levels

    async def keep(self, *files: FileRecord) -> None:
        told = NotifyFlags.FILE_TRANSFERRED in self._entry.job.notify_flags
        come = [file.transferred and not self._entry.files[file.index].transferred for file in files]
        files = tuple(file.evolve(owed=told) if new and file.owed != told else file for file, new in zip(files, come, strict=True))
        await self._engine.keep(self._entry, files, then=partial(self._kept, files))

    def _kept(self, files: Sequence[FileRecord]) -> None:
        before = [self._entry.positions.get(file.index, 0) for file in files]
        for file in files:
            self._show(file)
        if before != [self._entry.positions.get(file.index, 0) for file in files]:
            self._engine.notifier.modified(self._entry)
            self._engine.publish_progress(self._entry)

    def _show(self, file: FileRecord) -> None:
        entry = self._entry
        before = entry.files[file.index]
        entry.put(file)
        if entry.job.on_demand_mode:
            self._engine.notifier.arrived(entry, file.index, without(durable(file.slices), durable(before.slices)))
        if file.transferred and not before.transferred:
            self._transferred(file)

    def answered(self) -> None:
        if self._entry.job.state is JobState.CONNECTING:
            self._engine.move_in_memory(self._entry, Outcome.ANSWERED)

    def moved(self, index: int, position: int) -> None:
        self._reached(index, position)
        self._engine.notifier.modified(self._entry)
        self._engine.publish_progress(self._entry)

    def _reached(self, index: int, position: int) -> None:
        entry = self._entry
        if position > entry.farthest.get(index, 0):
            entry.failing_since = None
            entry.farthest[index] = position
        entry.reach(index, position)

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
        self._reached(file.index, file.size or 0)
        if self._engine.listened:
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
        adopt: the token of an owner for whom the process may stand in after a restart; with the logon sessions that he made jobs in.
        hold: jobs that are found wait for a resume.
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
        adopt: Callable[[OwnerKey, Collection[str]], Awaitable[Token | None]],
        hold: bool = False,
    ) -> None:
        self.roster = Roster(store, adopt=adopt, restored=self._restored, hold=hold, places=limits.background_jobs)
        self.clock: Clock = shop.clock
        self.failure: BitsError | None = None
        self.closed = False
        self._fault = JournalFault()
        self._store = store
        self._shop = shop
        self._limits = limits
        self._conditions = conditions
        self._run = run
        self._party = party
        self._find_owner = find_owner
        self._hold = hold
        self._stopped = False
        self._commands: set[asyncio.Future[None]] = set()  # under way
        self._streams: set[EventStream] = set()
        self._changed: set[asyncio.Future[None]] = set()
        self._wake = asyncio.Event()
        self._turns = 0
        self._looked = self.clock.monotonic(), self.clock.now()  # when this round of the loop began
        self._offset = beginning(self.clock)
        self._moment: datetime | None = None  # the next one at which the journal has something due
        self._moments_stale = True
        self._idle_moments: dict[bool, datetime] = {}  # the next ones at which nobody has touched a job (of elevated owners) for too long
        self._network_returned = False
        self._put_aside: list[Entry] = []  # wait for an event since this round of the loop; it may have happened before
        self._looked_through: int | None = 0  # of the jobs that wait for an event: so far; None: all
        self._owing_from: int | None = 0  # of the jobs with a command that is to be run: looked through so far; None: all
        self._blocked: Counter[JobPriority] = Counter()  # queued jobs that group policy has put off since it last said something else
        self._setters: dict[OwnerKey, Token] = {}  # who came and had set commands
        self._loop_tasks: set[asyncio.Task[None]] = set()
        self._searches: dict[str, asyncio.Task[None]] = {}
        self.notifier = Notifier(clock=self.clock, task=self.task, told=self._told, changed=self.announce, run_command=run_command)

    @property
    def executors(self) -> TokenExecutors:
        """The threads that act as the tokens."""
        return self._shop.executors

    # -- life -----------------------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Put the jobs of the journal back in the queue.

        Raises:
            StoreError: the journal cannot be used.
        """
        self.notifier.commands = self._run and not self._hold
        found = await self._store.recover(self.clock.now(), TokenRequired("the helper token did not survive the restart"))
        self._turns = found.turn
        self._moment, self._moments_stale = found.moment, False
        self._looked_through, self._owing_from = (0 if some else None for some in (found.awaiting, found.owing))
        self.roster.open(found.queued)
        if self._run:
            await self._conditions.open(self._conditions_changed, self._network_back)
            self._loop_tasks = {self.task(self._loop(), "bits-engine"), self.task(self._watch_the_clock(), "bits-clock")}

    async def _restored(self, entry: Entry) -> None:
        """What the journal does not say of a job that was read from it."""
        job, setter = entry.job, entry.job.notify_setter
        if setter is not None and entry.outbox.commander is None:
            token = self._setters.get(setter) or await self.roster.adopted(setter)
            entry.outbox.commander = None if token is None else (setter, token)
        if job.id in self._store.lost_secrets and not job.state.is_settled and not entry.refused:
            await self._refuse(entry)
        elif self._hold and not job.state.is_settled:
            entry.job = replace(job, state=JobState.SUSPENDED, retry_at=None)
        elif job.state is JobState.TRANSIENT_ERROR and entry.failing_since is None:
            entry.failing_since = self.clock.monotonic() - job.stalled
        self.notifier.look(entry)

    async def _refuse(self, entry: Entry) -> None:
        """A secret of the job is lost: it says so once, and then it is for whoever resumes it."""
        job, code = entry.job, ErrorCode.BG_E_INVALID_CREDENTIALS
        message = "the journal's key file was lost or replaced, and a secret of this job cannot be read"
        error = make_error(code, ErrorContext.GENERAL_QUEUE_MANAGER, message, job_id=job.id)
        fields: dict[str, Any] = {"error": error, "error_count": job.error_count + 1, "retry_at": None}
        await self.change(entry, state=JobState.ERROR, **fields)
        entry.refused = True
        self.roster.keep(entry)

    async def stop(self, grace: float) -> None:
        """Stop every attempt at a durable point and let commands end; what does not within `grace` seconds is left behind.

        The journal is closed by its owner, the manager, afterwards.
        """
        self.closed = True
        for task in self._loop_tasks:
            task.cancel()
        if self._loop_tasks:
            await asyncio.wait(self._loop_tasks)
        for task in self._searches.values():
            task.cancel()
        telling = self.task(self.notifier.stop(grace), "bits-notifier-end")
        supervisors = {entry.supervisor for entry in self.roster.running if entry.supervisor is not None}
        for entry in self.roster.running:
            entry.stop()
        waiting = supervisors | set(self._searches.values()) | self._commands
        if waiting:
            _, late = await asyncio.wait(waiting, timeout=grace)
            for each in late:
                log.warning("an attempt or a command did not end within %.1f s", grace)
                each.cancel()
        await self._conditions.aclose()
        await asyncio.wait({telling})
        if self.journal_fault is not None and not await self._is_usable():
            self.failure = self.failure or self.journal_fault
        self._stopped = True
        self._end_streams()
        self._tell_waiters()

    def _end_streams(self) -> None:
        for stream in list(self._streams):
            stream.finish(None if self.failure is None else self.failure.located())

    def fail(self, error: BitsError) -> None:
        """The journal broke: nothing more is transferred, and everybody who waits hears of it."""
        if self.failure is None:
            self.failure = error
            log.error("the engine has stopped: %s", error)
            self.notifier.halt()
            for entry in self.roster.running:
                entry.stop()
            self._end_streams()
        self._wake.set()
        self._tell_waiters()

    # -- a journal that cannot be used for now ----------------------------------------------------------------------------------------

    @property
    def journal_fault(self) -> StoreError | None:
        """Why the journal cannot be used for now, and with it nothing be changed or transferred; None: it can."""
        return self._fault.error

    def _broke(self, error: BitsError) -> None:
        """The journal could not be used: for now, or for good."""
        if not isinstance(error, StoreError) or not error.transient:
            self.fail(error)
        elif self.failure is None and self.journal_fault is None:
            self._pause(error)

    def _pause(self, error: StoreError) -> None:
        self._fault.begin(error, self.clock.monotonic())
        if self._is_too_long():
            self.fail(error)
            return
        log.error("%s; all transfers are paused, and go on as soon as the journal can be used again", error)
        self.notifier.halt()
        for entry in self.roster.running:
            entry.stop()
        self._show_all()

    def _show_all(self) -> None:
        for entry in self.roster:
            self.announce(entry)
        self._wake.set()
        self._tell_waiters()

    def _is_too_long(self) -> bool:
        """A manager of one call waits for its journal as long as the call says that errors are tried again."""
        patience = max((entry.job.no_progress_timeout for entry in self.roster), default=0.0)
        return self._hold and self.clock.monotonic() - self._fault.since >= patience

    async def _outlast(self) -> None:
        """Try the journal again and again, with pauses that grow, until it can be used. Then everything goes on."""
        while self.failure is None and self.journal_fault is not None:
            await self._timer(self._fault.next_try)
            if await self._is_usable():
                self._go_on()

    async def _is_usable(self) -> bool:
        try:
            await self._store.probe()
        except BitsError as error:
            if not isinstance(error, StoreError) or not error.transient:
                self.fail(error)
            elif self._fault.again(error, self.clock.monotonic()):
                log.error("%s; all transfers have been paused for %.0f s", error, self.clock.monotonic() - self._fault.since)
            if self._is_too_long():
                self.fail(error)
            return False
        return True

    def _go_on(self) -> None:
        """What was read of the journal before the fault may not have been followed to its end: it is read anew."""
        now = self.clock.monotonic()
        log.warning("the journal %s can be used again after %.0f s; transfers go on", self._store.path, now - self._fault.since)
        self._fault.end(now)
        self.roster.look_anew()
        self._moment, self._moments_stale = None, True
        self._looked_through = self._owing_from = 0
        self._idle_moments.clear()
        self._blocked.clear()
        self.notifier.go_on()
        self._show_all()

    def _fail_by_defect(self, error: Exception) -> None:
        """A task that jobs depend on died: those who wait hear of it, instead of waiting for ever."""
        log.error("a defect in bits_async ended the queue", exc_info=error)
        message = f"a defect in bits_async ended the queue ({type(error).__name__}); its log has the details"
        self.fail(make_error(ErrorCode.E_FAIL, ErrorContext.GENERAL_QUEUE_MANAGER, message))

    def check(self) -> None:
        """Raise what every call must hear first: the engine failed, or is closed. (It is not for now that the journal cannot be used:
        it may be read all the same, and who waits goes on waiting.)"""
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
            StoreError: neither; the engine has stopped, or is paused. ManagerClosed: neither; it came too late.
        """
        self.check_journal()
        await finish(self._save(changes, then))

    async def _save(self, changes: Sequence[Change], then: Callable[[], object]) -> None:
        try:
            if changes:
                await self._store.save(*changes)
        except BitsError as error:
            if self._stopped:
                raise ManagerClosed from None
            self._broke(error)
            raise
        then()

    def check_journal(self) -> None:
        """Raise why nothing can be changed, for good or for now."""
        trouble = self.failure or self.journal_fault
        if trouble is not None:
            raise trouble.located()

    async def keep(self, entry: Entry, files: Sequence[FileRecord], then: Callable[[], object]) -> None:
        """Journal files of a running attempt, as `save`. With the last one goes the end of the job, which is told when the attempt is over:
        one transaction, and nobody finds a job in the queue that has nothing to do."""
        changes = [shortest_change(entry.files[file.index], file) for file in files]
        if entry.ends_with(files):
            await finish(self._keep_last(entry, changes, then))
        else:
            await self.save(*changes, then=then)

    async def _keep_last(self, entry: Entry, changes: Sequence[Change], then: Callable[[], object]) -> None:
        async with entry.changing:
            job, fields = entry.job, self._all_done(entry)
            await self.save(replace(job, **fields), *changes, then=then)
            entry.end = job, fields

    async def change(
        self,
        entry: Entry,
        *,
        files: Sequence[FileRecord] = (),
        committed: Sequence[int] = (),
        grants: Sequence[GrantRecord] | None = None,
        **fields: Any,
    ) -> None:
        """Journal new values of a job, of files of it, and of all its grants, then show them. `committed`: files, by index, that have their
        names now."""
        async with entry.changing:
            if entry.job.state.is_final:
                return  # it left the queue while this waited, or is another owner's: the journal must not get it back
            fields["modified"] = self.clock.now()
            if "state" in fields:
                fields["owed"] = owed_in(fields["state"], entry.job.notify_flags)
            if "no_progress_timeout" in fields and _awaited(entry.job) is not None:
                fields["gives_up_at"] = self._patience(entry, fields["no_progress_timeout"])
            named = [FileCommitted(entry.job.id, index) for index in committed]
            then = partial(self._show, entry, files, committed, fields, grants)
            await self.save(replace(entry.job, **fields), *files, *named, *(grants or ()), then=then)

    def _show(
        self,
        entry: Entry,
        files: Sequence[FileRecord],
        committed: Sequence[int],
        fields: dict[str, Any],
        grants: Sequence[GrantRecord] | None = None,
    ) -> None:
        before = entry.job
        if grants is not None:
            entry.grants[:] = grants
        entry.job = replace(entry.job, **fields)  # a server may have answered in the meantime
        self.roster.changed(before, entry.job)
        if JobState.TRANSIENT_ERROR in (before.state, entry.job.state):
            self._moments_stale = True
        for file in files:
            entry.put(file)
        for index in committed:
            entry.put(entry.files[index].evolve(committed=True, validated=True))
        if entry.bucket is not None:
            if "maximum_bandwidth" in fields:
                entry.bucket.set_rate(entry.job.maximum_bandwidth)
            entry.levels = self._conditions.levels(entry.job, entry.bucket)
        if "state" in fields:
            entry.outbox.turns[None] += 1
        if entry.job.state is not before.state or "retry_at" in fields:
            self.announce(entry)
        if entry.job.state not in (JobState.TRANSFERRED, JobState.ERROR) or entry.job.state is before.state:
            self.notifier.modified(entry)
        self.notifier.look(entry)  # the flags may be others
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
                    entry.put(replace(entry.files[index], owed=False))

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
        if not self.listened:
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

    @property
    def listened(self) -> bool:
        """Somebody reads events."""
        return bool(self._streams)

    def publish(self, event: Event) -> None:
        """Hand an event to every stream."""
        for stream in list(self._streams):
            stream.publish(event)

    def stream(self, wants: Callable[[UUID], bool], ends: Callable[[JobState], bool]) -> EventStream:
        """A new reader."""

        async def snapshot(job_id: UUID) -> JobChanged | None:
            try:
                entry = await self.roster.find(job_id)
            except BitsError:  # the journal is closed, or broken: the stream says so at its end
                entry = self.roster.live(job_id)
            return None if entry is None else self.snapshot(entry)

        stream = EventStream(wants=wants, snapshot=snapshot, ends=ends, closed=self._streams.discard)
        self._streams.add(stream)
        return stream

    def waiting(self, entry: Entry) -> Waiting | None:
        """Why nothing moves."""
        job = entry.job
        fault = self.journal_fault
        if fault is not None and not job.state.is_settled and job.state is not JobState.SUSPENDED:
            seconds = self._fault.next_try - self.clock.monotonic()
            return Waiting(WaitingReason.JOURNAL, self.clock.now() + timedelta(seconds=seconds), f"{fault.message}; file {fault.path}")
        if job.state is JobState.TRANSIENT_ERROR:
            if (reason := _awaited(job)) is not None:
                return self._waiting_for(reason, job)
            return Waiting(WaitingReason.RETRY, job.retry_at, f"{job.retry_number}: {_short(job.error)}")
        if job.state is JobState.SUSPENDED:
            return Waiting(WaitingReason.SUSPENDED)
        if job.state is not JobState.QUEUED:
            return self.notifier.waiting(entry)
        if not self._run:
            return Waiting(WaitingReason.MANAGER_CLOSED)
        if entry.owner is None:
            absence = self.roster.absence(job.owner)
            return Waiting(WaitingReason.NO_OWNER_TOKEN, detail=absence.message if absence else "")
        if not job.may_run:
            return Waiting(WaitingReason.NOT_FOREGROUND)
        if self._conditions.allowance(job.priority).blocked:
            return self._waiting_for(WaitingReason.POLICY, job)
        if not self._conditions.is_settled(job):
            return Waiting(WaitingReason.COST, detail="nobody has said yet what it is")
        return Waiting(WaitingReason.QUEUE)

    def _waiting_for(self, reason: WaitingReason, job: JobRecord) -> Waiting:
        if reason is WaitingReason.POLICY:
            allowed = self._conditions.allowance(job.priority)
            return Waiting(reason, allowed.until if allowed.blocked else None, allowed.rule.value if allowed.rule else "")
        return Waiting(reason)

    async def until(self, done: Callable[[], bool]) -> None:
        """Wait until `done()`; it is asked again after every change of any job.

        Raises:
            StoreError: the engine failed. ManagerClosed: it was closed.
        """
        while not done():
            self.check()
            async with self._next_change() as changed:
                await changed

    async def until_idle(self) -> None:
        """Wait until no job is QUEUED, CONNECTING, TRANSFERRING or TRANSIENT_ERROR.

        Raises:
            StoreError: the engine failed. ManagerClosed: it was closed.
        """
        while True:
            async with self._next_change() as changed, self.reading():
                if not await self._is_busy():
                    return
                await changed

    async def _is_busy(self) -> bool:
        """Of a job whose last file has come the journal knows the end before the job shows it."""
        try:
            return await self._store.is_busy() or any(entry.job.state.is_active for entry in self.roster.running)
        except StoreError as error:
            if not error.transient or self.closed:
                raise
            self._broke(error)
            return True  # as far as anybody knows

    @contextlib.asynccontextmanager
    async def _next_change(self) -> AsyncIterator[asyncio.Future[None]]:
        """Done when any job has changed since it was entered, or the engine ends."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._changed.add(future)
        try:
            yield future
        finally:
            self._changed.discard(future)

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator[None]:
        """Around what reads the journal for somebody: that the engine is closed, or has failed, is what he hears first."""
        self.check()
        try:
            yield
        except BitsError:
            self.check()
            raise

    async def count(self, owner_sid: str | None, most: int) -> int:
        """How many jobs are in the queue (None: of any owner); counts no further than `most`."""
        async with self.reading():
            return await self._store.count(owner_sid=owner_sid, most=most)

    def _tell_waiters(self) -> None:
        for future in self._changed:
            if not future.done():
                future.set_result(None)

    # -- commands ---------------------------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def command(self, entry: Entry, *, even_paused: bool = False) -> Any:
        """Hold the job: one command at a time, and the scheduler leaves it alone.

        Args:
            even_paused: what it does before it changes the job is worth doing, though the journal cannot be used.
        """
        self.check()
        async with entry.lock:
            entry.held += 1
            self._commands.add(ended := asyncio.get_running_loop().create_future())
            try:
                self.check()
                if not even_paused:
                    self.check_journal()
                if entry.job.state.is_final:
                    raise InvalidState(f"the job is {entry.job.state.name} and has left the queue", job_id=entry.job.id)
                yield
            finally:
                entry.held -= 1
                self.roster.keep(entry)
                if entry.job.state is JobState.TRANSIENT_ERROR:  # it was passed over meanwhile
                    self._moments_stale = True
                    self._put_aside.append(entry)
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
        entry = Entry(job, list(files), list(grants), owner=owner)
        await self.save(job, *files, *grants, then=partial(self._enter, entry))
        return entry

    def _enter(self, entry: Entry) -> None:
        for other in self.roster.enter(entry):
            self.announce(other)
            self._wake.set()
        self.announce(entry)

    async def add_files(self, entry: Entry, files: Sequence[FileRecord]) -> None:
        """Append files in one transaction."""
        await self.change(entry, files=files)

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
        async with self._discarded_parts(entry, [entry.files[index]]) as left:
            await self._refused_content(entry, index, left_behind=bool(left))

    async def _refused_content(self, entry: Entry, index: int, *, left_behind: bool) -> None:
        job, file = entry.job, entry.files[index]
        part = file.part if left_behind else None
        dropped = replace(file, part=part, slices=(), validator=None, boot_id=None, transferred=False, validated=False)
        message, where = "the application refused the content of the file", {"url": file.url, "path": file.path, "job_id": job.id}
        error = make_error(ErrorCode.BG_E_VALIDATION_FAILED, ErrorContext.REMOTE_FILE, message, **where)
        state = job.state if job.state is JobState.ERROR else advance(job.state, Outcome.FAILED)
        entry.failing_since = None
        entry.reach(index, 0)
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
        http, bound = entry.job.http, None
        if not entry.job.resumed:
            http, bound = http.bound(Origin.of(file.original_url) for file in entry.files), bind(entry)
        entry.failing_since = None
        files = [replace(file, restarts=0, refetches=0, wrong_digest=None) for file in entry.files if file.restarts or file.refetches]
        fresh: dict[str, Any] = {"active": 0.0, "error": None, "error_file": None, "retry_number": 0, "retry_at": None, "stalled": 0.0}
        await self.change(entry, files=files, grants=bound, state=state, resumed=True, http=http, **fresh)

    async def suspend(self, entry: Entry) -> None:
        """No byte is written after it returns."""
        async with self.command(entry):
            self._next(entry, Command.SUSPEND)
            await self.halt(entry)
            state = self._next(entry, Command.SUSPEND)
            if entry.job.state is state:
                return
            entry.failing_since = None
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
        async with self._discarded_parts(entry, [file for file in entry.files if not file.committed]) as left:
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
                message = f"a job in state {entry.job.state.name} is not transferred"
                advice = "wait until it is, or keep the files that are finished and drop the rest with complete(partial=True)"
                raise InvalidState(message, job_id=entry.job.id, advice=advice)
            if not partial and entry.unfinished:
                message = "a file was added, or lost its part file, and is to be fetched: resume() first, or complete without it (partial)"
                raise InvalidState(message, job_id=entry.job.id)
            await self.halt(entry)
            state = advance(entry.job.state, Command.COMPLETE)
            if any(file.transferred and not file.committed for file in entry.files):  # the attempt may be long ago (T12)
                acting = entry.pair.acting_for(HelperTokenFlags.LOCAL_FILE)
                entry.pair.check_today(acting, await self.executors.refresh(acting))
            while waiting := [file for file in entry.files if file.transferred and not file.committed]:
                done = await part_files.commit_some(self.executors, entry, waiting[:COMMIT_AT_ONCE])
                if not done:
                    await self._commit(entry, waiting[0])
                    done = 1
                await self._committed(entry, waiting[:done])
            dropped = [file for file in entry.files if not file.transferred]
            async with self._discarded_parts(entry, dropped) as left:
                await self._leave(entry, state)
            return Completion([file.path for file in entry.files if file.committed], left, partial=bool(dropped))

    async def _commit(self, entry: Entry, file: FileRecord) -> None:
        who = entry.pair.acting_for(HelperTokenFlags.LOCAL_FILE).name
        lost = await part_files.commit(self.executors, entry, file)
        if not lost:
            return
        # the records stay: if a file is another identity's, the next attempt still has to remove it
        await self.change(entry, files=[_uncounted(each) for each in lost])
        more = f" ({len(lost) - 1} more of the job's files too)" if len(lost) > 1 else ""
        message = f"the part file was changed or removed, or another identity made it{more}; resume fetches what is lost anew"
        code = ErrorCode.BG_E_LOCAL_FILE_CHANGED
        raise make_error(code, ErrorContext.LOCAL_FILE, message, path=file.path, identity=who, job_id=entry.job.id)

    async def _committed(self, entry: Entry, files: Sequence[FileRecord]) -> None:
        """They have their names. Of the last ones the journal hears when the job leaves it, which is next: if the process dies in between,
        `_commit` finds what was renamed."""
        named = [file.index for file in files]
        if sum(file.committed for file in entry.files) + len(named) == len(entry.files):
            self._show(entry, (), named, {"modified": self.clock.now()})
        else:
            await self.change(entry, committed=named)

    @contextlib.asynccontextmanager
    async def _discarded_parts(self, entry: Entry, files: Sequence[FileRecord]) -> AsyncIterator[list[Path]]:
        """Around what the command then makes of the job. Named are those that are left, because the token that made them is gone
        (BG_S_UNABLE_TO_DELETE_FILES)."""
        state, uncounted = await self._uncount(entry, [file for file in files if file.transferred and file.part])
        try:
            yield await part_files.discard(self.executors, entry, files)
        except BitsError:  # the journal could not be written any more: what it has is what there is
            entry.job = replace(entry.job, state=state)
            for file in uncounted:
                entry.put(file)
            raise

    async def _uncount(self, entry: Entry, files: Sequence[FileRecord]) -> tuple[JobState, Sequence[FileRecord]]:
        """Before finished bytes are deleted the journal stops counting on them: of a process that dies in between it keeps a job that can
        be resumed or cancelled again, not a TRANSFERRED one without files. In memory the command that does it says what becomes of it.

        Returns:
            What the journal then has.
        """
        state, uncounted = entry.job.state, [_uncounted(file) for file in files]
        if uncounted:
            async with entry.changing:
                state = JobState.SUSPENDED if entry.job.state is JobState.TRANSFERRED else entry.job.state
                await self.save(replace(entry.job, state=state), *uncounted)
        return state, uncounted

    async def take_over(self, entry: Entry, key: OwnerKey, owner: Token) -> Entry:
        """Another owner; what the old one entrusted to the job is dropped (BITS: TakeOwnership).

        A handle is a right to use the job, and the old owner still holds his: the job goes on as another entry, which his handles do not
        lead to. Else he would add files that the new owner writes.
        """
        await self.drop_lanes(entry, entry.owner, entry.helper)
        return await finish(self._take_over(entry, key, owner))

    async def _take_over(self, entry: Entry, key: OwnerKey, owner: Token) -> Entry:
        async with self._discarded_parts(entry, [file for file in entry.files if not file.committed]), entry.changing:
            # the new owner looks at what the old one chose (destinations, proxy), and then resumes it or not
            http = replace(entry.job.http, headers=(), header_origins=None, flags=SecurityFlags(0), crl_source=None)
            http = replace(http, client_certificate=None, certificate_origins=None)
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
        entry.owner = entry.helper = entry.judge = None
        self.announce(entry)
        self.roster.leave(entry)
        self._enter(taken)
        self._wake.set()

    async def _leave(self, entry: Entry, state: JobState) -> None:
        async with entry.changing:  # a change that comes after the removal would bring the job back
            await self.save(JobRemoved(entry.job.id), then=partial(self._left, entry, state))

    def _left(self, entry: Entry, state: JobState) -> None:
        entry.job = replace(entry.job, state=state, modified=self.clock.now(), error=None)
        entry.grants.clear()
        self.announce(entry)
        self.roster.leave(entry)
        entry.owner = entry.helper = None
        self._wake.set()

    # -- the loop ---------------------------------------------------------------------------------------------------------------------

    async def _loop(self) -> None:
        """Start, end and retry attempts until cancelled. Woken by every change, else by the next deadline."""
        while self.failure is None:
            try:
                await self._outlast()
                await self._round()
            except BitsError as error:
                self._broke(error)
            except Exception as error:
                self._fail_by_defect(error)

    async def _watch_the_clock(self) -> None:
        """The loop sleeps by the monotonic clock: when the wall clock was changed, it looks what that makes due (a schedule, say)."""
        while True:
            await self.clock.changed()
            self._wake.set()

    async def _round(self) -> None:
        self._wake.clear()
        if self.failure is not None:
            return
        self._looked = self.clock.monotonic(), self.clock.now()
        await self._follow_the_clock()
        if self._conditions.refresh():
            self._blocked.clear()
            self._conditions_changed()
        await self._come_due()
        await self._expire()
        await self._let_go()
        await self._run_commands()
        # where group policy lets none run, the first ones say so, and the others need not be touched
        for entry in await self.roster.look_ahead(without={each for each, count in self._blocked.items() if count >= AHEAD}):
            self._search_owner(entry)
        await self._hold_up()
        if self.journal_fault is None:
            self._schedule()
            await self._sleep_until_woken(await self._next_deadline())

    async def _sleep_until_woken(self, deadline: float | None) -> None:
        if deadline is None:
            await self._wake.wait()
            return
        await sooner(self._wake, self._timer(deadline))

    async def _timer(self, deadline: float) -> None:
        await self.clock.sleep(deadline - self.clock.monotonic())  # less than was left when the deadline was found

    async def _follow_the_clock(self) -> None:
        """Jobs wait by the monotonic clock: when the wall clock was changed, the moments in the journal go with it."""
        offset = beginning(self.clock)
        step, before = offset - self._offset, self._offset
        if abs(step) < STEP:
            return
        waiting = {entry: entry.job for entry in self.roster if entry.job.state is JobState.TRANSIENT_ERROR}
        self._offset = offset
        try:
            await self._store.shift_retries(offset - before)
        except BitsError:
            self._offset -= step  # it is still to be done
            raise
        log.info("the wall clock was changed by %g s", step.total_seconds())
        self._moments_stale = True
        same = [entry for entry, job in waiting.items() if (entry.job.retry_at, entry.job.gives_up_at) == (job.retry_at, job.gives_up_at)]
        for entry in same:  # at once: the journal has it
            job = entry.job
            entry.job = replace(job, retry_at=_later(job.retry_at, step), gives_up_at=_later(job.gives_up_at, step))
        for entry in same:  # and again, because a change that was under way may have written the old ones
            if entry.job.state is JobState.TRANSIENT_ERROR:
                await self.change(entry, retry_at=entry.job.retry_at, gives_up_at=entry.job.gives_up_at)

    async def _come_due(self) -> None:
        """Queue jobs again whose retry delay is over, and give up those that waited too long for an event: a page of them each round."""
        _, now = self._looked
        if self._network_returned:
            await self._hasten(now)
            self._network_returned = False
        if not self._moments_stale and (self._moment is None or self._moment > now):
            return
        await _together(self._end_waiting(entry, now) for entry in await self.roster.due(now))

    async def _end_waiting(self, entry: Entry, now: datetime) -> None:
        job = entry.job
        if entry.held or job.state is not JobState.TRANSIENT_ERROR:
            return
        if job.retry_at is not None and job.retry_at <= now:
            await self.change(entry, state=advance(job.state, Outcome.RETRY_DUE), retry_at=None)
        elif job.retry_at is None and job.gives_up_at is not None and job.gives_up_at <= now and job.error is not None:
            await self._give_up(entry, _no_progress(job.error, job.no_progress_timeout), job.active)

    def _network_back(self) -> None:
        """A network came (back): whatever a job waits for, it may be better now (BITS: "Life Cycle of a BITS Job")."""
        self._network_returned = True
        self._wake.set()

    async def _hasten(self, now: datetime) -> None:
        """Every retry is due."""
        waiting = [entry for entry in self.roster if entry.job.state is JobState.TRANSIENT_ERROR and entry.job.retry_at is not None]
        await self.roster.hasten(now)
        self._moments_stale = True
        for entry in waiting:
            if entry.job.state is not JobState.TRANSIENT_ERROR or entry.job.retry_at is None:
                continue
            if entry.held:
                await self.change(entry, retry_at=now)
            else:
                await self.change(entry, state=advance(entry.job.state, Outcome.RETRY_DUE), retry_at=None)

    def _conditions_changed(self) -> None:
        """What jobs wait for may have happened."""
        self._looked_through = 0
        self._wake.set()

    async def _let_go(self) -> None:
        """Queue the jobs again whose hindrance has ended: those of which it was not known when it began, and of all a page each round."""
        aside, self._put_aside = self._put_aside, []
        for entry in aside:
            await self._maybe_let_go(entry)
        if self._looked_through is None:
            return
        page, self._looked_through = await self.roster.awaiting(self._looked_through)
        await _together(self._maybe_let_go(entry) for entry in page)
        if self._looked_through is not None:
            self._wake.set()

    async def _maybe_let_go(self, entry: Entry) -> None:
        job, reason = entry.job, _awaited(entry.job)
        if job.state is not JobState.TRANSIENT_ERROR or reason is None or entry.held:
            return  # of what is held the end of the command reminds us
        if self._conditions.over(reason, job, entry.next_url):
            event = Outcome.NETWORK_BACK if reason is WaitingReason.NETWORK else Outcome.ALLOWED
            await self.change(entry, state=advance(job.state, event))

    async def _run_commands(self) -> None:
        """Bring the jobs into memory that owe somebody the run of a command, a page each round: there the notifier sees to them."""
        if self._owing_from is None or not self.notifier.commands:
            return
        page, self._owing_from = await self.roster.owing(self._owing_from)
        for entry in page:
            self.notifier.look(entry)
            if entry.owner is None and self.notifier.waits_for_owner(entry):
                self._search_owner(entry)
        if self._owing_from is not None:
            self._wake.set()

    async def _hold_up(self) -> None:
        """Interrupt the jobs that cannot run now, those that only wait for their turn too (BITS: TRANSIENT_ERROR)."""
        waiting: list[tuple[Entry, Hindrance]] = []
        for entry in self.roster.candidates:
            idle = entry.job.state is JobState.QUEUED and not entry.held and entry.supervisor is None
            if not idle and (entry.work is None or entry.stopping):
                continue
            hindrance = self._conditions.hindrance(entry.job, entry.next_url)
            if hindrance is None:
                continue
            if idle:
                waiting.append((entry, hindrance))
                self._blocked[entry.job.priority] += hindrance.reason is WaitingReason.POLICY
            else:
                entry.hindrance = hindrance
                entry.stop()
        await _together(self._put_off(entry, each.error, entry.job.active, untimed=True) for entry, each in waiting)

    async def _expire(self) -> None:
        """End attempts that have had their time (MaximumDownloadTime), and cancel jobs that nobody has touched for too long."""
        now = self.clock.monotonic()
        for entry in self.roster.running:
            if entry.work is not None and now >= self._download_deadline(entry):
                entry.overdue = True
                entry.stop()
        for elevated in (False, True):
            timeout = self._conditions.limits(self._limits, elevated=elevated).job_inactivity_timeout
            if timeout is not None:
                await self._cancel_untouched(timedelta(seconds=timeout), elevated=elevated)

    async def _cancel_untouched(self, limit: timedelta, *, elevated: bool) -> None:
        _, now = self._looked
        moment = self._idle_moments.pop(elevated, None)
        if moment is not None and moment > now:
            self._idle_moments[elevated] = moment
            return
        page = await self.roster.longest_untouched(elevated=elevated)
        idle = [job_id for job_id, when in page if when + limit <= now]
        if not idle:
            self._idle_moments[elevated] = min((when + limit for _, when in page), default=now + limit)
        for entry in await self.roster.find_all(idle):
            if entry.held or entry.job.state.is_active or entry.job.state.is_final or entry.job.modified + limit > now:
                continue
            log.warning("job %s: cancelled after %g s without activity", entry.job.id, limit.total_seconds())
            with contextlib.suppress(InvalidState):  # somebody was faster
                await self.cancel(entry)

    def _download_deadline(self, entry: Entry) -> float:
        return entry.started + max(0.0, self.maximum_download_time(entry.job) - entry.job.active)

    def maximum_download_time(self, job: JobRecord) -> float:
        """Seconds that it may spend CONNECTING and TRANSFERRING: its own, or what group policy says."""
        return self._conditions.maximum_download_time(job)

    def _patience(self, entry: Entry, timeout: float) -> datetime | None:
        """When a job that waits for an event has waited too long; None: it may for ever."""
        if not timeout or entry.failing_since is None:
            return None  # without a timeout the next error is fatal; this one was not
        return self.clock.now() + timedelta(seconds=entry.failing_since + timeout - self.clock.monotonic())

    async def _next_deadline(self) -> float | None:
        """When (monotonic) something is due that was not when this round of the loop began; None: only a change brings something."""
        if self._wake.is_set():
            return None  # it will not sleep
        began, seen = self._looked
        if self._moments_stale or (self._moment is not None and self._moment <= seen):
            self._moments_stale = False
            self._moment = await self.roster.next_due(seen)
        running = [entry for entry in self.roster.running if entry.work is not None]
        due = [self._download_deadline(entry) for entry in running]
        if any(entry.job.state is JobState.QUEUED for entry in self.roster.candidates):
            due += [entry.started + self._limits.time_slice for entry in running]
        now, wall = self.clock.monotonic(), self.clock.now()
        waits = [moment - now for moment in due if moment > began]
        moments = (self._moment, self._conditions.next_change(), *self._idle_moments.values())
        waits += [(each - wall).total_seconds() for each in moments if each is not None]
        return None if not waits else now + min(waits)

    def _search_owner(self, entry: Entry) -> None:
        """Ask once per owner for the token of queued jobs that have none."""
        if entry.job.owner.sid not in self._searches:
            self._searches[entry.job.owner.sid] = self.task(self._search(entry), "bits-owner")

    async def _search(self, entry: Entry) -> None:
        try:
            token = await self._find_owner(entry)
        except Exception as error:  # whatever the application's logon() raises must not end the queue
            message = f"logon() failed: {type(error).__name__}"
            reason = error if isinstance(error, BitsError) else ImpersonationFailed(message)
            log.warning("job %s: no token for its owner %s: %s", entry.job.id, entry.job.owner.name, reason)
            self.roster.owner_refused(entry.job.owner, reason)
            self.announce(entry)
            return
        if token is None:
            self.announce(entry)
            return
        try:
            await self.owner_found(entry, token)
        except BitsError as error:  # he is here all the same; which session he is in is not journalled
            log.info("job %s: %s", entry.job.id, error)

    async def owner_found(self, entry: Entry, token: Token) -> None:
        """A token that matches the owner key: every job of that very owner has its owner again, and the journal knows the logon session
        that he is in now."""
        owner = entry.job.owner
        for other in self.roster.owner_found(owner, token):
            self.announce(other)
        self.setter_found(owner, token)
        self._wake.set()
        if token.session not in (None, owner.session):
            await self.change(entry, owner=replace(owner, session=token.session))

    def forget_setters(self, gone: Callable[[Token | None], bool]) -> Collection[Token]:
        """Tokens of setters that are given up: their commands wait for them to come again."""
        came = {key: token for key, token in self._setters.items() if gone(token)}
        for key in came:
            del self._setters[key]
        lost = self.roster.setters_gone(gone)
        keys = {key for key, _ in lost}
        for entry in self.roster:
            if entry.job.notify_setter in keys:
                self.announce(entry)
        return {*came.values(), *(token for _, token in lost)}

    def setter_found(self, key: OwnerKey, token: Token) -> None:
        """A token that matches the key of whoever set commands: those that wait for it are run."""
        self._setters[key] = token
        for entry in self.roster:
            if entry.job.notify_setter == key and commander(entry) is None:
                entry.outbox.commander = key, token
                self.announce(entry)
        self._owing_from = 0
        self._wake.set()

    def _schedule(self) -> None:
        now = self.clock.monotonic()
        # a job that a command holds, or whose last attempt is being wound up, is not started; while it runs, it has its place
        looked_at = {e.job.id: e for e in self.roster.candidates if e.job.state.is_active or not (e.held or e.supervisor)}
        candidates = [self._candidate(entry, now) for entry in looked_at.values()]
        choice = choose(candidates, self._limits)
        for job_id in choice.yield_:
            looked_at[job_id].stop()
        for job_id in choice.start:
            self._start(looked_at[job_id])
        if self.roster.look_further({each.priority for each in candidates if each.ready}):
            self._wake.set()

    def _candidate(self, entry: Entry, now: float) -> Candidate:
        job = entry.job
        over = entry.work is not None and now - entry.started >= self._limits.time_slice
        return Candidate(job.id, job.state, job.priority, job.turn, self._may_start(entry), over)

    def _may_start(self, entry: Entry) -> bool:
        job = entry.job
        if job.state is not JobState.QUEUED or entry.owner is None or not job.may_run or not self._conditions.is_settled(job):
            return False
        url = entry.next_url  # of a host that may be out of reach the answer is waited for
        return self._conditions.hindrance(job, url) is None and (url is None or bool(self._conditions.in_reach(job.proxy, url)))

    def overridden(self, entry: Entry) -> bool:
        """Whether group policy limits the job's speed more than its own limit does."""
        return self._conditions.overrides(entry.job)

    def _start(self, entry: Entry) -> None:
        self._turns += 1
        entry.last_turn = entry.job.turn
        entry.job = replace(entry.job, turn=self._turns)
        entry.started = self.clock.monotonic()
        entry.stopping = entry.overdue = False
        entry.hindrance = entry.end = None
        entry.bucket = entry.bucket or self._conditions.bucket(entry.job)
        entry.levels = self._conditions.levels(entry.job, entry.bucket)
        self.move_in_memory(entry, Outcome.PICKED)
        self.roster.begin(entry)
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
            self._broke(error)
            self._yielded(entry)
        except Exception as error:
            self._fail_by_defect(error)
        finally:
            entry.supervisor = None
            self.roster.end(entry)
            self._wake.set()

    def _yielded(self, entry: Entry) -> None:
        """What the attempt has come to cannot be journalled now."""
        if self.failure is None and entry.job.state.is_active:
            entry.job = replace(entry.job, active=entry.job.active + self.clock.monotonic() - entry.started)
            self.move_in_memory(entry, Outcome.YIELDED)

    async def _settle(self, entry: Entry, work: asyncio.Task[None]) -> None:
        active = entry.job.active + self.clock.monotonic() - entry.started
        failure = None if work.cancelled() else work.exception()
        _empty_frames(failure)
        if self.failure is not None:
            return
        if isinstance(failure, StoreError) and failure.transient:
            raise failure
        if failure is not None:
            await self._failed(entry, self._understand(entry, failure), active)
        elif not entry.unfinished:  # perhaps it was told to stop at that moment
            await self._end(entry)
        elif work.cancelled() and entry.overdue:
            message = f"the job has been transferring for {self.maximum_download_time(entry.job):g} s"
            error = make_error(ErrorCode.BG_E_MAXDOWNLOAD_TIMEOUT, ErrorContext.GENERAL_QUEUE_MANAGER, message, job_id=entry.job.id)
            await self._failed(entry, error, active)
        elif work.cancelled() and entry.hindrance is not None:
            await self._failed(entry, entry.hindrance.error, active)
        elif entry.satisfied and not work.cancelled():
            state = advance(entry.job.state, Outcome.RANGES_DONE)
            await self.change(entry, state=state, active=active, error=None, retry_number=0, stalled=0.0)
        else:  # it was stopped, or a file was added at the last moment
            turn = entry.last_turn if self.closed else entry.job.turn  # the next manager goes on with it first
            await self.change(entry, state=advance(entry.job.state, Outcome.YIELDED), active=active, turn=turn)

    def _all_done(self, entry: Entry) -> dict[str, Any]:
        """What becomes of the job when its last file is there."""
        job, now = entry.job, self.clock.now()
        state, active = advance(job.state, Outcome.ALL_FILES_DONE), job.active + self.clock.monotonic() - entry.started
        end: dict[str, Any] = {"state": state, "active": active, "completed": now, "modified": now}
        return end | {"owed": owed_in(state, job.notify_flags), "error": None, "retry_number": 0, "stalled": 0.0}

    async def _end(self, entry: Entry) -> None:
        """Show what was journalled with the last file, unless the job has become another one since."""
        async with entry.changing:
            end, entry.end = entry.end, None
            if end is not None and end[0] is entry.job:
                self._show(entry, (), (), end[1])
                return
        await self.change(entry, **self._all_done(entry))

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
        if error.transient and entry.hindrance is not None:
            error = entry.hindrance.error  # the attempt ended by itself while it was being stopped
        elif error.transient and isinstance(error, NetworkError):
            error = await self._lost(entry, error)
        await self._put_off(entry, error, active, untimed=error.transient and entry.hindrance is not None)

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
        await self._follow_the_clock()
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
        until = None if untimed else self.clock.now() + timedelta(seconds=delay)
        log.warning("%s; %s", error.located(job_id=job.id), "the job waits" if untimed else f"next attempt in {delay:g} s")
        fields: dict[str, Any] = {"retry_number": 1 if stalled == 0.0 else job.retry_number + 1, "retry_at": until, "stalled": stalled}
        fields["gives_up_at"] = self._patience(entry, job.no_progress_timeout) if untimed else None
        state = advance(job.state, Outcome.FAILED_FOR_NOW)
        await self.change(entry, state=state, error=error, error_count=job.error_count + 1, active=active, **fields)
        if untimed:
            self._put_aside.append(entry)

    async def _give_up(self, entry: Entry, error: BitsError, active: float) -> None:
        job = entry.job
        fields: dict[str, Any] = {"error_count": job.error_count + 1, "retry_at": None, "stalled": 0.0, "active": active}
        # who made a single call hears of it from that
        log.log(logging.INFO if self._hold else logging.WARNING, "%s; the job waits to be resumed", error.located(job_id=job.id))
        await self.change(entry, state=advance(job.state, Outcome.FAILED), error=error, **fields)
        entry.failing_since = None

    # -- tokens -----------------------------------------------------------------------------------------------------------------------

    async def drop_lanes(self, entry: Entry, *tokens: Token | None) -> None:
        """A token or credential of the job was replaced or removed: its attempt ends, and its connections are closed at once (T25)."""
        await self.halt(entry)
        await self.forget_lanes(*tokens)

    async def replace_helper(self, entry: Entry, helper: Token | None) -> None:
        """Another helper token for the job, or none. The attempt with the old one has ended first; then the job has the new one, and the
        old one's connections are closed, all of it even if the caller is cancelled."""
        if entry.helper is helper:
            return
        await self.halt(entry)
        before, entry.helper = entry.helper, helper
        await finish(self.forget_lanes(before))

    async def forget_lanes(self, *tokens: Token | None) -> None:
        """Connections of these tokens are closed at once."""
        for token in tokens:
            if token is not None:
                await self._shop.network.forget(token)


def _uncounted(file: FileRecord) -> FileRecord:
    """Nothing of it counts as fetched; its part file is still known, to be removed."""
    return replace(file, transferred=False, validated=False, slices=(), validator=None, boot_id=None)


def _renamed(file: FileRecord, url: str) -> FileRecord:
    """The file under another URL; what pins the version of an unfinished one counts there too, as far as it can."""
    validator = file.validator
    if validator is not None and not file.transferred and file.url.partition("?")[0] != url.partition("?")[0]:
        validator = validator.at_another_url()
    return replace(file, url=url, original_url=url, validator=validator, restarts=0, refetches=0, wrong_digest=None)


_AWAITED: Final[Mapping[int, WaitingReason]] = {
    ErrorCode.BG_E_NETWORK_DISCONNECTED: WaitingReason.NETWORK,
    ErrorCode.BG_E_BLOCKED_BY_POLICY: WaitingReason.POLICY,
    ErrorCode.BG_E_BLOCKED_BY_COST_TRANSFER_POLICY: WaitingReason.COST,
}


def _awaited(job: JobRecord) -> WaitingReason | None:
    """What a job in TRANSIENT_ERROR waits for; None: for its next attempt."""
    return None if job.retry_at is not None or job.error is None else _AWAITED.get(job.error.code)


async def _together(changes: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Changes of several jobs at once: the journal writes those that wait for it in one transaction."""
    await asyncio.gather(*changes)


def _empty_frames(error: BaseException | None) -> None:
    """Leave a traceback its lines, and nothing of what the attempt had in its hands: the error stays with the job, and would keep it."""
    seen: set[int] = set()
    errors = [error]
    while errors:
        one = errors.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        traceback.clear_frames(one.__traceback__)
        errors += [one.__cause__, one.__context__]


def _later(moment: datetime | None, by: timedelta) -> datetime | None:
    return None if moment is None else moment + by


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
