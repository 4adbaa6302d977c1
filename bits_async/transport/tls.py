"""Which TLS a lane speaks, and what this connection's own handshake showed.

A caller's `SSLContext` is never changed or stored, and used as it is unless a job's security flags ask for another verification: then a
context is derived from it, with all that can be read back of it. What cannot be read back is lost: a client certificate, directories of
authorities (`capath`), the list of ALPN; a context whose verification would be weakened by that is refused instead (E_NOTIMPL). The
certificate for channel binding is read from the connection's own `ssl_object` after its handshake, never through a hook on a context
that other connections share (T24). This module knows no connection but the one it is asked about, and nothing of credentials.
"""

import asyncio
import functools
import os
import re
import socket
import ssl
import stat
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NoReturn, cast

from ..auth.policy import Origin
from ..errors import BitsError, ErrorCode, ErrorContext, make_error, scrub, show_text
from .certificates import LeafRules, check_leaf, prepare
from .client_certificates import KeyPair, unusable_key
from .options import TLS_FLAGS, SecurityFlags, not_implemented

SHUTDOWN_TIMEOUT = 1.0
"""Seconds a closing connection waits for the peer's close_notify. Where a body needs that, it has come before (`ended_by_peer`)."""

MAX_REVOCATION_LISTS: Final = 16 << 20
"""Bytes of revocation lists that a job may name."""

_NO_CHECK_TIME: Final = ssl.VerifyFlags(0x200000)  # OpenSSL's X509_V_FLAG_NO_CHECK_TIME, which ssl has no name for
_CRL: Final = re.compile(rb"-----BEGIN X509 CRL-----[A-Za-z0-9+/=\s]+-----END X509 CRL-----")


@dataclass(frozen=True)
class TlsSettings:
    """What decides how a server is verified and how we present ourselves to it.

    `context` None means Python's defaults, so `SSL_CERT_FILE` and `SSL_CERT_DIR` work. `leaf` is what is left to check of a server's
    own certificate where OpenSSL does not verify it, and `proxy` the settings for TLS with a proxy, both made by `under`. With a client
    certificate (`presenting`) these settings are for `origins`, and `others` for every other origin (T19).
    """

    context: ssl.SSLContext | None = None
    leaf: LeafRules | None = None
    proxy: "TlsSettings | None" = None
    others: "TlsSettings | None" = None
    origins: frozenset[Origin] = frozenset()

    def effective(self) -> ssl.SSLContext:
        """The context to shake hands with. Reads the trusted authorities when the defaults are used for the first time."""
        return self.context if self.context is not None else _default_context(*_places())

    def refresh(self) -> None:
        """Trust whom the defaults name today: authorities whose file was replaced are read anew, and connections that are opened from now
        on go by them. Blocks."""
        if self.context is None:
            _forget_the_replaced()
            self.effective()

    @property
    def verifies(self) -> bool:
        """A server's certificate is verified in every respect: chain, name and dates."""
        context = self.effective()
        complete = context.verify_mode is ssl.CERT_REQUIRED and context.check_hostname
        return complete and self.leaf is None and not bool(context.verify_flags & _NO_CHECK_TIME)

    @property
    def key(self) -> object:
        """What lanes are told apart by: the context itself; two that look alike may differ in what cannot be read back."""
        return self.effective() if self.proxy is None else (self.effective(), self.leaf, self.proxy.key)

    def under(self, flags: SecurityFlags, revoked: bytes | None = None) -> "TlsSettings":
        """These settings as a job's security flags want them; blocks, because it reads the trusted authorities.

        Args:
            flags: those that `checked_flags` let pass.
            revoked: the revocation lists (`read_revocation_lists`), for SSL_ENABLE_CRL_CHECK.

        Raises:
            BitsError: E_NOTIMPL: the context cannot be derived from.
        """
        flags &= TLS_FLAGS
        if not flags:
            return self
        base = self.effective()
        context = _default_under(*_places(), flags, revoked) if self.context is None else _derived(base, flags, revoked)
        leaf = _leaf_rules(base, flags)
        if leaf is not None:
            prepare()
        return TlsSettings(context, leaf, TlsSettings(base))

    def toward(self, origin: Origin) -> "TlsSettings":
        """What this origin is met with."""
        return self if self.others is None or origin in self.origins else self.others

    def check_presentable(self) -> None:
        """Whether a client certificate can be shown.

        Raises:
            BitsError: E_NOTIMPL: there is a context of the application's, which may show another (T24); or this system cannot hand a key
                to OpenSSL without a temporary file (T27).
        """
        if self.context is not None:
            raise _cannot_present("the manager has an ssl context of the application's", "open the manager without ssl=")
        if not hasattr(os, "memfd_create"):
            raise _cannot_present("this system would need a temporary file for the key", "use a Linux system")

    def presenting(self, pair: KeyPair, origins: frozenset[Origin], flags: SecurityFlags, revoked: bytes | None = None) -> "TlsSettings":
        """As `under`, with a client certificate for these origins; blocks.

        Raises:
            BitsError: as `under` and `check_presentable`; ERROR_WINHTTP_CLIENT_CERT_NO_ACCESS_PRIVATE_KEY: OpenSSL refuses the pair.
        """
        self.check_presentable()
        others = self.under(flags, revoked)
        context = _presenting(_places(), flags & TLS_FLAGS, revoked, pair)
        return TlsSettings(context, others.leaf, TlsSettings(self.effective()), others, origins)

    def check_revocable(self) -> None:
        """Whether SSL_ENABLE_CRL_CHECK can be applied.

        Raises:
            BitsError: E_NOTIMPL.
        """
        base = self.effective()
        if self.context is not None:
            _copy(base)
        _require_verification(base)

    def check_leaf(self, certificate: bytes | None, host: str, url: str) -> None:
        """After a handshake in which OpenSSL verified nothing: what the flags do not ignore.

        Raises:
            NetworkError: the certificate does not pass.
        """
        if self.leaf is not None:
            check_leaf(certificate, host, self.leaf, url=url)


