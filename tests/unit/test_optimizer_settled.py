"""Groups whose decision is settled: what makes them so, and that their option then stays what it is."""

import random
from dataclasses import replace
from datetime import timedelta

import pytest

from services.optimizer.outcome import settled_groups
from services.optimizer.policy import settled_since
from services.optimizer.problem import OptionPrice, Problem
from services.optimizer.program import Program, solve_program
from services.optimizer.settings import OptimizerSettings
from shared.messages import OptionEstimate, Policy
from shared.messages.policies import OptionInputs
from tests.support.contract import EXAMPLES

PRICE = OptionInputs(pool="p", g_per_kwh=1.0, embodied_g_per_s=0.0)
LEVELS = ("p/L0", "p/L1", "p/L2")
ENERGY = {"p/L0": 1.0, "p/L1": 0.5, "p/L2": 0.3}


def estimate(option: str, quality: float, error: float, *, trials: float = 100.0) -> OptionEstimate:
    doubt = {} if option == "p/L0" else {"preference": (error, 0.0, 0.0)}
    return OptionEstimate(
        energy_kwh=ENERGY[option], processing_s=1.0, quality={"preference": quality}, doubt=doubt, trials=trials
    )


def problem(groups: dict[str, tuple[float, float, float]], *, error: float = 0.01, trials: float = 100.0, **more):
    """Groups of equal traffic with their quality by level; no loss is tolerated."""
    return Problem(
        reference="p/L0",
        options={option: OptionPrice(pool="p", g_per_kwh=1.0, embodied_g_per_s=0.0) for option in LEVELS},
        weights={group: 1 / len(groups) for group in groups},
        estimates={
            group: {
                option: estimate(option, value, error, trials=trials)
                for option, value in zip(LEVELS, qualities, strict=True)
            }
            for group, qualities in groups.items()
        },
        confidence_z={"preference": 1.645},
        **{"bounds": {"preference": 1.0}} | more,
    )


def solved(made: Problem) -> Program:
    (_, program) = solve_program(made)
    assert program is not None
    return program


MIXED = {"brief": (0.3, 0.35, 0.5), "long": (0.6, 0.1, 0.1), "sums": (0.9, 0.1, 0.05)}
"""Groups that prefer the shortest answer and the longest one, and one that shorter answers are no good for."""


def test_a_group_that_loses_much_is_settled_at_the_reference_and_one_that_mixes_options_is_not():
    program = solved(problem(MIXED))
    assert program.rows()["sums"] == {"p/L0": 1.0}
    assert len(program.rows()["long"]) == 2
    # Verdicts in the group with the shortest answers keep the margin small.
    assert program.rows()["brief"] == {"p/L2": 1.0}
    assert settled_groups(program, min_trials=20.0) == {"sums"}


def test_more_uncertainty_unsettles_and_so_do_forgotten_verdicts_and_a_binding_floor():
    assert settled_groups(solved(problem(MIXED, error=0.5)), min_trials=20.0) == set()
    assert settled_groups(solved(problem(MIXED, trials=19.0)), min_trials=20.0) == set()
    lower = {group: (0.6, 0.6 - loss, 0.6 - loss) for group, loss in (("a", 0.1), ("b", 0.2))}
    floors = {"floors": {"preference": 0.9}, "bounds": {}, "confidence_z": {}}
    for group in settled_groups(solved(replace(problem(lower), **floors)), min_trials=20.0):
        pytest.fail(f"{group} is held at the reference by its floor")


def test_without_a_limit_that_costs_anything_every_group_with_one_option_is_settled():
    program = solved(problem(MIXED, bounds={"preference": 0.1}, holdout=0.05))
    assert {max(row, key=lambda one: row[one]) for row in program.rows().values()} == {"p/L2"}
    assert settled_groups(program, min_trials=20.0) == set(MIXED)


def moved_by_chance(one: OptionEstimate, rng: random.Random) -> OptionEstimate:
    """An estimate whose quality has changed as much as its standard error allows."""
    (error, *_) = one.doubt.get("preference", (0.0, 0.0, 0.0))
    return one.model_copy(update={"quality": {"preference": one.quality["preference"] + rng.gauss(0.0, error)}})


def test_the_option_of_a_settled_group_stays_within_the_uncertainty():
    rng = random.Random(5)
    moved = checked = 0
    for _ in range(40):
        groups = {
            f"g{number}": (base := rng.uniform(0.3, 0.6), base - rng.uniform(-0.1, 0.2), base - rng.uniform(-0.1, 0.4))
            for number in range(12)
        }
        made = problem(groups, error=0.02)
        program = solved(made)
        for group in settled_groups(program, min_trials=20.0):
            before = program.rows()[group]
            for _ in range(3):
                shifted = {option: moved_by_chance(one, rng) for option, one in made.estimates[group].items()}
                after = solved(replace(made, estimates={**made.estimates, group: shifted})).rows()[group]
                checked += 1
                moved += max(abs(after.get(option, 0.0) - before.get(option, 0.0)) for option in LEVELS) > 0.01
    assert checked > 60
    assert moved <= 0.05 * checked  # Z standard errors


def test_a_policy_says_since_when_its_groups_are_settled_and_forgets_what_is_not_or_has_expired():
    example = EXAMPLES["policies"]
    assert isinstance(example, Policy)
    program = solved(problem(MIXED))
    policy = example.model_copy(update={"groups": program.rows()})
    settings, now, earlier = OptimizerSettings(), policy.created_at, policy.created_at - timedelta(hours=30)
    assert settled_since(policy, program, None, settings=settings) == {"sums": now}
    before = policy.model_copy(update={"settled": {"sums": earlier, "long": earlier}})
    assert settled_since(policy, program, before, settings=settings) == {"sums": earlier}
    expired = before.model_copy(update={"valid_until": now - timedelta(seconds=1)})
    assert settled_since(policy, program, expired, settings=settings) == {"sums": now}
    assert settled_since(policy, None, before, settings=settings) == {}
    assert settled_since(policy.model_copy(update={"groups": {}}), program, before, settings=settings) == {}
