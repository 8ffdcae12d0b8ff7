"""Topics `requests`, `responses` and `response-chunks`: what a producer asks for, and the answers."""

from typing import Annotated, Final, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from shared.messages.base import (
    RECORD,
    Identifier,
    Level,
    Message,
    Probability,
    RequestedDirective,
    RequestMessage,
    UtcDatetime,
    Value,
    Zone,
)

TokenCountSource = Literal["server", "stream", "tokenizer"]
DecisionSource = Literal["policy", "forced", "fallback", "switchback"]
FinishReason = Literal["stop", "length", "cancelled", "deadline"]
ErrorCode = Literal[
    "deadline_exceeded", "unknown_model", "unknown_level", "prompt_too_large", "no_endpoint", "upstream_error",
    "invalid_request", "cancelled",
]  # fmt: skip

MAX_REFERENCE_CHARS: Final = 8_000

ReferenceAnswer = Annotated[
    Annotated[str, Field(max_length=MAX_REFERENCE_CHARS)] | None,
    AfterValidator(lambda text: (text or "").strip() or None),
    Field(
        repr=False,
        description="The right answer, where the producer knows it: a number, a letter of a choice, or a text. Answers "
        "are evaluated with it; no model sees it but the judge. Blank: none",
    ),
]
"""A known right answer; None: unknown."""


class ChatMessage(Value):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"] = Field(description="Author of the turn")
    content: str = Field(description="Text of the turn")


