"""Which TLS a lane speaks, and what this connection's own handshake showed.

A caller's `SSLContext` is used as it is: never changed, copied or stored. The certificate for channel binding is read from the
connection's own `ssl_object` after its handshake, never through a hook on a context that other connections share (T24).
This module knows no connection but the one it is asked about, and nothing of credentials.
"""

import asyncio
import functools
import os
import ssl
from dataclasses import dataclass

SHUTDOWN_TIMEOUT = 1.0
"""Seconds a closing connection waits for the peer's close_notify; an HTTP body has an end of its own, so nothing is lost."""


@dataclass(frozen=True)
class TlsSettings:
    """What decides how a server is verified and how we present ourselves to it.

    `context` None means Python's defaults, so `SSL_CERT_FILE` and `SSL_CERT_DIR` work.
    """

    context: ssl.SSLContext | None = None

    def effective(self) -> ssl.SSLContext:
        """The context to shake hands with. Reads the trusted authorities when the defaults are used for the first time."""
        if self.context is not None:
            return self.context
        return _default_context(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))

    @property
    def key(self) -> object:
        """What lanes are told apart by: the context itself; two that look alike may differ in what cannot be read back."""
        return self.effective()


@functools.lru_cache(maxsize=8)
def _default_context(cert_file: str | None, cert_dir: str | None) -> ssl.SSLContext:
    """One context per place the authorities come from, so that jobs without settings of their own share lanes."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


def peer_certificate(transport: asyncio.BaseTransport) -> bytes | None:
    """The certificate (DER) the peer of this very connection showed; None without TLS. In a tunnel: the innermost handshake's."""
    connection = transport.get_extra_info("ssl_object")
    if connection is None:
        return None
    certificate: bytes | None = connection.getpeercert(binary_form=True)
    return certificate
