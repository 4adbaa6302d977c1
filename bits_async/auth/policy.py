"""Which credentials may go where: a pure decision over values, made before a single byte is prepared.

A `Grant` is one stored permission of a job ("NEGOTIATE for the proxy, the token's own credentials, for these origins");
`choose_offers` turns the grants and the token into the `Offer`s that one peer may see, strongest first, and says why it left
others out. Credentials belong to origins (scheme, host, port; T19): a peer that no grant names sees nothing. This module asks
nobody, keeps no ticket and opens no file; it tells pyspnego's credentials apart by what they have, so that importing it does
not load pyspnego.
"""

import enum
import hashlib
import hmac
import ipaddress
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Final, final
from urllib.parse import SplitResult, urlsplit

from ..errors import ErrorCode, ErrorContext, InvalidArgument, make_error
from ..identity.tokens import is_own_cache

if TYPE_CHECKING:
    from ..identity.tokens import Token

MAX_USER_NAME: Final = 300  # BITS's own limits
MAX_PASSWORD: Final = 65535

_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
_DROPPED: Final = re.compile(r"[\x00-\x20\x7f]")  # by urlsplit, silently
_NO_HOST: Final = re.compile(r"[\s%/?#@\\\[\]:]")
_NUMBER: Final = re.compile(r"(?:\d+|0x[0-9a-f]*)")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")
_KIND: Final = re.compile(r"[A-Za-z0-9_]+")
_IN_REALM: Final = re.compile(r"[^@]+@[^@]+")
_PROCESS_KEY: Final = secrets.token_bytes(32)  # fingerprints that never leave the process need no stored key


class AuthTarget(enum.Enum):
    """BG_AUTH_TARGET."""

    SERVER = 1
    PROXY = 2


class AuthScheme(enum.Enum):
    """BG_AUTH_SCHEME, less PASSPORT."""

    BASIC = 1
    DIGEST = 2
    NTLM = 3
    NEGOTIATE = 4

    @property
    def word(self) -> str:
        """The scheme's name in a header, lower case."""
        return self.name.lower()


_STRONGEST_FIRST: Final = (AuthScheme.NEGOTIATE, AuthScheme.NTLM, AuthScheme.DIGEST, AuthScheme.BASIC)


class Seat(enum.Enum):
    """Whose challenge is answered. The seat is decided by the route of the request, then by the status (T25)."""

    ORIGIN = "origin"
    PROXY = "proxy"

    @property
    def status(self) -> int:
        return 401 if self is Seat.ORIGIN else 407

    @property
    def challenge_header(self) -> str:
        return "WWW-Authenticate" if self is Seat.ORIGIN else "Proxy-Authenticate"

    @property
    def answer_header(self) -> str:
        return "Authorization" if self is Seat.ORIGIN else "Proxy-Authorization"

    @property
    def info_header(self) -> str:
        return "Authentication-Info" if self is Seat.ORIGIN else "Proxy-Authentication-Info"

    @property
    def target(self) -> AuthTarget:
        return AuthTarget.SERVER if self is Seat.ORIGIN else AuthTarget.PROXY

    @property
    def noun(self) -> str:
        """How a message calls the peer."""
        return "the server" if self is Seat.ORIGIN else "the proxy"


# -- where -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, order=True)
class Origin:
    """Scheme, host and port, normalised: what credentials belong to."""

    scheme: str
    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> "Origin":
        """The origin of an absolute URL: lower case, IDNA, no trailing dot, the scheme's port where none is written.

        Raises:
            InvalidArgument: no scheme, no host, or a port or host name that cannot be.
        """
        try:
            if _DROPPED.search(url):
                raise ValueError("characters that urlsplit would silently drop")
            parts = urlsplit(url)
            return _origin(parts.scheme.lower(), parts.netloc.rpartition("@")[2])
        except (ValueError, KeyError):
            raise InvalidArgument("this is no absolute http or https URL", url=url) from None

    @property
    def needs_listing(self) -> bool:
        """Loopback or an IP literal: a local listener that wants tokens to relay looks like this."""
        return self.host == "localhost" or self.host.endswith((".localhost", ".localdomain")) or _is_literal(self.host)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}" + (f":{self.port}" if self.port != _DEFAULT_PORTS.get(self.scheme) else "")


