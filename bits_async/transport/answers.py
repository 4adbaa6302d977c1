"""What may be asked of a server, and what its answer is worth: accept it, start the file anew, go elsewhere, or refuse.

Pure: values in, a `Verdict` out. Knows no connection, no retry and no local file, and never sees a byte of a body. `judge` is
the one place where status and headers become a decision; an answer that is not proved to be the bytes that were asked for, of
the version that was asked for, is never accepted. The first half of the module is about URLs: what a job may name, and where a
redirect leads.
"""

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import Enum, auto
from functools import lru_cache
from typing import Final, NamedTuple, Protocol
from urllib.parse import quote

from ..errors import BitsError, ErrorCode, ErrorContext, InvalidArgument, error_from_status, make_error
from .digests import NO_DIGESTS, Digests, parse_digests, parse_legacy_digests
from .ranges import ENTITY_TAG, ContentRange, Unsatisfied, Validator, http_date, parse_content_range, range_header

MAX_URL: Final = 2200
"""Characters of a URL that a job names (BITS's limit)."""

MAX_LOCATION: Final = 16 * 1024
"""Characters of a URL that a redirect names: signed ones are longer than what people write."""

MAX_RETRY_AFTER: Final = 86400.0
"""Seconds a server may ask us to stay away."""

CLOCK_SKEW: Final = 60.0
"""Seconds by which the clocks of a server and of its files may differ."""

MAX_MEDIA_TYPE: Final = 127
"""Characters of a media type that are kept (RFC 6838, 4.2, for each half of it)."""

# -- what may be asked -----------------------------------------------------------------------------------------------------------

_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_URL: Final = re.compile(r"(?:([A-Za-z][A-Za-z0-9+.-]*):)?(?://([^/?#]*))?([^?#]*)(\?[^#]*)?(?:#.*)?", re.DOTALL)
_AUTHORITY: Final = re.compile(r"(\[[^\[\]]*\]|[^:@\[\]]*)(?::([0-9]{0,5}))?")
_LABEL: Final = re.compile(r"[A-Za-z0-9_-]{1,63}")
_NUMBER: Final = re.compile(r"[0-9]+|0[xX][0-9A-Fa-f]*")
_NOT_ASCII: Final = re.compile(r"[^\x00-\x7f]+")
_LENGTH: Final = re.compile(r"[0-9]{1,18}")
_PAGES: Final = ("text/html", "application/xhtml+xml")
_DEFAULT_PORT: Final = {"http": 80, "https": 443}


class _Url(NamedTuple):
    scheme: str  # lower case
    authority: str  # as it was written
    host: str  # for a resolver: ASCII, lower case, an IPv6 literal without brackets
    port: int
    path: str
    query: str  # with its question mark, or empty


def check_url(url: str) -> str:
    """The URL as it will be asked for: as it stands, without its fragment.

    A host outside ASCII becomes IDNA, other text outside ASCII its UTF-8 escapes.

    Raises:
        InvalidArgument: not an absolute http or https URL, with user information, with spaces or control characters, or too long.
    """
    if not isinstance(url, str):
        raise InvalidArgument("a URL must be text")
    if len(url) > MAX_URL:
        raise InvalidArgument(f"a URL has at most {MAX_URL} characters", code=ErrorCode.BG_E_STRING_TOO_LONG)
    try:
        if " " in url:
            raise ValueError("a space in it must be written %20")
        return _as_asked(url)
    except ValueError as exc:
        raise InvalidArgument(f"not a URL that can be fetched: {exc}", url=url) from None


def authority(url: str) -> tuple[str, int]:
    """Host and port to connect to, rebuilt from what was parsed: IDNA, lower case, an IPv6 literal without brackets.

    Raises:
        InvalidArgument: the URL is not one that `check_url` lets pass.
    """
    try:
        parts = _split(url)
    except ValueError as exc:
        raise InvalidArgument(f"not a URL that can be fetched: {exc}", url=url) from None
    return parts.host, parts.port


def connect_target(url: str) -> str:
    """The request target of a CONNECT to this URL's server. Nothing of the URL's text gets into it unparsed (T23)."""
    host, port = authority(url)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def request_targets(url: str) -> tuple[str, str]:
    """(absolute form, origin form) of the target of a request for a URL as `check_url` gives it (RFC 9112, 3.2)."""
    slash = url.find("/", len("https://"))
    return (url, url[slash:]) if slash >= 0 else (f"{url}/", "/")


