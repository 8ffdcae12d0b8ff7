"""The watermark: the time up to which every published call is in PostgreSQL."""

from datetime import UTC, datetime, timedelta

from aiokafka import TopicPartition

from services.ledger.ingest import Watermark

A, B = TopicPartition("responses", 0), TopicPartition("usage", 0)
START = datetime(2024, 2, 1, tzinfo=UTC)


def at(seconds: int) -> datetime:
    return START + timedelta(seconds=seconds)


def test_the_watermark_is_unknown_until_all_records_of_some_time_are_committed():
    watermark = Watermark()
    watermark.observe(at(0), {A: 5, B: 1}, {A: 5})
    assert watermark.time is None
    watermark.observe(at(1), {A: 5, B: 1}, {A: 5, B: 1})
    assert watermark.time == at(1)


def test_under_steady_traffic_the_watermark_follows_earlier_end_offsets():
    watermark = Watermark()
    watermark.observe(at(0), {A: 10}, {A: 8})
    watermark.observe(at(1), {A: 20}, {A: 15})
    assert watermark.time == at(0)
    watermark.observe(at(2), {A: 30}, {A: 25})
    assert watermark.time == at(1)


def test_the_watermark_stands_still_while_nothing_is_committed():
    watermark = Watermark()
    watermark.observe(at(0), {A: 10}, {A: 10})
    for second in range(1, 5):
        watermark.observe(at(second), {A: 10 + second}, {A: 10})
    assert watermark.time == at(0)
    watermark.observe(at(5), {A: 20}, {A: 11})
    assert watermark.time == at(1)
