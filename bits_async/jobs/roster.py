"""Which jobs are in memory: those that are at work, those that somebody holds, and of each priority the next in line. The journal has all.

An `Entry` is one job in memory, and there is at most one of a job, so that two handles see the same. It is there while somebody holds it
(a handle, a command, an attempt, the line); then it goes, and comes back from the journal when it is asked for. What the journal does not
keep of it (tokens, callbacks, the last answers) is kept here meanwhile, in a `Remnant`.

The line holds the next jobs of each priority, so that the next one to start is always at hand: `AHEAD` of those that all run at once, and
of the others, which wait for a place, one for each place and `SPARE` more. Where none of these can start, it grows to `AHEAD` too. Jobs of
owners whose token is not here are passed over by the query itself: any number of them may stand before one that can run.

Race this module answers: a job that is read from the journal while somebody else reads and changes it (one reads at a time, and what is in
memory by then counts; nobody changes a job that is not in memory).
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final
from uuid import UUID
from weakref import WeakValueDictionary

from ..errors import BitsError
from ..identity.tokens import Token, TokenPair
from ..limits import Bucket
from ..transport.answers import RawHeaders
from .callbacks import Outbox
from .certificates import CertificateJudge
from .conditions import Hindrance
from .model import FileRecord, GrantRecord, JobPriority, JobProgress, JobRecord, JobState, OwnerKey
from .store import Store

AHEAD: Final = 64  # jobs of each priority that are in memory before their turn, at most
SPARE: Final = 3  # jobs that wait for a place, and are in memory besides the next ones to have it: to read one costs half a millisecond
PAGE: Final = 64  # jobs that are read from the journal at once


@dataclass(slots=True)
class _Tally:
    """What a job's files are together, kept as they change: asked for with each piece that arrives, they are not looked through."""

    size: int = 0  # of the files whose size is known
    sized: int = 0  # so many
    transferred: int = 0
    bytes_transferred: int = 0

    def count(self, file: FileRecord, sign: int) -> None:
        """It is one of the files (1), or is no more (-1)."""
        if (size := file.size) is not None:
            self.size += sign * size
            self.sized += sign
        self.transferred += sign * file.transferred


@dataclass(eq=False, slots=True, weakref_slot=True)
class Entry:
    """One job in memory: its records, its tokens and its running attempt."""

    job: JobRecord
    files: list[FileRecord]  # by index; changed by `put` alone
    grants: list[GrantRecord]
    owner: Token | None = None
    helper: Token | None = None
    positions: dict[int, int] = field(default_factory=dict)  # bytes written, by file; changed by `reach` alone
    farthest: dict[int, int] = field(default_factory=dict)  # of the same version: what counts as progress is beyond
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)  # each change of the record begins with what the last one left
    held: int = 0  # commands at work: the scheduler leaves the job alone
    work: asyncio.Task[None] | None = None
    supervisor: asyncio.Task[None] | None = None
    last_turn: int = 0  # the one before that of the running attempt
    started: float = 0.0  # monotonic, of the running attempt
    failing_since: float | None = None  # monotonic, of the first transient error without progress
    stopping: bool = False  # the attempt was told to stop; told again, it could not finish what it does to stop
    overdue: bool = False  # the attempt is stopped because the job has been transferring for too long
    hindrance: Hindrance | None = None  # the attempt is stopped because of it
    end: tuple[JobRecord, dict[str, Any]] | None = None  # what the journal has made of the job as it was, with its last file
    bucket: Bucket | None = None  # the job's own limit of speed, once it has run
    levels: tuple[Bucket, ...] = ()  # all limits of the running attempt
    restored: bool = False  # from the journal: a process that died may have left a part file that is not in it yet
    refused: bool = False  # a secret of it cannot be read, and the job has said so
    judge: CertificateJudge | None = None  # the application's own say about servers' certificates
    answers: dict[int, RawHeaders] = field(default_factory=dict, repr=False)  # last response headers, by file
    outbox: Outbox = field(default_factory=Outbox)  # what it has to tell, and to whom
    _tally: _Tally = field(default_factory=_Tally, init=False)

    def __post_init__(self) -> None:
        for file in self.files:
            self._tally.count(file, 1)
            position = sum(piece.durable - piece.start for piece in file.slices)
            self.reach(file.index, position)
            self.farthest.setdefault(file.index, position)

    def put(self, file: FileRecord) -> None:
        """The record of a file is now this one; with the next index it is a new file."""
        if file.index < len(self.files):
            self._tally.count(self.files[file.index], -1)
        self._tally.count(file, 1)
        self.files[file.index : file.index + 1] = [file]

    def ends_with(self, files: Sequence[FileRecord]) -> bool:
        """Whether these records of its files are the last that the job waited for."""
        come = sum(file.transferred - self.files[file.index].transferred for file in files)
        return come > 0 and self._tally.transferred + come == len(self.files)

    def reach(self, index: int, position: int) -> None:
        """So many bytes of that file are written."""
        self._tally.bytes_transferred += position - self.positions.get(index, 0)
        self.positions[index] = position

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
    def known_size(self) -> int:
        """Bytes of the files whose size is known."""
        return self._tally.size

    @property
    def progress(self) -> JobProgress:
        """Over all files."""
        tally = self._tally
        total = tally.size if tally.sized == len(self.files) else None
        return JobProgress(total, tally.bytes_transferred, len(self.files), tally.transferred)

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
        return self._tally.transferred < len(self.files)


