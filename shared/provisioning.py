"""Creates the topics that `shared.topics` declares; idempotent, and says what differs."""

from collections.abc import Iterable
from dataclasses import dataclass

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import TopicAlreadyExistsError, for_code

from shared.settings import KafkaSettings
from shared.topics import TOPICS, TopicSpec


class ProvisioningError(RuntimeError):
    """The broker refused a topic; the message names it and the reason."""


@dataclass(frozen=True, slots=True)
class Provisioned:
    """What happened to one topic."""

    topic: str
    created: bool
    partitions: int
    note: str = ""


async def create_topics(
    kafka: KafkaSettings, *, replication_factor: int = 1, specs: Iterable[TopicSpec] = TOPICS
) -> list[Provisioned]:
    """Create every declared topic that does not exist yet.

    An existing topic is left as it is; where its partitions differ from the declaration, the note says so.

    Raises:
        ProvisioningError: the broker refused a topic.
    """
    declared = tuple(specs)
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers)
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
        found = (
            {entry["topic"]: len(entry["partitions"]) for entry in await admin.describe_topics(sorted(existing))}
            if existing
            else {}
        )
    finally:
        await admin.close()
    return [_outcome(kafka.topic(spec), spec, found.get(kafka.topic(spec))) for spec in declared]


def _outcome(topic: str, spec: TopicSpec, found_partitions: int | None) -> Provisioned:
    if found_partitions is None:
        return Provisioned(topic, created=True, partitions=spec.partitions)
    note = "" if found_partitions == spec.partitions else f"declared with {spec.partitions} partitions"
    return Provisioned(topic, created=False, partitions=found_partitions, note=note)
