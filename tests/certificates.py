"""Throw-away certificates: an authority, servers' certificates, and contexts of clients that trust the authority alone."""

import hashlib
import ssl
from dataclasses import dataclass
from pathlib import Path

import trustme


@dataclass(frozen=True)
class ServerTls:
    """A certificate and the server's context that shows it."""

    context: ssl.SSLContext
    der: bytes

    @property
    def binding(self) -> bytes:
        """The channel binding's application data (tls-server-end-point; the authority signs with SHA-256)."""
        return b"tls-server-end-point:" + hashlib.sha256(self.der).digest()


class Authority:
    """A throw-away certificate authority, the contexts of clients that trust it, and certificates of servers."""

    def __init__(self, directory: Path) -> None:
        self._ca = trustme.CA()
        self.ca_file = directory / "ca.pem"
        self._ca.cert_pem.write_to_path(str(self.ca_file))
        self.server = self.issue()

    def issue(self, *names: str) -> ServerTls:
        """A new certificate, for localhost and 127.0.0.1 unless other names are given."""
        certificate = self._ca.issue_cert(*(names or ("localhost", "127.0.0.1")))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate.configure_cert(context)
        return ServerTls(context, ssl.PEM_cert_to_DER_cert(certificate.cert_chain_pems[0].bytes().decode()))

    def client(self) -> ssl.SSLContext:
        """A new context that trusts this authority alone."""
        return ssl.create_default_context(cafile=str(self.ca_file))

    def write_server_files(self, directory: Path, *names: str) -> tuple[Path, Path]:
        """A certificate chain and its key as files, for servers in other processes."""
        certificate = self._ca.issue_cert(*(names or ("localhost", "127.0.0.1")))
        chain, key = directory / "server.pem", directory / "server.key"
        chain.write_bytes(b"".join(pem.bytes() for pem in certificate.cert_chain_pems))
        certificate.private_key_pem.write_to_path(str(key))
        return chain, key