def resolve_location(base: str, location: str) -> str:
    """The URL that a redirect from `base` leads to (RFC 3986, 5.2); escapes stay as they stand, spaces and raw UTF-8 are escaped.

    Raises:
        BitsError: empty, malformed, too long, with control characters or user information, or not http.
    """
    try:
        location = location.strip(" \t")
        if not location or len(location) > MAX_LOCATION:
            raise ValueError("its length is not allowed")
        return _as_asked(_join(base, location.replace(" ", "%20")))
    except ValueError as exc:
        raise make_error(
            ErrorCode.ERROR_WINHTTP_REDIRECT_FAILED,
            ErrorContext.REMOTE_FILE,
            f"the server redirects to a place that cannot be asked: {exc}",
            url=base,
        ) from None


def downgrades(base: str, target: str) -> bool:
    """Whether going from `base` to `target` gives up TLS."""
    return base[:6].lower() == "https:" and target[:6].lower() != "https:"


@lru_cache(maxsize=256)  # many URLs have few hosts
def parse_authority(text: str) -> tuple[str, int | None]:
    """`host[:port]` -> (host as `authority` gives it, port or None).

    Numbers that only a resolver would take for an address (`0x7f.1`, `2130706433`) are refused: rules about hosts could not see
    through them (T22).

    Raises:
        ValueError: with the reason as its text.
    """
    match = _AUTHORITY.fullmatch(text)
    if match is None:
        raise ValueError("user information is not allowed in it" if "@" in text else "its host and port are malformed")
    host, port = match[1], match[2]
    if port and not 0 < int(port) < 65536:
        raise ValueError("its port is out of range")
    return _host(host), int(port) if port else None


def _host(text: str) -> str:
    if text.startswith("["):
        return _ipv6(text[1:-1])
    host = (text if text.isascii() else _idna(text)).lower()
    name = host.removesuffix(".")
    labels = name.split(".")
    if not name or len(name) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError("its host is missing or malformed")
    if not _NUMBER.fullmatch(labels[-1]):
        return host
    try:
        return str(ipaddress.IPv4Address(name))
    except ValueError:
        raise ValueError("its host is neither a name nor an IPv4 address in the usual form") from None


def _ipv6(text: str) -> str:
    try:
        address = ipaddress.IPv6Address(text)
    except ValueError:
        raise ValueError("its host is not an IPv6 address") from None
    if address.scope_id is not None:
        raise ValueError("an IPv6 address with a zone is not allowed in it")
    return str(address)


def _idna(text: str) -> str:
    import idna  # what yarl uses too; loaded only for the few names that need it

    try:
        return idna.encode(text, uts46=True).decode("ascii")
    except UnicodeError:
        raise ValueError("its host is not a valid international name") from None


def _split(url: str) -> _Url:
    if _CONTROL.search(url):
        raise ValueError("control characters are not allowed in it")
    match = _URL.fullmatch(url)
    scheme = (match[1] or "").lower() if match else ""
    if match is None or scheme not in _DEFAULT_PORT:
        raise ValueError("only http:// and https:// are supported")
    host, port = parse_authority(match[2] or "")
    return _Url(scheme, match[2], host, port or _DEFAULT_PORT[scheme], match[3], match[4] or "")


def _as_asked(url: str) -> str:
    parts = _split(url)
    where = parts.authority
    if not where.isascii():
        explicit = ":" in where
        where = f"{parts.host}:{parts.port}" if explicit else parts.host
    path = parts.path or ("/" if parts.query else "")
    if url.isascii():
        return f"{parts.scheme}://{where}{path}{parts.query}"
    return f"{parts.scheme}://{where}{_NOT_ASCII.sub(_escape, path)}{_NOT_ASCII.sub(_escape, parts.query)}"


def _escape(match: re.Match[str]) -> str:
    return quote(match[0].encode("utf-8", "surrogateescape"))  # header bytes that were not UTF-8 come as surrogates and stay the same bytes


