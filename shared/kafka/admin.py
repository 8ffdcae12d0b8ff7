"""Creates the topics that `shared.topics` declares; idempotent, reports differences."""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import TopicAlreadyExistsError, for_code

from shared.runtime.settings import KafkaSettings
from shared.topics import TOPICS, TopicSpec

VISIBLE_TIMEOUT_S = 30.0


class ProvisioningError(RuntimeError):
    """The broker rejected a topic; the message names it and the reason."""


@dataclass(frozen=True, slots=True)
class Provisioned:
    """The result for one topic."""

    topic: str
    created: bool
    partitions: int
    note: str = ""


async def create_topics(
    kafka: KafkaSettings, *, replication_factor: int = 1, specs: Iterable[TopicSpec] = TOPICS
) -> list[Provisioned]:
    """Create every declared topic that does not exist yet; returns once the broker serves all of them.

    An existing topic is not changed; if its partitions differ from the declaration, the note says so.

    Raises:
        ProvisioningError: the broker rejected a topic, or does not serve it within `VISIBLE_TIMEOUT_S`.
    """
    declared = tuple(specs)
    admin = AIOKafkaAdminClient(**kafka.client_options())
    await admin.start()
    try:
        response = await admin.create_topics(
            [
                NewTopic(
                    name=kafka.topic(spec),
                    num_partitions=spec.partitions,
                    replication_factor=replication_factor,
                    topic_configs=spec.configuration(),
                )
                for spec in declared
            ]
        )
        existing: set[str] = set()
        for topic, code, message in response.topic_errors:
            error = for_code(code)
            if error is TopicAlreadyExistsError:
                existing.add(topic)
            elif code != 0:
                raise ProvisioningError(f"topic {topic}: {error.__name__}: {message or error.description}")
        found = await _wait_until_served(admin, sorted(kafka.topic(spec) for spec in declared))
    finally:
        await admin.close()
    return [
        _outcome(kafka.topic(spec), spec, found[kafka.topic(spec)], created=kafka.topic(spec) not in existing)
        for spec in declared
    ]


async def _wait_until_served(admin: AIOKafkaAdminClient, topics: list[str]) -> dict[str, int]:
    """Number of partitions by topic, once the broker serves all topics: the controller knows them a little earlier."""
    try:
        async with asyncio.timeout(VISIBLE_TIMEOUT_S):
            while True:
                answers = {entry["topic"]: entry for entry in await admin.describe_topics(topics)}
                missing = [name for name in topics if not answers.get(name, {}).get("partitions")]
                if not missing:
                    return {name: len(answers[name]["partitions"]) for name in topics}
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise ProvisioningError(
            f"the broker does not serve topics {', '.join(missing)} {VISIBLE_TIMEOUT_S:.0f} s after they were created"
        ) from None


def _outcome(topic: str, spec: TopicSpec, partitions: int, *, created: bool) -> Provisioned:
    note = "" if partitions == spec.partitions else f"declared with {spec.partitions} partitions"
    return Provisioned(topic, created=created, partitions=partitions, note=note)
