"""A job's client certificate and its private key, read from files: PEM or PKCS#12, named or looked for in a directory.

Everything here blocks, and is called in threads of the job's owner, whoever acts on the network: his permissions on the key decide (T27).
A directory stands for one of Windows's certificate stores. A directory's certificates are read; of its keys only the one that is used.
Knows no connection: `tls` shows what comes out of here.
"""

import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ..errors import BitsError, ErrorCode, ErrorContext, make_error, scrub
from .options import ClientCertificate

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
    from cryptography.hazmat.primitives.serialization.pkcs12 import PKCS12PrivateKeyTypes
    from cryptography.x509 import Certificate

    Key = PrivateKeyTypes | PKCS12PrivateKeyTypes

MAX_FILE: Final = 1 << 20
"""Bytes of one file that is looked at."""

MAX_FILES: Final = 1000
"""Files of a directory that are looked at, in the order of their names."""

_PEM_CERTIFICATE: Final = b"-----BEGIN CERTIFICATE-----"
_PEM_KEY: Final = b"PRIVATE KEY-----"


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A certificate with its chain, and its private key. `path` and `identity` say where it was read, and as whom."""

    pem: bytes = field(repr=False)
    path: Path
    identity: str

    @property
    def fingerprint(self) -> bytes:
        """What pairs are told apart by."""
        return hashlib.sha256(self.pem).digest()


@dataclass(frozen=True, slots=True)
class _Found:
    """What a file holds: certificates, the first of which is the one; and its key, where that is in the file and could be opened."""

    path: Path
    chain: tuple["Certificate", ...]
    content: bytes = field(repr=False)
    key: "Key | None" = field(default=None, repr=False)


def read_key_pair(wanted: ClientCertificate, identity: str) -> KeyPair:
    """The certificate that a job shows, with its key.

    Args:
        identity: whose thread this is, for messages.

    Raises:
        LocalFileError: ERROR_FILE_NOT_FOUND: no such file or directory; CRYPT_E_NOT_FOUND: no such certificate in it;
            ERROR_WINHTTP_CLIENT_CERT_NO_ACCESS_PRIVATE_KEY: this identity may not read it, or its password is wrong;
            ERROR_WINHTTP_CLIENT_CERT_NO_PRIVATE_KEY: there is no key, or that of another certificate.
    """
    password = None if wanted.password_file is None else _password(wanted.password_file, identity)
    if wanted.thumbprint is None and wanted.subject_name is None:
        found = _in_file(wanted.source, password, identity)
    else:
        found = _in_directory(wanted, identity)
    key = found.key or _key_of(found, wanted.key, password, identity)
    leaf = found.chain[0]
    if key.public_key() != leaf.public_key():
        raise _no_key("the key belongs to another certificate", wanted.key or found.path, identity)
    return KeyPair(_as_pem(found.chain, key), found.path, identity)


def unusable_key(why: str, path: Path, identity: str) -> BitsError:
    """ERROR_WINHTTP_CLIENT_CERT_NO_ACCESS_PRIVATE_KEY."""
    code = ErrorCode.ERROR_WINHTTP_CLIENT_CERT_NO_ACCESS_PRIVATE_KEY
    return make_error(code, ErrorContext.LOCAL_FILE, f"cannot use the client certificate's key: {why}", path=path, identity=identity)


def _no_key(why: str, path: Path, identity: str) -> BitsError:
    code = ErrorCode.ERROR_WINHTTP_CLIENT_CERT_NO_PRIVATE_KEY
    return make_error(code, ErrorContext.LOCAL_FILE, f"the client certificate cannot be used: {why}", path=path, identity=identity)


def _not_found(why: str, path: Path, identity: str) -> BitsError:
    return make_error(ErrorCode.CRYPT_E_NOT_FOUND, ErrorContext.LOCAL_FILE, f"no client certificate: {why}", path=path, identity=identity)


# -- files -------------------------------------------------------------------------------------------------------------------------


def _read(path: Path) -> bytes:
    """Of a regular file; a pipe that nobody writes to would keep the thread for good.

    Raises:
        OSError: it cannot be read, is no file, or is too large.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(0, "it is not a file")
        content = file.read(MAX_FILE + 1)
    if len(content) > MAX_FILE:
        raise OSError(0, f"it has more than {MAX_FILE >> 20} MiB")
    return content


def _read_named(path: Path, identity: str) -> bytes:
    """Of a file that the job names."""
    try:
        return _read(path)
    except FileNotFoundError as exc:
        message = "cannot read the client certificate: there is no such file"
        error = make_error(ErrorCode.ERROR_FILE_NOT_FOUND, ErrorContext.LOCAL_FILE, message, path=path, identity=identity)
        raise error from scrub(exc)
    except OSError as exc:
        raise unusable_key(exc.strerror or type(exc).__name__, path, identity) from scrub(exc)


def _password(path: Path, identity: str) -> bytes:
    return _read_named(path, identity).partition(b"\n")[0].rstrip(b"\r")


