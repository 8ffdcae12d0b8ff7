"""Topic `carbon-intensity`: what the grid emits."""

from typing import Literal

from pydantic import Field

from shared.messages.base import Message, UtcDatetime, Value, Zone


class IntensityPoint(Value):
    """Carbon intensity of a zone at an instant."""

    at: UtcDatetime = Field(description="Start of the period that the value describes")
    intensity_g_per_kwh: float = Field(ge=0, description="gCO2eq per kWh")
    estimated: bool = Field(default=False, description="True where the provider estimated rather than measured")


class CarbonIntensity(Message):
    """The latest intensity of a zone, with all that a consumer needs to decide alone.

    The topic is compacted by zone: the last message must suffice for a service that starts now, so the trailing
    window travels with every value.
    """

    zone: Zone
    latest: IntensityPoint
    history: tuple[IntensityPoint, ...] = Field(
        default=(), description="Trailing window, oldest first, before `latest`; gaps stay gaps"
    )
    forecast: tuple[IntensityPoint, ...] = Field(default=(), description="Where the provider gives one; oldest first")
    kind: Literal["average", "marginal"] = "average"
    scope: Literal["direct", "life-cycle"] = "direct"
    source: str = Field(description="Provider, and for a file its name")
    published_at: UtcDatetime
