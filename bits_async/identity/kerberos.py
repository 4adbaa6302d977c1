"""What a realm's KDC is asked, and what its answers mean: tickets, caches of our own, acting for others, words for what went wrong.

Tickets are kept in MEMORY: caches with random names that are made here alone and destroyed by whoever holds the `Cache` (T4).
Neither KRB5CCNAME nor KRB5_CONFIG is ever changed, and GSSAPI is never left to choose a credential by itself. Everything here
blocks, half a minute when a KDC is silent: it is meant for threads with a deadline. It knows neither HTTP nor who asks.
"""

import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from ..errors import AuthFailed, BitsError, ErrorCode, ErrorContext, LogonFailed, make_error, scrub, show_text
from . import ntstatus
from .tokens import OWN_CACHES

if TYPE_CHECKING:
    import spnego

T = TypeVar("T")

REPLACE_BEFORE: Final = 300.0  # seconds before a ticket's end (the clock skew that realms allow)
RENEW_AFTER: Final = 0.75  # of its life a renewable ticket is renewed
RENEWABLE_FOR: Final = 7 * 86400  # seconds that are asked for with a password; the realm says for how long at most
CLOCK_SKEW: Final = 300  # seconds that a realm's clock and this machine's may differ
TRIED_KEYS: Final = 4  # principals of a keytab that an answer is verified with, one after the other


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


# -- caches of our own -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Lifetime:
    """When a ticket was given, when it ends, and until when it can be renewed (0: it cannot). Seconds of the wall clock."""

    starts: float
    ends: float
    renewable_until: float

    @property
    def renew_at(self) -> float | None:
        """When it is time to renew it; None: that would bring nothing."""
        return self.starts + (self.ends - self.starts) * RENEW_AFTER if self.renewable_until > self.ends else None

    def worn(self, now: float) -> bool:
        """Near enough to its end to be replaced."""
        return now > self.ends - min(REPLACE_BEFORE, (self.ends - self.starts) / 10)


@dataclass(slots=True)
class Cache:
    """A cache of ours: its name, whose tickets are in it, and the handles that destroy it."""

    name: str
    principal: str
    life: Lifetime
    context: Any
    handle: Any

    def destroy(self) -> None:
        import krb5

        try:
            krb5.cc_destroy(self.context, self.handle)
        except Exception:
            pass  # gone already; there is nothing left that could leak


def new_name() -> str:
    """For a cache that nobody else can name."""
    return f"{OWN_CACHES}{secrets.token_hex(16)}"


def _kept(context: Any, ticket: Any) -> Cache:
    """A new cache with this ticket in it."""
    import krb5

    name = new_name()
    handle = krb5.cc_resolve(context, name.encode())
    krb5.cc_initialize(context, handle, ticket.client)
    krb5.cc_store_cred(context, handle, ticket)
    return Cache(name, text_of(ticket.client.name), _life(ticket), context, handle)


def _life(ticket: Any) -> Lifetime:
    times = ticket.times
    renewable = ticket.ticket_flags_raw & _RENEWABLE
    return Lifetime(times.starttime or times.authtime, times.endtime, times.renew_till if renewable else 0)


def _filled(name: str) -> Cache:
    """The cache of this name, which GSSAPI has filled."""
    import krb5

    context = krb5.init_context()
    handle = krb5.cc_resolve(context, name.encode())
    principal = handle.principal
    return Cache(name, text_of(principal.name if principal else None), _life_of(handle), context, handle)


def _life_of(handle: Any) -> Lifetime:
    """Of the ticket-granting ticket in a cache; of what ends first, where there is none (S4U)."""
    tickets = [ticket for ticket in handle if ticket.times.endtime]
    owner = text_of(handle.principal.name) if handle.principal else ""
    realm = owner.rpartition("@")[2]
    granting = [
        ticket
        for ticket in tickets
        if (text_of(ticket.client.name), text_of(ticket.server.name)) == (owner, f"krbtgt/{realm}@{realm}")  # not the service's (S4U)
    ]
    if granting:
        return _life(max(granting, key=lambda ticket: ticket.times.endtime))
    times = [ticket.times for ticket in tickets]
    return Lifetime(max((t.authtime for t in times), default=0), min((t.endtime for t in times), default=0), 0)


def text_of(raw: bytes | None) -> str:
    return (raw or b"").decode("utf-8", "replace")


# -- the first ticket ------------------------------------------------------------------------------------------------------------


