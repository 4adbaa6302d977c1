"""A process of its own that downloads, says how much memory it needed, and dies by SIGKILL where a test wants it to.

    python tests/process/downloader.py '{"url": ..., "path": ..., "die": "before rename_at 1"}'

`die` names a point: before, after or (of a write) halfway through the n-th call of a file call of the platform's twin, or of
`save`, a transaction of the journal.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def start(url: str, path: Path, **more: Any) -> "subprocess.Popen[str]":
    """Start the process; when it ends well, it has printed the most memory that it had, in bytes.

    Args:
        url, path: what is downloaded.
        more: sha256, store, queue (true: a job of a `BitsManager`, left TRANSFERRED), cancel (true: which is then cancelled),
            segments and segment (of a queue: how many, and bytes of the smallest), copies (of a queue: so many files, the others named
            path1, path2), checkpoint (bytes), die, slowly (seconds that each write to the file takes more).
    """
    order = json.dumps({"url": url, "path": str(path), **more})
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-W", "error", __file__, order]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


# -- in the process


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class _Countdown:
    """True at the n-th call."""

    def __init__(self, number: int) -> None:
        self._left = number

    def now(self) -> bool:
        self._left -= 1
        return self._left == 0


def _doomed(honest: Callable[..., Any], when: str, count: _Countdown) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        doomed = count.now()
        if doomed and when == "before":
            _die()
        if doomed and when == "halfway":
            fd, chunks, offset, *_ = args
            whole = b"".join(chunks)
            honest(fd, [whole[: len(whole) // 2]], offset)
            _die()
        found = honest(*args)
        if doomed:
            _die()
        return found

    return call


def _doom(point: str) -> None:
    from bits_async.identity import native
    from bits_async.jobs.store import SqliteStore

    when, name, number = point.split()
    count = _Countdown(int(number))
    if name != "save":
        setattr(native, name, _doomed(getattr(native, name), when, count))
        return
    honest = SqliteStore._save

    async def save(self: SqliteStore, batch: Any) -> None:
        doomed = bool(batch.jobs or batch.files or batch.removed) and count.now()
        if doomed and when == "before":
            _die()
        await honest(self, batch)
        if doomed:
            _die()

    SqliteStore._save = save  # type: ignore[method-assign]


def _slow_down(seconds: float) -> None:
    from bits_async.identity import native

    honest = native.pwrite_all

    def pwrite_all(*args: Any) -> int:
        time.sleep(seconds)
        return honest(*args)

    native.pwrite_all = pwrite_all


def _peak() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))) * 1024


async def _queue(order: dict[str, Any]) -> None:
    import bits_async as bits

    async with bits.BitsManager(store=order["store"]) as manager:
        job = await manager.create_job("killed")
        await job.set_segments(order.get("segments", 1))
        paths = [order["path"], *(f"{order['path']}{number}" for number in range(1, order.get("copies", 1)))]
        await job.add_file_set([bits.FileInfo(order["url"], path, sha256=order.get("sha256")) for path in paths])
        await job.resume()
        await job.wait()
        if order.get("cancel"):
            await job.cancel()


async def _download(order: dict[str, Any]) -> None:
    import bits_async as bits

    await bits.download(order["url"], order["path"], sha256=order.get("sha256"), store=order.get("store"))


def main(arguments: Sequence[str]) -> None:
    from bits_async.jobs import transfer

    order = json.loads(arguments[0])
    transfer.SEGMENT = order.get("segment", transfer.SEGMENT)  # type: ignore[misc]
    transfer.CHECKPOINT_BYTES = order.get("checkpoint", transfer.CHECKPOINT_BYTES)  # type: ignore[misc]
    if "die" in order:
        _doom(order["die"])
    if order.get("slowly"):
        _slow_down(order["slowly"])
    asyncio.run(_queue(order) if order.get("queue") else _download(order))
    print(_peak())


if __name__ == "__main__":
    main(sys.argv[1:])
