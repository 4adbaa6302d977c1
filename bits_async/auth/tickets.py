"""Kerberos tickets: got once per credential, kept in memory that nobody else can name, checked before each use.

pyspnego asks the KDC for a ticket-granting ticket in every context built from a password or a keytab, and leaves the memory
cache it makes for that behind. `Tickets` therefore asks once, into a MEMORY: cache with a random name, renews it when it nears
its end, hands out `KerberosCCache`s only, and destroys what it made. FILE: caches are used as they are, under the token's user
id, which is what guards them. The principal of a cache is compared with the one its token claims before each context (T4).
GSSAPI is never left to choose a credential by itself: the process's default cache is looked up and named.

What blocks is plain functions, meant for the token's security threads. On Windows SSPI keeps tickets in the logon session, so
credentials pass unchanged. This module also reads a ticket's target out of a token (T21); it knows neither HTTP nor challenges.
"""

import os
import re
import secrets
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from ..errors import AuthFailed, BitsError, ErrorCode, ErrorContext, make_error, scrub, show_text
from .policy import CredentialKind, Offer, Refusals, cache_type, kind_of

if TYPE_CHECKING:
    import spnego

T = TypeVar("T")

KDC_DEADLINE: Final = 10.0  # seconds one thread waits for another that asks the KDC for the same ticket
RENEW_BEFORE: Final = 300.0  # seconds before a ticket's end (the clock skew that realms allow)
KDC: Final = "kdc"  # the realm under which a KDC's own refusal is remembered


_Holder = weakref.ref[object] | None
"""A token, which lives no longer for having tickets."""


class Tickets:
    """The ticket-granting tickets of all lanes of one manager."""

    def __init__(self, refusals: Refusals | None = None, *, clock: Callable[[], float] = time.time) -> None:
        self._refusals = refusals or Refusals()
        self._clock = clock
        self._entries: dict[tuple[_Holder, str], _Entry] = {}
        self._closed = False
        self._lock = threading.Lock()  # never held while the KDC is asked: each entry has `asking` for that

    def __repr__(self) -> str:
        return f"<Tickets: {len(self._entries)}>"

    def ready(self, offer: Offer) -> "spnego.Credential":
        """The credential to build a Kerberos context from. Blocking: call it in the token's thread.

        Raises:
            AuthFailed: no ticket to be had, the KDC refused, or the cache belongs to somebody else.
            NetworkError: the KDC does not answer.
        """
        import spnego

        credential = credential_of(offer)
        if sys.platform == "win32":
            return credential
        require_kerberos()
        kind = kind_of(credential)
        if kind in (CredentialKind.PASSWORD, CredentialKind.KEYTAB):
            cache = self._granted(offer, credential)
            name, principal = cache.name, cache.principal
        elif kind is CredentialKind.HASH:
            raise unable("an NTLM hash cannot get Kerberos tickets")
        else:
            name = _existing_cache(credential, offer)
            principal = kerberos(_principal_of_cache, name)
        for claimed in (offer.principal, getattr(credential, "principal", None)):
            _compare(claimed, principal)
        return spnego.KerberosCCache(name, principal)

    def revision(self, offer: Offer) -> str:
        """The state of the file a credential lives in, "" where there is none. Blocking: call it in the token's thread."""
        try:
            name = _place(offer)
            found = os.stat(name.partition(":")[2] if name.upper().startswith("FILE:") else name)
        except (OSError, ValueError, BitsError):
            return ""
        return f"{found.st_dev}:{found.st_ino}:{found.st_mtime_ns}:{found.st_size}"

    def forget(self, holder: object) -> None:
        """Destroy what was got for this token: it was closed or replaced."""
        with self._lock:
            for key in [key for key in self._entries if key[0] is not None and key[0]() is holder]:
                self._entries.pop(key).close()

    async def aclose(self) -> None:
        """Destroy all tickets. Each cache is destroyed with the handle it was made with: memory only, nothing that could wait."""
        with self._lock:
            self._closed = True
            while self._entries:
                self._entries.popitem()[1].close()

    def _granted(self, offer: Offer, credential: object) -> "_Cache":
        entry = self._entry(offer)
        # The KDC is asked once, however many lanes want the ticket; but none waits longer for another's question than its own.
        if not entry.asking.acquire(timeout=KDC_DEADLINE):
            raise silent_kdc()
        try:
            cache = entry.cache
            if cache is None or cache.worn(self._clock()):
                cache = self._ask(offer, credential)
                with self._lock:
                    entry.replace(cache)
            return cache
        finally:
            entry.asking.release()

    def _entry(self, offer: Offer) -> "_Entry":
        """One entry per token and credential: the path of a keytab is no proof that another token may read it."""
        mine = (None if offer.holder is None else weakref.ref(offer.holder), offer.fingerprint)
        with self._lock:
            if self._closed:
                raise unable("the manager is closing")
            for key, entry in list(self._entries.items()):
                alone = key[0] is not None and key[0]() is None  # nobody holds the token any more
                if alone or (key != mine and entry.ended(self._clock())):
                    self._entries.pop(key).close()
            return self._entries.setdefault(mine, _Entry())

    def _ask(self, offer: Offer, credential: object) -> "_Cache":
        revision = self.revision(offer)
        if self._refusals.refused(offer.fingerprint, KDC, None, revision):
            raise AuthFailed(
                f"the KDC refused the credentials of {show_text(offer.who, 80)} before; they are not tried again until they are "
                "replaced, lest the account be locked"
            )
        try:
            return kerberos(_first_ticket, credential)
        except AuthFailed as refused:
            if refused.code == ErrorCode.SEC_E_LOGON_DENIED:
                self._refusals.add(offer.fingerprint, KDC, None, revision)
            raise


