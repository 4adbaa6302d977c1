"""The journal of jobs: SQLite, opened only when nobody else can have written it, durable when `save` returns.

A journal is an authority: it says which files are written as whom (threat model T13). So it is opened only from private
files (see `secrets`), `trusted_schema` is off, and what must not be read from a copy is sealed: passwords, and of each URL
its query (and user information, should a redirect have brought one). Everything else is a typed column. The files are
`<store>`, `<store>-wal`, `<store>-shm`, `<store>.lock` and `<store>.key`.

Durable means: one transaction in the write-ahead log, synced (`synchronous=FULL`) before `save` returns. A `save` that is
cancelled is still finished first, so nobody has to guess what the journal holds.

A journal of ours that turns out to be damaged is set aside, never deleted: all its files get the name `<store>.damaged-<time>`
(with their endings, so that it can be opened there, or recovered with sqlite3), the log says so at ERROR, and a new one is
begun, because an operator wants the service back and the jobs that can be recovered later. It is found when the journal is
opened (the first page, the tables, and after a process that died every page); what is found while it is in use fails that
manager, and the journal is set aside when it is closed. A file that was never ours is refused and left alone, and so are a
journal of a later version and one that somebody else may have written.

A released schema is never edited: a change is one more entry of `SCHEMA`, and an older journal is brought up to date when it
is opened.

Questions run in aiosqlite's thread; transactions, looking at files, sealing and building records in one thread of the store's
own, never on the event loop. A transaction is one hop with all its statements: with a hop for each, small files cost more for
their hops than for their bytes. aiosqlite logs parameters at DEBUG, so a secret is sealed before it gets there. This module knows
no manager, no token, no network.
"""

import asyncio
import contextlib
import contextvars
import itertools
import json
import logging
import os
import shutil
import sqlite3
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import Enum
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Protocol, TypeVar, final
from uuid import UUID, uuid4

import aiosqlite

from ..auth.policy import AuthScheme, AuthTarget, Origin
from ..errors import (
    BitsError,
    ErrorCode,
    ErrorContext,
    InvalidState,
    NotFound,
    StoreError,
    make_error,
    scrub,
    show_text,
)
from ..files.records import PartRecord
from ..identity.tokens import HelperTokenFlags
from ..transport.digests import Digests
from ..transport.options import ClientCertificate, HttpOptions, SecurityFlags, headers_of_text, headers_text
from ..transport.proxies import ProxySettings, ProxyUsage
from ..transport.ranges import FileRange, Slice, Validator
from .keys import KeySource
from .model import (
    RETRY_DELAY_FLOOR,
    Change,
    CostFlags,
    FileRecord,
    GrantRecord,
    GrantRemoved,
    JobPriority,
    JobRecord,
    JobRemoved,
    JobState,
    NotifyCmdLine,
    NotifyFlags,
    OwnerKey,
    StoredJob,
)
from .secrets import (
    Place,
    SecretBox,
    check_private,
    guard_directory,
    make_private,
    os_fault,
    release_lock,
    sync_directory,
    take_lock,
)

log = logging.getLogger("bits_async.jobs")

T = TypeVar("T")
StrPath = str | os.PathLike[str]
Row = Mapping[str, Any]
Values = dict[str, Any]

APPLICATION_ID: Final = 0x42495453  # "BITS", in the database's header
BUSY_TIMEOUT: Final = 10.0  # seconds; only an operator's sqlite3 shell can hold the database besides us

