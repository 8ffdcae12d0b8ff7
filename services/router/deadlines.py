"""Until when an answer is of use."""

from datetime import datetime, timedelta

from shared.runtime.clock import Clock


def deadline_of(
    requested: datetime | None, *, received_at: datetime, clock: Clock, default_s: float, default_wall_s: float
) -> datetime:
    """The event time after which a request is given up.

    Args:
        requested: the producer's own deadline, which is kept to the letter.
        received_at: event time; where the producer has no deadline, the default runs from here, so that a backlog or
            a redelivery does not expire requests that nobody meant to expire.
        default_s: event seconds.
        default_wall_s: the default lasts this many wall seconds at least. Our own overhead takes wall time, which an
            accelerated clock would multiply until every request came too late.
    """
    if requested is not None:
        return requested
    return received_at + timedelta(seconds=max(default_s, default_wall_s * clock.rate))
