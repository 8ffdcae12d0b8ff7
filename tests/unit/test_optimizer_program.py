"""The linear program: rows are distributions, limits hold, the paper's schemes are restrictions."""

import itertools
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import clarabel
import highspy
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.optimize import linprog

from services.optimizer.cells import BOUND_TOLERANCE, Cells
from services.optimizer.highs import warm_up
from services.optimizer.problem import OptionPrice, Problem, Solution
from services.optimizer.program import Program, solve, solve_program
from shared.messages import OptionEstimate
from tests.support.examples import examples

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


@settings(max_examples=examples(150), suppress_health_check=[HealthCheck.too_slow])
@given(row=rows, bound=st.floats(0.5, 1.0), holdout=st.sampled_from([0.0, 0.05, 0.3]))
def test_one_group_of_three_levels_agrees_with_brute_force(row, bound, holdout):
    solution = solve(problem({"g": row}, bounds={"preference": bound}, holdout=holdout))
    assert solution.g_per_request == pytest.approx(cheapest_vertex(row, bound, holdout), rel=1e-5, abs=1e-4)


@settings(max_examples=examples(60), suppress_health_check=[HealthCheck.too_slow])
@given(groups=st.lists(rows, min_size=1, max_size=4), bound=st.floats(0.5, 1.0), floor=st.floats(0.0, 1.0))
def test_rows_are_distributions_that_keep_limits_floors_and_holdout_and_never_cost_more(groups, bound, floor):
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


def test_of_equal_options_the_reference_is_used():
    equal = [(1.0, 0.5)] * 3
    assert solve(problem({"g": equal, "h": equal}, bounds={"preference": 0.9})).rows["h"] == {REFERENCE: 1.0}


def two_pools(requests_per_s: float, **more) -> Problem:
    """Two equal pools of ten places, where a request takes 5 s; the first one's grid is four times as clean."""
    return Problem(
        reference="a/L0",
        options={
            "a/L0": OptionPrice(pool="a", g_per_kwh=100.0, embodied_g_per_s=0.0),
            "b/L0": OptionPrice(pool="b", g_per_kwh=400.0, embodied_g_per_s=0.0),
        },
        weights={"g": 1.0},
        estimates={"g": {"a/L0": estimate(1.0, 0.5, seconds=5.0), "b/L0": estimate(1.0, 0.4, seconds=5.0)}},
        capacities={"a": 10.0, "b": 10.0},
        requests_per_s=requests_per_s,
        **more,
    )


def test_an_overload_is_the_least_possible_and_shared_evenly():
    fits = solve(two_pools(4.0))
    assert fits.overload == 0.0
    assert fits.rows["g"] == pytest.approx({"a/L0": 0.5, "b/L0": 0.5})
    over = solve(two_pools(4.1))
    assert over.status == "optimal"
    assert over.overload == pytest.approx(0.025, abs=1e-5)
    assert over.rows["g"] == pytest.approx({"a/L0": 0.5, "b/L0": 0.5}, abs=1e-5)


@pytest.mark.parametrize("limit", ["floors", "bounds"])
def test_limits_of_quality_are_kept_in_an_overload(limit):
    """The second pool answers worse: of a tenth of quality that may be lost, half of the requests may use it."""
    over = solve(two_pools(8.0, **{limit: {"preference": 0.95}}))
    assert over.rows["g"] == pytest.approx({"a/L0": 0.75, "b/L0": 0.25}, abs=1e-5)
    assert over.overload == pytest.approx(8.0 * 5.0 * 0.75 / 10.0 - 1.0, abs=1e-4)


def test_a_limit_with_a_safety_margin_is_kept_in_an_overload():
    made = replace(small_program(), capacities={"p": 0.5})
    over = solve(made)
    assert over.status == "optimal"
    assert over.overload > 0.0
    assert over.quality["preference"] >= 0.9 - BOUND_TOLERANCE