def _join(base: str, reference: str) -> str:
    """RFC 3986, 5.2.2; `urllib.parse.urljoin` drops an empty query and rewrites what is absolute already."""
    ours, theirs = _split(base), _URL.fullmatch(reference)
    if theirs is None:
        raise ValueError("it is malformed")
    scheme, where, path, query = theirs[1], theirs[2], theirs[3], theirs[4] or ""
    if scheme is not None:
        return reference
    if where is not None:
        return f"{ours.scheme}://{where}{path}{query}"
    if not path:
        return f"{ours.scheme}://{ours.authority}{ours.path}{query or ours.query}"
    if not path.startswith("/"):
        path = (ours.path.rpartition("/")[0] + "/" if ours.path else "/") + path
    return f"{ours.scheme}://{ours.authority}{_without_dots(path)}{query}"


def _without_dots(path: str) -> str:
    """RFC 3986, 5.2.4, for a path that begins with a slash."""
    kept: list[str] = []
    segments = path.split("/")[1:]
    for number, segment in enumerate(segments):
        last = number == len(segments) - 1
        if segment == ".." and kept:
            kept.pop()
        if segment not in (".", ".."):
            kept.append(segment)
        elif last:
            kept.append("")
    return "/" + "/".join(kept)


# -- question and answer ---------------------------------------------------------------------------------------------------------


class Headers(Protocol):
    """Header fields of an answer: names in any case, several values for a name (`multidict.CIMultiDictProxy` is one)."""

    def get(self, key: str, /) -> str | None: ...
    def getall(self, key: str, default: list[str], /) -> list[str]: ...


RawHeaders = tuple[tuple[bytes, bytes], ...]
"""Names and values of an answer's fields, as they came."""


class HeaderFields:
    """The plain implementation of `Headers`, from pairs in the order they came."""

    __slots__ = ("_pairs",)

    def __init__(self, pairs: Iterable[tuple[str, str]] = ()) -> None:
        self._pairs = tuple((name.lower(), value) for name, value in pairs)

    def get(self, key: str, /) -> str | None:
        return next(iter(self.getall(key, [])), None)

    def items(self) -> tuple[tuple[str, str], ...]:
        """Every field, its name in lower case."""
        return self._pairs

    def getall(self, key: str, default: list[str], /) -> list[str]:
        return [value for name, value in self._pairs if name == key.lower()] or default


class Condition(Enum):
    """What `If-Range` says. Some servers answer 200 to the best one though nothing has changed; then a weaker one is asked."""

    VERSION = auto()  # the strong ETag, else Last-Modified
    DATE = auto()  # Last-Modified
    NONE = auto()  # no If-Range: the answer's own fields prove the version, and the bytes where it joins

    def weaker(self, pinned: Validator | None) -> "Condition | None":
        """The next one to try; None: there is none."""
        if self is Condition.VERSION and pinned is not None and pinned.strong and pinned.modified:
            return Condition.DATE
        return None if self is Condition.NONE else Condition.NONE


@dataclass(frozen=True, slots=True)
class Asked:
    """One GET for [start, end) of a file; (0, None) asks for the whole file without a Range header.

    Attributes:
        url: where it is asked now (after redirects).
        start, end: absolute positions; end None: to the end of the file.
        pinned: the version the bytes must be of; None: any.
        part: exactly these bytes are wanted, and not those before them: any version will do while none is pinned, and the whole file
            is no answer.
        dynamic: the file is made when it is asked for: it need not tell where it ends.
        condition: what `If-Range` says of the pinned version.
        past_caches: what a cache on the way has is not wanted: it may be where wrong bytes came from.
    """

    url: str
    start: int = 0
    end: int | None = None
    pinned: Validator | None = None
    part: bool = False
    dynamic: bool = False
    condition: Condition = Condition.VERSION
    past_caches: bool = False

    @property
    def ranged(self) -> bool:
        """Whether the request carries a Range header."""
        return self.start > 0 or self.end is not None

    @property
    def goes_on(self) -> bool:
        """Whether bytes of a version were fetched before."""
        return self.pinned is not None or (self.start > 0 and not self.part)

    def headers(self) -> dict[str, str]:
        """What the request needs of headers besides logins: identity coding, the range, `If-Range` for a pinned version."""
        fields = {"Accept-Encoding": "identity"}
        if self.ranged:
            fields["Range"] = range_header(self.start, self.end)
            version = self._if_range()
            if version is not None:
                fields["If-Range"] = version
        if self.past_caches:
            fields["Cache-Control"] = "no-cache"
        return fields

    def _if_range(self) -> str | None:
        if self.pinned is None or self.condition is Condition.NONE:
            return None
        return self.pinned.if_range() if self.condition is Condition.VERSION else self.pinned.last_modified

    def at(self, url: str) -> "Asked":
        """The same question, asked elsewhere: an ETag means something for its own resource only, so there it pins nothing."""
        if url == self.url:
            return self
        return replace(self, url=url, pinned=None if self.pinned is None else self.pinned.at_another_url())


