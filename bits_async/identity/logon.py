"""How tokens are made: from the process, the user database, a network credential, a password, a service's right to act for others.

Here stands which credential a token may carry: only what the kernel guards by the thread's own identity is accepted for
another user (T4). The principal of a credential is what it claims; that of a logon was proved, where a key of ours could tell the
realm's own KDC from another (T7). Whoever comes from the network is nobody on this machine until `local_user` says who (T9). A
logon asks the KDC in a thread of the ambient identity, which is who may read the keytab it names (T27), and gives up at a deadline.
Who a token opens doors for is decided elsewhere.
"""

import dataclasses
import enum
import importlib.util
import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final, TypeVar, get_args

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
from . import access_tokens, kerberos, native
from .ambient import current_token
from .sessions import watch_sessions
from .threads import TokenExecutor, in_own_thread, prepare, wear, wearing
from .tokens import DelegationTarget, ImpersonationLevel, LocalIdentity, LocalUser, Token, is_own_cache

if TYPE_CHECKING:
    import spnego

    from .windows import TokenIdentity

T = TypeVar("T")

LOGON_DEADLINE: Final = 10.0  # seconds for all that one logon asks the KDC
PAM_DEADLINE: Final = 30.0  # seconds for PAM, whose modules may ask a network too

# Of the places for tickets and keys only files are guarded by the thread's fsuid. A cache in memory belongs to whoever in this process
# knows its name: only those count that the package made, whose names nobody guesses.
_GUARDED: Final = frozenset({"FILE", "WRFILE"})

_process: tuple[object, Token] | None = None


def for_process() -> Token:
    """The process's own token: one instance, until the process's ids change."""
    global _process
    if wearing() is not None:  # a token thread sees its own groups, not the process's
        if _process is None:
            raise ImpersonationFailed("the process's own token was not made before a thread of another identity asked for it")
        return _process[1]
    key = native.process_key()
    if _process is None or _process[0] != key:
        _process = key, Token._make(native.process_identity(), default_network=_default_credential)
    return _process[1]


def _default_credential() -> "spnego.CredentialCache":
    import spnego

    return spnego.CredentialCache()


async def for_user(user: str | int, network: "spnego.Credential | None") -> Token:
    """See `Token.for_user`."""
    if isinstance(user, bool) or not isinstance(user, str | int):
        raise TypeError(f"a user is a name or a uid, not {type(user).__name__}")
    credential = _own_copy(network)
    local = await in_own_thread(_find, user)
    if credential is not None and not local.is_process:
        _refuse_unguarded(credential, local.name)
    # Worn once before the token exists: what would fail at the first file fails here, and the principal is read by whom it
    # belongs to.
    principal = await wear(local, _principal, credential)
    return Token._make(local, network=_named(credential, principal), principal=principal)


async def for_session(session: str, network: "spnego.Credential | None") -> Token:
    """See `Token.for_session`."""
    if not isinstance(session, str):
        raise TypeError(f"a session is named by text, not {type(session).__name__}")
    if sys.platform == "win32":
        return await _session_token(session, network)
    async with watch_sessions() as sessions:
        try:
            user = await sessions.user_of(session)
        except LookupError as exc:
            message = f"nobody knows whose session {show_text(session, 80)} is: {exc}"
            raise ImpersonationFailed(message, advice="use Token.for_user() where no logind keeps sessions") from None
    if user is None:
        raise ImpersonationFailed(f"there is no session {show_text(session, 80)}", advice="look at the sessions with loginctl")
    token = await for_user(int(user.removeprefix("uid:")), network)
    return Token._make(token.local, network=token.network, principal=token.principal, session=session)


def _find(user: str | int) -> LocalIdentity:
    return _prepared(native.user_identity(user))


def _prepared(local: LocalIdentity) -> LocalIdentity:
    if not local.is_process:
        prepare()  # here, because it takes half a second and this thread is nobody else's
    return local


