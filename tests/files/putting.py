"""The two ways bytes come into a part file, and what a test of files looks at."""

import contextlib
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol
from uuid import UUID

from bits_async.files.intake import Limiter, Stop
from bits_async.files.part import PartFile
from bits_async.transport.ranges import Detached, Slice

JOB = UUID("00112233-4455-6677-8899-aabbccddeeff")


class Put(Protocol):
    """Brings bytes to a position of a part file."""

    async def __call__(self, part: PartFile, offset: int, data: bytes) -> None: ...


async def write(part: PartFile, offset: int, chunks: Sequence[bytes | memoryview]) -> None:
    """As a piece of their own."""
    piece = Slice.fresh(offset, None)
    await part.append(piece, chunks)
    assert piece.written == offset + sum(map(len, chunks))


async def put_by_write(part: PartFile, offset: int, data: bytes) -> None:
    """In uneven chunks, as a connection delivers them."""
    third = len(data) // 3
    await write(part, offset, [data[:third], b"", memoryview(data)[third:]])


async def put_by_receive(part: PartFile, offset: int, data: bytes, limiter: Limiter | None = None, stop: Stop | None = None) -> None:
    """A few bytes read before, the rest over a socket."""
    piece = Slice.fresh(offset, offset + len(data))
    with plugged(data[len(data) // 7 :]) as ours:
        moved = await part.receive(Detached(ours, data[: len(data) // 7], len(data)), piece, limiter, stop)
    assert moved == len(data)
    assert piece.done


@contextlib.contextmanager
def plugged(data: bytes, *, keep_open: bool = False) -> Iterator[socket.socket]:
    """Our end of a connection whose other end sends `data`, and then closes."""
    ours, theirs = socket.socketpair()
    done = threading.Event()

    def send() -> None:
        with contextlib.suppress(OSError):  # the test may have had enough
            theirs.sendall(data)
        if keep_open:
            done.wait()
        theirs.close()

    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield ours
    finally:
        done.set()
        ours.close()
        sender.join()


def descriptors() -> set[tuple[str, str]]:
    """What this process has open, sockets and pipes of the test's own machinery included."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing itself
            found.add((name, os.readlink(f"/proc/self/fd/{name}")))
    return found


def open_below(directory: Path) -> list[str]:
    """Descriptors of this process that lead to that directory or into it."""
    return sorted(link for _, link in descriptors() if link.removesuffix(" (deleted)").startswith(str(directory)))
