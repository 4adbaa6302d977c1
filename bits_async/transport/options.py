"""How a job asks over HTTP: its method, its custom headers and whom they are for, its security flags.

Pure: values and their rules. Custom headers are secrets (people put tokens into them): they have no repr, and messages here never repeat
a value. Knows no connection and no certificate; `tls` says what the flags mean for a handshake, `lane` follows the redirects.
"""

import enum
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from ..auth.policy import Origin
from ..errors import BitsError, ErrorCode, ErrorContext, InvalidArgument, make_error

MAX_CUSTOM_HEADERS: Final = 16_384
"""Characters of all custom headers, with the CRLF between them and the NUL that BITS puts at their end (BITS's limit)."""

MAX_METHOD: Final = 64

MAX_SUBJECT_NAME: Final = 255
"""Characters of the name that a client certificate is looked for by (BITS's limit: 256 with the NUL)."""

_TOKEN: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")  # RFC 9110, 5.6.2
_VALUE: Final = re.compile(r"[\x20-\x7e]*")
_FORBIDDEN: Final = frozenset(
    {
        *("host", "content-length", "transfer-encoding", "te", "trailer", "upgrade", "expect"),  # where a request ends, and who reads it
        *("connection", "keep-alive", "http2-settings"),
        *("authorization", "cookie", "range", "accept-encoding"),  # these are the engine's own
    }
)
_FORBIDDEN_PREFIXES: Final = ("proxy-", "if-")
_WITHOUT_A_FILE: Final = frozenset({"CONNECT", "HEAD", "OPTIONS", "TRACE"})  # their answers are never a file


class SecurityFlags(enum.Flag, boundary=enum.STRICT):
    """What a job allows a server (BG_SSL_* and BG_HTTP_REDIRECT_POLICY_* of IBackgroundCopyJobHttpOptions::SetSecurityFlags).

    The SSL flags are about the servers that a job names, never about a proxy. In terms of Python's `ssl`:

    * SSL_ENABLE_CRL_CHECK: `VERIFY_CRL_CHECK_LEAF` with the lists of `Job.set_crl_source`. Nothing is fetched: a server whose
      authority has no list there is refused, as one whose list has expired.
    * SSL_IGNORE_CERT_CN_INVALID: `check_hostname = False`.
    * SSL_IGNORE_CERT_DATE_INVALID: OpenSSL's `X509_V_FLAG_NO_CHECK_TIME`, for the whole chain and for revocation lists.
    * SSL_IGNORE_UNKNOWN_CA: `verify_mode = CERT_NONE`; then the name, dates and usage of the server's own certificate are checked
      here, as far as other flags do not ignore them. Who issued it is not looked at, so it cannot be checked for revocation.
    * SSL_IGNORE_CERT_WRONG_USAGE: only together with SSL_IGNORE_UNKNOWN_CA; `ssl` cannot turn this check off alone.

    The HTTP_REDIRECT_POLICY flags:

    * ALLOW_SILENT (0, the default): redirects are followed.
    * ALLOW_REPORT: they are followed, and `JobFile.remote_name` becomes the final URL (unless it is longer than a job's URL may be).
    * DISALLOW: a redirect ends the job with BG_E_HTTP_ERROR_3xx; `JobFile.remote_name` becomes the URL that was redirected to.
    * ALLOW_HTTPS_TO_HTTP: a redirect may give up TLS.

    Credentials and custom headers never follow a redirect to another origin, whatever the policy.
    """

    HTTP_REDIRECT_POLICY_ALLOW_SILENT = 0
    SSL_ENABLE_CRL_CHECK = 0x0001
    SSL_IGNORE_CERT_CN_INVALID = 0x0002
    SSL_IGNORE_CERT_DATE_INVALID = 0x0004
    SSL_IGNORE_UNKNOWN_CA = 0x0008
    SSL_IGNORE_CERT_WRONG_USAGE = 0x0010
    HTTP_REDIRECT_POLICY_ALLOW_REPORT = 0x0100
    HTTP_REDIRECT_POLICY_DISALLOW = 0x0200
    HTTP_REDIRECT_POLICY_ALLOW_HTTPS_TO_HTTP = 0x0800


TLS_FLAGS: Final = (
    SecurityFlags.SSL_ENABLE_CRL_CHECK
    | SecurityFlags.SSL_IGNORE_CERT_CN_INVALID
    | SecurityFlags.SSL_IGNORE_CERT_DATE_INVALID
    | SecurityFlags.SSL_IGNORE_UNKNOWN_CA
    | SecurityFlags.SSL_IGNORE_CERT_WRONG_USAGE
)
"""Those that change the handshake."""

