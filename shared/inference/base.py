"""The protocol of inference clients: requests, answers and errors.

A further inference server is one module: a class with the methods of `InferenceClient`, entered in
`shared.inference.pool.CLIENTS`.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Protocol

from shared.messages import FinishReason, SamplingParameters, TokenCountSource


class GenerationError(RuntimeError):
    """A generation failed; the text names the endpoint and never quotes the prompt.

    Attributes:
        server_message: the error message of the model server. It may quote the prompt, so it goes to the requester and
            never into a log.
    """

    def __init__(self, text: str, *, server_message: str = "") -> None:
        super().__init__(text)
        self.server_message = server_message

    @property
    def for_requester(self) -> str:
        """The text, followed by the server's message."""
        return f"{self}: {self.server_message}" if self.server_message else str(self)


class EndpointUnavailable(GenerationError):  # noqa: N818 - callers handle a state of the endpoint
    """The endpoint is down, rejects requests, or failed internally: a retry on another one may succeed."""


class InvalidRequest(GenerationError):  # noqa: N818
    """The request is invalid: every endpoint would reject it."""


class DeadlineExceeded(GenerationError):  # noqa: N818
    """The time limit has passed."""


class GenerationCancelled(GenerationError):  # noqa: N818
    """`InferenceClient.cancel` ended this generation."""


class GenerationParameters(SamplingParameters):
    """The sampling parameters of one generation; fields that are None are left to the model server.

    `stop` holds the request's stop sequences and those of the chat template. They are not part of the answer.
    """

    @classmethod
    def of(cls, sampling: SamplingParameters, *, stop: Sequence[str] = ()) -> "GenerationParameters":
        """A request's sampling parameters, with the chat template's stop sequences added to the request's own."""
        sequences = tuple(dict.fromkeys(one for one in (*sampling.stop, *stop) if one))
        # Both parts are valid; together they may exceed the number of sequences that a request may have. A copy takes a
        # quarter of the time of `model_construct`.
        return _NO_PARAMETERS.model_copy(update={**sampling.__dict__, "stop": sequences})


_NO_PARAMETERS: Final = GenerationParameters()


SAMPLING_FIELDS: Final = tuple(name for name in SamplingParameters.model_fields if name not in {"max_tokens", "stop"})
"""Sampling parameters that are sent to the server only where the request sets them."""


