"""OpenAI's requests as requests of Sprout, and responses of Sprout as OpenAI's. Pure functions."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import uuid4

from pydantic import ValidationError

from services.gateway.errors import ApiError
from services.gateway.estimates import Estimate
from services.gateway.schema import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatRequest,
    ChunkChoice,
    Completion,
    CompletionChoice,
    CompletionChunk,
    CompletionRequest,
    Delta,
    OpenAIFinishReason,
    OpenAIUsage,
    SproutUsage,
)
from shared.messages import (
    ChatMessage,
    Decision,
    FinishReason,
    GenerationRequest,
    GenerationResponse,
    SamplingParameters,
)

OPTIONS: Final = ("directive", "task", "complete_by")
"""What a client may ask of Sprout, in headers `x-sprout-NAME` or in the entries `sprout_NAME` of `metadata`."""

_OPENAI_METADATA: Final = "sprout_"
_SAMPLING: Final = (
    "temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "top_k", "min_tokens",
    "repetition_penalty",
)  # fmt: skip
_FINISH_REASONS: Final[Mapping[FinishReason, OpenAIFinishReason]] = {"stop": "stop", "length": "length"}


def to_request(
    body: ChatRequest | CompletionRequest,
    *,
    headers: Mapping[str, str],
    tenant: str | None,
    reply_partition: int,
    deadline: datetime,
) -> GenerationRequest:
    """The request to publish.

    Args:
        headers: of the HTTP request, with lower-case names.
        tenant: of the API key.
        reply_partition: that the gateway reads.
        deadline: event time.

    Raises:
        ApiError: an option of Sprout is not valid.
    """
    options = _options(body, headers)
    if "complete_by" in options:
        raise ApiError(
            400, "'complete_by' is not supported: a batch has a 'completion_window'", param="complete_by",
            code="unsupported_parameter",
        )  # fmt: skip
    conversation = _conversation(body) if isinstance(body, ChatRequest) else None
    prompt = body.text() if isinstance(body, CompletionRequest) else None
    limit = body.max_tokens
    if isinstance(body, ChatRequest) and body.max_completion_tokens is not None:
        limit = body.max_completion_tokens
    sampling = {name: getattr(body, name) for name in _SAMPLING if getattr(body, name) is not None}
    if limit is not None:
        sampling["max_tokens"] = limit
    metadata = {name: text for name, text in (body.metadata or {}).items() if not name.startswith(_OPENAI_METADATA)}
    try:
        return GenerationRequest(
            id=f"{'cmpl' if conversation is None else 'chatcmpl'}-{uuid4().hex}",
            model=body.model,
            prompt=prompt,
            messages=conversation,
            tenant=tenant,
            task=options.get("task"),
            directive=options.get("directive"),
            sampling=SamplingParameters(stop=body.stop or (), **sampling),
            stream=bool(body.stream),
            reply_partition=reply_partition,
            deadline=deadline,
            metadata=metadata,
        )
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        param = ".".join(str(part) for part in problem["loc"]) or None
        message = str(problem["msg"]).removeprefix("Value error, ")
        raise ApiError(400, f"{param or 'request'}: {message}", param=param, code="invalid_value") from None


def wants_usage(body: ChatRequest | CompletionRequest) -> bool:
    """Whether the last event of the stream is to carry the usage."""
    return body.stream_options is not None and body.stream_options.include_usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Writes the answers to one request in OpenAI's format.

    Attributes:
        chat: a chat completion; otherwise a completion.
        created: Unix time of the request.
    """

    request_id: str
    model: str
    created: int
    chat: bool

    def whole(self, response: GenerationResponse, estimate: Estimate) -> ChatCompletion | Completion:
        """The response as a whole."""
        text, reason, usage = response.text or "", finish_reason(response), usage_of(response, estimate)
        if self.chat:
            choice = ChatChoice(message=AnswerMessage(content=text), finish_reason=reason)
            return ChatCompletion(
                id=self.request_id, created=self.created, model=self.model, choices=(choice,), usage=usage
            )
        return Completion(
            id=self.request_id,
            created=self.created,
            model=self.model,
            choices=(CompletionChoice(text=text, finish_reason=reason),),
            usage=usage,
        )

    def first(self) -> CompletionChunk | None:
        """The event before the text: the author of a chat completion."""
        return self._chunk(ChunkChoice(delta=Delta(role="assistant", content=""))) if self.chat else None

    def piece(self, text: str) -> CompletionChunk:
        """An event with text."""
        return self._chunk(ChunkChoice(delta=Delta(content=text)) if self.chat else ChunkChoice(text=text))

    def last(self, response: GenerationResponse) -> CompletionChunk:
        """The event after the text."""
        reason = finish_reason(response)
        if self.chat:
            return self._chunk(ChunkChoice(delta=Delta(), finish_reason=reason))
        return self._chunk(ChunkChoice(text="", finish_reason=reason))

    def usage(self, response: GenerationResponse, estimate: Estimate) -> CompletionChunk:
        """The event with the usage."""
        return self._chunk().model_copy(update={"usage": usage_of(response, estimate)})

    def _chunk(self, *choices: ChunkChoice) -> CompletionChunk:
        return CompletionChunk(
            id=self.request_id,
            object="chat.completion.chunk" if self.chat else "text_completion",
            created=self.created,
            model=self.model,
            choices=choices,
        )