_REDIRECT_POLICY: Final = SecurityFlags.HTTP_REDIRECT_POLICY_ALLOW_REPORT | SecurityFlags.HTTP_REDIRECT_POLICY_DISALLOW


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientCertificate:
    """Where a job's client certificate is, and its key with it; nothing in here is secret.

    Attributes:
        source: the file (PEM or PKCS#12), or the directory to look for it in.
        thumbprint: in a directory: its SHA-1 (20 bytes) or SHA-256 (32 bytes).
        subject_name: in a directory: a part of its simple subject name.
        key: the file with its private key; None: it is in the same file, or beside it, with the suffix `.key`.
        password_file: the file whose first line opens `source` and the key.
    """

    source: Path
    thumbprint: bytes | None = None
    subject_name: str | None = None
    key: Path | None = None
    password_file: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpOptions:
    """The HTTP options of one job.

    Attributes:
        method: of every request; anything but GET is asked once and from the first byte, never repeated by itself.
        headers: custom headers in their order; None: they were set, but the journal's key does not open them.
        headers_write_only: they are not given out any more.
        header_origins: whom the headers may be sent to; None: bound at the first resume (T19).
        flags: see `SecurityFlags`.
        crl_source: file or directory with the certificate revocation lists.
        validates_certificates: the application wants to see each server's certificate; its callback itself does not survive a restart.
        client_certificate: what the job shows of itself in the handshake.
        certificate_origins: whom that may be shown to; None: bound at the first resume (T19).
    """

    method: str = "GET"
    headers: tuple[tuple[str, str], ...] | None = field(default=(), repr=False)
    headers_write_only: bool = False
    header_origins: frozenset[Origin] | None = None
    flags: SecurityFlags = SecurityFlags.HTTP_REDIRECT_POLICY_ALLOW_SILENT
    crl_source: Path | None = None
    validates_certificates: bool = False
    client_certificate: ClientCertificate | None = None
    certificate_origins: frozenset[Origin] | None = None

    @property
    def plain(self) -> bool:
        """The method is GET: asking again does no harm, and a part can be asked for."""
        return self.method == "GET"

    def bound(self, origins: Iterable[Origin]) -> "HttpOptions":
        """With the custom headers and the client certificate bound to these origins, where they are not bound yet (T19)."""
        headers, certificate = self.header_origins, self.certificate_origins
        named = frozenset(origins) if self.headers != () or self.client_certificate is not None else frozenset()
        if headers is None and self.headers != ():
            headers = named
        if certificate is None and self.client_certificate is not None:
            certificate = named
        return replace(self, header_origins=headers, certificate_origins=certificate)

    def headers_for(self, origin: Origin) -> tuple[tuple[str, str], ...]:
        """The custom headers that a request to this origin carries."""
        return (self.headers or ()) if origin in (self.header_origins or ()) else ()

    def after_redirect(self, status: int) -> "HttpOptions":
        """What the next request asks with (RFC 9110, 15.4): a 303, and a 301 or 302 to a POST, are followed by GET."""
        to_get = status == 303 or (status in (301, 302) and self.method == "POST")
        return replace(self, method="GET") if to_get else self


def checked_method(method: str) -> str:
    """A method that may bring a file: a token of RFC 9110 in capital letters.

    Raises:
        InvalidArgument: it is not, or it is CONNECT, HEAD, OPTIONS or TRACE, whose answers bring none.
    """
    if not isinstance(method, str) or not _TOKEN.fullmatch(method) or len(method) > MAX_METHOD or method != method.upper():
        raise InvalidArgument("an HTTP method is a token of RFC 9110, in capital letters")
    if method in _WITHOUT_A_FILE:
        raise InvalidArgument(f"{method} brings no file")
    return method


def checked_flags(flags: SecurityFlags) -> SecurityFlags:
    """Flags that can be followed.

    Raises:
        InvalidArgument: not SecurityFlags. BitsError (E_NOTIMPL): flags that contradict each other, or that `ssl` cannot follow.
    """
    if not isinstance(flags, SecurityFlags):
        raise InvalidArgument(f"security flags are SecurityFlags, not {type(flags).__name__}")
    if _REDIRECT_POLICY in flags:
        raise not_implemented("redirects cannot be both reported and refused")
    unknown_ca = SecurityFlags.SSL_IGNORE_UNKNOWN_CA in flags
    if SecurityFlags.SSL_IGNORE_CERT_WRONG_USAGE in flags and not unknown_ca:
        raise not_implemented("SSL_IGNORE_CERT_WRONG_USAGE works together with SSL_IGNORE_UNKNOWN_CA only")
    if SecurityFlags.SSL_ENABLE_CRL_CHECK in flags and unknown_ca:
        raise not_implemented("a certificate of an unknown authority cannot be checked for revocation")
    return flags


