"""The part of the OpenAI API that the gateway offers, as models of requests and responses.

A field that OpenAI knows and Sprout cannot honour is declared with the only values that change nothing. Any other
value, and any unknown field, is an error that names it. Source: OpenAI API reference, chat completions and completions.
"""

import json
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from shared.messages import Zone


def _one_or_many(value: object) -> object:
    return (value,) if isinstance(value, str) else value


def _nothing(value: object) -> object:
    if value in (None, False, [], {}, "none", "auto"):
        return None
    raise ValueError("is not supported")


Unsupported = Annotated[None, BeforeValidator(_nothing)]
"""A parameter that no model server behind Sprout honours: only values that ask for nothing are accepted."""


class OpenAIModel(BaseModel):
    """A request body: unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class TextPart(OpenAIModel):
    """A part of a turn."""

    type: Literal["text"]
    text: str


class Turn(OpenAIModel):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | tuple[TextPart, ...]
    name: str | None = Field(default=None, max_length=256, description="Accepted and ignored")
    refusal: Unsupported = None
    tool_calls: Unsupported = None
    audio: Unsupported = None

    def text(self) -> str:
        """The text of all parts."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(OpenAIModel):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: bool = Field(default=False, description="Accepted and ignored")


class TextFormat(OpenAIModel):
    """The only response format: text."""

    type: Literal["text"]


class _Request(OpenAIModel):
    """What both endpoints share."""

    model: str = Field(min_length=1, max_length=256)
    temperature: float | None = Field(default=None, ge=0.0, le=5.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    presence_penalty: float | None = Field(default=None, ge=-2.0, le=2.0)
    frequency_penalty: float | None = Field(default=None, ge=-2.0, le=2.0)
    seed: int | None = Field(default=None, ge=0, le=2**63 - 1)
    stop: Annotated[tuple[str, ...] | None, BeforeValidator(_one_or_many)] = Field(default=None, max_length=16)
    max_tokens: int | None = Field(default=None, ge=1, le=32_768)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    user: str | None = Field(default=None, description="Accepted and ignored")
    logit_bias: Unsupported = None
    # Extensions that vLLM and others have, too.
    top_k: int | None = Field(default=None, ge=1)
    min_tokens: int | None = Field(default=None, ge=0)
    repetition_penalty: float | None = Field(default=None, gt=0.0)


class ChatRequest(_Request):
    """Body of `POST /v1/chat/completions`."""

    messages: tuple[Turn, ...] = Field(min_length=1, max_length=1_000)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=32_768)
    metadata: dict[str, str] | None = Field(default=None, max_length=16)
    response_format: TextFormat | None = None
    service_tier: Literal["auto", "default", "flex"] | None = Field(default=None, description="Accepted and ignored")
    store: bool | None = Field(default=None, description="Accepted and ignored: nothing is stored")
    safety_identifier: str | None = Field(default=None, description="Accepted and ignored")
    prompt_cache_key: str | None = Field(default=None, description="Accepted and ignored")
    parallel_tool_calls: bool | None = Field(default=None, description="Without tools it has no effect")
    tools: Unsupported = None
    tool_choice: Unsupported = None
    functions: Unsupported = None
    function_call: Unsupported = None
    logprobs: Unsupported = None
    top_logprobs: Unsupported = None
    modalities: tuple[Literal["text"], ...] | None = None
    audio: Unsupported = None
    prediction: Unsupported = None
    web_search_options: Unsupported = None
    reasoning_effort: Unsupported = None
    verbosity: Unsupported = None


class CompletionRequest(_Request):
    """Body of `POST /v1/completions`: the prompt is answered as a single user turn."""

    prompt: str | Annotated[tuple[str], Field(description="One prompt")]
    metadata: dict[str, str] | None = Field(default=None, max_length=16, description="An extension of Sprout")
    best_of: Literal[1] | None = None
    echo: Unsupported = None
    logprobs: Unsupported = None
    suffix: Unsupported = None

    def text(self) -> str:
        """The prompt."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]


class SproutUsage(BaseModel):
    """What Sprout did with the request, and an estimate of its carbon; null where unknown.

    The attributed values are at `GET /v1/footprints/{id}` once they are known.
    """

    level: str | None = Field(description="Directive level that was used")
    group: str | None = Field(description="Prompt group")
    pool: str | None
    zone: Zone | None = Field(description="Grid zone of the pool")
    decision: str | None = Field(description="policy, forced, fallback or switchback")
    policy_version: int | None
    estimated_joules: float | None = Field(description="Energy of prompt and answer")
    estimated_grams: float | None = Field(description="gCO2eq, embodied carbon included")
    estimate_source: Literal["token_price", "option_mean"] | None = Field(
        description="token_price: tokens times the price of a token in the pool; option_mean: mean of the option and "
        "group; null: no policy says"
    )


class OpenAIUsage(BaseModel):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    sprout: SproutUsage


class AnswerMessage(BaseModel):
    """The answer of a chat completion."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


OpenAIFinishReason = Literal["stop", "length"]


class ChatChoice(BaseModel):
    """The only choice of a chat completion."""

    index: Literal[0] = 0
    message: AnswerMessage
    logprobs: None = None
    finish_reason: OpenAIFinishReason


class ChatCompletion(BaseModel):
    """Response of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: tuple[ChatChoice]
    usage: OpenAIUsage


class CompletionChoice(BaseModel):
    """The only choice of a completion."""

    index: Literal[0] = 0
    text: str
    logprobs: None = None
    finish_reason: OpenAIFinishReason


class Completion(BaseModel):
    """Response of `POST /v1/completions`."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: tuple[CompletionChoice]
    usage: OpenAIUsage


class Delta(BaseModel):
    """What a chunk adds to the answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """The only choice of a chunk: `delta` of a chat completion, `text` of a completion."""

    index: Literal[0] = 0
    delta: Delta | None = None
    text: str | None = None
    finish_reason: OpenAIFinishReason | None = None


class CompletionChunk(BaseModel):
    """An event of a stream."""

    id: str
    object: Literal["chat.completion.chunk", "text_completion"]
    created: int
    model: str
    choices: tuple[ChunkChoice, ...]
    usage: OpenAIUsage | None = None

    def to_json(self, *, include_usage: bool) -> str:
        """The event's data: without the fields that say nothing, as OpenAI sends it.

        Args:
            include_usage: the client asked for usage, which is null in every event but the last.
        """
        document = self.model_dump(mode="json", exclude={"usage"}, exclude_none=True)
        for choice in document["choices"]:
            choice.setdefault("finish_reason", None)
        if include_usage:
            document["usage"] = None if self.usage is None else self.usage.model_dump(mode="json")
        return json.dumps(document, ensure_ascii=False, separators=(",", ":"))


class ModelCard(BaseModel):
    """An entry of `GET /v1/models`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "sprout"


class ModelList(BaseModel):
    """Response of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: tuple[ModelCard, ...]


class ErrorBody(BaseModel):
    """The content of an error."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """Every error of the API."""

    error: ErrorBody
