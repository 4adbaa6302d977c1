"""Security contexts of Windows: Kerberos and NTLM by SSPI, as the security context that the calling thread is in.

Built from Microsoft's public reference (learn.microsoft.com/windows/win32/api/sspi). Without explicit credentials a context shows what
the thread's token is logged on with: AcquireCredentialsHandle takes that from the thread, so it is called, and the context stepped, in
the token's threads. The buffers are ours, of the size that the package names (cbMaxToken): that is right for every package, and
Wine has no other way. What the peer is told is bound to the TLS channel where there is one.

pyspnego's own way to SSPI is not used: it has no channel for a password that Wine would survive, and logs tokens. This module knows
neither HTTP nor challenges; it loads on every system and works on Windows.
"""

import ctypes
import weakref
from ctypes import wintypes
from typing import Any, Final, NamedTuple

from ..errors import AuthFailed, BitsError, ErrorCode, show_text
from ..identity.kerberos import silent_kdc, unable
from ..identity.win32 import Call, code_of, failure
from .policy import CredentialKind, kind_of

# -- declarations (sspi.h) -----------------------------------------------------------------------------------------------------------

_STATUS: Final = wintypes.LONG
_TEXT: Final = wintypes.LPCWSTR
_ULONG: Final = wintypes.ULONG


class _Handle(ctypes.Structure):
    """SecHandle."""

    _fields_ = (("lower", ctypes.c_void_p), ("upper", ctypes.c_void_p))


class _Buffer(ctypes.Structure):
    """SecBuffer."""

    _fields_ = (("size", _ULONG), ("type", _ULONG), ("data", ctypes.c_void_p))


class _Buffers(ctypes.Structure):
    """SecBufferDesc."""

    _fields_ = (("version", _ULONG), ("count", _ULONG), ("first", ctypes.POINTER(_Buffer)))


class _Identity(ctypes.Structure):
    """SEC_WINNT_AUTH_IDENTITY_W."""

    _fields_ = (
        *(("user", ctypes.c_wchar_p), ("user_length", _ULONG)),
        *(("domain", ctypes.c_wchar_p), ("domain_length", _ULONG)),
        *(("password", ctypes.c_void_p), ("password_length", _ULONG)),
        ("flags", _ULONG),
    )


class _PackageInfo(ctypes.Structure):
    """SecPkgInfoW."""

    _fields_ = (
        *(("capabilities", _ULONG), ("version", wintypes.USHORT), ("rpc_id", wintypes.USHORT), ("max_token", _ULONG)),
        *(("name", ctypes.c_void_p), ("comment", ctypes.c_void_p)),
    )


class _Bindings(ctypes.Structure):
    """SEC_CHANNEL_BINDINGS; the data stands right behind it."""

    _fields_ = (
        *(("initiator_type", _ULONG), ("initiator_length", _ULONG), ("initiator_offset", _ULONG)),
        *(("acceptor_type", _ULONG), ("acceptor_length", _ULONG), ("acceptor_offset", _ULONG)),
        *(("data_length", _ULONG), ("data_offset", _ULONG)),
    )


_OUT_HANDLE, _IN_BUFFERS = ctypes.POINTER(_Handle), ctypes.POINTER(_Buffers)
_OUT_TIME = ctypes.POINTER(ctypes.c_int64)

_AcquireCredentialsHandle: Final = Call(
    *("secur32", "AcquireCredentialsHandleW", _STATUS, _TEXT, _TEXT, _ULONG, ctypes.c_void_p, ctypes.c_void_p),
    *(ctypes.c_void_p, ctypes.c_void_p, _OUT_HANDLE, _OUT_TIME),
    ok=None,
)
_InitializeSecurityContext: Final = Call(
    *("secur32", "InitializeSecurityContextW", _STATUS, _OUT_HANDLE, _OUT_HANDLE, _TEXT, _ULONG, _ULONG, _ULONG),
    *(_IN_BUFFERS, _ULONG, _OUT_HANDLE, _IN_BUFFERS, ctypes.POINTER(_ULONG), _OUT_TIME),
    ok=None,
)
_QuerySecurityPackageInfo: Final = Call(
    "secur32", "QuerySecurityPackageInfoW", _STATUS, _TEXT, ctypes.POINTER(ctypes.POINTER(_PackageInfo)), ok=None
)
_FreeContextBuffer: Final = Call("secur32", "FreeContextBuffer", _STATUS, ctypes.c_void_p, ok=None)
_FreeCredentialsHandle: Final = Call("secur32", "FreeCredentialsHandle", _STATUS, _OUT_HANDLE, ok=None)
_DeleteSecurityContext: Final = Call("secur32", "DeleteSecurityContext", _STATUS, _OUT_HANDLE, ok=None)

