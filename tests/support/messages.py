"""Builders of messages: a policy and a carbon intensity."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from shared.messages import CarbonIntensity, IntensityPoint, Policy, PolicyInputs
from tests.support.fleets import MODEL, ZONE


def policy(
    probabilities: Mapping[str, float],
    *,
    version: int = 1,
    now: datetime | None = None,
    valid_s: float = 3_600.0,
    **changes: Any,
) -> Policy:
    """A policy with the same probabilities for every prompt group.

    Args:
        probabilities: by level.
        now: event time; default: wall time.
        valid_s: validity from `now`, event seconds.
        changes: other fields.
    """
    now = now or datetime.now(UTC)
    options = {f"p/{level}": probability for level, probability in probabilities.items()}
    inputs = PolicyInputs(
        solved_for=now,
        intensity_g_per_kwh={ZONE: 300.0},
        k0_zone=ZONE,
        k0_g_per_kwh=300.0,
        k0_min_g_per_kwh=100.0,
        k0_max_g_per_kwh=400.0,
        xi={"preference": 0.1},
        weights={"default": 1.0},
        estimates={},
        holdout=0.0,
    )
    values: dict[str, Any] = {
        "model": MODEL,
        "version": version,
        "created_at": now,
        "valid_until": now + timedelta(seconds=valid_s),
        "status": "optimal",
        "reason": "test",
        "reference": "p/L0",
        "groups": {},
        "overall": options,
        "bounds": {},
        "expected_quality": {},
        "expected_g_per_request": 1.0,
        "reference_g_per_request": 2.0,
        "inputs": inputs,
    }
    return Policy.model_validate(values | changes)


def intensity(at: datetime | None = None, zone: str = ZONE) -> CarbonIntensity:
    """300 g/kWh at an event time; default: wall time."""
    at = at or datetime.now(UTC)
    return CarbonIntensity(
        zone=zone, latest=IntensityPoint(at=at, intensity_g_per_kwh=300.0), source="test", published_at=at
    )