def ticket_by_password(credential: "spnego.Password", *, forwardable: bool = False) -> Cache:
    """Ask the KDC with a password, and keep the answer in a new cache."""
    import krb5

    context = krb5.init_context()
    client = krb5.parse_name_flags(context, str(credential.username).encode())
    options = _options(context, forwardable)
    krb5.get_init_creds_opt_set_renew_life(options, RENEWABLE_FOR)
    ticket = krb5.get_init_creds_password(context, client, options, password=_encoded(credential))
    return _kept(context, ticket)


def _encoded(credential: "spnego.Password") -> bytes:
    """A password of random 16-bit units (a managed service account) may hold lone surrogates; Windows hashes them as U+FFFD."""
    return re.sub("[\ud800-\udfff]", "\ufffd", str(credential.password)).encode()


def why_revoked(credential: "spnego.Password") -> tuple[str, ErrorCode] | None:
    """What Active Directory has against an account that it refused as revoked; asks once more. None: it does not say."""
    status = ntstatus.ask(str(credential.username).encode(), _encoded(credential))
    return None if status is None else ntstatus.WHY.get(status)


def ticket_by_keytab(credential: "spnego.KerberosKeytab", *, forwardable: bool = False) -> Cache:
    """Ask the KDC with a key. Its answer is encrypted with that key, so only the realm's own KDC can give it."""
    import krb5

    context = krb5.init_context()
    keytab = krb5.kt_resolve(context, credential.keytab.encode())
    entries = list(keytab)  # before the KDC is asked: is there a keytab? An iteration left half-way would keep the file open
    if not entries:
        raise unable("the keytab is empty", advice="export the keytab again")
    wanted = credential.principal or text_of(entries[0].principal.name)  # lives no longer than its entry
    client = krb5.parse_name_flags(context, wanted.encode())
    ticket = krb5.get_init_creds_keytab(context, client, _options(context, forwardable), keytab=keytab)
    return _kept(context, ticket)


def _options(context: Any, forwardable: bool) -> Any:
    import krb5

    options = krb5.get_init_creds_opt_alloc(context)
    if forwardable:
        krb5.get_init_creds_opt_set_forwardable(options, True)
    return options


def look_into(name: str) -> tuple[str, Lifetime]:
    """Whose tickets are in a cache of this name, and how long they last. Nothing is asked of a KDC, and nothing written."""
    import krb5

    handle = krb5.cc_resolve(krb5.init_context(), name.encode())
    principal = handle.principal
    if principal is None:
        raise unable("there are no tickets in the cache", advice=KINIT)
    return text_of(principal.name), _life_of(handle)


def renew(name: str) -> Cache:
    """Have the KDC renew the ticket-granting ticket in the cache of this name (RFC 4120, 3.3): the new one in a new cache of ours.

    The cache itself stays as it is: whoever filled it renews it there when he likes. Neither password nor key is needed.
    """
    import krb5

    context = krb5.init_context()
    handle = krb5.cc_resolve(context, name.encode())
    return _kept(context, krb5.get_renewed_creds(context, krb5.cc_get_principal(context, handle), handle))


def clock_difference(cache: Cache) -> int:
    """Seconds by which the KDC that gave these tickets is ahead of this machine."""
    import krb5

    seconds, _ = krb5.get_time_offsets(cache.context)
    return int(seconds)


# -- was it the realm's own KDC? -------------------------------------------------------------------------------------------------


def default_keytab() -> str | None:
    """The machine's keytab; None where there is none that this identity can read, or nothing is in it."""
    import krb5

    context = krb5.init_context()
    try:
        keytab = krb5.kt_default(context)
        return krb5.kt_default_name(context).decode() if list(keytab) else None
    except krb5.Krb5Error:
        return None


def verify(cache: Cache, keytab: str) -> None:
    """Get a ticket for a principal of the keytab, and decrypt it with its key: whoever gave the ticket knows that key.

    Whatever else a KDC can say, a wrong one says it too: nothing but a ticket that the key opens is proof.

    Raises:
        LogonFailed: no principal of the keytab can be had a proper ticket for.
    """
    failures = []
    for principal in _services_of(keytab)[:TRIED_KEYS]:
        try:
            found = _present(cache, keytab, principal)
        except Exception as exc:
            failures.append(exc)
            if problem_of(exc).kind == _SILENT or problem_of(exc).logon == ErrorCode.ERROR_TIME_SKEW:
                raise
        else:
            if found == cache.principal:
                return
    raise LogonFailed(
        "the KDC's answer does not fit the keytab: it may not be the realm's own KDC, and nobody was logged on",
        code=ErrorCode.ERROR_TRUSTED_RELATIONSHIP_FAILURE,
        identity=show_text(cache.principal),
    ) from (scrub(failures[-1]) if failures else None)