def _places() -> tuple[str | None, str | None]:
    return os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")


_seen: dict[tuple[str | None, str | None], object] = {}  # by place: what the file system said of it when it was read


def _forget_the_replaced() -> None:
    paths = ssl.get_default_verify_paths()
    now = [_stamp(path) for path in (paths.cafile, paths.capath) if path is not None]
    if _seen.setdefault(_places(), now) == now:
        return
    _seen[_places()] = now
    _default_context.cache_clear()
    _default_under.cache_clear()
    _presented.clear()


def _stamp(path: str) -> object:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


@functools.lru_cache(maxsize=8)
def _default_context(cert_file: str | None, cert_dir: str | None) -> ssl.SSLContext:
    """One context per place the authorities come from, so that jobs without settings of their own share lanes."""
    return _new_default()


@functools.lru_cache(maxsize=8)
def _default_under(cert_file: str | None, cert_dir: str | None, flags: SecurityFlags, revoked: bytes | None) -> ssl.SSLContext:
    return _apply(_new_default(), flags, revoked)


def _new_default() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


# -- a client certificate -----------------------------------------------------------------------------------------------------------

_presented: "weakref.WeakValueDictionary[object, ssl.SSLContext]" = weakref.WeakValueDictionary()


def _presenting(places: tuple[str | None, str | None], flags: SecurityFlags, revoked: bytes | None, pair: KeyPair) -> ssl.SSLContext:
    """One context for each certificate with its key, so that jobs with the same ones share lanes; it goes with the last lane."""
    which = (*places, flags, revoked, pair.fingerprint)
    context = _presented.get(which)
    if context is None:
        context = _apply(_new_default(), flags, revoked)
        context.post_handshake_auth = True  # a server may ask for it when it sees the path
        _load_pair(context, pair)
        _presented[which] = context
    return context


