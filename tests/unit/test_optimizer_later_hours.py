"""The program over the present hour and later ones: limits of the mean, floors of every hour, bounds above 1."""

from dataclasses import replace

import clarabel
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from scipy import sparse

from services.optimizer.cells import BOUND_TOLERANCE, Cells, QualityBound
from services.optimizer.problem import LaterHours, OptionPrice, Problem
from services.optimizer.program import Program, solve, solve_program
from shared.messages import OptionEstimate
from tests.benchmarks.bench_program import synthetic
from tests.support.examples import examples

METRIC = "preference"
REFERENCE = "p/L0"


def price(g_per_kwh: float) -> OptionPrice:
    return OptionPrice(pool="p", g_per_kwh=g_per_kwh, embodied_g_per_s=0.0)


def hours(options: tuple[str, ...], shares: dict[float, float]) -> tuple[LaterHours, ...]:
    """Later hours by carbon intensity, with their shares."""
    return tuple(
        LaterHours(share=share, options=dict.fromkeys(options, price(g_per_kwh))) for g_per_kwh, share in shares.items()
    )


def two_levels(quality: float, *, now: float, later: dict[float, float], **more) -> Problem:
    """One group that L1 serves at half of the energy, at this quality relative to the baseline's."""
    options = (REFERENCE, "p/L1")
    return Problem(
        reference=REFERENCE,
        options=dict.fromkeys(options, price(now)),
        later=hours(options, later),
        weights={"g": 1.0},
        estimates={
            "g": {
                REFERENCE: OptionEstimate(energy_kwh=1.0, processing_s=1.0, quality={METRIC: 0.5}),
                "p/L1": OptionEstimate(energy_kwh=0.5, processing_s=1.0, quality={METRIC: 0.5 * quality}),
            }
        },
        **more,
    )


def test_the_loss_is_spent_in_the_dirtiest_hours():
    """A loss of 0.1 in all requests is a loss of 0.05 on average: half of them may be served briefly."""
    bounds = {METRIC: 0.95}
    dirty = solve(two_levels(0.9, now=300.0, later={100.0: 0.5}, bounds=bounds))
    assert dirty.rows["g"] == pytest.approx({"p/L1": 1.0})
    assert dirty.quality == {METRIC: pytest.approx(0.9)}
    clean = solve(two_levels(0.9, now=100.0, later={300.0: 0.5}, bounds=bounds))
    assert clean.rows["g"] == pytest.approx({REFERENCE: 1.0})
    middle = solve(two_levels(0.9, now=200.0, later={100.0: 0.4, 300.0: 0.3}, bounds=bounds))
    assert middle.rows["g"] == pytest.approx({REFERENCE: 1 / 3, "p/L1": 2 / 3})


def test_an_hourly_floor_limits_the_present_hour_and_is_counted_on_in_later_ones():
    bounds, floors = {METRIC: 0.95}, {METRIC: 0.94}
    dirty = solve(two_levels(0.9, now=300.0, later={100.0: 0.5}, bounds=bounds, hourly_floors=floors))
    assert dirty.rows["g"]["p/L1"] == pytest.approx(0.6)
    # The dirty hours to come can only take 0.06 of the loss, so 0.04 is left for this clean hour.
    clean = solve(two_levels(0.9, now=100.0, later={300.0: 0.5}, bounds=bounds, hourly_floors=floors))
    assert clean.rows["g"]["p/L1"] == pytest.approx(0.4)


def test_an_hourly_floor_counts_on_the_lower_confidence_bound():
    made = with_errors(two_levels(0.95, now=300.0, later={100.0: 0.5}, hourly_floors={METRIC: 0.92}))
    assert solve(made).rows["g"]["p/L1"] == pytest.approx(0.08 / (0.05 + 2.0 * 0.04 / 0.5), rel=1e-3)


def with_errors(made: Problem) -> Problem:
    """The same with a standard error of 0.04 of L1's quality, of which two are taken off."""
    row = made.estimates["g"]
    uncertain = row["p/L1"].model_copy(update={"doubt": {METRIC: (0.04, 0.0, 0.0)}})
    return replace(made, estimates={"g": {**row, "p/L1": uncertain}}, confidence_z={METRIC: 2.0})


@pytest.mark.parametrize("later", [{}, {100.0: 0.6}, {100.0: 0.3, 500.0: 0.3}])
def test_errors_of_a_group_do_not_cancel_out_between_hours(later):
    """However many hours there are, 0.1 is used up by loss and margin of the mean share of L1."""
    made = with_errors(two_levels(0.95, now=300.0, later=later, bounds={METRIC: 0.9}))
    _, program = solve_program(made)
    assert program is not None
    hours = [made.share, 1.0 - made.share] if later else [1.0]
    mean = hours @ program.plan.reshape(len(hours), -1)
    share = dict(zip(program.cells.names, mean, strict=True))["g", "p/L1"]
    assert share == pytest.approx(0.1 / (0.05 + 2.0 * 0.04 / 0.5), rel=1e-3)