@dataclass(frozen=True, slots=True)
class Answer:
    """The head of an answer."""

    status: int
    headers: Headers
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Accept:
    """The body is what was asked for.

    Attributes:
        start: position of its first byte.
        length: bytes of the body; None: its framing tells (chunked). Without a range (`ranged` False) it may reach beyond
        `Asked.end`,
            with one it may stop before: the server may send less than was asked for.
        total: size of the file, None while unknown.
        validator: of the version served; where it is the pinned one, with all that is known of that.
        ranged: the server serves ranges (206).
        content: digests of the body itself, where it is a part (those of the whole file are in the validator).
    """

    start: int
    length: int | None
    total: int | None
    validator: Validator
    ranged: bool
    content: Digests = NO_DIGESTS


@dataclass(frozen=True, slots=True)
class Restart:
    """What was fetched so far cannot be continued; the file is to be fetched anew from its first byte.

    Attributes:
        reason: for people.
        validator: of the version the server has now, where the answer says so.
        changed: there is evidence of another version. False: the server cannot continue this one (no ranges, nothing pins it).
        same: it is proved to be the very same version: asked by a weaker condition, the server may continue it after all.
    """

    reason: str
    validator: Validator | None
    changed: bool = True
    same: bool = False


@dataclass(frozen=True, slots=True)
class Complete:
    """There is nothing left to fetch: the file has `total` bytes, and all before `Asked.start` were fetched."""

    total: int


@dataclass(frozen=True, slots=True)
class Redirect:
    """The file is elsewhere. `location` is absolute and fit to be asked; `downgrade`: it gives up TLS."""

    location: str
    downgrade: bool = False
    status: int = field(default=302, compare=False)


@dataclass(frozen=True, slots=True)
class Challenged:
    """The seat with this status (401 the server, 407 the proxy) wants a login."""

    seat_status: int


@dataclass(frozen=True, slots=True)
class Refuse:
    """The answer is an error. `error.transient`: waiting may help; `error.retry_after`: for so long, says the server."""

    error: BitsError


Verdict = Accept | Restart | Complete | Redirect | Challenged | Refuse


class FileChanged(Exception):
    """Control flow, not an error: the file must be fetched anew (a `Restart` on its way up)."""

    def __init__(self, validator: Validator | None, reason: str, *, changed: bool = True, same: bool = False) -> None:
        super().__init__(reason)
        self.validator = validator
        self.reason = reason
        self.changed = changed
        self.same = same


class AlreadyComplete(Exception):
    """Control flow, not an error: nothing is left to fetch (a `Complete` on its way up)."""

    def __init__(self, total: int) -> None:
        super().__init__(f"all {total} bytes were fetched before")
        self.total = total


class Redirected(Exception):
    """Control flow: the server redirects, and the job does not follow. `location` is where to, `error` what becomes of the attempt."""

    def __init__(self, location: str, error: BitsError) -> None:
        super().__init__("redirected")
        self.location = location
        self.error = error


# -- the judge -------------------------------------------------------------------------------------------------------------------


class _Broken(Exception):
    """The answer breaks HTTP, or means nothing to a download."""

    def __init__(self, why: str, code: int = ErrorCode.BG_E_INVALID_SERVER_RESPONSE) -> None:
        super().__init__(why)
        self.code = code