def for_network(network: "spnego.Credential") -> Token:
    """See `Token.for_network`."""
    credential = _own_copy(network)
    if credential is None:
        raise TypeError("for_network() takes a credential of spnego")
    local = for_process().local
    principal = _principal(credential)
    return Token._make(local, name=principal, network=_named(credential, principal), principal=principal)


# -- somebody of the network ------------------------------------------------------------------------------------------


class LogonType(enum.Enum):
    """LOGON32_LOGON: what a logon is for.

    On Windows they are LogonUser's, each with the right that it needs. On Linux they differ in two things only. NETWORK has no
    credentials for other machines, all others have. NEW_CREDENTIALS keeps the caller's local identity, and asks nobody, on Windows too:
    a wrong password shows when it is first used. All others leave who acts on this machine to the account: a local one is itself, a
    principal of a realm is nobody until `local_user` says who.
    """

    INTERACTIVE = 2
    NETWORK = 3
    BATCH = 4
    SERVICE = 5
    NETWORK_CLEARTEXT = 8
    NEW_CREDENTIALS = 9


@dataclasses.dataclass(frozen=True, slots=True)
class NetworkOnly:
    """Somebody who is nobody on this machine: no thread becomes him (T9)."""

    name: str
    key: str = "network"
    elevated: bool = False
    is_process: bool = False

    def assume(self) -> None:
        raise ImpersonationFailed(
            f"{self.name} is nobody on this machine",
            identity=self.name,
            advice="let the job's owner act on local files, or say with local_user= which user of this machine it is",
        )

    def check(self) -> None:
        self.assume()

    def fresh(self) -> "NetworkOnly":
        return self

    def close(self) -> None:
        pass


async def logon_user(
    user: str,
    password: str | None = None,
    *,
    domain: str | None = None,
    keytab: str | os.PathLike[str] | None = None,
    logon_type: LogonType = LogonType.INTERACTIVE,
    local_user: LocalUser | str | int | None = None,
    delegate_to: Iterable[DelegationTarget | str] = (),
) -> Token:
    """Logs a user on (LogonUser): checks the password or key, and makes a token of it.

    "alice@REALM", or `domain="REALM"`, is a principal of a Kerberos realm and goes to its KDC. A name alone, or with `domain="."`, is
    an account of this machine and goes to PAM (the rules of /etc/pam.d/bits-async, else those of "login"), in a process of its own; it
    has no credentials on the network. The process needs root's privileges to ask for others than itself.

    On Windows both go to LogonUser, DOMAIN\\alice too, and the token is the user's access token: it acts on local files as the user, and
    on the network with the logon's own credentials. `keytab` and `local_user` are refused there.

    Args:
        password: Kept in the token, where it has network credentials, to get tickets with. It is in no log, repr or error.
        keytab: With a password: keys of this machine, to verify the KDC's answer with, so that nobody who stands in for the KDC logs
            anyone on. Without it the machine's default keytab is used, if this identity can read it. A token whose answer could not
            be verified is not `proved`: it opens only jobs that were made with the same password. Without a password: the user's
            own keys to log on with. Keys that are read as another user, under `impersonate()`, prove nothing: he knows them.
        logon_type: See `LogonType`.
        local_user: Who a principal is on this machine; else nobody: the token acts on the network only. See `LocalUser`.
        delegate_to: Origins that may be handed a forwarded ticket, and act as this user wherever they like; the token's level is
            DELEGATE then. See `DelegationTarget`.

    Raises:
        LogonFailed: The code says why: ERROR_LOGON_FAILURE (wrong password or key), ERROR_NO_SUCH_USER, ERROR_PASSWORD_EXPIRED,
            ERROR_ACCOUNT_EXPIRED, ERROR_ACCOUNT_DISABLED, ERROR_ACCOUNT_LOCKED_OUT (or one of these two: not every KDC says which),
            ERROR_ACCOUNT_RESTRICTION (hours, machines, policy), ERROR_NO_LOGON_SERVERS (no KDC, or none that answers within 10
            seconds), ERROR_TIME_SKEW, ERROR_TRUSTED_RELATIONSHIP_FAILURE (the KDC is not the realm's own).
        ImpersonationFailed: The local user cannot be taken, or `local_user` is refused.
        InvalidArgument: The arguments do not go together.
    """
    request = _request_of(user, password, domain, keytab, logon_type)
    del password  # from here on in an object that does not show it
    targets = _targets(delegate_to)
    if logon_type is LogonType.NEW_CREDENTIALS:
        return _with_new_credentials(request, targets)
    if sys.platform == "win32":
        if local_user is not None:
            raise InvalidArgument("on Windows a logon says itself who the user is on this machine (local_user)")
        return await _windows_logon(request, logon_type, targets)
    if not request.realm:
        return await _local_logon(request)
    return await _domain_logon(request, logon_type, local_user, targets)


