"""Credentials of an encrypted connection to a model server, from the files that the fleet file names."""

from pathlib import Path

import grpc

from shared.fleet import Endpoint, Pool
from shared.tls import tls_context


def credentials_of(pool: Pool, endpoint: Endpoint) -> grpc.ChannelCredentials | None:
    """What gRPC is given; null for plain text.

    gRPC itself would say nothing of a bad file until a connection fails, and then little: so it is tried before.

    Raises:
        FleetError: a file cannot be used.
    """
    security = endpoint.over(pool)
    if not security.tls:
        return None
    tls_context(security, endpoint=endpoint.name)
    return grpc.ssl_channel_credentials(
        root_certificates=_content(security.tls_ca_file),
        private_key=_content(security.tls_key_file),
        certificate_chain=_content(security.tls_cert_file),
    )


def _content(file: Path | None) -> bytes | None:
    return None if file is None else file.read_bytes()
