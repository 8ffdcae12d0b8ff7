"""What recovery reads: commits with a time, and the records that messages were published for."""

import re
from types import SimpleNamespace

import pytest
from aiokafka import TopicPartition
from aiokafka.structs import OffsetAndMetadata

from services.router.offsets import Commit
from services.router.recovery import Source, collect_answered, from_kafka, to_kafka
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


@pytest.mark.parametrize(
    ("lane", "header"), [("requests", "3:7:1700000000000"), ("requests-batch", "requests-batch:3:7:1700000000000")]
)
def test_a_source_round_trips(lane, header):
    record = SimpleNamespace(partition=3, offset=7, timestamp=1_700_000_000_000)
    source = Source.of(record, lane)
    assert str(source) == header
    assert Source.parse(header.encode()) == source == Source(lane, 3, 7, 1_700_000_000_000)
    assert re.search(SOURCE_HEADERS[SOURCE_HEADER].pattern, header)


@pytest.mark.parametrize("header", [b"", b"1:2", b"1:2:x", b"x:1:2:3:4", b"\xff:1:2"])
def test_headers_in_another_format_are_ignored(header):
    found: dict[tuple[str, int], dict[int, int]] = {}
    collect_answered([message((SOURCE_HEADER, header), (SOURCE_HEADER, None))], {("requests", 1): Commit(0, 0)}, found)
    assert found == {}


def test_only_responses_to_records_at_or_beyond_the_commit_count():
    found: dict[tuple[str, int], dict[int, int]] = {}
    places = (("requests", 3, 6, 60), ("requests", 3, 7, 70), ("requests", 3, 9, 90), ("requests", 4, 9, 90),
              ("batch", 3, 8, 80), ("other", 3, 8, 80))  # fmt: skip
    messages = [message(("traceparent", b"00"), (SOURCE_HEADER, str(Source(*place)).encode())) for place in places]
    collect_answered(messages, {("requests", 3): Commit(7, 0), ("batch", 3): Commit(8, 0)}, found)
    assert found == {("requests", 3): {7: 70, 9: 90}, ("batch", 3): {8: 80}}
