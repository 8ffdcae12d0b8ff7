"""The program behind a policy, rebuilt: its quality limits, binding constraints and shadow prices, also as JSON.

It imports the solver; `tools.cli.policy` imports it only when the command runs.
"""

from dataclasses import dataclass
from typing import Any

from services.optimizer.cells import Cells
from services.optimizer.outcome import limit_outcomes
from services.optimizer.policy import problem_of
from services.optimizer.problem import Problem, Rows
from services.optimizer.program import Program, solve_program
from shared.fleet import Fleet
from shared.messages import LimitOutcome, Policy

_BINDING = 1e-6
"""Shadow price, relative to the reference's grams, from which a constraint is binding."""

_SAME = 1e-3
"""Relative difference in grams up to which the rebuilt program agrees with the policy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitExplanation:
    """A quality limit on all traffic; every quality is relative to the reference's.

    Attributes:
        outcome: of the rebuilt program.
        z: standard errors that are taken off the mean.
    """

    metric: str
    outcome: LimitOutcome
    z: float

    @property
    def slack(self) -> float:
        """By how much the lower confidence bound exceeds the limit."""
        return self.outcome.mean - self.outcome.margin - self.outcome.required

    @property
    def is_binding(self) -> bool:
        """Whether the limit costs carbon."""
        return self.outcome.carbon_points_per_point > _BINDING


@dataclass(frozen=True, slots=True, kw_only=True)
class BindingConstraint:
    """A constraint that costs carbon, by its name in the program, and its shadow price in words."""

    name: str
    price_g: float
    meaning: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What one option means for the requests of one group.

    Attributes:
        grams: expected gCO2eq of a request.
        quality: by metric, relative to the reference's in this group; metrics without an estimate are left out.
        extra_g: gCO2eq by which all traffic emits more if one more request of the group has this option and the quality
            that it loses is made up for elsewhere; 0 for the options in use. None if the reference is served.
    """

    grams: float
    quality: dict[str, float]
    extra_g: float | None

    @property
    def is_in_use(self) -> bool:
        """Whether the program serves requests with it."""
        return self.extra_g is None or abs(self.extra_g) <= _BINDING * max(self.grams, 1e-12)


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """A policy and the program that it was solved from.

    Attributes:
        rows: probabilities by group, then option.
        binding: constraints with a shadow price, the most expensive first.
        choices: what speaks for and against each option, by group, then option.
        rebuilt_g_per_request: expected grams of the rebuilt program's solution.
        program: None if the reference is served.
    """

    policy: Policy
    problem: Problem
    rows: Rows
    limits: tuple[LimitExplanation, ...]
    binding: tuple[BindingConstraint, ...]
    choices: dict[str, dict[str, Choice]]
    rebuilt_g_per_request: float
    program: Program | None

    @property
    def agrees(self) -> bool:
        """Whether the rebuilt program has the expected grams of the policy."""
        expected = self.policy.expected_g_per_request
        return abs(self.rebuilt_g_per_request - expected) <= _SAME * max(expected, self.rebuilt_g_per_request)


def explain_policy(policy: Policy, *, fleet: Fleet | None = None) -> Explanation:
    """Rebuild and solve a policy's program.

    Args:
        policy: as published.
        fleet: for the prices of a policy of the first release, which does not contain them.

    Raises:
        MissingPricesError: the prices are missing.
        ValueError: the policy's inputs contradict each other.
    """
    problem = problem_of(policy, fleet=fleet)
    solution, program = solve_program(problem)
    rows = policy.groups or dict.fromkeys(problem.weights, policy.overall)
    prices = {} if program is None else program.shadow_prices()
    reference_g = Cells(problem).mean_reference_g or 1.0
    return Explanation(
        policy=policy,
        problem=problem,
        rows=rows,
        limits=_limits(problem, limit_outcomes(program)),
        binding=_binding(problem, program, prices, reference_g),
        choices=_choices(problem, program),
        rebuilt_g_per_request=solution.g_per_request,
        program=program,
    )


def lp_text(explanation: Explanation) -> str:
    """The program in LP format; a comment if the reference is served and there is none."""
    if explanation.program is None:
        return "\\* no program: the reference is served *\\\n"
    return explanation.program.lp_text()


