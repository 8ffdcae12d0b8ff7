"""Workarounds for small faults of aiokafka (0.14.0) and FastStream (0.7.8). docs/architecture.md lists all of them.

For each fault `tests/integration/test_library_faults.py` has a test that fails when the library has mended it.
"""

import asyncio
import base64
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from aiokafka import ConsumerRecord, OffsetAndMetadata, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import GroupCoordinatorNotAvailableError

if TYPE_CHECKING:  # a child process of every starting service imports this module
    from faststream.kafka import KafkaMessage

UNKNOWN_PARTITION: Final = AssertionError
"""What aiokafka raises, in place of a `KafkaError`, for a message to a partition that its topic does not have."""


async def read_commits(
    admin: AIOKafkaAdminClient, group: str, partitions: Collection[TopicPartition]
) -> dict[TopicPartition, OffsetAndMetadata]:
    """The last commits of a consumer group, without partitions that have none.

    While the coordinator of a group is loading, for example after a restart of Kafka, its whole answer is an error
    without partitions. aiokafka looks at errors of single partitions only, and so returns no commits: without a check
    the group would begin again at the first record.

    Raises:
        GroupCoordinatorNotAvailableError: there is no coordinator, or the answer lacks partitions.
        KafkaError: Kafka could not be read.
    """
    stored: dict[TopicPartition, OffsetAndMetadata] = await admin.list_consumer_group_offsets(
        group, partitions=list(partitions)
    )
    if not stored.keys() >= set(partitions):
        raise GroupCoordinatorNotAvailableError("the coordinator has not reported the commits of all partitions")
    return {partition: one for partition, one in stored.items() if one.offset >= 0}


async def until_assigned(checks: Collection[Callable[[], bool]]) -> None:
    """Make each of the checks until it returns true: that a consumer without a group has its partitions.

    aiokafka calls the rebalance listener of consumers with a group only. So the checks are made in every turn of the
    event loop while the broker starts: a consumer receives nothing in the turn in which it is assigned its partitions.
    """
    while checks := [check for check in checks if not check()]:  # noqa: ASYNC110 - there is no event
        await asyncio.sleep(0)


async def parse_any_headers(
    raw: Any,  # noqa: ANN401 - a record or a batch of records
    parse_text: Callable[[Any], Awaitable["KafkaMessage"]],
) -> "KafkaMessage":
    """A FastStream parser for records with binary header values, at which FastStream's own parser fails.

    The handler sees such values in base64; the raw message, from which a dead letter is made, keeps them as they are.
    Reported: https://github.com/ag2ai/faststream/issues/2458.
    """
    is_batch = isinstance(raw, (tuple, list))
    records: Sequence[ConsumerRecord[bytes, bytes]] = raw if is_batch else (raw,)
    if all(_is_text(content) for record in records for _, content in record.headers):
        return await parse_text(raw)
    encoded = tuple(map(_with_text_headers, records))
    message = await parse_text(encoded if is_batch else encoded[0])
    message.raw_message = raw
    return message


def _with_text_headers(record: "ConsumerRecord[bytes, bytes]") -> "ConsumerRecord[bytes, bytes]":
    headers = tuple(
        (name, content if _is_text(content) else base64.b64encode(content or b"")) for name, content in record.headers
    )
    return replace(record, headers=headers)


def _is_text(content: bytes | None) -> bool:
    if content is None:
        return False
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True