async def s4u_logon(
    user: str,
    *,
    service: "str | os.PathLike[str] | spnego.KerberosKeytab",
    local_user: LocalUser | str | int | None = None,
) -> Token:
    """A token for somebody whose password nobody here knows: by the right of a service to act for others (S4U, [MS-SFU]).

    Its level is IMPERSONATE when the KDC lets the service take the user elsewhere: it then gets tickets for those services that the
    realm's administrator has listed for it, and no others (constrained delegation with protocol transition). Otherwise it is
    IDENTIFY: it says who the user is, and every use of it fails. The ticket is not renewed: log the user on again before it ends,
    usually after ten hours.

    Args:
        user: "bob@REALM".
        service: The keytab of the service's own account; the first principal in it, or the one that a `spnego.KerberosKeytab` names.
        local_user: As in `logon_user`.

    Raises:
        LogonFailed: As in `logon_user`, for the user and for the service.
        ImpersonationFailed: `local_user` is refused.
    """
    _require_posix()
    caller = current_token()
    principal = _principal_in_realm(user)
    own = _keytab_of(service)
    evidence = await _at_the_kdc(caller, caller.local, principal, _stand_in, principal, own)
    level = ImpersonationLevel.IMPERSONATE if evidence.forwardable else ImpersonationLevel.IDENTIFY
    return await _ticketed(evidence.cache, caller, level, local_user, ())


async def from_delegated(context: object, local_user: LocalUser | str | int | None, delegate_to: Iterable[DelegationTarget | str]) -> Token:
    """See `Token.from_delegated`."""
    _require_posix()
    if not (hasattr(context, "delegated_creds") and hasattr(context, "initiator_name")):
        raise TypeError(f"a gssapi.SecurityContext is needed, not {type(context).__name__}")
    targets = _targets(delegate_to)
    caller = current_token()
    cache = await _at_the_kdc(caller, caller.security, None, _delegated, context)
    level = ImpersonationLevel.DELEGATE if targets else ImpersonationLevel.IMPERSONATE
    return await _ticketed(cache, caller, level, local_user, targets)


async def _ticketed(
    cache: kerberos.Cache,
    caller: Token,
    level: ImpersonationLevel,
    local_user: LocalUser | str | int | None,
    targets: tuple[DelegationTarget, ...],
) -> Token:
    """A token that lives on the tickets in a cache of ours, and destroys it in the end."""
    import spnego

    local = await _local_of(local_user, cache.principal)
    acts = level is not ImpersonationLevel.IDENTIFY
    return Token._make(
        local,
        name=cache.principal,
        network=spnego.KerberosCCache(cache.name, cache.principal) if acts else None,
        principal=cache.principal,
        proved=True,
        level=level,
        security=caller.security,
        delegates=targets,
        release=cache.destroy,
    )


# -- what was asked for


@dataclasses.dataclass(frozen=True, slots=True)
class _Request:
    """The arguments of a logon, checked. `credential` does not show its password."""

    name: str  # as the account's database knows it: "alice", "alice@REALM"
    realm: str
    credential: "spnego.Password | spnego.KerberosKeytab"
    verify_with: str | None

    @property
    def names_a_keytab(self) -> bool:
        """The caller did, to log on with or to verify with."""
        return self.verify_with is not None or not hasattr(self.credential, "password")


