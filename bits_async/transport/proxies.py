"""Which proxy a URL is asked through: the job's settings, the environment's variables, and the route that follows from both.

Pure: the environment is a parameter, and nothing here resolves a name or opens a connection. Never knows a credential: user
information in an argument is refused, in a variable it is dropped. There is no silent direct connection: settings that cannot
be followed are an error.
"""

import enum
import ipaddress
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from ..errors import BitsError, ErrorCode, ErrorContext, InvalidArgument, make_error
from .answers import authority, parse_authority

MAX_LIST: Final = 32 * 1024
"""Characters of a proxy list, and of a bypass list (BITS's limit)."""

_SCHEMES: Final = ("http", "https")
_ENTRY: Final = re.compile(r"(?:https?=)?(?:([a-z][a-z0-9+.-]*)://)?([^/?#\\]*)/?", re.IGNORECASE)
_WANTED: Final = re.compile(r"(https?)=", re.IGNORECASE)
_SEPARATOR: Final = re.compile(r"[\s;]+")
_COMMA: Final = re.compile(r"[\s,]+")
_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_BEYOND_HOST: Final = re.compile(r"[/?#\\]")


class ProxyUsage(enum.Enum):
    """BG_JOB_PROXY_USAGE."""

    PRECONFIG = 0
    NO_PROXY = 1
    OVERRIDE = 2
    AUTODETECT = 3


@dataclass(frozen=True, slots=True)
class ProxySettings:
    """How a job finds its proxy. Made by `preconfig()`, `no_proxy()`, `autodetect()` and `override()`.

    Attributes:
        usage: the kind of settings.
        proxy_list: entries `[http=|https=][http://|https://]host[:port]`; of those that fit a URL's scheme the first is used.
        bypass: hosts that are asked directly: `host`, `*.suffix`, `.suffix`, an address, a network `10.0.0.0/8`, each with `:port` if
            wanted, `<local>` for names without a dot, `*` for all.
        resolved: PRECONFIG only: the lists are what the creating process's environment said.

    Raises:
        InvalidArgument: no ProxyUsage, a list that is no tuple of text, OVERRIDE without a proxy. (Entries are looked at by `override()`.)
    """

    usage: ProxyUsage
    proxy_list: tuple[str, ...] = ()
    bypass: tuple[str, ...] = ()
    resolved: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.usage, ProxyUsage):
            raise InvalidArgument(f"usage= takes a ProxyUsage, not {type(self.usage).__name__}; ProxySettings.override() names a proxy")
        for each in (self.proxy_list, self.bypass):
            if not isinstance(each, tuple) or not all(isinstance(entry, str) for entry in each):
                raise InvalidArgument("a proxy list, and a bypass list, is a tuple of text; ProxySettings.override() makes them")
        if self.usage is ProxyUsage.OVERRIDE and not self.proxy_list:
            raise InvalidArgument("the proxy list is empty; NO_PROXY is how to ask servers directly")

    @classmethod
    def preconfig(cls) -> "ProxySettings":
        """What `http_proxy`, `https_proxy`, `all_proxy` and `no_proxy` of this process say when the job is created."""
        return cls(ProxyUsage.PRECONFIG)

    @classmethod
    def no_proxy(cls) -> "ProxySettings":
        """Every server is asked directly."""
        return cls(ProxyUsage.NO_PROXY)

    @classmethod
    def autodetect(cls) -> "ProxySettings":
        """Automatic detection. Not supported yet: a job with it fails with BG_E_INVALID_PROXY_INFO."""
        return cls(ProxyUsage.AUTODETECT)

    @classmethod
    def override(cls, proxy_list: str | Sequence[str], bypass: str | Sequence[str] = ()) -> "ProxySettings":
        """These proxies; lists as sequences or as text with spaces between.

        Raises:
            InvalidArgument: no proxy, a malformed entry, user information in one, another kind of proxy, or a list that is too
            large.
        """
        proxies = _entries(proxy_list, ErrorCode.BG_E_PROXY_LIST_TOO_LARGE, "proxy")
        exceptions = _entries(bypass, ErrorCode.BG_E_PROXY_BYPASS_LIST_TOO_LARGE, "bypass")
        if not proxies:
            raise InvalidArgument("the proxy list is empty; NO_PROXY is how to ask servers directly")
        try:
            for entry in proxies:
                _parse_proxy(entry)
            for entry in exceptions:
                _parse_bypass(entry, suffixes=False)
        except ValueError as exc:
            raise InvalidArgument(str(exc)) from None
        return cls(ProxyUsage.OVERRIDE, proxies, exceptions)

    @classmethod
    def of(cls, value: "ProxySettings | str | None") -> "ProxySettings":
        """What a `proxy=` argument means: settings as they are, text as a proxy list, None as `preconfig()`."""
        if value is None:
            return cls.preconfig()
        if isinstance(value, str):
            return cls.override(value)
        if not isinstance(value, ProxySettings):
            raise InvalidArgument("a proxy must be ProxySettings, text or None")
        return value


