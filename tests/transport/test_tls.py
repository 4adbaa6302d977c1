"""TLS settings and the certificate that channel binding is made of."""

import asyncio
import hashlib
import ssl
import subprocess
import sys

import pytest
import trustme

from bits_async.transport.tls import TlsSettings, peer_certificate
from tests.transport.wire import Origin


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
