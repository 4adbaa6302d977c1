"""KEEP: the part file of one download, from its creation beside the destination to the rename over it.

Knows neither the states of jobs nor the network: it is given bytes and positions, or a socket and a number of bytes. Which
identity touches the file is a parameter, the `TokenExecutor`; nothing here ever runs as somebody else.

**Names.** The directory is opened once and every call is relative to that descriptor. A name in it is nobody's promise: somebody
else may have put another file there. So device and inode decide whether a file is ours, before it is reopened, replaced, renamed
or deleted, and once more after the rename (T15, T17). No finalizer touches a path.

**Power.** What the journal says of a file is true after a loss of power, in this order: the name of a part file is journalled before
the file is made (`new_draft`), so nothing is left that nobody knows of; bytes are synced, and the name of their file once, before
their position is journalled (`sync`); the whole file is synced before it is renamed, and the directory after that, before the
journal calls it committed (`commit`); a removed name is synced before the journal forgets it (`discard_part`). What is not synced
may be there or not, in part or as zeros: it is never counted, and cut off when the file is opened in another boot.

**Threads.** Each call is one hop to a thread of the token, and a cancel waits for that thread. A thread that does not come back
in time is given up on together with the part file: its descriptors stay open until the thread leaves them (`_Handles`), every
later call fails, and this process does not reopen the file meanwhile. So the calls that own a descriptor or change a file go
through `TokenExecutor.run`. aiofiles, on the executor's own pool, carries the one that only looks (`length`): it returns
from a cancel at once, and what it leaves behind does no harm. Its file objects are not used: their position is state between two
hops, and `async with` closes them on another thread.

**Many at once.** Files that came whole need no part file while they are fetched: `store_whole` makes, writes and syncs a batch of them in
one hop, and `commit_parts` renames one, each directory opened, looked at and synced once. They keep every promise above for each file, and
stop at the first that is not as it should be: what is wrong with it is said when it is tried alone.
"""

import asyncio
import errno
import hashlib
import os
import secrets
import selectors
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeVar, TypeVarTuple, cast
from uuid import UUID

import aiofiles.os

from .errors import (
    BitsError,
    ErrorCode,
    ErrorContext,
    InvalidArgument,
    InvalidState,
    LocalFileError,
    error_from_os,
    make_error,
    scrub,
)
from .identity import native

if sys.platform != "win32":
    import grp
    import pwd

if TYPE_CHECKING:
    from .identity.threads import TokenExecutor
    from .identity.tokens import Token
    from .transport.ranges import Detached, Slice

RESERVE_AHEAD: Final = 64 << 20
"""Bytes that preallocation may run ahead of what was received (T18)."""

RESERVE_STEP: Final = 32 << 20
"""Bytes preallocated at once; a body whose rest is smaller than a write needs none."""

PUBLIC_MODE: Final = 0o644
"""A finished file's mode before the umask and the mode of the file it replaces."""

_REREAD: Final = 8 << 20  # bytes hashed in one hop: a cancel waits no longer than that takes
_READ: Final = 1 << 20
_RECEIVE: Final = 1 << 20
_WRITE_BACK: Final = 8 << 20  # bytes after which the kernel is told to begin writing: the sync at the end then has little left to do
_UNCACHED: Final = 256 << 10  # a smaller write that bypasses the page cache would be a small one for the disk, too
_GLANCE: Final = 0.1  # seconds between two looks at the stop flag while nothing arrives
_IDLE: Final = 60.0
_PATIENCE: Final = 10.0  # seconds a cancel waits for the thread that receives
_DONTWAIT: Final[int] = getattr(socket, "MSG_DONTWAIT", 0)
_BATCH_SECONDS: Final = 1.0  # for renames in one hop: a cancel waits no longer
_SUFFIX: Final = ".bits-part"
_OF_THE_SOCKET: Final = {
    getattr(errno, name, -1) for name in ("EHOSTUNREACH", "EHOSTDOWN", "ENETUNREACH", "ENETDOWN", "ENETRESET", "ENOTCONN", "ESHUTDOWN")
}

_STEP: Final = getattr(os, "O_PATH", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)

if sys.platform == "win32":
    Directory = Path  # Windows has no calls relative to a descriptor
else:
    Directory = int

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
Chunk = bytes | bytearray | memoryview


class Limiter(Protocol):
    """A token bucket as a thread sees it."""

    @property
    def chunk(self) -> int:
        """Bytes to take at once at most, now."""
        ...

    def rests(self, count: int, /) -> Iterator[float]:
        """Take `count` bytes; seconds to wait, one after the other, before taking more."""
        ...


class _Hash(Protocol):
    """What hashlib's objects and BLAKE3's share."""

    @property
    def digest_size(self) -> int: ...
    def update(self, data: Chunk, /) -> object: ...
    def hexdigest(self) -> str: ...


class Pace(Protocol):
    """Who is told how fast a body comes."""

    @property
    def too_slow(self) -> bool: ...
    @property
    def told(self) -> str: ...
    def waited(self, seconds: float, /) -> None: ...
    def came(self, count: int, /) -> None: ...


class Stop(Protocol):
    """What `threading.Event` offers a reader."""

    def is_set(self) -> bool: ...


class Source(Protocol):
    """What a `socket.socket` offers whoever receives from it. One that is none deciphers what comes over the wire."""

    def fileno(self) -> int: ...

    def recv_into(self, buffer: memoryview, nbytes: int = 0, flags: int = 0, /) -> int:
        """Raises BlockingIOError when nothing is there; 0: the end."""
        ...


@dataclass(frozen=True, slots=True)
class PartRecord:
    """What the journal keeps of a part file: enough to know it again (T15), and who made it (T17).

    `uid` is the file's owner, None where the platform has no such thing; `maker` the local user who made it (`LocalIdentity.key`):
    another one on file systems that give every file to one user. None: not known (a journal of version 2), taken for the owner.
    """

    directory: str
    name: str
    dir_device: int
    dir_inode: int
    device: int
    inode: int
    uid: int | None
    maker: str | None = None

    @property
    def path(self) -> Path:
        """Where it was made."""
        return Path(self.directory, self.name)

    def was_made_by(self, token: "Token") -> bool:
        """Whether that identity made it: no other goes on with it or deletes it (T17)."""
        if self.maker is None:
            return self.uid is None or _uid(token) == self.uid
        return token.local.key == self.maker

    def is_file(self, found: os.stat_result) -> bool:
        """Whether that is our file, whatever its name."""
        return (found.st_dev, found.st_ino) == (self.device, self.inode)

    def is_directory(self, found: os.stat_result) -> bool:
        """Whether that is the directory we made it in."""
        return (found.st_dev, found.st_ino) == (self.dir_device, self.dir_inode)


# -- descriptors and who is using them -------------------------------------------------------------------------------------------


_given_up: set[tuple[int, int]] = set()
"""Part files (device, inode) that a lost thread may still write: `reopen` leaves them alone. Each use is one atomic call."""


