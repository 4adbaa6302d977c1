"""The system calls of Linux that wear an identity in one thread only, and those that Python's `os` does not offer.

glibc's own set*id functions change every thread of a process; the raw calls here change the calling thread alone. Nothing
in this module knows what a user or a token is: numbers in, `OSError` out. It refuses to guess: on a machine whose call
numbers it does not know it raises.
"""

import ctypes
import errno
import os
import sys
from collections.abc import Sequence
from typing import Final, NamedTuple

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.setfsuid.argtypes = _libc.setfsgid.argtypes = [ctypes.c_uint32]
_libc.setfsuid.restype = _libc.setfsgid.restype = ctypes.c_int
_libc.prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong]
_libc.unshare.argtypes = [ctypes.c_int]
_fallocate = getattr(_libc, "fallocate64", None) or _libc.fallocate  # glibc's fallocate has 32-bit offsets on 32-bit machines
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.fstatfs.argtypes = [ctypes.c_int, ctypes.c_void_p]


class _Machine(NamedTuple):
    """Call numbers of one architecture (asm/unistd.h), and what a seccomp filter must know of it."""

    setgroups: int
    capset: int
    seccomp: int
    audit: int  # AUDIT_ARCH_*
    births: tuple[int, ...]  # clone, fork, vfork, execve, execveat: each way to make a process, a thread or a program


_OPENAT2: Final = 437  # the same on every architecture, like clone3
_CLONE3: Final = 435

_GENERIC: Final = (220, 221, 281)
_MACHINES: Final[dict[str, _Machine]] = {
    "x86_64": _Machine(116, 126, 317, 0xC000003E, (56, 57, 58, 59, 322)),
    "i686": _Machine(206, 185, 354, 0x40000003, (2, 11, 120, 190, 358)),
    "aarch64": _Machine(159, 91, 277, 0xC00000B7, _GENERIC),
    "armv7l": _Machine(206, 185, 383, 0x40000028, (2, 11, 120, 190, 387)),
    "riscv64": _Machine(159, 91, 277, 0xC00000F3, _GENERIC),
    "loongarch64": _Machine(159, 91, 277, 0xC0000102, _GENERIC),
    "ppc64le": _Machine(81, 184, 358, 0xC0000015, (2, 11, 120, 189, 362)),
    "s390x": _Machine(206, 185, 348, 0x80000016, (2, 11, 120, 190, 354)),
}
_NARROW: Final = {"x86_64": "i686", "i386": "i686", "i586": "i686", "aarch64": "armv7l", "armv8l": "armv7l", "armv6l": "armv7l"}


def _this_machine() -> _Machine | None:
    name = os.uname().machine
    if sys.maxsize < 2**32:  # a 32-bit interpreter makes 32-bit calls, also on a 64-bit kernel
        name = _NARROW.get(name, name)
    return _MACHINES.get(name)


_machine = _this_machine()


def _numbers() -> _Machine:
    if _machine is None:
        raise OSError(errno.ENOSYS, f"system call numbers of {os.uname().machine} are not known")
    return _machine


def _failed(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}")


# -- ids --------------------------------------------------------------------------------------------------------------

_NOBODY: Final = 0xFFFFFFFF  # (uid_t) -1: not an id, so the call changes nothing and returns the present one


def fsuid() -> int:
    """The uid that the kernel checks this thread's file calls against."""
    return int(_libc.setfsuid(_NOBODY)) & 0xFFFFFFFF


def fsgid() -> int:
    """The gid that the kernel checks this thread's file calls against."""
    return int(_libc.setfsgid(_NOBODY)) & 0xFFFFFFFF


def set_groups(gids: Sequence[int]) -> None:
    """Sets the supplementary groups of the calling thread only. Needs CAP_SETGID."""
    array = (ctypes.c_uint32 * max(1, len(gids)))(*gids)
    if _libc.syscall(ctypes.c_long(_numbers().setgroups), ctypes.c_size_t(len(gids)), array):
        raise _failed("setgroups")


def set_filesystem_ids(uid: int, gid: int) -> None:
    """Sets fsgid and fsuid of the calling thread. Neither call reports failure, so both are read back."""
    _libc.setfsgid(gid)
    _libc.setfsuid(uid)
    if fsgid() != gid or fsuid() != uid:
        raise OSError(errno.EPERM, f"the kernel left the thread at uid {fsuid()} gid {fsgid()}")


# -- what else a thread may do ----------------------------------------------------------------------------------------

_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
_CAPABILITY_VERSION_3: Final = 0x20080522
_CLONE_FS: Final = 0x200