def not_implemented(why: str) -> BitsError:
    """E_NOTIMPL."""
    return make_error(ErrorCode.E_NOTIMPL, ErrorContext.NONE, why, advice="use other security flags")


# -- client certificates -----------------------------------------------------------------------------------------------------------


def checked_thumbprint(thumbprint: bytes | str) -> bytes:
    """A thumbprint as bytes, or as hexadecimal digits with or without colons and spaces between them.

    Raises:
        InvalidArgument: it is neither a SHA-1 nor a SHA-256.
    """
    try:
        raw = bytes.fromhex(thumbprint.replace(":", " ")) if isinstance(thumbprint, str) else thumbprint
    except ValueError:
        raw = b""
    if not isinstance(raw, bytes) or len(raw) not in (20, 32):
        raise InvalidArgument("a thumbprint is a SHA-1 (20 bytes) or a SHA-256 (32 bytes)")
    return raw


def checked_subject_name(name: str) -> str:
    """A part of a simple subject name: 1 to 255 characters.

    Raises:
        InvalidArgument: it is not.
    """
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_SUBJECT_NAME or not name.strip():
        raise InvalidArgument(f"a subject name has 1 to {MAX_SUBJECT_NAME} characters")
    return name


# -- custom headers --------------------------------------------------------------------------------------------------------------


def checked_headers(given: Sequence[tuple[str, str]] | str | None) -> tuple[tuple[str, str], ...]:
    """Custom headers from pairs or from text with a CRLF between lines (one at the end is allowed); None: none.

    A name that comes again is spelled as it was the first time.

    Raises:
        InvalidArgument: more than 16,384 characters (BG_E_STRING_TOO_LONG); a name that is no token, or that is the engine's own
            (T23); a value with other characters than printable ASCII.
    """
    checked = [_checked_header(name, value) for name, value in _pairs(given)]
    _limit(headers_text(checked))
    spelling: dict[str, str] = {}  # one name, one spelling: what servers make of two is not known
    return tuple((spelling.setdefault(name.lower(), name), value) for name, value in checked)


def headers_text(headers: Iterable[tuple[str, str]]) -> str:
    """The headers as the journal keeps them (sealed): `Name: value`, a CRLF between lines."""
    return "\r\n".join(f"{name}: {value}" for name, value in headers)


def headers_of_text(text: str) -> tuple[tuple[str, str], ...]:
    """What `headers_text` was made of."""
    pairs = (line.partition(": ") for line in text.split("\r\n"))
    return tuple((name, value) for name, _, value in pairs)


def _pairs(given: Sequence[tuple[str, str]] | str | None) -> list[tuple[str, str]]:
    if given is None:
        return []
    if not isinstance(given, str):
        if not isinstance(given, Iterable) or isinstance(given, Mapping):
            raise InvalidArgument(f"custom headers are pairs of text (a dictionary's items()), not {type(given).__name__}")
        pairs = [pair if isinstance(pair, tuple | list) else (pair,) for pair in given]
        if not all(len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], str) for pair in pairs):
            raise InvalidArgument("custom headers are pairs of text, or text with a CRLF between lines")
        return [(pair[0], pair[1]) for pair in pairs]
    _limit(given)
    lines = given.removesuffix("\r\n").split("\r\n") if given else []
    if not all(":" in line for line in lines):
        raise InvalidArgument("a line of custom headers is written Name: value")
    return [(name, value) for name, _, value in (line.partition(":") for line in lines)]


def _checked_header(name: str, value: str) -> tuple[str, str]:
    if not _TOKEN.fullmatch(name):
        raise InvalidArgument("the name of a custom header is no token of RFC 9110")
    lower = name.lower()
    if lower in _FORBIDDEN or lower.startswith(_FORBIDDEN_PREFIXES):
        raise InvalidArgument(f"{name[:64]} is not for custom headers: it belongs to the engine or to the connection")
    if not _VALUE.fullmatch(value):
        raise InvalidArgument(f"the value of the custom header {name[:64]} has other characters than printable ASCII")
    return name, value.strip(" ")


def _limit(text: str) -> None:
    if len(text) + 1 > MAX_CUSTOM_HEADERS:
        raise InvalidArgument(f"custom headers have at most {MAX_CUSTOM_HEADERS} characters", code=ErrorCode.BG_E_STRING_TOO_LONG)
