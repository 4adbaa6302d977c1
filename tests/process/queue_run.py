"""A process that runs a queue of jobs to their ends and says what it was told, until somebody kills it.

    python tests/process/queue_run.py

It is a nursery: for each order (JSON, one a line on stdin) it forks a process that does the work, so that a kill costs milliseconds and
not the start of an interpreter. It answers "pid N", and "ended S" when that process is gone.

An order names the journal, the directory, the URLs by the numbers of the jobs, and what was reported before ("completed", say, by number).
The work is reported in lines of "verb number" to the file `report`, which survives a kill: "completing 3" before `complete()` is called,
"completed 3" after it has returned.
"""

import asyncio
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

FINISHING, CANCELLED, FAILING = range(10), range(10, 15), range(15, 20)
JOBS = range(20)


def start() -> "subprocess.Popen[str]":
    """The nursery."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-W", "error", __file__]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


# -- in the process that is killed


class _Run:
    def __init__(self, order: dict[str, Any]) -> None:
        self._order = order
        self._random = random.Random(order["seed"])
        self._report = os.open(order["report"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def say(self, verb: str, number: int) -> None:
        os.write(self._report, f"{verb} {number}\n".encode())

    async def whole(self) -> None:
        import bits_async as bits

        limits = bits.Limits(background_jobs=4)
        async with bits.BitsManager(store=self._order["store"], limits=limits) as manager:
            self.say("opened", 0)
            found = {int(job.display_name): job async for job in manager.enum_jobs()}
            todo = [number for number in JOBS if number not in self._order["gone"]]
            await asyncio.gather(*(self._drive(manager, number, found.get(number)) for number in todo))

    async def _drive(self, manager: Any, number: int, job: Any) -> None:
        import bits_async as bits

        if job is None:
            priority = bits.JobPriority.FOREGROUND if number % 2 else bits.JobPriority.NORMAL
            job = await manager.create_job(str(number), priority=priority)
            self.say("created", number)
        if not job.files:
            await job.add_file_set([bits.FileInfo(url, path) for url, path in self._order["files"][number]])
            self.say("added", number)
        if job.state is bits.JobState.SUSPENDED:
            await job.resume()
            self.say("resumed", number)
        if number in FINISHING:
            await self._finish(number, job)
        elif number in CANCELLED:
            await asyncio.sleep(self._random.uniform(0, 0.15))
            self.say("cancelling", number)
            assert (await job.cancel()).left_behind == ()
            self.say("cancelled", number)
        else:
            try:
                await job.wait()
            except bits.RemoteFileError:
                self.say("failed", number)

    async def _finish(self, number: int, job: Any) -> None:
        await job.wait()
        self.say("transferred", number)
        self.say("completing", number)
        await job.complete()
        self.say("completed", number)


def _forked(work: Callable[[], object]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(1)


def main(arguments: Sequence[str]) -> None:
    import aiosqlite  # noqa: F401 - here rather than in every process
    import cryptography.hazmat.primitives.ciphers.aead  # noqa: F401

    import bits_async as bits
    from bits_async.jobs import manager, transfer  # noqa: F401
    from bits_async.transport import lane  # noqa: F401

    assert all(getattr(bits, name) for name in bits.__all__)
    transfer.CHECKPOINT_BYTES = 64 << 10  # type: ignore[misc]
    transfer.WRITE_BATCH = 32 << 10  # type: ignore[misc]
    for line in sys.stdin:
        order = json.loads(line)
        pid = _forked(lambda order=order: asyncio.run(_Run(order).whole()))
        print(f"pid {pid}", flush=True)
        _, status = os.waitpid(pid, 0)
        print(f"ended {os.waitstatus_to_exitcode(status)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
