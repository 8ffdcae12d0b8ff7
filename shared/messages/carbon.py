"""Topics `carbon-intensity` and `footprints`: carbon of the grid, energy and carbon of every call."""

from typing import Literal

from pydantic import Field

from shared.messages.base import Identifier, Level, Message, Probability, RequestMessage, UtcDatetime, Value, Zone
from shared.messages.generation import FinishReason


class IntensityPoint(Value):
    """Carbon intensity of a zone in one period."""

    at: UtcDatetime = Field(description="Start of the period that the value describes")
    intensity_g_per_kwh: float = Field(ge=0, description="gCO2eq per kWh")
    estimated: bool = Field(default=False, description="True where the provider estimated rather than measured")


class CarbonIntensity(Message):
    """The latest intensity of a zone, with its history.

    The topic is compacted by zone: the last message must be enough for a service that starts now, so every message
    contains the trailing window.
    """

    zone: Zone
    latest: IntensityPoint
    history: tuple[IntensityPoint, ...] = Field(
        default=(), description="Trailing window before `latest`, oldest first; may have gaps"
    )
    forecast: tuple[IntensityPoint, ...] = Field(
        default=(), description="Forecast of the provider, if any; oldest first"
    )
    kind: Literal["average", "marginal"] = "average"
    scope: Literal["direct", "life-cycle"] = "direct"
    source: str = Field(description="Name of the provider, for a recorded trace with its file")
    published_at: UtcDatetime


class Footprint(RequestMessage):
    """Energy and carbon attributed to one call.

    total_g = energy_kwh * pue * intensity_g_per_kwh + embodied_g_per_s * server_s
    """

    request_id: Identifier = Field(description="The request's id, or the usage record's")
    purpose: Literal["request", "evaluation", "judge"]
    evaluation_id: str | None = None
    model: Identifier
    group: Identifier
    task: str | None = None
    tenant: str | None = None
    pool: Identifier
    level: Level
    zone: Zone
    endpoint: Identifier
    policy_version: int | None = None
    propensity: Probability = 1.0
    propensities: dict[str, Probability] = Field(default_factory=dict)
    started_at: UtcDatetime
    finished_at: UtcDatetime
    processing_s: float = Field(ge=0, description="Seconds from sending the call to its last token, event time")
    server_s: float | None = Field(
        default=None,
        ge=0,
        description="The call's share of the server's time: calls that run at once share it; null in old messages, "
        "which were charged for processing_s",
    )
    prompt_tokens: int | None = None
    completion_tokens: int = Field(ge=0)
    finish_reason: FinishReason | None = Field(
        default=None,
        description="Of a request's answer. cancelled: it was cut short, so its tokens and energy say nothing about "
        "whole answers; null in the evaluator's calls and old messages",
    )
    energy_j: float = Field(ge=0, description="Attributed from the endpoint's energy counter")
    intensity_g_per_kwh: float | None = Field(
        default=None, ge=0, description="Mean while the call ran; null where no value was recent enough"
    )
    operational_g: float | None = Field(default=None, ge=0)
    embodied_g: float = Field(ge=0)
    total_g: float | None = Field(default=None, ge=0, description="null where the intensity is unknown")


class SavingOnMeter(Message):
    """The saving of the whole fleet in one window on its meters, estimated by switchback: see `shared.metering`.

    What is unknown is null, and `reason` says why.
    """

    window: Literal["day", "28-days"] = Field(description="day: since midnight UTC")
    since: UtcDatetime
    at: UtcDatetime = Field(description="End of the last meter reading; the time of computation without one")
    saved_g: float | None = Field(default=None, description="gCO2eq of electricity, less the judge's")
    saved_g_low: float | None = Field(default=None, description="Of the 95 % confidence interval")
    saved_g_high: float | None = None
    saved_share: float | None = Field(default=None, description="Of the grams without Sprout; null if these may be 0")
    saved_share_low: float | None = None
    saved_share_high: float | None = None
    without_g: float | None = Field(default=None, description="Estimated grams without Sprout")
    judge_subtracted: bool = Field(default=True, description="false: a pool of the judge has no meter that can be used")
    blocks: int = Field(default=0, ge=0, description="Reference blocks that the estimate uses")
    hours: float = Field(default=0.0, ge=0, description="Of the window with complete readings, which the grams are for")
    hours_left_out: float = Field(default=0.0, ge=0)
    reason: str = Field(default="", description="Why there is no estimate, and what to do")