def _request_of(
    user: str, password: str | None, domain: str | None, keytab: str | os.PathLike[str] | None, logon_type: LogonType
) -> _Request:
    import spnego

    if not isinstance(logon_type, LogonType):
        raise InvalidArgument("logon_type is no LogonType")
    if password is None and keytab is None:
        raise InvalidArgument("a logon needs a password or a keytab")
    if sys.platform == "win32" and (keytab is not None or password is None):
        raise InvalidArgument("Windows logs on with passwords, not with keytabs")
    new = logon_type is LogonType.NEW_CREDENTIALS
    # LogonUser takes a domain by either of its names, but name@suffix with a suffix that the directory knows only.
    name, realm = _account(user, domain, anywhere=new or sys.platform == "win32", slash=sys.platform == "win32" and not new)
    if not realm and keytab is not None:
        raise InvalidArgument("an account of this machine has no keytab", advice="name the realm: alice@REALM")
    place = None if keytab is None else os.fspath(keytab)
    if password is None:
        return _Request(name, realm, spnego.KerberosKeytab(str(place), name), None)
    return _Request(name, realm, spnego.Password(name, password), place)


def _account(user: str, domain: str | None, *, anywhere: bool, slash: bool = False) -> tuple[str, str]:
    """The full name, and the realm in it ("": this machine, or a domain: `slash` writes DOMAIN\\user)."""
    name = _plain(user)
    if domain not in (None, "."):
        if "@" in name or "\\" in name:
            raise InvalidArgument("the user's name already has a domain in it")
        name = f"{_plain(domain)}\\{name}" if slash else f"{name}@{_plain(domain)}"
    if "\\" in name and not anywhere:
        raise InvalidArgument("DOMAIN\\user names no Kerberos realm", advice="write alice@REALM, or use LogonType.NEW_CREDENTIALS for NTLM")
    return name, name.rpartition("@")[2] if "@" in name else ""


def _principal_in_realm(user: str) -> str:
    name, realm = _account(user, None, anywhere=False)
    if not realm:
        raise InvalidArgument("a principal has a realm: bob@REALM")
    return name


def _keytab_of(service: "str | os.PathLike[str] | spnego.KerberosKeytab") -> "spnego.KerberosKeytab":
    import spnego

    return service if isinstance(service, spnego.KerberosKeytab) else spnego.KerberosKeytab(os.fspath(service))


def _targets(delegate_to: Iterable[DelegationTarget | str]) -> tuple[DelegationTarget, ...]:
    if isinstance(delegate_to, str):
        raise TypeError("delegate_to is a list of origins")
    return tuple(each if isinstance(each, DelegationTarget) else DelegationTarget(each) for each in delegate_to)


def _require_posix() -> None:
    if sys.platform == "win32":
        raise make_error(ErrorCode.E_NOTIMPL, ErrorContext.NONE, "this needs MIT Kerberos, on POSIX systems")


# -- access tokens of Windows -----------------------------------------------------------------------------------------


async def for_handle(handle: int, level: ImpersonationLevel) -> Token:
    """See `Token.for_handle`."""
    access_tokens.require_windows()
    if isinstance(handle, bool) or not isinstance(handle, int):
        raise TypeError(f"a handle is a number, not {type(handle).__name__}")
    if not isinstance(level, ImpersonationLevel) or level is ImpersonationLevel.ANONYMOUS:
        raise InvalidArgument("an access token is held at the levels IDENTIFY, IMPERSONATE or DELEGATE")
    local = await in_own_thread(access_tokens.by_handle, handle, level)
    return await _access_token(local, level)


def for_thread() -> Token | None:
    """See `Token.for_thread`."""
    access_tokens.require_windows()
    local = access_tokens.of_thread(ImpersonationLevel.IMPERSONATE)
    return None if local is None else _made_of(local, ImpersonationLevel.IMPERSONATE)