def _load_pair(context: ssl.SSLContext, pair: KeyPair) -> None:
    """`ssl` takes keys from files only; this one is memory without a name (T27)."""
    descriptor = os.memfd_create("client-certificate")
    try:
        os.fchmod(descriptor, 0o600)  # it is made for everybody, and every thread of this process, whoever it wears, may name descriptors
        with open(descriptor, "wb", closefd=False) as file:
            file.write(pair.pem)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    except ssl.SSLError as exc:
        raise unusable_key(f"OpenSSL refuses it: {show_text(exc.reason or '')}", pair.path, pair.identity) from scrub(exc)
    except OSError as exc:
        raise unusable_key("it cannot be handed to OpenSSL; is /proc mounted?", pair.path, pair.identity) from scrub(exc)
    finally:
        os.close(descriptor)


def _cannot_present(why: str, advice: str) -> BitsError:
    return make_error(ErrorCode.E_NOTIMPL, ErrorContext.NONE, f"a client certificate cannot be shown: {why}", advice=advice)


def peer_certificate(transport: asyncio.BaseTransport) -> bytes | None:
    """The certificate (DER) the peer of this very connection showed; None without TLS. In a tunnel: the innermost handshake's."""
    connection = transport.get_extra_info("ssl_object")
    if connection is None:
        return None
    certificate: bytes | None = connection.getpeercert(binary_form=True)
    return certificate


# -- records read by somebody else -----------------------------------------------------------------------------------------------

_WIRE: Final = 256 << 10  # bytes taken from the socket at once; a record has 16 KiB


class TappedContext(ssl.SSLContext):
    """A context as it stands, which also hands out the two buffers between a connection's TLS and its socket.

    asyncio and uvloop give them to `wrap_bio` and to nobody else. Everything but that call is the original's.
    """

    def __new__(cls, original: ssl.SSLContext) -> "TappedContext":
        return super().__new__(cls, ssl.PROTOCOL_TLS_CLIENT)

    def __init__(self, original: ssl.SSLContext) -> None:
        self._original = original
        self.last: tuple[ssl.SSLObject, ssl.MemoryBIO, ssl.MemoryBIO] | None = None
        """Of the connection made last: its TLS, what comes in for it, what goes out."""

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        connection = self._original.wrap_bio(incoming, outgoing, server_side, server_hostname, session)
        self.last = connection, incoming, outgoing
        return connection

    def ended_by_peer(self) -> bool:
        """Of a connection that is at its end: whether TLS's own farewell came. Without it anybody on the way may have ended it."""
        assert self.last is not None, "the handshake is over"
        try:
            return not self.last[0].read(1)
        except ssl.SSLZeroReturnError:
            return True
        except ssl.SSLError:
            return False


class Deciphered:
    """The bytes that come over a TLS connection, read from its own socket by one thread, while nobody else touches the connection.

    Reads and writes like a non-blocking socket, which `wire` has to be; or it is what comes over another TLS connection, in which this
    one is a tunnel. Tickets and key updates are dealt with on the way; what was read too far stays where the transport finds it again.
    """

    def __init__(self, wire: "socket.socket | Deciphered", tls: ssl.SSLObject, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO) -> None:
        self._wire = wire
        self._tls = tls
        self._incoming = incoming
        self._outgoing = outgoing
        self._raw = memoryview(bytearray(_WIRE))
        self._ended = False

    def fileno(self) -> int:
        """Of the socket: something may be there when that is readable."""
        return self._wire.fileno()

    def recv_into(self, buffer: memoryview, nbytes: int = 0, flags: int = 0, /) -> int:
        """As many bytes as are there and fit.

        Returns:
            0: the peer said goodbye, or only hung up; who knows the length knows whether that was early.

        Raises:
            BlockingIOError: there is none yet.
            ConnectionError: the connection broke, or what comes is not TLS.
        """
        count = 0
        while count < len(buffer):
            try:
                taken = cast(int, self._tls.read(len(buffer) - count, cast(bytearray, buffer[count:])))  # typed as without a buffer
            except ssl.SSLWantReadError:
                if not self._feed():
                    break
            except ssl.SSLError:
                raise ConnectionAbortedError("what comes is not TLS") from None
            else:
                self._ended = self._ended or not taken
                if not taken:
                    break
                count += taken
        if not count and not self._ended:
            raise BlockingIOError
        return count

    def send(self, data: bytes) -> int:
        """All of it.

        Raises:
            ConnectionError: the peer does not take it.
        """
        self._tls.write(data)
        self._send(self._outgoing.read())
        return len(data)

    def _feed(self) -> bool:
        """Records from the socket for TLS; False: none are there, or will be."""
        if answer := self._outgoing.read():  # to a key update
            self._send(answer)
        try:
            count = 0 if self._ended else self._wire.recv_into(self._raw)
        except BlockingIOError:
            return False
        self._ended = not count
        self._incoming.write(self._raw[:count])
        return bool(count)

    def _send(self, answer: bytes) -> None:
        try:
            if self._wire.send(answer) == len(answer):
                return
        except BlockingIOError:
            pass
        raise ConnectionAbortedError("the peer asks and does not listen")

    def quiet(self) -> bool:
        """Whether nothing but TLS's own messages has come behind what was read."""
        try:
            self.recv_into(self._raw[:1])
        except BlockingIOError:
            return True
        except ConnectionError:
            pass
        return False


