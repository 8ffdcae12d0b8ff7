"""What a model server's error means for the caller: its gRPC status, or its words where the status does not tell."""

from collections.abc import Sequence
from typing import Final

import grpc

from shared.triton.errors import DeadlineExceeded, EndpointUnavailable, GenerationError, InvalidRequest

_INVALID: Final = frozenset(
    {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.ALREADY_EXISTS}
)


def failure(
    endpoint: str, code: grpc.StatusCode, details: str | None, *, refusals: Sequence[str] = ()
) -> GenerationError:
    """The error of a call that ended with a status.

    Args:
        refusals: words by which the server blames the request, see `Dialect`.
    """
    text, said = f"{endpoint}: {code.name}", shortened(details or "")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(text, said=said)
    if code in _INVALID or _blamed(said, refusals):
        return InvalidRequest(text, said=said)
    return EndpointUnavailable(text, said=said)


def failure_in_stream(endpoint: str, message: str, *, refusals: Sequence[str] = ()) -> GenerationError:
    """The error that a stream carries as a bare text."""
    said = shortened(message)
    kind = InvalidRequest if _blamed(said, refusals) else EndpointUnavailable
    return kind(f"{endpoint}: the model failed", said=said)


def shortened(text: str) -> str:
    """A server's words, on one line and of bounded length."""
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:297]}..."


def _blamed(said: str, refusals: Sequence[str]) -> bool:
    return any(words in said for words in refusals)
