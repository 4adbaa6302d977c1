"""Who is logged on to Windows: one look at the sessions of this machine (Remote Desktop Services, which keep the console's too).

Built from Microsoft's public reference (learn.microsoft.com/windows/win32/api/wtsapi32). It is asked again and again rather than told:
notifications need a window and its messages, which a service has no business with, and those that were missed are lost. It blocks, and
knows neither tokens nor who asks.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import wintypes
from functools import lru_cache
from typing import Any, Final, NamedTuple

from .win32 import Call, sid_text

_DWORD, _BOOL, _TEXT = wintypes.DWORD, wintypes.BOOL, wintypes.LPCWSTR
_OUT_DWORD = ctypes.POINTER(wintypes.DWORD)


class _SessionInfo(ctypes.Structure):
    """WTS_SESSION_INFOW."""

    _fields_ = (("session", _DWORD), ("station", wintypes.LPWSTR), ("state", ctypes.c_int))


_WTSEnumerateSessions: Final = Call(
    *("wtsapi32", "WTSEnumerateSessionsW", _BOOL, wintypes.HANDLE, _DWORD, _DWORD),
    *(ctypes.POINTER(ctypes.POINTER(_SessionInfo)), _OUT_DWORD),
)
_WTSQuerySessionInformation: Final = Call(
    "wtsapi32", "WTSQuerySessionInformationW", _BOOL, wintypes.HANDLE, _DWORD, ctypes.c_int, ctypes.POINTER(wintypes.LPWSTR), _OUT_DWORD
)
_WTSFreeMemory: Final = Call("wtsapi32", "WTSFreeMemory", None, ctypes.c_void_p, ok=None)
_LookupAccountName: Final = Call(
    *("advapi32", "LookupAccountNameW", _BOOL, _TEXT, _TEXT, ctypes.c_void_p, _OUT_DWORD, wintypes.LPWSTR, _OUT_DWORD),
    ctypes.POINTER(ctypes.c_int),
)

_HERE: Final = None  # WTS_CURRENT_SERVER_HANDLE
_USER_NAME, _DOMAIN_NAME = 5, 7  # WTS_INFO_CLASS


class LoggedOn(NamedTuple):
    """Whose a session is."""

    name: str  # DOMAIN\\user
    sid: str | None  # None: nobody could say


def sessions() -> dict[str, LoggedOn]:
    """The sessions that somebody is logged on to, by their numbers.

    Raises:
        OSError: Windows does not say (its services are not up yet).
    """
    first = ctypes.POINTER(_SessionInfo)()
    count = wintypes.DWORD()
    _WTSEnumerateSessions(_HERE, 0, 1, ctypes.byref(first), ctypes.byref(count))
    try:
        numbers = [int(first[place].session) for place in range(count.value)]
    finally:
        _WTSFreeMemory(ctypes.cast(first, ctypes.c_void_p))
    return {str(number): LoggedOn(name, _sid(name)) for number in numbers if (name := _user_of(number))}


def _user_of(session: int) -> str:
    """ "" when nobody is logged on; also when it has just ended."""
    try:
        with _told(session, _USER_NAME) as user, _told(session, _DOMAIN_NAME) as domain:
            return f"{domain}\\{user}" if user and domain else user
    except OSError:
        return ""


@contextmanager
def _told(session: int, what: int) -> Iterator[str]:
    text = wintypes.LPWSTR()
    _WTSQuerySessionInformation(_HERE, session, what, ctypes.byref(text), ctypes.byref(wintypes.DWORD()))
    try:
        yield text.value or ""
    finally:
        _WTSFreeMemory(ctypes.cast(text, ctypes.c_void_p))


def _sid(name: str) -> str | None:
    try:
        return _found_sid(name)
    except OSError:
        return None  # a domain that does not answer; asked again at the next look


@lru_cache(maxsize=1024)
def _found_sid(name: str) -> str:
    """Asked once: it may go to a domain controller, and a name's SID stays."""
    sid: Any = ctypes.create_string_buffer(68)  # SECURITY_MAX_SID_SIZE
    domain = ctypes.create_unicode_buffer(512)
    sizes = wintypes.DWORD(len(sid)), wintypes.DWORD(len(domain))
    _LookupAccountName(None, name, sid, ctypes.byref(sizes[0]), domain, ctypes.byref(sizes[1]), ctypes.byref(ctypes.c_int()))
    return sid_text(sid)
