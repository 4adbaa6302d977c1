"""POSIX: who a thread is, and the file calls that its identity is checked on.

Identities: only the ids that Linux checks file calls against (fsuid, fsgid, groups) and the capabilities of one thread ever
    change. The real and effective uid stay: with a raw setresuid the real user could signal and trace the service (T3). The
    process's own identity is worn by doing nothing. On other systems than Linux that is the only one there is.

File calls: each is relative to a directory descriptor opened once, takes names of one component, follows no link there, and
blocks: a thread of the file token runs it. Nothing here knows what a download is.
"""

import contextlib
import ctypes
import errno
import fcntl
import grp
import os
import pwd
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

from ..errors import ImpersonationFailed, TokenRequired, scrub, show_text

if sys.platform == "linux":
    from . import kernel

# -- accounts ---------------------------------------------------------------------------------------------------------

_CAP_SETGID: Final = 6
_CAP_SETUID: Final = 7
_NEEDED: Final = ((_CAP_SETUID, "CAP_SETUID"), (_CAP_SETGID, "CAP_SETGID"))
# Whoever holds one of these can make himself an administrator: CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID,
# SETGID, SETUID, SETPCAP, LINUX_IMMUTABLE, SYS_MODULE, SYS_RAWIO, SYS_CHROOT, SYS_PTRACE, SYS_ADMIN, MKNOD, SETFCAP,
# MAC_OVERRIDE, MAC_ADMIN, BPF.
_POWERS: Final = sum(1 << bit for bit in (0, 1, 2, 3, 4, 6, 7, 8, 9, 16, 17, 18, 19, 21, 27, 31, 32, 33, 39))
_ADMIN_GROUPS: Final = ("sudo", "wheel", "admin", "docker", "lxd", "disk", "shadow")


@dataclass(frozen=True, slots=True)
class Account:
    """What the user database (or the kernel, for the process itself) says of somebody."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    capabilities: int = 0  # of the running process; an account has none


POWERS_ARE_THE_TOKENS: Final = False
"""The powers of a user are those of all his tokens."""


def is_elevated(account: Account) -> bool:
    """The one place that decides it.

    Root, an administrators' group, or, for the process itself, the capabilities it holds (T10).
    """
    if account.uid == 0 or account.capabilities & _POWERS:
        return True
    return not _admin_gids().isdisjoint((account.gid, *account.groups))


def _admin_gids() -> frozenset[int]:
    gids = {0}
    for name in _ADMIN_GROUPS:
        try:
            gids.add(grp.getgrnam(name).gr_gid)
        except KeyError:
            pass  # a machine without that group
    return frozenset(gids)


def _account_of_process() -> Account:
    uid = os.geteuid()
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = str(uid)  # a container's made-up uid: it is still the process's own
    return Account(name, uid, os.getegid(), _groups_of_thread(), _capabilities()[1])


def _account(user: str | int) -> Account:
    try:
        entry = pwd.getpwuid(user) if isinstance(user, int) else pwd.getpwnam(user)
        groups = os.getgrouplist(entry.pw_name, entry.pw_gid)
    except (KeyError, OverflowError, ValueError, OSError) as exc:
        raise ImpersonationFailed(
            f"the user database does not know {'uid ' if isinstance(user, int) else ''}{show_text(str(user))}",
            advice="name a user of this machine",
        ) from scrub(exc)
    return Account(entry.pw_name, entry.pw_uid, entry.pw_gid, tuple(sorted({*groups, entry.pw_gid})))


def _locked(name: str) -> str:
    """Why nobody may log on to an account of this machine: shadow(5) says that it is locked or expired; "": it says neither, or we may
    not read it. An account without a password is not locked: that is how services' accounts are."""
    try:
        with open("/etc/shadow", "rb") as shadow:
            line = next((line for line in shadow if line.partition(b":")[0] == os.fsencode(name)), b"")
    except OSError:
        return ""
    fields = line.rstrip(b"\n").split(b":")
    if len(fields) > 1 and fields[1].startswith(b"!") and len(fields[1].lstrip(b"!")) > 1:
        return "locked"
    if len(fields) > 7 and fields[7].isdigit() and int(fields[7]) <= time.time() // 86400:
        return "expired"
    return ""


