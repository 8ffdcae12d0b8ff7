"""From what is known of a model to its policy: what it was solved with, and the row of all traffic."""

import tomllib
from datetime import UTC, datetime
from typing import Any

import pytest

from services.optimizer.bounds import InForce, TrailingRange
from services.optimizer.estimates import Estimates
from services.optimizer.planning import Situation, make_policy
from services.optimizer.program import SLACK
from services.optimizer.settings import OptimizerSettings
from shared.fleet import Fleet
from shared.messages import OptionEstimate, Policy
from tests.support.router import MODEL, fleet_toml

FLEET = Fleet.model_validate(tomllib.loads(fleet_toml(["h:1"])))
ZONE = FLEET.pools[0].zone
NOW = datetime(2026, 1, 1, tzinfo=UTC)
METRIC = "preference"
DOUBT = (0.02, 0.01, 0.01)


def believed(energy_kwh: float, quality: float, **more: Any) -> OptionEstimate:
    return OptionEstimate(energy_kwh=energy_kwh, processing_s=1.0, quality={METRIC: quality}, **more)


def row(doubt: tuple[float, float, float], **more: Any) -> dict[str, OptionEstimate]:
    return {"p/L0": believed(1e-4, 0.5), "p/L1": believed(4e-5, 0.46, doubt={METRIC: doubt}, **more)}


def planned(estimates: Estimates, **settings: Any) -> Policy:
    situation = Situation(
        model=MODEL,
        now=NOW,
        trigger="start",
        intensities={ZONE: InForce(300.0, NOW)},
        range=TrailingRange(100.0, 300.0),
        estimates=estimates,
    )
    return make_policy(situation, fleet=FLEET, aims=OptimizerSettings(holdout=0.0, **settings).aims, version=1)


def two_groups(**more: Any) -> Estimates:
    return Estimates(
        weights={"a": 0.5, "b": 0.5},
        groups={"a": row(DOUBT, **more), "b": row(DOUBT, **more)},
        whole=row((0.02, 0.0, 0.0), **more),
        families={"a": "sums"},
        requests_per_s=1.0,
    )


def test_a_policy_tells_all_that_it_was_solved_with():
    made = planned(two_groups(), xi={METRIC: 0.1})
    assert made.inputs.families == {"a": "sums"}
    assert made.inputs.cautions == {METRIC: pytest.approx(1.645)}
    assert made.inputs.estimates["b"]["p/L1"].doubt == {METRIC: DOUBT}


def test_what_is_counted_on_is_what_is_left_after_the_margin():
    """Of 0.05 that may be lost, a moved request takes 0.04 and so many standard deviations."""
    made = planned(two_groups(), xi={METRIC: 0.1})
    apart = planned(two_groups(), xi={METRIC: 0.1}, cautions={METRIC: 0.0})
    assert apart.groups["a"] == {"p/L1": 1.0}
    # The groups have different families: all but what is shared with all cancels out in part.
    deviation = ((0.02**2 + 0.01**2) / 2 + 0.01**2) ** 0.5
    moved = sum(one.get("p/L1", 0.0) for one in made.groups.values()) / 2
    assert moved == pytest.approx(0.05 / (0.04 + 1.645 * deviation), rel=1e-2)
    assert made.expected_quality[METRIC] == pytest.approx(0.9, abs=2 * SLACK)
    assert made.overall["p/L1"] == pytest.approx(0.05 / (0.04 + 1.645 * 0.02), rel=1e-3)


def test_a_floor_binds_the_row_of_all_traffic_by_what_is_counted_on():
    made = planned(two_groups(group_quality={METRIC: 0.3}), xi={METRIC: 1.0}, floors={METRIC: 0.9})
    for one in (*made.groups.values(), made.overall):
        assert one["p/L1"] == pytest.approx(0.05 / 0.2, rel=1e-3)


def test_a_bound_of_nothing_binds_nothing():
    assert planned(two_groups(), xi={METRIC: 1.0}, caution=50.0).groups["a"] == {"p/L1": 1.0}