def resolve(settings: ProxySettings, environment: Mapping[str, str]) -> ProxySettings:
    """The settings with the environment read into them, without its credentials; all but an unresolved PRECONFIG stay as is.

    Lower-case names win, also when they are empty (which means: no proxy for that scheme). `HTTP_PROXY` is ignored where
    REQUEST_METHOD
    is set: in a CGI program it is a header of the caller's choice (httpoxy). Values that cannot be followed are kept, so that
    the job that would use them fails and says so.

    Raises:
        InvalidArgument: a list that is too large.
    """
    if settings.usage is not ProxyUsage.PRECONFIG or settings.resolved:
        return settings
    variables = dict(environment.items())  # by exact name: the lookup of Windows' os.environ would take HTTP_PROXY for http_proxy
    if "REQUEST_METHOD" in variables:
        variables.pop("HTTP_PROXY", None)
    everything = _variable(variables, "all_proxy")
    proxies = tuple(
        f"{scheme}={_without_user(value)}" for scheme in _SCHEMES if (value := _variable(variables, f"{scheme}_proxy", default=everything))
    )
    exceptions = tuple(entry for entry in _COMMA.split(_variable(variables, "no_proxy") or "") if entry)
    _limit(proxies, ErrorCode.BG_E_PROXY_LIST_TOO_LARGE, "proxy")
    _limit(exceptions, ErrorCode.BG_E_PROXY_BYPASS_LIST_TOO_LARGE, "bypass")
    return ProxySettings(ProxyUsage.PRECONFIG, proxies, exceptions, resolved=True)


def route(settings: ProxySettings, url: str) -> str | None:
    """The proxy to ask for this URL, as `scheme://host:port`; None: ask its server directly.

    Loopback is no exception unless the bypass list says so.

    Raises:
        BitsError: BG_E_INVALID_PROXY_INFO: settings that cannot be followed.
    """
    if settings.usage is ProxyUsage.NO_PROXY:
        return None
    if settings.usage is ProxyUsage.AUTODETECT:
        raise _invalid("automatic proxy detection is not supported: name the proxy, or use NO_PROXY", url)
    if settings.usage is ProxyUsage.PRECONFIG and not settings.resolved:
        raise _invalid("the environment was not read when the job was created", url)
    host, port = authority(url)
    try:
        if _bypassed(settings, host.removesuffix("."), port):
            return None
        return next(_proxies_for(settings, url.partition(":")[0].lower()), None)
    except ValueError as exc:
        raise _invalid(str(exc), url) from None


# -- proxies ---------------------------------------------------------------------------------------------------------------------


def _proxies_for(settings: ProxySettings, scheme: str) -> Iterator[str]:
    for entry in settings.proxy_list:
        wanted = _WANTED.match(entry)
        if wanted is None or wanted[1].lower() == scheme:
            yield _parse_proxy(entry)


def _parse_proxy(entry: str) -> str:
    """The URL of the proxy itself.

    Raises:
        ValueError: with a text that repeats nothing of the entry, which may hold a password.
    """
    if "@" in entry:
        raise ValueError("user information is not allowed in a proxy's address; use set_credentials for the target PROXY")
    match = _ENTRY.fullmatch(entry)
    if match is None:
        raise ValueError("a proxy is written [http=|https=][http://|https://]host[:port]")
    scheme = (match[1] or "http").lower()
    if scheme not in _SCHEMES:
        raise ValueError("only http:// and https:// proxies are supported")
    try:
        host, port = parse_authority(match[2])
    except ValueError as exc:
        raise ValueError(f"not a proxy's address: {exc}") from None
    host = f"[{host}]" if ":" in host else host
    return f"{scheme}://{host}:{port or (443 if scheme == 'https' else 80)}"