def _capabilities() -> tuple[int, int]:
    """The effective and the permitted set of the calling thread; none where there is no such thing."""
    if sys.platform != "linux":
        return 0, 0
    try:
        return kernel.capabilities()
    except OSError:
        return 0, 0  # a machine whose call numbers are not known: no other identity can be taken there either


def _groups_of_thread() -> tuple[int, ...]:
    return tuple(sorted(os.getgroups()))


# -- identities -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """The process's own: nothing is set, dropped or restored to wear it. It is checked like any other."""

    account: Account
    elevated: bool
    is_process: bool = True

    @property
    def name(self) -> str:
        return self.account.name

    @property
    def key(self) -> str:
        return f"uid:{self.account.uid}"

    def assume(self) -> None:
        self.check()

    def check(self) -> None:
        _check(self.account)

    def fresh(self) -> "ProcessIdentity":
        return self

    def close(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class UserIdentity:
    """Another user of this machine, worn by a thread from birth to death.

    Without any capability, and without a way to start programs.
    """

    account: Account
    elevated: bool
    is_process: bool = False

    @property
    def name(self) -> str:
        return self.account.name

    @property
    def key(self) -> str:
        return f"uid:{self.account.uid}"

    def assume(self) -> None:
        account = self.account
        try:
            kernel.own_working_directory()
            kernel.set_groups(account.groups)
            kernel.set_filesystem_ids(account.uid, account.gid)
            kernel.drop_capabilities()
            kernel.forbid_births()
            _read_back(account)
        except OSError as exc:
            why = show_text(exc.strerror or type(exc).__name__)
            raise ImpersonationFailed(f"cannot become {self.name}: {why}", identity=self.name) from scrub(exc)

    def check(self) -> None:
        _check(self.account)

    def fresh(self) -> "UserIdentity":
        try:
            account = _account(self.account.uid)
        except ImpersonationFailed as exc:
            raise TokenRequired(f"the account {self.name} is gone", identity=self.name) from exc
        if account.name != self.account.name:
            raise TokenRequired(f"uid {account.uid} is no longer {self.name}", identity=self.name)
        if why := _locked(account.name):
            raise TokenRequired(f"the account {self.name} is {why}", identity=self.name, advice="unlock the account, then resume the job")
        return self if account == self.account else UserIdentity(account, is_elevated(account))

    def close(self) -> None:
        pass


def process_identity() -> ProcessIdentity:
    """The identity of the running process as it is now."""
    account = _account_of_process()
    return ProcessIdentity(account, is_elevated(account))


def process_key() -> object:
    """Changes when the process's ids change; costs microseconds."""
    return os.geteuid(), os.getegid(), _groups_of_thread()


def user_identity(user: str | int) -> ProcessIdentity | UserIdentity:
    """The identity of a user by name or uid. Asks the user database, so it blocks.

    Raises:
        ImpersonationFailed: The user is not known, or the process lacks a capability that it needs; the message names it.
    """
    account = _account(user)
    if account.uid == os.geteuid():
        return process_identity()
    _require_capabilities(account.name)
    return UserIdentity(account, is_elevated(account))


def is_system_account(local: ProcessIdentity | UserIdentity) -> bool:
    """Root and the accounts of services: those below UID_MIN of login.defs, 1000 where it names none."""
    return local.account.uid < _first_uid_of_people()


def _first_uid_of_people() -> int:
    try:
        with open("/etc/login.defs", encoding="utf-8", errors="replace") as file:
            words = [line.split() for line in file]
    except OSError:
        words = []
    return next((int(line[1]) for line in words if len(line) > 1 and line[0] == "UID_MIN" and line[1].isdecimal()), 1000)


def _require_capabilities(name: str) -> None:
    if sys.platform != "linux":
        raise ImpersonationFailed(f"cannot become {name}: only Linux gives one thread another user's identity", identity=name)
    held, _ = _capabilities()
    missing = [capability for bit, capability in _NEEDED if not held >> bit & 1]
    if missing:
        raise ImpersonationFailed(
            f"cannot become {name}: the process lacks {' and '.join(missing)}",
            identity=name,
            advice=f"run it as root or give it {' and '.join(missing)} (systemd: AmbientCapabilities=)",
        )


def _check(account: Account) -> None:
    """About three microseconds: every use of an identity pays this twice (T1)."""
    if sys.platform != "linux":
        uid, gid = os.geteuid(), os.getegid()
    else:
        uid, gid = kernel.fsuid(), kernel.fsgid()
    if uid != account.uid or gid != account.gid or _groups_of_thread() != account.groups:
        raise ImpersonationFailed(
            f"a thread of {account.name} (uid {account.uid}, gid {account.gid}) was found as uid {uid}, gid {gid}"
            f"{'' if (uid, gid) != (account.uid, account.gid) else ' with other groups'}",
            identity=account.name,
            advice="something in this process called setuid, setgid or setgroups: do that before the first identity is used",
        )


def _read_back(account: Account) -> None:
    """Asks the kernel, in its own words, whether the thread is what it should be."""
    _check(account)
    status = kernel.status()
    held = [name.decode() for name in (b"CapEff", b"CapPrm", b"CapInh", b"CapAmb") if int(status.get(name, b"0"), 16)]
    if held:
        raise ImpersonationFailed(f"a thread of {account.name} kept capabilities ({', '.join(held)})", identity=account.name)
    if status[b"Uid"].split()[3] != b"%d" % account.uid or status[b"Gid"].split()[3] != b"%d" % account.gid:
        raise ImpersonationFailed(f"/proc does not show the thread as {account.name}", identity=account.name)


# -- directories ------------------------------------------------------------------------------------------------------


def open_directory(path: str | os.PathLike[str]) -> int:
    """Opens a directory for the calls below. A descriptor: whoever swaps the path later changes nothing (T15)."""
    name = os.fspath(path)
    flags = os.O_DIRECTORY | os.O_CLOEXEC
    try:
        return _open_plainly(name, flags | os.O_RDONLY)
    except PermissionError:
        if not hasattr(os, "O_PATH"):
            raise
        return _open_plainly(name, flags | os.O_PATH)  # a drop box: this identity may write in it but not list it


def _open_plainly(name: str, flags: int) -> int:
    if sys.platform == "linux":
        try:
            return kernel.open_without_magic_links(name, flags)
        except OSError as exc:
            if exc.errno not in (
                errno.ENOSYS,
                errno.EPERM,
            ):  # EPERM: what old container runtimes answer to calls they do not know
                raise
    return os.open(name, flags)


def sync_directory(dirfd: int) -> None:
    """Makes names in the directory durable, as far as this identity may: a directory it cannot read cannot be synced."""
    try:
        os.fsync(dirfd)
    except OSError as exc:
        if exc.errno not in (errno.EBADF, errno.EINVAL):  # opened as a mere path; a file system that has nothing to sync
            raise


def max_name(dirfd: int) -> int:
    """How many bytes a name in this directory may have."""
    try:
        return max(14, os.fpathconf(dirfd, "PC_NAME_MAX"))
    except (OSError, ValueError):
        return 255


def _one(name: str) -> str:
    """A name of one component, so that nothing leaves the directory."""
    if not name or name in (".", "..") or "/" in name or "\0" in name:
        raise OSError(errno.EINVAL, "not a plain file name", name)
    return name


def rename_at(dirfd: int, old: str, new: str) -> None:
    """Renames within the directory; replaces what is there."""
    os.rename(_one(old), _one(new), src_dir_fd=dirfd, dst_dir_fd=dirfd)


def unlink_at(dirfd: int, name: str) -> None:
    """Removes a name from the directory."""
    os.unlink(_one(name), dir_fd=dirfd)


def stat_at(dirfd: int, name: str) -> os.stat_result:
    """What stands under the name itself: a link is not followed."""
    return os.stat(_one(name), dir_fd=dirfd, follow_symlinks=False)


# -- files ------------------------------------------------------------------------------------------------------------


def create_exclusive(dirfd: int, name: str) -> int:
    """A new file, 0600 whatever the umask is; raises FileExistsError when anything, also a dangling link, has the name."""
    fd = os.open(_one(name), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=dirfd)
    try:
        os.fchmod(fd, 0o600)
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_existing(dirfd: int, name: str) -> int:
    """Opens a file to go on with it.

    O_NONBLOCK: a FIFO put in its place must not hang the thread; the caller looks at what it got.
    """
    return os.open(_one(name), os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=dirfd)


_VECTORS: Final = 1024  # IOV_MAX of Linux and macOS


DONTCACHE: Final = 0x80 if sys.platform == "linux" else 0
"""RWF_DONTCACHE (Linux 6.14): what is written goes to the disk at once and leaves the page cache; 0: there is no such thing."""


def pwrite_all(fd: int, chunks: Sequence[bytes | bytearray | memoryview], offset: int, flags: int = 0) -> int:
    """Writes all chunks one after the other at the offset, however often the kernel takes less. Returns the bytes written.

    With flags that kernel, file system or interpreter do not know it raises OSError EOPNOTSUPP, and nothing is written.
    """
    left = [view for view in (memoryview(chunk).cast("B") for chunk in chunks) if len(view)]
    start = offset
    while left:
        written = _pwritev(fd, left[:_VECTORS], offset, flags)
        if not written:
            raise OSError(errno.EIO, "the file system took no byte")
        offset += written
        left = _after(left, written)
    return offset - start


def _pwritev(fd: int, views: list[memoryview], offset: int, flags: int) -> int:
    if not flags:
        return os.pwritev(fd, views, offset)
    try:
        return os.pwritev(fd, views, offset, flags)
    except NotImplementedError:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP)) from None