async def _session_token(session: str, network: "spnego.Credential | None") -> Token:
    if not session.isdecimal():
        raise ImpersonationFailed(f"there is no session {show_text(session, 80)}", advice="sessions of Windows have numbers")
    level = ImpersonationLevel.IMPERSONATE
    local = await in_own_thread(access_tokens.of_session, int(session), level)
    return await _access_token(local, level, network=_own_copy(network), session=session)


async def _access_token(
    local: "TokenIdentity",
    level: ImpersonationLevel,
    *,
    network: "spnego.Credential | None" = None,
    on_network: bool = True,
    session: str | None = None,
    delegates: tuple[DelegationTarget, ...] = (),
) -> Token:
    if level.value >= ImpersonationLevel.IMPERSONATE.value:
        await wear(await in_own_thread(_prepared, local), _nothing)  # what would fail at the first file fails here
    return _made_of(local, level, network=network, on_network=on_network, session=session, delegates=delegates)


def _made_of(
    local: "TokenIdentity",
    level: ImpersonationLevel,
    *,
    network: "spnego.Credential | None" = None,
    on_network: bool = True,
    session: str | None = None,
    delegates: tuple[DelegationTarget, ...] = (),
) -> Token:
    """`on_network`: the token's own logon session has credentials for the network. Windows vouches for who it is."""
    import spnego

    logged_on = network is None and on_network
    if logged_on:
        network = spnego.CredentialCache(local.name)  # the name is for people and fingerprints: SSPI goes by who the thread is
    return Token._make(local, network=network, proved=True, level=level, session=session, delegates=delegates, logged_on=logged_on)


async def _windows_logon(request: _Request, logon_type: LogonType, targets: tuple[DelegationTarget, ...]) -> Token:
    """LogonUser, as whoever asks: the machine's authority writes down who tried."""
    caller = current_token()
    level = ImpersonationLevel.DELEGATE if targets else ImpersonationLevel.IMPERSONATE
    executor = TokenExecutor(caller, threads=1, name="logon", local=caller.security)
    try:
        local = await executor.run_security(_ask_windows, request, logon_type, level, deadline=LOGON_DEADLINE)
    except TimeoutError:
        failure = LogonFailed("the domain did not answer in time", code=ErrorCode.ERROR_NO_LOGON_SERVERS, identity=show_text(request.name))
    else:
        return await _access_token(local, level, on_network=logon_type is not LogonType.NETWORK, delegates=targets)
    finally:
        await executor.aclose()
    raise failure


def _ask_windows(request: _Request, logon_type: LogonType, level: ImpersonationLevel) -> "TokenIdentity":
    """ "alice@REALM" is a name that LogonUser takes whole, DOM\\alice one that it takes in two; without either: this machine's."""
    domain, slash, user = request.name.rpartition("\\")
    place = domain if slash else None if request.realm else "."
    return access_tokens.by_logon(user, place, _password_of(request) or "", logon_type.value, level)


# -- by Kerberos


def _with_new_credentials(request: _Request, targets: tuple[DelegationTarget, ...]) -> Token:
    caller = current_token()
    if caller.level.value < ImpersonationLevel.IMPERSONATE.value:  # else it would act on this machine after all
        raise ImpersonationFailed(f"a token of level {caller.level.name} cannot act", identity=caller.name)
    level = ImpersonationLevel.DELEGATE if targets else caller.level
    return Token._make(caller.local, name=request.name, network=request.credential, principal=request.name, level=level, delegates=targets)


async def _domain_logon(
    request: _Request, logon_type: LogonType, local_user: LocalUser | str | int | None, targets: tuple[DelegationTarget, ...]
) -> Token:
    caller = current_token()
    local = caller.local if request.names_a_keytab else caller.security
    proved = await _at_the_kdc(caller, local, request.name, _prove, request, local.is_process)
    local = await _local_of(local_user, request.name)
    return Token._make(
        local,
        name=request.name,
        network=None if logon_type is LogonType.NETWORK else request.credential,
        principal=request.name,
        proved=proved,
        level=ImpersonationLevel.DELEGATE if targets else ImpersonationLevel.IMPERSONATE,
        security=caller.security,
        delegates=targets,
    )


