"""The program behind a policy, rebuilt: its quality limits, binding constraints and shadow prices, as text and as JSON.

It imports the solver; `tools.cli.policy` imports it only when the command runs.
"""

from dataclasses import dataclass
from typing import Any

from rich.table import Column, Table
from rich.text import Text

from services.optimizer.policy import problem_of
from services.optimizer.problem import Cells, Floats, Problem, Rows
from services.optimizer.program import Program, solve_program
from shared.fleet import Fleet
from shared.messages import Policy
from shared.runtime.printable import printable
from tools.cli.console import out

_BINDING = 1e-6
"""Shadow price, relative to the reference's grams, from which a constraint is binding."""

_MOST_GROUPS = 12
"""Groups whose options are explained on the screen, the largest first."""

_SAME = 1e-3
"""Relative difference in grams up to which the rebuilt program agrees with the policy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitExplanation:
    """A quality limit on all traffic; every quality is relative to the reference's.

    With a promise by period it is the limit on the rest of the period, and the mean is that of the rebuilt program.

    Attributes:
        required: b.
        mean: estimated quality of all traffic under the policy.
        margin: z standard errors of that mean.
        z: standard errors taken off the mean.
        carbon_points_per_point: rise of the expected carbon, in points of the reference's, for one more point of
            quality; 0 if the limit is not binding.
    """

    metric: str
    required: float
    mean: float
    margin: float
    z: float
    carbon_points_per_point: float

    @property
    def slack(self) -> float:
        """By how much the lower confidence bound exceeds the limit."""
        return self.mean - self.margin - self.required


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
    cells = Cells(problem)
    reference_g = cells.mean_reference_g or 1.0
    return Explanation(
        policy=policy,
        problem=problem,
        rows=rows,
        limits=_limits(cells, cells.values(rows) if program is None or not problem.later else program.plan, prices),
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
                "required": one.required,
                "mean": one.mean,
                "margin": one.margin,
                "confidence_z": one.z,
                "slack": one.slack,
                "carbon_points_per_point": one.carbon_points_per_point,
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


def _limits(cells: Cells, x: Floats, prices: dict[str, float]) -> tuple[LimitExplanation, ...]:
    # If only the reference is served, its quality may be unknown; relative to itself it is 1.
    only_reference = bool((x.reshape(-1, len(cells.reference)) == cells.reference).all())
    problem, reference_g = cells.problem, cells.mean_reference_g or 1.0
    found = []
    for metric, required in problem.bounds.items():
        limit = None if only_reference else cells.bounds[metric]
        found.append(
            LimitExplanation(
                metric=metric,
                required=required,
                mean=1.0 if limit is None else limit.mean(x),
                margin=0.0 if limit is None else limit.margin(x),
                z=problem.confidence_z.get(metric, 0.0),
                carbon_points_per_point=prices.get(f"bound[{metric}]", 0.0) / reference_g,
            )
        )
    return tuple(found)


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
            return f"one point more {subject} costs {_points(points)} of carbon"
        case "hourly":
            return f"the hourly floor of {subject} is reached"
        case "floor":
            metric, _, group = subject.partition(",")
            of_reference = problem.estimates[group][problem.reference].quality[metric]
            return f"one point more {metric} in group {group} costs {_points(points * of_reference)} of carbon"
        case "capacity":
            return f"one more concurrent request in pool {subject} saves {_points(-100.0 * points)} of carbon"
        case "holdout":
            return f"one point more holdout costs {_points(points)} of carbon"
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


def _points(value: float) -> str:
    return f"{value:.2g} point{'' if f'{value:.2g}' == '1' else 's'}"


def print_explanation(explanation: Explanation) -> None:
    """Print the explanation to standard output."""
    policy = explanation.policy
    heading = f"policy {policy.version} of {policy.model}: {policy.status}"
    out.print(printable(heading), style="bold", markup=False)
    out.print(f"made {policy.created_at:%Y-%m-%d %H:%M}, valid until {policy.valid_until:%Y-%m-%d %H:%M} (UTC)")
    out.print(printable(policy.reason), markup=False)
    saving = 1.0 - policy.expected_g_per_request / (policy.reference_g_per_request or 1.0)
    out.print(
        f"expected {policy.expected_g_per_request:.4g} gCO2eq per request, {100.0 * saving:.1f} % less than "
        f"{policy.reference_g_per_request:.4g} if {policy.reference} served all requests",
        markup=False,
    )
    if not explanation.agrees:
        out.print(
            f"the rebuilt program gives {explanation.rebuilt_g_per_request:.4g} g: a limit is missing in this policy's "
            "inputs, or it was made by another release"
        )
    _print_prices(policy)
    _print_promise(policy)
    _print_limits(explanation)
    if explanation.binding:
        out.print("\nBinding constraints", style="bold")
        for one in explanation.binding:
            out.print(printable(f"{one.name}: {one.meaning}"), markup=False)
    else:
        out.print("\nno constraint is binding")
    _print_probabilities(explanation)
    _print_choices(explanation)


def _print_prices(policy: Policy) -> None:
    if not policy.inputs.prices:
        return
    table = _table(
        "Energy of a token", "pool", "basis", "batch", "generated", "of the prompt", "on the meter", "reason"
    )
    for pool, price in policy.inputs.prices.items():
        batch = "" if price.batch is None else f"{price.batch:.3g}"
        joules = (price.token_j, price.prompt_token_j, price.meter_token_j)
        _add_row(
            table, pool, price.basis, batch, *("" if one is None else f"{one:.3g} J" for one in joules), price.reason
        )
    out.print()
    out.print(table)


def _print_promise(policy: Policy) -> None:
    """The account of a promise by period; nothing with an hourly promise."""
    promise = policy.promise
    if promise is None:
        return
    table = _table("Promise by period", "metric", "from", "to", "state", "promised", "kept", "hourly floor")
    closed = [] if promise.previous is None else [(promise.previous, "closed")]
    for account, state in (*closed, (promise.current, "so far")):
        for metric, promised in account.promised.items():
            floor = promise.hourly_floors.get(metric)
            _add_row(
                table,
                metric,
                *(f"{time:%Y-%m-%d}" for time in (account.start, account.end)),
                state,
                f"{100.0 * promised:.2f} %",
                f"{100.0 * account.kept[metric]:.2f} %",
                "" if floor is None else f"{100.0 * floor:.2f} %",
            )
    out.print()
    if table.rows:
        out.print(table)
    else:
        out.print("Promise by period: nothing is booked yet")


def _print_limits(explanation: Explanation) -> None:
    if not explanation.limits:
        return
    of = "" if explanation.policy.promise is None else " of the rest of the period"
    table = _table(f"Quality limits{of}", "metric", "required", "mean", "margin", "mean - margin", "slack", "price")
    for one in explanation.limits:
        price = one.carbon_points_per_point
        _add_row(
            table,
            one.metric,
            f"{100.0 * one.required:.2f} %",
            f"{100.0 * one.mean:.2f} %",
            f"{100.0 * one.margin:.2f} ({one.z:.2f} standard errors)",
            f"{100.0 * (one.mean - one.margin):.2f} %",
            f"{100.0 * one.slack:.2f}",
            f"{_points(price)} of carbon per point" if price > _BINDING else "not binding",
        )
    out.print()
    out.print(table)


def _print_probabilities(explanation: Explanation) -> None:
    options = list(explanation.problem.options)
    settled = explanation.policy.settled
    table = _table("Probabilities", "group", "share of traffic", *options, *(["settled since"] if settled else []))
    table.columns[0].no_wrap = True
    weights = explanation.problem.weights
    for group, row in sorted(explanation.rows.items(), key=lambda one: -weights.get(one[0], 0.0)):
        share = f"{100.0 * weights.get(group, 0.0):.1f} %"
        since = [f"{settled[group]:%Y-%m-%d %H:%M}" if group in settled else ""] if settled else []
        _add_row(table, group, share, *(_share(row, option) for option in options), *since)
    if explanation.policy.groups:
        others = [_share(explanation.policy.overall, option) for option in options]
        _add_row(table, "other groups", "", *others, *([""] if settled else []))
    out.print()
    out.print(table)


def _print_choices(explanation: Explanation) -> None:
    """Why each of the largest groups has its options."""
    if explanation.program is None:
        return
    metrics = list(explanation.problem.bounds)
    table = _table(
        "Why: what one request more with an option changes",
        "group", "option", "probability", "grams", *metrics, "all traffic emits more by",
    )  # fmt: skip
    table.columns[0].no_wrap = True
    weights = explanation.problem.weights
    largest = sorted(explanation.choices, key=lambda group: -weights[group])[:_MOST_GROUPS]
    for group in largest:
        for option, one in explanation.choices[group].items():
            in_use = one.extra_g is None or abs(one.extra_g) <= _BINDING * max(one.grams, 1e-12)
            _add_row(
                table,
                group,
                option,
                _share(explanation.rows.get(group, {}), option),
                f"{one.grams:.3g}",
                *(f"{100.0 * one.quality[metric]:.1f} %" if metric in one.quality else "" for metric in metrics),
                "0: in use" if in_use else f"{one.extra_g:.2g} g",
            )
    out.print()
    out.print(table)
    if len(explanation.choices) > _MOST_GROUPS:
        out.print(f"the {_MOST_GROUPS} largest of {len(explanation.choices)} groups; all are in --json")


def _table(title: str, *headings: str) -> Table:
    return Table(*(Column(header=_text(heading)) for heading in headings), title=title, title_justify="left")


def _add_row(table: Table, *cells: str) -> None:
    table.add_row(*(_text(cell) for cell in cells))


def _text(cell: str) -> Text:
    """A cell without markup: groups are task labels of clients, and Rich parses strings as markup."""
    return Text(printable(cell))


def _share(row: dict[str, float], option: str) -> str:
    return f"{100.0 * row[option]:.1f} %" if option in row else ""
