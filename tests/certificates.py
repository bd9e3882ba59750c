"""Certificates for tests: an authority, and what it signs."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from nixl_async import TLS

PEM = serialization.Encoding.PEM


@dataclass
class Authority:
    """Signs certificates; `ca` is the file that those who believe it are given."""

    directory: Path
    name: str = "authority"

    def __post_init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, self.name)])
        built = self._build(self._subject, self._key.public_key()).add_extension(
            x509.BasicConstraints(ca=True, path_length=None), critical=True
        )
        usage = x509.KeyUsage(*(False,) * 5, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False)
        built = built.add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
        self.ca = self.directory / f"{self.name}.pem"
        signed = built.add_extension(usage, critical=True).sign(self._key, hashes.SHA256())
        self.ca.write_bytes(signed.public_bytes(PEM))

    def _build(self, subject: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
        )

    def issue(
        self, common: str, *, dns: tuple[str, ...] = (), uris: tuple[str, ...] = (), stem: str = ""
    ) -> tuple[Path, Path]:
        """Write a certificate and its key; return the two files."""
        key = ec.generate_private_key(ec.SECP256R1())
        built = self._build(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common)]), key.public_key())
        names: list[x509.GeneralName] = [*map(x509.DNSName, dns), *map(x509.UniformResourceIdentifier, uris)]
        if names:
            built = built.add_extension(x509.SubjectAlternativeName(names), critical=False)
        # Python 3.13's default context asks for it (ssl.VERIFY_X509_STRICT).
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        built = built.add_extension(issuer, critical=False)
        public, private = (self.directory / f"{stem or common}{end}" for end in (".crt", ".key"))
        public.write_bytes(built.sign(self._key, hashes.SHA256()).public_bytes(PEM))
        private.write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
        return public, private

    def tls(self, common: str, **options: object) -> TLS:
        """Return mutual TLS for an agent of that name."""
        certificate, key = self.issue(common, **options)  # type: ignore[arg-type]
        return TLS(certificate=certificate, key=key, ca=self.ca)
