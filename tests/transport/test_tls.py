"""TLS settings and the certificate that channel binding is made of."""

import asyncio
import gc
import hashlib
import os
import ssl
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives.serialization import Encoding

from bits_async.errors import BitsError, ErrorCode, LocalFileError
from bits_async.transport import tls
from bits_async.transport.certificates import LeafRules
from bits_async.transport.options import SecurityFlags as F
from bits_async.transport.tls import TlsSettings, peer_certificate, read_revocation_lists
from tests.certificates import Authority
from tests.transport.wire import Origin

NAME, DATE = F.SSL_IGNORE_CERT_CN_INVALID, F.SSL_IGNORE_CERT_DATE_INVALID


def test_a_callers_context_is_used_as_it_is() -> None:
    context = ssl.create_default_context()
    before = context.options, context.verify_flags, context.sslobject_class
    settings = TlsSettings(context)
    assert settings.effective() is context
    assert (context.options, context.verify_flags, context.sslobject_class) == before


def test_two_contexts_are_two_keys_even_if_they_look_alike() -> None:
    one, other = TlsSettings(ssl.create_default_context()), TlsSettings(ssl.create_default_context())
    assert one.key != other.key
    assert one.key == TlsSettings(one.context).key


def test_jobs_without_settings_share_the_default_until_the_authorities_change(
    monkeypatch: pytest.MonkeyPatch, tmp_path, ca: trustme.CA
) -> None:
    default = TlsSettings().key
    assert TlsSettings().key is default
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    changed = TlsSettings()
    assert changed.key is not default
    assert changed.effective().cert_store_stats()["x509_ca"] == 1


def test_the_default_verifies() -> None:
    context = TlsSettings().effective()
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname


async def test_the_certificate_is_that_of_the_connection_itself(server_tls: ssl.SSLContext, trust: ssl.SSLContext, ca: trustme.CA) -> None:
    """Two servers behind one context: each connection tells its own server's certificate."""
    other = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("localhost").configure_cert(other)
    async with Origin(tls=server_tls) as first, Origin(tls=other) as second:
        seen = []
        for server in (first, second, first):
            _, writer = await asyncio.open_connection("localhost", server.port, ssl=trust)
            certificate = peer_certificate(writer.transport)
            assert certificate is not None
            seen.append(hashlib.sha256(certificate).digest())
            writer.transport.abort()
    assert seen[0] == seen[2] != seen[1]


async def test_without_tls_there_is_no_certificate() -> None:
    async with Origin() as server:
        _, writer = await asyncio.open_connection("localhost", server.port)
        assert peer_certificate(writer.transport) is None
        writer.transport.abort()


def test_the_module_needs_no_aiohttp() -> None:
    code = "import sys, bits_async.transport.tls; sys.exit('aiohttp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- contexts for a job's security flags


def test_flags_that_are_not_about_tls_leave_the_settings_as_they_are(trust: ssl.SSLContext) -> None:
    for settings in (TlsSettings(), TlsSettings(trust)):
        assert settings.under(F.HTTP_REDIRECT_POLICY_DISALLOW) is settings


@pytest.mark.parametrize("given", [True, False])
def test_jobs_with_the_same_flags_share_a_context_and_others_do_not(trust: ssl.SSLContext, given: bool) -> None:
    settings = TlsSettings(trust if given else None)
    one, same, other = (settings.under(flags) for flags in (NAME, NAME | F.HTTP_REDIRECT_POLICY_DISALLOW, NAME | DATE))
    assert one.key == same.key
    assert len({one.key, other.key, settings.key}) == 3
    assert one.proxy is not None
    assert one.proxy.key == settings.key, "a proxy is verified as if there were no flags"


