"""One attempt at one job: the only place where a connection meets a file.

The byte's line runs through `_pump` (body -> batch -> part file -> checkpoint), or through `_receive`, where a thread of the file token
moves the rest of the body and only the checkpoints are made here. A checkpoint is fdatasync and then the journal's row, in
this order, so that the journal never speaks of bytes that may still be in the air. Cancelling the attempt is how it is suspended,
pre-empted and closed: what has arrived is written, made durable and journalled, then the cancel goes on.

Of a job with several files those that come whole in one write go together: `_write` finds that a file is whole, `_close` puts it on the
shelf, and `_put_away` takes many of them at once from there, in one hop and one transaction, while the next ones are fetched. A file
that is on the shelf has no part file yet: what a kill takes is no more than the shelf holds.

This module decides nothing about jobs: it raises what went wrong and its caller (`engine`) says what becomes of the job.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

from ..clock import Clock, finish
from ..errors import BitsError, ErrorCode, ErrorContext, LocalFileError, NetworkError, StoreError, ValidationFailed, make_error, show_url
from ..files.batches import WholeFile, store_whole
from ..files.leftovers import discard_part
from ..files.names import new_draft
from ..files.part import PartFile
from ..files.records import PartRecord
from ..identity.threads import TokenExecutor, TokenExecutors
from ..identity.tokens import HelperTokenFlags, Token, TokenPair
from ..limits import Bucket, Chain, limiter
from ..transport.answers import MAX_URL, AlreadyComplete, Asked, Condition, FileChanged, Redirected
from ..transport.digests import NO_DIGESTS, Digests
from ..transport.lane import Body, Network, Party
from ..transport.options import SecurityFlags
from ..transport.ranges import (
    MAX_REQUEST,
    Detached,
    FileRange,
    Slice,
    Validator,
    complete,
    divide,
    filled,
    local_size,
    locate,
    missing,
    recover,
)
from ..transport.timeouts import Pace, Timeouts
from .model import FileRecord, JobRecord

WRITE_BATCH: Final = 1 << 20
WRITE_AFTER: Final = 0.25  # seconds of silence after which a smaller batch is written
WRITE_WITHIN: Final = 1.0  # and seconds after which it is in any case: on a slow line a kill would take minutes of it
CHECKPOINT_BYTES: Final = 32 << 20
CHECKPOINT_SECONDS: Final = 5.0
LOOK: Final = 0.1  # seconds between two looks at a body that a thread moves
SEGMENT: Final = 4 << 20  # a range that has less is not worth a connection of its own
FILE_RESTARTS: Final = 3
REFETCHES: Final = 2  # of a file whose digest is wrong
SEAM: Final = 64 << 10  # bytes fetched once more, where nothing but the answer says that the rest is of the same version
GONE: Final = (401, 403, 404, 410)  # what a URL that was good for a while answers afterwards
RECONNECTS: Final = 5
RECONNECT_DELAYS: Final = (0.2, 0.5, 1.0, 2.0, 5.0)
SHELF_FILES: Final = 64  # whole files that are put away at once: the disk is waited for once for all of them
SHELF_BYTES: Final = 2 << 20  # two batches are in memory at most, and a job that is stopped has no more to write
NO_VALIDATOR: Final = "the server gives no validator to go on by"
DYNAMIC: Final = "dynamic content cannot be continued"

log = logging.getLogger("bits_async.transfer")


class Recorder(Protocol):
    """The job as an attempt sees it: what it reads, and where it reports."""

    @property
    def job(self) -> JobRecord: ...

    @property
    def files(self) -> Sequence[FileRecord]: ...

    @property
    def known_size(self) -> int:
        """Bytes of all files together, as far as their sizes are known; not counted anew at each asking."""
        ...

    @property
    def levels(self) -> Sequence[Bucket]:
        """What limits the speed, from the machine to the job; others when the job's priority changes."""
        ...

    async def keep(self, *files: FileRecord) -> None:
        """Durable in the journal when it returns; a file that is transferred is told of at that moment, even if the caller is cancelled."""
        ...

    def answered(self) -> None:
        """A server has begun to deliver."""
        ...

    def moved(self, index: int, position: int) -> None:
        """So many bytes of that file are written; it can fall."""
        ...

    def restarted(self, index: int, reason: str, *, changed: bool) -> None:
        """That file is fetched anew; `changed`: because it is another version."""
        ...

    def retrying(self, number: int, delay: float, error: BitsError) -> None:
        """A broken connection is opened again."""
        ...


@dataclass(frozen=True, slots=True)
class Workshop:
    """What every attempt of a manager works with."""

    network: Network
    executors: TokenExecutors
    clock: Clock
    boot_id: str
    disk_reserve: int = 0  # bytes that preallocation leaves free (T18)


@dataclass(slots=True)
class _Download:
    """One file being fetched: its open part file, how far it is, and which version it is of."""

    record: FileRecord
    opened: PartFile | None  # None: it may come whole, and is in no part file yet
    piece: Slice
    validator: Validator | None
    checkpoint_at: float
    fresh: bool  # nothing is in it but what this attempt wrote
    files: TokenExecutor
    checkpoint_from: int = 0
    complete: bool = False  # all bytes of the piece are there
    condition: Condition = Condition.VERSION  # the strongest that the server is known to heed
    hashed: Digests = NO_DIGESTS  # what the running digests are compared with in the end
    went_back: bool = False  # to the URL that the application named, and no server has answered since
    others: tuple[Slice, ...] = ()  # on demand: what is there besides the piece
    segments: tuple[Slice, ...] = ()  # in place of the piece, while the file is fetched in several ranges at once
    abreast: int = 1  # so many of them at once
    whole: Sequence[bytes] | None = None  # all of it, in the place of a part file
    arrivals_seen: int = 0  # other files that had come in whole when its connection broke last
    broke_with_others: bool = False  # once: next time it counts

    @property
    def part(self) -> PartFile:
        """The part file, for those who know that there is one."""
        assert self.opened is not None, "made when the first bytes came, unless they were all of them"
        return self.opened

    @property
    def index(self) -> int:
        return self.record.index

    @property
    def slices(self) -> tuple[Slice, ...]:
        """All that is there, for the journal. Several: the length of the file says nothing, not even in the boot that wrote it."""
        return filled(self.pieces) if self.record.wanted else tuple(replace(each) for each in self.pieces)

    @property
    def pieces(self) -> tuple[Slice, ...]:
        """All that is there, as it grows."""
        return self.segments or (*self.others, self.piece)

    @property
    def count(self) -> int:
        """Bytes that are there."""
        if not (self.segments or self.others):
            return self.piece.written - self.piece.start
        return sum(each.written - each.start for each in self.pieces)

    @property
    def is_all_there(self) -> bool:
        """The one piece that is fetched is the rest of the file, and has come."""
        return self.piece.done and not (self.segments or self.record.wanted)

    @property
    def at_risk(self) -> bool:
        """Bytes are in a part file that a loss of power would take."""
        return any(each.durable < each.written for each in self.pieces)


