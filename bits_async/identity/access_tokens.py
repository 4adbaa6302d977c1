"""How access tokens of Windows are got: a handle that the caller has, the calling thread's own, a session's, a logon's.

Each is duplicated into an impersonation token that this package alone has a handle of, so that nobody else can close or change it. What is
got asks the machine's or the domain's authority, and may block as long as that does. Nothing here knows what a `Token` is.
"""

import sys
from typing import Final

from ..errors import (
    BitsError,
    ErrorCode,
    ErrorContext,
    ImpersonationFailed,
    InvalidArgument,
    LogonFailed,
    make_error,
    scrub,
    show_text,
)
from . import win32
from .tokens import ImpersonationLevel
from .windows import TokenIdentity


def require_windows() -> None:
    """Raises: BitsError E_NOTIMPL elsewhere."""
    if sys.platform != "win32":
        raise make_error(ErrorCode.E_NOTIMPL, ErrorContext.NONE, "access tokens exist on Windows only")


def by_handle(handle: int, level: ImpersonationLevel) -> TokenIdentity:
    """Of an open handle (TOKEN_DUPLICATE | TOKEN_QUERY), which stays the caller's.

    Raises:
        ImpersonationFailed: it is no token, may not be duplicated, or is an impersonation token of a lower level.
    """
    return _adopted(handle, level)


def of_thread(level: ImpersonationLevel) -> TokenIdentity | None:
    """Whom the calling thread impersonates; None: nobody."""
    try:
        token = win32.thread_token(win32.TOKEN_QUERY | win32.TOKEN_DUPLICATE)
    except OSError as exc:
        raise _failed("the thread's token cannot be had", exc) from scrub(exc)
    return None if token is None else _consumed(token, level)


def of_session(session: int, level: ImpersonationLevel) -> TokenIdentity:
    """Whoever is logged on in a session (WTSQueryUserToken).

    Raises:
        ImpersonationFailed: there is no such session, nobody is logged on there, or this process is not LocalSystem.
    """
    try:
        token = win32.session_token(session)
    except OSError as exc:
        advice = "run it as LocalSystem: only that may act for the sessions of others" if win32.code_of(exc) == _NOT_HELD else None
        raise _failed(f"the token of session {session} cannot be had", exc, advice) from scrub(exc)
    return _consumed(token, level)


def by_logon(user: str, domain: str | None, password: str, logon_type: int, level: ImpersonationLevel) -> TokenIdentity:
    """LogonUser; `logon_type` is LOGON32_LOGON.

    Raises:
        LogonFailed: the code says why.
    """
    name = show_text(user)
    try:
        token = win32.logged_on(user, domain, password, logon_type)
    except OSError as exc:
        raise _explained(exc, name) from scrub(exc)
    try:
        return _consumed(token, level)
    except ImpersonationFailed as exc:
        raise LogonFailed(f"the logon gave no token that can be used: {exc.message}", identity=name) from scrub(exc)


_NOT_HELD: Final = 1314  # ERROR_PRIVILEGE_NOT_HELD


def _consumed(token: win32.TokenHandle, level: ImpersonationLevel) -> TokenIdentity:
    """Our own duplicate of it; the original is closed."""
    try:
        return _adopted(token.value, level)
    finally:
        token.close()


def _adopted(handle: int, level: ImpersonationLevel) -> TokenIdentity:
    try:
        mine = win32.duplicated(handle, level.value)
    except OSError as exc:
        advice = "it is an impersonation token of a lower level" if win32.code_of(exc) == win32.ERROR_BAD_IMPERSONATION_LEVEL else None
        raise _failed("the token cannot be duplicated", exc, advice) from scrub(exc)
    try:
        return TokenIdentity.of(mine)
    except OSError as exc:
        mine.close()
        raise _failed("the token cannot be read", exc) from scrub(exc)


def _failed(what: str, exc: OSError, advice: str | None = None) -> ImpersonationFailed:
    return ImpersonationFailed(f"{what}: {show_text(exc.strerror or '')} ({win32.code_of(exc)})", advice=advice)


# -- why nobody was logged on -----------------------------------------------------------------------------------------

_RESTRICTED: Final = ErrorCode.ERROR_ACCOUNT_RESTRICTION
_WHY: Final[dict[int, tuple[str, ErrorCode]]] = {  # system error codes of LogonUser (winerror.h)
    1326: ("the user name or the password is wrong", ErrorCode.ERROR_LOGON_FAILURE),
    1317: ("there is no such user", ErrorCode.ERROR_NO_SUCH_USER),
    1311: ("no domain controller answers", ErrorCode.ERROR_NO_LOGON_SERVERS),
    1355: ("the domain does not exist or cannot be reached", ErrorCode.ERROR_NO_LOGON_SERVERS),
    1327: ("the account is restricted (no password, hours, policy)", _RESTRICTED),
    1328: ("the account may not log on at this time", _RESTRICTED),
    1329: ("the account may not log on to this machine", _RESTRICTED),
    1385: ("the account has not the right to log on in this way (logon_type)", _RESTRICTED),
    1330: ("the password has expired", ErrorCode.ERROR_PASSWORD_EXPIRED),
    1907: ("the password has to be changed first", ErrorCode.ERROR_PASSWORD_EXPIRED),
    1331: ("the account is disabled", ErrorCode.ERROR_ACCOUNT_DISABLED),
    1793: ("the account has expired", ErrorCode.ERROR_ACCOUNT_EXPIRED),
    1909: ("the account is locked", ErrorCode.ERROR_ACCOUNT_LOCKED_OUT),
    1398: ("the clocks of this machine and of the domain differ too much", ErrorCode.ERROR_TIME_SKEW),
    1786: ("this machine has no account in the domain", ErrorCode.ERROR_TRUSTED_RELATIONSHIP_FAILURE),
    1787: ("the domain has no account for this machine", ErrorCode.ERROR_TRUSTED_RELATIONSHIP_FAILURE),
    1788: ("the trust between the domains failed", ErrorCode.ERROR_TRUSTED_RELATIONSHIP_FAILURE),
    1789: ("the trust between this machine and the domain failed", ErrorCode.ERROR_TRUSTED_RELATIONSHIP_FAILURE),
}


def _explained(exc: OSError, name: str) -> BitsError:
    if win32.code_of(exc) == _INVALID_PARAMETER:
        return InvalidArgument("Windows does not take these arguments for a logon", identity=name)
    sentence, code = _WHY.get(win32.code_of(exc), (f"Windows says: {show_text(exc.strerror or '')} ({win32.code_of(exc)})", None))
    return LogonFailed(sentence, code=ErrorCode.ERROR_LOGON_FAILURE if code is None else code, identity=name)


_INVALID_PARAMETER: Final = 87
