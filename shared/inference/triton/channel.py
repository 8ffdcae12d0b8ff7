"""The connection to a Triton server, and how its calls are made.

Credentials of an encrypted connection to a model server, from the files that the fleet file names.
"""

import asyncio
from pathlib import Path
from typing import Any, Final

import grpc
from tritonclient.grpc.service_pb2 import ModelInferRequest, ModelStreamInferResponse
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from shared.fleet import Endpoint, Pool, tls_context

LARGEST_MESSAGE_BYTES: Final = 64 * 1024 * 1024

CHANNEL_OPTIONS: Final = (
    ("grpc.max_send_message_length", LARGEST_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", LARGEST_MESSAGE_BYTES),
    # A server that vanished without a word is noticed within 30 s while something waits for it. Two pings without data
    # are as many as a server with default settings bears.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.max_pings_without_data", 2),
    # A server that comes back is found soon.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 3_000),
    ("grpc.use_local_subchannel_pool", 1),
)

STATUS_MODE: Final = (("triton_grpc_error", "true"),)
"""Metadata that makes Triton end a stream with the error's gRPC status instead of a bare text in the stream."""

STATUS_S: Final = 0.25
"""Wall seconds for the status of a stream that is over; without effect where it has come."""

STREAM_METHOD: Final = "/inference.GRPCInferenceService/ModelStreamInfer"


class Connection:
    """The calls of one Triton server; connects when the first is made, and again after `close`.

    The stub's method of a stream is for many requests; ours carries one, so it is called as a method that takes one,
    whose request goes out in a single step instead of three. On the wire both are the same.
    """

    def __init__(self, address: str, *, credentials: grpc.ChannelCredentials | None, server_name: str | None) -> None:
        """Take what `open_channel` takes."""
        self._address = address
        self._credentials = credentials
        self._server_name = server_name
        self._opened: tuple[grpc.aio.Channel, GRPCInferenceServiceStub, Any] | None = None

    @property
    def stub(self) -> Any:  # noqa: ANN401 - its methods have no types
        """For calls with one answer."""
        return self._open()[1]

    def stream(self, request: ModelInferRequest, *, timeout_s: float) -> Any:  # noqa: ANN401 - not generic in the stubs
        """Begin a generation; returns gRPC's `UnaryStreamCall` of `ModelStreamInferResponse`."""
        return self._open()[2](request, timeout=timeout_s, metadata=STATUS_MODE)

    @staticmethod
    def leave(call: Any) -> None:  # noqa: ANN401
        """Let a stream end by itself whose last message was read: its status is on its way, and nobody waits for it.

        A call that nobody refers to is cancelled, so the timer keeps it. gRPC's own callback at a call's end would make
        a cycle of the call and itself, and of every prompt something for the cyclic collector.
        """
        asyncio.get_running_loop().call_later(STATUS_S, call.cancel)

    async def close(self) -> None:
        """Cancel what runs and disconnect."""
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
    """A channel that connects when it is first used.

    Args:
        credentials: for TLS; null: plain text.
        server_name: that the server's certificate has; null: the host of the address.
    """
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
    options: tuple[tuple[str, str | int], ...] = CHANNEL_OPTIONS
    if server_name is not None:
        options = (*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", server_name))
    return grpc.aio.secure_channel(address, credentials, options=options)


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