@lru_cache(maxsize=256)  # many URLs have few origins
def _origin(scheme: str, where: str) -> Origin:
    parts = SplitResult(scheme, where, "", "", "")
    host, port = parts.hostname, parts.port
    if not host or port == 0:
        raise ValueError("no host")
    return Origin(scheme, _normal_host(host), port or _DEFAULT_PORTS[scheme])


def _normal_host(host: str) -> str:
    try:
        return ipaddress.ip_address(host).compressed
    except ValueError:
        pass
    host = host.lower()
    if not host.isascii():
        # As yarl writes the name that is connected to: another reading of "straße" would be another owner's host.
        import idna

        host = idna.encode(host, uts46=True).decode("ascii")
    host = host[:-1] if host.endswith(".") else host
    if not host or _NO_HOST.search(host):
        raise ValueError("no host name")
    return host


def _is_literal(host: str) -> bool:
    """An IP address, also in the short forms that resolvers still read (127.1, 0x7f000001, 2130706433)."""
    if ":" in host:
        return True
    return _NUMBER.fullmatch(host.rpartition(".")[2]) is not None


# -- what may be shown -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AuthCredentials:
    """Credentials for one target and scheme, as `set_credentials` takes them. None, None: the token's own (NEGOTIATE and NTLM only).

    Raises:
        InvalidArgument: exactly one of user name and password is None; BASIC or DIGEST without them; not text; too long; control
            characters.
    """

    target: AuthTarget
    scheme: AuthScheme
    user_name: str | None
    password: str | None = field(repr=False)

    def __post_init__(self) -> None:
        check_target_and_scheme(self.target, self.scheme)
        if (self.user_name is None) != (self.password is None):
            raise _refused("give both user name and password, or neither")
        if self.user_name is None or self.password is None:
            if self.scheme in (AuthScheme.BASIC, AuthScheme.DIGEST):
                raise _refused(f"{self.scheme.name} needs a user name and a password")
            return
        if not isinstance(self.user_name, str) or not isinstance(self.password, str):
            raise _refused("user name and password are text")
        if len(self.user_name) > MAX_USER_NAME:
            raise _refused("the user name is too long", ErrorCode.BG_E_USERNAME_TOO_LARGE)
        if len(self.password) > MAX_PASSWORD:
            raise _refused("the password is too long", ErrorCode.BG_E_PASSWORD_TOO_LARGE)
        if not self.user_name or _CONTROL.search(self.user_name):
            raise _refused("the user name is empty or has control characters")
        if self.scheme is AuthScheme.BASIC and (":" in self.user_name or _CONTROL.search(self.password)):
            raise _refused("BASIC cannot carry a colon in the user name, nor control characters")


def check_target_and_scheme(target: AuthTarget, scheme: AuthScheme) -> None:
    """Both are what they are named after.

    Raises:
        InvalidArgument: the target is not (BG_E_INVALID_AUTH_TARGET), the scheme is not (BG_E_INVALID_AUTH_SCHEME).
    """
    if not isinstance(target, AuthTarget):
        raise _refused("target is no AuthTarget", ErrorCode.BG_E_INVALID_AUTH_TARGET)
    if not isinstance(scheme, AuthScheme):
        raise _refused("scheme is no AuthScheme", ErrorCode.BG_E_INVALID_AUTH_SCHEME)


def _refused(message: str, code: int = ErrorCode.E_INVALIDARG) -> Exception:
    return make_error(code, ErrorContext.NONE, message)


@dataclass(frozen=True, slots=True)
class Grant:
    """One stored permission of a job: this credential may be shown to these origins (of proxies, when the target is PROXY)."""

    target: AuthTarget
    scheme: AuthScheme
    user_name: str | None
    password: str | None = field(repr=False)
    origins: frozenset[Origin] = frozenset()
    asked: bool = True  # the job did; else a rule makes it

    @property
    def implicit(self) -> bool:
        """The token's own credentials."""
        return self.user_name is None


