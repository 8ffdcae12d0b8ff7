"""Curves are published when they change and every hour, and again after a failure."""

from datetime import UTC, datetime, timedelta

import pytest
from aiokafka.errors import KafkaConnectionError
from structlog.testing import capture_logs

from services.ledger.outbox import CurvePublisher
from shared.messages import EndpointCurve

START = datetime(2024, 2, 1, tzinfo=UTC)


class MemoryTopic:
    """A publisher that keeps what is published."""

    def __init__(self) -> None:
        self.messages: list[EndpointCurve] = []
        self.available = True

    async def publish(self, message: EndpointCurve, /, *, key: bytes, **_: object) -> None:
        if not self.available:
            raise KafkaConnectionError
        assert key == message.endpoint.encode()
        self.messages.append(message)


def curve(minute: float, *, endpoint: str = "e0", step_j: float = 4.0, reason: str = "") -> EndpointCurve:
    return EndpointCurve(
        endpoint=endpoint, pool="p", at=START + timedelta(minutes=minute), idle_w=100, step_j=step_j, token_j=0.08,
        step_s=0.012, token_s=0.0001, identifiable=not reason, reason=reason, intervals=100, mean_batch=9,
    )  # fmt: skip


@pytest.fixture
def topic() -> MemoryTopic:
    return MemoryTopic()


@pytest.fixture
def publisher(topic: MemoryTopic) -> CurvePublisher:
    return CurvePublisher(topic)


async def test_a_curve_is_published_when_it_has_changed_or_after_an_hour(publisher, topic):
    for one in (
        curve(0),
        curve(10, step_j=4.05),
        curve(20, step_j=4.2),
        curve(70, step_j=4.2),
        curve(80, step_j=4.2),
    ):
        await publisher.publish([one])
    assert [(one.at - START).total_seconds() / 60 for one in topic.messages] == [0, 20, 80]


async def test_while_a_curve_is_not_identifiable_its_numbers_are_no_news(publisher, topic):
    for one in (
        curve(0, reason="too few intervals: 3 of 30"),
        curve(10, step_j=9.0, reason="too few intervals: 4 of 30"),
        curve(20),
        curve(30, reason="no idle time was seen"),
    ):
        await publisher.publish([one])
    assert [one.reason for one in topic.messages] == ["too few intervals: 3 of 30", "", "no idle time was seen"]


async def test_each_endpoint_has_its_own_curve_and_what_kafka_did_not_take_is_sent_again(publisher, topic):
    topic.available = False
    with capture_logs() as logs:
        await publisher.publish([curve(0), curve(0, endpoint="e1")])
    assert [one["event"] for one in logs] == ["could not publish a curve; retrying later"]
    topic.available = True
    await publisher.publish([curve(1), curve(1, endpoint="e1")])
    await publisher.publish([curve(2), curve(2, endpoint="e1")])
    assert [one.endpoint for one in topic.messages] == ["e0", "e1"]
