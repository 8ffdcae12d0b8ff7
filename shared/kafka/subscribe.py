"""Every way in which a service subscribes to a topic, and reading compacted topics to their end."""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Annotated, Any, Literal, Protocol

from aiokafka import ConsumerRebalanceListener
from aiokafka.errors import KafkaError
from faststream.kafka import KafkaBroker, KafkaMessage, TopicPartition
from faststream.middlewares import AckPolicy
from pydantic import SkipValidation

from shared.kafka.broker import ServiceBroker, note_read, unreadable_records
from shared.kafka.careful import CarefulBatches
from shared.kafka.dead_letters import DeadLetterPublisher
from shared.kafka.handling import decode_records, handle_batch, message_decoder, raw_records
from shared.kafka.unreadable import PassBy
from shared.kafka.workarounds import parse_any_headers
from shared.runtime.settings import KafkaSettings
from shared.topics import TopicSpec

POLL_MS = 100
"""Wall milliseconds that FastStream waits for records, and then sleeps if there are none."""

STATE_POLL_MS = 250
"""The same for compacted topics, whose messages are rare: a router reads five of them beside its requests."""

MAX_RECORDS = 500
"""Records that a consumer without a group receives at once: a batch of 1 MB may hold millions."""

HANDLING_S = 0.05
"""Wall seconds allowed for handling the messages that were read last."""

FROM_START = "From its beginning at every start, then whatever is published; by every copy of the service."
NEWEST = "Only what is published after the start; by every copy of the service."
ONE_PARTITION = "One partition, which the copy of the service claims at its start, from its present end on."
BY_GROUP = "Each message by one copy of the service, at least once; a new consumer group begins with the oldest."
INSPECTED = "Before the start a child process reads the same records, to find those that take too much memory."
"""How a topic is read; see `shared.kafka.broker.Read`."""


class Subscriber(Protocol):
    """The part of a FastStream subscriber that services use: a decorator of the handler, with its consumer."""

    @property
    def consumer(self) -> Any:  # noqa: ANN401 - aiokafka has no types
        """The aiokafka consumer; `None` before the broker has started."""

    def __call__(self, handler: Callable[..., Any], /) -> Any:  # noqa: ANN401
        """Register the handler."""


class BatchSubscriber:
    """A subscriber whose handler receives the messages of a batch, and one at a time after it failed."""

    def __init__(
        self,
        subscriber: Subscriber,
        dead_letters: DeadLetterPublisher,
        spec: TopicSpec,
        pass_by: PassBy,
        careful: CarefulBatches | None = None,
    ) -> None:
        self._subscriber = subscriber
        self._dead_letters = dead_letters
        self._spec = spec
        self._pass_by = pass_by
        self._careful = careful

    @property
    def consumer(self) -> Any:  # noqa: ANN401 - aiokafka has no types
        """The aiokafka consumer; `None` before the broker has started."""
        return self._subscriber.consumer

    def __call__(self, handler: Callable[[list[Any]], Awaitable[Any]], /) -> Any:  # noqa: ANN401
        """Register the handler."""

        async def parse_and_handle(records: Sequence[Any]) -> None:
            await handle_batch(
                await decode_records(self._spec, records, self._dead_letters), handler, self._dead_letters
            )

        handle = parse_and_handle
        if self._careful is not None:
            self._careful.attach(lambda: self._subscriber.consumer, parse_and_handle)
            handle = self._careful.handle
        self._pass_by.attach(lambda: self._subscriber.consumer, handle)

        async def on_batch(records: Annotated[list[Any], SkipValidation]) -> None:
            await handle(records)

        return self._subscriber(on_batch)


def subscribe_compacted(
    broker: KafkaBroker,
    kafka: KafkaSettings,
    dead_letters: DeadLetterPublisher,
    spec: TopicSpec,
    *,
    before: str | None = None,
) -> Subscriber:
    """A subscriber that reads a compacted topic, or a small one, from its beginning at each start; stores no offset.

    It belongs to no consumer group: every process reads every message. The handler receives a list of messages. What it
    failed to process is read again at the next start.

    Args:
        before: what the service does only after it has read the topic to its end, for the AsyncAPI document.
    """
    return _subscribe_ungrouped(
        broker,
        kafka,
        dead_letters,
        spec,
        auto_offset_reset="earliest",
        poll_ms=STATE_POLL_MS,
        how=f"{FROM_START} {INSPECTED}" + ("" if before is None else f" It is read to its end before {before}."),
    )


