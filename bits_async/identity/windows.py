"""Windows: who a thread is, and the file calls that its identity is checked on. The twin of `posix`, with the same names.

The process's own identity works. Another user's access token is not worn yet: it is refused when the token is made, never
replaced by the process's own. A directory "descriptor" is the directory's path here, because Windows has no calls relative
to a directory.
"""

import contextlib
import ctypes
import os
import sys
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from ..errors import ImpersonationFailed, show_text

# -- identities -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Account:
    """What Windows says of the process's own access token."""

    name: str
    sid: str
    elevated: bool


def is_elevated(account: Account) -> bool:
    """The one place that decides it: a fact of the access token (T10)."""
    return account.elevated


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """The process's own: nothing is set or restored to wear it."""

    account: Account
    elevated: bool
    is_process: bool = True

    @property
    def name(self) -> str:
        return self.account.name

    @property
    def key(self) -> str:
        return self.account.sid

    def assume(self) -> None:
        self.check()

    def check(self) -> None:
        """A thread that somebody else made impersonate is not the process (T1)."""
        if _thread_impersonates():
            raise ImpersonationFailed(
                f"a thread of {self.name} was found impersonating somebody else",
                identity=self.name,
                advice="something in this process impersonates in threads that are not its own",
            )

    def fresh(self) -> "ProcessIdentity":
        return self

    def close(self) -> None:
        pass


def process_identity() -> ProcessIdentity:
    """The identity of the running process."""
    account = _account_of_process()
    return ProcessIdentity(account, is_elevated(account))


def process_key() -> object:
    """A process keeps its access token for life."""
    return "process"


def user_identity(user: str | int) -> ProcessIdentity:
    """The identity of a user by name: the process's own, or a refusal."""
    own = process_identity()
    if isinstance(user, str) and user.casefold() in _names_of(own.account):
        return own
    raise ImpersonationFailed(
        f"cannot become {show_text(str(user))}: tokens of other Windows users come with a later version",
        identity=str(user),
        advice="use Token.for_process() or Token.for_network()",
    )


def is_system_account(local: ProcessIdentity) -> bool:
    """LocalSystem, LocalService, NetworkService, and a machine's or domain's own Administrator ([MS-DTYP] 2.4.2.4)."""
    return local.account.sid in ("S-1-5-18", "S-1-5-19", "S-1-5-20") or local.account.sid.endswith("-500")


def _names_of(account: Account) -> frozenset[str]:
    return frozenset({account.sid.casefold(), account.name.casefold(), account.name.rpartition("\\")[2].casefold()})


