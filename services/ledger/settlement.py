"""Closing the books of an endpoint up to an instant: which intervals, which calls, and what of those that came late.

An interval is settled once, when it is old enough that the calls of its time should be known; joules never move from
one call to another afterwards. A call that comes later takes what its intervals left unattributed
(docs/decisions/0006).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from services.ledger.attribution import Attribution, Call, attribute
from services.ledger.idle import IdlePower, learn
from services.ledger.metering import Interval, Reading, intervals_between


@dataclass(frozen=True, slots=True)
class Rules:
    """How joules are attributed.

    Attributes:
        prefill_weight: cost of a prompt's token relative to a generated one.
        idle_window_s: quiet time over which idle power is learned, event.
    """

    prefill_weight: float = 0.0
    idle_window_s: float = 60.0


@dataclass(frozen=True, slots=True)
class OpenCall:
    """A call without a footprint, and what of it is in the books.

    Attributes:
        energy_j: from the intervals settled so far.
        accounted: it was known when the last interval before now was settled.
        partial: some of its energy is known to be missing.
    """

    call: Call
    energy_j: float = 0.0
    accounted: bool = False
    partial: bool = False


@dataclass(frozen=True, slots=True)
class SettledInterval:
    """An interval of the past, as it stands in the books."""

    started_s: float
    finished_s: float
    attributed_j: float
    unattributed_j: float


@dataclass(frozen=True, slots=True)
class EndpointBooks:
    """What is known of an endpoint before a settlement.

    Attributes:
        readings: up to the horizon, in order; the first one is where the books end.
        calls: all open ones that began before the last reading.
        settled: intervals of the past that calls touch which came late.
        metered_from_s: the first reading ever.
        idle_power_w: as configured; null: what was learned counts.
    """

    readings: Sequence[Reading]
    calls: Sequence[OpenCall]
    settled: Sequence[SettledInterval] = ()
    metered_from_s: float = -math.inf
    idle_power_w: float | None = None
    learned: IdlePower = field(default_factory=IdlePower)


@dataclass(frozen=True, slots=True)
class CallOutcome:
    """What becomes of a call.

    Attributes:
        finished: all its intervals are settled.
        metered: some of it lies in an interval; where not, there is no footprint.
    """

    id: str
    energy_j: float
    partial: bool
    finished: bool
    metered: bool
    late: bool


@dataclass(frozen=True, slots=True)
class Settlement:
    """What to write: new intervals, joules that late calls took from old ones (by their start), calls."""

    intervals: tuple[Attribution, ...]
    taken_j: tuple[tuple[float, float], ...]
    calls: tuple[CallOutcome, ...]
    settled_until_s: float
    learned: IdlePower


def is_late(opened: OpenCall, books_end_s: float) -> bool:
    """Whether intervals of a call were settled before it was known."""
    return not opened.accounted and opened.call.started_s < books_end_s


def settle(books: EndpointBooks, rules: Rules) -> Settlement:
    """Settle every interval between the readings, and the calls that ended by the last of them.

    Raises:
        ValueError: there is no reading.
    """
    if not books.readings:
        raise ValueError("'readings' must hold at least the one where the books end")
    end_s, until_s = books.readings[0].at_s, books.readings[-1].at_s
    calls = [opened.call for opened in books.calls]
    idle_w = books.idle_power_w if books.idle_power_w is not None else books.learned.power_w
    fresh = attribute(
        intervals_between(books.readings), calls, idle_power_w=idle_w or 0.0, prefill_weight=rules.prefill_weight
    )
    late = [opened.call for opened in books.calls if is_late(opened, end_s)]
    recovered = _recover(books.settled, late, rules)
    energy_j: dict[str, list[float]] = {opened.call.id: [opened.energy_j] for opened in books.calls}
    for attribution in (*fresh, *recovered.values()):
        for call_id, share_j in attribution.shares_j.items():
            energy_j[call_id].append(share_j)
    late_ids = {call.id for call in late}
    outcomes = []
    for opened in books.calls:
        call = opened.call
        is_one = call.id in late_ids
        charged_to_others = is_one and any(
            interval.attributed_j > 0 and call.runs_in(interval.started_s, interval.finished_s)
            for interval in books.settled
        )
        outcomes.append(
            CallOutcome(
                id=call.id,
                energy_j=math.fsum(energy_j[call.id]),
                partial=opened.partial or charged_to_others or call.started_s < books.metered_from_s,
                finished=call.finished_s <= until_s,
                metered=call.finished_s > books.metered_from_s,
                late=is_one,
            )
        )
    return Settlement(
        intervals=tuple(fresh),
        taken_j=tuple((start_s, one.attributed_j) for start_s, one in recovered.items() if one.attributed_j > 0),
        calls=tuple(outcomes),
        settled_until_s=until_s,
        learned=learn(
            books.learned, ((one.interval, len(one.shares_j)) for one in fresh), window_s=rules.idle_window_s
        ),
    )


def _recover(settled: Sequence[SettledInterval], late: Sequence[Call], rules: Rules) -> dict[float, Attribution]:
    """What late calls get of intervals that are settled: what these left unattributed, by the usual rule."""
    if not late:
        return {}
    left = [
        Interval(one.started_s, one.finished_s, one.unattributed_j)
        for one in sorted(settled, key=lambda one: one.started_s)
    ]
    shared = attribute(left, late, idle_power_w=0.0, prefill_weight=rules.prefill_weight)
    return {one.interval.started_s: one for one in shared if one.shares_j}
