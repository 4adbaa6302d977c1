"""Windows calls on access tokens, and how calls of Windows are declared: prototypes, errors, handles that are closed once.

Built from Microsoft's public reference (learn.microsoft.com/windows/win32/api: processthreadsapi, securitybaseapi, winbase, sddl,
wtsapi32). Each call is declared with the types of its arguments and of its result, and raises OSError with `winerror` when it fails.
Importing this module elsewhere than on Windows loads nothing; a call raises there.

Nothing here knows what a `Token` is.
"""

import contextlib
import ctypes
import errno
import os
import sys
import weakref
from collections.abc import Callable
from ctypes import wintypes
from typing import Any, Final, NamedTuple

# -- declaring calls --------------------------------------------------------------------------------------------------

CALLS: "Final[list[Call]]" = []
"""All that are declared, so that a test can ask a Windows whether it has them."""


def last_error() -> int:
    """GetLastError of the last declared call of this thread."""
    return int(getattr(ctypes, "get_last_error")())  # noqa: B009 - exists on Windows only, as WinDLL and WinError do


def failure(code: int | None = None) -> OSError:
    """The error that Windows names by this number, or by the last of this thread."""
    error: OSError = getattr(ctypes, "WinError")(last_error() if code is None else code)  # noqa: B009
    return error


def code_of(exc: OSError) -> int:
    """The number that Windows gave its error."""
    return int(getattr(exc, "winerror", None) or 0)


class Call:
    """One function of a library of Windows.

    Args:
        ok: whether a result means success; None: the result says everything, and nothing is raised.
    """

    def __init__(self, library: str, name: str, result: Any, *arguments: Any, ok: Callable[[Any], bool] | None = bool) -> None:
        self.library, self.name = library, name
        self._result, self._arguments, self._ok = result, arguments, ok
        self._function: Any = None
        CALLS.append(self)
        if sys.platform == "win32":
            self.bind()  # here, because a thread that acts as somebody else may not be able to read a library

    def bind(self) -> Any:
        """The function itself, with its prototype."""
        if self._function is None:
            function = getattr(_library(self.library), self.name)
            function.argtypes, function.restype = list(self._arguments), self._result
            self._function = function
        return self._function

    def __call__(self, *arguments: Any) -> Any:
        result = self.bind()(*arguments)
        if self._ok is not None and not self._ok(result):
            raise failure()
        return result


_libraries: Final[dict[str, Any]] = {}


def _library(name: str) -> Any:
    if sys.platform == "win32":
        if name not in _libraries:
            # From the system's directory alone: a library of this name beside the program is not the system's.
            _libraries[name] = ctypes.WinDLL(f"{name}.dll", use_last_error=True, winmode=_SYSTEM32)
        return _libraries[name]
    raise OSError("only Windows has these calls")


_SYSTEM32: Final = 0x800  # LOAD_LIBRARY_SEARCH_SYSTEM32

# -- numbers ----------------------------------------------------------------------------------------------------------

TOKEN_DUPLICATE: Final = 0x0002
TOKEN_IMPERSONATE: Final = 0x0004
TOKEN_QUERY: Final = 0x0008

ERROR_NO_TOKEN: Final = 1008
ERROR_INSUFFICIENT_BUFFER: Final = 122
ERROR_BAD_IMPERSONATION_LEVEL: Final = 1346

_TOKEN_USER: Final = 1
_TOKEN_TYPE: Final = 8
_TOKEN_IMPERSONATION_LEVEL: Final = 9
_TOKEN_STATISTICS: Final = 10
_TOKEN_SESSION_ID: Final = 12
_TOKEN_ELEVATION_TYPE: Final = 18
_TOKEN_ELEVATION: Final = 20
_TOKEN_INTEGRITY_LEVEL: Final = 25

IMPERSONATION: Final = 2  # TOKEN_TYPE
ELEVATION_TYPES: Final = {1: "default", 2: "full", 3: "limited"}  # TOKEN_ELEVATION_TYPE
HIGH_INTEGRITY: Final = 0x3000  # SECURITY_MANDATORY_HIGH_RID

# -- the calls --------------------------------------------------------------------------------------------------------

_HANDLE, _DWORD, _BOOL = wintypes.HANDLE, wintypes.DWORD, wintypes.BOOL
_OUT_HANDLE, _OUT_DWORD = ctypes.POINTER(wintypes.HANDLE), ctypes.POINTER(wintypes.DWORD)
_TEXT, _POINTER = wintypes.LPCWSTR, ctypes.c_void_p
_INVALID: Final = ctypes.c_void_p(-1).value  # INVALID_HANDLE_VALUE