@dataclass(slots=True)
class _Cache:
    """A cache of ours: its name, whose tickets are in it, and the handles that destroy it."""

    name: str
    principal: str
    starts: float
    ends: float
    context: Any
    handle: Any

    def worn(self, now: float) -> bool:
        """Near enough to its end to be renewed."""
        return now > self.ends - min(RENEW_BEFORE, (self.ends - self.starts) / 10)

    def destroy(self) -> None:
        import krb5

        try:
            krb5.cc_destroy(self.context, self.handle)
        except Exception:
            pass  # gone already; there is nothing left that could leak


class _Entry:
    """One credential's ticket. All but `asking` is guarded by the lock of `Tickets`."""

    def __init__(self) -> None:
        self.asking = threading.Lock()
        self.cache: _Cache | None = None
        self._previous: _Cache | None = None  # until the next renewal, because a context may be on its way to it
        self._closed = False

    def ended(self, now: float) -> bool:
        return self.cache is not None and self.cache.ends < now and not self.asking.locked()

    def replace(self, cache: _Cache) -> None:
        if self._closed:  # forgotten while the KDC was asked
            cache.destroy()
            raise unable("the identity was closed")
        old, self._previous, self.cache = self._previous, self.cache, cache
        if old:
            old.destroy()

    def close(self) -> None:
        self._closed = True
        for cache in (self._previous, self.cache):
            if cache:
                cache.destroy()
        self._previous = self.cache = None


# -- credentials -----------------------------------------------------------------------------------------------------------------


def credential_of(offer: Offer) -> "spnego.Credential":
    """The offer as a credential of pyspnego. Loads pyspnego, so call it where that may wait."""
    import spnego

    if offer.user_name is not None:
        return spnego.Password(offer.user_name, offer.password or "")
    return cast("spnego.Credential", offer.credential) or spnego.CredentialCache()


def require_kerberos() -> None:
    """Raises: AuthFailed that names the extra, when Kerberos is not installed."""
    try:
        import gssapi  # noqa: F401
        import krb5  # noqa: F401
    except ImportError:
        missing = True
    else:
        missing = False
    if missing:
        raise unable(
            "Kerberos is not installed here: the Python packages gssapi and krb5 are missing",
            advice="install bits-async[kerberos] (Debian needs libkrb5-dev to build it), or permit another scheme",
        )


def _existing_cache(credential: object, offer: Offer) -> str:
    """The full name of a cache that somebody else filled."""
    if kind_of(credential) is not CredentialKind.CACHE:
        if not offer.process:
            raise unable("only the process's own token may use the credentials it is logged on with")
        return kerberos(_default_cache, getattr(credential, "username", None))
    kind, name = cache_type(credential), str(getattr(credential, "ccache", ""))
    if kind != "FILE" and not offer.process:
        raise unable(f"a {kind}: ticket cache is not guarded by the user id of the token; use a FILE: cache")  # T4
    return name if kind != "FILE" or name.upper().startswith("FILE:") else f"FILE:{name}"


def _place(offer: Offer) -> str:
    """Where a credential is kept, as a path or FILE:path; other names lead to no file."""
    if offer.user_name is not None:
        return ""
    kind = kind_of(offer.credential)
    if kind is CredentialKind.CACHE:
        return str(getattr(offer.credential, "ccache", ""))
    if kind is CredentialKind.AMBIENT and sys.platform != "win32":
        require_kerberos()
        return kerberos(_default_cache, getattr(offer.credential, "username", None))
    return str(getattr(offer.credential, "keytab", ""))


