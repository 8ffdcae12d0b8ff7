"""Attribution: which calls used the energy that an endpoint's counters measured.

For every interval between two readings: metered = sum of the calls' shares + idle + unattributed
(docs/decisions/0006). Pure arithmetic of this project; no library does it.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from services.ledger.meters import Interval, Reading, intervals_between
from services.ledger.settings import LedgerSettings


@dataclass(frozen=True, slots=True)
class Call:
    """A call on a model server. Times in seconds since the Unix epoch, event time."""

    id: str
    started_s: float
    first_token_s: float | None
    finished_s: float
    prompt_tokens: int
    completion_tokens: int

    def runs_in(self, started_s: float, finished_s: float) -> bool:
        """Whether the call overlaps a span. A call of zero duration belongs to the span that contains its end."""
        if self.finished_s <= self.started_s:
            return started_s < self.finished_s <= finished_s
        return self.started_s < finished_s and self.finished_s > started_s


@dataclass(frozen=True, slots=True)
class Attribution:
    """The energy of one interval, J, by user. `shares_j` is keyed by call id and sums to `attributed_j`."""

    interval: Interval
    idle_j: float
    attributed_j: float
    unattributed_j: float
    shares_j: Mapping[str, float] = field(default_factory=dict)


def attribute(
    intervals: Sequence[Interval], calls: Sequence[Call], *, idle_power_w: float, prefill_weight: float
) -> list[Attribution]:
    """Attribute the energy of every interval.

    Idle energy is idle power x duration, at most the metered energy. The calls share the remainder in proportion to
    their work in the interval: generated tokens, plus `prefill_weight` times the prompt's tokens. If no running call
    did countable work in the interval, they share it by running time. Without calls it is unattributed.

    Args:
        intervals: in order of time, not overlapping.
        idle_power_w: power of the endpoint without calls, W.
        prefill_weight: cost of a prompt token relative to a generated token, >= 0.
    """
    starts = [interval.started_s for interval in intervals]
    ends = [interval.finished_s for interval in intervals]
    running: list[list[Call]] = [[] for _ in intervals]
    for call in sorted(calls, key=lambda call: call.id):
        # One interval more on either side than needed; `runs_in` decides.
        first = max(0, bisect_left(ends, call.started_s) - 1)
        last = min(len(intervals), bisect_right(starts, call.finished_s) + 1)
        for index in range(first, last):
            if call.runs_in(starts[index], ends[index]):
                running[index].append(call)
    return [
        _attribute_one(interval, here, idle_power_w, prefill_weight)
        for interval, here in zip(intervals, running, strict=True)
    ]


def work_in(call: Call, interval: Interval, prefill_weight: float) -> float:
    """Work of a call within an interval, in generated tokens.

    Generated tokens are spread evenly from the first token (the start, if unknown) to the end. Prompt tokens are
    spread evenly from the start to the first token.
    """
    first_s = (
        call.started_s if call.first_token_s is None else _clip(call.first_token_s, call.started_s, call.finished_s)
    )
    prompt_until_s = call.finished_s if call.first_token_s is None else first_s
    generated = call.completion_tokens * _share(first_s, call.finished_s, interval)
    read = prefill_weight * call.prompt_tokens * _share(call.started_s, prompt_until_s, interval)
    return generated + read


def _attribute_one(
    interval: Interval, calls: Sequence[Call], idle_power_w: float, prefill_weight: float
) -> Attribution:
    idle_j = min(idle_power_w * interval.length_s, interval.metered_j)
    rest_j = interval.metered_j - idle_j
    if not calls:
        return Attribution(interval, idle_j, 0.0, rest_j)
    weights = [work_in(call, interval, prefill_weight) for call in calls]
    if not math.fsum(weights) > 0:
        weights = [_seconds_in(call, interval) for call in calls]
    total = math.fsum(weights)
    if not total > 0:  # calls without duration or tokens
        weights, total = [1.0] * len(calls), float(len(calls))
    shares_j = {call.id: rest_j * (weight / total) for call, weight in zip(calls, weights, strict=True)}
    return Attribution(interval, idle_j, rest_j, 0.0, shares_j)


def _seconds_in(call: Call, interval: Interval) -> float:
    return max(0.0, min(call.finished_s, interval.finished_s) - max(call.started_s, interval.started_s))


def _share(started_s: float, finished_s: float, interval: Interval) -> float:
    """Share of a span within an interval. A span of zero duration belongs to the interval that contains its end."""
    if finished_s <= started_s:
        return 1.0 if interval.started_s < finished_s <= interval.finished_s else 0.0
    overlap_s = min(finished_s, interval.finished_s) - max(started_s, interval.started_s)
    return max(0.0, overlap_s) / (finished_s - started_s)


def _clip(value: float, low: float, high: float) -> float:
    return max(low, min(value, high))


@dataclass(frozen=True, slots=True)
class IdlePower:
    """Idle power of one endpoint, estimated from spans without calls.

    Attributes:
        power_w: None until a span without calls was long enough.
        idle_s: duration of the current span without calls.
        idle_j: energy of that span.
    """

    power_w: float | None = None
    idle_s: float = 0.0
    idle_j: float = 0.0


def update_idle_power(known: IdlePower, intervals: Iterable[tuple[Interval, int]], *, window_s: float) -> IdlePower:
    """Update the estimate: the least mean power of all spans of `window_s` seconds without calls.

    A server may refresh its counters less often than they are read. A single short interval can therefore show almost
    no energy; that is why means are taken over at least `window_s`.

    Args:
        intervals: in order of time, each with the number of its calls.
    """
    for interval, calls in intervals:
        if calls or interval.restarted:
            known = IdlePower(known.power_w)
            continue
        known = replace(known, idle_s=known.idle_s + interval.length_s, idle_j=known.idle_j + interval.metered_j)
        if known.idle_s >= window_s:
            mean_w = known.idle_j / known.idle_s
            known = IdlePower(mean_w if known.power_w is None else min(known.power_w, mean_w))
    return known


@dataclass(frozen=True, slots=True)
class OpenCall:
    """A call without a footprint.

    Attributes:
        energy_j: its share of the intervals settled so far.
        accounted: it was known at an earlier settlement, so the settled intervals include it.
        partial: some of its energy is known to be missing.
    """

    call: Call
    energy_j: float = 0.0
    accounted: bool = False
    partial: bool = False

    def is_late(self, settled_until_s: float) -> bool:
        """Whether intervals in which the call ran were settled before it was known."""
        return not self.accounted and self.call.started_s < settled_until_s


@dataclass(frozen=True, slots=True)
class SettledInterval:
    """An interval that was settled earlier."""

    started_s: float
    finished_s: float
    attributed_j: float
    unattributed_j: float


@dataclass(frozen=True, slots=True)
class EndpointState:
    """An endpoint before a settlement.

    Attributes:
        readings: in order of time, up to the watermark; the first one ends the last settled interval.
        calls: all open calls that started before the last reading.
        settled: settled intervals in which late calls ran.
        metered_from_s: time of the first reading ever.
        idle_power_w: configured idle power; None: use the learned one.
    """

    readings: Sequence[Reading]
    calls: Sequence[OpenCall]
    settled: Sequence[SettledInterval] = ()
    metered_from_s: float = -math.inf
    idle_power_w: float | None = None
    learned: IdlePower = field(default_factory=IdlePower)


@dataclass(frozen=True, slots=True)
class CallResult:
    """A call after a settlement.

    Attributes:
        finished: all intervals in which it ran are settled.
        metered: it overlaps the metered time; otherwise it gets no footprint.
        late: it arrived after intervals in which it ran were settled.
    """

    id: str
    energy_j: float
    partial: bool
    finished: bool
    metered: bool
    late: bool


@dataclass(frozen=True, slots=True)
class EndpointSettlement:
    """The result of settling one endpoint.

    Attributes:
        intervals: the newly settled ones.
        reallocated_j: (start of a settled interval, s; its formerly unattributed energy that late calls get, J).
        settled_until_s: end of the last settled interval.
        learned: the updated idle power.
    """

    intervals: tuple[Attribution, ...]
    reallocated_j: tuple[tuple[float, float], ...]
    calls: tuple[CallResult, ...]
    settled_until_s: float
    learned: IdlePower


def settle_endpoint(state: EndpointState, settings: LedgerSettings) -> EndpointSettlement:
    """Attribute every interval between the readings, and finish the calls that ended by the last reading.

    Energy never moves from one call to another after settlement. A late call gets what its settled intervals left
    unattributed, by the same rule; if other calls were charged for it, its footprint is partial.

    Raises:
        ValueError: there is no reading.
    """
    if not state.readings:
        raise ValueError("'readings' must hold at least the reading that ends the last settled interval")
    settled_until_s, until_s = state.readings[0].at_s, state.readings[-1].at_s
    calls = [opened.call for opened in state.calls]
    idle_w = state.idle_power_w if state.idle_power_w is not None else state.learned.power_w
    weight = settings.prefill_weight
    new = attribute(intervals_between(state.readings), calls, idle_power_w=idle_w or 0.0, prefill_weight=weight)
    late = {opened.call.id: opened.call for opened in state.calls if opened.is_late(settled_until_s)}
    reallocated = _reallocate(state.settled, list(late.values()), weight)
    energy_j: dict[str, list[float]] = {opened.call.id: [opened.energy_j] for opened in state.calls}
    for attribution in (*new, *reallocated.values()):
        for call_id, share_j in attribution.shares_j.items():
            energy_j[call_id].append(share_j)
    results = []
    for opened in state.calls:
        call = opened.call
        charged_to_others = call.id in late and any(
            interval.attributed_j > 0 and call.runs_in(interval.started_s, interval.finished_s)
            for interval in state.settled
        )
        results.append(
            CallResult(
                id=call.id,
                energy_j=math.fsum(energy_j[call.id]),
                partial=opened.partial or charged_to_others or call.started_s < state.metered_from_s,
                finished=call.finished_s <= until_s,
                metered=call.finished_s > state.metered_from_s,
                late=call.id in late,
            )
        )
    return EndpointSettlement(
        intervals=tuple(new),
        reallocated_j=tuple(
            (start_s, one.attributed_j) for start_s, one in reallocated.items() if one.attributed_j > 0
        ),
        calls=tuple(results),
        settled_until_s=until_s,
        learned=update_idle_power(
            state.learned, ((one.interval, len(one.shares_j)) for one in new), window_s=settings.idle_window_s
        ),
    )


def _reallocate(
    settled: Sequence[SettledInterval], late: Sequence[Call], prefill_weight: float
) -> dict[float, Attribution]:
    """The unattributed energy of settled intervals, attributed to late calls; by the interval's start."""
    if not late:
        return {}
    left = [
        Interval(one.started_s, one.finished_s, one.unattributed_j)
        for one in sorted(settled, key=lambda one: one.started_s)
    ]
    shared = attribute(left, late, idle_power_w=0.0, prefill_weight=prefill_weight)
    return {one.interval.started_s: one for one in shared if one.shares_j}