_GetCurrentProcess: Final = Call("kernel32", "GetCurrentProcess", _HANDLE)
_GetCurrentThread: Final = Call("kernel32", "GetCurrentThread", _HANDLE)
_CloseHandle: Final = Call("kernel32", "CloseHandle", _BOOL, _HANDLE)
_LocalFree: Final = Call("kernel32", "LocalFree", _POINTER, _POINTER, ok=None)
_GetTickCount64: Final = Call("kernel32", "GetTickCount64", ctypes.c_uint64, ok=None)
_SetFileTime: Final = Call("kernel32", "SetFileTime", _BOOL, _HANDLE, _POINTER, _POINTER, ctypes.POINTER(ctypes.c_uint64))

_CreateFile: Final = Call(
    *("kernel32", "CreateFileW", _HANDLE, _TEXT, _DWORD, _DWORD, _POINTER, _DWORD, _DWORD, _HANDLE), ok=lambda handle: handle != _INVALID
)

_OpenProcessToken: Final = Call("advapi32", "OpenProcessToken", _BOOL, _HANDLE, _DWORD, _OUT_HANDLE)
_OpenThreadToken: Final = Call("advapi32", "OpenThreadToken", _BOOL, _HANDLE, _DWORD, _BOOL, _OUT_HANDLE)
_DuplicateTokenEx: Final = Call("advapi32", "DuplicateTokenEx", _BOOL, _HANDLE, _DWORD, _POINTER, ctypes.c_int, ctypes.c_int, _OUT_HANDLE)
_ImpersonateLoggedOnUser: Final = Call("advapi32", "ImpersonateLoggedOnUser", _BOOL, _HANDLE)
_GetTokenInformation: Final = Call("advapi32", "GetTokenInformation", _BOOL, _HANDLE, ctypes.c_int, _POINTER, _DWORD, _OUT_DWORD)
_ConvertSidToStringSid: Final = Call("advapi32", "ConvertSidToStringSidW", _BOOL, _POINTER, ctypes.POINTER(wintypes.LPWSTR))
_GetSidSubAuthorityCount: Final = Call("advapi32", "GetSidSubAuthorityCount", ctypes.POINTER(ctypes.c_ubyte), _POINTER)
_GetSidSubAuthority: Final = Call("advapi32", "GetSidSubAuthority", _OUT_DWORD, _POINTER, _DWORD)
_LookupAccountSid: Final = Call(
    *("advapi32", "LookupAccountSidW", _BOOL, _TEXT, _POINTER, wintypes.LPWSTR, _OUT_DWORD, wintypes.LPWSTR, _OUT_DWORD),
    ctypes.POINTER(ctypes.c_int),
)
_LogonUser: Final = Call("advapi32", "LogonUserW", _BOOL, _TEXT, _TEXT, wintypes.LPWSTR, _DWORD, _DWORD, _OUT_HANDLE)
_WTSQueryUserToken: Final = Call("wtsapi32", "WTSQueryUserToken", _BOOL, wintypes.ULONG, _OUT_HANDLE)


class _Luid(ctypes.Structure):
    _fields_ = (("low", wintypes.DWORD), ("high", wintypes.LONG))

    @property
    def number(self) -> int:
        return int(self.high) << 32 | int(self.low)


class _Statistics(ctypes.Structure):
    """TOKEN_STATISTICS."""

    _fields_ = (
        ("token", _Luid),
        ("logon", _Luid),
        ("expires", ctypes.c_int64),
        ("type", ctypes.c_int),
        ("level", ctypes.c_int),
        ("dynamic_charged", wintypes.DWORD),
        ("dynamic_available", wintypes.DWORD),
        ("groups", wintypes.DWORD),
        ("privileges", wintypes.DWORD),
        ("modified", _Luid),
    )


# -- handles ----------------------------------------------------------------------------------------------------------


class TokenHandle:
    """An open access token: closed once, by `close()` or with the last reference, and never used afterwards."""

    __slots__ = ("__weakref__", "_close", "_value")

    def __init__(self, value: int) -> None:
        self._value = value
        self._close = weakref.finalize(self, _closed, value)
        self._close.atexit = False  # the system closes what is left

    @property
    def value(self) -> int:
        """For a call; raises OSError when it is closed."""
        if not self._close.alive:
            raise OSError("the handle is closed")
        return self._value

    def close(self) -> None:
        """Gives it back. A second time does nothing."""
        self._close()

    def __repr__(self) -> str:
        return f"<TokenHandle{'' if self._close.alive else ' closed'}>"


def _closed(value: int) -> None:
    with contextlib.suppress(OSError):  # nobody is left to be told
        _CloseHandle(value)


