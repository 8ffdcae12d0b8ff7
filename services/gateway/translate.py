"""OpenAI's requests as requests of Sprout, and responses of Sprout as OpenAI's. Pure functions."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import uuid4

from pydantic import TypeAdapter, ValidationError

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
from shared.fleet import Fleet
from shared.messages import (
    ChatMessage,
    Decision,
    FinishReason,
    GenerationRequest,
    GenerationResponse,
    SamplingParameters,
    UtcDatetime,
)

OPTIONS: Final = ("directive", "task", "reference", "zone", "complete_by")
"""What a client may ask of Sprout, in headers `x-sprout-NAME` or in the entries `sprout_NAME` of `metadata`."""

_IN_METADATA: Final = "sprout_"
_IN_HEADERS: Final = "x-sprout-"
_TIME: Final = TypeAdapter[datetime](UtcDatetime)
_SAMPLING: Final = (
    "temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "top_k", "min_tokens",
    "repetition_penalty",
)  # fmt: skip
_FINISH_REASONS: Final[Mapping[FinishReason, OpenAIFinishReason]] = {"stop": "stop", "length": "length"}


def to_request(
    body: ChatRequest | CompletionRequest,
    *,
    headers: Mapping[str, str],
    fleet: Fleet,
    tenant: str | None,
    reply_partition: int,
    now: datetime,
    deadline: datetime,
) -> GenerationRequest:
    """The request to publish.

    Args:
        headers: of the HTTP request, with lower-case names.
        tenant: of the API key.
        reply_partition: that the gateway reads.
        now: event time.
        deadline: event time; `complete_by` of the client can only make it earlier.

    Raises:
        ApiError: the fleet does not serve the model, or an option of Sprout is not valid.
    """
    pools = fleet.pools_of(body.model)
    if not pools:
        served = ", ".join(model.name for model in fleet.models)
        raise ApiError(
            404, f"the model {body.model!r} does not exist; available models: {served}", param="model",
            code="model_not_found",
        )  # fmt: skip
    options: dict[str, Any] = _options(body, headers)
    if (by := options.pop("complete_by", None)) is not None:
        deadline = min(deadline, _complete_by(by, now))
    zones = dict.fromkeys(pool.zone for pool in pools)
    if options.get("zone", pools[0].zone) not in zones:
        raise ApiError(
            400, f"zone: the model has servers in {', '.join(zones)}", param="zone", code="invalid_value"
        )  # fmt: skip
    conversation = _conversation(body) if isinstance(body, ChatRequest) else None
    prompt = body.text() if isinstance(body, CompletionRequest) else None
    limit = body.max_tokens
    if isinstance(body, ChatRequest) and body.max_completion_tokens is not None:
        limit = body.max_completion_tokens
    sampling = {name: getattr(body, name) for name in _SAMPLING if getattr(body, name) is not None}
    if limit is not None:
        sampling["max_tokens"] = limit
    metadata = {name: text for name, text in (body.metadata or {}).items() if not name.startswith(_IN_METADATA)}
    try:
        return GenerationRequest(
            id=f"{'cmpl' if conversation is None else 'chatcmpl'}-{uuid4().hex}",
            model=body.model,
            prompt=prompt,
            messages=conversation,
            tenant=tenant,
            **options,
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
    known = {_IN_METADATA + option: option for option in OPTIONS}
    found: dict[str, str] = {}
    for name, value in (body.metadata or {}).items():
        if name in known:
            found[known[name]] = value
        elif name.startswith(_IN_METADATA):
            raise _unknown_option("metadata", f"an entry with '{_IN_METADATA}'", known)
    known = {_IN_HEADERS + option.replace("_", "-"): option for option in OPTIONS}
    for name, value in headers.items():
        if name in known and value:
            found[known[name]] = _header_text(value)
        elif name.startswith(_IN_HEADERS) and name not in known:
            raise _unknown_option("headers", f"one with '{_IN_HEADERS}'", known)
    return found


def _unknown_option(where: str, what: str, known: Iterable[str]) -> ApiError:
    message = f"{where} have {what} that is unknown; known: {', '.join(known)}"
    return ApiError(400, message, param=where, code="unknown_parameter")


def _header_text(value: str) -> str:
    """The text of a header, whose bytes arrive as Latin-1, if it is UTF-8."""
    try:
        return value.encode("latin-1").decode()
    except UnicodeError:
        return value


def _complete_by(text: str, now: datetime) -> datetime:
    """The time until which the client needs its answer.

    Raises:
        ApiError: it is not a time, or has passed.
    """
    try:
        by = _TIME.validate_python(text)
    except ValidationError:
        by = None
    if by is None or by <= now:
        problem = "give a time with its zone: 2026-12-01T12:00:00Z" if by is None else "the time has passed"
        raise ApiError(400, f"complete_by: {problem}", param="complete_by", code="invalid_value")
    return by


def _conversation(body: ChatRequest) -> tuple[ChatMessage, ...]:
    return tuple(
        ChatMessage(role="system" if turn.role == "developer" else turn.role, content=turn.text())
        for turn in body.messages
    )