class _Closed(Exception):
    """The handles were released."""


class _Handles:
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

    def __enter__(self) -> "_Handles":
        with self._lock:
            if self._released:
                raise _Closed
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
            _given_up.add((self.record.device, self.record.inode))
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
            _given_up.discard((self.record.device, self.record.inode))


@contextmanager
def _local_errors(files: "TokenExecutor", path: Path, doing: str) -> Iterator[None]:
    """The seam: what file calls raise becomes a LOCAL_FILE error that names the path and the identity."""
    who = files.token.name
    try:
        yield
    except LocalFileError as error:
        raise error.located(path=path, identity=who) from error.__cause__
    except BitsError:
        raise
    except _Closed:
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


class _Call(Generic[T]):
    """One hop to a thread: what a cancelled task must know of it."""

    def __init__(self, handles: _Handles, func: Callable[[], T]) -> None:
        self._lock = threading.Lock()
        self._handles = handles
        self._func = func
        self._begun = self._ended = self._void = False

    def __call__(self) -> T:
        with self._lock:
            if self._void:
                raise _Closed
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


async def _run(files: "TokenExecutor", handles: _Handles, path: Path, doing: str, func: Callable[[_Handles, *Ts], T], *args: *Ts) -> T:
    """`func(handles, *args)` in a thread of the token, which has left the handles when a cancel goes on."""
    call = _Call(handles, lambda: func(handles, *args))
    with _local_errors(files, path, doing):
        try:
            return await files.run(call)
        except asyncio.CancelledError:
            call.abandon()
            raise


async def _close(files: "TokenExecutor", handles: _Handles) -> None:
    """Close the handles in a thread of the token, or here when its threads are gone."""
    handles.release()
    try:
        if handles.file is not None or handles.directory is not None:
            await files.run(handles.finish)
    except (BitsError, RuntimeError):
        pass  # no thread of the token is left; closing needs no identity
    finally:
        handles.finish()


# -- digests and preallocation: what is known about the bytes --------------------------------------------------------------------


class _RunningDigests:
    """Hashes of the bytes up to `position`, fed by the writes themselves as long as these come in order.

    A write behind the position makes them worthless: position None. Writes may come from several threads at once (slices), hence
    the lock.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._hashes: dict[str, _Hash] = {}
        self.position: int | None = None

    def begin(self, algorithms: Sequence[str], position: int = 0) -> None:
        """Start there. The hash objects are made here, on the caller's thread: OpenSSL loads what it needs the first time."""
        hashes = {name: _new_hash(name) for name in algorithms}
        with self._lock:
            self._hashes = hashes
            self.position = position if hashes else None

    def rewrite(self, offset: int) -> None:
        """Bytes from `offset` on will change."""
        with self._lock:
            if self.position is not None and offset < self.position:
                self.position = None

    def feed(self, offset: int, chunks: Sequence[Chunk]) -> None:
        """These bytes are in the file."""
        with self._lock:
            if offset != self.position:
                return
            for chunk in chunks:
                for each in self._hashes.values():
                    each.update(chunk)
                self.position += len(chunk)

    def hexdigest(self, algorithm: str) -> str:
        with self._lock:
            if self.position is None or algorithm not in self._hashes:
                raise InvalidState(f"no running digest {algorithm} covers what was written: start_digest comes first")
            return self._hashes[algorithm].hexdigest()


def _new_hash(algorithm: str) -> _Hash:
    fresh: _Hash | None
    try:
        fresh = _new_blake3() if algorithm == "blake3" else hashlib.new(algorithm)
    except (ValueError, ImportError):
        fresh = None
    if fresh is None or not fresh.digest_size:  # SHAKE has no length of its own
        code, context = ErrorCode.BG_E_INVALID_HASH_ALGORITHM, ErrorContext.NONE
        raise InvalidArgument(f"no digest algorithm {algorithm!r}", code=code, context=context)
    return fresh


def _new_blake3() -> _Hash:
    from blake3 import blake3  # an extra

    return blake3()


class _Reservation:
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


# -- blocking calls, made by a thread of the token -------------------------------------------------------------------------------


def new_draft() -> str:
    """The part of a part file's name that nobody can guess. The journal knows it before the file exists, so a crash leaves no stray."""
    return secrets.token_hex(8)


def _part_name(name: str, job_id: UUID, draft: str, longest: int) -> str:
    """A name that starts with a dot, tells the destination and the job, and fits the directory."""
    tail = f".{job_id.hex}.{draft}{_SUFFIX}"
    told = name.encode("utf-8", "replace")  # the journal keeps the part's name as text, so it is text
    room = max(0, longest - len(tail) - 1)
    if len(told) > room:
        while room and told[room] & 0xC0 == 0x80:  # not in the middle of a character
            room -= 1
        told = told[:room]
    return f".{told.decode()}{tail}"


def _open(path: Path) -> Directory:
    if "\0" in str(path):
        raise ValueError("embedded null character")  # a system call would take it for the end of the path
    return native.open_directory(path)


def _open_guarded(path: Path, guard: int | None, walker: int | None) -> Directory:
    """A directory that this identity may write into (T15): nobody but user `guard` could swap files there, and `walker` is the user
    whose links may lead there. None: anybody's."""
    directory = _open(path)
    try:
        _refuse_shared(directory, guard)
        _refuse_detour(directory, path, walker)
    except BaseException:
        if isinstance(directory, int):
            os.close(directory)
        raise
    return directory


def _find(directory: Directory, name: str) -> os.stat_result | None:
    try:
        return native.stat_at(directory, name)
    except FileNotFoundError:
        return None


def _destination_name(destination: Path) -> str:
    if destination.name in ("", ".", ".."):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    return destination.name


def _replaceable(directory: Directory, destination: Path) -> os.stat_result | None:
    """What the file will replace: a regular file, a link that leads to no directory, or nothing. All else is refused."""
    found = _find(directory, _destination_name(destination))
    if found is None or stat.S_ISREG(found.st_mode):
        return found
    if stat.S_ISDIR(found.st_mode) or (stat.S_ISLNK(found.st_mode) and destination.is_dir()):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISLNK(found.st_mode):
        raise FileExistsError(errno.EEXIST, "The destination is a device, a pipe or a socket")
    return found


def _uid(token: "Token") -> int | None:
    """The local user a token acts as; None where users have no number."""
    kind, _, number = token.local.key.partition(":")
    if kind == "uid" and number.isdecimal():
        return int(number)
    return None if sys.platform == "win32" else os.geteuid()


def _guarded(token: "Token", allow_shared: bool) -> int | None:
    """Whose directory it has to be: privileged tokens do not write where others could swap the file (T15). None: anybody's."""
    uid = _uid(token)
    return uid if not allow_shared and (token.elevated or uid == 0) else None


