"""What the page shows: grid, policies, servers, saving, and the gateway's last answers without their text."""

from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Final, Literal

from pydantic import BaseModel, Field

from shared.fleet import Fleet
from shared.messages import (
    CarbonIntensity,
    Decision,
    GenerationResponse,
    OptionEstimate,
    Policy,
    PoolCapacity,
    SavingOnMeter,
    option_key,
    split_option,
)

MAX_RECENT: Final = 20
"""Answers that are listed."""

MAX_COUNTED: Final = 500
"""Answers whose levels are counted."""

FORECAST_H: Final = 24
ID_LENGTH: Final = 16
"""Characters of a request's id that are shown: enough to find it, too few to cancel it."""

MAX_AGE: Final = timedelta(hours=3)
"""An intensity that is older is not called current."""


class MeterStatus(BaseModel):
    """What the ledger knows of the saving on the meter, which is that of `sprout report`."""

    at: datetime | None = Field(description="End of the last reading that counts; null: nothing is known of today")
    interval_g: tuple[float, float] | None = Field(description="95 % confidence interval of `on_the_meter_g`")
    judge_subtracted: bool = Field(description="Whether what the judge's meters showed is taken off")
    blocks: int = Field(description="Reference blocks that the estimate uses")
    reason: str = Field(description="Why the saving of today is unknown, and what to do; empty if it is known")
    share_28_days: float | None = Field(description="Saved in 28 days, as a share of the grams without Sprout")
    share_28_days_interval: tuple[float, float] | None = Field(description="95 % confidence interval")


class SavedToday(BaseModel):
    """Grams of CO2 equivalent that were not emitted since midnight UTC, or since this gateway started."""

    since: datetime
    attributed_g: float | None = Field(
        description="Mean grams of the reference option minus those of the option that was used, in the policy of the "
        "time, summed over the answers; null: no answer could be compared"
    )
    answers: int = Field(description="Answers of this gateway")
    compared: int = Field(description="Those for which a policy has both means")
    on_the_meter_g: float | None = Field(
        description="Saved by the whole fleet since midnight UTC, as its meters show; less than 0: it used more. null: "
        "unknown, see `meter`"
    )
    meter: MeterStatus


class IntensityAt(BaseModel):
    """An intensity at a time."""

    at: datetime
    g_per_kwh: float


class ZoneStatus(BaseModel):
    """A zone's carbon intensity."""

    zone: str
    now: IntensityAt | None = Field(description="null: unknown, or older than three hours")
    estimated: bool = Field(description="Whether the provider estimated rather than measured")
    source: str | None
    forecast: tuple[IntensityAt, ...] = Field(description=f"Of the next {FORECAST_H} hours")


class QualityStatus(BaseModel):
    """A quality metric, relative to the reference."""

    metric: str
    expected: float | None = Field(description="Lower confidence bound; null: unknown")
    required: float | None = Field(description="Least that the operator allows; null: no bound")


class ModelStatus(BaseModel):
    """What is decided for a model."""

    model: str
    policy: Literal["current", "expired", "none"]
    policy_version: int | None
    valid_until: datetime | None
    mix: dict[str, float] = Field(description="Share of the traffic by directive level, by the current policy")
    served: dict[str, int] = Field(description=f"The last {MAX_COUNTED} answers of this gateway by level")
    quality: tuple[QualityStatus, ...]
    expected_g_per_request: float | None
    reference_g_per_request: float | None


class PoolStatus(BaseModel):
    """The servers of a pool."""

    pool: str
    model: str | None
    zone: str
    servers: int
    in_use: int | None = Field(description="Servers that are awake; null: no plan is valid, all may serve")
    needed: int | None
    in_flight: int | None = Field(description="Requests that run or wait for a server")
    requests_per_s: float | None


class RecentAnswer(BaseModel):
    """One of the last answers; nothing of its text."""

    id: str = Field(description="Beginning of the request's id")
    at: datetime
    model: str
    level: str | None
    group: str | None
    reason: str = Field(description="Why this level")
    tokens: int | None
    grams: float | None = Field(description="Estimate; null: unknown")


class SproutStatus(BaseModel):
    """Response of `GET /v1/sprout/status`; times are event times."""

    at: datetime
    saved_today: SavedToday
    zones: tuple[ZoneStatus, ...]
    models: tuple[ModelStatus, ...]
    pools: tuple[PoolStatus, ...]
    answers: tuple[RecentAnswer, ...] = Field(description=f"The last {MAX_RECENT} of this gateway, the newest first")