def judge(asked: Asked, answer: Answer, *, now: float | None = None) -> Verdict:
    """What to do with this answer to that question.

    `now` (seconds since the epoch) is needed only for a Retry-After that is a date in an answer without a date of its own.
    A `Restart` is never the verdict where there is nothing to drop (start 0, nothing pinned).
    """
    try:
        length, framed = _framing(answer.headers)
        match answer.status:
            case 200:
                return _judge_whole(asked, answer, length, framed)
            case 206:
                return _judge_part(asked, answer, length)
            case 301 | 302 | 303 | 307 | 308:
                return _judge_redirect(asked, answer)
            case 401 | 407:
                return Challenged(answer.status)
            case 412 if asked.goes_on:
                return Restart("the server has another version (412)", None)
            case 416:
                return _judge_unsatisfied(asked, answer)
            case status if status == 202 or 300 <= status < 600:  # 202: not there yet, later perhaps
                return Refuse(_error(asked, answer, now))
            case status:
                raise _Broken(f"an answer with status {status} brings no file")
    except _Broken as exc:
        context = ErrorContext.GENERAL_TRANSPORT if answer.status == 407 else ErrorContext.REMOTE_FILE
        return Refuse(make_error(exc.code, context, f"cannot use the answer: {exc}", url=asked.url, http_status=answer.status))


def _judge_whole(asked: Asked, answer: Answer, length: int | None, framed: bool) -> Verdict:
    """200: the whole file, good from offset 0 only; it is never appended."""
    _require_identity(answer.headers)
    served = _described(answer.headers, length, whole=True)
    if _is_web_page_instead(asked, served):
        return Refuse(_no_file(asked))
    version = _same_version(asked, served)
    if isinstance(version, Restart):
        return version
    if asked.start > 0 and asked.pinned is not None and asked.condition.weaker(version) and _may_know_ranges(answer.headers):
        return Restart("the server sent the whole file though it has not changed", version, changed=False, same=True)
    if asked.part and asked.ranged and (asked.start > 0 or length is None or (asked.end is not None and asked.end < length)):
        raise _Broken("the server sends the whole file in place of a range", ErrorCode.BG_E_INSUFFICIENT_RANGE_SUPPORT)
    if asked.start > 0:
        return Restart("the server sent the whole file in place of the rest", version, changed=False)
    _require_whole(answer.headers)
    if not framed and not asked.dynamic:
        raise _Broken("nothing in it says where the file ends", ErrorCode.BG_E_MISSING_FILE_SIZE)
    return Accept(0, length, version.size, version, ranged=False)


def _may_know_ranges(headers: Headers) -> bool:
    return (_once(headers, "Accept-Ranges") or "").lower() != "none"


def _is_web_page_instead(asked: Asked, served: Validator) -> bool:
    """A login page, or an error meant for people, in place of a file that was something else before: no version of it."""
    pinned = asked.pinned
    if pinned is None or pinned.media_type is None or pinned.media_type in _PAGES or served.media_type not in _PAGES:
        return False
    return not pinned.agrees(served)


def _no_file(asked: Asked) -> BitsError:
    message = "a web page came in place of the file; perhaps somebody on the way wants a login"
    return make_error(
        ErrorCode.BG_E_INVALID_SERVER_RESPONSE, ErrorContext.REMOTE_FILE, message, url=asked.url, http_status=200, transient=True
    )


def _judge_part(asked: Asked, answer: Answer, length: int | None) -> Verdict:
    """206: exactly one range, from where it was asked, of the pinned version."""
    _require_identity(answer.headers)
    if (answer.headers.get("Content-Type") or "").strip().lower().startswith("multipart/byteranges"):
        raise _Broken("it has several parts, asked was one range")
    part = _content_range(answer.headers)
    if not isinstance(part, ContentRange):
        raise _Broken("a 206 without the range it brings")
    if part.start != asked.start:
        raise _Broken(f"it begins at byte {part.start}, asked was {asked.start}")
    version = _same_version(asked, _described(answer.headers, part.total, whole=False))
    if isinstance(version, Restart):
        return version
    if version.size is None:
        if asked.goes_on and asked.start > 0:
            return Restart("the server does not tell the size of the file", version, changed=False)
        raise _Broken("it is a part of a file whose size is not told", ErrorCode.BG_E_MISSING_FILE_SIZE)
    if part.end > version.size or (asked.end is not None and part.end > asked.end):
        raise _Broken(f"it ends at byte {part.end}, beyond what was asked for")
    if length is not None and length != part.end - part.start:
        raise _Broken("its length is not that of its range")
    content = parse_digests(answer.headers.getall("Content-Digest", []))
    return Accept(part.start, part.end - part.start, version.size, version, ranged=True, content=content)