@settings(max_examples=examples(10), suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 10**6))
def test_the_hours_share_the_margin_of_their_mean(seed):
    made = over_hours(seed)
    cells = Cells(made)
    program = Program(cells)
    assert program.solve() is None
    x, later = np.split(program.plan, 2)
    share = made.share
    for metric, bound in cells.bounds.items():
        present = bound.present_lower_bound(x, later, share)
        swapped = QualityBound(cells, metric, bound.bound, [(1.0 - share, cells.later_weights), (share, cells.weights)])
        rest = swapped.present_lower_bound(later, x, 1.0 - share)
        assert share * present + (1.0 - share) * rest == pytest.approx(bound.lower_bound(program.plan))
        alone = QualityBound(cells, metric, bound.bound)
        assert alone.lower_bound(x) - 1e-9 <= present <= alone.mean(x) + 1e-9


def test_a_bound_above_1_is_kept_by_better_options():
    better = solve(two_levels(1.1, now=300.0, later={100.0: 0.5}, bounds={METRIC: 1.05}))
    assert (better.status, better.shortfall) == ("optimal", 0.0)
    assert better.quality[METRIC] == pytest.approx(1.1)


@pytest.mark.parametrize("later", [{}, {100.0: 0.5}])
def test_a_bound_that_cannot_be_kept_is_missed_by_as_little_as_possible(later):
    solution = solve(two_levels(0.9, now=300.0, later=later, bounds={METRIC: 1.02}))
    assert solution.status == "optimal"
    assert solution.rows["g"][REFERENCE] == pytest.approx(1.0, abs=1e-4)
    assert solution.shortfall == pytest.approx(0.02, abs=1e-5)


def test_a_bound_above_1_is_missed_rather_than_a_pool_overloaded():
    """L1 on another pool would make up for what is missing, but the pool is too small."""
    made = two_levels(1.1, now=300.0, later={100.0: 0.5}, bounds={METRIC: 1.05})
    elsewhere = OptionPrice(pool="q", g_per_kwh=300.0, embodied_g_per_s=0.0)
    made = replace(
        made,
        options={REFERENCE: price(300.0), "p/L1": elsewhere},
        later=(LaterHours(share=0.5, options={REFERENCE: price(100.0), "p/L1": elsewhere}),),
        capacities={"q": 0.2},
        requests_per_s=1.0,
    )
    solution = solve(made)
    assert (solution.status, solution.overload) == ("optimal", pytest.approx(0.0, abs=1e-5))
    assert solution.rows["g"]["p/L1"] == pytest.approx(0.2, abs=1e-4)
    assert solution.shortfall == pytest.approx(0.03, abs=1e-4)


def over_hours(seed: int, groups: int = 5, options: int = 3) -> Problem:
    """A synthetic problem with two limits, floors, a capacity and three kinds of later hours."""
    made = synthetic(groups, options)
    chance = np.random.default_rng(seed)
    later = tuple(
        LaterHours(
            share=float(share),
            options={name: replace(one, g_per_kwh=one.g_per_kwh * float(factor)) for name, one in made.options.items()},
        )
        for share, factor in zip(chance.dirichlet(np.ones(4))[:3], chance.uniform(0.2, 2.0, 3), strict=True)
    )
    bounds = {"preference": chance.uniform(0.93, 1.03), "correctness": chance.uniform(0.95, 1.0)}
    usual = dict(zip(made.weights, chance.dirichlet(np.ones(groups)).tolist(), strict=True))
    return replace(made, later=later, later_weights=usual, bounds=bounds, floors={}, capacities={}, holdout=0.0)


def cone_optimum(made: Problem) -> tuple[str, float]:
    """The same program stated with second-order cones and without means as variables, solved by Clarabel."""
    cells = Cells(made)
    shares = [made.share, *(one.share for one in made.later)]
    count, blocks = len(cells.names), len(shares)
    one_per_group = np.array([[float(name == group) for name, _ in cells.names] for group in made.weights])
    rows, limits = (
        [np.kron(np.eye(blocks), one_per_group), -np.eye(blocks * count)],
        [
            np.ones(blocks * len(one_per_group)),
            np.zeros(blocks * count),
        ],
    )
    kinds = [clarabel.ZeroConeT(len(limits[0])), clarabel.NonnegativeConeT(blocks * count)]
    for bound in cells.bounds.values():
        now, then = np.split(-np.vstack([bound.mean_factors / bound.z, bound.error_factors]), 2, axis=1)
        rows.append(np.hstack([now, *(share / sum(shares[1:]) * then for share in shares[1:])]))
        limits.append(np.concatenate([[-bound.bound / bound.z], np.zeros(len(bound.error_factors))]))
        kinds.append(clarabel.SecondOrderConeT(1 + len(bound.error_factors)))
    grams = [cells.grams, *cells.later_grams]
    weights = [cells.weights, *(cells.later_weights for _ in made.later)]
    costs = np.concatenate([share * cells.costs(one, w) for share, one, w in zip(shares, grams, weights, strict=True)])
    quiet = clarabel.DefaultSettings()
    quiet.verbose = False
    nothing = sparse.csc_matrix((blocks * count, blocks * count))
    matrix, right = sparse.csc_matrix(np.vstack(rows)), np.concatenate(limits)
    found = clarabel.DefaultSolver(nothing, costs, matrix, right, kinds, quiet).solve()
    return str(found.status), float(found.obj_val)


