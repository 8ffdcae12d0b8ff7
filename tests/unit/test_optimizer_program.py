"""The linear program: rows are distributions, bounds are kept, the paper's schemes are restrictions."""

import itertools
import math
import random
from dataclasses import replace
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.optimizer.problem import BOUND_TOLERANCE, OptionPrice, Problem, Rows, Solution, error_factors
from services.optimizer.program import solve
from shared.messages import OptionEstimate

LEVELS = ("L0", "L1", "L2")
REFERENCE = "p/L0"


def estimate(energy: float, quality: float, seconds: float = 1.0) -> OptionEstimate:
    return OptionEstimate(energy_kwh=energy, processing_s=seconds, quality={"preference": quality})


def problem(groups: dict[str, list[tuple[float, float]]], weights: dict[str, float] | None = None, **more) -> Problem:
    """Groups of (kWh, quality) by level, on one pool at 1 g/kWh without embodied carbon."""
    return Problem(
        reference=REFERENCE,
        options={f"p/{level}": OptionPrice(pool="p", g_per_kwh=1.0, embodied_g_per_s=0.0) for level in LEVELS},
        weights=weights or {group: 1 / len(groups) for group in groups},
        estimates={
            group: {f"p/{level}": estimate(*cell) for level, cell in zip(LEVELS, row, strict=False)}
            for group, row in groups.items()
        },
        **more,
    )


cells = st.tuples(st.floats(0.01, 10.0), st.floats(0.01, 1.0))
rows = st.lists(cells, min_size=3, max_size=3)


def cheapest_vertex(row: list[tuple[float, float]], bound: float, holdout: float) -> float:
    """Brute force: with one equality and one inequality a vertex draws from two options beside the holdout."""
    least, best = bound * row[0][1], row[0][0]
    for (cost, quality), (other_cost, other_quality) in itertools.product(row, repeat=2):
        base_quality = holdout * row[0][1] + (1 - holdout) * other_quality
        base_cost = holdout * row[0][0] + (1 - holdout) * other_cost
        if base_quality >= least - 1e-12:
            best = min(best, base_cost)
        gain = (1 - holdout) * (quality - other_quality)
        if gain > 0 and 0 <= (share := (least - base_quality) / gain) <= 1:
            best = min(best, base_cost + share * (1 - holdout) * (cost - other_cost))
    return best


