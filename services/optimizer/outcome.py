"""What a solved program says of its quality limits and of the options of each group; policies carry it. Pure functions.

`tools.cli.explanation` rebuilds the same from a policy's inputs, with the program and all other constraints.
"""

from services.optimizer.problem import Rows
from services.optimizer.program import Program
from shared.messages import LimitOutcome

_IN_USE = 1e-6
"""Reduced cost, relative to the option's grams, up to which it is 0 within the solver's tolerance."""


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
