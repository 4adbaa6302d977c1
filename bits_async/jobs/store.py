"""The journal of jobs: SQLite, opened only when nobody else can have written it, durable when `save` returns.

A journal is an authority: it says which files are written as whom (threat model T13). So it is opened only from private
files (`journal_files`), `trusted_schema` is off, and what must not be read from a copy is sealed (`rows`): passwords, and of each
URL its query (and user information, should a redirect have brought one). Everything else is a typed column (`schema`, `columns`).

Durable means: one transaction in the write-ahead log, synced (`synchronous=FULL`) before `save` returns. A `save` that is
cancelled is still finished first, so nobody has to guess what the journal holds.

A journal of ours that turns out to be damaged is set aside, never deleted: all its files get the name `<store>.damaged-<time>`
(with their endings, so that it can be opened there, or recovered with sqlite3), the log says so at ERROR, and a new one is
begun, because an operator wants the service back and the jobs that can be recovered later. It is found when the journal is
opened (the first page, the tables, and after a process that died every page); what is found while it is in use fails that
manager, and the journal is set aside when it is closed. A file that was never ours is refused and left alone, and so are a
journal of a later version and one that somebody else may have written.

An older journal is brought up to date when it is opened.

Questions run in aiosqlite's thread; transactions, looking at files, sealing and building records in one thread of the store's
own, never on the event loop. A transaction is one hop with all its statements: with a hop for each, small files cost more for
their hops than for their bytes. aiosqlite logs parameters at DEBUG, so a secret is sealed before it gets there. This module knows
no manager, no token, no network.
"""

import asyncio
import contextlib
import json
import logging
import os
import sqlite3
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Protocol, TypeVar, final
from uuid import UUID, uuid4

import aiosqlite

from ..clock import finish
from ..errors import BitsError, ErrorCode, InvalidState, NotFound, StoreError, scrub
from . import statements
from .columns import EPOCH, MICROSECOND, Row, Values, column_value, maybe_time, owner_text, row_of, text_out
from .journal_files import JournalFiles
from .keys import KeySource
from .model import RETRY_DELAY_FLOOR, Change, JobPriority, OwnerKey, StoredJob
from .rows import Batch, Lost, Reader, Writer
from .schema import APPLICATION_ID, COLUMNS, SCHEMA, columns_of
from .secrets import SecretBox

log = logging.getLogger("bits_async.jobs")

T = TypeVar("T")
StrPath = str | os.PathLike[str]

BUSY_TIMEOUT: Final = 10.0  # seconds; only an operator's sqlite3 shell can hold the database besides us

# Set and read back: a SQLite that does not know one of them is refused.
PRAGMAS: Final = (
    ("trusted_schema", "OFF", 0),  # T13
    ("secure_delete", "ON", 1),  # T13: what is removed is overwritten
    ("cell_size_check", "ON", 1),
    ("foreign_keys", "ON", 1),
    ("temp_store", "MEMORY", 2),  # no temporary file in a directory of others
    ("synchronous", "FULL", 2),
    ("fullfsync", "ON", 1),  # macOS: to the medium, not to its cache
    ("checkpoint_fullfsync", "ON", 1),
)

