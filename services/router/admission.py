"""Admits a request: parses its record, applies defaults and limits, and decides whether it becomes a sample."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from aiokafka import ConsumerRecord
from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from services.router.settings import RouterSettings
from shared.fleet import Fleet
from shared.hashing import uniform
from shared.kafka.dead_letters import SET_ASIDE
from shared.kafka.records import PoisonMessageError, check_size, parse
from shared.kafka.unreadable import set_aside_reason
from shared.messages import Decision, ErrorDetail, GenerationRequest, GenerationResponse, Identifier
from shared.runtime.clock import Clock
from shared.tenants import with_defaults

TURN_CHARS: Final = 64
"""Characters that a chat template adds to a turn: the most of the built-in templates."""

OBJECT_BYTES: Final = 512
"""Memory of a small JSON object, such as an empty turn, once it is parsed; and of a Kafka header."""

RECORD_BYTES: Final = 640
"""Memory of a record besides its content."""

_SAMPLE_SALT = "sample"
_IDENTIFIER: Final = TypeAdapter[str](Identifier)


def held_bytes(record: "ConsumerRecord[bytes, bytes]") -> int:
    """The memory that a record takes while it waits."""
    size = RECORD_BYTES + len(record.value or b"") + len(record.key or b"")
    if record.headers:
        size += sum(len(name) + len(content or b"") + OBJECT_BYTES for name, content in record.headers)
    return size


def parsed_bytes(value: bytes | None) -> int:
    """Estimate, without parsing, of what parsing a record's value adds: for everything that becomes an object."""
    return OBJECT_BYTES * (value or b"").count(b"{")


@dataclass(frozen=True, slots=True, kw_only=True)
class IncomingRequest:
    """A valid request; it is answered, with an error if necessary.

    Attributes:
        request_id: the client's, or derived from the position of the record; several requests may have the same.
        record: identifies the request, see `shared.kafka.records`.
        model: the requested model, or the default of the tenant or the fleet.
        request: with the defaults of its tenant.
        requested_at, received_at, deadline: event time.
    """

    request_id: str
    record: str
    model: str
    request: GenerationRequest
    requested_at: datetime
    received_at: datetime
    deadline: datetime


def parse_request(
    record: "ConsumerRecord[bytes, bytes]",
    *,
    record_id: str,
    received_at: datetime,
    clock: Clock,
    fleet: Fleet,
    settings: RouterSettings,
) -> IncomingRequest:
    """Parse a record of the topic `requests`.

    Args:
        record_id: identifies the record.
        received_at: event time.

    Raises:
        PoisonMessageError: the value is too large, which is seen before it is parsed, or not a valid request.
    """
    if (reason := set_aside_reason(record)) is not None:
        raise PoisonMessageError(reason, SET_ASIDE[reason])
    check_size(record, settings.max_request_bytes)
    sent = parse(GenerationRequest, record.value)
    tenant = fleet.tenant(sent.tenant)
    request = with_defaults(sent, tenant)
    requested_deadline = request.deadline or (tenant.deadline(received_at) if tenant is not None else None)
    return IncomingRequest(
        request_id=request.id or f"{record.topic}-{record.partition}-{record.offset}",
        record=record_id,
        model=request.model or fleet.default_model,
        request=request,
        requested_at=request.requested_at or _event_time(record.timestamp, clock, received_at),
        received_at=received_at,
        deadline=requested_deadline or default_deadline(received_at, clock=clock, settings=settings),
    )