def _judge_unsatisfied(asked: Asked, answer: Answer) -> Verdict:
    """416: complete, when the file is proved to end where we stopped; else another file, or a server without sense."""
    if asked.part and not asked.goes_on:
        raise _Broken("the file ends before the range begins", ErrorCode.BG_E_INVALID_RANGE)
    end = _content_range(answer.headers, needed=False)
    total = end.total if isinstance(end, Unsatisfied) else None
    served = validator_of(answer.headers, total)
    if total is not None and total == asked.start and not asked.part and _ends_here(asked, served):
        return Complete(total)
    if asked.start == 0 and asked.pinned is None:
        return Refuse(_error(asked, answer, None))
    return Restart("the server has no byte where this file goes on (416)", None)  # the fields of a 416 describe its own text


def _judge_redirect(asked: Asked, answer: Answer) -> Verdict:
    try:
        target = resolve_location(asked.url, _only(answer.headers, "Location") or "")
    except BitsError as exc:
        return Refuse(make_error(exc.code, exc.context, exc.message, url=asked.url, http_status=answer.status))
    return Redirect(target, downgrades(asked.url, target), answer.status)


# -- what the judge looks at -----------------------------------------------------------------------------------------------------


def _same_version(asked: Asked, served: Validator) -> Validator | Restart:
    """The served version; completed by what was pinned where it is proved the same, a Restart where it is not but should be."""
    pinned = asked.pinned
    if pinned is not None and pinned.resumable:
        if not pinned.agrees(served):
            return Restart("the file has changed on the server, or nothing proves that it has not", served)
        return Validator(
            served.etag or pinned.etag,
            served.last_modified or pinned.last_modified,
            pinned.size if served.size is None else served.size,
            pinned.digests.joined(served.digests),
            pinned.media_type or served.media_type,
        )
    if pinned is not None and pinned.contradicts(served):
        return Restart("the file has changed on the server", served)
    if asked.start > 0 and asked.goes_on:
        return Restart("nothing proves that this is still the same file", served, changed=False)
    return served


def _ends_here(asked: Asked, served: Validator) -> bool:
    """Whether a file that ends at `asked.start` is the one the bytes before it came from (a 416 seldom names its version)."""
    pinned = asked.pinned
    if asked.start == 0:
        return pinned is None or not pinned.contradicts(served)
    if pinned is None or pinned.contradicts(served):
        return False
    return pinned.size is not None or pinned.agrees(served)


def validator_of(headers: Headers, size: int | None) -> Validator:
    """What pins the version that this answer brings; fields that are malformed, empty or given twice pin nothing.

    A Last-Modified without a strong ETag beside it counts only when the answer's Date is a second later or more (RFC 9110,
    8.8.2.2): a file written in this very second may be written again in it and keep its date. A date far in the future was set
    by somebody and not by a clock; it counts. An ETag that is nothing but that date and the size, as nginx makes them, is worth no
    more than these: while they are fresh it is weak.
    """
    etag, last_modified = _once(headers, "ETag"), _once(headers, "Last-Modified")
    found = Validator(etag if ENTITY_TAG.fullmatch(etag or "") else None, last_modified, size)
    modified, date = found.modified, http_date(_once(headers, "Date"))
    fresh = modified is not None and date is not None and -CLOCK_SKEW <= (date - modified).total_seconds() < 1
    if fresh and modified is not None and size is not None and etag == f'"{int(modified.timestamp()):x}-{size:x}"':
        return replace(found, etag=f"W/{etag}", last_modified=None)
    if modified is None or (fresh and not found.strong):
        return replace(found, last_modified=None)
    return found


_DIGESTS: Final = (  # those behind the first only of the whole file: its content is the representation then
    ("Repr-Digest", parse_digests),
    ("Content-Digest", parse_digests),
    ("Digest", parse_legacy_digests),
)


def _described(headers: Headers, size: int | None, *, whole: bool) -> Validator:
    """What an answer that brings bytes of the file says of it: its validator, and what no other answer tells of the file."""
    digests = NO_DIGESTS
    for name, parse in _DIGESTS if whole else _DIGESTS[:1]:
        if lines := headers.getall(name, []):
            digests = digests.joined(parse(lines))
    media_type = (_once(headers, "Content-Type") or "").partition(";")[0].strip().lower()
    found = validator_of(headers, size)
    return Validator(found.etag, found.last_modified, size, digests, media_type[:MAX_MEDIA_TYPE] or None)


