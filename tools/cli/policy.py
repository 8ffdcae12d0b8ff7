"""`sprout policy`: the linear program behind a policy, its binding constraints and their shadow prices."""

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from aiokafka import AIOKafkaConsumer
from aiokafka.errors import KafkaError
from pydantic import ValidationError
from rich.table import Column, Table

from services.optimizer.policy import problem_of
from services.optimizer.problem import Cells, Problem, Rows
from services.optimizer.program import Program, solve_program, warm_up
from shared.fleet import Fleet, FleetError, load_fleet
from shared.kafka.dead_letters import PoisonMessageError, describe, parse
from shared.messages import Policy
from shared.runtime.settings import FleetSettings, KafkaSettings
from shared.topics import POLICIES
from tools.cli.console import Bootstrap, Exit, fail, find_target, out, quiet_clients, unreachable
from tools.cli.offsets import existing_partitions

POLL_MS = 500
_BINDING = 1e-6
"""Shadow price, relative to the reference's grams, from which a constraint is binding."""

_SAME = 1e-3
"""Relative difference in grams up to which the rebuilt program agrees with the policy."""

app = typer.Typer(no_args_is_help=True, help="Explain the optimizer's policies.")


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitExplanation:
    """A quality limit on all traffic; every quality is relative to the reference's.

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
class Explanation:
    """A policy and the program that it was solved from.

    Attributes:
        rows: probabilities by group, then option.
        binding: constraints with a shadow price, the most expensive first.
        rebuilt_g_per_request: expected grams of the rebuilt program's solution.
        program: None if the reference is served.
    """

    policy: Policy
    problem: Problem
    rows: Rows
    limits: tuple[LimitExplanation, ...]
    binding: tuple[BindingConstraint, ...]
    rebuilt_g_per_request: float
    program: Program | None

    @property
    def agrees(self) -> bool:
        """Whether the rebuilt program has the expected grams of the policy."""
        expected = self.policy.expected_g_per_request
        return abs(self.rebuilt_g_per_request - expected) <= _SAME * max(expected, self.rebuilt_g_per_request)


@app.callback()
def policy() -> None:
    """Explain the optimizer's policies."""


