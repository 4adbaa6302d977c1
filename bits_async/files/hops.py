"""One hop to a thread of the token: the descriptors it uses, its errors told as ours, and what becomes of it when nobody waits."""

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Generic, TypeVar, TypeVarTuple

from ..errors import BitsError, ErrorCode, ErrorContext, LocalFileError, error_from_os, make_error, scrub
from .directories import Directory
from .records import PartRecord

if TYPE_CHECKING:
    from ..identity.threads import TokenExecutor

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

given_up: Final[set[tuple[int, int]]] = set()
"""Part files (device, inode) that a lost thread may still write: `reopen` leaves them alone. Each use is one atomic call."""


class Closed(Exception):
    """The handles were released."""


class Handles:
    """The descriptors of a part file and its directory, closed by whoever leaves them last.

    The fault it answers: a thread that was given up on still uses its descriptors. Closed under it, their numbers would go to
    other files, and its next write would go there.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._released = False
        self.directory: Directory | None = None
        self.file: int | None = None
        self.record: PartRecord | None = None
        self.committed = False
        self.named = False  # the name of the part file survives a loss of power

    def __enter__(self) -> "Handles":
        with self._lock:
            if self._released:
                raise Closed
            self._inside += 1
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._lock:
            self._inside -= 1
        self.finish()

    @property
    def released(self) -> bool:
        """Nobody may enter any more."""
        return self._released

    def opened(self) -> tuple[Directory, int]:
        """Directory and file, for those inside."""
        assert self.directory is not None, "opened before the part file is handed out"
        assert self.file is not None, "opened before the part file is handed out"
        return self.directory, self.file

    def publish(self, record: PartRecord) -> bool:
        """The file exists and is known to be `record`. False: nobody waits for it any more, whoever made it removes it."""
        with self._lock:
            if not self._released:
                self.record = record
            return not self._released

    def release(self) -> None:
        """Let nobody in any more."""
        with self._lock:
            self._released = True

    def give_up(self) -> None:
        """A thread is lost in there."""
        self.release()
        if self.record is not None:
            given_up.add((self.record.device, self.record.inode))
        self.finish()  # it may have left a moment ago

    def finish(self) -> None:
        """Close what is released and unused. May be called any number of times, from any thread: closing needs no identity."""
        with self._lock:
            if not self._released or self._inside:
                return
            opened = [each for each in (self.file, self.directory) if isinstance(each, int)]
            self.file = self.directory = None
        for each in opened:
            with suppress(OSError):  # what a late write-back has to say was said by the sync before
                os.close(each)
        if self.record is not None:
            given_up.discard((self.record.device, self.record.inode))


@contextmanager
def local_errors(files: "TokenExecutor", path: Path, doing: str) -> Iterator[None]:
    """The seam: what file calls raise becomes a LOCAL_FILE error that names the path and the identity."""
    who = files.token.name
    try:
        yield
    except LocalFileError as error:
        raise error.located(path=path, identity=who) from error.__cause__
    except BitsError:
        raise
    except Closed:
        raise LocalFileError(f"cannot {doing} the file: its part file is closed", path=path, identity=who) from None
    except OSError as exc:
        raise error_from_os(exc, path=path, identity=who, doing=doing) from scrub(exc)
    except RuntimeError as exc:
        if type(exc) is not RuntimeError:
            raise
        raise LocalFileError(f"cannot {doing} the file: {exc}", path=path, identity=who) from None  # the executor was closed
    except OverflowError as exc:
        message = f"cannot {doing} the file: the position is out of range"
        raise make_error(ErrorCode.ERROR_FILE_TOO_LARGE, ErrorContext.LOCAL_FILE, message, path=path, identity=who) from scrub(exc)
    except ValueError as exc:
        message = f"cannot {doing} the file: the operating system cannot use that name"
        raise make_error(ErrorCode.E_INVALIDARG, ErrorContext.LOCAL_FILE, message, path=path, identity=who) from scrub(exc)


class Call(Generic[T]):
    """One hop to a thread: what a cancelled task must know of it."""

    def __init__(self, handles: Handles, func: Callable[[], T]) -> None:
        self._lock = threading.Lock()
        self._handles = handles
        self._func = func
        self._begun = self._ended = self._void = False

    def __call__(self) -> T:
        with self._lock:
            if self._void:
                raise Closed
            self._begun = True
        try:
            with self._handles:
                return self._func()
        finally:
            self._ended = True

    def abandon(self) -> None:
        """Nobody waits any more: if it has not begun it never will; if it has not ended, its thread is lost, the handles too."""
        with self._lock:
            self._void = not self._begun
        if self._begun and not self._ended:
            self._handles.give_up()


async def hop(files: "TokenExecutor", handles: Handles, path: Path, doing: str, func: Callable[[Handles, *Ts], T], *args: *Ts) -> T:
    """`func(handles, *args)` in a thread of the token, which has left the handles when a cancel goes on."""
    call = Call(handles, lambda: func(handles, *args))
    with local_errors(files, path, doing):
        try:
            return await files.run(call)
        except asyncio.CancelledError:
            call.abandon()
            raise


async def close_handles(files: "TokenExecutor", handles: Handles) -> None:
    """Close the handles in a thread of the token, or here when its threads are gone."""
    handles.release()
    try:
        if handles.file is not None or handles.directory is not None:
            await files.run(handles.finish)
    except (BitsError, RuntimeError):
        pass  # no thread of the token is left; closing needs no identity
    finally:
        handles.finish()