async def _at_the_kdc(caller: Token, local: LocalIdentity, identity: str | None, func: Callable[..., T], *args: Any) -> T:
    """Runs it in a thread of the caller; whatever it raises comes out as ours.

    `local`: as whom on this machine. A file that the caller named is opened as himself, and by nobody where he is nobody here: else
    somebody from the network would log on with the keys of this process (T27).
    """
    executor = TokenExecutor(caller, threads=1, name="logon", local=local)
    try:
        return await executor.run_security(_explained, func, *args, deadline=LOGON_DEADLINE)
    except TimeoutError:
        failure: BitsError = LogonFailed("no KDC of the realm answered in time", code=ErrorCode.ERROR_NO_LOGON_SERVERS)
    except BitsError as exc:
        failure = exc
    finally:
        await executor.aclose()
    raise failure if identity is None else failure.located(identity=show_text(identity))


def _explained(func: Callable[..., T], *args: Any) -> T:
    kerberos.require_kerberos()
    return kerberos.translated(kerberos.explain_logon, func, *args)


def _prove(request: _Request, trusted: bool) -> bool:
    """Asks the KDC; whether it is certain that it was the realm's own.

    `trusted`: keys that are read here prove it. Those that another user than the process's can read do not: whoever knows a key, or has
    made one up, can stand in for the KDC (T7).
    """
    import spnego

    try:
        cache = _first_ticket(request.credential)
    except Exception as exc:
        credential = request.credential
        told = kerberos.why_revoked(credential) if isinstance(credential, spnego.Password) and kerberos.is_revoked(exc) else None
        if told is None:
            raise
        raise LogonFailed(told[0], code=told[1]) from scrub(exc)
    try:
        if abs(kerberos.clock_difference(cache)) > kerberos.CLOCK_SKEW:
            raise LogonFailed(kerberos.SKEW, code=ErrorCode.ERROR_TIME_SKEW)
        if isinstance(request.credential, spnego.KerberosKeytab):
            return trusted
        keytab = request.verify_with or kerberos.default_keytab()
        if keytab is not None:
            kerberos.verify(cache, keytab)
        return keytab is not None and trusted
    finally:
        cache.destroy()


def _first_ticket(credential: "spnego.Password | spnego.KerberosKeytab", *, forwardable: bool = False) -> kerberos.Cache:
    import spnego

    if isinstance(credential, spnego.KerberosKeytab):
        return kerberos.ticket_by_keytab(credential, forwardable=forwardable)
    return kerberos.ticket_by_password(credential, forwardable=forwardable)


def _stand_in(user: str, service: "spnego.KerberosKeytab") -> kerberos.Evidence:
    cache = _first_ticket(service, forwardable=True)
    try:
        return kerberos.act_for(user, cache)
    finally:
        cache.destroy()


def _delegated(context: Any) -> kerberos.Cache:
    """The tickets that came with an accepted login, in a cache of ours."""
    if context.locally_initiated or not context.complete:
        raise ImpersonationFailed("this is no login that was accepted", advice="pass the acceptor's own context, after its last step")
    client = str(context.initiator_name)
    if context.delegated_creds is None:
        raise ImpersonationFailed(
            "the client delegated nothing",
            identity=show_text(client),
            advice="let it ask for delegation and its realm trust this service, or allow the service's account constrained delegation",
        )
    cache = kerberos.keep(context.delegated_creds)
    if cache.principal != client:
        cache.destroy()
        raise ImpersonationFailed(
            f"the tickets are {show_text(cache.principal)}'s, but {show_text(client)} logged on", code=ErrorCode.SEC_E_WRONG_PRINCIPAL
        )
    return cache


# -- who that is on this machine


