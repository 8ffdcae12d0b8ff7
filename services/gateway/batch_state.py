"""The states of a batch, and which one follows. Pure."""

from enum import StrEnum
from typing import Final


class Status(StrEnum):
    """OpenAI's states of a batch."""

    VALIDATING = "validating"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


class Event(StrEnum):
    """What happens to a batch."""

    COUNTED = "counted"
    """Its lines are counted, and they are not too many."""
    REJECTED = "rejected"
    """Its input file is empty, gone, or has too many lines."""
    ANSWERED = "answered"
    """Every line has a result."""
    CANCEL = "cancel"
    """Its owner cancels it."""
    WRITTEN = "written"
    """Its files are written, and every line got its chance."""
    WRITTEN_LATE = "written_late"
    """Its files are written, and some lines were not processed in time."""


ACTIVE: Final = frozenset({Status.VALIDATING, Status.IN_PROGRESS, Status.FINALIZING, Status.CANCELLING})

_NEXT: Final = {
    (Status.VALIDATING, Event.COUNTED): Status.IN_PROGRESS,
    (Status.VALIDATING, Event.REJECTED): Status.FAILED,
    (Status.VALIDATING, Event.CANCEL): Status.CANCELLING,
    (Status.IN_PROGRESS, Event.ANSWERED): Status.FINALIZING,
    (Status.IN_PROGRESS, Event.CANCEL): Status.CANCELLING,
    (Status.CANCELLING, Event.CANCEL): Status.CANCELLING,
    (Status.CANCELLING, Event.WRITTEN): Status.CANCELLED,
    (Status.CANCELLING, Event.WRITTEN_LATE): Status.CANCELLED,
    (Status.FINALIZING, Event.WRITTEN): Status.COMPLETED,
    (Status.FINALIZING, Event.WRITTEN_LATE): Status.EXPIRED,
}


def following(status: Status, event: Event) -> Status | None:
    """The state after an event; None if the event cannot happen in this state."""
    return _NEXT.get((status, event))
