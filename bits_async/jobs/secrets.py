"""Secrets at rest: the box that seals them, the key it needs, and the files that nobody else may touch (threat model T13).

A sealed secret is AES-256-GCM with a random nonce. Its place (job, owner, target, scheme, column) is associated data, so a
secret that was copied into another row, job or column does not open. Each job has a key of its own, derived from the key
file: random nonces then stay far from their bound however long a journal lives. A second, independent key is for
fingerprints (T7).

A private file is one that only this user can have written. Path by path, from the root down, no component is a symbolic
link; each directory belongs to root or to the effective user, and others may not write it unless it is sticky (then they
cannot replace what we own in it). The last directory, which holds the journal, belongs to the effective user and nobody else
may write it, sticky or not: SQLite makes files in it by name. Once that holds nobody else can change what any of these names
mean, so later calls may go by path. The group bits of a mode are also the mask of an access control list, so one look at the
mode covers both. On Windows only links are refused: owners and access lists are not looked at, so there a journal is as private as the
list of its directory makes it (that of a user's own, below %LOCALAPPDATA%, admits the user, administrators and the system).

Everything here blocks: it is called by the store's own thread. This module knows neither SQLite nor the records of a job.
"""

import errno
import hmac
import os
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, final
from uuid import UUID

from ..errors import ErrorCode, InvalidArgument, StoreError, scrub

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_SIZE: Final = 32
NONCE_SIZE: Final = 12
FORMAT: Final = b"\x01"  # first byte of every sealed secret

OTHERS_WRITE: Final = 0o022
OTHERS_ANYTHING: Final = 0o077

_OPEN: Final = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_CLOEXEC", "O_NONBLOCK", "O_BINARY", "O_NOINHERIT"))


# -- the box -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """Where a secret belongs. It opens nowhere else.

    Attributes:
        job_id: the job.
        owner: the sid of the job's owner.
        column: the journal's name for it; with the index where a job has several.
        target, scheme: names of the credential's target and scheme; empty for what is no credential.
    """

    job_id: UUID
    owner: str
    column: str
    target: str = ""
    scheme: str = ""

    def encoded(self) -> bytes:
        """One encoding per place: each part after its length, so no two places share one."""
        parts = (b"bits_async", self.job_id.bytes, *map(_encode, (self.owner, self.target, self.scheme, self.column)))
        return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


@final
class SecretBox:
    """Seals and opens secrets with the journal's key. Neither its repr nor an exception of it shows a key or a secret."""

    __slots__ = ("_last", "_sealing", "fingerprint_key")

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_SIZE:
            raise InvalidArgument(f"the journal's key has {len(key)} bytes instead of {KEY_SIZE}")
        self._sealing = _derive(key, b"bits_async journal: secrets")
        self.fingerprint_key = _derive(key, b"bits_async journal: fingerprints")
        self._last: tuple[UUID, AESGCM] | None = None  # a job's secrets are read and written one after the other

    def __repr__(self) -> str:
        return "<SecretBox>"

    def seal(self, secret: str, place: Place) -> bytes:
        """The secret, readable only with this key and at this place."""
        nonce = os.urandom(NONCE_SIZE)
        return FORMAT + nonce + self._cipher(place).encrypt(nonce, _encode(secret), place.encoded())

    def open(self, sealed: bytes, place: Place) -> str | None:
        """The secret, or None: sealed with another key, for another place, or altered."""
        if not isinstance(sealed, bytes) or sealed[:1] != FORMAT:
            return None
        from cryptography.exceptions import InvalidTag

        nonce, body = sealed[1 : 1 + NONCE_SIZE], sealed[1 + NONCE_SIZE :]
        try:
            return self._cipher(place).decrypt(nonce, body, place.encoded()).decode("utf-8", "surrogatepass")
        except (InvalidTag, ValueError):  # ValueError: too short to be one
            return None

    def _cipher(self, place: Place) -> "AESGCM":
        last = self._last
        if last is None or last[0] != place.job_id:
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # most journals of one download have no secret

            last = self._last = place.job_id, AESGCM(_expand(self._sealing, b"job " + place.job_id.bytes))
        return last[1]


def _derive(key: bytes, purpose: bytes) -> bytes:
    """HKDF with SHA-256 and no salt, one block of output (RFC 5869)."""
    return _expand(hmac.digest(bytes(KEY_SIZE), key, "sha256"), purpose)


def _expand(key: bytes, purpose: bytes) -> bytes:
    """HKDF-Expand (RFC 5869, 2.3) of one block, which is a key."""
    return hmac.digest(key, purpose + b"\x01", "sha256")


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


# -- private files -----------------------------------------------------------------------------------------------------