def error_of_unparsed(
    record: "ConsumerRecord[bytes, bytes]",
    error: PoisonMessageError,
    *,
    record_id: str,
    received_at: datetime,
    clock: Clock,
    fleet: Fleet,
    settings: RouterSettings,
) -> GenerationResponse | None:
    """The response to a record that `parse_request` rejects; None if its id cannot be read.

    Reads as many bytes as a request may have, and so also the id of a request that is cut off or too large.
    """
    try:
        content = from_json((record.value or b"")[: settings.max_request_bytes], allow_partial=True)
        fields: Mapping[str, Any] = content if isinstance(content, dict) else {}
        request_id = _IDENTIFIER.validate_python(fields.get("id"))
        model, tenant = fields.get("model"), fields.get("tenant")
        detail = (
            ErrorDetail(code="prompt_too_large", message=f"{error.detail}: shorten the prompt")
            if error.reason == "too_large"
            else ErrorDetail(
                code="invalid_request",
                message=f"the message is not a valid request: {error.detail}. It was saved to the dead-letter topic",
            )
        )
        return GenerationResponse(
            request_id=request_id,
            record=record_id,
            # Clients choose the name of an unknown model: it must not become a time series.
            model=model if isinstance(model, str) and fleet.pools_of(model) else fleet.default_model,
            status="error",
            error=detail,
            requested_at=_event_time(record.timestamp, clock, received_at),
            attempts=0,
            tenant=tenant if isinstance(tenant, str) and fleet.tenant(tenant) is not None else None,
        )
    except (ValueError, ValidationError, RecursionError):
        return None


def default_deadline(received_at: datetime, *, clock: Clock, settings: RouterSettings) -> datetime:
    """The deadline of a request that has none, event time.

    It counts from the receipt, so a backlog or a redelivery does not expire requests. Its minimum in wall time covers
    the router's own overhead, which an accelerated clock would multiply.
    """
    seconds = max(settings.default_deadline_s, settings.default_deadline_wall_s * clock.rate)
    return received_at + timedelta(seconds=seconds)


def rejection(incoming: IncomingRequest, *, fleet: Fleet, settings: RouterSettings) -> ErrorDetail | None:
    """The reason why a request is rejected; None if it is admitted.

    The message names the field and the remedy, and never quotes the content.
    """
    if not fleet.pools_of(incoming.model):
        served = ", ".join(model.name for model in fleet.models)
        return ErrorDetail(
            code="unknown_model",
            message=f"'model' {incoming.model!r} is not served; available models: {served}. Use one of them, or omit "
            "'model'",
        )
    zones = dict.fromkeys(pool.zone for pool in fleet.pools_of(incoming.model))
    if incoming.request.zone is not None and incoming.request.zone not in zones:
        return ErrorDetail(
            code="invalid_request",
            message=f"'zone' {incoming.request.zone!r} has no server of this model; available zones: "
            f"{', '.join(zones)}. Use one of them, or omit 'zone'",
        )
    field = "prompt" if incoming.request.prompt is not None else "messages"
    turns = incoming.request.conversation()
    if len(turns) > settings.max_turns:
        return ErrorDetail(
            code="prompt_too_large",
            message=f"'messages' has {len(turns)} turns, the limit is {settings.max_turns}: shorten it",
        )
    # What is rendered counts, not only the content: a template adds to every turn.
    characters = sum(len(turn.content) for turn in turns) + TURN_CHARS * (len(turns) - 1)
    if characters > settings.max_prompt_chars:
        return ErrorDetail(
            code="prompt_too_large",
            message=f"'{field}' has {characters} characters, the limit is {settings.max_prompt_chars}: shorten it",
        )
    if incoming.deadline <= incoming.received_at:
        return ErrorDetail(
            code="deadline_exceeded",
            message=f"'deadline' {incoming.deadline.isoformat()} had passed when the request was received at "
            f"{incoming.received_at.isoformat()}: set a later deadline",
        )
    return None


def should_sample(incoming: IncomingRequest, decision: Decision, settings: RouterSettings) -> bool:
    """Whether a request becomes a sample for the evaluator.

    The draw depends on the record and the deployment's key, so a redelivered request has the same result. Clients can
    opt out. Requests with a forced level are excluded: their clients may prefer some kind of prompt.
    """
    if not incoming.request.evaluation_allowed or decision.source == "forced":
        return False
    return uniform(_SAMPLE_SALT, incoming.record, settings.draw_key_bytes) < settings.sample_share


def _event_time(timestamp_ms: int | None, clock: Clock, received_at: datetime) -> datetime:
    """Event time of a record's timestamp, which is wall time; the receipt if the record has none."""
    if timestamp_ms is None or timestamp_ms < 0:
        return received_at
    wall_s = timestamp_ms / 1_000
    try:
        return datetime.fromtimestamp(clock.origin_event_s + (wall_s - clock.origin_wall_s) * clock.rate, UTC)
    except (ValueError, OverflowError, OSError):  # a producer may set any number
        return received_at