@given(st.floats(0.1, 50.0), st.floats(1.0, 30.0), st.floats(1.0, 30.0))
@settings(max_examples=examples(40))
def test_no_pool_carries_more_than_the_least_overload(requests_per_s, of_a, of_b):
    made = replace(two_pools(requests_per_s), capacities={"a": of_a, "b": of_b})
    solution = solve(made)
    least = max(0.0, requests_per_s * 5.0 / (of_a + of_b) - 1.0)
    assert solution.overload == pytest.approx(least, abs=1e-5)


standard_errors = st.floats(0.001, 0.3)


def uncertain(groups: dict[str, tuple[float, tuple[float, float, float]]], **more) -> Problem:
    """Groups that L1 serves at half the cost; by group: loss of quality from 0.5, and its standard errors."""
    made = problem({group: [(1.0, 0.5), (0.5, 0.5 - loss)] for group, (loss, _) in groups.items()}, **more)
    estimates = {
        group: made.estimates[group]
        | {"p/L1": made.estimates[group]["p/L1"].model_copy(update={"doubt": {"preference": doubt}})}
        for group, (_, doubt) in groups.items()
    }
    return replace(made, estimates=estimates)


def served_briefly(solution: Solution) -> dict[str, float]:
    return {group: row.get("p/L1", 0.0) for group, row in solution.rows.items()}


def test_one_group_is_moved_until_loss_and_margin_use_up_the_tolerance():
    made = uncertain({"g": (0.05, (0.03, 0.0, 0.04))}, bounds={"preference": 0.9}, confidence_z={"preference": 2.0})
    solution = solve(made)
    assert served_briefly(solution)["g"] == pytest.approx(0.05 / (0.05 + 2.0 * 0.05), abs=1e-4)
    assert solution.quality["preference"] == pytest.approx(0.9, abs=2e-5)
    assert solve(replace(made, confidence_z={})).rows["g"] == pytest.approx({"p/L1": 1.0})


def test_own_errors_of_groups_cancel_out_and_shared_errors_do_not():
    """Equal groups are moved equally; four own errors add up to half of four shared errors."""
    shares = []
    for errors in ((0.1, 0.0, 0.0), (0.0, 0.1, 0.0), (0.0, 0.0, 0.1)):
        made = uncertain(
            {f"g{n}": (0.0, errors) for n in range(4)},
            families={"g0": "a", "g1": "a", "g2": "b", "g3": "b"},
            bounds={"preference": 0.9},
            confidence_z={"preference": 1.0},
        )
        shares.append(fmean(served_briefly(solve(made)).values()))
    # A loss of 0.05 is tolerated.
    assert shares == pytest.approx([1.0, 0.05 / (0.1 / math.sqrt(2)), 0.05 / 0.1], abs=1e-3)


def test_traffic_shares_that_few_requests_were_counted_for_have_a_margin_of_their_own():
    """The margin is that of shares drawn from as many requests, whatever the groups have in common."""
    groups = {"g0": [(1.0, 0.3), (0.5, 0.7)], "g1": [(1.0, 0.7), (0.5, 0.3)]}
    known = problem(groups, bounds={"preference": 0.9}, confidence_z={"preference": 1.0})
    counted = replace(known, traffic_requests=400.0)
    everything_brief = np.array([0.0, 1.0, 0.0, 1.0])
    margin = Cells(counted).bounds["preference"].margin(everything_brief)
    shares = np.random.default_rng(1).multinomial(400, [0.5, 0.5], size=20_000) / 400
    assert margin == pytest.approx((shares @ [0.4, -0.4]).std() / 0.5, rel=0.03)
    assert Cells(known).bounds["preference"].margin(everything_brief) == 0.0
    assert Cells(counted).bounds["preference"].margin(np.array([1.0, 0.0, 1.0, 0.0])) == 0.0
    assert solve(counted).status == solve(known).status == "optimal"


