"""Kerberos tickets: got once per credential, kept in memory that nobody else can name, checked before each use.

pyspnego asks the KDC for a ticket-granting ticket in every context built from a password or a keytab, and leaves the memory
cache it makes for that behind. `Tickets` therefore asks once, into a MEMORY: cache with a random name, hands out
`KerberosCCache`s only, and destroys what it made. FILE: caches are used as they are, under the token's user id, which is what
guards them. The principal of a cache is compared with the one its token claims before each context (T4).
GSSAPI is never left to choose a credential by itself: the process's default cache is looked up and named.

Before a ticket ends it is renewed, where the realm lets it be, or another is got with the password or key. A cache that somebody
else filled is never renewed in its place: it belongs to whoever runs kinit, and other programs read it. The renewed ticket is
kept in a cache of our own, and used while it lasts longer than what is in the other one; when that is emptied or removed, as a
log-off does, ours is used and renewed no more, and goes as soon as either is tried. While a ticket is good nobody waits for its
successor, and a KDC that does not answer harms nobody.

What blocks is plain functions, meant for the token's security threads. On Windows SSPI keeps tickets in the logon session, so
credentials pass unchanged. This module also reads a ticket's target out of a token (T21); it knows neither HTTP nor challenges.
"""

import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, TypeVar, cast

