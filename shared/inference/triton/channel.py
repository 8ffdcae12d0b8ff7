"""The gRPC connection to a Triton server, its TLS credentials, and what its errors mean."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import grpc
from tritonclient.grpc.service_pb2 import ModelInferRequest, ModelStreamInferResponse
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from shared.fleet import tls_context
from shared.inference.base import DeadlineExceeded, EndpointUnavailable, GenerationError, InvalidRequest
from shared.pools import Endpoint, Pool

MAX_MESSAGE_BYTES: Final = 64 * 1024 * 1024

CHANNEL_OPTIONS: Final = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Detects within 30 s that a server has disappeared while a call is waiting for it. A server with default settings
    # tolerates two pings without data.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.max_pings_without_data", 2),
    # Reconnects soon after a server has restarted.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 3_000),
    ("grpc.use_local_subchannel_pool", 1),
)

ERROR_STATUS_METADATA: Final = (("triton_grpc_error", "true"),)
"""Makes Triton end a stream with the error's gRPC status instead of a text in the stream.

In this mode Triton 2.51 can crash when a request fails (in five trials, after 2 to 219 failed requests; never in 5,000
without it), so it is used only for models whose status shows whether the request is invalid.
"""

STATUS_TIMEOUT_S: Final = 0.25
"""Wall seconds to wait for the status of a stream whose last message was read, before it is cancelled."""

STREAM_METHOD: Final = "/inference.GRPCInferenceService/ModelStreamInfer"

_INVALID: Final = frozenset(
    {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.ALREADY_EXISTS}
)


class Connection:
    """The calls to one Triton server; connects with the first call, and again after `close`.

    The stub's streaming method takes many requests. Sprout sends one per stream, so the method is called as one that
    takes a single request, which is sent in one step instead of three. On the wire both are the same.
    """

    def __init__(self, address: str, *, credentials: grpc.ChannelCredentials | None, server_name: str | None) -> None:
        """Configure the connection; the arguments are those of `open_channel`."""
        self._address = address
        self._credentials = credentials
        self._server_name = server_name
        self._opened: tuple[grpc.aio.Channel, GRPCInferenceServiceStub, Any] | None = None

    @property
    def stub(self) -> Any:  # noqa: ANN401 - its methods have no types
        """For calls with a single response."""
        return self._open()[1]

    def stream(self, request: ModelInferRequest, *, timeout_s: float, error_status: bool) -> Any:  # noqa: ANN401
        """Start a generation; returns gRPC's `UnaryStreamCall` of `ModelStreamInferResponse`, not generic in the stubs.

        Args:
            error_status: end the stream of a failed request with a gRPC status; otherwise it carries a text.
        """
        return self._open()[2](request, timeout=timeout_s, metadata=ERROR_STATUS_METADATA if error_status else None)

    @staticmethod
    def finish(call: Any) -> None:  # noqa: ANN401
        """Let a stream whose last message was read end by itself, without waiting for its status.

        Cancelling a stream at the moment at which it ends is a race in Triton (server issue 8034), and gRPC cancels a
        call that is garbage collected, so the timer keeps a reference. gRPC's `add_done_callback` would create a
        reference cycle of the call and the callback, and leave every prompt to the cyclic garbage collector.
        """
        asyncio.get_running_loop().call_later(STATUS_TIMEOUT_S, call.cancel)

    async def close(self) -> None:
        """Cancel what is running and disconnect."""
        opened, self._opened = self._opened, None
        if opened is not None:
            await opened[0].close(None)

    def _open(self) -> tuple[grpc.aio.Channel, GRPCInferenceServiceStub, Any]:
        if self._opened is None:
            channel = open_channel(self._address, credentials=self._credentials, server_name=self._server_name)
            stream = channel.unary_stream(
                STREAM_METHOD,
                request_serializer=ModelInferRequest.SerializeToString,
                response_deserializer=ModelStreamInferResponse.FromString,
            )
            self._opened = channel, GRPCInferenceServiceStub(channel), stream
        return self._opened


def open_channel(
    address: str, *, credentials: grpc.ChannelCredentials | None, server_name: str | None
) -> grpc.aio.Channel:
    """Create a channel that connects when it is first used.

    Args:
        credentials: for TLS; None for plain text.
        server_name: the name in the server's certificate; None for the host of the address.
    """
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
    options: tuple[tuple[str, str | int], ...] = CHANNEL_OPTIONS
    if server_name is not None:
        options = (*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", server_name))
    return grpc.aio.secure_channel(address, credentials, options=options)


def credentials_of(pool: Pool, endpoint: Endpoint) -> grpc.ChannelCredentials | None:
    """Load an endpoint's TLS credentials; None for plain text.

    gRPC reports an unusable file only when a connection fails, and without details, so the files are checked before.

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


def status_error(
    endpoint: str, code: grpc.StatusCode, details: str | None, *, invalid_request_phrases: Sequence[str] = ()
) -> GenerationError:
    """The error of a call that ended with a gRPC status.

    Args:
        invalid_request_phrases: see `TensorContract`.
    """
    text, message = f"{endpoint}: {code.name}", shorten(details or "")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(text, server_message=message)
    if code in _INVALID or _contains_any(message, invalid_request_phrases):
        return InvalidRequest(text, server_message=message)
    return EndpointUnavailable(text, server_message=message)


def stream_error(endpoint: str, details: str, *, invalid_request_phrases: Sequence[str] = ()) -> GenerationError:
    """The error that a stream carries as a text, without a status."""
    message = shorten(details)
    kind = InvalidRequest if _contains_any(message, invalid_request_phrases) else EndpointUnavailable
    return kind(f"{endpoint}: the model failed", server_message=message)


def shorten(text: str) -> str:
    """A server's message on one line, cut to 300 characters."""
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:297]}..."


def _contains_any(message: str, phrases: Sequence[str]) -> bool:
    return any(phrase in message for phrase in phrases)


def _content(file: Path | None) -> bytes | None:
    return None if file is None else file.read_bytes()