def subscribe_newest(
    broker: KafkaBroker, kafka: KafkaSettings, dead_letters: DeadLetterPublisher, spec: TopicSpec
) -> Subscriber:
    """A subscriber that reads only what is published after it started, and stores no offset.

    It belongs to no consumer group: every process reads every message. The handler receives a list of messages.
    """
    return _subscribe_ungrouped(
        broker, kafka, dead_letters, spec, auto_offset_reset="latest", poll_ms=POLL_MS, how=NEWEST
    )


def subscribe_partition(
    broker: KafkaBroker, kafka: KafkaSettings, dead_letters: DeadLetterPublisher, spec: TopicSpec, *, poll_ms: int
) -> Subscriber:
    """A subscriber that reads what is published to one partition after it started, and stores no offset.

    It reads partition 0 until its `consumer` is assigned another one. The handler receives a list of messages.

    Args:
        poll_ms: wall milliseconds that the consumer waits for messages.
    """
    subscriber = _subscribe(
        broker,
        kafka,
        spec,
        how=ONE_PARTITION,
        partitions=[TopicPartition(kafka.topic(spec), 0)],
        decoder=raw_records,
        batch=True,
        batch_timeout_ms=poll_ms,
        max_records=MAX_RECORDS,
        auto_offset_reset="latest",
        ack_policy=AckPolicy.ACK_FIRST,
    )
    pass_by = PassBy(unreadable_records(broker, kafka), dead_letters, commits=False)
    return BatchSubscriber(subscriber, dead_letters, spec, pass_by)


def _subscribe_ungrouped(
    broker: KafkaBroker,
    kafka: KafkaSettings,
    dead_letters: DeadLetterPublisher,
    spec: TopicSpec,
    *,
    auto_offset_reset: Literal["earliest", "latest"],
    poll_ms: int,
    how: str,
) -> Subscriber:
    unreadable = unreadable_records(broker, kafka)
    pass_by = PassBy(unreadable, dead_letters, commits=False)
    if auto_offset_reset == "earliest":
        unreadable.watch(kafka.topic(spec), group=None)
        unreadable.add_ungrouped(pass_by)
    subscriber = _subscribe(
        broker,
        kafka,
        spec,
        decoder=raw_records,
        batch=True,
        batch_timeout_ms=poll_ms,
        max_records=MAX_RECORDS,
        auto_offset_reset=auto_offset_reset,
        how=how,
        ack_policy=AckPolicy.ACK_FIRST,
    )
    return BatchSubscriber(subscriber, dead_letters, spec, pass_by)


def subscribe_batches(
    broker: KafkaBroker,
    kafka: KafkaSettings,
    dead_letters: DeadLetterPublisher,
    spec: TopicSpec,
    *,
    group: str,
    max_records: int,
    poll_ms: int = POLL_MS,
    **consumer_options: Any,  # noqa: ANN401
) -> Subscriber:
    """A subscriber of a consumer group; the handler receives a list of messages.

    A handler that raises `RetryLaterError` gets the same batch again. After another error it gets the messages one at a
    time, and those that fail become dead letters.

    Args:
        group: of `kafka.group(...)`, without the prefix.
        max_records: of one batch.
        poll_ms: wall milliseconds that the consumer waits for messages.
        consumer_options: further options of `KafkaBroker.subscriber`.
    """
    unreadable = unreadable_records(broker, kafka)
    pass_by = PassBy(unreadable, dead_letters, commits=True)
    unreadable.watch(kafka.topic(spec), group=kafka.group(group))
    careful = CarefulBatches(kafka, dead_letters, group=kafka.group(group), max_records=max_records, listener=pass_by)
    if isinstance(broker, ServiceBroker):
        broker.careful.append(careful)
    subscriber = _subscribe(
        broker,
        kafka,
        spec,
        decoder=raw_records,
        batch=True,
        batch_timeout_ms=poll_ms,
        max_records=max_records,
        how=f"{BY_GROUP} {INSPECTED}",
        group=group,
        auto_offset_reset="earliest",
        ack_policy=AckPolicy.NACK_ON_ERROR,
        listener=careful,
        **consumer_options,
    )
    return BatchSubscriber(subscriber, dead_letters, spec, pass_by, careful)


def subscribe_messages(broker: KafkaBroker, kafka: KafkaSettings, spec: TopicSpec, *, group: str) -> Subscriber:
    """A subscriber of a consumer group; the handler receives one message at a time.

    A handler that raises `RetryLaterError` gets the message again; another error makes it a dead letter.
    """
    return _subscribe(
        broker,
        kafka,
        spec,
        decoder=message_decoder(spec),
        how=BY_GROUP,
        group=group,
        auto_offset_reset="earliest",
        ack_policy=AckPolicy.NACK_ON_ERROR,
    )