def capabilities() -> tuple[int, int]:
    """The effective and the permitted set of the calling thread."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    data = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable of the first 32, then of the others
    if _libc.syscall(ctypes.c_long(_numbers().capset - 1), header, data):  # capget stands before capset everywhere
        raise _failed("capget")
    return data[0] | data[3] << 32, data[1] | data[4] << 32


def drop_capabilities() -> None:
    """Empties the ambient, effective, permitted and inheritable sets of the calling thread; an exec gives none of them back."""
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise _failed("prctl(PR_SET_NO_NEW_PRIVS)")
    if _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) and ctypes.get_errno() != errno.EINVAL:
        raise _failed("prctl(PR_CAP_AMBIENT)")  # EINVAL: before Linux 4.3, where there are no ambient capabilities
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    nothing = (ctypes.c_uint32 * 6)()
    if _libc.syscall(ctypes.c_long(_numbers().capset), header, nothing):
        raise _failed("capset")


def own_working_directory() -> bool:
    """Gives the thread a working directory and umask of its own, so that a chdir in it is not the process's.

    False: not allowed here.
    """
    return bool(_libc.unshare(_CLONE_FS) == 0)


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint16), ("yes", ctypes.c_uint8), ("no", ctypes.c_uint8), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.POINTER(_Instruction)))


_LOAD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
_EQUAL: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_AT_LEAST: Final = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_RETURN: Final = 0x06  # BPF_RET | BPF_K
_ALLOW: Final = 0x7FFF0000  # SECCOMP_RET_ALLOW
_REFUSE: Final = 0x00050000 | errno.EPERM  # SECCOMP_RET_ERRNO
_SET_MODE_FILTER: Final = 1
_SPEC_ALLOW: Final = 4  # without it old kernels slow the whole thread down against Spectre, which this filter is not about


def forbid_births() -> bool:
    """Makes the kernel refuse new processes, threads and programs to the calling thread, for good (T2).

    It stands behind the audit hook, which does not see C code, and on some versions of Python not every call of its own. Needs
    no_new_privs (`drop_capabilities`). False: the kernel has no filters, or the process may not set one.
    """
    machine = _numbers()
    refused = (*machine.births, _CLONE3)
    n = len(refused)
    program = [
        (_LOAD, 0, 0, 4),  # the architecture whose call it is
        (_EQUAL, 1, 0, machine.audit),
        (_RETURN, 0, 0, _REFUSE),
        (_LOAD, 0, 0, 0),  # the call's number
        (_AT_LEAST, n + 1, 0, 0x40000000),  # x32, which has numbers of its own
        *((_EQUAL, n - i, 0, number) for i, number in enumerate(refused)),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE),
    ]
    instructions = (_Instruction * len(program))(*(_Instruction(*each) for each in program))
    filter_ = _Program(len(program), instructions)
    arguments = (ctypes.c_ulong(_SET_MODE_FILTER), ctypes.c_ulong(_SPEC_ALLOW), ctypes.byref(filter_))
    return bool(_libc.syscall(ctypes.c_long(machine.seccomp), *arguments) == 0)


# -- files ------------------------------------------------------------------------------------------------------------

_FALLOC_FL_KEEP_SIZE: Final = 1
_RESOLVE_NO_MAGICLINKS: Final = 0x02
_AT_FDCWD: Final = -100


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def open_without_magic_links(path: str, flags: int) -> int:
    """`open(path, flags)` that refuses to go through /proc's magic links.

    OSError ENOSYS: the kernel has no openat2 (before 5.6).
    """
    how = _OpenHow(flags, 0, _RESOLVE_NO_MAGICLINKS)
    while True:
        fd = _libc.syscall(
            ctypes.c_long(_OPENAT2),
            ctypes.c_long(_AT_FDCWD),
            os.fsencode(path),
            ctypes.byref(how),
            ctypes.c_size_t(ctypes.sizeof(how)),
        )
        if fd >= 0:
            return int(fd)
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number), path)


def allocate(fd: int, offset: int, length: int) -> None:
    """Reserves blocks without changing the file's size."""
    while _fallocate(fd, _FALLOC_FL_KEEP_SIZE, offset, length):
        if ctypes.get_errno() != errno.EINTR:
            raise _failed("fallocate")


def is_memory(fd: int) -> bool:
    """Whether the file system is tmpfs or ramfs (statfs(2): `f_type`, which comes first)."""
    found = ctypes.create_string_buffer(256)  # larger than any struct statfs
    if _libc.fstatfs(fd, found):
        raise _failed("fstatfs")
    word = ctypes.c_uint if os.uname().machine == "s390x" else ctypes.c_long
    return word.from_buffer(found).value in (0x01021994, 0x858458F6)


def status(path: str = "/proc/thread-self/status") -> dict[bytes, bytes]:
    """The fields of a status file of /proc: by default the calling thread's."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        text = os.read(fd, 1 << 16)
        while more := os.read(fd, 1 << 16):
            text += more
    finally:
        os.close(fd)
    return {name: value.strip() for name, _, value in (line.partition(b":") for line in text.splitlines())}