if sys.platform == "win32":
    from ctypes import wintypes

    _TOKEN_QUERY: Final = 0x0008
    _TOKEN_USER: Final = 1
    _TOKEN_ELEVATION: Final = 20
    _SAM_COMPATIBLE: Final = 2

    _kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
    _advapi32 = ctypes.WinDLL("advapi32", use_last_error=True)
    _secur32 = ctypes.WinDLL("secur32", use_last_error=True)
    _kernel32.GetCurrentProcess.restype = wintypes.HANDLE
    _kernel32.GetCurrentThread.restype = wintypes.HANDLE
    _kernel32.CloseHandle.argtypes = [wintypes.HANDLE]
    _kernel32.LocalFree.argtypes = [wintypes.HLOCAL]
    _kernel32.GetTickCount64.restype = ctypes.c_uint64
    _advapi32.OpenProcessToken.argtypes = [wintypes.HANDLE, wintypes.DWORD, ctypes.POINTER(wintypes.HANDLE)]
    _advapi32.OpenThreadToken.argtypes = [wintypes.HANDLE, wintypes.DWORD, wintypes.BOOL, ctypes.POINTER(wintypes.HANDLE)]
    _advapi32.GetTokenInformation.argtypes = [
        wintypes.HANDLE,
        ctypes.c_int,
        ctypes.c_void_p,
        wintypes.DWORD,
        ctypes.POINTER(wintypes.DWORD),
    ]
    _advapi32.ConvertSidToStringSidW.argtypes = [ctypes.c_void_p, ctypes.POINTER(wintypes.LPWSTR)]
    _secur32.GetUserNameExW.argtypes = [ctypes.c_int, wintypes.LPWSTR, ctypes.POINTER(wintypes.ULONG)]

    def _account_of_process() -> Account:
        handle = wintypes.HANDLE()
        if not _advapi32.OpenProcessToken(_kernel32.GetCurrentProcess(), _TOKEN_QUERY, ctypes.byref(handle)):
            raise ImpersonationFailed(f"cannot read the process's own token: {ctypes.FormatError(ctypes.get_last_error())}")
        try:
            sid = _sid_text(_information(handle, _TOKEN_USER))
            elevated = int.from_bytes(_information(handle, _TOKEN_ELEVATION).raw[:4], "little") != 0
        finally:
            _kernel32.CloseHandle(handle)
        return Account(_user_name() or sid, sid, elevated)

    def _information(handle: wintypes.HANDLE, kind: int) -> Any:
        size = wintypes.DWORD(512)
        buffer = ctypes.create_string_buffer(size.value)
        if not _advapi32.GetTokenInformation(handle, kind, buffer, size.value, ctypes.byref(size)):
            raise ImpersonationFailed(f"cannot read the process's own token: {ctypes.FormatError(ctypes.get_last_error())}")
        return buffer

    def _sid_text(token_user: Any) -> str:
        sid = ctypes.cast(token_user, ctypes.POINTER(ctypes.c_void_p))[0]  # TOKEN_USER begins with a pointer to the SID
        text = wintypes.LPWSTR()
        if not _advapi32.ConvertSidToStringSidW(sid, ctypes.byref(text)):
            raise ImpersonationFailed(f"cannot read the process's own SID: {ctypes.FormatError(ctypes.get_last_error())}")
        try:
            return text.value or ""
        finally:
            _kernel32.LocalFree(ctypes.cast(text, wintypes.HLOCAL))

    def _user_name() -> str:
        size = wintypes.ULONG(512)
        buffer = ctypes.create_unicode_buffer(size.value)
        return buffer.value if _secur32.GetUserNameExW(_SAM_COMPATIBLE, buffer, ctypes.byref(size)) else ""

    def _thread_impersonates() -> bool:
        handle = wintypes.HANDLE()
        if not _advapi32.OpenThreadToken(_kernel32.GetCurrentThread(), _TOKEN_QUERY, True, ctypes.byref(handle)):
            return ctypes.get_last_error() != 1008  # ERROR_NO_TOKEN: the thread is the process
        _kernel32.CloseHandle(handle)
        return True

    def _milliseconds_up() -> int:
        return int(_kernel32.GetTickCount64())

else:

    def _account_of_process() -> Account:
        raise ImpersonationFailed("Windows identities exist on Windows only")

    def _thread_impersonates() -> bool:
        return False

    def _milliseconds_up() -> int:
        raise OSError("only Windows counts these")


# -- directories ------------------------------------------------------------------------------------------------------


def open_directory(path: str | os.PathLike[str]) -> Path:
    """The directory's full path, once it is known to be one."""
    directory = Path(path).resolve(strict=True)
    if not directory.is_dir():
        raise NotADirectoryError(20, "not a directory", str(directory))
    return directory


def sync_directory(directory: Path) -> None:
    """NTFS journals names itself."""


def max_name(directory: Path) -> int:
    """How many characters a name may have."""
    return 255


def _in(directory: Path, name: str) -> Path:
    """A name of one component: no separator, no drive, no stream."""
    if not name or name in (".", "..") or set(name) & set("/\\:\0"):
        raise OSError(22, "not a plain file name", name)
    return directory / name


