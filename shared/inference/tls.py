"""The TLS context of a client of a model server: of its gRPC interface, or of its metrics."""

import ssl

from shared.fleet import FleetError
from shared.pools import TlsFields


def tls_context(security: TlsFields, *, endpoint: str) -> ssl.SSLContext:
    """The TLS context of a client of an endpoint.

    Raises:
        FleetError: a file cannot be used.
    """
    where = f"endpoint {endpoint!r}"
    authorities, certificate, key = security.tls_ca_file, security.tls_cert_file, security.tls_key_file
    try:
        context = ssl.create_default_context(cafile=authorities)
    except OSError as error:
        raise FleetError(
            f"{where}: tls_ca_file {authorities} cannot be used: {error}; it must be the PEM of an authority"
        ) from error
    if certificate is not None and key is not None:
        try:
            # A function: with None OpenSSL would ask for the password of an encrypted key on the terminal.
            context.load_cert_chain(certificate, key, password=lambda: "")
        except OSError as error:
            raise FleetError(
                f"{where}: tls_cert_file {certificate} with tls_key_file {key} cannot be used: {error}; they must be "
                "PEM and belong together, and the key must not be encrypted"
            ) from error
    return context