def _taken(handle: wintypes.HANDLE) -> TokenHandle:
    return TokenHandle(int(handle.value or 0))


def process_token(access: int = TOKEN_QUERY) -> TokenHandle:
    """The process's own, whoever the thread is."""
    handle = wintypes.HANDLE()
    _OpenProcessToken(_GetCurrentProcess(), access, ctypes.byref(handle))
    return _taken(handle)


def thread_token(access: int = TOKEN_QUERY) -> TokenHandle | None:
    """What the calling thread wears; None: it is the process. Opened with the process's rights: the token's own may not suffice."""
    handle = wintypes.HANDLE()
    try:
        _OpenThreadToken(_GetCurrentThread(), access, True, ctypes.byref(handle))
    except OSError as exc:
        if code_of(exc) == ERROR_NO_TOKEN:
            return None
        raise
    return _taken(handle)


def duplicated(token: int, level: int) -> TokenHandle:
    """A new impersonation token of this level (SECURITY_IMPERSONATION_LEVEL) from any token.

    Raises:
        OSError: ERROR_BAD_IMPERSONATION_LEVEL when it is an impersonation token of a lower level; ERROR_ACCESS_DENIED.
    """
    handle = wintypes.HANDLE()
    access = TOKEN_QUERY | TOKEN_DUPLICATE | TOKEN_IMPERSONATE
    _DuplicateTokenEx(token, access, None, level, IMPERSONATION, ctypes.byref(handle))
    return _taken(handle)


def logged_on(user: str, domain: str | None, password: str, logon_type: int) -> TokenHandle:
    """LogonUser: asks this machine's or the domain's authority, which may take as long as that does not answer."""
    handle = wintypes.HANDLE()
    secret = ctypes.create_unicode_buffer(password)
    try:
        _LogonUser(user, domain, secret, logon_type, _PROVIDER_DEFAULT, ctypes.byref(handle))
    finally:
        ctypes.memset(secret, 0, ctypes.sizeof(secret))
    return _taken(handle)


_PROVIDER_DEFAULT: Final = 0


def session_token(session: int) -> TokenHandle:
    """The token of whoever is logged on there. Only LocalSystem may have it (SE_TCB_NAME)."""
    handle = wintypes.HANDLE()
    _WTSQueryUserToken(session, ctypes.byref(handle))
    return _taken(handle)


def impersonate(token: TokenHandle) -> None:
    """The calling thread wears it from here on."""
    _ImpersonateLoggedOnUser(token.value)


# -- what a token says ------------------------------------------------------------------------------------------------


class Worn(NamedTuple):
    """What tells a thread's token from every other, for microseconds."""

    token: int  # TokenId: of this token object alone
    logon: int  # AuthenticationId: its logon session
    level: int


def worn(token: TokenHandle) -> Worn:
    """Of an impersonation token."""
    found = _Statistics()
    _GetTokenInformation(token.value, _TOKEN_STATISTICS, ctypes.byref(found), ctypes.sizeof(found), ctypes.byref(wintypes.DWORD()))
    return Worn(found.token.number, found.logon.number, found.level)


class Facts(NamedTuple):
    """What Windows says of an access token."""

    name: str  # DOMAIN\\user, or the SID where no authority knows it
    sid: str
    elevated: bool  # TokenElevation
    elevation_type: int
    integrity: int  # the RID of the mandatory label
    session: int
    logon: int
    kind: int
    level: int  # of a primary token: IMPERSONATE, what it is made into


def facts(token: TokenHandle) -> Facts:
    """Reads them. May ask a domain controller for the name, so it blocks."""
    user = _variable(token, _TOKEN_USER)
    sid = _first_pointer(user)
    kind = _number(token, _TOKEN_TYPE)
    return Facts(
        name=_account_name(sid) or sid_text(sid),
        sid=sid_text(sid),
        elevated=_number(token, _TOKEN_ELEVATION) != 0,
        elevation_type=_number(token, _TOKEN_ELEVATION_TYPE),
        integrity=_integrity(token),
        session=_number(token, _TOKEN_SESSION_ID),
        logon=worn(token).logon,
        kind=kind,
        level=_number(token, _TOKEN_IMPERSONATION_LEVEL) if kind == IMPERSONATION else 2,
    )


def sid_of(token: TokenHandle) -> str:
    """The user's SID alone; asks nobody."""
    user = _variable(token, _TOKEN_USER)
    return sid_text(_first_pointer(user))


def _number(token: TokenHandle, kind: int) -> int:
    found = wintypes.DWORD()
    _GetTokenInformation(token.value, kind, ctypes.byref(found), ctypes.sizeof(found), ctypes.byref(wintypes.DWORD()))
    return int(found.value)