class ImplicitCredentials(enum.IntEnum):
    """When a token's own credentials may answer a challenge: BITS's registry value UseLMCompat, with its numbers."""

    ON_ANY_CHALLENGE = 0
    IF_NTLMV2 = 1
    """BITS: if LmCompatibilityLevel is 2 or more. NTLMv1 is never spoken here, so it is as ON_ANY_CHALLENGE."""
    WHEN_SET = 2
    """Only after `set_credentials(target, scheme, None, None)`."""


class AutologonLevel(enum.Enum):
    """Whom a token's own credentials may be shown to (WinHTTP's autologon security levels)."""

    ANY_HOST = "low"
    INTRANET = "medium"
    NEVER = "high"


@final
class Hosts:
    """A list of peers, each entry normalised as origins are (case, IDNA, trailing dot).

    An entry is `host`, `.suffix` (the domain and all below it), an IP address, a network (`10.0.0.0/8`), or a service principal
    (`HTTP/host`: Kerberos only). A scheme before it (`https://host`) and a port behind it (`host:8443`) narrow it down.

    Raises:
        InvalidArgument: an entry is none of these.
    """

    __slots__ = ("_entries",)

    def __init__(self, entries: Iterable[str] = ()) -> None:
        if isinstance(entries, str):
            raise InvalidArgument("a list of hosts is a list, not one text")
        self._entries = frozenset(_Entry.read(each) for each in entries)

    def __contains__(self, origin: object) -> bool:
        return isinstance(origin, Origin) and any(each.covers(origin) for each in self._entries)

    def by_principal_only(self, origin: Origin) -> bool:
        """Every entry that covers it is a service principal."""
        return origin in self and all(each.principal for each in self._entries if each.covers(origin))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Hosts) and other._entries == self._entries

    def __hash__(self) -> int:
        return hash(self._entries)

    def __repr__(self) -> str:
        return f"Hosts({sorted(map(str, self._entries))})"


@dataclass(frozen=True, slots=True)
class _Entry:
    """One entry of `Hosts`."""

    host: str  # "" with `network`
    below: bool = False  # what is below it, too
    scheme: str | None = None
    port: int | None = None
    network: ipaddress.IPv4Network | ipaddress.IPv6Network | None = None
    principal: bool = False

    @classmethod
    def read(cls, text: str) -> "_Entry":
        try:
            if text.upper().startswith("HTTP/") and not text.lower().startswith(("http://", "https://")):
                return cls(_normal_host(text[5:].partition("@")[0]), principal=True)
            scheme, separator, rest = text.rpartition("://")
            if separator and scheme.lower() not in _DEFAULT_PORTS:
                raise ValueError("another scheme")
            narrowed = scheme.lower() or None
            if "/" in rest:
                return cls("", scheme=narrowed, network=ipaddress.ip_network(rest))
            if rest.count(":") > 1 and not rest.startswith("["):
                rest = f"[{rest}]"
            parts = urlsplit(f"//{rest}")
            if parts.username is not None or parts.path or parts.query or parts.fragment or not parts.hostname or parts.port == 0:
                raise ValueError("more than a host")
            below = parts.hostname.startswith((".", "*."))
            return cls(_normal_host(parts.hostname.lstrip("*").lstrip(".")), below, narrowed, parts.port)
        except (AttributeError, TypeError, ValueError):
            raise InvalidArgument(f"this is no entry of a list of hosts: {str(text)[:80]!r}") from None

    def covers(self, origin: Origin) -> bool:
        if (self.scheme or origin.scheme) != origin.scheme or (self.port or origin.port) != origin.port:
            return False
        if self.network is not None:
            address = _address(origin.host)
            return address is not None and address in self.network
        return origin.host == self.host or (self.below and origin.host.endswith(f".{self.host}"))

    def __str__(self) -> str:
        shown = str(self.network) if self.network else ("." if self.below else "") + self.host
        return ("HTTP/" if self.principal else f"{self.scheme}://" if self.scheme else "") + shown + (f":{self.port}" if self.port else "")


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