def test_a_derived_context_is_as_strict_as_the_one_it_was_made_from_but_for_the_flags(trust: ssl.SSLContext) -> None:
    trust.minimum_version = ssl.TLSVersion.TLSv1_3
    trust.verify_flags |= ssl.VERIFY_X509_STRICT
    trust.set_ciphers("ECDHE-RSA-AES256-GCM-SHA384")
    trust.hostname_checks_common_name = False
    made = TlsSettings(trust).under(DATE).effective()
    assert made is not trust
    assert (made.verify_mode, made.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert made.minimum_version is ssl.TLSVersion.TLSv1_3
    assert made.verify_flags & ~0x200000 == trust.verify_flags
    assert made.options == trust.options
    assert made.hostname_checks_common_name is False
    assert [cipher["name"] for cipher in made.get_ciphers()] == [cipher["name"] for cipher in trust.get_ciphers()]
    assert made.get_ca_certs() == trust.get_ca_certs()


def test_the_context_of_an_application_is_not_kept_alive_by_what_was_made_from_it(ca: trustme.CA) -> None:
    context = ssl.create_default_context()
    TlsSettings(context).under(NAME)
    gone = weakref.ref(context)
    del context
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("flags", [NAME, DATE, F.SSL_IGNORE_UNKNOWN_CA])
def test_a_context_whose_store_cannot_be_read_back_is_refused(tmp_path, flags) -> None:
    authority = Authority(tmp_path)
    leaf = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    leaf.load_verify_locations(cadata=authority.server.der)  # trusts one server's certificate itself
    lists = tmp_path / "revoked.pem"
    lists.write_bytes(authority.revocation_list().public_bytes(Encoding.PEM))
    revoking = ssl.create_default_context(cafile=str(authority.ca_file))
    revoking.load_verify_locations(cafile=str(lists))
    for context in (leaf, revoking):
        with pytest.raises(BitsError) as caught:
            TlsSettings(context).under(flags)
        assert caught.value.code == ErrorCode.E_NOTIMPL


def test_what_the_context_itself_does_not_check_is_not_checked_in_its_place() -> None:
    lax = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    lax.check_hostname = False
    assert TlsSettings(lax).under(F.SSL_IGNORE_UNKNOWN_CA).leaf == LeafRules(name=False)
    lax.verify_mode = ssl.CERT_NONE
    assert TlsSettings(lax).under(F.SSL_IGNORE_UNKNOWN_CA).leaf is None
    for call in (lambda: TlsSettings(lax).under(F.SSL_ENABLE_CRL_CHECK, b""), TlsSettings(lax).check_revocable):
        with pytest.raises(BitsError) as caught:
            call()
        assert caught.value.code == ErrorCode.E_NOTIMPL


# -- revocation lists


def test_lists_are_read_from_a_file_or_a_directory_and_certificates_beside_them_are_left_out(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    one, other = authority.revocation_list(), authority.revocation_list(authority.issue())
    source = tmp_path / "lists"
    source.mkdir()
    (source / "a.pem").write_bytes(authority.ca_file.read_bytes() + one.public_bytes(Encoding.PEM) + b"more text")
    (source / "b.crl").write_bytes(other.public_bytes(Encoding.DER))
    (source / "below").mkdir()
    found = read_revocation_lists(source, "alice")
    assert found.count(b"BEGIN X509 CRL") == 2
    assert b"CERTIFICATE" not in found
    trusting_nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made = TlsSettings(trusting_nobody).under(F.SSL_ENABLE_CRL_CHECK, found).effective()
    assert made.cert_store_stats() == {"x509": 0, "crl": 2, "x509_ca": 0}
    assert made.verify_flags & ssl.VERIFY_CRL_CHECK_LEAF
    assert not trusting_nobody.verify_flags & ssl.VERIFY_CRL_CHECK_LEAF


@pytest.mark.parametrize("lack", ["missing", "empty", "no list", "too large"])
def test_lists_that_cannot_be_read_are_an_error_that_names_the_place_and_the_reader(tmp_path: Path, monkeypatch, lack) -> None:
    source = tmp_path / "lists"
    if lack != "missing":
        source.write_bytes({"empty": b"", "no list": b"text", "too large": b"-" * 2000}[lack])
    monkeypatch.setattr(tls, "MAX_REVOCATION_LISTS", 1000)
    with pytest.raises(LocalFileError) as caught:
        read_revocation_lists(source, "alice")
    error = caught.value
    assert (error.code, error.path, error.identity) == (ErrorCode.ERROR_WINHTTP_SECURE_CERT_REV_FAILED, source, "alice")
    assert not error.transient


def test_t27_a_pipe_or_device_in_place_of_the_lists_keeps_no_thread(tmp_path: Path) -> None:
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
    for source in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(LocalFileError):
            read_revocation_lists(source, "alice")


def test_lists_that_openssl_does_not_understand_are_an_error(trust: ssl.SSLContext) -> None:
    with pytest.raises(LocalFileError) as caught:
        TlsSettings(trust).under(F.SSL_ENABLE_CRL_CHECK, b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n")
    assert caught.value.code == ErrorCode.ERROR_WINHTTP_SECURE_CERT_REV_FAILED