# -- contexts for a job's security flags -------------------------------------------------------------------------------------------


@dataclass
class _Derived:
    """What was made from one caller's context; gone when that context is."""

    contexts: dict[tuple[SecurityFlags, bytes | None], ssl.SSLContext] = field(default_factory=dict)


_derived_from: "weakref.WeakKeyDictionary[ssl.SSLContext, _Derived]" = weakref.WeakKeyDictionary()


def _derived(base: ssl.SSLContext, flags: SecurityFlags, revoked: bytes | None) -> ssl.SSLContext:
    """One context per caller's context and flags, so that jobs with the same settings share lanes."""
    made = _derived_from.setdefault(base, _Derived()).contexts
    if (flags, revoked) not in made:
        context = _apply(_copy(base), flags, revoked)
        while len(made) >= 8:
            made.pop(next(iter(made)), None)  # an outdated revocation list, most likely
        made[flags, revoked] = context
    return made[flags, revoked]


def _copy(base: ssl.SSLContext) -> ssl.SSLContext:
    """A context that verifies as `base` does, or more strictly.

    Raises:
        BitsError: E_NOTIMPL: its verification depends on something that cannot be read back.
    """
    stored = base.cert_store_stats()
    if type(base) is not ssl.SSLContext:
        raise not_implemented("security flags cannot be applied to the manager's ssl context: it is of a class of its own")
    if stored["crl"] or stored["x509"] != stored["x509_ca"]:
        raise not_implemented("security flags cannot be applied to the manager's ssl context: its store cannot be read back")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = base.verify_mode
    context.check_hostname = base.check_hostname
    context.verify_flags = base.verify_flags
    context.options = base.options
    context.minimum_version, context.maximum_version = base.minimum_version, base.maximum_version
    context.hostname_checks_common_name = base.hostname_checks_common_name
    context.post_handshake_auth = base.post_handshake_auth
    context.sslobject_class = base.sslobject_class
    names = [cipher["name"] for cipher in base.get_ciphers() if cipher["protocol"] != "TLSv1.3"]
    context.set_ciphers(":".join([*(names or ["DEFAULT"]), f"@SECLEVEL={base.security_level}"]))
    context.set_alpn_protocols(["http/1.1"])
    authorities = b"".join(base.get_ca_certs(binary_form=True))
    if authorities:
        context.load_verify_locations(cadata=authorities)
    return context