class Monitor:
    """Collects what the page shows; bounded, whatever arrives."""

    def __init__(self, fleet: Fleet, *, started_at: datetime) -> None:
        self._fleet = fleet
        self._policies: dict[str, Policy] = {}
        self._intensities: dict[str, CarbonIntensity] = {}
        self._capacities: dict[str, PoolCapacity] = {}
        self._savings: dict[str, SavingOnMeter] = {}
        self._recent: deque[tuple[str | None, RecentAnswer]] = deque(maxlen=MAX_COUNTED)
        self._since = started_at
        self._saved_g = 0.0
        self._answers = self._compared = 0

    def update_policies(self, policies: Iterable[Policy]) -> None:
        """Take new policies."""
        self._policies |= {policy.model: policy for policy in policies}

    def update_intensities(self, intensities: Iterable[CarbonIntensity]) -> None:
        """Take new intensities; those of zones without a pool are dropped."""
        zones = {pool.zone for pool in self._fleet.pools}
        self._intensities |= {one.zone: one for one in intensities if one.zone in zones}

    def update_capacities(self, capacities: Iterable[PoolCapacity]) -> None:
        """Take new plans of the servers; those of unknown pools are dropped."""
        pools = {pool.name for pool in self._fleet.pools}
        self._capacities |= {one.pool: one for one in capacities if one.pool in pools}

    def update_savings(self, savings: Iterable[SavingOnMeter]) -> None:
        """Take new savings on the meter."""
        self._savings |= {one.window: one for one in savings}

    def note(self, response: GenerationResponse, *, grams: float | None, now: datetime) -> None:
        """Take an answer.

        Args:
            grams: its estimate.
            now: event time.
        """
        self._begin_day(now)
        decision = response.decision
        answer = RecentAnswer(
            id=_beginning(response.request_id),
            at=now,
            model=response.model,
            level=None if decision is None else decision.level,
            group=None if decision is None else decision.group,
            reason=reason_of(response),
            tokens=None if response.usage is None else response.usage.completion_tokens,
            grams=grams,
        )
        self._recent.append((response.tenant, answer))
        if response.error is None:
            self._answers += 1
            saved_g = None if decision is None else saving_g(self._policies.get(response.model), decision)
            if saved_g is not None:
                self._compared += 1
                self._saved_g += saved_g

    def status(self, now: datetime, *, tenant: str | None = None) -> SproutStatus:
        """The document.

        Args:
            now: event time.
            tenant: list only its answers; None: all answers.
        """
        self._begin_day(now)
        midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
        today = self._savings.get("day")
        if today is not None and today.since != midnight:
            today = None
        listed = [answer for owner, answer in self._recent if tenant is None or owner == tenant]
        return SproutStatus(
            at=now,
            saved_today=SavedToday(
                since=self._since,
                attributed_g=self._saved_g if self._compared else None,
                answers=self._answers,
                compared=self._compared,
                on_the_meter_g=None if today is None else today.saved_g,
                meter=meter_status(today, self._savings.get("28-days")),
            ),
            zones=tuple(self._zone(zone, now) for zone in dict.fromkeys(pool.zone for pool in self._fleet.pools)),
            models=tuple(self._model(model.name, now) for model in self._fleet.models),
            pools=tuple(self._pool(number, now) for number in range(len(self._fleet.pools))),
            answers=tuple(reversed(listed[-MAX_RECENT:])),
        )

    def _begin_day(self, now: datetime) -> None:
        midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
        if midnight > self._since:
            self._since, self._saved_g, self._answers, self._compared = midnight, 0.0, 0, 0

    def _zone(self, zone: str, now: datetime) -> ZoneStatus:
        known = self._intensities.get(zone)
        if known is None:
            return ZoneStatus(zone=zone, now=None, estimated=False, source=None, forecast=())
        current = now - known.latest.at <= MAX_AGE
        return ZoneStatus(
            zone=zone,
            now=IntensityAt(at=known.latest.at, g_per_kwh=known.latest.intensity_g_per_kwh) if current else None,
            estimated=known.latest.estimated,
            source=known.source,
            forecast=tuple(
                IntensityAt(at=point.at, g_per_kwh=point.intensity_g_per_kwh)
                for point in known.forecast
                if now <= point.at <= now + timedelta(hours=FORECAST_H)
            ),
        )

    def _model(self, model: str, now: datetime) -> ModelStatus:
        served = Counter(answer.level for _, answer in self._recent if answer.model == model and answer.level)
        policy = self._policies.get(model)
        if policy is None:
            return ModelStatus(
                model=model, policy="none", policy_version=None, valid_until=None, mix={}, served=dict(served),
                quality=(), expected_g_per_request=None, reference_g_per_request=None,
            )  # fmt: skip
        valid = now <= policy.valid_until
        # A promise by period bounds a single hour by its floors only.
        bounds = policy.bounds if policy.promise is None else policy.promise.hourly_floors
        return ModelStatus(
            model=model,
            policy="current" if valid else "expired",
            policy_version=policy.version,
            valid_until=policy.valid_until,
            mix=level_mix(policy) if valid else {split_option(policy.reference)[1]: 1.0},
            served=dict(sorted(served.items())),
            quality=tuple(
                QualityStatus(metric=metric, expected=policy.expected_quality.get(metric), required=bounds.get(metric))
                for metric in sorted(policy.expected_quality.keys() | policy.bounds.keys())
            ),
            expected_g_per_request=policy.expected_g_per_request,
            reference_g_per_request=policy.reference_g_per_request,
        )

    def _pool(self, number: int, now: datetime) -> PoolStatus:
        pool = self._fleet.pools[number]
        plan = self._capacities.get(pool.name)
        if plan is not None and now > plan.valid_until:
            plan = None
        return PoolStatus(
            pool=pool.name,
            model=pool.model,
            zone=pool.zone,
            servers=len(pool.endpoints),
            in_use=None if plan is None else len(plan.awake),
            needed=None if plan is None else plan.endpoints_needed,
            in_flight=None if plan is None else plan.in_flight,
            requests_per_s=None if plan is None else plan.requests_per_s,
        )


