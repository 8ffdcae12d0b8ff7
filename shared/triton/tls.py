"""Credentials of an encrypted connection to a model server, from the files that the fleet file names."""

import ssl
from pathlib import Path

import grpc

from shared.fleet import Endpoint, Pool
from shared.fleet_parts import FleetError, TlsFields


def security_of(pool: Pool, endpoint: Endpoint) -> TlsFields:
    """How an endpoint's connection is secured: its own fields, else its pool's."""
    return endpoint.over(pool)


def credentials_of(pool: Pool, endpoint: Endpoint) -> grpc.ChannelCredentials | None:
    """What gRPC is given; null for plain text.

    gRPC itself would say nothing of a bad file until a connection fails, and then little.

    Raises:
        FleetError: a file cannot be used.
    """
    security = security_of(pool, endpoint)
    if not security.tls:
        return None
    where = f"endpoint {endpoint.name!r}"
    authorities, certificate, key = security.tls_ca_file, security.tls_cert_file, security.tls_key_file
    try:
        context = ssl.create_default_context(cafile=authorities)
    except OSError as error:
        raise FleetError(
            f"{where}: tls_ca_file {authorities} cannot be used: {error}; it must be the PEM of an authority"
        ) from error
    if certificate is not None and key is not None:
        try:
            # A function, because without a password OpenSSL would ask for one on the terminal.
            context.load_cert_chain(certificate, key, password=lambda: "")
        except OSError as error:
            raise FleetError(
                f"{where}: tls_cert_file {certificate} with tls_key_file {key} cannot be used: {error}; they must be "
                "PEM and belong together, and the key must not be encrypted"
            ) from error
    return grpc.ssl_channel_credentials(
        root_certificates=_content(authorities),
        private_key=_content(key),
        certificate_chain=_content(certificate),
    )


def _content(file: Path | None) -> bytes | None:
    return None if file is None else file.read_bytes()
