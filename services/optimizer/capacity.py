"""The capacity planner: how many endpoints every pool needs now and in the next hours, and which are to be awake.

An endpoint carries its target batch. A pool needs as many endpoints as carry the requests that run or wait, with a
margin of some standard deviations of a Poisson distributed number of them, because requests arrive at random. The
forecast scales the arrivals by hour of day, learned over the last days, with the present level; requests in flight
follow by Little's law. Endpoints wake at once, and before the forecast needs them; they go to sleep only after none has
needed them for a while. No I/O.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from services.optimizer.costs import DecayedSums, decay_factor
from services.optimizer.loads import PoolDemand
from services.optimizer.prices import PoolPrices
from services.optimizer.settings import OptimizerSettings
from shared.fleet import Fleet
from shared.messages import CapacityForecast, PoolCapacity
from shared.pools import Pool
from shared.switchback import SwitchbackSchedule

HOURS = 24
_HOUR_S = 3_600.0
_KNOWN_S = 600.0
"""Decayed seconds of observation from which the arrivals of an hour of the day are known."""

_IN_FLIGHT_HALF_LIFE_S = 6 * _HOUR_S
"""Half-life of the mean time that a request is in flight, event."""

_RESERVED_STEP = 8
"""Calls of evaluators are rounded up to a multiple, so that not every call makes a new plan."""

_LARGEST_SCALE = 3.0
"""The present level changes the usual arrivals by this factor at most."""


class ArrivalProfile:
    """Arrivals of one pool by hour of day, UTC: decayed means over the last days."""

    def __init__(self, half_life_s: float) -> None:
        """Start empty."""
        self._half_life_s = half_life_s
        self._hours: dict[int, DecayedSums] = {}

    def add(self, arrivals_per_s: float, *, seconds: float, at: datetime) -> None:
        """Count the arrivals of some event seconds around `at`."""
        at_s = at.timestamp()
        sums = self._hours.setdefault(at.astimezone(UTC).hour, DecayedSums(at_s, [0.0, 0.0]))
        sums.add((arrivals_per_s * seconds, seconds), at_s=at_s, half_life_s=self._half_life_s)

    def rate(self, at: datetime) -> float | None:
        """Usual arrivals per second at a time of day, linear between the middles of the hours; None if unknown."""
        at = at.astimezone(UTC)
        own = self._mean(at.hour, at)
        if own is None:
            return None
        offset = at.minute / 60.0 + at.second / _HOUR_S - 0.5
        other = self._mean((at.hour + (1 if offset > 0.0 else -1)) % HOURS, at)
        return own if other is None else own + (other - own) * abs(offset)

    def to_document(self) -> dict[str, list[float]]:
        """The sums as JSON types, by hour: [as_of_s, arrivals, seconds]."""
        return {str(hour): [sums.as_of_s, *sums.values] for hour, sums in self._hours.items()}

    def load_document(self, document: Mapping[str, Any]) -> None:
        """Take over what `to_document` wrote; hours that this process has observed itself stay as they are."""
        stored = {int(hour): DecayedSums(values[0], list(values[1:])) for hour, values in document.items()}
        self._hours = stored | self._hours

    def _mean(self, hour: int, at: datetime) -> float | None:
        sums = self._hours.get(hour)
        if sums is None:
            return None
        arrivals, seconds = sums.at(at.timestamp(), self._half_life_s)
        return arrivals / seconds if seconds >= _KNOWN_S else None


@dataclass(slots=True)
class _Mean:
    """A mean over the recent event time, with exponential weights."""

    value: float
    at_s: float

    def add(self, value: float, *, at_s: float, half_life_s: float) -> None:
        """Take a value that holds since the last one."""
        self.value = value + (self.value - value) * decay_factor(at_s - self.at_s, half_life_s)
        self.at_s = at_s


@dataclass(slots=True)
class _PoolState:
    """What the planner remembers of a pool.

    Attributes:
        profile: arrivals by hour of day.
        arrivals_per_s, in_flight: means over the recent time; None before the first demand.
        work: decayed sums of requests in flight times seconds, and of arrivals; None before the first demand.
        needed: (event time, endpoints needed) of the dwell time.
        awake: number of endpoints that are to be awake; None before the first plan.
        passed_over: since when an endpoint that is awake gets no requests though others are needed, event time.
        serving: number of endpoints that the requests in flight are spread over; None before the first plan.
    """

    profile: ArrivalProfile
    arrivals_per_s: _Mean | None = None
    in_flight: _Mean | None = None
    work: DecayedSums | None = None
    needed: deque[tuple[float, int]] = field(default_factory=deque)
    awake: int | None = None
    passed_over: dict[str, float] = field(default_factory=dict)
    serving: int | None = None

    def seconds_in_flight(self) -> float | None:
        """Mean event seconds that a request is in flight, by Little's law; None before the first request."""
        if self.work is None or self.work.values[1] <= 0.0:
            return None
        return self.work.values[0] / self.work.values[1]