def _refuse_shared(directory: Directory, uid: int | None) -> None:
    if uid is None:
        return
    found = os.stat(directory)
    if found.st_uid not in (0, uid):
        why = "another user owns the directory"
    elif not found.st_mode & stat.S_ISVTX and _others_may_write(directory, found, uid):
        why = "other users may write in the directory, and it is not sticky"
    else:
        return
    raise _unfit_directory(f"{why} and could swap the file")


_LINKS: Final = 40  # as many as the kernel follows in one path


def _refuse_detour(directory: Directory, path: Path, uid: int | None) -> None:
    """A link that somebody else made on the way to the directory: he chose where that user's token writes, and may choose anew.

    The way is walked again with a descriptor per step, so that no name changes its meaning between the look and the next step.
    """
    if uid is None or sys.platform != "linux":
        return
    here = os.open("/", _STEP)
    try:
        names, links = list(reversed(path.parts[1:])), 0
        while names:
            step = os.open(names.pop(), _STEP, dir_fd=here)
            found = os.fstat(step)
            if not stat.S_ISLNK(found.st_mode):
                left, here = here, step
                os.close(left)
                continue
            try:
                target, links = os.readlink("", dir_fd=step), links + 1
            finally:
                os.close(step)
            if found.st_uid not in (0, uid):
                why = f"a symbolic link of another user (uid {found.st_uid}) leads there"
                raise _unfit_directory(f"{why}, who could have chosen any place")
            if links > _LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            if target.startswith("/"):
                left, here = here, os.open("/", _STEP)
                os.close(left)
            names += [name for name in reversed(target.split("/")) if name]
        if not os.path.samestat(os.fstat(here), os.stat(directory)):
            raise _unfit_directory("another directory took its place at this moment")
    finally:
        os.close(here)


def _unfit_directory(why: str) -> BitsError:
    message = f"an identity with rights of its own does not write there: {why}"
    advice = "use a directory that this identity owns and that others may not change, or act as the user who owns it"
    return make_error(ErrorCode.ERROR_DIRECTORY, ErrorContext.LOCAL_FILE, message, advice=advice)


def _others_may_write(directory: Directory, found: os.stat_result, uid: int) -> bool:
    if found.st_mode & stat.S_IWOTH:
        return True
    if not found.st_mode & stat.S_IWGRP:
        return False
    return _has_acl(directory) or not any(_is_private_group(each, found.st_gid) for each in {found.st_uid, uid})


def _is_private_group(uid: int, gid: int) -> bool:
    """Whether the group is one user's own, as most distributions make them (their umask of 002 relies on it)."""
    if sys.platform == "win32":
        return False
    try:
        user, group = pwd.getpwuid(uid), grp.getgrgid(gid)
    except (KeyError, OSError):
        return False
    return user.pw_gid == gid and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}


def _has_acl(directory: Directory) -> bool:
    """With an ACL the group bits of the mode are its mask, and speak of users that the mode does not name."""
    if sys.platform != "linux":
        return False
    try:
        return bool(os.getxattr(directory, "system.posix_acl_access"))
    except OSError:  # none, or no such thing on this file system
        return False


def _make(
    handles: _Handles, destination: Path, job_id: UUID, draft: str, guard: int | None, walker: int | None, token: "Token"
) -> PartRecord:
    """Open the directory, look at the destination, make the part file."""
    try:
        handles.directory = directory = _open_guarded(destination.parent, guard, walker)
        _replaceable(directory, destination)
        name = _part_name(destination.name, job_id, draft, native.max_name(directory))
        if handles.released:
            raise _Closed  # nobody waits any more: the name may be another's part file by now
        _remove_stray(directory, name, _uid(token))
        handles.file = native.create_exclusive(directory, name)
        record = _record_of(destination, name, os.stat(directory), os.fstat(handles.file), token)
        if not handles.publish(record):
            _unlink(directory, record)
        return record
    except BaseException:
        handles.release()
        raise


def _record_of(destination: Path, name: str, where: os.stat_result, made: os.stat_result, token: "Token") -> PartRecord:
    uid = None if sys.platform == "win32" else made.st_uid
    return PartRecord(str(destination.parent), name, where.st_dev, where.st_ino, made.st_dev, made.st_ino, uid, token.local.key)


def _remove_stray(directory: Directory, name: str, uid: int | None) -> bool:
    """What a process left that died between making a part file and saying so: a file that is this identity's alone, with a name that
    only the journal knew. Anything else of that name is somebody's and stays. Whether nothing has the name now."""
    found = _find(directory, name)
    if found is None:
        return True
    private = stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and not found.st_mode & 0o022
    if not private or uid not in (None, found.st_uid):
        return False
    with suppress(FileNotFoundError):
        native.unlink_at(directory, name)
    return True


def _take_up(handles: _Handles, destination: Path, record: PartRecord, guard: int | None) -> bool:
    """Open the directory and the part file that was left there; False: odd, the handles are released."""
    try:
        handles.directory = directory = _open_guarded(destination.parent, guard, guard)
        handles.file = _open_known(directory, record) if record.is_directory(os.stat(directory)) else None
        taken = handles.file is not None and handles.publish(record)
    except BaseException:
        handles.release()
        raise
    if not taken:
        handles.release()
    return taken


def _open_known(directory: Directory, record: PartRecord) -> int | None:
    """Open the part file if it is what we left: looked at before it is opened, because opening a device may do something."""
    found = _find(directory, record.name)
    if found is None or not _as_left(found, record):
        return None
    try:
        file = native.open_existing(directory, record.name)
    except OSError as exc:
        if exc.errno in (errno.ENOENT, errno.ELOOP, errno.ENXIO, errno.EISDIR, errno.EACCES, errno.EPERM):
            return None  # replaced in this moment, or no longer ours to write
        raise
    if _as_left(os.fstat(file), record):
        return file
    os.close(file)
    return None


def _as_left(found: os.stat_result, record: PartRecord) -> bool:
    return (
        stat.S_ISREG(found.st_mode)
        and record.is_file(found)
        and found.st_nlink == 1
        and (record.uid is None or (found.st_uid == record.uid and not found.st_mode & 0o022))
    )


def _unlink(directory: Directory, record: PartRecord) -> bool:
    """Delete the part file, if its name still leads to it; whether nothing has the name now."""
    found = _find(directory, record.name)
    if found is None:
        return True
    if not record.is_file(found):
        return False
    with suppress(FileNotFoundError):
        native.unlink_at(directory, record.name)
    return True


def _discard(handles: _Handles) -> bool:
    assert handles.record is not None, "published before anybody can discard"
    return _synced(handles.opened()[0], _unlink(handles.opened()[0], handles.record))


def _synced(directory: Directory, gone: bool) -> bool:
    """The journal forgets a removed file next: after a loss of power it must not be back."""
    if gone:
        native.sync_directory(directory)
    return gone


def _discard_draft(handles: _Handles, destination: Path, job_id: UUID, draft: str, uid: int | None) -> bool:
    handles.release()  # closed as soon as this thread leaves
    try:
        handles.directory = directory = _open(destination.parent)
    except FileNotFoundError:
        return True
    name = _part_name(destination.name, job_id, draft, native.max_name(directory))
    return _synced(directory, _remove_stray(directory, name, uid))