def meter_status(today: SavingOnMeter | None, month: SavingOnMeter | None) -> MeterStatus:
    """What is known of the saving on the meter.

    Args:
        today: None if nothing of today is known.
        month: of 28 days.
    """
    reason = "the ledger has not published it today"
    return MeterStatus(
        at=None if today is None else today.at,
        interval_g=None if today is None else _interval(today.saved_g_low, today.saved_g_high),
        judge_subtracted=today is None or today.judge_subtracted,
        blocks=0 if today is None else today.blocks,
        reason=reason if today is None else today.reason,
        share_28_days=None if month is None else month.saved_share,
        share_28_days_interval=None if month is None else _interval(month.saved_share_low, month.saved_share_high),
    )


def _interval(low: float | None, high: float | None) -> tuple[float, float] | None:
    return None if low is None or high is None else (low, high)


def level_mix(policy: Policy) -> dict[str, float]:
    """Share of the traffic by directive level: the groups' probabilities by their weights."""
    weights = policy.inputs.weights or {"": 1.0}
    total = sum(weights.values()) or 1.0
    mix: defaultdict[str, float] = defaultdict(float)
    for group, weight in weights.items():
        for option, probability in policy.row(group).items():
            mix[split_option(option)[1]] += probability * weight / total
    return dict(sorted(mix.items()))


def saving_g(policy: Policy | None, decision: Decision) -> float | None:
    """Expected grams that a decision saves compared with the reference option; None: the policy does not say."""
    if policy is None:
        return None
    row = policy.inputs.estimates.get(decision.group, {})
    options = (policy.reference, option_key(decision.pool, decision.level))
    grams = [_mean_g(policy, option, row.get(option)) for option in options]
    return None if grams[0] is None or grams[1] is None else grams[0] - grams[1]


def reason_of(response: GenerationResponse) -> str:
    """Why a request was answered as it was, for people."""
    if response.error is not None:
        return f"error: {response.error.code}"
    decision = response.decision
    if decision is None:
        return "unknown"
    return {
        "policy": f"drawn by policy {decision.policy_version}",
        "forced": "required by the request",
        "fallback": "no valid policy",
        "switchback": "reference block",
    }[decision.source]


def _mean_g(policy: Policy, option: str, mean: OptionEstimate | None) -> float | None:
    inputs = policy.inputs.options.get(option)
    if mean is None or inputs is None:
        return None
    server_s = mean.processing_s if mean.server_s is None else mean.server_s
    return mean.energy_kwh * inputs.g_per_kwh + server_s * inputs.embodied_g_per_s


def _beginning(request_id: str) -> str:
    return request_id if len(request_id) <= ID_LENGTH else f"{request_id[:ID_LENGTH]}…"