def finish_reason(response: GenerationResponse) -> OpenAIFinishReason:
    """Why the answer ended; one that was cut off ended because of its length."""
    return _FINISH_REASONS.get(response.finish_reason or "stop", "length")


def usage_of(response: GenerationResponse, estimate: Estimate) -> OpenAIUsage:
    """Token counts, and what Sprout did; a count that nobody made is 0."""
    usage = response.usage
    prompt = 0 if usage is None else usage.prompt_tokens or 0
    completion = 0 if usage is None else usage.completion_tokens
    return OpenAIUsage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        sprout=sprout_usage(response.decision, estimate),
    )


def sprout_usage(decision: Decision | None, estimate: Estimate) -> SproutUsage:
    """What Sprout did with a request."""
    return SproutUsage(
        level=None if decision is None else decision.level,
        group=None if decision is None else decision.group,
        pool=None if decision is None else decision.pool,
        zone=None if decision is None else decision.zone,
        decision=None if decision is None else decision.source,
        policy_version=None if decision is None else decision.policy_version,
        estimated_joules=estimate.joules,
        estimated_grams=estimate.grams,
        estimate_source=estimate.source,
    )


def sprout_headers(usage: SproutUsage) -> dict[str, str]:
    """The same as HTTP headers `x-sprout-*`; what is unknown has none."""
    return {
        f"x-sprout-{name.replace('_', '-')}": _header_value(value)
        for name, value in usage.model_dump().items()
        if value is not None
    }


def _header_value(value: object) -> str:
    """A number with six digits, or a text without what headers cannot carry."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return "".join(character if " " <= character <= "~" else "?" for character in str(value))


def _options(body: ChatRequest | CompletionRequest, headers: Mapping[str, str]) -> dict[str, str]:
    """What the client asks of Sprout; headers win over metadata."""
    metadata = body.metadata or {}
    for name in metadata:
        if name.startswith(_OPENAI_METADATA) and name.removeprefix(_OPENAI_METADATA) not in OPTIONS:
            known = ", ".join(_OPENAI_METADATA + option for option in OPTIONS)
            raise ApiError(
                400, f"metadata has an unknown entry with '{_OPENAI_METADATA}'; known: {known}", param="metadata"
            )
    found = {option: metadata.get(_OPENAI_METADATA + option) for option in OPTIONS}
    found |= {option: value for option in OPTIONS if (value := headers.get(f"x-sprout-{option.replace('_', '-')}"))}
    return {option: value for option, value in found.items() if value is not None}


def _conversation(body: ChatRequest) -> tuple[ChatMessage, ...]:
    return tuple(
        ChatMessage(role="system" if turn.role == "developer" else turn.role, content=turn.text())
        for turn in body.messages
    )