_FULL: Final = (ErrorCode.ERROR_DISK_FULL, "the volume is full", "make room on the volume of the journal, then try again")
_FAULTS: Final[Mapping[int, tuple[int, str, str | None]]] = MappingProxyType(  # by SQLite's primary result code, or its extended one
    {
        sqlite3.SQLITE_FULL: _FULL,
        sqlite3.SQLITE_IOERR_SHMSIZE: _FULL,  # the index of the log could not be made longer
        sqlite3.SQLITE_READONLY: (ErrorCode.ERROR_WRITE_FAULT, "it cannot be written", "make its file system writable, then try again"),
        sqlite3.SQLITE_CANTOPEN: (ErrorCode.ERROR_WRITE_FAULT, "it cannot be opened", "check its directory, then try again"),
        sqlite3.SQLITE_IOERR: (
            ErrorCode.ERROR_WRITE_FAULT,
            "reading or writing failed",
            "check the volume of the journal and its quota, then try again",
        ),
        sqlite3.SQLITE_BUSY: (ErrorCode.ERROR_SHARING_VIOLATION, "another program holds it", "end that program, then try again"),
        sqlite3.SQLITE_LOCKED: (ErrorCode.ERROR_SHARING_VIOLATION, "another program holds it", "end that program, then try again"),
        sqlite3.SQLITE_CORRUPT: (ErrorCode.BG_E_DATABASE_CORRUPT, "it is damaged", None),
        sqlite3.SQLITE_NOTADB: (ErrorCode.BG_E_DATABASE_CORRUPT, "it is no database", None),
    }
)


# What may be over without anybody's looking at the journal itself.
_TRANSIENT: Final = frozenset(number & 0xFF for number in _FAULTS) - {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}

PROBE_BYTES: Final = 64 << 10  # bytes; more than any single change of a job takes


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a journal has to offer at its opening: what it has none of need not be asked for."""

    turn: int  # the highest that a job has had; 0: none
    queued: frozenset[JobPriority]  # priorities of QUEUED jobs
    moment: datetime | None  # the first at which a job is due
    awaiting: bool  # jobs in TRANSIENT_ERROR without a next attempt: they wait for an event
    owing: bool  # jobs with a command that is to be run


class Store(Protocol):
    """What the manager needs of a journal."""

    @property
    def path(self) -> Path:
        """Where it is."""

    @property
    def fingerprint_key(self) -> bytes:
        """The key for `credential_fingerprint`; valid while the journal is open."""

    @property
    def lost_secrets(self) -> frozenset[UUID]:
        """Of the jobs that were loaded: those with a secret that the journal's key does not open."""

    async def open(self) -> None:
        """Takes the journal's lock and makes it ready.

        Raises:
            StoreError: another manager holds it, somebody else may have written it, or it cannot be read. It is left as it was.
        """

    async def recover(self, now: datetime, lost_helper: BitsError) -> Outlook:
        """Put what the last manager left behind in order, before anything is loaded: jobs that were at work are QUEUED, unfinished ones
        with helper flags are in ERROR with `lost_helper` (each as its own job's), no retry is farther off than its delay, because the
        wall clock may have been changed, and who waits for an event has the rest of his time before him. Returns what is there then.
        """

    async def load(self, job_ids: Collection[UUID] | None = None) -> list[StoredJob]:
        """These jobs, without those that are not there; None: all. In the order in which they were created.

        A grant whose password cannot be read is left out; a URL whose query cannot be read comes without it; custom headers that
        cannot be read come as None. `lost_secrets` names
        the jobs. What is sealed stays in the journal until it is replaced, so bringing the key back brings the secrets back.
        """

    async def in_line(self, priority: JobPriority, *, dynamic: bool, absent: Collection[OwnerKey], count: int) -> list[UUID]:
        """The QUEUED jobs of a class that come next, in order: the least turn first, of equal turns the oldest.

        Args:
            dynamic: False: those with dynamic content are passed over.
            absent: owners whose jobs are passed over.
            count: how many at most.
        """

    async def is_busy(self) -> bool:
        """Whether a job is QUEUED, CONNECTING, TRANSFERRING or TRANSIENT_ERROR."""

    async def due(self, now: datetime, count: int) -> list[UUID]:
        """Jobs in TRANSIENT_ERROR whose next attempt is due, or that give up waiting, the longest due first, so many at most."""

    async def next_due(self, after: datetime) -> datetime | None:
        """The next moment after that one at which a job is due; None: there is none."""

    async def shift_retries(self, by: timedelta) -> None:
        """Every such moment is by so much later: the wall clock was changed."""

    async def hasten_retries(self, now: datetime) -> None:
        """Every next attempt is due."""

    async def awaiting(self, after: int, count: int) -> list[tuple[int, UUID]]:
        """Jobs in TRANSIENT_ERROR without a next attempt: they wait for an event. In the order of their creation, from behind the one
        with that number; so many at most."""

    async def owing(self, after: int, count: int) -> list[tuple[int, UUID]]:
        """Jobs with a command that is to be run, in the order of their creation, from behind the one with that number; so many at most."""

    async def longest_untouched(self, count: int, *, elevated: bool) -> list[tuple[UUID, datetime]]:
        """The jobs of elevated owners, or of others, that have not been changed for longest, so many at most, with the time of that."""

    async def numbered(self, after: int, *, owner_sid: str | None, count: int) -> list[tuple[int, UUID]]:
        """Jobs (None: of any owner) in the order of their creation, from behind the one with that number; so many at most."""

    async def last_number(self) -> int:
        """Of the youngest job; 0: there is none."""

    async def count(self, *, owner_sid: str | None, most: int) -> int:
        """How many jobs there are (None: of any owner); counts no further than `most`."""

    async def with_destination(self, path: Path, *, owner_sid: str) -> list[UUID]:
        """Jobs of that owner with a file for that path, oldest first."""

    async def sessions_of(self, *, owner_sid: str) -> frozenset[str]:
        """The logon sessions that the tokens were tied to with which this owner made his jobs."""
        ...

    async def with_helper(self, *, owner_sid: str) -> list[UUID]:
        """Unfinished jobs of that owner, not in ERROR, whose helper flags are not 0."""

    async def save(self, *changes: Change) -> None:
        """All changes, in this order, or none of them; durable when it returns. Cancelled, it is finished first.

        Raises:
            NotFound: a file or a grant of a job that is not in the journal.
            StoreError: nothing was saved.
        """

    async def probe(self) -> None:
        """Writes and removes `PROBE_BYTES`.

        Raises:
            StoreError: that could not be done; `transient`: it may be possible later.
        """

    async def close(self) -> None:
        """Gives the journal back. Nothing happens if it is not open."""


