"""The journal's tables: what each version adds. A released version is never edited; a change is one more entry of `SCHEMA`."""

import contextlib
import sqlite3
from functools import cache
from typing import Final

APPLICATION_ID: Final = 0x42495453  # "BITS", in the database's header

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

COLUMNS: Final = "SELECT tables.name AS tab, columns.name AS col FROM sqlite_master AS tables, pragma_table_info(tables.name) AS columns"


@cache
def columns_of(schema: tuple[str, ...]) -> frozenset[tuple[str, str]]:
    """(table, column) of a schema."""
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.executescript("".join(schema))
        return frozenset(db.execute(COLUMNS))