def _discard_recorded(handles: _Handles, record: PartRecord) -> bool:
    handles.release()  # closed as soon as this thread leaves
    try:
        handles.directory = directory = _open(Path(record.directory))
    except FileNotFoundError:
        return True
    return record.is_directory(os.stat(directory)) and _synced(directory, _unlink(directory, record))


def _look_for_committed(handles: _Handles, destination: Path, record: PartRecord) -> int | None:
    handles.release()
    handles.directory = directory = _open(destination.parent)
    if not record.is_directory(os.stat(directory)) or _find(directory, record.name) is not None:
        return None
    found = _find(directory, _destination_name(destination))
    if found is None or not stat.S_ISREG(found.st_mode) or not record.is_file(found) or record.uid not in (None, found.st_uid):
        return None
    native.sync_directory(directory)  # the process may have died before it did that
    return found.st_size


def _read_at(fd: int, count: int, offset: int) -> bytes:
    if sys.platform == "win32":
        os.lseek(fd, offset, os.SEEK_SET)
        return os.read(fd, count)
    return os.pread(fd, count, offset)


def _cut(handles: _Handles, length: int) -> None:
    os.ftruncate(handles.opened()[1], length)


def _sync(handles: _Handles) -> int:
    directory, file = handles.opened()
    native.datasync(file)
    if not handles.named:
        native.sync_directory(directory)  # durable bytes need a durable name
        handles.named = True
    return os.fstat(file).st_size


def _trim_and_sync(handles: _Handles, trim: bool) -> None:
    _, file = handles.opened()
    if trim:
        os.ftruncate(file, os.fstat(file).st_size)  # gives back what was preallocated beyond the end
    native.datasync(file)


def _preallocate(file: int, offset: int, length: int) -> bool:
    """Whether the file system can, and had the room."""
    try:
        return native.preallocate(file, offset, length)
    except OSError as exc:
        if exc.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # a help, not a promise: the write will say it
            raise
        return False


def _refuse_too_large(need: int, room: int) -> None:
    if need > room:
        message = f"the volume is too small for the file: {need} bytes are still to come, and it has room for {room}"
        raise make_error(ErrorCode.ERROR_DISK_FULL, ErrorContext.LOCAL_FILE, message)


# -- whole files -----------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Place:
    """A directory that a batch of files goes to."""

    directory: Directory
    found: os.stat_result
    longest: int  # bytes that a name may have


class _Places:
    """The directories of a batch, each opened and looked at once. Closed by whoever leaves its `with`."""

    def __init__(self, guard: int | None, walker: int | None) -> None:
        self._guard = guard, walker
        self._places: dict[Path, _Place] = {}

    def __enter__(self) -> "_Places":
        return self

    def __exit__(self, *_: object) -> None:
        for each in self._places.values():
            if isinstance(each.directory, int):
                os.close(each.directory)

    def of(self, destination: Path) -> _Place:
        parent = destination.parent
        place = self._places.get(parent)
        if place is None:
            directory = _open_guarded(parent, *self._guard)
            place = self._places[parent] = _Place(directory, os.stat(directory), native.max_name(directory))
        return place

    def sync(self) -> None:
        for each in self._places.values():
            native.sync_directory(each.directory)

    def stand(self) -> bool:
        """Whether the way that was asked for still leads to each of them: what was put into one that was moved away is not where it was
        asked for (T15)."""
        return all(_leads_to(path, each.found) for path, each in self._places.items())


def _store_all(handles: _Handles, wholes: "Sequence[WholeFile]", guard: int | None, walker: int | None, token: "Token") -> list[PartRecord]:
    """What the journal is to keep of those, from the first on, that are durable now.

    First all are written and the disk is told, then each is waited for: it writes them side by side.
    """
    until = time.monotonic() + _BATCH_SECONDS
    made: list[tuple[int, PartRecord]] = []
    with _Places(guard, walker) as places:
        try:
            for whole in wholes:
                if time.monotonic() >= until or not _store_one(handles, whole, places, made, token):
                    break
                token.local.check()  # as in `_commit_all`
            for file, _ in made:
                native.datasync(file)
            places.sync()
        except OSError:
            for _, record in made:  # which of them are durable is not known
                _unlink_made(places, record)
            return []
        finally:
            for file, _ in made:
                os.close(file)
    return [record for _, record in made]


def _store_one(handles: _Handles, whole: "WholeFile", places: _Places, made: list[tuple[int, PartRecord]], token: "Token") -> bool:
    """Whether it is in its part file, not yet durable. If not, nothing is left of it."""
    file, record = None, None
    try:
        if not whole.is_right():
            return False
        place = places.of(whole.destination)
        _replaceable(place.directory, whole.destination)
        name = _part_name(whole.destination.name, whole.job_id, whole.draft, place.longest)
        if handles.released:
            return False  # nobody waits any more: the name may be another's part file by now
        file = _create_in_place_of_stray(place.directory, name, _uid(token))
        record = _record_of(whole.destination, name, place.found, os.fstat(file), token)
        native.pwrite_all(file, whole.chunks, 0)
        native.write_back(file, 0, sum(map(len, whole.chunks)))
    except (OSError, BitsError, ValueError):  # what is wrong is said when it is tried alone
        if record is not None:
            _unlink_made(places, record)
        if file is not None:
            os.close(file)
        return False
    made.append((file, record))
    return True


def _create_in_place_of_stray(directory: Directory, name: str, uid: int | None) -> int:
    try:
        return native.create_exclusive(directory, name)
    except FileExistsError:
        if not _remove_stray(directory, name, uid):
            raise
    return native.create_exclusive(directory, name)


def _unlink_made(places: _Places, record: PartRecord) -> None:
    with suppress(OSError, BitsError):  # else the next one who makes it removes it
        _unlink(places.of(record.path).directory, record)


# -- the rename ------------------------------------------------------------------------------------------------------------------


def _commit(handles: _Handles, destination: Path, mtime: float | None) -> None:
    """Give the file its mode and time, and its name, durably. Runs again after a failure: what was done is not done twice."""
    directory, file = handles.opened()
    record = handles.record
    assert record is not None, "published before anybody can commit"
    if not handles.committed:
        _refuse_moved(directory, destination, record)
        mode = _rename(directory, file, destination, record, mtime, native.process_umask())
        handles.committed = True
        _tidy_up(directory, file, record, mode)
    native.sync_directory(directory)


def _rename(directory: Directory, file: int, destination: Path, record: PartRecord, mtime: float | None, umask: int) -> int:
    """The mode that the file is to have."""
    mode = _dress(directory, file, destination.name, _replaceable(directory, destination), umask)
    if mtime is not None:
        _set_time(file, mtime)
    native.set_mode(file, mode | 0o600)  # its owner must be able to open it again if the rename fails
    native.rename_at(directory, record.name, destination.name)
    if not _is_renamed(directory, destination, record):
        message = "somebody else changed the directory during the rename"
        raise make_error(ErrorCode.BG_E_LOCAL_FILE_CHANGED, ErrorContext.LOCAL_FILE, message)
    return mode


