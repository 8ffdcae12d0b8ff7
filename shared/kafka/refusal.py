"""Why Kafka turns a client away. aiokafka itself says only that it could not bootstrap."""

import asyncio
import ssl

from aiokafka.conn import collect_hosts, create_conn
from aiokafka.errors import (
    AuthenticationFailedError,
    IllegalSaslStateError,
    KafkaError,
    SaslAuthenticationFailed,
    UnsupportedSaslMechanismError,
)

from shared.runtime.settings import KafkaSettings

TIMEOUT_MS = 5_000


class KafkaRefusedError(RuntimeError):
    """The broker does not accept this client, or the client not the broker; waiting does not help."""


async def refusal(kafka: KafkaSettings) -> str | None:
    """What the settings get wrong, in words and without a secret; null where that is not the problem.

    Connects once to each bootstrap server, until one gives an answer to that.
    """
    for host, port, _ in collect_hosts(kafka.bootstrap_servers):
        try:
            connection = await create_conn(host, port, request_timeout_ms=TIMEOUT_MS, **kafka.security_options())
        except (KafkaError, OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            found = _told(kafka, f"{host}:{port}", error)
            if found is not None:
                return found
        else:
            connection.close()
            return None
    return None


def _told(kafka: KafkaSettings, address: str, error: BaseException) -> str | None:
    match error:
        case SaslAuthenticationFailed() | AuthenticationFailedError():
            return (
                f"{address} refuses the credentials of user {kafka.sasl_username!r} ({kafka.sasl_mechanism}): check "
                "SPROUT_KAFKA_SASL_USERNAME, the password, and that the broker knows the user for this mechanism"
            )
        case UnsupportedSaslMechanismError() | IllegalSaslStateError():
            return (
                f"{address} does not take {kafka.sasl_mechanism} on this listener: check SPROUT_KAFKA_SASL_MECHANISM "
                "and SPROUT_KAFKA_SECURITY_PROTOCOL"
            )
        case ssl.SSLCertVerificationError():
            return (
                f"the certificate of {address} is not trusted: {error.verify_message}. Check SPROUT_KAFKA_SSL_CA_FILE, "
                "and that the certificate names this address"
            )
        case ssl.SSLError():
            return (
                f"no TLS with {address}: {error.reason}. Check SPROUT_KAFKA_SECURITY_PROTOCOL (is the listener's "
                f"{kafka.security_protocol}?) and, where the broker asks for one, SPROUT_KAFKA_SSL_CERTIFICATE_FILE"
            )
        case _:
            return None