def _after(views: list[memoryview], count: int) -> list[memoryview]:
    """What is left of the views after `count` bytes."""
    for i, view in enumerate(views):
        if count < len(view):
            return [view[count:], *views[i + 1 :]]
        count -= len(view)
    return []


_PIPE: Final = 1 << 20


class Splicer:
    """Moves bytes from a socket into a file through a pipe, without their passing through this program. Linux only.

    Belongs to one thread. The socket must be non-blocking. Bytes that are in the pipe when something fails are lost to the caller; it
    counts only what `move` returned.
    """

    def __init__(self) -> None:
        self._read, self._write = os.pipe2(os.O_CLOEXEC)
        try:
            self.size = fcntl.fcntl(self._write, fcntl.F_SETPIPE_SZ, _PIPE)
        except OSError:
            self.size = fcntl.fcntl(self._write, fcntl.F_GETPIPE_SZ)  # an ordinary user has pipes of this size left, and no larger

    def move(self, source: int, target: int, offset: int, count: int) -> int:
        """Up to `count` bytes that are there, to `offset`. 0: the socket has ended. Raises BlockingIOError when there are none."""
        taken = os.splice(source, self._write, min(count, self.size), flags=os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK)
        left = taken
        while left:
            moved = self._put(target, offset, left)
            offset, left = offset + moved, left - moved
        return taken

    def _put(self, target: int, offset: int, count: int) -> int:
        try:
            moved = os.splice(self._read, target, count, offset_dst=offset, flags=os.SPLICE_F_MOVE)
        except OSError as exc:
            if exc.errno != errno.EINVAL:  # the file system knows no splice: what is in the pipe goes the long way
                raise
            return pwrite_all(target, [os.read(self._read, count)], offset)
        if not moved:
            raise OSError(errno.EIO, "the file system took no byte")
        return moved

    def close(self) -> None:
        """Give the pipe back."""
        os.close(self._read)
        os.close(self._write)


