"""Policies: what they contain, the distribution for all traffic, and the program rebuilt from a policy."""

import tomllib
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pytest

from services.optimizer.bounds import CurrentIntensity, TrailingRange
from services.optimizer.cells import BOUND_TOLERANCE
from services.optimizer.estimates import Estimates
from services.optimizer.policy import Situation, make_policy, margin_g
from services.optimizer.program import solve_program
from services.optimizer.settings import OptimizerSettings
from shared.fleet import Fleet
from shared.messages import OptionEstimate, Policy
from tests.support.router import MODEL, fleet_toml

FLEET = Fleet.model_validate(tomllib.loads(fleet_toml(["h:1"])))
ZONE = FLEET.pools[0].zone
NOW = datetime(2026, 1, 1, tzinfo=UTC)
METRIC = "preference"
ERRORS = (0.02, 0.01, 0.01)


def cell(energy_kwh: float, quality: float, **more: Any) -> OptionEstimate:
    return OptionEstimate(energy_kwh=energy_kwh, processing_s=1.0, quality={METRIC: quality}, **more)


def row(errors: tuple[float, float, float], **more: Any) -> dict[str, OptionEstimate]:
    return {"p/L0": cell(1e-4, 0.5), "p/L1": cell(4e-5, 0.46, doubt={METRIC: errors}, **more)}


def planned(estimates: Estimates, *, fleet: Fleet = FLEET, rate: float = 1.0, **settings: Any) -> Policy:
    situation = Situation(
        model=MODEL,
        now=NOW,
        trigger="start",
        intensities={ZONE: CurrentIntensity(300.0, NOW)},
        range=TrailingRange(100.0, 300.0),
        estimates=replace(estimates, requests_per_s=rate),
    )
    return make_policy(situation, fleet=fleet, settings=OptimizerSettings(holdout=0.0, **settings), version=1)[0]


def two_groups(**more: Any) -> Estimates:
    return Estimates(
        weights={"a": 0.5, "b": 0.5},
        groups={"a": row(ERRORS, **more), "b": row(ERRORS, **more)},
        overall=row((0.02, 0.0, 0.0), **more),
        families={"a": "sums"},
        requests_per_s=1.0,
    )


def test_a_policy_contains_what_it_was_solved_with():
    made = planned(two_groups(), xi={METRIC: 0.1})
    assert made.inputs.families == {"a": "sums"}
    assert made.inputs.cautions == {METRIC: pytest.approx(1.0)}
    assert made.inputs.estimates["b"]["p/L1"].doubt == {METRIC: ERRORS}


def test_the_expected_quality_is_the_lower_confidence_bound():
    """Of a tolerated loss of 0.05, a request moved to L1 uses 0.04 and z standard errors."""
    made = planned(two_groups(), xi={METRIC: 0.1})
    apart = planned(two_groups(), xi={METRIC: 0.1}, confidence_z_by_metric={METRIC: 0.0})
    assert apart.groups["a"] == {"p/L1": 1.0}
    # The groups have different families: only the component shared with all does not cancel out in part.
    deviation = ((0.02**2 + 0.01**2) / 2 + 0.01**2) ** 0.5
    moved = sum(one.get("p/L1", 0.0) for one in made.groups.values()) / 2
    assert moved == pytest.approx(0.05 / (0.04 + deviation), rel=1e-2)
    assert made.expected_quality[METRIC] == pytest.approx(0.9, abs=2 * BOUND_TOLERANCE)
    assert made.overall["p/L1"] == pytest.approx(0.05 / (0.04 + 0.02), rel=1e-3)


def test_the_cost_of_the_margin_is_what_the_program_would_save_without_it():
    made = planned(two_groups(), xi={METRIC: 0.1})
    certain = planned(two_groups(), xi={METRIC: 0.1}, confidence_z_by_metric={METRIC: 0.0})
    assert margin_g(made) == pytest.approx(made.expected_g_per_request - certain.expected_g_per_request)
    assert margin_g(made) > 0.0
    assert margin_g(certain) == 0.0


def two_limits(preference: float) -> Policy:
    """L1 loses correctness, and this share of the preference; both are estimated with a standard error of 0.01."""
    metrics = (METRIC, "correctness")
    row = {
        "p/L0": OptionEstimate(energy_kwh=1e-4, processing_s=1.0, quality=dict.fromkeys(metrics, 0.5)),
        "p/L1": OptionEstimate(
            energy_kwh=4e-5, processing_s=1.0, quality={METRIC: preference, "correctness": 0.47},
            doubt=dict.fromkeys(metrics, (0.01, 0.0, 0.0)),
        ),
    }  # fmt: skip
    estimates = Estimates(weights={"a": 1.0}, groups={"a": row}, overall=row, requests_per_s=1.0)
    return planned(
        estimates, xi={METRIC: 0.1, "correctness": 0.05}, constant_bounds=frozenset(metrics), confidence_z=1.645
    )


def test_a_limit_with_room_to_spare_leaves_the_others_a_smaller_margin():
    made = two_limits(preference=0.49)
    assert made.inputs.cautions == {
        METRIC: pytest.approx(3.09, abs=2e-3),
        "correctness": pytest.approx(1.654, abs=1e-3),
    }
    assert made.groups["a"]["p/L1"] == pytest.approx(0.025 / (0.03 + 1.654 * 0.01), rel=1e-3)
    assert all(made.expected_quality[metric] >= made.bounds[metric] - 2 * BOUND_TOLERANCE for metric in made.bounds)


def test_of_the_margins_that_are_tried_those_with_the_least_carbon_are_taken():
    """With a share of 2 % the correctness, which has little room, would limit L1 more than the preference does."""
    made = two_limits(preference=0.40)
    assert made.inputs.cautions[METRIC] == pytest.approx(1.695, abs=2e-3)
    assert made.inputs.cautions["correctness"] == pytest.approx(2.576, abs=2e-3)
    assert made.groups["a"]["p/L1"] == pytest.approx(0.05 / (0.1 + 1.695 * 0.01), rel=1e-3)


def test_a_floor_limits_the_overall_distribution_by_its_lower_confidence_bound():
    made = planned(two_groups(group_quality={METRIC: 0.3}), xi={METRIC: 1.0}, floors={METRIC: 0.9})
    for one in (*made.groups.values(), made.overall):
        assert one["p/L1"] == pytest.approx(0.05 / 0.2, rel=1e-3)


def test_a_limit_of_zero_has_no_effect():
    assert planned(two_groups(), xi={METRIC: 1.0}, confidence_z=10.0).groups["a"] == {"p/L1": 1.0}


def test_a_time_limit_of_the_solver_is_named_in_the_reason(monkeypatch):
    monkeypatch.setattr("services.optimizer.safety_margin.solve_program", partial(solve_program, time_limit_s=0.0))
    made = planned(two_groups(), floors={METRIC: 0.9})
    assert made.status == "reference"
    assert "the solver reached its time limit of 10 s; the reference is served" in made.reason
    assert "capacities" not in made.reason


def test_an_overload_is_named_in_the_reason():
    capacity = FLEET.model_copy(update={"pools": [FLEET.pools[0].model_copy(update={"concurrency": 1})]})
    assert "capacities" not in planned(two_groups()).reason
    made = planned(two_groups(), fleet=capacity, rate=5.0)
    assert made.status == "optimal"
    assert f"{made.overload:.1%} more load than the pools' capacities: more endpoints are needed" in made.reason
    assert made.overload > 1.0
