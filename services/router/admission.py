"""Admits a request: parses its record, applies defaults and limits, and decides whether it becomes a sample."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from aiokafka import ConsumerRecord

from services.router.settings import RouterSettings
from shared.fleet import Fleet
from shared.hashing import uniform
from shared.kafka.dead_letters import parse
from shared.messages import Decision, ErrorDetail, GenerationRequest
from shared.runtime.clock import Clock
from shared.tenants import with_defaults

_SAMPLE_SALT = "sample"


@dataclass(frozen=True, slots=True, kw_only=True)
class IncomingRequest:
    """A valid request; it is answered, with an error if necessary.

    Attributes:
        request_id: the client's, or derived from the position of the record.
        model: the requested model, or the default of the tenant or the fleet.
        request: with the defaults of its tenant.
        requested_at, received_at, deadline: event time.
        size_bytes: of the record's value.
    """

    request_id: str
    model: str
    request: GenerationRequest
    requested_at: datetime
    received_at: datetime
    deadline: datetime
    size_bytes: int


def parse_request(
    record: "ConsumerRecord[bytes, bytes]",
    *,
    received_at: datetime,
    clock: Clock,
    fleet: Fleet,
    settings: RouterSettings,
) -> IncomingRequest:
    """Parse a record of the topic `requests`.

    Args:
        received_at: event time.

    Raises:
        PoisonMessageError: the value is not a valid request.
    """
    sent = parse(GenerationRequest, record.value)
    tenant = fleet.tenant(sent.tenant)
    request = with_defaults(sent, tenant)
    requested_deadline = request.deadline or (tenant.deadline(received_at) if tenant is not None else None)
    return IncomingRequest(
        request_id=request.id or f"{record.topic}-{record.partition}-{record.offset}",
        model=request.model or fleet.default_model,
        request=request,
        requested_at=request.requested_at or _event_time(record.timestamp, clock, received_at),
        received_at=received_at,
        deadline=requested_deadline or default_deadline(received_at, clock=clock, settings=settings),
        size_bytes=len(record.value or b""),
    )


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
    if incoming.size_bytes > settings.max_request_bytes:
        return ErrorDetail(
            code="prompt_too_large",
            message=f"the message has {incoming.size_bytes} bytes, the limit is {settings.max_request_bytes}: shorten "
            "the prompt",
        )
    characters = sum(len(turn.content) for turn in incoming.request.conversation())
    if characters > settings.max_prompt_chars:
        field = "prompt" if incoming.request.prompt is not None else "messages"
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


def should_sample(request_id: str, request: GenerationRequest, decision: Decision, *, share: float) -> bool:
    """Whether a request becomes a sample for the evaluator.

    The draw depends on the request id, so a redelivered request has the same result. Clients can opt out. Requests
    with a forced level are excluded: their clients may prefer some kind of prompt.
    """
    if not request.evaluation_allowed or decision.source == "forced":
        return False
    return uniform(_SAMPLE_SALT, request_id) < share


def _event_time(timestamp_ms: int | None, clock: Clock, received_at: datetime) -> datetime:
    """Event time of a record's timestamp, which is wall time; the receipt if the record has none."""
    if timestamp_ms is None or timestamp_ms < 0:
        return received_at
    wall_s = timestamp_ms / 1_000
    try:
        return datetime.fromtimestamp(clock.origin_event_s + (wall_s - clock.origin_wall_s) * clock.rate, UTC)
    except (ValueError, OverflowError, OSError):  # a producer may set any number
        return received_at