def guard_directory(directory: Path, *, make_parents: bool = False) -> None:
    """Makes sure that nobody else can change what names in `directory` mean.

    The directory is made (0700) if it is missing; with `make_parents` what is missing above it, too.

    Raises:
        StoreError: a component is a symbolic link, belongs to somebody else, or others may write it. It names the component.
    """
    for ancestor in reversed(directory.parents):
        if make_parents and not os.path.lexists(ancestor):
            _make_directory(ancestor)
        _check(ancestor, _look(ancestor), kind=stat.S_ISDIR, forbidden=OTHERS_WRITE, ancestor=True)
    if not os.path.lexists(directory):
        _make_directory(directory)
    _check(directory, _look(directory), kind=stat.S_ISDIR, forbidden=OTHERS_WRITE)


def make_private(path: Path) -> bool:
    """Makes an empty file (0600) that is ours alone; a file that exists is checked instead.

    Returns:
        Whether it was made.

    Raises:
        StoreError: what exists is not a regular file of ours that nobody else may write.
    """
    try:
        os.close(_create(path))
    except FileExistsError:
        check_private(path)
        return False
    except OSError as exc:
        raise os_fault(exc, path, "create") from scrub(exc)
    return True


def check_private(path: Path, *, forbidden: int = OTHERS_WRITE) -> None:
    """Checks a file that may exist.

    Raises:
        StoreError: it exists and is not a regular file of ours whose mode has no `forbidden` bit.
    """
    if os.path.lexists(path):
        _check(path, _look(path), kind=stat.S_ISREG, forbidden=forbidden)


def os_fault(exc: OSError, path: Path, doing: str) -> StoreError:
    """The error for a failed call on one of the journal's files; transient where nobody need look at these files for it to be over."""
    code, advice, transient = (
        ErrorCode.ERROR_WRITE_FAULT,
        "check that the path exists and that this user may write there, or name another journal",
        False,
    )
    if exc.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        code, advice, transient = ErrorCode.ERROR_DISK_FULL, "make room on the volume of the journal, then try again", True
    elif exc.errno == errno.EROFS:
        advice, transient = "make its file system writable, then try again", True
    elif exc.errno in (errno.ENOENT, errno.ENOTDIR):
        code = ErrorCode.ERROR_PATH_NOT_FOUND
    reason = exc.strerror or type(exc).__name__
    return StoreError(f"cannot {doing} the journal's file: {reason}", code=code, transient=transient, path=path, advice=advice)


def _look(path: Path) -> os.stat_result:
    try:
        return os.lstat(path)
    except OSError as exc:
        raise os_fault(exc, path, "look at") from scrub(exc)


def _check(path: Path, status: os.stat_result, *, kind: Callable[[int], bool], forbidden: int, ancestor: bool = False) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise _refused(path, "is a symbolic link", f"name the journal by its real path: {os.path.realpath(path)}")
    if not kind(status.st_mode):
        raise _refused(path, "is not what belongs there", "name another journal, or move this away")
    trouble = _stranger(status, forbidden, ancestor)
    if trouble:
        raise _refused(path, *trouble)


def _refused(path: Path, why: str, advice: str) -> StoreError:
    return StoreError(
        f"the journal is not opened: its file, or a directory on the way there, {why}",
        code=ErrorCode.ERROR_DIRECTORY,
        path=path,
        advice=advice,
    )


def _create(path: Path) -> int:
    """A new file; its mode is set on the descriptor, so the umask does not matter."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _OPEN, 0o600)
    try:
        _set_mode(fd)
    except OSError:
        os.close(fd)
        raise
    return fd


def _make_directory(directory: Path) -> None:
    try:
        os.mkdir(directory, 0o700)
        os.chmod(directory, 0o700)  # whatever the umask took away; others cannot have replaced it since: the parent was checked
    except FileExistsError:
        return  # another process of ours was faster; it is checked like any other
    except OSError as exc:
        raise os_fault(exc, directory, "make the directory of") from scrub(exc)
    try:
        sync_directory(directory.parent)
    except StoreError:
        pass  # a parent that may be searched but not read cannot be synced; the name is durable a little later


# -- the key -----------------------------------------------------------------------------------------------------------


def load_key(path: Path) -> bytes:
    """The journal's key; a new one is made when there is none. Call it under the journal's lock.

    A new key is written under another name, synced and renamed, so a key file is whole or missing.

    Raises:
        StoreError: the key file may be read by others, is not ours, or is no key.
    """
    check_private(path, forbidden=OTHERS_ANYTHING)
    try:
        return _read_key(path) if os.path.lexists(path) else _make_key(path)
    except OSError as exc:
        raise os_fault(exc, path, "use") from scrub(exc)


def _read_key(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | _OPEN)
    with open(fd, "rb") as file:
        key = file.read(KEY_SIZE + 1)
    if len(key) != KEY_SIZE:
        raise StoreError(
            "the journal's key file does not hold a key",
            path=path,
            advice="restore it from a backup; without one move it away: jobs that need a secret then say so",
        )
    return key


def _make_key(path: Path) -> bytes:
    key = os.urandom(KEY_SIZE)
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)  # left by a crash; it never sealed anything
    with open(_create(new), "wb") as file:
        file.write(key)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    sync_directory(path.parent)
    return key


# -- the lock ----------------------------------------------------------------------------------------------------------


def take_lock(path: Path, store: Path) -> int:
    """Takes the lock that one manager holds for as long as it uses `store`; closing the descriptor, or dying, gives it back.

    Raises:
        StoreError: another manager holds it, in this process or another one.
    """
    while True:
        make_private(path)
        try:
            fd = os.open(path, os.O_RDWR | _OPEN)
        except FileNotFoundError:
            continue  # its holder removed the journal and the lock with it
        except OSError as exc:
            raise os_fault(exc, path, "open") from scrub(exc)
        try:
            if not _lock(fd):
                raise _held(fd, store)
            if _is_still(fd, path):
                _write_holder(fd)
                return fd
        except OSError as exc:
            os.close(fd)
            raise os_fault(exc, path, "lock") from scrub(exc)
        except StoreError:
            os.close(fd)
            raise
        os.close(fd)  # locked, but removed by the holder before: the name now means another file


def _is_still(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def _held(fd: int, store: Path) -> StoreError:
    holder = os.read(fd, 20).decode("ascii", "replace").strip()
    return StoreError(
        f"the journal is in use by another manager{f', process {holder}' if holder.isdigit() else ''}",
        code=ErrorCode.ERROR_SHARING_VIOLATION,
        path=store,
        advice="close that manager first, or name another journal",
    )


def _write_holder(fd: int) -> None:
    """The process id, for people: it names the holder in the other manager's error."""
    os.ftruncate(fd, 0)
    os.lseek(fd, 0, os.SEEK_SET)
    os.write(fd, f"{os.getpid()}\n".encode("ascii"))