@dataclass(frozen=True, slots=True)
class AuthRules:
    """What may be shown to whom, whatever a job says. Each default is the strict one.

    Attributes:
        basic_over_http: at these targets BASIC may be sent over a hop that TLS does not protect.
        ntlm_in_negotiate: where Kerberos was meant and is not possible, NEGOTIATE may go on with NTLM.
        ntlm: only these peers are answered with NTLM; None: all. NTLMv1 is never spoken.
        ntlm_over_http: servers that are answered with NTLM although TLS does not protect the hop (proxies are, where `ntlm` has them).
        implicit: when a token's own credentials may answer.
        autologon: whom they may be shown to; None: any host where the job asks for it (`set_credentials` with None, None), the intranet
            where `implicit` does.
        intranet: the intranet. A name without a dot is not in it by itself.
        allow: they are shown to these peers only; None: to all that the other rules leave. Loopback and IP addresses must be listed here
            to be shown the process's own.

    Raises:
        InvalidArgument: a rule is of another kind than its attribute.
    """

    basic_over_http: frozenset[AuthTarget] = frozenset()
    ntlm_in_negotiate: bool = False
    ntlm: Hosts | None = None
    ntlm_over_http: Hosts = Hosts()  # noqa: RUF009 - a frozen value
    implicit: ImplicitCredentials = ImplicitCredentials.WHEN_SET
    autologon: AutologonLevel | None = None
    intranet: Hosts = Hosts()  # noqa: RUF009
    allow: Hosts | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.basic_over_http, frozenset) or not all(isinstance(each, AuthTarget) for each in self.basic_over_http):
            raise InvalidArgument("basic_over_http is a frozenset of AuthTarget")
        if not isinstance(self.ntlm_in_negotiate, bool):
            raise InvalidArgument(f"ntlm_in_negotiate is True or False, not {self.ntlm_in_negotiate!r}")
        kinds: tuple[tuple[str, type, bool], ...] = (
            ("ntlm", Hosts, True),
            ("ntlm_over_http", Hosts, False),
            ("implicit", ImplicitCredentials, False),
            ("autologon", AutologonLevel, True),
            ("intranet", Hosts, False),
            ("allow", Hosts, True),
        )
        for name, kind, optional in kinds:
            value = getattr(self, name)
            if not (isinstance(value, kind) or (optional and value is None)):  # a rule of another kind would keep nothing back
                raise InvalidArgument(f"{name} is {kind.__name__}{' or None' if optional else ''}, not {type(value).__name__}")

    def listed(self, origin: Origin) -> bool:
        """The peer stands in `allow`."""
        return self.allow is not None and origin in self.allow

    def no_ntlm(self, seat: Seat, origin: Origin) -> str:
        """Which rule keeps NTLM from this peer; "": none does."""
        if self.ntlm is not None and origin not in self.ntlm:
            return f"the rule ntlm does not list {origin}"
        if seat is Seat.ORIGIN and origin.scheme == "http" and origin not in self.ntlm_over_http:
            return f"the rule ntlm_over_http does not list {origin}"
        return ""

    def no_implicit(self, origin: Origin, *, asked: bool) -> str:
        """Which rule keeps a token's own credentials from this peer, for which the job asked or not; "": none does."""
        level = self.autologon or (AutologonLevel.ANY_HOST if asked else AutologonLevel.INTRANET)
        if level is AutologonLevel.NEVER:
            return "the rule autologon is NEVER"
        if level is AutologonLevel.INTRANET and origin not in self.intranet:
            return f"by the rule autologon they stay in the intranet, where {origin} is not"
        if self.allow is not None and origin not in self.allow:
            return f"the rule allow does not list {origin}"
        return ""


STRICT: Final = AuthRules()


class Delegation(enum.Enum):
    """Whether a peer is handed the ticket-granting ticket (T20)."""

    NEVER = "never"
    IF_TRUSTED = "if the realm marks its account as trusted for delegation"
    ALWAYS = "always"