def _size(download: _Download) -> int | None:
    """Of the remote file."""
    return download.validator.size if download.validator else None


async def _next(chunks: AsyncIterator[bytes], patience: float | None) -> bytes | None:
    """The next chunk; empty when none has come within `patience` seconds, None at the end."""
    if patience is None:
        return await anext(chunks, None)
    try:
        async with asyncio.timeout(patience):
            return await anext(chunks, None)
    except TimeoutError:
        return b""


def _batch(levels: Sequence[Bucket]) -> int:
    """Bytes to write at once: what is paid for afterwards is read in small bites."""
    most = WRITE_BATCH
    for level in levels:
        if level.rate is not None:
            most = min(most, level.chunk)
    return most


def _behind(detached: Detached, moved: int) -> Detached:
    """What is left of a body."""
    return replace(detached, already=detached.already[moved:], length=detached.length - moved) if moved else detached


async def _ended(*tasks: "asyncio.Task[Any]") -> None:
    """Cancel the tasks and wait for their end through any number of cancels of our own: until then they use what is ours."""
    for task in tasks:
        task.cancel()
    cancelled = False
    while pending := [task for task in tasks if not task.done()]:
        try:
            await asyncio.wait(pending)
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError


async def _side_by_side(works: "Sequence[Coroutine[Any, Any, None]]") -> None:
    """All of them at once. The first that fails stops the others, which end as at a cancel, and its error is raised."""
    if len(works) == 1:
        await works[0]
        return
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        await _ended(*tasks)
    failures = [task.exception() for task in (*done, *tasks) if not task.cancelled()]
    for failure in filter(None, failures):
        raise failure


class _Shelf:
    """Files that came whole, on their way from those who fetch to the one who puts them away: how much there may be, and when it goes.

    Two batches at most are in memory: one that is written, and one that is gathered meanwhile.
    """

    def __init__(self) -> None:
        self.files: list[_Download] = []
        self._bytes = 0
        self._changed = asyncio.Event()
        self._hurry = False
        self._ended = False

    @property
    def _full(self) -> bool:
        return len(self.files) >= SHELF_FILES or self._bytes >= SHELF_BYTES

    def put(self, download: _Download) -> None:
        self.files.append(download)
        self._bytes += download.count
        if len(self.files) == 1 or self._full:
            self._changed.set()

    def remove(self, some: Sequence[_Download]) -> None:
        """The first ones are put away, or go alone."""
        del self.files[: len(some)]
        self._bytes -= sum(each.count for each in some)
        self._changed.set()

    def end(self) -> None:
        """Nobody fetches any more."""
        self._ended = True
        self._changed.set()

    @property
    def crowded(self) -> bool:
        """Two batches are there."""
        return len(self.files) >= 2 * SHELF_FILES or self._bytes >= 2 * SHELF_BYTES

    async def room(self) -> None:
        """Wait until less than two batches are there."""
        await self._until(lambda: not self.crowded)

    async def empty(self) -> None:
        """Wait until all are put away, which is done at once."""
        self._hurry = True
        self._changed.set()
        await self._until(lambda: not self.files)
        self._hurry = False

    async def batch(self) -> Sequence[_Download]:
        """The next to be put away, when there are enough of them or the first has waited `WRITE_AFTER`; none: nobody fetches any more."""
        await self._until(lambda: bool(self.files) or self._ended)
        try:
            async with asyncio.timeout(WRITE_AFTER):
                await self._until(lambda: self._full or self._hurry or self._ended)
        except TimeoutError:
            pass
        return self.files[:SHELF_FILES]

    async def _until(self, so: Callable[[], bool]) -> None:
        while not so():
            self._changed.clear()
            await self._changed.wait()


class _WrongBytes(Exception):
    """Control flow: what came hashes to `found`, and should not. The message is for people."""

    def __init__(self, message: str, found: str) -> None:
        super().__init__(message)
        self.message = message
        self.found = found


def _whole(download: _Download) -> WholeFile:
    record, digests = download.record, _held_to(download)
    expected = [(name, digests.of(name) or "") for name in digests.names]
    return WholeFile(record.path, record.job_id, record.draft, download.whole or (), expected)


def _held_to(download: _Download) -> Digests:
    """What the local file must hash to: the caller's word, else that of the server where it serves all of it."""
    record = download.record
    if record.digests or record.ranges or download.validator is None:
        return record.digests
    return download.validator.digests.one()