def splicer() -> "Splicer | None":
    """A new `Splicer`; None where the kernel has no splice."""
    return Splicer() if sys.platform == "linux" else None


def write_back(fd: int, offset: int, length: int) -> None:
    """Let the kernel begin to write these bytes to the disk, and forget its copy of what is written; a hint, never an error."""
    with contextlib.suppress(OSError):
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)


def datasync(fd: int) -> None:
    """Makes the file's bytes durable."""
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)  # fsync alone leaves them in the drive's cache
    else:
        os.fdatasync(fd)


def preallocate(fd: int, offset: int, length: int) -> bool:
    """Reserves room without changing the file's size. False: the file system cannot, or has nothing of it; nothing is written in its
    place. Raises OSError ENOSPC."""
    if sys.platform != "linux" or kernel.is_memory(fd):
        return False  # memory does not come in better pieces for it, and finding it twice takes longer
    try:
        kernel.allocate(fd, offset, length)
    except OSError as exc:
        if exc.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM):
            raise
        return False
    return True


def room(fd: int) -> int | None:
    """Bytes that the file's volume has left for the identity of this thread; None: it does not say."""
    volume = os.fstatvfs(fd)
    if not volume.f_blocks:
        return None
    uid = kernel.fsuid() if sys.platform == "linux" else os.geteuid()
    return volume.f_frsize * (volume.f_bavail if uid else volume.f_bfree)  # some of it may be kept for root