def _apply(context: ssl.SSLContext, flags: SecurityFlags, revoked: bytes | None) -> ssl.SSLContext:
    if SecurityFlags.SSL_ENABLE_CRL_CHECK in flags:
        _require_verification(context)
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        _load_revoked(context, revoked or b"")
    if flags & (SecurityFlags.SSL_IGNORE_CERT_CN_INVALID | SecurityFlags.SSL_IGNORE_UNKNOWN_CA):
        context.check_hostname = False
    if SecurityFlags.SSL_IGNORE_CERT_DATE_INVALID in flags:
        context.verify_flags |= _NO_CHECK_TIME
    if SecurityFlags.SSL_IGNORE_UNKNOWN_CA in flags:
        context.verify_mode = ssl.CERT_NONE
    return context


def _require_verification(context: ssl.SSLContext) -> None:
    if context.verify_mode is ssl.CERT_NONE:
        raise not_implemented("the manager's ssl context verifies nothing, so nothing is checked for revocation")


def _leaf_rules(base: ssl.SSLContext, flags: SecurityFlags) -> LeafRules | None:
    """Never more than the context itself would have checked."""
    if SecurityFlags.SSL_IGNORE_UNKNOWN_CA not in flags or base.verify_mode is ssl.CERT_NONE:
        return None
    return LeafRules(
        name=base.check_hostname and SecurityFlags.SSL_IGNORE_CERT_CN_INVALID not in flags,
        dates=SecurityFlags.SSL_IGNORE_CERT_DATE_INVALID not in flags,
        usage=SecurityFlags.SSL_IGNORE_CERT_WRONG_USAGE not in flags,
    )


# -- revocation lists --------------------------------------------------------------------------------------------------------------


def read_revocation_lists(source: Path, identity: str) -> bytes:
    """The revocation lists (as PEM) in a file, or in the files of a directory; blocks. Called in threads of the job's owner (T27).

    Certificates beside them are not taken along: they would become trusted.

    Raises:
        LocalFileError: they cannot be read, are too large, or there is none.
    """
    try:
        files = sorted(each for each in source.iterdir() if each.is_file()) if source.is_dir() else [source]
        found = b"\n".join(_revocation_lists(files))
    except OSError as exc:
        raise _no_lists(exc.strerror or type(exc).__name__, source, identity) from scrub(exc)
    except ValueError as exc:
        raise _no_lists(str(exc), source, identity) from None
    if not found:
        raise _no_lists("there is none", source, identity)
    return found + b"\n"


def _revocation_lists(files: list[Path]) -> Iterator[bytes]:
    left = MAX_REVOCATION_LISTS
    for each in files:
        with open(each, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError("it is not a file")
            content = file.read(left + 1)
        left -= len(content)
        if left < 0:
            raise ValueError(f"they have more than {MAX_REVOCATION_LISTS >> 20} MiB")
        if content.startswith(b"0") and b"-----BEGIN" not in content:  # DER: a SEQUENCE
            body = ssl.DER_cert_to_PEM_cert(content).encode("ascii")
            yield body.replace(b" CERTIFICATE-----", b" X509 CRL-----").strip()
        else:
            yield from _CRL.findall(content)


def _open_at_once(path: str, flags: int) -> int:
    """A pipe that nobody writes to would keep the thread for good."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _no_lists(why: str, source: Path, identity: str) -> BitsError:
    code = ErrorCode.ERROR_WINHTTP_SECURE_CERT_REV_FAILED
    return make_error(code, ErrorContext.LOCAL_FILE, f"cannot read the revocation lists: {why}", path=source, identity=identity)


def _load_revoked(context: ssl.SSLContext, revoked: bytes) -> None:
    """`ssl` takes revocation lists from files only; this one is private, and nothing in it is secret."""
    with tempfile.TemporaryDirectory(prefix="bits-async-") as directory:
        file = Path(directory, "revoked.pem")
        file.write_bytes(revoked)
        try:
            context.load_verify_locations(cafile=str(file))
        except ssl.SSLError as exc:
            _refuse_lists(exc)


def _refuse_lists(exc: ssl.SSLError) -> NoReturn:
    code, why = ErrorCode.ERROR_WINHTTP_SECURE_CERT_REV_FAILED, "cannot read the revocation lists: OpenSSL does not understand them"
    raise make_error(code, ErrorContext.LOCAL_FILE, why) from scrub(exc)