def _compare(claimed: str | None, actual: str) -> None:
    """T4: the ticket must be for who the token says it is. A claim without a realm names the first part only."""
    if claimed is None or claimed == actual or ("@" not in claimed and claimed == actual.rpartition("@")[0]):
        return
    raise AuthFailed(
        f"the tickets are {show_text(actual)}'s, but the identity is {show_text(claimed)}",
        code=ErrorCode.SEC_E_WRONG_PRINCIPAL,
        advice="give the token the ticket cache or keytab of its own principal",
    )


# -- krb5 (each runs inside `kerberos`) ------------------------------------------------------------------------------------------


def _principal_of_cache(name: str) -> str:
    import krb5

    principal = krb5.cc_resolve(krb5.init_context(), name.encode()).principal
    if principal is None:
        raise unable("there are no tickets in the cache", advice=_KINIT)
    return _text(principal.name)


def _default_cache(user: str | None) -> str:
    import krb5

    context = krb5.init_context()
    named = krb5.parse_name_flags(context, user.encode()) if user else None
    cache = krb5.cc_cache_match(context, named) if named else krb5.cc_default(context)
    return f"{_text(cache.cache_type)}:{_text(cache.name)}"


def _first_ticket(credential: object) -> _Cache:
    """Ask the KDC, and keep the answer in a new cache."""
    import krb5

    context = krb5.init_context()
    options = krb5.get_init_creds_opt_alloc(context)
    if kind_of(credential) is CredentialKind.KEYTAB:
        keytab = krb5.kt_resolve(context, str(getattr(credential, "keytab", "")).encode())
        entries = list(keytab)  # before the KDC is asked: is there a keytab? An iteration left half-way would keep the file open
        if not entries:
            raise unable("the keytab is empty", advice="export the keytab again")
        wanted = getattr(credential, "principal", None) or _text(entries[0].principal.name)  # lives no longer than its entry
        client = krb5.parse_name_flags(context, wanted.encode())
        ticket = krb5.get_init_creds_keytab(context, client, options, keytab=keytab)
    else:
        client = krb5.parse_name_flags(context, str(getattr(credential, "username", "")).encode())
        # A password of random 16-bit units (a managed service account) may hold lone surrogates; Windows hashes them as U+FFFD.
        password = re.sub("[\ud800-\udfff]", "\ufffd", str(getattr(credential, "password", ""))).encode()
        ticket = krb5.get_init_creds_password(context, client, options, password=password)
    name = f"MEMORY:bits-{secrets.token_hex(16)}"
    cache = krb5.cc_resolve(context, name.encode())
    krb5.cc_initialize(context, cache, ticket.client)
    krb5.cc_store_cred(context, cache, ticket)
    return _Cache(name, _text(ticket.client.name), ticket.times.authtime, ticket.times.endtime, context, cache)


def _text(raw: bytes | None) -> str:
    return (raw or b"").decode("utf-8", "replace")


# -- what went wrong, in words ---------------------------------------------------------------------------------------------------

_KINIT = "renew the ticket cache (kinit), then resume the job"
_DENIED, _UNABLE, _SILENT = "denied", "unable", "silent"
_CODES: Final[dict[int, tuple[str, str, str]]] = {
    -1765328353: (_DENIED, "the KDC says that the password or key is wrong", ""),
    -1765328360: (_DENIED, "the KDC says that the password or key is wrong", ""),
    -1765328378: (_DENIED, "the realm does not know this principal", ""),
    -1765328366: (_DENIED, "the account is disabled or locked", "ask the realm's administrator"),
    -1765328361: (_DENIED, "the password has expired", "change the password, set the credentials again, then resume the job"),
    -1765328383: (_DENIED, "the account has expired", "ask the realm's administrator"),
    -1765328228: (_SILENT, "no KDC of the realm answers", ""),
    -1765328164: (_SILENT, "the name of the realm's KDC is not known", ""),
    -1765328230: (_UNABLE, "no KDC is configured for the realm", "check krb5.conf and the realm's DNS records"),
    -1765328160: (_UNABLE, "there is no default realm", "name the principal with its realm, or set default_realm in krb5.conf"),
    -1765328377: (
        _UNABLE,
        "the realm knows no such service",
        "use the host's full name in the URL, or register its HTTP service",
    ),
    -1765328347: (_UNABLE, "the clocks of this machine and of the realm differ too much", "set the clock"),
    -1765328352: (_UNABLE, "the tickets have expired", _KINIT),
    -1765328243: (_UNABLE, "there are no tickets in the cache", _KINIT),
    -1765328189: (_UNABLE, "there is no such ticket cache", _KINIT),
    -1765328190: (_UNABLE, "the ticket cache may not be read by this identity", "give the identity a cache of its own"),
    -1765328203: (_UNABLE, "the keytab has no key for this principal", "export the keytab again"),
    2: (_UNABLE, "the keytab or ticket cache does not exist", ""),
    13: (_UNABLE, "the keytab or ticket cache may not be read by this identity", "give the identity a file of its own"),
}


