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
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from ..errors import ErrorCode, ErrorContext, InvalidArgument, make_error
from ..identity.tokens import is_own_cache

if TYPE_CHECKING:
    from ..identity.tokens import Token

MAX_USER_NAME: Final = 300  # BITS's own limits
MAX_PASSWORD: Final = 65535

_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
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
            if re.search(r"[\x00-\x20\x7f]", url):
                raise ValueError("characters that urlsplit would silently drop")
            parts = urlsplit(url)
            scheme, host, port = parts.scheme.lower(), parts.hostname, parts.port
            if not host or port == 0:
                raise ValueError("no host")
            return cls(scheme, _normal_host(host), port or _DEFAULT_PORTS[scheme])
        except (ValueError, KeyError):
            raise InvalidArgument("this is no absolute http or https URL", url=url) from None

    @property
    def needs_listing(self) -> bool:
        """Loopback or an IP literal: a local listener that wants tokens to relay looks like this."""
        return self.host == "localhost" or self.host.endswith((".localhost", ".localdomain")) or _is_literal(self.host)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}" + (f":{self.port}" if self.port != _DEFAULT_PORTS.get(self.scheme) else "")


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
    if not host or re.search(r"[\s%/?#@\\\[\]:]", host):
        raise ValueError("no host name")
    return host


def _is_literal(host: str) -> bool:
    """An IP address, also in the short forms that resolvers still read (127.1, 0x7f000001, 2130706433)."""
    if ":" in host:
        return True
    return re.fullmatch(r"(?:\d+|0x[0-9a-f]*)", host.rpartition(".")[2]) is not None


# -- what may be shown -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AuthCredentials:
    """Credentials for one target and scheme, as `set_credentials` takes them. None, None: the token's own (NEGOTIATE and NTLM
    only).

    Raises:
        InvalidArgument: exactly one of user name and password is None; BASIC or DIGEST without them; too long; control
        characters.
    """

    target: AuthTarget
    scheme: AuthScheme
    user_name: str | None
    password: str | None = field(repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.target, AuthTarget):
            raise _refused("target is no AuthTarget", ErrorCode.BG_E_INVALID_AUTH_TARGET)
        if not isinstance(self.scheme, AuthScheme):
            raise _refused("scheme is no AuthScheme", ErrorCode.BG_E_INVALID_AUTH_SCHEME)
        if (self.user_name is None) != (self.password is None):
            raise _refused("give both user name and password, or neither")
        if self.user_name is None or self.password is None:
            if self.scheme in (AuthScheme.BASIC, AuthScheme.DIGEST):
                raise _refused(f"{self.scheme.name} needs a user name and a password")
            return
        if len(self.user_name) > MAX_USER_NAME:
            raise _refused("the user name is too long", ErrorCode.BG_E_USERNAME_TOO_LARGE)
        if len(self.password) > MAX_PASSWORD:
            raise _refused("the password is too long", ErrorCode.BG_E_PASSWORD_TOO_LARGE)
        if not self.user_name or re.search(r"[\x00-\x1f\x7f]", self.user_name):
            raise _refused("the user name is empty or has control characters")
        if self.scheme is AuthScheme.BASIC and (":" in self.user_name or re.search(r"[\x00-\x1f\x7f]", self.password)):
            raise _refused("BASIC cannot carry a colon in the user name, nor control characters")


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

    @property
    def implicit(self) -> bool:
        """The token's own credentials."""
        return self.user_name is None


@dataclass(frozen=True, slots=True)
class AuthRules:
    """Decisions that weaken something, each off until asked for.

    Attributes:
        basic_over_http: BASIC may be sent over a hop that TLS does not protect.
        ntlm_in_negotiate: where Kerberos was meant and is not possible, NEGOTIATE may go on with NTLM.
    """

    basic_over_http: bool = False
    ntlm_in_negotiate: bool = False


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


def choose_offers(seat: Seat, origin: Origin, grants: Iterable[Grant], token: "Token") -> Offers:
    """What this peer may see of this token's and this job's credentials, strongest first; empty: nothing may go there."""
    chosen: list[Offer] = []
    withheld: list[str] = []
    for grant in sorted(grants, key=lambda grant: _STRONGEST_FIRST.index(grant.scheme)):
        offer = _decide(seat, origin, grant, token)
        if isinstance(offer, Offer):
            chosen.append(offer)
        elif offer:
            withheld.append(f"{grant.scheme.name}: {offer}")
    return Offers.of(chosen, withheld)


def _decide(seat: Seat, origin: Origin, grant: Grant, token: "Token") -> Offer | str:
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
    return _implicit(origin, grant, token)


def _implicit(origin: Origin, grant: Grant, token: "Token") -> Offer | str:
    process = token.local.is_process
    if grant.scheme not in (AuthScheme.NEGOTIATE, AuthScheme.NTLM):
        return "needs a user name and a password"
    credential: object | None = None
    if token.has_credentials:
        credential = token.network
        if why := _unfit(grant.scheme, credential, process):
            return why
    elif not process:
        return f"the token {token.name} has no network credentials"
    elif origin.needs_listing:
        return f"the process's own credentials are not sent to loopback and IP addresses ({origin.host})"
    return Offer(
        grant.scheme,
        credential,
        implicit=True,
        fingerprint=_fingerprint_of(credential),
        principal=token.principal,
        holder=token,
        process=process,
    )


def _unfit(scheme: AuthScheme, credential: object, process: bool) -> str:
    """Why this credential of the token's cannot be used in the scheme; "": it can."""
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
    return kind.upper() if colon and re.fullmatch(r"[A-Za-z0-9_]+", kind) else "FILE"


def _cache_name(credential: object) -> str:
    name: str = getattr(credential, "ccache", "")
    return name


def mechanisms(offer: Offer, rules: AuthRules) -> tuple[str, ...]:
    """What NEGOTIATE and NTLM mean for an offer, in the order to try: "kerberos", "ntlm".

    Kerberos is meant by tickets, keytabs, the process's own logon and names with a realm (alice@REALM); names of a domain
    (DOM\\alice) or without one can only be NTLM. Going on with NTLM where Kerberos was meant is a rule's decision, never
    silent.
    """
    if offer.scheme is AuthScheme.NTLM:
        return ("ntlm",)
    kind = CredentialKind.PASSWORD if offer.user_name is not None else kind_of(offer.credential)
    if kind in (CredentialKind.CACHE, CredentialKind.KEYTAB):
        return ("kerberos",)
    if kind is CredentialKind.HASH:
        return ("ntlm",)
    name = offer.user_name or getattr(offer.credential, "username", None) or ""
    if kind is CredentialKind.PASSWORD and ("\\" in name or not re.fullmatch(r"[^@]+@[^@]+", name)):
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
