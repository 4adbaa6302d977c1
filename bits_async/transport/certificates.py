"""A server's own certificate, where OpenSSL was told not to verify it: its name, its dates and its usage.

For jobs that ignore an unknown authority only. Nothing here makes such a connection safe: whoever is between can make a certificate that
passes. It keeps the other checks that the job did not ask to ignore, so that an expired certificate or a wrong host still shows.
Names are compared as RFC 9525 says: the certificate's alternative names, a wildcard for the whole first label only, no common name.
"""

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from ..errors import BitsError, ErrorCode, ErrorContext, make_error

if TYPE_CHECKING:
    from cryptography.x509 import Certificate


@dataclass(frozen=True, slots=True)
class LeafRules:
    """What is checked."""

    name: bool = True
    dates: bool = True
    usage: bool = True


def prepare() -> None:
    """Load what `check_leaf` needs; blocks."""
    import cryptography.x509  # noqa: F401 - what is loaded here is not loaded on the event loop


def check_leaf(certificate: bytes | None, host: str, rules: LeafRules, *, url: str, now: datetime | None = None) -> None:
    """Look at the certificate (DER) that `host` showed.

    Args:
        host: as it was asked for: lower case, IDNA, an address without brackets.

    Raises:
        NetworkError: it does not pass; not transient.
    """
    from cryptography.x509 import load_der_x509_certificate

    try:
        leaf = load_der_x509_certificate(certificate or b"")
        why = _fault(leaf, host.removesuffix("."), rules, now or datetime.now(UTC))
    except ValueError:  # also what cryptography raises for extensions that it cannot read
        why = "it cannot be read"
    if why:
        raise _refused(why, url)


def _fault(leaf: "Certificate", host: str, rules: LeafRules, now: datetime) -> str:
    if rules.dates and now < leaf.not_valid_before_utc:
        return "it is not valid yet"
    if rules.dates and now > leaf.not_valid_after_utc:
        return "it has expired"
    if rules.usage and not _for_servers(leaf):
        return "it is not meant for servers"
    if rules.name and not _names(leaf, host):
        return "it is for another host"
    return ""


def _for_servers(leaf: "Certificate") -> bool:
    """As OpenSSL's purpose "sslserver" has it: what a certificate does not restrict it allows; "any usage" does not count as this one."""
    from cryptography.x509 import ExtendedKeyUsage, ExtensionNotFound, KeyUsage
    from cryptography.x509.oid import ExtendedKeyUsageOID

    try:
        if ExtendedKeyUsageOID.SERVER_AUTH not in leaf.extensions.get_extension_for_class(ExtendedKeyUsage).value:
            return False
    except ExtensionNotFound:
        pass  # no restriction
    try:
        usage = leaf.extensions.get_extension_for_class(KeyUsage).value
    except ExtensionNotFound:
        return True
    return usage.digital_signature or usage.key_encipherment or usage.key_agreement


def _names(leaf: "Certificate", host: str) -> bool:
    from cryptography.x509 import DNSName, ExtensionNotFound, IPAddress, SubjectAlternativeName

    try:
        names = leaf.extensions.get_extension_for_class(SubjectAlternativeName).value
    except ExtensionNotFound:
        return False
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return _name_fits(host, names.get_values_for_type(DNSName))
    return address in names.get_values_for_type(IPAddress)


def _name_fits(host: str, patterns: Iterable[str]) -> bool:
    first, dot, rest = host.partition(".")
    wildcard = f"*.{rest}" if first and dot and "." in rest else None
    return any(pattern.lower().removesuffix(".") in (host, wildcard) for pattern in patterns)


def _refused(why: str, url: str) -> BitsError:
    code = ErrorCode.ERROR_WINHTTP_SECURE_FAILURE
    return make_error(code, ErrorContext.GENERAL_TRANSPORT, f"certificate refused: {why}", transient=False, url=url)
