"""What a solved program says of its quality limits, of the options of each group, and of which groups are settled.

Pure functions. Policies carry the outcome of the limits and the further grams of the options; `tools.cli.explanation`
rebuilds the same from a policy's inputs, with the program and all other constraints.

A group is settled if a further verdict would change neither its option nor, noticeably, the margin. A group's option is
the one whose grams, plus what its loss of quality costs elsewhere, are least. That cost is the shadow price of the
quality limits. So the reduced cost of another option, divided by the shadow price, says by how much its quality would
have to be better than estimated to be chosen. If that is more than the uncertainty allows, further verdicts do not
change the choice.

They may still make the safety margin smaller, from which all groups gain. With the standard error |v| of the quality of
all traffic, of which the group's own part is v[g], the margin costs L = price z |v| grams per request, of which
L[g] = price z v[g]^2 / |v| is the group's own; one more of its n[g] verdicts saves about L[g] / (2 n[g]), the average
verdict L / (2 N). A group that is served by the reference adds nothing to the margin.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from services.optimizer.cells import Cells, QualityBound
from services.optimizer.problem import Floats, Problem, Rows
from services.optimizer.program import Program
from services.optimizer.quality import NO_ERROR
from shared.messages import LimitOutcome

_IN_USE = 1e-6
"""Reduced cost, relative to the option's grams, up to which it is 0 within the solver's tolerance."""

Z = 1.96
"""Standard errors by which the qualities of two options may differ more than estimated."""

LEAST_WORTH = 0.1
"""What a verdict in a group is worth to the margin, relative to the average verdict, below which it does not count."""

_PROBABILITY_TOLERANCE = 1e-6

_SMALLEST_PRICE = 1e-9
"""Shadow price, in units of the objective, below which a limit costs nothing."""


def limit_outcomes(program: Program | None) -> dict[str, LimitOutcome]:
    """Mean, margin and price of every quality limit by metric; empty if the reference is served."""
    if program is None:
        return {}
    cells, plan, prices = program.cells, program.plan, program.shadow_prices()
    reference_g = cells.mean_reference_g or 1.0
    return {
        metric: LimitOutcome(
            required=bound.bound,
            mean=bound.mean(plan),
            margin=bound.margin(plan),
            carbon_points_per_point=max(0.0, prices.get(f"bound[{metric}]", 0.0)) / reference_g,
        )
        for metric, bound in cells.bounds.items()
    }


def extra_grams(program: Program | None) -> Rows:
    """By group, then option: gCO2eq by which all traffic emits more for one more request with it.

    0 for the options in use; empty if the reference is served. See `Program.extra_g`.
    """
    if program is None:
        return {}
    problem = program.cells.problem
    return {
        group: {
            option: grams if grams > _IN_USE * problem.options[option].grams(problem.estimates[group][option]) else 0.0
            for option, grams in row.items()
        }
        for group, row in program.extra_g().items()
    }


def settled_groups(program: Program, *, min_trials: float) -> frozenset[str]:
    """Groups in which further verdicts would change nothing, as far as the uncertainty allows.

    A group with few verdicts is never settled, so that it is judged again once its verdicts are forgotten.

    Args:
        program: solved.
        min_trials: effective judged prompts that every option needs in the group.
    """
    problem = program.cells.problem
    extra, prices = program.extra_g(), program.shadow_prices()
    limits = list(_limits(program, prices))
    worth = _worth_of_verdicts(program.cells, limits)
    found = set()
    for group, row in program.rows().items():
        used = max(row, key=lambda option: row[option])
        certain = row[used] >= 1.0 - problem.holdout - _PROBABILITY_TOLERANCE
        floors = any(prices.get(f"floor[{metric},{group}]", 0.0) > 0.0 for metric in problem.floors)
        if not certain or floors or _fewest_trials(problem, group) < min_trials or worth.get(group, 0.0) > LEAST_WORTH:
            continue
        if all(
            extra[group][other] > Z * _error_g(program.cells, limits, group, (used, other))
            for other in extra[group]
            if other != used
        ):
            found.add(group)
    return frozenset(found)


class _Limit(NamedTuple):
    """A quality limit that costs grams.

    Attributes:
        bound: the limit.
        plan: the probabilities that it is on.
        used: (cells,), share of all requests that each cell serves by that plan.
        price: grams for one more unit of quality of the present hour's requests.
    """

    metric: str
    bound: QualityBound
    plan: Floats
    used: Floats
    price: float


def _limits(program: Program, prices: dict[str, float]) -> Iterator[_Limit]:
    cells = program.cells
    smallest = _SMALLEST_PRICE * cells.cost_unit_g
    now = cells.weights * program.x
    used = now
    if cells.problem.later:
        share, later = cells.problem.share, program.plan[len(now) :]
        used = share * now + (1.0 - share) * cells.later_weights * later
    for metric, bound in cells.bounds.items():
        if (price := prices.get(f"bound[{metric}]", 0.0)) > smallest:
            yield _Limit(metric, bound, program.plan, used, price)
    for metric, floor in cells.hourly_floors(cells.weights).items():
        if (price := prices.get(f"hourly[{metric}]", 0.0)) > smallest:
            yield _Limit(metric, floor, program.x, now, price / cells.problem.share)


def _error_g(cells: Cells, limits: list[_Limit], group: str, options: tuple[str, str]) -> float:
    """Standard error of the difference of two options' quality in a group, in grams per request at the shadow prices.

    The errors of both count as independent: they have the baseline's answers in common, which makes the true one
    smaller.
    """
    row = cells.problem.estimates[group]
    return sum(
        limit.price
        * math.hypot(*(error for option in options for error in row[option].doubt.get(limit.metric, NO_ERROR)))
        / (_reference_quality(cells, limit.metric) or 1.0)
        for limit in limits
    )


def _worth_of_verdicts(cells: Cells, limits: list[_Limit]) -> dict[str, float]:
    """What one more verdict in a group saves of the margin, relative to the average verdict; 0 if it costs nothing."""
    problem = cells.problem
    trials = {group: _most_trials(problem, group) for group in problem.weights}
    all_g = 0.0
    own_g = dict.fromkeys(problem.weights, 0.0)
    for limit in limits:
        error = float(np.linalg.norm(limit.bound.error_factors @ limit.plan))
        if error <= 0.0:
            continue
        price = limit.price * limit.bound.z
        all_g += price * error
        reference = _reference_quality(cells, limit.metric)
        for group in problem.weights:
            row = problem.estimates[group]
            own = sum(
                row[cells.names[place][1]].doubt.get(limit.metric, NO_ERROR)[0] * float(limit.used[place])
                for place in cells.of_group(group)
            )
            own_g[group] += price * (own / reference) ** 2 / error
    if all_g <= 0.0:
        return {}
    average = all_g / max(sum(trials.values()), 1.0)
    return {group: grams / max(trials[group], 1.0) / average for group, grams in own_g.items()}


def _reference_quality(cells: Cells, metric: str) -> float:
    """Quality of all traffic at the reference."""
    return float((cells.weights * cells.quality(metric)) @ cells.reference)


def _fewest_trials(problem: Problem, group: str) -> float:
    return min(one.trials for one in problem.row(group).values())


def _most_trials(problem: Problem, group: str) -> float:
    return max(one.trials for one in problem.row(group).values())
