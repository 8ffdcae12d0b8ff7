"""`sprout directives`: wordings that make a model answer more briefly, tried before they enter the fleet file."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError
from pydantic import ValidationError
from rich.table import Table

from shared.fleet import Fleet, FleetError, load_fleet
from shared.kafka.records import describe
from shared.messages import UsageRecord
from shared.runtime.clock import Clock, ClockConfigurationError
from shared.runtime.settings import FleetSettings, KafkaSettings
from shared.topics import USAGE
from tools.cli.console import (
    BOOTSTRAP_VARIABLE,
    Bootstrap,
    Exit,
    Target,
    fail,
    find_target,
    local_state,
    needs_extra,
    out,
    print_text,
    quiet_clients,
    say,
    unreachable,
)
from tools.directives.inputs import InputError, draw_prompts, load_candidates, load_prompts

if TYPE_CHECKING:
    from services.evaluator.settings import EvaluatorSettings
    from tools.directives.comparison import Estimate, Result
    from tools.directives.trial import PublishUsage, Trial, TrialSetup

MAX_PROMPTS = 500

app = typer.Typer(no_args_is_help=True, help="Find directives that a model obeys.")


@app.callback()
def directives() -> None:
    """Find directives that a model obeys."""


@app.command(name="try")
def try_(
    candidates: Annotated[
        Path,
        typer.Option(metavar="FILE", help="TOML or JSON: [[directives]] with level and text, as in the fleet file"),
    ],
    *,
    model: Annotated[str | None, typer.Option(help="Model; default: the first of the fleet file")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="JSON lines with `prompt` and perhaps `reference`; default: the shipped workload"
        ),
    ] = None,
    number: Annotated[int, typer.Option(min=1, max=MAX_PROMPTS, help="Prompts to draw from them")] = 60,
    seed: Annotated[int, typer.Option(help="Draws the prompts")] = 1,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Maximum tokens of an answer; default: the evaluator's setting")
    ] = None,
    fleet_file: Annotated[
        Path | None,
        typer.Option("--fleet", metavar="FILE", help="Fleet file; default: the local stack's, else SPROUT_FLEET_FILE"),
    ] = None,
    bootstrap: Bootstrap = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the result here")] = None,
) -> None:
    """Measure tokens, energy and quality of candidate directives, and say which are worth adding for this model.

    Every directive of the fleet and every candidate answers the same prompts on the model's first pool. The fleet's
    judge compares each answer with the one without a directive, in both orders. SPROUT_EVALUATOR_ settings apply.

    Exit codes: 0 measured, 1 failed, 2 wrong usage, 3 no model server or no Kafka.
    """
    # Other subcommands must start without loading numpy and the inference clients.
    with needs_extra("evaluator", "ledger"):
        from shared.inference.chat import ChatTemplateError  # noqa: PLC0415
        from tools.directives.comparison import compare  # noqa: PLC0415
        from tools.directives.trial import TrialError, TrialSetup  # noqa: PLC0415
    target = _target(bootstrap, fleet_file)
    fleet = _fleet(fleet_file, target)
    try:
        setup = TrialSetup(
            candidates=load_candidates(candidates, fleet),
            prompts=draw_prompts(load_prompts(prompts or _shipped_prompts()), number, seed=seed),
            fleet=fleet,
            model=_model(model, fleet),
            settings=_settings(max_tokens),
            clock=Clock.from_environment() if target is None else target.clock,
        )
    except (InputError, ClockConfigurationError) as error:
        fail(str(error))
    if target is None:
        say("no Kafka: the calls are not reported, so a ledger of these servers charges their energy to other calls")
    say(f"{setup.model}: {len(setup.prompts)} prompts, {len(setup.candidates)} candidates")
    quiet_clients()
    try:
        trial = asyncio.run(_run(setup, target))
        results = compare(trial.measurements[0], trial.measurements[1:], seed=seed)
    except TrialError as error:
        fail(str(error), remedy="see sprout status, and the model server's log", code=Exit.NOT_RUNNING)
    except (FleetError, ChatTemplateError, ValueError) as error:
        fail(str(error))
    except KafkaError as error:
        if target is None:
            raise
        unreachable(target, error)
    new = {one.level for one in setup.candidates}
    _print(trial, results, new=new, drawn=len(setup.prompts))
    if json_file is not None:
        _write(json_file, _document(trial, results, setup=setup, seed=seed))


def _target(bootstrap: str | None, fleet_file: Path | None) -> Target | None:
    """Where the calls are reported; None: nowhere, because no Kafka is known that belongs to the fleet."""
    if bootstrap or os.environ.get(BOOTSTRAP_VARIABLE):
        return find_target(bootstrap)
    state = None if fleet_file is not None else local_state()
    return None if state is None or not state.running or not state.bootstrap_servers else Target(state.kafka, state)


def _fleet(fleet_file: Path | None, target: Target | None) -> Fleet:
    if fleet_file is None and target is not None and (found := target.fleet()) is not None:
        return found
    try:
        return load_fleet(fleet_file or FleetSettings().file)
    except FleetError as error:
        fail(str(error))


def _model(model: str | None, fleet: Fleet) -> str:
    chosen = model or fleet.default_model
    if not fleet.pools_of(chosen):
        raise typer.BadParameter(f"the fleet has no model {chosen!r}; it has {', '.join(m.name for m in fleet.models)}")
    return chosen


def _settings(max_tokens: int | None) -> "EvaluatorSettings":
    from services.evaluator.settings import EvaluatorSettings  # noqa: PLC0415 - see `try_`

    try:
        settings = EvaluatorSettings()
    except ValidationError as error:
        fail(describe(error, root="evaluator settings"))
    return settings if max_tokens is None else settings.model_copy(update={"max_tokens": max_tokens})


def _shipped_prompts() -> Path:
    try:
        from deploy.triton.models import SHIPPED_WORKLOAD  # noqa: PLC0415
    except ModuleNotFoundError:
        raise typer.BadParameter("give --prompts FILE: this installation has no prompts of its own") from None
    return SHIPPED_WORKLOAD


async def _run(setup: "TrialSetup", target: Target | None) -> "Trial":
    from tools.directives.trial import run_trial  # noqa: PLC0415 - see `try_`

    async with _usage_publisher(None if target is None else target.kafka) as publish_usage:
        return await run_trial(setup, publish_usage=publish_usage, say=say)


@asynccontextmanager
async def _usage_publisher(kafka: KafkaSettings | None) -> "AsyncIterator[PublishUsage]":
    """Publishes the records of finished calls, from which the ledger attributes their energy; without Kafka, nothing.

    Raises:
        KafkaError: Kafka cannot be reached.
    """
    if kafka is None:

        async def ignore(_: UsageRecord) -> None:
            return

        yield ignore
        return
    producer = AIOKafkaProducer(**kafka.client_options(), acks="all", enable_idempotence=True)
    topic = kafka.topic(USAGE)

    async def publish(record: UsageRecord) -> None:
        await producer.send_and_wait(topic, record.model_dump_json().encode(), key=record.id.encode())

    await producer.start()
    try:
        yield publish
    finally:
        await producer.stop()


def _print(trial: "Trial", results: "list[Result]", *, new: set[str], drawn: int) -> None:
    reference = trial.measurements[0]
    if trial.prompts < drawn:
        say(f"{drawn - trial.prompts} prompts do not count: not every directive got an answer to them")
    table = Table("", "tokens", "of L0's", "s", "J", "not worse than L0", "right, against L0", "on the front", "advice")
    joules = "" if reference.joules is None else f"{reference.joules:.1f}"
    table.add_row("L0", f"{reference.tokens.mean():.0f}", "", f"{reference.seconds.mean():.2f}", joules)
    for one in results:
        right = "" if one.right_change is None else _points(one.right_change)
        table.add_row(
            one.level,
            f"{one.tokens:.0f}",
            _interval(one.tokens_ratio),
            f"{one.seconds:.2f}",
            "" if one.joules is None else f"{one.joules:.1f}",
            "" if one.not_worse is None else _interval(one.not_worse),
            right,
            f"{100.0 * one.front_share:.0f} %",
            one.advice,
        )
    out.print(table)
    if trial.unmetered is not None:
        print_text(f"energy: unmetered, {trial.unmetered}")
    if trial.judge_fault is not None:
        print_text(f"the judge cannot be relied on: {trial.judge_fault}")
    for one in results:
        print_text(f"{one.level} ({'candidate' if one.level in new else 'in the catalogue'}): {one.text}")
        if one.beaten_by:
            print_text(f"  shorter and no worse: {', '.join(one.beaten_by)}")
        elif one.better_mix is not None:
            print_text(f"  a mix of {' and '.join(one.better_mix)} is shorter at the same quality")
    worth = [one.level for one in results if one.level in new and one.advice == "worth it"]
    print_text(f"worth adding: {', '.join(worth) if worth and trial.judge_fault is None else 'none'}")


def _interval(estimate: "Estimate") -> str:
    value, low, high = (100.0 * part for part in estimate)
    return f"{value:.0f} % ({low:.0f} to {high:.0f})"


def _points(change: "Estimate") -> str:
    value, low, high = (100.0 * part for part in change)
    return f"{value:+.0f} points ({low:+.0f} to {high:+.0f})"


def _document(trial: "Trial", results: "list[Result]", *, setup: "TrialSetup", seed: int) -> dict[str, Any]:
    reference = trial.measurements[0]
    return {
        "model": setup.model,
        "pool": setup.pool.name,
        "prompts": trial.prompts,
        "seed": seed,
        "energy": "meter" if trial.unmetered is None else "unmetered",
        "unmetered_reason": trial.unmetered,
        "judge_fault": trial.judge_fault,
        "reference": {
            "level": reference.directive.level,
            "tokens": float(reference.tokens.mean()),
            "seconds": float(reference.seconds.mean()),
            "joules": reference.joules,
        },
        "directives": [one.to_json() | {"in_catalogue": one.level in setup.fleet.levels} for one in results],
    }


def _write(path: Path, document: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror}")
    say(f"wrote {path}")