class CapacityPlanner:
    """Plans the endpoints of every pool of the fleet."""

    def __init__(self, fleet: Fleet, settings: OptimizerSettings, *, event_per_wall: float = 1.0) -> None:
        """Start without any demand.

        Args:
            fleet: pools, and the switchback schedule.
            settings: margins and times.
            event_per_wall: event seconds per wall second; in a replay, all times last some wall seconds at least.
        """
        self._fleet = fleet
        self._settings = settings
        self._schedule = SwitchbackSchedule(fleet.switchback)
        shortest_s = settings.capacity_shortest_s * event_per_wall
        self._lead = timedelta(seconds=max(settings.wake_lead_s, shortest_s))
        self._dwell_s = max(settings.capacity_dwell_min * 60.0, shortest_s)
        self._half_life_s = max(settings.load_half_life_min * 60.0, shortest_s)
        self._longest_step_s = max(_KNOWN_S, 5.0 * shortest_s)
        self._validity = timedelta(
            seconds=max(settings.capacity_validity_min * 60.0, settings.capacity_validity_s * event_per_wall)
        )
        self._pools = {pool.name: _PoolState(ArrivalProfile(settings.profile_half_life_s)) for pool in fleet.pools}

    def profiles(self) -> dict[str, dict[str, list[float]]]:
        """Arrivals by hour of day, by pool, as JSON types."""
        return {name: state.profile.to_document() for name, state in self._pools.items()}

    def restore_profiles(self, documents: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over what `profiles` gave."""
        for name, document in documents.items():
            if name in self._pools:
                self._pools[name].profile.load_document(document)

    def loads(self) -> dict[str, float]:
        """Mean number of sequences on an endpoint that serves, by pool; pools without a demand are left out."""
        return {
            name: state.in_flight.value / state.serving
            for name, state in self._pools.items()
            if state.in_flight is not None and state.serving
        }

    def plan(self, demand: Mapping[str, PoolDemand], prices: PoolPrices, now: datetime) -> list[PoolCapacity]:
        """The plan of every pool that has a demand, in the order of the fleet.

        Args:
            demand: by pool, now.
            prices: the pools' power curves.
            now: event time.
        """
        pools = [pool for pool in self._fleet.pools if pool.name in demand]
        return [self._plan_pool(pool, demand[pool.name], prices, now) for pool in pools]

    def _plan_pool(self, pool: Pool, demand: PoolDemand, prices: PoolPrices, now: datetime) -> PoolCapacity:
        state = self._pools[pool.name]
        self._observe(pool, state, demand, now)
        curve = prices.curve_of(pool)
        target = curve.target_batch(pool)
        everything = len(pool.endpoints)
        forecast: tuple[CapacityForecast, ...] = ()
        if target is None:
            needed = awake = everything
            why = curve.problem if _has_objective(pool) else "no target_batch and no latency objective"
            reason = f"all, because the target batch is unknown: {why}"
        else:
            needed = self._endpoints_for(pool, demand.in_flight, target)
            forecast = self._forecast(pool, state, target, now)
            soon = self._needed_at(pool, state, target, now + self._lead, now) or 0
            awake, reason = self._awake(pool, state, needed=needed, soon=soon, now=now)
            if failing := self._failing(pool, state, demand, target, now):
                awake = _endpoints_with(pool, usable=awake, without=failing)
                reason += f"; without {', '.join(sorted(failing))}, which gets no requests"
            reason = (
                f"{demand.in_flight} requests and a margin of {self._margin(demand.in_flight):.0f} need {needed} "
                f"endpoints with {target} each; {reason}"
            )
            if missed := curve.missed_objective(pool):
                reason += f"; {missed}"
        state.awake = awake
        # Packed requests leave the other endpoints idle.
        state.serving = min(awake, needed) if pool.dispatch == "pack" else awake
        return PoolCapacity(
            pool=pool.name,
            at=now,
            valid_until=now + self._validity,
            requests_per_s=demand.arrivals_per_s if state.arrivals_per_s is None else state.arrivals_per_s.value,
            in_flight=demand.in_flight,
            target_batch=target,
            endpoints=everything,
            endpoints_needed=needed,
            forecast=forecast,
            awake=tuple(endpoint.name for endpoint in pool.endpoints[:awake]),
            reserved={
                name: math.ceil(calls / _RESERVED_STEP) * _RESERVED_STEP
                for name, calls in demand.evaluation.items()
                if calls > 0
            },
            reason=reason,
        )

    def _observe(self, pool: Pool, state: _PoolState, demand: PoolDemand, now: datetime) -> None:
        """Count a demand in the means, and in the arrivals by hour of day."""
        now_s = now.timestamp()
        if state.arrivals_per_s is None or state.in_flight is None or state.work is None:
            state.arrivals_per_s = _Mean(demand.arrivals_per_s, now_s)
            state.in_flight = _Mean(float(demand.in_flight), now_s)
            state.work = DecayedSums(now_s, [0.0, 0.0])
            # What an earlier process kept awake and is in use stays awake for the dwell time.
            used = [place for place, one in enumerate(pool.endpoints, start=1) if demand.running.get(one.name)]
            state.needed.append((now_s, max(used, default=0)))
            return
        # After a pause nothing is known about most of it.
        seconds = min(max(0.0, now_s - state.in_flight.at_s), self._longest_step_s)
        state.arrivals_per_s.add(demand.arrivals_per_s, at_s=now_s, half_life_s=self._half_life_s)
        state.in_flight.add(float(demand.in_flight), at_s=now_s, half_life_s=self._half_life_s)
        middle = now - timedelta(seconds=seconds / 2)
        state.profile.add(demand.arrivals_per_s, seconds=seconds, at=middle)
        if self._schedule.world(now) == "sprout":
            # Answers without a directive take longer.
            state.work.add(
                (demand.in_flight * seconds, demand.arrivals_per_s * seconds),
                at_s=now_s,
                half_life_s=_IN_FLIGHT_HALF_LIFE_S,
            )

    def _forecast(self, pool: Pool, state: _PoolState, target: int, now: datetime) -> tuple[CapacityForecast, ...]:
        """Endpoints needed in the next hours; as many as at the present level while nothing else is known."""
        flat = self._needed_at_present_level(pool, state, target)
        times = [now + timedelta(hours=hour) for hour in range(1, self._settings.forecast_h + 1)]
        return tuple(
            CapacityForecast(at=at, endpoints_needed=self._needed_at(pool, state, target, at, now) or flat)
            for at in times
        )

    def _needed_at(self, pool: Pool, state: _PoolState, target: int, at: datetime, now: datetime) -> int | None:
        """Endpoints needed at a later time, by Little's law; None while the arrivals at that time are unknown."""
        seconds, usual = state.seconds_in_flight(), state.profile.rate(at)
        if seconds is None or usual is None or state.arrivals_per_s is None:
            return None
        usual_now = state.profile.rate(now)
        scale = state.arrivals_per_s.value / usual_now if usual_now else 1.0
        scale = min(max(scale, 1.0 / _LARGEST_SCALE), _LARGEST_SCALE)
        return self._endpoints_for(pool, usual * scale * seconds, target)

    def _needed_at_present_level(self, pool: Pool, state: _PoolState, target: int) -> int:
        """Endpoints needed if arrivals stay as they are."""
        seconds = state.seconds_in_flight()
        if state.arrivals_per_s is None or state.in_flight is None:
            return len(pool.endpoints)
        in_flight = state.in_flight.value if seconds is None else state.arrivals_per_s.value * seconds
        return self._endpoints_for(pool, in_flight, target)

    def _awake(self, pool: Pool, state: _PoolState, *, needed: int, soon: int, now: datetime) -> tuple[int, str]:
        """How many endpoints are to be awake, and why."""
        now_s, everything = now.timestamp(), len(pool.endpoints)
        state.needed.append((now_s, max(needed, soon)))
        while state.needed[0][0] < now_s - self._dwell_s:
            state.needed.popleft()
        if not pool.sleep:
            return everything, "all are awake: the pool's endpoints do not sleep"
        if not self._fleet.switchback.sleep:
            if self._schedule.is_reference(now):
                return everything, "all are awake: without Sprout none would sleep"
            change = self._schedule.next_change(now)
            if change is not None and change - now <= self._lead:
                return everything, "all are awake: a block without Sprout begins soon"
        held = max(number for _, number in state.needed)
        if held == needed:
            return held, f"{held} awake"
        if held == soon:
            return held, f"{held} awake: needed soon"
        return held, f"{held} awake: needed within the last {self._dwell_s / 60.0:.0f} min"

    def _failing(self, pool: Pool, state: _PoolState, demand: PoolDemand, target: int, now: datetime) -> frozenset[str]:
        """Awake endpoints that routers seem unable to use: nothing runs there, though others are busy or requests wait.

        One counts after the time that it may take to wake, and until something runs there again.
        """
        now_s, lead_s = now.timestamp(), self._lead.total_seconds()
        others_needed = demand.waiting > 0
        for place, endpoint in reversed(list(enumerate(pool.endpoints))):
            running = demand.running.get(endpoint.name, 0)
            since_s = state.passed_over.get(endpoint.name)
            counted = since_s is not None and now_s - since_s >= lead_s
            if state.awake is None or place >= state.awake or running or not (others_needed or counted):
                state.passed_over.pop(endpoint.name, None)
            else:
                state.passed_over.setdefault(endpoint.name, now_s)
            others_needed = others_needed or running >= target / 2
        return frozenset(name for name, at_s in state.passed_over.items() if now_s - at_s >= lead_s)

    def _endpoints_for(self, pool: Pool, in_flight: float, target: int) -> int:
        wanted = math.ceil((in_flight + self._margin(in_flight)) / target - 1e-9)
        return min(max(wanted, pool.min_awake), len(pool.endpoints))

    def _margin(self, in_flight: float) -> float:
        return self._settings.capacity_margin * math.sqrt(in_flight)


def plan_changed(old: PoolCapacity | None, new: PoolCapacity) -> bool:
    """Whether a plan must be published: it differs from the last one, or that one is half through its validity."""
    if old is None or new.at - old.at >= (old.valid_until - old.at) / 2:
        return True
    return _compared(old) != _compared(new)


def _compared(plan: PoolCapacity) -> tuple[object, ...]:
    needed = tuple(one.endpoints_needed for one in plan.forecast)
    return plan.target_batch, plan.endpoints, plan.endpoints_needed, plan.awake, plan.reserved, needed


def _endpoints_with(pool: Pool, *, usable: int, without: frozenset[str]) -> int:
    """How many endpoints, in the order of the fleet, contain so many that can be used; at most all."""
    for count in range(usable, len(pool.endpoints)):
        if sum(endpoint.name not in without for endpoint in pool.endpoints[:count]) >= usable:
            return count
    return len(pool.endpoints)


def _has_objective(pool: Pool) -> bool:
    return pool.tpot_objective_ms is not None or pool.ttft_objective_ms is not None
