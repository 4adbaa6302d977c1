"""Fills a journal: `fill.py JOURNAL COUNT` makes that many queued jobs of one file each, alike but for their ids."""

import asyncio
import sys
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import bits_async as bits
from bits_async.jobs.store import SqliteStore

AT_ONCE = 5000


async def main(journal: Path, count: int) -> None:
    async with bits.BitsManager(store=journal, run=False) as manager:
        if not count:
            return
        job = await manager.create_job("one of many")
        await job.add_file("http://127.0.0.1:9/file", "/nonexistent/file")
        await job.resume()
    store = SqliteStore(journal)
    await store.open()
    try:
        ((pattern, files),) = [(each.job, each.files) for each in await store.load()]
        ids = [uuid4() for _ in range(count - 1)]
        for start in range(0, len(ids), AT_ONCE):
            some = ids[start : start + AT_ONCE]
            jobs = [replace(pattern, id=each) for each in some]
            await store.save(*jobs, *(replace(file, job_id=each) for each in some for file in files))
    finally:
        await store.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
