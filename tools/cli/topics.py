"""`sprout topics`: create, plan, list and describe the declared topics; the ACLs that their users need."""

import asyncio
import shlex
from pathlib import Path
from typing import Annotated

import typer
from aiokafka.errors import KafkaError
from pydantic import ValidationError
from rich.table import Column, Table

from shared.access import ACCESS, acl_arguments
from shared.kafka.admin import ProvisioningError, create_topics, plan_topics
from shared.kafka.records import describe as describe_error
from shared.kafka.topic_settings import TopicSettings, TopicSettingsError, all_topics, load_topic_settings
from shared.runtime.settings import KafkaSettings
from shared.topics import TOPICS, TopicSpec
from tools.cli.console import Bootstrap, Exit, fail, find_target, out, print_text, quiet_clients, unreachable
from tools.cli.offsets import offsets_by_topic

app = typer.Typer(no_args_is_help=True, help="Create, list and describe Kafka topics.")

MISSING = "missing"

Copies = Annotated[
    int | None, typer.Option(min=1, help="Copies of every partition; default: SPROUT_TOPICS_REPLICATION_FACTOR, or 1")
]


@app.command()
def create(
    bootstrap: Bootstrap = None,
    replication_factor: Copies = None,
    *,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show the plan, as `sprout topics plan` does")
    ] = False,
    allow_loss: Annotated[
        bool, typer.Option("--allow-loss", help="Also apply changes that may delete records or weaken what is promised")
    ] = False,
) -> None:
    """Create the topics, those of SPROUT_ROUTER_LANES too, and bring existing ones to what they are to be.

    That is what the declarations and SPROUT_TOPICS_* say. Changes of existing topics that may delete records or weaken
    what is promised need --allow-loss. What remains different is printed; the exit code is 0 nevertheless.
    """
    if dry_run:
        plan(bootstrap, replication_factor)
        return
    target = find_target(bootstrap)
    quiet_clients()
    settings, specs = _settings(replication_factor), _topics()
    try:
        outcomes = asyncio.run(create_topics(target.kafka, settings, specs=specs, allow_loss=allow_loss))
    except ProvisioningError as error:
        fail(str(error))
    except (KafkaError, OSError) as error:
        unreachable(target, error)
    for outcome in outcomes:
        word = "created" if outcome.created else "changed" if outcome.changed else "exists"
        out.print(f"{word:8}{outcome.topic}, {outcome.partitions} partitions")
        for change in outcome.changed:
            out.print(f"        done     {change}", markup=False)
        for change in outcome.drift:
            out.print(f"        differs  {change}", markup=False)
    if any(change.how == "loses" for outcome in outcomes for change in outcome.drift):
        out.print("to apply what may lose records as well: sprout topics create --allow-loss")


@app.command()
def plan(bootstrap: Bootstrap = None, replication_factor: Copies = None) -> None:
    """Show how the topics differ from what they are to be; changes nothing.

    Exit codes: 0 no difference, 1 differences.
    """
    target = find_target(bootstrap)
    quiet_clients()
    settings = _settings(replication_factor)
    try:
        changes = asyncio.run(plan_topics(target.kafka, settings, specs=_topics()))
    except (KafkaError, OSError) as error:
        unreachable(target, error)
    words = {"apply": "apply", "loses": "--allow-loss", "manual": "by hand"}
    for change in changes:
        out.print(f"{words[change.how]:13}{change}", markup=False)
    if changes:
        raise typer.Exit(Exit.FAILED)
    out.print("the topics are what they are to be")


def _settings(replication_factor: int | None) -> TopicSettings:
    given = {} if replication_factor is None else {"replication_factor": replication_factor}
    try:
        return load_topic_settings(**given)
    except TopicSettingsError as error:
        fail(str(error))