@dataclass(frozen=True, slots=True)
class Offer:
    """One credential that one peer may see in one scheme.

    Attributes:
        credential: pyspnego's credential where the token brings its own; None: `user_name` and `password`, or, where these are
        None
            too, whatever the process itself is logged on with.
        implicit: the token's own, not given for this job.
        fingerprint: tells credentials apart within this process, whatever the scheme; no secret can be had from it.
        principal: the Kerberos principal the token claims to be, if it says one (T4).
        holder: what tickets got for this offer belong to: the token.
        process: the holder acts locally as the process itself.
        delegation: whether the peer is handed the holder's ticket-granting ticket.
        ntlm: NTLM may be spoken with this peer.
        guarded: not for a peer that turns out to be near (`is_near`): a local listener that wants tokens to relay.
    """

    scheme: AuthScheme
    credential: object | None = field(default=None, repr=False)
    user_name: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    implicit: bool = False
    fingerprint: str = field(default="", repr=False)
    principal: str | None = field(default=None, repr=False)
    holder: object | None = field(default=None, repr=False, compare=False)
    process: bool = field(default=True, repr=False)
    ntlm: bool = field(default=True, repr=False)
    guarded: bool = field(default=False, repr=False)
    delegation: Delegation = field(default=Delegation.NEVER, repr=False)

    @property
    def forwardable(self) -> bool:
        """The holder's tickets may be handed on somewhere, so they are asked for as such."""
        return bool(getattr(self.holder, "delegates", ()))

    @property
    def user(self) -> str | None:
        """The name the peer will see, where it is known beforehand."""
        known = self.user_name or self.principal or getattr(self.credential, "username", None)
        return known or getattr(self.credential, "principal", None)

    @property
    def who(self) -> str:
        """The same, for a message."""
        return self.user or "whoever it is logged on as"


class Offers(tuple[Offer, ...]):
    """The offers, strongest first, and in `withheld` one sentence for each grant that gave none."""

    withheld: tuple[str, ...] = ()

    @classmethod
    def of(cls, offers: Iterable[Offer], withheld: Iterable[str]) -> "Offers":
        self = cls(offers)
        self.withheld = tuple(dict.fromkeys(withheld))
        return self


def implied(rules: AuthRules, grants: Iterable[Grant], origins: Mapping[AuthTarget, frozenset[Origin]]) -> tuple[Grant, ...]:
    """What `AuthRules.implicit` adds to a job's grants: the token's own credentials at each target for which the job has set none."""
    if rules.implicit is ImplicitCredentials.WHEN_SET:
        return ()
    open_targets = set(AuthTarget) - {grant.target for grant in grants}
    schemes = (AuthScheme.NEGOTIATE, AuthScheme.NTLM)
    return tuple(
        Grant(target, scheme, None, None, origins[target], asked=False)
        for target in sorted(open_targets, key=lambda target: target.value)
        for scheme in schemes
    )


def is_near(peer: str, local: str) -> bool:
    """Whether a connection leads to this machine: the peer is a loopback or unspecified address, mapped into IPv6 or not, or the address
    that the connection comes from."""
    address = _address(peer.partition("%")[0])
    if address is None:
        return True  # no internet socket: whoever listens there is on this machine
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_unspecified or peer == local


def is_own_name(host: str, machine: str) -> bool:
    """Whether a host (normalised) is what this machine calls itself, with its domain or without."""
    own = machine.lower().rstrip(".")
    return bool(own) and host in (own, own.partition(".")[0])


def unseen(offers: Offers) -> Offers:
    """The offers for a server that a proxy connects to: which machine that is, nobody sees from here (T22).

    It may be this one, where somebody listens who wants logins to relay. NTLM names no server, so that whoever gets it can use it anywhere;
    a Kerberos ticket is for the host of the URL, and of no use to whoever does not have that host's key.
    """
    kept = [replace(offer, ntlm=False) if offer.guarded else offer for offer in offers if not _is_guarded_ntlm(offer)]
    reason = "the process's own are not sent through a proxy, which may lead to anybody, unless the rule allow lists the host"
    return Offers.of(kept, [*offers.withheld, *(f"{offer.scheme.name}: {reason}" for offer in offers if _is_guarded_ntlm(offer))])