def _tidy_up(directory: Directory, file: int, record: PartRecord, mode: int) -> None:
    _unlink(directory, record)  # still there if both names were links to our file: such a rename does nothing
    if mode | 0o600 != mode:
        native.set_mode(file, mode)


def _commit_all(handles: _Handles, parts: "Sequence[FinishedPart]", guard: int | None, check: Callable[[], None]) -> int:
    """How many of them, from the first on, have their names, durably."""
    until = time.monotonic() + _BATCH_SECONDS
    umask, done = native.process_umask(), 0
    with _Places(guard, guard) as places:
        try:
            for part in parts:
                if not _commit_one(handles, part, places, umask):
                    break
                done += 1
                if time.monotonic() >= until:
                    break
                check()  # a batch is long; whoever changes the thread's identity meanwhile changes it for one file at most (T1)
            places.sync()
        except OSError:
            return 0  # which of them are durable is not known
        return done if places.stand() else 0


def _commit_one(handles: _Handles, part: "FinishedPart", places: _Places, umask: int) -> bool:
    """Whether it has its name."""
    record = part.record
    if (record.device, record.inode) in _given_up or not handles.publish(record):  # or nobody waits for this thread any more
        return False
    file = None
    try:
        place = places.of(part.destination)
        if not record.is_directory(place.found):
            return False
        file = _open_known(place.directory, record)
        if file is None:
            return False
        mode = _rename(place.directory, file, part.destination, record, part.mtime, umask)
        _tidy_up(place.directory, file, record, mode)
        return True
    except (OSError, BitsError, ValueError):
        return False  # what is wrong is said when it is tried alone
    finally:
        if file is not None:
            os.close(file)


def _is_renamed(directory: Directory, destination: Path, record: PartRecord) -> bool:
    found = _find(directory, _destination_name(destination))
    return found is not None and record.is_file(found)


def _leads_to(path: Path, directory: os.stat_result) -> bool:
    try:
        there = os.stat(path)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (directory.st_dev, directory.st_ino)


def _refuse_moved(directory: Directory, destination: Path, record: PartRecord) -> None:
    """The rename would still be a rename in our directory; it would not put the file where it was asked for."""
    there, here = os.stat(destination.parent), os.stat(directory)
    if (there.st_dev, there.st_ino) != (here.st_dev, here.st_ino):
        message = "the directory was replaced by another one during the transfer"
        raise make_error(ErrorCode.BG_E_LOCAL_FILE_CHANGED, ErrorContext.LOCAL_FILE, message)
    found = _find(directory, record.name)
    if found is None or not record.is_file(found):
        message = f"the part file {record.name} was removed or replaced during the transfer"
        raise make_error(ErrorCode.BG_E_LOCAL_FILE_CHANGED, ErrorContext.LOCAL_FILE, message)


def _dress(directory: Directory, file: int, name: str, replaced: os.stat_result | None, umask: int) -> int:
    """The mode the file shall have: 0644 less the umask, and nothing that a replaced regular file did not allow (T16).

    That file's access list is put on ours. Without it, or with another group, its group bits spoke of other people than ours
    would: the group may then do what everybody may.
    """
    mode = PUBLIC_MODE & ~umask
    if replaced is None or not stat.S_ISREG(replaced.st_mode):
        return mode
    mode &= replaced.st_mode
    if replaced.st_gid != os.fstat(file).st_gid or not _keep_acl(directory, file, name, replaced):
        mode &= ~0o070 | (mode & 0o007) << 3
    return mode


def _keep_acl(directory: Directory, file: int, name: str, replaced: os.stat_result) -> bool:
    """Copy the access list, or its absence. False: not done, because it cannot be read or is not our owner's word.

    Where everybody may make files, a stranger's list would let him read ours.
    """
    if sys.platform == "win32":
        return True  # a new file has the directory's list, as BITS documents it
    if replaced.st_uid not in (0, os.fstat(file).st_uid):
        return False
    try:
        source = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    except OSError:
        return False
    try:
        found = os.fstat(source)
        if (found.st_dev, found.st_ino) != (replaced.st_dev, replaced.st_ino):
            return False
        native.copy_acl(source, file)
    except OSError:
        return False
    finally:
        os.close(source)
    return True


def _set_time(file: int, mtime: float) -> None:
    try:
        native.set_times(file, round(mtime * 1e9))
    except (OverflowError, ValueError):
        pass  # a server's date that this system cannot write down is not worth failing for
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, getattr(errno, "EOVERFLOW", errno.EINVAL)):
            raise


# -- receiving -------------------------------------------------------------------------------------------------------------------