@app.command()
def explain(
    model: Annotated[str | None, typer.Argument(help="Logical model; default: the only one that has a policy")] = None,
    *,
    version: Annotated[
        int | None, typer.Option(min=1, help="Version of the policy; default: the newest. Kafka deletes older ones")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Read the policy, a JSON message, from a file instead of Kafka")
    ] = None,
    lp: Annotated[bool, typer.Option("--lp", help="Print the program in LP format, with its cuts")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the explanation as JSON")] = False,
    bootstrap: Bootstrap = None,
) -> None:
    """Rebuild the program that a policy was solved from; print probabilities, quality limits and shadow prices.

    Exit codes: 0 printed, 1 failed, 2 wrong usage, 3 no Kafka, or no such policy.
    """
    fleet: Fleet | None = None
    if file is not None:
        found = _choose(_read_file(file), model, version, where=str(file))
        if not found.inputs.options:
            fleet = _fleet_of_environment()
    else:
        target = find_target(bootstrap)
        quiet_clients()
        try:
            policies = asyncio.run(_read_topic(target.kafka))
        except (KafkaError, OSError) as error:
            unreachable(target, error)
        found = _choose(policies, model, version, where=f"topic {target.kafka.topic(POLICIES)}")
        fleet = target.fleet()
    warm_up()
    try:
        explanation = explain_policy(found, fleet=fleet)
    except ValueError as error:
        fail(f"the program cannot be rebuilt: {error}", remedy="name the fleet file: SPROUT_FLEET_FILE")
    if lp:
        print(lp_text(explanation), end="")
    elif as_json:
        print(json.dumps(to_json(explanation), indent=2))
    else:
        _print(explanation)


def explain_policy(policy: Policy, *, fleet: Fleet | None = None) -> Explanation:
    """Rebuild and solve a policy's program.

    Args:
        policy: as published.
        fleet: for the prices of a policy of the first release, which does not contain them.

    Raises:
        ValueError: the prices are missing.
    """
    problem = problem_of(policy, fleet=fleet)
    solution, program = solve_program(problem)
    rows = policy.groups or dict.fromkeys(problem.weights, policy.overall)
    prices = {} if program is None else program.shadow_prices()
    reference_g = policy.reference_g_per_request or 1.0
    return Explanation(
        policy=policy,
        problem=problem,
        rows=rows,
        limits=_limits(problem, rows, prices, reference_g),
        binding=_binding(problem, program, prices, reference_g),
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
        "weights": dict(explanation.problem.weights),
        "probabilities": {group: dict(row) for group, row in explanation.rows.items()},
        "overall": dict(policy.overall),
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
        "binding": [
            {"constraint": one.name, "shadow_price_g": one.price_g, "meaning": one.meaning}
            for one in explanation.binding
        ],
    }


def _limits(problem: Problem, rows: Rows, prices: dict[str, float], reference_g: float) -> tuple[LimitExplanation, ...]:
    cells = Cells(problem)
    x = cells.values(rows)
    # If only the reference is served, its quality may be unknown; relative to itself it is 1.
    only_reference = bool((x == cells.reference).all())
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


def _points(value: float) -> str:
    return f"{value:.2g} point{'' if f'{value:.2g}' == '1' else 's'}"


def _print(explanation: Explanation) -> None:
    policy = explanation.policy
    out.print(f"policy {policy.version} of {policy.model}: {policy.status}", style="bold", markup=False)
    out.print(f"made {policy.created_at:%Y-%m-%d %H:%M}, valid until {policy.valid_until:%Y-%m-%d %H:%M} (UTC)")
    out.print(policy.reason, markup=False)
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
    _print_limits(explanation)
    if explanation.binding:
        out.print("\nBinding constraints", style="bold")
        for one in explanation.binding:
            out.print(f"{one.name}: {one.meaning}", markup=False)
    else:
        out.print("\nno constraint is binding")
    _print_probabilities(explanation)


def _print_limits(explanation: Explanation) -> None:
    if not explanation.limits:
        return
    table = Table("metric", "required", "mean", "margin", "mean - margin", "slack", "price", title="Quality limits")
    table.title_justify = "left"
    for one in explanation.limits:
        price = one.carbon_points_per_point
        table.add_row(
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
    table = Table(Column("group", no_wrap=True), "share of traffic", *options, title="Probabilities")
    table.title_justify = "left"
    weights = explanation.problem.weights
    for group, row in sorted(explanation.rows.items(), key=lambda one: -weights.get(one[0], 0.0)):
        table.add_row(group, f"{100.0 * weights.get(group, 0.0):.1f} %", *(_share(row, option) for option in options))
    if explanation.policy.groups:
        table.add_row("other groups", "", *(_share(explanation.policy.overall, option) for option in options))
    out.print()
    out.print(table)


def _share(row: dict[str, float], option: str) -> str:
    return f"{100.0 * row[option]:.1f} %" if option in row else ""


def _choose(policies: list[Policy], model: str | None, version: int | None, *, where: str) -> Policy:
    """The policy asked for; leaves with an error if there is none."""
    models = sorted({one.model for one in policies})
    if not policies:
        fail(f"{where} has no policy", remedy="is the optimizer running? sprout status", code=Exit.NOT_RUNNING)
    if model is None and len(models) > 1:
        fail("there are policies of several models", remedy=f"name one: {', '.join(models)}")
    found = [one for one in policies if model in (None, one.model)]
    if not found:
        fail(f"{where} has no policy of model {model!r}", remedy=f"it has {', '.join(models)}", code=Exit.NOT_RUNNING)
    if version is not None:
        known = sorted({one.version for one in found})
        found = [one for one in found if one.version == version]
        if not found:
            fail(
                f"{where} has no version {version} of the policy",
                remedy=f"it has {', '.join(map(str, known))}; older ones are deleted by compaction",
                code=Exit.NOT_RUNNING,
            )
    return max(found, key=lambda one: one.version)


def _read_file(path: Path) -> list[Policy]:
    try:
        return [Policy.model_validate_json(path.read_bytes())]
    except OSError as error:
        fail(f"{path} cannot be read: {error.strerror}")
    except ValidationError as error:
        fail(f"{path} is not a policy: {describe(error)}")


def _fleet_of_environment() -> Fleet | None:
    path = FleetSettings().file
    try:
        return load_fleet(path) if path.exists() else None
    except FleetError as error:
        fail(str(error))


async def _read_topic(kafka: KafkaSettings) -> list[Policy]:
    """Every policy that the topic still has.

    Raises:
        KafkaError: the broker cannot be reached.
    """
    partitions = await existing_partitions(kafka, [kafka.topic(POLICIES)])
    if not partitions:
        return []
    consumer: Any = AIOKafkaConsumer(**kafka.client_options(), enable_auto_commit=False)
    found: list[Policy] = []
    await consumer.start()
    try:
        ends = await consumer.end_offsets(partitions)
        consumer.assign(partitions)
        await consumer.seek_to_beginning(*partitions)
        unread = {partition for partition, end in ends.items() if end > 0}
        while unread:
            batches = await consumer.getmany(timeout_ms=POLL_MS)
            for records in batches.values():
                found += [message for record in records if (message := _parsed(record.value)) is not None]
            unread = {partition for partition in unread if await consumer.position(partition) < ends[partition]}
    finally:
        await consumer.stop()
    return found


def _parsed(value: bytes | None) -> Policy | None:
    try:
        return None if value is None else parse(Policy, value)
    except PoisonMessageError:
        return None
