"""Allots the probability of missing a quality limit to several limits (docs/decisions/0004-optimizer-estimates.md)."""

from dataclasses import replace

from services.optimizer.bounds import joint_confidence_z
from services.optimizer.problem import Problem, Solution
from services.optimizer.program import RELIEF_TOLERANCE, Program, solve_program
from services.optimizer.settings import OptimizerSettings

SLACK_SHARES = (0.1, 0.02)
"""Shares of the probability of missing a limit that are tried for limits with room to spare."""

_SLACK = 1e-3
"""Room to spare, relative to the reference's quality."""


def solve_jointly(problem: Problem, settings: OptimizerSettings) -> tuple[Problem, Solution, Program | None]:
    """Solve, with the probability of missing a limit allotted to the limits so that carbon is least.

    Whatever the shares, the limits hold together as often as a single one would. A limit that the solution keeps with
    room to spare needs a small share only, and the others' margins shrink; of a few shares the best one is taken. That
    the same estimates choose the shares matters little: the limits with a small share are far from being missed.

    Returns:
        The problem with the chosen confidence levels, its solution, and the solved program; see `solve_program`.
    """
    best, best_program = solve_program(problem)
    program = best_program
    limited = [metric for metric, bound in problem.bounds.items() if bound > 0.0]
    if program is None or any(metric in settings.confidence_z_by_metric for metric in limited):
        return problem, best, program
    of_plan = program.cells.bounds
    slack = [metric for metric in limited if of_plan[metric].lower_bound(program.plan) > of_plan[metric].bound + _SLACK]
    if len(slack) in (0, len(limited)):
        return problem, best, program
    least_g = program.mean_g_per_request()
    for share in SLACK_SHARES:
        active = (1.0 - share) / (len(limited) - len(slack))
        shares = {metric: share / len(slack) if metric in slack else active for metric in limited}
        other = replace(problem, confidence_z=joint_confidence_z(problem.bounds, settings, shares=shares))
        solution, program = solve_program(other)
        missed = max(solution.shortfall - best.shortfall, solution.overload - best.overload)
        if program is not None and missed <= RELIEF_TOLERANCE and program.mean_g_per_request() < least_g:
            problem, best, best_program, least_g = other, solution, program, program.mean_g_per_request()
    return problem, best, best_program
