"""Where a file may go: the directory, opened once, and what has its name there.

A directory that others could swap files in, or that a stranger's link leads to, is refused to an identity with rights of its own (T8, T15).
"""

import errno
import os
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ..errors import BitsError, ErrorCode, ErrorContext, make_error
from ..identity import native
from .records import uid_of

if sys.platform != "win32":
    import grp
    import pwd

if TYPE_CHECKING:
    from ..identity.tokens import Token

_STEP: Final = getattr(os, "O_PATH", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)

if sys.platform == "win32":
    Directory = Path  # Windows has no calls relative to a descriptor
else:
    Directory = int


def open_directory(path: Path) -> Directory:
    if "\0" in str(path):
        raise ValueError("embedded null character")  # a system call would take it for the end of the path
    return native.open_directory(path)


def open_guarded(path: Path, guard: int | None, walker: int | None) -> Directory:
    """A directory that this identity may write into (T15): nobody but user `guard` could swap files there, and `walker` is the user
    whose links may lead there. None: anybody's."""
    directory = open_directory(path)
    try:
        _refuse_shared(directory, guard)
        _refuse_detour(directory, path, walker)
    except BaseException:
        if isinstance(directory, int):
            os.close(directory)
        raise
    return directory


def find(directory: Directory, name: str) -> os.stat_result | None:
    try:
        return native.stat_at(directory, name)
    except FileNotFoundError:
        return None


def destination_name(destination: Path) -> str:
    if destination.name in ("", ".", ".."):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    return destination.name


def replaceable(directory: Directory, destination: Path) -> os.stat_result | None:
    """What the file will replace: a regular file, a link that leads to no directory, or nothing. All else is refused."""
    found = find(directory, destination_name(destination))
    if found is None or stat.S_ISREG(found.st_mode):
        return found
    if stat.S_ISDIR(found.st_mode) or (stat.S_ISLNK(found.st_mode) and destination.is_dir()):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISLNK(found.st_mode):
        raise FileExistsError(errno.EEXIST, "The destination is a device, a pipe or a socket")
    return found


def guard_of(token: "Token", allow_shared: bool) -> int | None:
    """Whose directory it has to be: privileged tokens do not write where others could swap the file (T15). None: anybody's."""
    uid = uid_of(token)
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


def leads_to(path: Path, directory: os.stat_result) -> bool:
    try:
        there = os.stat(path)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (directory.st_dev, directory.st_ino)