@settings(max_examples=examples(40), suppress_health_check=[HealthCheck.too_slow])
@given(
    losses=st.lists(st.floats(-0.1, 0.2), min_size=2, max_size=2),
    deviations=st.lists(st.tuples(standard_errors, standard_errors, standard_errors), min_size=2, max_size=2),
    bound=st.floats(0.7, 1.0),
    caution=st.floats(0.1, 3.0),
    together=st.booleans(),
)
def test_the_margin_holds_and_the_cost_agrees_with_brute_force(losses, deviations, bound, caution, together):
    made = uncertain(
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
def test_a_metric_that_is_defined_for_few_prompts_is_limited_as_tightly(share):
    """The metric is defined for that share of the prompts; losses and standard errors are scaled by it."""
    made = uncertain({"g": (0.05, (0.03, 0.0, 0.04))}, bounds={"preference": 0.9}, confidence_z={"preference": 2.0})
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


def cone_optimum(made: Problem) -> float:
    """The least cost of the same program with its norms as second-order cones, solved by Clarabel."""
    cells = Cells(made)
    count = len(cells.names)
    one_per_group = np.array([[float(name == group) for name, _ in cells.names] for group in made.weights])
    blocks, limits = [one_per_group, -np.eye(count)], [np.ones(len(one_per_group)), np.zeros(count)]
    kinds = [clarabel.ZeroConeT(len(one_per_group)), clarabel.NonnegativeConeT(count)]
    for bound in cells.bounds.values():
        # ((q.x - b) / z, P x) lies in the cone.
        blocks.append(-np.vstack([bound.mean_factors / bound.z, bound.error_factors]))
        limits.append(np.concatenate([[-bound.bound / bound.z], np.zeros(len(bound.error_factors))]))
        kinds.append(clarabel.SecondOrderConeT(1 + len(bound.error_factors)))
    quiet = clarabel.DefaultSettings()
    quiet.verbose = False
    no_quadratic = sparse.csc_matrix((count, count))
    rows, right = sparse.csc_matrix(np.vstack(blocks)), np.concatenate(limits)
    found = clarabel.DefaultSolver(
        no_quadratic, cells.costs(cells.grams, cells.weights), rows, right, kinds, quiet
    ).solve()
    assert str(found.status) == "Solved"
    return float(found.obj_val)


@settings(max_examples=examples(40), suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 10**6), bounds=st.sampled_from([(0.95, 0.97), (1.0, 0.97), (0.99, 0.995), (0.9, 1.0)]))
@example(seed=3032, bounds=(0.99, 0.995))
@example(seed=524287, bounds=(0.99, 0.995))
def test_margins_of_several_limits_hold_and_nothing_cheaper_keeps_them(seed, bounds):
    """The optimum by cutting planes is that of a cone solver, within what the tolerance of the limits is worth."""
    made = many_groups(seed, dict(zip(BOTH, bounds, strict=True)))
    solution = solve(made)
    assert solution.status == "optimal"
    for metric, bound in made.bounds.items():
        assert solution.quality[metric] >= bound - 2 * BOUND_TOLERANCE
    assert solution.g_per_request == pytest.approx(cone_optimum(made) * Cells(made).cost_unit_g, rel=1e-3)


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ({"bounds": {"preference": -0.1}}, "bounds must not be negative"),
        ({"weights": {"g": 0.5}}, "weights must sum to 1"),
        ({"bounds": {"correctness": 0.9}}, "no quality for correctness"),
    ],
)
def test_an_inconsistent_problem_is_rejected(more, complaint):
    with pytest.raises(ValueError, match=complaint):
        problem({"g": ROW}, **more)


VARIANTS = {
    "bounds": {},
    "floors": {"floors": {"preference": 0.97}, "holdout": 0.05},
    "capacity": {"capacities": {"p": 0.9}, "requests_per_s": 0.95},
    "tight capacity": {"capacities": {"p": 0.5}, "requests_per_s": 2.0},
    "tight floors": {"floors": {"preference": 1.0}, "bounds": {"preference": 0.9, "correctness": 0.0}},
}
STORED = json.loads((Path(__file__).parent / "data" / "optimizer_solutions.json").read_text(encoding="utf-8"))
"""Solutions of the first release, which stated the same programs to HiGHS directly, without PuLP."""