class Attempt:
    """One go at a job, as the tokens of `pair`. `run` returns when every file is transferred.

    `party` makes the network side of one file (by its index) for the token that acts there and its security threads.
    """

    def __init__(
        self, shop: Workshop, recorder: Recorder, pair: TokenPair, party: Callable[[Token, TokenExecutor, int], Awaitable[Party]]
    ) -> None:
        self._shop = shop
        self._recorder = recorder
        self._pair = pair
        self._party = party
        self._reconnects = 0  # since a file came in whole
        self._arrivals = 0  # files that came in whole
        self._resting = 0  # so many wait before they open theirs again
        self._under_way: set[int] = set()  # files, by index
        self._passed = 0  # so many files, from the first on, are transferred or under way
        self._shelf: _Shelf | None = None  # for files that come whole, if there are several
        self._alone: set[int] = set()  # files that do not go with others: something is wrong with them

    @property
    def _asking(self) -> str:
        """Whom the server sees, for errors."""
        return self._pair.acting_for(HelperTokenFlags.NETWORK).name

    async def run(self) -> None:
        """Transfer the files that are not yet transferred, in order, as many at once as the job wants; on demand, what was asked for
        of them.

        Raises:
            BitsError: what stopped the attempt; `transient` says whether another may help.
        """
        pair, executors = self._pair, self._shop.executors
        local, remote = pair.acting_for(HelperTokenFlags.LOCAL_FILE), pair.acting_for(HelperTokenFlags.NETWORK)
        with self._shop.clock.working():
            for token in {local, remote}:
                pair.check_today(token, await executors.refresh(token))
        with executors.lease(local, "files") as files, executors.lease(remote, "security") as security:
            count = sum(map(self._to_do, self._recorder.files))
            hands = max(1, min(self._recorder.job.files_at_once, count))
            if count > 1 and self._may_share_a_write():
                self._shelf = _Shelf()
                await self._fetch_onto(self._shelf, hands, remote, files, security)
            else:
                await self._fetch_all(hands, remote, files, security)

    async def _fetch_all(self, hands: int, remote: Token, files: TokenExecutor, security: TokenExecutor) -> None:
        await _side_by_side([self._work(remote, files, security) for _ in range(hands)])

    async def _work(self, remote: Token, files: TokenExecutor, security: TokenExecutor) -> None:
        """One file after the other, each that nobody else is at; files may be added meanwhile."""
        with self._shop.clock.working():
            while (record := await self._next_file()) is not None:
                self._under_way.add(record.index)
                download = await self._transfer(record, files, await self._party(remote, security, record.index))
                self._reconnects, self._arrivals = 0, self._arrivals + 1
                if download.whole is None:
                    self._under_way.discard(record.index)

    async def _next_file(self) -> FileRecord | None:
        """The next that nobody is at; None: all are transferred. Those on the shelf may come back from there."""
        shelf = self._shelf
        if shelf is not None and shelf.crowded:
            await shelf.room()
        if (record := self._first_to_do()) is None and shelf is not None:
            await shelf.empty()
            record = self._first_to_do()
        return record

    def _first_to_do(self) -> FileRecord | None:
        files = self._recorder.files
        begin = 0 if self._recorder.job.on_demand_mode else self._passed
        for self._passed in range(begin, len(files)):
            if self._to_do(files[self._passed]):
                return files[self._passed]
        self._passed = len(files)
        return None

    def _to_do(self, file: FileRecord) -> bool:
        outstanding = file.outstanding if self._recorder.job.on_demand_mode else not file.transferred
        return outstanding and file.index not in self._under_way

    async def _transfer(self, record: FileRecord, files: TokenExecutor, party: Party) -> _Download:
        download = await self._open(record, files)
        try:
            if self._recorder.job.on_demand_mode:
                await self._fetch_wanted(download, party)
            else:
                await self._begin(download)
                await self._fetch(download, party)
                while download.whole is None and not await self._finished(download):
                    await self._fetch(download, party)
        finally:
            if download.opened is not None:
                # whole, also where the attempt is told to stop while it fails: of a part file that is in no record nobody would know
                await finish(self._close(download, download.opened))
            elif download.whole is not None and self._shelf is not None:
                self._shelf.put(download)
        return download

    # -- files that come whole ----------------------------------------------------------------------------------------------------------

    def _may_share_a_write(self) -> bool:
        """Whether files of this job may be written together, when all that is to be known of them is known."""
        job = self._recorder.job
        return job.http.plain and not job.on_demand_mode and job.maximum_download_size is None

    async def _fetch_onto(self, shelf: _Shelf, hands: int, remote: Token, files: TokenExecutor, security: TokenExecutor) -> None:
        async def fetch() -> None:
            try:
                await self._fetch_all(hands, remote, files, security)
            finally:
                shelf.end()

        try:
            await _side_by_side([fetch(), self._put_away(shelf, files)])
        finally:
            await finish(self._clear(shelf, files))  # what has come is kept, whatever ended the attempt

    async def _put_away(self, shelf: _Shelf, files: TokenExecutor) -> None:
        """Batch after batch, beside those who fetch; a file with which anything is wrong goes back to them, and then alone."""
        while batch := await shelf.batch():
            if not await finish(self._put_some_away(shelf, batch, files)):
                self._alone.add(batch[0].index)
                self._passed = min(self._passed, batch[0].index)
                self._under_way.discard(batch[0].index)
                shelf.remove(batch[:1])

    async def _clear(self, shelf: _Shelf, files: TokenExecutor) -> None:
        while shelf.files:
            if not await self._put_some_away(shelf, shelf.files[:SHELF_FILES], files):
                shelf.remove(shelf.files[:1])  # of what is wrong with it the next attempt hears

    async def _put_some_away(self, shelf: _Shelf, batch: Sequence[_Download], files: TokenExecutor) -> int:
        """How many of them, from the first on, are in part files and in the journal; the next one is to go alone."""
        with self._shop.clock.working():
            try:
                parts = await store_whole(files, [_whole(each) for each in batch], chosen_by_another=self._chosen_by_another(files))
            except BitsError as error:
                log.info("job %s: whole files go alone: %s", batch[0].record.job_id, error)
                parts = []
            done = batch[: len(parts)]
            if done:
                try:
                    await self._recorder.keep(*(self._kept_whole(each, part) for each, part in zip(done, parts, strict=True)))
                except BitsError:
                    await self._throw_away(done, parts, files)
                    raise
                shelf.remove(done)
                self._under_way.difference_update(each.index for each in done)
        return len(done)

    async def _throw_away(self, some: Sequence[_Download], parts: Sequence[PartRecord], files: TokenExecutor) -> None:
        """Part files that the journal does not know of."""
        for each, part in zip(some, parts, strict=True):
            try:
                await discard_part(files, each.record.path, part)
            except BitsError as error:
                log.warning("job %s: the part file %s stays: %s", each.record.job_id, part.path, error)

    def _kept_whole(self, download: _Download, part: PartRecord) -> FileRecord:
        known, size = download.validator or Validator(None, None, None), download.count
        return download.record.evolve(
            validator=known if known.size is not None else replace(known, size=size),
            part=part,
            draft="",  # its name is used up, and nobody needs another unless the file is lost
            slices=(Slice(0, size, size, size),),
            boot_id=self._shop.boot_id,
            transferred=True,
            validated=False,
        )

    # -- opening ----------------------------------------------------------------------------------------------------------------------

    async def _open(self, record: FileRecord, files: TokenExecutor) -> _Download:
        abreast = self._recorder.job.segments
        if self._may_come_whole(record):
            return _Download(
                record, None, Slice(0, None, 0, 0), None, self._shop.clock.monotonic(), fresh=True, files=files, abreast=abreast
            )
        part = None
        if record.part is not None:
            part = await PartFile.reopen(files, record.path, record.part)
            if part is None:
                self._recorder.restarted(record.index, "the part file is not as it was left", changed=True)
                await self._clear_away(record, files.token)
        fresh = part is None
        if part is None:
            record, part = await self._create(replace(record, part=None, slices=(), validator=None), files)
        part.keep_free = self._shop.disk_reserve
        return _Download(record, part, Slice(0, None, 0, 0), None, self._shop.clock.monotonic(), fresh, files, abreast=abreast)

    def _may_come_whole(self, record: FileRecord) -> bool:
        """Nothing of it is there, and others of this job could be written with it: then its part file is made when bytes come."""
        fresh = record.part is None and not record.ranges and bool(record.draft)
        return fresh and self._shelf is not None and record.index not in self._alone

    async def _unpack(self, download: _Download) -> None:
        """Into a part file of its own, though it came whole."""
        content, download.whole, download.piece.written = download.whole or (), None, 0
        await self._make(download)
        await download.part.append(download.piece, content)

    async def _make(self, download: _Download) -> None:
        """The part file of one that does not come whole, in time for its first byte."""
        download.record, download.opened = await self._create(download.record, download.files)
        download.part.keep_free = self._shop.disk_reserve
        await self._keep(download)
        await self._start_digest(download)

    async def _create(self, record: FileRecord, files: TokenExecutor) -> tuple[FileRecord, PartFile]:
        """A new part file. The journal knows its name before it exists: a process that dies then leaves nothing that nobody knows of."""
        if not record.draft:
            record = await self._drafted(record)
        try:
            return record, await self._create_part(record, files)
        except LocalFileError as error:
            if error.code != ErrorCode.ERROR_FILE_EXISTS:
                raise
        record = await self._drafted(record)  # somebody has put something there
        return record, await self._create_part(record, files)

    async def _create_part(self, record: FileRecord, files: TokenExecutor) -> PartFile:
        """The owner chose the place. A helper who is another user would write wherever a link of the owner's leads by then (T8)."""
        chosen = self._chosen_by_another(files)
        return await PartFile.create(files, record.path, record.job_id, draft=record.draft, chosen_by_another=chosen)

    def _chosen_by_another(self, files: TokenExecutor) -> bool:
        owner = self._pair.owner
        return owner is None or owner.local.key != files.token.local.key

    async def _drafted(self, record: FileRecord) -> FileRecord:
        record = replace(record, draft=new_draft())
        await self._recorder.keep(record)
        return record

    async def _clear_away(self, record: FileRecord, acting: Token) -> None:
        """The part file of another identity, which acted here before flags or tokens were changed, is removed by that identity (T17)."""
        part = record.part
        for token in (self._pair.owner, self._pair.helper):
            if token is not None and part is not None and part.was_made_by(token) and not part.was_made_by(acting):
                with self._shop.executors.lease(token, "files") as files:
                    try:
                        await discard_part(files, record.path, part)
                    except BitsError as error:
                        log.warning("job %s: the part file %s stays: %s", record.job_id, part.path, error)

    async def _begin(self, download: _Download) -> None:
        """Find out where to go on. Of a part file with something in it the journal knows in which boot it is written, before anything is
        asked for; of a new one it knows the name, which is enough to remove it."""
        record = download.record
        if download.opened is None:
            return  # nothing is there to go on with
        if len(record.slices) > 1:
            await self._take_up_segments(download)
        else:
            position = await self._position(record, download.part)
            if position:  # else nothing is kept of that version, and any other is as good
                download.piece, download.validator = Slice(0, record.size, position, position), record.validator
        download.fresh = not download.count
        download.checkpoint_from = download.count
        if record.part is not None and record.boot_id != self._shop.boot_id:
            await self._keep(download)
        await self._start_digest(download)
        self._moved(download)

    async def _take_up_segments(self, download: _Download) -> None:
        """Only what was made durable counts: the length of a file with holes says nothing."""
        record = download.record
        kept = recover(record.slices, length=await download.part.length(), same_boot=False)
        if kept is not None and self._can_go_on(record.validator):
            download.segments, download.validator = kept, record.validator
        else:
            self._recorder.restarted(record.index, self._why_anew, changed=False)
            await download.part.truncate(0)

    async def _position(self, record: FileRecord, part: PartFile) -> int:
        """Where to go on: in the boot that wrote the file its length counts, after another boot only what was made durable."""
        if record.part is None:
            return 0  # it was made a moment ago
        length = await part.length()
        resumable = self._can_go_on(record.validator)
        if length and not resumable:
            self._recorder.restarted(record.index, self._why_anew, changed=False)
        durable = record.slices[0].durable if record.slices and resumable else 0
        if length < durable:
            self._recorder.restarted(record.index, "the part file is shorter than the journal says", changed=True)
            durable = 0
        elif resumable and record.boot_id == self._shop.boot_id:
            durable = length if record.size is None else min(length, record.size)
        if durable < length:
            await part.truncate(durable)  # also where all is fetched anew: what lies beyond is of no version
        return durable

    def _can_go_on(self, validator: Validator | None) -> bool:
        """Whether bytes of that version can be followed by more of the same version."""
        job = self._recorder.job
        return validator is not None and validator.resumable and not job.dynamic_content and job.http.plain

    @property
    def _why_anew(self) -> str:
        if not self._recorder.job.http.plain:
            return "only GET can be continued"
        return DYNAMIC if self._recorder.job.dynamic_content else NO_VALIDATOR

    async def _start_digest(self, download: _Download) -> None:
        if download.opened is None:
            return  # all of it is in memory when it is put away
        download.hashed = NO_DIGESTS if download.segments else _held_to(download)
        await download.part.start_digest(download.hashed.names, download.piece.written if download.hashed else 0)

    # -- fetching ---------------------------------------------------------------------------------------------------------------------

    async def _fetch(self, download: _Download, party: Party) -> None:
        while not download.complete:
            start = download.count
            try:
                await (self._request_segments if self._divisible(download) else self._request)(download, party)
            except _WrongBytes as wrong:
                await self._distrust(download, wrong)
            except FileChanged as change:
                weaker = download.condition.weaker(download.validator) if change.same and not download.segments else None
                if weaker is not None:
                    download.condition = weaker
                elif change.changed:
                    await self._restart(download, change.reason)
                else:
                    # the server cannot go on where we stopped; bounded by the number of broken connections
                    await self._anew(download, change.reason, changed=False)
            except Redirected as elsewhere:
                if download.validator is not None:
                    download.validator = download.validator.at_another_url()
                await self._rename(download, elsewhere.location)
                raise elsewhere.error from None
            except AlreadyComplete as done:
                if done.total != download.piece.written:
                    await self._restart(download, "the file's size on the server is another one")
                else:
                    if download.opened is None and download.whole is None:
                        await self._unpack(download)  # it is empty: a server refuses the first range of nothing
                    download.complete = True
            except BitsError as error:
                if not await self._back_to_original(download, error):
                    await self._reopen(download, error, download.count > start)

    async def _fetch_wanted(self, download: _Download, party: Party) -> None:
        """On demand: one stretch after the other of what was asked for; the file is transferred if that is all of it."""
        await self._begin_with_slices(download)
        while not await self._wanted_is_there(download, party):
            pass

    async def _wanted_is_there(self, download: _Download, party: Party) -> bool:
        """Fetch what is missing; False: it was wrong, and nothing is there."""
        while (gap := missing(download.record.wanted, download.slices, _size(download), download.record.position)) is not None:
            self._turn_to(download, *gap)
            try:
                await self._fetch(download, party)
            except BitsError as error:
                if error.code != ErrorCode.BG_E_INSUFFICIENT_RANGE_SUPPORT:
                    raise
                code, message = ErrorCode.BG_E_RANDOM_ACCESS_NOT_SUPPORTED, f"nothing can be fetched on demand: {error.message}"
                raise make_error(code, ErrorContext.REMOTE_FILE, message, url=download.record.url) from error
        await self._checkpoint(download)
        size = _size(download)
        if size is not None and complete(download.slices, size):
            download.piece, download.others = Slice(0, size, size, size), ()
            return await self._finished(download)
        return True

    async def _begin_with_slices(self, download: _Download) -> None:
        """As `_begin`; the length of a file with holes says nothing, so only what was made durable counts."""
        record, length = download.record, await download.part.length()
        kept = [Slice(each.start, each.durable, each.durable, each.durable) for each in record.slices]
        if self._can_go_on(record.validator) and all(each.durable <= length for each in kept):
            download.others, download.validator = filled(kept), record.validator
        elif length:
            self._recorder.restarted(record.index, self._why_anew, changed=False)
            await download.part.truncate(0)
        download.fresh = not download.others
        if record.part is None or record.boot_id != self._shop.boot_id:
            await self._keep(download)
        self._moved(download)

    def _turn_to(self, download: _Download, start: int, end: int | None) -> None:
        download.others, download.piece, download.complete = download.slices, Slice.fresh(start, end), False

    async def _request(self, download: _Download, party: Party) -> None:
        piece = download.piece
        if piece.end is not None and piece.written >= piece.end and piece.written > 0:
            download.complete = True
            return
        asked = self._asked(download)
        seam = piece.written - asked.start if download.condition is Condition.NONE and not asked.part else 0
        async with self._shop.network.get(party, asked) as body:
            if body.url != download.record.url and SecurityFlags.HTTP_REDIRECT_POLICY_ALLOW_REPORT in party.options.flags:
                await self._rename(download, body.url)
            await self._pin(download, asked, body)
            self._refuse_part(download, asked, body)
            self._recorder.answered()
            download.went_back = False
            first = await self._across_the_seam(download, body, seam)
            start = piece.written
            detached = None if first or download.opened is None else await body.detach()  # not what is one write
            if detached is None:
                await self._pump(download, piece, body, first)
            else:
                await self._receive(download, piece, body, detached, party.timeouts)
            if download.opened is None and (download.whole is None or body.content):
                await self._unpack(download)
            if not seam and body.content:
                await self._compare_content(download, body, start, piece.written)
        if body.length is None:
            download.complete = True  # only the end of the body says where the file ends
            if download.record.wanted and download.validator is not None:
                download.validator = replace(download.validator, size=piece.written)
        elif piece.end is not None:
            download.complete = piece.written >= piece.end

    def _divisible(self, download: _Download) -> bool:
        """Whether the rest of the file can be fetched in several ranges; what was begun so is also ended so."""
        size, record = _size(download), download.record
        if size is None or record.ranges or record.wanted or download.condition is not Condition.VERSION:
            return False
        wanted = download.segments or (download.abreast > 1 and size - download.count >= 2 * SEGMENT)
        return bool(wanted) and self._can_go_on(download.validator)

    async def _request_segments(self, download: _Download, party: Party) -> None:
        """Fetch the rest of the file in several ranges at once, each on a connection of its own, all of one version.

        The journal knows of all ranges before a byte is written in one of them.
        """
        size = _size(download)
        assert size is not None, "divisible"
        download.segments = divide(download.pieces, size, download.abreast, SEGMENT)
        await self._keep(download)
        await self._start_digest(download)
        rest = iter([piece for piece in download.segments if not piece.done])
        await _side_by_side([self._fetch_segments(download, rest, party) for _ in range(download.abreast)])
        download.piece, download.segments, download.complete = Slice(0, size, size, 0), (), True

    async def _fetch_segments(self, download: _Download, rest: Iterator[Slice], party: Party) -> None:
        for piece in rest:
            while not piece.done:
                end = min(piece.end or 0, piece.written + MAX_REQUEST)
                asked = Asked(download.record.url, piece.written, end, download.validator)
                async with self._shop.network.get(party, asked) as body:
                    self._refuse_elsewhere(asked, body)
                    start = piece.written
                    detached = await body.detach()
                    if detached is None:
                        await self._pump(download, piece, body)
                    else:
                        await self._receive(download, piece, body, detached, party.timeouts)
                    await self._compare_content(download, body, start, piece.written)

    def _asked(self, download: _Download) -> Asked:
        """The bytes to ask for next."""
        record, position, validator = download.record, download.piece.written, download.validator
        if record.wanted or record.ranges:
            return self._asked_part(download)
        if position and not self._recorder.job.http.plain:
            code, message = ErrorCode.BG_E_INVALID_SERVER_RESPONSE, "the server sent a part of the file, and only GET can ask for the rest"
            raise make_error(code, ErrorContext.REMOTE_FILE, message, url=record.url)
        end = download.piece.end
        limit = None if end is None or end - position <= MAX_REQUEST else position + MAX_REQUEST
        job = self._recorder.job
        if end is None and not position and download.abreast > 1 and job.http.plain and not job.dynamic_content:
            limit = SEGMENT  # the answer says whether there is enough for more ranges, and a version to ask them of
        start = max(0, position - SEAM) if download.condition is Condition.NONE else position
        return Asked(
            record.url,
            start,
            limit,
            validator,
            dynamic=self._recorder.job.dynamic_content,
            condition=download.condition,
            past_caches=record.refetches > 0 and not position,
        )

    def _asked_part(self, download: _Download) -> Asked:
        record, piece, validator = download.record, download.piece, download.validator
        if download.count and not self._can_go_on(validator):
            message = f"a file of ranges cannot be fetched: {self._why_anew}"
            raise make_error(ErrorCode.BG_E_INSUFFICIENT_RANGE_SUPPORT, ErrorContext.REMOTE_FILE, message, url=record.url)
        ranges = record.ranges or (FileRange(0, piece.end),)
        stretch = locate(ranges, piece.written, _size(download))
        return Asked(record.url, *stretch, validator, part=True, condition=download.condition, past_caches=record.refetches > 0)

    async def _pin(self, download: _Download, asked: Asked, body: Body) -> None:
        """The first answer names the version that every later one must be of.

        The journal knows it before the first byte is written, unless all that is asked for comes in one write: then it hears of both
        together, and what a kill takes in between is no more than that.
        """
        self._refuse_elsewhere(asked, body)
        at_once = body.length is not None and body.length <= _batch(self._recorder.levels)
        if download.validator is None or download.validator.size is None:
            self._refuse_outside(download.record, body.total)
            named = body.url == download.record.url  # a redirect may lead elsewhere next time, and an ETag is of its own resource only
            served = body.validator if named else body.validator.at_another_url()
            download.validator = served if served.size == body.total else replace(served, size=body.total)
            if download.piece.end is None or not download.record.wanted:
                download.piece.end = local_size(download.record.ranges, body.total)
            if not at_once:
                await (self._keep if download.opened else self._make)(download)
        elif body.validator.digests != download.validator.digests:
            download.validator = replace(download.validator, digests=body.validator.digests)  # journalled at the next checkpoint
        if download.hashed != _held_to(download) and not download.record.wanted:
            await self._start_digest(download)
        self._refuse_too_large(download, download.count + (download.piece.remaining or 0))

    def _refuse_elsewhere(self, asked: Asked, body: Body) -> None:
        if body.start != asked.start:
            raise make_error(ErrorCode.BG_E_INVALID_SERVER_RESPONSE, ErrorContext.REMOTE_FILE, "the answer starts elsewhere", url=body.url)

    def _refuse_part(self, download: _Download, asked: Asked, body: Body) -> None:
        """A first range is of no use where the next cannot be of the same version: then the file comes in one stream."""
        rest = download.piece.remaining
        if asked.part or asked.end is None or None in (rest, body.length) or body.length == rest or self._can_go_on(download.validator):
            return
        download.abreast = 1
        raise FileChanged(None, self._why_anew, changed=False)

    def _refuse_outside(self, record: FileRecord, size: int | None) -> None:
        for each in record.wanted or record.ranges:
            if size is not None and each.reaches_beyond(size):
                message = f"the range from byte {each.initial_offset} is not in the file, which has {size} bytes"
                raise make_error(ErrorCode.BG_E_INVALID_RANGE, ErrorContext.REMOTE_FILE, message, url=record.url)

    def _refuse_too_large(self, download: _Download, size: int) -> None:
        """With `size` bytes of this file the job would have more than it may (its maximum download size)."""
        most = self._recorder.job.maximum_download_size
        if most is None:
            return
        others = self._recorder.known_size - (self._recorder.files[download.index].size or 0)
        if others + size > most:
            message = f"the job may have {most} bytes, and its files have at least {others + size}"
            code = ErrorCode.BG_E_MAX_DOWNLOAD_SIZE_LIMIT_REACHED
            raise make_error(code, ErrorContext.REMOTE_FILE, message, url=download.record.url)

    async def _across_the_seam(self, download: _Download, body: Body, seam: int) -> bytes:
        """The first `seam` bytes of the body are in the part file already, if it is the same file; returns what came behind them."""
        if not seam:
            return b""
        there, came = await download.part.read(download.piece.written - seam, seam), b""
        async for chunk in body:
            came += chunk
            if came[:seam] != there[: len(came)]:
                raise FileChanged(None, "the bytes before the place where it goes on are not those that were fetched")
            if len(came) > seam:
                return came[seam:]
        raise FileChanged(None, "the server sends too little to go on with", changed=False)

    async def _compare_content(self, download: _Download, body: Body, start: int, end: int) -> None:
        """What the server said of this one part, which was written to [start, end)."""
        expected = body.content.one()
        for name in expected.names if end - start == body.length else ():
            found = await download.part.digest_of(name, start, end)
            if found != expected.of(name):
                raise _WrongBytes(f"{name} of a part of the file is {found}, the server said {expected.of(name)}", found)

    async def _pump(self, download: _Download, piece: Slice, body: Body, first: bytes = b"") -> None:
        chunks, batch, size = aiter(body), [first] if first else [], len(first)
        clock, began = self._shop.clock, self._shop.clock.monotonic()
        levels = self._recorder.levels
        limits = Chain(*levels)
        most = _batch(levels)
        try:
            while (chunk := await _next(chunks, WRITE_AFTER if batch and size != body.length else None)) is not None:
                if chunk:
                    if piece.end is None:
                        self._refuse_too_large(download, download.count + size + len(chunk))
                    began = began if batch else clock.monotonic()
                    batch.append(chunk)
                    size += len(chunk)
                if size >= most or not chunk or clock.monotonic() - began >= WRITE_WITHIN:
                    full, moved, batch, size = batch, size, [], 0
                    await self._write(download, piece, full)
                    await self._rest(limits, moved)
                    if self._recorder.levels != levels:
                        levels = self._recorder.levels
                        limits = Chain(*levels)
                    most = _batch(levels)
        finally:
            if batch:
                if limits.limited:
                    limits.acquire(size)  # paid for by those who come next
                await self._write(download, piece, batch)  # what has arrived is kept, whatever ended the body

    async def _rest(self, limits: Chain, moved: int) -> None:
        """Wait until these bytes are paid for."""
        if limits.limited:
            for seconds in limits.rests(moved):
                await self._shop.clock.sleep(seconds)

    async def _write(self, download: _Download, piece: Slice, batch: Sequence[bytes]) -> None:
        if download.opened is None:
            if not piece.written and piece.end == sum(map(len, batch)):
                download.whole = batch
                piece.advance(piece.end)
                return
            await self._make(download)
        try:
            await download.part.append(piece, batch)
        finally:
            self._moved(download)
        await self._checkpoint_when_due(download)

    async def _receive(self, download: _Download, piece: Slice, body: Body, detached: Detached, timeouts: Timeouts) -> None:
        """The fast way: a thread of the file token moves the rest of the body from its socket; here it is only watched."""
        start = piece.written
        try:
            while not await self._move(download, piece, _behind(detached, piece.written - start), timeouts):
                pass
        except BitsError as error:
            raise error.located(url=body.url) from None
        finally:
            body.reattach(piece.written - start)

    async def _move(self, download: _Download, piece: Slice, detached: Detached, timeouts: Timeouts) -> bool:
        """True: all is there. False: other limits hold, or there was none and one was set (or the reverse): the rest goes another way."""
        levels = self._recorder.levels
        limits, pace = limiter(*levels), Pace(timeouts)
        move = asyncio.ensure_future(download.part.receive(detached, piece, limits, None, idle=timeouts.idle, pace=pace))
        try:
            while not move.done():
                await asyncio.wait({move}, timeout=LOOK)
                self._moved(download)
                await self._checkpoint_when_due(download)
                others = self._recorder.levels != levels or (limits is None) == any(level.rate is not None for level in levels)
                if others and not move.done():
                    return False
            move.result()
            return True
        finally:
            await _ended(move)
            self._moved(download)

    def _moved(self, download: _Download) -> None:
        self._recorder.moved(download.index, download.count)

    async def _checkpoint_when_due(self, download: _Download) -> None:
        if self._recorder.job.high_performance or download.is_all_there:
            return  # what is all there is made durable at once, as a whole file
        clock, count = self._shop.clock, download.count
        if count - download.checkpoint_from >= CHECKPOINT_BYTES or clock.monotonic() - download.checkpoint_at >= CHECKPOINT_SECONDS:
            download.checkpoint_at, download.checkpoint_from = clock.monotonic(), count  # segments have one checkpoint between them
            await self._checkpoint(download)

    async def _checkpoint(self, download: _Download) -> None:
        count, written = download.count, [(each, each.written) for each in download.pieces]  # before the sync: threads may write on
        await download.part.sync()
        for piece, position in written:
            piece.checkpoint(max(position, piece.durable))  # another segment's checkpoint may have been later and quicker
        await self._keep(download)
        download.checkpoint_at = self._shop.clock.monotonic()
        download.checkpoint_from = count

    async def _keep(self, download: _Download, *, transferred: bool = False) -> None:
        record, part = download.record, download.opened.record if download.opened else None
        download.record = replace(
            record,
            validator=download.validator,
            part=part,
            draft=record.draft if record.part == part else new_draft(),  # each name is used once
            slices=download.slices if part else (),
            boot_id=self._shop.boot_id,
            transferred=transferred,
            validated=False,
        )
        await self._recorder.keep(download.record)

    # -- when it does not go straight ---------------------------------------------------------------------------------------------------

    async def _reopen(self, download: _Download, error: BitsError, moved: bool) -> None:
        """Open a connection that broke after new bytes, or after another file, again, a few times for each file that comes in; anything
        else ends the attempt. Several that break together (a server that is restarted) count as one, once for each file.

        Several connections at once may be more than a server or the way there bears: then half of them are tried first.
        """
        if download.segments and download.abreast > 1 and error.transient and not isinstance(error, LocalFileError):
            download.abreast //= 2
            return
        progress = moved or self._arrivals > download.arrivals_seen
        together = self._resting > 0 and not download.broke_with_others
        again = progress and (together or self._reconnects < RECONNECTS)
        if not (isinstance(error, NetworkError) and error.transient and again):
            raise error
        if not self._recorder.job.http.plain:
            raise error  # only the application knows whether such a request may be made twice
        self._reconnects += not together
        download.broke_with_others = download.broke_with_others or together
        download.arrivals_seen = self._arrivals
        delay = RECONNECT_DELAYS[max(0, self._reconnects - 1)]
        self._recorder.retrying(self._reconnects, delay, error)
        self._resting += 1
        try:
            await self._shop.clock.sleep(delay)
        finally:
            self._resting -= 1
        if not self._can_go_on(download.validator):
            await self._anew(download, self._why_anew, changed=False)

    async def _back_to_original(self, download: _Download, error: BitsError) -> bool:
        """Where the redirect policy reported where the file is, and it is there no more: ask the name that the application gave, once."""
        record = download.record
        reported = SecurityFlags.HTTP_REDIRECT_POLICY_ALLOW_REPORT in self._recorder.job.http.flags and record.url != record.original_url
        if not reported or download.went_back or error.http_status not in GONE:
            return False
        download.went_back = True
        await self._rename(download, record.original_url)
        return True

    async def _distrust(self, download: _Download, wrong: _WrongBytes) -> None:
        """Throw wrong bytes away and fetch the file anew: a few times, and not if the same wrong bytes came twice, which is no accident."""
        record = download.record
        if not self._recorder.job.http.plain or record.refetches >= REFETCHES or wrong.found == record.wrong_digest:
            await self._refuse(download, wrong.message)
        download.record = replace(record, refetches=record.refetches + 1, wrong_digest=wrong.found)
        await self._anew(download, wrong.message, changed=False)

    async def _rename(self, download: _Download, url: str) -> None:
        """The redirect policy reports where the file is. What is too long to be the name of a file in a job is not kept."""
        if url != download.record.url and len(url) <= MAX_URL:
            download.record = replace(download.record, url=url)
            if download.validator is not None:
                download.validator = download.validator.at_another_url()
            await self._keep(download)

    async def _restart(self, download: _Download, reason: str) -> None:
        """The remote file is another one: fetch this file anew, a bounded number of times."""
        record = download.record
        if record.restarts >= FILE_RESTARTS:
            message = f"the file changed {record.restarts + 1} times while it was fetched: {reason}"
            code = ErrorCode.BG_E_REMOTE_FILE_CHANGED
            raise make_error(code, ErrorContext.REMOTE_FILE, message, url=record.url, identity=self._asking)
        download.record = replace(record, restarts=record.restarts + 1)
        await self._anew(download, reason, changed=True)

    async def _anew(self, download: _Download, reason: str, *, changed: bool) -> None:
        log.info("job %s: %s is fetched anew: %s", download.record.job_id, show_url(download.record.url), reason)
        if download.opened is not None:
            await download.part.truncate(0)  # before the journal hears of it: bytes of one version are never taken for another's
        download.whole = None
        if download.segments and not changed:
            download.abreast = 1  # the server does not serve ranges as it should
        download.piece, download.others, download.segments = Slice(0, None, 0, 0), (), ()
        download.complete = bool(download.record.wanted)  # with this piece; the next one is chosen anew
        download.validator = None
        download.fresh = True
        download.checkpoint_from = 0
        await self._keep(download)
        await self._start_digest(download)
        self._recorder.restarted(download.index, reason, changed=changed)
        self._recorder.moved(download.index, 0)

    # -- the end ------------------------------------------------------------------------------------------------------------------------

    async def _finished(self, download: _Download) -> bool:
        """Every byte is there: make it durable, check the ends, journal it. False: it is wrong, and to be fetched anew."""
        piece, record = download.piece, download.record
        length = await download.part.sync()
        if length != piece.written or (piece.end is not None and length != piece.end):
            message = f"the part file has {length} bytes instead of {piece.end if piece.end is not None else piece.written}"
            await self._refuse(download, message)
        try:
            await self._compare(download)
        except _WrongBytes as wrong:
            await self._distrust(download, wrong)
            return False
        known = download.validator or Validator(None, None, None)
        download.validator = known if record.ranges and known.size is not None else replace(known, size=length)
        piece.end = length
        piece.durable = piece.written
        await self._keep(download, transferred=True)
        return True

    async def _compare(self, download: _Download) -> None:
        expected = _held_to(download)
        if expected and (download.hashed != expected or download.part.digest_position != download.piece.written):
            await self._start_digest(download)  # what came out of order is read once more
        for name in expected.names:
            found = await download.part.digest(name)
            if found != expected.of(name):
                who = "expected" if download.record.digests else "the server said"
                raise _WrongBytes(f"{name} is {found}, {who} {expected.of(name)}", found)

    async def _refuse(self, download: _Download, message: str) -> None:
        """Wrong bytes are thrown away."""
        record = download.record
        await self._discard(download)
        raise ValidationFailed(message, url=record.url, path=record.path, identity=self._asking)

    async def _discard(self, download: _Download) -> None:
        """The part file goes; a resume fetches the file anew."""
        await download.part.discard()
        download.piece, download.others, download.segments = Slice(0, None, 0, 0), (), ()  # nothing is left for a last checkpoint
        download.record = replace(download.record, part=None, slices=(), validator=None, boot_id=None)
        await self._recorder.keep(download.record)
        self._recorder.moved(download.index, 0)

    async def _unmake(self, download: _Download) -> None:
        """A part file of which the journal has no more than the name. What cannot be deleted it is told of, for whoever cancels the job."""
        try:
            await download.part.discard()
        except BitsError:
            await self._keep(download)

    async def _close(self, download: _Download, part: PartFile) -> None:
        """The last checkpoint of a stopped download; an attempt that wrote nothing leaves no part file."""
        record = download.record
        try:
            if record.part is None and not download.count:
                await self._unmake(download)
            elif download.fresh and not download.count and not record.transferred:
                await self._discard(download)
            elif record.transferred or not download.at_risk:
                pass
            elif not self._recorder.job.high_performance or record.wanted:
                await self._checkpoint(download)
            elif record.validator is None:
                await self._keep(download)  # which version it is: after a mere stop the part file's length says how far
        except BitsError as error:
            level = logging.INFO if isinstance(error, StoreError) else logging.WARNING  # of its journal the engine speaks, once for all
            log.log(level, "job %s: the last checkpoint failed, a resume repeats some bytes: %s", record.job_id, error)
            if record.part is None and download.count:
                with suppress(BitsError):
                    await self._unmake(download)
        finally:
            await part.close()
