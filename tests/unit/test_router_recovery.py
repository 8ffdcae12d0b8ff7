"""What recovery reads: commits with a time, and the records that messages were published for."""

import re
from types import SimpleNamespace

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import GroupCoordinatorNotAvailableError
from aiokafka.structs import OffsetAndMetadata

from services.router.offsets import Commit
from services.router.recovery import collect_answered, from_kafka, to_kafka
from shared.kafka.records import RecordId
from shared.kafka.workarounds import read_commits
from shared.topics import SOURCE_HEADER, SOURCE_HEADERS

PARTITION = TopicPartition("requests", 3)


def message(*headers: tuple[str, bytes | None]) -> SimpleNamespace:
    return SimpleNamespace(headers=headers)


def test_a_commit_round_trips():
    commit = Commit(7, 1_700_000_000_000)
    assert from_kafka(to_kafka({PARTITION: commit})[PARTITION]) == commit


@pytest.mark.parametrize("metadata", ["", None, "since-ms=", "since-ms=soon", "another tool's"])
def test_a_commit_that_no_router_made_has_no_time(metadata):
    assert from_kafka(OffsetAndMetadata(7, metadata)) is None


async def test_an_answer_that_lacks_partitions_is_an_error_and_not_a_group_without_commits():
    other = TopicPartition("requests", 4)
    stored = {PARTITION: OffsetAndMetadata(7, ""), other: OffsetAndMetadata(-1, "")}

    def admin(answer):
        async def answer_with(group, *, partitions):
            assert (group, partitions) == ("g", [PARTITION, other])
            return answer

        return SimpleNamespace(list_consumer_group_offsets=answer_with)

    found = await read_commits(admin(stored), "g", [PARTITION, other])
    assert found == {PARTITION: OffsetAndMetadata(7, "")}
    for answer in ({}, {other: stored[other]}):
        with pytest.raises(GroupCoordinatorNotAvailableError):
            await read_commits(admin(answer), "g", [PARTITION, other])


@pytest.mark.parametrize(
    ("topic", "header", "text"),
    [
        ("requests", "3:7:-1", "requests/3/7/-1"),  # as earlier routers write and read it
        ("requests-batch", "requests-batch:3:7:-1", "requests-batch/3/7/-1"),
    ],
)
def test_the_identity_of_a_record_round_trips(topic, header, text):
    record = SimpleNamespace(topic=f"sprout.{topic}", partition=3, offset=7, timestamp=-1)
    identity = RecordId.of(record, "sprout.")
    assert (identity.header, str(identity)) == (header, text)
    assert RecordId.parse_header(header.encode()) == identity == RecordId(topic, 3, 7, -1)
    assert re.match(SOURCE_HEADERS[SOURCE_HEADER].pattern, header)


@pytest.mark.parametrize("header", [b"", b"1:2", b"1:2:x", b"requests:x:1:2:3", b"a:1:2:x", b"\xff:1:2"])
def test_headers_in_another_format_are_ignored(header):
    found: dict[tuple[str, int], dict[int, int]] = {}
    collect_answered([message((SOURCE_HEADER, header), (SOURCE_HEADER, None))], {("requests", 1): Commit(0, 0)}, found)
    assert found == {}


def test_only_responses_to_records_at_or_beyond_the_commit_count():
    found: dict[tuple[str, int], dict[int, int]] = {}
    messages = [message(("traceparent", b"00"), (SOURCE_HEADER, header))
                for header in (b"3:6:60", b"3:7:70", b"3:9:90", b"4:9:90", b"lane:3:9:91", b"new:3:9:9")]  # fmt: skip
    collect_answered(messages, {("requests", 3): Commit(7, 0), ("lane", 3): Commit(0, 0)}, found)
    assert found == {("requests", 3): {7: 70, 9: 90}, ("lane", 3): {9: 91}}
