"""What recovery reads: commits with a time, and the records that messages were published for."""

from types import SimpleNamespace

import pytest
from aiokafka import TopicPartition
from aiokafka.structs import OffsetAndMetadata

from services.router.offsets import Commit
from services.router.recovery import SOURCE_HEADER, Source, collect_answered, from_kafka, to_kafka

PARTITION = TopicPartition("requests", 3)


def message(*headers: tuple[str, bytes | None]) -> SimpleNamespace:
    return SimpleNamespace(headers=headers)


def test_a_commit_round_trips():
    commit = Commit(7, 1_700_000_000_000)
    assert from_kafka(to_kafka({PARTITION: commit})[PARTITION]) == commit


@pytest.mark.parametrize("metadata", ["", None, "since-ms=", "since-ms=soon", "another tool's"])
def test_a_commit_that_no_router_made_has_no_time(metadata):
    assert from_kafka(OffsetAndMetadata(7, metadata)) is None


def test_a_source_round_trips():
    record = SimpleNamespace(partition=3, offset=7, timestamp=1_700_000_000_000)
    assert Source.parse(str(Source.of(record)).encode()) == Source(3, 7, 1_700_000_000_000)


@pytest.mark.parametrize("header", [b"", b"1:2", b"1:2:x", b"1:2:3:4", b"\xff:1:2"])
def test_headers_in_another_format_are_ignored(header):
    found: dict[int, dict[int, int]] = {}
    collect_answered([message((SOURCE_HEADER, header), (SOURCE_HEADER, None))], {1: Commit(0, 0)}, found)
    assert found == {}


def test_only_responses_to_records_at_or_beyond_the_commit_count():
    found: dict[int, dict[int, int]] = {}
    messages = [message(("traceparent", b"00"), (SOURCE_HEADER, str(Source(*place)).encode()))
                for place in ((3, 6, 60), (3, 7, 70), (3, 9, 90), (4, 9, 90))]  # fmt: skip
    collect_answered(messages, {3: Commit(7, 0)}, found)
    assert found == {3: {7: 70, 9: 90}}