def _is_guarded_ntlm(offer: Offer) -> bool:
    return offer.guarded and offer.scheme is AuthScheme.NTLM


def without_guarded(offers: Offers, peer: str) -> Offers:
    """The offers for a peer that turned out to be near."""
    kept = [offer for offer in offers if not offer.guarded]
    reason = f"the process's own credentials are not sent to this machine ({peer}) unless the rule allow lists the host"
    dropped = [f"{offer.scheme.name}: {reason}" for offer in offers if offer.guarded]
    return Offers.of(kept, [*offers.withheld, *dropped])


def choose_offers(seat: Seat, origin: Origin, grants: Iterable[Grant], token: "Token", rules: AuthRules = STRICT) -> Offers:
    """What this peer may see of this token's and this job's credentials, strongest first; empty: nothing may go there."""
    chosen: list[Offer] = []
    withheld: list[str] = []
    for grant in sorted(grants, key=lambda grant: _STRONGEST_FIRST.index(grant.scheme)):
        offer = _decide(seat, origin, grant, token, rules)
        if isinstance(offer, Offer):
            offer = _as_ruled(seat, origin, offer, rules)
        if isinstance(offer, Offer):
            chosen.append(replace(offer, delegation=_delegation(seat, origin, offer, token)))
        elif offer:
            withheld.append(f"{grant.scheme.name}: {offer}")
    return Offers.of(chosen, withheld)


def _delegation(seat: Seat, origin: Origin, offer: Offer, token: "Token") -> Delegation:
    """T20: only who is on the token's own list, over TLS, and never a proxy. Being asked means nothing."""
    if not offer.implicit or seat is not Seat.ORIGIN or origin.scheme != "https" or token.level.name != "DELEGATE":
        return Delegation.NEVER
    listed = [target for target in token.delegates if Origin.of(target.url) == origin]
    if not listed:
        return Delegation.NEVER
    return Delegation.IF_TRUSTED if all(target.ok_as_delegate_only for target in listed) else Delegation.ALWAYS


def without_delegation(offers: Offers) -> Offers:
    """The offers for a peer that was reached by a redirect, or whose certificate was not verified (T20)."""
    return Offers.of((replace(offer, delegation=Delegation.NEVER) for offer in offers), offers.withheld)


def _as_ruled(seat: Seat, origin: Origin, offer: Offer, rules: AuthRules) -> Offer | str:
    """The offer as the rules leave it, or which of them withholds it."""
    if offer.scheme not in (AuthScheme.NTLM, AuthScheme.NEGOTIATE):
        return offer
    why = rules.no_ntlm(seat, origin)
    if not why and offer.implicit and rules.allow is not None and rules.allow.by_principal_only(origin):
        why = f"the rule allow lists {origin} by its service principal, which is for Kerberos"
    offer = replace(offer, ntlm=not why)
    return offer if mechanisms(offer, rules) else why


def _decide(seat: Seat, origin: Origin, grant: Grant, token: "Token", rules: AuthRules) -> Offer | str:
    """The offer a grant makes, or why it makes none ("": it is about somebody else)."""
    if grant.target is not seat.target:
        return ""
    if origin not in grant.origins:
        return f"the credentials were given for other hosts than {origin}"
    if token.level.name in ("ANONYMOUS", "IDENTIFY"):
        return f"a token of level {token.level.name} must not act on the network"
    if not grant.implicit:
        return Offer(
            grant.scheme,
            user_name=grant.user_name,
            password=grant.password,
            fingerprint=account_fingerprint(grant.user_name, grant.password),
            holder=token,
            process=token.local.is_process,
        )
    return _implicit(origin, grant, token, rules)