SCHEMA: Final = (
    """
    CREATE TABLE jobs (
        number INTEGER PRIMARY KEY,             -- order of creation
        id TEXT NOT NULL UNIQUE,
        display_name TEXT NOT NULL,
        owner_sid TEXT NOT NULL,
        owner_name TEXT NOT NULL,
        owner_local TEXT NOT NULL,
        owner_principal TEXT,
        owner_proof TEXT,
        owner_process INTEGER NOT NULL CHECK (owner_process IN (0, 1)),
        owner_elevated INTEGER NOT NULL CHECK (owner_elevated IN (0, 1)),
        created INTEGER NOT NULL,               -- times: microseconds since 1970, UTC
        modified INTEGER NOT NULL,
        completed INTEGER,
        priority INTEGER NOT NULL,
        state INTEGER NOT NULL,
        resumed INTEGER NOT NULL CHECK (resumed IN (0, 1)),
        helper_flags INTEGER NOT NULL,
        proxy_usage INTEGER NOT NULL,
        proxy_list TEXT NOT NULL,               -- JSON array of strings
        proxy_bypass TEXT NOT NULL,             -- JSON array of strings
        proxy_resolved INTEGER NOT NULL CHECK (proxy_resolved IN (0, 1)),
        minimum_retry_delay REAL NOT NULL,      -- durations: seconds
        no_progress_timeout REAL NOT NULL,
        maximum_download_time REAL NOT NULL,
        error_code INTEGER,                     -- NULL: no error, and then every other error column is NULL
        error_context INTEGER,
        error_message TEXT,
        error_transient INTEGER,
        error_job_id TEXT,
        error_url TEXT,
        error_path TEXT,
        error_identity TEXT,
        error_http_status INTEGER,
        error_advice TEXT,
        error_retry_after REAL,
        error_file INTEGER,
        error_count INTEGER NOT NULL,
        retry_number INTEGER NOT NULL,
        retry_at INTEGER,
        stalled REAL NOT NULL,
        active REAL NOT NULL
    );
    CREATE INDEX jobs_by_turn ON jobs (state, priority, number);

    CREATE TABLE files (
        job_id TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
        file_index INTEGER NOT NULL,
        original_url TEXT NOT NULL,             -- up to the query
        original_url_secret BLOB,               -- sealed: the query and what follows
        url TEXT NOT NULL,
        url_secret BLOB,
        path TEXT NOT NULL,
        sha256 TEXT,
        pinned INTEGER NOT NULL CHECK (pinned IN (0, 1)),
        etag TEXT,
        last_modified TEXT,
        size INTEGER,
        part_directory TEXT,
        part_name TEXT,
        part_dir_device TEXT,                   -- decimal: devices and inodes have 64 bits without a sign, or more
        part_dir_inode TEXT,
        part_device TEXT,
        part_inode TEXT,
        part_uid INTEGER,
        boot_id TEXT,
        restarts INTEGER NOT NULL,
        transferred INTEGER NOT NULL CHECK (transferred IN (0, 1)),
        committed INTEGER NOT NULL CHECK (committed IN (0, 1)),
        PRIMARY KEY (job_id, file_index)
    ) WITHOUT ROWID;

    CREATE TABLE ranges (                       -- the ranges asked for, in order; none: the whole file
        job_id TEXT NOT NULL,
        file_index INTEGER NOT NULL,
        range_index INTEGER NOT NULL,
        start INTEGER NOT NULL,
        length INTEGER,                         -- NULL: to the end of the file
        PRIMARY KEY (job_id, file_index, range_index),
        FOREIGN KEY (job_id, file_index) REFERENCES files (job_id, file_index) ON DELETE CASCADE
    ) WITHOUT ROWID;

    CREATE TABLE slices (
        job_id TEXT NOT NULL,
        file_index INTEGER NOT NULL,
        slice_index INTEGER NOT NULL,
        start INTEGER NOT NULL,
        stop INTEGER,                           -- NULL: unknown
        durable INTEGER NOT NULL,
        PRIMARY KEY (job_id, file_index, slice_index),
        FOREIGN KEY (job_id, file_index) REFERENCES files (job_id, file_index) ON DELETE CASCADE
    ) WITHOUT ROWID;

    CREATE TABLE grants (
        job_id TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
        target INTEGER NOT NULL,
        scheme INTEGER NOT NULL,
        user_name TEXT,
        password_secret BLOB,                   -- sealed
        origins TEXT,                           -- JSON array of [scheme, host, port]; NULL: bound at the first resume
        PRIMARY KEY (job_id, target, scheme)
    ) WITHOUT ROWID;
    """,
    """
    ALTER TABLE jobs ADD COLUMN description TEXT NOT NULL DEFAULT '';
    ALTER TABLE jobs ADD COLUMN http_method TEXT NOT NULL DEFAULT 'GET';
    ALTER TABLE jobs ADD COLUMN custom_headers_secret BLOB;        -- sealed; NULL: none
    ALTER TABLE jobs ADD COLUMN custom_headers_write_only INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE jobs ADD COLUMN custom_headers_origins TEXT;       -- as grants.origins
    ALTER TABLE jobs ADD COLUMN security_flags INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE jobs ADD COLUMN crl_source TEXT;
    ALTER TABLE jobs ADD COLUMN validates_certificates INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE jobs ADD COLUMN maximum_download_size INTEGER;  -- bytes
    ALTER TABLE jobs ADD COLUMN dynamic_content INTEGER NOT NULL DEFAULT 0 CHECK (dynamic_content IN (0, 1));
    ALTER TABLE jobs ADD COLUMN high_performance INTEGER NOT NULL DEFAULT 0 CHECK (high_performance IN (0, 1));
    ALTER TABLE jobs ADD COLUMN on_demand_mode INTEGER NOT NULL DEFAULT 0 CHECK (on_demand_mode IN (0, 1));
    ALTER TABLE files ADD COLUMN wanted TEXT NOT NULL DEFAULT '[]';  -- JSON array of [start, length or null]
    ALTER TABLE files ADD COLUMN position INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE files ADD COLUMN validated INTEGER NOT NULL DEFAULT 0 CHECK (validated IN (0, 1));
    """,
    """
    ALTER TABLE jobs ADD COLUMN notify_flags INTEGER NOT NULL DEFAULT 3;
    ALTER TABLE jobs ADD COLUMN notify_program TEXT;                -- NULL: no command
    ALTER TABLE jobs ADD COLUMN notify_parameters TEXT;             -- JSON array of strings: the whole argv
    ALTER TABLE jobs ADD COLUMN notify_setter TEXT;                 -- JSON object, as the owner_ columns
    ALTER TABLE jobs ADD COLUMN minimum_notification_interval REAL NOT NULL DEFAULT 0.5;
    ALTER TABLE jobs ADD COLUMN maximum_bandwidth REAL;             -- bytes per second; NULL: no limit
    ALTER TABLE jobs ADD COLUMN own_download_time INTEGER NOT NULL DEFAULT 0 CHECK (own_download_time IN (0, 1));
    UPDATE jobs SET own_download_time = 1 WHERE maximum_download_time <> 7776000;
    ALTER TABLE jobs ADD COLUMN cost_flags INTEGER NOT NULL DEFAULT 2147483903;  -- TRANSFER_ALWAYS
    ALTER TABLE jobs ADD COLUMN owed INTEGER NOT NULL DEFAULT 0;    -- what happened and nobody was told of
    ALTER TABLE files ADD COLUMN owed INTEGER NOT NULL DEFAULT 0 CHECK (owed IN (0, 1));
    ALTER TABLE jobs ADD COLUMN turn INTEGER NOT NULL DEFAULT 0;   -- grows each time the job begins to run
    DROP INDEX jobs_by_turn;
    CREATE INDEX jobs_by_turn ON jobs (
        state, priority, turn, number, dynamic_content, owner_sid, owner_name, owner_proof, owner_process, owner_elevated);
    CREATE INDEX jobs_by_last_turn ON jobs (turn) WHERE turn > 0;
    CREATE INDEX jobs_by_owner ON jobs (owner_sid);
    ALTER TABLE jobs ADD COLUMN gives_up_at INTEGER;
    CREATE INDEX jobs_by_moment ON jobs (ifnull(retry_at, gives_up_at)) WHERE state = 5;
    CREATE INDEX jobs_awaiting ON jobs (number) WHERE state = 5 AND retry_at IS NULL;
    CREATE INDEX jobs_by_change ON jobs (owner_elevated, modified);
    CREATE INDEX jobs_with_helper ON jobs (state) WHERE helper_flags <> 0;
    CREATE INDEX files_by_path ON files (path);
    ALTER TABLE files ADD COLUMN part_maker TEXT;                   -- a local user; NULL: not known
    ALTER TABLE files ADD COLUMN part_draft TEXT NOT NULL DEFAULT '';  -- of the name of the part file that is made next
    ALTER TABLE files ADD COLUMN sha512 TEXT;                        -- sha256, sha512, blake3: the caller's
    ALTER TABLE files ADD COLUMN blake3 TEXT;
    ALTER TABLE files ADD COLUMN served_sha256 TEXT;                 -- of the whole remote file, as its server gave them
    ALTER TABLE files ADD COLUMN served_sha512 TEXT;
    ALTER TABLE files ADD COLUMN media_type TEXT;
    ALTER TABLE files ADD COLUMN refetches INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE files ADD COLUMN wrong_digest TEXT;
    ALTER TABLE jobs ADD COLUMN files_at_once INTEGER NOT NULL DEFAULT 1;
    ALTER TABLE jobs ADD COLUMN segments INTEGER NOT NULL DEFAULT 1;
    ALTER TABLE jobs ADD COLUMN client_certificate TEXT;            -- JSON object: where it is; NULL: none
    ALTER TABLE jobs ADD COLUMN client_certificate_origins TEXT;    -- as grants.origins
    CREATE INDEX jobs_owing ON jobs (number) WHERE owed <> 0 AND notify_program IS NOT NULL;
    CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;  -- of the journal: key_source, key_id
    """,
    """
    ALTER TABLE jobs ADD COLUMN owner_session TEXT;                 -- that the owner's token ends with; NULL: none
    CREATE INDEX jobs_by_session ON jobs (owner_sid, owner_session) WHERE owner_session IS NOT NULL;
    """,
)
"""`SCHEMA[n]` takes a journal from version n to n + 1. Entries that were released are never edited."""

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

