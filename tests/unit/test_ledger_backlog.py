"""Books are closed only up to the instant by which every published call has been read."""

from datetime import UTC, datetime, timedelta

from aiokafka import TopicPartition

from services.ledger.backlog import CaughtUp

A, B = TopicPartition("responses", 0), TopicPartition("usage", 0)
START = datetime(2024, 2, 1, tzinfo=UTC)


def at(seconds: int) -> datetime:
    return START + timedelta(seconds=seconds)


def test_nothing_is_known_before_everything_was_read_once():
    seen = CaughtUp()
    seen.observe(at(0), {A: 5, B: 1}, {A: 5})
    assert seen.until is None
    seen.observe(at(1), {A: 5, B: 1}, {A: 5, B: 1})
    assert seen.until == at(1)


def test_under_steady_traffic_it_follows_where_the_topics_ended_earlier():
    seen = CaughtUp()
    seen.observe(at(0), {A: 10}, {A: 8})
    seen.observe(at(1), {A: 20}, {A: 15})
    assert seen.until == at(0)
    seen.observe(at(2), {A: 30}, {A: 25})
    assert seen.until == at(1)


def test_it_stands_still_while_nobody_reads():
    seen = CaughtUp()
    seen.observe(at(0), {A: 10}, {A: 10})
    for second in range(1, 5):
        seen.observe(at(second), {A: 10 + second}, {A: 10})
    assert seen.until == at(0)
    seen.observe(at(5), {A: 20}, {A: 11})
    assert seen.until == at(1)