@app.command("list")
def list_topics(bootstrap: Bootstrap = None) -> None:
    """List the topics, with those of SPROUT_ROUTER_LANES: partitions, records, cleanup, retention."""
    target = find_target(bootstrap)
    topics = _topics()
    quiet_clients()
    try:
        found = asyncio.run(offsets_by_topic(target.kafka, [target.kafka.topic(spec) for spec in topics]))
    except (KafkaError, OSError) as error:
        unreachable(target, error)
    table = Table(Column("topic", no_wrap=True), "partitions", "records", "cleanup", "retention")
    for spec in topics:
        name = target.kafka.topic(spec)
        partitions = found.get(name, {})
        table.add_row(
            name,
            str(len(partitions)) if partitions else MISSING,
            str(sum(following - first for first, following in partitions.values())),
            spec.cleanup.value,
            _retention(spec),
        )
    out.print(table)
    if len(found) < len(topics):
        fail(
            f"{len(topics) - len(found)} of {len(topics)} topics are missing",
            remedy="create them: sprout topics create",
        )


@app.command()
def describe(
    topic: Annotated[str, typer.Argument(help="Name, with or without the prefix: requests")],
    bootstrap: Bootstrap = None,
) -> None:
    """Describe a topic: its declaration, the fields of its message, the offsets of its partitions."""
    target = find_target(bootstrap)
    name = topic.removeprefix(target.kafka.topic_prefix)
    specs = {spec.name: spec for spec in _topics()}
    if name not in specs:
        fail(f"no topic {topic!r} is declared", remedy=f"declared: {', '.join(specs)}", code=Exit.FAILED)
    spec = specs[name]
    quiet_clients()
    try:
        offsets = asyncio.run(offsets_by_topic(target.kafka, [target.kafka.topic(spec)]))
    except (KafkaError, OSError) as error:
        unreachable(target, error)
    offsets_by_partition = offsets.get(target.kafka.topic(spec), {})
    out.print(f"{target.kafka.topic(spec)}  (key: {spec.key})", style="bold")
    out.print(
        f"cleanup {spec.cleanup.value}, retention {_retention(spec)}, at most {spec.max_message_bytes} bytes a message"
    )
    fields = Table("field", "required", "meaning", title=spec.message.__name__, title_justify="left")
    for field, info in spec.message.model_fields.items():
        fields.add_row(field, "yes" if info.is_required() else "", info.description or "")
    out.print(fields)
    if not offsets_by_partition:
        fail("it does not exist on the broker", remedy="create it: sprout topics create")
    partitions = Table("partition", "first offset", "next offset")
    for partition, (first, following) in sorted(offsets_by_partition.items()):
        partitions.add_row(str(partition), str(first), str(following))
    out.print(partitions)


@app.command()
def acls(
    service: Annotated[
        list[str] | None, typer.Argument(help=f"Only for these: {', '.join(ACCESS)}; default: all")
    ] = None,
    *,
    principal: Annotated[
        str, typer.Option(help="Kafka's name of a principal; {} stands for router, carbon-feed, ...")
    ] = "User:sprout-{}",
    command: Annotated[str, typer.Option(help="Kafka's tool")] = "kafka-acls.sh",
    command_config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Properties with which the tool logs in")
    ] = None,
    bootstrap: Bootstrap = None,
) -> None:
    """Print the commands that give every service, clients and operators the least access that they need.

    Nothing is sent to Kafka. Topics and consumer groups have the prefixes of SPROUT_KAFKA_*. The topics of requests are
    those of SPROUT_ROUTER_LANES.
    """
    names = service or list(ACCESS)
    for name in names:
        if name.replace("-", "_") not in ACCESS:
            fail(f"no principal {name!r}", remedy=f"there are: {', '.join(ACCESS)}")
    kafka = KafkaSettings(bootstrap_servers=bootstrap) if bootstrap else KafkaSettings()
    start = [command, "--bootstrap-server", kafka.bootstrap_servers]
    if command_config is not None:
        start += ["--command-config", str(command_config)]
    principals = {name.replace("-", "_"): principal.replace("{}", name.replace("_", "-")) for name in names}
    for arguments in acl_arguments(kafka, principals, lanes=_topics()[len(TOPICS) :]):
        print_text(shlex.join([*start, "--add", *arguments]))


def _topics() -> tuple[TopicSpec, ...]:
    """Every topic, with those of the lanes."""
    try:
        return all_topics()
    except ValidationError as error:
        fail(f"SPROUT_ROUTER_LANES: {describe_error(error)}")


def _retention(spec: TopicSpec) -> str:
    if spec.retention_ms is None:
        return "forever"
    hours = spec.retention_ms / 3_600_000
    return f"{hours:g} h" if hours < 48 else f"{hours / 24:g} d"