@dataclass(frozen=True, slots=True)
class Remnant:
    """Of a job that is not in memory: what the journal does not keep. Where it says nothing, there is none."""

    owner: Token | None = None  # where it is another instance than that of the owner's other jobs
    helper: Token | None = None
    judge: CertificateJudge | None = None
    answers: Mapping[int, RawHeaders] = field(default_factory=dict, repr=False)
    farthest: Mapping[int, int] = field(default_factory=dict)
    failing_since: float | None = None
    refused: bool = False
    outbox: Outbox | None = None

    @classmethod
    def of(cls, entry: Entry, usual: Token | None) -> "Remnant | None":
        """None: the journal keeps all of it. `usual`: the token that the owner's jobs have."""
        farthest = {index: place for index, place in entry.farthest.items() if place > entry.positions.get(index, 0)}
        owner = None if entry.owner is usual else entry.owner
        outbox = entry.outbox if entry.outbox.listener or entry.outbox.commander else None
        parts = (owner, entry.helper, entry.judge, entry.answers, farthest, entry.failing_since, entry.refused, outbox)
        return cls(*parts) if any(part is not None and part is not False and part != {} for part in parts) else None

    def restore(self, entry: Entry) -> None:
        """Give it back."""
        entry.owner = self.owner or entry.owner
        entry.helper, entry.judge = self.helper, self.judge
        entry.answers.update(self.answers)
        entry.farthest.update(self.farthest)
        entry.failing_since, entry.refused = self.failing_since, self.refused
        entry.outbox = self.outbox or entry.outbox