@dataclass(frozen=True, slots=True)
class StreamTimeouts:
    """How long a streaming server may send nothing before the attempt fails; wall seconds.

    Attributes:
        first_s: until the first part of the answer; the request may have to wait in the server's queue.
        next_s: between two parts.
    """

    first_s: float
    next_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """The features that a model on a server supports.

    Attributes:
        streaming: it can send an answer in several parts.
        counts_tokens: it counts the tokens of prompt and answer.
        stop_sequences: it ends an answer at a stop sequence. Otherwise the client cuts the text there.
        sampling_fields: the sampling parameters that it accepts, a subset of `SAMPLING_FIELDS`.
    """

    streaming: bool
    counts_tokens: bool
    stop_sequences: bool
    sampling_fields: frozenset[str]

    @property
    def unsupported_sampling(self) -> tuple[str, ...]:
        """Sampling parameters that it does not accept; a request that sets one is rejected."""
        return tuple(name for name in SAMPLING_FIELDS if name not in self.sampling_fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One finished generation; times are event time, seconds since the Unix epoch.

    Attributes:
        text: the answer, without the prompt and without the stop sequence that ended it.
        completion_tokens: counted by `token_count_source`.
        prompt_tokens: None where nothing counts them.
        started_at_s: when the request was sent to the model server.
        first_token_at_s: when the first text was received; None for an empty answer.
        finished_at_s: when the last token was received.
    """

    text: str
    finish_reason: FinishReason
    completion_tokens: int
    prompt_tokens: int | None
    token_count_source: TokenCountSource
    started_at_s: float
    first_token_at_s: float | None
    finished_at_s: float

    @property
    def started_at(self) -> datetime:
        """When the request was sent to the model server, event time."""
        return datetime.fromtimestamp(self.started_at_s, UTC)

    @property
    def first_token_at(self) -> datetime | None:
        """When the first text was received, event time."""
        return None if self.first_token_at_s is None else datetime.fromtimestamp(self.first_token_at_s, UTC)

    @property
    def finished_at(self) -> datetime:
        """When the last token was received, event time."""
        return datetime.fromtimestamp(self.finished_at_s, UTC)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of an answer.

    Attributes:
        text: the text that this part adds; may be empty in the last chunk.
        generation: the whole answer; only the last chunk has it.
    """

    text: str
    generation: Generation | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PreparedRequest:
    """A generation that `InferenceClient.prepare` has checked; it is also the handle by which it is cancelled.

    Attributes:
        prompt: with the chat template and the directive applied.
        payload: what the client sends; only the client that prepared it reads it.
    """

    request_id: str
    prompt: str
    parameters: GenerationParameters
    payload: Any


class InferenceClient(Protocol):
    """One model on one inference server. Nothing is sent before the first call.

    Errors name the endpoint and never quote a prompt. Time limits are wall seconds.
    """

    @property
    def name(self) -> str:
        """The endpoint's name, for messages."""
        ...

    @property
    def capabilities(self) -> Capabilities | None:
        """What the model supports; None before the first successful `probe`."""
        ...

    async def probe(self, *, timeout_s: float) -> Capabilities:
        """Ask the server what its model supports. A restarted server may serve another model, so repeat it.

        Raises:
            EndpointUnavailable: no answer within the time, no such model, or a model that cannot generate text.
        """
        ...

    async def is_ready(self, *, timeout_s: float) -> bool:
        """Whether the server responds within the time and has the model loaded."""
        ...

    async def prepare(
        self, prompt: str, parameters: GenerationParameters, *, request_id: str, timeout_s: float, streamed: bool = True
    ) -> PreparedRequest:
        """Check a request against the model's capabilities and build what is sent; probes if nothing is known yet.

        Args:
            prompt: with the chat template and the directive applied.
            streamed: False asks for a single response: it costs less, but the time of the first token is not known. The
                client streams all the same where it must: to count tokens, or to stop the server at a stop sequence.

        Raises:
            InvalidRequest: the model does not support a parameter.
            EndpointUnavailable: probing failed.
            DeadlineExceeded: `timeout_s` is not positive.
        """
        ...

    def stream(
        self, request: PreparedRequest, *, timeout_s: float, stream_timeouts: StreamTimeouts | None = None
    ) -> AsyncGenerator[Chunk, None]:
        """Generate: yields new text as it arrives, and last a chunk with the whole `Generation`.

        Close the iterator (`contextlib.aclosing`) to stop the server before the end.

        Args:
            timeout_s: for the whole answer.
            stream_timeouts: between its parts; None: `timeout_s` is the only limit.

        Raises:
            EndpointUnavailable: a retry on another endpoint may succeed.
            InvalidRequest: every endpoint would reject the request.
            DeadlineExceeded: `timeout_s` has passed.
            GenerationCancelled: `cancel` was called before any text arrived. Afterwards the last chunk has the
                generation until then, with finish reason `cancelled`.
        """
        ...

    def cancel(self, request: PreparedRequest) -> None:
        """Stop a generation from another task than the one that reads its stream; no effect if it is not running."""
        ...

    async def close(self) -> None:
        """Cancel what is running and disconnect."""
        ...


async def generate(
    client: InferenceClient,
    prompt: str,
    parameters: GenerationParameters,
    *,
    request_id: str,
    timeout_s: float,
    streamed: bool = True,
) -> Generation:
    """Generate, and return the whole answer; see `InferenceClient.prepare` and `InferenceClient.stream`."""
    request = await client.prepare(prompt, parameters, request_id=request_id, timeout_s=timeout_s, streamed=streamed)
    async with aclosing(client.stream(request, timeout_s=timeout_s)) as chunks:
        async for chunk in chunks:
            if chunk.generation is not None:
                return chunk.generation
    raise EndpointUnavailable(f"{client.name}: the stream ended without an answer")
