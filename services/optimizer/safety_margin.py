"""The safety margin of the quality limits: how wide it is, and its allotment to several limits. No I/O.

The margin promises that quality is at least the published lower bound. Evaluations check that before they are learned
from. If more of the last 30 days' evaluations missed the promise than chance explains, the margin is widened; it
narrows again as they pass (docs/decisions/0042-quality-out-of-sample.md).

The probability of missing a limit is allotted to several limits so that carbon is least
(docs/decisions/0004-optimizer-estimates.md).
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final

from services.optimizer.bounds import joint_confidence_z
from services.optimizer.problem import Problem, Solution
from services.optimizer.program import RELIEF_TOLERANCE, Program, solve_program
from services.optimizer.settings import OptimizerSettings
from shared.messages import Policy, Quality
from shared.prequential import PoliciesInForce, QualityInterval, QualityScore, combined, excess_of_misses, is_missed

MEMORY: Final = timedelta(days=30)
"""Evaluations that decide on the margin."""

WEEK: Final = timedelta(days=7)

SLACK_SHARES = (0.1, 0.02)
"""Shares of the probability of missing a limit that are tried for limits with room to spare."""

_SLACK = 1e-3
"""Room to spare, relative to the reference's quality."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """How often a metric's promise was missed, and what that adds to its confidence z.

    Attributes:
        scored: evaluations in `MEMORY`.
        missed: of these, evaluations that show a quality below what was promised.
        extra_z: 0 unless chance does not explain so many misses.
    """

    scored: int
    missed: int
    extra_z: float

    def describe(self, metric: str, z: float) -> str:
        """For people, in the reason of a policy."""
        return (
            f"{metric} missed its promise in {self.missed} of {self.scored} evaluations, more often than 5 %: "
            f"{z + self.extra_z:.2f} standard errors are taken off instead of {z:.2f}"
        )


class QualityScores:
    """The active policies of every model, and the scores of the last `MEMORY`."""

    def __init__(self, settings: OptimizerSettings) -> None:
        """Start without any score.

        Args:
            settings: the confidence level, and the most that is added to it.
        """
        self._settings = settings
        self._in_force: dict[str, PoliciesInForce] = defaultdict(PoliciesInForce)
        self._scores: dict[tuple[str, str], dict[str, QualityScore]] = defaultdict(dict)

    def update_policy(self, policy: Policy) -> None:
        """A policy is active from now on."""
        self._in_force[policy.model].add(policy)

    def score(self, evaluation: Quality) -> list[QualityScore]:
        """Score the policies that served before an evaluation; empty if none was, or if it was scored before."""
        in_force = self._in_force[evaluation.model]
        return in_force.scored(evaluation.evaluation_id, evaluation.independent_counts(), evaluation.evaluated_at)

    def add(self, scores: Iterable[QualityScore]) -> None:
        """Count scores, each once; those older than `MEMORY` before the newest one are forgotten."""
        for one in scores:
            known = self._scores[one.model, one.metric]
            known[one.evaluation_id] = one
            oldest = max(score.until for score in known.values()) - MEMORY
            self._scores[one.model, one.metric] = {
                name: score for name, score in known.items() if score.until >= oldest
            }

    def recent(self, model: str, metric: str, now: datetime) -> QualityInterval | None:
        """Quality of the last week, relative to the baseline's; None without enough verdicts."""
        scores = [one for one in self._scores.get((model, metric), {}).values() if one.until > now - WEEK]
        return combined(scores) if scores else None

    def calibrations(self, model: str, now: datetime) -> dict[str, Calibration]:
        """By limited metric with a score."""
        found = {}
        for metric in self._settings.xi:
            scores = [one for one in self._scores.get((model, metric), {}).values() if one.until > now - MEMORY]
            if scores:
                missed = sum(map(is_missed, scores))
                extra_z = min(excess_of_misses(missed, len(scores)), self._settings.max_extra_confidence_z)
                found[metric] = Calibration(len(scores), missed, extra_z)
        return found


def calibrated(
    settings: OptimizerSettings, calibrations: Mapping[str, Calibration]
) -> tuple[OptimizerSettings, list[str]]:
    """The settings with the margins that the calibrations ask for, and what to say of them; unchanged if none does."""
    wider = {metric: one for metric, one in calibrations.items() if one.extra_z > 0.0}
    if not wider:
        return settings, []
    z = joint_confidence_z({metric: 1.0 - loss for metric, loss in settings.xi.items()}, settings)
    by_metric = {metric: z[metric] + one.extra_z for metric, one in wider.items() if metric in z}
    notes = [one.describe(metric, z[metric]) for metric, one in wider.items() if metric in z]
    return settings.model_copy(
        update={"confidence_z_by_metric": {**settings.confidence_z_by_metric, **by_metric}}
    ), notes


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