def to_json(explanation: Explanation) -> dict[str, Any]:
    """The explanation as JSON types."""
    policy = explanation.policy
    return {
        "model": policy.model,
        "version": policy.version,
        "status": policy.status,
        "reason": policy.reason,
        "reference": policy.reference,
        "expected_g_per_request": policy.expected_g_per_request,
        "reference_g_per_request": policy.reference_g_per_request,
        "rebuilt_g_per_request": explanation.rebuilt_g_per_request,
        "prices": {pool: price.model_dump() for pool, price in policy.inputs.prices.items()},
        "weights": dict(explanation.problem.weights),
        "probabilities": {group: dict(row) for group, row in explanation.rows.items()},
        "overall": dict(policy.overall),
        "settled": {group: since.isoformat() for group, since in policy.settled.items()},
        "limits": [
            {
                "metric": one.metric,
                "required": one.outcome.required,
                "mean": one.outcome.mean,
                "margin": one.outcome.margin,
                "confidence_z": one.z,
                "slack": one.slack,
                "carbon_points_per_point": one.outcome.carbon_points_per_point,
            }
            for one in explanation.limits
        ],
        "choices": {
            group: {
                option: {"grams": one.grams, "quality": one.quality, "extra_g": one.extra_g}
                for option, one in row.items()
            }
            for group, row in explanation.choices.items()
        },
        "promise": None if policy.promise is None else policy.promise.model_dump(mode="json"),
        "binding": [
            {"constraint": one.name, "shadow_price_g": one.price_g, "meaning": one.meaning}
            for one in explanation.binding
        ],
    }


def _limits(problem: Problem, outcomes: dict[str, LimitOutcome]) -> tuple[LimitExplanation, ...]:
    # Relative to itself the reference's quality is 1, also where it is unknown.
    only_reference = LimitOutcome(required=1.0, mean=1.0, margin=0.0, carbon_points_per_point=0.0)
    return tuple(
        LimitExplanation(
            metric=metric,
            outcome=outcomes.get(metric, only_reference).model_copy(update={"required": required}),
            z=problem.confidence_z.get(metric, 0.0),
        )
        for metric, required in problem.bounds.items()
    )


def _binding(
    problem: Problem, program: Program | None, prices: dict[str, float], reference_g: float
) -> tuple[BindingConstraint, ...]:
    if program is None:
        return ()
    if problem.holdout > 0.0:
        prices = {**prices, "holdout": program.holdout_price_g()}
    found = [
        BindingConstraint(name=name, price_g=price, meaning=meaning)
        for name, price in prices.items()
        if abs(price) > _BINDING * reference_g and (meaning := _meaning(name, price, problem, reference_g))
    ]
    return tuple(sorted(found, key=lambda one: -abs(one.price_g)))


def _meaning(name: str, price_g: float, problem: Problem, reference_g: float) -> str:
    """A shadow price in words; empty for `one[group]`, which every policy must keep."""
    kind, _, subject = name.partition("[")
    subject = subject.removesuffix("]")
    points = price_g / reference_g
    match kind:
        case "bound":
            return f"one point more {subject} costs {in_points(points)} of carbon"
        case "hourly":
            return f"the hourly floor of {subject} is reached"
        case "floor":
            metric, _, group = subject.partition(",")
            of_reference = problem.estimates[group][problem.reference].quality[metric]
            return f"one point more {metric} in group {group} costs {in_points(points * of_reference)} of carbon"
        case "capacity":
            return f"one more concurrent request in pool {subject} saves {in_points(-100.0 * points)} of carbon"
        case "holdout":
            return f"one point more holdout costs {in_points(points)} of carbon"
        case _:
            return ""


def _choices(problem: Problem, program: Program | None) -> dict[str, dict[str, Choice]]:
    extra = {} if program is None else program.extra_g()
    found: dict[str, dict[str, Choice]] = {}
    for group in problem.weights:
        row = problem.row(group)
        of_reference = row[problem.reference].quality
        found[group] = {
            option: Choice(
                grams=problem.options[option].grams(one),
                quality={
                    metric: value / of_reference[metric]
                    for metric, value in one.quality.items()
                    if of_reference.get(metric, 0.0) > 0.0
                },
                extra_g=extra.get(group, {}).get(option),
            )
            for option, one in row.items()
        }
    return found


def in_points(value: float) -> str:
    """Percentage points in words."""
    return f"{value:.2g} point{'' if f'{value:.2g}' == '1' else 's'}"