async def _local_of(local_user: LocalUser | str | int | None, principal: str) -> LocalIdentity:
    if local_user is None:
        return NetworkOnly(principal)
    mapping = local_user if isinstance(local_user, LocalUser) else LocalUser(local_user)
    local = await in_own_thread(_mapped, mapping, principal)
    await wear(local, _nothing)  # what would fail at the first file fails here
    return local


def _mapped(mapping: LocalUser, principal: str) -> LocalIdentity:
    """Blocks: asks the user database (T9)."""
    realm = principal.rpartition("@")[2]
    if realm not in (mapping.realms or {_default_realm()}):
        raise ImpersonationFailed(
            f"principals of the realm {show_text(realm)} are nobody on this machine",
            identity=show_text(principal),
            advice='name the realms whose principals may be users of it: LocalUser("alice", realms=frozenset({"REALM"}))',
        )
    local = native.user_identity(mapping.user)
    if native.is_system_account(local) and not mapping.system:
        raise ImpersonationFailed(
            f"{show_text(principal)} cannot be {local.name}, an account of the system",
            identity=show_text(principal),
            advice="map it to an ordinary user, or say LocalUser(..., system=True)",
        )
    return _prepared(local)


def _default_realm() -> str:
    import krb5

    return kerberos.text_of(krb5.get_default_realm(krb5.init_context()))


def _nothing() -> None:
    pass


# -- accounts of this machine -----------------------------------------------------------------------------------------

_PAM: Final = (pkgutil.get_data(__package__, "pam.py") or b"").decode()
_WHY_NOT: Final = {  # PAM's numbers (_pam_types.h)
    6: ("PAM does not permit it", ErrorCode.ERROR_ACCOUNT_RESTRICTION),
    7: ("the password is wrong", ErrorCode.ERROR_LOGON_FAILURE),
    10: ("this machine has no such user", ErrorCode.ERROR_NO_SUCH_USER),
    11: ("the account is locked: too many tries", ErrorCode.ERROR_ACCOUNT_LOCKED_OUT),
    12: ("the password has expired", ErrorCode.ERROR_PASSWORD_EXPIRED),
    13: ("the account has expired", ErrorCode.ERROR_ACCOUNT_EXPIRED),
}


async def _local_logon(request: _Request) -> Token:
    if failure := await in_own_thread(_ask_pam, request):
        raise failure
    return await for_user(request.name, None)


def _ask_pam(request: _Request) -> LogonFailed | None:
    """In a thread of its own; why not, or None."""
    name = show_text(request.name)
    found = importlib.util.find_spec("pam")
    if found is None or found.origin is None:
        return LogonFailed("PAM cannot be asked: python-pam is not installed", identity=name, advice="install bits-async[pam]")
    place = os.path.dirname(os.path.dirname(found.origin))
    try:
        told = json.loads(_converse(request, place))
        code, reason, locked = int(told["code"]), show_text(told["reason"], 200), told["locked"] is True
    except (OSError, LookupError, TypeError, ValueError):
        return LogonFailed("PAM did not answer", identity=name, advice="look at the system's log for what its modules say")
    if code == 0:
        return None
    if locked:
        return LogonFailed("the account is locked", code=ErrorCode.ERROR_ACCOUNT_LOCKED_OUT, identity=name)
    sentence, number = _WHY_NOT.get(code, (f"PAM says: {reason}", ErrorCode.ERROR_LOGON_FAILURE))
    return LogonFailed(sentence, code=number, identity=name)


