"""Messages as rows of the ledger's tables."""

import json
from collections.abc import Mapping
from typing import Any

from shared.messages import (
    CarbonIntensity,
    Footprint,
    GenerationResponse,
    IntensityPoint,
    Policy,
    PromptGrouping,
    Quality,
    UsageRecord,
)

Row = dict[str, Any]
"""Column to value; instants as ISO 8601 text."""

LARGEST_INTEGER = 2**31 - 1


def refusal_row(response: GenerationResponse) -> Row:
    """A response with an error."""
    at = response.timing.finished_at if response.timing is not None else response.requested_at
    return _clean(
        {
            "request_id": response.request_id,
            "model": response.model,
            "code": response.error.code if response.error is not None else "upstream_error",
            "at": at.isoformat(),
        }
    )


def request_row(response: GenerationResponse) -> Row:
    """The call behind an answer.

    Raises:
        ValueError: the response is no answer.
    """
    decision, usage, timing = response.decision, response.usage, response.timing
    if decision is None or usage is None or timing is None or response.endpoint is None:
        raise ValueError("a response with status 'ok' must carry decision, usage, timing and endpoint")
    return _clean(
        {
            "id": response.request_id,
            "purpose": "request",
            "model": response.model,
            "grp": decision.group,
            "task": response.task,
            "tenant": response.tenant,
            "pool": decision.pool,
            "level": decision.level,
            "zone": decision.zone,
            "endpoint": response.endpoint,
            "policy_version": decision.policy_version,
            "decision_source": decision.source,
            "propensity": decision.propensity,
            "propensities": decision.propensities,
            "started_at": timing.started_at.isoformat(),
            "first_token_at": timing.first_token_at.isoformat() if timing.first_token_at is not None else None,
            "finished_at": timing.finished_at.isoformat(),
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
        }
    )


def usage_row(record: UsageRecord) -> Row:
    """The call behind a usage record."""
    row = record.model_dump(mode="json", exclude={"schema_version", "group"})
    return _clean({**row, "grp": record.group, "propensity": 1.0, "propensities": {}})


def intensity_rows(intensity: CarbonIntensity) -> list[Row]:
    """The latest value and its history."""
    return [
        {"zone": intensity.zone, "source": intensity.source, **_point(point)}
        for point in (*intensity.history, intensity.latest)
    ]


def policy_row(policy: Policy) -> Row:
    """A policy, whole."""
    whole = policy.model_dump(mode="json")
    return _clean({**{name: whole[name] for name in ("model", "version", "created_at")}, "policy": whole})


def quality_row(quality: Quality) -> Row:
    """An evaluation's outcome, whole."""
    whole = quality.model_dump(mode="json")
    return _clean({**{name: whole[name] for name in ("evaluation_id", "model", "evaluated_at")}, "quality": whole})


def grouping_row(grouping: PromptGrouping) -> Row:
    """A version of learned prompt groups: what had been judged before it."""
    whole = grouping.model_dump(mode="json", include={"model", "version", "learned_at", "prompts", "evidence"})
    return _clean({**{name: whole[name] for name in ("model", "version", "learned_at")}, "grouping": whole})


def footprint_of(row: Mapping[str, Any]) -> Footprint:
    """The message of a row of `footprints`; asyncpg hands its JSON over as text."""
    return Footprint.model_validate({**row, "group": row["grp"], "propensities": json.loads(row["propensities"])})


def _point(point: IntensityPoint) -> Row:
    return {
        "at": point.at.isoformat(),
        "intensity_g_per_kwh": point.intensity_g_per_kwh,
        "estimated": point.estimated,
    }


def _clean(row: Row) -> Row:
    """What PostgreSQL cannot store, in the nearest form that it can: NUL in a text, an integer beyond 32 bits."""
    return {name: _storable(content) for name, content in row.items()}


def _storable(value: Any) -> Any:  # noqa: ANN401 - whatever JSON holds
    if isinstance(value, str):
        return value.replace("\x00", "\ufffd")
    if isinstance(value, dict):
        return {_storable(name): _storable(content) for name, content in value.items()}
    if isinstance(value, list | tuple):
        return [_storable(one) for one in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return min(value, LARGEST_INTEGER)
    return value