def _services_of(keytab: str) -> list[str]:
    """The principals of a keytab, those of services first: a KDC gives no tickets for most users."""
    import krb5

    found = krb5.kt_resolve(krb5.init_context(), keytab.encode())
    names = dict.fromkeys(text_of(entry.principal.name) for entry in list(found))
    return sorted(names, key=lambda name: "/" not in name)


def _present(cache: Cache, keytab: str, service: str) -> str:
    """Log on to ourselves as that service; whom it saw."""
    import gssapi

    kerberos_name = gssapi.NameType.kerberos_principal
    client = gssapi.Credentials(usage="initiate", store={"ccache": cache.name})
    # No replay cache: this process asks itself, and the file of one could not be kept by a thread of another user.
    server = gssapi.Credentials(
        name=gssapi.Name(service, kerberos_name),
        usage="accept",
        store={"keytab": keytab, "rcache": "none:"},
        mechs=[gssapi.MechType.kerberos],
    )
    name = gssapi.Name(service, kerberos_name)
    asking = gssapi.SecurityContext(name=name, creds=client, usage="initiate", mech=gssapi.MechType.kerberos, flags=0)
    answering = gssapi.SecurityContext(creds=server, usage="accept")
    answering.step(asking.step())
    return str(answering.initiator_name)


# -- acting for others -----------------------------------------------------------------------------------------------------------


class Evidence(NamedTuple):
    """A service's right to act for a user: in a cache, and whether the KDC let it be used with other services."""

    cache: Cache
    forwardable: bool


def act_for(user: str, service: Cache) -> Evidence:
    """S4U2Self ([MS-SFU] 3.1.5.1.1): a ticket of this user for the service itself, without the user's password."""
    import gssapi

    kerberos_name = gssapi.NameType.kerberos_principal
    itself = gssapi.Credentials(usage="initiate", store={"ccache": service.name})
    theirs = itself.impersonate(gssapi.Name(user, kerberos_name), mechs=[gssapi.MechType.kerberos])
    cache = keep(theirs)
    tickets = [ticket for ticket in cache.handle if text_of(ticket.client.name) == cache.principal and ticket.times.endtime]
    return Evidence(cache, any(ticket.ticket_flags_raw & _FORWARDABLE for ticket in tickets))


_FORWARDABLE: Final = 0x40000000  # RFC 4120, 5.3: bit 1, counted from the left
_RENEWABLE: Final = 0x00800000  # bit 8


def keep(credentials: Any) -> Cache:
    """Credentials of GSSAPI (forwarded, or of S4U) in a cache of ours."""
    import gssapi

    name = new_name()
    credentials.store(store={"ccache": name}, usage="initiate", mech=gssapi.MechType.kerberos, overwrite=True)
    return _filled(name)


# -- what went wrong, in words ---------------------------------------------------------------------------------------------------

SKEW: Final = "the clocks of this machine and of the realm differ too much"
KINIT: Final = "renew the ticket cache (kinit), then resume the job"
_DENIED, _UNABLE, _SILENT, _POLICY = "denied", "unable", "silent", "policy"


class Problem(NamedTuple):
    """What a number of krb5 means: for a transfer, and for a logon."""

    kind: str
    sentence: str
    advice: str = ""
    logon: ErrorCode | None = None


