"""Why a KDC of Active Directory refuses an account: the NTSTATUS beside its refusal, which krb5's own errors leave out.

KDC_ERR_CLIENT_REVOKED means disabled, locked, expired and more. [MS-KILE] 2.2.2 adds KERB-EXT-ERROR, which libkrb5 hands to nobody
but a hook on the KDC's replies; neither python package for Kerberos has that hook, so libkrb5 is asked here by ctypes, once more
and with its own context. It blocks, as all that asks a KDC.
"""

import ctypes
import re
import sys
from typing import Any, Final

from ..errors import ErrorCode

WHY: Final = {
    0xC000006E: ("an account restriction forbids it", ErrorCode.ERROR_ACCOUNT_RESTRICTION),
    0xC000006F: ("the account may not log on at this hour", ErrorCode.ERROR_ACCOUNT_RESTRICTION),
    0xC0000070: ("the account may not log on from this machine", ErrorCode.ERROR_ACCOUNT_RESTRICTION),
    0xC0000071: ("the password has expired", ErrorCode.ERROR_PASSWORD_EXPIRED),
    0xC0000072: ("the account is disabled", ErrorCode.ERROR_ACCOUNT_DISABLED),
    0xC0000193: ("the account has expired", ErrorCode.ERROR_ACCOUNT_EXPIRED),
    0xC0000224: ("the password must be changed", ErrorCode.ERROR_PASSWORD_EXPIRED),
    0xC0000234: ("the account is locked", ErrorCode.ERROR_ACCOUNT_LOCKED_OUT),
}

# PA-DATA { type [1] INTEGER 3, value [2] OCTET STRING { status, reserved 0, flags } }, the numbers little-endian
_EXTENDED: Final = re.compile(rb"\xa1\x03\x02\x01\x03\xa2\x0e\x04\x0c(.{4})\0{4}.\0{3}", re.DOTALL)


def status_in(reply: bytes) -> int | None:
    """The status in a KRB-ERROR; None: there is none."""
    found = _EXTENDED.search(reply) if reply.startswith(b"\x7e") else None
    return None if found is None else int.from_bytes(found[1], "little")


class _Data(ctypes.Structure):
    """krb5_data."""

    _fields_ = (("magic", ctypes.c_int32), ("length", ctypes.c_uint), ("data", ctypes.c_void_p))


_Pointer = ctypes.POINTER(_Data)
_Hook = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, _Pointer, _Pointer, _Pointer, ctypes.c_void_p)
_CREDS_SIZE: Final = 1024  # more than a krb5_creds has in any release


def _library() -> Any:
    """libkrb5 with the hook (1.15), or None."""
    try:
        library = ctypes.CDLL("libkrb5.so.3" if sys.platform == "linux" else "libkrb5.dylib")
        for name, kinds in _CALLS.items():
            getattr(library, name).argtypes = kinds
    except (OSError, AttributeError):
        return None
    return library


_P: Final = ctypes.c_void_p
_CALLS: Final[dict[str, list[Any]]] = {
    "krb5_init_context": [_P],
    "krb5_set_kdc_recv_hook": [_P, _Hook, _P],
    "krb5_parse_name": [_P, ctypes.c_char_p, _P],
    "krb5_get_init_creds_password": [_P, _P, _P, ctypes.c_char_p, _P, _P, ctypes.c_int32, ctypes.c_char_p, _P],
    "krb5_free_cred_contents": [_P, _P],
    "krb5_free_principal": [_P, _P],
    "krb5_free_context": [_P],
}


def ask(principal: bytes, password: bytes) -> int | None:
    """Why the KDC refuses this account; None: it does not say."""
    library = _library()
    replies: list[bytes] = []

    def note(context: Any, data: Any, code: int, realm: Any, message: Any, reply: Any, new_reply: Any) -> int:
        if reply:
            replies.append(ctypes.string_at(reply[0].data, reply[0].length))
        return code

    hook = _Hook(note)  # held until the last call
    context = ctypes.c_void_p()
    if library is None or library.krb5_init_context(ctypes.byref(context)):
        return None
    try:
        library.krb5_set_kdc_recv_hook(context, hook, None)
        _log_on(library, context, principal, password)
    finally:
        library.krb5_free_context(context)
    return next((status for reply in reversed(replies) if (status := status_in(reply)) is not None), None)


def _log_on(library: Any, context: Any, principal: bytes, password: bytes) -> None:
    client, creds = ctypes.c_void_p(), ctypes.create_string_buffer(_CREDS_SIZE)
    if library.krb5_parse_name(context, principal, ctypes.byref(client)):
        return
    if not library.krb5_get_init_creds_password(context, creds, client, password, None, None, 0, None, None):
        library.krb5_free_cred_contents(context, creds)
    library.krb5_free_principal(context, client)
