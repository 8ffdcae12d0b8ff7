"""Creates the topics that `shared.topics` declares, plans and applies changes to existing ones, and reports drift."""

import asyncio
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.admin.new_partitions import NewPartitions
from aiokafka.errors import KafkaError, TopicAlreadyExistsError, for_code

from shared.kafka.topic_settings import TopicSettings, TopicTarget, load_topic_settings
from shared.runtime.logs import get_logger
from shared.runtime.settings import KafkaSettings
from shared.topics import TOPICS, TopicSpec

VISIBLE_TIMEOUT_S = 30.0

TOPIC_LEVEL: Final = 1
"""Kafka's number for a configuration that is set on the topic itself."""

NO_LIMIT: Final = -1
"""Kafka's `retention.ms` of records that never expire."""

_log = get_logger(__name__)


class ProvisioningError(RuntimeError):
    """The broker rejected a topic; the message names it and the reason."""


@dataclass(frozen=True, slots=True)
class TopicState:
    """A topic on the broker.

    Attributes:
        configuration: every value that applies, by name.
        overridden: those that are set on the topic itself.
    """

    partitions: int
    replication_factor: int
    configuration: Mapping[str, str]
    overridden: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Change:
    """A difference between a topic and what it is to be.

    Attributes:
        setting: `topic`, `partitions`, `replication.factor`, or the name of a configuration.
        found: None: the topic does not exist.
        how: `apply`: can be done and loses nothing; `loses`: can be done, and may delete records or weaken what is
            promised; `manual`: this program cannot do it.
    """

    topic: str
    setting: str
    found: str | None
    wanted: str
    how: str = "apply"
    note: str = ""

    def __str__(self) -> str:
        text = f"{self.topic}: " + (
            f"create with {self.wanted}" if self.found is None else f"{self.setting} {self.found} -> {self.wanted}"
        )
        return f"{text}  ({self.note})" if self.note else text


@dataclass(frozen=True, slots=True)
class Provisioned:
    """The result for one topic.

    Attributes:
        changed: differences that were removed.
        drift: differences that remain.
    """

    topic: str
    created: bool
    partitions: int
    changed: tuple[Change, ...] = ()
    drift: tuple[Change, ...] = ()


def plan_topic(topic: str, target: TopicTarget, found: TopicState | None) -> tuple[Change, ...]:
    """What a topic differs in from what it is to be.

    Args:
        found: None: it does not exist.
    """
    if found is None:
        wanted = f"{target.partitions} partitions, replication factor {target.replication_factor}"
        return (Change(topic, "topic", None, wanted),)
    changes: list[Change] = []
    if found.partitions != target.partitions:
        fewer = found.partitions > target.partitions
        note = "Kafka cannot remove partitions" if fewer else "keys move to other partitions"
        how = "manual" if fewer else "apply"
        changes.append(Change(topic, "partitions", str(found.partitions), str(target.partitions), how, note))
    if found.replication_factor != target.replication_factor:
        numbers = str(found.replication_factor), str(target.replication_factor)
        changes.append(Change(topic, "replication.factor", *numbers, "manual", "use kafka-reassign-partitions.sh"))
    for name, value in target.configuration.items():
        if (current := found.configuration.get(name, "")) != value:
            loses = _may_lose(name, current, value)
            note = "may delete records, or weakens what is promised" if loses else ""
            changes.append(Change(topic, name, current, value, "loses" if loses else "apply", note))
    return tuple(changes)


async def plan_topics(
    kafka: KafkaSettings, settings: TopicSettings | None = None, *, specs: Iterable[TopicSpec] = TOPICS
) -> list[Change]:
    """All differences between the topics on the broker and what they are to be; changes nothing.

    Raises:
        KafkaError: the broker cannot be reached, or does not let this user describe topics.
        TopicSettingsError: the settings from the environment cannot be used.
    """
    settings = settings or load_topic_settings()
    targets = {kafka.topic(spec): settings.target(spec) for spec in specs}
    admin = AIOKafkaAdminClient(**kafka.client_options())
    await admin.start()
    try:
        found = await read_topics(admin, targets)
    finally:
        await admin.close()
    return [change for topic, target in targets.items() for change in plan_topic(topic, target, found.get(topic))]


async def create_topics(
    kafka: KafkaSettings,
    settings: TopicSettings | None = None,
    *,
    specs: Iterable[TopicSpec] = TOPICS,
    allow_loss: bool = False,
) -> list[Provisioned]:
    """Create every declared topic that does not exist yet, and bring existing ones to what they are to be.

    Returns once the broker serves all of them.

    Args:
        settings: of the topics; None: from the environment.
        allow_loss: whether to apply changes that may delete records or weaken what is promised.

    Raises:
        ProvisioningError: the broker rejected a topic, or does not serve it within `VISIBLE_TIMEOUT_S`.
        TopicSettingsError: the settings from the environment cannot be used.
    """
    settings = settings or load_topic_settings()
    targets = {kafka.topic(spec): settings.target(spec) for spec in specs}
    admin = AIOKafkaAdminClient(**kafka.client_options())
    await admin.start()
    try:
        existing = await _create(admin, targets)
        await _wait_until_served(admin, sorted(targets))
        found = await read_topics(admin, existing)
        applied: dict[str, tuple[Change, ...]] = {}
        for topic in sorted(existing):
            plan = plan_topic(topic, targets[topic], found[topic])
            applied[topic] = tuple(one for one in plan if one.how == "apply" or (allow_loss and one.how == "loses"))
            if applied[topic]:
                await _apply(admin, topic, targets[topic], found[topic], applied[topic])
    finally:
        await admin.close()
    return [
        Provisioned(
            topic,
            created=False,
            partitions=max(found[topic].partitions, target.partitions),
            changed=applied[topic],
            drift=tuple(one for one in plan_topic(topic, target, found[topic]) if one not in applied[topic]),
        )
        if topic in existing
        else Provisioned(topic, created=True, partitions=target.partitions)
        for topic, target in targets.items()
    ]