def _implicit(origin: Origin, grant: Grant, token: "Token", rules: AuthRules) -> Offer | str:
    process = token.local.is_process
    if grant.scheme not in (AuthScheme.NEGOTIATE, AuthScheme.NTLM):
        return "needs a user name and a password"
    if why := rules.no_implicit(origin, asked=grant.asked):
        return f"the token's own credentials are not sent: {why}"
    credential: object | None = None
    if token.has_credentials:
        credential = token.network
        if why := _unfit(grant.scheme, credential, process or token.logged_on):
            return why
    elif not process:
        return f"the token {token.name} has no network credentials"
    # Not built by the caller from a credential for somebody: whoever listens near by would get what the user is logged on with (T22).
    lent = token.logged_on or (process and kind_of(credential) is CredentialKind.AMBIENT)
    if lent and origin.needs_listing and not rules.listed(origin):
        whose = "the token's" if token.logged_on else "the process's own"
        return f"{whose} credentials are not sent to loopback and IP addresses unless the rule allow lists them ({origin.host})"
    return Offer(
        grant.scheme,
        credential,
        guarded=lent and not rules.listed(origin),
        implicit=True,
        fingerprint=_fingerprint_of(credential),
        principal=token.principal,
        holder=token,
        process=process,
    )


def _unfit(scheme: AuthScheme, credential: object, process: bool) -> str:
    """Why this credential of the token's cannot be used in the scheme; "": it can. `process`: threads of the token are logged on."""
    kind = kind_of(credential)
    if kind is CredentialKind.AMBIENT and not process:
        return "only the process's own token may use the credentials it is logged on with"
    if scheme is AuthScheme.NTLM and kind in (CredentialKind.CACHE, CredentialKind.KEYTAB):
        return "the token's credential is a Kerberos one"
    if kind is CredentialKind.CACHE and not process and cache_type(credential) != "FILE" and not is_own_cache(_cache_name(credential)):
        return "only FILE: ticket caches are guarded by the token's user id"  # T4
    return ""


# -- telling credentials apart ---------------------------------------------------------------------------------------------------


class CredentialKind(enum.Enum):
    """What a credential of pyspnego is."""

    PASSWORD = "password"  # noqa: S105 - a kind, not a password
    HASH = "NTLM hash"
    CACHE = "ticket cache"
    KEYTAB = "keytab"
    AMBIENT = "whatever the process is logged on with"


def kind_of(credential: object | None) -> CredentialKind:
    """The kind, by the attribute that only this kind has."""
    for attribute, kind in (
        ("ccache", CredentialKind.CACHE),
        ("keytab", CredentialKind.KEYTAB),
        ("nt_hash", CredentialKind.HASH),
        ("password", CredentialKind.PASSWORD),
    ):
        if hasattr(credential, attribute):
            return kind
    return CredentialKind.AMBIENT


def cache_type(credential: object) -> str:
    """FILE, MEMORY, KCM, ... of a KerberosCCache; a name without a type is a file."""
    kind, colon, _ = _cache_name(credential).partition(":")
    return kind.upper() if colon and _KIND.fullmatch(kind) else "FILE"


def _cache_name(credential: object) -> str:
    name: str = getattr(credential, "ccache", "")
    return name


def mechanisms(offer: Offer, rules: AuthRules) -> tuple[str, ...]:
    """What NEGOTIATE and NTLM mean for an offer, in the order to try: "kerberos", "ntlm".

    Kerberos is meant by tickets, keytabs, the process's own logon and names with a realm (alice@REALM); names of a domain
    (DOM\\alice) or without one can only be NTLM. Going on with NTLM where Kerberos was meant is a rule's decision, never
    silent.
    """
    return tuple(each for each in _mechanisms(offer, rules) if each != "ntlm" or offer.ntlm)


def _mechanisms(offer: Offer, rules: AuthRules) -> tuple[str, ...]:
    if offer.scheme is AuthScheme.NTLM:
        return ("ntlm",)
    kind = CredentialKind.PASSWORD if offer.user_name is not None else kind_of(offer.credential)
    if kind in (CredentialKind.CACHE, CredentialKind.KEYTAB):
        return ("kerberos",)
    if kind is CredentialKind.HASH:
        return ("ntlm",)
    name = offer.user_name or getattr(offer.credential, "username", None) or ""
    if kind is CredentialKind.PASSWORD and ("\\" in name or not _IN_REALM.fullmatch(name)):
        return ("ntlm",)
    return ("kerberos", "ntlm") if rules.ntlm_in_negotiate else ("kerberos",)


