"""The final name: what the file must still be, the mode, access list and time it gets, and the rename (T15, T16)."""

import errno
import os
import stat
import sys
from pathlib import Path
from typing import Final

from ..errors import ErrorCode, ErrorContext, make_error
from ..identity import native
from .directories import Directory, destination_name, find, replaceable
from .hops import Handles
from .names import unlink
from .records import PartRecord

PUBLIC_MODE: Final = 0o644
"""A finished file's mode before the umask and the mode of the file it replaces."""


def commit(handles: Handles, destination: Path, mtime: float | None) -> None:
    """Give the file its mode and time, and its name, durably. Runs again after a failure: what was done is not done twice."""
    directory, file = handles.opened()
    record = handles.record
    assert record is not None, "published before anybody can commit"
    if not handles.committed:
        _refuse_moved(directory, destination, record)
        mode = rename(directory, file, destination, record, mtime, native.process_umask())
        handles.committed = True
        tidy_up(directory, file, record, mode)
    native.sync_directory(directory)


def rename(directory: Directory, file: int, destination: Path, record: PartRecord, mtime: float | None, umask: int) -> int:
    """The mode that the file is to have."""
    mode = _dress(directory, file, destination.name, replaceable(directory, destination), umask)
    if mtime is not None:
        _set_time(file, mtime)
    native.set_mode(file, mode | 0o600)  # its owner must be able to open it again if the rename fails
    native.rename_at(directory, record.name, destination.name)
    if not _is_renamed(directory, destination, record):
        message = "somebody else changed the directory during the rename"
        raise make_error(ErrorCode.BG_E_LOCAL_FILE_CHANGED, ErrorContext.LOCAL_FILE, message)
    return mode


def tidy_up(directory: Directory, file: int, record: PartRecord, mode: int) -> None:
    unlink(directory, record)  # still there if both names were links to our file: such a rename does nothing
    if mode | 0o600 != mode:
        native.set_mode(file, mode)


def _is_renamed(directory: Directory, destination: Path, record: PartRecord) -> bool:
    found = find(directory, destination_name(destination))
    return found is not None and record.is_file(found)


def _refuse_moved(directory: Directory, destination: Path, record: PartRecord) -> None:
    """The rename would still be a rename in our directory; it would not put the file where it was asked for."""
    there, here = os.stat(destination.parent), os.stat(directory)
    if (there.st_dev, there.st_ino) != (here.st_dev, here.st_ino):
        message = "the directory was replaced by another one during the transfer"
        raise make_error(ErrorCode.BG_E_LOCAL_FILE_CHANGED, ErrorContext.LOCAL_FILE, message)
    found = find(directory, record.name)
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
