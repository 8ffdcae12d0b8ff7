"""Topics `responses` and `response-chunks`: the answers."""

from typing import Literal, Self

from pydantic import Field, model_validator

from shared.messages.base import Identifier, Level, Message, Probability, UtcDatetime, Value, Zone

TokenCountSource = Literal["server", "stream", "tokenizer"]
DecisionSource = Literal["policy", "forced", "fallback"]
FinishReason = Literal["stop", "length", "cancelled", "deadline"]
ErrorCode = Literal[
    "deadline_exceeded", "unknown_model", "unknown_level", "prompt_too_large", "no_endpoint", "upstream_error",
    "invalid_request",
]  # fmt: skip


class ErrorDetail(Value):
    """Why a request could not be answered."""

    code: ErrorCode
    message: str = Field(
        description="What went wrong and what to do; quotes nothing of the prompt unless a model server's own words do"
    )


class Decision(Value):
    """Which option served the request, and how it was chosen: what causal accounting needs."""

    source: DecisionSource = Field(description="policy: drawn; forced: the producer's; fallback: no valid policy")
    group: Identifier = Field(description="Prompt group")
    pool: Identifier
    level: Level
    zone: Zone
    policy_version: int | None = Field(default=None, description="Version of the policy; null in fallback")
    propensity: Probability = Field(description="Probability with which this option was drawn")
    propensities: dict[str, Probability] = Field(
        default_factory=dict, description="The row it was drawn from, by option `<pool>/<level>`"
    )


class Usage(Value):
    """What the generation consumed."""

    prompt_tokens: int | None = Field(default=None, ge=0, description="null where nothing counts them")
    completion_tokens: int = Field(ge=0)
    source: TokenCountSource = Field(description="Who counted the completion's tokens")


class Timing(Value):
    """When it happened, in event time."""

    received_at: UtcDatetime = Field(description="Read from Kafka by the router")
    started_at: UtcDatetime = Field(description="Sent to the model server")
    first_token_at: UtcDatetime | None = None
    finished_at: UtcDatetime = Field(description="Last token received")


class GenerationResponse(Message):
    """The answer to one request, or why there is none."""

    request_id: Identifier
    model: str = Field(description="Logical model asked for")
    status: Literal["ok", "error"]
    text: str | None = Field(default=None, description="The answer; null on error")
    finish_reason: FinishReason | None = None
    error: ErrorDetail | None = None
    decision: Decision | None = Field(default=None, description="null when the request failed before a decision")
    endpoint: str | None = Field(default=None, description="Name of the Triton endpoint that answered")
    usage: Usage | None = None
    timing: Timing | None = None
    requested_at: UtcDatetime
    attempts: int = Field(default=1, ge=0, description="Endpoints tried")
    task: str | None = None
    tenant: str | None = None
    metadata: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.status == "error" and self.error is None:
            raise ValueError("a response with status 'error' must carry 'error'")
        if self.status == "ok":
            needed = {"text", "decision", "endpoint", "usage", "timing"}
            missing = sorted(name for name in needed if getattr(self, name) is None)
            if missing:
                raise ValueError(f"a response with status 'ok' must carry {', '.join(missing)}")
        return self


class ResponseChunk(Message):
    """A piece of a streamed answer; `sequence` counts from 0 without gaps, the last one is `final`.

    A router that dies in the middle of an answer leaves a stream without an end; whoever takes the request over begins
    another `stream`, and what came before it is void.
    """

    request_id: Identifier
    stream: Identifier | None = Field(default=None, description="Names the attempt whose chunks belong together")
    sequence: int = Field(ge=0)
    text: str
    final: bool = False
    finish_reason: FinishReason | None = None
    error: ErrorDetail | None = None