from ..errors import AuthFailed, BitsError, ErrorCode, TokenRequired, show_text
from ..identity.kerberos import (
    Cache,
    Lifetime,
    kerberos,
    look_into,
    renew,
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
AGAIN: Final = 0.2  # of the time that a ticket lasts until a renewal that failed is tried again
PAUSE: Final = 0.05  # of a ticket's life, in which it is not replaced before its end
KDC: Final = "kdc"  # the realm under which a KDC's own refusal is remembered


_ASKS: Final = (CredentialKind.PASSWORD, CredentialKind.KEYTAB)
_Holder = weakref.ref[object] | None
"""A token, which lives no longer for having tickets."""


class Tickets:
    """The ticket-granting tickets of all lanes of one manager.

    Attributes:
        keeper: sees to it that tickets are renewed in time. None: whoever asks for tickets waits for that.
    """

    def __init__(self, refusals: Refusals | None = None, *, clock: Callable[[], float] = time.time) -> None:
        self.keeper: Keeper | None = None
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
        if kind in _ASKS:
            cache = self._granted(offer, credential)
            name, principal = cache.name, cache.principal
        elif kind is CredentialKind.HASH:
            raise unable("an NTLM hash cannot get Kerberos tickets")
        else:
            name, principal = self._borrowed(offer, _existing_cache(credential, offer))
        for claimed in (offer.principal, getattr(credential, "principal", None)):
            _compare(claimed, principal)
        return spnego.KerberosCCache(name, principal)

    def refresh(self, offer: Offer) -> None:
        """Get another ticket in place of one that nears its end. Blocking: call it in a thread of the token.

        Raises:
            BitsError: as `ready`; the one that is there is good until its end.
        """
        entry = self._entries.get(_mine(offer))
        cache = None if entry is None else entry.cache
        if entry is not None and cache is not None and cache.life.worn(self._clock()):
            self._replace(entry, cache, partial(self._ask, offer, credential_of(offer)))

    def renewals(self) -> "list[Renewal]":
        """The tickets that can be renewed, in no order."""
        with self._lock:
            self._clear_out()
            found = [(key[0]() if key[0] is not None else None, entry) for key, entry in self._entries.items()]
        return [Renewal(when, holder, entry.wanted, entry) for holder, entry in found if holder and (when := entry.renew_at) is not None]

    def renew(self, renewal: "Renewal") -> None:
        """Renew a ticket by itself, if it is time. Blocking: call it in a thread of the token.

        Raises:
            BitsError: it could not be; it is good until its end.
        """
        entry, now = renewal.entry, self._clock()
        with entry.turn(0) as mine:
            if not mine:
                return  # a KDC that does not answer still has that thread
            try:
                name, life = self._longest(entry)
            except BitsError:
                self._drop(entry)  # whoever filled the other cache has given it up
                raise
            if life.renew_at is not None and life.renew_at <= now:
                self._keep(entry, kerberos(renew, name))
                entry.wanted = False

    def forget(self, holder: object) -> None:
        """Destroy what was got for this token: it was closed or replaced."""
        with self._lock:
            for key in [key for key in self._entries if key[0] is not None and key[0]() is holder]:
                self._entries.pop(key).close()

    def drop(self, offer: Offer) -> None:
        """Destroy what was got for this offer: it is of no use any more."""
        with self._lock:
            entry = self._entries.pop(_mine(offer), None)
            if entry is not None:
                entry.close()

    def _drop(self, entry: "_Entry") -> None:
        with self._lock:
            for key in [key for key, each in self._entries.items() if each is entry]:
                self._entries.pop(key).close()

    async def aclose(self) -> None:
        """Destroy all tickets. Each cache is destroyed with the handle it was made with: memory only, nothing that could wait."""
        with self._lock:
            self._closed = True
            while self._entries:
                self._entries.popitem()[1].close()

    # -- tickets that we ask for

    def _granted(self, offer: Offer, credential: object) -> Cache:
        entry = self._entry(offer)
        now, cache = self._clock(), entry.cache
        ask = partial(self._ask, offer, credential)
        if cache is None or cache.life.ends <= now:
            self._replace(entry, cache, ask, wait=KDC_DEADLINE)
        elif cache.life.worn(now) and entry.tries_again <= now:
            entry.next_try(now)
            if self.keeper is not None:
                self.keeper.worn(offer)
            else:
                with suppress(BitsError):
                    self._replace(entry, cache, ask)
        return entry.have()

    def _replace(self, entry: "_Entry", known: Cache | None, ask: Callable[[], Cache], *, wait: float = 0.0) -> None:
        """The KDC is asked once, however many lanes want the ticket; but none waits longer for another's question than its own."""
        with entry.turn(wait) as mine:
            if not mine and wait:
                raise silent_kdc()
            if mine and entry.cache is known:
                self._keep(entry, ask())

    def _keep(self, entry: "_Entry", cache: Cache) -> None:
        with self._lock:
            entry.replace(cache, self._clock())
        self._tell_keeper()

    def _tell_keeper(self) -> None:
        if self.keeper is not None:
            self.keeper.news()

    def _entry(self, offer: Offer) -> "_Entry":
        """One entry per token and credential: the path of a keytab is no proof that another token may read it."""
        with self._lock:
            if self._closed:
                raise unable("the manager is closing")
            if _is_closed(offer.holder):  # in the middle of a login: whoever forgets the token's tickets may have done so already
                raise TokenRequired("the token was closed", identity=show_text(offer.who, 80))
            self._clear_out(_mine(offer))
            entry = self._entries.setdefault(_mine(offer), _Entry())
            news, entry.wanted = not entry.wanted, True
        if news and entry.life is not None:
            self._tell_keeper()
        return entry

    def _clear_out(self, but: object = None) -> None:
        for key, entry in list(self._entries.items()):
            alone = key[0] is not None and ((holder := key[0]()) is None or _is_closed(holder))  # nobody has the token any more
            if alone or (key != but and entry.ended(self._clock())):
                self._entries.pop(key).close()

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

    # -- tickets that somebody else got

    def _borrowed(self, offer: Offer, name: str) -> tuple[str, str]:
        """The cache to use in place of this one, and whose tickets are in it."""
        try:
            principal, life = kerberos(look_into, name)
        except BitsError:
            self.drop(offer)  # whoever filled it has given it up
            raise
        if life.renew_at is None and _mine(offer) not in self._entries:
            return name, principal
        entry = self._entry(offer)
        ours = entry.cache
        if ours is not None and (ours.principal != principal or ours.life.ends <= life.ends):
            self.drop(offer)
            entry, ours = self._entry(offer), None
        if entry.source != (name, life):
            entry.source = name, life
            self._tell_keeper()
        return (name, principal) if ours is None else (ours.name, principal)

    def _longest(self, entry: "_Entry") -> tuple[str, Lifetime]:
        """The cache with the ticket that lasts longest: whoever filled the other one may have renewed it himself."""
        ours = entry.cache
        if entry.source is not None:
            name, _ = entry.source
            principal, life = kerberos(look_into, name)
            entry.source = name, life
            if ours is None or ours.principal != principal or ours.life.ends <= life.ends:
                return name, life
        cache = entry.have()
        return cache.name, cache.life

    def revision(self, offer: Offer) -> str:
        """The state of the file a credential lives in, "" where there is none. Blocking: call it in the token's thread."""
        try:
            name = _place(offer)
            found = os.stat(name.partition(":")[2] if name.upper().startswith("FILE:") else name)
        except (OSError, ValueError, BitsError):
            return ""
        return f"{found.st_dev}:{found.st_ino}:{found.st_mtime_ns}:{found.st_size}"


class _Entry:
    """One credential's ticket. All but `asking` is guarded by the lock of `Tickets`."""

    def __init__(self) -> None:
        self.asking = threading.Lock()
        self.cache: Cache | None = None
        self.source: tuple[str, Lifetime] | None = None  # the cache that somebody else filled
        self.wanted = False  # a context was made since it was renewed
        self.tries_again = 0.0  # not before that moment, if it failed
        self._previous: Cache | None = None  # until the next renewal, because a context may be on its way to it
        self._closed = False

    @property
    def life(self) -> Lifetime | None:
        """Of the ticket that is used."""
        if self.cache is not None:
            return self.cache.life
        return None if self.source is None else self.source[1]

    @property
    def renew_at(self) -> float | None:
        """When it is time to renew the ticket; None: that is not possible."""
        when = None if self.life is None else self.life.renew_at
        return None if when is None else max(when, self.tries_again)

    def next_try(self, now: float) -> None:
        """A try begins: if it fails, there is another after a part of the time that is left."""
        left = 0.0 if self.life is None else self.life.ends - now
        self.tries_again = now + max(left * AGAIN, 1.0)

    @contextmanager
    def turn(self, wait: float) -> Iterator[bool]:
        """Whether it is ours to ask the KDC."""
        mine = self.asking.acquire(timeout=wait)
        try:
            yield mine
        finally:
            if mine:
                self.asking.release()

    def have(self) -> Cache:
        """The ticket, which was got a moment ago."""
        if self.cache is None:
            raise unable("the identity was closed")
        return self.cache

    def ended(self, now: float) -> bool:
        return self.life is not None and self.life.ends < now and not self.asking.locked()

    def replace(self, cache: Cache, now: float) -> None:
        if self._closed:  # forgotten while the KDC was asked
            cache.destroy()
            raise unable("the identity was closed")
        old, self._previous, self.cache = self._previous, self.cache, cache
        # Where the realm's clock is far behind ours, every ticket looks old: the KDC is not asked for one after the other.
        self.tries_again = now + (cache.life.ends - cache.life.starts) * PAUSE
        if old:
            old.destroy()

    def close(self) -> None:
        self._closed = True
        for cache in (self._previous, self.cache):
            if cache:
                cache.destroy()
        self._previous = self.cache = None


class Renewal(NamedTuple):
    """A ticket that can be renewed: from when on, the token whose it is, and whether it was used since it was got."""

    when: float
    holder: object
    used: bool
    entry: _Entry

    def begin(self, now: float) -> None:
        """There is a try now; if it fails, another after a part of the time that is left."""
        self.entry.next_try(now)


class Keeper(Protocol):
    """Who sees to it that tickets are renewed in time. Called in whatever thread asks for tickets."""

    def news(self) -> None:
        """`Tickets.renewals` says something else."""

    def worn(self, offer: Offer) -> None:
        """The ticket of this offer nears its end: `Tickets.refresh` is due."""


def _is_closed(holder: object) -> bool:
    return bool(getattr(holder, "closed", False))


def _mine(offer: Offer) -> tuple[_Holder, str]:
    return (None if offer.holder is None else weakref.ref(offer.holder), offer.fingerprint)


def expired(principal: str | None) -> TokenRequired:
    """Tickets that nobody here can replace are over: the identity is gone, as after a log-off."""
    who = show_text(principal or "this identity", 80)
    return TokenRequired(
        f"the Kerberos tickets of {who} have expired",
        identity=who,
        advice="get new tickets (kinit), set the helper token again, or set the helper token flags to NONE, then resume the job",
    )


def asks(offer: Offer) -> bool:
    """Whether the credential gets tickets by itself, as often as it needs."""
    return kind_of(credential_of(offer)) in _ASKS


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