def unable(message: str, *, advice: str | None = None) -> AuthFailed:
    """No Kerberos for now, and nothing was shown to anybody: another scheme may be tried."""
    return AuthFailed(message, code=ErrorCode.SEC_E_NO_CREDENTIALS, advice=advice)


def silent_kdc(message: str = "the KDC did not answer in time") -> BitsError:
    """The realm is out of reach; the job tries again by itself."""
    return make_error(
        ErrorCode.ERROR_WINHTTP_TIMEOUT,
        ErrorContext.GENERAL_TRANSPORT,
        message,
        advice="the job tries again by itself; check the way to the realm's KDC",
    )


def translated(explain: Callable[[Exception], BitsError], function: Callable[..., T], *args: Any) -> T:
    """Call it; what other libraries raise comes out as ours, with nothing of theirs but the name of the class (T14)."""
    try:
        return function(*args)
    except BitsError:
        raise
    except Exception as exc:
        ours = explain(exc)
        ours.__cause__ = scrub(exc)
    raise ours  # outside the handler, so that the original does not stay behind as the context


def kerberos(function: Callable[..., T], *args: Any) -> T:
    """`translated` for calls of krb5 and GSSAPI."""
    return translated(explain, function, *args)


def explain(exc: Exception) -> BitsError:
    """The error for what krb5, GSSAPI or pyspnego raised: by the number of the mechanism, where it has one."""
    base = getattr(exc, "base_error", None) or exc
    number = getattr(base, "err_code", None) or getattr(base, "min_code", None) or getattr(base, "errno", None) or 0
    number = number - 2**32 if number >= 2**31 else number
    if getattr(base, "maj_code", None) == _BAD_BINDINGS:
        return AuthFailed("the peer's channel binding is wrong", code=ErrorCode.SEC_E_BAD_BINDINGS)
    kind, sentence, advice = _CODES.get(number, (_UNABLE, f"{type(base).__name__} {number or ''}".rstrip(), ""))
    if kind == _SILENT:
        return silent_kdc(sentence)
    if kind == _DENIED:
        return AuthFailed(sentence, advice=advice or None)
    return unable(f"Kerberos is not possible: {sentence}", advice=advice or None)


_BAD_BINDINGS: Final = 0x40000


# -- what a token says (DER) -----------------------------------------------------------------------------------------------------

_KERBEROS_OID: Final = b"\x2a\x86\x48\x86\xf7\x12\x01\x02\x02"
_AP_REQ: Final = b"\x01\x00"


def target_of(token: bytes) -> tuple[str, ...]:
    """The service principal in the clear part of the ticket inside a GSS Kerberos token: ("HTTP", "www.example.com") (T21).

    Raises:
        ValueError: this is no such token.
    """
    framed = descend(token, 0x60)  # RFC 2743, 3.1
    tag, oid, end = _element(framed, 0)
    if (tag, oid) != (0x06, _KERBEROS_OID) or framed[end : end + 2] != _AP_REQ:
        raise ValueError("not the first token of Kerberos")
    # RFC 4120, 5.5.1 and 5.3: AP-REQ { ..., ticket [3] Ticket { ..., sname [2] { ..., name-string [1] SEQUENCE OF } } }
    names = descend(framed[end + 2 :], 0x6E, 0x30, 0xA3, 0x61, 0x30, 0xA2, 0x30, 0xA1, 0x30)
    return tuple(name.decode("utf-8") for _, name in _elements(names))


def descend(data: bytes, *path: int) -> bytes:
    """The value found by following tags downwards, at each level the first element that has the tag.

    Raises:
        ValueError: there is none, or the encoding is broken.
    """
    for wanted in path:
        for tag, value in _elements(data):
            if tag == wanted:
                data = value
                break
        else:
            raise ValueError(f"no element with tag {wanted:#x}")
    return data


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(data):
        tag, value, at = _element(data, at)
        yield tag, value


def _element(data: bytes, at: int) -> tuple[int, bytes, int]:
    """The element at this place: tag, value, where the next begins."""
    if at + 2 > len(data):
        raise ValueError("cut short")
    tag, length, at = data[at], data[at + 1], at + 2
    if length & 0x80:
        octets = length & 0x7F
        if not 1 <= octets <= 4 or at + octets > len(data):
            raise ValueError("not a length of DER")
        length, at = int.from_bytes(data[at : at + octets], "big"), at + octets
    if at + length > len(data):
        raise ValueError("cut short")
    return tag, data[at : at + length], at + length