def credential_fingerprint(credential: object, key: bytes) -> str:
    """A keyed fingerprint: equal for equal credentials, worth nothing without the key (T7).

    Takes a credential of pyspnego, an `AuthCredentials`, a `Grant`, an `Offer`, or any nesting of tuples and text.
    """
    mac = hmac.new(key, digestmod=hashlib.sha256)
    for piece in _pieces(credential):
        mac.update(len(piece).to_bytes(8, "big") + piece)
    return mac.hexdigest()


def account_fingerprint(user_name: str | None, password: str | None) -> str:
    """The fingerprint that `Offer` and `Refusals` use for a user name and password, whatever scheme and job they are for."""
    return credential_fingerprint(("account", user_name, password), _PROCESS_KEY)


def _fingerprint_of(credential: object | None) -> str:
    if kind_of(credential) is CredentialKind.PASSWORD:
        return account_fingerprint(getattr(credential, "username", None), getattr(credential, "password", None))
    return credential_fingerprint(credential, _PROCESS_KEY)


def _pieces(value: object) -> Iterable[bytes]:
    """The value as a prefix-free row of byte strings: every piece says its type, every group its size."""
    if is_dataclass(value) and not isinstance(value, type):
        named = [(item.name, getattr(value, item.name)) for item in fields(value) if item.name != "holder"]
        yield f"{type(value).__name__}:{len(named)}".encode()
        for name, item in named:
            yield name.encode()
            yield from _pieces(item)
    elif isinstance(value, tuple | list):
        yield f"tuple:{len(value)}".encode()
        for item in value:
            yield from _pieces(item)
    elif isinstance(value, frozenset | set):
        yield from _pieces(sorted(value))
    elif isinstance(value, enum.Enum):
        yield f"enum:{type(value).__name__}.{value.name}".encode()
    elif isinstance(value, bytes):
        yield b"bytes:" + value
    elif isinstance(value, str):
        yield b"str:" + value.encode("utf-8", "surrogatepass")
    elif value is None or isinstance(value, bool | int | float):
        yield repr(value).encode()
    else:
        raise TypeError(f"{type(value).__name__} has no fingerprint")


# -- what was refused ------------------------------------------------------------------------------------------------------------


class Refusals:
    """What peers refused: not offered to them again, by any job, until it is replaced (T26: account lockout).

    A refusal is remembered with the revision of the credential (the state of its file, where it has one), so that a renewed
    keytab or ticket cache is a new credential. Shared by all lanes of a manager; also read and written by token threads, one
    dictionary operation at a time.
    """

    LIMIT: Final = 4096  # entries; the oldest goes first

    def __init__(self) -> None:
        self._refused: dict[tuple[str, str, Seat | None], str] = {}

    def add(self, fingerprint: str, realm: str, seat: Seat | None, revision: str = "") -> None:
        """Remember that the peer refused it. `seat` None: a KDC did."""
        self._refused.pop((fingerprint, realm, seat), None)
        self._refused[fingerprint, realm, seat] = revision
        while len(self._refused) > self.LIMIT:
            self._refused.pop(next(iter(self._refused)), None)

    def revision(self, fingerprint: str, realm: str, seat: Seat | None) -> str | None:
        """The revision that was refused; None: nothing was."""
        return self._refused.get((fingerprint, realm, seat))

    def refused(self, fingerprint: str, realm: str, seat: Seat | None, revision: str = "") -> bool:
        """Whether this very revision was refused there."""
        return self.revision(fingerprint, realm, seat) == revision

    def forget(self, fingerprint: str | None = None) -> None:
        """The credential was set anew, or its owner asks for another try. None: all of them."""
        for key in list(self._refused):
            if fingerprint is None or key[0] == fingerprint:
                self._refused.pop(key, None)
