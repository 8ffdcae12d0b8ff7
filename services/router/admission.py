"""From a record to a request that may be served, or the reason why not."""

from dataclasses import dataclass
from datetime import UTC, datetime

from aiokafka import ConsumerRecord

from services.router.deadlines import deadline_of
from shared.fleet import Fleet
from shared.kafka.dead_letters import parse
from shared.messages import ErrorDetail, GenerationRequest
from shared.runtime.clock import Clock
from shared.tenants import with_defaults


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What is still served; see the settings of the same names."""

    max_request_bytes: int
    max_prompt_chars: int
    default_deadline_s: float
    default_deadline_wall_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A request that can be answered, be it with an error.

    Attributes:
        request_id: the producer's, or made from the record's place.
        model: asked for, or the tenant's or the fleet's default.
        request: with its tenant's defaults where it says nothing.
        received_at, requested_at, deadline: event time.
        size_bytes: of the message.
    """

    request_id: str
    model: str
    request: GenerationRequest
    requested_at: datetime
    received_at: datetime
    deadline: datetime
    size_bytes: int


def arrive(
    record: "ConsumerRecord[bytes, bytes]", *, received_at: datetime, clock: Clock, fleet: Fleet, limits: Limits
) -> Arrival:
    """Read a record of the topic `requests`.

    Args:
        received_at: event time.

    Raises:
        PoisonMessageError: it is no request at all.
    """
    sent = parse(GenerationRequest, record.value)
    tenant = fleet.tenant(sent.tenant)
    request = with_defaults(sent, tenant)
    return Arrival(
        request_id=request.id or f"{record.topic}-{record.partition}-{record.offset}",
        model=request.model or fleet.default_model,
        request=request,
        requested_at=request.requested_at or _event_time(record.timestamp, clock, received_at),
        received_at=received_at,
        deadline=deadline_of(
            request.deadline or (tenant.deadline(received_at) if tenant is not None else None),
            received_at=received_at,
            clock=clock,
            default_s=limits.default_deadline_s,
            default_wall_s=limits.default_deadline_wall_s,
        ),
        size_bytes=len(record.value or b""),
    )


def refusal(arrival: Arrival, *, fleet: Fleet, limits: Limits) -> ErrorDetail | None:
    """Why a request is not served; null when it is. A message names the field and the remedy, never the content."""
    if not fleet.pools_of(arrival.model):
        return ErrorDetail(
            code="unknown_model",
            message=f"'model' {arrival.model!r} is not served (there are "
            f"{', '.join(model.name for model in fleet.models)}): name one of these, or leave it out",
        )
    if arrival.size_bytes > limits.max_request_bytes:
        return ErrorDetail(
            code="prompt_too_large",
            message=f"the message has {arrival.size_bytes} bytes, {limits.max_request_bytes} at most are accepted: "
            "shorten the prompt",
        )
    characters = sum(len(turn.content) for turn in arrival.request.conversation())
    if characters > limits.max_prompt_chars:
        field = "prompt" if arrival.request.prompt is not None else "messages"
        return ErrorDetail(
            code="prompt_too_large",
            message=f"'{field}' has {characters} characters, at most "
            f"{limits.max_prompt_chars} are accepted: shorten it",
        )
    if arrival.deadline <= arrival.received_at:
        return ErrorDetail(
            code="deadline_exceeded",
            message=f"'deadline' {arrival.deadline.isoformat()} had passed when the request was received at "
            f"{arrival.received_at.isoformat()}: give it more time",
        )
    return None


def _event_time(timestamp_ms: int | None, clock: Clock, received_at: datetime) -> datetime:
    """A record's timestamp, which is wall time, on the clock; the receipt where a record has none."""
    if timestamp_ms is None or timestamp_ms < 0:
        return received_at
    wall_s = timestamp_ms / 1_000
    return datetime.fromtimestamp(clock.origin_event_s + (wall_s - clock.origin_wall_s) * clock.rate, UTC)