_REVOKED: Final = -1765328366
_EXPIRED: Final = -1765328352
_WRONG: Final = Problem(_DENIED, "the KDC says that the password or key is wrong", "", ErrorCode.ERROR_LOGON_FAILURE)
_SKEW: Final = Problem(_UNABLE, SKEW, "set the clock", ErrorCode.ERROR_TIME_SKEW)
_PROBLEMS: Final[dict[int, Problem]] = {
    -1765328353: _WRONG,
    -1765328360: _WRONG,
    -1765328378: Problem(_DENIED, "the realm does not know this principal", "", ErrorCode.ERROR_NO_SUCH_USER),
    _REVOKED: Problem(
        _DENIED, "the account is disabled, locked or expired", "ask the realm's administrator", ErrorCode.ERROR_ACCOUNT_LOCKED_OUT
    ),
    -1765328361: Problem(
        _DENIED,
        "the password has expired",
        "change the password, set the credentials again, then resume the job",
        ErrorCode.ERROR_PASSWORD_EXPIRED,
    ),
    -1765328383: Problem(_DENIED, "the account has expired", "ask the realm's administrator", ErrorCode.ERROR_ACCOUNT_EXPIRED),
    -1765328372: Problem(_UNABLE, "the realm's policy forbids it", "ask the realm's administrator", ErrorCode.ERROR_ACCOUNT_RESTRICTION),
    -1765328371: Problem(_POLICY, "the realm does not let this account act for somebody else there"),
    -1765328228: Problem(_SILENT, "no KDC of the realm answers", "", ErrorCode.ERROR_NO_LOGON_SERVERS),
    -1765328164: Problem(_SILENT, "the name of the realm's KDC is not known", "", ErrorCode.ERROR_NO_LOGON_SERVERS),
    -1765328230: Problem(
        _UNABLE, "no KDC is configured for the realm", "check krb5.conf and the realm's DNS records", ErrorCode.ERROR_NO_LOGON_SERVERS
    ),
    -1765328160: Problem(_UNABLE, "there is no default realm", "name the principal with its realm, or set default_realm in krb5.conf"),
    -1765328377: Problem(_UNABLE, "the realm knows no such service", "use the host's full name in the URL, or register its HTTP service"),
    -1765328347: _SKEW,
    -1765328237: _SKEW,
    _EXPIRED: Problem(_UNABLE, "the tickets have expired", KINIT),
    -1765328243: Problem(_UNABLE, "there are no tickets in the cache", KINIT),
    -1765328189: Problem(_UNABLE, "there is no such ticket cache", KINIT),
    -1765328190: Problem(_UNABLE, "the ticket cache may not be read by this identity", "give the identity a cache of its own"),
    -1765328203: Problem(_UNABLE, "the keytab has no key for this principal", "export the keytab again"),
    2: Problem(_UNABLE, "the keytab or ticket cache does not exist"),
    13: Problem(_UNABLE, "the keytab or ticket cache may not be read by this identity", "give the identity a file of its own"),
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


def problem_of(exc: Exception) -> Problem:
    """What krb5, GSSAPI or pyspnego raised: by the number of the mechanism, where it has one."""
    base = getattr(exc, "base_error", None) or exc
    number = _number(exc)
    return _PROBLEMS.get(number) or Problem(_UNABLE, f"{type(base).__name__} {number or ''}".rstrip())


def _number(exc: Exception) -> int:
    base = getattr(exc, "base_error", None) or exc
    number: int = getattr(base, "err_code", None) or getattr(base, "min_code", None) or getattr(base, "errno", None) or 0
    return number - 2**32 if number >= 2**31 else number


def is_expired(exc: Exception) -> bool:
    """The tickets are over."""
    return _number(exc) == _EXPIRED


def is_revoked(exc: Exception) -> bool:
    """The KDC refused the account itself."""
    return getattr(exc, "err_code", None) == _REVOKED


def explain(exc: Exception) -> BitsError:
    """The error for what krb5, GSSAPI or pyspnego raised, in a transfer."""
    if getattr(getattr(exc, "base_error", None) or exc, "maj_code", None) == _BAD_BINDINGS:
        return AuthFailed("the peer's channel binding is wrong", code=ErrorCode.SEC_E_BAD_BINDINGS)
    problem = problem_of(exc)
    if problem.kind == _SILENT:
        return silent_kdc(problem.sentence)
    if problem.kind == _DENIED:
        return AuthFailed(problem.sentence, advice=problem.advice or None)
    if problem.kind == _POLICY:
        return AuthFailed(problem.sentence, code=ErrorCode.SEC_E_DELEGATION_POLICY)
    return unable(f"Kerberos is not possible: {problem.sentence}", advice=problem.advice or None)


_BAD_BINDINGS: Final = 0x40000


def explain_logon(exc: Exception) -> BitsError:
    """The same, for a logon."""
    problem = problem_of(exc)
    if problem.logon is not None:
        return LogonFailed(problem.sentence, code=problem.logon)
    return LogonFailed(f"Kerberos is not possible: {problem.sentence}", advice=problem.advice or None)