@pytest.mark.parametrize("variant", VARIANTS)
def test_solutions_equal_those_of_a_formulation_without_pulp(variant):
    stored = [one for one in STORED if one["variant"] == variant]
    assert stored
    for one in stored:
        made = replace(many_groups(one["seed"], dict(zip(BOTH, one["bounds"], strict=True))), **VARIANTS[variant])
        solution = solve(made)
        # The first release dropped capacities that were too small. With one pool they do not change what is best.
        assert solution.status == one["status"].replace("capacity_dropped", "optimal")
        overloaded = one["status"] == "capacity_dropped"
        assert (solution.overload > 0.0) == overloaded
        # Other cuts were added on the way to the solution of an overload.
        assert solution.g_per_request == pytest.approx(one["g_per_request"], rel=1e-4 if overloaded else 1e-6)
        if overloaded:
            continue
        moved = [1.0 - solution.rows[group].get(REFERENCE, 0.0) for group in made.weights]
        assert moved == pytest.approx(one["moved"], abs=1e-6)


@settings(max_examples=examples(40), suppress_health_check=[HealthCheck.too_slow])
@given(
    groups=st.lists(rows, min_size=1, max_size=4),
    bound=st.floats(0.5, 1.0),
    floor=st.sampled_from([0.0, 0.6]),
    holdout=st.sampled_from([0.0, 0.05]),
    capacity=st.sampled_from([None, 0.7]),
)
def test_the_program_agrees_with_matrices_solved_by_scipy(groups, bound, floor, holdout, capacity):
    """The same program stated a second time, as dense matrices, without margins."""
    seconds = [1.0, 0.5, 0.4]
    named = {f"g{number}": row for number, row in enumerate(groups)}
    made = problem(
        named,
        bounds={"preference": bound},
        floors={"preference": floor} if floor else {},
        holdout=holdout,
        capacities={"p": capacity} if capacity else {},
        requests_per_s=1.0,
    )
    estimates = {
        group: {
            option: one.model_copy(update={"processing_s": seconds[LEVELS.index(option[-2:])]})
            for option, one in row.items()
        }
        for group, row in made.estimates.items()
    }
    solution = solve(replace(made, estimates=estimates))
    count = len(groups)
    share = 1.0 / count
    costs = np.array([share * cost for row in groups for cost, _ in row])
    quality = np.array([quality for row in groups for _, quality in row])
    reference = np.tile([1.0, 0.0, 0.0], count)
    upper, limits = [-share * quality], [-bound * share * float(quality @ reference)]
    for g in range(count if floor else 0):
        of_group = np.repeat(np.arange(count) == g, 3)
        upper.append(-quality * of_group)
        limits.append(-floor * float(quality @ (reference * of_group)))
    one_per_group = np.kron(np.eye(count), np.ones(3))
    least = [(holdout * one, None) for one in reference]
    if capacity:
        upper.append(share * np.tile(seconds, count))
        limits.append(capacity)
        overload = linprog(
            np.eye(len(costs) + 1)[-1],
            A_ub=np.column_stack([np.array(upper), [0.0] * (len(upper) - 1) + [-capacity]]),
            b_ub=limits,
            A_eq=np.column_stack([one_per_group, np.zeros(count)]),
            b_eq=np.ones(count),
            bounds=[*least, (0.0, None)],
        ).fun
        assert solution.overload == pytest.approx(overload, abs=1e-5)
        limits[-1] = capacity * (1.0 + solution.overload)
    found = linprog(costs, A_ub=np.array(upper), b_ub=limits, A_eq=one_per_group, b_eq=np.ones(count), bounds=least)
    assert (solution.status, found.status) == ("optimal", 0)
    # The tie-break adds up to 2e-6 of the most expensive option.
    most = max(cost for row in groups for cost, _ in row)
    assert solution.g_per_request == pytest.approx(found.fun, rel=1e-6, abs=1e-5 * most)


def small_program(**more) -> Problem:
    made = uncertain({"a-b": (0.05, (0.03, 0.0, 0.04)), "a b": (0.02, (0.03, 0.0, 0.04))})
    return replace(
        made,
        bounds={"preference": 0.9},
        confidence_z={"preference": 2.0},
        floors={"preference": 0.7},
        capacities={"p": 3.0},
        requests_per_s=1.0,
        holdout=0.05,
        **more,
    )