@settings(max_examples=examples(30), suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 10**6))
def test_the_optimum_is_that_of_a_cone_solver(seed):
    made = over_hours(seed)
    program = Program(Cells(made))
    assert program.solve() is None
    status, optimum = cone_optimum(made)
    if status != "Solved":
        assert program.shortfall > 0.0
        return
    assert program.shortfall == 0.0
    for bound in program.cells.bounds.values():
        assert not bound.is_violated(program.plan)
    assert program.mean_g_per_request() == pytest.approx(optimum * program.cells.cost_unit_g, rel=1e-3)


@settings(max_examples=examples(20), suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 10**6), floor=st.floats(0.8, 1.0))
@example(seed=2337, floor=0.828125)  # HiGHS ends without a result unless it leaves out presolving, too
@example(seed=185828, floor=0.8030414242515688)  # … or with that alone
def test_the_present_hour_keeps_floors_capacity_and_holdout(seed, floor):
    made = over_hours(seed)
    made = replace(
        made,
        holdout=0.05,
        hourly_floors=dict.fromkeys(made.bounds, floor),
        floors={METRIC: 0.8},
        capacities={"pool-0": 100.0},
    )
    solution = solve(made)
    assert solution.status == "optimal"
    assert all(row[made.reference] >= 0.05 for row in solution.rows.values())
    assert all(quality >= floor - 2 * BOUND_TOLERANCE for quality in solution.quality.values())
    assert solution.overload == 0.0


def test_without_later_hours_the_program_is_the_hourly_one():
    made = synthetic(6, 3)
    assert "later_" not in solve_program(made)[1].lp_text()  # type: ignore[union-attr]
    assert "later_" in solve_program(replace(over_hours(1), bounds={METRIC: 0.95}))[1].lp_text()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ({"later": {100.0: 1.0}}, "must leave a share for the present one"),
        ({"later": {}, "hourly_floors": {METRIC: 1.1}}, "hourly_floors must lie in"),
        ({"later": {}, "bounds": {METRIC: float("nan")}}, "bounds must not be negative"),
    ],
)
def test_an_inconsistent_problem_is_rejected(more, complaint):
    with pytest.raises(ValueError, match=complaint):
        two_levels(0.9, now=300.0, **more)


def test_every_option_needs_a_price_in_later_hours():
    made = two_levels(0.9, now=300.0, later={})
    with pytest.raises(ValueError, match="every option needs a price"):
        replace(made, later=hours((REFERENCE,), {100.0: 0.5}))


def test_an_hour_with_unusual_prompts_is_made_up_for_by_usual_ones():
    """L1 loses on the prompts that are frequent now and gains on those that are frequent later."""
    options = (REFERENCE, "p/L1")
    quality = {"loses": 0.4, "gains": 0.6}
    made = Problem(
        reference=REFERENCE,
        options=dict.fromkeys(options, price(200.0)),
        later=hours(options, {200.0: 0.5}),
        weights={"loses": 1.0, "gains": 0.0},
        later_weights={"loses": 0.0, "gains": 1.0},
        bounds={METRIC: 1.0},
        estimates={
            group: {
                REFERENCE: OptionEstimate(energy_kwh=1.0, processing_s=1.0, quality={METRIC: 0.5}),
                "p/L1": OptionEstimate(energy_kwh=0.5, processing_s=1.0, quality={METRIC: value}),
            }
            for group, value in quality.items()
        },
    )
    assert solve(made).rows["loses"] == {"p/L1": pytest.approx(1.0)}
    assert solve(replace(made, later_weights={})).rows["loses"][REFERENCE] == pytest.approx(1.0)


def test_later_shares_must_be_of_the_same_groups():
    with pytest.raises(ValueError, match="later_weights must be of the groups"):
        two_levels(0.9, now=300.0, later={100.0: 0.5}, later_weights={"other": 1.0})