def _variable(token: TokenHandle, kind: int) -> Any:
    """A structure with pointers into itself: the buffer has to live as long as they do."""
    size = wintypes.DWORD(512)
    while True:
        buffer = ctypes.create_string_buffer(size.value)
        try:
            _GetTokenInformation(token.value, kind, buffer, len(buffer), ctypes.byref(size))
        except OSError as exc:
            if code_of(exc) != ERROR_INSUFFICIENT_BUFFER or size.value <= len(buffer):
                raise
        else:
            return buffer


def _first_pointer(structure: Any) -> int:
    """TOKEN_USER and TOKEN_MANDATORY_LABEL begin with a pointer to a SID."""
    return int(ctypes.cast(structure, ctypes.POINTER(ctypes.c_void_p))[0] or 0)


def sid_text(sid: Any) -> str:
    """S-1-5-..."""
    text = wintypes.LPWSTR()
    _ConvertSidToStringSid(sid, ctypes.byref(text))
    try:
        return text.value or ""
    finally:
        _LocalFree(ctypes.cast(text, ctypes.c_void_p))


def _account_name(sid: int) -> str:
    """DOMAIN\\user, or "" where nobody knows it (an account that was deleted, a domain that does not answer)."""
    name, domain = ctypes.create_unicode_buffer(512), ctypes.create_unicode_buffer(512)
    sizes = wintypes.DWORD(len(name)), wintypes.DWORD(len(domain))
    kind = ctypes.c_int()
    try:
        _LookupAccountSid(None, sid, name, ctypes.byref(sizes[0]), domain, ctypes.byref(sizes[1]), ctypes.byref(kind))
    except OSError:
        return ""
    return f"{domain.value}\\{name.value}" if domain.value else name.value


def _integrity(token: TokenHandle) -> int:
    label = _variable(token, _TOKEN_INTEGRITY_LEVEL)
    sid = _first_pointer(label)
    count = _GetSidSubAuthorityCount(sid)[0]
    return int(_GetSidSubAuthority(sid, count - 1)[0])


# -- the machine, files -----------------------------------------------------------------------------------------------


def milliseconds_up() -> int:
    """Since the machine was booted."""
    return int(_GetTickCount64())


_READ_WRITE: Final = 0x80000000 | 0x40000000  # GENERIC_READ, GENERIC_WRITE
_DELETE: Final = 0x00010000
_SHARE_ALL: Final = 0x7  # FILE_SHARE_READ, _WRITE, _DELETE: whoever looks at the file, and our own rename, are let
_CREATE_NEW, _OPEN_EXISTING = 1, 3
_LINK_ITSELF: Final = 0x00200000  # FILE_FLAG_OPEN_REPARSE_POINT
_REPARSE_POINT: Final = 0x400  # FILE_ATTRIBUTE_REPARSE_POINT


def open_file(path: str, *, new: bool) -> int:
    """A descriptor to read and write a file by. Not inherited; it keeps nobody from reading the file, nor from renaming it.

    Raises:
        OSError: FileExistsError when `new` and anything has the name; a link, or another reparse point, stands in the file's place.
    """
    if sys.platform == "win32":
        import msvcrt

        how = _CREATE_NEW if new else _OPEN_EXISTING
        handle = _CreateFile(path, _READ_WRITE, _SHARE_ALL, None, how, _LINK_ITSELF, None)
        try:
            fd = msvcrt.open_osfhandle(handle, os.O_RDWR | os.O_BINARY | os.O_NOINHERIT)
        except BaseException:
            _CloseHandle(handle)
            raise
        if os.fstat(fd).st_file_attributes & _REPARSE_POINT:
            os.close(fd)
            raise OSError(errno.ELOOP, "a link stands in the file's place", path)
        return fd
    raise OSError("only Windows has these calls")


def in_use(path: str) -> bool:
    """Whether somebody has the file open and lets nobody replace it meanwhile."""
    try:
        handle = _CreateFile(path, _DELETE, _SHARE_ALL, None, _OPEN_EXISTING, _LINK_ITSELF, None)
    except OSError as exc:
        return code_of(exc) == _SHARING_VIOLATION
    _CloseHandle(handle)
    return False


_SHARING_VIOLATION: Final = 32


def set_modification_time(fd: int, mtime_ns: int) -> None:
    """SetFileTime of an open file."""
    if sys.platform == "win32":
        import msvcrt

        time = ctypes.c_uint64(mtime_ns // 100 + 116444736000000000)  # FILETIME counts 100 ns since 1601
        _SetFileTime(msvcrt.get_osfhandle(fd), None, None, ctypes.byref(time))
