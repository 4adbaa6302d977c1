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
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, TypeVar, cast

from ..errors import AuthFailed, BitsError, ErrorCode, show_text
from ..identity.kerberos import (
    KINIT,
    Cache,
    kerberos,
    require_kerberos,
    silent_kdc,
    text_of,
    ticket_by_keytab,
    ticket_by_password,
    unable,
)
from ..identity.tokens import is_own_cache
from .policy import CredentialKind, Offer, Refusals, cache_type, kind_of

if TYPE_CHECKING:
    import spnego

T = TypeVar("T")

KDC_DEADLINE: Final = 10.0  # seconds one thread waits for another that asks the KDC for the same ticket
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

    def _granted(self, offer: Offer, credential: object) -> Cache:
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

    def _ask(self, offer: Offer, credential: object) -> Cache:
        revision = self.revision(offer)
        if self._refusals.refused(offer.fingerprint, KDC, None, revision):
            raise AuthFailed(
                f"the KDC refused the credentials of {show_text(offer.who, 80)} before; they are not tried again until they are "
                "replaced, lest the account be locked"
            )
        try:
            return kerberos(_first_ticket, credential, *([True] if offer.forwardable else []))
        except AuthFailed as refused:
            if refused.code == ErrorCode.SEC_E_LOGON_DENIED:
                self._refusals.add(offer.fingerprint, KDC, None, revision)
            raise


class _Entry:
    """One credential's ticket. All but `asking` is guarded by the lock of `Tickets`."""

    def __init__(self) -> None:
        self.asking = threading.Lock()
        self.cache: Cache | None = None
        self._previous: Cache | None = None  # until the next renewal, because a context may be on its way to it
        self._closed = False

    def ended(self, now: float) -> bool:
        return self.cache is not None and self.cache.ends < now and not self.asking.locked()

    def replace(self, cache: Cache) -> None:
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


def _existing_cache(credential: object, offer: Offer) -> str:
    """The full name of a cache that somebody else filled."""
    if kind_of(credential) is not CredentialKind.CACHE:
        if not offer.process:
            raise unable("only the process's own token may use the credentials it is logged on with")
        return kerberos(_default_cache, getattr(credential, "username", None))
    kind, name = cache_type(credential), str(getattr(credential, "ccache", ""))
    if kind != "FILE" and not offer.process and not is_own_cache(name):
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
        raise unable("there are no tickets in the cache", advice=KINIT)
    return text_of(principal.name)


def _default_cache(user: str | None) -> str:
    import krb5

    context = krb5.init_context()
    named = krb5.parse_name_flags(context, user.encode()) if user else None
    cache = krb5.cc_cache_match(context, named) if named else krb5.cc_default(context)
    return f"{text_of(cache.cache_type)}:{text_of(cache.name)}"


def _first_ticket(credential: object, forwardable: bool = False) -> Cache:
    """Ask the KDC, and keep the answer in a new cache."""
    if kind_of(credential) is CredentialKind.KEYTAB:
        return ticket_by_keytab(cast("spnego.KerberosKeytab", credential), forwardable=forwardable)
    return ticket_by_password(cast("spnego.Password", credential), forwardable=forwardable)


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
