"""The part file's name in its directory: nobody's promise, so device and inode say whether what has it is ours (T15, T17)."""

import errno
import os
import secrets
import stat
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final
from uuid import UUID

from ..identity import native
from .directories import Directory, find
from .records import PartRecord

if TYPE_CHECKING:
    from ..identity.tokens import Token

_SUFFIX: Final = ".bits-part"


def new_draft() -> str:
    """The part of a part file's name that nobody can guess. The journal knows it before the file exists, so a crash leaves no stray."""
    return secrets.token_hex(8)


def part_name(name: str, job_id: UUID, draft: str, longest: int) -> str:
    """A name that starts with a dot, tells the destination and the job, and fits the directory."""
    tail = f".{job_id.hex}.{draft}{_SUFFIX}"
    told = name.encode("utf-8", "replace")  # the journal keeps the part's name as text, so it is text
    room = max(0, longest - len(tail) - 1)
    if len(told) > room:
        while room and told[room] & 0xC0 == 0x80:  # not in the middle of a character
            room -= 1
        told = told[:room]
    return f".{told.decode()}{tail}"


def record_of(destination: Path, name: str, where: os.stat_result, made: os.stat_result, token: "Token") -> PartRecord:
    uid = None if sys.platform == "win32" else made.st_uid
    return PartRecord(os.path.dirname(destination), name, where.st_dev, where.st_ino, made.st_dev, made.st_ino, uid, token.local.key)


def remove_stray(directory: Directory, name: str, uid: int | None) -> bool:
    """What a process left that died between making a part file and saying so: a file that is this identity's alone, with a name that
    only the journal knew. Anything else of that name is somebody's and stays. Whether nothing has the name now."""
    found = find(directory, name)
    if found is None:
        return True
    private = stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and not found.st_mode & 0o022
    if not private or uid not in (None, found.st_uid):
        return False
    with suppress(FileNotFoundError):
        native.unlink_at(directory, name)
    return True


def open_known(directory: Directory, record: PartRecord) -> int | None:
    """Open the part file if it is what we left: looked at before it is opened, because opening a device may do something."""
    found = find(directory, record.name)
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


def unlink(directory: Directory, record: PartRecord) -> bool:
    """Delete the part file, if its name still leads to it; whether nothing has the name now."""
    found = find(directory, record.name)
    if found is None:
        return True
    if not record.is_file(found):
        return False
    with suppress(FileNotFoundError):
        native.unlink_at(directory, record.name)
    return True


def synced(directory: Directory, gone: bool) -> bool:
    """The journal forgets a removed file next: after a loss of power it must not be back."""
    if gone:
        native.sync_directory(directory)
    return gone


def create_in_place_of_stray(directory: Directory, name: str, uid: int | None) -> int:
    try:
        return native.create_exclusive(directory, name)
    except FileExistsError:
        if not remove_stray(directory, name, uid):
            raise
    return native.create_exclusive(directory, name)
