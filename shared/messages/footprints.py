"""Topic `footprints`: joules and grams of every call on a model server."""

from typing import Literal

from pydantic import Field

from shared.messages.base import Identifier, Level, Message, Probability, UtcDatetime, Zone


class Footprint(Message):
    """Energy and carbon attributed to one call.

    total_g = energy_kwh * pue * intensity_g_per_kwh + embodied_g_per_s * processing_s
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
    processing_s: float = Field(ge=0, description="Seconds from sent to last token, event time")
    prompt_tokens: int | None = None
    completion_tokens: int = Field(ge=0)
    energy_j: float = Field(ge=0, description="Attributed from the endpoint's energy counter")
    intensity_g_per_kwh: float | None = Field(
        default=None, ge=0, description="Mean in force while it ran; null where no data was fresh enough"
    )
    operational_g: float | None = Field(default=None, ge=0)
    embodied_g: float = Field(ge=0)
    total_g: float | None = Field(default=None, ge=0, description="null where the intensity is unknown")
