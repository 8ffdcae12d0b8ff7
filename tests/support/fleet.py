"""A fleet of one model and one pool, what its model answers, and a policy that is in force for it."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from shared.messages import CarbonIntensity, IntensityPoint, Policy, PolicyInputs

MODEL = "m"
ZONE = "GB"
DIRECTIVES = {"L1": "Always answer briefly.", "L2": "Always answer very briefly."}

Answers = Mapping[str, tuple[int, float]]
"""Tokens and seconds of a prompt's recorded answer, by level."""


def fleet_toml(endpoints: Sequence[str], *, template: str = "llama-2", triton_model: str = "ensemble") -> str:
    """A fleet file of one model and one pool `p` with endpoints `e0`, `e1`, ..."""
    lines = ["[[directives]]", 'level = "L0"']
    for level, text in DIRECTIVES.items():
        lines += ["[[directives]]", f'level = "{level}"', f'text = "{text}"']
    lines += ["[[models]]", f'name = "{MODEL}"', f'chat_template = "{template}"']
    lines += ["[[pools]]", 'name = "p"', f'model = "{MODEL}"', f'zone = "{ZONE}"', f'triton_model = "{triton_model}"']
    for number, address in enumerate(endpoints):
        lines += ["[[pools.endpoints]]", f'name = "e{number}"', f'grpc = "{address}"']
    return "\n".join(lines) + "\n"


def write_workload(path: Path, answers: Mapping[str, Answers]) -> Path:
    """Recorded answers of `MODEL`, by prompt; every text begins with its level. Returns the path."""
    lines = [
        {
            "task": "test",
            "prompt": prompt,
            "preferred": "L0",
            "responses": {
                f"{MODEL}/{level}": {
                    "text": f"{level} says: " + "word " * tokens,
                    "tokens": tokens,
                    "energy_j": tokens * 6.0,
                    "time_s": time_s,
                }
                for level, (tokens, time_s) in levels.items()
            },
        }
        for prompt, levels in answers.items()
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def policy(
    row: Mapping[str, float],
    *,
    version: int = 1,
    now: datetime | None = None,
    valid_s: float = 3_600.0,
    **changes: Any,
) -> Policy:
    """A policy of one row.

    Args:
        row: probability by level.
        now: event time; default: the present.
        valid_s: event seconds from now on.
        changes: other fields.
    """
    now = now or datetime.now(UTC)
    options = {f"p/{level}": probability for level, probability in row.items()}
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
    """300 g/kWh at an event time; default: the present."""
    at = at or datetime.now(UTC)
    return CarbonIntensity(
        zone=zone, latest=IntensityPoint(at=at, intensity_g_per_kwh=300.0), source="test", published_at=at
    )
