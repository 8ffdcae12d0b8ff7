"""What requests took: `GET /v1/footprints/{id}` and `GET /v1/usage`, of the tenant of the key that asks."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, Literal

import asyncpg
from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, Field

from services.gateway.accounts import Accounts
from services.gateway.errors import ApiError
from services.gateway.keys import ApiKey
from shared.messages import Zone
from shared.runtime.clock import Clock
from shared.runtime.database import DatabaseUnavailableError

MAX_ROWS: Final = 10_000
"""Rows of one answer."""

Grouping = Literal["key", "hour", "day", "month"]

_OWN: Final = "(tenant = $1 OR (tenant IS NULL AND $1 IS NULL AND key_id = $2))"
"""Rows of the key's tenant; of the key itself if it has none."""

_FOOTPRINT: Final = f"SELECT * FROM requests WHERE {_OWN} AND id = $3"
_SUMS: Final = """
SELECT {group} sum(requests)::bigint AS requests, sum(prompt_tokens)::bigint AS prompt_tokens,
       sum(completion_tokens)::bigint AS completion_tokens, sum(metered)::bigint AS metered_requests,
       CASE WHEN sum(metered) > 0 THEN sum(joules) END AS joules,
       sum(priced)::bigint AS attributed_requests, CASE WHEN sum(priced) > 0 THEN sum(grams) END AS grams,
       CASE WHEN sum(compared) > 0 THEN sum(saved_grams) END AS saved_grams,
       greatest(0, sum(estimated_joules)) AS outstanding_joules, greatest(0, sum(estimated_grams)) AS outstanding_grams
FROM hours LEFT JOIN (SELECT id AS key_id, name AS key_name FROM api_keys) AS names USING (key_id)
WHERE {own} AND hour >= $3 AND hour < $4
{group_by} ORDER BY {order} LIMIT {limit}
"""


class RequestFootprint(BaseModel):
    """Response of `GET /v1/footprints/{id}`: what is attributed to a request; null while unknown."""

    id: str
    object: Literal["footprint"] = "footprint"
    created: int = Field(description="Unix time, of the deployment's clock")
    model: str
    record: str | None = Field(description="Record of the request in Kafka, by which reports identify it")
    level: str | None = Field(description="Directive level that was used")
    pool: str | None
    zone: Zone | None
    prompt_tokens: int | None
    completion_tokens: int | None
    joules: float | None = Field(description="Attributed from the server's energy counter")
    intensity_g_per_kwh: float | None = Field(description="Mean carbon intensity while the request ran")
    operational_grams: float | None = Field(description="gCO2eq of the energy")
    embodied_grams: float | None = Field(description="gCO2eq of the server's manufacture, its share")
    grams: float | None = Field(description="gCO2eq, embodied carbon included; null also without a known intensity")
    saved_grams: float | None = Field(
        description="Estimate for the reference option, a mean of the prompt group, minus `grams`; may be negative"
    )
    estimated_joules: float | None = Field(description="As in `usage.sprout` of the answer")
    estimated_grams: float | None = Field(description="As in `usage.sprout` of the answer")
    estimate_source: Literal["token_price", "option_mean"] | None


class UsageRow(BaseModel):
    """Sums of one period, and of one key where they are grouped by key."""

    start: datetime = Field(description="Of the period, UTC")
    key: str | None = Field(description="Id of the key; null: of all keys of the tenant")
    key_name: str | None
    requests: int = Field(description="Answered ones")
    prompt_tokens: int
    completion_tokens: int
    metered_requests: int = Field(description="Requests whose `joules` are attributed")
    joules: float | None = Field(description="Attributed; null: of no request yet")
    attributed_requests: int = Field(description="Requests whose `grams` are attributed")
    grams: float | None = Field(description="Attributed gCO2eq, embodied carbon included; null: of no request yet")
    saved_grams: float | None = Field(
        description="Against estimates for the reference option, over the attributed requests that have one; null: none"
    )
    outstanding_joules: float = Field(description="Estimates of requests whose `joules` are not attributed yet")
    outstanding_grams: float = Field(description="Estimates of requests whose `grams` are not attributed yet")


class UsageList(BaseModel):
    """Response of `GET /v1/usage`."""

    object: Literal["list"] = "list"
    since: datetime = Field(serialization_alias="from", description="Full hour, UTC")
    until: datetime = Field(serialization_alias="to", description="Full hour, UTC")
    data: tuple[UsageRow, ...]