def test_the_program_is_readable_in_lp_format(tmp_path):
    """Names follow docs/architecture.md; PuLP writes `_` for brackets, and names that it would spell alike differ."""
    solution, program = solve_program(small_program())
    assert program is not None
    lines = program.lp_text().splitlines()
    assert lines[:3] == [
        "\\* sprout *\\",
        "Minimize",
        "OBJ: 0.5 x_a_b,p_L0_ + 0.5 x_a_b,p_L0_~2 + 0.2500005 x_a_b,p_L1_",
    ]
    text = "\n".join(lines)
    assert "one_a_b_: x_a_b,p_L0_ + x_a_b,p_L1_ = 1" in text
    assert "one_a_b_~2: x_a_b,p_L0_~2 + x_a_b,p_L1_~2 = 1" in text
    assert "bound_preference_: - 2 sigma_preference_ + 0.5 x_a_b,p_L0_" in text
    assert "capacity_p_: - 3 overload + 0.5 x_a_b,p_L0_" in text
    assert "floor_preference,a_b_: 0.5 x_a_b,p_L0_ + 0.45 x_a_b,p_L1_ >= 0.35" in text
    assert "norm_preference_: sigma_preference_ - term_preference,0_" in text
    assert "cut_preference,0_:" in text
    assert " 0.05 <= x_a_b,p_L0_" in text
    # With its cuts it is the program that was solved; every option costs up to 1 g.
    (tmp_path / "program.lp").write_text(text, encoding="utf-8")
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    solver.readModel(str(tmp_path / "program.lp"))
    solver.run()
    assert solver.getObjectiveValue() == pytest.approx(solution.g_per_request, rel=1e-5)


def test_shadow_prices_are_the_change_of_the_optimum():
    tight = small_program()
    solution, program = solve_program(tight)
    prices = program.shadow_prices()
    step = 1e-3
    stricter = solve(replace(tight, bounds={"preference": 0.9 + step}))
    assert prices["bound[preference]"] == pytest.approx(
        (stricter.g_per_request - solution.g_per_request) / step, rel=0.05
    )
    assert prices["bound[preference]"] > 0.0
    assert prices["capacity[p]"] == 0.0
    only_capacity = replace(tight, bounds={}, floors={}, capacities={"p": 0.8})
    seconds = {
        group: {
            option: one.model_copy(update={"processing_s": 0.5 if option == REFERENCE else 1.0})
            for option, one in row.items()
        }
        for group, row in only_capacity.estimates.items()
    }
    full = replace(only_capacity, estimates=seconds)
    solution, program = solve_program(full)
    larger = solve(replace(full, capacities={"p": 0.8 + step}))
    assert program.shadow_prices()["capacity[p]"] == pytest.approx(
        (larger.g_per_request - solution.g_per_request) / step, rel=0.01
    )
    free = replace(full, capacities={})
    solution, program = solve_program(free)
    more = solve(replace(free, holdout=0.05 + step))
    assert program.holdout_price_g() == pytest.approx((more.g_per_request - solution.g_per_request) / step, rel=0.01)


def test_a_time_limit_of_the_solver_is_reported_as_such():
    made = small_program()
    solution = solve(made, time_limit_s=0.0)
    assert (solution.status, solution.failure) == ("reference", "time limit")
    assert solve(made).failure is None


def test_the_solver_works_after_the_warm_up():
    """HiGHS fails if two models of a process ask for different numbers of threads."""
    warm_up()
    assert solve(small_program()).status == "optimal"


def test_a_number_that_is_not_finite_is_rejected():
    made = problem({"g": ROW}, bounds={"preference": 0.9})
    unknown = {**made.options, "p/L1": OptionPrice(pool="p", g_per_kwh=float("nan"), embodied_g_per_s=0.0)}
    with pytest.raises(ValueError, match="not finite"):
        Program(Cells(replace(made, options=unknown)))