class Roster:
    """The jobs of one journal, as far as they are in memory.

    Args:
        store: the open journal.
        adopt: the token of an owner for whom the process may stand in, with the logon sessions that he made jobs in; None: he must come
            himself.
        restored: called with each job that was read, before anybody else has it.
        hold: nothing is in line: only jobs that were asked for are in memory, and they stay.
        places: so many jobs below FOREGROUND run at once.
    """

    def __init__(
        self,
        store: Store,
        *,
        adopt: Callable[[OwnerKey, Collection[str]], Awaitable[Token | None]],
        restored: Callable[[Entry], Awaitable[None]],
        hold: bool,
        places: int,
    ) -> None:
        self._store = store
        self._adopt = adopt
        self._restored = restored
        self._live: WeakValueDictionary[UUID, Entry] = WeakValueDictionary()
        self._stay: dict[UUID, Entry] | None = {} if hold else None
        self._running: dict[UUID, Entry] = {}
        self._line: dict[JobPriority, list[Entry]] = {}
        self._stale = set[JobPriority]()  # whose line may have become another
        self._first = {each: AHEAD if each is JobPriority.FOREGROUND else min(places + SPARE, AHEAD) for each in JobPriority}
        self._length = dict(self._first)  # of the line, at most
        self._cut: set[JobPriority] = set()  # more jobs may stand behind the line
        self._remnants: dict[UUID, Remnant] = {}
        self._owners: dict[OwnerKey, Token | None] = {}
        self._adopted: dict[OwnerKey, Token | None] = {}
        self._absent: set[OwnerKey] = set()  # owners of queued jobs, whose token is not here
        self._reasons: dict[OwnerKey, BitsError] = {}  # why it could not be had
        self._reading = asyncio.Lock()

    def __repr__(self) -> str:
        return f"<Roster: {len(self)} jobs in memory>"

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Entry]:
        """The jobs that are in memory now."""
        return iter(list(self._live.values()))

    def open(self, queued: Collection[JobPriority]) -> None:
        """The journal has QUEUED jobs of these priorities."""
        self._stale.update(queued)

    # -- one job ------------------------------------------------------------------------------------------------------------------------

    def live(self, job_id: UUID) -> Entry | None:
        """The job, if it is in memory."""
        return self._live.get(job_id)

    async def find(self, job_id: UUID) -> Entry | None:
        """The job, read from the journal where it must be; None: it is not in the queue."""
        entry = self._live.get(job_id)
        if entry is None:
            entry = next(iter(await self.find_all([job_id])), None)
        return entry

    async def find_all(self, job_ids: Sequence[UUID]) -> list[Entry]:
        """These jobs, in this order; those that are not in the queue are left out."""
        here = [self._live.get(job_id) for job_id in job_ids]
        if None not in here:
            return [entry for entry in here if entry is not None]
        async with self._reading:
            found = {job_id: entry for job_id in job_ids if (entry := self._live.get(job_id)) is not None}
            for stored in await self._store.load([job_id for job_id in job_ids if job_id not in found]):
                owner = await self._owner(stored.job.owner)
                found[stored.job.id] = entry = Entry(stored.job, list(stored.files), list(stored.grants), owner, restored=True)
                await self._revive(entry)
        return [entry for job_id in job_ids if (entry := self._live.get(job_id)) is not None and job_id in found]

    async def _revive(self, entry: Entry) -> None:
        rest = self._remnants.get(entry.job.id)
        if rest is not None:
            rest.restore(entry)
        self._put(entry)
        await self._restored(entry)

    def _put(self, entry: Entry) -> None:
        self._live[entry.job.id] = entry
        if self._stay is not None:
            self._stay[entry.job.id] = entry

    def enter(self, entry: Entry) -> Sequence[Entry]:
        """A job that is new in the queue, or goes on as another entry. Returns the jobs whose owner is here with it."""
        key, usual = entry.job.owner, self._owners.get(entry.job.owner)
        others = self.owner_found(key, entry.owner) if entry.owner is not None and (usual is None or usual.closed) else ()
        self._put(entry)
        self.keep(entry)
        self.changed(None, entry.job)
        return others

    def leave(self, entry: Entry) -> None:
        """The job has left the queue."""
        self._live.pop(entry.job.id, None)
        self._remnants.pop(entry.job.id, None)
        if self._stay is not None:
            self._stay.pop(entry.job.id, None)
        self._leave_line(entry)

    def _leave_line(self, entry: Entry) -> None:
        """Of those behind it, if there are any, one comes up."""
        priority = entry.job.priority
        self._line[priority] = [each for each in self._line.get(priority, ()) if each is not entry]
        if priority in self._cut:
            self._stale.add(priority)

    def keep(self, entry: Entry) -> None:
        """Remember what the journal does not keep of it: at the end of each command and attempt."""
        if self._live.get(entry.job.id) is not entry:
            return  # it has left, or goes on as another entry
        rest = Remnant.of(entry, self._owners.get(entry.job.owner))
        if rest is None:
            self._remnants.pop(entry.job.id, None)
        else:
            self._remnants[entry.job.id] = rest

    def changed(self, before: JobRecord | None, after: JobRecord) -> None:
        """The record of a job has become another. None: there was none. Jobs of absent owners change no line: it passes them over."""
        if before is None or _place(before) != _place(after):
            queued = [job for job in (before, after) if job is not None and job.state is JobState.QUEUED]
            self._stale.update(job.priority for job in queued if job.owner not in self._absent)

    def look_anew(self) -> None:
        """A look at the journal may have broken off."""
        self._stale = set(JobPriority)

    # -- at work ------------------------------------------------------------------------------------------------------------------------

    @property
    def running(self) -> Collection[Entry]:
        """The jobs with an attempt, or with one that is being wound up."""
        return list(self._running.values())

    def begin(self, entry: Entry) -> None:
        """The job has an attempt."""
        self._running[entry.job.id] = entry
        self._leave_line(entry)
        self._length[entry.job.priority] = self._first[entry.job.priority]

    def end(self, entry: Entry) -> None:
        """It has none any more."""
        if self._running.get(entry.job.id) is entry:
            del self._running[entry.job.id]
        if entry.job.state is JobState.QUEUED:
            self._stale.add(entry.job.priority)
        self.keep(entry)

    # -- the line -----------------------------------------------------------------------------------------------------------------------

    @property
    def candidates(self) -> Sequence[Entry]:
        """Whom the scheduler looks at: the jobs at work and those that come next, in the order of the line."""
        if self._stay is not None:
            return list(self._stay.values())
        line = [entry for entries in self._line.values() for entry in entries if entry.job.id not in self._running]
        return [*self._running.values(), *line]

    async def look_ahead(self, without: Collection[JobPriority] = ()) -> Sequence[Entry]:
        """Bring the line up to date. Returns queued jobs whose owner's token is not here, one for each owner that is met.

        Args:
            without: priorities of which none can run now: they have no line.
        """
        met: list[Entry] = []
        for priority in without:
            self._line[priority] = []
            self._stale.add(priority)
            self._cut.discard(priority)
        while stale := self._stale.difference(without):
            priority = stale.pop()
            self._stale.discard(priority)
            if self._stay is not None:
                continue
            entries = await self._next_in(priority)
            lost = {entry.job.owner: entry for entry in entries if entry.owner is None and entry.job.state is JobState.QUEUED}
            met += lost.values()
            self._line[priority] = [entry for entry in entries if entry.owner is not None]
            if lost.keys() - self._absent:
                self._absent |= lost.keys()
                self._stale.add(priority)  # without them others come up
                if not self._line[priority]:
                    self._lengthen(priority)  # there may be many of them
        return met if self._stay is None else self._without_owner()

    def look_further(self, ready: Collection[JobPriority]) -> bool:
        """Where none in line can start, of all priorities but these, those behind them may: whether there is more to look at."""
        stuck = [priority for priority in self._cut.difference(ready) if self._length[priority] < AHEAD]
        for priority in stuck:
            self._lengthen(priority)
            self._stale.add(priority)
        return bool(stuck)

    def _lengthen(self, priority: JobPriority) -> None:
        self._length[priority] = min(2 * self._length[priority], AHEAD)

    async def _next_in(self, priority: JobPriority) -> list[Entry]:
        running = set(self._running)  # the journal has them in the queue
        length, dynamic = self._length[priority], priority is JobPriority.FOREGROUND
        ids = await self._store.in_line(priority, dynamic=dynamic, absent=self._absent, count=length + len(running))
        waiting = [job_id for job_id in ids if job_id not in running][:length]
        (self._cut.add if len(waiting) == length else self._cut.discard)(priority)
        return await self.find_all(waiting)

    def _without_owner(self) -> list[Entry]:
        stay = self._stay or {}
        return [entry for entry in stay.values() if entry.owner is None and entry.job.state is JobState.QUEUED]

    # -- owners -------------------------------------------------------------------------------------------------------------------------

    async def adopted(self, key: OwnerKey) -> Token | None:
        """The token of somebody for whom the process may stand in; None: he must come himself. Asked once."""
        if key not in self._adopted:
            sessions = await self._store.sessions_of(owner_sid=key.sid)
            self._adopted[key] = await self._adopt(key, sessions if key.session is None else sessions | {key.session})
        return self._adopted[key]

    async def _owner(self, key: OwnerKey) -> Token | None:
        return self._owners.get(key) or self._owners.setdefault(key, await self.adopted(key))

    def owner_found(self, key: OwnerKey, token: Token) -> Sequence[Entry]:
        """A token that matches the owner key: every job of that very owner has its owner again. Returns those that waited for it."""
        self._owners[key] = token
        if key in self._absent:  # else no job of his was passed over
            self._absent.discard(key)
            self._stale.update(JobPriority)
        self._reasons.pop(key, None)
        waited = [entry for entry in self if entry.owner is None and entry.job.owner == key]
        for entry in waited:
            entry.owner = token
        return waited

    def owners_gone(self, gone: Callable[[Token | None], bool]) -> Mapping[OwnerKey, Token]:
        """Owners whose token is given up, and that token. Their jobs have none until they come themselves."""
        lost = {key: token for key, token in self._owners.items() if token is not None and gone(token)}
        for key in lost:
            self._owners[key] = self._adopted[key] = None
            self._stale.update(JobPriority)
        return lost

    def setters_gone(self, gone: Callable[[Token | None], bool]) -> Collection[tuple[OwnerKey, Token]]:
        """Setters of commands whose tokens are given up. The commands wait until they come themselves: the process stands in for none."""
        boxes = [*(entry.outbox for entry in self), *(rest.outbox for rest in self._remnants.values() if rest.outbox is not None)]
        lost: list[tuple[OwnerKey, Token]] = []
        for box in boxes:
            if box.commander is not None and gone(box.commander[1]):
                lost.append(box.commander)
                self._adopted[box.commander[0]] = None
                box.commander = None
        return lost

    async def touched_by(self, gone: Callable[[Token | None], bool], owners: Collection[OwnerKey]) -> Sequence[Entry]:
        """Jobs that carry such a token, or whose owner was given up and who need a helper."""
        apart = [job_id for job_id, rest in self._remnants.items() if gone(rest.owner) or gone(rest.helper)]
        helped = [job_id for key in owners for job_id in await self._store.with_helper(owner_sid=key.sid)]
        looked_at = dict.fromkeys([*self, *await self.find_all([*dict.fromkeys([*apart, *helped])])])
        return [entry for entry in looked_at if gone(entry.owner) or gone(entry.helper) or entry.job.owner in owners]

    def carried_apart(self, gone: Callable[[Token | None], bool]) -> Collection[Token]:
        """Such tokens of jobs that are not in memory; the journal is not asked."""
        return {token for rest in self._remnants.values() for token in (rest.owner, rest.helper) if token is not None and gone(token)}

    def owner_refused(self, key: OwnerKey, reason: BitsError) -> None:
        """Asking for that token failed."""
        self._reasons[key] = reason

    def absence(self, key: OwnerKey) -> BitsError | None:
        """Why the owner's token could not be had, as far as known."""
        return self._reasons.get(key)

    # -- of all jobs --------------------------------------------------------------------------------------------------------------------

    async def due(self, now: datetime) -> list[Entry]:
        """Jobs in TRANSIENT_ERROR whose next attempt is due, or that have waited for an event too long: a page of them."""
        if self._stay is None:
            return await self.find_all(await self._store.due(now, PAGE))
        return [entry for entry in self._stay.values() if (moment := _due(entry.job)) is not None and moment <= now]

    async def next_due(self, after: datetime) -> datetime | None:
        """When the next one is, after that moment."""
        if self._stay is None:
            return await self._store.next_due(after)
        moments = [moment for entry in self._stay.values() if (moment := _due(entry.job)) is not None]
        return min((moment for moment in moments if moment > after), default=None)

    async def hasten(self, now: datetime) -> None:
        """In the journal every retry is due."""
        if self._stay is None:
            await self._store.hasten_retries(now)

    async def awaiting(self, after: int) -> tuple[Sequence[Entry], int | None]:
        """Jobs that wait for an event, a page of them from behind that number, and where the next page begins; None: there is none."""
        if self._stay is not None:
            return list(self._stay.values()), None
        page = await self._store.awaiting(after, PAGE)
        return await self.find_all([job_id for _, job_id in page]), page[-1][0] if len(page) == PAGE else None

    async def owing(self, after: int) -> tuple[Sequence[Entry], int | None]:
        """Jobs with a command that is to be run, as `awaiting`."""
        if self._stay is not None:
            return (), None
        page = await self._store.owing(after, PAGE)
        return await self.find_all([job_id for _, job_id in page]), page[-1][0] if len(page) == PAGE else None

    async def longest_untouched(self, *, elevated: bool) -> list[tuple[UUID, datetime]]:
        """Jobs of elevated owners, or of others, that are not at work and were not changed for longest, a page of them, with the time of
        that change."""
        if self._stay is not None:
            return []
        page = await self._store.longest_untouched(PAGE + len(self._running), elevated=elevated)
        return [(job_id, when) for job_id, when in page if job_id not in self._running]

    async def pages(self, owner_sid: str | None) -> AsyncIterator[Sequence[Entry]]:
        """The jobs that are in the queue now (None: of all owners), oldest first."""
        last, end = 0, await self._store.last_number()
        while page := [each for each in await self._store.numbered(last, owner_sid=owner_sid, count=PAGE) if each[0] <= end]:
            yield await self.find_all([job_id for _, job_id in page])
            last = page[-1][0]

    async def with_destination(self, path: Path, *, owner_sid: str) -> Sequence[Entry]:
        """Jobs of that owner with a file for that path, oldest first."""
        return await self.find_all(await self._store.with_destination(path, owner_sid=owner_sid))


def _due(job: JobRecord) -> datetime | None:
    return None if job.state is not JobState.TRANSIENT_ERROR else job.retry_at or job.gives_up_at


def _place(job: JobRecord) -> tuple[object, ...]:
    """What decides where a job stands in line."""
    return job.state, job.priority, job.may_run, job.turn, job.owner