_FAULTS: Final[Mapping[int, tuple[int, str, str | None]]] = MappingProxyType(  # by SQLite's primary result code
    {
        sqlite3.SQLITE_FULL: (
            ErrorCode.ERROR_DISK_FULL,
            "the volume is full",
            "make room on the volume of the journal, then open the manager again",
        ),
        sqlite3.SQLITE_READONLY: (ErrorCode.ERROR_WRITE_FAULT, "it cannot be written", "make its file system writable"),
        sqlite3.SQLITE_CANTOPEN: (ErrorCode.ERROR_WRITE_FAULT, "it cannot be opened", "check its directory"),
        sqlite3.SQLITE_IOERR: (ErrorCode.ERROR_WRITE_FAULT, "reading or writing failed", "check the volume of the journal"),
        sqlite3.SQLITE_BUSY: (ErrorCode.ERROR_SHARING_VIOLATION, "another program holds it", "end that program"),
        sqlite3.SQLITE_LOCKED: (ErrorCode.ERROR_SHARING_VIOLATION, "another program holds it", "end that program"),
        sqlite3.SQLITE_CORRUPT: (ErrorCode.BG_E_DATABASE_CORRUPT, "it is damaged", None),
        sqlite3.SQLITE_NOTADB: (ErrorCode.BG_E_DATABASE_CORRUPT, "it is no database", None),
    }
)


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

    async def recover(self, now: datetime, lost_helper: BitsError) -> None:
        """Put what the last manager left behind in order, before anything is loaded: jobs that were at work are QUEUED, unfinished ones
        with helper flags are in ERROR with `lost_helper` (each as its own job's), no retry is farther off than its delay, because the
        wall clock may have been changed, and who waits for an event has the rest of his time before him.
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

    async def last_turn(self) -> int:
        """The highest turn that a job has had; 0: none."""

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
        self._path = Path(os.path.normpath(whole))
        self._make_parents = make_parents
        self._key = key
        self._box: SecretBox | None = None
        self._db: aiosqlite.Connection | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._lock_file: int | None = None
        self._made: list[Path] = []  # empty files that an open under way has made
        self._damage: StoreError | None = None  # what SQLite, or a look at what it holds, has found
        self._aside: Path | None = None
        self._turn = asyncio.Lock()
        self._waiting: list[_Waiting] = []
        self._lost = _Lost()

    def __repr__(self) -> str:
        return f"<SqliteStore {self.path}>"

    @property
    def path(self) -> Path:
        """The database, absolute."""
        return self._path

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
        return self._aside

    # -- open and close

    async def open(self) -> None:
        """See `Store.open`."""
        if self._pool is not None:
            raise InvalidState("the journal is already open", path=self.path)
        self._pool = ThreadPoolExecutor(1, "bits-store")
        self._damage = self._aside = None
        self._turn = asyncio.Lock()  # one connection: the statements of two transactions must not mix
        try:
            await finish(self._open())
        except BaseException:
            await finish(self._shut())
            raise
        self._made.clear()

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
                empty: bool = (await _fetch(db, "SELECT NOT EXISTS (SELECT * FROM jobs) AS empty"))[0]["empty"] == 1
        await self._shut(remove=empty)
        return empty

    async def _open(self) -> None:
        await self._in_thread(self._claim)
        try:
            await self._open_database()
        except StoreError as error:
            if not self._is_damage(error):
                raise
            if not await self._in_thread(self._is_ours):
                self._damage = None
                raise
            await self._put_aside(error)
            await self._in_thread(self._make_files)
            await self._open_database()
        await self._in_thread(self._check_files)

    async def _open_database(self) -> None:
        died = await self._in_thread(self._has_log)
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
        settings = {row["name"]: row["value"] for row in await _fetch(db, "SELECT name, value FROM settings")}
        if not settings and await self._in_thread(self._side(".key").exists):
            settings = {"key_source": str(KeySource.file()), "key_id": uuid4().hex}
        settings = settings or {"key_source": str(self._key), "key_id": uuid4().hex}
        self._key.check(settings["key_source"], self.path)
        key = await self._in_thread(partial(self._key.load, self._side(".key"), settings["key_id"]))
        rows = [{"name": name, "value": value} for name, value in settings.items()]
        await self._in_thread(partial(_each, self._raw, "INSERT OR IGNORE INTO settings VALUES (:name, :value)", rows))
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

    def _claim(self) -> None:
        """What must hold before SQLite may look: private files, and the lock. No database file is opened before the lock is ours,
        because closing it would give up the locks that another connection of this process has on it."""
        guard_directory(self.path.parent, make_parents=self._make_parents)
        self._lock_file = take_lock(self._side(".lock"), self.path)
        self._make_files()

    def _make_files(self) -> None:
        for name in ("", "-wal", "-shm"):
            if make_private(self._side(name)):
                self._made.append(self._side(name))
        self._check_files()
        sync_directory(self.path.parent)

    # -- a damaged journal

    def _has_log(self) -> bool:
        """Whether the last process that had it open did not come to closing it."""
        log_file = self._side("-wal")
        return log_file.exists() and log_file.stat().st_size > 0

    def _is_ours(self) -> bool:
        """Whether a file that SQLite cannot read was a journal: its header says so, or a key is beside it."""
        with self.path.open("rb") as file:
            header = file.read(72)
        return header[68:] == APPLICATION_ID.to_bytes(4, "big") or self._side(".key").exists()

    async def _examine(self, db: aiosqlite.Connection) -> None:
        """Reads every page.

        Raises:
            StoreError: one is damaged.
        """
        (found,) = (await _fetch(db, "PRAGMA quick_check(1)"))[0]
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
        names = await self._in_thread(self._name_aside)
        with contextlib.suppress(StoreError):  # it may try to write the log back
            await self._close_database()
        await self._in_thread(partial(self._let_go, names))
        self._damage = None
        log.error("%s: %s; it was set aside as %s, and a new journal is begun", self.path, error.message, self._aside)

    def _name_aside(self) -> list[str]:
        aside = self._free_name()
        names = [name for name in ("", "-wal", "-journal", ".key") if self._side(name).exists()]
        try:
            for name in names:
                _link(self._side(name), aside.with_name(aside.name + name))
        except OSError as exc:
            raise os_fault(exc, self.path, "set aside") from scrub(exc)
        sync_directory(self.path.parent)
        self._aside = aside
        return names

    def _let_go(self, names: Sequence[str]) -> None:
        try:
            for name in (*names, "-shm"):
                self._side(name).unlink(missing_ok=True)
        except OSError as exc:
            raise os_fault(exc, self.path, "set aside") from scrub(exc)
        sync_directory(self.path.parent)

    def _free_name(self) -> Path:
        stem = f"{self.path.name}.damaged-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
        names = (self.path.with_name(stem + (f"-{number}" if number else "")) for number in itertools.count())
        return next(name for name in names if not os.path.lexists(name))

    def _check_files(self) -> None:
        for name in ("", "-wal", "-shm", "-journal"):
            check_private(self._side(name))

    async def _identify(self, db: aiosqlite.Connection) -> None:
        """Refuses another program's database and a later version's journal, before anything is changed."""
        await db.execute_fetchall("PRAGMA trusted_schema=OFF")
        application, version = await _pragma(db, "application_id"), await _pragma(db, "user_version")
        tables = (await _fetch(db, "SELECT count(*) AS n FROM sqlite_master"))[0]["n"]
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
        if await _pragma(db, "journal_mode=WAL") != "wal":
            raise StoreError(
                "its file system cannot hold a write-ahead log",
                code=ErrorCode.ERROR_WRITE_FAULT,
                path=self.path,
                advice="put the journal on a local disk",
            )
        for name, setting, value in PRAGMAS:
            await db.execute_fetchall(f"PRAGMA {name}={setting}")
            if await _pragma(db, name) != value:
                raise StoreError(
                    f"this SQLite ({sqlite3.sqlite_version}) does not know the setting {name}",
                    code=ErrorCode.E_NOTIMPL,
                    path=self.path,
                    advice="use SQLite 3.31 or later",
                )

    async def _migrate(self, db: aiosqlite.Connection) -> None:
        known: int = await _pragma(db, "user_version")
        found = {(row["tab"], row["col"]) for row in await _fetch(db, _COLUMNS)}
        if missing := await self._in_thread(partial(_columns_of, SCHEMA[:known])) - found:
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
                await self._in_thread(self._delete)
            await self._in_thread(self._unmake)
        finally:
            await self._in_thread(partial(self._release, remove=remove))
            self._pool, self._box = None, None
            pool.shutdown(wait=False)  # it is idle: nothing is waited for on the event loop

    def _delete(self) -> None:
        for name in ("-wal", "-shm", "-journal", "", ".key"):
            try:
                self._side(name).unlink(missing_ok=True)
            except OSError as exc:
                raise os_fault(exc, self._side(name), "delete") from scrub(exc)
        sync_directory(self.path.parent)

    def _unmake(self) -> None:
        """After an open that failed: beside another program's database an empty log would mean something to SQLite."""
        while self._made:
            made = self._made.pop()
            if made.exists() and made.stat().st_size == 0:
                made.unlink()

    def _release(self, *, remove: bool) -> None:
        if self._lock_file is not None:
            lock_file, self._lock_file = self._lock_file, None
            release_lock(lock_file, self._side(".lock"), remove=remove)

    # -- load

    async def load(self, job_ids: Collection[UUID] | None = None) -> list[StoredJob]:
        """See `Store.load`."""
        return [] if job_ids is not None and not job_ids else await finish(self._load(job_ids))

    async def _load(self, job_ids: Collection[UUID] | None) -> list[StoredJob]:
        which = {} if job_ids is None else {"ids": json.dumps([str(job_id) for job_id in job_ids])}
        async with self._turn:
            db, box = self._opened()
            with self._translated():
                rows = [await _fetch(db, sql, which) for sql in _select(some=job_ids is not None)]
            reader = _Reader(box, self.path)
            stored = await self._in_thread(partial(reader.jobs, *rows))
            self._lost.forget({each.job.id for each in stored})
            self._lost.add(reader.lost)
            return stored

    # -- asked of all jobs: by index, without loading them

    async def recover(self, now: datetime, lost_helper: BitsError) -> None:
        """See `Store.recover`."""
        error = _columns(**{f"error_{name}": value for name, value in lost_helper.fields().items() if name != "job_id"})
        await finish(self._recover(error | {"now": _value(now), "floor": RETRY_DELAY_FLOOR}))

    async def _recover(self, values: Values) -> None:
        lost = ", ".join(f"{column} = :{column}" for column in values if column.startswith("error_"))
        async with self._turn:
            db, _ = self._opened()
            with self._translated():
                async with _transaction(db):
                    for sql in (*_RECOVERY, _LOST_HELPERS.format(error=lost)):
                        await db.execute_fetchall(sql, values)

    async def in_line(self, priority: JobPriority, *, dynamic: bool, absent: Collection[OwnerKey], count: int) -> list[UUID]:
        """See `Store.in_line`."""
        keys = json.dumps([_owner_text(key) for key in absent])
        rows = await self._ask(_IN_LINE, priority=priority, dynamic=dynamic, absent=keys, count=count)
        return [UUID(row["id"]) for row in rows]

    async def last_turn(self) -> int:
        """See `Store.last_turn`."""
        return int((await self._ask(_LAST_TURN))[0]["turn"])

    async def is_busy(self) -> bool:
        """See `Store.is_busy`."""
        return bool((await self._ask(_IS_BUSY))[0]["busy"])

    async def due(self, now: datetime, count: int) -> list[UUID]:
        """See `Store.due`."""
        return [UUID(row["id"]) for row in await self._ask(_DUE, now=now, count=count)]

    async def next_due(self, after: datetime) -> datetime | None:
        """See `Store.next_due`."""
        return _maybe_time((await self._ask(_NEXT_DUE, after=after))[0]["moment"])

    async def shift_retries(self, by: timedelta) -> None:
        """See `Store.shift_retries`."""
        await self._ask(_SHIFT_RETRIES, by=by // _MICROSECOND)

    async def hasten_retries(self, now: datetime) -> None:
        """See `Store.hasten_retries`."""
        await self._ask(_HASTEN_RETRIES, now=now)

    async def awaiting(self, after: int, count: int) -> list[tuple[int, UUID]]:
        """See `Store.awaiting`."""
        return [(row["number"], UUID(row["id"])) for row in await self._ask(_AWAITING, after=after, count=count)]

    async def owing(self, after: int, count: int) -> list[tuple[int, UUID]]:
        """See `Store.owing`."""
        return [(row["number"], UUID(row["id"])) for row in await self._ask(_OWING, after=after, count=count)]

    async def longest_untouched(self, count: int, *, elevated: bool) -> list[tuple[UUID, datetime]]:
        """See `Store.longest_untouched`."""
        rows = await self._ask(_UNTOUCHED, count=count, elevated=elevated)
        return [(UUID(row["id"]), _EPOCH + row["modified"] * _MICROSECOND) for row in rows]

    async def numbered(self, after: int, *, owner_sid: str | None, count: int) -> list[tuple[int, UUID]]:
        """See `Store.numbered`."""
        sql = _NUMBERED if owner_sid is None else _NUMBERED_OF_OWNER
        rows = await self._ask(sql, after=after, owner_sid=owner_sid, count=count)
        return [(row["number"], UUID(row["id"])) for row in rows]

    async def last_number(self) -> int:
        """See `Store.last_number`."""
        return int((await self._ask(_LAST_NUMBER))[0]["number"])

    async def count(self, *, owner_sid: str | None, most: int) -> int:
        """See `Store.count`."""
        sql = _COUNT if owner_sid is None else _COUNT_OF_OWNER
        return int((await self._ask(sql, owner_sid=owner_sid, most=most))[0]["jobs"])

    async def with_destination(self, path: Path, *, owner_sid: str) -> list[UUID]:
        """See `Store.with_destination`."""
        return [UUID(row["id"]) for row in await self._ask(_WITH_DESTINATION, path=path, owner_sid=owner_sid)]

    async def sessions_of(self, *, owner_sid: str) -> frozenset[str]:
        """See `Store.sessions_of`."""
        return frozenset(_text_out(row["owner_session"]) for row in await self._ask(_SESSIONS_OF, owner_sid=owner_sid))

    async def with_helper(self, *, owner_sid: str) -> list[UUID]:
        """See `Store.with_helper`."""
        return [UUID(row["id"]) for row in await self._ask(_WITH_HELPER, owner_sid=owner_sid)]

    async def _ask(self, sql: str, **values: Any) -> list[Row]:
        return await finish(self._asked(sql, _columns(**values)))

    async def _asked(self, sql: str, values: Values) -> list[Row]:
        async with self._turn:
            db, _ = self._opened()
            with self._translated():
                return await _fetch(db, sql, values)

    # -- save

    async def save(self, *changes: Change) -> None:
        """See `Store.save`."""
        batch = _Batch()
        for change in changes:  # here, at the call: slices are mutable, and go on while this waits for its turn
            batch.add(change)
        await finish(self._save(batch))

    async def _save(self, batch: "_Batch") -> None:
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

    async def _write_all(self, batches: Sequence["_Batch"]) -> None:
        _, box = self._opened()
        writer = _Writer(box, self._lost)
        await self._in_thread(partial(self._transact, writer, batches))
        self._lost = writer.lost

    def _transact(self, writer: "_Writer", batches: Sequence["_Batch"]) -> None:
        """In the store's thread, all of it in one hop."""
        db = self._raw
        db.execute("BEGIN IMMEDIATE")
        try:
            for batch in batches:
                self._write(db, writer, batch)
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:  # else SQLite rolled back by itself, or the commit got there first
                db.execute("ROLLBACK")
            raise

    def _write(self, db: sqlite3.Connection, writer: "_Writer", batch: "_Batch") -> None:
        """The statements of one save; each kind of change in one go, however many there are."""
        before = _owners(db, batch.job_ids())
        owners = batch.owners(before)
        _each(db, "DELETE FROM jobs WHERE id = :id", [{"id": str(job_id)} for job_id in batch.removed])
        writer.lost.forget(batch.removed.keys())
        for job_id, old in before.items():
            if job_id in owners and owners[job_id] != old and job_id not in batch.removed:
                self._reseal(db, writer, job_id, old, owners[job_id])
        rows = writer.rows(batch, owners)
        _put(db, "jobs", rows.jobs, key=("id",))
        _put(db, "files", rows.files, key=("job_id", "file_index"))
        _put(db, "ranges", rows.ranges, key=("job_id", "file_index", "range_index"))  # a file keeps its ranges
        _each(db, "DELETE FROM slices WHERE job_id = :job_id AND file_index = :file_index", rows.files)
        _put(db, "slices", rows.slices, key=("job_id", "file_index", "slice_index"))
        _each(db, "DELETE FROM grants WHERE job_id = :job_id AND target = :target AND scheme = :scheme", rows.grants_removed)
        _put(db, "grants", rows.grants, key=("job_id", "target", "scheme"))

    def _reseal(self, db: sqlite3.Connection, writer: "_Writer", job_id: UUID, old: str, new: str) -> None:
        """The job has another owner: its secrets move to the new owner's places. What cannot be opened stays as it is, lost."""
        which = {"job_id": str(job_id)}
        files = db.execute("SELECT * FROM files WHERE job_id = :job_id", which).fetchall()
        grants = db.execute("SELECT * FROM grants WHERE job_id = :job_id", which).fetchall()
        _each(
            db,
            _update("files", ("original_url_secret", "url_secret"), ("job_id", "file_index")),
            writer.moved_files(files, old, new),
        )
        _each(
            db,
            _update("grants", ("password_secret",), ("job_id", "target", "scheme")),
            writer.moved_grants(grants, old, new),
        )

    # -- means

    def _side(self, suffix: str) -> Path:
        return self.path.with_name(self.path.name + suffix)

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


def _link(old: Path, new: Path) -> None:
    try:
        os.link(old, new)
    except OSError:  # a file system without links: copied, so that the old one still stands if this fails
        make_private(new)  # before there is a byte in it: the key is copied too
        shutil.copyfile(old, new)
        with new.open("rb") as file:
            os.fsync(file.fileno())


_COLUMNS: Final = "SELECT tables.name AS tab, columns.name AS col FROM sqlite_master AS tables, pragma_table_info(tables.name) AS columns"


@cache
def _columns_of(schema: tuple[str, ...]) -> frozenset[tuple[str, str]]:
    """(table, column) of a schema."""
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.executescript("".join(schema))
        return frozenset(db.execute(_COLUMNS))


def _fault(exc: sqlite3.Error, path: Path) -> StoreError:
    number = getattr(exc, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    name = getattr(exc, "sqlite_errorname", type(exc).__name__)
    code, why, advice = _FAULTS.get(number & 0xFF, (ErrorCode.BG_E_DATABASE_CORRUPT, "it does not fit this program", None))
    return StoreError(f"the journal cannot be used: {why} ({name})", code=code, transient=False, path=path, advice=advice)


async def finish(work: Coroutine[Any, Any, T] | asyncio.Task[T]) -> T:
    """Awaits work to its end, through cancels; then lets the cancel through (a failure is its cause)."""
    loop = asyncio.get_running_loop()
    task = work if isinstance(work, asyncio.Task) else loop.create_task(work, context=contextvars.Context())
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as exc:
            cancelled = exc
    if cancelled is not None:
        raise cancelled from (None if task.cancelled() else task.exception())
    return task.result()


# -- SQL ---------------------------------------------------------------------------------------------------------------


async def _fetch(db: aiosqlite.Connection, sql: str, values: Row | Sequence[Any] = ()) -> list[Row]:
    rows: Any = await db.execute_fetchall(sql, values)
    return list(rows)


async def _pragma(db: aiosqlite.Connection, name: str) -> Any:
    rows: Any = await _fetch(db, f"PRAGMA {name}")
    return rows[0][0] if rows else None


def _each(db: sqlite3.Connection, sql: str, rows: Sequence[Values]) -> None:
    if rows:
        db.executemany(sql, rows)


@asynccontextmanager
async def _transaction(db: aiosqlite.Connection) -> AsyncIterator[None]:
    """All that is written in it, durable at its end, or nothing."""
    await db.execute_fetchall("BEGIN IMMEDIATE")
    try:
        yield
        await db.execute_fetchall("COMMIT")
    except BaseException:
        await _roll_back(db)
        raise


async def _roll_back(db: aiosqlite.Connection) -> None:
    try:
        await db.execute_fetchall("ROLLBACK")
    except sqlite3.Error:
        pass  # SQLite rolled back by itself, or the commit got there first


def _owners(db: sqlite3.Connection, job_ids: Sequence[UUID]) -> dict[UUID, str]:
    """The owners' sids as the journal has them."""
    found: dict[UUID, str] = {}
    for start in range(0, len(job_ids), 500):  # SQLite allows 999 parameters
        some = [str(job_id) for job_id in job_ids[start : start + 500]]
        marks = ", ".join("?" * len(some))
        for row in db.execute(f"SELECT id, owner_sid FROM jobs WHERE id IN ({marks})", some):  # noqa: S608 - question marks
            found[UUID(row["id"])] = _text_out(row["owner_sid"])
    return found


def _put(db: sqlite3.Connection, table: str, rows: Sequence[Values], *, key: Sequence[str]) -> None:
    if rows:
        _each(db, _upsert(table, tuple(rows[0]), key), rows)


def _update(table: str, columns: Sequence[str], key: Sequence[str]) -> str:
    changes, which = ", ".join(f"{c} = :{c}" for c in columns), " AND ".join(f"{c} = :{c}" for c in key)
    return f"UPDATE {table} SET {changes} WHERE {which}"  # noqa: S608 - our own names


def _upsert(table: str, columns: Sequence[str], key: Sequence[str]) -> str:
    """A row is changed in place: it keeps its number, and what refers to it."""
    names, values = ", ".join(columns), ", ".join(f":{c}" for c in columns)
    changes = ", ".join(f"{c} = excluded.{c}" for c in columns if c not in key)
    return (
        f"INSERT INTO {table} ({names}) VALUES ({values}) "  # noqa: S608 - our own names
        f"ON CONFLICT ({', '.join(key)}) DO UPDATE SET {changes}"
    )


def _select(*, some: bool) -> Iterator[str]:
    """The statements that read everything of jobs: of those in the JSON array `:ids`, or of all."""
    tables = {
        "jobs": "number",
        "files": "job_id, file_index",
        "ranges": "job_id, file_index, range_index",
        "slices": "job_id, file_index, slice_index",
        "grants": "job_id, target, scheme",
    }
    for table, order in tables.items():
        job = "id" if table == "jobs" else "job_id"
        which = f" WHERE {job} IN (SELECT value FROM json_each(:ids))" if some else ""  # noqa: S608 - our own names
        yield f"SELECT * FROM {table}{which} ORDER BY {order}"  # noqa: S608


# States as numbers: 0 QUEUED, 1 CONNECTING, 2 TRANSFERRING, 3 SUSPENDED, 5 TRANSIENT_ERROR; 4 ERROR.
_IN_LINE: Final = """
    SELECT id FROM jobs WHERE number IN (
        SELECT number FROM jobs INDEXED BY jobs_by_turn
        WHERE state = 0 AND priority = :priority AND dynamic_content <= :dynamic AND
            owner_sid || char(31) || owner_name || char(31) || ifnull(owner_proof, '') || char(31) || owner_process || owner_elevated
            NOT IN (SELECT value FROM json_each(:absent))
        ORDER BY turn, number LIMIT :count)
    ORDER BY turn, number"""
_LAST_TURN: Final = "SELECT ifnull(max(turn), 0) AS turn FROM jobs WHERE turn > 0"
_IS_BUSY: Final = "SELECT EXISTS (SELECT * FROM jobs WHERE state IN (0, 1, 2, 5)) AS busy"
_DUE: Final = """
    SELECT id FROM jobs INDEXED BY jobs_by_moment WHERE ifnull(retry_at, gives_up_at) <= :now AND state = 5
    ORDER BY ifnull(retry_at, gives_up_at) LIMIT :count"""
_NEXT_DUE: Final = """
    SELECT min(ifnull(retry_at, gives_up_at)) AS moment FROM jobs INDEXED BY jobs_by_moment
    WHERE ifnull(retry_at, gives_up_at) > :after AND state = 5"""
_SHIFT_RETRIES: Final = "UPDATE jobs SET retry_at = retry_at + :by, gives_up_at = gives_up_at + :by WHERE state = 5"
_HASTEN_RETRIES: Final = "UPDATE jobs SET retry_at = :now WHERE state = 5 AND retry_at > :now"
_AWAITING: Final = """
    SELECT number, id FROM jobs INDEXED BY jobs_awaiting WHERE state = 5 AND retry_at IS NULL AND number > :after
    ORDER BY number LIMIT :count"""
_OWING: Final = """
    SELECT number, id FROM jobs INDEXED BY jobs_owing WHERE owed <> 0 AND notify_program IS NOT NULL AND number > :after
    ORDER BY number LIMIT :count"""
_UNTOUCHED: Final = "SELECT id, modified FROM jobs WHERE owner_elevated = :elevated ORDER BY modified LIMIT :count"
_NUMBERED: Final = "SELECT number, id FROM jobs WHERE number > :after ORDER BY number LIMIT :count"
_NUMBERED_OF_OWNER: Final = "SELECT number, id FROM jobs WHERE owner_sid = :owner_sid AND number > :after ORDER BY number LIMIT :count"
_LAST_NUMBER: Final = "SELECT ifnull(max(number), 0) AS number FROM jobs"
_COUNT: Final = "SELECT count(*) AS jobs FROM (SELECT 1 FROM jobs LIMIT :most)"
_COUNT_OF_OWNER: Final = "SELECT count(*) AS jobs FROM (SELECT 1 FROM jobs WHERE owner_sid = :owner_sid LIMIT :most)"
_WITH_DESTINATION: Final = """
    SELECT DISTINCT jobs.number, jobs.id FROM files CROSS JOIN jobs ON jobs.id = files.job_id
    WHERE files.path = :path AND jobs.owner_sid = :owner_sid ORDER BY jobs.number"""
_RECOVERY: Final = (
    "UPDATE jobs SET state = 0 WHERE state IN (1, 2)",
    # no delay is longer than `scheduler.retry_delay` makes it
    """
    UPDATE jobs SET retry_at = :now + CAST(1000000 * max(minimum_retry_delay, :floor, ifnull(error_retry_after, 0)) AS INTEGER)
    WHERE state = 5 AND retry_at - :now > 1000000 * max(minimum_retry_delay, :floor, ifnull(error_retry_after, 0))""",
    """
    UPDATE jobs SET gives_up_at = iif(no_progress_timeout > 0, :now + CAST(1000000 * (no_progress_timeout - stalled) AS INTEGER), NULL)
    WHERE state = 5 AND retry_at IS NULL""",
)
_SESSIONS_OF: Final = """
    SELECT DISTINCT owner_session FROM jobs INDEXED BY jobs_by_session WHERE owner_sid = :owner_sid AND owner_session IS NOT NULL"""
_WITH_HELPER: Final = "SELECT id FROM jobs WHERE helper_flags <> 0 AND state IN (0, 3, 5) AND owner_sid = :owner_sid"
_LOST_HELPERS: Final = """
    UPDATE jobs SET state = 4, {error}, error_job_id = id, error_count = error_count + 1, retry_at = NULL,
        owed = notify_flags & 2
    WHERE helper_flags <> 0 AND state IN (0, 3, 5)"""


# -- values in columns -------------------------------------------------------------------------------------------------

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_LARGEST: Final = 2**63 - 1


def _columns(**columns: Any) -> Values:
    return {name: _value(value) for name, value in columns.items()}


def _value(value: Any) -> Any:
    """How the journal keeps a value."""
    kind = type(value)
    if value is None or kind is float or (kind is str and value.isascii()) or (kind is int and -_LARGEST <= value <= _LARGEST):
        return value  # most are
    match value:
        case None | bytes() | float():
            return value
        case bool():
            return int(value)
        case int():
            return int(value) if abs(value) <= _LARGEST else str(value).encode()  # a server may claim any size
        case str() | Path() | UUID():
            return _text_in(str(value))
        case datetime():
            return (value - _EPOCH) // _MICROSECOND
        case Enum():
            return value.value
    raise TypeError(f"no column for {type(value).__name__}")


def _text_in(text: str) -> str | bytes:
    """Text as text; what is no UTF-8 (a path with lone surrogates) as bytes, which a TEXT column keeps as they are."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")
    return text


def _text_out(value: str | bytes) -> str:
    return value.decode("utf-8", "surrogatepass") if isinstance(value, bytes) else str(value)


def _owner_text(key: OwnerKey) -> str:
    """As the statement `_IN_LINE` puts it together; the sid holds the local user and the principal."""
    return "\x1f".join((key.sid, key.name, key.proof or "", f"{key.process:d}{key.elevated:d}"))


def _maybe_text(value: str | bytes | None) -> str | None:
    return None if value is None else _text_out(value)


def _maybe_int(value: int | bytes | None) -> int | None:
    return None if value is None else int(value)


def _maybe_time(value: int | None) -> datetime | None:
    return None if value is None else _EPOCH + value * _MICROSECOND


def _split_url(url: str) -> tuple[str, str]:
    """What of a URL may be read in the journal, and what is sealed.

    Sealed is the query with what follows, or the whole URL where it has user information. `_join_url` puts them together.
    """
    cut = min((at for at in (url.find("?"), url.find("#")) if at >= 0), default=len(url))
    base, secret = url[:cut], url[cut:]
    scheme, slashes, rest = base.partition("://")
    authority, slash, path = rest.partition("/")
    if "@" in authority:
        return f"{scheme}{slashes}{authority.rpartition('@')[2]}{slash}{path}", url
    return base, secret


def _join_url(base: str, secret: str) -> str:
    return base + secret if secret[:1] in ("", "?", "#") else secret


def _origins_in(origins: frozenset[Origin] | None) -> str | None:
    return None if origins is None else json.dumps(sorted([o.scheme, o.host, o.port] for o in origins))


def _origins_out(text: str | None) -> frozenset[Origin] | None:
    return None if text is None else frozenset(Origin(scheme, host, port) for scheme, host, port in json.loads(text))


def _certificate_in(given: ClientCertificate | None) -> str | None:
    if given is None:
        return None
    paths = {name: value and str(value) for name, value in (("key", given.key), ("password_file", given.password_file))}
    thumbprint = given.thumbprint and given.thumbprint.hex()
    return json.dumps({"source": str(given.source), "thumbprint": thumbprint, "subject_name": given.subject_name, **paths})


def _certificate_out(text: str | None) -> ClientCertificate | None:
    if text is None:
        return None
    stored = json.loads(text)
    return ClientCertificate(
        source=Path(stored["source"]),
        thumbprint=None if stored["thumbprint"] is None else bytes.fromhex(stored["thumbprint"]),
        subject_name=stored["subject_name"],
        key=None if stored["key"] is None else Path(stored["key"]),
        password_file=None if stored["password_file"] is None else Path(stored["password_file"]),
    )


def _url_place(job_id: UUID, owner: str, index: int, column: str) -> Place:
    return Place(job_id, owner, f"files.{index}.{column}")


def _headers_place(job: JobRecord) -> Place:
    return Place(job.id, job.owner.sid, "jobs.custom_headers")


def _password_place(job_id: UUID, owner: str, target: AuthTarget, scheme: AuthScheme) -> Place:
    return Place(job_id, owner, "grants.password", target.name, scheme.name)


# -- records to rows ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Lost:
    """Sealed values that this key does not open: of files by (job, index, column), beside their readable part; of grants; of jobs."""

    urls: dict[tuple[UUID, int, str], tuple[str, bytes]] = field(default_factory=dict)
    grants: set[tuple[UUID, AuthTarget, AuthScheme]] = field(default_factory=set)
    headers: dict[UUID, bytes] = field(default_factory=dict)  # of jobs: custom headers

    def jobs(self) -> frozenset[UUID]:
        return frozenset((*(key[0] for key in (*self.urls, *self.grants)), *self.headers))

    def copy(self) -> "_Lost":
        return _Lost(dict(self.urls), set(self.grants), dict(self.headers))

    def add(self, more: "_Lost") -> None:
        self.urls |= more.urls
        self.grants |= more.grants
        self.headers |= more.headers

    def forget(self, job_ids: Set[UUID]) -> None:
        self.urls = {key: value for key, value in self.urls.items() if key[0] not in job_ids}
        self.grants = {key for key in self.grants if key[0] not in job_ids}
        self.headers = {key: value for key, value in self.headers.items() if key not in job_ids}


@dataclass(slots=True)
class _Batch:
    """The changes of one transaction: of each thing the last one."""

    removed: dict[UUID, None] = field(default_factory=dict)
    jobs: dict[UUID, JobRecord] = field(default_factory=dict)
    files: dict[tuple[UUID, int], FileRecord] = field(default_factory=dict)
    slices: dict[tuple[UUID, int], list[Values]] = field(default_factory=dict)  # of the files, as they were at the call
    grants: dict[tuple[UUID, AuthTarget, AuthScheme], GrantRecord | None] = field(default_factory=dict)  # None: removed

    def add(self, change: Change) -> None:
        match change:
            case JobRecord():
                self.jobs[change.id] = change
            case FileRecord():
                self.files[change.job_id, change.index] = change
                self.slices[change.job_id, change.index] = _slice_rows(change)
            case GrantRecord():
                self.grants[change.job_id, change.target, change.scheme] = change
            case GrantRemoved():
                self.grants[change.job_id, change.target, change.scheme] = None
            case JobRemoved():
                self._remove(change.job_id)

    def _remove(self, job_id: UUID) -> None:
        self.removed[job_id] = None
        self.jobs.pop(job_id, None)
        self.files = {key: value for key, value in self.files.items() if key[0] != job_id}
        self.grants = {key: value for key, value in self.grants.items() if key[0] != job_id}

    def job_ids(self) -> list[UUID]:
        mentioned = (*self.jobs, *(key[0] for key in self.files), *(key[0] for key in self.grants))
        return list(dict.fromkeys(mentioned))

    def owners(self, before: Mapping[UUID, str]) -> dict[UUID, str]:
        """The owners' sids as they are after the transaction, of the jobs that it mentions and that exist then."""
        kept = {job_id: sid for job_id, sid in before.items() if job_id not in self.removed}
        return kept | {job_id: job.owner.sid for job_id, job in self.jobs.items()}


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A save that waits for its transaction, and what it will hear of it."""

    batch: _Batch
    done: "asyncio.Future[None]"


@dataclass(slots=True)
class _Rows:
    jobs: list[Values]
    files: list[Values]
    ranges: list[Values]
    slices: list[Values]
    grants: list[Values]
    grants_removed: list[Values]


class _Writer:
    """Turns records into rows; seals what must not be read. `lost` is what is lost once the transaction is committed."""

    def __init__(self, box: SecretBox, lost: _Lost) -> None:
        self._box = box
        self.lost = lost.copy()

    def rows(self, batch: _Batch, owners: Mapping[UUID, str]) -> _Rows:
        for job_id in batch.job_ids():
            if job_id not in owners and any(key[0] == job_id for key in (*batch.files, *(k for k, v in batch.grants.items() if v))):
                raise NotFound(job_id=job_id)
        return _Rows(
            [_job_row(job) | self._headers_of(job) for job in batch.jobs.values()],
            [self._file_row(file, owners[file.job_id]) for file in batch.files.values()],
            [row for file in batch.files.values() for row in _range_rows(file)],
            [row for each in batch.files for row in batch.slices[each]],
            [self._grant_row(grant, owners[grant.job_id]) for grant in batch.grants.values() if grant],
            [self._grant_removed(*key) for key, grant in batch.grants.items() if grant is None],
        )

    def moved_files(self, rows: Iterable[Row], old: str, new: str) -> list[Values]:
        return [
            {
                "job_id": row["job_id"],
                "file_index": row["file_index"],
                **{
                    f"{column}_secret": self._moved(
                        row[f"{column}_secret"],
                        _url_place(UUID(row["job_id"]), old, row["file_index"], column),
                        _url_place(UUID(row["job_id"]), new, row["file_index"], column),
                    )
                    for column in ("original_url", "url")
                },
            }
            for row in rows
        ]

    def moved_grants(self, rows: Iterable[Row], old: str, new: str) -> list[Values]:
        moved = []
        for row in rows:
            which = AuthTarget(row["target"]), AuthScheme(row["scheme"])
            before, after = (_password_place(UUID(row["job_id"]), owner, *which) for owner in (old, new))
            key = {name: row[name] for name in ("job_id", "target", "scheme")}
            moved.append({**key, "password_secret": self._moved(row["password_secret"], before, after)})
        return moved

    def _moved(self, sealed: bytes | None, before: Place, after: Place) -> bytes | None:
        secret = None if sealed is None else self._box.open(sealed, before)
        return sealed if secret is None else self._box.seal(secret, after)

    def _headers_of(self, job: JobRecord) -> Values:
        headers = job.http.headers
        if headers is None:  # as load() gave them: what is sealed stays
            return {"custom_headers_secret": self.lost.headers.get(job.id)}
        self.lost.headers.pop(job.id, None)
        return {"custom_headers_secret": self._box.seal(headers_text(headers), _headers_place(job)) if headers else None}

    def _file_row(self, file: FileRecord, owner: str) -> Values:
        validator, part = file.validator, file.part
        original_url, original_url_secret = self._url(file, owner, "original_url", file.original_url)
        url, url_secret = self._url(file, owner, "url", file.url)
        return _columns(
            job_id=file.job_id,
            file_index=file.index,
            original_url=original_url,
            original_url_secret=original_url_secret,
            url=url,
            url_secret=url_secret,
            path=file.path,
            sha256=file.digests.sha256,
            sha512=file.digests.sha512,
            blake3=file.digests.blake3,
            pinned=validator is not None,
            etag=validator and validator.etag,
            last_modified=validator and validator.last_modified,
            size=validator and validator.size,
            served_sha256=validator and validator.digests.sha256,
            served_sha512=validator and validator.digests.sha512,
            media_type=validator and validator.media_type,
            part_directory=part and part.directory,
            part_name=part and part.name,
            part_dir_device=part and str(part.dir_device),
            part_dir_inode=part and str(part.dir_inode),
            part_device=part and str(part.device),
            part_inode=part and str(part.inode),
            part_uid=part and part.uid,
            part_maker=part and part.maker,
            part_draft=file.draft,
            boot_id=file.boot_id,
            restarts=file.restarts,
            refetches=file.refetches,
            wrong_digest=file.wrong_digest,
            transferred=file.transferred,
            committed=file.committed,
            validated=file.validated,
            wanted=json.dumps([[each.initial_offset, each.length] for each in file.wanted]) if file.wanted else "[]",
            position=file.position,
            owed=file.owed,
        )

    def _url(self, file: FileRecord, owner: str, column: str, url: str) -> tuple[str, bytes | None]:
        key = file.job_id, file.index, column
        if key in self.lost.urls and self.lost.urls[key][0] == url:
            return self.lost.urls[key]  # the URL as load() gave it, without its query: what is sealed stays
        self.lost.urls.pop(key, None)
        base, secret = _split_url(url)
        return base, self._box.seal(secret, _url_place(file.job_id, owner, file.index, column)) if secret else None

    def _grant_row(self, grant: GrantRecord, owner: str) -> Values:
        which = grant.job_id, grant.target, grant.scheme
        self.lost.grants.discard(which)
        place = _password_place(grant.job_id, owner, grant.target, grant.scheme)
        return _columns(
            job_id=grant.job_id,
            target=grant.target,
            scheme=grant.scheme,
            user_name=grant.user_name,
            password_secret=None if grant.password is None else self._box.seal(grant.password, place),
            origins=_origins_in(grant.origins),
        )

    def _grant_removed(self, job_id: UUID, target: AuthTarget, scheme: AuthScheme) -> Values:
        self.lost.grants.discard((job_id, target, scheme))
        return _columns(job_id=job_id, target=target, scheme=scheme)


def _job_row(job: JobRecord) -> Values:
    owner, error = job.owner, job.error.fields() if job.error else {}
    return _columns(
        id=job.id,
        display_name=job.display_name,
        description=job.description,
        owner_sid=owner.sid,
        owner_name=owner.name,
        owner_local=owner.local,
        owner_principal=owner.principal,
        owner_proof=owner.proof,
        owner_process=owner.process,
        owner_elevated=owner.elevated,
        owner_session=owner.session,
        created=job.created,
        modified=job.modified,
        completed=job.completed,
        priority=job.priority,
        state=job.state,
        resumed=job.resumed,
        helper_flags=job.helper_flags,
        proxy_usage=job.proxy.usage,
        proxy_list=json.dumps(job.proxy.proxy_list),
        proxy_bypass=json.dumps(job.proxy.bypass),
        proxy_resolved=job.proxy.resolved,
        http_method=job.http.method,
        custom_headers_write_only=job.http.headers_write_only,
        custom_headers_origins=_origins_in(job.http.header_origins),
        security_flags=job.http.flags,
        crl_source=job.http.crl_source,
        validates_certificates=job.http.validates_certificates,
        client_certificate=_certificate_in(job.http.client_certificate),
        client_certificate_origins=_origins_in(job.http.certificate_origins),
        minimum_retry_delay=float(job.minimum_retry_delay),
        no_progress_timeout=float(job.no_progress_timeout),
        maximum_download_time=float(job.maximum_download_time),
        maximum_bandwidth=job.maximum_bandwidth,
        own_download_time=job.own_download_time,
        cost_flags=job.cost_flags,
        maximum_download_size=job.maximum_download_size,
        dynamic_content=job.dynamic_content,
        high_performance=job.high_performance,
        on_demand_mode=job.on_demand_mode,
        files_at_once=job.files_at_once,
        segments=job.segments,
        **{f"error_{name}": error.get(name) for name in _ERROR_FIELDS},
        error_file=job.error_file,
        error_count=job.error_count,
        retry_number=job.retry_number,
        retry_at=job.retry_at,
        stalled=float(job.stalled),
        active=float(job.active),
        notify_flags=job.notify_flags,
        notify_program=job.notify_cmd_line and job.notify_cmd_line.program,
        notify_parameters=job.notify_cmd_line and json.dumps(job.notify_cmd_line.parameters),
        notify_setter=job.notify_setter and json.dumps(asdict(job.notify_setter)),
        minimum_notification_interval=float(job.minimum_notification_interval),
        owed=job.owed,
        gives_up_at=job.gives_up_at,
        turn=job.turn,
    )


_ERROR_FIELDS: Final = tuple(BitsError().fields())


def _range_rows(file: FileRecord) -> list[Values]:
    return [
        _columns(job_id=file.job_id, file_index=file.index, range_index=number, start=each.initial_offset, length=each.length)
        for number, each in enumerate(file.ranges)
    ]


def _slice_rows(file: FileRecord) -> list[Values]:
    job = str(file.job_id)
    return [
        {
            "job_id": job,
            "file_index": file.index,
            "slice_index": number,
            "start": _value(piece.start),
            "stop": _value(piece.end),
            "durable": _value(piece.durable),
        }
        for number, piece in enumerate(file.slices)
    ]


# -- rows to records ---------------------------------------------------------------------------------------------------


class _Reader:
    """Turns rows into records; collects in `lost` what the key does not open."""

    def __init__(self, box: SecretBox, path: Path) -> None:
        self._box = box
        self._path = path
        self.lost = _Lost()

    def jobs(
        self, jobs: Iterable[Row], files: Iterable[Row], ranges: Iterable[Row], slices: Iterable[Row], grants: Iterable[Row]
    ) -> list[StoredJob]:
        files_of, grants_of = _by(files, "job_id"), _by(grants, "job_id")
        ranges_of, slices_of = _by(ranges, "job_id", "file_index"), _by(slices, "job_id", "file_index")
        return [self._job(row, files_of, ranges_of, slices_of, grants_of) for row in jobs]

    def _job(self, row: Row, files_of: "_Groups", ranges_of: "_Groups", slices_of: "_Groups", grants_of: "_Groups") -> StoredJob:
        name = row["id"]
        try:
            job = self._with_headers(row, _job(row))
            files = [
                self._file(file, job, ranges_of.get((name, file["file_index"]), ()), slices_of.get((name, file["file_index"]), ()))
                for file in files_of.get((name,), ())
            ]
            grants = [self._grant(grant, job) for grant in grants_of.get((name,), ())]
        except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as exc:
            raise StoreError(f"the journal's record of job {show_text(str(name), 40)} is damaged", path=self._path) from scrub(exc)
        return StoredJob(job, tuple(files), tuple(grant for grant in grants if grant))

    def _with_headers(self, row: Row, job: JobRecord) -> JobRecord:
        sealed = row["custom_headers_secret"]
        if sealed is None:
            return job
        text = self._box.open(sealed, _headers_place(job))
        if text is None:
            self.lost.headers[job.id] = sealed
        return replace(job, http=replace(job.http, headers=None if text is None else headers_of_text(text)))

    def _file(self, row: Row, job: JobRecord, ranges: Iterable[Row], slices: Iterable[Row]) -> FileRecord:
        return FileRecord(
            job_id=job.id,
            index=row["file_index"],
            original_url=self._url(row, job, "original_url"),
            url=self._url(row, job, "url"),
            path=Path(_text_out(row["path"])),
            digests=Digests(row["sha256"], row["sha512"], row["blake3"]),
            ranges=tuple(FileRange(int(each["start"]), _maybe_int(each["length"])) for each in ranges),
            validator=_validator(row),
            part=_part(row),
            draft=_text_out(row["part_draft"]),
            slices=tuple(_slice(piece) for piece in slices),
            boot_id=row["boot_id"],
            restarts=row["restarts"],
            refetches=row["refetches"],
            wrong_digest=row["wrong_digest"],
            transferred=bool(row["transferred"]),
            committed=bool(row["committed"]),
            validated=bool(row["validated"]),
            wanted=tuple(FileRange(start, length) for start, length in json.loads(row["wanted"])),
            position=int(row["position"]),
            owed=bool(row["owed"]),
        )

    def _url(self, row: Row, job: JobRecord, column: str) -> str:
        base, sealed = _text_out(row[column]), row[f"{column}_secret"]
        if sealed is None:
            return base
        secret = self._box.open(sealed, _url_place(job.id, job.owner.sid, row["file_index"], column))
        if secret is None:
            self.lost.urls[job.id, row["file_index"], column] = base, sealed
            return base
        return _join_url(base, secret)

    def _grant(self, row: Row, job: JobRecord) -> GrantRecord | None:
        target, scheme, sealed = AuthTarget(row["target"]), AuthScheme(row["scheme"]), row["password_secret"]
        password = sealed and self._box.open(sealed, _password_place(job.id, job.owner.sid, target, scheme))
        if sealed is not None and password is None:
            self.lost.grants.add((job.id, target, scheme))
            return None
        return GrantRecord(
            job_id=job.id,
            target=target,
            scheme=scheme,
            user_name=_maybe_text(row["user_name"]),
            password=password,
            origins=_origins_out(row["origins"]),
        )


_Groups = dict[tuple[Any, ...], list[Row]]


def _by(rows: Iterable[Row], *columns: str) -> _Groups:
    groups: _Groups = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in columns), []).append(row)
    return groups


def _owner(row: Row) -> OwnerKey:
    return OwnerKey(
        sid=_text_out(row["owner_sid"]),
        name=_text_out(row["owner_name"]),
        local=_text_out(row["owner_local"]),
        principal=_maybe_text(row["owner_principal"]),
        proof=_maybe_text(row["owner_proof"]),
        process=bool(row["owner_process"]),
        elevated=bool(row["owner_elevated"]),
        session=_maybe_text(row["owner_session"]),
    )


def _proxy(row: Row) -> ProxySettings:
    return ProxySettings(
        ProxyUsage(row["proxy_usage"]),
        tuple(json.loads(row["proxy_list"])),
        tuple(json.loads(row["proxy_bypass"])),
        bool(row["proxy_resolved"]),
    )


def _http(row: Row) -> HttpOptions:
    return HttpOptions(
        method=_text_out(row["http_method"]),
        headers_write_only=bool(row["custom_headers_write_only"]),
        header_origins=_origins_out(row["custom_headers_origins"]),
        flags=SecurityFlags(row["security_flags"]),
        crl_source=None if row["crl_source"] is None else Path(_text_out(row["crl_source"])),
        validates_certificates=bool(row["validates_certificates"]),
        client_certificate=_certificate_out(row["client_certificate"]),
        certificate_origins=_origins_out(row["client_certificate_origins"]),
    )


def _job(row: Row) -> JobRecord:
    return JobRecord(
        id=UUID(row["id"]),
        display_name=_text_out(row["display_name"]),
        description=_text_out(row["description"]),
        owner=_owner(row),
        created=_EPOCH + row["created"] * _MICROSECOND,
        modified=_EPOCH + row["modified"] * _MICROSECOND,
        completed=_maybe_time(row["completed"]),
        priority=JobPriority(row["priority"]),
        state=JobState(row["state"]),
        resumed=bool(row["resumed"]),
        helper_flags=HelperTokenFlags(row["helper_flags"]),
        proxy=_proxy(row),
        http=_http(row),
        minimum_retry_delay=row["minimum_retry_delay"],
        no_progress_timeout=row["no_progress_timeout"],
        maximum_download_time=row["maximum_download_time"],
        maximum_bandwidth=row["maximum_bandwidth"],
        own_download_time=bool(row["own_download_time"]),
        cost_flags=CostFlags(row["cost_flags"]),
        maximum_download_size=_maybe_int(row["maximum_download_size"]),
        dynamic_content=bool(row["dynamic_content"]),
        high_performance=bool(row["high_performance"]),
        on_demand_mode=bool(row["on_demand_mode"]),
        files_at_once=row["files_at_once"],
        segments=row["segments"],
        error=_error(row),
        error_file=row["error_file"],
        error_count=row["error_count"],
        retry_number=row["retry_number"],
        retry_at=_maybe_time(row["retry_at"]),
        stalled=row["stalled"],
        active=row["active"],
        notify_flags=NotifyFlags(row["notify_flags"]),
        notify_cmd_line=_command(row),
        notify_setter=None if row["notify_setter"] is None else OwnerKey(**json.loads(row["notify_setter"])),
        minimum_notification_interval=row["minimum_notification_interval"],
        owed=NotifyFlags(row["owed"]),
        gives_up_at=_maybe_time(row["gives_up_at"]),
        turn=row["turn"],
    )


def _command(row: Row) -> NotifyCmdLine | None:
    if row["notify_program"] is None:
        return None
    return NotifyCmdLine(_text_out(row["notify_program"]), tuple(json.loads(row["notify_parameters"])))


def _error(row: Row) -> BitsError | None:
    """The error as it was stored: its class follows from code and context, as when it was made."""
    if row["error_code"] is None:
        return None
    return make_error(
        row["error_code"],
        ErrorContext(row["error_context"]),
        _text_out(row["error_message"]),
        transient=bool(row["error_transient"]),
        job_id=UUID(row["error_job_id"]) if row["error_job_id"] else None,
        url=_maybe_text(row["error_url"]),
        path=_maybe_text(row["error_path"]),
        identity=_maybe_text(row["error_identity"]),
        http_status=row["error_http_status"],
        advice=_maybe_text(row["error_advice"]),
        retry_after=row["error_retry_after"],
    )


def _validator(row: Row) -> Validator | None:
    if not row["pinned"]:
        return None
    digests = Digests(row["served_sha256"], row["served_sha512"])
    return Validator(
        _maybe_text(row["etag"]), _maybe_text(row["last_modified"]), _maybe_int(row["size"]), digests, _maybe_text(row["media_type"])
    )


def _slice(row: Row) -> Slice:
    durable = int(row["durable"])
    return Slice(int(row["start"]), _maybe_int(row["stop"]), written=durable, durable=durable)


def _part(row: Row) -> PartRecord | None:
    if row["part_name"] is None:
        return None
    return PartRecord(
        directory=_text_out(row["part_directory"]),
        name=_text_out(row["part_name"]),
        dir_device=int(row["part_dir_device"]),
        dir_inode=int(row["part_dir_inode"]),
        device=int(row["part_device"]),
        inode=int(row["part_inode"]),
        uid=_maybe_int(row["part_uid"]),
        maker=_maybe_text(row["part_maker"]),
    )