def rename_at(directory: Path, old: str, new: str) -> None:
    """Renames within the directory; replaces what is there."""
    os.replace(_in(directory, old), _in(directory, new))


def unlink_at(directory: Path, name: str) -> None:
    """Removes a name from the directory."""
    os.unlink(_in(directory, name))


def stat_at(directory: Path, name: str) -> os.stat_result:
    """What stands under the name itself: a link is not followed."""
    return os.stat(_in(directory, name), follow_symlinks=False)


# -- files ------------------------------------------------------------------------------------------------------------

_BINARY: Final = getattr(os, "O_BINARY", 0) | getattr(os, "O_NOINHERIT", 0)


def create_exclusive(directory: Path, name: str) -> int:
    """A new file; raises FileExistsError when anything has the name."""
    return os.open(_in(directory, name), os.O_RDWR | os.O_CREAT | os.O_EXCL | _BINARY, 0o600)


def open_existing(directory: Path, name: str) -> int:
    """Opens a file to go on with it; a link in its place is refused."""
    path = _in(directory, name)
    if path.is_symlink():
        raise OSError(40, "a link stands in the file's place", str(path))
    return os.open(path, os.O_RDWR | _BINARY)


DONTCACHE: Final = 0
"""No write here bypasses the system's cache."""

_position: Final = threading.Lock()  # it is the descriptor's: threads that write two ranges of one file must not move it for each other


def pwrite_all(fd: int, chunks: Sequence[bytes | bytearray | memoryview], offset: int, flags: int = 0) -> int:
    """Writes all chunks one after the other at the offset. Returns the bytes written."""
    start = offset
    with _position:
        os.lseek(fd, offset, os.SEEK_SET)
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            while len(view):
                written = os.write(fd, view)
                view = view[written:]
                offset += written
    return offset - start


class Splicer:
    """Windows moves no bytes from a socket into a file by itself: `splicer` never gives one."""

    def move(self, source: int, target: int, offset: int, count: int) -> int:
        """Never called."""
        raise NotImplementedError

    def close(self) -> None:
        """Never called."""


def splicer() -> Splicer | None:
    """None: the bytes pass through this program."""
    return None


def write_back(fd: int, offset: int, length: int) -> None:
    """Left to the system."""


def datasync(fd: int) -> None:
    """Makes the file's bytes durable."""
    os.fsync(fd)


def preallocate(fd: int, offset: int, length: int) -> bool:
    """Not done: Windows reserves room only by changing the file's size."""
    return False


def room(fd: int) -> int | None:
    """Not known of a descriptor."""
    return None


def set_mode(fd: int, mode: int) -> None:
    """Access lists come from the directory; permission bits mean nothing here."""


def set_times(fd: int, mtime_ns: int) -> None:
    """Sets the time of modification, where the system lets a descriptor do it."""
    if os.utime in os.supports_fd:
        os.utime(fd, ns=(os.fstat(fd).st_atime_ns, mtime_ns))
    elif sys.platform == "win32":
        import msvcrt

        time = ctypes.c_uint64(mtime_ns // 100 + 116444736000000000)  # FILETIME counts 100 ns since 1601
        if not _kernel32.SetFileTime(wintypes.HANDLE(msvcrt.get_osfhandle(fd)), None, None, ctypes.byref(time)):
            raise ctypes.WinError(ctypes.get_last_error())


def copy_acl(from_fd: int, to_fd: int) -> bool:
    """A file that replaces another keeps the list it inherited from the directory."""
    return False


# -- the machine ------------------------------------------------------------------------------------------------------


def process_umask() -> int:
    """Permission bits mean nothing here."""
    return 0o022


@cache
def boot_id() -> str:
    """Names this boot of the machine by the time it began; where that is unknown, this process."""
    with contextlib.suppress(OSError):
        import time

        return f"boot-{round((time.time() * 1000 - _milliseconds_up()) / 60000)}"
    return str(uuid.uuid4())