# -- exceptions ------------------------------------------------------------------------------------------------------------------

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class _Bypass:
    """One entry of a bypass list, parsed."""

    port: int | None = None
    every: bool = False
    network: _Network | None = None
    local: bool = False  # names without a dot
    name: str | None = None  # this very name
    suffix: str | None = None  # names that end so

    def fits(self, host: str, port: int) -> bool:
        if self.port not in (None, port):
            return False
        address = _address(host)
        if self.every or address is not None:
            return self.every or (self.network is not None and address in self.network)
        return (self.local and "." not in host) or host == self.name or (self.suffix is not None and host.endswith(self.suffix))


def _bypassed(settings: ProxySettings, host: str, port: int) -> bool:
    lenient = settings.usage is ProxyUsage.PRECONFIG
    for entry in settings.bypass:
        try:
            if _parse_bypass(entry, suffixes=lenient).fits(host, port):
                return True
        except ValueError:
            if not lenient:  # in no_proxy every program skips what it does not understand
                raise
    return False


def _parse_bypass(entry: str, *, suffixes: bool) -> _Bypass:
    """`suffixes`: a bare name stands for the names below it too, as in `no_proxy`; BITS wants `*.name` for these.

    Raises:
        ValueError: with its reason.
    """
    if entry == "*":
        return _Bypass(every=True)
    if entry.lower() == "<local>":
        return _Bypass(local=True)
    network = _network(entry)
    if network is not None:
        return _Bypass(network=network)
    wildcard, name = entry.startswith("*"), entry.removeprefix("*")
    dotted = name.startswith(".")
    try:
        host, port = parse_authority(name.removeprefix("."))
    except ValueError as exc:
        raise ValueError(f"not an entry of a bypass list: {exc}") from None
    host = host.removesuffix(".")
    if wildcard:
        return _Bypass(port=port, suffix=f".{host}" if dotted else host)
    if _address(host) is not None:
        return _Bypass(port=port, network=_network(host))
    return _Bypass(port=port, name=host, suffix=f".{host}" if dotted or suffixes else None)


def _network(text: str) -> _Network | None:
    """An address or a network in CIDR form (host bits are ignored); a mapped IPv6 address counts as the IPv4 address in it."""
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        return None
    if isinstance(network, ipaddress.IPv6Network) and network.prefixlen >= 96 and network.network_address.ipv4_mapped is not None:
        return ipaddress.IPv4Network((int(network.network_address.ipv4_mapped), network.prefixlen - 96))
    return network


def _address(host: str) -> _Address | None:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


# -- texts -----------------------------------------------------------------------------------------------------------------------


def _entries(given: str | Sequence[str], too_large: ErrorCode, kind: str) -> tuple[str, ...]:
    pieces: Iterable[str] = [given] if isinstance(given, str) else given
    pieces = list(pieces)
    if not all(isinstance(piece, str) for piece in pieces):
        raise InvalidArgument(f"a {kind} list is text or a sequence of text")
    _limit(pieces, too_large, kind)
    return tuple(entry for piece in pieces for entry in _SEPARATOR.split(piece) if entry)


def _limit(entries: Sequence[str], too_large: ErrorCode, kind: str) -> None:
    if sum(len(entry) + 1 for entry in entries) - 1 > MAX_LIST:
        raise InvalidArgument(f"a {kind} list has at most {MAX_LIST} characters", code=too_large)


def _variable(variables: Mapping[str, str], name: str, *, default: str | None = None) -> str | None:
    for spelling in (name, name.upper()):
        if spelling in variables:
            return variables[spelling].strip()
    return default


def _without_user(value: str) -> str:
    """The variable's value up to the scheme and after the last `@`: whatever stands between may be a password.

    Where a slash comes before that `@` nobody can tell the host from the password, so nothing is kept and the route fails.
    """
    match = _SCHEME.match(value)
    scheme = match[0] if match else ""
    user, _, rest = value[len(scheme) :].rpartition("@")
    return scheme if _BEYOND_HOST.search(user) else scheme + rest


def _invalid(why: str, url: str) -> BitsError:
    return make_error(ErrorCode.BG_E_INVALID_PROXY_INFO, ErrorContext.GENERAL_TRANSPORT, why, url=url)