_OUTBOUND: Final = 2  # SECPKG_CRED_OUTBOUND
_UNICODE: Final = 2  # SEC_WINNT_AUTH_IDENTITY_UNICODE
_NATIVE: Final = 0x10  # SECURITY_NATIVE_DREP
_TOKEN, _CHANNEL_BINDINGS = 2, 14  # SECBUFFER_
_DELEGATE, _MUTUAL, _REPLAY, _SEQUENCE = 0x1, 0x2, 0x4, 0x8  # ISC_REQ_
_CONTINUE: Final = 0x00090312  # SEC_I_CONTINUE_NEEDED

# -- contexts ------------------------------------------------------------------------------------------------------------------------


class Account(NamedTuple):
    """An explicit user; `domain` is "" for names like alice@REALM."""

    user: str
    domain: str
    password: str

    def __repr__(self) -> str:
        return f"Account({self.user!r}, {self.domain!r})"

    @classmethod
    def of(cls, name: str, password: str) -> "Account":
        """Of "alice@REALM", DOM\\alice or "alice"."""
        domain, _, user = name.rpartition("\\")
        return cls(user, domain, password)


def context_for(package: str, target: str, credential: object, *, binding: bytes | None = None, delegate: bool = False) -> "Context":
    """A context that shows a credential of pyspnego's, or what the thread is logged on with (`CredentialCache`).

    Raises:
        AuthFailed: Windows has nothing of that kind. OSError: as `Context`.
    """
    kind = kind_of(credential)
    if kind is CredentialKind.AMBIENT:
        return Context(package, target, binding=binding, delegate=delegate)
    if kind is CredentialKind.PASSWORD:
        account = Account.of(str(getattr(credential, "username", "")), str(getattr(credential, "password", "")))
        return Context(package, target, account=account, binding=binding, delegate=delegate)
    raise unable(f"Windows shows no {kind.value}", advice="give the token a password, or log the user on with logon_user()")


class Context:
    """One login with one peer: made and stepped by one thread after the other, never by two at once.

    Args:
        package: "Kerberos" or "NTLM".
        target: the peer's principal, "HTTP/host".
        account: whom to show; None: whoever the thread is.
        binding: application data of the channel binding.
        delegate: whether the peer is handed the ticket-granting ticket; Windows does that only where the realm trusts it.

    Attributes:
        complete: there is nothing more to say.
    """

    def __init__(
        self, package: str, target: str, *, account: Account | None = None, binding: bytes | None = None, delegate: bool = False
    ) -> None:
        self.complete = False
        self._target = target
        self._binding = None if binding is None else _bindings(binding)
        self._flags = _MUTUAL | _REPLAY | _SEQUENCE | (_DELEGATE if delegate else 0)
        self._size = _max_token(package)
        self._context: _Handle | None = None
        self._credential = _acquired(package, account)

    def step(self, token: bytes | None = None) -> bytes:
        """The next token for the peer, b"" when there is none. Raises OSError with the number that SSPI gave (`winerror`)."""
        out = ctypes.create_string_buffer(self._size)
        answer = _Buffer(self._size, _TOKEN, ctypes.cast(out, ctypes.c_void_p))
        given, keep = self._given(token)
        first = self._context is None
        context = _Handle() if self._context is None else self._context
        status = _InitializeSecurityContext(
            ctypes.byref(self._credential),
            None if first else ctypes.byref(context),
            self._target,
            self._flags,
            0,
            _NATIVE,
            None if given is None else ctypes.byref(given),
            0,
            ctypes.byref(context),
            ctypes.byref(_Buffers(0, 1, ctypes.pointer(answer))),
            ctypes.byref(_ULONG()),
            ctypes.byref(ctypes.c_int64()),
        )
        del keep
        _raise_for(status)
        if first:
            self._context = context
            weakref.finalize(self, _freed, _DeleteSecurityContext, context).atexit = False
        self.complete = status == 0
        return out.raw[: answer.size]

    def _given(self, token: bytes | None) -> tuple[_Buffers | None, Any]:
        """What goes in, and what has to live as long."""
        pieces = [(_TOKEN, ctypes.create_string_buffer(token, len(token)))] if token else []
        if self._binding is not None:
            pieces.append((_CHANNEL_BINDINGS, self._binding))
        if not pieces:
            return None, None
        buffers = (_Buffer * len(pieces))(*(_Buffer(len(data), kind, ctypes.cast(data, ctypes.c_void_p)) for kind, data in pieces))
        return _Buffers(0, len(pieces), ctypes.cast(buffers, ctypes.POINTER(_Buffer))), (pieces, buffers)


