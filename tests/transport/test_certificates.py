"""What is left to check of a server's certificate whose authority is ignored."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from bits_async.errors import ErrorCode, NetworkError
from bits_async.transport.certificates import LeafRules, check_leaf

NOW = datetime(2026, 6, 1, tzinfo=UTC)
ALL = LeafRules()
URL = "https://host/file?token=s3cret"
KEY = ec.generate_private_key(ec.SECP256R1())
Extend = Callable[[x509.CertificateBuilder], x509.CertificateBuilder]


def certificate(*names: x509.GeneralName, extend: Extend = lambda builder: builder) -> bytes:
    """Self-signed, good for the day around NOW; the common name is always "common.test"."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "common.test")])
    builder = x509.CertificateBuilder(name, name, KEY.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(NOW - timedelta(hours=1)).not_valid_after(NOW + timedelta(hours=1))
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return extend(builder).sign(KEY, hashes.SHA256()).public_bytes(Encoding.DER)


def passes(der: bytes | None, host: str = "host.test", rules: LeafRules = ALL, now: datetime = NOW) -> bool:
    try:
        check_leaf(der, host, rules, url=URL, now=now)
        return True
    except NetworkError as caught:
        error = caught
    assert error.code == ErrorCode.ERROR_WINHTTP_SECURE_FAILURE
    assert not error.transient
    assert "s3cret" not in str(error)
    return False


def dns(*names: str) -> list[x509.GeneralName]:
    return [x509.DNSName(name) for name in names]


@pytest.mark.parametrize(
    ("names", "host", "fits"),
    [
        (["host.test"], "host.test", True),
        (["HOST.Test"], "host.test", True),
        (["host.test"], "host.test.", True),
        (["other.test", "host.test"], "host.test", True),
        (["*.test"], "host.test", False),  # a whole top level
        (["*.example.test"], "host.example.test", True),
        (["*.example.test"], "example.test", False),
        (["*.example.test"], "a.b.example.test", False),
        (["h*.example.test"], "host.example.test", False),
        (["host.*.test"], "host.example.test", False),
        (["*"], "host", False),
        (["test"], "host.test", False),
        (["host.test.evil"], "host.test", False),
        (["127.0.0.1"], "127.0.0.1", False),  # an address is no name
        ([], "common.test", False),
    ],
)
def test_names_are_compared_whole_with_a_wildcard_for_one_label(names, host, fits):
    assert passes(certificate(*dns(*names)), host) is fits
    assert passes(certificate(*dns(*names)), host, LeafRules(name=False))


@pytest.mark.parametrize(
    ("host", "fits"), [("127.0.0.1", True), ("::1", True), ("0:0::1", True), ("127.0.0.2", False), ("host.test", False)]
)
def test_addresses_are_compared_as_addresses(host, fits):
    import ipaddress

    der = certificate(*(x509.IPAddress(ipaddress.ip_address(text)) for text in ("127.0.0.1", "::1")))
    assert passes(der, host) is fits


@pytest.mark.parametrize(("hours", "good"), [(-2, False), (-0.5, True), (0.5, True), (2, False)])
def test_dates_count(hours, good):
    when = NOW + timedelta(hours=hours)
    assert passes(certificate(*dns("host.test")), now=when) is good
    assert passes(certificate(*dns("host.test")), now=when, rules=LeafRules(dates=False))


def extended(*usages: x509.ObjectIdentifier) -> Extend:
    return lambda builder: builder.add_extension(x509.ExtendedKeyUsage(usages), critical=True)


def usage(**yes: bool) -> Extend:
    names = (
        "digital_signature content_commitment key_encipherment data_encipherment key_agreement key_cert_sign crl_sign "
        "encipher_only decipher_only"
    )
    flags = dict.fromkeys(names.split(), False) | yes
    return lambda builder: builder.add_extension(x509.KeyUsage(**flags), critical=True)


@pytest.mark.parametrize(
    ("extend", "good"),
    [
        (lambda builder: builder, True),
        (extended(ExtendedKeyUsageOID.SERVER_AUTH), True),
        (extended(ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH), True),
        (extended(ExtendedKeyUsageOID.CLIENT_AUTH), False),
        (extended(ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE), False),
        (usage(digital_signature=True), True),
        (usage(key_encipherment=True), True),
        (usage(key_agreement=True), True),
        (usage(content_commitment=True), False),
    ],
)
def test_the_usage_counts(extend, good):
    der = certificate(*dns("host.test"), extend=extend)
    assert passes(der) is good
    assert passes(der, rules=LeafRules(usage=False))


@pytest.mark.parametrize("der", [None, b"", b"no certificate", certificate(*dns("host.test"))[:-20]])
def test_what_cannot_be_read_does_not_pass_whatever_is_ignored(der):
    assert not passes(der, rules=LeafRules(name=False, dates=False, usage=False))


def test_an_extension_that_cannot_be_read_does_not_pass():
    broken = x509.UnrecognizedExtension(x509.ExtendedKeyUsage.oid, b"\x00nonsense")
    assert not passes(certificate(*dns("host.test"), extend=lambda builder: builder.add_extension(broken, critical=False)))
