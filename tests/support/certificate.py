"""Certificates for the tests of TLS, made with `openssl` and valid for a day."""

import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Certificate:
    """PEM files. `both` is the key, then the certificate and its issuer's, as Kafka reads them."""

    certificate: Path
    key: Path
    both: Path


class Authority:
    """An authority of the test's own."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.certificate = folder / f"{name}.pem"
        self._key = folder / f"{name}.key"
        _openssl(
            "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", f"/CN={name}",
            "-addext", "keyUsage=critical,keyCertSign,cRLSign", "-keyout", self._key, "-out", self.certificate,
        )  # fmt: skip

    def issue(self, name: str, *, alternative: str = "IP:127.0.0.1", password: str = "") -> Certificate:
        """A certificate for a server or a client.

        Args:
            alternative: the subject's alternative name.
            password: of the key; empty: it is not encrypted.
        """
        key, certificate, request = (self.folder / f"{name}.{ending}" for ending in ("key", "pem", "csr"))
        extensions = self.folder / f"{name}.ext"
        extensions.write_text(
            f"subjectAltName={alternative}\nkeyUsage=critical,digitalSignature,keyEncipherment\n"
            "extendedKeyUsage=serverAuth,clientAuth\nauthorityKeyIdentifier=keyid\n"
        )
        encryption = ("-passout", f"pass:{password}") if password else ("-nodes",)
        _openssl("req", "-newkey", "rsa:2048", *encryption, "-subj", f"/CN={name}", "-keyout", key, "-out", request)
        _openssl(
            "x509", "-req", "-in", request, "-CA", self.certificate, "-CAkey", self._key, "-CAcreateserial",
            "-days", "1", "-extfile", extensions, "-out", certificate,
        )  # fmt: skip
        both = self.folder / f"{name}.both.pem"
        both.write_text(key.read_text() + certificate.read_text() + self.certificate.read_text())
        return Certificate(certificate, key, both)


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)