@final
class SqliteStore:
    """The journal in a SQLite file. The constructor does no I/O; open it once at a time, on one event loop.

    Args:
        path: the database.
        make_parents: make every missing directory above it (0700), not only the last one. For places that this package chooses
            itself; in a path that somebody typed, a missing directory is rather a mistake.
        key: where its key comes from.
    """

    def __init__(self, path: StrPath, *, make_parents: bool = False, key: KeySource = KeySource.file()) -> None:  # noqa: B008 - frozen
        whole = path if os.path.isabs(path) else os.path.join(os.getcwd(), path)
        self._files = JournalFiles(Path(os.path.normpath(whole)), make_parents=make_parents)
        self._key = key
        self._box: SecretBox | None = None
        self._db: aiosqlite.Connection | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._damage: StoreError | None = None  # what SQLite, or a look at what it holds, has found
        self._turn = asyncio.Lock()
        self._waiting: list[_Waiting] = []
        self._lost = Lost()

    def __repr__(self) -> str:
        return f"<SqliteStore {self.path}>"

    @property
    def path(self) -> Path:
        """The database, absolute."""
        return self._files.path

    @property
    def fingerprint_key(self) -> bytes:
        """Key for fingerprints of credentials (T7). It changes when the key file is lost."""
        if self._box is None:
            raise self._closed()
        return self._box.fingerprint_key

    @property
    def lost_secrets(self) -> frozenset[UUID]:
        """Jobs with a secret that this key does not open, until it is replaced or removed."""
        return self._lost.jobs()

    @property
    def set_aside(self) -> Path | None:
        """Where the journal is that was found damaged when this one was opened or closed; None: it was not."""
        return self._files.set_aside

    # -- open and close

    async def open(self) -> None:
        """See `Store.open`."""
        if self._pool is not None:
            raise InvalidState("the journal is already open", path=self.path)
        self._pool = ThreadPoolExecutor(1, "bits-store")
        self._damage = self._files.set_aside = None
        self._turn = asyncio.Lock()  # one connection: the statements of two transactions must not mix
        try:
            await finish(self._open())
        except BaseException:
            await finish(self._shut())
            raise
        self._files.keep()

    async def close(self) -> None:
        """See `Store.close`."""
        await finish(self._shut())

    async def remove(self) -> bool:
        """Deletes the journal's files, the lock last, if no job is in it and no other manager uses it. It is closed afterwards.

        Returns:
            Whether the journal is gone.

        Raises:
            StoreError: a file could not be deleted.
        """
        if self._pool is None:
            try:
                await self.open()
            except StoreError as error:
                if error.code == ErrorCode.ERROR_SHARING_VIOLATION:
                    return False
                raise
        return await finish(self._remove())

    async def _remove(self) -> bool:
        async with self._turn:
            db, _ = self._opened()
            with self._translated():
                empty: bool = (await statements.fetch(db, "SELECT NOT EXISTS (SELECT * FROM jobs) AS empty"))[0]["empty"] == 1
        await self._shut(remove=empty)
        return empty

    async def _open(self) -> None:
        await self._in_thread(self._files.claim)
        try:
            await self._open_database()
        except StoreError as error:
            if not self._is_damage(error):
                raise
            if not await self._in_thread(self._files.is_ours):
                self._damage = None
                raise
            await self._put_aside(error)
            await self._in_thread(self._files.make)
            await self._open_database()
        await self._in_thread(self._files.check)

    async def _open_database(self) -> None:
        died = await self._in_thread(self._files.has_log)
        with self._translated():
            self._db = await aiosqlite.Connection(self._connect, iter_chunk_size=64)
            self._db.row_factory = sqlite3.Row
            await self._identify(self._db)
            await self._configure(self._db)
            if died:
                await self._examine(self._db)
            await self._migrate(self._db)
            self._box = SecretBox(await self._load_key(self._db))

    async def _load_key(self, db: aiosqlite.Connection) -> bytes:
        """From the place that the journal remembers; a new journal, and one of a version that did not, is told now."""
        settings = {
            row["name"]: row["value"] for row in await statements.fetch(db, "SELECT name, value FROM settings WHERE name <> 'probe'")
        }
        if not settings and await self._in_thread(self._files.side(".key").exists):
            settings = {"key_source": str(KeySource.file()), "key_id": uuid4().hex}
        settings = settings or {"key_source": str(self._key), "key_id": uuid4().hex}
        self._key.check(settings["key_source"], self.path)
        key = await self._in_thread(partial(self._key.load, self._files.side(".key"), settings["key_id"]))
        rows = [{"name": name, "value": value} for name, value in settings.items()]
        await self._in_thread(partial(statements.each, self._raw, "INSERT OR IGNORE INTO settings VALUES (:name, :value)", rows))
        return key

    async def _close_database(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            with self._translated():
                await db.close()

    def _connect(self) -> sqlite3.Connection:
        """Two threads use it, never both at once (`_turn`): aiosqlite's asks single questions, ours makes whole transactions."""
        self._raw = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False)
        return self._raw

    # -- a damaged journal

    async def _examine(self, db: aiosqlite.Connection) -> None:
        """Reads every page.

        Raises:
            StoreError: one is damaged.
        """
        (found,) = (await statements.fetch(db, "PRAGMA quick_check(1)"))[0]
        if found != "ok":
            raise self._damaged("it is damaged (quick_check)")

    async def _put_aside_if_damaged(self, db: aiosqlite.Connection) -> None:
        """After a fault while it was in use: the file is looked at once more, because a fault need not be the disk's."""
        self._damage = None
        try:
            with self._translated():
                await self._examine(db)
        except StoreError as error:
            if self._is_damage(error):
                await self._put_aside(error)

    async def _put_aside(self, error: StoreError) -> None:
        """Another name for every file of the journal, and the connection is closed. Each has the new name before SQLite closes the
        database, which removes the log, and before the first loses the old one: a log beside a missing database would be removed."""
        names = await self._in_thread(self._files.name_aside)
        with contextlib.suppress(StoreError):  # it may try to write the log back
            await self._close_database()
        await self._in_thread(partial(self._files.let_go, names))
        self._damage = None
        log.error("%s: %s; it was set aside as %s, and a new journal is begun", self.path, error.message, self._files.set_aside)

    async def _identify(self, db: aiosqlite.Connection) -> None:
        """Refuses another program's database and a later version's journal, before anything is changed."""
        await db.execute_fetchall("PRAGMA trusted_schema=OFF")
        application, version = await statements.pragma(db, "application_id"), await statements.pragma(db, "user_version")
        tables = (await statements.fetch(db, "SELECT count(*) AS n FROM sqlite_master"))[0]["n"]
        if (application, version, tables) != (0, 0, 0) and (application != APPLICATION_ID or version < 1):
            raise StoreError("this is not a journal of jobs", path=self.path, advice="name another file as the journal")
        if version > len(SCHEMA):
            raise StoreError(
                f"the journal has version {version}; this program knows versions up to {len(SCHEMA)}",
                code=ErrorCode.E_NOTIMPL,
                path=self.path,
                advice="open it with the newer program that wrote it",
            )

    async def _configure(self, db: aiosqlite.Connection) -> None:
        if await statements.pragma(db, "journal_mode=WAL") != "wal":
            raise StoreError(
                "its file system cannot hold a write-ahead log",
                code=ErrorCode.ERROR_WRITE_FAULT,
                path=self.path,
                advice="put the journal on a local disk",
            )
        for name, setting, value in PRAGMAS:
            await db.execute_fetchall(f"PRAGMA {name}={setting}")
            if await statements.pragma(db, name) != value:
                raise StoreError(
                    f"this SQLite ({sqlite3.sqlite_version}) does not know the setting {name}",
                    code=ErrorCode.E_NOTIMPL,
                    path=self.path,
                    advice="use SQLite 3.31 or later",
                )

    async def _migrate(self, db: aiosqlite.Connection) -> None:
        known: int = await statements.pragma(db, "user_version")
        found = {(row["tab"], row["col"]) for row in await statements.fetch(db, COLUMNS)}
        if missing := await self._in_thread(partial(columns_of, SCHEMA[:known])) - found:
            raise self._damaged(f"it has no {'.'.join(min(missing))}, which version {known} has")
        for version in range(known, len(SCHEMA)):
            await db.executescript(  # one transaction for each step: an interrupted one never happened
                f"BEGIN IMMEDIATE; {SCHEMA[version]}PRAGMA application_id={APPLICATION_ID}; PRAGMA user_version={version + 1}; COMMIT;"
            )

    async def _shut(self, *, remove: bool = False) -> None:
        pool, db = self._pool, self._db
        if pool is None:
            return
        try:
            if db is not None:
                async with self._turn:  # a save that is under way is finished first
                    if self._damage is not None:
                        await self._put_aside_if_damaged(db)
                    await self._close_database()
            if remove:
                await self._in_thread(self._files.delete)
            await self._in_thread(self._files.unmake)
        finally:
            await self._in_thread(partial(self._files.release, remove=remove))
            self._pool, self._box = None, None
            pool.shutdown(wait=False)  # it is idle: nothing is waited for on the event loop

    # -- load

    async def load(self, job_ids: Collection[UUID] | None = None) -> list[StoredJob]:
        """See `Store.load`."""
        return [] if job_ids is not None and not job_ids else await finish(self._load(job_ids))

    async def _load(self, job_ids: Collection[UUID] | None) -> list[StoredJob]:
        which = {} if job_ids is None else {"ids": json.dumps([str(job_id) for job_id in job_ids])}
        async with self._turn:
            db, box = self._opened()
            with self._translated():
                rows = [await statements.fetch(db, sql, which) for sql in statements.select(some=job_ids is not None)]
            reader = Reader(box, self.path)
            stored = await self._in_thread(partial(reader.jobs, *rows))
            self._lost.forget({each.job.id for each in stored})
            self._lost.add(reader.lost)
            return stored

    # -- asked of all jobs: by index, without loading them

    async def recover(self, now: datetime, lost_helper: BitsError) -> Outlook:
        """See `Store.recover`."""
        error = row_of(**{f"error_{name}": value for name, value in lost_helper.fields().items() if name != "job_id"})
        await finish(self._recover(error | {"now": column_value(now), "floor": RETRY_DELAY_FLOOR}))
        return await self._outlook()

    async def _recover(self, values: Values) -> None:
        async with self._turn:
            self._opened()
            with self._translated():
                await self._in_thread(partial(self._put_in_order, values))

    def _put_in_order(self, values: Values) -> None:
        lost = ", ".join(f"{column} = :{column}" for column in values if column.startswith("error_"))
        with statements.all_or_nothing(self._raw) as db:
            for sql in (*statements.RECOVERY, statements.LOST_HELPERS.format(error=lost)):
                db.execute(sql, values)

    async def _outlook(self) -> Outlook:
        row = (await self._ask(statements.OUTLOOK, priorities=json.dumps([each.value for each in JobPriority])))[0]
        queued = frozenset(map(JobPriority, json.loads(row["queued"])))
        return Outlook(row["turn"], queued, maybe_time(row["moment"]), bool(row["awaiting"]), bool(row["owing"]))

    async def in_line(self, priority: JobPriority, *, dynamic: bool, absent: Collection[OwnerKey], count: int) -> list[UUID]:
        """See `Store.in_line`."""
        keys = json.dumps([owner_text(key) for key in absent])
        rows = await self._ask(statements.IN_LINE, priority=priority, dynamic=dynamic, absent=keys, count=count)
        return [UUID(row["id"]) for row in rows]

    async def is_busy(self) -> bool:
        """See `Store.is_busy`."""
        return bool((await self._ask(statements.IS_BUSY))[0]["busy"])

    async def due(self, now: datetime, count: int) -> list[UUID]:
        """See `Store.due`."""
        return [UUID(row["id"]) for row in await self._ask(statements.DUE, now=now, count=count)]

    async def next_due(self, after: datetime) -> datetime | None:
        """See `Store.next_due`."""
        return maybe_time((await self._ask(statements.NEXT_DUE, after=after))[0]["moment"])

    async def shift_retries(self, by: timedelta) -> None:
        """See `Store.shift_retries`."""
        await self._ask(statements.SHIFT_RETRIES, by=by // MICROSECOND)

    async def hasten_retries(self, now: datetime) -> None:
        """See `Store.hasten_retries`."""
        await self._ask(statements.HASTEN_RETRIES, now=now)

    async def awaiting(self, after: int, count: int) -> list[tuple[int, UUID]]:
        """See `Store.awaiting`."""
        return [(row["number"], UUID(row["id"])) for row in await self._ask(statements.AWAITING, after=after, count=count)]

    async def owing(self, after: int, count: int) -> list[tuple[int, UUID]]:
        """See `Store.owing`."""
        return [(row["number"], UUID(row["id"])) for row in await self._ask(statements.OWING, after=after, count=count)]

    async def longest_untouched(self, count: int, *, elevated: bool) -> list[tuple[UUID, datetime]]:
        """See `Store.longest_untouched`."""
        rows = await self._ask(statements.UNTOUCHED, count=count, elevated=elevated)
        return [(UUID(row["id"]), EPOCH + row["modified"] * MICROSECOND) for row in rows]

    async def numbered(self, after: int, *, owner_sid: str | None, count: int) -> list[tuple[int, UUID]]:
        """See `Store.numbered`."""
        sql = statements.NUMBERED if owner_sid is None else statements.NUMBERED_OF_OWNER
        rows = await self._ask(sql, after=after, owner_sid=owner_sid, count=count)
        return [(row["number"], UUID(row["id"])) for row in rows]

    async def last_number(self) -> int:
        """See `Store.last_number`."""
        return int((await self._ask(statements.LAST_NUMBER))[0]["number"])

    async def count(self, *, owner_sid: str | None, most: int) -> int:
        """See `Store.count`."""
        sql = statements.COUNT if owner_sid is None else statements.COUNT_OF_OWNER
        return int((await self._ask(sql, owner_sid=owner_sid, most=most))[0]["jobs"])

    async def with_destination(self, path: Path, *, owner_sid: str) -> list[UUID]:
        """See `Store.with_destination`."""
        return [UUID(row["id"]) for row in await self._ask(statements.WITH_DESTINATION, path=path, owner_sid=owner_sid)]

    async def sessions_of(self, *, owner_sid: str) -> frozenset[str]:
        """See `Store.sessions_of`."""
        return frozenset(text_out(row["owner_session"]) for row in await self._ask(statements.SESSIONS_OF, owner_sid=owner_sid))

    async def with_helper(self, *, owner_sid: str) -> list[UUID]:
        """See `Store.with_helper`."""
        return [UUID(row["id"]) for row in await self._ask(statements.WITH_HELPER, owner_sid=owner_sid)]

    async def _ask(self, sql: str, **values: Any) -> list[Row]:
        return await finish(self._asked(sql, row_of(**values)))

    async def _asked(self, sql: str, values: Values) -> list[Row]:
        async with self._turn:
            db, _ = self._opened()
            with self._translated():
                return await statements.fetch(db, sql, values)

    # -- save

    async def save(self, *changes: Change) -> None:
        """See `Store.save`."""
        batch = Batch()
        for change in changes:  # here, at the call: slices are mutable, and go on while this waits for its turn
            batch.add(change)
        await finish(self._save(batch))

    async def _save(self, batch: Batch) -> None:
        """Saves that come while a transaction is on its way to the disk share the next one: a sync costs more than all else."""
        waiting = _Waiting(batch, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        async with self._turn:
            if not waiting.done.done():
                together, self._waiting = self._waiting, []
                await self._save_all(together)
        with self._translated():
            waiting.done.result()

    async def _save_all(self, together: Sequence["_Waiting"]) -> None:
        try:
            await self._write_all([each.batch for each in together])
        except Exception as error:
            if len(together) == 1:
                together[0].done.set_exception(error)
                return
            for each in together:  # one of them is wrong; the others are not to suffer
                await self._save_all([each])
        else:
            for each in together:
                each.done.set_result(None)

    async def _write_all(self, batches: Sequence[Batch]) -> None:
        _, box = self._opened()
        writer = Writer(box, self._lost)
        await self._in_thread(partial(self._transact, writer, batches))
        self._lost = writer.lost

    def _transact(self, writer: Writer, batches: Sequence[Batch]) -> None:
        """In the store's thread, all of it in one hop."""
        with statements.all_or_nothing(self._raw) as db:
            for batch in batches:
                self._write(db, writer, batch)

    async def probe(self) -> None:
        """See `Store.probe`."""
        await finish(self._probe())

    async def _probe(self) -> None:
        async with self._turn:
            self._opened()
            with self._translated():
                await self._in_thread(self._write_in_vain)

    def _write_in_vain(self) -> None:
        for sql in (statements.PROBE, statements.PROBED):
            with statements.all_or_nothing(self._raw) as db:
                db.execute(sql, {"size": PROBE_BYTES})

    def _write(self, db: sqlite3.Connection, writer: Writer, batch: Batch) -> None:
        """The statements of one save; each kind of change in one go, however many there are."""
        before = statements.owners(db, batch.job_ids())
        owners = batch.owners(before)
        statements.each(db, "DELETE FROM jobs WHERE id = :id", [{"id": str(job_id)} for job_id in batch.removed])
        writer.lost.forget(batch.removed.keys())
        for job_id, old in before.items():
            if job_id in owners and owners[job_id] != old and job_id not in batch.removed:
                self._reseal(db, writer, job_id, old, owners[job_id])
        rows = writer.rows(batch, owners)
        statements.put(db, "jobs", rows.jobs, key=("id",))
        statements.put(db, "files", rows.files, key=("job_id", "file_index"))
        statements.put(db, "ranges", rows.ranges, key=("job_id", "file_index", "range_index"))  # a file keeps its ranges
        statements.each(db, "DELETE FROM slices WHERE job_id = :job_id AND file_index = :file_index", rows.files)
        if not statements.change(db, "files", rows.whole, key=("job_id", "file_index")):
            raise NotFound(job_id=next(iter(batch.whole))[0])
        statements.put(db, "slices", rows.slices, key=("job_id", "file_index", "slice_index"))
        statements.each(db, statements.COMMITTED, rows.committed)
        statements.each(db, "DELETE FROM grants WHERE job_id = :job_id AND target = :target AND scheme = :scheme", rows.grants_removed)
        statements.put(db, "grants", rows.grants, key=("job_id", "target", "scheme"))

    def _reseal(self, db: sqlite3.Connection, writer: Writer, job_id: UUID, old: str, new: str) -> None:
        """The job has another owner: its secrets move to the new owner's places. What cannot be opened stays as it is, lost."""
        which = {"job_id": str(job_id)}
        files = db.execute("SELECT * FROM files WHERE job_id = :job_id", which).fetchall()
        grants = db.execute("SELECT * FROM grants WHERE job_id = :job_id", which).fetchall()
        statements.change(db, "files", writer.moved_files(files, old, new), key=("job_id", "file_index"))
        statements.change(db, "grants", writer.moved_grants(grants, old, new), key=("job_id", "target", "scheme"))

    # -- means

    def _opened(self) -> tuple[aiosqlite.Connection, SecretBox]:
        if self._db is None or self._box is None:
            raise self._closed()
        return self._db, self._box

    def _closed(self) -> InvalidState:
        return InvalidState("the journal is not open", path=self.path)

    async def _in_thread(self, func: Callable[[], T]) -> T:
        assert self._pool is not None
        return await asyncio.get_running_loop().run_in_executor(self._pool, func)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """SQLite's exceptions become ours. Their texts name tables and columns only, but are not needed: the code says it."""
        try:
            yield
        except sqlite3.Error as exc:
            error = _fault(exc, self.path)
            if getattr(exc, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                self._damage = error
            raise error from scrub(exc)

    def _is_damage(self, error: StoreError) -> bool:
        return error is self._damage

    def _damaged(self, why: str) -> StoreError:
        self._damage = StoreError(f"the journal cannot be used: {why}", transient=False, path=self.path)
        return self._damage


def _fault(exc: sqlite3.Error, path: Path) -> StoreError:
    number = getattr(exc, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    name = getattr(exc, "sqlite_errorname", type(exc).__name__)
    code, why, advice = _FAULTS.get(number) or _FAULTS.get(
        number & 0xFF, (ErrorCode.BG_E_DATABASE_CORRUPT, "it does not fit this program", None)
    )
    transient = number & 0xFF in _TRANSIENT
    return StoreError(f"the journal cannot be used: {why} ({name})", code=code, transient=transient, path=path, advice=advice)


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A save that waits for its transaction, and what it will hear of it."""

    batch: Batch
    done: "asyncio.Future[None]"
