"""Settling one endpoint: its intervals since the last settlement, and the calls that ended in them.

Pure: what it needs is in `EndpointState`, what changes in `EndpointSettlement`. Energy and time never move from one
call to another after settlement.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from services.ledger.attribution import Attribution, Call, CallUse, attribute
from services.ledger.curve import CallSample, CurveState, Estimate, IntervalSample
from services.ledger.meters import Interval, Reading, intervals_between
from services.ledger.settings import LedgerSettings
from shared.batch_curve import BatchCurve

DAY_S = 86_400.0
NOTHING = CallUse()
SERVER_S = CallUse._fields.index("server_s")


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


class OpenCall(NamedTuple):
    """A call without a footprint.

    Attributes:
        used: its part of the intervals settled so far.
        accounted: it was known at an earlier settlement, so the settled intervals include it.
        partial: some of its energy is known to be missing.
        timed: `used` has its time; an older version of the ledger did not count it.
    """

    call: Call
    used: CallUse = NOTHING
    accounted: bool = False
    partial: bool = False
    timed: bool = True

    def is_late(self, settled_until_s: float) -> bool:
        """Whether intervals in which the call ran were settled before it was known."""
        return not self.accounted and self.call.started_s < settled_until_s


@dataclass(frozen=True, slots=True)
class SettledInterval:
    """An interval that was settled earlier.

    Attributes:
        idle_s: time in it that no call has got.
        flawed: its meter was reset or stood still.
    """

    started_s: float
    finished_s: float
    attributed_j: float
    unattributed_j: float
    idle_s: float = 0.0
    flawed: bool = False


@dataclass(frozen=True, slots=True)
class EndpointState:
    """An endpoint before a settlement.

    Attributes:
        readings: in order of time, up to the watermark; the first one ends the last settled interval.
        calls: all open calls that started before the last reading.
        settled: settled intervals in which late calls ran.
        settled_from_s: time from which these are known; calls that are later than that are partial.
        metered_from_s: time of the first reading ever.
        idle_power_w: configured idle power; None: use the learned one.
        pool_idle_w: idle power of the pool's other endpoints; used for the curve if this one never idles.
        learned: idle power learned from spans without calls.
        curve: what the endpoint's curve is computed from.
        kept_awake: whether it was needed from one time to another, seconds; while it is not, its model may be unloaded.
            None: it is never unloaded.
        still_after_s: time after which a meter that does not move while tokens are generated counts as broken.
    """

    readings: Sequence[Reading]
    calls: Sequence[OpenCall]
    settled: Sequence[SettledInterval] = ()
    settled_from_s: float = -math.inf
    metered_from_s: float = -math.inf
    idle_power_w: float | None = None
    pool_idle_w: float | None = None
    learned: IdlePower = field(default_factory=IdlePower)
    curve: CurveState = field(default_factory=CurveState)
    kept_awake: Callable[[float, float], bool] | None = None
    still_after_s: float = math.inf

    def estimate(self) -> Estimate | None:
        """The endpoint's curve; with the idle power of the pool's other endpoints if its own cannot be learned."""
        found = self.curve.estimate(idle_power_w=self.idle_power_w)
        if found is None or found.identifiable or self.idle_power_w is not None or self.pool_idle_w is None:
            return found
        borrowed = self.curve.estimate(idle_power_w=self.pool_idle_w)
        return borrowed if borrowed is not None and borrowed.identifiable else found

    def attribution_curve(self) -> BatchCurve | None:
        """The curve by which energy is attributed; None until it is identifiable."""
        estimate = self.estimate()
        return estimate.curve if estimate is not None and estimate.identifiable else None

    def attribution_idle_w(self) -> float | None:
        """The idle power by which energy is attributed; None while it is unknown."""
        if self.idle_power_w is not None:
            return self.idle_power_w
        curve = None if self.learned.power_w is not None else self.attribution_curve()
        return self.learned.power_w if curve is None else curve.idle_w


class CallResult(NamedTuple):
    """A call after a settlement.

    Attributes:
        used: its part of all intervals settled so far.
        finished: all intervals in which it ran are settled.
        metered: it overlaps the metered time; otherwise it gets no footprint.
        late: it arrived after intervals in which it ran were settled.
        server_s: its share of the server's time; None if an older version of the ledger did not count all of it.
    """

    id: str
    used: CallUse
    partial: bool
    finished: bool
    metered: bool
    late: bool
    server_s: float | None

    @property
    def energy_j(self) -> float:
        """Its share of the energy."""
        return self.used.energy_j


@dataclass(frozen=True, slots=True)
class EndpointSettlement:
    """The result of settling one endpoint.

    Attributes:
        intervals: the newly settled ones.
        stalled: starts of those in which the meter stood still while tokens were generated, s.
        reallocated_j: (start of a settled interval, s; its formerly unattributed energy that late calls get, J).
        reallocated_s: (start of a settled interval, s; its formerly idle time that late calls get, s).
        settled_until_s: end of the last settled interval.
        learned: the updated idle power.
        curve: the updated sums of the curve.
    """

    intervals: tuple[Attribution, ...]
    stalled: frozenset[float]
    reallocated_j: tuple[tuple[float, float], ...]
    reallocated_s: tuple[tuple[float, float], ...]
    calls: tuple[CallResult, ...]
    settled_until_s: float
    learned: IdlePower
    curve: CurveState


def settle_endpoint(state: EndpointState, settings: LedgerSettings) -> EndpointSettlement:
    """Attribute every interval between the readings, and finish the calls that ended by the last reading.

    A late call gets the energy and time that its settled intervals left unattributed and idle, by the same rule; if
    other calls were charged for it, its footprint is partial. So is that of a call that ran while the meter was reset
    or stood still.

    Raises:
        ValueError: there is no reading.
    """
    if not state.readings:
        raise ValueError("'readings' must hold at least the reading that ends the last settled interval")
    settled_until_s, until_s = state.readings[0].at_s, state.readings[-1].at_s
    curve, idle_w = state.attribution_curve(), state.attribution_idle_w()
    new = attribute(
        intervals_between(state.readings),
        [opened.call for opened in state.calls],
        idle_power_w=idle_w or 0.0,
        prefill_weight=settings.prefill_weight,
        curve=curve,
        speed=state.curve.speed,
    )
    late = [index for index, opened in enumerate(state.calls) if opened.is_late(settled_until_s)]
    reallocated = _reallocate(state.settled, [state.calls[index].call for index in late], settings.prefill_weight)
    stalled, still_s = _stalled(new, state.curve.still_s, after_s=state.still_after_s)
    uses = np.zeros((len(state.calls), len(CallUse._fields)))
    flawed, with_energy = np.zeros((2, len(state.calls)), dtype=bool)
    for one, users in (
        *((one, one.calls) for one in new),
        *((one, np.array(late)[one.calls]) for one in reallocated),
    ):
        uses[users] += one.parts
        flawed[users] |= one.interval.restarted or one.interval.started_s in stalled
        with_energy[users] |= one.interval.metered_j > 0
    results = [
        _result(state, opened, _sum(opened.used, CallUse(*used)), flawed=is_flawed, with_energy=has_energy)
        for opened, used, is_flawed, has_energy in zip(
            state.calls, uses.tolist(), flawed.tolist(), with_energy.tolist(), strict=True
        )
    ]
    awake, idle_seen = _awake(state, new)
    learned = state.curve.learned(
        _interval_samples(new, results, stalled=stalled, idle_seen=idle_seen, idle_power_w=idle_w),
        _call_samples(state.calls, results),
        until_s=until_s,
        half_life_s=settings.curve_half_life_days * DAY_S,
    )
    return EndpointSettlement(
        intervals=tuple(new),
        stalled=stalled,
        reallocated_j=tuple((one.interval.started_s, one.attributed_j) for one in reallocated if one.attributed_j > 0),
        reallocated_s=tuple((one.interval.started_s, math.fsum(one.parts[:, SERVER_S])) for one in reallocated),
        calls=tuple(results),
        settled_until_s=until_s,
        learned=update_idle_power(
            state.learned,
            (
                (one.interval, one.calls.size or not idles or one.interval.divided)
                for one, idles in zip(new, idle_seen, strict=True)
            ),
            window_s=settings.idle_window_s,
        ),
        curve=learned.model_copy(update={"awake": awake, "still_s": still_s}),
    )


def _result(state: EndpointState, opened: OpenCall, used: CallUse, *, flawed: bool, with_energy: bool) -> CallResult:
    """A call after a settlement.

    Args:
        used: its part of all intervals settled so far.
        flawed: the meter was reset or stood still in one of the new ones.
        with_energy: the meter moved in one of them.
    """
    call, until_s = opened.call, state.readings[-1].at_s
    late = opened.is_late(state.readings[0].at_s)
    finished = call.finished_s <= until_s
    return CallResult(
        id=call.id,
        used=used,
        partial=opened.partial
        or flawed
        or call.started_s < state.metered_from_s
        or (late and (call.started_s < state.settled_from_s or _charged_to_others(call, state.settled)))
        # The meter did not move in all of its time: its energy is missing, not 0.
        or (finished and not with_energy and call.completion_tokens > 0 and used.energy_j == 0),
        finished=finished,
        metered=call.finished_s > state.metered_from_s,
        late=late,
        server_s=used.server_s if opened.timed else None,
    )


def _sum(one: CallUse, other: CallUse) -> CallUse:
    if one is NOTHING:
        return other
    return CallUse(*(first + second for first, second in zip(one, other, strict=True)))


def _charged_to_others(call: Call, settled: Sequence[SettledInterval]) -> bool:
    return any(
        (interval.attributed_j > 0 or interval.flawed) and call.runs_in(interval.started_s, interval.finished_s)
        for interval in settled
    )


def _interval_samples(
    intervals: Sequence[Attribution],
    results: Sequence[CallResult],
    *,
    stalled: frozenset[float],
    idle_seen: Sequence[bool],
    idle_power_w: float | None,
) -> list[IntervalSample]:
    """The intervals whose energy and work are both known."""
    unknown = np.array([one.partial or one.late for one in results], dtype=bool)
    return [
        IntervalSample(one.interval.length_s, one.idle_s, one.interval.metered_j, one.work)
        for one, idles in zip(intervals, idle_seen, strict=True)
        if not one.interval.restarted
        and not one.interval.divided
        and one.interval.started_s not in stalled
        and not unknown[one.calls].any()
        and (idles or one.idle_s < 1e-6 * one.interval.length_s)
        # Without a call, more than twice the idle energy means that somebody else uses the server.
        and (one.calls.size or idle_power_w is None or one.unattributed_j <= one.idle_j)
    ]


def _call_samples(calls: Sequence[OpenCall], results: Sequence[CallResult]) -> list[CallSample]:
    """The calls that ended, and in all of whose intervals the other calls are known."""
    found = []
    for call, result in zip((opened.call for opened in calls), results, strict=True):
        if not result.finished or result.partial or result.late:
            continue
        token_s, used = call.token_time_s, result.used
        found.append(
            CallSample(
                token_time_s=token_s,
                mean_batch=used.batch_tokens / used.steps if used.steps > 0 else 0.0,
                completion_tokens=call.completion_tokens,
                prompt_tokens=call.prompt_tokens,
                waited_s=None if token_s is None else max(0.0, call.reads_until_s - token_s - call.started_s),
            )
        )
    return found


def _stalled(intervals: Sequence[Attribution], still_s: float, *, after_s: float) -> tuple[frozenset[float], float]:
    """Starts of the intervals in which the meter stood still for too long, and the length of the present span.

    A server may refresh its counters less often than they are read, so a short span means nothing.
    """
    found: list[float] = []
    span: list[float] = []
    for one in intervals:
        if one.interval.metered_j > 0 or one.interval.restarted:
            still_s, span = 0.0, []
        elif one.work.tokens > 0:
            still_s += one.interval.length_s
            span.append(one.interval.started_s)
            if still_s >= after_s:
                found += span
                span = []
    return frozenset(found), still_s


def _awake(state: EndpointState, intervals: Sequence[Attribution]) -> tuple[bool, list[bool]]:
    """Whether the model is loaded at the end, and in which intervals idle power was measured without doubt.

    A model that may be unloaded is known to be loaded from its first call until it is not needed.
    """
    awake = state.kept_awake is None if state.curve.awake is None else state.curve.awake
    seen = []
    for one in intervals:
        needed = state.kept_awake is None or state.kept_awake(one.interval.started_s, one.interval.finished_s)
        seen.append(awake and needed)
        awake = needed and (awake or bool(one.calls.size))
    return awake, seen


def _reallocate(settled: Sequence[SettledInterval], late: Sequence[Call], prefill_weight: float) -> list[Attribution]:
    """What settled intervals left unattributed and idle, attributed to late calls."""
    if not late:
        return []
    ordered = sorted(settled, key=lambda one: one.started_s)
    left = [Interval(one.started_s, one.finished_s, one.unattributed_j) for one in ordered]
    found = attribute(left, late, idle_power_w=0.0, prefill_weight=prefill_weight)
    return [_within(one, before.idle_s) for one, before in zip(found, ordered, strict=True) if one.calls.size]


def _within(attribution: Attribution, idle_s: float) -> Attribution:
    """The same attribution, with no more of the server's time than was idle, and without steps."""
    wanted_s = math.fsum(attribution.parts[:, SERVER_S])
    share = min(1.0, idle_s / wanted_s) if wanted_s > 0 else 0.0
    return replace(attribution, parts=attribution.parts * (1.0, share, 0.0, 0.0))