class SamplingParameters(Value):
    """How the model samples its answer: the one definition, from which every server's request is derived.

    A parameter that is `None` is left to the model server.
    """

    max_tokens: int = Field(default=512, ge=1, le=32_768, description="Maximum number of tokens to generate")
    temperature: float | None = Field(default=None, ge=0.0, le=5.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    top_k: int | None = Field(default=None, ge=1)
    min_tokens: int | None = Field(default=None, ge=0)
    repetition_penalty: float | None = Field(default=None, gt=0.0)
    presence_penalty: float | None = Field(default=None, ge=-2.0, le=2.0)
    frequency_penalty: float | None = Field(default=None, ge=-2.0, le=2.0)
    stop: tuple[str, ...] = Field(default=(), max_length=16, description="Sequences that end the answer")
    seed: int | None = Field(default=None, ge=0)


class GenerationRequest(Message):
    """A prompt to be answered. Give either `prompt` or `messages`."""

    id: Identifier | None = Field(
        default=None, description="Unique id; default: derived from the record's topic, partition and offset"
    )
    model: Identifier | None = Field(default=None, description="Logical model; default: the fleet's first")
    prompt: str | None = Field(default=None, min_length=1, description="A single user turn")
    messages: tuple[ChatMessage, ...] | None = Field(
        default=None, min_length=1, description="A conversation; the last turn is the user's"
    )
    task: Identifier | None = Field(default=None, description="Kind of task, where the producer knows it")
    tenant: Identifier | None = Field(
        default=None, description="Tenant: selects defaults of the fleet file, and rows of reports"
    )
    directive: RequestedDirective | None = Field(
        default=None, description="Level to use instead of the one the policy draws; with prefix '!': level not to use"
    )
    zone: Zone | None = Field(
        default=None, description="Grid zone in which the request may run; default: wherever the policy says"
    )
    sampling: SamplingParameters = Field(default_factory=SamplingParameters)
    stream: bool = Field(default=False, description="Publish the answer in chunks as well")
    reply_partition: int | None = Field(
        default=None,
        ge=0,
        description="Partition of the topic `replies` that gets the answer's chunks and the answer",
    )
    evaluation_allowed: bool = Field(default=True, description="False: the prompt is never sampled for evaluation")
    reference: ReferenceAnswer = None
    requested_at: UtcDatetime | None = Field(
        default=None, description="Event time; default: the record's Kafka timestamp"
    )
    deadline: UtcDatetime | None = Field(default=None, description="The answer is useless after this time")
    metadata: dict[str, str] = Field(default_factory=dict, max_length=32, description="Copied into the response")

    @model_validator(mode="after")
    def _one_of_prompt_and_messages(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            found = "both" if self.prompt is not None else "neither"
            raise ValueError(f"give either 'prompt' (a text) or 'messages' (a conversation), found {found}")
        if self.messages is not None and self.messages[-1].role != "user":
            raise ValueError(
                f"the last of 'messages' must have role 'user', found {self.messages[-1].role!r}: "
                "there is nothing to answer"
            )
        return self

    def conversation(self) -> tuple[ChatMessage, ...]:
        """The turns to answer: `messages`, or `prompt` as the only turn."""
        if self.messages is not None:
            return self.messages
        return (ChatMessage(role="user", content=self.prompt or ""),)


class ErrorDetail(Value):
    """Why a request could not be answered."""

    code: ErrorCode
    message: str = Field(
        description="What went wrong and what to do; quotes the prompt only where the model server's message does"
    )


class Decision(Value):
    """Which option served the request, and how it was chosen: the input of the saving estimator."""

    source: DecisionSource = Field(
        description="policy: drawn; forced: required by the request; fallback: no valid policy; switchback: the whole "
        "fleet serves as it would without Sprout"
    )
    group: Identifier = Field(description="Prompt group")
    pool: Identifier
    level: Level
    zone: Zone
    policy_version: int | None = Field(default=None, description="Version of the policy; null in fallback")
    propensity: Probability = Field(description="Probability with which this option was drawn")
    propensities: dict[str, Probability] = Field(
        default_factory=dict, description="Probabilities it was drawn with, by option `<pool>/<level>`"
    )


class Usage(Value):
    """Token counts of a generation."""

    prompt_tokens: int | None = Field(default=None, ge=0, description="null where they are not counted")
    completion_tokens: int = Field(ge=0)
    source: TokenCountSource = Field(description="Who counted the completion's tokens")


class Timing(Value):
    """Timestamps of a generation, event time."""

    received_at: UtcDatetime = Field(description="The router read the request from Kafka")
    started_at: UtcDatetime = Field(description="The request was sent to the model server")
    first_token_at: UtcDatetime | None = None
    finished_at: UtcDatetime = Field(description="The last token was received")


class GenerationResponse(RequestMessage):
    """The answer to one request, or the error in its place."""

    model: str = Field(description="Logical model requested")
    status: Literal["ok", "error"]
    text: str | None = Field(default=None, description="The answer; null on error")
    finish_reason: FinishReason | None = None
    error: ErrorDetail | None = None
    decision: Decision | None = Field(default=None, description="null when the request failed before a decision")
    endpoint: str | None = Field(default=None, description="Name of the Triton endpoint that answered")
    usage: Usage | None = None
    timing: Timing | None = None
    requested_at: UtcDatetime
    attempts: int = Field(default=1, ge=0, description="Number of endpoints tried")
    task: str | None = None
    tenant: str | None = None
    metadata: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.status == "error" and self.error is None:
            raise ValueError("a response with status 'error' must carry 'error'")
        if self.status == "ok":
            needed = ("decision", "endpoint", "text", "timing", "usage")
            missing = [name for name in needed if getattr(self, name) is None]
            if missing:
                raise ValueError(f"a response with status 'ok' must carry {', '.join(missing)}")
        return self


class ResponseChunk(Message):
    """A piece of a streamed answer; `sequence` counts from 0 without gaps, the last one is `final`.

    A router that fails during an answer leaves its stream unfinished. The router that takes the request over starts the
    answer again under another `stream`; discard the chunks of the first one.
    """

    request_id: Identifier
    stream: Identifier | None = Field(default=None, description="Id of the attempt that the chunk belongs to")
    sequence: int = Field(ge=0)
    text: str
    final: bool = False
    finish_reason: FinishReason | None = None
    error: ErrorDetail | None = None


class Reply(Message):
    """A part of the answer to a request that names a `reply_partition`: a chunk, or last the response."""

    request_id: Identifier
    chunk: ResponseChunk | None = None
    decision: Decision | None = Field(default=None, description="With the first chunk of an answer")
    response: GenerationResponse | None = Field(default=None, description="The last reply to the request")

    @model_validator(mode="after")
    def _one_of_chunk_and_response(self) -> Self:
        if (self.chunk is None) == (self.response is None):
            raise ValueError("give either 'chunk' or 'response'")
        return self


class Cancellation(Message):
    """Ends a request: a running generation is stopped, and what was generated until then is the answer."""

    request_id: Identifier
    record: Identifier | None = Field(default=None, description=f"null: every request with this id. {RECORD}")
    cancelled_at: UtcDatetime