def set_mode(fd: int, mode: int) -> None:
    """Sets the permission bits: never group- or other-writable (T16), never setuid or setgid."""
    os.fchmod(fd, mode & 0o755)


def set_times(fd: int, mtime_ns: int) -> None:
    """Sets the time of modification; the time of access stays."""
    os.utime(fd, ns=(os.fstat(fd).st_atime_ns, mtime_ns))


_ACL: Final = "system.posix_acl_access"
_NO_ACL: Final = (errno.ENODATA, errno.EOPNOTSUPP) if hasattr(errno, "ENODATA") else (errno.EOPNOTSUPP,)


def copy_acl(from_fd: int, to_fd: int) -> bool:
    """Gives a file the access list of the file it replaces; False: that one has none, and neither has the new one now.

    Set the mode afterwards: an access list brings its own permission bits.
    """
    if sys.platform != "linux":
        return False
    try:
        acl = os.getxattr(from_fd, _ACL)
    except OSError as exc:
        if exc.errno not in _NO_ACL:
            raise
        _remove_acl(to_fd)  # it may have got one from the directory's default list
        return False
    os.setxattr(to_fd, _ACL, acl)
    return True


def _remove_acl(fd: int) -> None:
    try:
        os.removexattr(fd, _ACL)
    except OSError as exc:
        if exc.errno not in _NO_ACL:
            raise


# -- the machine ------------------------------------------------------------------------------------------------------


def process_umask() -> int:
    """The process's umask, read without setting it: os.umask would change it for every other thread meanwhile (T16)."""
    if sys.platform == "linux":
        try:
            return int(kernel.status("/proc/self/status")[b"Umask"], 8)
        except (OSError, KeyError):
            pass  # no /proc: the strict answer
    return 0o077


@cache
def boot_id() -> str:
    """Names this boot of the machine. Where it cannot be read it names this process: then nothing is taken for the same boot."""
    if sys.platform == "darwin":
        return _sysctl("kern.bootsessionuuid") or str(uuid.uuid4())
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return str(uuid.uuid4())


def _sysctl(name: str) -> str:
    text = ctypes.create_string_buffer(64)
    size = ctypes.c_size_t(len(text))
    failed = ctypes.CDLL(None).sysctlbyname(name.encode(), text, ctypes.byref(size), None, ctypes.c_size_t(0))
    return "" if failed else text.value.decode("ascii", "replace")
