"""`sprout policy`: the linear program behind a policy, its binding constraints and their shadow prices."""

import asyncio
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from aiokafka import AIOKafkaConsumer
from aiokafka.errors import KafkaError
from pydantic import ValidationError

from shared.fleet import Fleet, FleetError, load_fleet
from shared.kafka.records import PoisonMessageError, describe, parse
from shared.messages import Policy
from shared.runtime.logs import printable
from shared.runtime.settings import FleetSettings, KafkaSettings
from shared.topics import POLICIES
from tools.cli.console import (
    Bootstrap,
    Exit,
    Target,
    fail,
    find_target,
    needs_extra,
    out,
    print_text,
    quiet_clients,
    unreachable,
)
from tools.cli.offsets import existing_partitions

POLL_MS = 500

READ_TIMEOUT_S = 30.0
"""Wait for the records of the topic; without the leader of a partition they do not arrive."""

app = typer.Typer(no_args_is_help=True, help="Explain the optimizer's policies.")


class ReadTimeoutError(Exception):
    """The topic could not be read to its end in time."""


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

    Exit codes: 0 printed, 1 failed, 2 wrong usage, 3 no Kafka, or no such policy, 4 Kafka did not send every policy in
    time.
    """
    # Other subcommands must start without loading the solver.
    with needs_extra("optimizer"):
        from services.optimizer.policy import MissingPricesError  # noqa: PLC0415
        from services.optimizer.program import warm_up  # noqa: PLC0415
        from tools.cli.explanation import explain_policy, lp_text, to_json  # noqa: PLC0415
        from tools.cli.explanation_tables import print_explanation  # noqa: PLC0415
    fleet: Fleet | None = None
    if file is not None:
        found = _choose(_read_file(file), model, version, where=str(file))
        if not found.inputs.options:
            fleet = _fleet_of_environment()
    else:
        target = find_target(bootstrap)
        quiet_clients()
        policies = _read(target)
        found = _choose(policies, model, version, where=f"topic {target.kafka.topic(POLICIES)}")
        fleet = target.fleet()
    warm_up()
    try:
        explanation = explain_policy(found, fleet=fleet)
    except MissingPricesError as error:
        fail(f"the program cannot be rebuilt: {error}", remedy="name the fleet file: SPROUT_FLEET_FILE")
    except ValueError as error:
        fail(f"the program cannot be rebuilt, because the policy message is inconsistent: {error}")
    if lp:
        print_text(lp_text(explanation), end="")
    elif as_json:
        print(json.dumps(to_json(explanation), indent=2))
    else:
        print_explanation(explanation)


@app.command("export-prior")
def export_prior_command(
    output: Annotated[Path, typer.Argument(metavar="FILE", help="Written; an existing file is replaced")],
    *,
    file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Read the policy, a JSON message, from a file instead of Kafka")
    ] = None,
    bootstrap: Bootstrap = None,
) -> None:
    """Write what the newest policies know of energy, time and quality, for the optimizer of another fleet.

    Name the file there with SPROUT_OPTIMIZER_PRIOR_FILE. It contains no prompts; its groups are task labels.

    Exit codes: 0 written, 1 failed, 2 wrong usage, 3 no Kafka, or no policy that knows more than the baseline, 4 Kafka
    did not send every policy in time.
    """
    with needs_extra("optimizer"):
        from services.optimizer.prior import PriorFile, export_prior  # noqa: PLC0415
    if file is not None:
        policies, fleet = _read_file(file), _fleet_of_environment()
    else:
        target = find_target(bootstrap)
        quiet_clients()
        policies, fleet = _read(target), target.fleet() or _fleet_of_environment()
    if fleet is None:
        fail("the fleet file is not known", remedy="name it: SPROUT_FLEET_FILE")
    newest = {one.model: one for one in sorted(policies, key=lambda one: one.version)}
    try:
        priors = {model: prior for model, one in newest.items() if (prior := export_prior(one, fleet)) is not None}
    except KeyError as error:
        fail(f"the fleet file has no level {error}", remedy="name the fleet file of these policies: SPROUT_FLEET_FILE")
    if not priors:
        fail("no policy knows more than the baseline yet", remedy="wait for an evaluation", code=Exit.NOT_RUNNING)
    try:
        output.write_text(PriorFile(models=priors).model_dump_json(indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        fail(f"{output} cannot be written: {error.strerror}")
    out.print(printable(f"wrote {output}: {', '.join(priors)}"), markup=False)


def _read(target: Target) -> list[Policy]:
    try:
        return asyncio.run(read_policies(target.kafka))
    except ReadTimeoutError as error:
        fail(
            str(error),
            remedy="does each partition have a leader? See the broker's log, and try again",
            code=Exit.TIMED_OUT,
        )
    except (KafkaError, OSError) as error:
        unreachable(target, error)


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


async def read_policies(kafka: KafkaSettings, *, timeout_s: float = READ_TIMEOUT_S) -> list[Policy]:
    """Every policy that the topic still has.

    Raises:
        KafkaError: the broker cannot be reached.
        ReadTimeoutError: the end of the topic was not reached within `timeout_s`.
    """
    topic = kafka.topic(POLICIES)
    partitions = await existing_partitions(kafka, [topic])
    if not partitions:
        return []
    consumer: Any = AIOKafkaConsumer(**kafka.client_options(), enable_auto_commit=False)
    found: list[Policy] = []
    await consumer.start()
    unread = set(partitions)
    try:
        async with asyncio.timeout(timeout_s):
            ends = await consumer.end_offsets(partitions)
            consumer.assign(partitions)
            await consumer.seek_to_beginning(*partitions)
            unread = {partition for partition, end in ends.items() if end > 0}
            while unread:
                batches = await consumer.getmany(timeout_ms=POLL_MS)
                for records in batches.values():
                    found += [message for record in records if (message := _parsed(record.value)) is not None]
                unread = {partition for partition in unread if await consumer.position(partition) < ends[partition]}
    except TimeoutError:
        numbers = ", ".join(str(number) for number in sorted(one.partition for one in unread))
        raise ReadTimeoutError(
            f"topic {topic} could not be read to its end within {timeout_s:g} s: partition {numbers} is incomplete"
        ) from None
    finally:
        await consumer.stop()
    return found


def _parsed(value: bytes | None) -> Policy | None:
    try:
        return None if value is None else parse(Policy, value)
    except PoisonMessageError:
        return None