def _acquired(package: str, account: Account | None) -> _Handle:
    """A credential of the thread, or of the account; given back with the last reference."""
    credential = _Handle()
    identity, secret = None, None
    if account is not None:
        secret = ctypes.create_unicode_buffer(account.password)
        identity = _Identity(
            *(account.user, _units(account.user), account.domain or None, _units(account.domain)),
            *(ctypes.cast(secret, ctypes.c_void_p), _units(account.password), _UNICODE),
        )
    try:
        status = _AcquireCredentialsHandle(
            *(None, package, _OUTBOUND, None, None if identity is None else ctypes.byref(identity), None, None),
            *(ctypes.byref(credential), ctypes.byref(ctypes.c_int64())),
        )
    finally:
        if secret is not None:
            ctypes.memset(secret, 0, ctypes.sizeof(secret))
    _raise_for(status)
    weakref.finalize(credential, _freed, _FreeCredentialsHandle, _Handle(credential.lower, credential.upper)).atexit = False
    return credential


def _freed(call: Call, handle: _Handle) -> None:
    call(ctypes.byref(handle))


def _units(text: str) -> int:
    """UTF-16 units, as Windows counts characters."""
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


def _bindings(data: bytes) -> Any:
    """SEC_CHANNEL_BINDINGS with the data behind it."""
    head = _Bindings(data_length=len(data), data_offset=ctypes.sizeof(_Bindings))
    return ctypes.create_string_buffer(bytes(head) + data, ctypes.sizeof(_Bindings) + len(data))


def _max_token(package: str) -> int:
    info = ctypes.POINTER(_PackageInfo)()
    _raise_for(_QuerySecurityPackageInfo(package, ctypes.byref(info)))
    try:
        return int(info.contents.max_token)
    finally:
        _FreeContextBuffer(ctypes.cast(info, ctypes.c_void_p))


def _raise_for(status: int) -> None:
    if status not in (0, _CONTINUE):
        raise failure(status)


# -- what went wrong, in words -------------------------------------------------------------------------------------------------------

_SENTENCES: Final[dict[int, tuple[str, str]]] = {  # SEC_E_*, in a transfer
    0x80090303: ("the realm knows no such service", "use the host's full name in the URL, or register its HTTP service"),  # TARGET_UNKNOWN
    0x80090304: ("Windows has no security authority that would do it", ""),  # INTERNAL_ERROR
    0x8009030E: ("nobody is logged on here who has credentials for it", "log the user on, or give the token credentials"),  # NO_CREDENTIALS
    0x80090305: ("this Windows has no such security package", ""),  # SECPKG_NOT_FOUND
    0x80090308: ("the peer's token cannot be read", ""),  # INVALID_TOKEN
    0x80090324: ("the clocks of this machine and of the realm differ too much", "set the clock"),  # TIME_SKEW
    0x80090317: ("the tickets have expired", "log the user on again"),  # CONTEXT_EXPIRED
}
_NO_AUTHORITY: Final = 0x80090311  # SEC_E_NO_AUTHENTICATING_AUTHORITY
_LOGON_DENIED: Final = 0x8009030C
_BAD_BINDINGS: Final = 0x80090346
_WRONG_PRINCIPAL: Final = 0x80090322
_POLICY: Final = 0x8009035E


def explain(exc: Exception) -> BitsError:
    """The error for what SSPI raised, in a transfer."""
    number = (code_of(exc) if isinstance(exc, OSError) else 0) & 0xFFFFFFFF
    if number == _NO_AUTHORITY:
        return silent_kdc("no domain controller answers")
    if number == _LOGON_DENIED:
        return AuthFailed("the user name or the password is wrong")
    if number == _BAD_BINDINGS:
        return AuthFailed("the peer's channel binding is wrong", code=ErrorCode.SEC_E_BAD_BINDINGS)
    if number == _WRONG_PRINCIPAL:
        return AuthFailed("the peer is not who the ticket is for", code=ErrorCode.SEC_E_WRONG_PRINCIPAL)
    if number == _POLICY:
        return AuthFailed("the realm does not let this account act for somebody else there", code=ErrorCode.SEC_E_DELEGATION_POLICY)
    sentence, advice = _SENTENCES.get(number, (f"SSPI says {number:#x}" if number else show_text(type(exc).__name__), ""))
    return unable(f"the login is not possible: {sentence}", advice=advice or None)