async def warn_of_drift(kafka: KafkaSettings, topics: Iterable[TopicSpec]) -> None:
    """Log where the topics of a service do not hold what it relies on: partitions, and copies that survive a broker.

    A service may lack the right to read the configuration of a topic, which is then not checked.
    """
    targets = {kafka.topic(spec): spec for spec in topics}
    admin = AIOKafkaAdminClient(**kafka.client_options(), request_timeout_ms=5_000)
    try:
        await admin.start()
        found = await read_topics(admin, targets, is_strict=False)
    except (KafkaError, OSError) as error:
        _log.info("topics were not checked", error=type(error).__name__)
        return
    finally:
        await admin.close()
    for topic, state in found.items():
        for problem in durability_problems(targets[topic], state):
            _log.warning(problem, topic=topic, remedy="sprout topics plan")


def durability_problems(spec: TopicSpec, found: TopicState) -> list[str]:
    """Where a topic does not hold what is promised, for people."""
    problems = []
    if found.partitions < spec.partitions:
        problems.append(f"the topic has {found.partitions} partitions, and is declared with {spec.partitions}")
    if found.replication_factor > 1 and found.configuration.get("min.insync.replicas") == "1":
        problems.append(
            f"the topic has {found.replication_factor} copies, but min.insync.replicas is 1: a message that Kafka has "
            "acknowledged can be lost with one broker"
        )
    return problems


async def read_topics(
    admin: AIOKafkaAdminClient, topics: Collection[str], *, is_strict: bool = True
) -> dict[str, TopicState]:
    """Those of the topics that exist.

    Args:
        is_strict: whether an unreadable configuration is an error; otherwise it is empty.

    Raises:
        KafkaError: the broker does not answer, or does not let this user describe topics.
    """
    existing = sorted(set(await admin.list_topics()) & set(topics))
    if not existing:
        return {}
    described = {one["topic"]: one["partitions"] for one in await admin.describe_topics(existing)}
    values: dict[str, tuple[dict[str, str], dict[str, str]]] = {}
    resources = [ConfigResource(ConfigResourceType.TOPIC, topic) for topic in existing]
    for response in await admin.describe_configs(resources):
        for code, message, _, topic, entries in response.resources:
            if code and is_strict:
                raise for_code(code)(f"configuration of {topic}: {message}")
            # (name, value, read only, where it is set, ...)
            known = {entry[0]: entry[1] for entry in entries if entry[1] is not None}
            values[topic] = known, {entry[0]: entry[1] for entry in entries if entry[3] == TOPIC_LEVEL}
    return {
        topic: TopicState(len(partitions), min(len(one["replicas"]) for one in partitions), *values[topic])
        for topic, partitions in described.items()
        if partitions
    }


async def _create(admin: AIOKafkaAdminClient, targets: Mapping[str, TopicTarget]) -> set[str]:
    """Create topics; returns those that existed before."""
    response = await admin.create_topics(
        [
            NewTopic(
                name=topic,
                num_partitions=target.partitions,
                replication_factor=target.replication_factor,
                topic_configs=dict(target.configuration),
            )
            for topic, target in targets.items()
        ]
    )
    existing: set[str] = set()
    for topic, code, message in response.topic_errors:
        error = for_code(code)
        if error is TopicAlreadyExistsError:
            existing.add(topic)
        elif code != 0:
            raise ProvisioningError(f"topic {topic}: {error.__name__}: {message or error.description}")
    return existing


async def _apply(
    admin: AIOKafkaAdminClient, topic: str, target: TopicTarget, found: TopicState, changes: Collection[Change]
) -> None:
    """Apply changes to an existing topic.

    Raises:
        ProvisioningError: the broker rejected one.
    """
    settings = {one.setting: one.wanted for one in changes}
    if settings.pop("partitions", None) is not None:
        try:
            await admin.create_partitions({topic: NewPartitions(target.partitions)})
        except KafkaError as error:
            raise ProvisioningError(f"topic {topic}: partitions: {error}") from error
    if not settings:
        return
    # Kafka replaces all values of the topic, so those that are not changed are sent again.
    resource = ConfigResource(ConfigResourceType.TOPIC, topic, {**found.overridden, **settings})
    for response in await admin.alter_configs([resource]):
        for code, message, *_ in response.resources:
            if code:
                raise ProvisioningError(f"topic {topic}: {for_code(code).__name__}: {message}")


async def _wait_until_served(admin: AIOKafkaAdminClient, topics: list[str]) -> None:
    """Wait until the broker serves all topics: the controller knows them a little earlier."""
    try:
        async with asyncio.timeout(VISIBLE_TIMEOUT_S):
            while True:
                answers = {entry["topic"]: entry for entry in await admin.describe_topics(topics)}
                missing = [name for name in topics if not answers.get(name, {}).get("partitions")]
                if not missing:
                    return
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise ProvisioningError(
            f"the broker does not serve topics {', '.join(missing)} {VISIBLE_TIMEOUT_S:.0f} s after they were created"
        ) from None


def _may_lose(name: str, found: str, wanted: str) -> bool:
    """Whether a change of a configuration may delete records or weaken what is promised."""
    if name == "cleanup.policy":
        return "delete" in wanted and "delete" not in found
    if name not in ("retention.ms", "min.insync.replicas", "max.message.bytes") or not found:
        return False
    before, after = int(found), int(wanted)
    if name == "retention.ms":
        return after != NO_LIMIT and (before == NO_LIMIT or after < before)
    return after < before
