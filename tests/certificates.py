"""Throw-away certificates: an authority, servers' certificates, and contexts of clients that trust the authority alone."""

import hashlib
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import pkcs12
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DAY = timedelta(days=1)


@dataclass(frozen=True)
class ServerTls:
    """A certificate and the server's context that shows it."""

    context: ssl.SSLContext
    der: bytes

    @property
    def binding(self) -> bytes:
        """The channel binding's application data (tls-server-end-point; the authority signs with SHA-256)."""
        return b"tls-server-end-point:" + hashlib.sha256(self.der).digest()


@dataclass(frozen=True)
class ClientTls:
    """A client's certificate and its key."""

    certificate: x509.Certificate
    private: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def key(self, password: bytes | None = None) -> bytes:
        """As PEM."""
        return self.private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, _sealed_by(password))

    def pkcs12(self, password: bytes | None = None) -> bytes:
        return pkcs12.serialize_key_and_certificates(b"me", self.private, self.certificate, None, _sealed_by(password))


def _sealed_by(password: bytes | None) -> serialization.KeySerializationEncryption:
    return serialization.NoEncryption() if password is None else serialization.BestAvailableEncryption(password)


class Authority:
    """A throw-away certificate authority, the contexts of clients that trust it, and certificates of servers."""

    def __init__(self, directory: Path) -> None:
        self._ca = trustme.CA()
        self.ca_file = directory / "ca.pem"
        self._ca.cert_pem.write_to_path(str(self.ca_file))
        self.server = self.issue()

    def issue(self, *names: str, not_before: datetime | None = None, not_after: datetime | None = None) -> ServerTls:
        """A new certificate, for localhost and 127.0.0.1 unless other names are given."""
        certificate = self._ca.issue_cert(*(names or ("localhost", "127.0.0.1")), not_before=not_before, not_after=not_after)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate.configure_cert(context)
        return ServerTls(context, ssl.PEM_cert_to_DER_cert(certificate.cert_chain_pems[0].bytes().decode()))

    def issue_for_clients(self, directory: Path) -> ServerTls:
        """A certificate for localhost that says it is for clients only."""
        key = ec.generate_private_key(ec.SECP256R1())
        authority = x509.load_pem_x509_certificate(self._ca.cert_pem.bytes())
        now = datetime.now(UTC)
        builder = x509.CertificateBuilder(authority.subject, x509.Name([]), key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now - DAY).not_valid_after(now + DAY)
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        certificate = builder.sign(self._signer(), hashes.SHA256())
        file = directory / "for-clients.pem"
        pem, none = serialization.Encoding.PEM, serialization.NoEncryption()
        file.write_bytes(certificate.public_bytes(pem) + key.private_bytes(pem, serialization.PrivateFormat.PKCS8, none))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file)
        return ServerTls(context, certificate.public_bytes(serialization.Encoding.DER))

    def issue_client(
        self, *, organization: str = "Lab", name: str = "alice", servers_only: bool = False, not_after: datetime | None = None
    ) -> ClientTls:
        """A certificate of a user, O=organization, CN=name, and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        authority = x509.load_pem_x509_certificate(self._ca.cert_pem.bytes())
        subject = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization), x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now, usage = datetime.now(UTC), ExtendedKeyUsageOID.SERVER_AUTH if servers_only else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = x509.CertificateBuilder(authority.subject, subject, key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now - DAY).not_valid_after(not_after or now + DAY)
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        return ClientTls(builder.sign(self._signer(), hashes.SHA256()), key)

    def asking(self, mode: ssl.VerifyMode = ssl.CERT_REQUIRED) -> ServerTls:
        """A server that asks for a client's certificate of this authority."""
        server = self.issue()
        server.context.load_verify_locations(self.ca_file)
        server.context.verify_mode = mode
        return server

    def revocation_list(self, *revoked: ServerTls, expired: bool = False) -> x509.CertificateRevocationList:
        """The authority's list of the servers it does not vouch for any more."""
        authority = x509.load_pem_x509_certificate(self._ca.cert_pem.bytes())
        now = datetime.now(UTC)
        builder = x509.CertificateRevocationListBuilder().issuer_name(authority.subject).last_update(now - 2 * DAY)
        builder = builder.next_update(now - DAY if expired else now + DAY)
        for server in revoked:
            serial = x509.load_der_x509_certificate(server.der).serial_number
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now - DAY).build()
            builder = builder.add_revoked_certificate(entry)
        return builder.sign(self._signer(), hashes.SHA256())

    def _signer(self) -> ec.EllipticCurvePrivateKey:
        key = serialization.load_pem_private_key(self._ca.private_key_pem.bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return key

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
