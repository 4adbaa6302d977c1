"""Downloads phase after phase, and counts what each cost: `counted.py ORDER`. No figure here depends on how fast the machine is.

An order names a journal, the authority's certificate, and phases: a name and the files of one job. For each phase a line of JSON:

    hops          calls into the event loop from other threads, one for each piece of work that a thread was given
    iterations    rounds of the event loop
    timers        set by the loop's thread
    calls         of Python's functions in the loop's thread; 0 unless the order says `trace`
    transactions  of the journal
    blocks        allocated blocks of Python's memory, more than before
    python_peak   most memory that Python's allocator had at once, more than before; 0 unless the order says `trace`

Whoever traces system calls finds the phases between looks at the file /phase/NAME.
"""

import asyncio
import gc
import json
import os
import selectors
import sqlite3
import ssl
import sys
import tracemalloc
from collections import Counter
from typing import Any

from inside import order

import bits_async as bits

COUNTS: Counter[str] = Counter()


class CountingSelector(selectors.DefaultSelector):
    def select(self, timeout: float | None = None) -> Any:
        COUNTS["iterations"] += 1
        return super().select(timeout)


class CountingLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        super().__init__(CountingSelector())

    def call_soon_threadsafe(self, callback: Any, *args: Any, context: Any = None) -> asyncio.Handle:
        COUNTS["hops"] += 1
        return super().call_soon_threadsafe(callback, *args, context=context)

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> asyncio.TimerHandle:
        COUNTS["timers"] += 1
        return super().call_at(when, callback, *args, context=context)


def _count_call(frame: object, event: str, argument: object) -> None:
    if event == "call":
        COUNTS["calls"] += 1


def _count_transactions() -> None:
    connect = sqlite3.connect

    def counting(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        database = connect(*args, **kwargs)
        database.set_trace_callback(lambda sql: COUNTS.update(transactions=sql == "COMMIT"))
        return database

    sqlite3.connect = counting  # type: ignore[assignment]


async def _job(manager: bits.BitsManager, files: list[list[str]]) -> None:
    job = await manager.create_job("counted", priority=bits.JobPriority.FOREGROUND)
    await job.add_file_set([bits.FileInfo(url, path) for url, path in files])
    await job.resume()
    await job.wait()
    await job.complete()


async def main(wish: dict[str, Any]) -> None:
    tls = ssl.create_default_context(cafile=wish["ca"])
    async with bits.BitsManager(store=wish["store"], ssl=tls) as manager:
        for name, files in wish["phases"]:
            gc.collect()
            if wish.get("trace"):
                tracemalloc.start()
            blocks = sys.getallocatedblocks()
            COUNTS.clear()
            os.access(f"/phase/{name}", os.F_OK)
            sys.setprofile(_count_call if wish.get("trace") else None)
            await _job(manager, files)
            sys.setprofile(None)
            os.access("/phase/", os.F_OK)
            counts = {each: COUNTS[each] for each in ("hops", "iterations", "timers", "calls", "transactions")}
            peak = tracemalloc.get_traced_memory()[1] if wish.get("trace") else 0
            tracemalloc.stop()
            gc.collect()
            print(json.dumps({"phase": name, **counts, "blocks": sys.getallocatedblocks() - blocks, "python_peak": peak}), flush=True)


if __name__ == "__main__":
    _count_transactions()
    with asyncio.Runner(loop_factory=CountingLoop) as runner:
        runner.run(main(order()))
