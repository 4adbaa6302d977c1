"""The SQL of the journal: what is asked of all jobs by index, without loading them, and what writes and reads their rows."""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Final
from uuid import UUID

import aiosqlite

from .columns import Row, Values, text_out


async def fetch(db: aiosqlite.Connection, sql: str, values: Row | Sequence[Any] = ()) -> list[Row]:
    rows: Any = await db.execute_fetchall(sql, values)
    return list(rows)


async def pragma(db: aiosqlite.Connection, name: str) -> Any:
    rows: Any = await fetch(db, f"PRAGMA {name}")
    return rows[0][0] if rows else None


def each(db: sqlite3.Connection, sql: str, rows: Sequence[Values]) -> None:
    if rows:
        db.executemany(sql, rows)


@contextmanager
def all_or_nothing(db: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """All that is written in it, durable at its end, or nothing. For those who are in the store's thread."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield db
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:  # else SQLite rolled back by itself, or the commit got there first
            db.execute("ROLLBACK")
        raise


def owners(db: sqlite3.Connection, job_ids: Sequence[UUID]) -> dict[UUID, str]:
    """The owners' sids as the journal has them."""
    found: dict[UUID, str] = {}
    for start in range(0, len(job_ids), 500):  # SQLite allows 999 parameters
        some = [str(job_id) for job_id in job_ids[start : start + 500]]
        marks = ", ".join("?" * len(some))
        for row in db.execute(f"SELECT id, owner_sid FROM jobs WHERE id IN ({marks})", some):  # noqa: S608 - question marks
            found[UUID(row["id"])] = text_out(row["owner_sid"])
    return found


def put(db: sqlite3.Connection, table: str, rows: Sequence[Values], *, key: Sequence[str]) -> None:
    """New rows, or other values for those that are there. All with the same columns in the same order."""
    if rows:
        _many(db, _upsert(table, tuple(rows[0]), tuple(key)), rows)


def change(db: sqlite3.Connection, table: str, rows: Sequence[Values], *, key: Sequence[str]) -> bool:
    """Other values for some columns of rows that are there; the key's columns come last. Whether all of them are."""
    return not rows or _many(db, update(table, tuple(rows[0])[: -len(key)], tuple(key)), rows) == len(rows)


def _many(db: sqlite3.Connection, sql: str, rows: Sequence[Values]) -> int:
    """By position: SQLite looks for each name in all of the statement's."""
    return db.executemany(sql, [tuple(row.values()) for row in rows]).rowcount


@cache
def update(table: str, columns: tuple[str, ...], key: tuple[str, ...]) -> str:
    """Its values: those of the columns, then those of the key."""
    changes, which = ", ".join(f"{c} = ?" for c in columns), " AND ".join(f"{c} = ?" for c in key)
    return f"UPDATE {table} SET {changes} WHERE {which}"  # noqa: S608 - our own names


@cache
def _upsert(table: str, columns: tuple[str, ...], key: tuple[str, ...]) -> str:
    """A row is changed in place: it keeps its number, and what refers to it."""
    names, values = ", ".join(columns), ", ".join("?" * len(columns))
    changes = ", ".join(f"{c} = excluded.{c}" for c in columns if c not in key)
    return (
        f"INSERT INTO {table} ({names}) VALUES ({values}) "  # noqa: S608 - our own names
        f"ON CONFLICT ({', '.join(key)}) DO UPDATE SET {changes}"
    )


def select(*, some: bool) -> Iterator[str]:
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
IN_LINE: Final = """
    SELECT id FROM jobs WHERE number IN (
        SELECT number FROM jobs INDEXED BY jobs_by_turn
        WHERE state = 0 AND priority = :priority AND dynamic_content <= :dynamic AND
            owner_sid || char(31) || owner_name || char(31) || ifnull(owner_proof, '') || char(31) || owner_process || owner_elevated
            NOT IN (SELECT value FROM json_each(:absent))
        ORDER BY turn, number LIMIT :count)
    ORDER BY turn, number"""
PROBE: Final = "INSERT OR REPLACE INTO settings VALUES ('probe', zeroblob(:size))"
PROBED: Final = "DELETE FROM settings WHERE name = 'probe'"
COMMITTED: Final = "UPDATE files SET committed = 1, validated = 1 WHERE job_id = :job_id AND file_index = :file_index"
OUTLOOK: Final = """
    SELECT (SELECT ifnull(max(turn), 0) FROM jobs WHERE turn > 0) AS turn,
        (SELECT json_group_array(value) FROM json_each(:priorities)
            WHERE EXISTS (SELECT * FROM jobs INDEXED BY jobs_by_turn WHERE state = 0 AND priority = value)) AS queued,
        (SELECT min(ifnull(retry_at, gives_up_at)) FROM jobs INDEXED BY jobs_by_moment WHERE state = 5) AS moment,
        EXISTS (SELECT * FROM jobs INDEXED BY jobs_awaiting WHERE state = 5 AND retry_at IS NULL AND number > 0) AS awaiting,
        EXISTS (SELECT * FROM jobs INDEXED BY jobs_owing WHERE owed <> 0 AND notify_program IS NOT NULL AND number > 0) AS owing"""
IS_BUSY: Final = "SELECT EXISTS (SELECT * FROM jobs WHERE state IN (0, 1, 2, 5)) AS busy"
DUE: Final = """
    SELECT id FROM jobs INDEXED BY jobs_by_moment WHERE ifnull(retry_at, gives_up_at) <= :now AND state = 5
    ORDER BY ifnull(retry_at, gives_up_at) LIMIT :count"""
NEXT_DUE: Final = """
    SELECT min(ifnull(retry_at, gives_up_at)) AS moment FROM jobs INDEXED BY jobs_by_moment
    WHERE ifnull(retry_at, gives_up_at) > :after AND state = 5"""
SHIFT_RETRIES: Final = "UPDATE jobs SET retry_at = retry_at + :by, gives_up_at = gives_up_at + :by WHERE state = 5"
HASTEN_RETRIES: Final = "UPDATE jobs SET retry_at = :now WHERE state = 5 AND retry_at > :now"
AWAITING: Final = """
    SELECT number, id FROM jobs INDEXED BY jobs_awaiting WHERE state = 5 AND retry_at IS NULL AND number > :after
    ORDER BY number LIMIT :count"""
OWING: Final = """
    SELECT number, id FROM jobs INDEXED BY jobs_owing WHERE owed <> 0 AND notify_program IS NOT NULL AND number > :after
    ORDER BY number LIMIT :count"""
UNTOUCHED: Final = "SELECT id, modified FROM jobs WHERE owner_elevated = :elevated ORDER BY modified LIMIT :count"
NUMBERED: Final = "SELECT number, id FROM jobs WHERE number > :after ORDER BY number LIMIT :count"
NUMBERED_OF_OWNER: Final = "SELECT number, id FROM jobs WHERE owner_sid = :owner_sid AND number > :after ORDER BY number LIMIT :count"
LAST_NUMBER: Final = "SELECT ifnull(max(number), 0) AS number FROM jobs"
COUNT: Final = "SELECT count(*) AS jobs FROM (SELECT 1 FROM jobs LIMIT :most)"
COUNT_OF_OWNER: Final = "SELECT count(*) AS jobs FROM (SELECT 1 FROM jobs WHERE owner_sid = :owner_sid LIMIT :most)"
WITH_DESTINATION: Final = """
    SELECT DISTINCT jobs.number, jobs.id FROM files CROSS JOIN jobs ON jobs.id = files.job_id
    WHERE files.path = :path AND jobs.owner_sid = :owner_sid ORDER BY jobs.number"""
RECOVERY: Final = (
    "UPDATE jobs SET state = 0 WHERE state IN (1, 2)",
    # no delay is longer than `scheduler.retry_delay` makes it
    """
    UPDATE jobs SET retry_at = :now + CAST(1000000 * max(minimum_retry_delay, :floor, ifnull(error_retry_after, 0)) AS INTEGER)
    WHERE state = 5 AND retry_at - :now > 1000000 * max(minimum_retry_delay, :floor, ifnull(error_retry_after, 0))""",
    """
    UPDATE jobs SET gives_up_at = iif(no_progress_timeout > 0, :now + CAST(1000000 * (no_progress_timeout - stalled) AS INTEGER), NULL)
    WHERE state = 5 AND retry_at IS NULL""",
)
SESSIONS_OF: Final = """
    SELECT DISTINCT owner_session FROM jobs INDEXED BY jobs_by_session WHERE owner_sid = :owner_sid AND owner_session IS NOT NULL"""
WITH_HELPER: Final = "SELECT id FROM jobs WHERE helper_flags <> 0 AND state IN (0, 3, 5) AND owner_sid = :owner_sid"
LOST_HELPERS: Final = """
    UPDATE jobs SET state = 4, {error}, error_job_id = id, error_count = error_count + 1, retry_at = NULL,
        owed = notify_flags & 2
    WHERE helper_flags <> 0 AND state IN (0, 3, 5)"""