def usage_router(authenticate: Callable[..., Any], accounts: Callable[[], Accounts], clock: Clock) -> APIRouter:
    """The endpoints.

    Args:
        authenticate: dependency that gives the key of a request.
        accounts: raises `DatabaseUnavailableError` while the gateway starts.
    """
    router = APIRouter(tags=["carbon"])
    Key = Annotated[ApiKey, Depends(authenticate)]  # noqa: N806 - a type

    async def fetch(statement: str, *arguments: object) -> list[asyncpg.Record]:
        try:
            return await accounts().fetch(statement, *arguments)
        except DatabaseUnavailableError:
            raise ApiError.unavailable("footprints cannot be read at the moment") from None

    @router.get("/v1/footprints/{request_id}")
    async def footprint(request_id: str, key: Key) -> RequestFootprint:
        """Energy and carbon that are attributed to a request, some seconds to minutes after its answer."""
        rows = [] if "\x00" in request_id else await fetch(_FOOTPRINT, key.tenant, key.id, request_id)
        if not rows:
            raise ApiError(404, "there is no such request of this API key's tenant", param="id", code="not_found")
        return footprint_of(rows[0])

    @router.get("/v1/usage")
    async def usage(
        key: Key,
        since: Annotated[
            datetime | None,
            Query(alias="from", description="ISO 8601 or Unix time, rounded down to the hour; default: of this month"),
        ] = None,
        until: Annotated[datetime | None, Query(alias="to", description="The same, rounded up; default: now")] = None,
        group_by: Annotated[
            tuple[Grouping, ...],
            Query(description="key, and one of hour, day and month; without a period one row spans all"),
        ] = ("day",),
    ) -> UsageList:
        """Requests, tokens, energy and carbon of the tenant's keys."""
        now = clock.now()
        try:
            start = _hour(since or now.replace(day=1, hour=0))
            end = _hour((until or now) + timedelta(hours=1) - timedelta(microseconds=1))
        except OverflowError:
            raise ApiError(400, "the times are outside of the calendar", param="from", code="invalid_value") from None
        periods = [one for one in group_by if one != "key"]
        if len(set(periods)) > 1:
            raise ApiError(400, "group by one of hour, day and month", param="group_by", code="invalid_value")
        if start >= end:
            raise ApiError(400, "'from' must be before 'to'", param="from", code="invalid_value")
        period, by_key = next(iter(periods), None), "key" in group_by
        rows = await fetch(_statement(period, by_key=by_key), key.tenant, key.id, start, end)
        if len(rows) > MAX_ROWS:
            raise ApiError(
                400, f"that is more than {MAX_ROWS} rows: choose a longer period or less time", param="group_by",
                code="invalid_value",
            )  # fmt: skip
        found = ({"start": start, "key": None, "key_name": None, **row} for row in rows if row["requests"] is not None)
        return UsageList(since=start, until=end, data=tuple(UsageRow.model_validate(row) for row in found))

    return router


def footprint_of(row: asyncpg.Record) -> RequestFootprint:
    """The footprint of a row of `requests`."""
    reference_g, total_g = row["reference_g"], row["total_g"]
    return RequestFootprint(
        id=row["id"],
        created=int(row["created_at"].timestamp()),
        model=row["model"],
        record=row["record"],
        level=row["level"],
        pool=row["pool"],
        zone=row["zone"],
        prompt_tokens=row["prompt_tokens"],
        completion_tokens=row["completion_tokens"],
        joules=row["energy_j"],
        intensity_g_per_kwh=row["intensity_g_per_kwh"],
        operational_grams=row["operational_g"],
        embodied_grams=row["embodied_g"],
        grams=total_g,
        saved_grams=None if reference_g is None or total_g is None else reference_g - total_g,
        estimated_joules=row["estimated_j"],
        estimated_grams=row["estimated_g"],
        estimate_source=row["estimate_source"],
    )


def _statement(period: str | None, *, by_key: bool) -> str:
    columns = ["key_id AS key, key_name"] if by_key else []
    names = ["key_id", "key_name"] if by_key else []
    if period is not None:
        columns.insert(0, f"date_trunc('{period}', hour, 'UTC') AS start")
        names.insert(0, "start")
    return _SUMS.format(
        group="".join(f"{column}, " for column in columns),
        own=_OWN,
        group_by=f"GROUP BY {', '.join(names)}" if names else "",
        order=", ".join(names) or "1",
        limit=MAX_ROWS + 1,
    )


def _hour(time: datetime) -> datetime:
    """The full hour before a time; UTC unless it has a zone."""
    aware = time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    return aware.replace(minute=0, second=0, microsecond=0)