@settings(max_examples=150, deadline=None)
@given(row=rows, bound=st.floats(0.5, 1.0), holdout=st.sampled_from([0.0, 0.05, 0.3]))
def test_one_group_of_three_levels_is_answered_as_brute_force_does(row, bound, holdout):
    solution = solve(problem({"g": row}, bounds={"preference": bound}, holdout=holdout))
    assert solution.g_per_request == pytest.approx(cheapest_vertex(row, bound, holdout), rel=1e-5, abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(groups=st.lists(rows, min_size=1, max_size=4), bound=st.floats(0.5, 1.0), floor=st.floats(0.0, 1.0))
def test_rows_are_distributions_that_keep_bounds_floors_and_holdout_and_never_cost_more(groups, bound, floor):
    named = {f"g{number}": row for number, row in enumerate(groups)}
    solution = solve(problem(named, bounds={"preference": bound}, floors={"preference": floor}, holdout=0.05))
    assert solution.status == "optimal"
    assert solution.quality["preference"] >= bound - 1e-6
    assert solution.g_per_request <= solution.reference_g_per_request * (1 + 1e-6) + 1e-9
    for group, row in solution.rows.items():
        assert sum(row.values()) == pytest.approx(1.0, abs=1e-9)
        assert all(0 < probability <= 1 + 1e-12 for probability in row.values())
        assert row[REFERENCE] >= 0.05
        quality = sum(p * named[group][LEVELS.index(option[-2:])][1] for option, p in row.items())
        assert quality >= floor * named[group][0][1] - 1e-6


ROW = [(1.0, 0.4), (0.4, 0.36), (0.3, 0.2)]


def test_co2_opt_has_no_bound_and_base_no_option_but_the_reference():
    assert solve(problem({"g": ROW})).rows["g"] == pytest.approx({"p/L2": 1.0})
    base = solve(problem({"g": ROW[:1]}, bounds={"preference": 1.0}))
    assert (base.status, base.rows, base.quality) == ("reference", {"g": {REFERENCE: 1.0}}, {"preference": 1.0})


def test_model_opt_is_two_pools_at_l0():
    options = {name: OptionPrice(pool=name[0], g_per_kwh=1.0, embodied_g_per_s=0.0) for name in ("a/L0", "b/L0")}
    made = Problem(
        reference="a/L0",
        options=options,
        weights={"g": 1.0},
        estimates={"g": {"a/L0": estimate(2.0, 0.6), "b/L0": estimate(1.0, 0.4)}},
        bounds={"preference": 0.9},
    )
    assert solve(made).rows["g"]["b/L0"] == pytest.approx(0.3, abs=1e-6)


def test_no_loss_tolerated_and_no_better_level_means_the_reference():
    assert solve(problem({"g": ROW}, bounds={"preference": 1.0})).rows["g"] == pytest.approx({REFERENCE: 1.0})


def test_of_equal_options_the_reference_is_taken():
    equal = [(1.0, 0.5)] * 3
    assert solve(problem({"g": equal, "h": equal}, bounds={"preference": 0.9})).rows["h"] == {REFERENCE: 1.0}


def test_floors_are_given_up_first_then_capacity():
    slow = {"g": [(1.0, 0.4), (0.4, 0.36), (0.3, 0.2)]}
    tight = {"p": 0.5}  # every option takes a second, at one request a second
    both = solve(problem(slow, floors={"preference": 1.0}, capacities=tight, requests_per_s=1.0))
    assert both.status == "capacity_dropped"
    options = {
        "a/L0": OptionPrice(pool="a", g_per_kwh=1.0, embodied_g_per_s=0.0),
        "b/L0": OptionPrice(pool="b", g_per_kwh=2.0, embodied_g_per_s=0.0),
    }
    two = Problem(
        reference="a/L0",
        options=options,
        weights={"g": 1.0},
        estimates={"g": {"a/L0": estimate(1.0, 0.5), "b/L0": estimate(1.0, 0.4)}},
        floors={"preference": 1.0},
        capacities={"a": 0.5},
        requests_per_s=1.0,
    )
    solution = solve(two)
    assert solution.status == "floors_dropped"
    assert solution.rows["g"] == pytest.approx({"a/L0": 0.5, "b/L0": 0.5})


doubts = st.floats(0.001, 0.3)


def doubted(groups: dict[str, tuple[float, tuple[float, float, float]]], **more) -> Problem:
    """Groups that L1 serves at half the cost; by how much less quality than 0.5, and how far that may be off."""
    made = problem({group: [(1.0, 0.5), (0.5, 0.5 - loss)] for group, (loss, _) in groups.items()}, **more)
    estimates = {
        group: made.estimates[group]
        | {"p/L1": made.estimates[group]["p/L1"].model_copy(update={"doubt": {"preference": doubt}})}
        for group, (_, doubt) in groups.items()
    }
    return replace(made, estimates=estimates)


def served_briefly(solution: Solution) -> dict[str, float]:
    return {group: row.get("p/L1", 0.0) for group, row in solution.rows.items()}


def test_of_one_group_as_much_is_moved_as_the_bound_leaves_to_loss_and_margin():
    made = doubted({"g": (0.05, (0.03, 0.0, 0.04))}, bounds={"preference": 0.9}, confidence_z={"preference": 2.0})
    solution = solve(made)
    assert served_briefly(solution)["g"] == pytest.approx(0.05 / (0.05 + 2.0 * 0.05), abs=1e-4)
    assert solution.quality["preference"] == pytest.approx(0.9, abs=2e-5)
    assert solve(replace(made, confidence_z={})).rows["g"] == pytest.approx({"p/L1": 1.0})


def test_doubts_of_their_own_cancel_out_those_that_are_shared_do_not():
    """Equal groups are moved equally; four doubts of their own are half as much together as four that are shared."""
    shares = []
    for doubt in ((0.1, 0.0, 0.0), (0.0, 0.1, 0.0), (0.0, 0.0, 0.1)):
        made = doubted(
            {f"g{n}": (0.0, doubt) for n in range(4)},
            families={"g0": "a", "g1": "a", "g2": "b", "g3": "b"},
            bounds={"preference": 0.9},
            confidence_z={"preference": 1.0},
        )
        shares.append(fmean(served_briefly(solve(made)).values()))
    # 0.05 of loss is tolerated.
    assert shares == pytest.approx([1.0, 0.05 / (0.1 / math.sqrt(2)), 0.05 / 0.1], abs=1e-3)


@settings(max_examples=40, deadline=None)
@given(
    losses=st.lists(st.floats(-0.1, 0.2), min_size=2, max_size=2),
    deviations=st.lists(st.tuples(doubts, doubts, doubts), min_size=2, max_size=2),
    bound=st.floats(0.7, 1.0),
    caution=st.floats(0.1, 3.0),
    together=st.booleans(),
)
def test_a_margin_is_kept_and_nothing_is_given_away_as_brute_force_finds(losses, deviations, bound, caution, together):
    made = doubted(
        {f"g{n}": one for n, one in enumerate(zip(losses, deviations, strict=True))},
        families={} if together else {"g0": "a", "g1": "b"},
        bounds={"preference": bound},
        confidence_z={"preference": caution},
    )
    first, second = np.meshgrid(np.linspace(0, 1, 401), np.linspace(0, 1, 401))
    (own, family, common), (other, others_family, others_common) = deviations
    shared = [first * family + second * others_family] if together else [first * family, second * others_family]
    parts = [first * own, second * other, first * common + second * others_common, *shared]
    margin = caution * np.sqrt(sum(np.square(part / 2) for part in parts))
    quality = 0.5 - (first * losses[0] + second * losses[1]) / 2 - margin
    grid = np.where(quality >= bound * 0.5, 1.0 - (first + second) / 4, np.inf).min()
    solution = solve(made)
    assert solution.quality["preference"] >= bound - 2 * BOUND_TOLERANCE
    assert grid - 0.005 <= solution.g_per_request <= grid + 1e-4


@pytest.mark.parametrize("share", [1.0, 1e-3, 1e-6, 1e-9])
def test_a_metric_that_can_be_told_of_few_prompts_is_bound_as_tightly(share):
    """Right answers are that share of all; losses and doubts are as much smaller."""
    made = doubted({"g": (0.05, (0.03, 0.0, 0.04))}, bounds={"preference": 0.9}, confidence_z={"preference": 2.0})
    few = {
        option: one.model_copy(
            update={
                "quality": {"preference": share * one.quality["preference"]},
                "doubt": {metric: tuple(share * part for part in doubt) for metric, doubt in one.doubt.items()},
            }
        )
        for option, one in made.estimates["g"].items()
    }
    solution = solve(replace(made, estimates={"g": few}))
    assert solution.status == "optimal"
    assert served_briefly(solution)["g"] == pytest.approx(0.05 / (0.05 + 2.0 * 0.05), abs=1e-4)


BOTH = ("preference", "correctness")


def many_groups(seed: int, bounds: dict[str, float]) -> Problem:
    """Twelve groups in four families, three levels, two metrics."""
    chance = random.Random(seed)
    groups = [f"g{n}" for n in range(12)]
    shares = [chance.uniform(0.2, 1.0) for _ in groups]

    def cell(place: int) -> OptionEstimate:
        return OptionEstimate(
            energy_kwh=(1.0, 0.4, 0.3)[place] * chance.uniform(0.7, 1.4),
            processing_s=1.0,
            quality={metric: 0.5 - place * chance.uniform(-0.02, 0.04) for metric in BOTH},
            doubt={metric: (chance.uniform(0.01, 0.08), 0.02, 0.01) for metric in BOTH} if place else {},
        )

    return replace(
        problem({"g": ROW}),
        bounds=bounds,
        confidence_z=dict.fromkeys(BOTH, 1.96),
        weights={group: share / sum(shares) for group, share in zip(groups, shares, strict=True)},
        families={group: f"f{n // 3}" for n, group in enumerate(groups)},
        estimates={group: {f"p/{level}": cell(place) for place, level in enumerate(LEVELS)} for group in groups},
    )


def with_margins_as_at(made: Problem, rows: Rows) -> Problem:
    """The same with the margins' tangents at these rows in place of the margins; no margin is smaller anywhere."""
    cells = [(group, option) for group in made.weights for option in made.estimates[group]]
    weights = np.array([made.weights[group] for group, _ in cells])
    x = np.array([rows[group].get(option, 0.0) for group, option in cells])
    estimates = {group: dict(row) for group, row in made.estimates.items()}
    for metric in made.bounds:
        doubts = np.array([estimates[group][option].doubt.get(metric, (0.0, 0.0, 0.0)) for group, option in cells])
        parts = error_factors(
            weights[:, None] * doubts, [group for group, _ in cells], [made.families[group] for group, _ in cells]
        )
        slopes = made.confidence_z[metric] * parts.T @ (parts @ x) / np.linalg.norm(parts @ x) / weights
        for (group, option), slope in zip(cells, slopes, strict=True):
            one = estimates[group][option]
            less = {**one.quality, metric: one.quality[metric] - slope}
            estimates[group][option] = one.model_copy(update={"quality": less})
    return replace(made, estimates=estimates, confidence_z={})


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), bounds=st.sampled_from([(0.95, 0.97), (1.0, 0.97), (0.99, 0.995), (0.9, 1.0)]))
def test_margins_of_several_bounds_are_kept_and_nothing_cheaper_keeps_them(seed, bounds):
    """What the tangents at the solution allow is no cheaper, and the margins allow no more than these."""
    made = many_groups(seed, dict(zip(BOTH, bounds, strict=True)))
    solution = solve(made)
    assert solution.status == "optimal"
    for metric, bound in made.bounds.items():
        assert solution.quality[metric] >= bound - 2 * BOUND_TOLERANCE
    if any(row != {REFERENCE: 1.0} for row in solution.rows.values()):
        cheapest = solve(with_margins_as_at(made, solution.rows))
        assert solution.g_per_request <= cheapest.g_per_request + 0.01 * solution.reference_g_per_request


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ({"bounds": {"preference": 1.2}}, "bounds must lie in"),
        ({"weights": {"g": 0.5}}, "weights must sum to 1"),
        ({"bounds": {"correctness": 0.9}}, "no quality for correctness"),
    ],
)
def test_a_program_that_makes_no_sense_is_refused(more, complaint):
    with pytest.raises(ValueError, match=complaint):
        problem({"g": ROW}, **more)
