"""Idle power, learned from quiet spans: the least mean power of a span in which no call ran."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from services.ledger.metering import Interval


@dataclass(frozen=True, slots=True)
class IdlePower:
    """What was learned of one endpoint.

    Attributes:
        power_w: null until the first quiet span was long enough.
        quiet_s, quiet_j: length and energy of the quiet span that is being watched.
    """

    power_w: float | None = None
    quiet_s: float = 0.0
    quiet_j: float = 0.0


def learn(known: IdlePower, intervals: Iterable[tuple[Interval, int]], *, window_s: float) -> IdlePower:
    """Take in intervals in order, each with the number of its calls.

    A server refreshes its counters less often than they may be read, so that a single short interval can show hardly
    any energy: means are taken over at least `window_s` of quiet time.
    """
    for interval, calls in intervals:
        if calls or interval.restarted:
            known = IdlePower(known.power_w)
            continue
        known = replace(known, quiet_s=known.quiet_s + interval.length_s, quiet_j=known.quiet_j + interval.metered_j)
        if known.quiet_s >= window_s:
            mean_w = known.quiet_j / known.quiet_s
            known = IdlePower(mean_w if known.power_w is None else min(known.power_w, mean_w))
    return known
