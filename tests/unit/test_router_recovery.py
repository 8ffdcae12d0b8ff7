"""What is found out about a partition that is taken over."""

from types import SimpleNamespace

import pytest
from aiokafka import TopicPartition
from aiokafka.structs import OffsetAndMetadata

from services.router.offsets import Commit
from services.router.recovery import SOURCE_HEADER, Source, answered, commit_of, stored

PARTITION = TopicPartition("requests", 3)


def message(*headers: tuple[str, bytes | None]) -> SimpleNamespace:
    return SimpleNamespace(headers=headers)


def test_a_commit_is_read_as_it_was_stored():
    commit = Commit(7, 1_700_000_000_000)
    assert commit_of(stored({PARTITION: commit})[PARTITION]) == commit


@pytest.mark.parametrize("metadata", ["", None, "since-ms=", "since-ms=soon", "another tool's"])
def test_a_commit_of_another_hand_says_nothing_of_answers(metadata):
    assert commit_of(OffsetAndMetadata(7, metadata)) is None


def test_a_record_is_read_as_it_was_named():
    record = SimpleNamespace(partition=3, offset=7, timestamp=1_700_000_000_000)
    assert Source.parse(str(Source.of(record)).encode()) == Source(3, 7, 1_700_000_000_000)


@pytest.mark.parametrize("header", [b"", b"1:2", b"1:2:x", b"1:2:3:4", b"\xff:1:2"])
def test_what_names_no_record_is_passed_over(header):
    found: dict[int, dict[int, int]] = {}
    answered([message((SOURCE_HEADER, header), (SOURCE_HEADER, None))], {1: Commit(0, 0)}, found)
    assert found == {}


def test_only_answers_at_or_beyond_the_commit_of_a_partition_taken_over_count():
    found: dict[int, dict[int, int]] = {}
    messages = [message(("traceparent", b"00"), (SOURCE_HEADER, str(Source(*place)).encode()))
                for place in ((3, 6, 60), (3, 7, 70), (3, 9, 90), (4, 9, 90))]  # fmt: skip
    answered(messages, {3: Commit(7, 0)}, found)
    assert found == {3: {7: 70, 9: 90}}
