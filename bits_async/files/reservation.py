"""Space taken before the bytes come: step by step, and never far ahead of them (T18)."""

import errno
import threading
from typing import Final

from ..errors import ErrorCode, ErrorContext, make_error
from ..identity import native

RESERVE_AHEAD: Final = 64 << 20
"""Bytes that preallocation may run ahead of what was received (T18)."""

RESERVE_STEP: Final = 32 << 20
"""Bytes preallocated at once; a body whose rest is smaller than a write needs none."""


class Reservation:
    """Bytes preallocated and not yet written, as [start, end) pairs: never more than `RESERVE_AHEAD` in all (T18).

    Several threads (slices) share it, hence the lock.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ahead: list[list[int]] = []

    def next(self, offset: int, end: int) -> tuple[int, int]:
        """What to preallocate now for a stretch that is written at `offset` and goes to `end`: where it starts, how long it is.

        Nothing while half a step is still ahead, or where the others have taken all room.
        """
        with self._lock:
            mine = self._of(offset)
            start = mine[1] if mine else offset
            room = RESERVE_AHEAD - sum(end - begin for begin, end in self._ahead)
            count = min(end - start, RESERVE_STEP)
            return start, 0 if start - offset > RESERVE_STEP // 2 or count > room else count

    def claim(self, offset: int, start: int, count: int) -> None:
        """So much of what `next` named is preallocated."""
        with self._lock:
            mine = self._of(offset)
            if mine and mine[1] == start:
                mine[1] += count
            else:
                self._ahead.append([start, start + count])

    def _of(self, offset: int) -> list[int] | None:
        return next((each for each in self._ahead if each[0] <= offset <= each[1]), None)

    def consume(self, start: int, end: int) -> None:
        """These bytes were written."""
        with self._lock:
            for each in self._ahead:
                if start <= each[0] < end:
                    each[0] = min(end, each[1])
            self._ahead = [each for each in self._ahead if each[0] < each[1]]

    def clear(self) -> bool:
        """The file was cut, which frees what lies beyond its end. Whether there was any."""
        with self._lock:
            some = bool(self._ahead)
            self._ahead = []
            return some


def preallocate(file: int, offset: int, length: int) -> bool:
    """Whether the file system can, and had the room."""
    try:
        return native.preallocate(file, offset, length)
    except OSError as exc:
        if exc.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # a help, not a promise: the write will say it
            raise
        return False


def refuse_too_large(need: int, room: int) -> None:
    if need > room:
        message = f"the volume is too small for the file: {need} bytes are still to come, and it has room for {room}"
        raise make_error(ErrorCode.ERROR_DISK_FULL, ErrorContext.LOCAL_FILE, message)