def _converse(request: _Request, place: str) -> bytes:
    """Nothing leaves this frame but the answer: it holds the password."""
    command = [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c", _PAM]
    environment = {name: value for name in ("LD_LIBRARY_PATH",) if (value := os.environ.get(name)) is not None}
    with subprocess.Popen(  # noqa: S603 - the interpreter that runs this, and a text of ours
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        cwd="/",
        start_new_session=True,
    ) as process:
        try:
            question = {"user": request.name, "password": _password_of(request), "place": place}
            return process.communicate(json.dumps(question).encode(), PAM_DEADLINE)[0]
        except (subprocess.SubprocessError, OSError):
            return b""
        finally:
            process.kill()


def _password_of(request: _Request) -> str | None:
    return getattr(request.credential, "password", None)


# -- credentials ------------------------------------------------------------------------------------------------------


def _own_copy(credential: "spnego.Credential | None") -> "spnego.Credential | None":
    """A copy: spnego's credentials can be changed by whoever holds them, a token cannot."""
    if credential is None:
        return None
    import spnego

    if not isinstance(credential, get_args(spnego.Credential)):
        raise TypeError(f"network credentials are a credential of spnego, not {type(credential).__name__}")
    copy: spnego.Credential = dataclasses.replace(credential)
    return copy


def _named(credential: "spnego.Credential | None", principal: str | None) -> "spnego.Credential | None":
    """The credential with the principal that was read from it: whoever replaces the file does not replace the identity."""
    if credential is None:
        return None
    import spnego

    if isinstance(credential, spnego.KerberosCCache | spnego.KerberosKeytab):
        return dataclasses.replace(credential, principal=principal)
    return credential


def _refuse_unguarded(credential: "spnego.Credential", name: str) -> None:
    import spnego

    if isinstance(credential, spnego.CredentialCache):
        raise ImpersonationFailed(
            f"{name} cannot have the default credential cache: it is the process's, whoever the thread is",
            identity=name,
            advice="name a FILE: cache or a keytab of this user",
        )
    if isinstance(credential, spnego.KerberosCCache | spnego.KerberosKeytab):
        place = credential.ccache if isinstance(credential, spnego.KerberosCCache) else credential.keytab
        kind = _kind_of(place)
        if kind not in _GUARDED and not is_own_cache(place):
            raise ImpersonationFailed(
                f"{name} cannot have a {show_text(kind, 20)}: credential: only files are guarded by the thread's identity",
                identity=name,
                advice="name a FILE: cache or a keytab of this user",
            )


def _kind_of(place: str) -> str:
    """The type of a cache's or keytab's name, "FILE" when none is written."""
    kind, colon, _ = place.partition(":")
    return kind if colon and "/" not in kind else "FILE"


def _principal(credential: "spnego.Credential | None") -> str | None:
    """Who a credential claims to be. Runs as the identity that the credential is for, because it may read that user's files."""
    if credential is None:
        return None
    import spnego

    if isinstance(credential, spnego.KerberosCCache):
        return _plain(credential.principal or _read("the credential cache", credential.ccache, _principal_of_cache))
    if isinstance(credential, spnego.KerberosKeytab):
        return _plain(credential.principal or _read("the keytab", credential.keytab, _principal_of_keytab))
    if isinstance(credential, spnego.CredentialCache) and credential.username is None:
        return None  # whoever the process is
    return _plain(credential.username)


def _plain(principal: str | None) -> str:
    if not isinstance(principal, str) or not principal or show_text(principal, 1000) != principal:
        raise InvalidArgument("a credential needs a user name or principal, without control characters")
    return principal


def _read(what: str, place: str, reader: Callable[[str], str]) -> str:
    try:
        return reader(place)
    except ImportError as exc:
        raise ImpersonationFailed(f"cannot read whose {what} is", advice="install bits-async[kerberos], or name its principal") from scrub(
            exc
        )
    except Exception as exc:  # krb5's errors, which name the file and the reason
        raise ImpersonationFailed(
            f"cannot read whose {what} is: {show_text(str(exc))}", advice="check the file, or name its principal"
        ) from scrub(exc)


def _principal_of_cache(place: str) -> str:
    import krb5

    context = krb5.init_context()
    return _text(krb5.cc_get_principal(context, krb5.cc_resolve(context, place.encode())).name)


def _principal_of_keytab(place: str) -> str:
    import krb5

    context = krb5.init_context()
    entry = next(iter(krb5.kt_resolve(context, place.encode())))  # held: its principal is freed with it
    return _text(entry.principal.name)


def _text(name: bytes | None) -> str:
    return (name or b"").decode("utf-8", "replace")