class _Intake:
    """The loop that moves a socket's bytes into a file, run by one thread of the token from begin to end."""

    def __init__(
        self,
        reserve: Callable[[int, int], None],
        store: Callable[[int, Sequence[Chunk]], None],
        splice: Callable[[native.Splicer, int, int, int], int] | None,
        piece: "Slice",
        limiter: Limiter | None,
        stop: Stop | None,
        pace: Pace | None,
    ) -> None:
        self._pace = pace
        self._reserve = reserve
        self._store = store
        self._splice = splice
        self._piece = piece
        self._limiter = limiter
        self._stop = stop
        self._halt = threading.Event()  # set when the task that waits for us is cancelled
        self.moved = 0

    def halt(self) -> None:
        self._halt.set()

    @property
    def _stopped(self) -> bool:
        return self._halt.is_set() or (self._stop is not None and self._stop.is_set())

    def run(self, detached: "Detached", idle: float) -> int:
        """Move until all is there or somebody says stop."""
        total = detached.length if self._piece.remaining is None else min(detached.length, self._piece.remaining)
        self._make_room(total)
        self._keep(memoryview(detached.already)[:total])
        if self.moved >= total or self._stopped:
            return self.moved
        splicer = None if self._splice is None else native.splicer()
        if splicer is None:
            self._copy_through(cast(Source, detached.socket), total, idle)
        else:
            try:
                self._splice_through(splicer, cast(socket.socket, detached.socket), total, idle)
            finally:
                splicer.close()
        return self.moved

    def _splice_through(self, splicer: native.Splicer, connection: socket.socket, total: int, idle: float) -> None:
        assert self._splice is not None
        source, splice = connection.fileno(), self._splice
        connection.setblocking(False)  # splice heeds nothing else
        with selectors.DefaultSelector() as selector:
            selector.register(connection, selectors.EVENT_READ)

            def take() -> int:
                self._make_room(total)
                return splice(splicer, source, self._piece.written, self._bite(total))

            while self.moved < total and (count := self._when_there(selector, take, idle)):
                self._count(count)

    def _copy_through(self, connection: Source, total: int, idle: float) -> None:
        buffer = memoryview(bytearray(min(total - self.moved, _RECEIVE)))
        if isinstance(connection, socket.socket):
            connection.setblocking(False)  # whoever looks at it afterwards shall not wait either
        with selectors.DefaultSelector() as selector:
            selector.register(connection.fileno(), selectors.EVENT_READ)

            def take() -> int:
                return connection.recv_into(buffer[: self._bite(total)], 0, _DONTWAIT)

            while self.moved < total and (count := self._when_there(selector, take, idle)):
                self._make_room(total)
                self._keep(buffer[:count])

    def _keep(self, view: memoryview) -> None:
        if not view:
            return
        self._store(self._piece.written, [view])
        self._count(len(view))

    def _make_room(self, total: int) -> None:
        """In the file, for what comes next of the piece; of a piece without an end, for this body."""
        end = self._piece.written + total - self.moved if self._piece.end is None else self._piece.end
        self._reserve(self._piece.written, end)

    def _bite(self, total: int) -> int:
        """Bytes to take at once; a limiter keeps its rate with small bites only."""
        left = total - self.moved
        return left if self._limiter is None else min(left, self._limiter.chunk)

    def _count(self, moved: int) -> None:
        """So many bytes are in the file; rest until they are paid for."""
        self._piece.advance(moved)
        self.moved += moved
        if self._limiter is not None:
            for seconds in self._limiter.rests(moved):
                self._rest(seconds)
                if self._stopped:
                    return

    def _rest(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._stopped and (left := until - time.monotonic()) > 0:
            self._halt.wait(min(left, _GLANCE))

    def _when_there(self, selector: selectors.BaseSelector, take: Callable[[], int], idle: float) -> int:
        """What `take` gets, as soon as there is something; 0: stopped. Looks before it waits: on a fast line there is always more."""
        began = time.monotonic()
        until = began + idle
        if self._pace is not None and self._pace.too_slow:
            raise _broken(ErrorCode.ERROR_WINHTTP_TIMEOUT, f"the server is too slow: {self._pace.told}")
        while not self._stopped:
            try:
                if count := take():
                    if self._pace is not None:
                        self._pace.came(count)
                    return count
                raise _broken(ErrorCode.BG_E_CONNECTION_CLOSED, "the connection ended before the file did")
            except (BlockingIOError, TimeoutError):
                selector.select(min(_GLANCE, idle))
                if self._pace is not None:
                    now = time.monotonic()
                    self._pace.waited(now - began)
                    began = now
            except OSError as exc:
                if not isinstance(exc, ConnectionError) and exc.errno not in _OF_THE_SOCKET:
                    raise  # splice fails for either end: this is the file's
                raise _broken(ErrorCode.BG_E_CONNECTION_CLOSED, "the connection was cut") from scrub(exc)
            if time.monotonic() >= until:
                raise _broken(ErrorCode.ERROR_WINHTTP_TIMEOUT, f"no byte for {idle:g} seconds")
        return 0


def _broken(code: ErrorCode, message: str) -> BitsError:
    return make_error(code, ErrorContext.GENERAL_TRANSPORT, message)


async def _outlast(future: "asyncio.Future[T]", seconds: float) -> None:
    """Wait for a thread that was told to stop, through any further cancel."""
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    while not future.done() and (left := until - loop.time()) > 0:
        with suppress(asyncio.CancelledError):  # the caller raises the one it already has
            await asyncio.wait({future}, timeout=left)
    if future.done() and not future.cancelled():
        future.exception()  # seen: the cancel is what is reported


# -- the part file ---------------------------------------------------------------------------------------------------------------


class PartFile:
    """The open part file of one download, made or reopened as one token.

    Every method that touches the file raises `LocalFileError` when that fails (path and identity in its fields) or when the file
    is closed, and what the executor raises when the identity is gone (`ImpersonationFailed`, `TokenRequired`). A cancelled method
    has finished, or never began, when the cancel goes on; if its thread did not come back, the part file is closed for good.

    Attributes:
        destination: the name it will get.
        record: what the journal keeps of it.
        path: where it is now.
        keep_free: bytes of the volume that preallocation leaves to others.
    """

    record: PartRecord

    def __init__(self, files: "TokenExecutor", destination: Path, handles: _Handles) -> None:
        """Use `create` or `reopen`."""
        self._files = files
        self._handles = handles
        self._digests = _RunningDigests()
        self._reservation = _Reservation()
        self._discarded = False
        self.destination = destination
        self.keep_free = 0
        self._preallocates = True
        self._uncached = bool(native.DONTCACHE)
        self._dirty: dict[int, int] = {}  # stretches not yet written back, end to start; a thread touches only the one it writes

    def __repr__(self) -> str:
        return f"<PartFile of {self.destination}>"

    @property
    def committed(self) -> bool:
        """The file has its final name."""
        return self._handles.committed

    @property
    def path(self) -> Path:
        """The part file, or the destination once it has that name."""
        return self.destination if self.committed else self.destination.with_name(self.record.name)

    @property
    def digest_position(self) -> int | None:
        """How far the running digests reach; None: there are none, or a write behind their position has made them worthless."""
        return self._digests.position

    # -- making and finding --

    @classmethod
    async def create(
        cls,
        files: "TokenExecutor",
        destination: Path,
        job_id: UUID,
        *,
        draft: str | None = None,
        allow_shared_directory: bool = False,
        chosen_by_another: bool = False,
    ) -> "PartFile":
        """Make a new, empty part file of mode 0600 beside the destination.

        Args:
            files: the threads of the token that shall own the file.
            destination: absolute path of the file to come.
            job_id: part of the name, for people who find it.
            draft: part of the name, from `new_draft` and already journalled for this file; what a dead process left of that name is
                removed first. None: a new one.
            allow_shared_directory: let a privileged token write where other users could swap the file (T15).
            chosen_by_another: somebody else said where the file goes: on the way there the token follows links of its own user and of
                root, and of nobody else (T8).

        Raises:
            LocalFileError: the directory is missing, not writable, or not fit for such a token; or the destination is a
                directory, a device, a pipe or a socket; or somebody's file has the part file's name (ERROR_FILE_EXISTS). Nothing was
                made.
        """
        part = cls(files, destination, _Handles())
        guard = _guarded(files.token, allow_shared_directory)
        walker = _uid(files.token) if chosen_by_another else guard
        try:
            part.record = await part._run("create", _make, destination, job_id, draft or new_draft(), guard, walker, files.token)
        except BaseException:
            await part._unmake()
            raise
        return part

    @classmethod
    async def reopen(
        cls, files: "TokenExecutor", destination: Path, record: PartRecord, *, allow_shared_directory: bool = False
    ) -> "PartFile | None":
        """Open a part file again.

        Returns:
            None when directory or file are not exactly what was left (another inode, owner or kind, a second link, others may
            write to it), another identity made it, or a lost thread of this process may still write to it: make a new one. Nothing
            was unlinked.

        Raises:
            LocalFileError: the directory cannot be opened, or is not fit for a privileged token (see `create`).
        """
        if (record.device, record.inode) in _given_up or not record.was_made_by(files.token):
            return None
        part = cls(files, destination, _Handles())
        try:
            taken = await part._run("open", _take_up, destination, record, _guarded(files.token, allow_shared_directory))
        except BaseException:
            await part.close()
            raise
        if not taken:
            return None
        part.record = record
        return part

    # -- looking --

    async def length(self) -> int:
        """Bytes in the file, holes counted; preallocated bytes are not."""
        with _local_errors(self._files, self.destination, "look at"), self._handles as handles:
            return (await aiofiles.os.stat(handles.opened()[1], executor=self._files.pool)).st_size

    # -- writing --

    async def append(self, piece: "Slice", chunks: Sequence[Chunk]) -> None:
        """Put these bytes at `piece.written`: all of them when it returns, perhaps some when it raises. One hop for the whole batch.

        `piece` moves on in the thread as in `receive`, also when the wait for it is cancelled; not when the write failed. Where the
        piece has an end, the file is preallocated before the bytes arrive, at most `RESERVE_AHEAD` ahead of them (T18).

        Raises:
            LocalFileError: a write failed; ERROR_DISK_FULL before anything is written: the volume has no room for the whole piece.
        """
        if any(chunks):
            await self._run("write", self._append, piece, chunks)

    def _append(self, handles: _Handles, piece: "Slice", chunks: Sequence[Chunk]) -> None:
        count = sum(map(len, chunks))
        if piece.end is not None and piece.end - piece.written > count:
            self._reserve(handles, piece.written, piece.end)
        self._store(handles, piece.written, chunks)
        piece.advance(count)

    async def receive(
        self,
        detached: "Detached",
        piece: "Slice",
        limiter: Limiter | None,
        stop: Stop | None,
        *,
        idle: float = _IDLE,
        pace: Pace | None = None,
    ) -> int:
        """Put the rest of a body at `piece.written`, read from its socket by one thread of the token.

        The thread advances `piece` as it goes; it never writes beyond the piece's end or the body's length. The socket stays the
        caller's.

        Args:
            detached: a socket (or `Source`), the bytes already read from it, and the length of both together.
            piece: where they go.
            limiter: asked before each read how much to take, and after it how long to rest; None: no limit.
            stop: looked at several times a second; None: only a cancel stops it.
            idle: seconds without a byte after which the connection counts as dead.
            pace: told how fast they come; None: they may come at any pace.

        Returns:
            The bytes moved: all of them, or fewer when it was stopped.

        Raises:
            NetworkError: the connection ended early, fell silent or was too slow; `piece` counts what came before.
            LocalFileError: as `append`, and it is preallocated as there.
        """
        handles = self._handles
        unseen = self._digests.position is None and isinstance(detached.socket, socket.socket)
        splice = partial(self._splice, handles) if unseen else None  # else somebody has to see the bytes
        reserve, store = partial(self._reserve, handles), partial(self._store, handles)
        intake = _Intake(reserve, store, splice, piece, limiter, stop, pace)
        call = _Call(handles, lambda: intake.run(detached, idle))
        with _local_errors(self._files, self.destination, "write"):
            future = self._files.spawn(call)
            try:
                await asyncio.wait({future})
            except asyncio.CancelledError:
                intake.halt()
                await _outlast(future, _PATIENCE)
                call.abandon()
                raise
            return future.result()

    def _store(self, handles: _Handles, offset: int, chunks: Sequence[Chunk]) -> None:
        """In a thread: the bytes, then all that is known of them."""
        _, file = handles.opened()
        end = offset + sum(map(len, chunks))
        self._digests.rewrite(offset)
        gone = self._write_uncached(file, chunks, offset) if end - offset >= _UNCACHED else False
        if not gone:
            native.pwrite_all(file, chunks, offset)
        self._digests.feed(offset, chunks)
        self._account(file, offset, end, written_back=gone)

    def _write_uncached(self, file: int, chunks: Sequence[Chunk], offset: int) -> bool:
        """False: nothing is written, as kernel or file system know no such writes; they are not asked again for this file."""
        if not self._uncached:
            return False
        try:
            native.pwrite_all(file, chunks, offset, native.DONTCACHE)
        except OSError as exc:
            if exc.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            self._uncached = False
        return self._uncached

    def _splice(self, handles: _Handles, splicer: native.Splicer, source: int, offset: int, count: int) -> int:
        """In a thread: bytes straight from a socket. Returns how many; 0: the socket has ended."""
        _, file = handles.opened()
        moved = splicer.move(source, file, offset, count)
        self._account(file, offset, offset + moved)
        return moved

    def _account(self, file: int, offset: int, end: int, *, written_back: bool = False) -> None:
        self._reservation.consume(offset, end)
        if written_back:
            return
        start = self._dirty.pop(offset, offset)
        if end - start < _WRITE_BACK:
            self._dirty[end] = start
        else:
            native.write_back(file, start, end - start)

    def _reserve(self, handles: _Handles, offset: int, end: int) -> None:
        """In a thread, before bytes are written at `offset` of a stretch that goes to `end`: preallocate the next step of it.

        The length of the file stays as it is. Does less, or nothing, where the volume is short of space: but for a stretch that it
        cannot hold at all, a write says when it is full.
        """
        start, count = self._reservation.next(offset, end) if self._preallocates else (end, 0)
        if not count:
            return
        _, file = handles.opened()
        room = native.room(file)
        if room is not None:
            _refuse_too_large(end - start, room)
            count = min(count, room - self.keep_free)
        if count > 0:
            self._preallocates = _preallocate(file, start, count)
            if self._preallocates:
                self._reservation.claim(offset, start, count)

    async def sync(self) -> int:
        """What was written survives a loss of power when it returns. Returns the length of the file, as `length`."""
        return await self._run("write", _sync)

    async def truncate(self, length: int) -> None:
        """Cut the file to `length` bytes."""
        self._digests.rewrite(length)
        await self._run("write", _cut, length)
        self._reservation.clear()
        self._dirty.clear()

    # -- digests --

    async def start_digest(self, algorithms: Sequence[str], upto: int) -> None:
        """Keep running digests (names of hashlib): of [0, upto), read again now, and of what is written from there on in order.

        Raises:
            InvalidArgument: an algorithm is unknown.
            LocalFileError: the file cannot be read or ends before `upto`.
        """
        self._digests.begin(algorithms)
        await self._feed(self._digests, 0, upto)

    async def digest_of(self, algorithm: str, start: int, end: int) -> str:
        """The digest of [start, end) in hexadecimal digits, read again for it.

        Raises:
            InvalidArgument, LocalFileError: as `start_digest`.
        """
        digests = _RunningDigests()
        digests.begin([algorithm], start)
        await self._feed(digests, start, end)
        return await self._run("read", lambda _: digests.hexdigest(algorithm))

    async def _feed(self, digests: _RunningDigests, position: int, end: int) -> None:
        while position < end:
            count = await self._run("read", self._reread, digests, position, min(_REREAD, end - position))
            if not count:
                message = f"the part file ends at {position}, before {end}"
                code, context = ErrorCode.BG_E_LOCAL_FILE_CHANGED, ErrorContext.LOCAL_FILE
                raise make_error(code, context, message, path=self.destination, identity=self._files.token.name)
            position += count

    async def read(self, offset: int, length: int) -> bytes:
        """So many bytes, fewer at the end of the file; at most a megabyte or so, they are all in memory."""
        return await self._run("read", lambda handles: _read_at(handles.opened()[1], length, offset))

    def _reread(self, handles: _Handles, digests: _RunningDigests, offset: int, length: int) -> int:
        _, file = handles.opened()
        position = offset
        while position < offset + length:
            chunk = _read_at(file, min(_READ, offset + length - position), position)
            if not chunk:
                break
            digests.feed(position, [chunk])
            position += len(chunk)
        return position - offset

    async def digest(self, algorithm: str) -> str:
        """The digest of [0, `digest_position`) in hexadecimal digits.

        Raises:
            InvalidState: there is none: `start_digest` was not called for it, or bytes were written behind its position.
        """
        return await self._run("read", lambda _: self._digests.hexdigest(algorithm))

    # -- ends --

    async def commit(self, *, mtime: float | None) -> Path:
        """Make the file durable and give it its name, mode and time (T15, T16); the handles stay open until `close`.

        The mode is 0644 less the process's umask; of a regular file that is replaced, its mode limits that further and its ACL is
        kept. May be called again after an error.

        Args:
            mtime: seconds since the epoch; None: when it was written.

        Raises:
            LocalFileError: also when directory, part file or destination are no longer what they were. The part file is where
                it was, unless somebody else has moved it.
        """
        await self._run("write", _trim_and_sync, self._reservation.clear())
        await self._run("replace", _commit, self.destination, mtime)
        return self.destination

    async def discard(self) -> None:
        """Delete the part file, if its name still leads to it, and close. A committed file stays.

        Raises:
            LocalFileError: it cannot be deleted; it is closed nevertheless.
        """
        if self._discarded:
            return
        try:
            if not self.committed:
                await self._run("remove", _discard)
            self._discarded = True
        finally:
            await self.close()

    async def _run(self, doing: str, func: Callable[[_Handles, *Ts], T], *args: *Ts) -> T:
        return await _run(self._files, self._handles, self.destination, doing, func, *args)

    async def close(self) -> None:
        """Let go of the descriptors; the file stays. May be called again, and in any state."""
        await _close(self._files, self._handles)

    async def _unmake(self) -> None:
        """What an interrupted `create` has made goes away again: nobody knows of it."""
        try:
            if self._handles.record is not None and not self._handles.released:
                with suppress(BitsError):  # the first error is the one to report
                    await self._run("remove", _discard)
        finally:
            await self.close()


async def discard_part(files: "TokenExecutor", destination: Path, record: PartRecord) -> bool:
    """Delete a part file that is not open, as the token that made it (T17).

    Returns:
        True: nothing has its name any more. False: directory or file are not those of the record; nothing was touched.

    Raises:
        LocalFileError: it cannot be looked for or deleted; or another identity made it, and nothing was touched.
    """
    if not record.was_made_by(files.token):
        message, who = "another identity made the part file, and only that one deletes it", files.token.name
        raise make_error(ErrorCode.E_ACCESSDENIED, ErrorContext.LOCAL_FILE, message, path=record.path, identity=who)
    handles = _Handles()
    try:
        return await _run(files, handles, destination, "remove", _discard_recorded, record)
    finally:
        await _close(files, handles)


async def discard_draft(files: "TokenExecutor", destination: Path, job_id: UUID, draft: str) -> bool:
    """Delete the part file that a process may have left which died before it could journal more than `draft`.

    Returns:
        True: nothing has that name. False: somebody else's file has it, and was left alone.

    Raises:
        LocalFileError: it cannot be looked for or deleted.
    """
    handles = _Handles()
    try:
        return await _run(files, handles, destination, "remove", _discard_draft, destination, job_id, draft, _uid(files.token))
    finally:
        await _close(files, handles)


@dataclass(frozen=True, slots=True)
class WholeFile:
    """All bytes of a file, in memory.

    Attributes:
        destination, job_id, draft: as `PartFile.create` takes them.
        chunks: the bytes.
        digests: what they must hash to, in hexadecimal digits, by algorithm.
    """

    destination: Path
    job_id: UUID
    draft: str
    chunks: Sequence[Chunk]
    digests: Sequence[tuple[str, str]] = ()

    def is_right(self) -> bool:
        """Whether they hash to what they must."""
        for algorithm, expected in self.digests:
            found = _new_hash(algorithm)
            for chunk in self.chunks:
                found.update(chunk)
            if found.hexdigest() != expected:
                return False
        return True


async def store_whole(files: "TokenExecutor", wholes: "Sequence[WholeFile]", *, chosen_by_another: bool = False) -> list[PartRecord]:
    """Put whole files into new part files, as `PartFile.create`, `write` and `sync` do: many in one hop, and each directory is synced
    once.

    Returns:
        What the journal is to keep of those, from the first on, that are durable. It stops after a second, and at one with which
        anything is wrong, of which nothing is left: `PartFile` says what, when it is tried alone.
    """
    handles = _Handles()
    try:
        guard = _guarded(files.token, False)
        walker = _uid(files.token) if chosen_by_another else guard
        return await _run(files, handles, wholes[0].destination, "write", _store_all, wholes, guard, walker, files.token)
    finally:
        await _close(files, handles)


@dataclass(frozen=True, slots=True)
class FinishedPart:
    """A part file that holds a whole file and is durable, and what it shall become."""

    destination: Path
    record: PartRecord
    mtime: float | None


async def commit_parts(files: "TokenExecutor", parts: Sequence[FinishedPart]) -> int:
    """Give part files that are not open their names, as `PartFile.commit` does: many in one hop, and each directory is synced once.

    Returns:
        How many of them, from the first on, have their names and are durable. It stops after a second, and at one with which anything
        is wrong: `PartFile.reopen` and `PartFile.commit` say what.
    """
    handles = _Handles()
    try:
        own = list(takewhile(lambda part: part.record.was_made_by(files.token), parts))
        guard, check = _guarded(files.token, False), files.token.local.check
        return await _run(files, handles, parts[0].destination, "replace", _commit_all, own, guard, check)
    finally:
        await _close(files, handles)


async def committed_length(files: "TokenExecutor", destination: Path, record: PartRecord) -> int | None:
    """The length of the destination if it is the recorded part file, renamed by a process that died before it could journal it.

    The inode number alone does not prove that nobody has written another file there since: compare the length, and the digest if
    any.

    Raises:
        LocalFileError: the directory cannot be opened.
    """
    handles = _Handles()
    try:
        return await _run(files, handles, destination, "look at", _look_for_committed, destination, record)
    finally:
        await _close(files, handles)