def subscribe_records(
    broker: KafkaBroker,
    kafka: KafkaSettings,
    *specs: TopicSpec,
    group: str,
    max_records: int,
    poll_ms: int = POLL_MS,
    **consumer_options: Any,  # noqa: ANN401
) -> Subscriber:
    """A subscriber of a consumer group that commits nothing: the service parses the records and commits offsets itself.

    The handler takes a `KafkaMessage`, whose `raw_message` is a tuple of aiokafka records. The service itself passes
    unreadable records by, see `unreadable_records`.
    """
    for spec in specs:
        unreadable_records(broker, kafka).watch(kafka.topic(spec), group=kafka.group(group))
    return _subscribe(
        broker,
        kafka,
        *specs,
        batch=True,
        batch_timeout_ms=poll_ms,
        max_records=max_records,
        how=f"{BY_GROUP} {INSPECTED}",
        group=group,
        auto_offset_reset="earliest",
        ack_policy=AckPolicy.MANUAL,
        **consumer_options,
    )


def join_group(
    broker: KafkaBroker,
    kafka: KafkaSettings,
    spec: TopicSpec,
    *,
    group: str,
    listener: ConsumerRebalanceListener,
    **consumer_options: Any,  # noqa: ANN401
) -> Subscriber:
    """A member of a consumer group for which only the assignment of partitions matters: it processes no records.

    Args:
        listener: is notified of the assignment, and must pause the partitions, so that nothing is fetched.
    """

    async def without_content(records: Any) -> KafkaMessage:  # noqa: ANN401 - aiokafka has no types
        return KafkaMessage(records, b"", consumer=subscriber.consumer, correlation_id=group)

    async def nothing(message: KafkaMessage) -> None:  # noqa: ARG001
        return

    subscriber = _subscribe(
        broker,
        kafka,
        spec,
        batch=True,
        batch_timeout_ms=POLL_MS,
        max_records=1,
        how=None,
        group=group,
        auto_offset_reset="latest",
        ack_policy=AckPolicy.MANUAL,
        parser=without_content,
        decoder=nothing,
        listener=listener,
        **consumer_options,
    )

    @subscriber
    async def ignore(nothing: Annotated[object, SkipValidation]) -> None:  # noqa: ARG001
        return

    return subscriber


def _subscribe(
    broker: KafkaBroker,
    kafka: KafkaSettings,
    *specs: TopicSpec,
    how: str | None,
    group: str | None = None,
    partitions: Sequence[TopicPartition] = (),
    **options: Any,  # noqa: ANN401
) -> Subscriber:
    """Subscribe, the one place where that is done.

    Args:
        how: the topics are read, see `shared.kafka.broker.Read`; None: no record of them is.
        group: without its prefix; None: no consumer group.
        partitions: to read instead of all of the topics.
        options: further options of `KafkaBroker.subscriber`.
    """
    group_id = None if group is None else kafka.group(group)
    for spec in specs:
        if how is not None:
            note_read(broker, spec, how, group=group_id)
    subscriber: Subscriber = broker.subscriber(
        *(() if partitions else map(kafka.topic, specs)),
        partitions=partitions,
        group_id=group_id,
        # Otherwise FastStream sends a handler's result to the topic that a record's header `reply_to` names.
        no_reply=True,
        # `sprout asyncapi` describes the reads from what was noted: FastStream's document has no consumer groups, and
        # one operation for all reads of a topic.
        include_in_schema=False,
        **{"parser": parse_any_headers, **options},
    )
    return subscriber


async def read_to_end(subscribers: Collection[Subscriber], *, within_s: float) -> bool:
    """Wait until compacted topics have been read up to their present end.

    Returns:
        Whether that was done within `within_s` (wall).
    """
    try:
        async with asyncio.timeout(within_s):
            for subscriber in subscribers:
                while not await _is_at_end(subscriber.consumer):  # noqa: ASYNC110 - a position has no event
                    await asyncio.sleep(HANDLING_S)
            await asyncio.sleep(HANDLING_S)
    except TimeoutError:
        return False
    return True


async def _is_at_end(consumer: Any) -> bool:  # noqa: ANN401 - aiokafka has no types
    """Whether a consumer without a group has received every message that its topic held a moment ago."""
    if consumer is None:
        return False
    try:
        partitions = consumer.assignment()
        ends = await consumer.end_offsets(partitions) if partitions else {}
        return bool(ends) and all([await consumer.position(one) >= end for one, end in ends.items()])
    except KafkaError:
        return False