def _in_file(path: Path, password: bytes | None, identity: str) -> _Found:
    found = _parsed(path, _read_named(path, identity), password)
    if isinstance(found, str):
        if found:
            raise unusable_key(found, path, identity)
        raise _not_found("there is none in this file (PEM or PKCS#12)", path, identity)
    return found


def _parsed(path: Path, content: bytes, password: bytes | None) -> "_Found | str":
    """What a file holds; a text: it is a PKCS#12 and cannot be opened, because of that; an empty one: no certificate."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import pkcs12

    try:
        if _PEM_CERTIFICATE in content:
            return _Found(path, tuple(x509.load_pem_x509_certificates(content)), content)
        if not content.startswith(b"0"):  # DER: a SEQUENCE
            return ""
        try:
            return _Found(path, (x509.load_der_x509_certificate(content),), content)
        except ValueError:
            opened = pkcs12.load_pkcs12(content, password)
    except ValueError as exc:
        return "its password is wrong, or missing" if "password" in str(exc).lower() else ""
    except Exception:
        return ""
    if opened.cert is None:
        return ""
    others = (each.certificate for each in opened.additional_certs)
    return _Found(path, (opened.cert.certificate, *others), b"", opened.key)


# -- a directory -------------------------------------------------------------------------------------------------------------------


def _in_directory(wanted: ClientCertificate, identity: str) -> _Found:
    """The first certificate that is meant, in the order of the files' names, and that may be shown by a client."""
    try:
        files = sorted(each for each in wanted.source.iterdir() if each.is_file())[:MAX_FILES]
    except OSError as exc:
        code, context = ErrorCode.ERROR_FILE_NOT_FOUND, ErrorContext.LOCAL_FILE
        message = f"cannot look into the certificate store: {exc.strerror or type(exc).__name__}"
        raise make_error(code, context, message, path=wanted.source, identity=identity) from scrub(exc)
    unread: list[Path] = []
    for found in _certificates(files, unread):
        if _is_meant(found.chain[0], wanted) and _may_be_a_client(found.chain[0]):
            return found
    skipped = f"; {len(unread)} of its files could not be read" if unread else ""
    raise _not_found(f"none in the store matches{skipped}", wanted.source, identity)


def _certificates(files: list[Path], unread: list[Path]) -> Iterator[_Found]:
    for path in files:
        try:
            found = _parsed(path, _read(path), None)
        except OSError:
            unread.append(path)
            continue
        if not isinstance(found, str):
            yield found


def _is_meant(certificate: "Certificate", wanted: ClientCertificate) -> bool:
    from cryptography.hazmat.primitives import hashes

    if wanted.thumbprint is not None:
        kind = hashes.SHA1() if len(wanted.thumbprint) == 20 else hashes.SHA256()  # noqa: S303 - a name that BITS gives it, no proof
        return certificate.fingerprint(kind) == wanted.thumbprint
    assert wanted.subject_name is not None, "a directory is searched by thumbprint or by name"
    return wanted.subject_name.casefold() in simple_subject_name(certificate).casefold()


def simple_subject_name(certificate: "Certificate") -> str:
    """The values of the subject's names in the order of the certificate, which is that of BITS: what is shown as `CN=a, O=b` is `b, a`."""
    return ", ".join(str(each.value) for each in certificate.subject)


def _may_be_a_client(certificate: "Certificate") -> bool:
    """Its extended key usage, if it has one, names clients."""
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    try:
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return True
    except ValueError:
        return False
    return ExtendedKeyUsageOID.CLIENT_AUTH in usage or ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE in usage


# -- keys --------------------------------------------------------------------------------------------------------------------------


def _key_of(found: _Found, named: Path | None, password: bytes | None, identity: str) -> "Key":
    """The key of a certificate that came without: from the file that the job names, the certificate's own, or the one beside it."""
    beside = found.path.with_suffix(".key")
    if named is not None:
        return _loaded(named, _read_named(named, identity), password, identity)
    if _PEM_KEY in found.content:
        return _loaded(found.path, found.content, password, identity)
    try:
        content = _read(beside)
    except FileNotFoundError as exc:
        raise _no_key("it has no private key in its file, and there is none beside it", found.path, identity) from scrub(exc)
    except OSError as exc:
        raise unusable_key(exc.strerror or type(exc).__name__, beside, identity) from scrub(exc)
    return _loaded(beside, content, password, identity)


def _loaded(path: Path, content: bytes, password: bytes | None, identity: str) -> "Key":
    from cryptography.hazmat.primitives.serialization import load_der_private_key, load_pem_private_key

    load = load_pem_private_key if b"-----BEGIN" in content else load_der_private_key
    encrypted = b"ENCRYPTED" in content
    try:
        return load(content, password if encrypted or load is load_der_private_key else None)
    except TypeError as exc:  # encrypted and no password, or the other way round
        raise unusable_key("it is encrypted, and the job names no password", path, identity) from scrub(exc)
    except Exception as exc:
        why = "its password is wrong, or it is damaged" if encrypted else "it is none that can be read"
        raise unusable_key(why, path, identity) from scrub(exc)


def _as_pem(chain: tuple["Certificate", ...], key: "Key") -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return secret + b"".join(each.public_bytes(Encoding.PEM) for each in chain)
