"""The part file of one download: made or reopened, written, given its name."""

import asyncio
import errno
import os
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar, TypeVarTuple
from uuid import UUID

import aiofiles.os

from ..errors import BitsError, ErrorCode, ErrorContext, make_error
from ..identity import native
from .directories import guard_of, open_guarded, replaceable
from .hashes import RunningDigests
from .hops import Call, Closed, Handles, close_handles, given_up, hop, local_errors
from .intake import Intake, Limiter, Pace, Stop
from .names import new_draft, open_known, part_name, record_of, remove_stray, synced, unlink
from .records import Chunk, PartRecord, uid_of
from .rename import commit
from .reservation import Reservation, preallocate, refuse_too_large

if TYPE_CHECKING:
    from ..identity.threads import TokenExecutor
    from ..identity.tokens import Token
    from ..transport.ranges import Detached, Slice

_REREAD: Final = 8 << 20  # bytes hashed in one hop: a cancel waits no longer than that takes
_READ: Final = 1 << 20
_WRITE_BACK: Final = 8 << 20  # bytes after which the kernel is told to begin writing: the sync at the end then has little left to do
_UNCACHED: Final = 256 << 10  # a smaller write that bypasses the page cache would be a small one for the disk, too
_IDLE: Final = 60.0
_PATIENCE: Final = 10.0  # seconds a cancel waits for the thread that receives

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


def _make(
    handles: Handles, destination: Path, job_id: UUID, draft: str, guard: int | None, walker: int | None, token: "Token"
) -> PartRecord:
    """Open the directory, look at the destination, make the part file."""
    try:
        handles.directory = directory = open_guarded(destination.parent, guard, walker)
        replaceable(directory, destination)
        name = part_name(destination.name, job_id, draft, native.max_name(directory))
        if handles.released:
            raise Closed  # nobody waits any more: the name may be another's part file by now
        remove_stray(directory, name, uid_of(token))
        handles.file = native.create_exclusive(directory, name)
        record = record_of(destination, name, os.stat(directory), os.fstat(handles.file), token)
        if not handles.publish(record):
            unlink(directory, record)
        return record
    except BaseException:
        handles.release()
        raise


def _take_up(handles: Handles, destination: Path, record: PartRecord, guard: int | None) -> bool:
    """Open the directory and the part file that was left there; False: odd, the handles are released."""
    try:
        handles.directory = directory = open_guarded(destination.parent, guard, guard)
        handles.file = open_known(directory, record) if record.is_directory(os.stat(directory)) else None
        taken = handles.file is not None and handles.publish(record)
    except BaseException:
        handles.release()
        raise
    if not taken:
        handles.release()
    return taken


def _discard(handles: Handles) -> bool:
    assert handles.record is not None, "published before anybody can discard"
    return synced(handles.opened()[0], unlink(handles.opened()[0], handles.record))


def _read_at(fd: int, count: int, offset: int) -> bytes:
    if sys.platform == "win32":
        os.lseek(fd, offset, os.SEEK_SET)
        return os.read(fd, count)
    return os.pread(fd, count, offset)


def _cut(handles: Handles, length: int) -> None:
    os.ftruncate(handles.opened()[1], length)


def _sync(handles: Handles) -> int:
    directory, file = handles.opened()
    native.datasync(file)
    if not handles.named:
        native.sync_directory(directory)  # durable bytes need a durable name
        handles.named = True
    return os.fstat(file).st_size


def _trim_and_sync(handles: Handles, trim: bool) -> None:
    _, file = handles.opened()
    if trim:
        os.ftruncate(file, os.fstat(file).st_size)  # gives back what was preallocated beyond the end
    native.datasync(file)


async def _outlast(future: "asyncio.Future[T]", seconds: float) -> None:
    """Wait for a thread that was told to stop, through any further cancel."""
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    while not future.done() and (left := until - loop.time()) > 0:
        with suppress(asyncio.CancelledError):  # the caller raises the one it already has
            await asyncio.wait({future}, timeout=left)
    if future.done() and not future.cancelled():
        future.exception()  # seen: the cancel is what is reported


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

    def __init__(self, files: "TokenExecutor", destination: Path, handles: Handles) -> None:
        """Use `create` or `reopen`."""
        self._files = files
        self._handles = handles
        self._digests = RunningDigests()
        self._reservation = Reservation()
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
        part = cls(files, destination, Handles())
        guard = guard_of(files.token, allow_shared_directory)
        walker = uid_of(files.token) if chosen_by_another else guard
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
        if (record.device, record.inode) in given_up or not record.was_made_by(files.token):
            return None
        part = cls(files, destination, Handles())
        try:
            taken = await part._run("open", _take_up, destination, record, guard_of(files.token, allow_shared_directory))
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
        with local_errors(self._files, self.destination, "look at"), self._handles as handles:
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

    def _append(self, handles: Handles, piece: "Slice", chunks: Sequence[Chunk]) -> None:
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
        intake = Intake(reserve, store, splice, piece, limiter, stop, pace)
        call = Call(handles, lambda: intake.run(detached, idle))
        with local_errors(self._files, self.destination, "write"):
            future = self._files.spawn(call)
            try:
                await asyncio.wait({future})
            except asyncio.CancelledError:
                intake.halt()
                await _outlast(future, _PATIENCE)
                call.abandon()
                raise
            return future.result()

    def _store(self, handles: Handles, offset: int, chunks: Sequence[Chunk]) -> None:
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

    def _splice(self, handles: Handles, splicer: native.Splicer, source: int, offset: int, count: int) -> int:
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

    def _reserve(self, handles: Handles, offset: int, end: int) -> None:
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
            refuse_too_large(end - start, room)
            count = min(count, room - self.keep_free)
        if count > 0:
            self._preallocates = preallocate(file, start, count)
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
        digests = RunningDigests()
        digests.begin([algorithm], start)
        await self._feed(digests, start, end)
        return await self._run("read", lambda _: digests.hexdigest(algorithm))

    async def _feed(self, digests: RunningDigests, position: int, end: int) -> None:
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

    def _reread(self, handles: Handles, digests: RunningDigests, offset: int, length: int) -> int:
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
        await self._run("replace", commit, self.destination, mtime)
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

    async def _run(self, doing: str, func: Callable[[Handles, *Ts], T], *args: *Ts) -> T:
        return await hop(self._files, self._handles, self.destination, doing, func, *args)

    async def close(self) -> None:
        """Let go of the descriptors; the file stays. May be called again, and in any state."""
        await close_handles(self._files, self._handles)

    async def _unmake(self) -> None:
        """What an interrupted `create` has made goes away again: nobody knows of it."""
        try:
            if self._handles.record is not None and not self._handles.released:
                with suppress(BitsError):  # the first error is the one to report
                    await self._run("remove", _discard)
        finally:
            await self.close()
