"""The report's section on the meters, as dataclasses. The field names are keys of the JSON document."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from shared.metering.tables import Latency
from tools.reporting.capacity import NO_LATENCY, PoolRow
from tools.reporting.savings import Interval


@dataclass(frozen=True, slots=True)
class MeterSaving:
    """The saving on the meter, less all energy of the judge's endpoints.

    Attributes:
        saved_g, saved_j: gCO2eq of electricity, and J.
        saving_pct, carbon_saving_pct: of the energy and of its grams without Sprout; None if these may be 0.
        without_j, without_g: without Sprout; estimated, but measured in the reference blocks.
        hours: of the period with complete readings, which all sums are for.
        hours_left_out: of the period without.
        extrapolated_pct: share of these hours with a demand that no reference block had.
    """

    saved_g: float
    saved_g_interval: Interval
    saved_j: float
    saved_j_interval: Interval
    saving_pct: float | None
    saving_interval: Interval | None
    carbon_saving_pct: float | None
    carbon_saving_interval: Interval | None
    without_j: float
    without_g: float
    hours: float
    hours_left_out: float
    extrapolated_pct: float


@dataclass(frozen=True, slots=True)
class PowerPoint:
    """Mean power of the serving endpoints, W; `without_w` is predicted without Sprout; None if unknown."""

    at: datetime
    power_w: float | None
    without_w: float | None


@dataclass(frozen=True, slots=True)
class TimeSpan:
    """A span of event time."""

    start: datetime
    end: datetime


@dataclass(frozen=True, slots=True)
class Metered:
    """What the meters say of the whole fleet; always for all models and zones.

    Attributes:
        saving: None if it cannot be estimated.
        reason: why there is no saving, and what to do; empty with a saving.
        explanation: why it differs from the attributed saving, for people.
        reference_blocks: blocks of the switchback with readings.
        excluded_pools: pools that are not in any figure here, with the reason.
        notes: other things to know about the readings.
        fleet_energy_j: of all metered endpoints of the pools that are not excluded, idle energy and judge included, J.
        idle_energy_j: idle power x time, J.
        judge_energy_j: everything that the judge's endpoints used, J.
        endpoints: that serve requests.
        endpoints_needed_mean: fewest endpoints that could carry the load, mean over time; None if unknown.
        endpoints_in_use_mean: endpoints with calls, mean over time; None if unknown.
        latency: of all requests outside of reference blocks, ms.
        reference_latency: of requests in reference blocks, ms.
        tpot_objective_ms: the smallest of all pools; None without one.
        power: mean power over the period.
        blocks: times of the reference blocks in the period.
    """

    saving: MeterSaving | None
    reason: str
    explanation: str = ""
    reference_blocks: int = 0
    excluded_pools: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    fleet_energy_j: float = 0.0
    idle_energy_j: float = 0.0
    judge_energy_j: float = 0.0
    endpoints: int = 0
    endpoints_needed_mean: float | None = None
    endpoints_in_use_mean: float | None = None
    latency: Latency = NO_LATENCY
    reference_latency: Latency = NO_LATENCY
    tpot_objective_ms: float | None = None
    pools: tuple[PoolRow, ...] = ()
    power: tuple[PowerPoint, ...] = ()
    blocks: tuple[TimeSpan, ...] = ()
