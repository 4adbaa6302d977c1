"""A journal with very many queued jobs: one made through the API, and copies of it by SQL."""

import contextlib
import sqlite3
from pathlib import Path
from uuid import UUID

import bits_async as bits

COPIES = """
    WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < :count)
    INSERT INTO {table} ({columns}) SELECT {values} FROM {table}, numbers
"""
ID = "printf('%08x-0000-4000-8000-000000000000', n)"


def copy_of(number: int) -> UUID:
    """The id of a copy, the first of which is 1."""
    return UUID(f"{number:08x}-0000-4000-8000-000000000000")


async def make_crowd(
    path: Path, count: int, *, url: str = "https://crowd.test/", priority: bits.JobPriority = bits.JobPriority.NORMAL
) -> None:
    """A new journal with `count` QUEUED jobs of this process: of the copies each has the file `url` + its number.

    They come in the order of their numbers, behind the first one, which is named "first" and has the file `url`.
    """
    async with bits.BitsManager(store=path, run=False) as manager:
        job = await manager.create_job("first", priority=priority)
        await job.add_file(url, path.parent / "0")
        await job.resume()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA synchronous=OFF")
        db.execute("PRAGMA cache_size=-200000")
        db.execute("BEGIN")
        changed = {
            "jobs": {"id": ID, "display_name": "'copy'", "created": "created + n", "modified": "modified + n"},
            "files": {"job_id": ID, "url": "url || n", "original_url": "original_url || n", "path": "rtrim(path, '0') || n"},
        }
        for table, values in changed.items():
            names = [row[1] for row in db.execute(f"PRAGMA table_info({table})") if row[1] != "number"]
            sql = COPIES.format(table=table, columns=", ".join(names), values=", ".join(values.get(name, name) for name in names))
            db.execute(sql, {"count": count - 1})
        db.execute("COMMIT")