def _framing(headers: Headers) -> tuple[int | None, bool]:
    """(announced length, whether the end of the body can be told). Two ways to tell it are an attack or a fault (T26)."""
    lengths, codings = headers.getall("Content-Length", []), headers.getall("Transfer-Encoding", [])
    if len(lengths) > 1 or len(codings) > 1 or (lengths and codings):
        raise _Broken("its length is told twice")
    if codings and codings[0].strip(" \t").lower() != "chunked":
        raise _Broken("its transfer coding is not supported")
    if lengths and not _LENGTH.fullmatch(lengths[0].strip(" \t")):
        raise _Broken("its length is not a number")
    return (int(lengths[0]) if lengths else None), bool(lengths or codings)


def _require_identity(headers: Headers) -> None:
    """Encoded bytes are not the file's bytes, and their positions are not the file's positions."""
    lines = headers.getall("Content-Encoding", [])
    if not lines:
        return
    codings = {token.strip().lower() for line in lines for token in line.split(",")}
    if codings - {"", "identity"}:
        raise _Broken("it is encoded though only identity was asked for")


def _require_whole(headers: Headers) -> None:
    """A 200 has no business with Content-Range; one that says 'a part only' is believed rather than taken for the whole."""
    part = _content_range(headers, needed=False)
    if isinstance(part, ContentRange) and (part.start > 0 or part.end != (part.total or part.end)):
        raise _Broken("a part of the file is sent as the whole (200 with Content-Range)")


def _content_range(headers: Headers, *, needed: bool = True) -> ContentRange | Unsatisfied | None:
    try:
        text = _only(headers, "Content-Range")
        if text is not None:
            return parse_content_range(text)
    except ValueError:
        if needed:
            raise _Broken("its Content-Range is malformed") from None
    if needed:
        raise _Broken("it has no Content-Range")
    return None


def _once(headers: Headers, name: str) -> str | None:
    values = headers.getall(name, [])
    return values[0].strip(" \t") if len(values) == 1 else None


def _only(headers: Headers, name: str) -> str | None:
    values = headers.getall(name, [])
    if len(values) > 1 and len(set(values)) > 1:
        raise _Broken(f"it has several {name} fields that contradict each other")
    return values[0] if values else None


def _error(asked: Asked, answer: Answer, now: float | None) -> BitsError:
    return error_from_status(answer.status, url=asked.url, reason=answer.reason, retry_after=retry_after(answer.headers, now))


_ABOUT_CERTIFICATES: Final = {  # nginx keeps its codes 495 and 496 to itself and writes them into the page
    b"No required SSL certificate was sent": "the job showed none",
    b"The SSL certificate error": "it does not accept the one that was shown",
}


def refused_for(error: BitsError, page: bytes) -> BitsError:
    """The error of an answer, by the beginning of its page too: nginx refuses clients' certificates, and clients without one, with
    a plain 400."""
    why = next((why for words, why in _ABOUT_CERTIFICATES.items() if words in page), None)
    if error.http_status != 400 or why is None or not (error.url or "").startswith("https:"):
        return error
    return certificate_wanted(why, error.url or "")


def certificate_wanted(why: str, url: str) -> BitsError:
    """The server wants to know who we are, and there is something in the way."""
    message = f"the server wants a client certificate, and {why}"
    code, context = ErrorCode.ERROR_WINHTTP_CLIENT_AUTH_CERT_NEEDED, ErrorContext.GENERAL_TRANSPORT
    return make_error(code, context, message, url=url, transient=False)


def retry_after(headers: Headers, now: float | None = None) -> float | None:
    """Seconds that `Retry-After` asks to wait, between 0 and a day.

    A date is measured against the answer's own Date where it has one, so that a server with a wrong clock is understood too.
    """
    text = (_once(headers, "Retry-After") or "").strip()
    if re.fullmatch(r"[0-9]{1,12}", text):
        return min(float(text), MAX_RETRY_AFTER)
    until = http_date(text)
    here = http_date(_once(headers, "Date")) or (None if now is None else datetime.fromtimestamp(now, UTC))
    if until is None or here is None:
        return None
    return min(max((until - here).total_seconds(), 0.0), MAX_RETRY_AFTER)
