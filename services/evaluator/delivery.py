"""Publishes what the evaluator spends and finds, for as long as it takes."""

from faststream.kafka import KafkaBroker

from shared.kafka.publish import publish_with_retry
from shared.messages import PromptGrouping, Quality, UsageRecord
from shared.runtime.settings import KafkaSettings
from shared.topics import PROMPT_GROUPS, QUALITY, USAGE


class Delivery:
    """The evaluator's publishers. Every method returns once Kafka has the message."""

    def __init__(self, broker: KafkaBroker, *, kafka: KafkaSettings) -> None:
        self._usage = broker.publisher(
            kafka.topic(USAGE), description="Every call of an evaluation on a model server", schema=UsageRecord
        )
        self._quality = broker.publisher(
            kafka.topic(QUALITY), description="The outcome of an evaluation", schema=Quality
        )
        self._groupings = broker.publisher(
            kafka.topic(PROMPT_GROUPS), description="Prompt groups learned from judged prompts", schema=PromptGrouping
        )

    async def usage(self, record: UsageRecord) -> None:
        """Publish a finished call."""
        await publish_with_retry(lambda: self._usage.publish(record, key=record.id.encode()))

    async def quality(self, quality: Quality) -> None:
        """Publish an evaluation's outcome."""
        await publish_with_retry(lambda: self._quality.publish(quality, key=quality.model.encode()))

    async def grouping(self, grouping: PromptGrouping) -> None:
        """Publish a version of prompt groups."""
        await publish_with_retry(lambda: self._groupings.publish(grouping, key=grouping.model.encode()))