# -- the platforms: the same names twice --------------------------------------------------------------------------------

if sys.platform == "win32":
    import msvcrt

    _LOCKED_BYTE: Final = 1 << 30  # far behind the process id: a locked byte cannot be read

    def _lock(fd: int) -> bool:
        os.lseek(fd, _LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        finally:
            os.lseek(fd, 0, os.SEEK_SET)
        return True

    def release_lock(fd: int, path: Path, *, remove: bool = False) -> None:
        """Gives the lock back; `remove` when the journal is gone and the lock file may go, too."""
        os.close(fd)
        if remove:
            try:
                path.unlink(missing_ok=True)
            except PermissionError:
                pass  # the next manager has it open already

    def sync_directory(directory: Path) -> None:
        """Makes the names in a directory durable. Windows has no such call; there a name is durable with its file."""

    def _set_mode(fd: int) -> None:
        pass  # owners and access lists of Windows are not looked at: see above

    def _stranger(status: os.stat_result, forbidden: int, ancestor: bool) -> tuple[str, str] | None:
        return None  # likewise

else:
    import fcntl

    def _lock(fd: int) -> bool:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the open file, so a second manager in this process is refused too
        except BlockingIOError:
            return False
        return True

    def release_lock(fd: int, path: Path, *, remove: bool = False) -> None:
        """Gives the lock back; `remove` when the journal is gone and the lock file may go, too."""
        try:
            if remove:
                path.unlink(missing_ok=True)  # before it is given back: whoever takes it then sees that the name is gone
        except OSError as exc:
            raise os_fault(exc, path, "delete") from scrub(exc)
        finally:
            os.close(fd)

    def sync_directory(directory: Path) -> None:
        """Makes the names in a directory durable. Windows has no such call; there a name is durable with its file."""
        try:
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | _OPEN)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as exc:
            raise os_fault(exc, directory, "sync") from scrub(exc)

    def _set_mode(fd: int) -> None:
        os.fchmod(fd, 0o600)

    def _stranger(status: os.stat_result, forbidden: int, ancestor: bool) -> tuple[str, str] | None:
        """Why somebody else could have a hand in this file or directory, and what to do; None if nobody can."""
        user = os.geteuid()
        if status.st_uid != user and not (ancestor and status.st_uid == 0):
            wanted = f"uid {user}" + (" or root" if ancestor and user else "")
            return f"belongs to uid {status.st_uid}, not to {wanted}", "give it to that user, or name another journal"
        sticky = ancestor and status.st_mode & stat.S_ISVTX
        if status.st_mode & forbidden and not sticky:
            verb = "write" if not status.st_mode & forbidden & ~OTHERS_WRITE else "read or write"
            mode = stat.S_IMODE(status.st_mode)
            take = "chmod go-w" if forbidden == OTHERS_WRITE else "chmod go-rwx"
            why = f"may be used by others (mode {mode:04o}): they may {verb} it"
            if status.st_mode & stat.S_ISVTX:  # meant for everybody, as /tmp is: the system needs it as it stands
                return why, "name a journal in a directory that is this user's alone"
            return why, f"run {take} on it, or name another journal"
        return None
