"""The connection to a Triton server, and how its calls are made."""

from typing import Final

import grpc

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
